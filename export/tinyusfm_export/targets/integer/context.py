"""What is known while a graph becomes an integer model.

The graph's labels, the decision's steps, and where values lie.

It does not write operations.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from tinyusfm_calibration.ranges import SPAN
from tinyusfm_export.graph.net import shape_of
from tinyusfm_export.onnx_files.writer import as_array
from tinyusfm_export.quantize.decision import QuantDecision, TensorQuant
from tinyusfm_export.quantize.ptq import natural_grid
from tinyusfm_export.targets.integer.scales import Step, fraction_bits, word_bits
from tinyusfm_export.targets.integer.writer import ModelWriter
from tinyusfm_runtime.engines.integer.layout import I32
from tinyusfm_runtime.errors import CalibrationError

if TYPE_CHECKING:
    from torch.fx import Node

    from tinyusfm_export.graph.build import ExportGraph

WIDE_BLOCKS = (0,)
"""Blocks whose LayerNorm outputs are 16 bits wide whatever the decision says: of 12 blocks of the fetal-head student
only the first is sensitive, and of its tensors only these (logit error 0.074 without, 0.062 with)."""
WEIGHT_LIMIT = 63
"""Largest weight code. Two products of a code and such a weight fit 16 bits, so CPUs without 8-bit dot products can
multiply bytes, with the same sums, in up to half the time. On patients it costs nothing: over 60 frames of HC18 mean
Dice .99914 against .99915 with codes up to 127, and 0.18 mm at the circumference's 95th percentile with both."""
_RESIDUAL = (".mid", ".out", ".mean")


