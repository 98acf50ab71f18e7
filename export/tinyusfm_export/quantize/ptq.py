"""Post-training quantization: which layers become int8.

Also the arithmetic that every target's form shares.

The default is safe for a ViT: int8 in the linears of the blocks and, switched by ``decoder``, in the 3x3 convolutions
of the pyramid and their classifiers, which read post-ReLU maps. Residual adds, softmax, GELU, LayerNorm and the two
attention products stay in the rest precision; so do the patch embedding and the four laterals (1 % of the products:
int8 there bought no measurable time with OpenVINO 2026.4). int8 attention products were tried too and bought
nothing, since softmax dominates attention at head size 16.

There is no default range: without calibrated ranges int8 is a CalibrationError. It does not know files or engines.

Shapes: O outputs of a layer; NCHW.
Shapes: O output channels; linear weights (O, I), convolution weights OIHW; scales (O,); an activation has one scale.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import numpy as np

from tinyusfm_calibration.ranges import SPAN, Ranges
from tinyusfm_export.graph.inference import repeatable_inference
from tinyusfm_export.quantize.decision import QuantDecision, RestPrecision, TensorQuant, float_decision
from tinyusfm_runtime.device.machine import machine_card
from tinyusfm_runtime.errors import CalibrationError, InputError

if TYPE_CHECKING:
    from tinyusfm_export.graph.build import ExportGraph

BLOCK_LAYERS = ("blocks.*.attn.qkv", "blocks.*.attn.proj", "blocks.*.mlp.fc1", "blocks.*.mlp.fc2")
"""The linears of the transformer: four a block."""
DECODER_LAYERS = ("head.smooth.*", "head.classifier.*")
"""The pyramid's convolutions; a quarter of the segmentation student's products lie in ``head.smooth.0``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PtqPolicy:
    """What becomes int8.

    Attributes:
        layers: layers by shell pattern.
        decoder: also the segmentation decoder's convolutions; switch it off where they miss the gate.
        keep_float: exceptions by shell pattern, stronger than the others.
        dynamic: of these, the ones whose range is found per frame instead of at export; only linears, and only ONNX
            Runtime runs them.
        symmetric: demand code grids symmetric about zero in every form, also where a target could use the range as
            it is.
        rest_precision: arithmetic of everything else; None is bf16 where this CPU computes it itself, else f32.
        weight_limit: largest weight code, 127, or 7 for weights of 4 bits.
    """

    layers: tuple[str, ...] = BLOCK_LAYERS
    decoder: bool = True
    keep_float: tuple[str, ...] = ()
    dynamic: tuple[str, ...] = ()
    symmetric: bool = False
    rest_precision: RestPrecision | None = None
    weight_limit: int = 127

    def quantizes(self, layer: str) -> bool:
        """Whether a layer becomes int8."""
        wanted = self.layers + (DECODER_LAYERS if self.decoder else ())
        return _matches(layer, wanted) and not _matches(layer, self.keep_float)


def decide(
    graph: ExportGraph, precision: str, ranges: Ranges | None = None, *, policy: PtqPolicy | None = None
) -> QuantDecision:
    """Makes the one decision for all targets.

    Args:
        graph: the export graph.
        precision: fp32, fp16, bf16 or int8.
        ranges: activation ranges of this graph; needed for int8, ignored otherwise.
        policy: what becomes int8, or None for the default.

    Raises:
        CalibrationError: int8 without ranges, or the ranges lack a tensor.
        InputError: an unknown precision, or a policy that selects no layer.
    """
    if precision != "int8":
        return float_decision(precision)
    if ranges is None:
        raise CalibrationError("int8 needs activation ranges: calibrate on frames, or use a student that carries them")
    policy = policy or PtqPolicy()
    tensors = {name: _tensor(name, layer, ranges, policy) for name, layer in graph.linear_inputs.items()}
    if all(quant.mode == "float" for quant in tensors.values()):
        raise InputError("the quantization policy selects no layer of this model: check its patterns")
    rest = policy.rest_precision or ("bf16" if machine_card().has_bf16 else "f32")
    return QuantDecision(
        precision="int8",
        rest_precision=rest,
        tensors=tensors,
        set_id=ranges.set_id,
        method=ranges.method,
        weight_limit=policy.weight_limit,
        spans={name: span for name, span in ranges.tensors.items() if name.endswith(SPAN)},
    )


def _tensor(name: str, layer: str, ranges: Ranges, policy: PtqPolicy) -> TensorQuant:
    if not policy.quantizes(layer):
        return TensorQuant(mode="float")
    if _matches(layer, policy.dynamic):
        return TensorQuant(mode="dynamic")
    if name not in ranges.tensors:
        raise CalibrationError(f"the ranges lack tensor {name!r}: they belong to another model, calibrate again")
    low, high = ranges.tensors[name]
    return TensorQuant(mode="static", low=low, high=high, symmetric=policy.symmetric)


def _matches(layer: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(layer, pattern) for pattern in patterns)


