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
from typing import TYPE_CHECKING, Any

from tinyusfm_calibration.leakage import check_leakage
from tinyusfm_calibration.ranges import Ranges, Taps, collect_ranges
from tinyusfm_calibration.sets import NamedFrame, describe_frames, exclude_test_frames
from tinyusfm_export.assemble import bundle_files, manifest_artefacts, rehearse_and_publish
from tinyusfm_export.checked import CheckedArtefact, build_checked, load_target
from tinyusfm_export.decision import PRECISIONS, QuantDecision
from tinyusfm_export.engine_run import open_engine, preprocess_all
from tinyusfm_export.expected import Expected, expect, expect_golden
from tinyusfm_export.gate import Gate
from tinyusfm_export.gate_frames import GateFrames
from tinyusfm_export.golden import golden_frames
from tinyusfm_export.parity import ParityReport
from tinyusfm_export.verdict import Side, Verdict, measure_interleaved
from tinyusfm_runtime import plugins
from tinyusfm_runtime.errors import CalibrationError, EngineError, GateError, InputError
from tinyusfm_runtime.machine import machine_card
from tinyusfm_runtime.manifest import Artefact
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
        auxiliary: extra outputs of the graph.
        threads: threads inside the engine, for the check and the latency.
        compare: also build and measure FP32 and FP16 or BF16 beside INT8, for the verdict.
        rounds: interleaved rounds of the latency measurement.
        runs: timed runs a round.
    """

    method: str = "percentile"
    calibration_name: str = "calibration"
    test_sha256: frozenset[str] = frozenset()
    auxiliary: tuple[str, ...] = ()
    threads: int = 1
    compare: bool = True
    rounds: int = 7
    runs: int = 10


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportResult:
    """A published bundle.

    Attributes:
        path: its folder.
        artefacts: the manifest's entries, best first.
        reports: artefact name -> parity report.
        verdicts: one a target, where they were measured.
        ranges: activation ranges used, if any.
    """

    path: Path
    artefacts: tuple[Artefact, ...]
    reports: Mapping[str, ParityReport]
    verdicts: tuple[Verdict, ...]
    ranges: Ranges | None


@dataclass(frozen=True, kw_only=True, slots=True)
class MissedGates:
    """What a GateError carries: every report of the export.

    Attributes:
        reports: artefact name -> parity report.
    """

    reports: Mapping[str, ParityReport] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain data, ready for ``json.dumps``."""
        return {name: report.to_json() for name, report in self.reports.items()}


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
    spec = spec if spec.weights_sha256 else replace(spec, weights_sha256=module_sha256(module))
    ladder = plan_ladder(targets, precisions)
    for target in {name for name, _ in ladder}:
        load_target(target)
    told("rewriting the graph", 0.0)
    graph = _build_graph(module, spec, options)
    if any(precision == "int8" for _, precision in ladder):
        told("finding activation ranges", 0.02)
        ranges = find_ranges(graph, ranges, calibration, options)
    told("running the PyTorch reference", 0.08)
    pictures = golden_frames()
    frames = expect(module, spec, gate_frames)
    golden = expect_golden(module, spec, pictures)
    steps = _Steps(told, 0.2, 0.8, len(ladder))
    checked = []
    for target, precision in ladder:
        steps.next(f"building and checking {plugins.public_name(target)} {precision}")
        decision = _decide(graph, target, precision, ranges)
        thresholds = gate or Gate()
        checked.append(
            build_checked(
                target, graph, decision, gate=thresholds, frames=frames, golden=golden, threads=options.threads
            )
        )
    reports = {artefact.name: artefact.report for artefact in checked}
    if gated:
        _refuse_missed(reports)
    _refuse_broken(checked)
    told("measuring", 0.8)
    verdicts = _verdicts(graph, checked, ranges, gate or Gate(), frames, golden, options)
    told("publishing", 0.97)
    files = bundle_files(checked, golden, pictures, ranges=ranges, verdicts=verdicts)
    entries = manifest_artefacts(checked, files, gated=gated)
    used = ranges if any(artefact.decision.quantized() for artefact in checked) else None
    path = rehearse_and_publish(
        out, spec=spec, artefacts=entries, files=files, calibration_id=used.set_id if used else None
    )
    told("done", 1.0)
    return ExportResult(path=path, artefacts=entries, reports=reports, verdicts=verdicts, ranges=used)


def plan_ladder(targets: Sequence[str], precisions: Sequence[str]) -> list[tuple[str, str]]:
    """Order of the artefacts: the first precision on every target, then the next precision.

    Args:
        targets: names or aliases.
        precisions: names.

    Returns:
        (canonical target, precision), none twice.

    Raises:
        InputError: nothing asked for, or an unknown name.
    """
    if not targets or not precisions:
        raise InputError("nothing to export: name a target and a precision")
    unknown = [precision for precision in precisions if precision not in PRECISIONS]
    if unknown:
        raise InputError(f"precision {unknown[0]!r} is not one of {', '.join(PRECISIONS)}")
    stems = [plugins.canonical("targets", target) for target in targets]
    return list(dict.fromkeys((stem, precision) for precision in precisions for stem in stems))


