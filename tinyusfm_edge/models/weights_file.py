"""Bytes of an untrusted weights file -> named tensors.

Every size is checked before anything is allocated.

Two formats are read, distinguished by content and never by suffix: safetensors, and torch's zip files (torch >= 1.6),
the latter by ``torch.load(weights_only=True)`` and nothing else. Before torch sees a zip file, its pickle is walked by
a reader that builds nothing: it refuses every global outside ``ALLOWED_GLOBALS``, storages larger than their record
and tensors larger than their storage. Refused as well: compressed or overlapping zip members, TorchScript archives,
bare pickles, older torch files, files over 2 GiB, truncated files and tensors that are not finite.

``argparse.Namespace`` is on the list because many public training checkpoints (MAE, DINO and their heirs) keep their
command line in one; it is data, has no code of its own, and is thrown away.

It does not know which model the tensors belong to.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import math
import os
import pickle
import stat
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tinyusfm_runtime.errors import CheckpointError
from tinyusfm_runtime.strict_json import parse_json

MAX_FILE_BYTES = 2 << 30
"""Largest weights file that is read: the largest teacher here (USFM, ViT-B) is 343 MB."""
MAX_HEADER_BYTES = 8 << 20
"""Largest safetensors header: a ViT of 48 blocks needs about 100 KB."""
MAX_PICKLE_BYTES = 2 << 20
"""Largest pickle of a zip file; walking one of this size takes about a second and 200 MB."""
MAX_AXES = 8
"""Axes of one tensor."""
MAX_TENSORS = 20_000
"""Largest number of tensors in a file."""

_SAFETENSORS_ITEM_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip
_STORAGE_ITEM_BYTES = {
    "DoubleStorage": 8, "FloatStorage": 4, "HalfStorage": 2, "BFloat16Storage": 2, "LongStorage": 8,
    "IntStorage": 4, "ShortStorage": 2, "CharStorage": 1, "ByteStorage": 1, "BoolStorage": 1,
}  # fmt: skip
_DTYPES = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")

ALLOWED_GLOBALS = frozenset(
    {"collections.OrderedDict", "argparse.Namespace", "torch.Size"}
    | {"torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter"}
    | {f"torch.{name}" for name in (*_STORAGE_ITEM_BYTES, *_DTYPES)}
)
"""The only names a checkpoint's pickle may ask for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightsFile:
    """What a weights file held.

    Attributes:
        path: where it was read.
        sha256: hash of the very bytes that were parsed, hex.
        format: ``safetensors`` or ``torch-zip``.
        content: tensors by name (safetensors), or whatever mapping the checkpoint holds.
        metadata: strings of the safetensors header; empty for torch files.
    """

    path: Path
    sha256: str
    format: str
    content: Mapping[str, Any]
    metadata: Mapping[str, str] = field(default_factory=dict)


def read_weights_file(path: Path) -> WeightsFile:
    """Reads a weights file once, hashes those bytes, checks and parses them.

    Args:
        path: a regular file.

    Returns:
        Its content, on the CPU, in the file's own element types.

    Raises:
        CheckpointError: missing, not a regular file, too large, truncated, of an unknown format, hostile or not finite.
    """
    data = read_limited(path)
    sha256 = hashlib.sha256(data).hexdigest()
    content: Mapping[str, Any]
    metadata: Mapping[str, str]
    if data[:4] == b"PK\x03\x04":
        kind, content, metadata = "torch-zip", _load_torch_zip(path, data), {}
    elif len(data) > 9 and data[8:9] == b"{":
        content, metadata = _load_safetensors(path, data)
        kind = "safetensors"
    elif data[:1] == b"\x80":
        raise CheckpointError(
            f"{path} is a bare pickle or a torch file older than 1.6 and is not read, since unpickling runs code: "
            "load it where you trust it and save the state dict as safetensors"
        )
    else:
        raise CheckpointError(f"{path} is neither safetensors nor a torch checkpoint, or its start is damaged")
    return WeightsFile(path=path, sha256=sha256, format=kind, content=content, metadata=metadata)


