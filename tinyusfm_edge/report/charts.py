"""Charts as SVG text, by the standard library only.

A histogram of latencies, a strip of per-frame values, named bars and named points.

They show what they are given and compute nothing beyond bins and scales. A colour goes with a
name's position, so two charts with the same names in the same order agree.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

COLOURS = ("#0b7285", "#d9480f", "#5f3dc4", "#2b8a3e", "#a61e4d", "#495057")
"""Dark enough on white for text; distinguished by people who do not see red and green."""
WIDTH, HEIGHT = 720, 260
BAR_STEP = 17
"""Height of one row of a bar chart."""
LEFT, RIGHT, TOP, BOTTOM = 62, 14, 34, 44
"""Margins of the plotting area, in the drawing's own units."""
LETTER = 8.0
"""Width of a letter at most: letters are larger on a narrow screen (page.py)."""


def histogram(samples: Mapping[str, Sequence[float]], unit: str, *, bins: int = 48) -> str:
    """Histograms of several sample sets over one axis.

    The axis ends at the 99.5th percentile of all samples; what lies beyond is counted in the last bin.

    Args:
        samples: name -> values.
        unit: of the values, for the axis.
        bins: number of bins.

    Returns:
        An ``<svg>`` element.
    """
    pooled = sorted(value for values in samples.values() for value in values)
    if not pooled:
        return _frame([_words(WIDTH / 2, HEIGHT / 2, "nothing measured", anchor="middle")], "empty chart")
    low, high = 0.0, pooled[min(len(pooled) - 1, int(0.995 * len(pooled)))] * 1.02 or 1.0
    step = (high - low) / bins
    counts = {name: _binned(values, low, step, bins) for name, values in samples.items() if values}
    tallest = max(max(shares) for shares in counts.values())
    parts = _axes(low, high, 0.0, tallest, unit, "share of frames")
    for index, shares in enumerate(counts.values()):
        colour = COLOURS[index % len(COLOURS)]
        points = [f"{_x(low, low, high):.1f},{_y(0, 0, tallest):.1f}"]
        for i, share in enumerate(shares):
            top = _y(share, 0.0, tallest)
            points += [
                f"{_x(low + i * step, low, high):.1f},{top:.1f}",
                f"{_x(low + (i + 1) * step, low, high):.1f},{top:.1f}",
            ]
        points.append(f"{_x(high, low, high):.1f},{_y(0, 0, tallest):.1f}")
        parts.append(f'<polygon points="{" ".join(points)}" fill="{colour}" fill-opacity="0.28" stroke="{colour}"/>')
    names, about = list(counts), "histogram of " + ", ".join(counts)
    if sum(34 + LETTER * len(name) for name in names) < WIDTH - RIGHT - LETTER * len("share of frames"):
        return _frame([*parts, *_legend(names)], about)
    below, height = _legend_below(names)
    return _frame([*parts, *below], about, height=HEIGHT + height)


def strip(
    values: Mapping[str, Sequence[float | None]],
    label: str,
    *,
    limit: float | None = None,
    limit_label: str = "",
    axis: str = "frame",
) -> str:
    """One dot a frame for several series, with the limit as a line.

    Args:
        values: name -> one value a frame; None leaves a gap.
        label: of the vertical axis.
        limit: where a line is drawn, or None.
        limit_label: words at that line.
        axis: what stands side by side.

    Returns:
        An ``<svg>`` element.
    """
    present = [v for series in values.values() for v in series if v is not None and math.isfinite(v)]
    if not present:
        return _frame([_words(WIDTH / 2, HEIGHT / 2, "nothing measured", anchor="middle")], "empty chart")
    reach = [*present, *([limit] if limit is not None else [])]
    low, high = min(reach), max(reach)
    pad = 0.06 * (high - low) or 0.5 * abs(high) or 1.0
    low, high = (0.0 if 0 <= low < 0.2 * high else low - pad), high + pad
    count = max(len(series) for series in values.values())
    parts = _axes(0, count, low, high, axis, label)
    if limit is not None:
        y = _y(limit, low, high)
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" class="limit"/>')
        parts.append(_words(WIDTH - RIGHT - 4, y - 5, limit_label, anchor="end", kind="limit-label"))
    for index, series in enumerate(values.values()):
        colour, shift = COLOURS[index % len(COLOURS)], (index + 0.5) / len(values)
        for frame, value in enumerate(series):
            if value is not None and math.isfinite(value):
                x, y = _x(frame + shift, 0, count), _y(value, low, high)
                parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}" fill-opacity="0.75"/>')
    return _frame([*parts, *_legend(list(values))], f"{label} of each {axis}: " + ", ".join(values))


