"""What a missed gate leaves beside the goal.

``NAME.failed.json`` for machines and ``NAME.failed.html`` to look at.

No bundle is published then, and the numbers behind the refusal are not lost. A later export that passes removes both.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from tinyusfm_runtime import atomic
from tinyusfm_runtime.errors import GateError

if TYPE_CHECKING:
    from tinyusfm_edge.report.page import Block
    from tinyusfm_export.verify.parity import ParityReport

FAILED_VERSION = 1
"""Version of the JSON form."""
WORST_FRAMES = 12
"""Frames of each artefact on the page, the worst first."""


def failed_places(bundle: Path) -> tuple[Path, Path]:
    """The JSON file and the page of a bundle that missed its gate."""
    stem = bundle.name.removesuffix(".bundle")
    return bundle.with_name(f"{stem}.failed.json"), bundle.with_name(f"{stem}.failed.html")


@contextmanager
def failed_report(bundle: Path) -> Iterator[None]:
    """Writes the reports of a gate that is missed inside the context.

    The error goes on with the page's name.

    Args:
        bundle: what was to be published.

    Raises:
        GateError: as it came, the report named in it.
        OutputError: the report cannot be written.
    """
    try:
        yield
    except GateError as error:
        reports = getattr(error.report, "reports", None)
        if not isinstance(reports, Mapping) or not reports:
            raise
        data, page = failed_places(bundle)
        content = {
            "kind": "tinyusfm-edge failed gate",
            "version": FAILED_VERSION,
            "bundle": bundle.name,
            "why": str(error),
            "reports": {name: report.to_json() for name, report in reports.items()},
        }
        atomic.write_file(
            data, (json.dumps(content, indent=1, sort_keys=True) + "\n").encode(), "the failed gate's report"
        )
        atomic.write_file(page, failed_page(bundle.name, reports).encode(), "the failed gate's page")
        raise GateError(f"{error} (report: {page}, {data})", error.report) from error


def forget_failed(bundle: Path) -> None:
    """Removes what an earlier, missed gate left for this bundle."""
    for place in failed_places(bundle):
        place.unlink(missing_ok=True)


def failed_page(name: str, reports: Mapping[str, ParityReport]) -> str:
    """The page.

    Args:
        name: of the bundle that was not published.
        reports: artefact name -> its comparison with the reference.
    """
    from tinyusfm_edge.report.page import Facts, Page, Table, render

    missed = [artefact for artefact, report in reports.items() if not report]
    blocks: list[Block] = []
    for artefact, report in reports.items():
        rows = [
            (line.name, f"{line.value:.5g}", f"{line.limit:.5g}", "passed" if line.passed else "missed")
            for line in report.lines
        ]
        header = ("demand", "measured", "limit", "verdict")
        blocks.append(
            Table(title=artefact, note="; ".join((*report.failures, *report.notes)), header=header, rows=rows)
        )
        blocks += _worst_frames(artefact, report)
    provenance = next(iter(reports.values())).comparison.provenance
    facts = [
        ("frames", f"{provenance.get('count')}: {provenance.get('about')}"),
        ("data", str(provenance.get("source") or "-")),
        *((f"gate {key}", f"{value:g}") for key, value in next(iter(reports.values())).limits.items()),
    ]
    blocks.append(Facts(title="How it was judged", facts=facts))
    return render(
        Page(
            title=f"{name} was not published",
            passed=False,
            headline=f"The gate was missed by {', '.join(missed)}.",
            lead=["tinyusfm-edge gate show explains every demand; --gate FILE sets others, which the bundle records."],
            blocks=blocks,
        )
    )


def _worst_frames(artefact: str, report: ParityReport) -> list[Block]:
    from tinyusfm_edge.report.page import Table

    frames = report.comparison.frames
    keys = [key for key in ("dice", "hc_diff_mm", "drift", "cosine", "differing_pixels") if key in _keys(frames)]
    if not keys:
        return []
    sign = 1.0 if keys[0] in ("dice", "cosine") else -1.0
    known = [(frame.values.get(keys[0]), frame) for frame in frames]
    ranked = sorted((sign * value, number) for number, (value, _) in enumerate(known) if value is not None)
    worst = [known[number][1] for _, number in ranked[:WORST_FRAMES]]
    rows = [
        (f"#{frame.id[:8]}", "counts" if frame.counted else "small", *(_number(frame.values.get(key)) for key in keys))
        for frame in worst
    ]
    note = "Frames are named by the hash of their pixels; small masks do not count."
    return [Table(title=f"Worst frames of {artefact}", note=note, header=("frame", "mask", *keys), rows=rows)]


def _keys(frames: object) -> set[str]:
    return {key for frame in frames for key in frame.values}  # type: ignore[attr-defined]


def _number(value: object) -> str:
    return f"{value:.5g}" if isinstance(value, (int, float)) else "-"


__all__ = ["FAILED_VERSION", "WORST_FRAMES", "failed_page", "failed_places", "failed_report", "forget_failed"]
