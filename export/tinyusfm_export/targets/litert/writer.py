"""The export graph as operators of LiteRT.

Every kind of node of net.py is one or a few built-in operators; there is no custom one.

* Convolutions read maps with channels last here, so the graph's NCHW maps are kept that way and turned only where a
  product or an output needs them. Tokens are channels-last already: what turns them into a map is then a reshape.
* int8 is dynamic-range: int8 weights with one scale per output channel, float activations that the kernel quantizes
  row by row while it runs. The decision says which layers; its static ranges are not used.
* Codes are scaled by 1/256 in front of the first linear and its weights by 256, both exact, since the folded weights
  would lie below the smallest normal FP16 number, and accelerators of phones compute in FP16.
* LayerNorm is written so that no step overflows FP16, see ``normalised``.

It does not know files' tables, engines or how an artefact is run.

Shapes: tokens B N D; maps N h w C in the file; linear weights O I; convolution weights O k k I.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from tinyusfm_export.graph.forms import NodeForms
from tinyusfm_export.graph.net import as_array, shape_of
from tinyusfm_export.quantize.decision import QuantDecision
from tinyusfm_export.quantize.ptq import quantize_weight
from tinyusfm_export.targets.litert.flatbuffer import ModelFile
from tinyusfm_runtime.errors import UnsupportedError

if TYPE_CHECKING:
    from torch.fx import Node

    from tinyusfm_export.graph.build import ExportGraph

CODE_SCALE = 256.0
"""Codes 0..255 are divided by this power of two, and the first linear's weights multiplied with it."""
_FIRST = "patch_embed"
_SAME, _VALID = 0, 1  # tflite.Padding


@dataclass(frozen=True, slots=True)
class Value:
    """A node's value in the file.

    Attributes:
        number: of its tensor.
        last: the graph's axis 1, channels, lies last in the file.
    """

    number: int
    last: bool = False


def write_model(graph: ExportGraph, decision: QuantDecision) -> bytes:
    """Writes the whole graph.

    Args:
        graph: the export graph, or a stage of a chain.
        decision: what becomes int8.

    Returns:
        Content of a ``.tflite`` file.

    Raises:
        MissingExtra: a package of the extra ``litert`` is not installed.
        UnsupportedError: a tensor that the graph has not, or a node outside the vocabulary.
    """
    unknown = sorted(set(decision.quantized()) - set(graph.linear_inputs))
    if unknown:
        raise UnsupportedError(f"the decision names {unknown[0]!r}, which this graph has not: decide again")
    return LiteRtWriter(graph, decision).write()


class LiteRtWriter:
    """Operators written so far.

    Args:
        graph: the export graph.
        decision: what becomes int8.
    """

    def __init__(self, graph: ExportGraph, decision: QuantDecision) -> None:
        self.graph = graph
        self.module: Any = graph.module
        self.decision = decision
        self.file = ModelFile(f"{graph.spec.name}, {graph.spec.task.value}, {decision.precision}")
        self.values: dict[Node, Value] = {}
        self._names: set[str] = set(graph.outputs) | {graph.input.name}

    def write(self) -> bytes:
        """Writes every node and finishes the file."""
        inputs: list[int] = []
        outputs: list[int] = []
        for node in self.module.graph.nodes:
            if node.op == "placeholder":
                inputs.append(self.file.tensor(self.graph.input.name, shape_of(node), self.graph.input.dtype))
                self.values[node] = Value(inputs[0])
            elif node.op == "get_attr":
                array = as_array(getattr(self.module, str(node.target))).astype(np.float32)
                self.values[node] = Value(self.file.constant(str(node.meta["path"]), array))
            elif node.op == "output":
                outputs = [self.output(end, name) for end, name in zip(node.args[0], self.graph.outputs, strict=True)]
            else:
                write, layer = _FORMS.of(node, self.module)
                self.values[node] = write(self, node, layer)
        return self.file.finish(inputs, outputs)

    def output(self, node: Node, name: str) -> int:
        """A tensor of the graph's own shape that bears the output's name."""
        number = self.plain(node)
        self.file.tensors[number].name = name
        return number

    def emit(self, kind: str, inputs: list[int], shape: tuple[int, ...], name: str, **options: Any) -> int:
        """One operator with one float output.

        Returns:
            The output's number.
        """
        while name in self._names:
            name += "_"
        self._names.add(name)
        made = self.file.tensor(name, shape)
        self.file.operator(kind, inputs, [made], **options)
        return made

    def whole(self, values: tuple[int, ...] | list[int]) -> int:
        """A stored list of whole numbers."""
        return self.file.constant("numbers", np.asarray(values, np.int32))

    def scalar(self, value: float) -> int:
        """A stored number."""
        return self.file.constant("number", np.asarray([value], np.float32))

    def value(self, node: Node, index: int = 0) -> Value:
        """The value of a node's argument, as it lies in the file."""
        return self.values[node.args[index]]  # type: ignore[index]

    def source(self, node: Node, index: int = 0) -> int:
        """The number of a node's argument in the graph's own order of axes."""
        return self.plain(node.args[index])  # type: ignore[arg-type]

    def plain(self, node: Node) -> int:
        """The number of a node's value with the graph's own order of axes."""
        found = self.values[node]
        if not found.last:
            return found.number
        shape, path = shape_of(node), str(node.meta["label"])
        if shape[1] == 1:
            number = self.reshaped(found.number, shape, f"{path}/plain")
        else:
            axes = (0, len(shape) - 1, *range(1, len(shape) - 1))
            number = self.emit("TRANSPOSE", [found.number, self.whole(axes)], shape, f"{path}/plain")
        self.values[node] = Value(number)
        return number

    def reshaped(self, number: int, shape: tuple[int, ...], name: str) -> int:
        """The same numbers in another shape."""
        return self.emit("RESHAPE", [number, self.whole(shape)], shape, name)

    def weight(self, node: Node, stored: np.ndarray) -> int:
        """A layer's weight, in int8 where the decision says so.

        Args:
            node: the layer.
            stored: float32 with output channels first.
        """
        path = str(node.target)
        quant = self.decision.tensors.get(node.args[0].meta["path"])  # type: ignore[union-attr]
        if quant is None or quant.mode == "float":
            return self.file.constant(f"{path}.weight", stored)
        codes, scales = quantize_weight(stored, limit=self.decision.weight_limit)
        return self.file.constant(f"{path}.weight", codes, scales)

    def bias(self, node: Node, layer: Any, outputs: int) -> int:
        """A layer's bias; zeros where it has none."""
        bias = np.zeros(outputs) if layer.bias is None else as_array(layer.bias)
        return self.file.constant(f"{node.target}.bias", bias.astype(np.float32))


