"""The story in one function: module -> graph -> decision -> build -> check in its own engine -> bundle.

Nothing is published unless every artefact that was asked for holds the gate against the PyTorch reference (or the gate
was switched off, which the manifest records). Whatever fails, no file is left behind. It does not know where students,
frames or command lines come from.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from tinyusfm_calibration.leakage import check_leakage
from tinyusfm_calibration.ranges import Ranges, Taps, collect_ranges
from tinyusfm_calibration.sets import NamedFrame, describe_frames, exclude_test_frames
from tinyusfm_export.ahead import check_ahead, with_engines
from tinyusfm_export.assemble import bundle_files, manifest_artefacts, rehearse_and_publish
from tinyusfm_export.checked import Checks, load_target
from tinyusfm_export.engine_run import preprocess_all, stand_in_of
from tinyusfm_export.expected import expect, expect_golden
from tinyusfm_export.gate import Gate
from tinyusfm_export.gate_frames import GateFrames
from tinyusfm_export.golden import golden_frames
from tinyusfm_export.ladder import Rung, build_ladder, default_policies, plan_rungs
from tinyusfm_export.parity import ParityReport
from tinyusfm_export.ptq import PtqPolicy, activation_taps
from tinyusfm_export.range_choice import Preparation
from tinyusfm_export.side_by_side import judge_sides
from tinyusfm_export.stages import writes_chains
from tinyusfm_export.verdict import Verdict
from tinyusfm_runtime.drift import DriftStatistic
from tinyusfm_runtime.errors import CalibrationError, InputError, UnsupportedError
from tinyusfm_runtime.manifest import Artefact
from tinyusfm_runtime.plugins import public_name
from tinyusfm_runtime.spec import ModelSpec

if TYPE_CHECKING:
    from torch import nn

    from tinyusfm_export.graph import ExportGraph

Progress = Callable[[str, float], None]
"""Called with what is being done and the share that is done, 0..1."""


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
        policies: int8 policies to try in turn; empty takes the default ones, see ladder.py.
        threads: threads inside the engine, for the check and the latency.
        compare: also build and measure FP32 and FP16 or BF16 beside INT8, for the verdict.
        rounds: interleaved rounds of the latency measurement.
        runs: timed runs a round.
        compute_capabilities: also build TensorRT engines ahead of time for these, such as ``8.6``.
        require_verified: refuse targets whose engine cannot run here, so that nothing unverified is published.
        full_depth: leave a student's early exits out and publish one graph that always runs to its end.
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
    require_verified: bool = False
    full_depth: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportResult:
    """A published bundle.

    Attributes:
        path: its folder.
        artefacts: the manifest's entries, best first.
        reports: artefact name -> parity report.
        verdicts: one a target, where they were measured.
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


