"""Whole small pre-trainings: killed and resumed to the same bits, two processes on one curve, a bank that is reused."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import child_environment
from tests.training.small_runs import SMALL, random_teacher, small_config
from tinyusfm_edge.cli.main import main
from tinyusfm_edge.data.fingerprint import images_sha256
from tinyusfm_edge.data.images import list_rows
from tinyusfm_edge.models.checkpoint import load_student_file, load_weights
from tinyusfm_edge.models.student import StudentConfig, build_student
from tinyusfm_edge.students.choice import load_student
from tinyusfm_edge.training.pretrain import teacher_bank
from tinyusfm_edge.training.pretrain.run import (
    STUDENT_FILE,
    DistillTeacher,
    PretrainTask,
    check_steps,
    open_pool,
    open_teacher,
    pretrain,
)
from tinyusfm_edge.training.trainer.lock import LOCK, one_run
from tinyusfm_edge.training.trainer.loop import Outcome, draws_of_step, read_scalars
from tinyusfm_runtime.errors import CheckpointError, InputError


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def run(table: Path, out: Path, cache: Path, teacher: Path | None, ablation: str = "ours", *changes: str) -> Outcome:
    config = small_config(ablation, *changes)
    choice = DistillTeacher(name="dinov2_vits14", weights=teacher) if teacher and config.needs_teacher else None
    return pretrain(list_rows([table]), config, out, teacher=choice, cache=cache, device="cpu", quiet=True, short=True)


def command(table: Path, out: Path, cache: Path, teacher: Path, *changes: str) -> list[str]:
    changed = [part for change in (*SMALL, *changes) for part in ("--set", change)]
    return [
        *("-m", "tinyusfm_edge", "distill", "--data", str(table), "--out", str(out), "--cache", str(cache)),
        *("--teacher", "dinov2_vits14", "--teacher-weights", str(teacher), "--device", "cpu", "--short", *changed),
    ]


@pytest.fixture(scope="module")
def whole(table: Path, cache: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "whole"
    run(table, out, cache, teacher)
    return out


def curve(out: Path) -> list[float]:
    """The feature loss of every step: the loss itself is divided by its running mean."""
    return [entry.get("kd", entry["loss"]) for entry in read_scalars(out)]


def test_a_run_leaves_a_student_that_others_can_start_from(whole: Path, table: Path, teacher: Path) -> None:
    found = load_student_file(whole / STUDENT_FILE)
    assert found.spec.task.value == "features"
    made_of = {"images": images_sha256([table]), "teacher": hashlib.sha256(teacher.read_bytes()).hexdigest()}
    assert dict(found.report.stages) == made_of, "what a bundle's trace begins with"
    assert "dinov2_vits14" in found.spec.origin
    bigger = build_student(StudentConfig(task="classify", num_classes=3, width=32, heads=2, depth=2, image_size=64))
    with pytest.warns(UserWarning, match="interpolated|fc_norm"):
        report = load_weights(bigger, whole / STUDENT_FILE, resize_positions=True)
    assert report.missing_heads and all(name.startswith("head") for name in report.missing_heads)
    assert len(curve(whole)) == 6


def test_killed_at_any_moment_it_goes_on_to_the_same_bits(
    table: Path, cache: Path, teacher: Path, whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "killed"
    child = subprocess.Popen(
        [sys.executable, *command(table, out, cache, teacher)],
        env=child_environment(OMP_NUM_THREADS="1"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 900
    while not list(out.glob("step-0000000[2-5]")) and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    assert list(out.glob("step-*")), "killed after a checkpoint"
    assert not (out / STUDENT_FILE).exists(), "killed before its end"
    run(table, out, cache, teacher)
    one, two = load_file(whole / STUDENT_FILE), load_file(out / STUDENT_FILE)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert curve(out) == curve(whole)


def test_two_processes_see_the_curve_of_one_with_the_whole_batch(
    table: Path, cache: Path, teacher: Path, whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "two"
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [sys.executable, *launcher, *command(table, out, cache, teacher)],
        env=child_environment(OMP_NUM_THREADS="1"),
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert curve(out) == pytest.approx(curve(whole), rel=2e-4)
    one, two = load_file(whole / STUDENT_FILE), load_file(out / STUDENT_FILE)
    for name in one:
        torch.testing.assert_close(one[name], two[name], atol=2e-3, rtol=1e-2)


def test_another_seed_gives_another_curve_from_the_same_bank(
    table: Path, cache: Path, teacher: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("the teacher was asked again")

    monkeypatch.setattr(teacher_bank.TeacherFeatures, "__call__", never)
    run(table, tmp_path / "other", cache, teacher, "ours", "seed=7")
    assert curve(tmp_path / "other") != curve(whole)


def test_cached_features_are_the_teachers(table: Path, teacher: Path, cache: Path, tmp_path: Path) -> None:
    """One batch through the bank and once with the live teacher on the same views, targets as they are."""
    cached = run(table, tmp_path / "a", cache, teacher, "raw-targets", "steps=1", "batch=24")
    config = small_config("raw-targets", "steps=1", "batch=24")
    pool = open_pool(list_rows([table]), config, cache)
    features, _ = open_teacher(DistillTeacher(name="dinov2_vits14", weights=teacher), config)
    task = PretrainTask(pool, config, None, features, (features.width,) * 2)
    batch = task.batch(draws_of_step(len(task), 24, config.seed, 0))
    assert "teacher" not in batch
    live, _ = task.objective(batch)
    assert cached.scalars["loss"] == pytest.approx(float(live.detach()), rel=1e-3)


@pytest.mark.parametrize("ablation", ["mae", "feature-kd"])
def test_baselines_run_from_the_same_cache(
    table: Path, cache: Path, teacher: Path, tmp_path: Path, ablation: str
) -> None:
    outcome = run(table, tmp_path / "run", cache, teacher, ablation)
    assert outcome.steps == 6
    assert (tmp_path / "run" / STUDENT_FILE).is_file()


def test_new_views_all_the_time_need_no_bank(table: Path, cache: Path, teacher: Path, tmp_path: Path) -> None:
    before = sorted(cache.glob("bank-*"))
    run(table, tmp_path / "run", cache, teacher, "ours", "variants=0", "steps=2")
    assert sorted(cache.glob("bank-*")) == before


def test_a_bank_that_was_cut_short_is_completed(table: Path, teacher: Path, tmp_path: Path) -> None:
    run(table, tmp_path / "a", tmp_path / "cache", teacher, "ours", "steps=1")
    bank = next((tmp_path / "cache").glob("bank-*"))
    original = (bank / "spatial-12.f16").read_bytes()
    (bank / "spatial.json").write_text(json.dumps({"entries": 32}), encoding="utf-8")
    half = bytearray(original)
    half[len(half) * 2 // 3 :] = bytes(len(half) - len(half) * 2 // 3)
    (bank / "spatial-12.f16").write_bytes(half)
    run(table, tmp_path / "b", tmp_path / "cache", teacher, "ours", "steps=1")
    assert (bank / "spatial-12.f16").read_bytes() == original


def test_what_does_not_fit_is_refused(table: Path, cache: Path, tmp_path: Path, teacher: Path) -> None:
    with pytest.raises(InputError, match="--teacher"):
        run(table, tmp_path / "a", cache, None)
    with pytest.raises(InputError, match="14-pixel"):
        run(table, tmp_path / "b", cache, teacher, "ours", "teacher_size=32")


def test_a_foreign_bank_teaches_as_the_teacher_does(table: Path, teacher: Path, tmp_path: Path) -> None:
    """Written by the command with our teacher, read as somebody else's: the curve is the same up to 8-bit images."""
    changes = [part for change in SMALL for part in ("--set", change)]
    line = ["bank", "--data", str(table), "--out", str(tmp_path / "bank"), *changes]
    assert main([*line, "--teacher", "dinov2_vits14", "--teacher-weights", str(teacher)]) == 0
    config = small_config()
    choice = DistillTeacher(name="feature_bank", weights=tmp_path / "bank")
    options = {"cache": tmp_path / "cache", "device": "cpu", "quiet": True, "short": True}
    pretrain(list_rows([table]), config, tmp_path / "foreign", teacher=choice, **options)  # type: ignore[arg-type]
    ours = DistillTeacher(name="dinov2_vits14", weights=teacher)
    pretrain(list_rows([table]), config, tmp_path / "ours", teacher=ours, **options)  # type: ignore[arg-type]
    assert curve(tmp_path / "foreign") == pytest.approx(curve(tmp_path / "ours"), rel=0.02)
    images = np.load(tmp_path / "bank" / "images-spatial.npy", mmap_mode="r")
    assert (images.shape, images.dtype) == ((48, 32, 32), np.uint8)
    other = small_config("ours", "view_seed=5")
    with pytest.raises(InputError, match="written for another seed"):
        pretrain(list_rows([table]), other, tmp_path / "x", teacher=choice, **options)  # type: ignore[arg-type]
    third = small_config("last-layer")
    with pytest.raises(InputError, match="2 stages and 1 layers"):
        pretrain(list_rows([table]), third, tmp_path / "y", teacher=choice, **options)  # type: ignore[arg-type]


