"""One input tensor for several models.

Where models agree on how a frame becomes an input, it is made once for all of them.

They agree where size, channels, aspect and crop are the same; mean and deviation are applied inside each graph and play
no part. Every frame gets a tensor of its own, never written to again, so a model that hangs in an earlier frame reads
what it was given. It knows no session and no loop.

Shapes: NCHW = 1, channels, rows, columns.
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np

from tinyusfm_runtime.frame import Frame
from tinyusfm_runtime.numerics.preprocess import Placement, preprocess
from tinyusfm_runtime.spec import PreprocessSpec


def agreement(spec: PreprocessSpec) -> tuple[Any, ...]:
    """What two models must agree on to take the same tensor.

    Args:
        spec: a model's preprocessing.

    Returns:
        Height, width, grey, aspect and crop; two models share a tensor where these are equal.
    """
    crop = None if spec.crop is None else tuple(spec.crop)
    return spec.height, spec.width, spec.grey, spec.aspect, crop


class SharedInput:
    """Keeps the input of the newest frame. Any thread may ask.

    Called as ``numerics.preprocess.preprocess`` is.

    Attributes:
        made: tensors that were computed so far.
        shared: how often one was handed out again.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._newest: dict[tuple[Any, ...], tuple[Frame, np.ndarray, Placement]] = {}
        self.made = self.shared = 0

    def __call__(
        self, frame: Frame, spec: PreprocessSpec, out: np.ndarray | None = None
    ) -> tuple[np.ndarray, Placement]:
        """Gives the model's input for a frame.

        Args:
            frame: any supported frame; the very object that another model is asked about gets the same tensor.
            spec: the model's preprocessing.
            out: not used: a tensor that others read is not filled again.

        Returns:
            uint8 tensor NCHW, not to be written to, and the placement.

        Raises:
            FrameError: the crop lies outside the frame.
        """
        key = agreement(spec)
        with self._lock:
            kept = self._newest.get(key)
            if kept is not None and kept[0] is frame:
                self.shared += 1
                return kept[1], kept[2]
        tensor, placement = preprocess(frame, spec)
        with self._lock:
            self._newest[key] = frame, tensor, placement
            self.made += 1
        return tensor, placement


__all__ = ["SharedInput", "agreement"]
