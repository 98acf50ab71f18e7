"""The two lines of the README, at a small size: the student that comes out is better than the one that went in."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.training.small_runs import SMALL, random_teacher
from tinyusfm_edge.cli.main import main
from tinyusfm_edge.evaluation.probe import block_tokens
from tinyusfm_edge.models.checkpoint import load_start, save_student
from tinyusfm_edge.models.student import Student, StudentConfig, build_student
from tinyusfm_edge.models.teachers import load_teacher
from tinyusfm_edge.training.pretrain.teacher_bank import FeatureConfig, TeacherFeatures
from tinyusfm_edge.training.pretrain.views import as_input
from tinyusfm_runtime.numerics.preprocess import preprocess
from tinyusfm_runtime.phantom import make_phantom
from tinyusfm_runtime.spec import ModelSpec, PreprocessSpec, Task

SPEC = PreprocessSpec(height=32, width=32)
SIZES = {"image_size": 32, "width": 32, "heads": 2, "depth": 2}


def phantoms(seeds: range) -> torch.Tensor:
    """Images S1HW 0..1."""
    drawn = [preprocess(make_phantom(seed, height=96, width=128).frame, SPEC)[0][0, 0] for seed in seeds]
    return torch.from_numpy(np.stack(drawn))[:, None].float() / 255


def known_of_the_teacher(student: Student, teacher: Path) -> float:
    """R2 of the teacher's standardised tokens on held-out images, read linearly off the student's."""
    wanted = FeatureConfig(layers=(2,), student_depth=2, teacher_size=28, grid=2)
    features = TeacherFeatures(load_teacher("dinov2_vits14", teacher), wanted)
    parts = []
    for seeds in (range(4000, 4060), range(5000, 5040)):
        images = phantoms(seeds)
        mine = block_tokens(student, as_input(images), (2,))[0].flatten(0, 1).double().numpy()
        parts.append((mine, features(images)[0].flatten(0, 1).double().numpy()))
    (x, y), (held_x, held_y) = parts
    mean, sd, centre, spread = x.mean(0), x.std(0) + 1e-6, y.mean(0), y.std(0) + 1e-6
    x, held_x, y, held_y = (x - mean) / sd, (held_x - mean) / sd, (y - centre) / spread, (held_y - centre) / spread
    weights = np.linalg.solve(x.T @ x + np.eye(x.shape[1]), x.T @ y)
    return float(1 - np.mean((held_y - held_x @ weights) ** 2) / np.mean((held_y - held_y.mean(0)) ** 2))


@pytest.mark.slow
def test_coreset_and_distill_as_the_readme_has_them_beat_their_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import cv2

    pool = tmp_path / "pool"
    pool.mkdir()
    for seed in range(3000, 3120):
        cv2.imwrite(str(pool / f"{seed}.png"), make_phantom(seed, height=96, width=128).frame.pixels)
    torch.manual_seed(0)
    start = build_student(StudentConfig(task="features", **SIZES))  # type: ignore[arg-type]
    spec = ModelSpec(name="start", task=Task.FEATURES, labels=(), preprocess=SPEC)
    save_student(tmp_path / "start.safetensors", start, spec, torch.float32)
    teacher = random_teacher(tmp_path)
    line = ["coreset", str(pool), "--budget", "50%", "--image-size", "32", "--epochs", "1", "--out"]
    assert main([*line, str(tmp_path / "coreset.json")]) == 0
    sizes = [change for change in SMALL if not change.startswith(("steps", "learning_rate", "checkpoint", "log"))]
    changes = [part for change in (*sizes, "steps=500") for part in ("--set", change)]
    line = ["distill", "--teacher", "dinov2_vits14", "--teacher-weights", str(teacher)]
    line += ["--data", str(tmp_path / "coreset.json"), "--init", str(tmp_path / "start.safetensors")]
    assert main([*line, "--out", str(tmp_path / "a"), "--device", "cpu", *changes]) == 0
    told = capsys.readouterr()
    assert "no better than a predictor of the mean" not in told.err
    last = json.loads((tmp_path / "a" / "scalars.jsonl").read_text().splitlines()[-1])
    assert last["kd"] < 0.9 * last["kd_of_mean"]
    made = build_student(StudentConfig(task="features", **SIZES))  # type: ignore[arg-type]
    load_start(made, tmp_path / "a" / "student.safetensors")
    before, after = known_of_the_teacher(start, teacher), known_of_the_teacher(made, teacher)
    assert after > before + 0.005, (before, after)
