"""Saved Core ML programs with one thing changed: one number of the weight file, or one axis in the program.

Everything else stays as it was saved, byte for byte where it is the weight file, and the package stays readable.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Files = dict[str, bytes]


def model_of(files: Files) -> Any:
    """The program and its description."""
    from coremltools.proto import Model_pb2

    model = Model_pb2.Model()
    model.ParseFromString(files["model.mlmodel"])
    return model


def operations(model: Any) -> Any:
    """Operators of the main function, in order."""
    function = model.mlProgram.functions["main"]
    return function.block_specializations[function.opset].operations


def with_weight(files: Files, name: str, index: int, value: float) -> Files:
    """One entry of one stored float16 or float32 weight set to a value.

    Args:
        files: the package's files.
        name: of the constant.
        index: of the entry, flat.
        value: new value.
    """
    raw = bytearray(files["weight.bin"])
    start, stored = _place(files, name)
    kind = np.dtype(stored)
    raw[start + index * kind.itemsize : start + (index + 1) * kind.itemsize] = kind.type(value).tobytes()
    return {**files, "weight.bin": bytes(raw)}


def weight_of(files: Files, name: str) -> np.ndarray:
    """A stored weight, flat."""
    op = _constant(model_of(files), name)
    start, kind = _place(files, name)
    shape = [d.constant.size for d in op.outputs[0].type.tensorType.dimensions]
    return np.frombuffer(files["weight.bin"], kind, int(np.prod(shape)), start)


def with_input(files: Files, operator: str, key: str, value: int | list[int]) -> Files:
    """One whole-number input of one operator set to a value.

    Args:
        files: the package's files.
        operator: name of the operator's first output.
        key: name of the input, such as ``axis``.
        value: one number, or as many as before.
    """
    model = model_of(files)
    op = next(o for o in operations(model) if o.outputs[0].name == operator)
    stored = _constant(model, op.inputs[key].arguments[0].name).attributes["val"].immediateValue.tensor.ints.values
    new = [value] if isinstance(value, int) else value
    assert len(new) == len(stored) and list(stored) != new, (operator, key, list(stored))
    stored[:] = new
    return {**files, "model.mlmodel": model.SerializeToString(deterministic=True)}


def _constant(model: Any, name: str) -> Any:
    return next(o for o in operations(model) if o.type == "const" and o.outputs[0].name == name)


def _place(files: Files, name: str) -> tuple[int, type]:
    """Where a weight's numbers begin in the weight file, and their type."""
    op = _constant(model_of(files), name)
    offset = op.attributes["val"].blobFileValue.offset
    start = int(np.frombuffer(files["weight.bin"][offset + 16 : offset + 24], np.uint64)[0])
    return start, {10: np.float16, 11: np.float32}[op.outputs[0].type.tensorType.dataType]
