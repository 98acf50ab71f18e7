"""The export in one function, from module to bundle.

module -> graph -> decision -> build -> check in its own engine -> bundle.

Nothing is published unless every artefact that was asked for holds the gate against the PyTorch reference (or the gate
was switched off, which the manifest records). Whatever fails, no file is left behind. It does not know where students,
frames or command lines come from.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinyusfm_calibration.leakage import check_leakage
from tinyusfm_calibration.ranges import Ranges, Taps, collect_ranges
from tinyusfm_calibration.sets import NamedFrame, describe_frames, exclude_test_frames
from tinyusfm_export.ahead import check_ahead, check_timing, with_engines
from tinyusfm_export.artefacts import (
    ArtefactSet,
    Decide,
    TargetPrecision,
    build_fallback,
    default_policies,
    joined,
    plan_levels,
)
from tinyusfm_export.assemble import bundle_files, manifest_artefacts, rehearse_and_publish
from tinyusfm_export.quantize.ptq import PtqPolicy, decide
from tinyusfm_export.quantize.range_choice import Preparation
from tinyusfm_export.quantize.spans import calibration_taps
from tinyusfm_export.verify.artefact import CheckedArtefact, Checks, compare_outputs, load_target, writes_chains
from tinyusfm_export.verify.engine_run import preprocess_all, stand_in_of
from tinyusfm_export.verify.expected import Expected, expect, expect_golden
from tinyusfm_export.verify.frame_count import check_counted_frames, check_frame_count
from tinyusfm_export.verify.gate import Gate
from tinyusfm_export.verify.gate_frames import GateFrames
from tinyusfm_export.verify.golden import golden_frames
from tinyusfm_export.verify.parity import ParityReport
from tinyusfm_export.verify.sector import masked_frames, masked_gate_frames, pruned_gate, pruned_reference
from tinyusfm_export.verify.side_by_side import judge_sides, place_by_speed
from tinyusfm_export.verify.thresholds import calibrate_reading, rejudged
from tinyusfm_export.verify.verdict import Verdict
from tinyusfm_runtime import plugins
from tinyusfm_runtime.bundle.manifest import Artefact
from tinyusfm_runtime.drift import DriftStatistic
from tinyusfm_runtime.errors import CalibrationError, GateError, InputError, UnsupportedError
from tinyusfm_runtime.plugins import public_name
from tinyusfm_runtime.reading_rules import ProbeGeometry, TokenSector
from tinyusfm_runtime.spec import ModelSpec, SecondPass

if TYPE_CHECKING:
    from torch import nn

    from tinyusfm_export.graph.build import ExportGraph
    from tinyusfm_runtime.frame import Frame

Progress = Callable[[str, float], None]
"""Called with what is being done and the share that is done, 0..1."""


_BEGINS = {"reference": 0.0, "graph": 0.08, "ranges": 0.1, "building": 0.2, "measuring": 0.7, "publishing": 0.97}
"""Stage -> share of an export that counts as done when it begins; rough, and for progress bars alone."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stages:
    """Parts of an export that know what a student looks like inside.

    Others serve students of another kind.

    Attributes:
        build_graph: (module, spec, auxiliary outputs) -> the export graph; None rewrites a TinyUSFM (graph/build.py).
        decide: (graph, precision, ranges, policy) -> which tensors are 8-bit.
        taps: graph -> a callable that gives its tensors by name, for calibration frames.
        golden: frames that a bundle carries for its self-test; None takes phantoms (verify/golden.py).
    """

    build_graph: Callable[[nn.Module, ModelSpec, tuple[str, ...]], ExportGraph] | None = None
    decide: Decide = decide
    taps: Callable[[ExportGraph], Taps] = calibration_taps
    golden: Callable[[], list[Frame]] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportOptions:
    """What is rarely changed.

    Attributes:
        method: range method when calibration frames are at hand.
        calibration_name: name of the calibration set.
        test_sha256: hashes of the test split's files and pixels; calibration frames among them are an error.
        auxiliary: extra outputs of the graph, beside those that the drift statistic needs.
        preparation: how the graph is changed before it becomes int8; stored ranges are then those of the changed graph.
        drift: statistic of the calibration frames, stored in the bundle, or None.
        notes: what a reader must know about the ranges.
        policies: int8 policies to try in turn; empty takes the default ones, see fallback.py.
        threads: threads inside the engine, for the check and the latency.
        compare: also build and measure FP32 and FP16 or BF16 beside INT8, for the verdict.
        rounds: interleaved rounds of the latency measurement.
        runs: timed runs a round.
        compute_capabilities: also build TensorRT engines ahead of time for these, such as ``8.6``.
        timing_caches: files that TensorRT measured on devices, put into its artefacts.
        require_verified: refuse targets whose engine cannot run here, so that nothing unverified is published.
        full_depth: leave a student's early exits out and publish one graph that always runs to its end.
        upstream: what the student was made of, stage -> sha256 (hex), for the bundle's trace.
        stages: parts that know what a student looks like inside.
        sector: patches that a pruned artefact of every level looks at, in front of the whole ones; None prunes nothing.
        probe: geometry of the sector's probe, for the spec, or None for the student's own.
        sector_only: leave the artefacts out that look at whole frames; there is nothing to fall back to then.
    """

    method: str = "percentile"
    calibration_name: str = "calibration"
    test_sha256: frozenset[str] = frozenset()
    auxiliary: tuple[str, ...] = ()
    preparation: Preparation = field(default_factory=Preparation)
    drift: DriftStatistic | None = None
    notes: tuple[str, ...] = ()
    policies: tuple[PtqPolicy, ...] = ()
    threads: int = 1
    compare: bool = True
    rounds: int = 7
    runs: int = 10
    compute_capabilities: tuple[str, ...] = ()
    timing_caches: tuple[Path, ...] = ()
    require_verified: bool = False
    full_depth: bool = False
    upstream: Mapping[str, str] = field(default_factory=dict)
    stages: Stages = field(default_factory=Stages)
    sector: TokenSector | None = None
    probe: ProbeGeometry | None = None
    sector_only: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportResult:
    """A published bundle.

    Attributes:
        path: its folder.
        artefacts: the manifest's entries, best first.
        reports: artefact name -> parity report.
        verdicts: one per target, where they were measured.
        ranges: activation ranges used, if any.
        notes: what a reader must know, such as layers that were kept float for the gate's sake.
    """

    path: Path
    artefacts: tuple[Artefact, ...]
    reports: Mapping[str, ParityReport]
    verdicts: tuple[Verdict, ...]
    ranges: Ranges | None
    notes: tuple[str, ...] = ()

    @property
    def pending(self) -> dict[str, str]:
        """Artefact name -> what has still to complete its gate."""
        return {artefact.name: artefact.pending for artefact in self.artefacts if artefact.pending}

    def to_json(self) -> dict[str, Any]:
        """Plain data with reports and verdicts, ready for ``json.dumps``."""
        return {
            "bundle": self.path.name,
            "artefacts": [artefact.to_json() for artefact in self.artefacts],
            "reports": {name: report.to_json() for name, report in self.reports.items()},
            "verdicts": [verdict.to_json() for verdict in self.verdicts],
            "pending": self.pending,
            "notes": list(self.notes),
        }


