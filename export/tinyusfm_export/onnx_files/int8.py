"""The decision as ONNX, in two forms.

Explicit Q/DQ, and what ONNX Runtime runs fast on a CPU.

* ``qdq_onnx``: QuantizeLinear and DequantizeLinear around every int8 layer's input, int8 weights with a
  DequantizeLinear per output channel, all zero points 0 and the bias in float. It is what TensorRT 10 and 11 take
  (int32 bias and asymmetric activations are refused there: tensorrt-rtx 1.7.1), and the reference form in plain ONNX.
* ``ort_onnx``: linears as DynamicQuantizeLinear, MatMulInteger, Cast, Mul, Mul, Add, which ONNX Runtime fuses into one
  DynamicQuantizeMatMul each; 3x3 convolutions as QLinearConv with static ranges, whose unsigned output codes are the
  ReLU. Measured on the segmentation student, one Zen 5 core, ONNX Runtime 1.31.1, against its own fp32: dynamic linears
  alone 1.40x, with QLinearConv 1.86x; static linears in place of dynamic ones are no faster and less exact; fusing
  attention into MultiHeadAttention costs 3 %; ConvInteger takes twice the time of fp32; plain Q/DQ is slower than fp32
  (its QLinearMatMul requantizes what the next operator needs in float).

Both are standard ONNX of one opset, without contributed operators. They do not know which engine reads them.

Shapes: linear weights are (O, I) in the graph and (I, O) in the file, as MatMul reads them; convolution weights OIHW.
Scales float32 (O,), one per output channel; activations have one scale, a scalar.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from tinyusfm_export.graph.net import as_array
from tinyusfm_export.onnx_files.half import half_onnx, half_scale
from tinyusfm_export.onnx_files.writer import FloatForm, OnnxWriter, conv_attributes, write_onnx
from tinyusfm_export.quantize.decision import QuantDecision, TensorQuant
from tinyusfm_export.quantize.ptq import codes_on, natural_grid, quantize_weight, symmetric_grid
from tinyusfm_runtime.device.machine import machine_card
from tinyusfm_runtime.errors import UnsupportedError

if TYPE_CHECKING:
    from torch.fx import Node

    from tinyusfm_export.graph.build import ExportGraph

_FLOAT = 1  # TensorProto.FLOAT
_FLAT = TensorQuant(mode="float")
Codes = tuple[np.ndarray, np.ndarray]
"""int8 weight codes, and float32 scales (O,)."""


def qdq_onnx(graph: ExportGraph, decision: QuantDecision, *, half: bool = False) -> bytes:
    """Writes explicit, symmetric Q/DQ.

    Args:
        graph: the export graph.
        decision: an int8 decision with static ranges; a float one gives the float32 file.
        half: type everything that is not int8 in FP16 (onnx_half.py), with scales that are exact in it.

    Raises:
        UnsupportedError: the decision has a dynamic tensor, or names one that the graph has not.
        MissingExtra: onnx is not installed.
    """
    dynamic = [name for name, quant in decision.quantized().items() if quant.mode == "dynamic"]
    if dynamic:
        raise UnsupportedError(f"Q/DQ ONNX has static ranges only, {dynamic[0]!r} is dynamic: calibrate it")
    data = write_onnx(graph, form=_QdqForm(graph, decision, half=half))
    return half_onnx(data) if half else data


def ort_onnx(graph: ExportGraph, decision: QuantDecision) -> bytes:
    """Writes dynamic int8 linears and static int8 convolutions.

    Args:
        graph: the export graph.
        decision: an int8 decision.

    Raises:
        UnsupportedError: the decision names a tensor that the graph has not.
        MissingExtra: onnx is not installed.
    """
    return write_onnx(graph, form=_OrtForm(graph, decision), flat_heads=True)


class _Int8Form(FloatForm):
    """Looks up each layer's part of the decision; layers without one are float32."""

    def __init__(self, graph: ExportGraph, decision: QuantDecision) -> None:
        super().__init__()
        unknown = sorted(set(decision.quantized()) - set(graph.linear_inputs))
        if unknown:
            raise UnsupportedError(f"the decision names {unknown[0]!r}, which this graph has not: decide again")
        self.decision = decision

    def quant(self, node: Node) -> TensorQuant:
        """How the node's first argument is represented."""
        return self.decision.tensors.get(node.args[0].meta["path"], _FLAT)  # type: ignore[union-attr]

    def codes(self, layer: Any) -> Codes:
        """A layer's weight codes and scales, as narrow as the decision says."""
        return quantize_weight(as_array(layer.weight), limit=self.decision.weight_limit)


