"""Drift: do the frames of a stream still look like the ones the model was calibrated on?

Each frame gets a score, the negative log-likelihood of a Gaussian mixture (in the spirit of the NRQ score of
US-Metrics, arXiv:2604.19512) over what the graph gives anyway: the mean patch token after some blocks, the largest
absolute value of some tensors, and a few grey-level statistics of the frame. An artefact without these outputs is
watched by its grey levels alone, and says so. A frame is strange above a conformal threshold (Vovk et al. 2005) set
on patients that the mixture never saw; a stream has drifted when half of the last frames are strange. Frames of one
patient resemble each other, so nothing is assumed about that: by Markov's inequality half of a window is strange at
most twice as often as one frame is.

numpy only. It does not know how a mixture is fitted (tinyusfm_calibration/drift_fit.py), and it never stops a stream.

Shapes: HW = rows, columns; F features, K components, T token numbers, P principal directions.
"""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from tinyusfm_runtime.arrays import pack_arrays, unpack_arrays
from tinyusfm_runtime.errors import BundleError, InputError
from tinyusfm_runtime.frame import Frame, PixelFormat

if TYPE_CHECKING:
    from tinyusfm_runtime.session import Prediction

DRIFT_FILE: Final = "drift/statistic.npz"
"""Where a bundle keeps its statistic."""
DRIFT_VERSION: Final = 1
"""Version of that file; raise it when a feature changes its meaning."""
WINDOW_FRAMES: Final = 25
"""Frames that decide together: about a second of a stream."""
STRANGE_SHARE: Final = 0.5
"""A window with at least this share of strange frames has drifted."""
MAX_STATISTIC_BYTES: Final = 16 << 20
"""Unpacked; the shipped one is below 1 MB."""

GREY_NAMES: Final = (
    "grey mean", "grey p10", "grey p50", "grey p90", "grey p99", "black share", "row steps", "column steps", "colour",
)  # fmt: skip
"""What ``grey_statistics`` gives, in order."""
_GREY_SIDE = 256
_BLACK = 8
_COLOURED = 24
"""Codes below which a pixel is black, and channels this far apart are colour (a JPEG's grey is off by a few)."""


