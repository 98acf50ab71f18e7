"""The operators that an ONNX model may hold, with their attributes.

And how each is understood by the rules.

All of them compute numbers from numbers. Left out: control flow (If, Loop, Scan), whatever makes a tensor out
of a shape (ConstantOfShape, Expand, Tile, Range, OneHot, Pad), whatever has a size that depends on values (NonZero,
Unique, Compress), random numbers, text, and everything that our targets do not write and no plain network needs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tinyusfm_runtime.graphs.tensors import Node, Tensor

_Inputs = Sequence[Tensor | None]
_Attributes = Mapping[str, Any]
_ONNX_TYPES = {
    1: "float32", 2: "uint8", 3: "int8", 4: "uint16", 5: "int16", 6: "int32", 7: "int64", 9: "bool", 10: "float16",
    11: "float64", 12: "uint32", 16: "bfloat16",
}  # fmt: skip


def _plain(rule: str, **fixed: Any) -> Callable[[str, _Inputs, _Attributes, int], Node]:
    """An operator whose inputs are the rule's own."""
    return lambda kind, inputs, attributes, outputs: Node(rule, inputs, {**attributes, **fixed}, outputs)


def _cast(kind: str, inputs: _Inputs, attributes: _Attributes, outputs: int) -> Node:
    return Node("cast", inputs, {"dtype": _ONNX_TYPES.get(attributes.get("to", 0), "unknown")}, outputs)


def _windows(attributes: _Attributes) -> dict[str, Any]:
    pads = list(attributes.get("pads", ()))
    half = len(pads) // 2
    return {
        "strides": attributes.get("strides", ()),
        "dilations": attributes.get("dilations", ()),
        "pads_begin": pads[:half],
        "pads_end": pads[half:],
        "auto_pad": attributes.get("auto_pad", ""),
        "groups": attributes.get("group", 1),
        "kernel": attributes.get("kernel_shape", ()),
        "round_up": attributes.get("ceil_mode", 0),
        "output_padding": attributes.get("output_padding", ()),
    }


def _conv(kind: str, inputs: _Inputs, attributes: _Attributes, outputs: int) -> Node:
    order = {"QLinearConv": (0, 3), "ConvInteger": (0, 1)}.get(kind, (0, 1))
    dtype = {"QLinearConv": "uint8", "ConvInteger": "int32"}.get(kind, "float32")
    taken = [inputs[place] if place < len(inputs) else None for place in order]
    rule = "conv_transpose" if kind == "ConvTranspose" else "conv"
    return Node(rule, taken, {**_windows(attributes), "dtype": dtype}, outputs)


def _pool(kind: str, inputs: _Inputs, attributes: _Attributes, outputs: int) -> Node:
    return Node("pool", inputs[:1], _windows(attributes), outputs)


def _matmul(kind: str, inputs: _Inputs, attributes: _Attributes, outputs: int) -> Node:
    order = (0, 3) if kind == "QLinearMatMul" else (0, 1)
    taken = [inputs[place] if place < len(inputs) else None for place in order]
    dtype = {"QLinearMatMul": "uint8", "MatMulInteger": "int32"}.get(kind, "float32")
    turned = {"transpose_a": attributes.get("transA", 0), "transpose_b": attributes.get("transB", 0)}
    return Node("matmul", taken, {**turned, "dtype": dtype}, outputs)


def _reshape(kind: str, inputs: _Inputs, attributes: _Attributes, outputs: int) -> Node:
    return Node("reshape", inputs, {"zero": not attributes.get("allowzero", 0)}, outputs)


def _split(kind: str, inputs: _Inputs, attributes: _Attributes, outputs: int) -> Node:
    values = {"axis": attributes.get("axis", 0), "count": attributes.get("num_outputs", outputs)}
    return Node("split", inputs, values, outputs)


def _reduce(kind: str, inputs: _Inputs, attributes: _Attributes, outputs: int) -> Node:
    values = {"keeps": attributes.get("keepdims", 1), "nothing_if_empty": attributes.get("noop_with_empty_axes", 0)}
    if "axes" in attributes:
        values["axes"] = attributes["axes"]
    return Node("reduce", inputs, values, outputs)


def _arg(kind: str, inputs: _Inputs, attributes: _Attributes, outputs: int) -> Node:
    return Node(
        "arg_extreme", inputs, {"axis": attributes.get("axis", 0), "keeps": attributes.get("keepdims", 1)}, outputs
    )


def _quantise(kind: str, inputs: _Inputs, attributes: _Attributes, outputs: int) -> Node:
    zero = inputs[2] if len(inputs) > 2 else None
    dtype = "float32" if kind == "DequantizeLinear" else zero.dtype if zero is not None else "uint8"
    return Node("same", inputs, {"dtype": dtype}, outputs)


