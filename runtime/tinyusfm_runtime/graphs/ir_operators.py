"""The layers that an OpenVINO model may hold, with their attributes.

And how each is understood by the rules.

All of them compute numbers from numbers. Left out: bodies (If, Loop, TensorIterator), variables (Assign, ReadValue),
whatever has a size that depends on values (NonZero, Unique), random numbers, text, paged attention, custom layers, and
everything that our targets do not write and no plain network needs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tinyusfm_runtime.graphs.tensors import Node, Tensor

_Inputs = Sequence[Tensor]
_Data = Mapping[str, str]
_Prepare = Callable[[_Inputs, _Data, int], Node]
TYPES: Mapping[str, tuple[str, int]] = {
    "f64": ("float64", 64), "f32": ("float32", 32), "f16": ("float16", 16), "bf16": ("bfloat16", 16),
    "i64": ("int64", 64), "i32": ("int32", 32), "i8": ("int8", 8), "u8": ("uint8", 8), "i4": ("int4", 4),
    "u4": ("uint4", 4), "boolean": ("bool", 8),
}  # fmt: skip
"""Element type -> name and bits of one number."""


def _numbers(data: _Data, name: str) -> list[int]:
    """A list of whole numbers in an attribute.

    Raises:
        ValueError: it holds something else.
    """
    text = data.get(name, "")
    return [int(part) for part in text.split(",")] if text.strip() else []


def _truth(data: _Data, name: str, default: bool) -> bool:
    """A truth value in an attribute.

    Raises:
        ValueError: it holds something else.
    """
    text = data.get(name, str(default)).lower()
    if text not in ("true", "false", "1", "0"):
        raise ValueError(f"{name} {text!r}")
    return text in ("true", "1")


def _plain(rule: str, **fixed: Any) -> _Prepare:
    return lambda inputs, data, outputs: Node(rule, inputs, fixed, outputs)


def _arithmetic(does: str = "", dtype: str | None = None) -> _Prepare:
    def prepare(inputs: _Inputs, data: _Data, outputs: int) -> Node:
        if data.get("auto_broadcast", "numpy") not in ("numpy", "none"):
            raise ValueError("auto_broadcast")
        return Node("elementwise", inputs, {"does": does, **({} if dtype is None else {"dtype": dtype})}, outputs)

    return prepare


def _convert(inputs: _Inputs, data: _Data, outputs: int) -> Node:
    dtype, _ = TYPES.get(data.get("destination_type", ""), ("", 0))
    if not dtype:
        raise ValueError("destination_type")
    return Node("cast", inputs, {"dtype": dtype}, outputs)


def _windows(rule: str) -> _Prepare:
    def prepare(inputs: _Inputs, data: _Data, outputs: int) -> Node:
        values: dict[str, Any] = {
            "strides": _numbers(data, "strides"),
            "dilations": _numbers(data, "dilations"),
            "pads_begin": _numbers(data, "pads_begin"),
            "pads_end": _numbers(data, "pads_end"),
            "kernel": _numbers(data, "kernel"),
            "auto_pad": data.get("auto_pad", ""),
            "round_up": data.get("rounding_type", "floor").lower() not in ("floor",),
        }
        if values["auto_pad"] == "valid":
            values |= {"pads_begin": [], "pads_end": []}
        if rule == "pool" and not values["kernel"]:
            raise ValueError("a pool without a kernel")
        return Node(rule, inputs[:2] if rule != "pool" else inputs[:1], values, outputs)

    return prepare


def _matmul(inputs: _Inputs, data: _Data, outputs: int) -> Node:
    values = {name: _truth(data, name, False) for name in ("transpose_a", "transpose_b")}
    return Node("matmul", inputs, values, outputs)


def _reshape(inputs: _Inputs, data: _Data, outputs: int) -> Node:
    return Node("reshape", inputs, {"zero": _truth(data, "special_zero", True)}, outputs)


def _axis(rule: str) -> _Prepare:
    return lambda inputs, data, outputs: Node(rule, inputs, {"axis": (_numbers(data, "axis") or [0])[0]}, outputs)


def _split(inputs: _Inputs, data: _Data, outputs: int) -> Node:
    count = (_numbers(data, "num_splits") or [outputs])[0]
    return Node("split", inputs, {"axis_is_input": True, "count": count}, outputs)


def _reduce(inputs: _Inputs, data: _Data, outputs: int) -> Node:
    return Node("reduce", inputs, {"keeps": _truth(data, "keep_dims", False), "nothing_if_empty": True}, outputs)


def _broadcast(inputs: _Inputs, data: _Data, outputs: int) -> Node:
    mode = data.get("mode", "numpy").lower()
    if mode not in ("numpy", "bidirectional") or len(inputs) > 2:
        raise ValueError(f"mode {mode!r}")
    return Node("spread", inputs, {"both_ways": mode == "bidirectional"}, outputs)


def _gather(inputs: _Inputs, data: _Data, outputs: int) -> Node:
    if _numbers(data, "batch_dims") not in ([], [0]):
        raise ValueError("batch_dims")
    return Node("gather", inputs, {}, outputs)


def _interpolate(inputs: _Inputs, data: _Data, outputs: int) -> Node:
    if any(_numbers(data, "pads_begin") + _numbers(data, "pads_end")):
        raise ValueError("paddings")
    axes = inputs[2].numbers("the axes of a resize") if len(inputs) > 2 else None
    by_size = data.get("shape_calculation_mode", "sizes").lower() == "sizes"
    ordered = [inputs[0], None, None if by_size else inputs[1], inputs[1] if by_size else None]
    return Node("resize", ordered, {"axes": axes}, outputs)


@dataclass(frozen=True, slots=True)
class IrOperator:
    """One layer type.

    Attributes:
        prepare: makes the rule's node from inputs, attributes and the number of outputs; ValueError where it cannot.
        attributes: names that it may have.
    """

    prepare: _Prepare
    attributes: frozenset[str]


def _of(prepare: _Prepare, *attributes: str) -> IrOperator:
    return IrOperator(prepare, frozenset(attributes))


_SLID = ("auto_pad", "dilations", "pads_begin", "pads_end", "strides")
_UNARY = ("Abs", "Negative", "ReLU", "Sigmoid", "Tanh", "Erf", "Exp", "Log", "Sqrt", "Floor", "Ceiling", "Sign",
          "HSwish", "Swish", "SoftPlus", "LogicalNot", "Mish", "HSigmoid")  # fmt: skip
_BINARY = ("Maximum", "Minimum", "Power", "SquaredDifference", "PRelu")
_COMPARED = ("Equal", "Greater", "GreaterEqual", "Less", "LessEqual", "NotEqual", "LogicalAnd", "LogicalOr")

OPERATORS: Mapping[str, IrOperator] = {
    **{kind: _of(_plain("same")) for kind in _UNARY},
    **{kind: _of(_arithmetic(), "auto_broadcast", "m_pythondiv") for kind in _BINARY},
    **{kind: _of(_arithmetic(dtype="bool"), "auto_broadcast") for kind in _COMPARED},
    **{kind: _of(_arithmetic(does), "auto_broadcast")
       for kind, does in (("Add", "add"), ("Subtract", "subtract"), ("Multiply", "multiply"))},
    "Divide": _of(_arithmetic("divide"), "auto_broadcast", "m_pythondiv"),
    **{kind: _of(_reduce, "keep_dims")
       for kind in ("ReduceMean", "ReduceMax", "ReduceMin", "ReduceSum", "ReduceL2")},
    "Parameter": _of(_plain("same"), "shape", "element_type"),
    "Const": _of(_plain("same"), "element_type", "shape", "offset", "size"),
    "Result": _of(_plain("same")),
    "Select": _of(_plain("elementwise", selects=True), "auto_broadcast"),
    "Convert": _of(_convert, "destination_type"),
    "Clamp": _of(_plain("same"), "min", "max"),
    "Elu": _of(_plain("same"), "alpha"),
    "Gelu": _of(_plain("same"), "approximation_mode"),
    "Round": _of(_plain("same"), "mode"),
    "SoftMax": _of(_plain("same"), "axis"),
    "LogSoftmax": _of(_plain("same"), "axis"),
    "MVN": _of(_plain("same"), "eps", "eps_mode", "normalize_variance"),
    "BatchNormInference": _of(_plain("same"), "epsilon"),
    "FakeQuantize": _of(_plain("same"), "auto_broadcast", "levels"),
    "MatMul": _of(_matmul, "transpose_a", "transpose_b"),
    "Convolution": _of(_windows("conv"), *_SLID),
    "GroupConvolution": _of(_windows("group_conv"), *_SLID),
    "AvgPool": _of(_windows("pool"), *_SLID, "exclude-pad", "kernel", "rounding_type"),
    "MaxPool": _of(_windows("pool"), *_SLID, "axis", "index_element_type", "kernel", "rounding_type"),
    "Reshape": _of(_reshape, "special_zero"),
    "Transpose": _of(_plain("transpose")),
    "Concat": _of(_axis("concat"), "axis"),
    "Split": _of(_split, "num_splits"),
    "VariadicSplit": _of(_plain("split", axis_is_input=True)),
    "Slice": _of(_plain("cut", steps_first=True)),
    "Gather": _of(_gather, "batch_dims"),
    "Squeeze": _of(_plain("squeeze"), "allow_axis_skip"),
    "Unsqueeze": _of(_plain("unsqueeze")),
    "ShapeOf": _of(_plain("shape_of"), "output_type"),
    "Range": _of(_plain("count_up"), "output_type"),
    "Broadcast": _of(_broadcast, "mode"),
    "Interpolate": _of(
        _interpolate, "antialias", "coordinate_transformation_mode", "cube_coeff", "mode", "nearest_mode", "pads_begin",
        "pads_end", "shape_calculation_mode",
    ),
}  # fmt: skip
"""Type -> what it may have and how it is understood."""

__all__ = ["OPERATORS", "TYPES", "IrOperator"]
