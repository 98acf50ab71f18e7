"""What a run found: as rows for people, as plain data, as a page."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tinyusfm_edge.report.charts import histogram, scatter
from tinyusfm_edge.report.page import Block, Chart, Facts, Page, Table
from tinyusfm_edge.tuning.choice import TuneChoice, TuneRow, accuracy_words
from tinyusfm_edge.tuning.rounds import TuneState

TUNE_VERSION = 1
"""Version of the report."""
HEADER = (
    "variant",
    "artefact",
    "threads",
    "pinning",
    "p50 ms",
    "p90 ms",
    "p99 ms",
    "network ms",
    "agreement",
    "gate",
    "MB",
)
"""Columns of the table."""
MOST_ROWS = 24
"""Rows that are printed; page and JSON hold all."""
SHOWN_AT_ONCE = 4
"""Rows whose samples are drawn."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TuneReport:
    """Everything that a run found.

    Attributes:
        rows: of all candidates that were tried.
        choice: the pick.
        state: every visit.
        left_out: artefact or target -> why it was not tried.
        host: device that measured, or empty for this machine.
        recipe: text of the recipe, or empty.
    """

    rows: Sequence[TuneRow]
    choice: TuneChoice
    state: TuneState
    left_out: Mapping[str, str] = field(default_factory=dict)
    host: str = ""
    recipe: str = ""

    @property
    def machine(self) -> Mapping[str, Any]:
        """Card of the machine that measured."""
        found: Mapping[str, Any] = self.state.about.get("machine", {})
        return found

    @property
    def busy(self) -> str:
        """What must be known where other programs ran beside the measurement, or nothing."""
        loads = [one["conditions"].get("load") for one in self.state.visits if "conditions" in one]
        most, cpus = max((load for load in loads if load), default=0.0), int(self.machine.get("usable_cpus", 1))
        if most <= cpus + 1.0:  # the measurement itself counts for about one
            return ""
        return f"the machine was busy (load up to {most:.0f} on {cpus} CPUs): measure again on a quiet one"

    def ordered(self) -> list[TuneRow]:
        """The pick, then by variant those that hold their gate, fastest first."""
        pick = self.choice.pick
        return sorted(
            self.rows,
            key=lambda row: (row is not pick, row.candidate.rank, bool(row.why_not), row.median_ms, row.candidate.key),
        )

    def to_json(self) -> dict[str, Any]:
        """Plain data with every sample."""
        return {
            "kind": "tinyusfm-edge tune",
            "version": TUNE_VERSION,
            "choice": self.choice.to_json(),
            "rows": [row.to_json() for row in self.ordered()],
            "left_out": dict(self.left_out),
            "host": self.host,
            "busy": self.busy,
            "recipe": self.recipe,
            "state": self.state.to_json(),
        }


def cells(row: TuneRow) -> tuple[str, ...]:
    """One row of the table, see ``HEADER``.

    Args:
        row: with its figures.
    """
    one = row.candidate
    p90 = row.p90.text() if row.p90.value is not None else "-"
    p99 = f"{row.p99.value:.2f}" if row.p99.value is not None else "-"
    gate = "MISSED" if row.why_not and row.samples_ms else "failed" if row.why_not else "holds"
    return (
        one.variant, one.artefact, str(one.threads), one.pinning,
        f"{row.median_ms:.2f}" if row.samples_ms else "-", p90, p99,
        f"{row.infer_ms:.2f}" if row.infer_ms is not None else "-",
        accuracy_words(row.accuracy) or "-", gate, f"{row.rss_mb:.0f}" if row.rss_mb else "-",
    )  # fmt: skip


_FIGURES = (
    ("dice_mean", "mean Dice", "{:.4f}"), ("dice_worst", "worst", "{:.4f}"), ("hc_p95_mm", "HC p95 mm", "{:.2f}"),
    ("top1", "top-1", "{:.3f}"), ("cosine_mean", "cosine", "{:.4f}"),
)  # fmt: skip
"""Columns of accuracy on the page: statistic, name, form."""


