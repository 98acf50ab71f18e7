"""Fitting the drift statistic: the declared rate holds, foreign frames are seen, features that say nothing refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import pytest

from tests.needs import needs
from tinyusfm_calibration.drift_fit import DriftSample, conformal_threshold, drift_sample, fit_drift
from tinyusfm_runtime.drift import GREY_NAMES, DriftStatistic, join_features
from tinyusfm_runtime.errors import CalibrationError, InputError
from tinyusfm_runtime.phantom import make_phantom

needs("sklearn", reason="install tinyusfm-edge[calibration]")

TOKENS, PEAKS = ("tokens_block0",), ("peak_block0",)
WIDTH = 24


def samples(count: int, *, seed: int, shift: float = 0.0, prefix: str = "p") -> list[DriftSample]:
    """Frames of as many patients: tokens near a plane of four directions, moved along others by ``shift``."""
    rng = np.random.default_rng(seed)
    plane = np.random.default_rng(99).normal(size=(4, WIDTH))
    tokens = 8.0 + rng.normal(size=(count, 4)) @ plane + 0.1 * rng.normal(size=(count, WIDTH))
    tokens += shift * np.sign(np.random.default_rng(98).normal(size=WIDTH))
    tokens /= np.linalg.norm(tokens, axis=1, keepdims=True)
    grey = 0.4 + 0.05 * rng.normal(size=(count, len(GREY_NAMES)))
    return [
        DriftSample(grey=g, tokens_T=t.astype(np.float32), peaks=np.exp(rng.normal(size=1)), group=f"{prefix}{i}")
        for i, (g, t) in enumerate(zip(grey, tokens, strict=True))
    ]


def strange_share(statistic: DriftStatistic, frames: Sequence[DriftSample]) -> float:
    """Share of frames above the features' threshold."""
    mixture = statistic.features
    assert mixture is not None
    rows = [join_features(s.tokens_T, s.peaks, s.grey, statistic.mean_T, statistic.basis_TP) for s in frames]
    return float(np.mean([mixture.score(row) > mixture.threshold for row in rows]))


def detects(statistic: DriftStatistic, own: Sequence[DriftSample], foreign: Sequence[DriftSample]) -> bool:
    """The verdict that a detector must earn: few own frames are strange, and nearly all foreign ones."""
    return strange_share(statistic, own) <= 0.1 and strange_share(statistic, foreign) >= 0.9


def fitted(**changes: object) -> DriftStatistic:
    """A statistic of 300 frames and 200 held-out patients."""
    return fit_drift(
        samples(300, seed=0), samples(200, seed=1, prefix="q"), token_names=TOKENS, peak_names=PEAKS, **changes
    )  # type: ignore[arg-type]


def test_new_patients_pass_at_the_declared_rate_and_foreign_frames_do_not() -> None:
    statistic = fitted()
    assert detects(statistic, samples(600, seed=2), samples(200, seed=3, shift=2.0))
    assert statistic.about["frames"] == 300 and statistic.about["held_out"] == 200
    assert statistic.auxiliary == (*TOKENS, *PEAKS)


def test_the_threshold_keeps_its_promise_on_average() -> None:
    rng = np.random.default_rng(0)
    for rate in (0.025, 0.1):
        exceeded = [(rng.normal(size=50) > conformal_threshold(rng.normal(size=99), rate)).mean() for _ in range(400)]
        assert np.mean(exceeded) <= rate * 1.15, "split-conformal: at most the rate, on average over calibrations"
        assert np.mean(exceeded) >= rate * 0.5


def test_half_a_window_is_strange_at_most_twice_as_often_as_a_frame() -> None:
    # the worst case: all frames of a patient are strange together
    rng = np.random.default_rng(0)
    together = rng.uniform(size=20_000) < 0.025
    windows = np.repeat(together[:, None], 25, 1).mean(1) >= 0.5
    assert windows.mean() <= 0.05


def test_a_detector_on_shuffled_features_does_not_pass_as_one() -> None:
    rng = np.random.default_rng(5)

    def shuffled(frames: Sequence[DriftSample]) -> list[DriftSample]:
        return [
            dataclasses.replace(s, tokens_T=rng.permutation(s.tokens_T), grey=rng.permutation(s.grey)) for s in frames
        ]

    blind = fit_drift(
        shuffled(samples(300, seed=0)),
        shuffled(samples(200, seed=1, prefix="q")),
        token_names=TOKENS,
        peak_names=PEAKS,
    )
    own, foreign = samples(300, seed=2), samples(200, seed=3, shift=2.0)
    assert not detects(blind, shuffled(own), shuffled(foreign)), "the control: order carries the information"
    assert detects(fitted(), own, foreign)


def test_constant_features_are_refused() -> None:
    same = [dataclasses.replace(s, tokens_T=np.ones(WIDTH, np.float32)) for s in samples(300, seed=0)]
    with pytest.raises(CalibrationError, match="same on every"):
        fit_drift(same, samples(200, seed=1, prefix="q"), token_names=TOKENS, peak_names=PEAKS)
    flat = [dataclasses.replace(s, grey=np.zeros(len(GREY_NAMES))) for s in samples(300, seed=0)]
    with pytest.raises(CalibrationError, match="look the same"):
        fit_drift(flat, samples(200, seed=1, prefix="q"))


def test_grey_levels_alone_are_a_statistic_too() -> None:
    alone = fit_drift(samples(300, seed=0), samples(200, seed=1, prefix="q"))
    assert alone.features is None and alone.auxiliary == ()


def test_too_few_patients_for_a_rate_are_refused_with_the_number_needed() -> None:
    with pytest.raises(CalibrationError, match="at least 39"):
        fit_drift(samples(300, seed=0), samples(38, seed=1, prefix="q"))
    assert fit_drift(samples(300, seed=0), samples(39, seed=1, prefix="q"))
    with pytest.raises(CalibrationError, match="a drift check needs"):
        fit_drift(samples(20, seed=0), samples(200, seed=1, prefix="q"))


def test_a_patients_second_frame_promises_nothing() -> None:
    twice = samples(30, seed=1, prefix="q") + samples(30, seed=4, prefix="q")
    with pytest.raises(CalibrationError, match="30 held-out patients"):
        fit_drift(samples(300, seed=0), twice)


def test_patients_on_both_sides_no_frames_and_bad_numbers_are_refused() -> None:
    with pytest.raises(CalibrationError, match="both sides"):
        fit_drift(samples(300, seed=0), samples(200, seed=1))
    with pytest.raises(CalibrationError, match="no frames"):
        fit_drift([], samples(200, seed=1))
    broken = samples(300, seed=0)
    broken[3] = dataclasses.replace(broken[3], grey=np.full(len(GREY_NAMES), np.nan))
    with pytest.raises(CalibrationError, match="NaN"):
        fit_drift(broken, samples(200, seed=1, prefix="q"))
    with pytest.raises(InputError, match="rate"):
        fit_drift(samples(300, seed=0), samples(200, seed=1, prefix="q"), false_alarms=1.0)


def test_a_sample_takes_what_is_named() -> None:
    outputs = {"tokens_block0": np.ones((1, 4), np.float32), "peak_block0": np.array([3.0]), "logits": np.zeros(1)}
    found = drift_sample(make_phantom(0).frame, outputs, token_names=TOKENS, peak_names=PEAKS, group="g")
    assert found.tokens_T.shape == (4,) and found.peaks.tolist() == [3.0] and found.group == "g"
    assert drift_sample(make_phantom(0).frame, {}).tokens_T.size == 0
