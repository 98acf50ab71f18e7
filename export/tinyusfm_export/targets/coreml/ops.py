"""Operators of a Core ML program over torch.

Those whose arithmetic coremltools cannot or should not infer itself.

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
    """Batched product of two tensors.

    Either side is transposed in its last two axes where the program says so.
    """
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
    """Bilinear enlargement by two factors.

    Half-pixel centres unless corners are aligned.
    """
    import torch.nn.functional as F

    factors = float(i["scale_factor_height"]), float(i["scale_factor_width"])
    size = tuple(int(side * factor) for side, factor in zip(i["x"].shape[2:], factors, strict=True))
    return F.interpolate(i["x"], size=size, mode="bilinear", align_corners=bool(i.get("align_corners", True)))


def resize_bilinear(i: Inputs) -> Any:
    """Bilinear resize to a size.

    Pixel centres as UNALIGN_CORNERS puts them, which are half-pixel ones.

    Raises:
        UnsupportedError: another sampling mode.
    """
    import torch.nn.functional as F

    if i.get("sampling_mode") != "UNALIGN_CORNERS":
        raise UnsupportedError(f"the Core ML program resizes by {i.get('sampling_mode')!r}: it is not interpreted")
    size = int(i["target_size_height"]), int(i["target_size_width"])
    return F.interpolate(i["x"], size=size, mode="bilinear", align_corners=False)


def gather(i: Inputs) -> Any:
    """Rows by their numbers along one axis.

    Raises:
        UnsupportedError: batch axes.
    """
    import numpy as np
    import torch

    if i.get("batch_dims"):
        raise UnsupportedError("the Core ML program gathers over batch axes: it is not interpreted")
    index = torch.from_numpy(np.asarray(i["indices"]).astype(np.int64))
    return i["x"].index_select(int(i.get("axis", 0)), index)


def reduce_mean(i: Inputs) -> Any:
    """Mean over axes."""
    return i["x"].mean(list(_whole(i["axes"])), keepdim=bool(i.get("keep_dims", False)))


def reduce_max(i: Inputs) -> Any:
    """Largest value over axes.

    coremltools 9.0's own inference fails on it (numpy 2.3 takes no numpy bool there).
    """
    return i["x"].amax(list(_whole(i["axes"])), keepdim=bool(i.get("keep_dims", False)))


def quantize(i: Inputs) -> Any:
    """Codes round(x / scale) + zero point, clipped to the type; one scale for all.

    Raises:
        UnsupportedError: scales along an axis.
    """
    if getattr(i["scale"], "ndim", 0):
        raise UnsupportedError("the Core ML program quantizes along an axis: it is not interpreted")
    low, high = (-128, 127) if i["output_dtype"] == "int8" else (0, 255)
    codes = (i["input"] / float(i["scale"])).round() + float(i.get("zero_point") or 0)
    return codes.clamp(low, high)


def dequantize(i: Inputs) -> Any:
    """(codes - zero point) * scale; one scale for all.

    Raises:
        UnsupportedError: scales along an axis.
    """
    import torch

    if getattr(i["scale"], "ndim", 0):
        raise UnsupportedError("the Core ML program dequantizes along an axis: it is not interpreted")
    codes = torch.as_tensor(i["input"]).float()
    return (codes - float(i.get("zero_point") or 0)) * float(i["scale"])


def constexpr_affine_dequantize(i: Inputs) -> Any:
    """Stored codes minus zero point, times the scale of their place on one axis."""
    import torch

    codes = torch.as_tensor(i["quantized_data"]).float()
    shape = [1] * codes.ndim
    shape[int(i["axis"])] = -1

    def spread(value: Any) -> Any:
        found = torch.as_tensor(value).float()
        return found.reshape(shape) if found.ndim else found

    return (codes - spread(i["zero_point"])) * spread(i["scale"])


def constexpr_lut_to_dense(i: Inputs) -> Any:
    """Table entries by packed indices, lowest bit first.

    The table's length tells the bits of an index.
    """
    import numpy as np
    import torch

    shape = tuple(int(side) for side in i["shape"])
    table = torch.as_tensor(i["lut"]).float().reshape(-1)
    bits, count = int(np.log2(len(table))), int(np.prod(shape))
    stream = np.unpackbits(np.asarray(i["indices"], np.uint8), bitorder="little")[: count * bits]
    indices = stream.reshape(count, bits).astype(np.int64) @ (1 << np.arange(bits, dtype=np.int64))
    return table[torch.from_numpy(indices)].reshape(shape)


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
    "constexpr_affine_dequantize": constexpr_affine_dequantize,
    "constexpr_lut_to_dense": constexpr_lut_to_dense,
    "conv": conv,
    "dequantize": dequantize,
    "gather": gather,
    "gelu": gelu,
    "layer_norm": layer_norm,
    "linear": linear,
    "matmul": matmul,
    "quantize": quantize,
    "reduce_max": reduce_max,
    "reduce_mean": reduce_mean,
    "resize_bilinear": resize_bilinear,
    "softmax": softmax,
    "upsample_bilinear": upsample_bilinear,
}
"""Operator name in MIL -> what computes it."""


__all__ = [
    "OPERATORS",
    "Inputs",
    "avg_pool",
    "constexpr_affine_dequantize",
    "constexpr_lut_to_dense",
    "conv",
    "dequantize",
    "gather",
    "gelu",
    "layer_norm",
    "linear",
    "matmul",
    "quantize",
    "reduce_max",
    "reduce_mean",
    "resize_bilinear",
    "softmax",
    "upsample_bilinear",
]