def bars(rows: Sequence[tuple[str, float]], unit: str) -> str:
    """One named bar per row, from zero, in the order given.

    Args:
        rows: (name, value); a value that is not finite, or below zero, has no bar.
        unit: of the values, for the axis.

    Returns:
        An ``<svg>`` element, higher the more rows there are.
    """
    if not rows:
        return _frame([_words(WIDTH / 2, HEIGHT / 2, "nothing measured", anchor="middle")], "empty chart")
    left, base = 240, 12 + BAR_STEP * len(rows)
    high = max((value for _, value in rows if math.isfinite(value)), default=0.0) * 1.04
    high = high if high > 0 else 1.0
    scale = (WIDTH - RIGHT - left) / high
    parts = []
    for tick, label in _ticks(0.0, high):
        x = left + tick * scale
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="8" y2="{base}" class="grid"/>')
        parts.append(_words(x, base + 18, label, anchor="middle"))
    for index, (name, value) in enumerate(rows):
        y = 12 + BAR_STEP * index
        parts.append(_words(left - 8, y + 11, name, anchor="end"))
        if math.isfinite(value) and value > 0:
            wide = value * scale
            parts.append(
                f'<rect x="{left}" y="{y + 2}" width="{wide:.1f}" height="{BAR_STEP - 5}" fill="{COLOURS[0]}"/>'
            )
    parts.append(_words((left + WIDTH - RIGHT) / 2, base + 36, unit, anchor="middle"))
    return _frame(parts, f"{unit} of " + ", ".join(name for name, _ in rows), height=base + BOTTOM)


def scatter(
    points: Sequence[tuple[str, float, float, bool]],
    label_x: str,
    label_y: str,
    *,
    limit_x: float | None = None,
    most_y: float = math.inf,
) -> str:
    """Points with a colour for each name, good ones filled and the others hollow.

    Args:
        points: (name, x, y, good); points of one name are of one colour.
        label_x: of the horizontal axis.
        label_y: of the vertical axis.
        limit_x: where a line is drawn upwards, or None.
        most_y: largest value that the vertical axis can have.

    Returns:
        An ``<svg>`` element, higher the more names there are.
    """
    if not points:
        return _frame([_words(WIDTH / 2, HEIGHT / 2, "nothing measured", anchor="middle")], "empty chart")
    low_x, high_x = _padded([*(point[1] for point in points), *([] if limit_x is None else [limit_x])])
    low_y, high_y = _padded([point[2] for point in points])
    high_y = max(min(high_y, most_y), low_y + 1e-9)
    parts = _axes(low_x, high_x, low_y, high_y, label_x, label_y)
    if limit_x is not None:
        x = _x(limit_x, low_x, high_x)
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}" class="limit"/>')
    names = list(dict.fromkeys(point[0] for point in points))
    for name, x, y, good in points:
        parts.append(_mark(_x(x, low_x, high_x), _y(y, low_y, high_y), names.index(name), good))
    below, height = _legend_below(names)
    return _frame([*parts, *below], f"{label_y} against {label_x}: {', '.join(names)}", height=HEIGHT + height)


