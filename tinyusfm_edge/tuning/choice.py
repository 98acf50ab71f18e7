"""Rows of figures, and which one is picked.

The rule, in this order: a row that misses its gate is never picked; a row meets the budget if the upper end of the
interval of its 90th percentile does; variants come in the order in which they were given, so that a faster and less
accurate one is taken only where the ones before it are too slow; inside a variant the fastest row counts, and of those
within ``BAND`` of it the one with the fewest threads, then without pinning, then closest to the reference.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tinyusfm_edge.tuning.candidates import TuneCandidate, TuneVariant
from tinyusfm_edge.tuning.rounds import TuneState, why_not
from tinyusfm_runtime.latency import STAGES
from tinyusfm_runtime.numerics.order import wide
from tinyusfm_runtime.profiling.quantiles import Quantile, quantile

BAND = 1.05
"""Rows of one variant that are this close to its fastest one are equally fast."""
DECIDES = 90.0
"""Percentile that the budget is held against."""
ACCURACY = ("dice_mean", "dice_worst", "hc_p95_mm", "top1", "drift_worst", "cosine_mean", "cosine_worst")
"""Statistics that are shown, where the gate has them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TuneRow:
    """One candidate with its figures.

    Attributes:
        candidate: what was tried.
        samples_ms: frame to answer, every sample.
        infer_ms: median time of the engine alone, or None.
        p50: median of the samples.
        p90: 90th percentile.
        p99: 99th percentile.
        rounds: rounds it took part in.
        accuracy: statistics against the PyTorch reference.
        judged: what those were measured on.
        why_not: why it is never picked, or nothing.
        rss_mb: largest memory of its process, or None.
        load_ms: opening until the first answer, or None.
        description: engine really used.
    """

    candidate: TuneCandidate
    samples_ms: tuple[float, ...] = ()
    infer_ms: float | None = None
    p50: Quantile
    p90: Quantile
    p99: Quantile
    rounds: int = 1
    accuracy: Mapping[str, float] = field(default_factory=dict)
    judged: str = ""
    why_not: str = ""
    rss_mb: float | None = None
    load_ms: float | None = None
    description: str = ""

    @property
    def median_ms(self) -> float:
        """Median of the samples, infinite where there are none."""
        return float(np.median(wide(self.samples_ms))) if self.samples_ms else math.inf

    @property
    def decides_ms(self) -> float:
        """Upper end of the 90th percentile's interval, which the budget is held against.

        Infinite where the samples support none.
        """
        return self.p90.high if self.p90.high is not None else math.inf

    @property
    def bound_ms(self) -> float:
        """What would have to lie within a budget; of too few samples the slowest one."""
        return self.decides_ms if self.decides_ms < math.inf else max(self.samples_ms, default=math.inf)

    @property
    def agreement(self) -> float:
        """How close to the reference, larger is closer; minus infinity where nobody knows."""
        return next(
            (self.accuracy[name] for name in ("dice_mean", "top1", "cosine_mean") if name in self.accuracy), -math.inf
        )

    @property
    def name(self) -> str:
        """The candidate in words."""
        one = self.candidate
        threads = f"{one.threads} thread{'' if one.threads == 1 else 's'}"
        return f"{one.variant} {one.artefact}, {threads}, {one.pinning}"

    def meets(self, budget_ms: float | None) -> bool:
        """Whether it holds its gate and a budget.

        Args:
            budget_ms: for a frame; None is met by everything that was measured.
        """
        if self.why_not or not self.samples_ms:
            return False
        return budget_ms is None or self.decides_ms <= budget_ms

    def to_json(self) -> dict[str, Any]:
        """Plain data with every sample."""
        return {
            **self.candidate.to_json(),
            "description": self.description,
            "samples_ms": list(self.samples_ms),
            "quantiles_ms": [found.to_json() for found in (self.p50, self.p90, self.p99)],
            "infer_ms": self.infer_ms,
            "rounds": self.rounds,
            "accuracy": dict(self.accuracy),
            "judged": self.judged,
            "holds_gate": not self.why_not,
            "why_not": self.why_not,
            "rss_mb": self.rss_mb,
            "load_ms": self.load_ms,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class TuneChoice:
    """The pick, or what comes nearest.

    Attributes:
        budget_ms: that was asked for, or None.
        pick: the row that is picked, or None.
        nearest: the row that comes nearest where none meets the budget, or None where none holds its gate.
        ratio: time of the nearest one over the budget, or None.
        reason: one sentence.
        would: what would meet the budget where nothing did, a line each; see advice.py.
    """

    budget_ms: float | None
    pick: TuneRow | None = None
    nearest: TuneRow | None = None
    ratio: float | None = None
    reason: str = ""
    would: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return self.pick is not None

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "budget_ms": self.budget_ms,
            "pick": None if self.pick is None else self.pick.candidate.key,
            "nearest": None if self.nearest is None else self.nearest.candidate.key,
            "ratio": self.ratio,
            "reason": self.reason,
            "would": list(self.would),
        }