def grey_statistics(frame: Frame) -> np.ndarray:
    """A frame's brightness and colour in a few numbers, from every n-th pixel so that the longer side is 256 to 511.

    Args:
        frame: any frame; its crop has been applied.

    Returns:
        float64 (9,), see GREY_NAMES: mean, percentiles, share of black pixels, mean absolute steps along rows and
        columns, all as shares of 255; share of coloured pixels.
    """
    stride = max(1, max(frame.pixels.shape[:2]) // _GREY_SIDE)
    pixels = frame.pixels[::stride, ::stride].astype(np.float32)
    colour = 0.0
    if frame.pixel_format is not PixelFormat.GREY:
        pixels = pixels[:, :, :3]
        colour = float((np.ptp(pixels, axis=2) > _COLOURED).mean())
        pixels = pixels.mean(2)
    levels = np.percentile(pixels, (10, 50, 90, 99)) / 255.0
    steps = (float(np.abs(np.diff(pixels, axis=axis)).mean()) / 255.0 for axis in (1, 0))
    black = float((pixels < _BLACK).mean())
    return np.array([float(pixels.mean()) / 255.0, *levels, black, *steps, colour])


@dataclass(frozen=True, kw_only=True, slots=True)
class Mixture:
    """A Gaussian mixture with diagonal covariances over standardised features, and its conformal threshold.

    Attributes:
        centre_F: float64 mean of each feature on the calibration frames.
        scale_F: float64 spread of each feature, positive.
        weights_K: float64 shares of the components, sum 1.
        means_KF: float64 means of the standardised features.
        spreads_KF: float64 standard deviations, positive.
        threshold: score above which a frame is strange.
    """

    centre_F: np.ndarray
    scale_F: np.ndarray
    weights_K: np.ndarray
    means_KF: np.ndarray
    spreads_KF: np.ndarray
    threshold: float

    def __post_init__(self) -> None:
        """Checks that the parts fit.

        Raises:
            BundleError: shapes that do not fit, or numbers no mixture has.
        """
        shape = (len(self.weights_K), len(self.centre_F))
        arrays = (self.centre_F, self.scale_F, self.weights_K, self.means_KF, self.spreads_KF)
        fits = self.means_KF.shape == self.spreads_KF.shape == shape and self.scale_F.shape == self.centre_F.shape
        if not fits or 0 in shape or not all(np.isfinite(array).all() for array in arrays):
            raise BundleError("the drift statistic's mixture has parts that do not fit: export the bundle again")
        if (self.scale_F <= 0).any() or (self.spreads_KF <= 0).any() or (self.weights_K <= 0).any():
            raise BundleError("the drift statistic's mixture has spreads or weights that are not positive")
        if not math.isfinite(self.threshold):
            raise BundleError("the drift statistic has no finite threshold")

    def standardise(self, features_F: np.ndarray) -> np.ndarray:
        """Features as multiples of their spread on the calibration frames."""
        standard: np.ndarray = (features_F - self.centre_F) / self.scale_F
        return standard

    def score(self, features_F: np.ndarray) -> float:
        """Negative log-likelihood of one frame, in nats; high is strange."""
        gaps_KF = (self.standardise(features_F) - self.means_KF) / self.spreads_KF
        logs_K = np.log(self.weights_K) - 0.5 * np.square(gaps_KF).sum(1) - np.log(self.spreads_KF).sum(1)
        top = float(logs_K.max())
        normal = 0.5 * len(self.centre_F) * math.log(2.0 * math.pi)
        return normal - top - math.log(float(np.exp(logs_K - top).sum()))


@dataclass(frozen=True, kw_only=True, slots=True)
class DriftStatistic:
    """What a bundle knows about the frames it was calibrated on. No frames, no names.

    Attributes:
        grey: mixture over the grey-level statistics alone.
        features: mixture over tokens, peaks and grey levels, or None.
        token_names: auxiliary outputs that are mean patch tokens, in order.
        peak_names: auxiliary outputs that are largest absolute values, in order.
        mean_T: float32 mean of the concatenated, normalised tokens.
        basis_TP: float32 principal directions.
        false_alarms: declared rate of windows without drift that alarm, 0..1.
        about: counts and hashes of what it was fitted on, plain data.
        version: of the file.
    """

    grey: Mixture
    features: Mixture | None = None
    token_names: tuple[str, ...] = ()
    peak_names: tuple[str, ...] = ()
    mean_T: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))
    basis_TP: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.float32))
    false_alarms: float
    about: Mapping[str, Any] = field(default_factory=dict)
    version: int = DRIFT_VERSION

    def __post_init__(self) -> None:
        """Checks that the parts fit.

        Raises:
            BundleError: another version, or parts of different size.
        """
        if self.version != DRIFT_VERSION:
            raise BundleError(f"drift statistic of version {self.version}: this runtime reads {DRIFT_VERSION}")
        if not 0.0 < self.false_alarms < 1.0 or len(self.grey.centre_F) != len(GREY_NAMES):
            raise BundleError("the drift statistic's false-alarm rate or grey levels are not usable")
        wanted = self.basis_TP.shape[1] + 1 + len(self.peak_names) + len(GREY_NAMES)
        if self.features is None:
            return
        if self.basis_TP.shape[:1] != self.mean_T.shape or len(self.features.centre_F) != wanted:
            raise BundleError("the drift statistic's projection and mixture do not fit: export the bundle again")
        if not np.isfinite(self.basis_TP).all() or not np.isfinite(self.mean_T).all() or not self.token_names:
            raise BundleError("the drift statistic's projection is not usable: export the bundle again")

    @property
    def auxiliary(self) -> tuple[str, ...]:
        """Outputs of the graph that the features need; empty where only grey levels are watched."""
        return (*self.token_names, *self.peak_names)

    def to_bytes(self) -> bytes:
        """The file; equal statistics give equal bytes."""
        head: dict[str, Any] = {
            "version": self.version,
            "token_names": list(self.token_names),
            "peak_names": list(self.peak_names),
            "false_alarms": self.false_alarms,
            "about": dict(self.about),
            "thresholds": {"grey": self.grey.threshold},
        }
        arrays = {f"grey.{name}": value for name, value in _arrays_of(self.grey).items()}
        if self.features is not None:
            head["thresholds"]["features"] = self.features.threshold
            arrays.update({f"features.{name}": value for name, value in _arrays_of(self.features).items()})
            arrays.update({"mean": self.mean_T, "basis": self.basis_TP})
        text = json.dumps(head, sort_keys=True, allow_nan=False).encode("ascii")
        return pack_arrays({**arrays, "head": np.frombuffer(text, np.uint8)})

    @classmethod
    def from_bytes(cls, raw: bytes) -> DriftStatistic:
        """Reads what ``to_bytes`` wrote.

        Raises:
            BundleError: not such a file, or one whose parts do not fit.
        """
        arrays = unpack_arrays(raw, DRIFT_FILE, max_bytes=MAX_STATISTIC_BYTES)
        try:
            head = json.loads(arrays["head"].tobytes().decode("ascii"))
            thresholds = head["thresholds"]
            whole = "features" in thresholds
            return cls(
                grey=_mixture_of(arrays, "grey", thresholds),
                features=_mixture_of(arrays, "features", thresholds) if whole else None,
                token_names=tuple(str(name) for name in head["token_names"]),
                peak_names=tuple(str(name) for name in head["peak_names"]),
                mean_T=arrays["mean"] if whole else np.zeros(0, np.float32),
                basis_TP=arrays["basis"] if whole else np.zeros((0, 0), np.float32),
                false_alarms=float(head["false_alarms"]),
                about=dict(head["about"]),
                version=int(head["version"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise BundleError(f"the drift statistic cannot be read: {type(error).__name__}") from error


def _arrays_of(mixture: Mixture) -> dict[str, np.ndarray]:
    return {
        "centre": mixture.centre_F,
        "scale": mixture.scale_F,
        "weights": mixture.weights_K,
        "means": mixture.means_KF,
        "spreads": mixture.spreads_KF,
    }


def _mixture_of(arrays: Mapping[str, np.ndarray], kind: str, thresholds: Mapping[str, Any]) -> Mixture:
    centre, scale, weights, means, spreads = (
        np.asarray(arrays[f"{kind}.{name}"], np.float64) for name in ("centre", "scale", "weights", "means", "spreads")
    )
    return Mixture(
        centre_F=centre,
        scale_F=scale,
        weights_K=weights,
        means_KF=means,
        spreads_KF=spreads,
        threshold=float(thresholds[kind]),
    )


def join_tokens(auxiliary: Mapping[str, np.ndarray], names: Collection[str]) -> np.ndarray:
    """Mean tokens of several blocks as one vector of length one.

    Args:
        auxiliary: outputs of the graph by name.
        names: which of them, in order.

    Returns:
        float32 (T,); zeros where all tokens are zero.
    """
    joined_T = np.concatenate([np.asarray(auxiliary[name], np.float32).ravel() for name in names])
    length = float(np.linalg.norm(joined_T))
    unit: np.ndarray = joined_T / (length or 1.0)
    return unit


def join_features(
    tokens_T: np.ndarray, peaks: np.ndarray, grey: np.ndarray, mean_T: np.ndarray, basis_TP: np.ndarray
) -> np.ndarray:
    """Features of one frame: principal components, what they leave over, peaks, grey levels.

    Args:
        tokens_T: see ``join_tokens``.
        peaks: largest absolute values, from 0 up.
        grey: see ``grey_statistics``.
        mean_T: mean of the tokens on the calibration frames.
        basis_TP: principal directions.

    Returns:
        float64 (F,); lengths and peaks as natural logarithms, since they spread by factors.
    """
    gap_T = tokens_T - mean_T
    inside_P = gap_T @ basis_TP
    left = np.linalg.norm(gap_T - basis_TP @ inside_P)
    return np.concatenate([inside_P, np.log([left + 1e-6]), np.log(np.asarray(peaks, np.float64) + 1e-6), grey])


@dataclass(frozen=True, kw_only=True, slots=True)
class DriftReading:
    """What is known about the stream after one more frame.

    Attributes:
        kind: ``features``, or ``grey levels`` where the artefact gives no features.
        score: of this frame, in nats; infinite where the model's output was not finite.
        threshold: score above which a frame is strange.
        share: share of strange frames in the window, 0..1.
        frames: frames in the window; no decision before it is full.
        window: frames of a full window.
        strangest: feature farthest from the calibration frames on this frame, in words.
    """

    kind: str
    score: float
    threshold: float
    share: float
    frames: int
    window: int
    strangest: str

    @property
    def strange(self) -> bool:
        """Whether this frame lies above the threshold."""
        return self.score > self.threshold

    @property
    def alarm(self) -> bool:
        """Whether the stream has drifted: the window is full and at least half of it strange."""
        return self.frames == self.window and self.share >= STRANGE_SHARE

    def to_json(self) -> dict[str, Any]:
        """Plain data, ready for ``json.dumps``."""
        return {
            "kind": self.kind,
            "score": self.score if math.isfinite(self.score) else None,
            "threshold": self.threshold,
            "strange": self.strange,
            "share": self.share,
            "frames": self.frames,
            "window": self.window,
            "alarm": self.alarm,
            "strangest": self.strangest,
        }


class DriftMonitor:
    """Watches one stream; make a new one, or ``reset``, for the next.

    Args:
        statistic: of the bundle.
        auxiliary: outputs that the artefact gives beside the logits.
        window: frames that decide together.

    Raises:
        InputError: a window without frames.
    """

    def __init__(
        self, statistic: DriftStatistic, auxiliary: Collection[str] = (), *, window: int = WINDOW_FRAMES
    ) -> None:
        if window < 1:
            raise InputError(f"a drift window of {window} frames decides nothing: at least 1")
        self.statistic = statistic
        whole = statistic.features is not None and set(statistic.auxiliary) <= set(auxiliary)
        self.kind = "features" if whole else "grey levels"
        self._mixture = statistic.features if whole and statistic.features is not None else statistic.grey
        self._window = window
        self._strange: deque[bool] = deque(maxlen=window)
        names = [f"token direction {i + 1}" for i in range(statistic.basis_TP.shape[1])]
        self._names = (*names, "token remainder", *statistic.peak_names, *GREY_NAMES) if whole else GREY_NAMES

    @property
    def description(self) -> str:
        """What is watched and how often it cries wolf, one line."""
        why = "" if self.kind == "features" else " alone (the artefact gives no features)"
        return f"watched by {self.kind}{why}, at most {self.statistic.false_alarms:.0%} false alarms a window"

    @property
    def needs(self) -> tuple[str, ...]:
        """Auxiliary outputs it reads of a prediction; another artefact of the bundle may not give them."""
        return self.statistic.auxiliary if self.kind == "features" else ()

    def observe(self, prediction: Prediction, frame: Frame) -> DriftReading:
        """Takes one more frame into account.

        Args:
            prediction: the session's answer to it.
            frame: the frame.

        Returns:
            The reading after it.
        """
        score, strangest = math.inf, "the model's output is not finite"
        if prediction.valid:
            features_F = self.features(prediction.auxiliary, frame)
            score = self._mixture.score(features_F)
            strangest = self._names[int(np.abs(self._mixture.standardise(features_F)).argmax())]
        self._strange.append(score > self._mixture.threshold)
        return DriftReading(
            kind=self.kind,
            score=score,
            threshold=self._mixture.threshold,
            share=sum(self._strange) / len(self._strange),
            frames=len(self._strange),
            window=self._window,
            strangest=strangest,
        )

    def features(self, auxiliary: Mapping[str, np.ndarray], frame: Frame) -> np.ndarray:
        """The numbers a frame is judged by.

        Args:
            auxiliary: the graph's further outputs.
            frame: the frame.

        Returns:
            float64 (F,).
        """
        grey = grey_statistics(frame)
        if self.kind != "features":
            return grey
        known = self.statistic
        peaks = np.array([float(np.max(auxiliary[name])) for name in known.peak_names])
        return join_features(join_tokens(auxiliary, known.token_names), peaks, grey, known.mean_T, known.basis_TP)

    def reset(self) -> None:
        """Forgets the window, for another stream."""
        self._strange.clear()


__all__ = [
    "DRIFT_FILE",
    "DRIFT_VERSION",
    "GREY_NAMES",
    "MAX_STATISTIC_BYTES",
    "STRANGE_SHARE",
    "WINDOW_FRAMES",
    "DriftMonitor",
    "DriftReading",
    "DriftStatistic",
    "Mixture",
    "grey_statistics",
    "join_features",
    "join_tokens",
]
