"""What every operation of an integer model has to fulfil.

Shapes, ranges of its numbers, and proofs against overflow.

The proofs take the stored weights and the widest values that a buffer's type can hold, so they hold for any input. The
C engine makes the same checks. It does not compute.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod

import numpy as np

from tinyusfm_runtime.engines.integer.layout import (
    ADD,
    CODES,
    EXACT,
    F32,
    I16,
    I32,
    U8,
    WORDS,
    Buffer,
    Operation,
    Port,
)

INT32_HIGH = 2**31 - 1
"""Largest number of an accumulator."""
MAX_WIDTH = 1024
"""Channels that a LayerNorm may have: the sum of squares stays below 2^61."""
MAX_BITS = 7
"""Bits of the last shift in front of 8-bit codes: more could saturate before the clamp."""


def check_operation(operation: Operation, buffers: Sequence[Buffer], ports: Sequence[Port]) -> None:
    """Checks one operation.

    Args:
        operation: with its fields and tensors.
        buffers: all of the model's.
        ports: input first, then the outputs.

    Raises:
        ValueError: a number, a shape or a bound does not hold.
    """
    source, target = buffers[operation.source], buffers[operation.target]
    _need(operation.target != 0 or operation.kind == "output", "it writes to the input")
    _CHECKS[operation.kind](operation, source, target, ports)


def _need(holds: bool, what: str) -> None:
    if not holds:
        raise ValueError(f"{what}: export the bundle again")


def _tensors(operation: Operation, **wanted: tuple[str, tuple[int, ...]]) -> None:
    _need(set(operation.tensors) == set(wanted), f"it needs the tensors {', '.join(wanted) or 'none'}")
    for role, (dtype, shape) in wanted.items():
        found = operation.tensors[role]
        _need(found.dtype == np.dtype(dtype) and found.shape == shape, f"tensor {role} is not {dtype} of shape {shape}")


def _types(source: Buffer, sources: tuple[int, ...], target: Buffer, targets: tuple[int, ...]) -> None:
    _need(source.dtype in sources and target.dtype in targets, "its buffers are of other types")


def _codes(operation: Operation, *, most: int = MAX_BITS) -> None:
    _need(0 <= operation["bits"] <= most and 0 <= operation["zero"] <= 255, "its last shift or zero is out of range")


def _between(values: np.ndarray, low: int, high: int, what: str) -> None:
    _need(values.size == 0 or (int(values.min()) >= low and int(values.max()) <= high), f"{what} is out of range")


def _distinct(operation: Operation) -> None:
    _need(operation.source != operation.target, "it reads and writes the same buffer")


def _scaling(operation: Operation, outputs: int) -> None:
    _between(operation.tensors["shift"], 0, 31, "a shift")
    _between(operation.tensors["factor"], 0, 2**15 - 1, "a multiplier")


def _sums_fit(operation: Operation, source: Buffer) -> None:
    """The widest accumulator on either side of zero stays within 32 bits."""
    weight = operation.tensors["weight"]
    flat_OI = weight.reshape(len(weight), -1).astype(np.int64)
    bias_O = operation.tensors["bias"].astype(np.int64)
    above_O, below_O = np.maximum(flat_OI, 0).sum(1), np.minimum(flat_OI, 0).sum(1)
    low, high = (0, 255) if source.dtype == U8 else (-(2**15), 2**15 - 1)
    most = (np.maximum(bias_O, 0) + above_O * high + below_O * low).max()
    least = (np.minimum(bias_O, 0) + below_O * high + above_O * low).min()
    _need(bool(most <= INT32_HIGH and least >= -INT32_HIGH - 1), "its accumulators could leave 32 bits")


def _patches(operation: Operation, source: Buffer, target: Buffer, ports: Sequence[Port]) -> None:
    size = operation["size"]
    _tensors(operation)
    _types(source, (U8,), target, (U8,))
    _need(1 <= size <= 64 and source.rows % size == 0 and source.columns % size == 0, "its patches do not fit")
    wanted = (source.rows // size * (source.columns // size), size * size)
    _need(operation.source == 0 and target.shape == wanted, "its patches do not fit")
    _distinct(operation)


def _tokens(operation: Operation, source: Buffer, target: Buffer, ports: Sequence[Port]) -> None:
    _tensors(operation)
    _types(source, (F32,), target, (I16,))
    _need(operation.source == 0 and source.shape == target.shape, "its buffers are of other shapes")
    _need(0 <= operation["bits"] <= 30, "its scale is out of range")


def _fill(operation: Operation, source: Buffer, target: Buffer, ports: Sequence[Port]) -> None:
    _tensors(operation, table=("<i2", target.shape))
    _types(target, (I16,), target, (I16,))


def _linear(operation: Operation, source: Buffer, target: Buffer, ports: Sequence[Port]) -> None:
    outputs, inputs, mode = target.columns, source.columns, operation["mode"]
    wanted = {"weight": ("i1", (outputs, inputs)), "bias": ("<i4", (outputs,))}
    wanted |= {"shift": ("i1", (outputs,)), "factor": ("<i2", (outputs,))}
    if operation["table"] == 1:
        wanted["table"] = ("u1", (256,))
    _tensors(operation, **wanted)
    _types(source, (U8, I16), target, (U8,) if mode == CODES else (I16,))
    _need(mode in (CODES, WORDS, ADD) and operation["table"] in ((0, 1) if mode == CODES else (0,)), "its mode")
    _codes(operation, most=MAX_BITS if mode == CODES else 14)
    row, first, rows = operation["row"], operation["target_row"], operation["rows"]
    _need(row >= 0 and first >= 0 and rows >= 1, "its rows are out of range")
    _need(row + rows <= source.rows and first + rows <= target.rows, "its rows are out of range")
    _scaling(operation, outputs)
    _sums_fit(operation, source)
    _distinct(operation)


def _norm(operation: Operation, source: Buffer, target: Buffer, ports: Sequence[Port]) -> None:
    mode, rows = operation["mode"], operation["rows"]
    wanted: dict[str, tuple[str, tuple[int, ...]]] = {"constants": ("<i8", (2,))}
    if mode == CODES:
        wanted["factor"] = ("<i2", (source.columns,))
    _need(mode in (CODES, WORDS), "its mode")
    _tensors(operation, **wanted)
    _types(source, (I16,), target, (U8,) if mode == CODES else (I16,))
    _codes(operation)
    epsilon, root = (int(number) for number in operation.tensors["constants"])
    _need(1 <= epsilon < 2**60 and 1 <= root < 2**29 and source.columns <= MAX_WIDTH, "its constants are out of range")
    if mode == CODES:
        _between(operation.tensors["factor"], 0, 2**15 - 1, "a multiplier")
    _need(operation["row"] >= 0 and rows >= 1 and operation["row"] + rows <= source.rows, "its rows are out of range")
    _need(target.shape == (rows, source.columns), "its buffers are of other shapes")
    _distinct(operation)


def _attention(operation: Operation, source: Buffer, target: Buffer, ports: Sequence[Port]) -> None:
    heads, row, drop = operation["heads"], operation["row"], operation["drop"]
    _need(1 <= heads <= 256, "its heads are out of range")
    one = (heads,)
    _tensors(operation, left=("i1", one), right=("i1", one), factor=("<i2", one), out=("<i2", one))
    _types(source, (U8,), target, (U8,))
    width = target.columns
    _need(source.columns == 3 * width and width % heads == 0 and width // heads <= 128, "its heads do not fit")
    _need(0 <= row < source.rows and target.rows == source.rows - row, "its rows are out of range")
    _codes(operation)
    left, right = operation.tensors["left"], operation.tensors["right"]
    _between(left, 0, 15, "a shift")
    _between(right, 0, 20, "a shift")
    _need(bool((np.minimum(left, right) == 0).all()), "a shift goes both ways")
    largest = 2 * 2**14 * (width // heads)
    _need(largest << int(left.max()) < 2**30, "its scores could leave 32 bits")
    _between(operation.tensors["factor"], 0, 2**15 - 1, "a multiplier")
    _between(operation.tensors["out"], 0, 2**15 - 1, "a multiplier")
    _need(0 <= drop <= 6 and source.rows * ((2**15 - 1) >> drop) * 128 + 2**20 <= INT32_HIGH, "its sums could overflow")
    _distinct(operation)


def _window(operation: Operation, source: Buffer, target: Buffer) -> None:
    area = operation["height"] * operation["width"]
    _types(source, (U8,), target, (U8,))
    _need(operation["height"] >= 1 and operation["width"] >= 1, "its map has no size")
    _need(source.rows == target.rows == area, "its map does not fit")
    _codes(operation)
    _scaling(operation, target.columns)
    _sums_fit(operation, source)
    _distinct(operation)


def _convolution(operation: Operation, source: Buffer, target: Buffer, ports: Sequence[Port]) -> None:
    outputs = target.columns
    channels = {"bias": ("<i4", (outputs,)), "shift": ("i1", (outputs,)), "factor": ("<i2", (outputs,))}
    _tensors(operation, weight=("i1", (outputs, 9, source.columns)), **channels)
    _window(operation, source, target)


def _depthwise(operation: Operation, source: Buffer, target: Buffer, ports: Sequence[Port]) -> None:
    outputs = target.columns
    channels = {"bias": ("<i4", (outputs,)), "shift": ("i1", (outputs,)), "factor": ("<i2", (outputs,))}
    _tensors(operation, weight=("i1", (outputs, 9)), **channels)
    _need(source.columns == outputs, "its channels do not fit")
    _window(operation, source, target)


def _resize(operation: Operation, source: Buffer, target: Buffer, ports: Sequence[Port]) -> None:
    old = operation["from_height"], operation["from_width"]
    new = operation["height"], operation["width"]
    flags, bits = operation["flags"], operation["share_bits"]
    _need(0 <= flags <= EXACT and flags != EXACT + 1, "its flags")
    _types(source, (I16,), target, (I32,) if flags == EXACT else (I16,))
    _need(min(*old, *new) >= 1 and source.rows == prod(old) and target.rows == prod(new), "its maps do not fit")
    _need(source.columns == target.columns and 0 <= bits <= MAX_BITS, "its maps do not fit")
    axes = (("rows", old[0], new[0]), ("columns", old[1], new[1]))
    wanted = {f"{axis}_first": ("<i4", (size,)) for axis, _, size in axes}
    wanted |= {f"{axis}_share": ("<i2", (size,)) for axis, _, size in axes}
    _tensors(operation, **wanted)
    for axis, before, _ in axes:
        _between(operation.tensors[f"{axis}_first"], 0, before - 1, "a place")
        _between(operation.tensors[f"{axis}_share"], 0, 1 << bits, "a share")
    _distinct(operation)


def _halve(operation: Operation, source: Buffer, target: Buffer, ports: Sequence[Port]) -> None:
    height, width = operation["height"], operation["width"]
    _tensors(operation)
    _types(source, (I16,), target, (I16,))
    _need(height >= 2 and width >= 2 and source.rows == height * width, "its maps do not fit")
    _need(target.shape == ((height // 2) * (width // 2), source.columns), "its maps do not fit")
    _need(operation["flags"] in (0, 1), "its flags")
    _distinct(operation)


def _requantised(operation: Operation, source: Buffer, target: Buffer, ports: Sequence[Port]) -> None:
    _tensors(operation)
    _types(source, (I16,), target, (U8,))
    _codes(operation)
    _need(0 <= operation["factor"] < 2**15 and source.shape == target.shape, "its multiplier or shape is out of range")


def _mean(operation: Operation, source: Buffer, target: Buffer, ports: Sequence[Port]) -> None:
    rows, row = operation["rows"], operation["row"]
    _tensors(operation)
    _types(source, (U8, I16), target, (I16,))
    _need(row >= 0 and rows >= 1 and row + rows <= source.rows, "its rows are out of range")
    _need(target.shape == (1, source.columns), "its buffers are of other shapes")
    _need(0 <= operation["shift"] <= 31 and 0 <= operation["factor"] < 2**15, "its multiplier is out of range")
    _need(0 <= operation["bits"] <= 14, "its last shift is out of range")
    largest = 255 if source.dtype == U8 else 2**15
    _need(rows * largest + abs(operation["bias"]) <= INT32_HIGH, "its sums could overflow")
    _distinct(operation)


def _peak(operation: Operation, source: Buffer, target: Buffer, ports: Sequence[Port]) -> None:
    _tensors(operation)
    _types(source, (U8,), target, (I32,))
    _need(target.shape == (1, 1) and 0 <= operation["zero"] <= 255, "its target or zero is out of range")


def _sum(operation: Operation, source: Buffer, target: Buffer, ports: Sequence[Port]) -> None:
    rows, row = operation["rows"], operation["row"]
    _tensors(operation)
    _types(source, (I16,), target, (I32,))
    _need(row >= 0 and rows >= 1 and row + rows <= source.rows, "its rows are out of range")
    _need(target.shape == (1, source.columns) and rows <= 2**15, "its buffers are of other shapes")


def _affine(operation: Operation, source: Buffer, target: Buffer, ports: Sequence[Port]) -> None:
    width = (source.columns,)
    _tensors(operation, factor=("<i4", width), bias=("<i4", width))
    _types(source, (I16,), target, (I32,))
    _need(source.shape == target.shape, "its buffers are of other shapes")
    factor, bias = (np.abs(operation.tensors[role].astype(np.int64)) for role in ("factor", "bias"))
    _need(int((factor * 2**15 + bias).max()) <= INT32_HIGH, "its sums could overflow")


def _output(operation: Operation, source: Buffer, target: Buffer, ports: Sequence[Port]) -> None:
    _tensors(operation)
    _types(source, (I16, I32), source, (I16, I32))
    _need(1 <= operation["port"] < len(ports), "its port is out of range")
    _need(prod(ports[operation["port"]].shape) == prod(source.shape), "its port is of another shape")
    scale = np.array([operation["scale"]], np.int32).view(np.float32)[0]
    _need(bool(np.isfinite(scale) and scale > 0) and operation["transposed"] in (0, 1), "its scale is out of range")


def _gather(operation: Operation, source: Buffer, target: Buffer, ports: Sequence[Port]) -> None:
    blank = operation["blank"]
    _need(blank in (0, 1), "its blank row is out of range")
    wanted: dict[str, tuple[str, tuple[int, ...]]] = {"index": ("<i4", (target.rows,))}
    if blank:
        wanted["blank"] = ("<i4", (target.columns,))
    _tensors(operation, **wanted)
    _types(source, (U8, I16, I32), target, (source.dtype,))
    _need(source.columns == target.columns, "its buffers are of other shapes")
    _between(operation.tensors["index"], -blank, source.rows - 1, "a row")
    if blank and source.dtype != I32:
        low, high = (0, 255) if source.dtype == U8 else (-(2**15), 2**15 - 1)
        _between(operation.tensors["blank"], low, high, "the blank row")
    _distinct(operation)


_CHECKS: dict[str, Callable[[Operation, Buffer, Buffer, Sequence[Port]], None]] = {
    "patches": _patches,
    "tokens": _tokens,
    "fill": _fill,
    "linear": _linear,
    "norm": _norm,
    "attention": _attention,
    "convolution": _convolution,
    "depthwise": _depthwise,
    "resize": _resize,
    "halve": _halve,
    "codes": _requantised,
    "mean": _mean,
    "peak": _peak,
    "sum": _sum,
    "affine": _affine,
    "output": _output,
    "gather": _gather,
}


__all__ = ["INT32_HIGH", "MAX_BITS", "MAX_WIDTH", "check_operation"]