def read_limited(path: Path, limit: int = MAX_FILE_BYTES) -> bytes:
    """Reads a regular file whole.

    Args:
        path: the file.
        limit: largest size in bytes.

    Raises:
        CheckpointError: missing, unreadable, not a regular file or larger than the limit.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        with os.fdopen(descriptor, "rb") as stream:
            info = os.fstat(descriptor)
            if not stat.S_ISREG(info.st_mode):
                raise CheckpointError(f"{path} is not a regular file: give a .safetensors or .pth file")
            if info.st_size > limit:
                raise CheckpointError(f"{path} has {info.st_size} bytes, more than the {limit} that are read")
            data = stream.read(info.st_size + 1)  # not the limit: that much memory would be asked for at once
    except OSError as error:
        raise CheckpointError(f"cannot read weights {path}: {error.strerror or error}") from error
    if len(data) > info.st_size:
        raise CheckpointError(f"{path} grew while it was read: wait until it is written")
    return data


def check_finite(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Refuses NaN and infinity.

    Raises:
        CheckpointError: naming the first tensor that has one.
    """
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"{path}: tensor {name!r} holds NaN or infinity")


# ---------------------------------------------------------------------------------------------- safetensors


def _load_safetensors(path: Path, data: bytes) -> tuple[dict[str, Tensor], dict[str, str]]:
    header = _read_header(path, data)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CheckpointError(f"{path}: the safetensors metadata must be strings by name")
    room = len(data) - 8 - int.from_bytes(data[:8], "little")
    _check_entries(path, header, room)
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        tensors = load(data)
    except (SafetensorError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path} is not a sound safetensors file: {error}") from error
    check_finite(tensors, path)
    return tensors, metadata


def _read_header(path: Path, data: bytes) -> dict[str, Any]:
    length = int.from_bytes(data[:8], "little")
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(f"{path}: the safetensors header claims {length} bytes, {MAX_HEADER_BYTES} are allowed")
    if 8 + length > len(data):
        raise CheckpointError(f"{path} is truncated: the header claims {length} bytes, the file has {len(data)}")
    try:
        header = parse_json(data[8 : 8 + length].decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: the safetensors header is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: the safetensors header is not a table")
    return header


def _check_entries(path: Path, header: Mapping[str, Any], room: int) -> None:
    """Sizes against shapes and against the file, before the library allocates.

    Computed in Python integers.
    """
    if len(header) > MAX_TENSORS:
        raise CheckpointError(f"{path} names {len(header)} tensors, {MAX_TENSORS} are allowed")
    total = 0
    for name, entry in header.items():
        try:
            begin, end = entry["data_offsets"]
            shape, item = entry["shape"], _SAFETENSORS_ITEM_BYTES[entry["dtype"]]
            # kinds and counts first: a product of texts, or of a million numbers, is a bomb of its own
            sane = isinstance(shape, list) and len(shape) <= MAX_AXES
            sane = sane and all(type(n) is int and 0 <= n <= MAX_FILE_BYTES for n in (*shape, begin, end))
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path}: tensor {name!r} has an unusable or unknown header entry") from error
        want = math.prod(shape) * item if sane else -1
        if not sane or end - begin != want or end > room:
            stated = shape if sane else "that no tensor has"
            raise CheckpointError(f"{path} is truncated or forged: tensor {name!r} of shape {stated} does not fit it")
        total += want
    if total != room:
        raise CheckpointError(f"{path} is truncated or forged: tensors take {total} bytes, the file holds {room}")


# ------------------------------------------------------------------------------------------------ torch zip


def _load_torch_zip(path: Path, data: bytes) -> Mapping[str, Any]:
    _check_zip(path, data)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # a forged file can make torch raise anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path} cannot be read as weights: {reason}") from error
    if not isinstance(content, Mapping) or not content:
        kind = "nothing" if isinstance(content, Mapping) else type(content).__name__
        raise CheckpointError(f"{path} holds {kind}, not named tensors: save model.state_dict()")
    return content


def _check_zip(path: Path, data: bytes) -> None:
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = archive.infolist()
            _check_members(path, members, len(data))
            folder, records = _records(path, members)
            scan = archive.read(f"{folder}/data.pkl")
    except CheckpointError:
        raise
    except Exception as error:  # a forged directory can make zipfile raise anything
        raise CheckpointError(f"{path} is truncated or is not a sound zip file: {error}") from error
    _PickleScan(path, scan, records).run()


