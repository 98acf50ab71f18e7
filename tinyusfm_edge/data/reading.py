"""How files of a data folder are read where they do not explain themselves.

One value for every command.

What was asked for is written into runs, calibration files and reports, so that a result says how its data was read. It
knows no command line and decodes nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from tinyusfm_calibration.tables import TableOptions
from tinyusfm_edge.data.doubts import Doubts
from tinyusfm_edge.data.mask_values import MaskOptions, read_classes, read_values
from tinyusfm_runtime.errors import InputError

COLUMNS = ("file", "label", "mask", "split", "group", "pixel_size_mm", "orig_w", "orig_h", "head_circumference_mm")
"""Columns that may have another name in a table."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """How a data folder is read.

    Attributes:
        table: names of columns, and links.
        masks: which values are foreground, and outlines.
        window: (code that becomes 0, code that becomes 255) for images of more than 8 bits, or None to refuse them.
        doubts: takes what is doubtful about files that can be read all the same; None refuses them.
    """

    table: TableOptions = field(default_factory=TableOptions)
    masks: MaskOptions = field(default_factory=MaskOptions)
    window: tuple[float, float] | None = None
    doubts: Doubts | None = field(default=None, compare=False, repr=False)

    def to_json(self) -> dict[str, Any]:
        """What differs from the default, as it is typed; empty where nothing does."""
        asked: dict[str, Any] = {
            "columns": ",".join(f"{ours}={theirs}" for ours, theirs in self.table.columns.items()),
            "follow_links": self.table.follow_links,
            "mask_value": ",".join(map(str, self.masks.values)),
            "classes": ",".join(f"{name}={span}" for name, span in self.masks.classes.items()),
            "window": None if self.window is None else f"{self.window[0]:g},{self.window[1]:g}",
        }
        found = {name: value for name, value in asked.items() if value}
        if self.masks.fill_outline is not None:
            found["fill_outline"] = self.masks.fill_outline
        return found


AS_IT_IS = Reading()
"""Nothing was asked for."""


def make_reading(
    columns: str | None = None,
    follow_links: bool = False,
    mask_value: str | None = None,
    classes: str | None = None,
    fill_outline: bool | None = None,
    window: str | None = None,
) -> Reading:
    """Reads the options.

    Args:
        columns: ``OURS=THEIRS``, with commas between.
        follow_links: links may lead out of the folder.
        mask_value: values of the foreground.
        classes: ``NAME=VALUE``, with commas between.
        fill_outline: fill outlines, take them as they are, or None: refuse them.
        window: ``LO,HI``.

    Raises:
        InputError: one cannot be read, or two contradict each other.
    """
    if mask_value and classes:
        raise InputError("--mask-value and --classes both say what is foreground: give one")
    named: dict[str, str] = {}
    for part in filter(None, (columns or "").split(",")):
        ours, equals, theirs = (piece.strip() for piece in part.partition("="))
        if ours not in COLUMNS or not equals or not theirs:
            raise InputError(f"--columns {part!r}: give pairs such as file=image; ours are {', '.join(COLUMNS)}")
        named[ours] = theirs
    return Reading(
        table=TableOptions(columns=named, follow_links=follow_links),
        masks=MaskOptions(values=read_values(mask_value), classes=read_classes(classes), fill_outline=fill_outline),
        window=None if window is None else _read_window(window),
    )


def numbers(text: str, count: int, what: str) -> tuple[float, ...]:
    """Reads comma-separated numbers.

    Args:
        text: what was typed.
        count: how many there must be.
        what: name of the option and an example, for the message.

    Raises:
        InputError: others, infinite ones among them, or another count.
    """
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = ()
    if len(values) != count or not all(map(math.isfinite, values)):
        raise InputError(f"{what}: {count} numbers with commas between them, not {text!r}")
    return values


def _read_window(text: str) -> tuple[float, float]:
    low, high = numbers(text, 2, "--window LO,HI")
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise InputError(f"--window {text}: give LO,HI, the codes that become black and white, such as 0,4095")
    return low, high


__all__ = ["AS_IT_IS", "COLUMNS", "Reading", "make_reading", "numbers"]
