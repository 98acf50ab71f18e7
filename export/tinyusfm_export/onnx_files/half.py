"""float32 ONNX -> strongly typed FP16.

Every tensor's type is written down, and what FP16 would spoil stays float32.

TensorRT builds strongly typed engines: it computes in the types that the file names and chooses none itself. So the
casts stand in the file. FP16 carries the products, the residual adds and what only moves data. LayerNormalization (a
variance squares its input), Softmax (exponentials) and ReduceMean (a sum over all tokens) read and write float32, with
a Cast on either side; the outputs are float32, the input stays uint8 (codes up to 255 are exact in FP16). Scales of
QuantizeLinear and DequantizeLinear become FP16 with what they scale; onnx_int8.py writes them so that this is exact.

It does not know graphs of other vocabularies than net.py's, nor engines.

Shapes are those of the model; only element types change.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from tinyusfm_export.quantize.ptq import on_scales, quantize_weight
from tinyusfm_runtime.errors import MissingExtra, UnsupportedError

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

    from tinyusfm_export.quantize.decision import QuantDecision

KEPT_FLOAT = frozenset({"LayerNormalization", "ReduceMean", "Softmax"})
"""Operators that read and write float32."""
_FLOAT, _HALF = 1, 10  # TensorProto.FLOAT, TensorProto.FLOAT16


def half_onnx(data: bytes) -> bytes:
    """Types a float32 model in FP16.

    Args:
        data: ONNX as writer.py or ``qdq_onnx`` writes it.

    Returns:
        The serialised model; equal models give equal bytes.

    Raises:
        MissingExtra: onnx is not installed.
        UnsupportedError: a weight lies outside FP16.
    """
    try:
        import onnx
    except ImportError as error:
        raise MissingExtra("export", "onnx", "export") from error
    model = onnx.load_model_from_string(data)
    _Typer(onnx, model).rewrite()
    typed: bytes = model.SerializeToString(deterministic=True)
    return typed


def half_scale(scale: np.ndarray | np.floating) -> np.ndarray:
    """The smallest float16 numbers that are not smaller, as float32.

    A grid with this step still covers the range.

    Args:
        scale: positive steps.
    """
    # nearest float16, and one step up where that lies below
    near = np.asarray(scale, np.float32).astype(np.float16)
    up = np.where(near.astype(np.float32) < scale, np.nextafter(near, np.float16(np.inf)), near)
    return up.astype(np.float32)


def half_weight(weight: np.ndarray, decision: QuantDecision) -> np.ndarray:
    """What a weight is after rounding.

    The decision's codes on steps that FP16 holds (see bias_shift.py).

    Args:
        weight: float32, output channels first.
        decision: says how wide the codes are.
    """
    scales = half_scale(quantize_weight(weight, limit=decision.weight_limit)[1])
    return on_scales(weight, scales, decision.weight_limit)


class _Typer:
    """Rewrites one model.

    ``place`` knows under which name a tensor exists in which type.
    """

    def __init__(self, onnx: Any, model: ModelProto) -> None:
        self.onnx = onnx
        self.graph = model.graph
        self.constants = {tensor.name: tensor for tensor in model.graph.initializer}
        self.place: dict[str, dict[int, str]] = {}
        self.nodes: list[NodeProto] = []
        self.stored: dict[str, Any] = {}
        self.outputs = {output.name for output in model.graph.output}

    def rewrite(self) -> None:
        """Types every node in turn and puts the nodes and constants back into the model."""
        for node in list(self.graph.node):
            self._node(node)
        del self.graph.node[:], self.graph.initializer[:]
        self.graph.node.extend(self.nodes)
        self.graph.initializer.extend(self.stored.values())

    def _node(self, node: NodeProto) -> None:
        if node.op_type == "Cast":
            # the one Cast of a float32 file takes the image's codes to floats: codes 0..255 are exact in FP16
            node.attribute[0].i = _HALF
        wanted = _FLOAT if node.op_type in KEPT_FLOAT else _HALF
        node.input[:] = [self._input(name, wanted) for name in node.input]
        # a QuantizeLinear reads a float and gives int8 codes, which have no place here
        floats = node.op_type != "QuantizeLinear"  # whose output is int8
        names = [self._output(name, wanted) if floats else name for name in node.output]
        casts = [(new, name) for new, name in zip(names, node.output, strict=True) if new != name]
        node.output[:] = names
        self.nodes.append(node)
        for half, name in casts:
            self._cast(half, name, _FLOAT)

    def _input(self, name: str, wanted: int) -> str:
        """Name under which a node reads a tensor in the wanted type.

        Adds the Cast or the constant it needs.
        """
        if name in self.constants:
            return self._constant(name, wanted)
        places = self.place.get(name)
        if places is None:  # the image, int8 codes, or an input that is left out
            return name
        if wanted not in places:
            places[wanted] = f"{name}/{'half' if wanted == _HALF else 'float'}"
            self._cast(next(iter(places.values())), places[wanted], wanted)
        return places[wanted]

    def _output(self, name: str, wanted: int) -> str:
        """Name of a node's output.

        An output of the graph keeps its own for the float32 it ends in.
        """
        if wanted == _HALF and name in self.outputs:
            self.place[name] = {_HALF: f"{name}/half", _FLOAT: name}
            return f"{name}/half"
        self.place[name] = {wanted: name}
        return name

    def _constant(self, name: str, wanted: int) -> str:
        tensor = self.constants[name]
        if tensor.data_type != _FLOAT or wanted == _FLOAT:
            self.stored.setdefault(name, tensor)
            return name
        new = f"{name}/half"
        if new not in self.stored:
            array = self.onnx.numpy_helper.to_array(tensor)
            if not np.abs(array).max(initial=0.0) <= np.finfo(np.float16).max:
                raise UnsupportedError(f"constant {name!r} does not fit FP16: export fp32")
            self.stored[new] = self.onnx.numpy_helper.from_array(array.astype(np.float16), new)
        return new

    def _cast(self, source: str, target: str, kind: int) -> None:
        self.nodes.append(self.onnx.helper.make_node("Cast", [source], [target], name=f"{target}/cast", to=kind))


__all__ = ["KEPT_FLOAT", "half_onnx", "half_scale", "half_weight"]
