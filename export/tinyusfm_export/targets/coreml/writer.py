"""The export graph as a MIL program, typed in full.

Every kind of node of net.py is one or two operations of iOS 17.

The program is built operation by operation, without a tracer and without optimising passes, so its names are ours
(``blocks.3.mlp.fc1`` becomes ``blocks_3_mlp_fc1``), equal graphs give equal programs, and what is saved is what was
written. The input is a grey image; its codes are scaled by 1/256 before the first linear and that linear's weights
by 256, both exact, since the folded weights themselves would lie below the smallest normal FP16 number.

* fp32, fp16: every value in that type; outputs are float32.
* int8 (W8A8): ``quantize`` and ``dequantize`` on a layer's input with the decision's own range, symmetric, and
  ``constexpr_affine_dequantize`` on its weight, one scale per output channel; biases and the rest in FP16.
* w4, w6: weights as a palette (palette.py), the rest in FP16.

It does not know packages, files or how a program is run.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from tinyusfm_export.graph.forms import NodeForms
from tinyusfm_export.graph.net import as_array
from tinyusfm_export.onnx_files.half import half_scale
from tinyusfm_export.quantize.decision import PALETTE_BITS, QuantDecision, TensorQuant
from tinyusfm_export.quantize.ptq import codes_on, quantize_weight, symmetric_grid
from tinyusfm_export.targets.coreml.palette import make_palette
from tinyusfm_runtime.engines.coreml import import_coremltools
from tinyusfm_runtime.errors import UnsupportedError
from tinyusfm_runtime.spec import INPUT_NAME

if TYPE_CHECKING:
    from torch.fx import Node

    from tinyusfm_export.graph.build import ExportGraph

CODE_SCALE = 256.0
"""Codes 0..255 are divided by this power of two, and the first linear's weights multiplied with it."""
PALETTE_FROM = 1024
"""Weights with fewer entries stay FP16: their table would weigh as much."""
_FLAT = TensorQuant(mode="float")
_FIRST = "patch_embed"


def write_program(graph: ExportGraph, decision: QuantDecision) -> Any:
    """Builds the program.

    Args:
        graph: the export graph.
        decision: what becomes 8-bit, and the precision of the rest.

    Returns:
        A coremltools MIL ``Program`` of iOS 17.

    Raises:
        MissingExtra: coremltools is not installed.
        UnsupportedError: a dynamic tensor, one the graph has not, a weight outside FP16, or a node outside the
            vocabulary.
    """
    unknown = sorted(set(decision.quantized()) - set(graph.linear_inputs))
    if unknown:
        raise UnsupportedError(f"the decision names {unknown[0]!r}, which this graph has not: decide again")
    dynamic = [name for name, quant in decision.quantized().items() if quant.mode == "dynamic"]
    if dynamic:
        raise UnsupportedError(f"Core ML has static ranges only, {dynamic[0]!r} is dynamic: calibrate it")
    ct = import_coremltools()
    from coremltools.converters.mil import Builder as mb
    from coremltools.converters.mil.mil import types

    writer = MilWriter(graph, decision, mb)

    def body(image: Any) -> Any:
        return writer.write(image)

    # the builder names a function's inputs by its arguments, and `image` is INPUT_NAME
    inputs = [mb.TensorSpec(tuple(graph.spec.input.shape), dtype=types.fp32)]
    return mb.program(input_specs=inputs, opset_version=ct.target.iOS17)(body)


def mil_name(path: str) -> str:
    """A tensor's name in MIL, where only letters, digits and underscores are allowed."""
    return path.replace(".", "_").replace("/", "_")


