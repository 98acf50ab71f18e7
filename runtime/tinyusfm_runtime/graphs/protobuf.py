"""Strict reader of protocol buffers.

A schema says what may stand in a message, and anything else is an error.

Libraries skip fields that they do not know, merge a message that comes twice and take the last of a number that comes
twice. Here each of these is refused, so that two readers cannot understand one file in two ways. Wire format:
https://protobuf.dev/programming-guides/encoding/. It knows no messages.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from tinyusfm_runtime.errors import EngineError

Kind = Literal["int", "float", "double", "text", "bytes", "skip"]
"""Types of a field; ``skip`` is text or bytes that nobody needs, its length alone is checked."""
MAX_VALUES = 1_000_000
"""Numbers, texts and messages in one file; weights are one each."""
_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5


@dataclass(frozen=True, slots=True)
class MessageSchema:
    """What may stand in a message.

    Attributes:
        name: for messages to people.
        fields: number -> what it is.
        refused: number -> what it is called, of fields that are known and never taken.
    """

    name: str
    fields: Mapping[int, Field]
    refused: Mapping[int, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Field:
    """One field.

    Attributes:
        name: key in what ``read`` returns.
        kind: a plain type, or the message inside.
        many: whether it may come more than once; it is then a list.
        most: how often at most, and the longest list of packed numbers.
    """

    name: str
    kind: Kind | MessageSchema
    many: bool = False
    most: int = 65_536


def read(raw: memoryview, message: MessageSchema, left: list[int] | None = None) -> dict[str, Any]:
    """Reads one message.

    Args:
        raw: all of it.
        message: what may stand in it.
        left: how many values may still be read, in a list of one; None begins at ``MAX_VALUES``.

    Returns:
        Name -> value: int (64 bits, signed), float, str, memoryview or dict; lists where a field may come often, empty
        ones where it does not come. A field that comes once at most and does not come is not there.

    Raises:
        EngineError: anything that the schema does not name, or a broken encoding.
    """
    found: dict[str, Any] = {part.name: [] for part in message.fields.values() if part.many}
    left = [MAX_VALUES] if left is None else left
    at = 0
    while at < len(raw):
        key, at = _varint(raw, at, message)
        number, wire = key >> 3, key & 7
        if number in message.refused:
            raise EngineError(f"{message.name} holds {message.refused[number]}, which no model of ours has")
        part = message.fields.get(number)
        if part is None:
            raise EngineError(f"{message.name} holds a field (number {number}) that no model of ours has")
        value, at = _value(raw, at, wire, part, message, left)
        left[0] -= len(value) if isinstance(value, list) else 1
        if left[0] < 0:
            raise EngineError(f"the file holds more than {MAX_VALUES} values")
        if not part.many:
            if part.name in found:
                raise EngineError(f"{message.name} holds {part.name} twice")
            found[part.name] = value
            continue
        listed = found[part.name]
        listed.extend(value) if isinstance(value, list) else listed.append(value)
        if len(listed) > part.most:
            raise EngineError(f"{message.name} holds more than {part.most} of {part.name}")
    return found


def _value(
    raw: memoryview, at: int, wire: int, field: Field, message: MessageSchema, left: list[int]
) -> tuple[Any, int]:
    kind = field.kind
    if kind == "int" and wire == _VARINT:
        number, at = _varint(raw, at, message)
        return _signed(number), at
    if kind == "float" and wire == _FIXED32:
        return struct.unpack("<f", _part(raw, at, 4, message))[0], at + 4
    if kind == "double" and wire == _FIXED64:
        return struct.unpack("<d", _part(raw, at, 8, message))[0], at + 8
    if wire != _LENGTH:
        raise EngineError(f"{message.name}: {field.name} is written as another type")
    size, at = _varint(raw, at, message)
    part = _part(raw, at, size, message)
    at += size
    if isinstance(kind, MessageSchema):
        return read(part, kind, left), at
    if kind == "text":
        try:
            return bytes(part).decode("utf-8"), at
        except UnicodeDecodeError as error:
            raise EngineError(f"{message.name}: {field.name} is no text") from error
    if kind in ("bytes", "skip"):
        return part, at
    if not field.many:
        raise EngineError(f"{message.name}: {field.name} is written as another type")
    return _packed(part, field, message), at


def _packed(part: memoryview, field: Field, message: MessageSchema) -> list[Any]:
    if field.kind == "int":
        numbers: list[Any] = []
        at = 0
        while at < len(part):
            number, at = _varint(part, at, message)
            numbers.append(_signed(number))
            if len(numbers) > field.most:
                raise EngineError(f"{message.name} holds more than {field.most} of {field.name}")
        return numbers
    letter, size = ("f", 4) if field.kind == "float" else ("d", 8)
    count, rest = divmod(len(part), size)
    if rest or count > field.most:
        raise EngineError(f"{message.name} holds a broken list of {field.name}, or more than {field.most}")
    return list(struct.unpack(f"<{count}{letter}", part))


def _varint(raw: memoryview, at: int, message: MessageSchema) -> tuple[int, int]:
    number = shift = 0
    for place in range(at, min(at + 10, len(raw))):
        byte = raw[place]
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            if number >> 64:
                break
            return number, place + 1
        shift += 7
    raise EngineError(f"{message.name} is cut off or broken: a number does not end")


def _signed(number: int) -> int:
    return number - (1 << 64) if number >> 63 else number


def _part(raw: memoryview, at: int, size: int, message: MessageSchema) -> memoryview:
    if size > len(raw) - at:
        raise EngineError(f"{message.name} is cut off or broken: a part is longer than the whole")
    return raw[at : at + size]


__all__ = ["MAX_VALUES", "Field", "Kind", "MessageSchema", "read"]
