"""Incomplete and doubtful input: results are kept, each doubt is a line, and the exit code is 4."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from typer.main import get_command

from tests.tables import write_rows
from tinyusfm_edge.cli.data_options import reads_data
from tinyusfm_edge.cli.main import app, main
from tinyusfm_edge.data.folder import read_data
from tinyusfm_edge.data.reading import Reading
from tinyusfm_runtime.errors import InputError
from tinyusfm_runtime.phantom import make_phantom

Image = pytest.importorskip("PIL.Image", reason="install tinyusfm-edge[images]")
Run = Callable[..., tuple[int, str, list[dict[str, Any]]]]


@pytest.fixture
def run(bundle: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Run:
    """Exit code, what was said on standard error, and the JSON lines."""

    def runner(source: object, *options: str) -> tuple[int, str, list[dict[str, Any]]]:
        lines = tmp_path / "out.jsonl"
        lines.unlink(missing_ok=True)
        code = main(["run", str(bundle), str(source), "--jsonl", str(lines), *options])
        said = capfd.readouterr().err
        records = [json.loads(line) for line in lines.read_text().splitlines()] if lines.exists() else []
        return code, said, records

    return runner


def put(folder: Path, count: int) -> Path:
    folder.mkdir(exist_ok=True)
    for seed in range(count):
        Image.fromarray(make_phantom(seed, height=64, width=96).frame.pixels).save(folder / f"{seed}.png")
    return folder


def frames_in(records: list[dict[str, Any]]) -> int:
    return sum("seq" in record for record in records)


def test_good_input_ends_with_0(run: Run, tmp_path: Path) -> None:
    code, said, records = run(put(tmp_path / "a", 3))
    assert (code, frames_in(records)) == (0, 3) and "doubtful" not in said


def test_files_that_are_left_out_are_named(run: Run, tmp_path: Path) -> None:
    folder = put(tmp_path / "a", 1)
    for name in "abc":
        (folder / f"{name}.dcm").write_bytes(bytes(128) + b"DICM" + bytes(100))
    code, said, records = run(folder)
    assert (code, frames_in(records)) == (4, 1) and "3 DICOM" in said


@pytest.mark.parametrize("options", [(), ("--policy", "lossless")], ids=["file", "live loop"])
def test_a_source_that_breaks_off_keeps_its_results(run: Run, tmp_path: Path, options: tuple[str, ...]) -> None:
    folder = put(tmp_path / "a", 4)
    (folder / "2.png").write_bytes((folder / "2.png").read_bytes()[:-30])
    code, said, records = run(folder, *options)
    assert (code, frames_in(records)) == (4, 2)
    assert "file 2 of 4" in said and "breaks off" in said and "results are kept" in said


def test_a_source_without_a_good_frame_is_an_error(run: Run, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"no image")
    code, said, records = run(tmp_path / "a.png")
    assert code == 2 and records == [] and "error: " in said


def test_a_dicom_that_holds_fewer_frames_than_promised(run: Run, tmp_path: Path) -> None:
    pydicom = pytest.importorskip("pydicom", reason="install tinyusfm-edge[dicom]")
    clip = Path(pydicom.__file__).parent / "data" / "test_files" / "examples_ybr_color.dcm"
    if not clip.is_file():
        pytest.skip("this pydicom came without its test files")
    (tmp_path / "cut.dcm").write_bytes(clip.read_bytes()[: clip.stat().st_size // 2])
    code, said, records = run(tmp_path / "cut.dcm")
    assert code == 4 and 5 < frames_in(records) < 30 and "promises 30 frames but holds" in said


def test_notes_that_come_up_while_reading_are_said(run: Run, tmp_path: Path) -> None:
    folder = put(tmp_path / "a", 2)
    tags = Image.Exif()
    tags[274] = 3
    Image.fromarray(np.zeros((64, 96), np.uint8)).save(folder / "1.png", exif=tags)
    code, said, _ = run(folder)
    assert code == 0 and said.count("the orientation in the file is obeyed") == 1


# every command that reads files


def doubtful_dicom(path: Path, seed: int = 0) -> Path:
    """A DICOM file that promises one frame and holds one, tagged YBR_FULL_422 although its data are RGB."""
    pydicom = pytest.importorskip("pydicom", reason="install tinyusfm-edge[dicom]")
    grey = make_phantom(seed, height=64, width=96).frame.pixels
    dataset = pydicom.Dataset()
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    dataset.SOPClassUID, dataset.SOPInstanceUID = pydicom.uid.UltrasoundImageStorage, "1.2.3"
    dataset.Rows, dataset.Columns = grey.shape
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation, dataset.PlanarConfiguration = 3, "YBR_FULL_422", 0
    dataset.BitsAllocated = dataset.BitsStored = 8
    dataset.HighBit, dataset.PixelRepresentation = 7, 0
    dataset.PixelData = np.stack([grey] * 3, axis=-1).tobytes()
    dataset.save_as(path, enforce_file_format=True)
    return path


def doubtful_table(folder: Path) -> Path:
    """Good images and one doubtful DICOM file in every split."""
    folder.mkdir()
    rows = []
    for number in range(9):
        found = make_phantom(number, height=64, width=96)
        name = f"{number}.dcm" if number % 3 == 0 else f"{number}.png"
        if number % 3 == 0:
            doubtful_dicom(folder / name, number)
        else:
            Image.fromarray(found.frame.pixels).save(folder / name)
        mask = np.zeros((64, 96), np.uint8)
        mask[20:44, 30:60] = 255
        Image.fromarray(mask).save(folder / f"m{number}.png")
        split = ("train", "val", "test")[number // 3]
        named = {"file": name, "label": "ab"[number % 2], "mask": f"m{number}.png", "split": split}
        rows.append({**named, "group": f"p{number}"})
    return write_rows(folder, rows)


DOUBTED = "the tags say YBR_FULL_422"


@pytest.mark.parametrize(
    "line",
    [
        ["run", "{bundle}", "{file}"],
        ["run", "{bundle}", "{file}", "--overlay", "{out}.mp4"],
        ["run", "{bundle}", "{file}", "--policy", "lossless"],
        ["live", "{bundle}", "{file}", "--once", "--port", "0", "--fps", "200"],
        ["profile", "{bundle}", "--source", "{file}", "--rounds", "1", "--no-cold"],
        ["data", "check", "{table}", "--report", "{out}.html"],
    ],
    ids=["run", "overlay", "run live", "live", "profile", "data check"],
)
def test_commands_end_with_4_and_keep_their_results(
    line: list[str], bundle: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    places = {"bundle": bundle, "out": tmp_path / "out"}
    places["file"] = doubtful_dicom(tmp_path / "a.dcm")
    places["table"] = doubtful_table(tmp_path / "data") if "{table}" in line else tmp_path
    code = main([word.format(**places) for word in line])
    said = capfd.readouterr()
    assert code == 4, said.err
    assert DOUBTED in said.err + said.out and "results are kept" in said.err and "error" not in said.err


def test_replay_of_a_clip_that_breaks_off_ends_with_4(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = put(tmp_path / "a", 3)
    (folder / "2.png").write_bytes((folder / "2.png").read_bytes()[:-30])
    name = f"doubts-{os.getpid()}"
    code = main(["replay", str(folder), "--as", "shm", "--name", name, "--fps", "200"])
    said = capfd.readouterr()
    assert code == 4 and "breaks off" in said.err and "2 frames" in said.out


def test_a_table_of_doubtful_files_is_read_told_once_and_ends_with_4(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Through the options that every command with ``--data`` shares; what it does with the frames is its own matter."""
    folder = doubtful_table(tmp_path / "data")
    got: list[int] = []

    @reads_data
    def command(*, reading: Reading) -> None:
        for _ in range(2):
            data = read_data(folder, calibrate=True, reading=reading)
            got.append(len(data.validation) + len(data.calibration))

    with pytest.raises(typer.Exit) as ended:
        command()
    said = capfd.readouterr().err
    assert ended.value.exit_code == 4 and got == [6, 6]
    assert said.count(DOUBTED) == 2 and "data/split.csv line 2: " in said and "data/split.csv line 5: " in said
    with pytest.raises(InputError, match=r"split.csv line 5: .*YBR_FULL_422"):
        read_data(folder, calibrate=False)  # nobody takes the doubt