class _QdqForm(_Int8Form):
    """Symmetric Q/DQ on inputs and weights.

    ``half`` takes scales that FP16 holds exactly.
    """

    def __init__(self, graph: ExportGraph, decision: QuantDecision, *, half: bool) -> None:
        super().__init__(graph, decision)
        self.half = half

    def codes(self, layer: Any) -> Codes:
        codes, scales = super().codes(layer)
        if not self.half:
            return codes, scales
        weight, limit = as_array(layer.weight), self.decision.weight_limit
        # the step grows to the next float16, so the codes are made again on that step
        scales = half_scale(scales)
        return codes_on(weight, scales, limit), scales

    def linear(self, w: OnnxWriter, node: Node, layer: Any) -> None:
        quant = self.quant(node)
        if quant.mode == "float":
            super().linear(w, node, layer)
            return
        path = str(node.target)
        # (I, O)
        weight = _dequantized_weight(w, path, self.codes(layer), transpose=True)
        product = f"{path}/product" if layer.bias is not None else w.values[node]
        # engines fuse DequantizeLinear -> MatMul <- DequantizeLinear into one int8 product
        w.raw("MatMul", f"{path}/matmul", [_qdq(w, path, w.source(node), quant, self.half), weight], [product])
        if layer.bias is not None:
            w.raw("Add", f"{path}/bias", [product, w.weight(f"{path}.bias", layer.bias)], [w.values[node]])

    def conv(self, w: OnnxWriter, node: Node, layer: Any) -> None:
        quant = self.quant(node)
        if quant.mode == "float":
            super().conv(w, node, layer)
            return
        path = str(node.target)
        source = _qdq(w, path, w.source(node), quant, self.half)
        # OIHW; a padding of zeros is exact on a symmetric grid
        weight = _dequantized_weight(w, path, self.codes(layer), transpose=False)
        inputs = [source, weight, w.weight(f"{path}.bias", layer.bias)]
        w.raw("Conv", path, inputs, [w.values[node]], **conv_attributes(layer))


def _qdq(w: OnnxWriter, path: str, source: str, quant: TensorQuant, half: bool) -> str:
    """Rounds a tensor to its symmetric grid."""
    # a scalar, float32
    step = np.float32(symmetric_grid(quant).scale)
    scale = w.store(f"{path}.input_scale", half_scale(step) if half else step)
    zero = w.store(f"{path}.input_zero", np.int8(0))
    w.raw("QuantizeLinear", f"{path}/quantize", [source, scale, zero], [f"{path}/codes"])
    w.raw("DequantizeLinear", f"{path}/dequantize", [f"{path}/codes", scale, zero], [f"{path}/rounded"])
    return f"{path}/rounded"


def _dequantized_weight(w: OnnxWriter, path: str, quantized: Codes, *, transpose: bool) -> str:
    """int8 weights with a scale per output channel.

    ``transpose`` stores a linear's as (I, O).
    """
    codes, scales = quantized
    names = [
        # the axis of the scales is the one of the output channels: 1 in (I, O), 0 in OIHW
        w.store(f"{path}.weight_codes", codes.T if transpose else codes),
        w.store(f"{path}.weight_scale", scales),
        w.store(f"{path}.weight_zero", np.zeros(len(scales), np.int8)),
    ]
    w.raw("DequantizeLinear", f"{path}/weight", names, [f"{path}.weight"], axis=1 if transpose else 0)
    return f"{path}.weight"


