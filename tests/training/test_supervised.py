"""A run that is killed and resumed ends with the weights of one that was not; settings cannot change half-way."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tinyusfm_edge.models.checkpoint import load_student_file, save_student
from tinyusfm_edge.models.student import StudentConfig, build_student
from tinyusfm_edge.training import supervised
from tinyusfm_edge.training.supervised import SupervisedConfig, main, normalise, soft_dice_loss, train
from tinyusfm_runtime.errors import CheckpointError, InputError
from tinyusfm_runtime.spec import ModelSpec, PreprocessSpec, Task

SMALL = SupervisedConfig(
    steps=6,
    batch=4,
    warmup=2,
    phantom_share=0.25,
    num_phantoms=6,
    held_phantoms=2,
    evaluate_every=3,
    student=StudentConfig(image_size=32, width=48, heads=3, drop_path=0.1),
)


class Killed(Exception):
    """Stands for the end of the process."""


def kill_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    real = supervised._Run.advance

    def advance(run: supervised._Run, pools: list[torch.Tensor], spec: PreprocessSpec) -> float:
        if run.step == step:
            raise Killed
        return real(run, pools, spec)

    monkeypatch.setattr(supervised._Run, "advance", advance)


@pytest.fixture(scope="module")
def whole(table: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "whole"
    train(table, out, SMALL)
    return out


def same(first: Path, second: Path) -> bool:
    a, b = load_file(first), load_file(second)
    return set(a) == set(b) and all(torch.equal(a[name], b[name]) for name in a)


def test_resumed_run_equals_an_uninterrupted_one(
    table: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        kill_at(patch, 5)
        with pytest.raises(Killed):
            train(table, tmp_path / "run", SMALL)
    assert not (tmp_path / "run" / "last.safetensors").exists()
    torch.manual_seed(123)  # a new process starts elsewhere
    train(table, tmp_path / "run", SMALL)
    assert same(tmp_path / "run" / "last.safetensors", whole / "last.safetensors")
    assert same(tmp_path / "run" / "best.safetensors", whole / "best.safetensors")


def test_another_seed_gives_other_weights(table: Path, whole: Path, tmp_path: Path) -> None:
    train(table, tmp_path / "run", replace(SMALL, seed=1))
    assert not same(tmp_path / "run" / "last.safetensors", whole / "last.safetensors")


def test_settings_cannot_change_half_way(table: Path, whole: Path) -> None:
    before = (whole / "config.json").read_text(encoding="utf-8")
    with pytest.raises(InputError, match="other settings"):
        train(table, whole, replace(SMALL, learning_rate=1e-5))
    assert (whole / "config.json").read_text(encoding="utf-8") == before


def test_best_weights_are_a_whole_student(whole: Path) -> None:
    assert load_student_file(whole / "best.safetensors", task="segment", config=SMALL.student).module.config.width == 48
    recorded = json.loads((whole / "config.json").read_text(encoding="utf-8"))
    assert StudentConfig.from_json(recorded["student"]) == SMALL.student
    assert recorded["init"] is None


def test_training_starts_from_given_weights_and_records_them(table: Path, tmp_path: Path) -> None:
    torch.manual_seed(7)
    start = build_student(SMALL.student)
    spec = ModelSpec(name="s", task=Task.SEGMENT, labels=("head",), preprocess=PreprocessSpec(height=32, width=32))
    sha256 = save_student(tmp_path / "start.safetensors", start, spec, torch.float32)
    still = replace(SMALL, steps=1, evaluate_every=1, learning_rate=1e-12)
    train(table, tmp_path / "run", still, init=tmp_path / "start.safetensors")
    found = load_file(tmp_path / "run" / "last.safetensors")
    torch.testing.assert_close(found["backbone.pos_embed"], start.backbone.pos_embed.detach(), atol=1e-5, rtol=0)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["init"]["sha256"] == sha256
    wide = replace(SMALL, student=replace(SMALL.student, width=96))
    with pytest.raises(CheckpointError, match="another net"):
        train(table, tmp_path / "wide", wide, init=tmp_path / "start.safetensors")
    assert not (tmp_path / "wide").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"steps": 0},
        {"batch": 0},
        {"phantom_share": 1.0},
        {"held_phantoms": 6},
        {"student": StudentConfig(task="features")},
        {"student": StudentConfig(num_classes=3)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_impossible_settings(change: dict[str, object]) -> None:
    with pytest.raises(InputError):
        replace(SMALL, **change)  # type: ignore[arg-type]


def test_settings_of_a_run_can_be_read_back(whole: Path) -> None:
    recorded = json.loads((whole / "config.json").read_text(encoding="utf-8"))
    assert SupervisedConfig.from_json(recorded) == SMALL
    assert SupervisedConfig.from_json({"augment": {"scale": [0.9, 1.1]}}).augment.scale == (0.9, 1.1)
    for wrong in ({"stepz": 1}, {"version": 2}, {"augment": {"zoom": 2}}, {"student": 3}, {"steps": "many"}):
        with pytest.raises(InputError):
            SupervisedConfig.from_json(wrong)


def test_command_line_takes_settings_and_options(
    table: Path, tmp_path: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["--data", str(table), "--out", str(tmp_path / "run"), "--config", str(whole / "config.json")]
    assert main([*common, "--steps", "1", "--init", str(whole / "best.safetensors")]) == 0
    assert json.loads((tmp_path / "run" / "config.json").read_text())["steps"] == 1
    assert main([*common[:-1], str(tmp_path / "none.json")]) == 2
    assert "cannot be read" in capsys.readouterr().out


def test_command_line_reports_bad_data_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--data", str(tmp_path), "--out", str(tmp_path / "run")]) == 2
    assert capsys.readouterr().out.startswith("error: ")


def test_loss_is_zero_for_a_sure_and_right_answer() -> None:
    target = torch.zeros(2, 1, 8, 8)
    target[:, :, 2:6] = 1
    assert soft_dice_loss(40 * (target - 0.5), target) < 1e-4
    assert soft_dice_loss(-40 * (target - 0.5), target) > 0.9


def test_normalised_grey_has_imagenet_statistics() -> None:
    spec = PreprocessSpec()
    found = normalise(torch.full((1, 1, 2, 2), 255.0), spec)
    assert found.shape == (1, 3, 2, 2)
    assert found[0, :, 0, 0].tolist() == pytest.approx([(1 - m) / s for m, s in zip(spec.mean, spec.std, strict=True)])
