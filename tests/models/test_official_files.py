"""Files of the official repositories load whole, name by name; averages are chosen; a random head is never silent."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from tests.models.golden_keys import FORMATS, golden_state
from tests.tables import write_rows
from tinyusfm_edge.cli.main import main
from tinyusfm_edge.models.checkpoint import load_start, load_student_file, load_weights
from tinyusfm_edge.models.student import StudentConfig, build_student
from tinyusfm_runtime.errors import CheckpointError

COUNTS = {
    "TinyUSFM.pth, pre-trained with norm": 150,
    "TinyUSFM.pth, pre-trained with fc_norm": 150,
    "train_cls.py, 5 classes": 152,
    "train_cls.py, 5 classes, parallel": 152,
    "train_seg.py, binary": 150 + 58 + 8,
    "train_seg.py, 4 classes": 150 + 58 + 8,
}


def written(folder: Path, name: str, change: str = "") -> Path:
    path = folder / "official.pth"
    torch.save({change + key: value for key, value in golden_state(name).items()}, path)
    return path


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_golden_lists_have_the_official_number_of_tensors(name: str) -> None:
    assert len(golden_state(name)) == COUNTS[name]


@pytest.mark.parametrize(("name", "classes"), [("train_seg.py, binary", 2), ("train_seg.py, 4 classes", 4)])
@pytest.mark.parametrize("wrapper", ["", "module.", "_orig_mod.", "module._orig_mod.", "net."])
def test_what_train_seg_saves_is_a_whole_student(tmp_path: Path, name: str, classes: int, wrapper: str) -> None:
    labels = ["background", *[f"organ{i}" for i in range(1, classes)]]
    found = load_student_file(written(tmp_path, name, wrapper), task="segment", labels=labels)
    state, own = golden_state(name), found.module.state_dict()
    pairs = {
        "neck.projections.2.weight": "neck.convs.2.weight",
        "decode_head.lateral_convs.0.0.weight": "head.lateral.0.0.weight",
        "decode_head.fpn_convs.3.1.running_var": "head.smooth.3.1.running_var",
        "decode_head.conv_seg.bias": "head.classifier.bias",
        "backbone.blocks.7.mlp.fc1.weight": "backbone.blocks.7.mlp.fc1.weight",
    }
    for theirs, ours in pairs.items():
        assert torch.equal(own[ours], state[theirs]), theirs
    assert not found.report.missing_heads and not found.report.unexpected


def test_a_start_takes_the_official_head_and_says_nothing(tmp_path: Path) -> None:
    told: list[str] = []
    student = build_student(StudentConfig())
    report = load_start(student, written(tmp_path, "train_seg.py, binary"), say=told.append)
    assert report.num_loaded == COUNTS["train_seg.py, binary"] - 8 and not told


def test_a_head_that_stays_random_is_said_in_one_line_and_refused_where_answers_count(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, told = written(tmp_path, "TinyUSFM.pth, pre-trained with norm"), list[str]()
    report = load_start(build_student(StudentConfig()), path, say=told.append)
    assert len(told) == 1 and "stays random (58 tensors" in told[0]
    assert report.random_head == told[0]
    frames = tmp_path / "frames"
    frames.mkdir()
    for name, value in (("a.png", 90), ("m.png", 0)):
        image = np.full((64, 64), value, np.uint8)
        image[20:40, 20:40] = 255
        assert cv2.imwrite(str(frames / name), image)
    write_rows(frames, [{"file": "a.png", "mask": "m.png", "split": "test"}])
    for line in (
        ["evaluate", str(path), "--task", "segment", "--labels", "head", "--data", str(frames)],
        ["export", str(path), "--task", "segment", "--labels", "head", "--out", str(tmp_path / "b")],
    ):
        assert main(line) == 2
        assert "58 tensors of its head are missing" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("kind", ["norm", "fc_norm"])
def test_either_norm_serves_features_and_classes(tmp_path: Path, kind: str) -> None:
    path = written(tmp_path, f"TinyUSFM.pth, pre-trained with {kind}")
    state = golden_state(f"TinyUSFM.pth, pre-trained with {kind}")
    features = build_student(StudentConfig(task="features"))
    classes = build_student(StudentConfig(task="classify", num_classes=5))
    told: list[str] = []
    load_start(features, path, say=told.append)
    assert torch.equal(features.backbone.norm.weight, state[f"model.{kind}.weight"])
    assert bool(told) is (kind == "fc_norm")
    load_start(classes, path)
    assert torch.equal(classes.fc_norm.weight, state[f"model.{kind}.weight"])  # type: ignore[union-attr]


def test_averaged_weights_are_named_and_chosen(tmp_path: Path) -> None:
    name = "train_seg.py, binary"
    content = {"model_state_dict": golden_state(name, 1), "model_ema": golden_state(name, 2), "epoch": 3}
    torch.save(content, tmp_path / "both.pth")
    with pytest.raises(CheckpointError, match="model_ema is a moving average.*--container"):
        load_weights(build_student(StudentConfig()), tmp_path / "both.pth")
    for container, seed in (("model_state_dict", 1), ("model_ema", 2)):
        student = build_student(StudentConfig())
        load_weights(student, tmp_path / "both.pth", container=container)
        wanted = golden_state(name, seed)["decode_head.conv_seg.weight"]
        assert torch.equal(student.head.classifier.weight, wanted)  # type: ignore[union-attr]


def test_two_nets_side_by_side_are_not_guessed_between(tmp_path: Path) -> None:
    state = golden_state("TinyUSFM.pth, pre-trained with norm")
    both = {
        key.replace("model.", f"{place}.backbone."): value
        for key, value in state.items()
        for place in ("student", "teacher")
    }
    torch.save(both, tmp_path / "pair.pth")
    with pytest.raises(CheckpointError, match="several models"):
        load_weights(build_student(StudentConfig()), tmp_path / "pair.pth")