class MilWriter:
    """Operations written so far.

    Must be used inside a program that coremltools' builder has opened.

    Args:
        graph: the export graph.
        decision: what becomes 8-bit.
        builder: coremltools' builder.
    """

    def __init__(self, graph: ExportGraph, decision: QuantDecision, builder: Any) -> None:
        self.graph = graph
        self.module: Any = graph.module
        self.decision = decision
        self.mb = builder
        self.half = decision.precision != "fp32"
        self.word = "fp16" if self.half else "fp32"
        self.type: Any = np.float16 if self.half else np.float32
        self.palette_bits = PALETTE_BITS.get(decision.precision, 0)
        self.values: dict[Node, Any] = {}

    def write(self, image: Any) -> Any:
        """Writes every node.

        Args:
            image: the program's input.

        Returns:
            Outputs in float32, in the graph's order.
        """
        for node in self.module.graph.nodes:
            if node.op == "placeholder":
                assert image.name == INPUT_NAME
                self.values[node] = image
            elif node.op == "get_attr":
                self.values[node] = self.constant(getattr(self.module, str(node.target)), node.meta["path"])
            elif node.op == "output":
                ends = node.args[0]
            else:
                write, layer = _FORMS.of(node, self.module)
                self.values[node] = write(self, node, layer)
        outputs = zip(ends, self.graph.outputs, strict=True)
        return tuple(self.mb.cast(x=self.values[end], dtype="fp32", name=mil_name(name)) for end, name in outputs)

    def name(self, node: Node) -> str:
        """An operation's name; a graph output's own name is kept for the cast behind it."""
        path = mil_name(node.meta["path"])
        return f"{path}_{self.word}" if node.meta["path"] in self.graph.outputs else path

    def source(self, node: Node, index: int = 0) -> Any:
        """The value of a node's argument."""
        return self.values[node.args[index]]  # type: ignore[index]

    def array(self, value: Any, name: str) -> np.ndarray:
        """A weight in the program's type.

        Raises:
            UnsupportedError: a value lies outside FP16.
        """
        found = as_array(value).astype(np.float32)
        if self.half and not np.abs(found).max(initial=0.0) <= np.finfo(np.float16).max:
            raise UnsupportedError(f"weight {name!r} does not fit float16: export fp32")
        return np.ascontiguousarray(found.astype(self.type))

    def constant(self, value: Any, name: str) -> Any:
        """A stored tensor in the program's type."""
        return self.mb.const(val=self.array(value, name), name=mil_name(name))

    def quant(self, node: Node) -> TensorQuant:
        """How the node's first argument is represented."""
        return self.decision.tensors.get(node.args[0].meta["path"], _FLAT)  # type: ignore[union-attr]

    def rounded(self, node: Node, quant: TensorQuant) -> Any:
        """The node's first argument on its 8-bit grid."""
        path = mil_name(str(node.target))
        scale = half_scale(np.float32(symmetric_grid(quant).scale)).astype(self.type)[()]
        codes = self.mb.quantize(input=self.source(node), scale=scale, output_dtype="int8", name=f"{path}_input_codes")
        return self.mb.dequantize(input=codes, scale=scale, name=f"{path}_input_rounded")

    def codes(self, weight: np.ndarray, name: str) -> Any:
        """A weight as int8 codes with a scale per output channel that FP16 holds exactly."""
        limit = self.decision.weight_limit
        scales = half_scale(quantize_weight(weight, limit=limit)[1])
        return self.mb.constexpr_affine_dequantize(
            quantized_data=codes_on(weight, scales, limit),
            zero_point=np.int8(0),
            scale=scales.astype(self.type),
            axis=0,
            name=f"{name}_weight",
        )

    def affine(self, node: Node, layer: Any, product: Callable[..., Any], column: tuple[int, ...]) -> Any:
        """A linear or convolution in the form that the decision asks for.

        Args:
            node: the node.
            layer: its torch module.
            product: builds the operation from x, weight, bias (None: without) and name.
            column: shape that spreads one number per output channel over the output.
        """
        path, result = mil_name(str(node.target)), self.name(node)
        weight = as_array(layer.weight).astype(np.float32)
        weight = weight * np.float32(CODE_SCALE) if str(node.target) == _FIRST else weight
        bias = None if layer.bias is None else self.array(layer.bias, f"{path}.bias")
        quant = self.quant(node)
        if quant.mode != "float":
            return product(self.rounded(node, quant), self.codes(weight, path), bias, result)
        if not self.palette_bits or weight.size < PALETTE_FROM:
            stored = self.mb.const(val=self.array(weight, f"{path}.weight"), name=f"{path}_weight")
            return product(self.source(node), stored, bias, result)
        palette = make_palette(weight, self.palette_bits)
        looked_up = self.mb.constexpr_lut_to_dense(
            indices=palette.packed(), lut=palette.table, shape=np.array(weight.shape, np.uint32), name=f"{path}_weight"
        )
        y = product(self.source(node), looked_up, None, f"{path}_unscaled")
        scaled = f"{path}_scaled" if bias is not None else result
        y = self.mb.mul(x=y, y=palette.scales.reshape(column), name=scaled)
        return y if bias is None else self.mb.add(x=y, y=bias.reshape(column), name=result)


def _linear(w: MilWriter, node: Node, layer: Any) -> Any:
    def product(x: Any, weight: Any, bias: Any, name: str) -> Any:
        given = {} if bias is None else {"bias": bias}
        return w.mb.linear(x=x, weight=weight, name=name, **given)

    return w.affine(node, layer, product, (-1,))


def _conv(w: MilWriter, node: Node, layer: Any) -> Any:
    pad = [p for p in layer.padding for _ in range(2)]

    def product(x: Any, weight: Any, bias: Any, name: str) -> Any:
        given = {} if bias is None else {"bias": bias}
        return w.mb.conv(x=x, weight=weight, pad_type="custom", pad=pad, groups=layer.groups, name=name, **given)

    return w.affine(node, layer, product, (1, -1, 1, 1))


def _layer_norm(w: MilWriter, node: Node, layer: Any) -> Any:
    path = mil_name(str(node.target))
    given = {}
    if layer.weight is not None:
        given = {"gamma": w.array(layer.weight, f"{path}.gamma"), "beta": w.array(layer.bias, f"{path}.beta")}
    return w.mb.layer_norm(x=w.source(node), axes=[-1], epsilon=w.type(layer.eps), name=w.name(node), **given)


