"""The page of ``data check``.

What a data folder holds, how it was understood, and its masks to look at.

It shows images, and lines of the table instead of file names unless names are asked for. It reads nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tinyusfm_edge.data.check import CheckedRow, DataReport, Fault, ShownRow
from tinyusfm_edge.report.charts import histogram
from tinyusfm_edge.report.page import Block, Chart, Facts, Images, Page, Table
from tinyusfm_runtime.numerics.preprocess import resize, to_grey
from tinyusfm_runtime.overlay import encode_png, outline

THUMB_PX = 300
"""Longer side of an image on the page."""
EDGE_RGB, TINT = (255, 196, 0), 0.25
"""Colour of a mask's edge, and how much of it tints the inside."""
LINES_SHOWN = 12
"""Lines of the table named with a fault at most."""


def data_page(report: DataReport, *, names: bool = False) -> Page:
    """The page of a report.

    Args:
        report: what was found.
        names: show file names; otherwise lines of the table.
    """
    grave = sum(fault.grave for fault in report.faults)
    doubts = len(report.faults) - grave
    headline = f"To mend before training: {grave}." if grave else "Nothing to mend was found."
    lead = [
        f"Doubts: {doubts}, below." if doubts else "",
        "This page holds images of the data; keep it where they may lie.",
    ]
    blocks: list[Block] = []
    if report.faults:
        rows = [_fault_row(fault) for fault in report.faults]
        note = "Lines are those of the table, the head being line 1."
        blocks.append(Table(title="To mend", note=note, header=("what", "found"), rows=rows))
    if report.splits:
        blocks += [_splits(report), *_classes(report)]
    blocks += _images(report, names)
    blocks += _sizes(report.looked)
    blocks.append(Facts(title="How it was read", facts=_facts(report)))
    return Page(
        title=f"Data check of {report.name}",
        passed=bool(report),
        headline=headline,
        lead=[line for line in lead if line],
        blocks=blocks,
    )


def lines_of(fault: Fault) -> str:
    """Lines of a fault in words: ``3, 7 and 12 more``."""
    shown = ", ".join(str(line) for line in fault.lines[:LINES_SHOWN])
    rest = len(fault.lines) - LINES_SHOWN
    return f"{shown} and {rest} more" if rest > 0 else shown


def _fault_row(fault: Fault) -> tuple[str, str]:
    where = f" (lines {lines_of(fault)})" if fault.lines else ""
    return fault.kind if fault.grave else f"doubt: {fault.kind}", fault.text + where


def _splits(report: DataReport) -> Table:
    rows = [
        (name, str(split.rows), str(split.patients), str(split.masks), str(split.empty), str(split.unreadable))
        for name, split in report.splits.items()
    ]
    left = ", ".join(f"{count} ({why})" for why, count in report.unused.items())
    return Table(
        title="Splits",
        note=f"Rows that are not used: {left}." if left else "Every row is used.",
        header=("split", "rows", "patients", "masks", "empty", "faulty"),
        rows=rows,
    )


def _classes(report: DataReport) -> list[Block]:
    labels = sorted({label for split in report.splits.values() for label in split.labels})
    if labels in ([], ["none"]):
        return []
    rows = [(label, *(str(split.labels.get(label, 0)) for split in report.splits.values())) for label in labels]
    return [Table(title="Classes", note="Rows by label.", header=("label", *report.splits), rows=rows)]


def _images(report: DataReport, names: bool) -> list[Block]:
    blocks: list[Block] = []
    bad = [seen for seen in report.seen if seen.fault]
    if bad:
        note = "The image alone, and why its mask cannot be used."
        blocks.append(Images(title="Masks that cannot be used", note=note, images=[_image(s, names) for s in bad]))
    for split in ("train", "val", "test", ""):
        good = [seen for seen in report.seen if not seen.fault and seen.row.split == split]
        if good:
            title = f"Split {split}" if split else "Frames"
            note = "The mask as it is understood: its edge in yellow, its inside tinted."
            if not any(seen.mask_HW is not None for seen in good):
                note = "No mask is named." if split else ""
            blocks.append(Images(title=title, note=note, images=[_image(seen, names) for seen in good]))
    return blocks


def _image(seen: ShownRow, names: bool) -> tuple[str, bytes]:
    row = seen.row
    place = row.columns.get("file", row.id) if names else f"line {row.line}" if row.split else f"frame {row.line}"
    parts = [place, row.label, seen.fault]
    if seen.mask_HW is not None:
        parts.append(f"mask {seen.mask_HW.mean():.1%} of the image")
    return ", ".join(filter(None, parts)), encode_png(thumbnail(seen))


def thumbnail(seen: ShownRow) -> np.ndarray:
    """A small RGB copy of an image with its mask drawn in, uint8 HWC."""
    frame = seen.frame
    rows, cols = frame.pixels.shape[:2]
    scale = min(1.0, THUMB_PX / max(rows, cols))
    high, wide = max(8, round(rows * scale)), max(8, round(cols * scale))
    grey = resize(np.ascontiguousarray(to_grey(frame.pixels, frame.pixel_format, frame.video_range)), high, wide)
    image = np.repeat(grey[..., None], 3, axis=2).astype(np.float32)
    if seen.mask_HW is not None:
        small = resize(np.ascontiguousarray(seen.mask_HW * np.uint8(255)), high, wide) >= 128
        colour = np.array(EDGE_RGB, np.float32)
        image[small] += TINT * (colour - image[small])
        image[outline(small.astype(np.uint8)) > 0] = colour
    return image.round().astype(np.uint8)


def _sizes(looked: Sequence[CheckedRow]) -> list[Block]:
    blocks: list[Block] = []
    shares = [100 * item.mask_share for item in looked if item.mask_share]
    if shares:
        svg = histogram({"masks": shares}, "% of the image")
        blocks.append(Chart(title="How large the masks are", note="Empty masks left out.", svg=svg))
    spacing = [1000 * item.spacing_mm[0] for item in looked if item.spacing_mm]
    if spacing:
        blocks.append(Chart(title="Pixel sizes", note="Distance of rows.", svg=histogram({"pixels": spacing}, "um")))
    return blocks


def _facts(report: DataReport) -> list[tuple[str, str]]:
    sizes = sorted({item.size for item in report.looked if item.size})
    facts = [("table", report.table or "none"), ("columns", ", ".join(report.columns) or "none")]
    if report.reading:
        facts.append(("asked for", ", ".join(f"{name} {value}" for name, value in report.reading.items())))
    if sizes:
        kinds = f"{len(sizes)} sizes, " if len(sizes) > 1 else ""
        facts.append(("rows x columns", f"{kinds}{sizes[0][0]}x{sizes[0][1]} to {sizes[-1][0]}x{sizes[-1][1]}"))
    touching = sum(item.on_border for item in report.looked if item.mask_share)
    if touching:
        facts.append(("masks at the border", str(touching)))
    values = sorted({item.mask_value for item in report.looked if item.mask_value is not None})
    if values:
        facts.append(("foreground values", ", ".join(values)))
    return [*facts, *(("note", note) for note in report.notes)]


__all__ = [
    "EDGE_RGB",
    "LINES_SHOWN",
    "THUMB_PX",
    "TINT",
    "data_page",
    "lines_of",
    "thumbnail",
]