@dataclass(kw_only=True)
class Context:
    """A graph under way.

    Attributes:
        graph: the export graph.
        decision: which tensors are 8 bits wide, with which ranges, and the spans.
        writer: the model so far.
        residual: buffer of the tokens.
        first_row: 1 where the class token is left out from here on, else 0.
        most_bits: fraction bits of the residual at most.
        units: layer that adds to the residual -> largest unit of its sums.
        answers: name of an output -> buffer, step, and whether it lies with channels last but is wanted first.
    """

    graph: ExportGraph
    decision: QuantDecision
    writer: ModelWriter
    labels: dict[str, Node] = field(init=False)
    residual: int = -1
    first_row: int = 0
    most_bits: int = 30
    units: dict[str, float] = field(default_factory=dict)
    answers: dict[str, tuple[int, float, bool]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.labels = {n.meta["label"]: n for n in self.module.graph.nodes if "label" in n.meta}
        if not self.decision.spans:
            raise CalibrationError(
                "the ranges know the inputs of linears only, and an integer artefact has no float in between: "
                "calibrate again with --data DIR"
            )

    @property
    def module(self) -> Any:
        """The graph's module."""
        return self.graph.module

    @property
    def limit(self) -> int:
        """Largest weight code."""
        return weight_limit(self.decision)

    @property
    def width(self) -> int:
        """Width of a token."""
        return self.writer.shape(self.residual)[1]

    @property
    def heads(self) -> int:
        """Attention heads."""
        return int(self.graph.spec.architecture["heads"])

    @property
    def all_rows(self) -> int:
        """Tokens, the class token among them."""
        return self.writer.shape(self.residual)[0]

    @property
    def rows(self) -> int:
        """Tokens that are still computed."""
        return self.all_rows - self.first_row

    @property
    def residual_bits(self) -> int:
        """Fraction bits of the residual: one step for the whole graph.

        As many as its range allows, the same in every stage of a chain, or ``most_bits`` where layers are coarser.
        """
        return min(self.range_bits, self.most_bits)

    @cached_property
    def range_bits(self) -> int:
        """Fraction bits of the residual that its range allows."""
        largest = 0.0
        for name, span in self.decision.spans.items():
            label = name.removesuffix(SPAN)
            if label in ("tokens", "patch_embed.positions") or (label.startswith("blocks.") and _is_residual(label)):
                largest = max(largest, *map(abs, span))
        return fraction_bits(largest)

    @property
    def bits_that_fill(self) -> int:
        """Fraction bits of the residual that no layer's sums are coarser than.

        Known when all layers are written.

        Raises:
            UnsupportedError: too few of its 16 bits would be left.
        """
        label = max(self.units, key=self.units.__getitem__)
        return word_bits(label, self.range_bits, self.units[label])

    @property
    def norm_bits(self) -> int:
        """Fraction bits of a LayerNorm's 16-bit values: sqrt(D) of them fit 14 bits."""
        return int(np.floor(14.0 - np.log2(np.sqrt(self.width)) - 1e-9))

    def span(self, label: str) -> tuple[float, float]:
        """Smallest and largest value of a tensor on the calibration frames.

        Raises:
            CalibrationError: it was not observed.
        """
        found = self.decision.spans.get(f"{label}{SPAN}")
        if found is None:
            raise CalibrationError(
                f"the ranges lack the span of {label!r}: they belong to another graph, calibrate again"
            )
        return found

    def hidden_step(self, name: str, high: float) -> Step:
        """The step behind a GELU whose inputs reach ``high``.

        What its reader has, or what follows from that.
        """
        if name in self.decision.tensors or f"{name}{SPAN}" in self.decision.spans:
            return self.input_step(name)
        grid = natural_grid(TensorQuant(mode="static", low=-0.17, high=max(high, 0.1)))
        return Step(scale=grid.scale, zero=grid.zero)

    def input_step(self, name: str) -> Step:
        """The 8-bit step of a linear's input.

        Ranges that training learned are taken as they are. Others are min-max here, whatever method suits the stock
        engines: on 78 phantoms the logit error is 0.15 with min-max and 0.19 with percentiles, and of the frames with
        small masks the worst has 0.14 % and 0.56 % of other pixels.
        """
        quant = self.decision.tensors.get(name)
        learned = "learned" in self.decision.method
        span = self.decision.spans.get(f"{name}{SPAN}")
        if quant is None or quant.mode != "static" or (span is not None and not learned):
            low, high = span or self.span(name)
            quant = TensorQuant(mode="static", low=low, high=high, symmetric=quant is not None and quant.symmetric)
        grid = natural_grid(quant)
        return Step(scale=grid.scale, zero=grid.zero + (128 if grid.signed else 0))

    def is_wide(self, reader: str) -> bool:
        """Whether a LayerNorm in front of this linear keeps 16 bits.

        In a sensitive block, or where it is kept float elsewhere.
        """
        if any(reader.startswith(f"blocks.{index}.") for index in WIDE_BLOCKS):
            return True
        quant = self.decision.tensors.get(f"{reader}.input")
        return quant is not None and quant.mode == "float"

    def norm_scale(self, norm: str, step: Step) -> np.ndarray:
        """What the columns behind a LayerNorm are multiplied with.

        Its own scale, where 16-bit words leave it out.
        """
        layer = self.module.get_submodule(norm)
        if not step.wide or layer.weight is None:
            return np.ones(1, np.float32)
        return as_array(layer.weight)

    def note_peak(self, index: int, hidden: int, step: Step) -> None:
        """Adds the auxiliary output of a block's largest hidden value, where it is wanted."""
        for name in self.graph.outputs:
            if name == f"peak_block{index}":
                target = self.writer.buffer(name, I32, 1, 1)
                self.writer.add("peak", hidden, target, label=name, zero=step.zero)
                self.answers[name] = (target, step.scale, False)

    def source_label(self, label: str) -> str:
        """Label of what a node reads first."""
        return str(self.labels[label].args[0].meta["label"])  # type: ignore[union-attr]

    def size(self, label: str) -> tuple[int, ...]:
        """Static shape of a node."""
        return shape_of(self.labels[label])


def weight_limit(decision: QuantDecision) -> int:
    """Largest weight code under a decision."""
    return min(decision.weight_limit, WEIGHT_LIMIT)


def _is_residual(label: str) -> bool:
    return label.endswith(_RESIDUAL) and ".mlp." not in label


__all__ = ["WEIGHT_LIMIT", "WIDE_BLOCKS", "Context", "weight_limit"]
