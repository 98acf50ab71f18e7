"""LiteRT on the CPU: ``model.tflite`` from memory, XNNPACK, no delegate beside it.

The model is checked strictly before the library sees a byte of it (graphs/tflite.py). int8 artefacts are
dynamic-range: weights are int8, activations float, and the kernel quantizes them row by row. LiteRT does not report
what its kernels compute in, so ``executed`` says what the file's types and the delegate's share tell. It computes in
float32 otherwise, so rest precisions bf16 and f16 are refused. A run cannot be interrupted: a cancelled one ends with
its last operator and its answer is discarded. It does not check tensor values (Session does).
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, BinaryIO

import numpy as np

from tinyusfm_runtime.device.forks import ForkMark
from tinyusfm_runtime.engines import EngineConfig, computes_in, one_line
from tinyusfm_runtime.errors import EngineError, MissingExtra, UnsupportedError
from tinyusfm_runtime.graphs.tflite import ReadOperator, check
from tinyusfm_runtime.plugins import Availability
from tinyusfm_runtime.spec import LOGITS_NAME, ModelSpec, TensorSpec

MODEL_FILE = "model.tflite"
"""The one file of an artefact."""
LIBRARY = "ai-edge-litert"
"""Distribution of the engine."""
CHAINS = True
"""This engine runs the later stages of a chain as well, see chain.py."""
DELEGATE = "XNNPACK"
"""What computes every operator that it takes; LiteRT's own kernels compute the others."""
_SAID = (b"INFO: Created TensorFlow Lite XNNPACK delegate", b"INFO: Initialized TensorFlow Lite runtime")
_LEFT: list[Any] = []  # interpreters of the parent, in a forked child


def import_litert() -> Any:
    """The module of LiteRT's interpreter.

    Raises:
        ImportError: LiteRT is not installed.
    """
    from ai_edge_litert import interpreter

    return interpreter


