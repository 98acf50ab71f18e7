"""Fragments of encapsulated pixel data (PS3.5 A.4).

Which of them make a frame.

The items are walked by their lengths, so markers inside a codestream mislead nobody, and only their positions are kept.
How many frames there are follows from the codestreams that begin, and not from NumberOfFrames: offset tables are used
where a frame has several fragments. It decodes nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from tinyusfm_runtime.errors import SourceError
from tinyusfm_runtime.sources.dicom.codestream import starts_image

ITEM, END = b"\xfe\xff\x00\xe0", b"\xfe\xff\xdd\xe0"
MAX_FRAGMENTS = 1_000_000
Span = tuple[int, int]
"""(offset in the file, length) in bytes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fragments:
    """The items behind the pixel data's head.

    Attributes:
        table: offsets of the basic offset table, bytes from the first fragment; empty where there is none.
        spans: the whole fragments.
        starts: for each, whether a codestream begins in it.
        closed: the sequence ends as it should; False where the file breaks off.
    """

    table: tuple[int, ...]
    spans: tuple[Span, ...]
    starts: tuple[bool, ...]
    closed: bool


def walk(file: BinaryIO, start: int) -> Fragments:
    """Walks the items.

    Args:
        file: the DICOM file.
        start: where the first item, the basic offset table, begins.

    Returns:
        Whole fragments only.

    Raises:
        SourceError: there is no item, or too many.
    """
    size = file.seek(0, os.SEEK_END)
    spans: list[Span] = []
    closed = False
    at = start
    while True:
        file.seek(at)
        item = file.read(8)
        length = int.from_bytes(item[4:8], "little")
        if item[:4] != ITEM or len(item) < 8 or at + 8 + length > size:
            closed = item[:4] == END
            break
        spans.append((at + 8, length))
        at += 8 + length
        if len(spans) > MAX_FRAGMENTS:
            raise SourceError(f"the DICOM file holds more than {MAX_FRAGMENTS} fragments")
    if not spans:
        raise SourceError("the pixel data of the DICOM file are empty, or break off before the first frame")
    return Fragments(
        table=_offsets(_read(file, spans[0])),
        spans=tuple(spans[1:]),
        starts=tuple(starts_image(_read(file, (offset, min(12, length)))) for offset, length in spans[1:]),
        closed=closed,
    )


def _offsets(data: bytes) -> tuple[int, ...]:
    return tuple(int.from_bytes(data[at : at + 4], "little") for at in range(0, len(data) - 3, 4))


def _read(file: BinaryIO, span: Span) -> bytes:
    file.seek(span[0])
    return file.read(span[1])


def group(found: Fragments, *, rle: bool, promised: int | None, extended: tuple[int, ...] = ()) -> list[list[Span]]:
    """Fragments of each frame.

    Args:
        found: what ``walk`` gave.
        rle: the codec is RLE, where every fragment is a frame (PS3.5 A.4.2).
        promised: NumberOfFrames, or None.
        extended: offsets of the extended offset table, or empty.

    Returns:
        Spans of each frame, in order.

    Raises:
        SourceError: several fragments, and nothing tells which of them belong together.
    """
    spans = found.spans
    if rle or (found.starts and all(found.starts)) or len(spans) == promised:
        return [[span] for span in spans]
    table = extended or found.table
    if len(table) > 1 and (by_table := _by_offsets(spans, table)):
        return by_table
    if found.starts and found.starts[0]:
        frames: list[list[Span]] = []
        for span, begins in zip(spans, found.starts, strict=True):
            if begins:
                frames.append([])
            frames[-1].append(span)
        return frames
    if promised in (None, 1):
        return [list(spans)] if spans else []
    raise SourceError(
        f"the DICOM file holds {len(spans)} fragments for {promised} frames and does not say which belong together"
    )


def _by_offsets(spans: tuple[Span, ...], table: tuple[int, ...]) -> list[list[Span]]:
    """Fragments by the offsets of their items.

    Empty where the table does not fit them.
    """
    first = spans[0][0] - 8 if spans else 0
    places = {span[0] - 8 - first: number for number, span in enumerate(spans)}
    numbers = [places[offset] for offset in table if offset in places]
    whole = [offset for offset in table if offset <= max(places, default=0)]
    if len(numbers) != len(whole) or numbers[:1] != [0] or numbers != sorted(set(numbers)):
        return []
    return [list(spans[a:b]) for a, b in zip(numbers, [*numbers[1:], len(spans)], strict=True)]


def read_frames(file: BinaryIO, frames: list[list[Span]]) -> Iterator[bytes]:
    """Yields the bytes of each frame."""
    for spans in frames:
        yield b"".join(_read(file, span) for span in spans)


__all__ = ["END", "ITEM", "MAX_FRAGMENTS", "Fragments", "Span", "group", "read_frames", "walk"]
