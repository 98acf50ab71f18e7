"""Pages of the results that people mail around.

An export, a verification, a latency profile, an evaluation.

They show what the command printed, with the charts that a terminal lacks. They do not know the command line.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tinyusfm_edge.report.charts import histogram
from tinyusfm_edge.report.page import Block, Chart, Facts, Page, Table
from tinyusfm_runtime.device.engine_facts import with_place

if TYPE_CHECKING:
    from tinyusfm_export.pipeline import ExportResult
    from tinyusfm_export.verify.bundle import VerifyReport
    from tinyusfm_runtime.latency import LatencyReport

DEMANDS = ("artefact", "demand", "measured", "limit", "verdict")
SPEED = ("target", "precision", "computes in", "MB", "against the reference", "p50 ms", "p90 ms", "p99 ms", "gate")


def page_place(bundle: Path) -> Path:
    """The page of an exported bundle: ``NAME.html`` beside ``NAME.bundle``."""
    return bundle.with_name(f"{bundle.name.removesuffix('.bundle')}.html")


def export_page(result: ExportResult) -> Page:
    """What was published, how it was judged and how fast it was while it was judged.

    Args:
        result: the export.
    """
    missed = [name for name, report in result.reports.items() if not report]
    blocks: list[Block] = []
    rows = [row for verdict in result.verdicts for row in verdict.table()]
    if rows:
        blocks.append(Table(title="Precisions side by side", header=SPEED, rows=rows))
    blocks += [
        Chart(
            title=f"Latency, {verdict.target}",
            note=f"Engine alone, {verdict.threads} thread(s), interleaved rounds.",
            svg=histogram({side.precision: _flat(side.samples_ms) for side in verdict.sides}, "ms"),
        )
        for verdict in result.verdicts
        if any(part for side in verdict.sides for part in side.samples_ms)
    ]
    demands = [(name, *line) for name, report in result.reports.items() for line in report.table()]
    if demands:
        blocks.append(Table(title="Gate", header=DEMANDS, rows=demands))
    facts = [("bundle", result.path.name)]
    for report in list(result.reports.values())[:1]:
        about = report.comparison.provenance
        facts.append(("frames", f"{about.get('count')}: {about.get('about')}"))
    facts += [(f"pending {name}", with_place(why, result.path.name)) for name, why in result.pending.items()]
    facts += [("note", note) for note in result.notes]
    blocks.append(Facts(title="What this is", facts=facts))
    open_gate = any(not artefact.gated for artefact in result.artefacts)
    passed = not missed and not open_gate
    words = f"The gate was missed by {', '.join(missed)}." if missed else "Every artefact holds the gate."
    return Page(
        title=f"Export of {result.path.name}",
        passed=passed,
        headline="UNVERIFIED: the gate was switched off." if open_gate else words,
        lead=[f"{verdict.target}: {verdict.recommendation}" for verdict in result.verdicts],
        blocks=blocks,
    )


def _flat(rounds: Sequence[Sequence[float]]) -> list[float]:
    return [sample for part in rounds for sample in part]


def verify_page(report: VerifyReport) -> Page:
    """Every demand of every artefact, and what could not run here.

    Args:
        report: what verifying found.
    """
    notes = [(check.name, note) for check in report.checks for note in check.notes]
    skipped = [(check.name, f"not run here: {check.skipped}") for check in report.checks if check.skipped]
    facts = [("bundle", report.bundle_id), ("CPU", str(report.machine.get("cpu", "unknown"))), *notes, *skipped]
    for check in report.checks:
        if check.report is not None:
            about = check.report.comparison.provenance
            facts.append(("frames", f"{about.get('count')}: {about.get('about')}"))
            break
    return Page(
        title=f"Verification of {report.path.name}",
        passed=bool(report),
        headline=report.headline,
        lead=list(report.failures) if not report else [],
        blocks=[Table(title="Gate", header=DEMANDS, rows=report.table()), Facts(title="What this is", facts=facts)],
    )


def profile_page(report: LatencyReport, name: str) -> Page:
    """Stages of a prediction with all samples as a chart.

    Args:
        report: what was measured.
        name: of the bundle.
    """
    blocks: list[Block] = [Table(title="Stages", header=("stage", "p50 ms", "p90 ms", "p99 ms"), rows=report.table())]
    if report.n:
        samples = {stage.removesuffix("_ms"): list(values) for stage, values in report.samples_ms.items()}
        blocks.append(Chart(title="Every sample", note=f"{report.n} predictions", svg=histogram(samples, "ms")))
    machine = [(key.replace("_", " "), str(value)) for key, value in report.machine.items() if key != "features"]
    blocks.append(Facts(title="Machine", facts=[("engine", report.description), *machine]))
    total = ", ".join(f"p{percent} {report.percentile_text('total_ms', percent)}" for percent in (50, 99))
    return Page(
        title=f"Latency of {name}",
        passed=bool(report),
        headline=f"Frame to answer, ms: {total}." if report.n else "Nothing was measured.",
        blocks=blocks,
    )


def evaluate_page(name: str, split: str, tables: Sequence[Sequence[tuple[str, str]]]) -> Page:
    """Scores of a student.

    Args:
        name: of the student.
        split: that was scored.
        tables: rows (what, value), one table a threshold.
    """
    blocks: list[Block] = [
        Table(title="Scores", note="In brackets the 95 % interval over patients.", header=("what", "value"), rows=rows)
        for rows in tables
    ]
    first = next((f"{what} {value}" for what, value in tables[0][1:]), "nothing scored") if tables else "nothing scored"
    return Page(title=f"{name} on {split}", passed=True, headline=first, blocks=blocks)


__all__ = ["DEMANDS", "SPEED", "evaluate_page", "export_page", "page_place", "profile_page", "verify_page"]