def _mark(x: float, y: float, index: int, filled: bool) -> str:
    """A point; beyond the colours there are, it is square."""
    colour, round_ = COLOURS[index % len(COLOURS)], 5 if index // len(COLOURS) % 2 == 0 else 0
    style = f'fill="{colour if filled else "#fff"}" fill-opacity="0.85" stroke="{colour}" stroke-width="1.5"'
    return f'<rect x="{x - 5:.1f}" y="{y - 5:.1f}" width="10" height="10" rx="{round_}" {style} class="mark"/>'


def _legend_below(names: Sequence[str]) -> tuple[list[str], int]:
    """A legend in rows below the axis' label, and its height."""
    parts: list[str] = []
    x, y = float(LEFT), float(HEIGHT + 10)
    for index, name in enumerate(names):
        wide = 16 + LETTER * len(name) + 18
        if x > LEFT and x + wide > WIDTH:
            x, y = float(LEFT), y + 20
        parts += [_mark(x + 5, y + 5, index, True), _words(x + 16, y + 9, name)]
        x += wide
    return parts, int(y - HEIGHT) + 20


def _padded(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    pad = 0.08 * (high - low) or 0.05 * abs(high) or 1.0
    return low - pad, high + pad


def _binned(values: Sequence[float], low: float, step: float, bins: int) -> list[float]:
    counts = [0] * bins
    for value in values:
        counts[min(bins - 1, max(0, int((value - low) / step)))] += 1
    return [count / len(values) for count in counts]


def _x(value: float, low: float, high: float) -> float:
    return LEFT + (value - low) / (high - low) * (WIDTH - LEFT - RIGHT)


def _y(value: float, low: float, high: float) -> float:
    return HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM)


def _ticks(low: float, high: float) -> list[tuple[float, str]]:
    """About five round numbers in a range, each with a label that no other one has."""
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough)
    first = math.ceil(low / step - 1e-9)
    found = [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]
    large = max(map(abs, found), default=0.0)
    if not 1e-5 < step <= large < 1e7:
        return [(tick, f"{tick:.4g}") for tick in found]
    decimals = next(n for n in range(8) if abs(round(step, n) - step) < 1e-6 * step)
    return [(tick, f"{tick + 0.0:.{decimals}f}") for tick in found]


def _axes(low_x: float, high_x: float, low_y: float, high_y: float, label_x: str, label_y: str) -> list[str]:
    parts = []
    for tick, label in _ticks(low_y, high_y):
        y = _y(tick, low_y, high_y)
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>')
        parts.append(_words(LEFT - 8, y + 4, label, anchor="end"))
    for tick, label in _ticks(low_x, high_x):
        parts.append(_words(_x(tick, low_x, high_x), HEIGHT - BOTTOM + 18, label, anchor="middle"))
    base = HEIGHT - BOTTOM
    parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{base}" y2="{base}" class="axis"/>')
    parts.append(_words((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, label_x, anchor="middle"))
    parts.append(_words(8, 14, label_y))
    return parts


def _legend(names: Sequence[str]) -> list[str]:
    parts: list[str] = []
    right = float(WIDTH - RIGHT)
    for index in reversed(range(len(names))):
        left = right - 16 - LETTER * len(names[index])
        parts.append(f'<rect x="{left:.1f}" y="5" width="11" height="11" fill="{COLOURS[index % len(COLOURS)]}"/>')
        parts.append(_words(left + 16, 15, names[index]))
        right = left - 18
    return parts


def _words(x: float, y: float, text: str, *, anchor: str = "start", kind: str = "words") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{kind}">{escape(text)}</text>'


def _frame(parts: Sequence[str], about: str, *, height: int = HEIGHT) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(about, quote=True)}" '
        f'xmlns="http://www.w3.org/2000/svg">{"".join(parts)}</svg>'
    )


__all__ = [
    "BAR_STEP",
    "BOTTOM",
    "COLOURS",
    "HEIGHT",
    "LEFT",
    "LETTER",
    "RIGHT",
    "TOP",
    "WIDTH",
    "bars",
    "histogram",
    "scatter",
    "strip",
]