def page_table(rows: Sequence[TuneRow]) -> Table:
    """The rows with a column for each statistic that one of them has.

    Args:
        rows: in their order.
    """
    figures = [one for one in _FIGURES if any(one[0] in row.accuracy for row in rows)]
    names = [name for _, name, _ in figures]
    header = ("candidate", *HEADER[2:6], "p90 at most", "gate", *names, *HEADER[6:8], HEADER[-1])
    found = []
    for row in rows:
        words = cells(row)
        shown = [form.format(row.accuracy[key]) if key in row.accuracy else "-" for key, _, form in figures]
        p90, most = words[5].partition(" (")[0], f"{row.decides_ms:.2f}" if math.isfinite(row.decides_ms) else "-"
        name = f"{row.candidate.variant} {row.candidate.artefact}"
        found.append((name, *words[2:5], p90, most, words[9], *shown, *words[6:8], words[-1]))
    note = (
        "Frame to answer in a process of its own, all in turns. The budget is held against "
        "'p90 at most', the upper end of its 95 % interval. Dice and the like are against the PyTorch reference. "
        "A row that misses its gate is never picked."
    )
    return Table(title="What was tried", note=note, header=header, rows=found)


def tune_page(report: TuneReport) -> Page:
    """The page: pick, table, accuracy against latency, samples, machine.

    Args:
        report: of a run.
    """
    choice, rows = report.choice, report.ordered()
    blocks: list[Block] = []
    if choice.would:
        would = [(f"{number}", line) for number, line in enumerate(choice.would, 1)]
        blocks.append(Table(title="What would meet the budget", header=("", "what"), rows=would))
    blocks.append(page_table(rows))
    # rows that were left after a round have too few samples for a 90th percentile; one axis shows one percentile
    percent = 90 if all(row.p90.value is not None for row in rows if row.samples_ms) else 50
    if spots := _spots(rows, percent):
        words = "Filled: holds its gate." + (" The dashed line is the budget." if choice.budget_ms else "")
        svg = scatter(spots, f"p{percent} of frame to answer, ms", _axis(rows), limit_x=choice.budget_ms, most_y=1.0)
        blocks.append(Chart(title="Accuracy against latency", note=words, svg=svg))
    shown = [row for row in rows if row.samples_ms and not row.why_not][:SHOWN_AT_ONCE]
    if shown:
        samples = {_short(row, shown): list(row.samples_ms) for row in shown}
        note = "Every sample of the first rows of the table, frame to answer."
        blocks.append(Chart(title="Samples", note=note, svg=histogram(samples, "ms")))
    if out := [*report.left_out.items(), *((row.name, row.why_not) for row in rows if row.why_not)]:
        blocks.append(Table(title="Not picked, and why", header=("what", "why"), rows=out))
    if report.recipe:
        blocks.append(Facts(title="The recipe", facts=_recipe_facts(report.recipe)))
    about = {**report.machine, **report.state.about.get("setup", {})}
    machine = [(key.replace("_", " "), _plain(value)) for key, value in about.items()]
    blocks.append(Facts(title="Machine", facts=[("measured on", report.host or "this machine"), *machine]))
    return Page(
        title="What runs best here" if not report.host else f"What runs best on {report.host}",
        passed=bool(choice),
        headline=choice.reason,
        lead=[report.busy] if report.busy else [],
        blocks=blocks,
    )


def _recipe_facts(text: str) -> list[tuple[str, str]]:
    """Names and values of a recipe in TOML or JSON."""
    if not text.lstrip().startswith("{"):
        return [(name, value) for name, mark, value in (x.partition(" = ") for x in text.splitlines()) if mark]
    flat = {**json.loads(text)}
    flat |= {**flat.pop("budget", {}), **flat.pop("run", {})}
    return [(name, _plain(value)) for name, value in flat.items()]


def _plain(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _spots(rows: Sequence[TuneRow], percent: int) -> list[tuple[str, float, float, bool]]:
    """Points of the chart at a percentile; those of one artefact have one name."""
    found = []
    for row in sorted(rows, key=lambda row: row.median_ms):
        x = row.median_ms if percent == 50 else row.p90.value if row.p90.value is not None else math.inf
        if math.isfinite(x) and math.isfinite(row.agreement):
            name = f"{row.candidate.variant} {row.candidate.artefact}"
            found.append((name, x, row.agreement, not row.why_not))
    return found


def _axis(rows: Sequence[TuneRow]) -> str:
    names = {"dice_mean": "mean Dice", "top1": "top-1 agreement", "cosine_mean": "cosine"}
    found = [words for key, words in names.items() if any(key in row.accuracy for row in rows)]
    return f"{' or '.join(found) or 'agreement'} against the reference"


def _short(row: TuneRow, shown: Sequence[TuneRow]) -> str:
    """Name of a row in the legend, without what all shown rows share."""
    return row.name if len({one.candidate.variant for one in shown}) > 1 else row.name.partition(" ")[2]


__all__ = ["HEADER", "MOST_ROWS", "SHOWN_AT_ONCE", "TUNE_VERSION", "TuneReport", "cells", "page_table", "tune_page"]