def export_bundle(
    module: nn.Module,
    spec: ModelSpec,
    *,
    targets: Sequence[str],
    precisions: Sequence[str],
    out: str | Path,
    gate_frames: GateFrames,
    ranges: Ranges | None = None,
    calibration: Sequence[NamedFrame] | None = None,
    gate: Gate | None = None,
    gated: bool = True,
    progress: Progress | None = None,
    advanced: ExportOptions | None = None,
) -> ExportResult:
    """Exports a student.

    Args:
        module: the student, float32.
        spec: its spec; ``weights_sha256`` is filled in from the parameters where it is empty.
        targets: names or aliases; the order is the fallback order's, but that an integer artefact comes first where it
            is the fastest here.
        precisions: fp32, fp16, bf16 or int8; each is built for every target before the next one.
        out: the bundle's folder.
        gate_frames: frames to judge on, see gate_frames.py.
        ranges: stored activation ranges; used for int8 where no calibration frames are given.
        calibration: calibration frames.
        gate: thresholds; None is the default gate.
        gated: False publishes whatever comes out, unverified.
        progress: called with the step and the share done.
        advanced: what is rarely changed.

    Returns:
        The published bundle with its reports.

    Raises:
        GateError: an artefact misses the gate, or there are too few frames for it; nothing is published.
        CalibrationError: int8 without calibration frames or ranges, or with frames of the test split.
        InputError: a target, precision or student that cannot be used.
        MissingExtra, UnsupportedError, EngineError: a target or engine does not work here.
        OutputError: the bundle cannot be written.
    """
    options, progress = advanced or ExportOptions(), progress or (lambda what, share: None)
    spec, levels = _settle(module, spec, options), plan_levels(targets, precisions)
    _check_levels(spec, levels, options)
    gate_frames = masked_gate_frames(gate_frames, spec)
    thresholds = gate or Gate()
    progress("running the PyTorch reference", _BEGINS["reference"])
    expected = _expect_enough(module, spec, gate_frames, thresholds if gated else None)
    spec, expected, unjudged = with_thresholds(spec, expected, [named.group for named in gate_frames.frames])
    progress("rewriting the graph", _BEGINS["graph"])
    graph = _build_graph(module, spec, options)
    quantized = any(precision == "int8" for _, precision in levels)
    if quantized:
        progress("finding activation ranges", _BEGINS["ranges"])
        ranges = find_ranges(graph, ranges, calibration, options)
    images = masked_frames((options.stages.golden or golden_frames)(), spec)
    checks = Checks(
        gate=thresholds,
        frames=expected,
        golden=expect_golden(module, spec, images),
        threads=options.threads,
    )
    sides = _sides(module, graph, checks, images, options)
    built = _build(sides, levels, ranges if quantized else None, options, gated=gated, progress=progress)
    progress("measuring side by side", _BEGINS["measuring"])
    built, order = _placed(sides, built, options)
    verdicts = _judge(sides, built, options)
    fallback = joined(built)
    progress("publishing", _BEGINS["publishing"])
    used = ranges if quantized else None
    preparation = options.preparation if quantized else None
    files = bundle_files(
        fallback,
        checks.golden,
        images,
        spec=spec,
        ranges=used,
        verdicts=verdicts,
        preparation=preparation,
        drift=options.drift,
        pruned=sides[0][1].golden if spec.sector is not None else None,
    )
    entries = manifest_artefacts(fallback.artefacts, files, gated=gated)
    path = rehearse_and_publish(
        Path(out),
        spec=spec,
        artefacts=entries,
        files=files,
        calibration_id=used.set_id if used else None,
        upstream=options.upstream,
    )
    progress("done", 1.0)
    return ExportResult(
        path=path,
        artefacts=entries,
        reports=fallback.reports,
        verdicts=verdicts,
        ranges=used,
        notes=(*fallback.notes, *unjudged, *order),
    )


