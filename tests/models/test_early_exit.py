"""Early exits: each has a head of its own, the end answers as the student does, and files carry them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tinyusfm_edge.models.checkpoint import load_student_file, load_weights, save_student
from tinyusfm_edge.models.early_exit import all_exits
from tinyusfm_edge.models.student import ClassificationStudent, StudentConfig, build_student
from tinyusfm_runtime.errors import InputError
from tinyusfm_runtime.spec import ExitPolicy, ModelSpec, PreprocessSpec, Task

CONFIG = StudentConfig(task="classify", num_classes=3, image_size=32, width=48, heads=3, drop_path=0.0, exits=(6, 9))
SPEC = ModelSpec(name="c", task=Task.CLASSIFY, labels=("a", "b", "c"), preprocess=PreprocessSpec(height=32, width=32))


@pytest.fixture(scope="module")
def student() -> ClassificationStudent:
    torch.manual_seed(0)
    made = build_student(CONFIG).eval()
    assert isinstance(made, ClassificationStudent)
    for parameter in made.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return made


def test_the_last_exit_is_the_student_and_the_others_have_heads_of_their_own(student: ClassificationStudent) -> None:
    image = torch.randn(2, 3, 32, 32)
    found = all_exits(student, image)
    assert found.shape == (3, 2, 3)
    torch.testing.assert_close(found[-1], student(image).detach())
    assert not torch.allclose(found[0], found[-1]) and not torch.allclose(found[0], found[1])


@pytest.mark.parametrize("exits", [(9, 6), (6, 6), (0,), (12,), (6.0,)], ids=str)
def test_impossible_exits(exits: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="exits"):
        replace(CONFIG, exits=exits)


def test_exits_belong_to_classifiers() -> None:
    with pytest.raises(InputError, match="classifiers"):
        StudentConfig(exits=(6,))


def test_a_student_file_carries_exits_and_policy(student: ClassificationStudent, tmp_path: Path) -> None:
    policy = ExitPolicy(blocks=(6, 9), entropy=(0.2, 0.3), patience=2)
    save_student(tmp_path / "s.safetensors", student, replace(SPEC, exits=policy), torch.float32)
    found = load_student_file(tmp_path / "s.safetensors")
    assert found.spec.exits == policy
    assert found.module.config.exits == (6, 9)
    image = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(all_exits(found.module, image), all_exits(student, image))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="early exits"):
        wrong = ExitPolicy(blocks=(5, 9), entropy=(0.2, 0.3))
        save_student(tmp_path / "w.safetensors", student, replace(SPEC, exits=wrong), torch.float32)


def test_a_pretrained_net_without_exits_starts_one_with_them(tmp_path: Path) -> None:
    plain = build_student(replace(CONFIG, exits=()))
    save_student(tmp_path / "p.safetensors", plain, SPEC, torch.float32)
    report = load_weights(build_student(CONFIG), tmp_path / "p.safetensors")
    assert all(name.startswith("exits.") for name in report.missing_heads)
    assert len(report.missing_heads) == 8


def test_configs_without_exits_are_written_as_before() -> None:
    assert "exits" not in replace(CONFIG, exits=()).to_json()
    assert StudentConfig.from_json(CONFIG.to_json()) == CONFIG
