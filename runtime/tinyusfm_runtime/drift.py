"""Drift: do frames still look like the ones of the calibration?

The frames of a stream against the ones the model was calibrated on.

Each frame gets a score, the negative log-likelihood of a Gaussian mixture (in the spirit of the NRQ score of
US-Metrics, arXiv:2604.19512) over what the graph gives anyway: the mean patch token after some blocks, the largest
absolute value of some tensors, and a few grey-level statistics of the frame. An artefact without these outputs is
watched by its grey levels alone, and says so. A frame is strange above a conformal threshold (Vovk et al. 2005) set
on patients that the mixture never saw; a stream has drifted when half of the last frames are strange. Frames of one
patient resemble each other, so nothing is assumed about that: by Markov's inequality half of a window is strange at
most twice as often as one frame is.

Arithmetic as in exact.py: doubles in a fixed order, no maths library; runtime/capi/src/drift.c is the same to the byte.
It does not know how a mixture is fitted (tinyusfm_calibration/drift_fit.py), and it never stops a stream.

Shapes: HW = rows, columns; F features, K components, T token numbers, P principal directions.
"""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from tinyusfm_runtime.bundle.arrays import ArrayLimits, pack_arrays, unpack_arrays
from tinyusfm_runtime.bundle.manifest import DRIFT_FILE
from tinyusfm_runtime.errors import BundleError, InputError
from tinyusfm_runtime.frame import Frame, PixelFormat
from tinyusfm_runtime.numerics import exact
from tinyusfm_runtime.results import DriftReading
from tinyusfm_runtime.strict_json import parse_json

if TYPE_CHECKING:
    from tinyusfm_runtime.results import Prediction

DRIFT_VERSION: Final = 1
"""Version of that file; raise it when a feature changes its meaning."""
WINDOW_FRAMES: Final = 25
"""Frames that decide together: about a second of a stream."""
MAX_STATISTIC_BYTES: Final = 16 << 20
"""Unpacked; the shipped one is below 1 MB."""

GREY_NAMES: Final = (
    "grey mean", "grey p10", "grey p50", "grey p90", "grey p99", "black share", "row steps", "column steps", "colour",
)  # fmt: skip
"""What ``grey_statistics`` gives, in order."""
_LOG_TWO_PI: Final = 1.8378770664093453
_LEAST = 1e-300  # of a spread or a weight: exact.log takes no subnormal number
_OFFSET = 1e-6  # logarithms of lengths and peaks begin here
_GREY_SIDE = 256
_BLACK = 8
_COLOURED = 24
"""Codes below which a pixel is black, and channels this far apart are colour (a JPEG's grey is off by a few)."""


