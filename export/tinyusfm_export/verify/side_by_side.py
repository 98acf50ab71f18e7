"""INT8 beside its float siblings on each target.

Builds what was not asked for, measures all, and makes the verdicts.

The siblings are for comparison alone and do not enter the bundle. Artefacts whose bytes do not depend on the CPU are
also measured beside those of other targets, for their place in the fallback order. It does not know bundles or the
PyTorch reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

from tinyusfm_export.quantize.decision import PRECISIONS, float_decision
from tinyusfm_export.verify.artefact import CheckedArtefact, Checks, build_checked, load_target
from tinyusfm_export.verify.engine_run import open_engine
from tinyusfm_export.verify.verdict import WORTH_RATIO, Side, Verdict, measure_interleaved, times_as_fast
from tinyusfm_runtime import plugins
from tinyusfm_runtime.device.machine import machine_card

if TYPE_CHECKING:
    from tinyusfm_export.graph.build import ExportGraph

NUM_INPUTS = 8
"""Distinct inputs that the timed runs take turns with."""


def judge_sides(
    graph: ExportGraph,
    artefacts: Sequence[CheckedArtefact],
    checks: Checks,
    *,
    siblings: bool,
    rounds: int,
    runs: int,
) -> tuple[Verdict, ...]:
    """One verdict a target whose engine runs here.

    Args:
        graph: the export graph.
        artefacts: what was asked for, checked.
        checks: what the siblings are put through as well.
        siblings: also build FP32, and BF16 (else FP16), where a target has an int8 artefact.
        rounds: interleaved rounds of the latency measurement.
        runs: timed runs a round.

    Raises:
        EngineError: an engine failed.
    """
    verdicts = []
    for target in dict.fromkeys(artefact.target for artefact in artefacts if not artefact.pending):
        sides = [artefact for artefact in artefacts if artefact.target == target]
        request = frozenset(artefact.decision.precision for artefact in sides)
        if siblings and "int8" in request:
            sides += [
                build_checked(target, graph, float_decision(precision), checks, with_tolerance=False)
                for precision in sibling_precisions(target, request)
            ]
        verdicts.append(_measure(target, graph, sides, request, checks, rounds, runs))
    return tuple(verdicts)


def sibling_precisions(target: str, request: frozenset[str]) -> list[str]:
    """Float precisions to set INT8 against.

    FP32, and BF16 where the target and this CPU have it, else FP16.

    Args:
        target: name or alias.
        request: precisions that are built anyway.
    """
    offered = load_target(target).precisions
    half = "bf16" if "bf16" in offered and machine_card().has_bf16 else "fp16"
    return [name for name in ("fp32", half) if name in offered and name not in request]


def _measure(
    target: str,
    graph: ExportGraph,
    sides: Sequence[CheckedArtefact],
    request: frozenset[str],
    checks: Checks,
    rounds: int,
    runs: int,
) -> Verdict:
    with ExitStack() as stack:
        engines = {
            side.decision.precision: stack.enter_context(
                open_engine(target, side.files, graph.spec, threads=checks.threads, rest_precision=side.rest_precision)
            )
            for side in sides
        }
        executed = {name: str(getattr(engine, "executed", "")) for name, engine in engines.items()}
        runners = {name: engine.run for name, engine in engines.items()}
        inputs = [tensor for tensor, _ in checks.frames.inputs[:NUM_INPUTS]]
        samples = measure_interleaved(runners, inputs, rounds=rounds, runs=runs)
    return Verdict(
        target=plugins.public_name(target),
        threads=checks.threads,
        machine=machine_card().to_json(),
        sides=tuple(
            Side(
                precision=side.decision.precision,
                rest_precision=side.rest_precision,
                form=side.form,
                size_bytes=side.size_bytes,
                report=side.report,
                published=side.decision.precision in request,
                samples_ms=samples[side.decision.precision],
                confidence=side.confidence,
                executed=executed[side.decision.precision],
            )
            for side in sorted(sides, key=lambda side: PRECISIONS.index(side.decision.precision))
        ),
    )


def place_by_speed(
    graph: ExportGraph, artefacts: Sequence[CheckedArtefact], checks: Checks, *, rounds: int, runs: int
) -> tuple[tuple[CheckedArtefact, ...], tuple[str, ...]]:
    """Puts an exact artefact in front of its precision.

    Where it is the fastest of those that passed here.

    By ``WORTH_RATIO`` against each, measured in interleaved rounds; less is within the machine's own phases, and then
    the order stays as it was asked for.

    Args:
        graph: the export graph.
        artefacts: checked artefacts in the order that was asked for.
        checks: whose inputs and threads are used.
        rounds: interleaved rounds of the measurement.
        runs: timed runs a round.

    Returns:
        The artefacts, and a line for each that moved.

    Raises:
        EngineError: an engine failed.
    """
    placed, notes = list(artefacts), []
    for own in artefacts:
        group = [a for a in placed if a.decision.precision == own.decision.precision and a.report and not a.pending]
        if not own.exact or own not in group or group[0] is own:
            continue
        ratios = _ratios(graph, own, [other for other in group if other is not own], checks, rounds, runs)
        if min(ratios.values()) >= WORTH_RATIO:
            placed.remove(own)
            placed.insert(placed.index(group[0]), own)
            faster = ", ".join(f"{ratio:.2f} times as fast as {name}" for name, ratio in ratios.items())
            notes.append(f"{own.name} comes first: {faster}")
    return tuple(placed), tuple(notes)


def _ratios(
    graph: ExportGraph,
    own: CheckedArtefact,
    others: Sequence[CheckedArtefact],
    checks: Checks,
    rounds: int,
    runs: int,
) -> dict[str, float]:
    """How many times as fast an artefact is as others, by their names."""
    with ExitStack() as stack:
        runners = {}
        for side in (own, *others):
            opened = open_engine(
                side.target, side.files, graph.spec, threads=checks.threads, rest_precision=side.rest_precision
            )
            runners[side.name] = stack.enter_context(opened).run
        inputs = [tensor for tensor, _ in checks.frames.inputs[:NUM_INPUTS]]
        samples = measure_interleaved(runners, inputs, rounds=rounds, runs=runs)
    return {side.name: times_as_fast(samples[side.name], samples[own.name]) for side in others}


__all__ = ["NUM_INPUTS", "judge_sides", "place_by_speed", "sibling_precisions"]