_Side = tuple["ExportGraph", Checks]
"""A graph, and what its artefacts are put through."""


def _sides(
    module: nn.Module, graph: ExportGraph, checks: Checks, images: Sequence[Frame], options: ExportOptions
) -> list[_Side]:
    """The graph that looks at all patches.

    In front of it the one that was pruned to a sector.
    """
    if graph.spec.sector is None:
        return [(graph, checks)]
    pruned = _build_graph(module, graph.spec, options, pruned=True)
    # golden: what it must equal up to rounding; the gate's frames stay those of the whole student
    own = replace(
        checks,
        gate=pruned_gate(checks.gate),
        golden=expect_golden(pruned_reference(module, graph.spec), graph.spec, images),
    )
    return [(pruned, own), *([] if options.sector_only else [(graph, checks)])]


NOT_TRAINED_FOR_IT = (
    "the student does not cope with the patches that --sector leaves out; train it with adapt --set drop_tokens=0.6, "
    "leave --sector out, or give a looser --gate"
)
"""What is said of a student whose pruned artefact misses the gate."""


def _build(
    sides: Sequence[_Side],
    levels: Sequence[TargetPrecision],
    ranges: Ranges | None,
    options: ExportOptions,
    *,
    gated: bool,
    progress: Progress,
) -> list[ArtefactSet]:
    begin, end = _BEGINS["building"], _BEGINS["measuring"]
    share = (end - begin) / len(sides)
    built: list[ArtefactSet] = []

    def part(what: str, done: float) -> None:
        progress(what, begin + share * (len(built) + done))

    for graph, checks in sides:
        try:
            found = build_fallback(
                graph,
                levels,
                ranges,
                checks,
                policies=options.policies or default_policies(graph.spec.task),
                gated=gated,
                progress=part,
                preparation=options.preparation if ranges is not None else None,
                notes=options.notes if ranges is not None else (),
                decide=options.stages.decide,
            )
        except GateError as error:
            if not graph.sector:
                raise
            raise GateError(f"{error}: {NOT_TRAINED_FOR_IT}", error.report) from error
        if options.compute_capabilities or options.timing_caches:
            found = with_engines(
                found, options.compute_capabilities, lambda what, _: progress(what, end), options.timing_caches
            )
        if graph.sector and gated:
            check_pruned(found.artefacts, checks, sides[-1][1].gate, graph.spec)
        built.append(found)
    return built


