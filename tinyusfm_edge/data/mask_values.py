"""Which pixels of a stored mask are foreground.

The values that were asked for, or the rule for masks of two values.

Without a choice of values a mask must have two of them (soft edges of resizing or JPEG aside), the larger is the
foreground, and it must not cover most of the border. Class ids, colours and palettes say what they hold and ask for
``--mask-value`` or ``--classes``. It does not read files and does not know shapes of outlines.

Shapes: HW rows, columns; HWC with colour channels red, green, blue.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from tinyusfm_runtime.errors import InputError
from tinyusfm_runtime.numerics.order import wide

FEW_VALUES = 8
"""Up to so many values a mask counts as drawn, above it as resized or compressed."""
SOFT_CONTRAST = {1: 64.0, 2: 16384.0}
"""Bytes per value -> least distance of foreground and background of a mask with soft edges, in codes."""
DRAWN_BAND, CODED_BAND = 2, 16
"""Pixels around an edge whose values may lie between: of a drawn mask, and of one that was compressed (JPEG's blocks of
16 with halved colour)."""
RAMP, MOST_EDGES = 8, 0.35
"""Soft edges are at most so many pixels wide to either side, and at most so large a share of the pixels lies at edges:
images and noise have more."""
MOST_OF_BORDER = 0.5
"""Share of the border pixels above which a foreground counts as an inverted background."""
MOST_OTHERS = 256
"""Values besides those asked for that are kept at most, the smallest ones."""
SHOWN = 6
"""Values that a message lists at most."""
_COLOUR = re.compile(r"#[0-9a-fA-F]{6}")
_SPAN = re.compile(r"(\d+(?:\.\d+)?)(?:-(\d+(?:\.\d+)?))?")


@dataclass(frozen=True, kw_only=True, slots=True)
class ValueSpan:
    """Values that mean one thing.

    Attributes:
        low: smallest grey code or palette index.
        high: largest, the same for a single value.
        colour: red, green, blue as one number, or None for grey.
    """

    low: float = 0.0
    high: float = 0.0
    colour: int | None = None

    def __str__(self) -> str:
        """As it is typed."""
        if self.colour is not None:
            return f"#{self.colour:06x}"
        return f"{self.low:g}" if self.low == self.high else f"{self.low:g}-{self.high:g}"


@dataclass(frozen=True, kw_only=True, slots=True)
class MaskOptions:
    """How masks are read that do not explain themselves.

    Attributes:
        values: what is foreground; empty for the rule of two values.
        classes: class -> its value; all of them are foreground, and any other value but 0 is an error.
        fill_outline: fill outlines, take them as they are, or None: refuse them.
    """

    values: tuple[ValueSpan, ...] = ()
    classes: Mapping[str, ValueSpan] = field(default_factory=dict)
    fill_outline: bool | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class MaskPlane:
    """A mask's values before anything is decided.

    Attributes:
        codes_HW: grey codes, palette indices, or colours as one number each.
        kind: ``grey``, ``palette`` or ``colour``.
        palette: colours of the indices, as one number each; empty but for a palette.
    """

    codes_HW: np.ndarray
    kind: str = "grey"
    palette: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Foreground:
    """What was found.

    Attributes:
        mask_HW: uint8 0/1.
        value: of the foreground where the rule of two values found it in a mask without soft edges, as it is typed.
        soft: whether soft edges were cut at half.
        others: values other than 0 and those asked for, as they are typed; empty where none was asked for.
        classes: names of ``--classes`` that it holds, in their order.
    """

    mask_HW: np.ndarray
    value: str | None = None
    soft: bool = False
    others: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()


def read_span(text: str, what: str) -> ValueSpan:
    """A value as it is typed: ``255``, ``1-3``, ``0.5-1`` or ``#ff0000``.

    Raises:
        InputError: something else.
    """
    plain = text.strip()
    if _COLOUR.fullmatch(plain):
        return ValueSpan(colour=int(plain[1:], 16))
    match = _SPAN.fullmatch(plain)
    if match is None:
        raise InputError(f"{what}: {text!r} is no value: give 255, 1-3 or a colour such as #ff0000")
    low, high = float(match[1]), float(match[2] or match[1])
    if high < low:
        raise InputError(f"{what}: {text!r} runs backwards")
    return ValueSpan(low=low, high=high)


def read_values(text: str | None) -> tuple[ValueSpan, ...]:
    """``--mask-value`` as it is typed: values with commas between.

    Raises:
        InputError: one cannot be read.
    """
    return tuple(read_span(part, "--mask-value") for part in (text or "").split(",") if part.strip())


def read_classes(text: str | None) -> dict[str, ValueSpan]:
    """``--classes`` as it is typed: ``head=1,abdomen=2``, or with the value in front.

    Raises:
        InputError: a pair is missing, a name or a value stands there twice.
    """
    found: dict[str, ValueSpan] = {}
    for part in filter(None, ((text or "").split(","))):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or not name or not value:
            raise InputError(f"--classes {part!r}: give pairs such as head=1,abdomen=2")
        if _SPAN.fullmatch(name) and not _SPAN.fullmatch(value) and not _COLOUR.fullmatch(value):
            name, value = value, name
        span = read_span(value, "--classes")
        if name in found or span in found.values():
            raise InputError(f"--classes names {name!r} or {span} twice")
        found[name] = span
    return found


def find_foreground(plane: MaskPlane, options: MaskOptions) -> Foreground:
    """Decides which pixels are foreground.

    Args:
        plane: values of the mask.
        options: what was asked for.

    Raises:
        InputError: the mask does not explain itself, or holds a value that no class has; says what to give.
    """
    if options.classes:
        found_HW = class_map(plane, options.classes)
        held = np.bincount(found_HW.ravel(), minlength=len(options.classes) + 1)[1:] > 0
        names = tuple(name for name, there in zip(options.classes, held, strict=True) if there)
        return Foreground(mask_HW=(found_HW > 0).astype(np.uint8), classes=names)
    if options.values:
        mask = _matching(plane, options.values)
        others = np.unique(wide(plane.codes_HW[(mask == 0) & (plane.codes_HW != 0)]))[:MOST_OTHERS]
        return Foreground(mask_HW=mask, others=tuple(_option(value, plane).strip("'") for value in others))
    if plane.kind == "palette":
        return _of_palette(plane)
    found = _of_two_values(plane)
    if _share_of_border(found.mask_HW) > MOST_OF_BORDER:
        values = np.unique(wide(plane.codes_HW))
        raise InputError(
            f"its larger value, {_option(values[-1], plane)}, covers most of the border. Name the foreground's value: "
            f"--mask-value {_option(values[0], plane)} if the mask is inverted, --mask-value "
            f"{_option(values[-1], plane)} if it is right"
        )
    return found


def class_map(plane: MaskPlane, classes: Mapping[str, ValueSpan]) -> np.ndarray:
    """Classes of a mask's pixels.

    Returns:
        uint8 HW: 0 background, 1 the first class, and so on.

    Raises:
        InputError: a value that no class has.
    """
    found = np.zeros(plane.codes_HW.shape, np.uint8)
    for number, span in enumerate(classes.values(), 1):
        found[_matching(plane, (span,)) > 0] = number
    others = np.unique(wide(plane.codes_HW[(found == 0) & (plane.codes_HW != 0)]))
    if len(others):
        shown = ", ".join(_option(value, plane) for value in others[:SHOWN])
        raise InputError(f"it holds values that --classes does not name: {shown}")
    return found


def _matching(plane: MaskPlane, spans: Sequence[ValueSpan]) -> np.ndarray:
    """Where one of the values stands, uint8 0/1."""
    found = np.zeros(plane.codes_HW.shape, bool)
    for span in spans:
        found |= _matches(plane, span)
    return found.astype(np.uint8)


def _matches(plane: MaskPlane, span: ValueSpan) -> np.ndarray:
    codes = plane.codes_HW
    if span.colour is None:
        if plane.kind == "colour":
            shown = ", ".join(_option(value, plane) for value in _values(plane)[:SHOWN])
            raise InputError(f"it is in colour, so --mask-value {span} means nothing: it holds {shown}")
        return (codes >= span.low) & (codes <= span.high)
    if plane.kind == "palette":
        table = np.array([colour == span.colour for colour in plane.palette])
        return table[codes]
    if plane.kind == "colour":
        return codes == span.colour
    grey = span.colour & 255
    if span.colour != grey * 0x010101:
        return np.zeros(codes.shape, bool)
    return codes == grey


def _values(plane: MaskPlane) -> np.ndarray:
    """Distinct values, the most frequent first but for the smallest, which is last."""
    values, counts = np.unique(wide(plane.codes_HW), return_counts=True)
    order = np.argsort(wide(-counts), kind="stable")
    return np.array([*(values[i] for i in order if i), values[0]])


def _option(value: float, plane: MaskPlane) -> str:
    """A value as it is typed behind ``--mask-value``."""
    return f"'#{int(value):06x}'" if plane.kind == "colour" else f"{value:g}"


def _of_palette(plane: MaskPlane) -> Foreground:
    """A palette of greys is obeyed.

    One of colours says nothing about what is foreground.
    """
    used = np.unique(wide(plane.codes_HW))
    colours = [plane.palette[int(index)] if int(index) < len(plane.palette) else 0 for index in used]
    if all(colour == (colour & 255) * 0x010101 for colour in colours):
        table = np.zeros(int(used[-1]) + 1, np.uint8)
        table[used.astype(int)] = [colour & 255 for colour in colours]
        return find_foreground(MaskPlane(codes_HW=table[plane.codes_HW]), MaskOptions())
    pairs = [f"{int(index)} (#{colour:06x})" for index, colour in zip(used, colours, strict=True)]
    raise InputError(
        f"it has a palette of colours, with {list_values(pairs)}: say which is the foreground, such as "
        f"--mask-value {int(used[-1])}, or name them, such as --classes head={int(used[-1])}"
    )


def list_values(shown: Sequence[str]) -> str:
    """The first few values, and how many more there are."""
    rest = len(shown) - SHOWN
    return ", ".join(shown[:SHOWN]) + (f" and {rest} more" if rest > 0 else "")


def _of_two_values(plane: MaskPlane) -> Foreground:
    codes = plane.codes_HW
    values = np.unique(wide(codes))
    if len(values) == 1:
        if values[0] != 0:
            shown = _option(values[0], plane)
            raise InputError(f"it holds {shown} everywhere: a full or an inverted mask. --mask-value {shown} says full")
        return Foreground(mask_HW=np.zeros(codes.shape, np.uint8))
    if len(values) == 2 and (plane.kind == "grey" or values[0] == 0):
        return Foreground(mask_HW=(codes == values[1]).astype(np.uint8), value=_option(values[1], plane).strip("'"))
    if len(values) > 2 and (soft := _cut_soft_edges(plane, len(values))) is not None:
        return Foreground(mask_HW=soft, soft=True)
    raise _unexplained(plane, values)


def _unexplained(plane: MaskPlane, values: np.ndarray) -> InputError:
    first = _values(plane)
    shown = list_values([_option(value, plane).strip("'") for value in values])
    kind = "colours" if plane.kind == "colour" else "values"
    return InputError(
        f"it holds {len(values)} {kind} ({shown}), class ids or an image: say which is the foreground, such as "
        f"--mask-value {_option(first[0], plane)}, or name them, such as --classes head={_option(first[0], plane)}"
    )


def _cut_soft_edges(plane: MaskPlane, number: int) -> np.ndarray | None:
    """The mask cut at half where only its edges lie between two values.

    None where more than edges do.

    Away from the edges every side must have one value: resizing and the blocks of JPEG leave it so, classes do not.
    """
    codes = plane.codes_HW
    if plane.kind == "colour":
        level = np.maximum(np.maximum(codes >> 16, codes >> 8 & 255), codes & 255).astype(np.float64)
        least = SOFT_CONTRAST[1]
    else:
        level = codes.astype(np.float64)
        least = SOFT_CONTRAST.get(codes.dtype.itemsize, 0.5) if codes.dtype.kind in "ui" else 0.5
    low, high = float(level.min()), float(level.max())
    if high - low < least:
        return None
    mask = (level > (low + high) / 2).astype(np.uint8)
    band = DRAWN_BAND if number <= FEW_VALUES else CODED_BAND
    # a border pixel has no neighbour outside, so that an object cut by the border keeps its core there
    near = _around_edges(mask, band)
    between = np.abs(level - (low + high) / 2) < (high - low) / 4
    if _around_edges(mask, 1).mean() > MOST_EDGES or bool((between & (_around_edges(mask, RAMP) == 0)).any()):
        return None
    for side in (0, 1):
        if len(np.unique(wide(codes[(mask == side) & (near == 0)]))) > 1:
            return None
    return mask


def _around_edges(mask_HW: np.ndarray, band: int) -> np.ndarray:
    """Pixels at most so far from an edge of a mask, uint8 0/1."""
    import cv2

    return np.asarray(cv2.morphologyEx(mask_HW, cv2.MORPH_GRADIENT, np.ones((2 * band + 1, 2 * band + 1), np.uint8)))


def _share_of_border(mask_HW: np.ndarray) -> float:
    """Share of the border's pixels that are foreground."""
    edges = (mask_HW[0], mask_HW[-1], mask_HW[1:-1, 0], mask_HW[1:-1, -1])
    return float(np.concatenate(edges).mean())


__all__ = [
    "CODED_BAND",
    "DRAWN_BAND",
    "FEW_VALUES",
    "MOST_EDGES",
    "MOST_OF_BORDER",
    "MOST_OTHERS",
    "RAMP",
    "SHOWN",
    "SOFT_CONTRAST",
    "Foreground",
    "MaskOptions",
    "MaskPlane",
    "ValueSpan",
    "class_map",
    "find_foreground",
    "list_values",
    "read_classes",
    "read_span",
    "read_values",
]
