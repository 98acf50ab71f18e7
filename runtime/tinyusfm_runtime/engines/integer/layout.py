"""A model as the integer engine knows it.

Buffers, a list of operations with their tensors, and its ports.

``model.safetensors`` holds these tensors beside the operations' own:

* ``model`` int32 (4,): version, buffers, operations, ports.
* ``buffers`` int32 (B, 3): element type, rows, columns. Maps lie as one row per position, channels side by side.
  Buffer 0 is the input.
* ``operations`` int32 (N, 12): kind, source, destination, and the kind's own fields in the order of ``KINDS``.
* ``ports`` int32 (P, 6): element type, number of axes, four sides; the input first.
* ``names`` uint8: the ports' names in ASCII, one per line.

The tensor ``weight`` of operation 7 is called ``7.weight``. Nothing is believed: ``model_file.py`` checks every
index and size, and ``bounds.py`` proves from the weights that no accumulator can leave 32 bits. This file only says
what there is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

MODEL_VERSION = 1
"""Of the file and of the arithmetic."""
FIELDS = 12
"""Numbers of an operation."""
MAX_BUFFERS, MAX_OPERATIONS, MAX_PORTS = 256, 4096, 64
"""More than any model of this family needs."""
MAX_ELEMENTS = 2**26
"""Of one buffer."""
MAX_MEMORY_BYTES, MAX_PRODUCTS = 2**28, 2**38
"""Of all buffers together, and products of one answer: ours take 20 MB and 2^31."""
TYPES = ("u1", "i1", "<i2", "<i4", "<i8", "<f4")
"""Element types by their number in the file: uint8, int8, int16, int32, int64, float32."""
U8, I16, I32, I64, F32 = 0, 2, 3, 4, 5
KINDS: dict[int, tuple[str, tuple[str, ...]]] = {
    1: ("patches", ("size",)),
    2: ("tokens", ("bits",)),
    3: ("fill", ()),
    4: ("linear", ("row", "target_row", "rows", "mode", "bits", "zero", "table")),
    5: ("norm", ("row", "rows", "mode", "bits", "zero")),
    6: ("attention", ("heads", "row", "bits", "zero", "drop")),
    7: ("convolution", ("height", "width", "bits", "zero")),
    8: ("depthwise", ("height", "width", "bits", "zero")),
    9: ("resize", ("from_height", "from_width", "height", "width", "share_bits", "flags")),
    10: ("halve", ("height", "width", "flags")),
    11: ("codes", ("factor", "bits", "zero")),
    12: ("mean", ("row", "rows", "bias", "shift", "factor", "bits")),
    13: ("peak", ("zero",)),
    14: ("sum", ("row", "rows")),
    15: ("affine", ()),
    16: ("output", ("port", "scale", "transposed")),
    17: ("gather", ("blank",)),
}
"""Number of a kind -> its name and its fields."""
NUMBERS = {name: number for number, (name, _) in KINDS.items()}
"""Name of a kind -> its number."""
CODES, WORDS, ADD = range(3)
"""Modes: uint8 codes; int16 words; words added to what the destination holds, saturated."""
RELU, ADDED, EXACT = 1, 2, 4
"""Flags of a resize: negative values become 0; added to the destination; 32 bits without rounding."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Buffer:
    """A matrix that operations read and write.

    Attributes:
        dtype: number of the element type.
        rows: tokens or positions.
        columns: channels.
    """

    dtype: int
    rows: int
    columns: int

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.rows, self.columns


@dataclass(frozen=True, kw_only=True, slots=True)
class Port:
    """The input or an output.

    Attributes:
        name: in the graph.
        dtype: number of the element type.
        shape: static.
    """

    name: str
    dtype: int
    shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Operation:
    """One step.

    Attributes:
        kind: see ``KINDS``.
        source: buffer that is read.
        target: buffer that is written.
        fields: the kind's own numbers by name.
        tensors: the kind's own tensors by role.
    """

    kind: str
    source: int
    target: int
    fields: Mapping[str, int]
    tensors: Mapping[str, np.ndarray]

    def __getitem__(self, name: str) -> int:
        return self.fields[name]


@dataclass(frozen=True, kw_only=True, slots=True)
class Ports:
    """What a model takes and gives.

    Attributes:
        input: what it takes.
        outputs: what it gives, ``logits`` first.
    """

    input: Port
    outputs: tuple[Port, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Model(Ports):
    """A checked model.

    Attributes:
        buffers: by number; 0 is the input.
        operations: in the order they run.
    """

    buffers: tuple[Buffer, ...]
    operations: tuple[Operation, ...]


__all__ = [
    "ADD",
    "ADDED",
    "CODES",
    "EXACT",
    "F32",
    "FIELDS",
    "I16",
    "I32",
    "I64",
    "KINDS",
    "MAX_BUFFERS",
    "MAX_ELEMENTS",
    "MAX_MEMORY_BYTES",
    "MAX_OPERATIONS",
    "MAX_PORTS",
    "MAX_PRODUCTS",
    "MODEL_VERSION",
    "NUMBERS",
    "RELU",
    "TYPES",
    "U8",
    "WORDS",
    "Buffer",
    "Model",
    "Operation",
    "Port",
    "Ports",
]
