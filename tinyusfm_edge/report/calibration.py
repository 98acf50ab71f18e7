"""The page of ``tinyusfm-edge calibrate``.

The frames as the model sees them, what they cover, how ranges were chosen.

Images are the model's own cropped input, so that nothing which was cropped away gets into the page; frames are
named by the beginning of their hash. It does not know where frames came from.

Shapes: HW = rows, columns; N bins.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from tinyusfm_calibration.observe import Histogram
from tinyusfm_calibration.sets import NamedFrame, pixels_sha256
from tinyusfm_edge.report.charts import COLOURS
from tinyusfm_edge.report.page import Block, Chart, Facts, Images, Page, Table
from tinyusfm_export.quantize.calibration_file import CalibrationFile
from tinyusfm_export.quantize.range_choice import RangeChoice
from tinyusfm_runtime.numerics.preprocess import preprocess, resize
from tinyusfm_runtime.overlay import encode_png
from tinyusfm_runtime.spec import ModelSpec

THUMBNAIL = 96
"""Pixels of an image's side in the montage."""
COLUMNS = 16
"""Images in a row of the montage."""
PANEL_COLUMNS, PANEL_WIDTH, PANEL_HEIGHT = 4, 240, 96
"""Of the histograms, in the drawing's own units."""
BARS = 60


def calibration_page(
    file: CalibrationFile, choice: RangeChoice, chosen: Sequence[NamedFrame], notes: Sequence[str], spec: ModelSpec
) -> Page:
    """Puts the page together.

    Args:
        file: what was written.
        choice: everything that was measured.
        chosen: the set's frames, cropped.
        notes: what was left out and why.
        spec: the model.
    """
    lead = [file.summary + ".", *notes]
    blocks: list[Block] = [
        Images(
            title="The frames, as the model sees them",
            note=f"{len(chosen)} frames in order of choice; what was cropped away is in no file.",
            images=[("", montage([named for named in chosen], spec))],
        ),
        Table(
            title="What they cover",
            note="Chosen frames of those in the pool. Kinds with a star were measured on the images, as a proxy.",
            header=("along", "kind", "pool", "chosen", "share of the pool", "share of the set"),
            rows=_coverage_rows(file.coverage, len(chosen)),
        ),
        Table(
            title="Range methods side by side",
            note="Simulated int8 against float on validation frames that did not calibrate; least logit error wins, "
            "equalisation and bias correction must earn their place.",
            header=("ranges by", "logit error", "mean Dice with float", "worst Dice", "used"),
            rows=[_trial_row(trial) for trial in file.trials],
        ),
        Chart(
            title="Values of every quantized tensor",
            note="Logarithmic counts over all calibration frames; the lines are the chosen range, what lies outside is "
            "clipped. Tensors are those of the graph before equalisation.",
            svg=histograms(choice.histograms, file.ranges.tensors, equalised=set(file.preparation.divisors)),
        ),
    ]
    if file.drift is not None:
        blocks.append(
            Facts(
                title="Drift statistic",
                note="Stored in every bundle made with this file; run and Session.watch_drift read it.",
                facts=[
                    ("outputs of the graph", ", ".join(file.drift.auxiliary)),
                    ("false alarms a window", f"at most {file.drift.false_alarms:.1%}"),
                    *((str(key), str(value)) for key, value in sorted(file.drift.about.items())),
                ],
            )
        )
    hashes = [(pixels_sha256(named.frame)[:12], named.stratum or "-") for named in chosen]
    blocks.append(
        Facts(
            title="Identity",
            note="Full hashes and names stand in the file itself.",
            facts=[("set", file.frames.id), ("weights", file.ranges.weights_sha256), *hashes],
        )
    )
    headline = f"{len(chosen)} frames calibrate {spec.name}: {file.ranges.method} ranges"
    return Page(title=f"Calibration of {spec.name}", passed=True, headline=headline, lead=lead, blocks=blocks)


