"""Adaptation end to end on a small table: resumption, decay that acts, labels, phantoms, teachers, exits, refusals."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tables import read_rows, write_rows
from tinyusfm_edge.data.fingerprint import images_sha256
from tinyusfm_edge.models.checkpoint import load_student_file, save_student
from tinyusfm_edge.models.encoder import EncoderShape
from tinyusfm_edge.models.student import StudentConfig, build_student
from tinyusfm_edge.models.teachers import dinov2
from tinyusfm_edge.training.adapt.config import AdaptConfig
from tinyusfm_edge.training.adapt.fit import BEST, engine_config, preprocess_spec
from tinyusfm_edge.training.adapt.run import adapt, best_student, student_spec, write_student
from tinyusfm_edge.training.adapt.task import class_names, load_task, score
from tinyusfm_edge.training.adapt.teacher import AdaptTeacher
from tinyusfm_edge.training.trainer import loop
from tinyusfm_runtime.device.machine import machine_card
from tinyusfm_runtime.errors import CheckpointError, InputError

STUDENT = StudentConfig(image_size=32, width=48, heads=3, drop_path=0.1)
SMALL = AdaptConfig(
    steps=6, batch=4, warmup=2, evaluate_every=3, phantom_share=0.25, num_phantoms=6, held_phantoms=2, student=STUDENT
)
HEAD = ("head",)


@pytest.fixture(scope="module")
def whole(table: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "whole"
    adapt(table, out, SMALL, HEAD, quiet=True)
    return out


@pytest.fixture(scope="module")
def classes(table: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same images with two labels by patient, one row of them flagged."""
    folder = tmp_path_factory.mktemp("classes")
    for path in table.glob("*.png"):
        (folder / path.name).write_bytes(path.read_bytes())
    rows = read_rows(table)
    labels = [("dark", "light")[number // 2 % 2] for number in range(len(rows))]
    return write_rows(
        folder, [{**row, "label": labels[n], "near_duplicate": int(n == 5)} for n, row in enumerate(rows)]
    )


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> AdaptTeacher:
    """A tiny DINOv2 under a name of its own."""
    torch.manual_seed(0)
    shape = EncoderShape(width=24, depth=12, heads=3, patch=14, grid=2, scale="timm")
    net = dinov2.Dinov2(shape)
    path = tmp_path_factory.mktemp("teacher") / "tiny.safetensors"
    save_file(net.state_dict(), path)
    return AdaptTeacher(name="tiny", weights=path)


@pytest.fixture
def tiny_variant(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = EncoderShape(width=24, depth=12, heads=3, patch=14, grid=2, scale="timm")
    monkeypatch.setitem(dinov2.VARIANTS, "tiny", shape)


def same(first: Path, second: Path) -> bool:
    a, b = load_file(first), load_file(second)
    return set(a) == set(b) and all(torch.equal(a[name], b[name]) for name in a)


def test_a_run_cut_short_ends_with_the_same_weights(
    table: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, steps = torch.optim.AdamW.step, list[int]()

    def killed(self: torch.optim.AdamW, *arguments: object) -> object:
        steps.append(1)
        if len(steps) == 6:
            raise KeyboardInterrupt
        return real(self, *arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", killed)
        with pytest.raises(KeyboardInterrupt):
            adapt(table, tmp_path / "run", SMALL, HEAD, quiet=True)
    torch.manual_seed(123)  # a new process starts elsewhere
    adapt(table, tmp_path / "run", SMALL, HEAD, quiet=True)
    assert same(tmp_path / "run" / BEST, whole / BEST)


def test_settings_cannot_change_half_way(table: Path, whole: Path) -> None:
    with pytest.raises(InputError, match="other settings"):
        adapt(table, whole, replace(SMALL, learning_rate=1e-5), HEAD, quiet=True)


def test_best_weights_become_a_student_file(table: Path, whole: Path, tmp_path: Path) -> None:
    spec = student_spec(SMALL, HEAD, name="tiny", postprocess="ellipse_hc")
    sha256, stops = write_student(whole, tmp_path / "s.safetensors", SMALL, spec, data=table)
    found = load_student_file(tmp_path / "s.safetensors")
    assert (found.weights_sha256, found.spec.labels, stops) == (sha256, HEAD, None)
    assert dict(found.report.stages) == {"images": images_sha256([table])}, "what a bundle's trace begins with"
    image = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(found.module(image), best_student(whole, SMALL)(image))
    with pytest.raises(InputError, match="holds no"):
        best_student(tmp_path, SMALL)
    with pytest.raises(InputError, match="another model"):
        best_student(whole, replace(SMALL, student=replace(STUDENT, task="classify", num_classes=2), phantom_share=0))


def test_layer_decay_acts_from_the_first_step_of_the_warm_up(table: Path, tmp_path: Path) -> None:
    """AdamW's first step is as long as the group's own rate, whatever the gradient's size: it shows the rates."""
    config = replace(
        SMALL, steps=1, warmup=4, ema=0.0, weight_decay=0.0, layer_decay=0.5, learning_rate=1e-2, phantom_share=0.0
    )
    config = replace(config, student=replace(STUDENT, drop_path=0.0))
    adapt(table, tmp_path / "run", config, HEAD, quiet=True)
    torch.manual_seed(config.seed)
    before, after = build_student(config.student).state_dict(), best_student(tmp_path / "run", config).state_dict()
    moved = {name: float((after[name] - before[name]).abs().median()) for name in before}
    rate = 1e-2 / 4
    assert moved["neck.convs.0.weight"] == pytest.approx(rate, rel=0.02)
    assert moved["backbone.blocks.11.mlp.fc1.weight"] == pytest.approx(rate / 2, rel=0.02)
    assert moved["backbone.blocks.10.mlp.fc1.weight"] == pytest.approx(rate / 4, rel=0.02)
    assert moved["backbone.blocks.0.mlp.fc1.weight"] == pytest.approx(rate / 2**12, rel=0.05)
    flat = replace(config, layer_decay=1.0)
    adapt(table, tmp_path / "flat", flat, HEAD, quiet=True)
    after = best_student(tmp_path / "flat", flat).state_dict()
    moved = {name: float((after[name] - before[name]).abs().median()) for name in before}
    assert moved["backbone.blocks.0.mlp.fc1.weight"] == pytest.approx(rate, rel=0.05), "the control: decay off"


def test_validation_leaves_the_batch_statistics_alone(table: Path, tmp_path: Path) -> None:
    often, once = replace(SMALL, evaluate_every=1), replace(SMALL, evaluate_every=6)
    for name, config in (("often", often), ("once", once)):
        adapt(table, tmp_path / name, config, HEAD, quiet=True)
    a, b = (load_file(tmp_path / name / "step-00000006" / "weights.safetensors") for name in ("often", "once"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert any("running_mean" in name for name in a)


def test_a_start_is_taken_over_and_recorded(table: Path, tmp_path: Path) -> None:
    torch.manual_seed(7)
    start = build_student(STUDENT)
    spec = student_spec(SMALL, HEAD, name="s")
    sha256 = save_student(tmp_path / "start.safetensors", start, spec, torch.float32)
    still = replace(SMALL, steps=1, evaluate_every=1, learning_rate=1e-12)
    adapt(table, tmp_path / "run", still, HEAD, init=tmp_path / "start.safetensors", quiet=True)
    found = load_file(tmp_path / "run" / BEST)
    torch.testing.assert_close(found["model.backbone.pos_embed"], start.backbone.pos_embed.detach(), atol=1e-5, rtol=0)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["init"]["sha256"] == sha256
    wide = replace(SMALL, student=replace(STUDENT, width=96))
    with pytest.raises(CheckpointError, match="another model"):
        adapt(table, tmp_path / "wide", wide, HEAD, init=tmp_path / "start.safetensors", quiet=True)
    assert not (tmp_path / "wide").exists()


def test_classes_with_exits_are_learnt_calibrated_and_written(classes: Path, tmp_path: Path) -> None:
    labels = class_names(classes)
    student = replace(STUDENT, task="classify", num_classes=2, exits=(6, 9))
    config = replace(SMALL, student=student, phantom_share=0.0, steps=3)
    outcome = adapt(classes, tmp_path / "run", config, labels, quiet=True)
    assert outcome.best is not None and outcome.best <= 1.0
    recorded = json.loads((tmp_path / "run" / "config.json").read_text(encoding="utf-8"))
    assert recorded["data"]["train"] == 23, "the flagged row is left out"
    spec = student_spec(config, labels, name="c")
    _, stops = write_student(tmp_path / "run", tmp_path / "c.safetensors", config, spec, data=classes)
    found = load_student_file(tmp_path / "c.safetensors")
    assert stops is not None and stops.accuracy >= stops.full_accuracy - 0.005 - 1e-9
    assert found.spec.exits is not None and found.spec.exits.blocks == (6, 9)


def test_a_share_of_the_labels_is_whole_patients(classes: Path, tmp_path: Path) -> None:
    config = replace(
        SMALL, steps=1, labels=0.25, phantom_share=0.0, student=replace(STUDENT, task="classify", num_classes=2)
    )
    adapt(classes, tmp_path / "run", config, ("dark", "light"), quiet=True)
    data = json.loads((tmp_path / "run" / "config.json").read_text(encoding="utf-8"))["data"]
    assert 6 <= data["train"] <= 8 and data["train_groups"] == 4 and data["val"] == 4


@pytest.mark.usefixtures("tiny_variant")
@pytest.mark.parametrize("task", ["segment", "classify"])
def test_a_lora_teacher_guides_the_student(task: str, classes: Path, teacher: AdaptTeacher, tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="install tinyusfm-edge[train]")
    student = replace(STUDENT, task=task, num_classes=2)
    config = replace(
        SMALL,
        steps=2,
        evaluate_every=2,
        student=student,
        phantom_share=0.0,
        kd=("logits", "features", "csf", "patches"),
        teacher_steps=2,
        labels=0.5,
        transfer_share=0.5,
        num_synthetic=3,
    )
    labels = HEAD if task == "segment" else ("dark", "light")
    choice = replace(teacher, run=tmp_path / "teacher")
    adapt(classes, tmp_path / "run", config, labels, teacher=choice, quiet=True)
    names = {name.split(".")[0] for name in load_file(tmp_path / "run" / BEST)}
    assert names >= {"model", "guide"}
    scalars = loop.read_scalars(tmp_path / "run")
    assert {"task", "kd_logits", "kd_features", "kd_csf", "kd_patches"} <= set(scalars[0])
    recorded = json.loads((tmp_path / "run" / "config.json").read_text(encoding="utf-8"))
    assert recorded["teacher"]["name"] == "tiny"
    assert recorded["data"]["transfer"] == 24 - 1 - recorded["data"]["train"] + 3
    stamp = (tmp_path / "teacher" / BEST).stat().st_mtime_ns
    adapt(classes, tmp_path / "other", replace(config, seed=1), labels, teacher=choice, quiet=True)
    assert (tmp_path / "teacher" / BEST).stat().st_mtime_ns == stamp, "the teacher's finished run serves every seed"


def test_distillation_and_a_teacher_belong_together(table: Path, teacher: AdaptTeacher, tmp_path: Path) -> None:
    for config, choice in ((SMALL, teacher), (replace(SMALL, kd=("logits",)), None)):
        with pytest.raises(InputError, match="belong together"):
            adapt(table, tmp_path / "run", config, HEAD, teacher=choice, quiet=True)


@pytest.mark.parametrize(
    "change",
    [
        {"steps": 0},
        {"batch": 0},
        {"phantom_share": 1.0},
        {"held_phantoms": 6},
        {"negative_share": 1.0},
        {"layer_decay": 0.0},
        {"labels": 1.5},
        {"precision": "fp8"},
        {"kd": ("everything",)},
        {"transfer_share": 0.5},
        {"temperature": 0.0},
        {"student": StudentConfig(task="features")},
        {"student": StudentConfig(num_classes=3)},
        {"student": StudentConfig(task="classify")},
        {"phantom_share": 0.0, "negative_share": 0.1, "student": StudentConfig(task="classify")},
    ],
    ids=lambda change: next(iter(change)),
)
def test_impossible_settings(change: dict[str, object]) -> None:
    with pytest.raises(InputError):
        replace(SMALL, **change)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("asked", "features", "computed"),
    [
        ("fp32", ["amx_bf16"], "fp32"),
        ("natural", ["amx_bf16"], "bf16"),
        ("natural", ["avx512_bf16"], "bf16"),
        ("natural", ["avx2"], "fp32"),
    ],
)
def test_natural_precision_is_what_the_machine_computes_in(
    asked: str, features: list[str], computed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = replace(machine_card(), features=tuple(features))
    monkeypatch.setattr("tinyusfm_runtime.device.machine.machine_card", lambda: card)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert engine_config(replace(AdaptConfig(), precision=asked)).precision == computed


def test_negatives_teach_a_net_to_answer_with_nothing(table: Path, tmp_path: Path) -> None:
    """Stripes have no head; a network that never saw them marks one, a network that did marks none."""
    stripes = tmp_path / "stripes"
    stripes.mkdir()
    rows = []
    for index in range(12):
        image = np.broadcast_to((np.arange(96)[:, None] // (2 + index % 4) % 2 * 180 + 40).astype(np.uint8), (96, 128))
        cv2.imwrite(str(stripes / f"{index}.png"), image)
        split = "val" if index >= 8 else "train"
        named = {"file": f"{index}.png", "label": "muscle", "mask": "", "split": split, "group": f"group{index}"}
        rows.append(named)
    write_rows(stripes, rows)
    without = replace(SMALL, steps=150, evaluate_every=150, ema=0.0, learning_rate=2e-3, layer_decay=1.0, batch=8)
    found = {}
    for share in (0.0, 0.4):
        run = tmp_path / f"run{share}"
        folders = [stripes] if share else []
        adapt(table, run, replace(without, negative_share=share), HEAD, negatives=folders, quiet=True)
        config = AdaptConfig.from_json(json.loads((run / "config.json").read_text(encoding="utf-8"))["adapt"])
        data = load_task(table, preprocess_spec(config), replace(config, negative_share=0.4), HEAD, [stripes])
        assert data.negatives is not None and len(data.negatives) == 8
        assert data.negatives_val is not None and len(data.negatives_val) == 4
        net = best_student(run, config)
        found[share] = score(net, data.negatives_val, preprocess_spec(config), segment=True)["dice"]
        logged = [entry for entry in loop.read_scalars(run) if "val_rank" in entry][-1]
        assert logged.get("negatives_empty") == (found[share] if share else None)
    assert found[0.4] == 1.0 and found[0.0] < 1.0
    settings = json.loads((run / "config.json").read_text(encoding="utf-8"))
    assert settings["data"]["negatives"] == 8 and settings["negatives"] == ["stripes"]


@pytest.mark.usefixtures("tiny_variant")
def test_a_taught_student_may_have_negatives_that_its_teacher_has_not(
    table: Path, classes: Path, teacher: AdaptTeacher, tmp_path: Path
) -> None:
    config = replace(
        SMALL, steps=3, phantom_share=0.0, negative_share=0.3, kd=("logits",), teacher_steps=2, lora_rank=0
    )
    outcome = adapt(table, tmp_path / "run", config, HEAD, teacher=teacher, negatives=[classes], quiet=True)
    assert outcome.best_step == 3
    assert json.loads((tmp_path / "run" / "config.json").read_text(encoding="utf-8"))["data"]["negatives"] > 0


def test_negatives_and_their_share_belong_together(table: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="belong together"):
        adapt(table, tmp_path / "run", replace(SMALL, negative_share=0.2), HEAD, quiet=True)
    with pytest.raises(InputError, match="belong together"):
        adapt(table, tmp_path / "run", SMALL, HEAD, negatives=[table], quiet=True)


def test_settings_of_a_run_can_be_read_back(whole: Path) -> None:
    recorded = json.loads((whole / "config.json").read_text(encoding="utf-8"))
    assert AdaptConfig.from_json(recorded["adapt"]) == SMALL
    assert AdaptConfig.from_json({"augment": {"scale": [0.9, 1.1]}}).augment.scale == (0.9, 1.1)
    for wrong in ({"stepz": 1}, {"augment": {"zoom": 2}}, {"student": 3}, {"steps": "many"}):
        with pytest.raises(InputError):
            AdaptConfig.from_json(wrong)


def test_a_label_the_model_does_not_know_is_named(classes: Path, tmp_path: Path) -> None:
    config = replace(SMALL, phantom_share=0.0, student=replace(STUDENT, task="classify", num_classes=2))
    with pytest.raises(InputError, match="'light'"):
        adapt(classes, tmp_path / "run", config, ("dark", "other"), quiet=True)
    assert np.array_equal(class_names(classes), ("dark", "light"))