def export_bundle(
    module: nn.Module,
    spec: ModelSpec,
    *,
    targets: Sequence[str],
    precisions: Sequence[str],
    out: Path,
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
        targets: names or aliases; the order is the fallback ladder's.
        precisions: fp32, fp16, bf16 or int8; each is built for every target before the next one.
        out: the bundle's folder.
        gate_frames: frames to judge on, see gate_frames.py.
        ranges: stored activation ranges; used for int8 where no calibration frames are given.
        calibration: calibration frames.
        gate: thresholds; None is the default gate.
        gated: False publishes whatever comes out, unverified.
        progress: told how far it is.
        advanced: what is rarely changed.

    Returns:
        The published bundle with its reports.

    Raises:
        GateError: an artefact misses the gate; nothing is published.
        CalibrationError: int8 without calibration frames or ranges, or with frames of the test split.
        InputError: a target, precision or student that cannot be used.
        MissingExtra, UnsupportedError, EngineError: a target or engine does not work here.
        OutputError: the bundle cannot be written.
    """
    options, told = advanced or ExportOptions(), progress or (lambda what, share: None)
    spec, rungs = _settle(module, spec, options), plan_rungs(targets, precisions)
    _check_rungs(spec, rungs, options)
    told("rewriting the graph", 0.0)
    graph = _build_graph(module, spec, options)
    quantized = any(precision == "int8" for _, precision in rungs)
    if quantized:
        told("finding activation ranges", 0.02)
        ranges = find_ranges(graph, ranges, calibration, options)
    told("running the PyTorch reference", 0.1)
    pictures = golden_frames()
    checks = Checks(
        gate=gate or Gate(),
        frames=expect(module, spec, gate_frames),
        golden=expect_golden(module, spec, pictures),
        threads=options.threads,
    )
    ladder = build_ladder(
        graph,
        rungs,
        ranges,
        checks,
        policies=options.policies or default_policies(spec.task),
        gated=gated,
        told=lambda what, share: told(what, 0.2 + 0.5 * share),
        preparation=options.preparation if quantized else None,
        notes=options.notes if quantized else (),
    )
    if options.compute_capabilities:
        ladder = with_engines(ladder, options.compute_capabilities, lambda what, share: told(what, 0.7))
    told("measuring side by side", 0.7)
    verdicts = judge_sides(
        graph, ladder.artefacts, checks, siblings=options.compare, rounds=options.rounds, runs=options.runs
    )
    told("publishing", 0.97)
    used = ranges if quantized else None
    preparation = options.preparation if quantized else None
    files = bundle_files(
        ladder, checks.golden, pictures, ranges=used, verdicts=verdicts, preparation=preparation, drift=options.drift
    )
    entries = manifest_artefacts(ladder.artefacts, files, gated=gated)
    path = rehearse_and_publish(
        out, spec=spec, artefacts=entries, files=files, calibration_id=used.set_id if used else None
    )
    told("done", 1.0)
    return ExportResult(
        path=path, artefacts=entries, reports=ladder.reports, verdicts=verdicts, ranges=used, notes=ladder.notes
    )


def _settle(module: nn.Module, spec: ModelSpec, options: ExportOptions) -> ModelSpec:
    """The spec as it is published: with a hash of the weights, and without early exits where they are left out."""
    spec = spec if spec.weights_sha256 else replace(spec, weights_sha256=module_sha256(module))
    return replace(spec, exits=None) if options.full_depth else spec


def _check_rungs(spec: ModelSpec, rungs: Sequence[Rung], options: ExportOptions) -> None:
    """Before anything slow starts: every target works here, and can do what the student and the options ask."""
    _check_chains(spec, rungs)
    targets = list(dict.fromkeys(target for target, _ in rungs))
    for target in targets:
        offered = load_target(target).precisions
        if lacking := [precision for name, precision in rungs if name == target and precision not in offered]:
            named = public_name(target)
            raise UnsupportedError(f"target {named} does not write {lacking[0]}: use {', '.join(offered)}")
        if options.require_verified and stand_in_of(target) is not None:
            raise UnsupportedError(
                f"{public_name(target)} cannot be verified on this machine, which --require-verified demands: leave it "
                "out, and complete the gate on the device"
            )
    if options.compute_capabilities:
        if "trt" not in targets:
            raise InputError("compute capabilities are for target tensorrt, which is not among the targets")
        check_ahead(options.compute_capabilities)


def _check_chains(spec: ModelSpec, rungs: Sequence[Rung]) -> None:
    """Early exits become a chain of graphs, which not every engine runs."""
    if spec.exits is None:
        return
    if len(spec.labels) < 2:
        raise InputError("early exits need at least two labels to be sure between: export with --full-depth")
    if whole := [target for target, _ in rungs if not writes_chains(target)]:
        raise UnsupportedError(
            f"{public_name(whole[0])} runs no chain of early exits: export to onnx or openvino, or leave the exits out "
            "with --full-depth"
        )


def find_ranges(
    graph: ExportGraph, stored: Ranges | None, calibration: Sequence[NamedFrame] | None, options: ExportOptions
) -> Ranges:
    """Ranges for int8: from calibration frames where they are given, else the stored ones.

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
            _taps(graph), inputs, described, method=options.method, weights_sha256=graph.spec.weights_sha256
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
        raise CalibrationError(f"the stored ranges lack {len(missing)} tensors (first {missing[0]!r}): calibrate anew")
    return stored


def _build_graph(module: nn.Module, spec: ModelSpec, options: ExportOptions) -> ExportGraph:
    from tinyusfm_export.graph import build_graph

    training = module.training
    try:
        drift = options.drift.auxiliary if options.drift is not None else ()
        return build_graph(module, spec, auxiliary=tuple(dict.fromkeys((*drift, *options.auxiliary))))
    finally:
        module.train(training)


def _taps(graph: ExportGraph) -> Taps:
    return activation_taps(graph)


def module_sha256(module: nn.Module) -> str:
    """Hash of a module's parameters and buffers by name, for students that came from no file."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


__all__ = ["ExportOptions", "ExportResult", "Progress", "export_bundle", "find_ranges", "module_sha256"]