def library_version() -> str:
    """Version of the installed distribution, or ``not installed``."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(LIBRARY)
    except PackageNotFoundError:
        return "not installed"


def available() -> Availability:
    """Tells whether LiteRT can run here; never raises."""
    try:
        import_litert()
    except ImportError:
        return Availability(usable=False, reason="ai-edge-litert is not installed", extra="litert")
    except Exception as error:  # a broken installation may raise anything
        return Availability(usable=False, reason=f"ai-edge-litert is broken: {one_line(error)}", extra="litert")
    return Availability(usable=True, reason=f"ai-edge-litert {library_version()}, CPU ({DELEGATE})", extra="litert")


class Engine:
    """One LiteRT model in one interpreter."""

    def __init__(self) -> None:
        self._mark = ForkMark()
        self._interpreter: Any = None
        self._takes: TensorSpec | None = None
        self._input = 0
        self._outputs: list[tuple[str, int]] = []
        self._reuse = False
        self._answers: dict[str, np.ndarray] = {}
        self._running = self._cancelled = False
        self._description = "LiteRT, not loaded"
        self.executed = ""
        """What it is computed in, as far as file and library tell, one line."""

    @property
    def description(self) -> str:
        """Library, version, device, precision and threads, one line."""
        return self._description

    def load(self, files: Mapping[str, bytes], spec: ModelSpec, config: EngineConfig) -> None:
        """Builds the interpreter and asserts its ends (see engine.Engine)."""
        if config.rest_precision != "f32":
            raise UnsupportedError(
                f"LiteRT computes in f32 on a CPU here, not in {config.rest_precision}: take one that rests on f32"
            )
        if set(files) != {MODEL_FILE}:
            raise EngineError(f"LiteRT needs exactly {MODEL_FILE}, got {', '.join(sorted(files)) or 'nothing'}")
        takes = config.takes or spec.input
        operators = check(files[MODEL_FILE], takes, spec)
        try:
            library = import_litert()
        except ImportError as error:
            raise MissingExtra("running a litert artefact", LIBRARY, "litert") from error
        try:
            with _without_greeting():
                interpreter = library.Interpreter(model_content=bytes(files[MODEL_FILE]), num_threads=config.threads)
                interpreter.allocate_tensors()
            self._bind(interpreter, takes)
            outside = operators_outside(interpreter._get_ops_details(), [number for _, number in self._outputs])
        except EngineError:
            raise
        except Exception as error:  # the library raises ValueError and RuntimeError for everything
            raise EngineError(f"LiteRT cannot load the model: {one_line(error)}") from error
        self._reuse, self._mark = config.reuse_outputs, ForkMark()
        self.executed = executed_in(operators, outside)
        words = computes_in("f32", quantised=any(operator.weight == "int8" for operator in operators))
        threads = f"{config.threads} thread{'' if config.threads == 1 else 's'}"
        self._description = f"LiteRT {library_version()}, CPU with {DELEGATE}, {words}, {threads}"

    def run(self, tensor: np.ndarray) -> dict[str, np.ndarray]:
        """Computes one answer (see engine.Engine)."""
        if self._interpreter is None or self._takes is None:
            raise EngineError("the LiteRT engine is not loaded")
        self._mark.check("LiteRT")
        if tensor.shape != self._takes.shape or tensor.dtype != self._takes.dtype:
            wanted = f"{self._takes.dtype} {self._takes.shape}"
            raise EngineError(f"the LiteRT engine takes {wanted}, not {tensor.dtype} {tensor.shape}")
        self._cancelled, self._running = False, True
        try:
            self._interpreter.set_tensor(self._input, tensor)
            self._interpreter.invoke()
            answers = {name: self._answer(name, number) for name, number in self._outputs}
        except Exception as error:
            raise EngineError(f"LiteRT failed: {one_line(error)}") from error
        finally:
            self._running = False
        if self._cancelled:
            raise EngineError("LiteRT: the run was cancelled")
        return answers

    def cancel(self) -> None:
        """Discards the answer of a run in progress."""
        if self._running:
            self._cancelled = True

    def close(self) -> None:
        """Frees the interpreter; in a forked child it is left to its end."""
        if self._mark.forked and self._interpreter is not None:
            _LEFT.append(self._interpreter)  # freeing it would wait for threads that are not there
        self._interpreter = None
        self._outputs, self._answers = [], {}

    def _answer(self, name: str, number: int) -> np.ndarray:
        """A copy of an output, in the array kept for it where outputs are used again."""
        value: np.ndarray = self._interpreter.get_tensor(number)
        if not self._reuse:
            return value
        kept = self._answers.setdefault(name, value)
        if kept is not value:
            np.copyto(kept, value)
        return kept

    def _bind(self, interpreter: Any, takes: TensorSpec) -> None:
        inputs, outputs = interpreter.get_input_details(), interpreter.get_output_details()
        listed = [(item["name"], np.dtype(item["dtype"]).name, tuple(int(s) for s in item["shape"])) for item in inputs]
        wanted = [(takes.name, takes.dtype, tuple(takes.shape))]
        if listed != wanted:
            raise EngineError(f"the model's inputs are {listed}; the manifest says {wanted}")
        if outputs[0]["name"] != LOGITS_NAME or any(item["dtype"] is not np.float32 for item in outputs):
            raise EngineError(
                f"the model's first output is {outputs[0]['name']}, not {LOGITS_NAME}, or one is not float32"
            )
        self._input = int(inputs[0]["index"])
        self._outputs = [(str(item["name"]), int(item["index"])) for item in outputs]
        self._interpreter, self._takes = interpreter, takes


def operators_outside(details: Sequence[Mapping[str, Any]], outputs: Sequence[int]) -> set[int]:
    """Operators that the delegate did not take, by their place in the file.

    The library lists the file's operators first and the delegate's parts behind them; what is computed is what the
    outputs are reached from.

    Args:
        details: of all operators, as the interpreter lists them.
        outputs: numbers of the graph's output tensors.
    """
    maker: dict[int, int] = {}
    for place, item in enumerate(details):  # a part of the delegate comes later and replaces the file's operators
        maker.update({int(number): place for number in item["outputs"]})
    seen: set[int] = set()
    waiting = [maker[number] for number in outputs if number in maker]
    while waiting:
        place = waiting.pop()
        if place not in seen:
            seen.add(place)
            waiting += [maker[int(number)] for number in details[place]["inputs"] if int(number) in maker]
    return {place for place in seen if details[place]["op_name"] != "DELEGATE"}


def executed_in(operators: Sequence[ReadOperator], outside: set[int]) -> str:
    """What a loaded graph computes in, one line.

    Args:
        operators: of the file.
        outside: places of those that the delegate did not take.
    """
    weighted = [operator.weight for operator in operators if operator.weight]
    taken = f"{DELEGATE} takes {len(operators) - len(outside)} of {len(operators)} operators"
    coded = weighted.count("int8")
    if not coded:
        return f"f32; {taken}"
    return f"int8 in {coded} of {len(weighted)} layers with weights (by the file's types), the rest f32; {taken}"


@contextmanager
def _without_greeting() -> Iterator[None]:
    """Keeps the library's greeting from standard error.

    It writes a line when its first delegate in a process is made, and has no switch for that. Whatever else is written
    there meanwhile is written afterwards.
    """
    kept = _standard_error()
    if kept is None:
        yield
        return
    with _scratch() as caught:
        os.dup2(caught.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            caught.seek(0)
            lines = caught.read().splitlines(keepends=True)
            _GREETED.extend(line for line in lines if line.startswith(_SAID))
            rest = b"".join(line for line in lines if not line.startswith(_SAID))
            if rest:
                os.write(2, rest)


def _standard_error() -> int | None:
    """A copy of standard error; None after the greeting, or where there is none."""
    if _GREETED:
        return None
    try:
        return os.dup(2)
    except OSError:
        return None


def _scratch() -> BinaryIO:
    """A file in memory; on systems without, a temporary one."""
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("tinyusfm"), "w+b")
    return tempfile.TemporaryFile()


_GREETED: list[bytes] = []
"""The greeting, once it was said."""

__all__ = [
    "CHAINS",
    "DELEGATE",
    "LIBRARY",
    "MODEL_FILE",
    "Engine",
    "available",
    "executed_in",
    "import_litert",
    "library_version",
    "operators_outside",
]
