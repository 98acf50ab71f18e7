"""Calibrating early exits: accuracy keeps its limit, cheap exits are used, the vectorised rule is the runtime's."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyusfm_edge.evaluation.exits import calibrate_exits, exit_probabilities, measure_exits
from tinyusfm_edge.models.student import StudentConfig, build_student
from tinyusfm_runtime.early_exit import stop_at
from tinyusfm_runtime.errors import InputError
from tinyusfm_runtime.spec import ExitPolicy, ModelSpec, Task


def world(seed: int, count: int = 40) -> tuple[np.ndarray, np.ndarray]:
    """Three exits that get better: probabilities ENK and truth N."""
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, 3, count)
    logits = rng.normal(size=(3, count, 3))
    for exit_, strength in enumerate((1.0, 2.0, 4.0)):
        logits[exit_, np.arange(count), truth] += strength
    power = np.exp(logits)
    return power / power.sum(-1, keepdims=True), truth


@given(st.integers(0, 10**6), st.floats(0, 1), st.floats(0, 1), st.sampled_from([0, 2]))
@settings(max_examples=30, deadline=None)
def test_measuring_is_the_runtimes_rule(seed: int, first: float, second: float, patience: int) -> None:
    probabilities, truth = world(seed, 12)
    policy = ExitPolicy(blocks=(6, 9), entropy=(first, second), patience=patience)
    stops = [stop_at(policy, probabilities[:, i]) for i in range(12)]
    right = [probabilities[stop, i].argmax() == truth[i] for i, stop in enumerate(stops)]
    found = measure_exits(policy, probabilities, truth, 12)
    assert found.accuracy == pytest.approx(np.mean(right))
    assert found.mean_blocks == pytest.approx(np.mean([(6, 9, 12)[stop] for stop in stops]))
    assert sum(found.share) == pytest.approx(1.0)


@pytest.mark.parametrize("seed", range(3))
def test_calibration_saves_blocks_within_its_limit(seed: int) -> None:
    probabilities, truth = world(seed)
    policy, report = calibrate_exits(probabilities, truth, (6, 9), 12)
    assert report.accuracy >= report.full_accuracy - 0.005 - 1e-9
    assert report.mean_blocks < 12
    assert report == measure_exits(policy, probabilities, truth, 12)
    loose = calibrate_exits(probabilities, truth, (6, 9), 12, max_drop=0.5)[1]
    assert loose.mean_blocks <= report.mean_blocks


def test_exits_that_know_nothing_are_not_used() -> None:
    probabilities, truth = world(1)
    probabilities[:2] = np.roll(probabilities[2:], 1, axis=-1)  # sure, and always wrong
    policy, report = calibrate_exits(probabilities, truth, (6, 9), 12)
    assert report.mean_blocks == 12
    assert policy.entropy == (0.0, 0.0)


def test_a_student_without_exits_is_refused() -> None:
    student = build_student(StudentConfig(task="classify", num_classes=2, image_size=32, width=48, heads=3))
    spec = ModelSpec(name="c", task=Task.CLASSIFY, labels=("a", "b"))
    with pytest.raises(InputError, match="exits"):
        exit_probabilities(student, spec, [])  # type: ignore[arg-type]
