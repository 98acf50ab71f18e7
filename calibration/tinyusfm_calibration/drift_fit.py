"""Fitting the drift statistic: a mixture and a threshold.

The mixture on the frames a model was calibrated on, the threshold on patients it never saw.

Principal directions by an exact decomposition, a diagonal Gaussian mixture by scikit-learn with as many components as
the Bayesian information criterion asks for, and a split-conformal threshold: with one frame of each of n held-out
patients the ceil((n+1)(1-a))-th smallest score is exceeded by a new patient's frame with probability at most a (Vovk
et al. 2005; Lei et al. 2018, theorem 2). The runtime's window turns a into a rate of false alarms. It does not know
models.

Shapes: N frames to fit on, M held-out frames, T token numbers, P directions, F features, K components.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from tinyusfm_runtime.drift import GREY_NAMES, DriftStatistic, Mixture, grey_statistics, join_features, join_tokens
from tinyusfm_runtime.errors import CalibrationError, InputError, MissingExtra
from tinyusfm_runtime.frame import Frame
from tinyusfm_runtime.numerics.order import wide
from tinyusfm_runtime.results import STRANGE_SHARE

FALSE_ALARMS: Final = 0.05
"""Declared rate of windows that alarm without drift (our choice)."""
DIRECTIONS: Final = 8
"""Principal directions at most; what they leave over is a feature of its own. Our choice by measurement: with 16, 24
and 48, all fitted on HC18, more and more frames of one cardiac clip pass for fetal heads. US-Metrics keeps 128."""
COMPONENTS: Final = 4
"""Components at most, as in US-Metrics."""
FRAMES_PER_FEATURE: Final = 4
"""Fewer frames per feature do not fit a mixture (our choice)."""
_FLOOR = 0.02
"""A spread below this share of 1 (grey levels are shares) would make a constant statistic infinitely strict."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DriftSample:
    """What one frame gives to the statistic.

    Attributes:
        grey: see ``grey_statistics``.
        tokens_T: concatenated mean tokens of length one; empty where there are none.
        peaks: largest absolute values, or empty.
        group: patient; of each held-out patient one frame counts.
    """

    grey: np.ndarray
    tokens_T: np.ndarray
    peaks: np.ndarray
    group: str = ""


def drift_sample(
    frame: Frame,
    auxiliary: Mapping[str, np.ndarray],
    *,
    token_names: Sequence[str] = (),
    peak_names: Sequence[str] = (),
    group: str = "",
) -> DriftSample:
    """Takes from a frame and the graph's outputs what the statistic needs.

    Args:
        frame: the frame, cropped.
        auxiliary: outputs of the graph by name.
        token_names: which are mean tokens.
        peak_names: which are largest absolute values.
        group: patient.
    """
    return DriftSample(
        grey=grey_statistics(frame),
        tokens_T=join_tokens(auxiliary, token_names) if token_names else np.zeros(0, np.float32),
        peaks=np.array([float(np.max(auxiliary[name])) for name in peak_names]),
        group=group,
    )


