"""Tables are read whole or refused by row; spacing belongs to the image as it is stored."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest

from tests.tables import change_rows, read_rows, write_rows
from tinyusfm_edge.data.table import read_table, resize_mask, table_counts, to_arrays
from tinyusfm_runtime.errors import InputError
from tinyusfm_runtime.frame import Frame
from tinyusfm_runtime.numerics.measure import measure_head
from tinyusfm_runtime.numerics.preprocess import preprocess
from tinyusfm_runtime.phantom import make_phantom
from tinyusfm_runtime.spec import AspectPolicy, PreprocessSpec

SPEC = PreprocessSpec(height=64, width=64)


@pytest.fixture
def spoilt(table: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(table, tmp_path / "table"))


def test_samples_are_what_the_table_says(table: Path) -> None:
    samples = read_table(table, "train")
    assert [s.id for s in samples] == [f"{seed}.png" for seed in range(500, 524)]
    assert [s.group for s in samples[:3]] == ["train0", "train0", "train1"]
    phantom = make_phantom(500, height=120, width=160)
    assert np.array_equal(samples[0].frame.pixels, phantom.frame.pixels)
    assert np.array_equal(samples[0].mask_HW, phantom.mask_HW)
    assert samples[0].hc_mm == phantom.hc_mm
    assert samples[0].sha256 == hashlib.sha256((table / "500.png").read_bytes()).hexdigest()
    assert len(read_table(table, "train", limit=5)) == 5
    assert table_counts(table)["val"] == {"frames": 4, "groups": 2}


def test_spacing_is_scaled_from_the_original_image_row_and_column_apart(spoilt: Path) -> None:
    assert read_table(spoilt, "train")[0].frame.spacing_mm == pytest.approx(
        make_phantom(500, height=120, width=160).frame.spacing_mm
    )
    change_rows(spoilt, lambda number, row: {} if number else {"orig_h": 120})
    rows, cols = read_table(spoilt, "train")[0].frame.spacing_mm or (0.0, 0.0)
    assert rows == pytest.approx(cols / 2)


def test_table_without_sizes_gives_no_millimetres(spoilt: Path) -> None:
    write_rows(spoilt, [{"file": "500.png", "mask": "500_mask.png", "split": "train"}])
    sample = read_table(spoilt, "train")[0]
    assert (sample.frame.spacing_mm, sample.hc_mm, sample.group) == (None, None, "500.png")


def test_circumference_of_the_stored_masks_is_the_stated_one(table: Path) -> None:
    samples = read_table(table, "val")
    assert len(samples) == 4
    for sample in samples:
        assert measure_head(sample.mask_HW, sample.frame.spacing_mm).hc_mm == pytest.approx(sample.hc_mm, rel=0.01)


def test_a_table_of_classes_needs_no_masks(spoilt: Path) -> None:
    write_rows(spoilt, [{"file": "500.png", "label": "head", "split": "train"}])
    (sample,) = read_table(spoilt, "train", need="label")
    assert sample.label == "head" and not sample.mask_HW.any()


def test_missing_table_split_or_column(spoilt: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="none does not exist"):
        read_table(tmp_path / "none", "train")
    with pytest.raises(InputError, match="no row with split 'holdout'"):
        read_table(spoilt, "holdout")
    write_rows(
        spoilt, [{"outline" if key == "mask" else key: cell for key, cell in row.items()} for row in read_rows(spoilt)]
    )
    with pytest.raises(InputError, match="lacks the columns mask; it has file, .*outline.*--columns mask="):
        read_table(spoilt, "train")


def test_broken_rows_are_named(spoilt: Path) -> None:
    (spoilt / "501.png").unlink()
    with pytest.raises(InputError, match=r"line 3: the file does not exist"):
        read_table(spoilt, "train")
    (spoilt / "501.png").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"line 3: .*can be decoded"):
        read_table(spoilt, "train")
    cv2.imwrite(str(spoilt / "501.png"), np.zeros((120, 158), np.uint8))
    with pytest.raises(InputError, match=r"line 3: mask 120x160 and image 120x158"):
        read_table(spoilt, "train")
    change_rows(spoilt, lambda number, row: {} if number else {"orig_w": "wide"})
    with pytest.raises(InputError, match=r"line 2: orig_w: 'wide' is no number"):
        read_table(spoilt, "train")


def test_arrays_are_the_runtimes_preprocessing(table: Path) -> None:
    samples = read_table(table, "val")
    images, masks = to_arrays(samples, SPEC)
    assert images.shape == masks.shape == (4, 64, 64)
    assert np.array_equal(images[1], preprocess(samples[1].frame, SPEC)[0][0, 0])
    assert masks.min() == 0 and masks.max() == 1


@pytest.mark.parametrize("aspect", list(AspectPolicy))
def test_resized_masks_keep_place_and_area(aspect: AspectPolicy) -> None:
    rows, cols = np.mgrid[0:200, 0:300]
    mask = (((rows - 90) / 60) ** 2 + ((cols - 160) / 80) ** 2 <= 1).astype(np.uint8)
    frame = Frame(pixels=mask * np.uint8(255), spacing_mm=(0.5, 0.4))
    spec = PreprocessSpec(height=96, width=96, aspect=aspect)
    small = resize_mask(mask, frame, spec)
    _, placement = preprocess(frame, spec)
    assert placement.spacing_mm is not None
    area_mm2 = small.sum() * placement.spacing_mm[0] * placement.spacing_mm[1]
    assert area_mm2 == pytest.approx(mask.sum() * 0.5 * 0.4, rel=0.01)
    wide, narrow = measure_head(mask, (0.5, 0.4)), measure_head(small, placement.spacing_mm)
    assert narrow.hc_mm == pytest.approx(wide.hc_mm, rel=0.004)
    row, col, height, width = placement.box
    assert narrow.centre_px[0] == pytest.approx(row + (90.5 / 200) * height - 0.5, abs=0.2)
    assert narrow.centre_px[1] == pytest.approx(col + (160.5 / 300) * width - 0.5, abs=0.2)


def test_labels_are_read_and_flagged_rows_left_out_and_counted(table: Path, tmp_path: Path) -> None:
    folder = tmp_path / "flagged"
    shutil.copytree(table, folder)
    change_rows(
        folder,
        lambda number, row: {
            "mask": "" if number == 3 else row["mask"],
            "near_duplicate": int(number in (0, 1)),
            "label_conflict": int(number == 2),
        },
    )
    labelled = read_table(folder, "train", need="label")
    assert len(labelled) == 21 and {s.label for s in labelled} == {"head"}
    assert not labelled[0].mask_HW.any(), "no mask is named"
    assert len(read_table(folder, "train")) == 20
    assert table_counts(folder)["train"] == {"frames": 21, "groups": 11, "flagged": 3}


def test_shares_are_nested_whole_patients(table: Path) -> None:
    kept = [{s.id for s in read_table(table, "train", share=share, share_seed=3)} for share in (0.25, 0.5, 1.0)]
    assert kept[0] < kept[1] < kept[2]
    assert [len(ids) for ids in kept] == [6, 12, 24]
    assert kept[0] != {s.id for s in read_table(table, "train", share=0.25, share_seed=4)}