def _check_members(path: Path, members: list[zipfile.ZipInfo], file_bytes: int) -> None:
    if len(members) > MAX_TENSORS:
        raise CheckpointError(f"{path} has {len(members)} zip members, {MAX_TENSORS} are allowed")
    names = [m.filename for m in members]
    if len(set(names)) != len(names):
        raise CheckpointError(f"{path}: two zip members have the same name")
    for member in members:
        if member.compress_type != zipfile.ZIP_STORED or member.file_size != member.compress_size:
            raise CheckpointError(f"{path}: zip member {member.filename!r} is compressed; torch never writes that")
        if member.filename.endswith(".pkl") and member.file_size > MAX_PICKLE_BYTES:
            raise CheckpointError(f"{path}: {member.filename!r} has {member.file_size} bytes, too many for names")
    total = sum(m.file_size for m in members)
    if total > file_bytes:
        raise CheckpointError(f"{path}: zip members claim {total} bytes, the file has {file_bytes}")


def _records(path: Path, members: list[zipfile.ZipInfo]) -> tuple[str, dict[str, int]]:
    """Returns the archive's folder and the size of each storage record by its key."""
    folders = [m.filename[: -len("/data.pkl")] for m in members if m.filename.endswith("/data.pkl")]
    if len(folders) != 1:
        raise CheckpointError(f"{path} is a zip file without one data.pkl: not a torch checkpoint")
    if any(m.filename.startswith((f"{folders[0]}/code/", f"{folders[0]}/constants.pkl")) for m in members):
        raise CheckpointError(f"{path} is a TorchScript archive, which holds code: save model.state_dict() instead")
    outside = (m.filename for m in members if not m.filename.startswith(f"{folders[0]}/") or ".." in m.filename)
    if (stray := next(outside, None)) is not None:
        raise CheckpointError(f"{path}: zip member {stray!r} lies outside the archive's folder; torch never does that")
    start = f"{folders[0]}/data/"
    return folders[0], {m.filename[len(start) :]: m.file_size for m in members if m.filename.startswith(start)}


_NEVER = (
    pickle.BYTEARRAY8, pickle.NEXT_BUFFER, pickle.READONLY_BUFFER, pickle.BINUNICODE8, pickle.BINBYTES8,
    pickle.EMPTY_SET, pickle.ADDITEMS, pickle.FROZENSET, pickle.DICT, pickle.DUP,
)  # fmt: skip
"""Instructions that torch never writes and that can ask for any amount of memory or time."""


@dataclass(frozen=True, slots=True)
class _Storage:
    """A storage the pickle asks for: elements and bytes of each."""

    numel: int


