"""Adds up what a graph asks for, tensor by tensor.

Refuses what no model of its input's size needs.

A graph of harmless operators can still ask for any amount of memory or time: a product of two vectors, a concatenation
that doubles forty times. So its shapes are worked out by rules (shapes.py) before any library sees it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from tinyusfm_runtime.errors import EngineError
from tinyusfm_runtime.graphs.shapes import RULES
from tinyusfm_runtime.graphs.tensors import Node, Tensor
from tinyusfm_runtime.spec import ModelSpec

MAX_RANK = 8
_BYTES = {"float64": 8, "int64": 8, "uint64": 8, "float32": 4, "int32": 4, "uint32": 4}  # others: 2 at most


class Budget:
    """Adds up what a graph asks for and refuses what no model of this size needs.

    The limits grow with the pixels of the model's input and lie far above what any of our models uses: 256 numbers a
    pixel in one tensor, 5,000 in all of them, 4 million multiplications a pixel.

    Args:
        spec: the model.
        weights_bytes: size of the artefact's files.
    """

    def __init__(self, spec: ModelSpec, weights_bytes: int) -> None:
        pixels = math.prod(spec.input.shape)
        self.tensor_elements = max(1 << 22, 256 * pixels)
        self.all_elements = max(1 << 25, 5_000 * pixels)
        self.products = max(1 << 35, 4_000_000 * pixels)
        self.fixed_bytes = 4 * weights_bytes + (64 << 20)
        self.used_elements = self.used_products = self.used_bytes = 0
        self.used_macs = 0  # of matrix products and convolutions of a frame's own numbers

    def apply(self, node: Node, what: str) -> list[Tensor]:
        """Works out an operator's outputs and takes their cost.

        Args:
            node: the operator.
            what: its name, for messages.

        Raises:
            EngineError: no rule, shapes that do not fit, or too large.
        """
        rule = RULES.get(node.kind)
        if rule is None:
            raise EngineError(f"the model holds an operator {what} that no model of ours has")
        try:
            outputs = rule(node)
        except (ValueError, IndexError, TypeError, OverflowError) as error:
            raise EngineError(f"the model's operator {what} does not fit its inputs: {error}") from error
        if len(outputs) < node.outputs:
            raise EngineError(f"the model's operator {what} has more outputs than there are")
        fixed = all(tensor is None or tensor.fixed for tensor in node.inputs)
        made = [Tensor(out.shape, out.dtype, out.value, fixed or out.value is not None) for out in outputs]
        for tensor in made:
            self._take(tensor, what)
        count = products(node, made)
        if node.kind in ("matmul", "conv", "group_conv", "conv_transpose") and not fixed:
            self.used_macs += count
        self._work(count, what)
        return made

    def declare(self, shape: tuple[int, ...], what: str, *, fixed: bool) -> None:
        """Takes the cost of a tensor whose shape a file declares.

        Args:
            shape: its sides.
            what: name of its operator, for messages.
            fixed: whether it is the same for every frame.

        Raises:
            EngineError: too large.
        """
        self._take(Tensor(shape, fixed=fixed), what)

    def _take(self, tensor: Tensor, what: str) -> None:
        if len(tensor.shape) > MAX_RANK or any(side < 1 for side in tensor.shape):
            raise EngineError(f"the model's operator {what} makes a tensor of {list(tensor.shape)}")
        if tensor.elements > self.tensor_elements:
            raise EngineError(
                f"the model's operator {what} makes a tensor of {tensor.elements} numbers; "
                f"a model of this input needs {self.tensor_elements} at most"
            )
        self.used_elements += tensor.elements
        if tensor.fixed:
            self.used_bytes += tensor.elements * _BYTES.get(tensor.dtype, 2)
        if self.used_elements > self.all_elements or self.used_bytes > self.fixed_bytes:
            raise EngineError("the model's tensors are larger together than a model of this input needs")

    def _work(self, count: int, what: str) -> None:
        self.used_products += count
        if self.used_products > self.products:
            raise EngineError(f"the model multiplies more than a model of this input needs (up to operator {what})")


def products(node: Node, made: Sequence[Tensor]) -> int:
    """How many products an operator adds up; everything else counts one a number."""
    out = made[0].elements
    if node.kind == "matmul":
        a = node.tensor(0).shape
        return out * (a[-2] if node.get("transpose_a", False) and len(a) > 1 else a[-1])
    if node.kind in ("conv", "group_conv", "conv_transpose"):
        weight = node.tensor(1).shape
        per = math.prod(weight[2:]) if node.kind == "group_conv" else math.prod(weight[1:])
        return (node.tensor(0).elements if node.kind == "conv_transpose" else out) * per
    if node.kind == "pool":
        return out * math.prod(node.get("kernel", ()) or node.tensor(0).shape[2:])
    return out


__all__ = ["MAX_RANK", "Budget", "products"]