def fit_drift(
    fit: Sequence[DriftSample],
    held_out: Sequence[DriftSample],
    *,
    token_names: Sequence[str] = (),
    peak_names: Sequence[str] = (),
    false_alarms: float = FALSE_ALARMS,
    directions: int = DIRECTIONS,
    seed: int = 0,
    about: Mapping[str, Any] | None = None,
) -> DriftStatistic:
    """Fits mixture and threshold.

    Args:
        fit: frames of the calibration split.
        held_out: frames of patients that are not among them.
        token_names: auxiliary outputs that are mean tokens; none fits grey levels alone.
        peak_names: auxiliary outputs that are largest absolute values.
        false_alarms: rate to be kept, 0..1.
        directions: principal directions at most.
        seed: of the mixture.
        about: what is written down with it; no names of patients.

    Raises:
        CalibrationError: too few frames or patients for this rate, a patient on both sides, or features that are the
            same on every frame, which could never tell anything.
        InputError: a rate outside 0..1.
        MissingExtra: scikit-learn is not installed.
    """
    if not 0.0 < false_alarms < 1.0:
        raise InputError(f"a false-alarm rate of {false_alarms} must lie between 0 and 1")
    both = {sample.group for sample in fit if sample.group} & {sample.group for sample in held_out}
    if both:
        raise CalibrationError(f"{len(both)} patients stand on both sides of the drift statistic: hold whole ones out")
    held = _one_a_group(held_out)
    rate = false_alarms * STRANGE_SHARE
    grey_ND, grey_MD = _stack([s.grey for s in fit]), _stack([s.grey for s in held])
    grey = _fit_mixture(grey_ND, grey_MD, rate, seed, np.full(len(GREY_NAMES), _FLOOR))
    facts = {**(about or {}), "frames": len(fit), "held_out": len(held)}
    if not token_names:
        return DriftStatistic(grey=grey, false_alarms=false_alarms, about=facts)
    tokens_NT = _stack([s.tokens_T for s in fit])
    mean_T, basis_TP = _directions(tokens_NT, min(directions, len(fit) // (2 * FRAMES_PER_FEATURE)))
    rows_NF, held_MF = (
        _stack([join_features(s.tokens_T, s.peaks, s.grey, mean_T, basis_TP) for s in samples])
        for samples in (fit, held)
    )
    floors_F = np.concatenate([np.full(rows_NF.shape[1] - len(GREY_NAMES), 1e-6), np.full(len(GREY_NAMES), _FLOOR)])
    return DriftStatistic(
        grey=grey,
        features=_fit_mixture(rows_NF, held_MF, rate, seed, floors_F),
        token_names=tuple(token_names),
        peak_names=tuple(peak_names),
        mean_T=mean_T,
        basis_TP=basis_TP,
        false_alarms=false_alarms,
        about=facts,
    )


def conformal_threshold(scores_M: np.ndarray, rate: float) -> float:
    """The score that a new patient's frame exceeds with probability at most ``rate``.

    Args:
        scores_M: scores of exchangeable held-out frames.
        rate: 0..1.

    Raises:
        CalibrationError: too few scores for this rate.
    """
    place = math.ceil((len(scores_M) + 1) * (1.0 - rate))
    if place > len(scores_M):
        needed = math.ceil(1.0 / rate) - 1
        raise CalibrationError(
            f"{len(scores_M)} held-out patients cannot promise {rate:.2%} strange frames: hold out at least {needed}, "
            "or allow more false alarms"
        )
    return float(np.sort(wide(scores_M))[place - 1])


def _one_a_group(samples: Sequence[DriftSample]) -> list[DriftSample]:
    """One frame of each patient; frames without a patient count as one each."""
    first: dict[str, DriftSample] = {}
    for number, sample in enumerate(samples):
        first.setdefault(sample.group or f"#{number}", sample)
    return list(first.values())


def _stack(rows: Sequence[np.ndarray]) -> np.ndarray:
    if not rows:
        raise CalibrationError("the drift statistic has no frames to look at: give a training and a validation split")
    stacked = np.stack(rows).astype(np.float64)
    if not np.isfinite(stacked).all():
        raise CalibrationError("a calibration frame gives NaN or infinity to the drift statistic: leave it out")
    return stacked


def _directions(tokens_NT: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    mean_T = tokens_NT.mean(0)
    _, strengths, rows = np.linalg.svd(tokens_NT - mean_T, full_matrices=False)
    if strengths[0] < 1e-6 * math.sqrt(len(tokens_NT)):
        raise CalibrationError("the tokens are the same on every calibration frame: they cannot show drift")
    basis_TP = rows[: max(1, count)].T
    signs_P = np.sign(basis_TP[np.abs(basis_TP).argmax(0), np.arange(basis_TP.shape[1])])
    return mean_T.astype(np.float32), (basis_TP * signs_P).astype(np.float32)


def _fit_mixture(fit_NF: np.ndarray, held_out_MF: np.ndarray, rate: float, seed: int, floors_F: np.ndarray) -> Mixture:
    count, width = fit_NF.shape
    if count < FRAMES_PER_FEATURE * width:
        raise CalibrationError(f"a drift check needs {FRAMES_PER_FEATURE * width} frames, got {count}")
    centre_F, spread_F = fit_NF.mean(0), fit_NF.std(0)
    if (spread_F < 1e-9).all():
        raise CalibrationError("all calibration frames look the same to the drift statistic: give more different ones")
    scale_F = np.maximum(spread_F, floors_F)
    fitted = _gaussians((fit_NF - centre_F) / scale_F, seed)
    mixture = Mixture(
        centre_F=centre_F,
        scale_F=scale_F,
        weights_K=fitted.weights_,
        means_KF=fitted.means_,
        spreads_KF=np.sqrt(fitted.covariances_),
        threshold=0.0,
    )
    scores_M = np.array([mixture.score(row_F) for row_F in held_out_MF])
    return Mixture(
        centre_F=centre_F,
        scale_F=scale_F,
        weights_K=mixture.weights_K,
        means_KF=mixture.means_KF,
        spreads_KF=mixture.spreads_KF,
        threshold=conformal_threshold(scores_M, rate),
    )


def _gaussians(standard_NF: np.ndarray, seed: int) -> Any:
    """The mixture with the best information criterion.

    Among 1 to COMPONENTS components.
    """
    try:
        from sklearn.mixture import GaussianMixture
    except ImportError as error:
        raise MissingExtra("the drift statistic", "scikit-learn", "calibration") from error
    tried = []
    for components in range(1, min(COMPONENTS, len(standard_NF) // (FRAMES_PER_FEATURE * 4)) + 1):
        model = GaussianMixture(components, covariance_type="diag", reg_covar=0.05, n_init=2, random_state=seed)
        with warnings.catch_warnings():
            # a mixture that has not settled after 100 rounds is still a mixture; the threshold is set on what it says
            warnings.simplefilter("ignore")
            tried.append(model.fit(standard_NF))
    return min(tried, key=lambda model: float(model.bic(standard_NF)))


__all__ = [
    "COMPONENTS",
    "DIRECTIONS",
    "FALSE_ALARMS",
    "FRAMES_PER_FEATURE",
    "DriftSample",
    "conformal_threshold",
    "drift_sample",
    "fit_drift",
]
