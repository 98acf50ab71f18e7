"""Operators of a Core ML program over torch: those whose arithmetic coremltools cannot or should not infer itself.

Each takes its inputs as float32 tensors or plain values and returns float32; the interpreter rounds the result to the
type that the program declares. Products, softmax and norms thus accumulate in float32, which coremltools' inference in
numpy float16 would not. It does not know programs or files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from tinyusfm_runtime.errors import UnsupportedError

Inputs = Mapping[str, Any]
"""Input name of the operator -> tensor, number, text or list of whole numbers; inputs left out are absent."""


def linear(i: Inputs) -> Any:
    """x W^T + b over the last axis."""
    import torch.nn.functional as F

    return F.linear(i["x"], i["weight"], i.get("bias"))


def matmul(i: Inputs) -> Any:
    """Batched product, either side transposed in its last two axes where the program says so."""
    x = i["x"].transpose(-1, -2) if i.get("transpose_x") else i["x"]
    y = i["y"].transpose(-1, -2) if i.get("transpose_y") else i["y"]
    return x @ y


def softmax(i: Inputs) -> Any:
    """Softmax over one axis."""
    return i["x"].softmax(int(i.get("axis", -1)))


def layer_norm(i: Inputs) -> Any:
    """(x - mean) / sqrt(variance + epsilon) over the axes, then gamma and beta."""
    axes = [int(axis) for axis in i["axes"]]
    x = i["x"]
    centred = x - x.mean(axes, keepdim=True)
    normed = centred / (centred.square().mean(axes, keepdim=True) + float(i.get("epsilon", 1e-5))).sqrt()
    normed = normed * i["gamma"] if i.get("gamma") is not None else normed
    return normed + i["beta"] if i.get("beta") is not None else normed


def gelu(i: Inputs) -> Any:
    """GELU with erf; approximations are refused.

    Raises:
        UnsupportedError: another mode.
    """
    import torch.nn.functional as F

    if i.get("mode", "EXACT") != "EXACT":
        raise UnsupportedError(f"the Core ML program has a gelu of mode {i['mode']!r}: only EXACT is interpreted")
    return F.gelu(i["x"])


def conv(i: Inputs) -> Any:
    """Two-dimensional convolution with explicit padding.

    Raises:
        UnsupportedError: another way of padding, or other than two dimensions.
    """
    import torch.nn.functional as F

    if i["x"].ndim != 4:
        raise UnsupportedError("the Core ML program has a convolution of other than two dimensions")
    padded = F.pad(i["x"], _pads(i))
    strides, dilations = _whole(i.get("strides", (1, 1))), _whole(i.get("dilations", (1, 1)))
    return F.conv2d(padded, i["weight"], i.get("bias"), strides, 0, dilations, int(i.get("groups", 1)))


def avg_pool(i: Inputs) -> Any:
    """Mean over windows without padding, the last incomplete ones dropped.

    Raises:
        UnsupportedError: padding or rounding up.
    """
    import torch.nn.functional as F

    if any(_pads(i)) or i.get("ceil_mode"):
        raise UnsupportedError("the Core ML program has an average pool with padding: it is not interpreted")
    return F.avg_pool2d(i["x"], _whole(i["kernel_sizes"]), _whole(i.get("strides", i["kernel_sizes"])))


def upsample_bilinear(i: Inputs) -> Any:
    """Bilinear enlargement by two factors, half-pixel centres unless corners are aligned."""
    import torch.nn.functional as F

    factors = float(i["scale_factor_height"]), float(i["scale_factor_width"])
    size = tuple(int(side * factor) for side, factor in zip(i["x"].shape[2:], factors, strict=True))
    return F.interpolate(i["x"], size=size, mode="bilinear", align_corners=bool(i.get("align_corners", True)))


def _whole(values: Any) -> tuple[int, ...]:
    return tuple(int(value) for value in values)


def _pads(i: Inputs) -> tuple[int, int, int, int]:
    """Left, right, top, bottom from the program's top, bottom, left, right."""
    kind = i.get("pad_type", "valid")
    if kind == "valid":
        return 0, 0, 0, 0
    if kind != "custom":
        raise UnsupportedError(f"the Core ML program pads by {kind!r}: only valid and custom are interpreted")
    top, bottom, left, right = _whole(i["pad"])
    return left, right, top, bottom


OPERATORS: Mapping[str, Callable[[Inputs], Any]] = {
    "avg_pool": avg_pool,
    "conv": conv,
    "gelu": gelu,
    "layer_norm": layer_norm,
    "linear": linear,
    "matmul": matmul,
    "softmax": softmax,
    "upsample_bilinear": upsample_bilinear,
}
"""Operator name in MIL -> what computes it."""


__all__ = [
    "OPERATORS",
    "Inputs",
    "avg_pool",
    "conv",
    "gelu",
    "layer_norm",
    "linear",
    "matmul",
    "softmax",
    "upsample_bilinear",
]
