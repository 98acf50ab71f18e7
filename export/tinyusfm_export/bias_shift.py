"""Bias correction: what rounding the weights adds to a layer's mean output is taken out of its bias.

The empirical correction of Nagel et al. 2019 (arXiv:1906.04721, 4.2): E[Wq x] - E[W x], measured on calibration
frames in the float net. Only the weights' part is corrected, because the weights' codes are the same in every form of
a decision while the activations' grids are not. The shift of a layer is folded in only where the decision quantizes
that layer. It does not know ranges or targets.

Shapes: O outputs of a layer.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from tinyusfm_export.decision import QuantDecision
from tinyusfm_export.onnx_writer import as_array
from tinyusfm_export.ptq import quantize_weight
from tinyusfm_runtime.errors import CalibrationError

if TYPE_CHECKING:
    from tinyusfm_export.graph import ExportGraph


def measure_shifts(graph: ExportGraph, inputs_NCHW: Iterable[np.ndarray]) -> dict[str, np.ndarray]:
    """Mean output shift of every quantizable layer with a bias.

    Args:
        graph: the export graph, equalised if it will be.
        inputs_NCHW: uint8 inputs of the calibration frames.

    Returns:
        Layer path -> float32 (O,): how much higher its outputs lie on average with rounded weights.

    Raises:
        CalibrationError: no frames, or NaN on one of them.
    """
    import torch

    sums: dict[str, np.ndarray] = {}
    handles = []
    for path in graph.linear_inputs.values():
        layer: Any = graph.module.get_submodule(path)
        if layer.bias is not None:
            handles.append(layer.register_forward_pre_hook(_adding(sums, path, layer)))
    frames = 0
    try:
        with torch.inference_mode():
            for tensor_NCHW in inputs_NCHW:
                graph.module(torch.from_numpy(np.ascontiguousarray(tensor_NCHW)))
                frames += 1
    finally:
        for handle in handles:
            handle.remove()
    if not frames:
        raise CalibrationError("bias correction has no calibration frames to look at")
    shifts = {path: (total / frames).astype(np.float32) for path, total in sums.items()}
    if not all(np.isfinite(shift).all() for shift in shifts.values()):
        raise CalibrationError("bias correction met NaN or infinity on a calibration frame: leave that frame out")
    return shifts


def _adding(sums: dict[str, np.ndarray], path: str, layer: Any) -> Any:
    import torch
    import torch.nn.functional as F

    weight = as_array(layer.weight)
    codes, scales = quantize_weight(weight)
    rounded = codes.astype(np.float64) * scales.reshape((-1,) + (1,) * (weight.ndim - 1))
    error = torch.from_numpy((rounded - weight).astype(np.float32))

    def add(_: Any, inputs: tuple[Any, ...]) -> None:
        if error.ndim == 2:
            shift = inputs[0].reshape(-1, error.shape[1]).mean(0) @ error.T
        else:
            shift = F.conv2d(inputs[0], error, padding=layer.padding, groups=layer.groups).mean((0, 2, 3))
        sums[path] = sums.get(path, 0.0) + shift.numpy().astype(np.float64)

    return add


def correct_biases(graph: ExportGraph, decision: QuantDecision, shifts: Mapping[str, np.ndarray]) -> ExportGraph:
    """Takes the shifts out of the biases of the layers that a decision quantizes.

    Args:
        graph: the export graph; it stays as it is.
        decision: says which layers.
        shifts: see ``measure_shifts``.

    Returns:
        A graph for this decision alone: in float its outputs are shifted.
    """
    import torch

    if not shifts:
        return graph
    layers = [graph.linear_inputs[name] for name in decision.quantized()]
    wanted = [path for path in layers if path in shifts]
    if not wanted:
        return graph
    module = copy.deepcopy(graph.module)
    for path in wanted:
        layer: Any = module.get_submodule(path)
        layer.bias.data -= torch.from_numpy(np.asarray(shifts[path], np.float32))
    return replace(graph, module=module)


__all__ = ["correct_biases", "measure_shifts"]