def test_a_run_too_short_to_teach_is_asked_for_or_refused(
    table: Path, cache: Path, teacher: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = [word for word in command(table, tmp_path / "run", cache, teacher)[2:] if word != "--short"]
    assert main(line) == 2
    told = capsys.readouterr().err
    assert "6 steps teach a student next to nothing" in told and "steps=800" in told and "--short" in told
    assert not (tmp_path / "run").exists()
    assert "SHORT RUN of 6 steps" in load_student_file(whole / STUDENT_FILE).spec.origin
    with pytest.warns(UserWarning, match="too short to teach much.*SHORT RUN of 6 steps"):
        load_student(whole / STUDENT_FILE)
    assert json.loads((whole / "config.json").read_text())["short"] is True
    with pytest.raises(InputError, match="set steps=800"):
        check_steps(499, short=False)
    assert not check_steps(500, short=False)


def test_a_run_starts_from_the_weights_it_is_given_and_goes_on_after_a_pause(
    table: Path, cache: Path, teacher: Path, whole: Path, tmp_path: Path
) -> None:
    config, choice = small_config(), DistillTeacher(name="dinov2_vits14", weights=teacher)
    start = {"teacher": choice, "cache": cache, "device": "cpu", "quiet": True, "short": True}
    with pytest.raises(CheckpointError):
        pretrain(list_rows([table]), config, tmp_path / "a", init=teacher, **start)  # type: ignore[arg-type]
    given = {**start, "init": whole / STUDENT_FILE}
    paused = pretrain(list_rows([table]), config, tmp_path / "b", stop_after_s=1e-9, **given)  # type: ignore[arg-type]
    assert paused.steps == 1 and not (tmp_path / "b" / STUDENT_FILE).exists()
    done = pretrain(list_rows([table]), config, tmp_path / "b", **given)  # type: ignore[arg-type]
    assert done.steps == 6
    assert curve(tmp_path / "b")[0] != curve(whole)[0], "it does not start where the first run did"
    assert json.loads((tmp_path / "b" / "config.json").read_text())["init"]
    assert "from whole" in load_student_file(tmp_path / "b" / STUDENT_FILE).spec.origin


def test_what_cannot_start_is_refused_before_images_are_read(
    table: Path, whole: Path, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["distill", "--data", str(table), "--out", str(tmp_path / "run"), "--device", "cpu"]
    line += ["--teacher", "dinov2_vits14", "--teacher-weights", str(teacher)]
    line += [part for change in SMALL for part in ("--set", change)]
    live = ["--set", "variants=0", "--set", "lambda_relation=1"]
    for extra, told in (
        ([], "6 steps teach a student next to nothing"),
        (["--short", "--set", "seed=-1"], "seed and view_seed are not negative"),
        (["--short", "--set", "view_seed=-1"], "view_seed are not negative"),
        (["--short", "--container", "model_ema"], "name the start"),
        (["--short", "--init", str(teacher)], "weights of a deeper net"),
        (["--short", "--init", str(whole), "--set", "student.heads=4"], "set student.heads=2"),
        (["--short", *live, "--set", "lambda_kd=0"], "set lambda_kd above 0"),
        (["--short", "--set", "masks=adaptive", "--set", "lambda_kd=0"], "set lambda_kd above 0"),
        (["--short", "--ablation", "mae", *live], "mae has no teacher's tokens"),
    ):
        assert main([*line, *extra]) == 2, extra
        assert told in capsys.readouterr().err
        assert not (tmp_path / "run").exists(), extra
    sizes = ["--set", "view.image_size=64", "--set", "teacher_size=70"]
    assert main([*line, "--short", *live, *sizes]) == 2
    assert "set teacher_size=56" in capsys.readouterr().err
    assert not (tmp_path / "run" / "config.json").exists(), "it is said before the run begins"


def test_a_bank_without_a_teacher_says_what_to_add(
    table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = [part for change in SMALL for part in ("--set", change)]
    assert main(["bank", "--data", str(table), "--out", str(tmp_path / "bank"), *changes]) == 0
    assert "features-spatial-1.npy" in capsys.readouterr().out
    assert not (tmp_path / "bank" / LOCK).exists(), "a finished run leaves no lock"
    with one_run(tmp_path / "bank"):
        assert main(["bank", "--data", str(table), "--out", str(tmp_path / "bank"), *changes]) == 2
    assert "is in use by process" in capsys.readouterr().err
    assert main(["bank", "--data", str(table), "--out", str(tmp_path / "b"), *changes, "--set", "variants=0"]) == 2
