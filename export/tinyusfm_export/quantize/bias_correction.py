"""Bias correction: takes the mean shift of rounded weights out of the bias.

What rounding the weights adds to a layer's mean output is taken out of its bias.

The empirical correction of Nagel et al. 2019 (arXiv:1906.04721, 4.2): E[Wq x] - E[W x], measured on calibration
frames in the float network. Only the weights' part is corrected, because the activations' grids are not the same in
every form of a decision. The weights' codes are not either: OpenVINO's are of 7 bits on a CPU without 8-bit dot
products, and a float16 rest takes other steps. So what is measured and stored is the mean input, (Wq - W) E[x] being
the same number, and the correction takes the codes that the target at hand really writes. It is folded in only where
the decision quantizes the layer. It does not know ranges, and targets only by the function they hand in.

Shapes: O outputs of a layer; I entries of a weight's row (channels, then rows and columns of a kernel).
Shapes: O output and I input entries of a weight's row; for a convolution I = channels of a group x k x k.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from tinyusfm_export.graph.inference import repeatable_inference
from tinyusfm_export.graph.net import as_array
from tinyusfm_export.quantize.decision import QuantDecision
from tinyusfm_export.quantize.ptq import rounded_weight
from tinyusfm_runtime.errors import CalibrationError

if TYPE_CHECKING:
    from tinyusfm_export.graph.build import ExportGraph

WrittenWeight = Callable[[np.ndarray, QuantDecision], np.ndarray]
"""float32 weight, decision -> the values a target's codes stand for; a target's ``written_weight``."""


def measure_means(graph: ExportGraph, inputs_NCHW: Iterable[np.ndarray]) -> dict[str, np.ndarray]:
    """Mean input of every quantizable layer with a bias.

    Args:
        graph: the export graph, equalised if it will be.
        inputs_NCHW: uint8 inputs of the calibration frames.

    Returns:
        Layer path -> float32 (I,): what each entry of a weight's row is multiplied with on average, the zeros of a
        padding among it. For a convolution in groups, the groups' rows one after another.

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
        with repeatable_inference():
            for tensor_NCHW in inputs_NCHW:
                graph.module(torch.from_numpy(np.ascontiguousarray(tensor_NCHW)))
                frames += 1
    finally:
        for handle in handles:
            handle.remove()
    if not frames:
        raise CalibrationError("bias correction has no calibration frames to look at")
    means = {path: (total / frames).astype(np.float32) for path, total in sums.items()}
    if not all(np.isfinite(mean_I).all() for mean_I in means.values()):
        raise CalibrationError("bias correction met NaN or infinity on a calibration frame: leave that frame out")
    return means


def _adding(sums: dict[str, np.ndarray], path: str, layer: Any) -> Any:
    import torch.nn.functional as F

    def add(_: Any, inputs: tuple[Any, ...]) -> None:
        # linear: mean over all rows that it multiplies, (..., I) -> (I,)
        if layer.weight.ndim == 2:
            mean_I = inputs[0].reshape(-1, layer.weight.shape[1]).mean(0)
        else:
            kernel = tuple(layer.weight.shape[2:])
            # every k x k window as a column, zero padding included: (B, I, positions)
            patches = F.unfold(inputs[0], kernel, layer.dilation, layer.padding, layer.stride)
            mean_I = patches.mean((0, 2))
        sums[path] = sums.get(path, 0.0) + mean_I.numpy().astype(np.float64)

    return add


def decided_weight(weight: np.ndarray, decision: QuantDecision) -> np.ndarray:
    """The values of the decision's own codes, which most targets write as they are.

    Args:
        weight: float32, output channels first.
        decision: says how wide the codes are.
    """
    return rounded_weight(weight, decision.weight_limit)


def mean_shift(layer: Any, mean_I: np.ndarray, rounded: np.ndarray) -> np.ndarray:
    """Mean rise of a layer's outputs by rounding its weights: float32 (O,).

    How much higher the outputs lie on average.

    Args:
        layer: the torch layer.
        mean_I: its mean input, see ``measure_means``.
        rounded: its weight after rounding.
    """
    weight = as_array(layer.weight)
    groups = int(getattr(layer, "groups", 1))
    # (groups, O per group, I): what rounding adds to each weight
    error = (rounded.astype(np.float64) - weight).reshape(groups, len(weight) // groups, -1)
    # times the mean input (groups, I, 1): the mean of the product is the product of the means, since
    # the weights are constant -> (O,)
    return np.asarray((error @ mean_I.astype(np.float64).reshape(groups, -1, 1)).reshape(-1), np.float32)


def correct_biases(
    graph: ExportGraph,
    decision: QuantDecision,
    means: Mapping[str, np.ndarray],
    written: WrittenWeight | None = None,
) -> ExportGraph:
    """Takes the shifts out of the biases of the layers that a decision quantizes.

    Args:
        graph: the export graph; it stays as it is.
        decision: says which layers.
        means: see ``measure_means``.
        written: which weights the target really writes; None takes the decision's own codes.

    Returns:
        A graph for this decision and target alone: in float its outputs are shifted.
    """
    import torch

    if not means:
        return graph
    layers = [graph.linear_inputs[name] for name in decision.quantized()]
    wanted = [path for path in layers if path in means]
    if not wanted:
        return graph
    module = copy.deepcopy(graph.module)
    for path in wanted:
        layer: Any = module.get_submodule(path)
        rounded = (written or decided_weight)(as_array(layer.weight), decision)
        layer.bias.data -= torch.from_numpy(mean_shift(layer, means[path], rounded))
    return replace(graph, module=module)


__all__ = ["WrittenWeight", "correct_biases", "decided_weight", "mean_shift", "measure_means"]
