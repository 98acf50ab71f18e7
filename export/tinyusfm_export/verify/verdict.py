"""Verdict: was INT8 worth it here?

FP32, FP16 or BF16, and INT8 of one target side by side, measured on this machine.

Speed is the engine alone, input tensor to outputs, taken in interleaved rounds (every side once a round, in an order
that changes), so that a slow phase of the machine hits all sides; ratios are medians over rounds. It does not
know how artefacts are built or judged.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tinyusfm_export.verify.parity import ParityReport
from tinyusfm_runtime.numerics.order import wide

VERDICT_VERSION = 2
"""Version of the JSON that ``Verdict.to_json`` writes."""

WORTH_RATIO = 1.15
"""INT8 must be this many times as fast as the best float side to be worth its error: less is within the
machine's own phases (measured up to 1.1 on one thread)."""

Samples = tuple[tuple[float, ...], ...]
"""Rounds of raw samples, ms."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Side:
    """One precision of one target.

    Attributes:
        precision: ``fp32``, ``fp16``, ``bf16`` or ``int8``.
        rest_precision: ``f32`` or ``bf16``.
        form: how the decision was written, one phrase.
        size_bytes: all files together.
        report: its parity report.
        published: whether it stands in the bundle or was built for comparison alone.
        samples_ms: rounds of raw samples.
        confidence: how far its probabilities moved, see confidence.py.
        executed: what its engine says it computes in, one line; empty where it does not tell.
    """

    precision: str
    rest_precision: str
    form: str
    size_bytes: int
    report: ParityReport
    published: bool
    samples_ms: Samples
    confidence: Mapping[str, float] = field(default_factory=dict)
    executed: str = ""

    def percentile(self, percent: float) -> float:
        """Percentile of all samples, ms."""
        return float(np.percentile(wide([sample for part in self.samples_ms for sample in part]), percent))

    @property
    def computes_in(self) -> str:
        """What the arithmetic really is."""
        if self.precision == "fp16" and self.rest_precision == "f32":
            return "f32 (fp16 is storage only on this CPU)"
        if self.precision == "int8" and self.executed:
            return self.executed
        return f"int8 and {self.rest_precision}" if self.precision == "int8" else self.rest_precision

    def to_json(self) -> dict[str, Any]:
        """Plain data with all samples."""
        return {
            "precision": self.precision,
            "computes_in": self.computes_in,
            "form": self.form,
            "size_bytes": self.size_bytes,
            "published": self.published,
            "gate_passed": bool(self.report),
            "failures": list(self.report.failures),
            "statistics": dict(self.report.comparison.statistics),
            "confidence": dict(self.confidence),
            "p50_ms": self.percentile(50),
            "p90_ms": self.percentile(90),
            "p99_ms": self.percentile(99),
            "samples_ms": [list(part) for part in self.samples_ms],
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """The sides of one target and what follows from them. True if INT8 is worth it.

    Attributes:
        target: public name.
        threads: threads inside the engine.
        machine: machine card, plain data.
        sides: slowest kind of arithmetic first: fp32, fp16, bf16, int8.
    """

    target: str
    threads: int
    machine: Mapping[str, Any]
    sides: tuple[Side, ...]

    def __bool__(self) -> bool:
        int8, best = self.side("int8"), self._best_float()
        if int8 is None or not int8.report or not self.compared:
            return False
        return best is None or ratio(best, int8) >= WORTH_RATIO

    @property
    def compared(self) -> bool:
        """Whether a float side was measured too.

        Without one nothing is said about speed and size.
        """
        return any(side.precision != "int8" for side in self.sides)

    def side(self, precision: str) -> Side | None:
        """The side of a precision, if it was measured."""
        return next((side for side in self.sides if side.precision == precision), None)

    @property
    def recommendation(self) -> str:
        """One sentence for people."""
        int8, best = self.side("int8"), self._best_float()
        if int8 is None:
            return self._float_sentence(best)
        if not int8.report:
            instead = f"; take {best.precision.upper()}" if best else "; no precision passed"
            return f"INT8 was not worth it here: it misses the gate ({'; '.join(int8.report.failures)}){instead}."
        if not self.compared:
            return "Only INT8 was measured; speed and size were not compared."
        if best is None:
            return "INT8 is the only precision that passed its gate here; the float ones missed it."
        return self._int8_sentence(int8, best)

    def _int8_sentence(self, int8: Side, best: Side) -> str:
        # both baselines are FP32 of the same target, whichever float side was faster that minute
        fp32 = self.side("fp32") or best
        base, smaller = fp32.precision.upper(), fp32.size_bytes / int8.size_bytes
        sizes = f"{int8.size_bytes / 1e6:.1f} against {fp32.size_bytes / 1e6:.1f} MB"
        facts = [f"{ratio(fp32, int8):.2f}x as fast as {base}", f"{smaller:.1f}x smaller than {base} ({sizes})"]
        if best is not fp32:
            facts.append(f"{ratio(best, int8):.2f}x as fast as {best.precision.upper()}, the fastest float")
        shown = agreement(int8.report)
        facts_line = f"{', '.join(facts)}, p50 {int8.percentile(50):.1f} ms on {self.threads} thread(s){shown}"
        if self:
            return f"INT8 was worth it here: {facts_line}."
        instead = f"take {best.precision.upper()} unless the file size matters" if smaller > 1 else "take FP32"
        return f"INT8 was not worth it here: only {facts_line}; {instead}."

    def _float_sentence(self, best: Side | None) -> str:
        if best is None:
            return "No precision passed its gate here."
        note = "; FP16 saves space, not time, on this CPU" if self.side("fp16") else ""
        return f"No INT8 was measured; the fastest is {best.precision.upper()}, p50 {best.percentile(50):.1f} ms{note}."

    def _best_float(self) -> Side | None:
        good = [side for side in self.sides if side.precision != "int8" and side.report]
        return min(good, key=lambda side: side.percentile(50), default=None)

    def to_json(self) -> dict[str, Any]:
        """Plain data with all samples, ready for ``json.dumps``."""
        return {
            "version": VERDICT_VERSION,
            "target": self.target,
            "threads": self.threads,
            "machine": dict(self.machine),
            "worth_it": bool(self),
            "recommendation": self.recommendation,
            "sides": [side.to_json() for side in self.sides],
        }

    def confidence_table(self) -> list[tuple[str, ...]]:
        """Rows on the change of confidence, for people.

        (target, precision, probability change, threshold shift, ECE before and after, flicker).
        """
        keys = ("probability_change", "threshold_shift", "ece_reference", "ece_artefact", "flicker_excess")
        return [
            (
                self.target,
                side.precision,
                *(f"{side.confidence[key]:+.4f}" if key in side.confidence else "-" for key in keys),
            )
            for side in self.sides
            if side.confidence
        ]

    def table(self) -> list[tuple[str, ...]]:
        """Rows of the verdicts, for people.

        (target, precision, computes in, MB, agreement, p50, p90, p99 in ms, gate).
        """
        return [
            (
                self.target,
                side.precision,
                side.computes_in,
                f"{side.size_bytes / 1e6:.1f}",
                agreement(side.report).lstrip(", ") or "-",
                *(f"{side.percentile(p):.2f}" for p in (50, 90, 99)),
                "passed" if side.report else "MISSED",
            )
            for side in self.sides
        ]


def ratio(slow: Side, fast: Side) -> float:
    """How many times as fast the second side is.

    Median over rounds of the ratio of the rounds' medians.
    """
    return times_as_fast(slow.samples_ms, fast.samples_ms)


def times_as_fast(slow_ms: Samples, fast_ms: Samples) -> float:
    """The same for two rounds of samples that were taken in turn, ms."""
    pairs = zip(slow_ms, fast_ms, strict=True)
    return float(np.median(wide([np.median(wide(a)) / np.median(wide(b)) for a, b in pairs])))


def measure_interleaved(
    runners: Mapping[str, Callable[[np.ndarray], object]],
    inputs_NCHW: Sequence[np.ndarray],
    *,
    rounds: int,
    runs: int,
    warm_up: int = 2,
) -> dict[str, Samples]:
    """Times several engines in turn.

    Args:
        runners: name -> runs one input.
        inputs_NCHW: uint8 inputs, used in turn.
        rounds: how often every engine has its turn.
        runs: timed runs in a turn.
        warm_up: untimed runs before them.

    Returns:
        name -> rounds of samples, ms.
    """
    order = np.random.default_rng(0)
    names = list(runners)
    samples: dict[str, list[tuple[float, ...]]] = {name: [] for name in names}
    for _ in range(rounds):
        for index in order.permutation(len(names)):
            run, name = runners[names[index]], names[index]
            for i in range(warm_up):
                run(inputs_NCHW[i % len(inputs_NCHW)])
            samples[name].append(tuple(_time_ms(run, inputs_NCHW[i % len(inputs_NCHW)]) for i in range(runs)))
    return {name: tuple(found) for name, found in samples.items()}


def _time_ms(run: Callable[[np.ndarray], object], tensor: np.ndarray) -> float:
    start = time.perf_counter_ns()
    run(tensor)
    return (time.perf_counter_ns() - start) / 1e6


def agreement(report: ParityReport) -> str:
    """The main statistics of a report in words, each behind a comma."""
    numbers = report.comparison.statistics
    shown = [
        f"{words} {numbers[key]:{form}}{unit}"
        for key, words, form, unit in (
            ("dice_mean", "mean Dice", ".4f", ""),
            ("dice_worst", "worst", ".4f", ""),
            ("hc_p95_mm", "HC p95", ".2f", " mm"),
            ("top1", "top-1", ".3f", ""),
            ("cosine_mean", "cosine", ".4f", ""),
        )
        if key in numbers
    ]
    return f", {', '.join(shown)}" if shown else ""


__all__ = [
    "VERDICT_VERSION",
    "WORTH_RATIO",
    "Samples",
    "Side",
    "Verdict",
    "agreement",
    "measure_interleaved",
    "ratio",
    "times_as_fast",
]