def make_rows(candidates: Sequence[TuneCandidate], state: TuneState, variants: Sequence[TuneVariant]) -> list[TuneRow]:
    """Rows of what was measured; a candidate without a visit has none.

    Args:
        candidates: what was tried.
        state: what was measured.
        variants: the bundles, for what their gates say.
    """
    gates = {(v.name, a.name): a.gate or {} for v in variants for a in v.artefacts}
    return [
        _row(one, visits, gates.get((one.variant, one.artefact), {}))
        for one in candidates
        if (visits := state.of(one.key))
    ]


def _row(candidate: TuneCandidate, visits: Sequence[Mapping[str, Any]], gate: Mapping[str, Any]) -> TuneRow:
    whole = [one for one in visits if "error" not in one]
    stages = {stage: tuple(x for one in whole for x in one["samples_ms"][stage]) for stage in STAGES}
    totals = stages["total_ms"]
    accuracy, judged = _accuracy(gate, whole)
    infer = float(np.median(wide(stages["infer_ms"]))) if stages["infer_ms"] else None
    memory = [one["conditions"]["peak_rss_mb"] for one in whole if one["conditions"].get("peak_rss_mb")]
    loads = [one["startup_ms"].get("load", 0.0) + one["startup_ms"].get("first_frame", 0.0) for one in whole]
    return TuneRow(
        candidate=candidate,
        samples_ms=totals,
        infer_ms=infer,
        p50=quantile(totals, 50.0),
        p90=quantile(totals, DECIDES),
        p99=quantile(totals, 99.0),
        rounds=len({one["round"] for one in whole}),
        accuracy=accuracy,
        judged=judged,
        why_not=next((why for one in visits if (why := why_not(one))), ""),
        rss_mb=max(memory) if memory else None,
        load_ms=float(np.median(wide(loads))) if loads else None,
        description=str(whole[-1]["description"]) if whole else "",
    )


def _accuracy(gate: Mapping[str, Any], visits: Sequence[Mapping[str, Any]]) -> tuple[dict[str, float], str]:
    """Statistics of the artefact's gate, else of the golden frames here."""
    found = gate.get("statistics")
    if isinstance(found, Mapping):
        frames = gate.get("frames") if isinstance(gate.get("frames"), Mapping) else {}
        about = f"{frames.get('count', '?')} frames, {frames.get('about', 'at export')}"  # type: ignore[union-attr]
        return {name: float(found[name]) for name in ACCURACY if name in found}, about
    for one in visits:
        golden = one["golden"]
        if golden["against"] == "reference":
            shown = {name: float(golden["numbers"][name]) for name in ACCURACY if name in golden["numbers"]}
            return shown, f"{golden['frames']} golden frames, here"
    return {}, ""


def decide(rows: Sequence[TuneRow], budget_ms: float | None) -> TuneChoice:
    """Picks a row by the rule at the top of this file.

    Args:
        rows: in any order.
        budget_ms: for a whole frame, or None for the fastest of the first variant.
    """
    good = [row for row in rows if row.meets(budget_ms)]
    if not good:
        return _unmet(rows, budget_ms)
    first = min(row.candidate.rank for row in good)
    mine = [row for row in good if row.candidate.rank == first]
    fastest = min(map(_time, mine))
    close = [row for row in mine if _time(row) <= BAND * fastest]
    pick = min(close, key=_preferred)
    return TuneChoice(budget_ms=budget_ms, pick=pick, reason=_why(pick, rows, budget_ms))


