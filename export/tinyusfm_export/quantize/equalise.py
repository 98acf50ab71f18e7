"""Equalisation: outlier channels move from a tensor into its weights.

They are divided out of the tensor and multiplied into the weights that read it, exactly.

SmoothQuant (Xiao et al. 2023, arXiv:2211.10438, eq. 4): channel j of an activation is divided by s_j = max|x_j|^a /
max|w_j|^(1-a) and column j of the weights multiplied by it. Where the activation comes out of a LayerNorm the
division becomes its scale, which costs nothing; in front of an attention's projection it goes into the rows of the
value projection, since the mixing of tokens between them treats every channel alike. Behind a GELU there is no exact
place, so fc2 stays. Float outputs are unchanged up to rounding. It does not know ranges or targets.

Shapes: C channels, O outputs of a layer.
Shapes: C channels of a tensor = I of the layer that reads it; weights (O, I). Divisors float32 (C,), positive.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from tinyusfm_export.graph.net import as_array
from tinyusfm_runtime.errors import InputError
from tinyusfm_runtime.numerics.order import wide

if TYPE_CHECKING:
    from tinyusfm_export.graph.build import ExportGraph

STRENGTH: Final = 0.5
"""a of the formula; the paper's value for most networks."""
OUTLIER_RATIO: Final = 4.0
"""A tensor needs equalising where its largest channel exceeds the median one so many times (our choice)."""
_QKV, _PROJ, _FC1 = ".attn.qkv", ".attn.proj", ".mlp.fc1"


def equalisable(graph: ExportGraph) -> list[str]:
    """Tensors that can be equalised exactly, in graph order."""
    return [name for name, layer in graph.linear_inputs.items() if layer.endswith((_QKV, _PROJ, _FC1))]