def _linear(w: LiteRtWriter, node: Node, layer: Any) -> Value:
    weight = as_array(layer.weight).astype(np.float32)
    weight = weight * np.float32(CODE_SCALE) if str(node.target) == _FIRST else weight
    stored = w.weight(node, weight)
    inputs = [w.source(node), stored, w.bias(node, layer, len(weight))]
    options = {"KeepNumDims": True}
    if w.file.tensors[stored].scales is not None:
        options["AsymmetricQuantizeInputs"] = True
    return Value(w.emit("FULLY_CONNECTED", inputs, shape_of(node), str(node.meta["label"]), **options))


def _conv(w: LiteRtWriter, node: Node, layer: Any) -> Value:
    weight, outputs = as_array(layer.weight).astype(np.float32), layer.out_channels
    options: dict[str, Any] = {"Padding": _SAME, "StrideW": 1, "StrideH": 1}
    options |= {"DilationWFactor": 1, "DilationHFactor": 1}
    kind, stored = "CONV_2D", 0
    if layer.groups == 1:
        # OIkk -> OkkI
        stored = w.weight(node, np.ascontiguousarray(weight.transpose(0, 2, 3, 1)))
    elif layer.groups == layer.in_channels == outputs:
        kind, options["DepthMultiplier"] = "DEPTHWISE_CONV_2D", 1
        # C1kk -> 1kkC
        stored = w.file.constant(f"{node.target}.weight", np.ascontiguousarray(weight.transpose(1, 2, 3, 0)))
    else:
        raise UnsupportedError(f"layer {node.target} is a convolution in {layer.groups} groups: LiteRT has none such")
    inputs = [_last(w, node).number, stored, w.bias(node, layer, outputs)]
    return Value(w.emit(kind, inputs, _turned(node), str(node.meta["label"]), **options), last=True)


def _last(w: LiteRtWriter, node: Node) -> Value:
    """A node's first argument, a map, with channels last."""
    found = w.value(node)
    if found.last:
        return found
    _, channels, rows, cols = shape_of(node.args[0])  # type: ignore[arg-type]
    shape = (1, rows, cols, channels)
    return Value(w.emit("TRANSPOSE", [found.number, w.whole((0, 2, 3, 1))], shape, f"{node.target}/map"), last=True)


def _turned(node: Node) -> tuple[int, ...]:
    """A node's shape with channels last."""
    batch, channels, *rest = shape_of(node)
    return (batch, *rest, channels)


def _layer_norm(w: LiteRtWriter, node: Node, layer: Any) -> Value:
    number = normalised(w, w.source(node), str(node.meta["label"]), layer.eps)
    if layer.weight is None:
        return Value(number)
    shape, path = shape_of(node), str(node.meta["label"])
    gain, shift = (
        w.file.constant(f"{node.target}.{name}", as_array(getattr(layer, name)).astype(np.float32))
        for name in ("weight", "bias")
    )
    scaled = w.emit("MUL", [number, gain], shape, f"{path}/scaled")
    return Value(w.emit("ADD", [scaled, shift], shape, f"{path}/shifted"))


