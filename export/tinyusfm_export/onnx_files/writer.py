"""ExportGraph -> ONNX: one file, static shapes, opset 20, IR 9.

Tensor names come from the graph.

Opset 20 is the first with Gelu, so LayerNormalization, Gelu and Softmax stay single nodes (a decomposed LayerNorm
overflows in FP16), and it is read by TensorRT 10+, OpenVINO 2024+ and ONNX Runtime 1.17+. A linear ``L`` becomes
MatMul ``L/matmul`` with initialiser ``L.weight`` stored (I, O), and Add with ``L.bias``; a convolution is one Conv.
Written node by node instead of by torch.onnx: the vocabulary is small (net.py), and the names stay those of the
quantization decision. The bytes depend on nothing but the graph; there is no metadata beyond the producer's name.

How a linear or convolution is written is a ``LayerForm``: ``FloatForm`` here, int8 forms in onnx_int8.py. It does not
know engines.

Shapes: static, those of the graph's nodes; linear weights are stored (I, O), convolution weights OIHW.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from tinyusfm_export.graph.forms import NodeForms
from tinyusfm_export.graph.net import as_array
from tinyusfm_runtime.errors import MissingExtra, OutputError, UnsupportedError

if TYPE_CHECKING:
    from onnx import ModelProto
    from torch.fx import Node

    from tinyusfm_export.graph.build import ExportGraph

OPSET = 20
"""ONNX operator set; see the module's docstring."""
IR_VERSION = 9
"""ONNX file format version that goes with opset 20 (onnx 1.15, 2023-10)."""
HALF_STORAGE_FROM = 1024
"""Constants with fewer values stay float32 when weights are stored as float16: nothing to save there."""


_SPLIT_HEADS = re.compile(r"blocks\.\d+\.attn\.[qkv]\.heads")
"""Labels of the reshapes into heads (graph/build.py)."""
_HEADS = re.compile(r"blocks\.\d+\.attn\.([qkv]|context)")
"""Labels of what moves heads before tokens, and back."""


class LayerForm(Protocol):
    """How the layers that hold nearly all weights are written."""

    half_storage: bool
    """Store float weights as float16 and cast them to float32 in the graph."""

    def linear(self, w: OnnxWriter, node: Node, layer: Any) -> None:
        """Writes a linear; its output is ``w.values[node]``."""
        ...

    def conv(self, w: OnnxWriter, node: Node, layer: Any) -> None:
        """Writes a convolution; its output is ``w.values[node]``."""
        ...


def write_onnx(
    graph: ExportGraph, *, float_input: bool = False, form: LayerForm | None = None, flat_heads: bool = False
) -> bytes:
    """Writes a graph as ONNX.

    Args:
        graph: the export graph.
        float_input: take float32 codes 0..255 instead of uint8.
        form: how linears and convolutions are written, or None for float32.
        flat_heads: write attention with three axes (heads, tokens, size) in place of four with a batch of 1: the same
            numbers, and ONNX Runtime moves and multiplies them faster. Other engines match four axes as attention.

    Returns:
        The serialised model; equal graphs give equal bytes.

    Raises:
        MissingExtra: onnx is not installed.
        UnsupportedError: the graph has a node outside the vocabulary.
    """
    helper = _onnx().helper
    writer = OnnxWriter(graph.module, form=form or FloatForm(), float_input=float_input, flat_heads=flat_heads)
    # fx keeps nodes in topological order, so every input is written before its reader
    recorded: Any = graph.module
    for node in recorded.graph.nodes:
        writer.visit(node)
    kind, takes = _onnx().TensorProto, graph.input
    wide = float_input or takes.dtype == "float32"
    image = helper.make_tensor_value_info(takes.name, kind.FLOAT if wide else kind.UINT8, takes.shape)
    outputs = [helper.make_tensor_value_info(name, kind.FLOAT, writer.shapes[name]) for name in graph.outputs]
    body = helper.make_graph(writer.nodes, graph.spec.name, [image], outputs, writer.initializers)
    model = helper.make_model(
        body, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION, producer_name="tinyusfm-edge"
    )
    return serialise(model)


