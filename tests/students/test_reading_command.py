"""``release.reading``: thresholds are calibrated on labelled frames, go with their weights, or nothing is written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest

from tinyusfm_edge import students
from tinyusfm_edge.models.checkpoint import load_student_file
from tinyusfm_edge.release.reading import main
from tinyusfm_runtime.phantom import make_phantom
from tinyusfm_runtime.spec import SecondPass

PLAN = ["--second-pass", "small", "--min-area", "0.005", "--anatomy", "fetal head,20,450"]
FRAMES = 34
TESTED = 2


def write_data(folder: Path, frames: int) -> Path:
    """Phantoms of a validation split and a few of a test split, each of a patient of its own."""
    folder.mkdir()
    rows = ["file,mask,split,group,pixel_size_mm"]
    for seed in range(500, 500 + frames + TESTED):
        phantom = make_phantom(seed, height=192, width=256)
        assert phantom.frame.spacing_mm is not None
        cv2.imwrite(str(folder / f"{seed}.png"), phantom.frame.pixels)
        cv2.imwrite(str(folder / f"{seed}_mask.png"), phantom.mask_HW * np.uint8(255))
        split = "val" if seed < 500 + frames else "test"
        rows.append(f"{seed}.png,{seed}_mask.png,{split},p{seed},{phantom.frame.spacing_mm[0]!r}")
    (folder / "split.csv").write_text("\n".join(rows) + "\n", encoding="ascii")
    return folder


@pytest.fixture
def student(tmp_path: Path) -> Path:
    """A copy of the shipped student, never read as planned here."""
    out = tmp_path / "fetal-head"
    shutil.copytree(students.folder("fetal-head"), out)
    (out / students.READING).unlink()
    return out


def test_readings_are_calibrated_on_the_validation_split(student: Path, tmp_path: Path) -> None:
    data = write_data(tmp_path / "data", FRAMES)
    line = ["--name", "fetal-head", "--out", str(student), "--data", str(data), *PLAN]
    assert main(line) == 0
    spec = students.as_shipped(load_student_file(student / students.WEIGHTS), student, demo=False).spec
    assert spec.second_pass is SecondPass.SMALL and spec.min_area == 0.005
    assert spec.anatomy is not None and spec.anatomy.size_mm == (20.0, 450.0)
    assert spec.reading is not None and spec.reading.rates.frames == FRAMES and spec.reading.rates.groups == FRAMES
    assert spec.reading.rates.good_but_wrong <= 0.01 * FRAMES
    card = json.loads((student / students.CARD).read_text(encoding="utf-8"))
    assert card["spec"] == spec.to_json()
    as_read = card["metrics"]["as_read"]
    assert [as_read[split]["dice"]["num_values"] for split in ("val", "test")] == [FRAMES, TESTED]
    assert 0 < as_read["val"]["looked_twice"] < FRAMES, "small heads, and no others"
    text = (student / students.CARD_TEXT).read_text(encoding="utf-8")
    assert f"Looked at twice: {as_read['val']['looked_twice']} of {FRAMES} on val" in text


def test_without_a_second_pass_there_is_one_table(student: Path, tmp_path: Path) -> None:
    data = write_data(tmp_path / "data", FRAMES)
    assert main(["--name", "fetal-head", "--out", str(student), "--data", str(data)]) == 0
    assert json.loads((student / students.CARD).read_text(encoding="utf-8"))["metrics"]["as_read"] is None
    assert "second pass" not in (student / students.CARD_TEXT).read_text(encoding="utf-8").partition("## Accuracy")[2]


def test_passes_are_compared_and_nothing_is_written(
    student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path.name: path.read_bytes() for path in student.iterdir()}
    data = write_data(tmp_path / "data", 6)
    assert main(["--name", "fetal-head", "--out", str(student), "--data", str(data), *PLAN, "--measure"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found) == ["never", "small", "always"]
    assert found["never"]["dice"] != found["always"]["dice"], "they are other readings"
    assert {path.name: path.read_bytes() for path in student.iterdir()} == before


@pytest.mark.parametrize(
    ("frames", "changed", "word"),
    [
        (4, {}, "at least 32 are needed"),
        (1, {"--anatomy": "head"}, "is not name,LO,HI"),
        (1, {"--anatomy": "head,9,2"}, "size"),
        (1, {"--min-area": "2"}, "min_area"),
    ],
)
def test_what_cannot_be_calibrated_leaves_the_student_as_it_was(
    frames: int, changed: dict[str, str], word: str, student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path.name: path.read_bytes() for path in student.iterdir()}
    data = write_data(tmp_path / "data", frames)
    line = ["--name", "fetal-head", "--out", str(student), "--data", str(data), *PLAN]
    for name, value in changed.items():
        line[line.index(name) + 1] = value
    assert main(line) == 2
    assert word in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in student.iterdir()} == before
