"""Fake quantization: the export graph as a torch module.

It rounds exactly where an exported artefact rounds.

Two forms of one decision are computed. ``qdq``: the symmetric signed codes of the Q/DQ graph (``qdq_onnx``), with
gradients, for training and for the cost of single layers. ``static``: the codes of a static form that takes a range as
it is (OpenVINO's FakeQuantize; symmetric ones where a padded convolution needs zero in its place), and each frame's own
range for a dynamic tensor; so that hundreds of decisions are compared in minutes. The gate still judges the artefact in
its own engine.

Weights lie on the per-channel grid of ``quantize_weight``; biases and everything else stay float32. Rounding passes
gradients straight through inside the grid and stops them outside (Jacob et al., CVPR 2018, section 3). Weights may be
handed in as functions of a student's parameters, so that training reaches the student itself.

It does not know data, losses, files or engines.

Shapes: B batch; B1HW codes 0..255; O output channels of a layer.
(O, I) linear and OIHW convolution weights; a layer's input is B tokens I or B I h w.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from tinyusfm_export.graph.build import logit_names
from tinyusfm_export.graph.inference import repeatable_inference
from tinyusfm_export.quantize.decision import QuantDecision, TensorQuant, float_decision
from tinyusfm_export.quantize.ptq import Grid, natural_grid, symmetric_grid
from tinyusfm_runtime.errors import UnsupportedError

if TYPE_CHECKING:
    from torch import Tensor

    from tinyusfm_export.graph.build import ExportGraph

Form = Literal["qdq", "static"]
"""Which artefact's rounding is computed."""
Net = Callable[[np.ndarray], dict[str, np.ndarray]]
"""uint8 NCHW input -> outputs by name."""


def on_grid(x: Tensor, grid: Grid, factor: Tensor | None = None) -> Tensor:
    """Rounds to the values of a code grid.

    The gradient with respect to ``x`` is that of the clamp, 1 inside and 0 outside; with respect to the factor it is
    that of the learned step size (Esser et al., ICLR 2020, equation 3).

    Args:
        x: values.
        grid: the grid.
        factor: on its step, a positive scalar; None leaves the step as it is.
    """
    import torch

    # codes of the grid; the code of zero is ``grid.zero``
    least, most = (-128, 127) if grid.signed else (0, 255)
    step = grid.scale if factor is None else grid.scale * factor
    # in steps from zero: its gradient is 1 inside the grid and 0 outside
    inside = torch.clamp(x / step, least - grid.zero, most - grid.zero)
    # value of the rounded, gradient of the clamped: straight through. With respect to the step it is
    # round(x/s) - x/s inside and the clamped code outside, which is the learned step size's
    return (inside + (torch.round(inside) - inside).detach()) * step


def weight_on_grid(weight: Tensor, limit: int) -> Tensor:
    """Rounds a weight to its per-channel grid.

    The scales follow the weight and take no gradient.

    Args:
        weight: output channels first.
        limit: largest code.
    """
    import torch

    # largest magnitude per output channel (O,); a channel of zeros gets step 1
    rows = weight.detach().flatten(1).abs().amax(1).double()
    scales = torch.where(rows > 0, rows / limit, torch.ones_like(rows)).float()
    # (O, 1) or (O, 1, 1, 1)
    column = scales.view(-1, *([1] * (weight.ndim - 1)))
    codes = torch.clamp(torch.round(weight.detach().double() / column.double()), -limit, limit)
    # forward: the rounded weight; backward: as if nothing had been rounded
    return weight + ((codes * column.double()).to(weight.dtype) - weight).detach()


def layer_grid(quant: TensorQuant, form: Form, *, is_padded: bool) -> Grid:
    """The grid from which a layer reads a static tensor.

    Args:
        quant: the tensor.
        form: of the artefact.
        is_padded: whether a padded convolution reads it, which needs zero where it is.
    """
    natural = natural_grid(quant)
    if form == "qdq" or (is_padded and natural.zero != 0 and not natural.signed):
        return symmetric_grid(quant)
    return natural


