"""Attention in equal forms: each gives NumPy's sums in each engine, and a form that does not is named, not timed."""

from __future__ import annotations

import numpy as np
import pytest

from tests.needs import needs

needs("onnx", "install tinyusfm-edge[export]")
needs("onnxruntime", "install tinyusfm-edge[onnxruntime]")
needs("openvino", "install tinyusfm-edge[openvino]")

from attention_forms import BASE, engines, forms, ratio, reference, right_ones  # noqa: E402

TOKENS, HEADS, SIZE = 20, 3, 8


@pytest.fixture(scope="module")
def packed() -> np.ndarray:
    """Queries, keys and values of a few tokens."""
    return np.random.default_rng(3).normal(size=(1, TOKENS, 3 * HEADS * SIZE)).astype(np.float32)


@pytest.mark.parametrize("engine", sorted(engines()))
def test_every_form_gives_the_same_sums(engine: str, packed: np.ndarray) -> None:
    models = forms(TOKENS, HEADS, SIZE)
    opened, tolerance = engines()[engine]
    good, wrong = right_ones(models, opened, packed, HEADS, tolerance)
    assert set(good) | set(wrong) == set(models) and BASE in good
    assert not [why for why in wrong.values() if "differs" in why], "what an engine runs, it runs right"
    assert len(good) >= 4


def test_a_wrong_form_and_one_that_an_engine_refuses_are_named(packed: np.ndarray) -> None:
    opened, tolerance = engines()["onnxruntime f32"]
    other = forms(TOKENS, HEADS * 2, SIZE // 2)[BASE]
    good, wrong = right_ones({"other heads": other, "none": b"no model"}, opened, packed, HEADS, tolerance)
    assert not good and "differs from NumPy" in wrong["other heads"] and wrong["none"]


def test_the_reference_averages_values_and_a_ratio_is_taken_inside_a_round() -> None:
    packed = np.zeros((1, 4, 12), np.float32)
    packed[0, :, 8:] = np.arange(16).reshape(4, 4)
    assert np.allclose(reference(packed, 2), packed[0, :, 8:].mean(0)), "equal keys give the mean of the values"
    assert ratio({BASE: ((2.0, 2.0), (40.0,)), "new": ((1.0,), (20.0, 20.0))}, "new") == 2.0