def check_pruned(artefacts: Sequence[CheckedArtefact], checks: Checks, gate: Gate, spec: ModelSpec) -> None:
    """Holds pruned artefacts against the student without the same patches.

    On the golden frames.

    Args:
        artefacts: what was built.
        checks: their golden frames, with that student's answers.
        gate: thresholds.
        spec: the model.

    Raises:
        GateError: one answers otherwise, as an artefact that looks at other patches does.
    """
    gate = replace(gate, min_frames=1)
    for artefact in artefacts:
        precision = artefact.decision.precision
        report = compare_outputs(spec, checks.golden, artefact.golden, gate, "", precision=precision)
        if not report:
            raise GateError(
                f"nothing was published: {artefact.name} does not answer the golden frames as the student without the "
                f"patches outside the sector does: {'; '.join(report.failures)}"
            )


def _placed(
    sides: Sequence[_Side], built: Sequence[ArtefactSet], options: ExportOptions
) -> tuple[list[ArtefactSet], tuple[str, ...]]:
    """The sets with their artefacts in order of speed, and a line for each that moved."""
    placed: list[ArtefactSet] = []
    lines: list[str] = []
    for (graph, checks), one in zip(sides, built, strict=True):
        artefacts, moved = place_by_speed(graph, one.artefacts, checks, rounds=options.rounds, runs=options.runs)
        placed.append(replace(one, artefacts=artefacts))
        lines += moved
    return placed, tuple(lines)


def _judge(sides: Sequence[_Side], built: Sequence[ArtefactSet], options: ExportOptions) -> tuple[Verdict, ...]:
    verdicts: list[Verdict] = []
    for (graph, checks), one in zip(sides, built, strict=True):
        found = judge_sides(
            graph, one.artefacts, checks, siblings=options.compare, rounds=options.rounds, runs=options.runs
        )
        end = "-sector" if graph.sector else ""
        verdicts += [replace(verdict, target=f"{verdict.target}{end}") for verdict in found]
    return tuple(verdicts)


def _expect_enough(module: nn.Module, spec: ModelSpec, frames: GateFrames, gate: Gate | None) -> Expected:
    """The reference's answers, after both counts of frames that a gate needs.

    Without a gate nothing is counted.
    """
    source = frames.source or "the gate"
    if gate is not None:
        check_frame_count(len(frames.frames), gate, source)
    expected = expect(module, spec, frames)
    if gate is not None:
        check_counted_frames(expected, spec, gate, source)
    return expected


def with_thresholds(
    spec: ModelSpec, frames: Expected, groups: Sequence[str]
) -> tuple[ModelSpec, Expected, tuple[str, ...]]:
    """Thresholds of the readings.

    Calibrated again where the frames are labelled, else those the student brings.

    Args:
        spec: the model.
        frames: the gate's frames with the reference's answers.
        groups: patient of each.

    Returns:
        Spec and frames judged by it, and what a reader must know.
    """
    if not any(truth is not None for truth in frames.truths):
        note = () if spec.reading is not None else ("readings stay unchecked: no labelled frames were given",)
        return spec, frames, note
    rules, why = calibrate_reading(spec, frames, groups)
    spec = replace(spec, reading=rules)
    outputs = rejudged(frames.outputs, spec, [placement for _, placement in frames.inputs])
    return spec, replace(frames, outputs=outputs), (why,) if why else ()


def _settle(module: nn.Module, spec: ModelSpec, options: ExportOptions) -> ModelSpec:
    """The spec as it is published.

    With a hash of the weights, without early exits where they are left out, and with its sector.
    """
    spec = spec if spec.weights_sha256 else replace(spec, weights_sha256=module_sha256(module))
    if options.sector is not None:
        if options.drift is not None:
            raise InputError("a drift statistic was taken of all patches: leave it out of an export with a sector")
        probe = options.probe or spec.probe
        spec = replace(spec, sector=options.sector, second_pass=SecondPass.NEVER, probe=probe)
    return replace(spec, exits=None) if options.full_depth else spec


