"""Stopping early: entropy, patience, the end always answers; policies survive JSON and nonsense is refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyusfm_runtime.early_exit import may_stop, normalised_entropy, stop_at
from tinyusfm_runtime.errors import InputError
from tinyusfm_runtime.spec import ExitPolicy, ModelSpec, Task

SURE, UNSURE, OTHER = np.array([0.98, 0.01, 0.01]), np.array([0.4, 0.3, 0.3]), np.array([0.3, 0.4, 0.3])


def policy(first: float, second: float, patience: int = 0) -> ExitPolicy:
    return ExitPolicy(blocks=(6, 9), entropy=(first, second), patience=patience)


@given(st.lists(st.floats(1e-6, 1.0), min_size=2, max_size=8))
@settings(max_examples=50, deadline=None)
def test_entropy_lies_between_sure_and_even(weights: list[float]) -> None:
    p = np.array(weights) / sum(weights)
    assert 0.0 <= normalised_entropy(p) <= 1.0 + 1e-12
    assert normalised_entropy(np.full(len(p), 1 / len(p))) == pytest.approx(1.0)
    assert normalised_entropy(np.eye(len(p))[0]) == 0.0
    with pytest.raises(InputError, match="two classes"):
        normalised_entropy(p[:1])


def test_a_sure_answer_stops_and_an_unsure_one_goes_on() -> None:
    assert stop_at(policy(0.3, 0.3), np.stack([SURE, UNSURE, UNSURE])) == 0
    assert stop_at(policy(0.3, 0.3), np.stack([UNSURE, SURE, UNSURE])) == 1
    assert stop_at(policy(0.3, 0.3), np.stack([UNSURE, UNSURE, UNSURE])) == 2, "the end always answers"
    assert stop_at(policy(0.0, 0.0), np.stack([SURE, SURE, SURE])) == 2, "0 never stops"


def test_patience_counts_agreeing_answers() -> None:
    assert stop_at(policy(0.0, 0.0, 2), np.stack([UNSURE, UNSURE, OTHER])) == 1
    assert stop_at(policy(0.0, 0.0, 2), np.stack([UNSURE, OTHER, OTHER])) == 2
    assert not may_stop(policy(0.0, 0.0, 2), [UNSURE])
    with pytest.raises(InputError, match="no answer"):
        may_stop(policy(0.0, 0.0), [])


def test_a_spec_carries_the_policy_and_one_without_is_as_before() -> None:
    spec = ModelSpec(name="c", task=Task.CLASSIFY, labels=("a", "b"), exits=policy(0.1, 0.2, 2))
    assert ModelSpec.from_json(spec.to_json()) == spec
    plain = ModelSpec(name="c", task=Task.CLASSIFY, labels=("a", "b"))
    assert plain.to_json()["exits"] is None
    with pytest.raises(InputError, match="nothing else"):
        ModelSpec.from_json({**plain.to_json(), "exits": {"blocks": [6]}})
    with pytest.raises(InputError, match="classifiers"):
        ModelSpec(name="c", task=Task.SEGMENT, labels=("a",), exits=policy(0.1, 0.2))


@pytest.mark.parametrize(
    "wrong",
    [
        {"blocks": ()},
        {"blocks": (9, 6)},
        {"blocks": (0, 6)},
        {"entropy": (0.1,)},
        {"entropy": (0.1, 1.5)},
        {"patience": 1},
        {"patience": -2},
    ],
    ids=str,
)
def test_impossible_policies(wrong: dict[str, object]) -> None:
    with pytest.raises(InputError):
        ExitPolicy(**{"blocks": (6, 9), "entropy": (0.1, 0.1), **wrong})  # type: ignore[arg-type]
