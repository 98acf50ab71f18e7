"""FlatBuffers, as far as a model file needs them.

A strict reader of tables whose every field is known: a field that the schema does not list, an offset that leaves the
file, or a list that is longer than allowed is refused. Positions are those of https://flatbuffers.dev/internals/: a
table begins with the distance back to its vtable, which lists where each field lies. It knows no meaning of a table.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from tinyusfm_runtime.errors import EngineError

MAX_TABLES = 200_000
"""More than any model of ours has: a file whose offsets lead to the same tables again and again ends here."""
_SCALARS = {"i8": "<b", "u8": "<B", "bool": "<?", "i32": "<i", "u32": "<I", "f32": "<f"}
_LISTS = {"bytes": "<u1", "ints": "<i4", "floats": "<f4", "longs": "<i8"}


@dataclass(frozen=True, slots=True)
class Slot:
    """One field of a table.

    Attributes:
        name: the key it gets.
        kind: a scalar, a list of numbers, ``text``, or the schema of a table.
        many: a list of tables.
        most: longest list.
    """

    name: str
    kind: str | TableSchema
    many: bool = False
    most: int = 1 << 16


@dataclass(frozen=True, slots=True)
class TableSchema:
    """The fields that a table may have.

    Attributes:
        what: a name for messages.
        slots: number of a field -> what it is.
    """

    what: str
    slots: Mapping[int, Slot]


class FlatBuffer:
    """One file.

    Args:
        content: its bytes.
    """

    def __init__(self, content: bytes) -> None:
        self.content = memoryview(content)
        self.tables = 0

    def root(self, identifier: bytes) -> int:
        """Where the outermost table begins.

        Raises:
            EngineError: another kind of file.
        """
        if bytes(self.content[4:8]) != identifier:
            raise EngineError("the model is no file of this format")
        return int(self._scalar("<I", 0))

    def table(self, place: int, schema: TableSchema) -> dict[str, Any]:
        """Reads a table and everything in it.

        Args:
            place: where it begins.
            schema: what it may hold.

        Returns:
            Name -> value of the fields that are there.

        Raises:
            EngineError: a field that is not known, or an offset that leaves the file.
        """
        self.tables += 1
        if self.tables > MAX_TABLES:
            raise EngineError("the model has more parts than any model of ours")
        vtable = place - self._scalar("<i", place)
        size = self._scalar("<H", vtable)
        if size < 4 or size % 2:
            raise EngineError(f"the model has {schema.what} without a list of fields")
        found = {}
        for number in range((size - 4) // 2):
            offset = self._scalar("<H", vtable + 4 + 2 * number)
            if not offset:
                continue
            slot = schema.slots.get(number)
            if slot is None:
                raise EngineError(f"the model has {schema.what} with a field {number} that none of ours has")
            found[slot.name] = self._value(place + offset, slot)
        return found

    def _value(self, place: int, slot: Slot) -> Any:
        if isinstance(slot.kind, str) and slot.kind in _SCALARS:
            return self._scalar(_SCALARS[slot.kind], place)
        target = place + self._scalar("<I", place)
        if slot.kind == "place":
            return target
        if isinstance(slot.kind, TableSchema) and not slot.many:
            return self.table(target, slot.kind)
        count = self._scalar("<I", target)
        if isinstance(slot.kind, TableSchema):
            self._most(count, slot)
            entries = [target + 4 + 4 * index for index in range(count)]
            return [self.table(entry + self._scalar("<I", entry), slot.kind) for entry in entries]
        if slot.kind == "text":
            self._most(count, slot)
            return bytes(self._cut(target + 4, count)).decode("utf-8", "replace")
        dtype = np.dtype(_LISTS[slot.kind])
        if slot.kind != "bytes":
            self._most(count, slot)
        return np.frombuffer(self._cut(target + 4, count * dtype.itemsize), dtype)

    def _most(self, count: int, slot: Slot) -> None:
        if count > slot.most:
            raise EngineError(f"the model has {count} of {slot.name!r}, no model of ours has so many")

    def _cut(self, place: int, size: int) -> memoryview:
        if place < 0 or size < 0 or place + size > len(self.content):
            raise EngineError("the model's file ends too early, or points outside of itself")
        return self.content[place : place + size]

    def _scalar(self, form: str, place: int) -> Any:
        return struct.unpack(form, self._cut(place, struct.calcsize(form)))[0]


__all__ = ["MAX_TABLES", "FlatBuffer", "Slot", "TableSchema"]