def normalised(w: LiteRtWriter, x: int, path: str, eps: float) -> int:
    """LayerNorm over the last axis in steps of which none overflows FP16.

    The plain form squares deviations: a token with one value of 300 overflows FP16 there, and a graph that
    computes in FP16 answers NaN or zeros without an error. Here every token is divided by m, its largest magnitude, but
    at least sqrt(eps). With a = x / m the result is the same for every m > 0:

        (a - mean a) / sqrt(mean (a - mean a)^2 + (sqrt(eps) / m)^2)

    and nothing in it is larger than 2, its square 4, its sum 4 D.

    Args:
        w: the writer.
        x: number of the tensor (..., D).
        path: name of the node.
        eps: of the norm.

    Returns:
        The result's number.
    """
    shape = w.file.shape(x)
    thin = (*shape[:-1], 1)
    axis, root = w.whole([len(shape) - 1]), float(np.sqrt(eps))
    size = w.emit("ABS", [x], shape, f"{path}/abs")
    largest = w.emit("REDUCE_MAX", [size, axis], thin, f"{path}/largest", KeepDims=True)
    bound = w.emit("MAXIMUM", [largest, w.scalar(root)], thin, f"{path}/bound")
    scaled = w.emit("DIV", [x, bound], shape, f"{path}/scaled_down")
    mean = w.emit("MEAN", [scaled, axis], thin, f"{path}/mean", KeepDims=True)
    centred = w.emit("SUB", [scaled, mean], shape, f"{path}/centred")
    square = w.emit("MUL", [centred, centred], shape, f"{path}/square")
    variance = w.emit("MEAN", [square, axis], thin, f"{path}/variance", KeepDims=True)
    share = w.emit("DIV", [w.scalar(root), bound], thin, f"{path}/share")
    rest = w.emit("MUL", [share, share], thin, f"{path}/rest")
    total = w.emit("ADD", [variance, rest], thin, f"{path}/total")
    factor = w.emit("RSQRT", [total], thin, f"{path}/factor")
    return w.emit("MUL", [centred, factor], shape, path)


def _cast(w: LiteRtWriter, node: Node, _: Any) -> Value:
    number, path, shape = w.source(node), str(node.meta["label"]), shape_of(node)
    if w.graph.input.dtype != "float32":
        number = w.emit("CAST", [number], shape, f"{path}/float")
    return Value(w.emit("MUL", [number, w.scalar(1.0 / CODE_SCALE)], shape, path))


