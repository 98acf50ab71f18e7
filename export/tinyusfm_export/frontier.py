"""Accuracy against latency: one target, all measured in one run.

Ever more of the most expensive layers are kept float.

Every point is a real artefact, built by its target, checked on the gate's frames in its own engine and timed in
interleaved rounds with the others, so a slow phase of the machine hits all of them. It does not know bundles or plots.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from tinyusfm_calibration.ranges import Ranges
from tinyusfm_export.quantize.decision import float_decision
from tinyusfm_export.quantize.ptq import PtqPolicy, decide
from tinyusfm_export.quantize.sensitivity import Sensitivity, keep_most_expensive
from tinyusfm_export.verify.artefact import CheckedArtefact, Checks, build_checked
from tinyusfm_export.verify.engine_run import open_engine
from tinyusfm_export.verify.parity import ParityReport
from tinyusfm_export.verify.verdict import Samples, measure_interleaved
from tinyusfm_runtime.numerics.order import wide

if TYPE_CHECKING:
    from tinyusfm_export.graph.build import ExportGraph

NUM_INPUTS = 8
"""Distinct inputs that the timed runs take turns with."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FrontierPoint:
    """One artefact.

    Attributes:
        kept_float: how many of the most expensive layers are float; -1 is the float32 artefact.
        report: its parity report.
        size_bytes: all files together.
        samples_ms: rounds of raw samples of the engine alone.
    """

    kept_float: int
    report: ParityReport
    size_bytes: int
    samples_ms: Samples

    @property
    def name(self) -> str:
        """Such as ``int8, 4 float``."""
        return "fp32" if self.kept_float < 0 else f"int8, {self.kept_float} float"

    def percentile(self, percent: float) -> float:
        """Percentile of all samples, ms."""
        return float(np.percentile(wide([sample for part in self.samples_ms for sample in part]), percent))

    @property
    def accuracy(self) -> float:
        """Agreement with the reference: mean Dice, top-1 or mean cosine, 0..1."""
        numbers = self.report.comparison.statistics
        return float(next(numbers[key] for key in ("dice_mean", "top1", "cosine_mean") if key in numbers))

    def to_json(self) -> dict[str, Any]:
        """Plain data with all samples."""
        return {
            "kept_float": self.kept_float,
            "gate_passed": bool(self.report),
            "failures": list(self.report.failures),
            "statistics": dict(self.report.comparison.statistics),
            "size_bytes": self.size_bytes,
            "p50_ms": self.percentile(50),
            "p90_ms": self.percentile(90),
            "p99_ms": self.percentile(99),
            "samples_ms": [list(part) for part in self.samples_ms],
        }

    def row(self) -> tuple[str, ...]:
        """Cells (artefact, agreement, worst Dice, MB, p50, p90, p99, gate) for people."""
        worst = self.report.comparison.statistics.get("dice_worst")
        return (
            self.name,
            f"{self.accuracy:.5f}",
            "-" if worst is None else f"{worst:.4f}",
            f"{self.size_bytes / 1e6:.1f}",
            *(f"{self.percentile(p):.2f}" for p in (50, 90, 99)),
            "passed" if self.report else "MISSED",
        )


def measure_frontier(
    graph: ExportGraph,
    target: str,
    ranges: Ranges,
    sensitivity: Sensitivity,
    checks: Checks,
    counts: Sequence[int],
    *,
    policy: PtqPolicy | None = None,
    rounds: int = 7,
    runs: int = 10,
    progress: Callable[[str, float], None] | None = None,
) -> tuple[FrontierPoint, ...]:
    """Builds, checks and times the artefacts.

    Args:
        graph: the export graph.
        target: name or alias.
        ranges: activation ranges.
        sensitivity: costs of the layers.
        checks: frames and gate.
        counts: how many layers to keep float; the float32 artefact is added.
        policy: what is int8 otherwise.
        rounds: interleaved rounds.
        runs: timed runs a round.
        progress: called with the step and the share done.

    Raises:
        CalibrationError, MissingExtra, UnsupportedError, EngineError: as in an export.
    """
    progress = progress or (lambda what, share: None)
    built: dict[int, CheckedArtefact] = {}
    for number, count in enumerate(counts):
        progress(f"building {target} with {count} float layers", 0.8 * number / (len(counts) + 1))
        decision = decide(graph, "int8", ranges, policy=keep_most_expensive(sensitivity, count, policy))
        built[count] = build_checked(target, graph, decision, checks, with_tolerance=False)
    built[-1] = build_checked(target, graph, float_decision("fp32"), checks, with_tolerance=False)
    progress("timing side by side", 0.8)
    with ExitStack() as stack:
        runners = {
            str(count): stack.enter_context(
                open_engine(
                    artefact.target,
                    artefact.files,
                    graph.spec,
                    threads=checks.threads,
                    rest_precision=artefact.rest_precision,
                )
            ).run
            for count, artefact in built.items()
        }
        inputs = [tensor for tensor, _ in checks.frames.inputs[:NUM_INPUTS]]
        samples = measure_interleaved(runners, inputs, rounds=rounds, runs=runs)
    return tuple(
        FrontierPoint(kept_float=count, report=item.report, size_bytes=item.size_bytes, samples_ms=samples[str(count)])
        for count, item in built.items()
    )


__all__ = ["NUM_INPUTS", "FrontierPoint", "measure_frontier"]