@dataclass(frozen=True, slots=True)
class OnnxOperator:
    """One operator.

    Attributes:
        prepare: makes the rule's node from kind, inputs, attributes and the number of outputs.
        attributes: names that it may have.
    """

    prepare: Callable[[str, _Inputs, _Attributes, int], Node]
    attributes: frozenset[str]


def _of(prepare: Callable[[str, _Inputs, _Attributes, int], Node], *attributes: str) -> OnnxOperator:
    return OnnxOperator(prepare, frozenset(attributes))


_WINDOW = ("auto_pad", "dilations", "kernel_shape", "pads", "strides")
_UNARY = ("Abs", "Neg", "Relu", "Sigmoid", "Tanh", "Erf", "Exp", "Log", "Sqrt", "Reciprocal", "Floor", "Ceil", "Round",
          "Identity", "Sign", "Softplus", "HardSwish", "Not")  # fmt: skip
_BINARY = ("Add", "Sub", "Mul", "Div", "Pow", "Max", "Min", "PRelu")
_COMPARED = ("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "And", "Or")
_REDUCED = ("ReduceMean", "ReduceMax", "ReduceMin", "ReduceSum", "ReduceL2", "ReduceSumSquare")

OPERATORS: Mapping[str, OnnxOperator] = {
    **{kind: _of(_plain("same")) for kind in _UNARY},
    **{kind: _of(_plain("elementwise")) for kind in _BINARY},
    **{kind: _of(_plain("elementwise", dtype="bool")) for kind in _COMPARED},
    **{kind: _of(_reduce, "axes", "keepdims", "noop_with_empty_axes") for kind in _REDUCED},
    "Where": _of(_plain("elementwise", selects=True)),
    "Clip": _of(_plain("same")),
    "Gelu": _of(_plain("same"), "approximate"),
    "LeakyRelu": _of(_plain("same"), "alpha"),
    "Elu": _of(_plain("same"), "alpha"),
    "HardSigmoid": _of(_plain("same"), "alpha", "beta"),
    "Softmax": _of(_plain("same"), "axis"),
    "LogSoftmax": _of(_plain("same"), "axis"),
    "LayerNormalization": _of(_plain("normalised"), "axis", "epsilon", "stash_type"),
    "InstanceNormalization": _of(_plain("same"), "epsilon"),
    "GroupNormalization": _of(_plain("same"), "epsilon", "num_groups", "stash_type"),
    "BatchNormalization": _of(_plain("same"), "epsilon", "momentum"),
    "Cast": _of(_cast, "to", "saturate"),
    "Constant": _of(_plain("same"), "value", "value_float", "value_floats", "value_int", "value_ints"),
    "MatMul": _of(_matmul),
    "Gemm": _of(_matmul, "alpha", "beta", "transA", "transB"),
    "MatMulInteger": _of(_matmul),
    "QLinearMatMul": _of(_matmul),
    "Conv": _of(_conv, *_WINDOW, "group"),
    "ConvInteger": _of(_conv, *_WINDOW, "group"),
    "QLinearConv": _of(_conv, *_WINDOW, "group"),
    "ConvTranspose": _of(_conv, *_WINDOW, "group", "output_padding"),
    "AveragePool": _of(_pool, *_WINDOW, "ceil_mode", "count_include_pad"),
    "MaxPool": _of(_pool, *_WINDOW, "ceil_mode", "storage_order"),
    "GlobalAveragePool": _of(_pool),
    "GlobalMaxPool": _of(_pool),
    "Reshape": _of(_reshape, "allowzero"),
    "Transpose": _of(_plain("transpose"), "perm"),
    "Concat": _of(_plain("concat"), "axis"),
    "Split": _of(_split, "axis", "num_outputs"),
    "Slice": _of(_plain("cut")),
    "Gather": _of(_plain("gather"), "axis"),
    "Squeeze": _of(_plain("squeeze")),
    "Unsqueeze": _of(_plain("unsqueeze")),
    "Flatten": _of(_plain("flatten"), "axis"),
    "Resize": _of(
        _plain("resize"), "antialias", "axes", "coordinate_transformation_mode", "cubic_coeff_a", "exclude_outside",
        "extrapolation_value", "keep_aspect_ratio_policy", "mode", "nearest_mode",
    ),
    "ArgMax": _of(_arg, "axis", "keepdims", "select_last_index"),
    "ArgMin": _of(_arg, "axis", "keepdims", "select_last_index"),
    "QuantizeLinear": _of(_quantise, "axis", "saturate"),
    "DequantizeLinear": _of(_quantise, "axis"),
    "DynamicQuantizeLinear": _of(_plain("quantised")),
}  # fmt: skip
"""Kind -> what it may have and how it is understood."""

__all__ = ["OPERATORS", "OnnxOperator"]
