"""An integer model being written.

Buffers, operations and tensors, and the bytes they become.

It knows the file's form (tinyusfm_runtime.engines.integer.layout) and nothing of networks.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tinyusfm_runtime.engines.integer import layout
from tinyusfm_runtime.engines.integer.model_file import SAFE_TYPES

_NAMES = {np.dtype(kind): name for name, kind in SAFE_TYPES.items()}


@dataclass(kw_only=True)
class ModelWriter:
    """Collects a model.

    Attributes:
        buffers: element type, rows and columns by number.
        operations: kind, source, target and fields.
        tensors: by the name in the file.
        ports: name, element type and shape; the input first.
        notes: one entry per operation for ``model.json``: what it stands for and its scales.
    """

    buffers: list[tuple[int, int, int]] = field(default_factory=list)
    operations: list[list[int]] = field(default_factory=list)
    tensors: dict[str, np.ndarray] = field(default_factory=dict)
    ports: list[tuple[str, int, tuple[int, ...]]] = field(default_factory=list)
    notes: list[dict[str, Any]] = field(default_factory=list)
    _roles: dict[tuple[str, int, int, int], int] = field(default_factory=dict)

    def port(self, name: str, dtype: int, shape: tuple[int, ...]) -> int:
        """Adds the input (first) or an output; returns its number."""
        self.ports.append((name, dtype, shape))
        return len(self.ports) - 1

    def buffer(self, role: str, dtype: int, rows: int, columns: int) -> int:
        """The buffer of a role and size; the same one every time."""
        key = (role, dtype, rows, columns)
        if key not in self._roles:
            self.buffers.append((dtype, rows, columns))
            self._roles[key] = len(self.buffers) - 1
        return self._roles[key]

    def shape(self, buffer: int) -> tuple[int, int]:
        """Rows and columns of a buffer."""
        return self.buffers[buffer][1:]

    def add(
        self,
        kind: str,
        source: int,
        target: int,
        *,
        label: str,
        tensors: Mapping[str, np.ndarray] | None = None,
        scales: Mapping[str, float] | None = None,
        **fields: int,
    ) -> None:
        """Adds an operation.

        Args:
            kind: see ``layout.KINDS``.
            source: buffer.
            target: buffer.
            label: of the graph's node that it stands for.
            tensors: by role.
            scales: for people: what one step of its values is worth.
            **fields: the kind's own, each of them.
        """
        names = layout.KINDS[layout.NUMBERS[kind]][1]
        assert set(names) == set(fields), (kind, names, fields)
        row = [layout.NUMBERS[kind], source, target, *(int(fields[name]) for name in names)]
        number = len(self.operations)
        self.operations.append(row + [0] * (layout.FIELDS - len(row)))
        for role, value in (tensors or {}).items():
            self.tensors[f"{number}.{role}"] = np.ascontiguousarray(value)
        self.notes.append({"kind": kind, "label": label, **{k: float(v) for k, v in (scales or {}).items()}})

    def all_tensors(self) -> dict[str, np.ndarray]:
        """Everything that the file holds, tables first."""
        counts = [layout.MODEL_VERSION, len(self.buffers), len(self.operations), len(self.ports)]
        ports = [[dtype, len(shape), *shape, *[0] * (4 - len(shape))] for _, dtype, shape in self.ports]
        names = "\n".join(name for name, _, _ in self.ports).encode("ascii")
        return {
            "model": np.array(counts, "<i4"),
            "buffers": np.array(self.buffers, "<i4"),
            "operations": np.array(self.operations, "<i4"),
            "ports": np.array(ports, "<i4"),
            "names": np.frombuffer(names, "u1"),
            **self.tensors,
        }

    def file(self) -> bytes:
        """``model.safetensors``; the same model gives the same bytes."""
        header: dict[str, Any] = {}
        parts: list[bytes] = []
        at = 0
        # wide elements first, so that every tensor lies on a multiple of its element's size
        for name, value in sorted(self.all_tensors().items(), key=lambda item: (-item[1].itemsize, item[0])):
            content = value.tobytes()
            places = [at, at + len(content)]
            header[name] = {"dtype": _NAMES[value.dtype], "shape": list(value.shape), "data_offsets": places}
            parts.append(content)
            at += len(content)
        text = json.dumps(header, separators=(",", ":")).encode("ascii")
        text += b" " * (-len(text) % 8)
        return b"".join([len(text).to_bytes(8, "little"), text, *parts])

    def description(self, **more: object) -> bytes:
        """``model.json``: shapes and scales."""
        types = ("uint8", "int8", "int16", "int32", "int64", "float32")
        plain = {
            "version": layout.MODEL_VERSION,
            **more,
            "ports": [{"name": n, "dtype": types[d], "shape": list(s)} for n, d, s in self.ports],
            "buffers": [{"dtype": types[d], "rows": r, "columns": c} for d, r, c in self.buffers],
            "operations": self.notes,
        }
        return (json.dumps(plain, indent=1, sort_keys=True) + "\n").encode("ascii")


__all__ = ["ModelWriter"]