def find_ranges(
    graph: ExportGraph, stored: Ranges | None, calibration: Sequence[NamedFrame] | None, options: ExportOptions
) -> Ranges:
    """Ranges for int8: from calibration frames where they are given, else the stored ones.

    Raises:
        CalibrationError: neither is given, frames stand in the test split or are too few, or the stored ranges belong
            to another student or lack a tensor.
    """
    if calibration is not None:
        exclude_test_frames(calibration, options.test_sha256)
        described = describe_frames(options.calibration_name, calibration)
        taps = _taps(graph)
        inputs = (tensor for tensor, _ in preprocess_all([named.frame for named in calibration], graph.spec))
        return collect_ranges(taps, inputs, described, method=options.method, weights_sha256=graph.spec.weights_sha256)
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
        return build_graph(module, spec, auxiliary=options.auxiliary)
    finally:
        module.train(training)


def _taps(graph: ExportGraph) -> Taps:
    from tinyusfm_export.ptq import activation_taps

    return activation_taps(graph)


def _decide(graph: ExportGraph, target: str, precision: str, ranges: Ranges | None) -> QuantDecision:
    from tinyusfm_export.ptq import decide

    return decide(graph, precision, ranges)


def _refuse_missed(reports: Mapping[str, ParityReport]) -> None:
    missed = {name: report for name, report in reports.items() if not report}
    if missed:
        reasons = " | ".join(f"{name}: {'; '.join(report.failures)}" for name, report in missed.items())
        raise GateError(f"nothing was published, the gate was missed by {reasons}", MissedGates(reports=reports))


def _refuse_broken(checked: Sequence[CheckedArtefact]) -> None:
    broken = [artefact.name for artefact in checked if artefact.broken]
    if broken:
        raise EngineError(f"{', '.join(broken)}: outputs are not finite; that is not published even without a gate")


def _verdicts(
    graph: ExportGraph,
    checked: Sequence[CheckedArtefact],
    ranges: Ranges | None,
    gate: Gate,
    frames: Expected,
    golden: Expected,
    options: ExportOptions,
) -> tuple[Verdict, ...]:
    """One verdict a target, over what was asked for and, beside INT8, its float siblings."""
    verdicts = []
    for target in dict.fromkeys(artefact.target for artefact in checked):
        sides = [artefact for artefact in checked if artefact.target == target]
        asked = {artefact.decision.precision for artefact in sides}
        siblings = _siblings(target, asked) if options.compare and "int8" in asked else []
        sides += [
            build_checked(
                target,
                graph,
                _decide(graph, target, precision, ranges),
                gate=gate,
                frames=frames,
                golden=golden,
                threads=options.threads,
                with_tolerance=False,
            )
            for precision in siblings
        ]
        verdicts.append(_measure(target, graph.spec, sides, asked, frames, options))
    return tuple(verdicts)


def _siblings(target: str, asked: set[str]) -> list[str]:
    """Float precisions to set INT8 against: FP32, and BF16 where the target and this CPU have it, else FP16."""
    offered = load_target(target).precisions
    half = "bf16" if "bf16" in offered and machine_card().has_bf16 else "fp16"
    return [name for name in ("fp32", half) if name in offered and name not in asked]


def _measure(
    target: str,
    spec: ModelSpec,
    sides: Sequence[CheckedArtefact],
    asked: set[str],
    frames: Expected,
    options: ExportOptions,
) -> Verdict:
    from contextlib import ExitStack

    with ExitStack() as stack:
        runners = {
            side.decision.precision: stack.enter_context(
                open_engine(target, side.files, spec, threads=options.threads, rest_precision=side.rest_precision)
            ).run
            for side in sides
        }
        inputs = [tensor for tensor, _ in frames.inputs[:8]]
        samples = measure_interleaved(runners, inputs, rounds=options.rounds, runs=options.runs)
    order = sorted(sides, key=lambda side: PRECISIONS.index(side.decision.precision))
    return Verdict(
        target=plugins.public_name(target),
        threads=options.threads,
        machine=machine_card().to_json(),
        sides=tuple(
            Side(
                precision=side.decision.precision,
                rest_precision=side.rest_precision,
                form=side.form,
                size_bytes=side.size_bytes,
                report=side.report,
                published=side.decision.precision in asked,
                samples_ms=samples[side.decision.precision],
            )
            for side in order
        ),
    )


def module_sha256(module: nn.Module) -> str:
    """Hash of a module's parameters and buffers by name, for students that came from no file."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


class _Steps:
    """Tells progress over equal steps between two shares."""

    def __init__(self, told: Progress, start: float, end: float, count: int) -> None:
        self.told, self.start, self.size, self.index = told, start, (end - start) / max(1, count), 0

    def next(self, what: str) -> None:
        """Tells that the next step begins."""
        self.told(what, self.start + self.size * self.index)
        self.index += 1


__all__ = [
    "ExportOptions",
    "ExportResult",
    "MissedGates",
    "Progress",
    "export_bundle",
    "find_ranges",
    "module_sha256",
    "plan_ladder",
]
