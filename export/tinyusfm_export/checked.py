"""One artefact, built by its target and checked in its own engine or its stand-in on the bytes that will be published.

The files are read back once; these bytes are loaded into the runtime's engine, run on the gate's frames and the golden
frames, and later written into the bundle. It does not know PyTorch or how a bundle is laid out.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinyusfm_export.confidence import confidence_drift
from tinyusfm_export.decision import QuantDecision
from tinyusfm_export.engine_run import open_checker, run_engine, stand_in_of
from tinyusfm_export.expected import Expected
from tinyusfm_export.gate import Gate, judge
from tinyusfm_export.golden import find_tolerance
from tinyusfm_export.parity import Output, ParityReport, compare_frame, summarise
from tinyusfm_export.stages import build_chain
from tinyusfm_runtime import plugins
from tinyusfm_runtime.errors import EngineError, MissingExtra, UnsupportedError
from tinyusfm_runtime.machine import machine_card
from tinyusfm_runtime.spec import ModelSpec

if TYPE_CHECKING:
    from tinyusfm_export.graph import ExportGraph


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
        tolerance: how far a later run may lie from them; empty if none was asked for.
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

    @property
    def public_target(self) -> str:
        """The name people type."""
        return plugins.public_name(self.target)

    @property
    def name(self) -> str:
        """Such as ``openvino-int8``."""
        return f"{self.public_target}-{self.decision.precision}"

    @property
    def pending(self) -> str:
        """What has still to complete the gate; empty where the artefact ran in its own engine."""
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
    found = plugins.probe("targets", name)
    if found.works:
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
        found = run_engine(engine, spec, checks.frames.inputs)
        own = run_engine(engine, spec, golden.inputs)
        description = engine.description
    report = compare_outputs(spec, checks.frames, found, checks.gate, description, precision=decision.precision)
    tolerance: dict[str, float] = {}
    broken = any(not output.answer.valid for output in (*found, *own))
    if with_tolerance and not broken:
        # a stand-in says nothing of its device's noise, and a device that completes the gate is held to the reference
        again = () if stand_in_of(stem) is not None else _other_threads(checks.threads)
        reruns = [_rerun(stem, built_files, spec, golden, n, built.rest_precision) for n in again]
        placements = [placement for _, placement in golden.inputs]
        tolerance = find_tolerance(own, [own, *reruns], golden.outputs, spec, placements)
    return CheckedArtefact(
        target=stem,
        decision=decision,
        files=built_files,
        form=built.form,
        rest_precision=built.rest_precision,
        requirements=built.requirements.to_json(),
        report=report,
        confidence=confidence_drift(spec, checks.frames.ids, checks.frames.outputs, found, checks.frames.truths),
        broken=broken,
        golden=tuple(own),
        tolerance=tolerance,
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


def _other_threads(threads: int) -> list[int]:
    """Thread counts to learn the noise from: the same again, and all of the machine's CPUs up to four."""
    most = max(1, min(4, machine_card().usable_cpus))
    return sorted({threads, most})


__all__ = ["CheckedArtefact", "Checks", "build_checked", "compare_outputs", "load_target"]