def channel_peaks(graph: ExportGraph, observed: Iterable[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Largest absolute value of each channel of every tensor that can be equalised.

    Args:
        graph: the export graph.
        observed: tensors of each calibration frame, see ``ptq.activation_taps``.

    Returns:
        Tensor -> float32 (C,).
    """
    peaks: dict[str, np.ndarray] = {}
    names = equalisable(graph)
    for tensors in observed:
        for name in names:
            # over all positions of the frame: (..., C) -> (C,)
            frame_C = np.abs(tensors[name]).reshape(-1, tensors[name].shape[-1]).max(0)
            peaks[name] = np.maximum(peaks[name], frame_C) if name in peaks else frame_C
    return peaks


def outlier_ratio(peaks_C: np.ndarray) -> float:
    """How many times the largest channel exceeds the median one."""
    return float(peaks_C.max() / max(float(np.median(wide(peaks_C))), 1e-12))


def find_divisors(
    graph: ExportGraph, peaks: Mapping[str, np.ndarray], *, strength: float = STRENGTH, ratio: float = OUTLIER_RATIO
) -> dict[str, np.ndarray]:
    """Divisors of the tensors that need it.

    Args:
        graph: the export graph.
        peaks: see ``channel_peaks``.
        strength: 0 leaves all difficulty in the activations, 1 moves all of it into the weights.
        ratio: tensors below this outlier ratio are left alone; 0 takes all.

    Returns:
        Tensor -> float32 (C,), geometric mean 1; empty where no tensor needs it.

    Raises:
        InputError: a strength outside 0..1.
    """
    if not 0.0 <= strength <= 1.0:
        raise InputError(f"equalisation strength {strength} must lie in 0..1")
    found = {}
    for name, peaks_C in peaks.items():
        if outlier_ratio(peaks_C) < ratio:
            continue
        layer: Any = graph.module.get_submodule(graph.linear_inputs[name])
        # (O, I) -> (I,): the largest weight that reads each channel
        columns_C = np.abs(as_array(layer.weight)).max(0).astype(np.float64)
        # s = peak^a / weight^(1 - a), in logarithms; a mean of 0 there is a geometric mean of 1
        logs_C = strength * np.log(np.maximum(peaks_C.astype(np.float64), 1e-6))
        logs_C -= (1.0 - strength) * np.log(np.maximum(columns_C, 1e-6))
        found[name] = np.exp(logs_C - logs_C.mean()).astype(np.float32)
    return found


def equalise(graph: ExportGraph, divisors: Mapping[str, np.ndarray]) -> ExportGraph:
    """The same function with other activations.

    Args:
        graph: the export graph; it stays as it is.
        divisors: tensor -> positive divisor of each channel.

    Returns:
        A graph with the same names and, up to rounding, the same outputs.

    Raises:
        InputError: a tensor that cannot be equalised, or divisors of another width.
    """
    if not divisors:
        return graph
    module: Any = copy.deepcopy(graph.module)
    able = set(equalisable(graph))
    for name, divisor_C in divisors.items():
        if name not in able:
            raise InputError(f"tensor {name!r} cannot be equalised exactly: only inputs of qkv, proj and fc1 can")
        path = graph.linear_inputs[name]
        layer = module.get_submodule(path)
        scale_C = np.asarray(divisor_C, np.float64)
        if scale_C.shape != (layer.weight.shape[1],) or not np.isfinite(scale_C).all() or (scale_C <= 0).any():
            raise InputError(f"the divisors of {name!r} do not fit its {layer.weight.shape[1]} channels")
        # proj reads attention's mix of the values, which is linear in them: divide the value rows
        # The inputs of qkv and fc1 come out of a LayerNorm: divide its affine
        if path.endswith(_PROJ):
            _divide_values(module.get_submodule(path.removesuffix(_PROJ) + _QKV), scale_C)
        else:
            _divide_norm(module, name, scale_C)
        # the reader's columns take the factor back: (O, I) * (I,)
        _set(layer, "weight", as_array(layer.weight).astype(np.float64) * scale_C)
    return replace(graph, module=module)


def _divide_values(packed: Any, scale_C: np.ndarray) -> None:
    """Divides the value rows (the last third) of a packed projection."""
    # (3 D,): queries and keys stay, value rows are divided
    rows = np.concatenate([np.ones(2 * len(scale_C)), scale_C])
    _set(packed, "weight", as_array(packed.weight).astype(np.float64) / rows[:, None])
    _set(packed, "bias", as_array(packed.bias).astype(np.float64) / rows)


def _divide_norm(module: Any, name: str, scale_C: np.ndarray) -> None:
    """Gives the LayerNorm that makes a tensor the divisor as its scale."""
    from torch import nn

    node = next(node for node in module.graph.nodes if node.meta.get("path") == name)
    path = str(node.target)
    # the decision's tensor is the output of this norm
    norm = module.get_submodule(path) if node.op == "call_module" else None
    if not isinstance(norm, nn.LayerNorm) or len(node.users) != 1:
        raise InputError(f"tensor {name!r} does not come out of a LayerNorm of its own")
    width = len(scale_C)
    # a new affine norm: (x - mean) / std * (old scale / s) + old shift / s
    affine = nn.LayerNorm(width, eps=norm.eps).eval().requires_grad_(False)
    old = [np.ones(width), np.zeros(width)]
    if norm.weight is not None:
        old = [as_array(norm.weight).astype(np.float64), as_array(norm.bias).astype(np.float64)]
    _set(affine, "weight", old[0] / scale_C)
    _set(affine, "bias", old[1] / scale_C)
    parent, _, leaf = path.rpartition(".")
    setattr(module.get_submodule(parent), leaf, affine)


def _set(layer: Any, name: str, value: np.ndarray) -> None:
    import torch

    getattr(layer, name).data.copy_(torch.from_numpy(value.astype(np.float32)))


__all__ = [
    "OUTLIER_RATIO",
    "STRENGTH",
    "channel_peaks",
    "equalisable",
    "equalise",
    "find_divisors",
    "outlier_ratio",
]