def grey_statistics(frame: Frame) -> np.ndarray:
    """A frame's brightness and colour in a few numbers.

    From every n-th pixel so that the longer side is 256 to 511.

    Whole numbers up to the last division: a colour pixel's brightness is a third of the sum of its channels.

    Args:
        frame: any frame; its crop has been applied.

    Returns:
        float64 (9,), see GREY_NAMES: mean, percentiles (linear between neighbouring samples), share of black pixels,
        mean absolute steps along rows and columns, all as shares of 255; share of coloured pixels.
    """
    stride = max(1, max(frame.pixels.shape[:2]) // _GREY_SIDE)
    pixels = frame.pixels[::stride, ::stride]
    colour, parts = 0.0, 1
    if frame.pixel_format is PixelFormat.GREY:
        levels = pixels.astype(np.int32)
    else:
        channels = pixels[:, :, :3].astype(np.int32)
        colour = float(np.count_nonzero(np.ptp(channels, axis=2) > _COLOURED)) / float(channels[:, :, 0].size)
        levels, parts = channels.sum(axis=2, dtype=np.int32), 3
    counts = np.bincount(levels.ravel(), minlength=255 * parts + 1)
    total, whole = int(levels.size), 255.0 * parts
    mean = float(counts @ np.arange(len(counts))) / float(total) / whole
    below = np.cumsum(counts)
    percentiles = [_percentile(below, total, share) / whole for share in (10, 50, 90, 99)]
    black = float(below[_BLACK * parts - 1]) / float(total)
    steps = [_mean_step(levels, axis) / whole for axis in (1, 0)]
    return np.array([mean, *percentiles, black, *steps, colour])


def _percentile(below: np.ndarray, total: int, share: int) -> float:
    """Linear between neighbouring samples; ``below[v]`` samples are at most v."""
    place = (total - 1) * share
    first, rest = place // 100, place % 100
    low = int(np.searchsorted(below, first, side="right"))
    high = int(np.searchsorted(below, min(first + 1, total - 1), side="right"))
    return float(low) + float(high - low) * (float(rest) / 100.0)


def _mean_step(levels: np.ndarray, axis: int) -> float:
    steps = np.abs(np.diff(levels, axis=axis))
    return float(int(steps.sum(dtype=np.int64))) / float(steps.size) if steps.size else 0.0


def _sums(values_NM: np.ndarray) -> np.ndarray:
    """Sum of each row from left to right."""
    found: np.ndarray = np.cumsum(values_NM, axis=1)[:, -1]
    return found


@dataclass(frozen=True, kw_only=True, slots=True)
class Mixture:
    """A Gaussian mixture over standardised features, and its threshold.

    The covariances are diagonal, the threshold is conformal.

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
        if any((array < _LEAST).any() for array in (self.scale_F, self.spreads_KF, self.weights_K)):
            raise BundleError("the drift statistic's mixture has spreads or weights that are not positive")
        if not math.isfinite(self.threshold):
            raise BundleError("the drift statistic has no finite threshold")

    def standardise(self, features_F: np.ndarray) -> np.ndarray:
        """Features as multiples of their spread on the calibration frames."""
        standard: np.ndarray = (features_F - self.centre_F) / self.scale_F
        return standard

    def score(self, features_F: np.ndarray) -> float:
        """Negative log-likelihood of one frame, in nats; high is strange."""
        with np.errstate(over="ignore"):  # a frame farther off than numbers go is infinitely strange
            gaps_KF = (self.standardise(features_F) - self.means_KF) / self.spreads_KF
            chances_K = self._bases() - 0.5 * _sums(gaps_KF * gaps_KF)
        top = float(chances_K.max())
        if top == -math.inf:
            return math.inf
        total = float(_sums(exact.exp(chances_K - top)[None])[0])
        return 0.5 * float(len(self.centre_F)) * _LOG_TWO_PI - top - exact.log(total)

    def _bases(self) -> np.ndarray:
        """Logarithm of each component's weight over the product of its spreads."""
        logs_KF = np.array([[exact.log(spread) for spread in row] for row in self.spreads_KF.tolist()])
        weights_K: np.ndarray = np.array([exact.log(weight) for weight in self.weights_K.tolist()])
        return weights_K - _sums(logs_KF)


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
        fits = self.basis_TP.shape[:1] == self.mean_T.shape and 0 not in self.basis_TP.shape
        if not fits or len(self.features.centre_F) != wanted:
            raise BundleError("the drift statistic's projection and mixture do not fit: export the bundle again")
        if not np.isfinite(self.basis_TP).all() or not np.isfinite(self.mean_T).all() or not self.token_names:
            raise BundleError("the drift statistic's projection is not usable: export the bundle again")

    @property
    def auxiliary(self) -> tuple[str, ...]:
        """Outputs of the graph that the features need.

        Empty where only grey levels are watched.
        """
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
        arrays = unpack_arrays(raw, DRIFT_FILE, limits=ArrayLimits(total_bytes=MAX_STATISTIC_BYTES))
        try:
            head = parse_json(arrays["head"].tobytes().decode("ascii"))
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
        float64 (T,); zeros where all tokens are zero.
    """
    joined_T = np.concatenate([np.asarray(auxiliary[name], np.float32).ravel() for name in names]).astype(np.float64)
    length = math.sqrt(float(_sums((joined_T * joined_T)[None])[0])) if joined_T.size else 0.0
    unit: np.ndarray = joined_T / (length or 1.0)
    return unit


def join_features(
    tokens_T: np.ndarray, peaks: np.ndarray, grey: np.ndarray, mean_T: np.ndarray, basis_TP: np.ndarray
) -> np.ndarray:
    """Features of one frame.

    Principal components, what they leave over, peaks, grey levels.

    Args:
        tokens_T: see ``join_tokens``.
        peaks: largest absolute values, from 0 up.
        grey: see ``grey_statistics``.
        mean_T: mean of the tokens on the calibration frames.
        basis_TP: principal directions.

    Returns:
        float64 (F,); lengths and peaks as natural logarithms, since they spread by factors.
    """
    gap_T = tokens_T.astype(np.float64) - mean_T.astype(np.float64)
    wide_TP = basis_TP.astype(np.float64)
    inside_P = np.cumsum(gap_T[:, None] * wide_TP, axis=0)[-1]
    rest_T = gap_T - _sums(wide_TP * inside_P[None])
    left = math.sqrt(float(_sums((rest_T * rest_T)[None])[0]))
    spread = [exact.log(max(float(size), 0.0) + _OFFSET) for size in (left, *np.asarray(peaks, np.float64).tolist())]
    return np.concatenate([inside_P, spread, grey])


class DriftCheck:
    """Compares single frames with the calibration frames.

    Knows nothing of the stream they come from.

    Args:
        statistic: of the bundle.
        auxiliary: outputs that the artefact gives beside the logits.
    """

    def __init__(self, statistic: DriftStatistic, auxiliary: Collection[str] = ()) -> None:
        self.statistic = statistic
        whole = statistic.features is not None and set(statistic.auxiliary) <= set(auxiliary)
        self.kind = "features" if whole else "grey levels"
        self.mixture = statistic.features if whole and statistic.features is not None else statistic.grey
        names = [f"token direction {i + 1}" for i in range(statistic.basis_TP.shape[1])]
        self._names = (*names, "token remainder", *statistic.peak_names, *GREY_NAMES) if whole else GREY_NAMES

    @property
    def needs(self) -> tuple[str, ...]:
        """Auxiliary outputs it reads of a prediction.

        Another artefact of the bundle may not give them.
        """
        return self.statistic.auxiliary if self.kind == "features" else ()

    def look(self, auxiliary: Mapping[str, np.ndarray], frame: Frame, *, valid: bool = True) -> DriftReading:
        """How strange one frame is.

        Args:
            auxiliary: the graph's further outputs.
            frame: the frame.
            valid: whether all outputs were finite; what is not is infinitely strange.

        Returns:
            A reading of this frame alone, which is never an alarm.
        """
        score, strangest = math.inf, "the model's output is not finite"
        if valid:
            features_F = self.features(auxiliary, frame)
            score = self.mixture.score(features_F)
            strangest = self._names[int(np.abs(self.mixture.standardise(features_F)).argmax())]
        return DriftReading(
            kind=self.kind,
            score=score,
            threshold=self.mixture.threshold,
            share=float(score > self.mixture.threshold),
            frames=1,
            window=WINDOW_FRAMES,
            strangest=strangest,
        )

    def features(self, auxiliary: Mapping[str, np.ndarray], frame: Frame) -> np.ndarray:
        """The numbers a frame is judged by.

        Args:
            auxiliary: the graph's further outputs.
            frame: the frame.

        Returns:
            float64 (F,).

        Raises:
            BundleError: the artefact gives other tokens than the statistic was made of.
        """
        grey = grey_statistics(frame)
        if self.kind != "features":
            return grey
        known = self.statistic
        tokens_T = join_tokens(auxiliary, known.token_names)
        if tokens_T.shape != known.mean_T.shape or any(not np.size(auxiliary[name]) for name in known.peak_names):
            raise BundleError("the drift statistic was made of other tokens than the artefact gives: export it again")
        peaks = np.array([float(np.max(auxiliary[name])) for name in known.peak_names])
        return join_features(tokens_T, peaks, grey, known.mean_T, known.basis_TP)


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
        self._check = DriftCheck(statistic, auxiliary)
        self._window = window
        self._strange: deque[bool] = deque(maxlen=window)

    @property
    def kind(self) -> str:
        """``features``, or ``grey levels`` where the artefact gives no features."""
        return self._check.kind

    @property
    def description(self) -> str:
        """What is watched and how often it alarms without drift, one line."""
        why = "" if self.kind == "features" else " alone (the artefact gives no features)"
        return f"watched by {self.kind}{why}, at most {self.statistic.false_alarms:.0%} false alarms a window"

    @property
    def needs(self) -> tuple[str, ...]:
        """Auxiliary outputs it reads of a prediction.

        Another artefact of the bundle may not give them.
        """
        return self._check.needs

    def observe(self, prediction: Prediction, frame: Frame) -> DriftReading:
        """Takes one more frame into account.

        Args:
            prediction: the session's answer to it; what it says of the frame's drift is taken over.
            frame: the frame.

        Returns:
            The reading after it.
        """
        known = prediction.drift
        if known is None or known.kind != self.kind:
            known = self._check.look(prediction.auxiliary, frame, valid=prediction.valid)
        self._strange.append(known.strange)
        count = len(self._strange)
        return replace(known, share=sum(self._strange) / count, frames=count, window=self._window)

    def features(self, auxiliary: Mapping[str, np.ndarray], frame: Frame) -> np.ndarray:
        """The numbers a frame is judged by; see ``DriftCheck.features``."""
        return self._check.features(auxiliary, frame)

    def reset(self) -> None:
        """Forgets the window, for another stream."""
        self._strange.clear()


__all__ = [
    "DRIFT_FILE",
    "DRIFT_VERSION",
    "GREY_NAMES",
    "MAX_STATISTIC_BYTES",
    "WINDOW_FRAMES",
    "DriftCheck",
    "DriftMonitor",
    "DriftStatistic",
    "Mixture",
    "grey_statistics",
    "join_features",
    "join_tokens",
]
