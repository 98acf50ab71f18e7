"""What export holds against a mask model's answer: each label's own pixels, where it is said which value is which."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import tiny_spec
from tinyusfm_edge.data.doubts import Doubts
from tinyusfm_edge.data.folder import DataFolder, read_data
from tinyusfm_edge.data.reading import make_reading
from tinyusfm_edge.export import _truths
from tinyusfm_runtime.errors import InputError
from tinyusfm_runtime.numerics.order import wide
from tinyusfm_runtime.overlay import encode_png
from tinyusfm_runtime.spec import PostProcess, PreprocessSpec

SPEC = tiny_spec(
    labels=("background", "left", "right"), postprocess=PostProcess.MASK, preprocess=PreprocessSpec(height=24, width=32)
)


def folder_of(place: Path, classes: str | None, value: int = 200) -> DataFolder:
    """Four validation frames with a mask of two classes, one of them without its mask."""
    mask = np.zeros((48, 64), np.uint8)
    mask[8:24, 8:24], mask[24:40, 32:56] = 100, value
    rows = ["file,mask,split,group"]
    for number in range(4):
        frame = np.full((48, 64), 40 + number, np.uint8)
        (place / f"{number}.png").write_bytes(encode_png(frame))
        (place / f"{number}.mask.png").write_bytes(encode_png(mask))
        rows.append(f"{number}.png,{'' if number == 3 else f'{number}.mask.png'},val,{number}")
    (place / "split.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return read_data(place, calibrate=False, reading=make_reading(classes=classes))


def test_each_label_has_its_number_whatever_the_masks_values(tmp_path: Path) -> None:
    truths = _truths(folder_of(tmp_path, "right=200,left=100"), SPEC)
    assert len(truths) == 4 and truths[3] is None
    for truth in truths[:3]:
        assert isinstance(truth, np.ndarray) and truth.shape == (24, 32) and set(np.unique(wide(truth))) == {0, 1, 2}
        assert (truth[4:12, 4:12] == 1).all() and (truth[12:20, 16:28] == 2).all()
        assert int((truth > 0).sum()) == 8 * 8 + 8 * 12


def test_without_all_names_nothing_is_held_against_it(tmp_path: Path) -> None:
    assert _truths(folder_of(tmp_path, "left=100-200"), SPEC) == []


def test_a_label_that_no_mask_holds_is_a_doubt(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "left=100,right=30", value=100)
    folder = replace(folder, reading=replace(folder.reading, doubts=Doubts()))
    _truths(folder, SPEC)
    assert folder.reading.doubts is not None
    assert any("no mask holds class right=30" in line and "left in 3" in line for line in folder.reading.doubts.lines)


def test_a_value_that_no_class_has_names_table_and_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"line 2.*values that --classes does not name: 210"):
        _truths(folder_of(tmp_path, "left=100,right=200", value=210), SPEC)


def test_a_mask_of_one_label_without_the_value_asked_for_is_a_doubt_and_all_of_them_an_error(tmp_path: Path) -> None:
    spec = tiny_spec(
        labels=("head",),
        postprocess=PostProcess.MASK,
        preprocess=PreprocessSpec(height=24, width=32),
    )
    folder = folder_of(tmp_path, None)
    other = np.zeros((48, 64), np.uint8)
    other[8:24, 8:24] = 7
    (tmp_path / "1.mask.png").write_bytes(encode_png(other))
    for value, found in (("100,200", [160, 0, 160]), ("9", None)):
        doubts = Doubts()
        asked = replace(folder, reading=replace(make_reading(mask_value=value), doubts=doubts))
        if found is None:
            with pytest.raises(InputError, match=r"no mask holds --mask-value 9 \(0 of 3\); there are"):
                _truths(asked, spec)
            assert not doubts
        else:
            assert [int(truth.sum()) for truth in _truths(asked, spec)[:3] if truth is not None] == found
            assert len(doubts.lines) == 1 and "line 3" in doubts.lines[0]
