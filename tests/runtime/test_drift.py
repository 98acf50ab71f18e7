"""Drift: scores, windows, the file, and what a monitor says when an artefact gives nothing to listen to."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyusfm_runtime.bundle.arrays import pack_arrays, unpack_arrays
from tinyusfm_runtime.drift import (
    DRIFT_FILE,
    GREY_NAMES,
    DriftMonitor,
    DriftStatistic,
    Mixture,
    grey_statistics,
    join_features,
    join_tokens,
)
from tinyusfm_runtime.errors import BundleError, InputError
from tinyusfm_runtime.frame import Frame, PixelFormat
from tinyusfm_runtime.phantom import make_phantom

TOKENS, PEAKS = ("tokens_block0", "tokens_block1"), ("peak_block1",)


def mixture(width: int, *, threshold: float, components: int = 2) -> Mixture:
    """A mixture around 0 in every feature."""
    return Mixture(
        centre_F=np.zeros(width),
        scale_F=np.ones(width),
        weights_K=np.full(components, 1.0 / components),
        means_KF=np.linspace(-0.1, 0.1, components)[:, None] * np.ones(width),
        spreads_KF=np.ones((components, width)),
        threshold=threshold,
    )


def statistic(**changes: Any) -> DriftStatistic:
    """A statistic over two tokens of four numbers and one peak."""
    values: dict[str, Any] = {
        "grey": mixture(len(GREY_NAMES), threshold=20.0),
        "features": mixture(2 + 1 + 1 + len(GREY_NAMES), threshold=30.0),
        "token_names": TOKENS,
        "peak_names": PEAKS,
        "mean_T": np.zeros(8, np.float32),
        "basis_TP": np.eye(8, 2, dtype=np.float32),
        "false_alarms": 0.05,
        "about": {"held_out": 151},
    }
    return DriftStatistic(**{**values, **changes})


def prediction(auxiliary: Mapping[str, np.ndarray] | None = None, *, valid: bool = True) -> Any:
    """What a monitor reads of a prediction."""
    return SimpleNamespace(auxiliary=auxiliary or {}, valid=valid, drift=None)


def auxiliary(peak: float = 1.0) -> dict[str, np.ndarray]:
    """Outputs of a graph."""
    tokens = {name: np.ones((1, 4), np.float32) for name in TOKENS}
    return {**tokens, PEAKS[0]: np.array([peak], np.float32)}


IMAGE = Frame(pixels=np.ascontiguousarray(make_phantom(1).frame.pixels[::8, ::8]))


def test_grey_statistics_say_what_they_mean() -> None:
    ramp = np.tile(np.arange(0, 256, dtype=np.uint8), (64, 1))
    found = dict(zip(GREY_NAMES, grey_statistics(Frame(pixels=ramp)), strict=True))
    assert found["grey mean"] == pytest.approx(0.5) and found["grey p50"] == pytest.approx(0.5)
    assert found["black share"] == pytest.approx(8 / 256)
    assert found["row steps"] == pytest.approx(1 / 255) and found["column steps"] == 0.0
    assert found["colour"] == 0.0


def test_colour_shows_and_grey_in_three_channels_does_not() -> None:
    grey = np.repeat(np.random.default_rng(0).integers(0, 255, (64, 64, 1), dtype=np.uint8), 3, 2)
    plain = grey_statistics(Frame(pixels=grey, pixel_format=PixelFormat.BGR))
    assert np.allclose(plain, grey_statistics(Frame(pixels=grey[:, :, 0].copy())), atol=1e-6)
    doppler = grey.copy()
    doppler[:16, :, 0] = 0
    doppler[:16, :, 2] = 255
    assert grey_statistics(Frame(pixels=doppler, pixel_format=PixelFormat.RGB))[-1] > 0.2


def test_the_score_is_the_mixtures_negative_log_likelihood() -> None:
    model = pytest.importorskip("sklearn.mixture", reason="install tinyusfm-edge[calibration]")
    rng = np.random.default_rng(0)
    rows = np.concatenate([rng.normal(-2, 1, (200, 5)), rng.normal(2, 0.5, (100, 5))])
    fitted = model.GaussianMixture(2, covariance_type="diag", random_state=0).fit(rows)
    ours = Mixture(
        centre_F=np.zeros(5),
        scale_F=np.ones(5),
        weights_K=fitted.weights_,
        means_KF=fitted.means_,
        spreads_KF=np.sqrt(fitted.covariances_),
        threshold=0.0,
    )
    assert np.allclose([ours.score(row) for row in rows], -fitted.score_samples(rows), atol=1e-9)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=40), st.integers(1, 12))
def test_an_alarm_needs_a_full_window_that_is_half_strange(course: list[bool], window: int) -> None:
    monitor = DriftMonitor(statistic(), tuple(auxiliary()), window=window)
    for number, strange in enumerate(course, 1):
        reading = monitor.observe(prediction(auxiliary(1e30 if strange else 1.0)), IMAGE)
        last = course[max(0, number - window) : number]
        assert reading.strange == strange
        assert reading.frames == len(last) and reading.share == pytest.approx(sum(last) / len(last))
        assert reading.alarm == (number >= window and 2 * sum(last) >= window)
    monitor.reset()
    assert monitor.observe(prediction(auxiliary()), IMAGE).frames == 1


def test_features_are_named_and_the_farthest_is_told() -> None:
    monitor = DriftMonitor(statistic(), tuple(auxiliary()))
    assert monitor.kind == "features" and "alone" not in monitor.description
    reading = monitor.observe(prediction(auxiliary(1e30)), IMAGE)
    assert reading.strange and reading.strangest == "peak_block1" and reading.kind == "features"
    plain = json.loads(json.dumps(reading.to_json(), allow_nan=False))
    assert plain["strange"] is True and plain["alarm"] is False and plain["window"] == 25


@pytest.mark.parametrize("known", [(), TOKENS, PEAKS])
def test_an_artefact_without_all_outputs_is_watched_by_its_grey_levels_and_says_so(known: tuple[str, ...]) -> None:
    monitor = DriftMonitor(statistic(), known)
    assert monitor.kind == "grey levels" and "alone" in monitor.description
    reading = monitor.observe(prediction(), IMAGE)
    assert reading.kind == "grey levels" and not reading.strange and reading.threshold == 20.0
    white = Frame(pixels=np.full((64, 64), 255, np.uint8))
    far = replace(statistic().grey, scale_F=np.full(len(GREY_NAMES), 0.05))
    assert DriftMonitor(statistic(grey=far)).observe(prediction(), white).strange


def test_an_answer_that_is_not_finite_counts_as_strange() -> None:
    reading = DriftMonitor(statistic(), tuple(auxiliary())).observe(prediction(valid=False), IMAGE)
    assert reading.strange and math.isinf(reading.score) and reading.to_json()["score"] is None


def test_tokens_have_length_one_and_what_directions_leave_over_counts() -> None:
    joined = join_tokens(auxiliary(), TOKENS)
    assert joined.shape == (8,) and np.linalg.norm(joined) == pytest.approx(1.0)
    assert not join_tokens({"a": np.zeros((1, 3))}, ["a"]).any()
    inside = join_features(np.eye(8)[0], np.ones(1), np.zeros(9), np.zeros(8), np.eye(8, 2))
    outside = join_features(np.eye(8)[7], np.ones(1), np.zeros(9), np.zeros(8), np.eye(8, 2))
    assert inside[0] == 1.0 and outside[0] == 0.0 and inside[2] < -10 < outside[2]


def test_the_file_gives_the_same_statistic_and_the_same_bytes() -> None:
    for one in (statistic(), statistic(features=None, token_names=(), peak_names=())):
        raw = one.to_bytes()
        again = DriftStatistic.from_bytes(raw)
        assert again.to_bytes() == raw and again.about == {"held_out": 151}
        first, second = (DriftMonitor(s, tuple(auxiliary())) for s in (one, again))
        scores = [m.observe(prediction(auxiliary()), IMAGE).score for m in (first, second)]
        assert scores[0] == scores[1]


def edited(change: dict[str, Any]) -> bytes:
    """The file with parts of its head or arrays exchanged."""
    arrays = dict(unpack_arrays(statistic().to_bytes(), DRIFT_FILE))
    head = json.loads(arrays["head"].tobytes())
    head.update({key: value for key, value in change.items() if key in head})
    arrays.update({key: value for key, value in change.items() if key in arrays})
    arrays["head"] = np.frombuffer(json.dumps(head).encode(), np.uint8)
    return pack_arrays(arrays)


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2},
        {"false_alarms": 0.0},
        {"false_alarms": "often"},
        {"thresholds": {"grey": None, "features": 1.0}},
        {"token_names": []},
        {"basis": np.full((8, 2), np.nan, np.float32)},
        {"basis": np.eye(8, 3, dtype=np.float32)},
        {"features.spreads": np.zeros((2, 13))},
        {"features.weights": np.array([0.5, np.inf])},
        {"grey.centre": np.zeros(3)},
        {"head": np.frombuffer(b"{", np.uint8)},
    ],
)
def test_a_file_that_cannot_be_right_is_refused(change: dict[str, Any]) -> None:
    raw = edited(change)
    if "head" in change:
        raw = pack_arrays({"head": change["head"]})
    with pytest.raises(BundleError):
        DriftStatistic.from_bytes(raw)


def test_no_file_and_no_window_are_refused() -> None:
    with pytest.raises(BundleError):
        DriftStatistic.from_bytes(b"not a zip")
    with pytest.raises(InputError, match="window"):
        DriftMonitor(statistic(), window=0)
    assert edited({}) and Path(DRIFT_FILE).suffix == ".safetensors"
