"""Outlines are told from filled shapes, rings and lines, and filled where that is asked for."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyusfm_edge.data.mask_values import MaskOptions
from tinyusfm_edge.data.masks import read_mask
from tinyusfm_edge.data.outlines import fill_outlines, is_outline
from tinyusfm_runtime.errors import InputError

SIZE = (150, 200)


def ellipse(thickness: int, centre: tuple[int, int] = (100, 75), axes: tuple[int, int] = (60, 40)) -> np.ndarray:
    mask = np.zeros(SIZE, np.uint8)
    cv2.ellipse(mask, centre, axes, 20, 0, 360, 1, thickness)
    return mask


def dice(one: np.ndarray, other: np.ndarray) -> float:
    return 2 * float((one & other).sum()) / float(one.sum() + other.sum())


@pytest.mark.parametrize("thickness", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("axes", [(60, 40), (20, 12), (8, 6)])
def test_closed_outlines_are_found_and_filled(thickness: int, axes: tuple[int, int]) -> None:
    if thickness > min(axes) // 3:
        pytest.skip("that is a thick ring")
    mask = ellipse(thickness, axes=axes)
    assert is_outline(mask)
    filled = fill_outlines(mask)
    assert not is_outline(filled)
    assert (filled >= mask).all() and not ((filled > 0) & (ellipse(-1, axes=axes) == 0) & (mask == 0)).any()
    assert (filled >= ellipse(-1, axes=axes)).mean() > 0.998


@pytest.mark.parametrize("gap", [2, 5, 10, 14])
def test_gaps_are_bridged(gap: int) -> None:
    mask = ellipse(3)
    mask[75 - gap // 2 : 75 + (gap + 1) // 2, 130:] = 0
    assert is_outline(mask)
    assert dice(fill_outlines(mask), ellipse(-1) | ellipse(3)) > 0.985


def test_dashes_are_an_outline() -> None:
    rows, cols = np.nonzero(ellipse(3))
    dashed = np.zeros(SIZE, np.uint8)
    turn = np.floor(np.arctan2(rows - 75, cols - 100) / np.pi * 20)
    dashed[rows, cols] = (turn % 2 == 0).astype(np.uint8)
    assert is_outline(dashed)
    assert dice(fill_outlines(dashed), ellipse(-1)) > 0.9


def test_an_outline_that_the_border_cuts_is_filled_to_the_border() -> None:
    mask = ellipse(2, centre=(0, 75))
    assert is_outline(mask)
    assert dice(fill_outlines(mask), ellipse(-1, centre=(0, 75))) > 0.93


def test_an_outline_that_is_open_is_refused() -> None:
    mask = ellipse(2)
    mask[40:110, 100:] = 0
    assert is_outline(mask)
    with pytest.raises(InputError, match="not closed"):
        fill_outlines(mask)


def test_two_outlines_are_filled_and_a_filled_shape_beside_them_stays() -> None:
    left, right = ellipse(2, (50, 75), (30, 20)), ellipse(2, (150, 75), (30, 20))
    solid = np.zeros(SIZE, np.uint8)
    solid[130:145, 90:110] = 1
    solid[135:137, 95:97] = 0
    filled = fill_outlines(left | right | solid)
    wanted = ellipse(-1, (50, 75), (30, 20)) | ellipse(-1, (150, 75), (30, 20))
    assert dice(filled[:125], wanted[:125]) > 0.95
    assert np.array_equal(filled[128:], solid[128:])


NOT_OUTLINES = {
    "filled": ellipse(-1),
    "filled with a hole": ellipse(-1) - ellipse(-1, axes=(20, 15)),
    "thick ring": ellipse(-1) - ellipse(-1, axes=(36, 24)),
    "line": cv2.line(np.zeros(SIZE, np.uint8), (10, 20), (180, 120), 1, 3),
    "dot": ellipse(-1, axes=(2, 2)),
    "empty": np.zeros(SIZE, np.uint8),
    "full": np.ones(SIZE, np.uint8),
    "dots": (np.random.default_rng(3).random(SIZE) < 0.0005).astype(np.uint8),
    "cut by the border": ellipse(-1, centre=(0, 75)),
}


@pytest.mark.parametrize("mask", NOT_OUTLINES.values(), ids=NOT_OUTLINES)
def test_other_shapes_are_left_alone(mask: np.ndarray) -> None:
    assert not is_outline(mask)
    assert np.array_equal(fill_outlines(mask), mask)


def test_the_option_decides_what_happens_to_an_outline() -> None:
    stored = bytes(cv2.imencode(".png", ellipse(2) * 255)[1])
    with pytest.raises(InputError, match="--fill-outline"):
        read_mask(stored, MaskOptions())
    assert dice(read_mask(stored, MaskOptions(fill_outline=True)).mask_HW, ellipse(-1)) > 0.95
    assert np.array_equal(read_mask(stored, MaskOptions(fill_outline=False)).mask_HW, ellipse(2))


@given(st.integers(12, 60), st.integers(12, 40), st.integers(60, 140), st.integers(45, 105))
@settings(max_examples=40, deadline=None)
def test_filled_ellipses_are_never_outlines_and_their_outlines_always(width: int, height: int, x: int, y: int) -> None:
    assert not is_outline(ellipse(-1, (x, y), (width, height)))
    assert is_outline(ellipse(1, (x, y), (width, height)))
