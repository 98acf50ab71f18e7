"""Results over time, outside the graph.

A steadier mask, a measurement that is held for a moment, and the flicker.

The prediction itself is never changed; what is made of it stands beside it as a ``SmoothedReading``. Everything
forgets when the image jumps: another size, another crop, or a pause longer than the hold. It knows no threads and no
engines.

Shapes: HW = rows, columns of the model's input; KHW = labels, rows, columns.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np

from tinyusfm_runtime.errors import InputError
from tinyusfm_runtime.numerics.order import wide
from tinyusfm_runtime.results import Prediction, SmoothedReading


@dataclass(frozen=True, kw_only=True, slots=True)
class TemporalOptions:
    """How much the past counts.

    Attributes:
        weight: share of the newest mask in the running mean of each label, above 0 up to 1; 1 smooths nothing.
        margin: lead in the running mean that another label needs before a pixel takes it, 0 to below 1; without it a
            pixel that is in and out in turn would stay so.
        median_of: measurements the shown one is the median of.
        hold_ms: how long the last measurement stands in for a missing one, and the longest pause that is bridged.
    """

    weight: float = 0.4
    margin: float = 0.3
    median_of: int = 5
    hold_ms: float = 300.0

    def __post_init__(self) -> None:
        """Checks the ranges.

        Raises:
            InputError: a value outside its range.
        """
        if not 0 < self.weight <= 1 or not 0 <= self.margin < 1 or self.median_of < 1 or self.hold_ms < 0:
            raise InputError(
                "temporal options: weight above 0 up to 1, margin 0 to below 1, median_of at least 1, hold_ms from 0 up"
            )


class Temporal:
    """Takes predictions in order and gives readings."""

    def __init__(self, options: TemporalOptions | None = None) -> None:
        self.options = options or TemporalOptions()
        self._mean_KHW: np.ndarray | None = None
        self._labels: np.ndarray = np.zeros(0, np.uint8)
        self._raw: np.ndarray | None = None
        self._smooth: np.ndarray | None = None
        self._where: object = None
        self._last_ns: int | None = None
        self._found: deque[tuple[int, float]] = deque(maxlen=self.options.median_of)

    def add(self, prediction: Prediction | None, now_ns: int) -> SmoothedReading:
        """Takes the next answer.

        Args:
            prediction: the answer, or None where there is none; one that is not valid counts as none.
            now_ns: ``time.monotonic_ns`` of the frame.

        Returns:
            What the last moments say.
        """
        hold_ns = int(self.options.hold_ms * 1e6)
        if self._last_ns is not None and now_ns - self._last_ns > hold_ns:
            self._forget()
        usable = prediction if prediction is not None and prediction.valid else None
        raw = smoothed = None
        if usable is not None and usable.mask_HW is not None:
            where = (usable.placement, usable.mask_HW.shape)
            if where != self._where:
                self._forget()
            self._where, self._last_ns = where, now_ns
            raw, smoothed = self._smoothed(usable.mask_HW)
        if usable is not None and usable.measurement is not None and usable.measurement.hc_mm is not None:
            self._found.append((now_ns, usable.measurement.hc_mm))
            self._last_ns = now_ns
        shown = None if usable is None or usable.mask_HW is None else self._smooth
        return self._reading(shown, (raw, smoothed), now_ns, hold_ns)

    def _forget(self) -> None:
        self._mean_KHW = self._raw = self._smooth = None
        self._found.clear()

    def _smoothed(self, mask_HW: np.ndarray) -> tuple[float | None, float | None]:
        labels = np.unique(wide(mask_HW))
        if self._mean_KHW is None or not np.isin(wide(labels), wide(self._labels)).all():
            self._widen(labels, mask_HW.shape)
        assert self._mean_KHW is not None
        fresh = self._labels[:, None, None] == mask_HW
        if self._smooth is None:
            self._mean_KHW[:] = fresh
        else:
            self._mean_KHW += np.float32(self.options.weight) * (fresh - self._mean_KHW)
        smooth = self._decided(self._mean_KHW)
        figures: tuple[float | None, float | None] = (None, None)
        if self._raw is not None and self._smooth is not None:
            figures = (flicker(self._raw, mask_HW), flicker(self._smooth, smooth))
        self._raw, self._smooth = mask_HW, smooth
        return figures

    def _decided(self, mean_KHW: np.ndarray) -> np.ndarray:
        best = mean_KHW.argmax(axis=0)
        if self._smooth is None:
            return self._labels[best]
        lead = mean_KHW.max(axis=0)
        for place, label in enumerate(self._labels):
            lead -= mean_KHW[place] * (self._smooth == label)
        return np.where(lead > self.options.margin, self._labels[best], self._smooth)

    def _widen(self, labels: np.ndarray, shape: tuple[int, ...]) -> None:
        """Makes room for labels that were not seen yet; the others keep their past."""
        known = np.union1d(wide(np.union1d(wide(self._labels), wide(labels))), [0]).astype(np.uint8)
        mean = np.zeros((len(known), *shape), np.float32)
        if self._mean_KHW is not None:
            mean[np.searchsorted(known, self._labels)] = self._mean_KHW
        self._labels, self._mean_KHW = known, mean

    def _reading(
        self, shown: np.ndarray | None, figures: tuple[float | None, float | None], now_ns: int, hold_ns: int
    ) -> SmoothedReading:
        if self._found and now_ns - self._found[-1][0] > hold_ns:
            self._found.clear()
        held_ns = now_ns - self._found[-1][0] if self._found else 0
        return SmoothedReading(
            mask_HW=None if shown is None else shown.copy(),
            hc_mm=float(np.median(wide([mm for _, mm in self._found]))) if self._found else None,
            held=held_ns > 0,
            held_ms=held_ns / 1e6,
            flicker=figures[0],
            flicker_smoothed=figures[1],
        )


def flicker(before_HW: np.ndarray, after_HW: np.ndarray) -> float:
    """How much of a mask changed from one frame to the next.

    Args:
        before_HW: label map.
        after_HW: label map of the same shape.

    Returns:
        1 - 2 |same label, not background| / (|before| + |after|): 0 if nothing changed, 1 if nothing stayed.
    """
    size = int(np.count_nonzero(before_HW)) + int(np.count_nonzero(after_HW))
    same = int(np.count_nonzero((before_HW == after_HW) & (before_HW != 0)))
    return 0.0 if size == 0 else 1.0 - 2.0 * same / size


__all__ = ["Temporal", "TemporalOptions", "flicker"]
