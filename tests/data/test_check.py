"""What ``data check`` finds in a folder: counts, masks, copies and leaks; and the page that shows them."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest

from tests.tables import phantom_table, read_rows, write_rows
from tinyusfm_edge.cli.main import main
from tinyusfm_edge.data.check import check_folder_data, fingerprint_bits
from tinyusfm_edge.data.doubts import Doubts
from tinyusfm_edge.data.reading import make_reading
from tinyusfm_edge.data.table import read_table
from tinyusfm_runtime.errors import InputError
from tinyusfm_runtime.frame import Frame
from tinyusfm_runtime.phantom import make_phantom

COLUMNS = ["file", "label", "mask", "split", "group", "pixel_size_mm"]
SPLITS = {"train": range(900, 906), "val": range(906, 910), "test": range(910, 912)}
"""Split -> phantom seeds."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twelve phantoms with masks: two per patient, three splits, nothing to mend."""
    phantom_table(
        tmp_path / "mine", SPLITS, height=96, width=128, cells=lambda seed, _: {"group": f"p{(seed - 900) // 2}"}
    )
    cells = [{**row, "pixel_size_mm": "0.2"} for row in read_rows(tmp_path / "mine")]
    return write_rows(tmp_path / "mine", [{name: row[name] for name in COLUMNS} for row in cells])


def write(folder: Path, rows: list[list[str]], columns: list[str] = COLUMNS) -> None:
    write_rows(folder, [dict(zip(columns, row, strict=True)) for row in rows])


def rows_of(folder: Path) -> list[list[str]]:
    return [list(row.values()) for row in read_rows(folder)]


def faults(folder: Path, **asked: str) -> dict[str, str]:
    """Kind -> text of the faults, grave ones with an exclamation mark."""
    found = check_folder_data(folder, make_reading(**asked))
    return {f"{fault.kind}{'!' if fault.grave else ''}": fault.text for fault in found.faults}


def test_a_good_folder_has_nothing_to_mend(folder: Path) -> None:
    found = check_folder_data(folder)
    assert found and not found.faults
    assert {name: (split.rows, split.patients, split.masks) for name, split in found.splits.items()} == {
        "train": (6, 3, 6),
        "val": (4, 2, 4),
        "test": (2, 1, 2),
    }
    assert found.splits["val"].labels == {"head": 4}
    assert found.table == "12 rows, utf-8, comma between cells"
    assert all(
        item.mask_value in ("255", None) and item.spacing_mm == pytest.approx((0.2, 0.2)) for item in found.looked
    )


def test_rows_that_are_not_used_are_counted_and_named(folder: Path) -> None:
    rows = rows_of(folder)
    rows[0][3], rows[1][3], rows[2][3] = "extra", "", "Validation"
    write(folder, rows)
    found = check_folder_data(folder)
    assert found.unused == {"split is 'extra'": 1, "no split is given": 1}
    assert found.splits["val"].rows == 5


def test_leaks_are_found_patients_copies_and_near_copies(folder: Path) -> None:
    rows = rows_of(folder)
    rows[11][4] = "p0"
    shutil.copy(folder / "900.png", folder / "906.png")
    image = cv2.imread(str(folder / "902.png"), cv2.IMREAD_GRAYSCALE)
    cv2.imwrite(str(folder / "908.png"), cv2.convertScaleAbs(image, alpha=0.97, beta=2))
    write(folder, rows)
    found = check_folder_data(folder)
    texts = {fault.text: fault for fault in found.faults}
    assert not found
    assert texts["patients that stand in two splits or more: 1"].lines == (2, 13)
    assert texts["images that stand in two splits: 1"].lines == (2, 8)
    near = texts["pairs of nearly equal images in two splits: 1"]
    assert near.lines == (4, 10) and not near.grave


