"""What is known of tensors and operators before anything runs.

Shapes, types, and numbers where they are few.

It knows no format and no rules (shapes.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Shape = tuple[int, ...]
FOLLOWED = 4096
"""Longest list of whole numbers that is followed."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """What is known of a tensor.

    Attributes:
        shape: its sides.
        dtype: name of its type.
        value: its numbers, where they are known and few.
        fixed: whether it is the same for every frame, so that a library computes it while it loads.
    """

    shape: Shape
    dtype: str = "float32"
    value: np.ndarray | None = None
    fixed: bool = False

    @property
    def elements(self) -> int:
        """How many numbers it has."""
        return math.prod(self.shape)

    def numbers(self, what: str) -> list[int]:
        """Its numbers, as a list.

        Raises:
            ValueError: they are not known.
        """
        if self.value is None:
            raise ValueError(f"{what} is not a constant")
        return [int(number) for number in self.value.reshape(-1).tolist()]


@dataclass(frozen=True, slots=True)
class Node:
    """One operator.

    Attributes:
        kind: the rule's name.
        inputs: None where an optional one is left out.
        attributes: name -> value.
        outputs: how many there are.
    """

    kind: str
    inputs: Sequence[Tensor | None]
    attributes: Mapping[str, Any] = field(default_factory=dict)
    outputs: int = 1

    def tensor(self, index: int) -> Tensor:
        """One input.

        Raises:
            ValueError: it is left out.
        """
        found = self.inputs[index] if index < len(self.inputs) else None
        if found is None:
            raise ValueError(f"input {index} is missing")
        return found

    def optional(self, index: int) -> Tensor | None:
        """One input, or None."""
        return self.inputs[index] if index < len(self.inputs) else None

    def get(self, name: str, default: Any) -> Any:
        """One attribute."""
        return self.attributes.get(name, default)


def broadcast(*shapes: Shape) -> Shape:
    """The common shape, as NumPy does it.

    Raises:
        ValueError: there is none.
    """
    return tuple(int(side) for side in np.broadcast_shapes(*shapes))


def axis_of(axis: int, rank: int) -> int:
    """A place counted from either end, from the front.

    Raises:
        ValueError: there is no such place.
    """
    if not -rank <= axis < rank:
        raise ValueError(f"axis {axis} of {rank}")
    return axis % rank


def known(array: np.ndarray) -> Tensor:
    """A tensor of numbers that are known."""
    return Tensor(array.shape, str(array.dtype), array if array.size <= FOLLOWED else None, fixed=True)


__all__ = ["FOLLOWED", "Node", "Shape", "Tensor", "axis_of", "broadcast", "known"]