class _OrtForm(_Int8Form):
    """Dynamic linears, static convolutions."""

    def linear(self, w: OnnxWriter, node: Node, layer: Any) -> None:
        if self.quant(node).mode == "float":
            super().linear(w, node, layer)
            return
        path = str(node.target)
        # codes (O, I), scales (O,), middle the code of zero
        codes, scales, middle = _stored_weight(*self.codes(layer))
        # the frame's own range: uint8 codes, their step and the code of zero, both scalars
        found = [f"{path}/codes", f"{path}/scale", f"{path}/zero"]
        w.raw("DynamicQuantizeLinear", f"{path}/quantize", [w.source(node)], found)
        weight = w.store(f"{path}.weight_codes", codes.T)
        zero = w.store(f"{path}.weight_zero", middle)
        # int32 sums of (codes - zero)(weight codes - middle), (..., O)
        w.raw("MatMulInteger", f"{path}/matmul", [found[0], weight, found[2], zero], [f"{path}/sums"])
        w.raw("Cast", f"{path}/cast", [f"{path}/sums"], [f"{path}/floats"], to=_FLOAT)
        # (O,): activation step times weight step, as QLinear kernels expect it to be fused
        w.raw("Mul", f"{path}/scales", [found[1], w.store(f"{path}.weight_scale", scales)], [f"{path}/step"])
        product = f"{path}/product" if layer.bias is not None else w.values[node]
        w.raw("Mul", f"{path}/dequantize", [f"{path}/floats", f"{path}/step"], [product])
        if layer.bias is not None:
            w.raw("Add", f"{path}/bias", [product, w.weight(f"{path}.bias", layer.bias)], [w.values[node]])

    def conv(self, w: OnnxWriter, node: Node, layer: Any) -> None:
        # the ReLU's own reader says in which range its result is quantized
        relu = _only_reader(node)
        quant = self.quant(node)
        out = self.decision.tensors.get(relu.meta["path"], _FLAT) if relu is not None else _FLAT
        # QLinearConv needs both ranges beforehand; convolutions in groups stay float
        if quant.mode != "static" or out.mode != "static" or layer.groups != 1:
            super().conv(w, node, layer)
            return
        assert relu is not None
        self._relu_conv(w, str(node.target), w.source(node), layer, quant, out, relu.meta["path"])
        # the ReLU is written: the clip at code 0 does its work, ``visit`` skips it
        w.values[relu], w.shapes[relu.meta["path"]] = relu.meta["path"], relu.meta["shape"]

    def _relu_conv(
        self, w: OnnxWriter, path: str, source: str, layer: Any, quant: TensorQuant, out: TensorQuant, result: str
    ) -> None:
        """A convolution and the ReLU behind it.

        Output codes start at 0, so negative sums are clipped to it.
        """
        grid = natural_grid(quant)
        step = w.store(f"{path}.input_scale", np.float32(grid.scale))
        zero = w.store(f"{path}.input_zero", (np.int8 if grid.signed else np.uint8)(grid.zero))
        w.raw("QuantizeLinear", f"{path}/quantize", [source, step, zero], [f"{path}/codes"])
        codes, scales, middle = _stored_weight(*self.codes(layer))
        # int32 codes on the step of the sums (O,)
        bias = np.rint(as_array(layer.bias).astype(np.float64) / (scales.astype(np.float64) * grid.scale))
        # OIHW codes, (O,) scales, (O,) codes of zero
        weight = [
            w.store(f"{path}.weight_codes", codes),
            w.store(f"{path}.weight_scale", scales),
            w.store(f"{path}.weight_zero", np.full(len(scales), middle)),
        ]
        # a ReLU's range starts at 0, so its 256 codes cover 0 .. high
        out_step = w.store(f"{path}.output_scale", np.float32(float(out.high or 0.0) / 255.0))
        out_zero = w.store(f"{path}.output_zero", np.uint8(0))
        inputs = [f"{path}/codes", step, zero, *weight, out_step, out_zero]
        inputs.append(w.store(f"{path}.bias_codes", np.clip(bias, -(2**31), 2**31 - 1).astype(np.int32)))
        w.raw("QLinearConv", path, inputs, [f"{path}/output_codes"], **conv_attributes(layer))
        w.raw("DequantizeLinear", f"{path}/dequantize", [f"{path}/output_codes", out_step, out_zero], [result])


def _stored_weight(codes: np.ndarray, scales: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.generic]:
    """Weight codes as ONNX Runtime multiplies them without overflow on this CPU.

    Without 8-bit dot products its x86 kernels add two products of an unsigned and a signed code in 16 bits, which
    saturates (vpmaddubsw; on a random student the error of the logits rose from 0.15 to 0.27 of their spread). Its
    kernel for two unsigned operands widens them first, so there the same codes are stored with an offset of 128.

    Returns:
        codes int8 or uint8, scales float32 (O,), and the code of zero, of the codes' type.
    """
    if machine_card().has_int8_dot:
        return codes, scales, np.int8(0)
    return (codes.astype(np.int16) + 128).astype(np.uint8), scales, np.uint8(128)


def _only_reader(node: Node) -> Node | None:
    """The ReLU that alone reads a convolution, or None."""
    readers = list(node.users)
    is_relu = len(readers) == 1 and readers[0].op == "call_module" and str(readers[0].target).endswith(".relu")
    return readers[0] if is_relu else None


__all__ = ["Codes", "ort_onnx", "qdq_onnx"]
