"""One artefact, built by its target and checked in its engine or stand-in.

It is checked on the bytes that will be published.

The files are read back once; these bytes are loaded into the runtime's engine, run on the gate's frames and the golden
frames, and later written into the bundle. It does not know PyTorch or how a bundle is laid out.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinyusfm_export.graph.build import ExportGraph
from tinyusfm_export.graph.stages import split_graph
from tinyusfm_export.quantize.decision import QuantDecision, float_decision
from tinyusfm_export.targets import BuiltArtefact, Target
from tinyusfm_export.verify.confidence import confidence_drift
from tinyusfm_export.verify.engine_run import open_checker, run_engine, stand_in_of
from tinyusfm_export.verify.expected import Expected
from tinyusfm_export.verify.gate import Gate, judge
from tinyusfm_export.verify.golden import check_identical, find_tolerance
from tinyusfm_export.verify.parity import Output, ParityReport, compare_frame, summarise
from tinyusfm_runtime import plugins
from tinyusfm_runtime.device.machine import machine_card
from tinyusfm_runtime.early_exit import ChainEngine, is_chain, stage_file
from tinyusfm_runtime.engines import Engine, EngineConfig
from tinyusfm_runtime.errors import EngineError, MissingExtra, OutputError, UnsupportedError
from tinyusfm_runtime.spec import ModelSpec

if TYPE_CHECKING:
    from tinyusfm_export.graph.build import ExportGraph


def writes_chains(target: str) -> bool:
    """Whether the engine of a target runs the stages of a chain.

    Args:
        target: name or alias.
    """
    return bool(getattr(plugins.load("engines", plugins.canonical("targets", target)), "CHAINS", False))


def build_chain(target: Target, graph: ExportGraph, decision: QuantDecision, out: Path) -> BuiltArtefact:
    """Writes every stage and gives its files the names of a chain's.

    Args:
        target: writes one graph.
        graph: the whole network of an early-exit student.
        decision: the one of the whole network.
        out: an existing folder.

    Raises:
        UnsupportedError, MissingExtra, OutputError: as the target.
    """
    files: list[Path] = []
    built: BuiltArtefact | None = None
    for number, stage in enumerate(split_graph(graph), start=1):
        folder, mine = out / f"stage{number}", stage_decision(stage, decision)
        try:
            folder.mkdir()
            made = target.build(stage, mine, folder)
            files += [path.rename(out / stage_file(number, path.name)) for path in made.files]
        except OSError as error:
            raise OutputError(f"cannot write {out}: {error.strerror or error}") from error
        built = made if built is None or mine.precision == decision.precision else built
    assert built is not None
    return replace(built, files=tuple(files), form=f"{built.form}; chain of {number} graphs")


def stage_decision(stage: ExportGraph, decision: QuantDecision) -> QuantDecision:
    """The part of a decision that concerns a stage.

    A float one where none of its layers is int8.

    Args:
        stage: one graph of the chain.
        decision: of the whole network.
    """
    mine = {name: quant for name, quant in decision.tensors.items() if name in stage.linear_inputs}
    if decision.precision == "int8" and all(quant.mode == "float" for quant in mine.values()):
        return float_decision("fp32")
    return replace(decision, tensors=mine)


DEFINITION_FRAMES = 2
"""Golden frames on which an exact engine is also compared with its slow definition."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Checks:
    """What every artefact of an export is put through.

    Attributes:
        gate: thresholds.
        frames: the gate's frames with the reference's answers.
        golden: the golden frames with the reference's answers.
        threads: threads inside the engine.
    """

    gate: Gate
    frames: Expected
    golden: Expected
    threads: int


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckedArtefact:
    """An artefact and what its own engine made of the frames.

    Attributes:
        target: file stem of target and engine, such as ``ov``.
        decision: what was built.
        files: file name -> content.
        form: how the decision was written.
        rest_precision: arithmetic of what is not int8.
        requirements: what the machine must have, plain data.
        report: judged on the gate's frames.
        confidence: how far its probabilities moved, see confidence.py.
        broken: True if any answer held NaN or infinity.
        golden: its answers to the golden frames.
        tolerance: how far a later run may lie from them; empty if none was asked for, or none is allowed.
        sector: name of the sector it was pruned to, or empty.
    """

    target: str
    decision: QuantDecision
    files: Mapping[str, bytes]
    form: str
    rest_precision: str
    requirements: Mapping[str, Any]
    report: ParityReport
    confidence: Mapping[str, float]
    broken: bool
    golden: tuple[Output, ...]
    tolerance: Mapping[str, float]
    sector: str = ""

    @property
    def public_target(self) -> str:
        """The name people type."""
        return plugins.public_name(self.target)

    @property
    def name(self) -> str:
        """Such as ``openvino-int8``."""
        return f"{self.public_target}-{self.decision.precision}{'-sector' if self.sector else ''}"

    @property
    def exact(self) -> bool:
        """Whether its engine gives the same bytes on every CPU.

        Later runs then have to be equal.
        """
        return is_exact(self.target)

    @property
    def pending(self) -> str:
        """What has still to complete the gate.

        Empty where the artefact ran in its own engine.
        """
        return str(self.requirements.get("pending", ""))

    @property
    def size_bytes(self) -> int:
        """All files together."""
        return sum(len(content) for content in self.files.values())


def load_target(typed: str) -> Any:
    """Finds a target that works here.

    Args:
        typed: a target's name or alias.

    Returns:
        Its ``Target``, made.

    Raises:
        InputError: no such target.
        MissingExtra: its library is not installed.
        UnsupportedError: it does not work here.
    """
    name = plugins.canonical("targets", typed)
    found = plugins.available("targets", name)
    if found.usable:
        return plugins.load("targets", name).Target()
    if found.extra and found.reason.endswith("is not installed"):
        raise MissingExtra(f"target {typed}", found.reason.split()[0], found.extra)
    raise UnsupportedError(f"target {typed} does not work here: {found.reason}")