def save_checked(data: bytes, out: Path) -> Path:
    """Writes an ONNX file and runs the full checker on the path.

    A reader would meet it in the same way.

    Raises:
        OutputError: the file cannot be written.
        UnsupportedError: the checker refuses it.
        MissingExtra: onnx is not installed.
    """
    onnx = _onnx()
    try:
        out.write_bytes(data)
    except OSError as error:
        out.unlink(missing_ok=True)
        raise OutputError(f"cannot write {out}: {error.strerror or error}") from error
    try:
        onnx.checker.check_model(str(out), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise UnsupportedError(f"the exported ONNX is not valid: {str(error).splitlines()[0]}") from error
    return out


def serialise(model: ModelProto) -> bytes:
    """Bytes of a model, the same in every process."""
    data: bytes = model.SerializeToString(deterministic=True)
    return data


def _onnx() -> Any:
    try:
        import onnx
    except ImportError as error:
        raise MissingExtra("export", "onnx", "export") from error
    return onnx


class OnnxWriter:
    """Nodes and initialisers written so far; ``visit`` adds those of one fx node.

    Args:
        module: the graph's module.
        form: how linears and convolutions are written.
        float_input: the input is float32 already.
        flat_heads: write attention without its batch axis (see ``write_onnx``).
    """

    def __init__(self, module: Any, *, form: LayerForm, float_input: bool, flat_heads: bool = False) -> None:
        self.module = module
        self.form = form
        self.float_input = float_input
        self.flat_heads = flat_heads
        self.nodes: list[Any] = []
        self.initializers: list[Any] = []
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.values: dict[Node, str] = {}

    def visit(self, node: Node) -> None:
        """Writes one node.

        A node that a form has written already, together with the one before it, is skipped.
        """
        if node in self.values and node.op != "placeholder":
            return
        if node.op == "placeholder":
            self.values[node] = node.meta["path"]
        elif node.op == "get_attr":
            self.values[node] = self.weight(node.meta["path"], getattr(self.module, str(node.target)))
        elif node.op != "output":
            write, layer = _FORMS.of(node, self.module)
            path = node.meta["path"]
            self.values[node], self.shapes[path] = path, node.meta["shape"]
            write(self, node, layer)

    def emit(self, kind: str, node: Node, inputs: list[str], **attributes: Any) -> None:
        """One ONNX node whose output is the fx node's value."""
        self.raw(kind, node.meta["label"], inputs, [self.values[node]], **attributes)

    def raw(self, kind: str, name: str, inputs: list[str], outputs: list[str], **attributes: Any) -> None:
        """One ONNX node."""
        self.nodes.append(_onnx().helper.make_node(kind, inputs, outputs, name=name, **attributes))

    def source(self, node: Node, index: int = 0) -> str:
        """Name of the tensor in a node's argument."""
        return self.values[node.args[index]]  # type: ignore[index]

    def store(self, name: str, array: np.ndarray | np.generic) -> str:
        """Adds an initialiser of the array's own type."""
        self.initializers.append(_onnx().numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def weight(self, name: str, value: Any) -> str:
        """Adds a float32 constant in the form's storage.

        Raises:
            UnsupportedError: a value lies outside float16, which was asked for as storage.
        """
        array = as_array(value)
        if not self.form.half_storage or array.size < HALF_STORAGE_FROM:
            return self.store(name, array)
        if not np.abs(array).max() <= np.finfo(np.float16).max:
            raise UnsupportedError(f"weight {name!r} does not fit float16: export fp32 or bf16")
        self.raw("Cast", f"{name}/widen", [self.store(f"{name}.half", array.astype(np.float16))], [name], to=1)
        return name


class FloatForm:
    """float32 layers, optionally stored as float16.

    Args:
        half_storage: store float weights as float16; engines widen them once when they load the file.
    """

    def __init__(self, *, half_storage: bool = False) -> None:
        self.half_storage = half_storage

    def linear(self, w: OnnxWriter, node: Node, layer: Any) -> None:
        """MatMul and Add."""
        path = str(node.target)
        # (O, I) -> (I, O): MatMul multiplies from the right
        weight = w.weight(f"{path}.weight", as_array(layer.weight).T)
        if layer.bias is None:
            w.raw("MatMul", f"{path}/matmul", [w.source(node), weight], [w.values[node]])
            return
        w.raw("MatMul", f"{path}/matmul", [w.source(node), weight], [f"{path}/product"])
        w.raw("Add", f"{path}/bias", [f"{path}/product", w.weight(f"{path}.bias", layer.bias)], [w.values[node]])

    def conv(self, w: OnnxWriter, node: Node, layer: Any) -> None:
        """Conv with bias."""
        path = str(node.target)
        inputs = [w.source(node), w.weight(f"{path}.weight", layer.weight), w.weight(f"{path}.bias", layer.bias)]
        w.raw("Conv", path, inputs, [w.values[node]], **conv_attributes(layer))


def conv_attributes(layer: Any) -> dict[str, Any]:
    """ONNX attributes of a stride-1 convolution."""
    return {"kernel_shape": list(layer.kernel_size), "pads": list(layer.padding) * 2, "group": layer.groups}


def _linear(w: OnnxWriter, node: Node, layer: Any) -> None:
    w.form.linear(w, node, layer)


def _conv(w: OnnxWriter, node: Node, layer: Any) -> None:
    w.form.conv(w, node, layer)


def _layer_norm(w: OnnxWriter, node: Node, layer: Any) -> None:
    path = str(node.target)
    width = layer.normalized_shape[0]
    inputs = [w.source(node)]
    if layer.weight is None:
        # ONNX demands a scale; ones are what a LayerNorm without affine has
        inputs.append(w.store(f"{path}.scale", np.ones(width, np.float32)))
    else:
        inputs += [w.weight(f"{path}.scale", layer.weight), w.weight(f"{path}.shift", layer.bias)]
    w.emit("LayerNormalization", node, inputs, axis=-1, epsilon=layer.eps)


def _average(w: OnnxWriter, node: Node, layer: Any) -> None:
    w.emit("AveragePool", node, [w.source(node)], kernel_shape=[2, 2], strides=[2, 2])


def _interpolate(w: OnnxWriter, node: Node, _: Any) -> None:
    path = node.meta["path"]
    # all four sizes, so no scale factor is rounded by an engine
    sizes = w.store(f"{path}.sizes", np.array(node.meta["shape"], np.int64))
    mode = {"mode": "linear", "coordinate_transformation_mode": "half_pixel"}
    w.emit("Resize", node, [w.source(node), "", "", sizes], **mode)


def _cast(w: OnnxWriter, node: Node, _: Any) -> None:
    if w.float_input:
        w.values[node] = w.source(node)
    else:
        w.emit("Cast", node, [w.source(node)], to=_onnx().TensorProto.FLOAT)


def _reshape(w: OnnxWriter, node: Node, _: Any) -> None:
    # (1, tokens, heads, size) that attention splits off, without the batch where heads are flat
    wanted = node.meta["shape"][w.flat_heads and bool(_SPLIT_HEADS.fullmatch(node.meta["label"])) :]
    shape = w.store(f"{node.meta['path']}.shape", np.array(wanted, np.int64))
    w.emit("Reshape", node, [w.source(node), shape])


def _permute(w: OnnxWriter, node: Node, _: Any) -> None:
    axes: tuple[int, ...] = tuple(node.args[1])  # type: ignore[arg-type]
    if w.flat_heads and _HEADS.fullmatch(node.meta["label"]):
        # the batch, axis 0, stays where it is in all of them
        axes = tuple(axis - 1 for axis in axes[1:])
    w.emit("Transpose", node, [w.source(node)], perm=list(axes))


def _chunk(w: OnnxWriter, node: Node, _: Any) -> None:
    path = node.meta["path"]
    w.raw("Split", path, [w.source(node)], [f"{path}.{i}" for i in range(3)], axis=-1, num_outputs=3)


def _getitem(w: OnnxWriter, node: Node, _: Any) -> None:
    """A part of a Split needs no node; a slice drops the first token."""
    if isinstance(node.args[1], int):
        return
    path = node.meta["path"]
    # x[:, 1:]: everything behind the class token
    bounds = {"starts": [1], "ends": [np.iinfo(np.int64).max], "axes": [1]}
    names = [w.store(f"{path}.{key}", np.array(value, np.int64)) for key, value in bounds.items()]
    w.emit("Slice", node, [w.source(node), *names])


def _take(w: OnnxWriter, node: Node, _: Any) -> None:
    index = w.store(f"{node.meta['path']}.index", np.array(node.args[1], np.int64))
    w.emit("Gather", node, [w.source(node), index], axis=1)


def _mean(w: OnnxWriter, node: Node, _: Any) -> None:
    # the token axis
    axes = w.store(f"{node.meta['path']}.axes", np.array([1], np.int64))
    w.emit("ReduceMean", node, [w.source(node), axes], keepdims=0)


def _amax(w: OnnxWriter, node: Node, _: Any) -> None:
    axes = w.store(f"{node.meta['path']}.axes", np.array(node.args[1], np.int64))
    w.emit("ReduceMax", node, [w.source(node), axes], keepdims=0)


def _cat(w: OnnxWriter, node: Node, _: Any) -> None:
    w.emit("Concat", node, [w.values[part] for part in node.args[0]], axis=1)  # type: ignore[union-attr, index]


def _unary(kind: str, **attributes: Any) -> Callable[[OnnxWriter, Any, Any], None]:
    return lambda w, node, _: w.emit(kind, node, [w.source(node)], **attributes)


def _binary(kind: str) -> Callable[[OnnxWriter, Any, Any], None]:
    return lambda w, node, _: w.emit(kind, node, [w.source(node, 0), w.source(node, 1)])


_FORMS: NodeForms[Callable[[OnnxWriter, Any, Any], None]] = NodeForms(
    writer="ONNX",
    file="onnx_files/writer.py",
    layers={
        "Linear": _linear,
        "Conv2d": _conv,
        "LayerNorm": _layer_norm,
        "AvgPool2d": _average,
        "GELU": _unary("Gelu"),
        "ReLU": _unary("Relu"),
        "Softmax": _unary("Softmax", axis=-1),
    },
    methods={"to": _cast},
    functions={
        operator.add.__name__: _binary("Add"),
        operator.getitem.__name__: _getitem,
        "matmul": _binary("MatMul"),
        "cat": _cat,
        "reshape": _reshape,
        "permute": _permute,
        "chunk": _chunk,
        "mean": _mean,
        "take_tokens": _take,
        "abs": _unary("Abs"),
        "amax": _amax,
        "interpolate": _interpolate,
    },
)

__all__ = [
    "HALF_STORAGE_FROM",
    "IR_VERSION",
    "OPSET",
    "FloatForm",
    "LayerForm",
    "OnnxWriter",
    "conv_attributes",
    "save_checked",
    "serialise",
    "write_onnx",
]
