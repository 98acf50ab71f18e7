"""What the operations of a Core ML program make, by what goes in.

Sizes that a package declares are a claim. So a constant is measured by the values it carries or by its place in the
weights, and every other tensor by the rules that the graphs of other engines go through (shapes.py); what is declared
must be what comes out. Storage of values: coremltools' MILBlob (StorageFormat.hpp); numbers of types: MIL.proto.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from tinyusfm_runtime.errors import EngineError
from tinyusfm_runtime.graphs.tensors import FOLLOWED, Node, Tensor, known

ITEM_BYTES = {1: 1, 10: 2, 11: 4, 12: 8, 21: 1, 22: 2, 23: 4, 24: 8, 31: 1, 32: 2, 33: 4, 34: 8}
"""Data type of MIL.proto -> bytes of one value."""
WHOLE = {21: "<i1", 22: "<i2", 23: "<i4", 24: "<i8", 31: "<u1", 32: "<u2", 33: "<u4", 34: "<u8"}
"""Data type of MIL.proto -> how its whole numbers stand in bytes."""
TEXT = 2
"""Data type of MIL.proto: strings."""
SENTINEL = 0xDEADBEEF
BLOB_HEAD_BYTES = 64
"""In front of each stored value: sentinel, type, size and place of the data."""
Inputs = Mapping[str, Sequence[Tensor]]
"""Input name -> the tensors that are bound to it."""


def shape_of_type(kind: Mapping[str, Any]) -> tuple[int, ...]:
    """Sides that a type declares; a side without a number counts as 0."""
    tensor = kind.get("tensor", {"sides": []})
    return tuple(int(side.get("constant", {}).get("size", 0)) for side in tensor["sides"])


def measured(value: Mapping[str, Any], weights: bytes, what: str) -> Tensor:
    """A constant as large as it really is.

    Args:
        value: of an attribute.
        weights: the package's weight file.
        what: name of its operation, for messages.

    Raises:
        EngineError: it carries another number of values than its type says.
    """
    shape = shape_of_type(value.get("type", {}))
    dtype = int(value.get("type", {}).get("tensor", {}).get("dtype", 0))
    count = math.prod(shape)
    blob = value.get("blob")
    if blob is not None:
        if _blob_bytes(int(blob.get("offset", 0)), weights, what) != count * ITEM_BYTES.get(dtype, 0):
            raise EngineError(f"the model's constant {what} declares another size than its weights have")
        return Tensor(shape, str(dtype), fixed=True)
    tensor = value.get("immediate", {}).get("tensor", {})
    for name, content in tensor.items():
        held = content.get("values", [])
        there = len(held) // max(1, ITEM_BYTES.get(dtype, 1)) if name == "bytes" else len(held)
        if there != count:
            raise EngineError(f"the model's constant {what} declares {count} values and holds {there}")
        if name == "bytes" and dtype in WHOLE and count <= FOLLOWED:
            return known(np.frombuffer(held, WHOLE[dtype]).astype(np.int64).reshape(shape))
        if name in ("ints", "longs", "bools") and count <= FOLLOWED:
            return known(np.asarray(held, np.int64).reshape(shape))
        if name in ("floats", "doubles") and count <= FOLLOWED:
            return Tensor(shape, "float32", np.asarray(held, np.float64).reshape(shape), fixed=True)
        return Tensor(shape, str(dtype), fixed=True)
    if count > 0 and dtype != TEXT:
        raise EngineError(f"the model's constant {what} holds no values")
    return Tensor(shape, str(dtype), fixed=True)


def _blob_bytes(offset: int, weights: bytes, what: str) -> int:
    head = weights[offset : offset + BLOB_HEAD_BYTES]
    size, place = (int.from_bytes(head[at : at + 8], "little") for at in (8, 16))
    if len(head) < BLOB_HEAD_BYTES or int.from_bytes(head[:4], "little") != SENTINEL or place + size > len(weights):
        raise EngineError(f"the model's constant {what} lies outside its own weights")
    return size


def node_of(kind: str, inputs: Inputs, attributes: Mapping[str, Tensor], outputs: int) -> Node:
    """The operation as a node that shapes.py has a rule for.

    Args:
        kind: MIL's name of it.
        inputs: what is bound to its inputs.
        attributes: its values (of constant expressions).
        outputs: how many it has.

    Raises:
        ValueError: an input is missing, or a number that decides on shapes is no constant.
    """
    build = _BUILD.get(kind)
    if build is None:
        return Node("same", [_one(inputs, "input" if "input" in inputs else "x")], {}, outputs)
    return build(inputs, attributes, outputs)


def _one(inputs: Inputs, name: str) -> Tensor:
    found = inputs.get(name, ())
    if len(found) != 1:
        raise ValueError(f"input {name} is missing")
    return found[0]


def _numbers(inputs: Inputs, name: str, default: Sequence[int] = ()) -> list[int]:
    return _one(inputs, name).numbers(name) if name in inputs else list(default)


def _flag(inputs: Inputs, name: str) -> bool:
    return bool(_numbers(inputs, name, (0,))[0])


def _window(inputs: Inputs) -> dict[str, Any]:
    """Strides, dilations and paddings, which ``pad`` has axis by axis."""
    pad = _numbers(inputs, "pad")
    found: dict[str, Any] = {"pads_begin": pad[0::2], "pads_end": pad[1::2], "round_up": _flag(inputs, "ceil_mode")}
    for ours, theirs in (("strides", "strides"), ("dilations", "dilations"), ("kernel", "kernel_sizes")):
        if theirs in inputs:
            found[ours] = _numbers(inputs, theirs)
    return found


def _conv(inputs: Inputs, _: Mapping[str, Tensor], outputs: int) -> Node:
    groups = _numbers(inputs, "groups", (1,))[0]
    return Node("conv", [_one(inputs, "x"), _one(inputs, "weight")], {**_window(inputs), "groups": groups}, outputs)


def _slice(inputs: Inputs, _: Mapping[str, Tensor], outputs: int) -> Node:
    data = _one(inputs, "x")
    begin = _numbers(inputs, "begin")
    if "size" in inputs:
        sizes = _numbers(inputs, "size")
        ends = [
            side if size == -1 else first + size for first, size, side in zip(begin, sizes, data.shape, strict=True)
        ]
        return Node("cut", [data, known(np.array(begin)), known(np.array(ends))], {}, outputs)
    ends, steps = _numbers(inputs, "end"), _numbers(inputs, "stride", [1] * len(begin))
    for name in ("begin_mask", "end_mask", "squeeze_mask"):
        if any(_numbers(inputs, name)):
            raise ValueError(f"a slice with a {name}")
    axes = list(range(len(begin)))
    return Node("cut", [data, *(known(np.array(part)) for part in (begin, ends, axes, steps))], {}, outputs)


def _split(inputs: Inputs, _: Mapping[str, Tensor], outputs: int) -> Node:
    axis = _numbers(inputs, "axis")[0]
    sizes = [_one(inputs, "split_sizes")] if "split_sizes" in inputs else []
    count = _numbers(inputs, "num_splits", (outputs,))[0]
    return Node("split", [_one(inputs, "x"), *sizes], {"axis": axis, "count": count}, outputs)


def _concat(inputs: Inputs, _: Mapping[str, Tensor], outputs: int) -> Node:
    if _flag(inputs, "interleave"):
        raise ValueError("a concatenation that interleaves")
    return Node("concat", list(inputs.get("values", ())), {"axis": _numbers(inputs, "axis")[0]}, outputs)


def _gather(inputs: Inputs, _: Mapping[str, Tensor], outputs: int) -> Node:
    index = _one(inputs, "indices")
    index.numbers("the list of a gather's rows")
    if _flag(inputs, "batch_dims"):
        raise ValueError("a gather over batch axes")
    return Node("gather", [_one(inputs, "x"), index], {"axis": _numbers(inputs, "axis", (0,))[0]}, outputs)


def _scaled(inputs: Inputs, _: Mapping[str, Tensor], outputs: int) -> Node:
    data = _one(inputs, "x")
    if "target_size_height" in inputs:
        sides = [_numbers(inputs, name)[0] for name in ("target_size_height", "target_size_width")]
    else:
        factors = (_one(inputs, name).value for name in ("scale_factor_height", "scale_factor_width"))
        sides = [
            round(float(np.asarray(factor).reshape(-1)[0]) * side)
            for factor, side in zip(factors, data.shape[-2:], strict=True)
            if factor is not None
        ]
    return Node("resize", [data, None, None, known(np.array(sides))], {"axes": [-2, -1]}, outputs)


def _reduce(inputs: Inputs, _: Mapping[str, Tensor], outputs: int) -> Node:
    axes = _numbers(inputs, "axes") or None
    return Node("reduce", [_one(inputs, "x")], {"axes": axes, "keeps": _flag(inputs, "keep_dims")}, outputs)


def _pair(inputs: Inputs, _: Mapping[str, Tensor], outputs: int) -> Node:
    return Node("elementwise", [_one(inputs, "x"), _one(inputs, "y")], {}, outputs)


def _dense(_: Inputs, attributes: Mapping[str, Tensor], outputs: int) -> Node:
    """Table entries: as many as the stored shape says, of 1 to 8 bits each."""
    shape = attributes["shape"].numbers("shape") if "shape" in attributes else []
    indices, table = attributes.get("indices"), attributes.get("lut")
    if indices is None or table is None or table.elements & (table.elements - 1):
        raise ValueError("a table without indices, or of a length that is no power of 2")
    bits = max(1, (table.elements - 1).bit_length())
    if bits > 8 or indices.elements != -(-math.prod(shape) * bits // 8):
        raise ValueError("another number of indices than the shape has")
    return Node("same", [Tensor(tuple(shape), fixed=True)], {}, outputs)


_BUILD: Mapping[str, Callable[[Inputs, Mapping[str, Tensor], int], Node]] = {
    **dict.fromkeys(("add", "sub", "mul", "real_div", "maximum", "minimum"), _pair),
    **dict.fromkeys(("reduce_mean", "reduce_max", "reduce_sum"), _reduce),
    **dict.fromkeys(("upsample_bilinear", "resize_bilinear", "upsample_nearest_neighbor"), _scaled),
    **dict.fromkeys(("slice_by_size", "slice_by_index"), _slice),
    "conv": _conv,
    "avg_pool": lambda i, _, n: Node("pool", [_one(i, "x")], _window(i), n),
    "max_pool": lambda i, _, n: Node("pool", [_one(i, "x")], _window(i), n),
    "linear": lambda i, _, n: Node("matmul", [_one(i, "x"), _one(i, "weight")], {"transpose_b": True}, n),
    "matmul": lambda i, _, n: Node(
        "matmul",
        [_one(i, "x"), _one(i, "y")],
        {"transpose_a": _flag(i, "transpose_x"), "transpose_b": _flag(i, "transpose_y")},
        n,
    ),
    "reshape": lambda i, _, n: Node("reshape", [_one(i, "x"), _one(i, "shape")], {}, n),
    "transpose": lambda i, _, n: Node("transpose", [_one(i, "x")], {"perm": _numbers(i, "perm")}, n),
    "concat": _concat,
    "gather": _gather,
    "split": _split,
    "squeeze": lambda i, _, n: Node("squeeze", [_one(i, "x")], {"axes": _numbers(i, "axes") or None}, n),
    "expand_dims": lambda i, _, n: Node("unsqueeze", [_one(i, "x")], {"axes": _numbers(i, "axes")}, n),
    "constexpr_affine_dequantize": lambda _, a, n: Node("same", [a["quantized_data"]], {}, n),
    "constexpr_lut_to_dense": _dense,
}

__all__ = [
    "BLOB_HEAD_BYTES",
    "ITEM_BYTES",
    "SENTINEL",
    "TEXT",
    "WHOLE",
    "Inputs",
    "measured",
    "node_of",
    "shape_of_type",
]