def _check_levels(spec: ModelSpec, levels: Sequence[TargetPrecision], options: ExportOptions) -> None:
    """Before anything slow starts: every target works here and fits the request.

    It can do what the student and the options ask.
    """
    _check_chains(spec, levels)
    targets = list(dict.fromkeys(target for target, _ in levels))
    for target in targets:
        offered = load_target(target).precisions
        if lacking := [precision for name, precision in levels if name == target and precision not in offered]:
            named = public_name(target)
            raise UnsupportedError(f"target {named} does not write {lacking[0]}: use {', '.join(offered)}")
        if spec.sector is not None and not getattr(plugins.load("targets", target), "PRUNES", False):
            raise UnsupportedError(
                f"target {public_name(target)} does not write graphs that are pruned to a sector: use onnx, openvino, "
                "tensorrt, integer, litert or coreml, or leave --sector out"
            )
        if options.require_verified and stand_in_of(target) is not None:
            raise UnsupportedError(
                f"{public_name(target)} cannot be checked on this machine: drop --require-verified, then run "
                "`tinyusfm-edge build` on the device"
            )
    if options.compute_capabilities:
        if "trt" not in targets:
            raise InputError("compute capabilities are for target tensorrt, which is not among the targets")
        check_ahead(options.compute_capabilities)
    if options.timing_caches:
        if "trt" not in targets:
            raise InputError("timing caches are for target tensorrt, which is not among the targets")
        check_timing(options.timing_caches)


def _check_chains(spec: ModelSpec, levels: Sequence[TargetPrecision]) -> None:
    """Early exits become a chain of graphs, which not every engine runs."""
    if spec.exits is None:
        return
    if len(spec.labels) < 2:
        raise InputError("early exits need at least two labels to be sure between: export with --full-depth")
    if whole := [target for target, _ in levels if not writes_chains(target)]:
        raise UnsupportedError(
            f"{public_name(whole[0])} runs no chain of early exits: export to onnx, openvino or litert, or leave the "
            "exits out with --full-depth"
        )


def find_ranges(
    graph: ExportGraph, stored: Ranges | None, calibration: Sequence[NamedFrame] | None, options: ExportOptions
) -> Ranges:
    """Ranges for int8.

    From calibration frames where they are given, else the stored ones.

    Raises:
        CalibrationError: neither is given, frames stand in the test split or are too few, or the stored ranges belong
            to another student or lack a tensor.
    """
    if calibration is not None:
        if options.preparation:
            raise CalibrationError("new calibration frames and a stored preparation of the graph exclude each other")
        exclude_test_frames(calibration, options.test_sha256)
        described = describe_frames(options.calibration_name, calibration)
        inputs = (tensor for tensor, _ in preprocess_all([named.frame for named in calibration], graph.spec))
        return collect_ranges(
            options.stages.taps(graph),
            inputs,
            described,
            method=options.method,
            weights_sha256=graph.spec.weights_sha256,
        )
    if stored is None:
        raise CalibrationError(
            "int8 needs activation ranges: give --data DIR to calibrate on its training split, or a student that "
            "carries its ranges"
        )
    check_leakage(stored.frame_sha256, options.test_sha256)
    if stored.weights_sha256 and stored.weights_sha256 != graph.spec.weights_sha256:
        raise CalibrationError("the stored activation ranges belong to another student: calibrate with --data DIR")
    missing = sorted(set(graph.linear_inputs) - set(stored.tensors))
    if missing:
        raise CalibrationError(f"the stored ranges lack {len(missing)} tensors (first {missing[0]!r}): calibrate again")
    return stored


def _build_graph(module: nn.Module, spec: ModelSpec, options: ExportOptions, *, pruned: bool = False) -> ExportGraph:
    from tinyusfm_export.graph.build import build_graph

    drift = options.drift.auxiliary if options.drift is not None else ()
    auxiliary = tuple(dict.fromkeys((*drift, *options.auxiliary)))
    if options.stages.build_graph is not None:
        if pruned:
            raise UnsupportedError("students of another kind cannot be pruned to a sector")
        return options.stages.build_graph(module, spec, auxiliary)
    training = module.training
    try:
        return build_graph(module, spec, auxiliary=auxiliary, pruned=pruned)
    finally:
        module.train(training)


def module_sha256(module: nn.Module) -> str:
    """Hash of a module's parameters and buffers by name.

    For students that came from no file.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


__all__ = [
    "NOT_TRAINED_FOR_IT",
    "ExportOptions",
    "ExportResult",
    "Progress",
    "Stages",
    "check_pruned",
    "export_bundle",
    "find_ranges",
    "module_sha256",
    "with_thresholds",
]