def montage(frames: Sequence[NamedFrame], spec: ModelSpec) -> bytes:
    """All frames in one image, PNG.

    Args:
        frames: in order.
        spec: the model, whose input is shown.
    """
    columns = min(COLUMNS, len(frames))
    rows = math.ceil(len(frames) / columns)
    gap = 2
    sheet = np.full((rows * (THUMBNAIL + gap) - gap, columns * (THUMBNAIL + gap) - gap), 255, np.uint8)
    for number, named in enumerate(frames):
        seen_HW = preprocess(named.frame, spec.preprocess)[0][0, 0]
        top, left = (number // columns) * (THUMBNAIL + gap), (number % columns) * (THUMBNAIL + gap)
        sheet[top : top + THUMBNAIL, left : left + THUMBNAIL] = resize(seen_HW, THUMBNAIL, THUMBNAIL)
    return encode_png(np.ascontiguousarray(np.repeat(sheet[:, :, None], 3, 2)))


def _coverage_rows(coverage: Sequence[Mapping[str, Any]], chosen: int) -> list[tuple[str, ...]]:
    totals: dict[str, int] = {}
    for entry in coverage:
        totals[entry["axis"]] = totals.get(entry["axis"], 0) + entry["pool"]
    return [
        (
            f"{entry['axis']}{'*' if entry['measured'] else ''}",
            entry["kind"],
            str(entry["pool"]),
            str(entry["chosen"]),
            f"{entry['pool'] / totals[entry['axis']]:.0%}",
            f"{entry['chosen'] / chosen:.0%}",
        )
        for entry in coverage
    ]


def _trial_row(trial: Mapping[str, Any]) -> tuple[str, ...]:
    dice = ("-", "-") if trial["dice_mean"] is None else (f"{trial['dice_mean']:.4f}", f"{trial['dice_worst']:.4f}")
    return (str(trial["name"]), f"{trial['error']:.2%}", *dice, "yes" if trial["chosen"] else "")


def histograms(
    found: Mapping[str, Histogram], ranges: Mapping[str, tuple[float, float]], *, equalised: set[str]
) -> str:
    """One small chart a tensor.

    Args:
        found: tensor -> histogram.
        ranges: tensor -> chosen range, drawn as lines where the tensor was not equalised.
        equalised: tensors whose range is that of other values than the histogram's.

    Returns:
        An ``<svg>`` element.
    """
    parts = []
    for number, (name, histogram) in enumerate(found.items()):
        left, top = (number % PANEL_COLUMNS) * PANEL_WIDTH, (number // PANEL_COLUMNS) * PANEL_HEIGHT
        bounds = None if name in equalised else ranges.get(name)
        parts.append(f'<g transform="translate({left},{top})">{_panel(name, histogram, bounds)}</g>')
    height = math.ceil(len(found) / PANEL_COLUMNS) * PANEL_HEIGHT
    about = "histogram of every quantized tensor"
    return (
        f'<svg viewBox="0 0 {PANEL_COLUMNS * PANEL_WIDTH} {height}" role="img" aria-label="{about}" '
        f'xmlns="http://www.w3.org/2000/svg">{"".join(parts)}</svg>'
    )


def _panel(name: str, histogram: Histogram, bounds: tuple[float, float] | None) -> str:
    low, high = min(histogram.low, 0.0), max(histogram.high, 0.0)
    if high <= low:
        return f'<text x="4" y="12" class="words">{escape(name)}: always zero</text>'
    width, bottom, tall = PANEL_WIDTH - 14, PANEL_HEIGHT - 16, PANEL_HEIGHT - 34
    used = np.flatnonzero(histogram.counts_N)
    places = (histogram.edges_N[used] + 0.5 * histogram.width - low) / (high - low)
    counts = np.bincount(
        np.clip((places * BARS).astype(int), 0, BARS - 1), weights=histogram.counts_N[used], minlength=BARS
    )
    heights = np.log1p(counts) / np.log1p(counts).max() * tall
    bars = "".join(
        f"M{4 + i * width / BARS:.1f} {bottom}v{-height:.1f}h{width / BARS:.1f}v{height:.1f}"
        for i, height in enumerate(heights)
        if height > 0
    )
    lines = "".join(
        f'<line x1="{x:.1f}" x2="{x:.1f}" y1="18" y2="{bottom}" class="limit"/>'
        for x in (4 + (bound - low) / (high - low) * width for bound in bounds or ())
    )
    return (
        f'<text x="4" y="12" class="words" style="font-size:9px">{escape(name.removesuffix(".input"))}</text>'
        f'<path d="{bars}" fill="{COLOURS[0]}" fill-opacity="0.55"/>{lines}'
        f'<line x1="4" x2="{4 + width}" y1="{bottom}" y2="{bottom}" class="axis"/>'
        f'<text x="4" y="{bottom + 11}" style="font-size:8px">{histogram.low:.3g}</text>'
        f'<text x="{4 + width}" y="{bottom + 11}" text-anchor="end" style="font-size:8px">{histogram.high:.3g}</text>'
    )


__all__ = [
    "BARS",
    "COLUMNS",
    "PANEL_COLUMNS",
    "PANEL_HEIGHT",
    "PANEL_WIDTH",
    "THUMBNAIL",
    "calibration_page",
    "histograms",
    "montage",
]
