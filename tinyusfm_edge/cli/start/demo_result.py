"""Numbers of the demo: what each artefact answered, and the table made of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tinyusfm_export.pipeline import ExportResult
    from tinyusfm_export.verify.bundle import VerifyReport
    from tinyusfm_runtime.bundle.manifest import Artefact
    from tinyusfm_runtime.frame import Frame
    from tinyusfm_runtime.latency import LatencyReport
    from tinyusfm_runtime.results import Prediction


@dataclass(frozen=True, kw_only=True, slots=True)
class Replay:
    """What one artefact said in the demo.

    Attributes:
        artefact: the manifest's entry.
        description: artefact and engine really used.
        clip: a prediction for every frame of the clip.
        known: a prediction for every phantom of known circumference.
        latency: frame to mask, warm.
        size_bytes: all files of the artefact.
    """

    artefact: Artefact
    description: str
    clip: tuple[Prediction, ...]
    known: tuple[Prediction, ...]
    latency: LatencyReport
    size_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Demo:
    """Everything the demo found.

    Attributes:
        name: of the student.
        exported: the bundle and its reports.
        verified: the live check of what was published.
        replays: one per artefact, the first choice first.
        clip: frames of the clip.
        known: phantom frames.
        truth_mm: their circumferences, mm.
    """

    name: str
    exported: ExportResult
    verified: VerifyReport
    replays: tuple[Replay, ...]
    clip: tuple[Frame, ...]
    known: tuple[Frame, ...]
    truth_mm: tuple[float, ...]


HEADER = ("target", "precision", "MB", "Dice mean", "worst", "HC p95 mm", "p50 ms", "p90", "p99", "verdict")
"""Columns of the demo's table: agreement with the PyTorch reference on the gate's frames, and frame to mask in ms."""


def table_rows(found: Demo) -> list[tuple[str, ...]]:
    """The demo's one table."""
    rows = []
    for replay in found.replays:
        check = next(c for c in found.verified.checks if c.name == replay.artefact.name)
        numbers = check.report.comparison.statistics if check.report is not None else {}
        rows.append(
            (
                replay.artefact.target,
                replay.artefact.precision,
                f"{replay.size_bytes / 1e6:.1f}",
                *(f"{numbers[key]:.4f}" if key in numbers else "-" for key in ("dice_mean", "dice_worst")),
                f"{numbers['hc_p95_mm']:.2f}" if "hc_p95_mm" in numbers else "-",
                *(f"{replay.latency.percentile('total_ms', percent):.1f}" for percent in (50, 90, 99)),
                "passed" if check.report else "MISSED",
            )
        )
    return rows


def known_lines(found: Demo) -> list[str]:
    """How near each artefact came to the circumferences that are known."""
    lines = []
    for replay in found.replays:
        errors = [
            abs(p.measurement.hc_mm - truth)
            for p, truth in zip(replay.known, found.truth_mm, strict=True)
            if p.measurement is not None and p.measurement.hc_mm is not None
        ]
        worst = (
            f"mean error {sum(errors) / len(errors):.2f} mm, largest {max(errors):.2f} mm"
            if errors
            else "no head found"
        )
        lines.append(
            f"phantoms   {replay.artefact.target}: known circumference of {len(found.truth_mm)} phantoms, {worst}"
        )
    return lines


__all__ = ["HEADER", "Demo", "Replay", "known_lines", "table_rows"]
