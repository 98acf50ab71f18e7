"""LiteRT models (``.tflite``): what may stand in one, and no more.

One graph of built-in operators from one input; no custom operators, no control flow, no variables, no sparse or
external tensors, no free sides. The reader is strict (flatbuffer.py): fields that our target does not write are refused
by number. Constants must be exactly as long as their shape says and lie on multiples of 16 bytes, and every declared
shape must be what the operators really give; what they come to is bounded by the model's spec (budget.py). Numbers of
fields, types and operators are those of schema.fbs
(https://github.com/google-ai-edge/LiteRT/blob/main/tflite/converter/schema/schema.fbs).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tinyusfm_runtime.errors import EngineError
from tinyusfm_runtime.graphs.budget import Budget
from tinyusfm_runtime.graphs.flatbuffer import FlatBuffer, Slot, TableSchema
from tinyusfm_runtime.graphs.tensors import FOLLOWED, Node, Tensor, known
from tinyusfm_runtime.spec import LOGITS_NAME, ModelSpec, TensorSpec

IDENTIFIER = b"TFL3"
VERSION = 3
ALIGNMENT = 16
MAX_OPERATORS = 20_000
TYPES: Mapping[int, tuple[str, int]] = {0: ("float32", 4), 2: ("int32", 4), 3: ("uint8", 1), 9: ("int8", 1)}
"""TensorType -> name and bytes of one number."""
_QUANTIZATION = TableSchema(
    "a quantization", {2: Slot("scale", "floats"), 3: Slot("zero", "longs"), 6: Slot("axis", "i32")}
)
_TENSOR = TableSchema(
    "a tensor",
    {
        0: Slot("shape", "ints", most=8),
        1: Slot("type", "i8"),
        2: Slot("buffer", "u32"),
        3: Slot("name", "text"),
        4: Slot("quantization", _QUANTIZATION),
    },
)
_OPERATOR = TableSchema(
    "an operator",
    {
        0: Slot("code", "u32"),
        1: Slot("inputs", "ints", most=64),
        2: Slot("outputs", "ints", most=64),
        3: Slot("options_type", "u8"),
        4: Slot("options", "place"),
    },
)
_GRAPH = TableSchema(
    "the graph",
    {
        0: Slot("tensors", _TENSOR, many=True),
        1: Slot("inputs", "ints", most=64),
        2: Slot("outputs", "ints", most=1024),
        3: Slot("operators", _OPERATOR, many=True, most=MAX_OPERATORS),
        4: Slot("name", "text"),
    },
)
_MAP = TableSchema("a name", {0: Slot("name", "text"), 1: Slot("tensor", "u32")})
_SIGNATURE = TableSchema(
    "a signature",
    {
        0: Slot("inputs", _MAP, many=True, most=64),
        1: Slot("outputs", _MAP, many=True, most=1024),
        2: Slot("key", "text"),
        4: Slot("graph", "u32"),
    },
)
_CODE = TableSchema("an operator's code", {0: Slot("old", "i8"), 2: Slot("version", "i32"), 3: Slot("code", "i32")})
_MODEL = TableSchema(
    "the model",
    {
        0: Slot("version", "u32"),
        1: Slot("codes", _CODE, many=True, most=1024),
        2: Slot("graphs", _GRAPH, many=True, most=1),
        3: Slot("description", "text"),
        4: Slot("buffers", TableSchema("a buffer", {0: Slot("data", "bytes")}), many=True),
        7: Slot("signatures", _SIGNATURE, many=True, most=1),
    },
)
Prepare = Callable[[Sequence[Tensor], Mapping[str, Any]], Node]
"""Inputs and options of an operator -> the node of a rule."""


def _plain(rule: str, **fixed: Any) -> Prepare:
    return lambda inputs, options: Node(rule, inputs, {**fixed})


def _turned(tensor: Tensor) -> Tensor:
    """A map with channels last as NCHW."""
    batch, *sides, channels = tensor.shape
    return Tensor((batch, channels, *sides), tensor.dtype, fixed=tensor.fixed)


def _windows(options: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "strides": (options.get("stride_h", 0), options.get("stride_w", 0)),
        "dilations": (options.get("dilation_h", 1), options.get("dilation_w", 1)),
        "auto_pad": "" if options.get("padding", 0) else "SAME_UPPER",
    }


def _conv(inputs: Sequence[Tensor], options: Mapping[str, Any]) -> Node:
    return Node("conv", [_turned(inputs[0]), _turned(inputs[1])], _windows(options))


def _depthwise(inputs: Sequence[Tensor], options: Mapping[str, Any]) -> Node:
    data, (one, rows, cols, channels) = _turned(inputs[0]), inputs[1].shape
    if one != 1 or options.get("multiplier") != 1 or data.shape[1] != channels:
        raise ValueError(f"depthwise weights {list(inputs[1].shape)} on {list(inputs[0].shape)}")
    weight = Tensor((channels, 1, rows, cols), inputs[1].dtype, fixed=inputs[1].fixed)
    return Node("conv", [data, weight], {**_windows(options), "groups": channels})


def _pool(inputs: Sequence[Tensor], options: Mapping[str, Any]) -> Node:
    kernel = (options.get("filter_h", 0), options.get("filter_w", 0))
    return Node("pool", [_turned(inputs[0])], {**_windows(options), "kernel": kernel})


def _linear(inputs: Sequence[Tensor], options: Mapping[str, Any]) -> Node:
    if len(inputs[1].shape) != 2 or not options.get("keeps", False):
        raise ValueError(f"weights {list(inputs[1].shape)}")
    return Node("matmul", inputs[:2], {"transpose_b": True})


def _reduce(inputs: Sequence[Tensor], options: Mapping[str, Any]) -> Node:
    return Node("reduce", inputs, {"keeps": options.get("keeps", False)})


def _slice(inputs: Sequence[Tensor], options: Mapping[str, Any]) -> Node:
    begin, size = inputs[1].numbers("the start of a slice"), inputs[2].numbers("the size of a slice")
    sides = inputs[0].shape
    if not len(begin) == len(size) == len(sides):
        raise ValueError("a slice with lists of different lengths")
    if any(b < 0 or s < 1 or b + s > side for b, s, side in zip(begin, size, sides, strict=True)):
        raise ValueError(f"a slice of {size} from {begin} of {list(sides)}")
    ends = known(np.asarray([b + s for b, s in zip(begin, size, strict=True)], np.int32))
    return Node("cut", [inputs[0], inputs[1], ends])


def _split(inputs: Sequence[Tensor], options: Mapping[str, Any]) -> Node:
    axis, count = inputs[0].numbers("the axis of a split")[0], int(options.get("parts", 0))
    if count < 1 or inputs[1].shape[axis] % count:
        raise ValueError(f"{count} equal parts of {list(inputs[1].shape)}")
    return Node("split", [inputs[1]], {"axis": axis, "count": count}, outputs=count)


def _resize(inputs: Sequence[Tensor], options: Mapping[str, Any]) -> Node:
    if len(inputs[0].shape) != 4:
        raise ValueError(f"a resize of {list(inputs[0].shape)}")
    return Node("resize", [inputs[0], None, None, inputs[1]], {"axes": [1, 2]})


def _gather(inputs: Sequence[Tensor], options: Mapping[str, Any]) -> Node:
    if min(inputs[1].numbers("the list of a gather's rows"), default=0) < 0:
        raise ValueError("rows below 0 that are not there")
    return Node("gather", inputs, {"axis": options.get("axis", 0)})


def _concat(inputs: Sequence[Tensor], options: Mapping[str, Any]) -> Node:
    return Node("concat", inputs, {"axis": options.get("axis", 0)})


@dataclass(frozen=True, slots=True)
class _Known:
    """One operator: name, options with their fields, and the rules' node."""

    name: str
    prepare: Prepare
    inputs: range
    options_type: int = 0
    options: Mapping[int, Slot] | None = None
    map: bool = False


