"""An artefact in its own engine: the runtime's engine plug-in on the artefact's bytes, as a user's session runs it.

It does not know gates, bundles or PyTorch.

Shapes: NCHW input, S frames.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np

from tinyusfm_export.parity import Output, read_output
from tinyusfm_runtime import plugins
from tinyusfm_runtime.engine import Engine, EngineConfig
from tinyusfm_runtime.errors import EngineError, MissingExtra
from tinyusfm_runtime.frame import Frame
from tinyusfm_runtime.preprocess import Placement, preprocess
from tinyusfm_runtime.spec import ModelSpec

Inputs = Sequence[tuple[np.ndarray, Placement]]
"""Preprocessed frames: uint8 NCHW tensor and where the frame lies in it."""


@contextmanager
def open_engine(
    name: str, files: Mapping[str, bytes], spec: ModelSpec, *, threads: int, rest_precision: str
) -> Iterator[Engine]:
    """Loads an artefact into its engine and closes it afterwards.

    Args:
        name: engine or target name, such as ``ov`` or ``openvino``.
        files: file name -> content.
        spec: the model.
        threads: threads inside the engine.
        rest_precision: ``f32`` or ``bf16``.

    Raises:
        MissingExtra: the engine's library is not installed.
        EngineError: the library refused the model.
        UnsupportedError: this machine cannot run it.
    """
    found = plugins.probe("engines", name)
    if not found.works:
        public = plugins.public_name(plugins.canonical("engines", name))
        if found.extra and found.reason.endswith("is not installed"):
            raise MissingExtra(f"running an artefact for {public}", found.reason.split()[0], found.extra)
        raise EngineError(f"the engine of {public} does not work here: {found.reason}")
    engine: Engine = plugins.load("engines", name).Engine()
    try:
        engine.load(files, spec, EngineConfig(threads=threads, rest_precision=rest_precision))
        yield engine
    finally:
        engine.close()


def preprocess_all(frames: Sequence[Frame], spec: ModelSpec) -> list[tuple[np.ndarray, Placement]]:
    """Frames as inputs.

    Args:
        frames: any frames.
        spec: the model.

    Raises:
        FrameError: a frame does not fit the spec's crop.
    """
    return [preprocess(frame, spec.preprocess) for frame in frames]


def run_engine(engine: Engine, spec: ModelSpec, inputs: Inputs) -> list[Output]:
    """Runs a loaded artefact.

    Args:
        engine: a loaded engine.
        spec: the model.
        inputs: preprocessed frames.

    Returns:
        One output a frame, arrays copied out of the engine.

    Raises:
        EngineError: the engine failed, or its logits have another shape than the model's.
    """
    outputs = []
    for tensor, placement in inputs:
        raw = {name: np.array(value) for name, value in engine.run(np.ascontiguousarray(tensor)).items()}
        outputs.append(read_output(raw, spec, placement))
    return outputs


__all__ = ["Inputs", "open_engine", "preprocess_all", "run_engine"]
