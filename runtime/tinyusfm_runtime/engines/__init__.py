"""Engine: what the runtime asks of an inference library, and nothing more.

One file in ``engines/`` wraps one library. An engine turns verified bytes into a loaded model and
a tensor into outputs. It does not know bundles, frames, golden vectors or post-processing, and it
does not check values: Session does, since libraries differ in what they let through.

Shapes: NCHW = 1, channels, rows, columns; NKHW = 1, classes, rows, columns; NK = 1, classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from tinyusfm_runtime.errors import InputError
from tinyusfm_runtime.spec import REST_PRECISIONS, ModelSpec, TensorSpec

MAX_THREADS = 1024
"""More threads than any board has: a larger number is a typing error."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """How an engine is to run. Nothing is left to a library's default.

    Attributes:
        threads: threads inside one operator, at least 1.
        rest_precision: ``f32``, ``f16`` or ``bf16``, set explicitly; some libraries choose silently.
        reuse_outputs: ``run`` may answer in the same arrays every time; the next run overwrites them.
        int8_layers: least layers of a quantised graph that must run in 8 bits, where the library tells; 0 takes any.
        takes: what the graph takes where that is not the model's image: a later stage of a chain (chain.py).
    """

    threads: int
    rest_precision: str
    reuse_outputs: bool = False
    int8_layers: int = 0
    takes: TensorSpec | None = None

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            InputError: a value no engine can use.
        """
        if isinstance(self.threads, bool) or not isinstance(self.threads, int) or not 1 <= self.threads <= MAX_THREADS:
            raise InputError(f"threads must be a whole number from 1 to {MAX_THREADS}, not {self.threads!r}")
        if self.rest_precision not in REST_PRECISIONS:
            raise InputError(f"rest precision must be one of {', '.join(REST_PRECISIONS)}, not {self.rest_precision!r}")


@runtime_checkable
class Engine(Protocol):
    """One loaded model in one library.

    Use it from one thread; only ``cancel`` may come from another.
    """

    @property
    def description(self) -> str:
        """Library, version, device, precision and threads really in use, one line."""
        ...

    def load(self, files: Mapping[str, bytes], spec: ModelSpec, config: EngineConfig) -> None:
        """Builds the model from bytes that were already verified.

        Asserts the device it got.

        Args:
            files: file name (``model.onnx``, or ``model.xml`` and ``model.bin``) to content.
            spec: the model's input and task.
            config: threads and rest precision.

        Raises:
            MissingExtra: the library is not installed.
            UnsupportedError: this CPU or this library cannot do what the configuration asks.
            EngineError: the library refused the model, or gave another device or precision.
        """
        ...

    def run(self, tensor: np.ndarray) -> dict[str, np.ndarray]:
        """Computes one answer.

        Args:
            tensor: uint8 NCHW (or what ``takes`` says), C-contiguous, of the graph's own shape.

        Returns:
            ``logits`` (float32 NKHW or NK) first, then the auxiliary outputs. The caller owns the arrays, unless the
            configuration allowed ``reuse_outputs``: then they are good until the next run.

        Raises:
            EngineError: the library failed, or the run was cancelled.
        """
        ...

    def cancel(self) -> None:
        """Asks a run in progress to stop.

        It then raises EngineError. Without one, nothing happens.
        """
        ...

    def close(self) -> None:
        """Frees the model. Idempotent."""
        ...


def computes_in(rest_precision: str, *, quantised: bool) -> str:
    """What a graph computes in, in words for an engine's description.

    Args:
        rest_precision: ``f32``, ``f16`` or ``bf16``.
        quantised: the graph holds INT8 layers.
    """
    rest = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}[rest_precision]
    return f"INT8 (rest in {rest})" if quantised else rest


def one_line(error: object, limit: int = 300) -> str:
    """A library's error in one line for a message.

    Its text without line breaks and cut, or the name of its type.
    """
    return " ".join(str(error).split())[:limit] or type(error).__name__


__all__ = ["MAX_THREADS", "Engine", "EngineConfig", "computes_in", "one_line"]