_FUSED = Slot("fused", "i8")
_SIDES = {0: Slot("padding", "i8"), 1: Slot("stride_w", "i32"), 2: Slot("stride_h", "i32")}
_KEEPS = {0: Slot("keeps", "bool")}
_ONE, _TWO, _THREE = range(1, 2), range(2, 3), range(3, 4)
OPERATORS: Mapping[int, _Known] = {
    0: _Known("ADD", _plain("elementwise"), _TWO, 11, {0: _FUSED}),
    1: _Known(
        "AVERAGE_POOL_2D", _pool, _ONE, 5,
        {**_SIDES, 3: Slot("filter_w", "i32"), 4: Slot("filter_h", "i32"), 5: _FUSED}, map=True,
    ),
    2: _Known("CONCATENATION", _concat, range(2, 9), 10, {0: Slot("axis", "i32"), 1: _FUSED}),
    3: _Known(
        "CONV_2D", _conv, _THREE, 1,
        {**_SIDES, 3: _FUSED, 4: Slot("dilation_w", "i32"), 5: Slot("dilation_h", "i32")}, map=True,
    ),
    4: _Known(
        "DEPTHWISE_CONV_2D", _depthwise, _THREE, 2,
        {
            **_SIDES, 3: Slot("multiplier", "i32"), 4: _FUSED, 5: Slot("dilation_w", "i32"),
            6: Slot("dilation_h", "i32"),
        }, map=True,
    ),
    9: _Known(
        "FULLY_CONNECTED", _linear, _THREE, 8, {0: _FUSED, 2: Slot("keeps", "bool"), 3: Slot("asymmetric", "bool")}
    ),
    18: _Known("MUL", _plain("elementwise"), _TWO, 21, {0: _FUSED}),
    19: _Known("RELU", _plain("same"), _ONE),
    22: _Known("RESHAPE", _plain("reshape", zero=False), _TWO, 17, {}),
    23: _Known("RESIZE_BILINEAR", _resize, _TWO, 15, {2: Slot("corners", "bool"), 3: Slot("half_pixel", "bool")}),
    25: _Known("SOFTMAX", _plain("same"), _ONE, 9, {0: Slot("beta", "f32")}),
    36: _Known("GATHER", _gather, _TWO, 23, {0: Slot("axis", "i32")}),
    39: _Known("TRANSPOSE", _plain("transpose"), _TWO, 26, {}),
    40: _Known("MEAN", _reduce, _TWO, 27, _KEEPS),
    41: _Known("SUB", _plain("elementwise"), _TWO, 28, {0: _FUSED}),
    42: _Known("DIV", _plain("elementwise"), _TWO, 29, {0: _FUSED}),
    49: _Known("SPLIT", _split, _TWO, 35, {0: Slot("parts", "i32")}),
    53: _Known("CAST", _plain("cast", dtype="float32"), _ONE, 37, {}),
    55: _Known("MAXIMUM", _plain("elementwise"), _TWO, 39, {}),
    65: _Known("SLICE", _slice, _THREE, 48, {}),
    76: _Known("RSQRT", _plain("same"), _ONE),
    82: _Known("REDUCE_MAX", _reduce, _TWO, 27, _KEEPS),
    101: _Known("ABS", _plain("same"), _ONE, 78, {}),
    126: _Known("BATCH_MATMUL", _plain("matmul"), _TWO, 101, {}),
    150: _Known("GELU", _plain("same"), _ONE, 116, {0: Slot("approximate", "bool")}),
}  # fmt: skip
"""BuiltinOperator -> what it is. Options that none of our graphs sets are not in the list, so they are refused."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReadOperator:
    """One operator of a checked file.

    Attributes:
        kind: its name.
        outputs: names of its tensors.
        weight: ``int8``, ``float32``, or empty for an operator without weights.
    """

    kind: str
    outputs: tuple[str, ...]
    weight: str


def check(model: bytes, takes: TensorSpec, spec: ModelSpec, budget: Budget | None = None) -> list[ReadOperator]:
    """Checks a whole model.

    Args:
        model: content of the ``.tflite`` file.
        takes: its one input.
        spec: the model's spec, whose input bounds every size.
        budget: adds up what the graph asks for; None makes one.

    Returns:
        Its operators, in order.

    Raises:
        EngineError: anything that is not known, does not fit, or is too large.
    """
    file = FlatBuffer(model)
    found = file.table(file.root(IDENTIFIER), _MODEL)
    graphs, buffers = found.get("graphs", []), found.get("buffers", [])
    if found.get("version") != VERSION or len(graphs) != 1 or not buffers or len(buffers[0].get("data", ())):
        raise EngineError("the model is no LiteRT model, or of a version that none of ours has")
    graph, budget = graphs[0], budget or Budget(spec, len(model))
    tensors = [_declared(tensor, buffers, model) for tensor in graph.get("tensors", [])]
    made: dict[int, Tensor] = {n: tensor.tensor for n, tensor in enumerate(tensors) if tensor.stored}
    _check_input(_listed(graph, "inputs", tensors), tensors, takes, made)
    outputs = _listed(graph, "outputs", tensors)
    read = []
    for entry in graph.get("operators", []):
        operator = _known(entry, found.get("codes", []))
        read.append(_apply(file, operator, entry, tensors, made, budget))
    if not outputs or tensors[outputs[0]].name != LOGITS_NAME or not set(outputs) <= set(made):
        raise EngineError(f"the model's first output is not {LOGITS_NAME}, or nothing computes one of them")
    _check_signature(found.get("signatures", []), graph, tensors)
    return read


@dataclass(frozen=True, slots=True)
class _Declared:
    name: str
    tensor: Tensor
    stored: bool
    coded: bool


def _declared(entry: Mapping[str, Any], buffers: Sequence[Mapping[str, Any]], model: bytes) -> _Declared:
    name, number = str(entry.get("name", "")), int(entry.get("buffer", 0))
    shape = tuple(int(side) for side in entry.get("shape", ()))
    if entry.get("type", 0) not in TYPES or number >= len(buffers) or not shape or any(side < 1 for side in shape):
        raise EngineError(f"the model's tensor {name!r} has a type, a shape or a place that none of ours has")
    dtype, size = TYPES[entry.get("type", 0)]
    data, coded = buffers[number].get("data"), entry.get("quantization")
    if data is None or not len(data):
        if coded is not None or dtype == "int8":
            raise EngineError(f"the model's tensor {name!r} is quantized and not stored: none of ours is")
        return _Declared(name, Tensor(shape, dtype), stored=False, coded=False)
    if len(data) != math.prod(shape) * size:
        raise EngineError(f"the model's weight {name!r} holds {len(data)} bytes; its shape {list(shape)} needs others")
    start = data.__array_interface__["data"][0] - np.frombuffer(model, np.uint8).__array_interface__["data"][0]
    if start % ALIGNMENT:
        raise EngineError(f"the model's weight {name!r} lies at byte {start}, which is no multiple of {ALIGNMENT}")
    if (coded is not None) != (dtype == "int8"):
        raise EngineError(f"the model's weight {name!r} is quantized in another way than ours")
    if coded is not None:
        _check_scales(coded, shape, name)
    value = data.view(np.dtype(dtype)).reshape(shape) if math.prod(shape) <= FOLLOWED and dtype == "int32" else None
    return _Declared(name, Tensor(shape, dtype, value, fixed=True), stored=True, coded=coded is not None)


def _check_scales(coded: Mapping[str, Any], shape: tuple[int, ...], name: str) -> None:
    scales, zeros = coded.get("scale", np.zeros(0)), coded.get("zero", np.zeros(0))
    if len(scales) != shape[0] or len(zeros) != shape[0] or np.any(zeros) or coded.get("axis", 0) != 0:
        raise EngineError(f"the model's weight {name!r} has not one scale and a zero point of 0 per output channel")
    if not np.all(np.isfinite(scales) & (scales > 0)):
        raise EngineError(f"the model's weight {name!r} has a scale that is not a number above 0")


def _listed(entry: Mapping[str, Any], side: str, tensors: Sequence[_Declared]) -> list[int]:
    """Numbers of tensors; one that is left out is refused."""
    numbers = [int(number) for number in entry.get(side, ())]
    if any(not 0 <= number < len(tensors) for number in numbers):
        raise EngineError(f"the model has {side} that are none of its tensors")
    return numbers


def _check_input(
    numbers: Sequence[int], tensors: Sequence[_Declared], takes: TensorSpec, made: dict[int, Tensor]
) -> None:
    listed = [(tensors[n].name, tensors[n].tensor.dtype, tensors[n].tensor.shape) for n in numbers]
    wanted = [(takes.name, takes.dtype, tuple(takes.shape))]
    if listed != wanted or numbers[0] in made:
        raise EngineError(f"the model's inputs are {listed}; the manifest says {wanted}")
    made[numbers[0]] = tensors[numbers[0]].tensor


def _known(entry: Mapping[str, Any], codes: Sequence[Mapping[str, Any]]) -> _Known:
    place = int(entry.get("code", 0))
    if place >= len(codes):
        raise EngineError("the model has an operator without a code")
    number = max(int(codes[place].get("code", 0)), int(codes[place].get("old", 0)))
    operator = OPERATORS.get(number)
    if operator is None:
        raise EngineError(f"the model holds an operator of number {number} that no model of ours has")
    if entry.get("options_type", 0) != operator.options_type or ("options" in entry) != (operator.options is not None):
        raise EngineError(f"the model's operator {operator.name} has options of another kind than ours")
    return operator


def _apply(
    file: FlatBuffer,
    operator: _Known,
    entry: Mapping[str, Any],
    tensors: Sequence[_Declared],
    made: dict[int, Tensor],
    budget: Budget,
) -> ReadOperator:
    inputs, outputs = _listed(entry, "inputs", tensors), _listed(entry, "outputs", tensors)
    name, options = operator.name, {}
    if operator.options is not None:
        options = file.table(entry["options"], TableSchema(f"an operator {name}", operator.options))
    if options.get("fused", 0) or options.get("corners", False) or options.get("approximate", False):
        raise EngineError(f"the model's operator {name} has an option that none of ours has")
    if len(inputs) not in operator.inputs or any(number not in made for number in inputs):
        raise EngineError(f"the model's operator {name} takes what nothing before it computes, or too much of it")
    coded = [number for number in inputs if tensors[number].coded]
    if coded and (name not in ("FULLY_CONNECTED", "CONV_2D") or coded != [inputs[1]]):
        raise EngineError(f"the model's operator {name} reads quantized numbers, which it does not in ours")
    try:
        node = operator.prepare([made[number] for number in inputs], options)
    except (ValueError, IndexError, TypeError) as error:
        raise EngineError(f"the model's operator {name} does not fit its inputs: {error}") from error
    results = budget.apply(node, name)
    for number, result in zip(outputs, results, strict=False):
        shape = (result.shape[0], *result.shape[2:], result.shape[1]) if operator.map else result.shape
        declared = tensors[number]
        if number in made or declared.tensor.shape != shape or declared.tensor.dtype != "float32":
            raise EngineError(
                f"the model's operator {name} gives {list(shape)}, {declared.name!r} is declared otherwise"
            )
        made[number] = Tensor(shape, "float32", fixed=result.fixed)
    if len(outputs) != node.outputs:
        raise EngineError(f"the model's operator {name} has {len(outputs)} outputs")
    weight = tensors[inputs[1]].tensor.dtype if name in ("FULLY_CONNECTED", "CONV_2D", "DEPTHWISE_CONV_2D") else ""
    return ReadOperator(kind=name, outputs=tuple(tensors[number].name for number in outputs), weight=weight)


def _check_signature(
    signatures: Sequence[Mapping[str, Any]], graph: Mapping[str, Any], tensors: Sequence[_Declared]
) -> None:
    """A signature names the graph's own ends and nothing else."""
    for signature in signatures:
        for side in ("inputs", "outputs"):
            named = [(str(entry.get("name", "")), int(entry.get("tensor", 0))) for entry in signature.get(side, [])]
            wanted = [(tensors[number].name, number) for number in _listed(graph, side, tensors)]
            if named != wanted or signature.get("graph", 0):
                raise EngineError(f"the model's signature names other {side} than its graph has")


__all__ = [
    "ALIGNMENT",
    "IDENTIFIER",
    "MAX_OPERATORS",
    "OPERATORS",
    "TYPES",
    "VERSION",
    "Prepare",
    "ReadOperator",
    "check",
]
