"""Engine ``integer``: a model in integers alone.

The same bytes on every CPU, without any inference library.

The compiled implementation (runtime/capi/integer_*.c) is used where the kernels are built; else numpy computes the
same bytes, two orders of magnitude slower, and the description says so. docs/reference/integer.md defines every
operation. It does not know how a model is made.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping

import numpy as np

from tinyusfm_runtime.engines import EngineConfig
from tinyusfm_runtime.engines.integer import compiled
from tinyusfm_runtime.engines.integer.execute import Definition
from tinyusfm_runtime.engines.integer.layout import MODEL_VERSION, TYPES, Ports
from tinyusfm_runtime.engines.integer.model_file import read_model, read_ports, read_tensors
from tinyusfm_runtime.errors import EngineError
from tinyusfm_runtime.plugins import Availability
from tinyusfm_runtime.spec import ModelSpec, TensorSpec

MODEL_FILE, DESCRIPTION_FILE = "model.safetensors", "model.json"
"""The two files of an artefact; the second is for people and tools and not computed with."""
LIBRARY_VERSION = f"{MODEL_VERSION}"
"""Version of the arithmetic: artefacts of one version give the same bytes forever."""
CHAINS = True
"""This engine runs the later stages of a chain as well, see chain.py."""
EXACT = True
"""Every implementation on every CPU gives the same bytes, so golden vectors are compared for equality."""


def available() -> Availability:
    """Tells whether this engine can run here, and how fast; never raises."""
    if not compiled.available():
        return Availability(
            usable=True, reason=f"numpy definition, slow and bit-identical: kernels {compiled.reason()}"
        )
    return Availability(
        usable=True, reason=f"own kernels ({compiled.instruction_sets()[0]}), bit-identical on every CPU"
    )


class Engine:
    """One integer model, compiled or in numpy (see engines.Engine).

    Args:
        isa: instruction set, one of ``compiled.instruction_sets()``, or ``numpy``; empty takes the fastest.
    """

    def __init__(self, isa: str = "") -> None:
        self._isa = isa
        self._runner: compiled.CompiledModel | Definition | None = None
        self._takes: TensorSpec | None = None
        self._reuse = False
        self._cancelled = threading.Event()
        self._description = "integer engine, not loaded"
        self.executed = "integers from pixels to logits"
        """What it is computed in."""

    @property
    def description(self) -> str:
        """Implementation, instruction set and threads really in use, one line."""
        return self._description

    def load(self, files: Mapping[str, bytes], spec: ModelSpec, config: EngineConfig) -> None:
        """Checks and packs the model (see engines.Engine)."""
        if MODEL_FILE not in files or not set(files) <= {MODEL_FILE, DESCRIPTION_FILE}:
            got = ", ".join(sorted(files)) or "nothing"
            raise EngineError(f"the integer engine needs {MODEL_FILE} and {DESCRIPTION_FILE}, got {got}")
        tensors = read_tensors(files[MODEL_FILE])
        ports, takes = read_ports(tensors), config.takes or spec.input
        _check_interface(ports, takes)
        if self._isa == "numpy" or not compiled.available():
            self._runner = Definition(read_model(tensors))
            why = "as asked" if self._isa == "numpy" else f"kernels {compiled.reason()}"
            self._description = f"integer engine {LIBRARY_VERSION}, numpy definition (slow: {why}), bit-identical"
        else:
            self._runner = compiled.CompiledModel(tensors, ports, threads=config.threads, isa=self._isa)
            self._description = f"integer engine {LIBRARY_VERSION}, {self._runner.description}, bit-identical"
        self._takes, self._reuse = takes, config.reuse_outputs

    def run(self, tensor: np.ndarray) -> dict[str, np.ndarray]:
        """Computes one answer (see engines.Engine)."""
        if self._runner is None or self._takes is None:
            raise EngineError("the integer engine is not loaded")
        if tensor.shape != self._takes.shape or tensor.dtype != self._takes.dtype:
            wanted = f"{self._takes.dtype} {self._takes.shape}"
            raise EngineError(f"the integer engine takes {wanted}, not {tensor.dtype} {tensor.shape}")
        if isinstance(self._runner, Definition):
            self._cancelled.clear()
            answers = self._runner.run(tensor, self._cancelled.is_set)
        else:
            answers = self._runner.run(np.ascontiguousarray(tensor), reuse=self._reuse)
        if answers is None:
            raise EngineError("the integer engine was cancelled")
        return answers

    def cancel(self) -> None:
        """Stops a run in progress between two operations (see engines.Engine)."""
        self._cancelled.set()
        runner = self._runner
        if isinstance(runner, compiled.CompiledModel):
            runner.cancel()

    def close(self) -> None:
        """Frees the model."""
        runner, self._runner = self._runner, None
        if isinstance(runner, compiled.CompiledModel):
            runner.close()


def make_definition() -> Engine:
    """The same engine in numpy, whatever is compiled.

    Every implementation is compared with it.
    """
    return Engine(isa="numpy")


def _check_interface(model: Ports, takes: TensorSpec) -> None:
    got = (model.input.name, np.dtype(TYPES[model.input.dtype]).name, model.input.shape)
    wanted = (takes.name, takes.dtype, tuple(takes.shape))
    if got != wanted:
        raise EngineError(f"the model's input is {got}; the manifest says {wanted}")
    if model.outputs[0].name != "logits":
        raise EngineError(f"the model's first output is {model.outputs[0].name}, not logits")


__all__ = [
    "CHAINS",
    "DESCRIPTION_FILE",
    "EXACT",
    "LIBRARY_VERSION",
    "MODEL_FILE",
    "Engine",
    "available",
    "make_definition",
]
