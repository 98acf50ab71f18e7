"""``calibrate``, and a bundle made with its file: frames, ranges, leakage, drift in a real engine, every refusal."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.needs import needs
from tests.tables import phantom_table, read_rows, write_rows
from tinyusfm_calibration.sets import pixels_sha256
from tinyusfm_edge.cli.main import main
from tinyusfm_edge.data.calibration_pool import open_pool
from tinyusfm_export.quantize.calibration_file import CalibrationFile, read_calibration_file
from tinyusfm_runtime import plugins
from tinyusfm_runtime.bundle.reader import Bundle
from tinyusfm_runtime.drift import DRIFT_FILE
from tinyusfm_runtime.errors import CalibrationError, FrameError, InputError
from tinyusfm_runtime.overlay import encode_png
from tinyusfm_runtime.session import Session

needs("sklearn", reason="install tinyusfm-edge[calibration]")
needs("cv2", reason="install tinyusfm-edge[opencv]")

SPLITS = {"train": range(300, 400), "val": range(500, 536), "test": range(600, 603)}
"""Split -> phantom seeds."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Phantoms with a table; the upper rows hold what is to be cropped away."""
    banner = np.full((12, 80), 255, np.uint8)
    banner[4:8, ::2] = 0  # stands for burnt-in text
    return phantom_table(
        tmp_path_factory.mktemp("data"), SPLITS, height=64, width=80, masks=False, above=banner,
        cells=lambda seed, _: {"group": f"p{seed}", "probe": "ab"[seed % 8 == 0]},
    )  # fmt: skip


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small student file."""
    torch = pytest.importorskip("torch", reason="install tinyusfm-edge[export]")
    from tinyusfm_edge.models.checkpoint import save_student
    from tinyusfm_edge.models.student import StudentConfig, build_student
    from tinyusfm_runtime.spec import ModelSpec, PreprocessSpec, Task

    torch.manual_seed(7)
    config = StudentConfig(image_size=64, width=24, heads=3)
    spec = ModelSpec(
        name="small",
        task=Task.SEGMENT,
        labels=("head",),
        preprocess=PreprocessSpec(height=64, width=64),
        architecture=config.to_json(),
    )
    path = tmp_path_factory.mktemp("student") / "small.safetensors"
    save_student(path, build_student(config).eval(), spec, torch.float32)
    return path


OPTIONS = ("--count", "40", "--method", "minmax", "--false-alarms", "0.2", "--crop", "12,0,64,80")


@pytest.fixture(scope="module")
def made(data: Path, student: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A calibration file with its report beside it."""
    out = tmp_path_factory.mktemp("made") / "set.json"
    assert main(["calibrate", str(student), str(data), "--out", str(out), *OPTIONS]) == 0
    return out


def test_the_file_names_hashes_covers_and_keeps_no_pixels(made: Path, data: Path) -> None:
    file = read_calibration_file(made)
    splits = {row["file"]: row["split"] for row in read_rows(data)}
    assert len(file.frames.ids) == 40 and {splits[name] for name in file.frames.ids} == {"train"}
    assert file.ranges.set_id == file.frames.id and file.ranges.method == "minmax"
    covered = {(e["axis"], e["kind"]): e for e in file.coverage}
    assert covered["probe", "b"]["chosen"] >= 4 and not covered["probe", "b"]["measured"]
    assert {axis for axis, _ in covered} >= {"probe", "gain"} and covered["probe", "a"]["pool"] == 88
    assert file.drift is not None and file.drift.about["held_out"] == 36 and file.drift.features is not None
    assert made.stat().st_size < 2_000_000


def test_frames_are_cropped_before_anything_is_stored(made: Path, data: Path) -> None:
    file = read_calibration_file(made)
    pool = open_pool(data, "12,0,64,80")
    frames = {named.id: named.frame for named, _ in pool.frames("train", set(file.frames.ids))}
    assert all(frame.pixels.shape[0] == 64 and frame.crop == (12, 0, 64, 80) for frame in frames.values())
    assert set(file.frames.pixels_sha256) == {pixels_sha256(frame) for frame in frames.values()}
    whole = {pixels_sha256(named.frame) for named, _ in open_pool(data, None).frames("train")}
    assert not whole & set(file.frames.pixels_sha256)
    with pytest.raises(FrameError, match="crop"):
        next(open_pool(data, "40,0,64,80").frames("train"))


def test_the_report_is_one_page_with_montage_histograms_and_coverage(made: Path) -> None:
    page = made.with_suffix(".html").read_text(encoding="utf-8")
    assert page.count("data:image/png") == 1 and page.count('<g transform="translate(') == 61
    for words in ("What they cover", "Range methods side by side", "Drift statistic", "blocks.11.mlp.fc2", "minmax"):
        assert words in page
    assert not re.search(r"https?://(?!www\.w3\.org)", page) and "<script" not in page
    assert "300.png" not in page, "file names may name patients"