def _time(row: TuneRow) -> float:
    return row.p90.value if row.p90.value is not None else row.median_ms


def _preferred(row: TuneRow) -> tuple[int, int, float, float, str]:
    one = row.candidate
    return one.threads, len(one.cpus), -row.agreement, _time(row), one.key


def _why(pick: TuneRow, rows: Sequence[TuneRow], budget_ms: float | None) -> str:
    within = "" if budget_ms is None else f" within {budget_ms:g} ms"
    facts = [f"p90 {pick.p90.text()} ms{within}" if pick.p90.value is not None else f"p50 {pick.median_ms:.2f} ms"]
    if shown := accuracy_words(pick.accuracy):
        facts.append(f"holds its gate ({shown})")
    before = {row.candidate.variant for row in rows if row.candidate.rank < pick.candidate.rank}
    if before:
        facts.append(f"{', '.join(sorted(before))} came first, but no row of it holds its gate and the budget")
    others = [
        row
        for row in rows
        if row.candidate.variant == pick.candidate.variant
        and row.candidate.artefact != pick.candidate.artefact
        and not row.why_not
        and row.samples_ms
    ]
    if others:
        # medians: not every row has samples for a 90th percentile
        second = min(others, key=lambda row: row.median_ms)
        times = second.median_ms / pick.median_ms
        facts.append(f"by medians {times:.2f} times as fast as {second.candidate.artefact} at its best")
    return f"{pick.name}: {'; '.join(facts)}"


def _unmet(rows: Sequence[TuneRow], budget_ms: float | None) -> TuneChoice:
    holding = [row for row in rows if not row.why_not and row.samples_ms]
    if not holding or budget_ms is None:
        wrong = min((row for row in rows if row.why_not), key=lambda row: row.median_ms, default=None)
        aside = f": {wrong.name} {wrong.why_not}" if wrong is not None else ""
        return TuneChoice(budget_ms=budget_ms, reason=f"no candidate ran and held its gate here{aside}")
    nearest = min(holding, key=lambda row: (row.bound_ms, row.candidate.key))
    ratio = nearest.bound_ms / budget_ms
    if ratio <= 1.0:
        few = f"{len(nearest.samples_ms)} samples bound no 90th percentile ({nearest.p90.needed} do)"
        rounds = math.ceil(nearest.p90.needed * nearest.rounds / len(nearest.samples_ms))
        reason = f"{nearest.name} may meet {budget_ms:g} ms, but {few}: the same command with --rounds {rounds} goes on"
        return TuneChoice(budget_ms=budget_ms, nearest=nearest, ratio=ratio, reason=reason)
    what = "the upper end of its p90" if nearest.decides_ms < math.inf else "its slowest frame"
    reason = (
        f"no variant meets {budget_ms:g} ms here; nearest is {nearest.name}: {what} is {nearest.bound_ms:.2f} ms, "
        f"{ratio:.2f} times the budget"
    )
    return TuneChoice(budget_ms=budget_ms, nearest=nearest, ratio=ratio, reason=reason)


def accuracy_words(accuracy: Mapping[str, float]) -> str:
    """The main statistics in words.

    Args:
        accuracy: by name.
    """
    shown = (
        ("dice_mean", "mean Dice {:.4f}"), ("dice_worst", "worst {:.4f}"), ("hc_p95_mm", "HC p95 {:.2f} mm"),
        ("top1", "top-1 {:.3f}"), ("cosine_mean", "cosine {:.4f}"),
    )  # fmt: skip
    return ", ".join(form.format(accuracy[name]) for name, form in shown if name in accuracy)


__all__ = ["ACCURACY", "BAND", "DECIDES", "TuneChoice", "TuneRow", "accuracy_words", "decide", "make_rows"]
