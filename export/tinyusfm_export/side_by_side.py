"""INT8 beside its float siblings on each target: builds what was not asked for, measures all, and makes the verdicts.

The siblings are for comparison alone and do not enter the bundle. It does not know bundles or the PyTorch reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

from tinyusfm_export.checked import CheckedArtefact, Checks, build_checked, load_target
from tinyusfm_export.decision import PRECISIONS, float_decision
from tinyusfm_export.engine_run import open_engine
from tinyusfm_export.verdict import Side, Verdict, measure_interleaved
from tinyusfm_runtime import plugins
from tinyusfm_runtime.machine import machine_card

if TYPE_CHECKING:
    from tinyusfm_export.graph import ExportGraph

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
        asked = frozenset(artefact.decision.precision for artefact in sides)
        if siblings and "int8" in asked:
            sides += [
                build_checked(target, graph, float_decision(precision), checks, with_tolerance=False)
                for precision in sibling_precisions(target, asked)
            ]
        verdicts.append(_measure(target, graph, sides, asked, checks, rounds, runs))
    return tuple(verdicts)


def sibling_precisions(target: str, asked: frozenset[str]) -> list[str]:
    """Float precisions to set INT8 against: FP32, and BF16 where the target and this CPU have it, else FP16.

    Args:
        target: name or alias.
        asked: precisions that are built anyway.
    """
    offered = load_target(target).precisions
    half = "bf16" if "bf16" in offered and machine_card().has_bf16 else "fp16"
    return [name for name in ("fp32", half) if name in offered and name not in asked]


def _measure(
    target: str,
    graph: ExportGraph,
    sides: Sequence[CheckedArtefact],
    asked: frozenset[str],
    checks: Checks,
    rounds: int,
    runs: int,
) -> Verdict:
    with ExitStack() as stack:
        runners = {
            side.decision.precision: stack.enter_context(
                open_engine(target, side.files, graph.spec, threads=checks.threads, rest_precision=side.rest_precision)
            ).run
            for side in sides
        }
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
                published=side.decision.precision in asked,
                samples_ms=samples[side.decision.precision],
                confidence=side.confidence,
            )
            for side in sorted(sides, key=lambda side: PRECISIONS.index(side.decision.precision))
        ),
    )


__all__ = ["NUM_INPUTS", "judge_sides", "sibling_precisions"]