class FakeQuant:
    """An export graph that computes as its artefact does.

    In float32 and with gradients.

    Args:
        graph: the export graph; its module is only read.
        decision: of this graph; nothing is rounded where it quantizes nothing.
        form: of the artefact.

    Attributes:
        module: its own copy of the graph's module, which rounds what each quantized layer reads.

    Raises:
        UnsupportedError: the decision has dynamic tensors and the form is ``qdq``, or it names one that the graph has
            not.
    """

    def __init__(self, graph: ExportGraph, decision: QuantDecision, *, form: Form = "qdq") -> None:
        import copy

        import torch

        self.graph, self.decision = graph, decision
        self.module: Any = copy.deepcopy(graph.module)
        self._layers: list[str] = []
        for name, quant in decision.quantized().items():
            if quant.mode == "dynamic" and form == "qdq":
                raise UnsupportedError(f"fake quantization has static ranges only, {name!r} is dynamic: calibrate it")
            if name not in graph.linear_inputs:
                raise UnsupportedError(f"the decision names {name!r}, which this graph has not: decide again")
            path = graph.linear_inputs[name]
            layer: Any = self.module.get_submodule(path)
            with torch.no_grad():
                # rounded once for runs under the graph's own weights
                layer.weight.copy_(weight_on_grid(layer.weight, decision.weight_limit))
            is_padded = any(getattr(layer, "padding", (0,)))
            # the hook rounds what the layer reads, where QuantizeLinear stands in the file
            layer.register_forward_pre_hook(self._rounding(name, quant, form, is_padded=is_padded))
            self._layers.append(path)
        self._factors: Mapping[str, Tensor] = {}

    def __call__(
        self,
        codes_B1HW: Tensor,
        weights: Mapping[str, Tensor] | None = None,
        factors: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Logits of the end for a batch, BKHW or BK; arguments as in ``answers``."""
        return self.answers(codes_B1HW, weights, factors)[-1]

    def answers(
        self,
        codes_B1HW: Tensor,
        weights: Mapping[str, Tensor] | None = None,
        factors: Mapping[str, Tensor] | None = None,
    ) -> list[Tensor]:
        """Everything that a network answers for a batch.

        Args:
            codes_B1HW: brightness codes 0..255, float32.
            weights: the graph's weights by name, such as ``graph.live_weights`` gives; None takes the graph's own.
            factors: on the steps of the activations' grids, positive scalars by the tensor's name; 1 where absent.

        Returns:
            Logits with the batch first (BKHW or BK): those of each early exit in order, the end last.
        """
        import torch
        from torch.func import functional_call

        used: dict[str, Tensor] = {}
        if weights is not None:
            used = dict(weights)
            for path in self._layers:
                # handed-in weights are float and differentiable: rounded here at every step
                used[f"{path}.weight"] = weight_on_grid(used[f"{path}.weight"], self.decision.weight_limit)

        # the exits' logits and the end's, by their places among the outputs
        places = [self.graph.outputs.index(name) for name in logit_names(self.graph.spec.exits)]

        def one(codes_1HW: Tensor) -> list[Tensor]:
            # shapes are static with a batch of one, so a batch is a loop: (1, 1, H, W) each
            found = functional_call(self.module, used, (codes_1HW[None],))
            return [found[place][0] for place in places]

        self._factors = factors or {}
        try:
            # frames x outputs -> per output B K H W or B K
            return [torch.stack(each) for each in zip(*(one(codes) for codes in codes_B1HW), strict=True)]
        finally:
            self._factors = {}

    def outputs(self, codes_11HW: np.ndarray) -> dict[str, np.ndarray]:
        """All outputs of one frame by name, under the graph's own weights."""
        import torch

        with repeatable_inference():
            found = self.module(torch.from_numpy(np.ascontiguousarray(codes_11HW)))
        return {name: value.numpy() for name, value in zip(self.graph.outputs, found, strict=True)}

    def _rounding(
        self, name: str, quant: TensorQuant, form: Form, *, is_padded: bool
    ) -> Callable[[Any, tuple[Tensor, ...]], tuple[Tensor]]:
        static = layer_grid(quant, form, is_padded=is_padded) if quant.mode == "static" else None

        def round_input(_: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
            values = inputs[0]
            grid = static
            if grid is None:
                # dynamic: the range of this frame's own tensor, zero always inside
                low, high = min(float(values.min()), 0.0), max(float(values.max()), 1e-9)
                grid = natural_grid(TensorQuant(mode="static", low=low, high=high))
            return (on_grid(values, grid, self._factors.get(name)),)

        return round_input


def int8_net(graph: ExportGraph, decision: QuantDecision) -> Net:
    """The graph under a decision, in its static form.

    Args:
        graph: the export graph; its own module stays as it is.
        decision: of this graph.
    """
    return FakeQuant(graph, decision, form="static").outputs


def float_net(graph: ExportGraph) -> Net:
    """The graph in float32.

    Args:
        graph: the export graph.
    """
    return FakeQuant(graph, float_decision("fp32")).outputs


__all__ = ["FakeQuant", "Form", "Net", "float_net", "int8_net", "layer_grid", "on_grid", "weight_on_grid"]
