"""Ranges: what each quantized tensor's values span, and which frames said so.

collect_ranges observes them.

The model is a callable handed in, so that nothing here needs torch. There is no default range and no fallback:
without frames that may be used, the answer is a CalibrationError.

Shapes: NCHW, the model's input tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tinyusfm_calibration.methods import find_range
from tinyusfm_calibration.observe import Histogram
from tinyusfm_calibration.sets import CalibrationSet
from tinyusfm_runtime.errors import CalibrationError
from tinyusfm_runtime.strict_json import refusing

RANGES_VERSION = 1
"""Version of the JSON that ``Ranges.to_json`` writes."""

SPAN = ".span"
"""Ending of a name under which only the smallest and largest value is kept, whatever the method."""

Taps = Callable[[np.ndarray], Mapping[str, np.ndarray]]
"""Runs the model on one uint8 NCHW input and returns the tensors to observe by name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ranges:
    """Activation ranges of one model.

    Attributes:
        tensors: tensor name -> (low, high), low <= 0 <= high.
        method: minmax, percentile, entropy or mse.
        set_id: id of the calibration set.
        frame_sha256: hashes the set's frames are known by (files and pixels), hex, sorted.
        weights_sha256: hash of the weights file they belong to, hex; empty if unknown.
        version: of the JSON form.
    """

    tensors: Mapping[str, tuple[float, float]]
    method: str
    set_id: str
    frame_sha256: tuple[str, ...]
    weights_sha256: str = ""
    version: int = RANGES_VERSION

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            CalibrationError: another version, no tensors, or a range that is empty, not finite or without zero.
        """
        if self.version != RANGES_VERSION:
            raise CalibrationError(f"ranges version {self.version} is not {RANGES_VERSION}: calibrate again")
        if not self.tensors or not self.set_id or not self.frame_sha256:
            raise CalibrationError("ranges name no tensors, no set or no frames: calibrate again")
        for name, (low, high) in self.tensors.items():
            if not (math.isfinite(low) and math.isfinite(high) and low <= 0.0 <= high and low < high):
                raise CalibrationError(f"range of tensor {name!r} is [{low}, {high}]: it must be finite and hold zero")

    def to_json(self) -> dict[str, Any]:
        """Plain data, ready for ``json.dumps``."""
        return {
            "version": self.version,
            "method": self.method,
            "set_id": self.set_id,
            "weights_sha256": self.weights_sha256,
            "frame_sha256": list(self.frame_sha256),
            "tensors": {name: [low, high] for name, (low, high) in sorted(self.tensors.items())},
        }

    @classmethod
    @refusing("the ranges", CalibrationError)
    def from_json(cls, data: dict[str, Any]) -> Ranges:
        """Reads what ``to_json`` wrote.

        Raises:
            CalibrationError: unknown or missing keys, or values that cannot be ranges.
        """
        wanted = {"version", "method", "set_id", "weights_sha256", "frame_sha256", "tensors"}
        if set(data) != wanted:
            raise CalibrationError(f"ranges have unknown or missing keys {sorted(set(data) ^ wanted)}")
        try:
            tensors = {str(name): (float(low), float(high)) for name, (low, high) in data["tensors"].items()}
            return cls(
                tensors=tensors,
                method=str(data["method"]),
                set_id=str(data["set_id"]),
                frame_sha256=tuple(str(h) for h in data["frame_sha256"]),
                weights_sha256=str(data["weights_sha256"]),
                version=int(data["version"]),
            )
        except (AttributeError, TypeError, ValueError) as error:
            raise CalibrationError(f"ranges are not usable: {error}") from error


@dataclass(kw_only=True, slots=True)
class Observer:
    """Histograms of all tapped tensors over a stream of frames.

    Attributes:
        histograms: tensor name -> histogram.
        spans: name that ends in ``SPAN`` -> smallest and largest value.
        num_frames: frames seen.
    """

    histograms: dict[str, Histogram] = field(default_factory=dict)
    spans: dict[str, tuple[float, float]] = field(default_factory=dict)
    num_frames: int = 0

    def add(self, tensors: Mapping[str, np.ndarray]) -> None:
        """Counts one frame's tensors.

        Raises:
            CalibrationError: no tensors, other tensors than on the first frame, or NaN or infinity in one.
        """
        if not tensors or (self.num_frames and set(tensors) != {*self.histograms, *self.spans}):
            raise CalibrationError("the model gave no tensors to observe, or not the same ones on every frame")
        for name, values in tensors.items():
            if name.endswith(SPAN):
                self._widen(name, values)
            else:
                self.histograms.setdefault(name, Histogram(name=name)).add(values)
        self.num_frames += 1

    def tensors(self, method: str) -> dict[str, tuple[float, float]]:
        """Low and high of everything that was observed.

        Args:
            method: minmax, percentile, entropy or mse; spans are always min-max.

        Raises:
            CalibrationError: a tensor that is always zero.
            InputError: no such method.
        """
        return {**{name: find_range(found, method) for name, found in self.histograms.items()}, **self.spans}

    def _widen(self, name: str, values: np.ndarray) -> None:
        if not np.isfinite(values).all():
            raise CalibrationError(f"tensor {name!r} holds NaN or infinity: leave that frame out")
        low, high = self.spans.get(name, (0.0, 0.0))
        self.spans[name] = min(low, float(values.min())), max(high, float(values.max()))


def collect_ranges(
    run_with_taps: Taps,
    inputs_NCHW: Iterable[np.ndarray],
    calibration: CalibrationSet,
    *,
    method: str = "percentile",
    weights_sha256: str = "",
) -> Ranges:
    """Finds the range of each tapped tensor.

    The model is observed on the calibration frames.

    Args:
        run_with_taps: the model.
        inputs_NCHW: uint8 inputs, one for each frame of the set, in the set's order.
        calibration: names and hashes of these frames.
        method: minmax, percentile, entropy or mse.
        weights_sha256: hash of the weights file, hex.

    Returns:
        The ranges; the order of the frames makes no difference to the numbers.

    Raises:
        CalibrationError: another number of inputs than frames, NaN, or a tensor that is always zero.
        InputError: no such method.
    """
    observer = Observer()
    for tensor in inputs_NCHW:
        observer.add(run_with_taps(tensor))
    if observer.num_frames == 0 or observer.num_frames != len(calibration.ids):
        raise CalibrationError(
            f"{observer.num_frames} inputs for the {len(calibration.ids)} frames of set {calibration.name!r}: "
            "the inputs may be an exhausted generator"
        )
    return Ranges(
        tensors=observer.tensors(method),
        method=method,
        set_id=calibration.id,
        frame_sha256=tuple(sorted(calibration.hashes)),
        weights_sha256=weights_sha256,
    )


__all__ = ["RANGES_VERSION", "SPAN", "Observer", "Ranges", "Taps", "collect_ranges"]