def _chunk(w: LiteRtWriter, node: Node, _: Any) -> Value:
    """Three tensors with numbers one behind the other; the value is the first."""
    *head, width = shape_of(node)
    names = [f"{node.meta['label']}.{part}" for part in range(3)]
    made = [w.file.tensor(name, (*head, width // 3)) for name in names]
    w.file.operator("SPLIT", [w.whole([len(head)]), w.source(node)], made, NumSplits=3)
    return Value(made[0])


def _getitem(w: LiteRtWriter, node: Node, _: Any) -> Value:
    """A part of a split is no operator; a slice drops the first token."""
    if isinstance(node.args[1], int):
        return Value(w.value(node).number + node.args[1])
    shape = shape_of(node)
    begin = (0, 1, *(0 for _ in shape[2:]))
    inputs = [w.source(node), w.whole(begin), w.whole(shape)]
    return Value(w.emit("SLICE", inputs, shape, str(node.meta["label"])))


def _take(w: LiteRtWriter, node: Node, _: Any) -> Value:
    """Tokens by their numbers, along axis 1."""
    inputs = [w.source(node), w.whole(node.args[1])]  # type: ignore[arg-type]
    return Value(w.emit("GATHER", inputs, shape_of(node), str(node.meta["label"]), Axis=1))


def _matmul(w: LiteRtWriter, node: Node, _: Any) -> Value:
    """Batched product; a constant matrix gets the other side's rank."""
    numbers = [w.source(node, index) for index in range(2)]
    rank = max(len(w.file.shape(number)) for number in numbers)
    for index, number in enumerate(numbers):
        shape = w.file.shape(number)
        if len(shape) < rank:
            constant = node.args[index]
            array = as_array(getattr(w.module, str(constant.target))).astype(np.float32)  # type: ignore[union-attr]
            raised = array.reshape((1,) * (rank - len(shape)) + shape)
            numbers[index] = w.file.constant(f"{constant.meta['path']}/raised", raised)  # type: ignore[union-attr]
    return Value(w.emit("BATCH_MATMUL", numbers, shape_of(node), str(node.meta["label"])))


def _add(w: LiteRtWriter, node: Node, _: Any) -> Value:
    values = [w.value(node, index) for index in range(2)]
    last = values[0].last and values[1].last
    numbers = [value.number for value in values] if last else [w.source(node, index) for index in range(2)]
    shape = _turned(node) if last else shape_of(node)
    return Value(w.emit("ADD", numbers, shape, str(node.meta["label"])), last=last)


def _cat(w: LiteRtWriter, node: Node, _: Any) -> Value:
    parts = [w.plain(part) for part in node.args[0]]  # type: ignore[union-attr, arg-type]
    return Value(w.emit("CONCATENATION", parts, shape_of(node), str(node.meta["label"]), Axis=1))


def _reshape(w: LiteRtWriter, node: Node, _: Any) -> Value:
    found, shape = w.value(node), shape_of(node)
    before = shape_of(node.args[0])  # type: ignore[arg-type]
    # (1, C, N) that lies as (1, N, C) becomes (1, C, h, w) that lies as (1, h, w, C)
    if found.last and len(before) == 3 and len(shape) == 4 and shape[1] == before[1]:
        return Value(w.reshaped(found.number, _turned(node), str(node.meta["label"])), last=True)
    return Value(w.reshaped(w.source(node), shape, str(node.meta["label"])))


def _permute(w: LiteRtWriter, node: Node, _: Any) -> Value:
    axes = tuple(int(axis) for axis in node.args[1])  # type: ignore[union-attr, arg-type]
    if axes == (0, 2, 1) and not w.value(node).last:
        return Value(w.value(node).number, last=True)
    return Value(w.emit("TRANSPOSE", [w.source(node), w.whole(axes)], shape_of(node), str(node.meta["label"])))


def _interpolate(w: LiteRtWriter, node: Node, _: Any) -> Value:
    shape = _turned(node)
    inputs = [_last(w, node).number, w.whole(shape[1:3])]
    label = str(node.meta["label"])
    return Value(w.emit("RESIZE_BILINEAR", inputs, shape, label, AlignCorners=False, HalfPixelCenters=True), last=True)


def _average(w: LiteRtWriter, node: Node, _: Any) -> Value:
    window = {"Padding": _VALID, "StrideW": 2, "StrideH": 2, "FilterWidth": 2, "FilterHeight": 2}
    number = _last(w, node).number
    return Value(w.emit("AVERAGE_POOL_2D", [number], _turned(node), str(node.meta["label"]), **window), last=True)


def _mean(w: LiteRtWriter, node: Node, _: Any) -> Value:
    """Mean over the token axis 1."""
    inputs = [w.source(node), w.whole([1])]
    return Value(w.emit("MEAN", inputs, shape_of(node), str(node.meta["label"]), KeepDims=False))


def _amax(w: LiteRtWriter, node: Node, _: Any) -> Value:
    axes = [int(axis) for axis in node.args[1]]  # type: ignore[union-attr, arg-type]
    inputs = [w.source(node), w.whole(axes)]
    return Value(w.emit("REDUCE_MAX", inputs, shape_of(node), str(node.meta["label"]), KeepDims=False))


def _same(kind: str, **options: Any) -> Callable[[LiteRtWriter, Any, Any], Value]:
    """The form of an operator that works number by number."""

    def form(w: LiteRtWriter, node: Node, _: Any) -> Value:
        found = w.value(node)
        shape = w.file.shape(found.number)
        return Value(w.emit(kind, [found.number], shape, str(node.meta["label"]), **options), last=found.last)

    return form


def _softmax(w: LiteRtWriter, node: Node, _: Any) -> Value:
    return Value(w.emit("SOFTMAX", [w.source(node)], shape_of(node), str(node.meta["label"]), Beta=1.0))


_FORMS: NodeForms[Callable[[LiteRtWriter, Any, Any], Value]] = NodeForms(
    writer="LiteRT",
    file="targets/litert/writer.py",
    layers={
        "Linear": _linear,
        "Conv2d": _conv,
        "LayerNorm": _layer_norm,
        "AvgPool2d": _average,
        "GELU": _same("GELU", Approximate=False),
        "ReLU": _same("RELU"),
        "Softmax": _softmax,
    },
    methods={"to": _cast},
    functions={
        operator.add.__name__: _add,
        operator.getitem.__name__: _getitem,
        "matmul": _matmul,
        "take_tokens": _take,
        "cat": _cat,
        "reshape": _reshape,
        "permute": _permute,
        "chunk": _chunk,
        "mean": _mean,
        "abs": _same("ABS"),
        "amax": _amax,
        "interpolate": _interpolate,
    },
)

__all__ = ["CODE_SCALE", "LiteRtWriter", "Value", "normalised", "write_model"]