class _Inert:
    """Stands for an object of an allowed class; keeps nothing."""

    def __init__(self, *args: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


class _EmptyOrderedDict(OrderedDict[Any, Any]):
    """An OrderedDict that starts empty, as protocol 2 writes them.

    A pickle cannot make copies of big ones.
    """

    def __init__(self, *args: object) -> None:
        if any(args):
            raise pickle.UnpicklingError("an OrderedDict that does not start empty")
        super().__init__()

    def __setstate__(self, state: object) -> None:
        pass


class _PickleScan(pickle._Unpickler):
    """Walks a checkpoint's pickle without importing or building anything of it.

    The pure Python unpickler, since the C one allocates its memo table by an index from the file.
    """

    def __init__(self, path: Path, data: bytes, records: Mapping[str, int]) -> None:
        super().__init__(io.BytesIO(data))
        self._path, self._records = path, records

    def refuse(self) -> None:
        """An instruction that torch never writes; called by the unpickler."""
        raise pickle.UnpicklingError("an instruction that torch never writes")

    def set_items(self) -> None:
        """Entries of a table: names are texts or numbers.

        The hash of a nested tuple can take forever.
        """
        items = self.pop_mark()  # type: ignore[attr-defined]
        self._put(items[::2], items[1::2])

    def set_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()  # type: ignore[attr-defined]
        self._put([key], [value])

    def _put(self, keys: list[Any], values: list[Any]) -> None:
        if not all(isinstance(key, str | int | float) or key is None for key in keys):
            raise pickle.UnpicklingError("a table with names that are neither texts nor numbers")
        table = self.stack[-1]  # type: ignore[attr-defined]
        if not isinstance(table, dict):
            raise pickle.UnpicklingError("entries of something that is no table")
        table.update(zip(keys, values, strict=True))

    def run(self) -> None:
        """Walks it.

        Raises:
            CheckpointError: a global outside the list, a size that does not fit, or a damaged pickle.
        """
        try:
            self.load()
        except CheckpointError:
            raise
        except Exception as error:  # a hostile pickle can make its reader raise anything
            raise CheckpointError(f"{self._path}: data.pkl is damaged ({type(error).__name__}: {error})") from error

    def find_class(self, module: str, name: str) -> Any:
        """Returns a stand-in for an allowed global; called by the unpickler."""
        wanted = f"{module}.{name}"
        if wanted not in ALLOWED_GLOBALS:
            raise CheckpointError(
                f"{self._path} asks for {wanted}, which weights never need; nothing was run. "
                "Only if you trust its author, load it elsewhere and save the state dict as safetensors"
            )
        stand_ins: dict[str, Callable[..., Any]] = {
            "torch._utils._rebuild_tensor_v2": self._tensor,
            "torch._utils._rebuild_parameter": lambda data, *rest: data,
            "collections.OrderedDict": _EmptyOrderedDict,
            "argparse.Namespace": _Inert,
            "torch.Size": _Inert,
        }
        return stand_ins.get(wanted, wanted)

    def persistent_load(self, pid: Any) -> _Storage:
        """Checks a storage's claim against its record; called by the unpickler."""
        if (
            not isinstance(pid, tuple)
            or len(pid) != 5
            or not isinstance(pid[1], str)
            or not isinstance(pid[2], str | int)
        ):
            raise CheckpointError(f"{self._path}: a storage is named in an unknown way")
        kind, storage, key, _, numel = pid
        item = _STORAGE_ITEM_BYTES.get(str(storage).removeprefix("torch."))
        if kind != "storage" or item is None or type(numel) is not int or numel < 0:
            raise CheckpointError(f"{self._path}: storage {key!r} is of an unknown kind")
        held = self._records.get(str(key), -1)
        if numel * item != held:
            raise CheckpointError(
                f"{self._path}: storage {key!r} claims {numel * item} bytes, its record has {max(held, 0)}"
            )
        return _Storage(numel)

    def _tensor(self, storage: Any, offset: Any, size: Any, stride: Any, *rest: object) -> None:
        sizes, strides = tuple(size), tuple(stride)
        numbers = (offset, *sizes, *strides)
        if not isinstance(storage, _Storage) or len(sizes) != len(strides) or len(sizes) > 8:
            raise CheckpointError(f"{self._path}: a tensor is described in an unknown way")
        if any(type(n) is not int or n < 0 for n in numbers):
            raise CheckpointError(f"{self._path}: a tensor has sizes or strides that are no whole numbers")
        if math.prod(sizes) == 0:
            return
        last = offset + sum((n - 1) * step for n, step in zip(sizes, strides, strict=True))
        if math.prod(sizes) > storage.numel or last >= storage.numel:
            raise CheckpointError(
                f"{self._path}: a tensor of shape {sizes} with strides {strides} does not fit "
                f"its storage of {storage.numel} elements"
            )


_INSTRUCTIONS: dict[int, Any] = {
    **dict.fromkeys((code[0] for code in _NEVER), _PickleScan.refuse),
    pickle.SETITEM[0]: _PickleScan.set_item,
    pickle.SETITEMS[0]: _PickleScan.set_items,
    pickle.LONG4[0]: _PickleScan.refuse,
}
_PickleScan.dispatch = {**pickle._Unpickler.dispatch, **_INSTRUCTIONS}

__all__ = [
    "ALLOWED_GLOBALS",
    "MAX_AXES",
    "MAX_FILE_BYTES",
    "MAX_HEADER_BYTES",
    "MAX_PICKLE_BYTES",
    "MAX_TENSORS",
    "WeightsFile",
    "check_finite",
    "read_limited",
    "read_weights_file",
]
