"""``adapt`` and ``evaluate`` on a small table: a student file that can be scored, one clear line for wrong input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.one_thread import one_thread
from tests.tables import phantom_table
from tinyusfm_edge.cli.main import main
from tinyusfm_edge.models.checkpoint import load_student_file
from tinyusfm_runtime.spec import PostProcess

__all__ = ["one_thread"]

SMALL = {"student": {"width": 48, "heads": 3}, "warmup": 1}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 phantoms with masks and two labels, one per patient, and the settings of a small student."""
    splits = {"train": range(700, 706), "val": range(706, 709), "test": range(709, 712)}
    labels = {"pixel_size_mm": "", "head_circumference_mm": ""}  # no millimetres
    folder = phantom_table(
        tmp_path_factory.mktemp("data"), splits, height=48, width=64,
        cells=lambda seed, _: {**labels, "label": "ab"[seed % 2], "group": f"p{seed - 700}"},
    )  # fmt: skip
    (folder / "small.json").write_text(json.dumps(SMALL), encoding="utf-8")
    return folder


def adapt(data: Path, out: Path, task: str, *more: str) -> int:
    common = ["--data", str(data), "--out", str(out), "--config", str(data / "small.json"), "--image-size", "32"]
    return main(["adapt", "--task", task, *common, "--steps", "2", "--batch", "2", *more])


def test_masks_are_learnt_written_and_scored(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "head.safetensors"
    assert adapt(data, out, "segment", "--postprocess", "ellipse_hc", "--labels", "50%") == 0
    assert "validation Dice" in capsys.readouterr().out
    student = load_student_file(out)
    assert (student.name, student.spec.postprocess) == ("head", PostProcess.ELLIPSE_HC)
    settings = json.loads((tmp_path / "head.run" / "config.json").read_text(encoding="utf-8"))
    assert settings["data"]["train"] == 4, "half of each label's three patients, rounded up"
    assert settings["adapt"]["layer_decay"] == 1.0, "random weights have no layers to spare"
    scores = tmp_path / "scores.json"
    assert main(["evaluate", str(out), "--data", str(data), "--split", "test", "--json", str(scores)]) == 0
    assert "HD95, input pixels" in capsys.readouterr().out
    written = json.loads(scores.read_text(encoding="utf-8"))
    assert written["version"] == 1 and len(written["reports"][0]["images"]) == 3
    assert "p9" not in json.dumps(written["weights_sha256"])
    assert main(["evaluate", str(out), "--data", str(data), "--thresholds", "0.4,0.6", "--paper-compat"]) == 0
    assert capsys.readouterr().out.count("quirks") == 2


def test_classes_with_exits_start_from_a_run(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert adapt(data, tmp_path / "a.safetensors", "segment") == 0
    (tmp_path / "runs").mkdir()
    (tmp_path / "a.safetensors").rename(tmp_path / "runs" / "student.safetensors")
    out = tmp_path / "c.safetensors"
    capsys.readouterr()
    assert adapt(data, out, "classify", "--init", str(tmp_path / "runs"), "--exits", "6,9") == 0
    shown = capsys.readouterr().out
    assert "validation balanced accuracy" in shown and "accuracy with early exits" in shown
    student = load_student_file(out)
    assert student.spec.labels == ("a", "b") and student.spec.exits is not None
    settings = json.loads((tmp_path / "c.run" / "config.json").read_text(encoding="utf-8"))
    assert settings["adapt"]["layer_decay"] == 0.8
    assert main(["evaluate", str(out), "--data", str(data), "--split", "val"]) == 0
    shown = capsys.readouterr().out
    assert "AUC" in shown and "stop at each exit" in shown


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--labels", "half"], "percentage"),
        (["--labels", "0%"], "more than 0"),
        (["--init", "nowhere"], "no run folder"),
        (["--lora"], "what is distilled"),
        (["--kd", "logits"], "--teacher dinov2_vits14"),
        (["--kd", "everything", "--teacher", "dinov2_vits14", "--teacher-weights", "f"], "unknown"),
        (["--teacher", "dinov2_vits14"], "nothing is distilled"),
        (["--exits", "6"], "classifiers"),
        (["--exits", "six"], "--exits"),
        (["--postprocess", "magic"], "unknown"),
        (["--precision", "int4"], "fp32, bf16 or natural"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_options_end_in_one_line(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    assert adapt(data, tmp_path / "s.safetensors", "segment", *more) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("error: ") and message in lines[-1]
    assert not (tmp_path / "s.safetensors").exists()


@pytest.mark.parametrize(
    "words",
    [
        ["--stress", "--thresholds", "0.5"],
        ["--stress", "--limit", "3"],
        ["--stress", "--paper-compat"],
        ["--every", "2"],
    ],
)
def test_evaluate_ignores_no_option(data: Path, capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
    assert main(["evaluate", "fetal-head", "--data", str(data), *words]) == 2
    assert "leave" in capsys.readouterr().err


def test_an_unknown_task_split_or_table_is_named(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert adapt(data, tmp_path / "s.safetensors", "detect") == 2
    assert adapt(tmp_path, tmp_path / "s.safetensors", "classify", "--config", str(data / "small.json")) == 2
    assert main(["evaluate", "fetal-head", "--data", str(data), "--split", "all"]) == 2
    assert main(["evaluate", "fetal-head", "--data", str(data), "--split", "test", "--thresholds", "0.5"]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 4
    assert "segment, classify" in errors[0] and "split.csv" in errors[1] and "train, val, test" in errors[2]
