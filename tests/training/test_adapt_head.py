"""Heads as they are shipped: ellipses as masks, small heads more often, aids, rectangles, sisters, teachers refused."""

from __future__ import annotations

import csv
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tinyusfm_edge.data.ellipses import Ellipse
from tinyusfm_edge.data.table import read_table
from tinyusfm_edge.models.checkpoint import load_student_file
from tinyusfm_edge.models.student import SegmentationStudent, StudentConfig, build_student
from tinyusfm_edge.training.adapt.config import AdaptConfig
from tinyusfm_edge.training.adapt.fit import preprocess_spec
from tinyusfm_edge.training.adapt.losses import border_of, mask_loss
from tinyusfm_edge.training.adapt.objective import AdaptObjective, AdaptTask, draw_kept
from tinyusfm_edge.training.adapt.run import adapt, student_spec, write_student
from tinyusfm_edge.training.adapt.task import TaskLoss, load_task
from tinyusfm_edge.training.adapt.teacher import SISTER, AdaptTeacher, check_margin
from tinyusfm_runtime.errors import InputError

STUDENT = StudentConfig(image_size=32, width=48, heads=3, drop_path=0.0)
PLAN = AdaptConfig(steps=4, batch=4, warmup=1, evaluate_every=2, student=STUDENT)
HEAD = ("head",)


