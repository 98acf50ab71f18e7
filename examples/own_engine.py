"""An engine of one's own: a bundle's ONNX file, run by the reference evaluator of the ``onnx`` package.

It is slow and exact. An entry point makes it an engine like the built-in ones; a distribution declares it with

    [project.entry-points."tinyusfm.engines"]
    onnx-reference = "own_engine"

Then ``tinyusfm-edge doctor`` lists it, and a bundle whose artefact names the engine ``onnx-reference`` runs on it,
golden frames first, like on any other.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import numpy as np

from tinyusfm_runtime import Availability, EngineError, ModelSpec
from tinyusfm_runtime.engines import EngineConfig
from tinyusfm_runtime.errors import MissingExtra


def available() -> Availability:
    """Whether the engine can work here; never raises."""
    try:
        import onnx
    except ImportError:
        return Availability(usable=False, reason="onnx is not installed", extra="export")
    return Availability(usable=True, reason=f"onnx {onnx.__version__}, reference evaluator")


class Engine:
    """One loaded model; the protocol of ``tinyusfm_runtime.engines.Engine``."""

    def __init__(self) -> None:
        self._evaluator: Any = None
        self._names: list[str] = []
        self._cancelled = threading.Event()
        self._running = False

    @property
    def description(self) -> str:
        """What really answers, one line."""
        return "onnx reference evaluator, CPU, f32"

    def load(self, files: Mapping[str, bytes], spec: ModelSpec, config: EngineConfig) -> None:
        """Builds the model from bytes that were already verified."""
        try:
            import onnx
            from onnx.reference import ReferenceEvaluator
        except ImportError as error:
            raise MissingExtra("the engine onnx-reference", "onnx", "export") from error
        model = onnx.load_model_from_string(files["model.onnx"])
        self._evaluator = ReferenceEvaluator(model)
        self._names = [output.name for output in model.graph.output]
        self._input = model.graph.input[0].name

    def run(self, tensor: np.ndarray) -> dict[str, np.ndarray]:
        """uint8 NCHW in, ``logits`` and auxiliary outputs by name out."""
        if self._evaluator is None:
            raise EngineError("the engine is closed")
        self._cancelled.clear()
        self._running = True
        try:
            outputs = self._evaluator.run(None, {self._input: tensor})
        except Exception as error:  # whatever the library raises becomes one line
            raise EngineError(f"the reference evaluator failed: {type(error).__name__}") from error
        finally:
            self._running = False
        if self._cancelled.is_set():
            raise EngineError("the run was cancelled")
        return dict(zip(self._names, outputs, strict=True))

    def cancel(self) -> None:
        """Asks a run in progress to stop; this library cannot, so its answer is thrown away."""
        if self._running:
            self._cancelled.set()

    def close(self) -> None:
        """Frees the model. Idempotent."""
        self._evaluator = None
