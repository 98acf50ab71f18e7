"""An artefact in its own engine.

The runtime's engine plug-in on the artefact's bytes, as a user's session runs it.

It does not know gates, bundles or PyTorch.

Shapes: NCHW input, S frames.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from tinyusfm_export.verify.parity import Output, read_exits, read_output
from tinyusfm_runtime import plugins
from tinyusfm_runtime.early_exit import EXIT_NAME, ChainEngine
from tinyusfm_runtime.engines import Engine, EngineConfig
from tinyusfm_runtime.errors import MissingExtra, UnsupportedError
from tinyusfm_runtime.frame import Frame
from tinyusfm_runtime.numerics.preprocess import Placement, preprocess
from tinyusfm_runtime.session import make_engine
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
        rest_precision: ``f32``, ``f16`` or ``bf16``.

    Raises:
        MissingExtra: the engine's library is not installed.
        EngineError: the library refused the model.
        UnsupportedError: this machine cannot run it.
    """
    found = plugins.available("engines", name)
    if not found.usable:
        public = plugins.public_name(plugins.canonical("engines", name))
        if found.extra and found.reason.endswith("is not installed"):
            raise MissingExtra(f"running an artefact for {public}", found.reason.split()[0], found.extra)
        raise UnsupportedError(f"the engine of {public} does not work here: {found.reason}")
    engine = make_engine(plugins.canonical("engines", name), files)
    try:
        engine.load(files, spec, EngineConfig(threads=threads, rest_precision=rest_precision))
        yield engine
    finally:
        engine.close()


@contextmanager
def open_checker(
    target: str, files: Mapping[str, bytes], spec: ModelSpec, *, threads: int, rest_precision: str
) -> Iterator[Engine]:
    """Loads an artefact into what judges it at export.

    Its own engine, or its target's stand-in.

    Args:
        target: name or alias.
        files: file name -> content.
        spec: the model.
        threads: threads inside the engine.
        rest_precision: arithmetic of what is not int8.

    Raises:
        MissingExtra: a library is not installed.
        EngineError: the library refused the model.
        UnsupportedError: this machine cannot run it.
    """
    stand_in = stand_in_of(target)
    if stand_in is None:
        with open_engine(target, files, spec, threads=threads, rest_precision=rest_precision) as engine:
            yield engine
        return
    made: Engine = stand_in()
    try:
        made.load(files, spec, EngineConfig(threads=threads, rest_precision=rest_precision))
        yield made
    finally:
        made.close()


def stand_in_of(target: str) -> Any:
    """The class that stands in for a target's engine, or None.

    It is used where the engine cannot run at export.
    """
    return getattr(plugins.load("targets", target), "StandIn", None)


def preprocess_all(frames: Sequence[Frame], spec: ModelSpec) -> list[tuple[np.ndarray, Placement]]:
    """Frames as inputs.

    Args:
        frames: any frames.
        spec: the model.

    Raises:
        FrameError: a frame does not fit the spec's crop.
    """
    return [preprocess(frame, spec.preprocess) for frame in frames]


def run_engine(engine: Engine, spec: ModelSpec, inputs: Inputs, frames: Sequence[Frame] = ()) -> list[Output]:
    """Runs a loaded artefact.

    Args:
        engine: a loaded engine.
        spec: the model.
        inputs: preprocessed frames.
        frames: the frames themselves, for the second pass; without them there is none.

    Returns:
        One output a frame, arrays copied out of the engine.

    Raises:
        EngineError: the engine failed, its logits have another shape than the model's, or a chain stopped where its own
            rule does not.
    """
    outputs = []
    for number, (tensor, placement) in enumerate(inputs):
        if isinstance(engine, ChainEngine):
            logits_1EK, found = engine.run_checked(np.ascontiguousarray(tensor))
            outputs.append(read_exits(logits_1EK, spec, placement, exit_index=int(found[EXIT_NAME][0])))
            continue
        frame = frames[number] if frames else None
        raw = _copied(engine, tensor)
        outputs.append(
            read_output(raw, spec, placement, tensor=tensor, frame=frame, run=lambda again: _copied(engine, again))
        )
    return outputs


def _copied(engine: Engine, tensor: np.ndarray) -> dict[str, np.ndarray]:
    return {name: np.array(value) for name, value in engine.run(np.ascontiguousarray(tensor)).items()}


__all__ = ["Inputs", "open_checker", "open_engine", "preprocess_all", "run_engine", "stand_in_of"]