def test_masks_that_cannot_be_used_are_named_and_the_rest_is_read(folder: Path) -> None:
    cv2.imwrite(str(folder / "900_mask.png"), np.zeros((10, 10), np.uint8))
    for number in (901, 902):
        ring = cv2.ellipse(np.zeros((96, 128), np.uint8), (64, 48), (30, 20), 0, 0, 360, 255, 2)
        cv2.imwrite(str(folder / f"{number}_mask.png"), ring)
    (folder / "903.png").unlink()
    found = check_folder_data(folder)
    by_lines = {fault.lines: fault for fault in found.faults}
    assert "outline" in by_lines[(3, 4)].text and "--fill-outline" in by_lines[(3, 4)].text
    assert "differ in size" in by_lines[(2,)].text
    assert "does not exist" in by_lines[(5,)].text
    assert (found.splits["train"].unreadable, found.splits["train"].masks) == (4, 2)


def test_values_that_differ_between_masks_are_class_ids(folder: Path) -> None:
    cv2.imwrite(str(folder / "900_mask.png"), make_phantom(900, height=96, width=128).mask_HW * 7)
    assert "7" in faults(folder)["mask!"] and "--mask-value" in faults(folder)["mask!"]
    assert "mask!" not in faults(folder, mask_value="7,255")


@pytest.fixture
def ids(folder: Path) -> Path:
    """Every mask holds 255, but for one of 0 and 3 in the row of line 2 and an empty one in that of line 3."""
    rows = rows_of(folder)
    shape = (96, 128)
    cv2.imwrite(str(folder / rows[0][2]), make_phantom(900, height=96, width=128).mask_HW * 3)
    cv2.imwrite(str(folder / rows[1][2]), np.zeros(shape, np.uint8))
    return folder


def test_a_mask_without_the_value_asked_for_is_a_doubt_and_an_empty_one_is_not(ids: Path) -> None:
    found = check_folder_data(ids, make_reading(mask_value="255"))
    doubts = [fault for fault in found.faults if fault.kind == "doubtful"]
    assert [(fault.lines, fault.grave) for fault in doubts] == [((2,), False)]
    assert "holds 3 and no --mask-value 255: it counts as empty" in doubts[0].text
    asked = Doubts()
    samples = read_table(ids, "train", reading=replace(make_reading(mask_value="255"), doubts=asked))
    assert [bool(sample.mask_HW.any()) for sample in samples] == [False, False, True, True, True, True]
    assert len(asked.lines) == 1 and "line 2" in asked.lines[0] and "holds 3" in asked.lines[0]
    with pytest.raises(InputError, match=r"line 2.*holds 3 and no --mask-value 255"):
        read_table(ids, "train", reading=make_reading(mask_value="255"))  # training takes no doubts


def test_a_class_that_a_frame_lacks_may_be_trained_on(ids: Path) -> None:
    """3 stands beside 255 in another mask: both are classes, and the first frame has only the other one."""
    second = next(row for row in read_rows(ids) if row["file"] == "902.png")["mask"]
    both = cv2.imread(str(ids / second), cv2.IMREAD_UNCHANGED)
    both[:9, :9] = 3
    cv2.imwrite(str(ids / second), both)
    assert len(read_table(ids, "train", reading=make_reading(mask_value="255"))) == 6


def test_a_value_that_no_mask_holds_is_an_error_that_names_those_there(ids: Path) -> None:
    asked = Doubts()
    with pytest.raises(InputError, match=r"no mask holds --mask-value 7 \(0 of 6\); there are 255 in 4, 3 in 1"):
        read_table(ids, "train", reading=replace(make_reading(mask_value="7"), doubts=asked))
    assert not asked, "one error and no lines before it"
    assert "255 in" in faults(ids, mask_value="7")["mask!"]


def test_a_doubt_about_a_mask_ends_with_exit_code_4(ids: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "check", str(ids), "--mask-value", "255"]) == 4
    assert "no --mask-value 255" in capsys.readouterr().out


def test_a_split_of_empty_masks_is_grave(folder: Path) -> None:
    for number in range(900, 906):
        cv2.imwrite(str(folder / f"{number}_mask.png"), np.zeros((96, 128), np.uint8))
    assert faults(folder)["mask!"] == "every mask of split train is empty (6)"


