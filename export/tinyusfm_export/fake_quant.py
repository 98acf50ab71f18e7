"""Fake quantization: the export graph as a torch module that rounds exactly where the exported Q/DQ graph rounds.

A layer that the decision quantizes reads its input from the symmetric 8-bit grid of ``qdq_onnx`` and its weights from
the per-channel grid of ``quantize_weight``; biases and everything else stay float32. Rounding passes gradients straight
through inside the grid and stops them outside (Jacob et al., CVPR 2018, section 3). Weights may be handed in as
functions of a student's parameters, so that training reaches the student itself.

It does not know data, losses, files or engines.

Shapes: B batch; B1HW codes 0..255; O output channels of a layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from tinyusfm_export.decision import QuantDecision
from tinyusfm_export.ptq import symmetric_grid
from tinyusfm_runtime.errors import UnsupportedError

if TYPE_CHECKING:
    from torch import Tensor

    from tinyusfm_export.graph import ExportGraph


def on_grid(x: Tensor, scale: float, low: int, high: int) -> Tensor:
    """Rounds to ``scale`` times a whole number from ``low`` to ``high``.

    The gradient is that of the clamp: 1 inside, 0 outside.
    """
    import torch

    inside = torch.clamp(x, scale * low, scale * high)
    rounded = torch.clamp(torch.round(x / scale), low, high) * scale
    return inside + (rounded - inside).detach()


def weight_on_grid(weight: Tensor, limit: int) -> Tensor:
    """Rounds a weight to its per-channel grid; the scales follow the weight and take no gradient.

    Args:
        weight: output channels first.
        limit: largest code.
    """
    import torch

    rows = weight.detach().flatten(1).abs().amax(1).double()
    scales = torch.where(rows > 0, rows / limit, torch.ones_like(rows)).float()
    column = scales.view(-1, *([1] * (weight.ndim - 1)))
    codes = torch.clamp(torch.round(weight.detach().double() / column.double()), -limit, limit)
    return weight + ((codes * column.double()).to(weight.dtype) - weight).detach()


class FakeQuant:
    """An export graph that computes as its Q/DQ artefact does, in float32 and with gradients.

    Args:
        graph: the export graph; its module is only read.
        decision: an int8 decision with static ranges.

    Raises:
        UnsupportedError: the decision has dynamic tensors, or names one that the graph has not.
    """

    def __init__(self, graph: ExportGraph, decision: QuantDecision) -> None:
        import copy

        for name, quant in decision.quantized().items():
            if quant.mode == "dynamic":
                raise UnsupportedError(f"fake quantization has static ranges only, {name!r} is dynamic: calibrate it")
            if name not in graph.linear_inputs:
                raise UnsupportedError(f"the decision names {name!r}, which this graph has not: decide anew")
        self.graph, self.decision = graph, decision
        self._layers = {graph.linear_inputs[name]: quant for name, quant in decision.quantized().items()}
        self._module = copy.deepcopy(graph.module)
        for path, quant in self._layers.items():
            scale = symmetric_grid(quant).scale
            self._module.get_submodule(path).register_forward_pre_hook(
                lambda _, inputs, scale=scale: (on_grid(inputs[0], scale, -128, 127),)
            )

    def __call__(self, codes_B1HW: Tensor, weights: Mapping[str, Tensor] | None = None) -> Tensor:
        """Logits of a batch.

        Args:
            codes_B1HW: brightness codes 0..255, float32.
            weights: the graph's weights by name, such as ``graph.live_weights`` gives; None takes the graph's own.

        Returns:
            Logits with the batch first (BKHW or BK).
        """
        import torch
        from torch.func import functional_call

        used = dict(self._module.state_dict() if weights is None else weights)
        for path in self._layers:
            used[f"{path}.weight"] = weight_on_grid(used[f"{path}.weight"], self.decision.weight_limit)

        def one(codes_1HW: Tensor) -> Tensor:
            return functional_call(self._module, used, (codes_1HW[None],))[0][0]

        return torch.stack([one(codes) for codes in codes_B1HW])


__all__ = ["FakeQuant", "on_grid", "weight_on_grid"]