def activation_taps(graph: ExportGraph, module: Any = None) -> Callable[[np.ndarray], Mapping[str, np.ndarray]]:
    """The rewritten network as a callable that calibration can observe.

    Args:
        graph: the export graph.
        module: run in place of the graph's own: a copy of it that computes otherwise.

    Returns:
        uint8 NCHW input -> float32 values of every tensor in ``graph.linear_inputs``, by name.
    """
    import torch

    network: Any = module or graph.module
    found: dict[str, np.ndarray] = {}

    def tap(name: str) -> Callable[[Any, tuple[Any, ...]], None]:
        return lambda _, inputs: found.__setitem__(name, inputs[0].numpy())

    def run(tensor_NCHW: np.ndarray) -> Mapping[str, np.ndarray]:
        layers = {name: network.get_submodule(path) for name, path in graph.linear_inputs.items()}
        handles = [layer.register_forward_pre_hook(tap(name)) for name, layer in layers.items()]
        try:
            with repeatable_inference():
                network(torch.from_numpy(np.ascontiguousarray(tensor_NCHW)))
        finally:
            for handle in handles:
                handle.remove()
        values = dict(found)
        found.clear()
        return values

    return run


def quantize_weight(weight: np.ndarray, *, limit: int = 127) -> tuple[np.ndarray, np.ndarray]:
    """Symmetric int8 codes with one scale per output channel.

    Args:
        weight: float32, output channels first.
        limit: largest code, 127, or 63 for engines that add two products in 16 bits (2 * 255 * 63 < 2^15).

    Returns:
        int8 codes in -limit..limit of the same shape, and float32 scales (O,), positive.
    """
    # (O,): largest magnitude of each output channel
    rows = np.abs(weight.reshape(weight.shape[0], -1)).max(1).astype(np.float64)
    scales = np.where(rows > 0.0, rows / limit, 1.0).astype(np.float32)
    # (O, 1) or (O, 1, 1, 1), to divide row by row
    shape = (-1,) + (1,) * (weight.ndim - 1)
    # in float64, so that the codes do not depend on float32 rounding of the quotient
    codes = np.rint(weight.astype(np.float64) / scales.reshape(shape).astype(np.float64))
    return np.clip(codes, -limit, limit).astype(np.int8), scales


def codes_on(weight: np.ndarray, scales_O: np.ndarray, limit: int) -> np.ndarray:
    """Codes of a weight on steps that were chosen elsewhere, such as float16 ones.

    Args:
        weight: float32, output channels first.
        scales_O: one step per output channel, positive.
        limit: largest code.

    Returns:
        int8, of the weight's shape.
    """
    column = np.asarray(scales_O, np.float32).reshape((-1,) + (1,) * (weight.ndim - 1))
    return np.clip(np.rint(weight / column), -limit, limit).astype(np.int8)


def rounded_weight(weight: np.ndarray, limit: int) -> np.ndarray:
    """The values that the codes of ``quantize_weight`` stand for.

    float64, of the weight's shape.
    """
    codes, scales = quantize_weight(weight, limit=limit)
    return codes * scales.astype(np.float64).reshape((-1,) + (1,) * (weight.ndim - 1))


def on_scales(weight: np.ndarray, scales_O: np.ndarray, limit: int) -> np.ndarray:
    """The values that ``codes_on`` stands for: float64, of the weight's shape."""
    column = np.asarray(scales_O, np.float64).reshape((-1,) + (1,) * (weight.ndim - 1))
    return codes_on(weight, scales_O, limit) * column


@dataclass(frozen=True, kw_only=True, slots=True)
class Grid:
    """An 8-bit code grid: value = scale * (code - zero).

    Attributes:
        scale: float32-representable step.
        zero: code of the value 0.
        signed: codes are -128..127, else 0..255.
    """

    scale: float
    zero: int
    signed: bool

    @property
    def low(self) -> float:
        """Smallest value on the grid."""
        return self.scale * ((-128 if self.signed else 0) - self.zero)

    @property
    def high(self) -> float:
        """Largest value on the grid."""
        return self.scale * ((127 if self.signed else 255) - self.zero)


def symmetric_grid(quant: TensorQuant) -> Grid:
    """Signed codes with zero at 0, the grid every int8 engine knows.

    TensorRT knows no other.
    """
    return Grid(scale=float(np.float32(quant.bound / 127.0)), zero=0, signed=True)


def natural_grid(quant: TensorQuant) -> Grid:
    """Unsigned codes that cover the range as it is, with an exact code for zero.

    Signed ones if symmetry is demanded.

    Post-GELU values span -0.17..13 on the fetal-head student and LayerNorm outputs -4.5..11, so this grid
    is up to twice as fine as the symmetric one.
    """
    if quant.symmetric:
        return symmetric_grid(quant)
    low, high = float(quant.low or 0.0), float(quant.high or 0.0)
    scale = float(np.float32((high - low) / 255.0))
    # low lies at code 0 and high at 255; ``low`` <= 0, so the code of zero is on the grid
    return Grid(scale=scale, zero=round(-low / scale), signed=False)


__all__ = [
    "BLOCK_LAYERS",
    "DECODER_LAYERS",
    "Grid",
    "PtqPolicy",
    "activation_taps",
    "codes_on",
    "decide",
    "natural_grid",
    "on_scales",
    "quantize_weight",
    "rounded_weight",
    "symmetric_grid",
]
