"""Simulated INT8: the export graph in PyTorch with rounded weights and rounded layer inputs, without any engine.

It rounds in exactly the places, and to exactly the grids, that a static form of the decision has (OpenVINO's
FakeQuantize; the symmetric grid where a padded convolution needs it), so that hundreds of decisions can be compared
in minutes. The gate still judges the artefact in its own engine. A dynamic tensor takes each frame's own range.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from tinyusfm_export.decision import QuantDecision, TensorQuant
from tinyusfm_export.onnx_writer import as_array
from tinyusfm_export.ptq import Grid, natural_grid, quantize_weight, symmetric_grid

if TYPE_CHECKING:
    from torch import Tensor

    from tinyusfm_export.graph import ExportGraph

Net = Callable[[np.ndarray], dict[str, np.ndarray]]
"""uint8 NCHW input -> outputs by name."""


def float_net(graph: ExportGraph) -> Net:
    """The graph in float32.

    Args:
        graph: the export graph.
    """
    return _callable(graph, graph.module)


def int8_net(graph: ExportGraph, decision: QuantDecision) -> Net:
    """The graph under a decision.

    Args:
        graph: the export graph; its own module stays as it is.
        decision: an int8 decision of this graph.
    """
    import torch

    module = copy.deepcopy(graph.module)
    for name, quant in decision.quantized().items():
        layer: Any = module.get_submodule(graph.linear_inputs[name])
        codes, scales = quantize_weight(as_array(layer.weight))
        rounded = codes.astype(np.float32) * scales.reshape((-1,) + (1,) * (codes.ndim - 1))
        layer.weight.data.copy_(torch.from_numpy(rounded))
        layer.register_forward_pre_hook(_rounding(quant, is_padded=any(getattr(layer, "padding", (0,)))))
    return _callable(graph, module)


def input_grid(quant: TensorQuant, *, is_padded: bool) -> Grid:
    """The grid of a static tensor in the static forms.

    Args:
        quant: the tensor.
        is_padded: whether a padded convolution reads it, which needs zero where it is.
    """
    grid = natural_grid(quant)
    return symmetric_grid(quant) if is_padded and grid.zero != 0 and not grid.signed else grid


def _rounding(quant: TensorQuant, *, is_padded: bool) -> Callable[[Any, tuple[Any, ...]], tuple[Tensor]]:
    import torch

    static = input_grid(quant, is_padded=is_padded) if quant.mode == "static" else None

    def round_input(_: Any, inputs: tuple[Any, ...]) -> tuple[Tensor]:
        values = inputs[0]
        grid = static
        if grid is None:
            low, high = min(float(values.min()), 0.0), max(float(values.max()), 1e-9)
            grid = natural_grid(TensorQuant(mode="static", low=low, high=high))
        least, most = (-128, 127) if grid.signed else (0, 255)
        codes = torch.clamp(torch.round(values / grid.scale) + grid.zero, least, most)
        return ((codes - grid.zero) * grid.scale,)

    return round_input


def _callable(graph: ExportGraph, module: Any) -> Net:
    import torch

    def run(tensor_NCHW: np.ndarray) -> dict[str, np.ndarray]:
        with torch.inference_mode():
            found = module(torch.from_numpy(np.ascontiguousarray(tensor_NCHW)))
        return {name: value.numpy() for name, value in zip(graph.outputs, found, strict=True)}

    return run


__all__ = ["Net", "float_net", "input_grid", "int8_net"]
