"""Named arrays in memory as ``.npz`` bytes, read with suspicion.

``numpy.load`` trusts a header's shape and allocates it before it reads: a few bytes can ask for
any amount of memory. Here a member is unpacked up to a cap, its header is compared with what was
unpacked, and objects are never unpickled. It does not know bundles.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping

import numpy as np

from tinyusfm_runtime.errors import BundleError

MAX_UNPACKED_BYTES = 1 << 30
"""All members together, unpacked."""
MAX_MEMBERS = 256
"""Arrays in one file."""
_FIRST_DAY = (1980, 1, 1, 0, 0, 0)  # the earliest time a zip can hold; the same arrays give the same bytes


def pack_arrays(arrays: Mapping[str, np.ndarray]) -> bytes:
    """Writes arrays as a compressed ``.npz``; equal arrays give equal bytes.

    Args:
        arrays: name -> array of numbers.

    Returns:
        Content that ``unpack_arrays`` and ``numpy.load(..., allow_pickle=False)`` read.
    """
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in sorted(arrays):
            member = io.BytesIO()
            np.lib.format.write_array(member, np.asarray(arrays[name], order="C"), allow_pickle=False)
            info = zipfile.ZipInfo(f"{name}.npy", _FIRST_DAY)
            info.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(info, member.getvalue())
    return out.getvalue()


def unpack_arrays(raw: bytes, what: str, *, max_bytes: int = MAX_UNPACKED_BYTES) -> dict[str, np.ndarray]:
    """Reads a ``.npz``.

    Args:
        raw: content of the file.
        what: its name, for messages.
        max_bytes: most that all members may take unpacked.

    Returns:
        Name -> array, read-only.

    Raises:
        BundleError: not such a file, larger than the cap, or holding anything but plain arrays.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(raw)) as archive:
            members = archive.infolist()
            if len(members) > MAX_MEMBERS or sum(member.file_size for member in members) > max_bytes:
                raise BundleError(f"{what} unpacks to more than {MAX_MEMBERS} arrays or {max_bytes} bytes")
            if len({member.filename for member in members}) != len(members):
                raise BundleError(f"{what} holds two arrays of one name")
            return {member.filename.removesuffix(".npy"): _array(archive.read(member)) for member in members}
    except BundleError:
        raise
    except Exception as error:  # zipfile, zlib and numpy each have their own for damaged input
        raise BundleError(f"{what} is not a readable .npz: {type(error).__name__}: {error}") from error


def _array(raw: bytes) -> np.ndarray:
    stream = io.BytesIO(raw)
    version = np.lib.format.read_magic(stream)
    read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
    shape, fortran_order, dtype = read_header(stream)
    if dtype.hasobject or dtype.names is not None:
        raise ValueError(f"arrays of {dtype} are not read")
    flat = np.frombuffer(raw, dtype=dtype, offset=stream.tell())  # refuses a remainder
    return flat.reshape(shape, order="F" if fortran_order else "C")  # refuses any other count


__all__ = ["MAX_MEMBERS", "MAX_UNPACKED_BYTES", "pack_arrays", "unpack_arrays"]
