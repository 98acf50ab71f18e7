"""Self-distillation: the teacher is the average it is said to be, the centre moves, a collapse is seen and said."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tables import phantom_table
from tests.training.small_runs import random_teacher, small_config
from tinyusfm_edge.cli.main import main
from tinyusfm_edge.data.images import list_rows
from tinyusfm_edge.models.checkpoint import load_student_file
from tinyusfm_edge.training.pretrain.config import DinoConfig, DistillConfig
from tinyusfm_edge.training.pretrain.dino import (
    DinoObjective,
    collapsed,
    cross_entropy,
    measured,
    teacher_momentum,
)
from tinyusfm_edge.training.pretrain.run import STUDENT_FILE, DistillTeacher, pretrain
from tinyusfm_edge.training.pretrain.views import draw_crops, draw_views
from tinyusfm_edge.training.trainer.loop import read_scalars
from tinyusfm_runtime.errors import InputError
from tinyusfm_runtime.phantom import make_phantom

HEAD = ("dino.hidden=32", "dino.bottleneck=16", "dino.outputs=32", "dino.local_crops=1")
WARMUP = 15
"""Steps in which the rate rises, as in a run: the centre settles before anything is learnt."""
STILL = ("dino.momentum=1", "dino.centre_momentum=1", "dino.temperature_warmup=0", "dino.last_teacher_temperature=0.04")


def dino_config(*changes: str) -> DistillConfig:
    return small_config("dino", *HEAD, *changes)


def grating(index: int) -> np.ndarray:
    """Stripes of another direction and width: images that can be logged apart."""
    rows, cols = np.mgrid[:64, :64]
    along = np.cos(index * np.pi / 8) * cols + np.sin(index * np.pi / 8) * rows
    return np.round(127 + 100 * np.sin((0.3 + 0.15 * (index % 3)) * along)).astype(np.uint8)


def crops_of(config: DistillConfig, count: int = 8) -> dict[str, torch.Tensor]:
    pixels = [grating(i) for i in range(count)]
    large = replace(config.view, crop_area=config.dino.global_area)
    small = replace(config.view, crop_area=config.dino.local_area)

    def draw(first: int, ranges: object) -> torch.Tensor:
        return draw_crops(pixels, [first + i for i in range(count)], ranges)  # type: ignore[arg-type]

    return {"global": torch.cat([draw(0, large), draw(100, large)], 1), "local": draw(200, small)}


def taught(config: DistillConfig, steps: int, rate: float = 5e-4) -> tuple[DinoObjective, list[dict[str, float]]]:
    """A run on the same crops all the time."""
    torch.manual_seed(0)
    objective, batch = DinoObjective(config, steps), crops_of(config)
    optimiser = torch.optim.AdamW(objective.parameters(), lr=rate)
    logged = []
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / WARMUP)
        loss, scalars = objective(batch)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        logged.append({name: float(value) for name, value in scalars.items()})
    return objective, logged


def test_a_student_learns_the_answers_of_a_teacher_that_stands_still() -> None:
    _, logged = taught(dino_config(*STILL), 40, 3e-3)
    # what is left is the entropy of the teacher's own answers
    least = logged[-1]["teacher_entropy"] * math.log(32)
    assert logged[-1]["dino"] - least < 0.5 * (logged[0]["dino"] - least)


def test_the_teacher_is_the_stated_average_and_starts_as_the_student() -> None:
    config = dino_config("dino.momentum=0.9")
    torch.manual_seed(0)
    objective, batch = DinoObjective(config, 10), crops_of(config, 2)
    with torch.no_grad():  # a start that was read after the objective was made
        for value in objective.student.parameters():
            value.add_(0.01)
    optimiser = torch.optim.SGD(objective.parameters(), lr=0.5)
    mean = {name: value.clone() for name, value in objective.pupil.state_dict().items()}
    for step in range(4):
        optimiser.zero_grad()
        objective(batch)[0].backward()
        for name, value in objective.teacher.state_dict().items():
            torch.testing.assert_close(value, mean[name], msg=name)
        optimiser.step()
        keep = 1 - 0.1 * (1 + math.cos(math.pi * step / 10)) / 2
        own = objective.pupil.state_dict()
        mean = {name: keep * value + (1 - keep) * own[name] for name, value in mean.items()}
    assert not list(objective.teacher.parameters()), "nothing of it is trained"
    assert teacher_momentum(0.996, 0, 100) == pytest.approx(0.996) and teacher_momentum(0.996, 100, 100) == 1


def test_parts_of_a_step_share_one_teacher() -> None:
    config = dino_config("accumulate=2", "dino.momentum=0")
    objective, batch = DinoObjective(config, 10), crops_of(config, 2)
    objective(batch)
    with torch.no_grad():
        objective.pupil.head.prototypes.add_(1.0)
    before = objective.teacher.state_dict()["head.prototypes"].clone()
    objective(batch)
    assert torch.equal(objective.teacher.state_dict()["head.prototypes"], before)
    objective(batch)
    torch.testing.assert_close(objective.teacher.state_dict()["head.prototypes"], objective.pupil.head.prototypes.data)


def test_the_centre_moves_by_its_momentum_to_the_mean_of_the_outputs() -> None:
    config = dino_config()
    torch.manual_seed(0)
    objective, batch = DinoObjective(config, 10), crops_of(config)
    seen: list[torch.Tensor] = []
    objective.teacher.register_forward_hook(lambda _m, _i, out: seen.append(out.detach().clone()))
    objective(batch)
    torch.testing.assert_close(objective.centre, 0.1 * seen[0].mean(0))
    objective(batch)
    torch.testing.assert_close(objective.centre, 0.09 * seen[0].mean(0) + 0.1 * seen[1].mean(0))
    kept = objective.centre.clone()
    objective.eval()(batch)
    assert torch.equal(objective.centre, kept), "a measurement changes nothing"


def test_only_different_crops_are_compared() -> None:
    """By hand: two global crops and one small one, one image, two outputs."""
    target = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]])
    logits = torch.tensor([[[2.0, 0.0]], [[0.0, 1.0]], [[3.0, 3.0]]])
    log = logits.log_softmax(-1)[:, 0]
    # teacher 0 with crops 1 and 2, teacher 1 with crops 0 and 2
    by_hand = -(log[1, 0] + log[2, 0] + log[0, 1] + log[2, 1]) / 4
    torch.testing.assert_close(cross_entropy(logits, target), by_hand)


def test_every_parameter_is_trained_and_the_last_layer_waits() -> None:
    config = dino_config("dino.freeze_last=0.2")
    torch.manual_seed(0)
    objective, batch = DinoObjective(config, 10), crops_of(config, 2)
    for step in range(3):
        objective.zero_grad()
        objective(batch)[0].backward()
        without = [name for name, value in objective.named_parameters() if value.grad is None]
        assert not without, "a parameter without a gradient stops DDP"
        size = float(objective.pupil.head.prototypes.grad.abs().max())  # type: ignore[union-attr]
        assert (size == 0) == (step < 2)


def test_centring_and_sharpening_together_do_not_collapse_and_alone_they_do() -> None:
    below = DinoConfig().collapsed_below
    free = dino_config("dino.momentum=0.99", "dino.temperature_warmup=0", "dino.last_teacher_temperature=0.04")
    assert collapsed(taught(free, 40)[1][-1], below) == ""
    # no centre: one output wins. No sharpening: all outputs are equal
    alone = dino_config("dino.momentum=0.9", "dino.centre_momentum=1")
    assert "one output alone" in collapsed(taught(alone, 25, 3e-3)[1][-1], below)
    soft = dino_config("dino.momentum=0.9", "dino.teacher_temperature=1", "dino.last_teacher_temperature=1")
    assert "equal in all outputs" in collapsed(taught(soft, 25, 3e-3)[1][-1], below)
    assert collapsed({"kd": 1.0}, below) == "", "other methods say nothing of it"


@given(st.integers(0, 2**40), st.integers(1, 6), st.integers(2, 6))
@settings(max_examples=30, deadline=None)
def test_equal_answers_hold_no_information_and_different_ones_all(seed: int, count: int, outputs: int) -> None:
    one = torch.rand(1, outputs, generator=torch.Generator().manual_seed(seed)).add(1e-3)
    same = measured((one / one.sum()).expand(count, -1))
    assert float(same["information"]) == pytest.approx(0, abs=1e-5) and 0 <= float(same["teacher_entropy"]) <= 1 + 1e-6
    different = measured(torch.eye(outputs))
    assert float(different["information"]) == pytest.approx(1, abs=1e-5)
    assert float(different["teacher_entropy"]) == pytest.approx(0, abs=1e-6)


def test_a_crop_is_that_of_the_views() -> None:
    config = small_config().view
    pixels = [make_phantom(i, height=64, width=64).frame.pixels for i in range(2)]
    assert torch.equal(draw_crops(pixels, [3, 4], config), draw_views(pixels, [3, 4], config).image_B1HW)


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return phantom_table(tmp_path_factory.mktemp("pool"), {"train": range(500, 512)}, height=128, width=160)


def run(table: Path, out: Path, *changes: str, **options: object) -> object:
    config = dino_config("steps=4", "dino.local_size=48", *changes)
    given = {"device": "cpu", "quiet": True, "short": True, **options}
    return pretrain(list_rows([table]), config, out, **given)  # type: ignore[arg-type]


def test_a_run_is_resumed_to_the_same_end_and_leaves_its_teacher(pool: Path, tmp_path: Path) -> None:
    said: list[str] = []
    run(pool, tmp_path / "whole", say=said.append)
    for _ in range(4):
        run(pool, tmp_path / "parts", stop_after_s=1e-9)
    parts = [load_student_file(tmp_path / name / STUDENT_FILE) for name in ("whole", "parts")]
    states = [part.module.state_dict() for part in parts]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    run(pool, tmp_path / "own", "dino.saved=student")
    other = load_student_file(tmp_path / "own" / STUDENT_FILE).module.state_dict()
    assert any(not torch.equal(states[0][name], other[name]) for name in other), "teacher and student differ"
    curves = [[entry["dino"] for entry in read_scalars(tmp_path / name)] for name in ("whole", "parts")]
    assert curves[0] == curves[1] and len(curves[0]) == 4
    assert "method dino, teacher none" in parts[0].spec.origin and "SHORT RUN of 4" in parts[0].spec.origin


def test_a_collapse_is_said_and_stands_in_the_student(pool: Path, tmp_path: Path) -> None:
    said: list[str] = []
    run(pool, tmp_path / "run", "dino.collapsed_below=1", say=said.append)
    assert [line for line in said if line.startswith("warning: the self-distillation has collapsed")]
    assert "COLLAPSED" in load_student_file(tmp_path / "run" / STUDENT_FILE).spec.origin


def test_what_does_not_fit_is_refused(pool: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError, match="its own teacher"):
        run(pool, tmp_path, teacher=DistillTeacher(name="dinov2_vits14", weights=random_teacher(tmp_path)))
    for wrong in ("dino.local_size=40", "dino.outputs=1", "dino.momentum=2", "dino.teacher_temperature=0", "keep=0.5"):
        with pytest.raises(InputError, match="dino"):
            dino_config(wrong)
    line = ["distill", "--ablation", "dino", "--data", str(pool), "--out", str(tmp_path / "x"), "--set", "steps=4"]
    assert main([*line, "--set", "view.image_size=32"]) == 2
    assert "4 steps teach a student next to nothing" in capsys.readouterr().err