def build_checked(
    target: str, graph: ExportGraph, decision: QuantDecision, checks: Checks, *, with_tolerance: bool = True
) -> CheckedArtefact:
    """Builds an artefact and runs it.

    Args:
        target: name or alias of target and engine.
        graph: the export graph.
        decision: what to build.
        checks: what it is put through.
        with_tolerance: also run the golden frames again, on other thread counts, to learn the artefact's noise.

    Raises:
        MissingExtra, UnsupportedError: target or engine do not work here.
        EngineError: the engine refused the artefact, failed, or does not repeat itself.
    """
    built_files, built = _build(target, graph, decision)
    spec, stem, golden = graph.spec, plugins.canonical("targets", target), checks.golden
    with open_checker(stem, built_files, spec, threads=checks.threads, rest_precision=built.rest_precision) as engine:
        found = run_engine(engine, spec, checks.frames.inputs, checks.frames.frames)
        own = run_engine(engine, spec, golden.inputs)
        description, ran_int8 = engine.description, getattr(engine, "int8_layers", None)
    report = compare_outputs(spec, checks.frames, found, checks.gate, description, precision=decision.precision)
    tolerance: dict[str, float] = {}
    broken = any(not output.answer.valid for output in (*found, *own))
    if with_tolerance and not broken:
        # a stand-in says nothing of its device's noise, and a device that completes the gate is held to the reference
        again = () if stand_in_of(stem) is not None else _other_threads(checks.threads)
        reruns = [_rerun(stem, built_files, spec, golden, n, built.rest_precision) for n in again]
        if is_exact(stem):
            reruns.append(_by_definition(stem, built_files, spec, golden))
            check_identical(own, reruns)
        else:
            placements = [placement for _, placement in golden.inputs]
            tolerance = find_tolerance(own, [own, *reruns], golden.outputs, spec, placements)
    return CheckedArtefact(
        target=stem,
        decision=decision,
        files=built_files,
        form=built.form,
        rest_precision=built.rest_precision,
        requirements={
            **built.requirements.to_json(),
            **({"int8_layers": ran_int8} if ran_int8 else {}),
            **({"sector": graph.sector} if graph.sector else {}),
        },
        report=report,
        confidence=confidence_drift(spec, checks.frames.ids, checks.frames.outputs, found, checks.frames.truths),
        broken=broken,
        golden=tuple(own),
        tolerance=tolerance,
        sector=graph.sector,
    )


def compare_outputs(
    spec: ModelSpec, frames: Expected, found: Sequence[Output], gate: Gate, engine: str, *, precision: str
) -> ParityReport:
    """Compares and judges.

    Args:
        spec: the model.
        frames: the frames with the reference's answers.
        found: the artefact's answers, in the same order.
        gate: thresholds.
        engine: what ran the artefact, in words.
        precision: of the artefact.
    """
    rows = [
        compare_frame(name, want, got, spec, min_coverage=gate.min_coverage)
        for name, want, got in zip(frames.ids, frames.outputs, found, strict=True)
    ]
    comparison = summarise(rows, spec, engine=engine, reference=frames.reference, provenance=frames.provenance)
    if spec.exits is not None:
        rule = float(spec.exits == frames.exits)
        comparison = replace(comparison, statistics={**comparison.statistics, "exit_rule": rule})
    return judge(comparison, gate, count_all=frames.golden, precision=precision)


def _build(target: str, graph: ExportGraph, decision: QuantDecision) -> tuple[dict[str, bytes], Any]:
    with tempfile.TemporaryDirectory(prefix="tinyusfm-") as folder:
        made = load_target(target)
        if graph.spec.exits is None:
            built = made.build(graph, decision, Path(folder))
        else:
            built = build_chain(made, graph, decision, Path(folder))
        files = {path.name: path.read_bytes() for path in built.files}
    if not files or not all(files.values()):
        raise EngineError(f"target {target} wrote no files, or empty ones")
    return files, built


def _rerun(
    stem: str, files: Mapping[str, bytes], spec: ModelSpec, golden: Expected, threads: int, rest_precision: str
) -> list[Output]:
    with open_checker(stem, files, spec, threads=threads, rest_precision=rest_precision) as engine:
        return run_engine(engine, spec, golden.inputs)


def is_exact(stem: str) -> bool:
    """Whether an engine gives the same bytes on every CPU and thread count.

    Args:
        stem: file stem of target and engine.
    """
    return bool(getattr(plugins.load("engines", stem), "EXACT", False))


def _by_definition(stem: str, files: Mapping[str, bytes], spec: ModelSpec, golden: Expected) -> list[Output]:
    """The first golden frames by the slow definition of an exact engine."""
    make: Callable[[], Engine] = plugins.load("engines", stem).make_definition
    engine: Engine = ChainEngine(make, full_depth=True) if is_chain(files) else make()
    try:
        engine.load(files, spec, EngineConfig(threads=1, rest_precision="f32"))
        return run_engine(engine, spec, golden.inputs[:DEFINITION_FRAMES])
    finally:
        engine.close()


def _other_threads(threads: int) -> list[int]:
    """Thread counts to learn the noise from.

    The same again, and all of the machine's CPUs up to four.
    """
    most = max(1, min(4, machine_card().usable_cpus))
    return sorted({threads, most})


__all__ = [
    "DEFINITION_FRAMES",
    "CheckedArtefact",
    "Checks",
    "build_chain",
    "build_checked",
    "compare_outputs",
    "is_exact",
    "load_target",
    "stage_decision",
    "writes_chains",
]
