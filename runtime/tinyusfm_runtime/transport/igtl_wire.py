"""OpenIGTLink on the wire: messages to bytes and back.

Pure functions without a socket.

Layouts are those of the OpenIGTLink protocol documents, versions 1 to 3: a 58-byte big-endian header; where its
version is 2 or more (protocol 3), an extended header in front of the content and metadata behind it; CRC-64 over
everything that follows the header. IMAGE, STATUS and STRING are understood, other types only as far as their frame.

Nothing is believed: sizes have caps, every field has a range, and the CRC comes before any content is looked at. The
header itself is not under the CRC, so its fields can be wrong without a trace; each is held against its range, and the
content must fit the type, the version and the length that the header claims.

It does not know connections, clocks or which device is wanted.

Shapes: HW = rows, columns; HWC = rows, columns, channels. OpenIGTLink's i runs along columns, j along rows.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from tinyusfm_runtime.errors import FrameError
from tinyusfm_runtime.transport.crc64 import crc64

PORT = 18944
"""The port registered for OpenIGTLink."""
HEADER_BYTES = 58
EXTENDED_BYTES = 12
IMAGE_HEADER_BYTES = 72
MAX_BODY_BYTES = 64 << 20
"""A longer body is refused unread; 3840x2160 RGBA takes 32 MiB."""
MAX_SIDE = 16384
MAX_METADATA = 1024
"""Entries of one message."""
MAX_TIME_S = 4_102_444_800
"""1 January 2100; a later timestamp is damage."""
ASCII, LATIN1, UTF8 = 3, 4, 106
"""Character sets by their MIBenum (IANA)."""
STATUS_OK = 1

_HEADER = struct.Struct(">H12s20sIIQQ")
_EXTENDED = struct.Struct(">HHII")
_ENTRY = struct.Struct(">HHI")
_IMAGE = struct.Struct(">HBBBB3H12f3H3H")
_STATUS = struct.Struct(">Hq20s")
_STRING = struct.Struct(">HH")
_SCALARS = {2: "i1", 3: "u1", 4: "i2", 5: "u2", 6: "i4", 7: "u4", 10: "f4", 11: "f8"}
_ENDIAN = {1: ">", 2: "<"}
_CHARSETS = {ASCII: "ascii", LATIN1: "latin-1", UTF8: "utf-8"}
_TYPE = re.compile(rb"[A-Z][A-Z0-9_]{0,11}\0*")
_NAME = re.compile(rb"[\x20-\x7e]*\0*")


class WireError(FrameError):
    """A message cannot be used.

    Args:
        reason: one word to count it by: ``header``, ``time``, ``size``, ``crc``, ``no_crc``, ``type``, ``geometry`` or
            ``content``.
        message: what was wrong.
    """

    def __init__(self, reason: str, message: str) -> None:
        self.reason = reason
        super().__init__(f"OpenIGTLink message refused: {message}")


@dataclass(frozen=True, kw_only=True, slots=True)
class IgtlEnvelope:
    """What is said around a content.

    Attributes:
        device: name of the sender, 20 ASCII characters at most.
        t_unix_ns: the sender's clock, ns since 1970, 0 .. MAX_TIME_S; the wire holds it to a quarter of a nanosecond.
        header_version: 1 for protocols 1 and 2, 2 for protocol 3.
        message_id: running number, 0 .. 2^32 - 1; travels with version 2 only.
        metadata: pairs of texts; travel with version 2 only.
    """

    device: str = ""
    t_unix_ns: int = 0
    header_version: int = 1
    message_id: int = 0
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class IgtlHeader:
    """The first 58 bytes of a message.

    Attributes:
        version: 1, or 2 and 3 with an extended header.
        kind: the message's type, such as ``IMAGE``.
        device: name of the sender.
        t_unix_ns: the sender's clock, ns since 1970.
        body_bytes: what follows.
        crc: CRC-64 of what follows.
    """

    version: int
    kind: str
    device: str
    t_unix_ns: int
    body_bytes: int
    crc: int


@dataclass(frozen=True, kw_only=True, slots=True)
class IgtlMessage:
    """A message whose CRC was right.

    Attributes:
        header: its header.
        content: the content without extended header and metadata; a view of the body.
        message_id: running number of the sender, or None without an extended header.
        metadata: pairs of texts.
    """

    header: IgtlHeader
    content: memoryview
    message_id: int | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class WireImage:
    """The content of an IMAGE message.

    Attributes:
        pixels: HW or HWC of any scalar type of the protocol, in this machine's byte order; a view where it can be.
        spacing_mm: (row, column), mm: lengths of the matrix's columns, 1e-4 .. 100.
        matrix: float32 (3, 4): directions of i, j, k times spacing, and the position of the image's centre, mm.
        ras: True if the position is in right-anterior-superior coordinates, else left-posterior-superior.
    """

    pixels: np.ndarray
    spacing_mm: tuple[float, float]
    matrix: np.ndarray
    ras: bool


def unpack_header(data: bytes | bytearray | memoryview, *, max_body_bytes: int = MAX_BODY_BYTES) -> IgtlHeader:
    """Reads the first bytes of a message.

    Args:
        data: HEADER_BYTES bytes.
        max_body_bytes: cap on what follows.

    Returns:
        The header; the CRC is not checked yet.

    Raises:
        WireError: a field is out of its range. The stream is out of step: start a new connection.
    """
    if len(data) != HEADER_BYTES:
        raise WireError("header", f"the header has {len(data)} bytes, not {HEADER_BYTES}")
    version, kind, device, seconds, fraction, body_bytes, crc = _HEADER.unpack(data)
    if version not in (1, 2, 3):
        raise WireError("header", f"header version {version} is not known")
    if not _TYPE.fullmatch(kind) or not _NAME.fullmatch(device):
        raise WireError("header", "type or device name is no plain text")
    if seconds > MAX_TIME_S:
        raise WireError("time", "the timestamp lies beyond the year 2100")
    if body_bytes > max_body_bytes:
        raise WireError("size", f"a body of {body_bytes} bytes is over the limit of {max_body_bytes}")
    return IgtlHeader(
        version=version,
        kind=kind.rstrip(b"\0").decode("ascii"),
        device=device.rstrip(b"\0").decode("ascii"),
        t_unix_ns=seconds * 1_000_000_000 + (fraction * 1_000_000_000 + (1 << 31) >> 32),
        body_bytes=body_bytes,
        crc=crc,
    )


def check_image_start(header: IgtlHeader, start: bytes | bytearray | memoryview) -> IgtlHeader:
    """Compares a header's length with the size in the image behind it.

    This is done before the image has arrived.

    Args:
        header: of an IMAGE message.
        start: the first bytes of its body, EXTENDED_BYTES + IMAGE_HEADER_BYTES or all there are.

    Returns:
        The header.

    Raises:
        WireError: header and image contradict each other; one of them is damaged.
    """
    around = 0
    if header.version > 1 and len(start) >= EXTENDED_BYTES:
        extended, index_bytes, text_bytes, _ = _EXTENDED.unpack_from(start)
        around = extended + index_bytes + text_bytes
        start = start[extended:]
        if extended != EXTENDED_BYTES:
            return header  # a longer one of a later protocol: the image lies further on
    if len(start) < IMAGE_HEADER_BYTES:
        raise WireError("size", "the body is too short for an image")
    _, channels, scalar, _, _, columns, rows, slices, *_ = _IMAGE.unpack_from(start)
    item_bytes = np.dtype(_SCALARS.get(scalar, "u1")).itemsize
    promised = around + IMAGE_HEADER_BYTES + columns * rows * slices * channels * item_bytes
    # a part of an image is shorter than its whole, and is refused later, in step
    if header.body_bytes > promised or header.body_bytes < around + IMAGE_HEADER_BYTES:
        raise WireError("size", f"the header says {header.body_bytes} bytes and the image {promised}")
    return header


def unpack_body(header: IgtlHeader, body: bytes | bytearray | memoryview, *, check_crc: bool = True) -> IgtlMessage:
    """Checks a body against its header and takes extended header and metadata off.

    Args:
        header: what ``unpack_header`` gave.
        body: exactly ``header.body_bytes`` bytes; the message keeps views of it.
        check_crc: False only to show what would pass without it.

    Returns:
        The message.

    Raises:
        WireError: wrong length or CRC, or the parts do not fit into one another.
    """
    if len(body) != header.body_bytes:
        raise WireError("size", f"the body has {len(body)} bytes and its header says {header.body_bytes}")
    if check_crc and crc64(body) != header.crc:
        if header.crc == 0:
            raise WireError("no_crc", "the sender writes no CRC (0)")
        raise WireError("crc", "the CRC does not match the body")
    view = memoryview(body)
    if header.version == 1:
        return IgtlMessage(header=header, content=view)
    if len(view) < EXTENDED_BYTES:
        raise WireError("header", "no room for the extended header")
    extended, index_bytes, text_bytes, message_id = _EXTENDED.unpack_from(view)
    end = len(view) - index_bytes - text_bytes
    if extended < EXTENDED_BYTES or end < extended:
        raise WireError("header", "extended header and metadata do not fit into the body")
    metadata = _unpack_metadata(view[end : end + index_bytes], view[end + index_bytes :])
    return IgtlMessage(header=header, content=view[extended:end], message_id=message_id, metadata=metadata)


def pack(kind: str, content: bytes, envelope: IgtlEnvelope) -> bytes:
    """A whole message around any content.

    Args:
        kind: type, 12 capital letters, digits or underscores at most.
        content: the content as its type defines it.
        envelope: device, time, version and what travels with it.

    Returns:
        The bytes to send.

    Raises:
        WireError: a field does not fit its place.
    """
    name = kind.encode("ascii", "replace"), envelope.device.encode("ascii", "replace")
    if len(name[0]) > 12 or not _TYPE.fullmatch(name[0]) or len(name[1]) > 20 or not _NAME.fullmatch(name[1]):
        raise WireError("header", "a type has 12 and a device name 20 plain characters at most")
    if envelope.header_version not in (1, 2):
        raise WireError("header", f"header version {envelope.header_version} is not written: choose 1 or 2")
    seconds, rest_ns = divmod(envelope.t_unix_ns, 1_000_000_000)
    if not 0 <= seconds <= MAX_TIME_S:
        raise WireError("time", "a timestamp must lie between 1970 and 2100")
    body = content
    if envelope.header_version == 2:
        index, texts = _pack_metadata(envelope.metadata)
        number = envelope.message_id & 0xFFFFFFFF
        body = _EXTENDED.pack(EXTENDED_BYTES, len(index), len(texts), number) + content + index + texts
    fraction = (rest_ns << 32) // 1_000_000_000
    header = _HEADER.pack(envelope.header_version, *name, seconds, fraction, len(body), crc64(body))
    return header + body


def unpack_image(message: IgtlMessage) -> WireImage:
    """The image in an IMAGE message.

    Args:
        message: what ``unpack_body`` gave.

    Returns:
        Pixels and geometry; one slice, whole.

    Raises:
        WireError: a volume, a part of an image, a field out of range, or another length than the fields promise.
    """
    content = message.content
    if message.header.kind != "IMAGE" or len(content) < IMAGE_HEADER_BYTES:
        raise WireError("content", "no IMAGE content")
    version, channels, scalar, endian, coordinates, *rest = _IMAGE.unpack_from(content)
    size, matrix, offset, part = rest[0:3], rest[3:15], rest[15:18], rest[18:21]
    if version != 1 or scalar not in _SCALARS or endian not in _ENDIAN or coordinates not in (1, 2):
        raise WireError("content", "version, scalar type, byte order or coordinate system is not known")
    if offset != [0, 0, 0] or part != size:
        raise WireError("content", "it carries a part of an image; send whole ones")
    # pyigtl writes an HW array as i = 1, j = columns, k = rows; the bytes lie the same way
    across, down, deep = (0, 1, 2) if size[2] == 1 else (1, 2, 0)
    if size[deep] != 1 or not all(1 <= side <= MAX_SIDE for side in size) or not 1 <= channels <= 4:
        raise WireError("content", "it must carry one slice of 1 to 4 channels with sides of 1 to 16384")
    columns, rows = size[across], size[down]
    kind = np.dtype(_ENDIAN[endian] + _SCALARS[scalar])
    if len(content) - IMAGE_HEADER_BYTES != rows * columns * channels * kind.itemsize:
        raise WireError("size", "the pixels are more or fewer than the image's size says")
    flat = np.frombuffer(content, kind, offset=IMAGE_HEADER_BYTES)
    shape = (rows, columns) if channels == 1 else (rows, columns, channels)
    columns_34 = np.array(matrix, np.float32).reshape(4, 3).T
    return WireImage(
        pixels=flat.reshape(shape).astype(kind.newbyteorder("="), copy=False),
        spacing_mm=_spacing(columns_34, across, down),
        matrix=columns_34,
        ras=coordinates == 1,
    )


def pack_image(
    pixels: np.ndarray, envelope: IgtlEnvelope, *, spacing_mm: tuple[float, float] | None = None, ras: bool = False
) -> bytes:
    """An IMAGE message of one slice whose first pixel lies in the origin.

    Args:
        pixels: HW or HWC with 1 to 4 channels; a scalar type of the protocol.
        envelope: device, time, version and what travels with it.
        spacing_mm: (row, column), mm; None writes 1, which this project reads as "not known".
        ras: write right-anterior-superior coordinates.

    Returns:
        The bytes to send.

    Raises:
        WireError: shape or scalar type is none of the protocol's, or the spacing is out of range.
    """
    channels = 1 if pixels.ndim == 2 else pixels.shape[2] if pixels.ndim == 3 else 0
    scalar = next((code for code, name in _SCALARS.items() if np.dtype(name) == pixels.dtype.newbyteorder("=")), None)
    if scalar is None or not 1 <= channels <= 4 or not all(1 <= side <= MAX_SIDE for side in pixels.shape[:2]):
        raise WireError("content", f"an array of {pixels.dtype} {pixels.shape} is no image")
    rows, columns = pixels.shape[:2]
    down_mm, across_mm = spacing_mm or (1.0, 1.0)
    if not all(np.isfinite(side) and 1e-4 < side < 100 for side in (down_mm, across_mm)):
        raise WireError("geometry", "a spacing must lie between 0.0001 and 100 mm")
    centre = ((columns - 1) / 2 * across_mm, (rows - 1) / 2 * down_mm, 0.0)
    head = _IMAGE.pack(
        1, channels, scalar, 2, 1 if ras else 2, columns, rows, 1,
        across_mm, 0, 0, 0, down_mm, 0, 0, 0, 1, *centre, 0, 0, 0, columns, rows, 1,
    )  # fmt: skip
    little = np.ascontiguousarray(pixels).astype(pixels.dtype.newbyteorder("<"), copy=False)
    return pack("IMAGE", head + little.tobytes(), envelope)


def unpack_status(message: IgtlMessage) -> tuple[int, str]:
    """Code (1 is well) and text of a STATUS message.

    Raises:
        WireError: no STATUS content.
    """
    if message.header.kind != "STATUS" or len(message.content) < _STATUS.size:
        raise WireError("content", "no STATUS content")
    code = int(_STATUS.unpack_from(message.content)[0])
    return code, bytes(message.content[_STATUS.size :]).rstrip(b"\0").decode("utf-8", "replace")


def pack_status(envelope: IgtlEnvelope, *, code: int = STATUS_OK, text: str = "") -> bytes:
    """A STATUS message.

    Args:
        envelope: device, time, version and what travels with it.
        code: 1 is well; others are listed in the protocol, 0 .. 65535.
        text: for people.

    Returns:
        The bytes to send.

    Raises:
        WireError: a field does not fit its place.
    """
    if not 0 <= code <= 0xFFFF:
        raise WireError("content", "a status code must lie between 0 and 65535")
    return pack("STATUS", _STATUS.pack(code, 0, b"") + text.encode() + b"\0", envelope)


def unpack_string(message: IgtlMessage) -> str:
    """Text of a STRING message.

    Raises:
        WireError: no STRING content, another length than promised, or bytes that are no text.
    """
    if message.header.kind != "STRING" or len(message.content) < _STRING.size:
        raise WireError("content", "no STRING content")
    charset, length = _STRING.unpack_from(message.content)
    if len(message.content) != _STRING.size + length:
        raise WireError("size", "the text is longer or shorter than it says")
    return _text(message.content[_STRING.size :], charset)


def pack_string(text: str, envelope: IgtlEnvelope) -> bytes:
    """A STRING message, ASCII where that suffices and UTF-8 otherwise.

    Args:
        text: 65535 bytes at most.
        envelope: device, time, version and what travels with it.

    Returns:
        The bytes to send.

    Raises:
        WireError: the text is too long, or a field does not fit its place.
    """
    data = text.encode()
    if len(data) > 0xFFFF:
        raise WireError("size", f"a text of {len(data)} bytes is over the limit of 65535")
    return pack("STRING", _STRING.pack(ASCII if text.isascii() else UTF8, len(data)) + data, envelope)


def _spacing(matrix_34: np.ndarray, across: int, down: int) -> tuple[float, float]:
    if not np.isfinite(matrix_34).all():
        raise WireError("geometry", "the matrix is not finite")
    lengths_mm = np.linalg.norm(matrix_34[:, :3].astype(np.float64), axis=0)
    if not (1e-4 < lengths_mm[down] < 100 and 1e-4 < lengths_mm[across] < 100):
        raise WireError("geometry", "the distance of its pixels does not lie between 0.0001 and 100 mm")
    # the wire has 7 digits; the rest is noise of float32
    return float(f"{lengths_mm[down]:.7g}"), float(f"{lengths_mm[across]:.7g}")


def _pack_metadata(metadata: Mapping[str, str]) -> tuple[bytes, bytes]:
    if len(metadata) > MAX_METADATA:
        raise WireError("size", f"{len(metadata)} entries of metadata are over the limit of {MAX_METADATA}")
    index, texts = [struct.pack(">H", len(metadata))], []
    for key, value in metadata.items():
        key_bytes, value_bytes = key.encode(), value.encode()
        if len(key_bytes) > 0xFFFF:
            raise WireError("size", "a name in the metadata is too long")
        index.append(_ENTRY.pack(len(key_bytes), ASCII if value.isascii() else UTF8, len(value_bytes)))
        texts += [key_bytes, value_bytes]
    return b"".join(index), b"".join(texts)


def _unpack_metadata(index: memoryview, texts: memoryview) -> dict[str, str]:
    if not len(index):
        if len(texts):
            raise WireError("content", "metadata without an index")
        return {}
    count = int.from_bytes(index[:2], "big")
    if count > MAX_METADATA or len(index) != 2 + count * _ENTRY.size:
        raise WireError("content", "the index of the metadata has another length than it says")
    found: dict[str, str] = {}
    at = 0
    for key_bytes, charset, value_bytes in _ENTRY.iter_unpack(index[2:]):
        middle, end = at + key_bytes, at + key_bytes + value_bytes
        if end > len(texts):
            raise WireError("content", "the metadata are shorter than their index says")
        found[_text(texts[at:middle], UTF8)] = _text(texts[middle:end], charset)
        at = end
    if at != len(texts):
        raise WireError("content", "the metadata are longer than their index says")
    return found


def _text(data: memoryview, charset: int) -> str:
    try:
        return bytes(data).decode(_CHARSETS[charset])
    except (KeyError, UnicodeDecodeError) as error:
        raise WireError("content", "a text is not in the character set that it names") from error


__all__ = [
    "ASCII",
    "EXTENDED_BYTES",
    "HEADER_BYTES",
    "IMAGE_HEADER_BYTES",
    "LATIN1",
    "MAX_BODY_BYTES",
    "MAX_METADATA",
    "MAX_SIDE",
    "MAX_TIME_S",
    "PORT",
    "STATUS_OK",
    "UTF8",
    "IgtlEnvelope",
    "IgtlHeader",
    "IgtlMessage",
    "WireError",
    "WireImage",
    "check_image_start",
    "pack",
    "pack_image",
    "pack_status",
    "pack_string",
    "unpack_body",
    "unpack_header",
    "unpack_image",
    "unpack_status",
    "unpack_string",
]