def test_labels_spacing_and_missing_columns(folder: Path) -> None:
    rows = rows_of(folder)
    rows[0][1], rows[7][1], rows[1][5], rows[2][5] = "Head", "spine", "20", ""
    shutil.copy(folder / "900.png", folder / "903.png")
    write(folder, rows)
    texts = [fault.text for fault in check_folder_data(folder).faults]
    assert "images that stand under two labels: 1" in texts
    assert "labels that training never sees: spine" in texts
    assert "labels that differ in spelling alone: Head, head" in texts
    assert "images with pixels outside 0.01 to 1 mm: 1; is pixel_size_mm in mm?" in texts
    assert "images without spacing: 1 of 12; readings in mm leave them out" in texts
    write(folder, [row[:4] for row in rows], COLUMNS[:4])
    assert any("no column group" in fault.text for fault in check_folder_data(folder).faults)


def test_fingerprints_tell_images_apart_and_copies_not() -> None:
    frames = [make_phantom(seed, height=96, width=128).frame for seed in range(20)]
    bits = [np.unpackbits(np.frombuffer(fingerprint_bits(frame), np.uint8)) for frame in frames]
    apart = [int((a != b).sum()) for i, a in enumerate(bits) for b in bits[:i]]
    assert min(apart) > 12
    brighter = Frame(pixels=np.clip(frames[3].pixels.astype(int) + 6, 0, 255).astype(np.uint8))
    assert int((np.unpackbits(np.frombuffer(fingerprint_bits(brighter), np.uint8)) != bits[3]).sum()) <= 6


def test_a_folder_without_a_table_is_described(folder: Path) -> None:
    (folder / "split.csv").unlink()
    found = check_folder_data(folder)
    assert found and found.table == "" and len(found.looked) == 24
    assert "24 files with 24 frames" in found.notes[0]


def test_the_command_leaves_a_page_and_json_without_file_names(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.html"
    assert main(["data", "check", str(folder), "--report", str(page), "--json", "-"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["passed"] and found["splits"]["train"]["patients"] == 3 and found["rows"][0]["line"] == 2
    html = page.read_text(encoding="utf-8")
    assert html.count("data:image/png;base64,") == 12
    assert not re.search(r"(?:src|href)=\"(?!data:)", html) and "<script" not in html
    assert "0.png" not in html and "0.png" not in json.dumps(found)
    assert main(["data", "check", str(folder), "--report", str(page), "--names"]) == 0
    assert "11.png" in page.read_text(encoding="utf-8")


def test_something_to_mend_is_exit_code_1_and_no_folder_2(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cv2.imwrite(str(folder / "900_mask.png"), np.full((96, 128), 255, np.uint8))
    assert main(["data", "check", str(folder), "--report", str(tmp_path / "p.html")]) == 1
    captured = capsys.readouterr()
    assert (
        "MEND" in captured.out
        and "lines 2" in captured.out
        and "mine has something to mend before training (1)" in captured.err
    )
    assert main(["data", "check", str(tmp_path / "none")]) == 2
    with pytest.raises(InputError, match="is a file"):
        check_folder_data(folder / "split.csv")


def test_a_class_that_no_mask_holds_is_named(folder: Path) -> None:
    asked = make_reading(classes="head=255,abdomen=2")
    found = [fault for fault in check_folder_data(folder, asked).faults if "abdomen=2" in fault.text]
    assert {fault.grave for fault in found if "train" in fault.text} == {True}
    assert "head in 6" in found[0].text and "leave it out of --classes" in found[0].text
    with pytest.raises(InputError, match=r"split train: no mask holds class abdomen=2 \(0 of 6; head in 6\)"):
        read_table(folder, "train", reading=asked)
    doubts = Doubts()
    read_table(folder, "val", reading=replace(asked, doubts=doubts))
    assert any("split val: no mask holds class abdomen=2" in line for line in doubts.lines)
    assert not [fault for fault in check_folder_data(folder, make_reading(classes="head=255")).faults if fault.grave]
