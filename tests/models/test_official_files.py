"""Files of the official repositories load whole, name by name; averages are chosen; a random head is never silent."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from tests.models.golden_keys import FORMATS, golden_state
from tests.tables import phantom_table, write_rows
from tinyusfm_edge.cli.main import main
from tinyusfm_edge.models.checkpoint import load_start, load_student_file, load_weights, save_student
from tinyusfm_edge.models.student import StudentConfig, build_student
from tinyusfm_runtime.errors import CheckpointError
from tinyusfm_runtime.spec import ModelSpec, PreprocessSpec, Task

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
    torch.save({"model_ema": content["model_ema"], "epoch": 3}, tmp_path / "alone.pth")
    with pytest.warns(UserWarning, match="are the moving average under 'model_ema'"):
        told = load_weights(build_student(StudentConfig()), tmp_path / "alone.pth").notes
    assert len(told) == 1
    assert not load_weights(build_student(StudentConfig()), tmp_path / "alone.pth", container="model_ema").notes


def test_two_nets_side_by_side_are_not_guessed_between(tmp_path: Path) -> None:
    state = golden_state("TinyUSFM.pth, pre-trained with norm")
    both = {
        key.replace("model.", f"{place}.backbone."): value
        for key, value in state.items()
        for place in ("student", "teacher")
    }
    torch.save(both, tmp_path / "pair.pth")
    with pytest.raises(CheckpointError, match="several models, student, teacher: choose one"):
        load_weights(build_student(StudentConfig()), tmp_path / "pair.pth")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("backbone.", "_orig_mod.backbone."),
        ("backbone.", "backbone._orig_mod."),
        ("backbone.", "module.backbone."),
        ("decode_head.", "decode_head.module."),
    ],
)
def test_a_part_that_was_compiled_alone_loses_no_head(tmp_path: Path, old: str, new: str) -> None:
    state = golden_state("train_seg.py, 4 classes")
    torch.save({key.replace(old, new): value for key, value in state.items()}, tmp_path / "part.pth")
    found = load_student_file(tmp_path / "part.pth", task="segment", labels=["background", "a", "b", "c"])
    assert torch.equal(found.module.state_dict()["head.classifier.weight"], state["decode_head.conv_seg.weight"])
    assert not found.report.unexpected


def beside(layout: str, raw: dict[str, torch.Tensor], average: dict[str, torch.Tensor]) -> dict[str, object]:
    flat: dict[str, object] = {f"model.{key}": value for key, value in raw.items()}
    flat |= {f"ema_model.module.{key}": value for key, value in average.items()}
    if layout == "with a count":
        return {"model": raw, "ema_model": {"module": average, "updates": 7}}
    return {"state_dict": flat} if layout == "in a container" else {**flat, "ema_model.step": torch.tensor(3)}


@pytest.mark.parametrize("layout", ["flat", "in a container", "with a count"])
def test_an_average_beside_the_weights_is_named_and_chosen_in_every_layout(tmp_path: Path, layout: str) -> None:
    raw, average = golden_state("train_seg.py, binary", 1), golden_state("train_seg.py, binary", 2)
    torch.save(beside(layout, raw, average), tmp_path / "both.pth")
    with pytest.raises(CheckpointError, match="model, ema_model; ema_model is a moving average.*--container"):
        load_weights(build_student(StudentConfig()), tmp_path / "both.pth")
    for container, wanted in (("model", raw), ("ema_model", average)):
        student = build_student(StudentConfig())
        load_weights(student, tmp_path / "both.pth", container=container)
        own = student.state_dict()["head.classifier.weight"]
        assert torch.equal(own, wanted["decode_head.conv_seg.weight"])
    with pytest.raises(CheckpointError, match="no weights under 'other'"):
        load_weights(build_student(StudentConfig()), tmp_path / "both.pth", container="other")


def test_an_unknown_container_is_named(tmp_path: Path) -> None:
    torch.save({"network": golden_state("train_seg.py, binary")}, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match="under network: choose with"):
        load_weights(build_student(StudentConfig()), tmp_path / "w.pth")
    assert not load_weights(build_student(StudentConfig()), tmp_path / "w.pth", container="network").missing_heads


def test_a_start_of_other_heads_is_refused_though_its_shapes_fit(tmp_path: Path) -> None:
    three = StudentConfig(task="features", image_size=32, width=48, heads=3)
    spec = ModelSpec(name="three", task=Task.FEATURES, labels=(), preprocess=PreprocessSpec(height=32, width=32))
    save_student(tmp_path / "three.safetensors", build_student(three), spec)
    with pytest.raises(CheckpointError, match="has 3 attention heads, the student 12: set student.heads=3"):
        load_start(build_student(replace(three, heads=12)), tmp_path / "three.safetensors")
    load_start(build_student(three), tmp_path / "three.safetensors")


@pytest.mark.parametrize("line", [["qat", "--data", "{data}"], ["sensitivity"], ["calibrate", "{data}"]])
def test_every_command_that_reads_a_student_takes_what_the_file_does_not_say(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], line: list[str]
) -> None:
    whole, backbone = golden_state("train_seg.py, binary"), golden_state("TinyUSFM.pth, pre-trained with norm")
    torch.save({"model": whole, "model_ema": backbone}, tmp_path / "both.pth")
    frames = tmp_path / "frames"
    frames.mkdir()
    phantom_table(frames, {"train": range(4), "val": range(4, 8)})
    command, *rest = (word.format(data=frames) for word in line)
    given = [command, str(tmp_path / "both.pth"), *rest, "--out", str(tmp_path / "out.safetensors")]
    given += ["--task", "segment", "--labels", "head"]
    assert main(given) == 2
    assert "model_ema is a moving average of the weights: choose" in capsys.readouterr().err
    assert main([*given, "--container", "model_ema"]) == 2
    assert "58 tensors of its head are missing" in capsys.readouterr().err
    assert not (tmp_path / "out.safetensors").exists()


def test_options_that_say_nothing_of_a_student_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    frames = tmp_path / "frames"
    frames.mkdir()
    phantom_table(frames, {"train": range(4), "val": range(4, 8)})
    for extra in (["--container", "model_ema"], ["--task", "classify"]):
        assert main(["evaluate", "fetal-head", "--data", str(frames), *extra]) == 2
        assert "leave out task and container" in capsys.readouterr().err
    out = tmp_path / "a.safetensors"
    line = ["adapt", "--task", "segment", "--data", str(frames), "--out", str(out), "--container", "model_ema"]
    assert main(line) == 2
    assert "name the start" in capsys.readouterr().err
    assert not out.exists() and not out.with_suffix(".run").exists()