def _cast(w: MilWriter, node: Node, _: Any) -> Any:
    x = w.source(node)
    if w.half:
        x = w.mb.cast(x=x, dtype="fp16", name=mil_name(node.meta["path"]))
    return w.mb.mul(x=x, y=w.type(1.0 / CODE_SCALE), name=f"{mil_name(node.meta['path'])}_scaled")


def _chunk(w: MilWriter, node: Node, _: Any) -> Any:
    return w.mb.split(x=w.source(node), num_splits=3, axis=-1, name=w.name(node))


def _getitem(w: MilWriter, node: Node, _: Any) -> Any:
    """A part of a split is no operation; a slice drops the first token."""
    if isinstance(node.args[1], int):
        return w.source(node)[node.args[1]]
    shape = node.meta["shape"]
    begin = [0, 1] + [0] * (len(shape) - 2)
    return w.mb.slice_by_size(x=w.source(node), begin=begin, size=list(shape), name=w.name(node))


def _matmul(w: MilWriter, node: Node, _: Any) -> Any:
    """Both sides of a product get the same rank.

    Constant matrices of a resize have two axes, maps four.
    """
    x, y = (w.source(node, index) for index in range(2))
    rank = max(len(x.shape), len(y.shape))
    x, y = (v if len(v.shape) == rank else _raised(w, node.args[i], rank) for i, v in enumerate((x, y)))
    return w.mb.matmul(x=x, y=y, name=w.name(node))


def _raised(w: MilWriter, constant: Any, rank: int) -> Any:
    array = w.array(getattr(w.module, str(constant.target)), constant.meta["path"])
    raised = array.reshape((1,) * (rank - array.ndim) + array.shape)
    return w.mb.const(val=raised, name=f"{mil_name(constant.meta['path'])}_raised")


def _cat(w: MilWriter, node: Node, _: Any) -> Any:
    parts = [w.values[part] for part in node.args[0]]  # type: ignore[union-attr, index]
    return w.mb.concat(values=parts, axis=1, name=w.name(node))


def _take(w: MilWriter, node: Node, _: Any) -> Any:
    """Tokens by their numbers, along axis 1."""
    index = np.array(node.args[1], np.int32)
    return w.mb.gather(x=w.source(node), indices=index, axis=1, name=w.name(node))


def _interpolate(w: MilWriter, node: Node, _: Any) -> Any:
    rows, cols = node.meta["shape"][2:]
    return w.mb.resize_bilinear(
        x=w.source(node),
        target_size_height=rows,
        target_size_width=cols,
        sampling_mode="UNALIGN_CORNERS",
        name=w.name(node),
    )


def _average(w: MilWriter, node: Node, _: Any) -> Any:
    return w.mb.avg_pool(x=w.source(node), kernel_sizes=[2, 2], strides=[2, 2], pad_type="valid", name=w.name(node))


def _amax(w: MilWriter, node: Node, _: Any) -> Any:
    axes = [int(axis) for axis in node.args[1]]  # type: ignore[union-attr, arg-type]
    return w.mb.reduce_max(x=w.source(node), axes=axes, keep_dims=False, name=w.name(node))


_FORMS: NodeForms[Callable[[MilWriter, Any, Any], Any]] = NodeForms(
    writer="MIL",
    file="targets/coreml/writer.py",
    layers={
        "Linear": _linear,
        "Conv2d": _conv,
        "LayerNorm": _layer_norm,
        "AvgPool2d": _average,
        "GELU": lambda w, node, _: w.mb.gelu(x=w.source(node), mode="EXACT", name=w.name(node)),
        "ReLU": lambda w, node, _: w.mb.relu(x=w.source(node), name=w.name(node)),
        "Softmax": lambda w, node, _: w.mb.softmax(x=w.source(node), axis=-1, name=w.name(node)),
    },
    methods={"to": _cast},
    functions={
        operator.add.__name__: lambda w, node, _: w.mb.add(x=w.source(node), y=w.source(node, 1), name=w.name(node)),
        operator.getitem.__name__: _getitem,
        "matmul": _matmul,
        "take_tokens": _take,
        "cat": _cat,
        "reshape": lambda w, node, _: w.mb.reshape(x=w.source(node), shape=list(node.meta["shape"]), name=w.name(node)),
        "permute": lambda w, node, _: w.mb.transpose(x=w.source(node), perm=list(node.args[1]), name=w.name(node)),
        "chunk": _chunk,
        "mean": lambda w, node, _: w.mb.reduce_mean(x=w.source(node), axes=[1], keep_dims=False, name=w.name(node)),
        "abs": lambda w, node, _: w.mb.abs(x=w.source(node), name=w.name(node)),
        "amax": _amax,
        "interpolate": _interpolate,
    },
)

__all__ = ["CODE_SCALE", "PALETTE_FROM", "MilWriter", "mil_name", "write_program"]