def test_calibrating_again_gives_the_same_file(made: Path, data: Path, student: Path, tmp_path: Path) -> None:
    out = tmp_path / "again.json"
    assert main(["calibrate", str(student), str(data), "--out", str(out), *OPTIONS]) == 0
    first, second = (json.loads(path.read_text(encoding="utf-8")) for path in (made, out))
    assert first == second


@pytest.fixture(scope="module")
def bundle(made: Path, data: Path, student: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle made with the file, for an engine that is here."""
    target = next((name for name in ("openvino", "onnx") if plugins.available("targets", name).usable), None)
    if target is None:
        pytest.skip("no inference library is installed")
    out = tmp_path_factory.mktemp("bundle") / "small.bundle"
    line = ["export", str(student), "--target", target, "--int8", "--no-gate", "--no-compare", "--out", str(out)]
    assert main([*line, "--data", str(data), "--calibration", str(made)]) == 0
    return out


def test_a_bundle_carries_ranges_preparation_and_statistic(bundle: Path, made: Path) -> None:
    file, opened = read_calibration_file(made), Bundle.open(bundle)
    quant = json.loads(opened.read("quant.json"))
    assert opened.manifest.calibration_id == file.frames.id
    assert quant["ranges"] == file.ranges.to_json() and quant["preparation"] == file.preparation.to_json()
    assert quant["version"] == 2 and quant["notes"][0] == file.summary
    assert file.drift is not None and opened.read(DRIFT_FILE) == file.drift.to_bytes()


def test_the_int8_artefact_is_watched_by_features(bundle: Path, data: Path) -> None:
    pool = open_pool(data, "12,0,64,80")
    with Session.open(bundle, allow_unverified=True) as session:
        monitor = session.watch_drift(window=20)
        own = [monitor.observe(session.predict(n.frame), n.frame) for n, _ in pool.frames("val")]
        monitor.reset()
        upside = [named.frame for named, _ in open_pool(data, "0,0,32,80").frames("val")]
        foreign = [monitor.observe(session.predict(frame), frame) for frame in upside]
    assert monitor.kind == "features"
    assert np.mean([r.strange for r in own]) <= 0.25 and not any(r.alarm for r in own)
    assert np.mean([r.strange for r in foreign]) >= 0.9 and foreign[-1].alarm


def test_run_tells_drift_and_writes_it(
    bundle: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines, frames = tmp_path / "out.jsonl", tmp_path / "frames"
    frames.mkdir()
    for image in sorted(data.glob("*.png"))[:30]:
        shutil.copy(image, frames)
    line = ["run", str(bundle), str(frames), "--allow-unverified"]
    assert main([*line, "--jsonl", str(lines)]) == 0
    assert "look unlike the calibration set, by features" in capsys.readouterr().out
    records = [json.loads(text) for text in lines.read_text(encoding="utf-8").splitlines()]
    assert len(records) == 30 and records[-1]["drift"]["window"] == 25
    assert main([*line, "--no-drift"]) == 0
    assert "calibration set" not in capsys.readouterr().out


def test_a_bundle_without_a_statistic_says_so(
    student: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "plain.bundle"
    target = next(name for name in ("openvino", "onnx") if plugins.available("targets", name).usable)
    line = ["export", str(student), "--target", target, "--fp32", "--no-gate", "--no-compare", "--out", str(out)]
    assert main([*line, "--data", str(data)]) == 0
    assert DRIFT_FILE not in Bundle.open(out).manifest.files
    assert main(["run", str(out), "phantom:0-1", "--allow-unverified"]) == 0
    assert main(["run", str(out), "phantom:0-1", "--allow-unverified", "--drift"]) == 2
    assert "no drift statistic" in capsys.readouterr().err
    assert main([*line, "--data", str(data), "--drift"]) == 2


@pytest.fixture
def copied(data: Path, tmp_path: Path) -> Path:
    """The data again, to be spoiled."""
    return Path(shutil.copytree(data, tmp_path / "copied"))


def spoil_test_copy(folder: Path) -> None:
    """Every training image stands in the test split too, stored as another file."""
    rows = read_rows(folder)
    for row in [row for row in rows if row["split"] == "train"]:
        name = f"again-{row['file']}"
        (folder / name).write_bytes((folder / row["file"]).read_bytes() + b"\0")
        rows.append({**row, "file": name, "split": "test", "group": f"other-{row['group']}"})
    write_rows(folder, rows)


def spoil_patients(folder: Path) -> None:
    """One patient stands in train and test."""
    rows = read_rows(folder)
    rows[-1]["group"] = rows[0]["group"]
    write_rows(folder, rows)


def spoil_flat(folder: Path) -> None:
    """Every training image is of one colour."""
    for row in read_rows(folder):
        if row["split"] == "train":
            (folder / row["file"]).write_bytes(encode_png(np.full((76, 80), 90, np.uint8)))


def spoil_empty(folder: Path) -> None:
    """A training image without bytes."""
    (folder / "300.png").write_bytes(b"")


def spoil_few(folder: Path) -> None:
    """Fifteen training frames."""
    rows = read_rows(folder)
    train = [row for row in rows if row["split"] == "train"]
    write_rows(folder, [row for row in rows if row["split"] != "train"] + train[:15])


def spoil_val(folder: Path) -> None:
    """Nothing to judge on."""
    write_rows(folder, [row for row in read_rows(folder) if row["split"] != "val"])


@pytest.mark.parametrize(
    "spoil, words",
    [
        (spoil_test_copy, "also stand in the test split"),
        (spoil_patients, "1 patients stand in the test split"),
        (spoil_flat, "of one colour"),
        (spoil_empty, "image"),
        (spoil_few, "give at least 16"),
        (spoil_val, "val"),
    ],
)
def test_data_that_cannot_calibrate_gives_one_line_and_no_file(
    copied: Path,
    student: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    spoil: Callable[[Path], None],
    words: str,
) -> None:
    spoil(copied)
    out = tmp_path / "set.json"
    assert main(["calibrate", str(student), str(copied), "--out", str(out), "--count", "16", "--method", "minmax"]) == 2
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert told.startswith("error: ") and words in told and "Traceback" not in told
    assert not out.exists() and not out.with_suffix(".html").exists()


@pytest.mark.parametrize(
    "options, words",
    [
        (["--count", "15"], "at least 16"),
        (["--method", "best"], "--method"),
        (["--count", "20", "--method", "mse"], "needs 32 calibration frames"),
        (["--false-alarms", "0"], "between 0 and 1"),
        (["--false-alarms", "0.05", "--count", "16", "--method", "minmax", "--drift"], "at least 39"),
        (["--crop", "region"], "--crop region needs a DICOM file"),
        (["--crop", "1,2"], "--crop"),
        (["--report", "set.json"], "different files"),
    ],
)
def test_options_that_cannot_be_are_refused(
    data: Path,
    student: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["calibrate", str(student), str(data), *options]) == 2
    assert words in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_student_that_gives_nan_is_refused(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch = pytest.importorskip("torch", reason="install tinyusfm-edge[export]")
    from tinyusfm_edge.calibrate import CalibrateOptions, calibrate_student
    from tinyusfm_edge.models.student import StudentConfig, build_student
    from tinyusfm_runtime.spec import ModelSpec, PreprocessSpec, Task

    config = StudentConfig(image_size=64, width=24, heads=3)
    module = build_student(config).eval()
    module.backbone.blocks[0].mlp.fc1.bias.data[0] = torch.nan
    spec = ModelSpec(
        name="nan", task=Task.SEGMENT, labels=("head",), preprocess=PreprocessSpec(height=64, width=64),
        architecture=config.to_json(),
    )  # fmt: skip
    loaded: Any = type("Loaded", (), {"module": module, "spec": spec, "weights_sha256": "0" * 64})
    options = CalibrateOptions(count=16, methods=("minmax",), drift=False, false_alarms=0.2)
    with pytest.raises(CalibrationError, match="NaN"):
        calibrate_student(loaded, open_pool(data, None), options)


def test_a_file_edited_by_hand_or_of_another_student_is_refused(made: Path, data: Path, tmp_path: Path) -> None:
    plain = json.loads(made.read_text(encoding="utf-8"))
    for change in (
        {"kind": "x"}, {"version": 2}, {"drift": "AAAA"}, {"drift": "***"}, {"extra": 1}, {"preparation": {}},
        {"set": {**plain["set"], "name": "other"}}, {"ranges": {**plain["ranges"], "set_id": "0" * 64}},
    ):  # fmt: skip
        with pytest.raises(CalibrationError):
            CalibrationFile.from_json({**plain, **change})
    for raw, words in ((b"{", "not JSON"), (None, "cannot be read")):
        path = tmp_path / "file.json"
        path.unlink(missing_ok=True)
        if raw is not None:
            path.write_bytes(raw)
        with pytest.raises(InputError, match=words):
            read_calibration_file(path)


def test_a_plain_folder_calibrates_without_patients_and_says_what_is_missing(
    data: Path, student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "plain"
    folder.mkdir()
    for seed in range(300, 340):
        shutil.copy(data / f"{seed}.png", folder)
    out = tmp_path / "set.json"
    assert main(["calibrate", str(student), str(folder), "--out", str(out), "--count", "16", "--method", "minmax"]) == 0
    captured = capsys.readouterr()
    assert "no drift check fitted: without a table" in captured.out and "every other frame" in captured.err
    assert read_calibration_file(out).drift is None
