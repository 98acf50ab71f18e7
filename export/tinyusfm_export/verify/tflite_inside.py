"""Tensors inside a LiteRT file, in its own engine.

A tensor is seen where it is an output of the graph; the delegate then gives it as well, and fuses nothing across it.
The list of outputs is written again at the end of the file, and the graph's reference to it is changed; all else stays.
Names are those that our writer gives, which are the labels of the export graph; maps lie with channels last.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import numpy as np

from tinyusfm_runtime.engines.litert import import_litert
from tinyusfm_runtime.errors import EngineError, MissingExtra

_MODEL_GRAPHS, _GRAPH_OUTPUTS = 2, 2
"""Fields of the FlatBuffers tables ``Model`` and ``SubGraph``."""


def tensor_numbers(model: bytes) -> dict[str, int]:
    """Number of every float tensor of a file, by its name.

    Args:
        model: content of the file.

    Raises:
        MissingExtra: LiteRT is not installed.
    """
    details = _open(model, threads=1).get_tensor_details()
    found: dict[str, int] = {}
    for item in details:
        if item["dtype"] is np.float32 and item["name"]:
            found.setdefault(str(item["name"]), int(item["index"]))
    return found


def with_outputs(model: bytes, numbers: Sequence[int]) -> bytes:
    """A file whose graph has these outputs and no others.

    Args:
        model: content of the file.
        numbers: of its tensors.

    Raises:
        EngineError: the file has no graph with outputs.
    """
    made = bytearray(model)
    graphs = _reference(made, _table(made, 0), _MODEL_GRAPHS)
    place = _field(made, _table(made, graphs + 4), _GRAPH_OUTPUTS)
    made += b"\0" * (-len(made) % 4)
    struct.pack_into("<I", made, place, len(made) - place)
    made += struct.pack(f"<I{len(numbers)}i", len(numbers), *numbers)
    return bytes(made)


class InsideRunner:
    """Runs a file with more outputs; a context manager.

    Args:
        model: content of the file.
        names: tensors that it gives.
        threads: inside the engine.

    Raises:
        MissingExtra: LiteRT is not installed.
        EngineError: it refuses the file.
    """

    def __init__(self, model: bytes, names: Sequence[str], *, threads: int = 1) -> None:
        numbers = tensor_numbers(model)
        self._numbers = {name: numbers[name] for name in names}
        self._interpreter = _open(with_outputs(model, list(self._numbers.values())), threads)
        self._input = int(self._interpreter.get_input_details()[0]["index"])

    def __enter__(self) -> InsideRunner:
        return self

    def __exit__(self, *_: object) -> None:
        self._interpreter = None

    def run(self, tensor: np.ndarray) -> dict[str, np.ndarray]:
        """Every named tensor on one input.

        Raises:
            EngineError: the engine failed.
        """
        try:
            self._interpreter.set_tensor(self._input, tensor)
            self._interpreter.invoke()
            return {name: self._interpreter.get_tensor(number) for name, number in self._numbers.items()}
        except (RuntimeError, ValueError) as error:
            raise EngineError(f"LiteRT failed with more outputs: {' '.join(str(error).split())[:200]}") from error


def _open(model: bytes, threads: int) -> Any:
    try:
        library = import_litert()
    except ImportError as error:
        raise MissingExtra("looking inside a litert artefact", "ai-edge-litert", "litert") from error
    try:
        interpreter = library.Interpreter(model_content=model, num_threads=threads)
        interpreter.allocate_tensors()
    except (RuntimeError, ValueError) as error:
        raise EngineError(f"LiteRT refuses the file: {' '.join(str(error).split())[:200]}") from error
    return interpreter


def _table(data: bytearray, place: int) -> int:
    """Where the table begins that a reference at a place leads to."""
    return place + int(struct.unpack_from("<I", data, place)[0])


def _field(data: bytearray, table: int, number: int) -> int:
    """Where a field of a table lies."""
    virtual = table - int(struct.unpack_from("<i", data, table)[0])
    slot = 4 + 2 * number
    offset = (
        struct.unpack_from("<H", data, virtual + slot)[0] if slot < struct.unpack_from("<H", data, virtual)[0] else 0
    )
    if not offset:
        raise EngineError("the LiteRT file has no graph with outputs")
    return table + int(offset)


def _reference(data: bytearray, table: int, number: int) -> int:
    """Where the vector of a field begins."""
    return _table(data, _field(data, table, number))


__all__ = ["InsideRunner", "tensor_numbers", "with_outputs"]