def test_commands_with_a_data_folder_share_those_options() -> None:
    found = {name for name, command in get_command(app).commands.items() if "mask_value" in _options_of(command)}  # type: ignore[attr-defined]
    assert found >= {
        "evaluate", "adapt", "distill", "coreset", "calibrate", "sensitivity", "qat", "export", "verify", "bank",
        "transfer-set",
    }  # fmt: skip


def _options_of(command: Any) -> set[str]:
    return {parameter.name for parameter in command.params}


def test_sizes_that_cannot_be_and_patients_under_another_name_are_told(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = put(tmp_path / "data", 4)
    lines = ["file,split,patient_id,pixel_size_mm", "0.png,train,1,0.2", "1.png,val,1,90", "2.png,val,2,0.2"]
    (folder / "split.csv").write_text("\n".join(lines))

    @reads_data
    def command(*, reading: Reading) -> None:
        found = read_data(folder, calibrate=False, reading=reading)
        assert [named.frame.spacing_mm for named in found.validation] == [None, pytest.approx((0.2, 0.2))]
        assert any("--columns group=patient_id" in line for line in found.notes)

    with pytest.raises(typer.Exit) as ended:
        command()
    assert ended.value.exit_code == 4 and "line 3: pixel_size_mm gives 90 mm" in capfd.readouterr().err
