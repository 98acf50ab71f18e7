"""Named arrays in memory as ``.safetensors`` bytes, validated on load.

The format (github.com/huggingface/safetensors, "Format"): 8 bytes length of the header, little-endian; the header,
JSON: name -> ``dtype``, ``shape``, ``data_offsets``, and ``__metadata__`` of strings; then the arrays, C order,
little-endian, without gaps. Nothing is compressed and nothing is executed, so a reader of any language needs a JSON
parser and no more. Here types come from a list, sizes are compared with the bytes that are there before anything is
made of them, and arrays are views of those bytes. How much a reader takes is its ``ArrayLimits``. It does not know
bundles.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from tinyusfm_runtime.errors import BundleError
from tinyusfm_runtime.strict_json import parse_json

_METADATA = "__metadata__"
_TYPES = {
    "BOOL": "|b1", "U8": "|u1", "I8": "|i1", "U16": "<u2", "I16": "<i2", "F16": "<f2", "U32": "<u4", "I32": "<i4",
    "F32": "<f4", "U64": "<u8", "I64": "<i8", "F64": "<f8",
}  # fmt: skip
_NAMES = {np.dtype(code).str: name for name, code in _TYPES.items()}


@dataclass(frozen=True, kw_only=True, slots=True)
class ArrayLimits:
    """How much a reader takes before it looks at any array.

    Attributes:
        header_bytes: of the header.
        total_bytes: all arrays of one file together.
        members: arrays in one file.
        axes: axes of one array.
        types: element types, by their names in the format.
    """

    header_bytes: int = 1 << 20
    total_bytes: int = 1 << 30
    members: int = 256
    axes: int = 8
    types: frozenset[str] = frozenset(_TYPES)


BUNDLE_LIMITS = ArrayLimits()
"""Of a bundle's own files, whose headers take about 2 kB."""


def pack_arrays(arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None) -> bytes:
    """Writes arrays; equal arrays give equal bytes.

    Args:
        arrays: name -> array of numbers or truth values.
        metadata: name -> text.

    Returns:
        Content that ``unpack_arrays`` and any other reader of the format takes.
    """
    solid = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    # the widest first, as the library does: every array then lies on a multiple of its element's size
    names = sorted(solid, key=lambda name: (-solid[name].itemsize, name))
    header: dict[str, Any] = {_METADATA: dict(sorted(metadata.items()))} if metadata else {}
    end = 0
    for name in names:
        begin, end = end, end + solid[name].nbytes
        kind = _NAMES[solid[name].dtype.newbyteorder("<").str]
        header[name] = {"dtype": kind, "shape": list(solid[name].shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), allow_nan=False).encode("ascii")
    text += b" " * (-len(text) % 8)
    content = (solid[name].astype(solid[name].dtype.newbyteorder("<"), copy=False).tobytes() for name in names)
    return b"".join([len(text).to_bytes(8, "little"), text, *content])


def unpack_arrays(raw: bytes, what: str, *, limits: ArrayLimits = BUNDLE_LIMITS) -> dict[str, np.ndarray]:
    """Reads arrays.

    Args:
        raw: content of the file.
        what: its name, for messages.
        limits: how much is taken.

    Returns:
        Name -> array, read-only views of ``raw``.

    Raises:
        BundleError: not such a file, larger than the cap, or holding anything but plain arrays.
    """
    header, start = _parsed(raw, what, limits)
    header.pop(_METADATA, None)
    size = len(raw) - start
    if len(header) > limits.members or size > limits.total_bytes:
        raise BundleError(f"{what} holds more than {limits.members} arrays or {limits.total_bytes} bytes")
    found: dict[str, np.ndarray] = {}
    end = 0
    for name, entry in sorted(header.items(), key=lambda item: _begin(item[1], what)):
        dtype, shape, begin = _entry(entry, what, limits)
        count = 1
        for side in shape:
            count *= side
            if count > size:
                raise BundleError(f"{what}: array {name!r} promises more than the file holds")
        if begin != end or begin + count * dtype.itemsize > size:
            raise BundleError(f"{what}: array {name!r} does not lie where its header says")
        end = begin + count * dtype.itemsize
        if entry["data_offsets"] != [begin, end]:
            raise BundleError(f"{what}: array {name!r} is not as long as its header says")
        found[name] = np.frombuffer(raw, dtype, count, start + begin).reshape(shape)
    if end != size:
        raise BundleError(f"{what} holds {size - end} bytes that belong to no array")
    return found


def unpack_metadata(raw: bytes, what: str) -> dict[str, str]:
    """The texts of a file, name -> text; empty where it holds none.

    Raises:
        BundleError: not such a file.
    """
    metadata = _parsed(raw, what, BUNDLE_LIMITS)[0].get(_METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise BundleError(f"{what} has metadata that are not texts")
    return dict(metadata)


def _parsed(raw: bytes, what: str, limits: ArrayLimits) -> tuple[dict[str, Any], int]:
    length = int.from_bytes(raw[:8], "little")
    if len(raw) < 8 or not 2 <= length <= min(limits.header_bytes, len(raw) - 8):
        raise BundleError(f"{what} is not a readable .safetensors file: its header is missing or too long")
    try:
        header = parse_json(raw[8 : 8 + length])
    except ValueError as error:
        raise BundleError(f"{what} is not a readable .safetensors file: its header is not JSON") from error
    if not isinstance(header, dict):
        raise BundleError(f"{what} is not a readable .safetensors file: its header is no object")
    return header, 8 + length


def _begin(entry: Any, what: str) -> tuple[int, int]:
    offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
    if not isinstance(offsets, list) or len(offsets) != 2 or any(type(place) is not int for place in offsets):
        raise BundleError(f"{what}: an array has no data_offsets")
    return offsets[0], offsets[1]


def _entry(entry: dict[str, Any], what: str, limits: ArrayLimits) -> tuple[np.dtype[Any], tuple[int, ...], int]:
    shape, kind = entry.get("shape"), entry.get("dtype")
    if set(entry) != {"dtype", "shape", "data_offsets"} or not isinstance(kind, str) or kind not in limits.types:
        raise BundleError(f"{what}: arrays of {str(kind)[:20]!r} are not read")
    if not isinstance(shape, list) or len(shape) > limits.axes or any(type(s) is not int or s < 0 for s in shape):
        raise BundleError(f"{what}: an array has no usable shape")
    return np.dtype(_TYPES[kind]), tuple(shape), entry["data_offsets"][0]


__all__ = ["BUNDLE_LIMITS", "ArrayLimits", "pack_arrays", "unpack_arrays", "unpack_metadata"]