@pytest.fixture(scope="module")
def ellipses(table: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The table with an ``ellipses.csv`` of the masks' own moments, in the original's pixels (twice as wide)."""
    folder = tmp_path_factory.mktemp("ellipses") / "table"
    shutil.copytree(table, folder)
    rows = []
    for split in ("train", "val", "test"):
        for sample in read_table(table, split):
            y, x = np.nonzero(sample.mask_HW)
            values, vectors = np.linalg.eigh(np.cov(x, y))
            major, minor = 2 * np.sqrt(values[1]), 2 * np.sqrt(values[0])
            angle = np.degrees(np.arctan2(vectors[1, 1], vectors[0, 1]))
            centre = (2 * (x.mean() + 0.5) - 0.5, 2 * (y.mean() + 0.5) - 0.5)
            rows.append((sample.id, *centre, 2 * major, 2 * minor, angle, 1.0))
    with (folder / "ellipses.csv").open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(("file", "centre_x", "centre_y", "semi_major", "semi_minor", "angle_deg", "mask_to_stated"))
        writer.writerows(rows)
    return folder


def test_masks_drawn_from_ellipses_are_the_masks_and_softer(ellipses: Path, table: Path) -> None:
    spec = preprocess_spec(PLAN)
    drawn = load_task(ellipses, spec, replace(PLAN, masks="ellipse"), HEAD).train.targets
    filed = load_task(ellipses, spec, PLAN, HEAD).train.targets
    inside, there = drawn >= 128, filed >= 128
    overlap = 2 * (inside & there).sum((1, 2)) / (inside.sum((1, 2)) + there.sum((1, 2)))
    assert float(overlap.min()) > 0.95
    assert len(torch.unique(drawn)) > 4 and set(torch.unique(filed).tolist()) == {0, 255}
    with pytest.raises(InputError, match=r"ellipses\.csv lacks 24 of 24"):
        load_task(table, spec, replace(PLAN, masks="ellipse"), HEAD)


def test_an_ellipse_scales_and_measures_exactly() -> None:
    ellipse = Ellipse.from_axes((30.0, 20.0), 12.0, 8.0, 35.0)
    assert ellipse.coverage(60, 80).sum() == pytest.approx(np.pi * 12 * 8, rel=5e-3)
    assert ellipse.scaled(2, 2).circumference() == pytest.approx(2 * ellipse.circumference())
    assert ellipse.scaled(2, 1).circumference((1.0, 0.5)) == pytest.approx(ellipse.circumference())
    back = ellipse.scaled(3, 0.5).scaled(1 / 3, 2)
    assert back.centre_xy == pytest.approx(ellipse.centre_xy)


def test_small_heads_come_more_often(table: Path) -> None:
    spec = preprocess_spec(PLAN)
    stated = sorted(sample.hc_mm or 0.0 for sample in read_table(table, "train"))
    plan = replace(PLAN, repeat_small=3, small_mm=stated[6])
    data = load_task(table, spec, plan, HEAD)
    student = build_student(STUDENT)
    task = AdaptTask(plan, data, AdaptObjective(student, TaskLoss(plan, data), spec))
    assert len(task) == 24 + 2 * 6
    assert len(AdaptTask(PLAN, data, task.objective)) == 24


def test_aids_are_trained_and_thrown_away_and_tokens_may_be_missing(table: Path, tmp_path: Path) -> None:
    plan = replace(PLAN, deep=0.4, border=2.0, drop_tokens=0.6)
    adapt(table, tmp_path / "run", plan, HEAD, quiet=True)
    names = set(load_file(tmp_path / "run" / "best.safetensors"))
    assert {name for name in names if name.startswith("aids.")} and len(names) > 100
    spec = student_spec(plan, HEAD, name="s")
    write_student(tmp_path / "run", tmp_path / "s.safetensors", plan, spec, data=table)
    assert not [name for name in load_file(tmp_path / "s.safetensors") if "aids" in name]


def test_the_border_weighs_more() -> None:
    mask = torch.zeros(1, 1, 32, 32)
    mask[..., 8:24, 8:24] = 1
    edge = border_of(mask)
    assert float(edge[0, 0, 8, 16]) == 1 and float(edge[0, 0, 16, 16]) == 0 and float(edge[0, 0, 0, 0]) == 0
    wrong_edge = torch.where(edge > 0, -4.0 * (2 * mask - 1), 4.0 * (2 * mask - 1))
    assert float(mask_loss(wrong_edge, mask, 4.0)) > float(mask_loss(wrong_edge, mask)) * 1.2


def test_missing_patches_are_zero_and_the_rest_is_what_the_blocks_gave() -> None:
    torch.manual_seed(0)
    student = build_student(replace(STUDENT, image_size=64)).eval()
    assert isinstance(student, SegmentationStudent)
    image, kept = torch.randn(2, 3, 64, 64), torch.tensor([[0, 3, 9], [1, 2, 15]])
    some = student.backbone.taps(image, kept_BV=kept)
    whole = student.scattered(some, kept)
    assert all(tap.shape == (2, 17, 48) for tap in whole)
    assert torch.equal(whole[0][1, 1 + 15], some[0][1, 3]) and not whole[0][0, 1 + 1].any()
    every = torch.arange(16).expand(2, 16)
    torch.testing.assert_close(student.backbone.taps(image, kept_BV=every)[3], student.backbone.taps(image)[3])
    torch.manual_seed(1)
    drawn = [draw_kept(2, 16, 0.5) for _ in range(40)]
    assert any(k is None for k in drawn) and all(k is None or 8 <= k.shape[1] < 16 for k in drawn)


def test_a_rectangle_is_trained_written_and_read(table: Path, tmp_path: Path) -> None:
    plan = replace(PLAN, student=replace(STUDENT, image_width=48))
    adapt(table, tmp_path / "run", plan, HEAD, quiet=True)
    spec = student_spec(plan, HEAD, name="wide")
    write_student(tmp_path / "run", tmp_path / "wide.safetensors", plan, spec, data=table)
    found = load_student_file(tmp_path / "wide.safetensors")
    assert (found.spec.preprocess.height, found.spec.preprocess.width) == (32, 48)
    with torch.no_grad():
        assert found.module(torch.zeros(1, 3, 32, 48)).shape == (1, 1, 32, 48)
    square = build_student(STUDENT)
    assert square.backbone.num_patches == 4 and found.module.backbone.num_patches == 6


def test_a_student_teaches_another_and_a_teacher_that_is_no_better_is_refused(table: Path, tmp_path: Path) -> None:
    adapt(table, tmp_path / "big", PLAN, HEAD, quiet=True)
    write_student(
        tmp_path / "big", tmp_path / "big.safetensors", PLAN, student_spec(PLAN, HEAD, name="big"), data=table
    )
    small = replace(STUDENT, seg_head="lite")
    plan = replace(PLAN, student=small, kd=("logits", "features"), teacher_margin=-1.0)
    sister = AdaptTeacher(name=SISTER, weights=tmp_path / "big.safetensors")
    big = tmp_path / "big.safetensors"
    outcome = adapt(table, tmp_path / "small", plan, HEAD, teacher=sister, against=big, quiet=True)
    assert outcome.steps == 4 and {"kd_logits", "kd_features"} <= set(outcome.scalars)
    strict = replace(plan, teacher_margin=0.005)
    with pytest.raises(InputError, match="must be better by 0.005"):
        adapt(table, tmp_path / "none", strict, HEAD, teacher=sister, against=big, quiet=True)
    check_margin(0.97, 0.96, 0.005, "x")
    with pytest.raises(InputError, match=r"0\.9630 on validation"):
        check_margin(0.963, 0.96, 0.005, "x")
