"""The compiled kernels of runtime/capi, reached through ctypes; their results are numpy's, byte for byte.

The shared object is an optional part of the installation: ``available()`` says whether it can be used and ``reason()``
why not. preprocess.py and measure.py fall back to numpy, which changes the time and not one byte. Calls release the
interpreter lock and share no state, so any number of threads may make them.

It does not know what the kernels are for, and checks of its arguments only what C could not survive.

``TINYUSFM_NATIVE=0`` in the environment, read once, switches the kernels off.

Shapes: HW, HWC as in frame.py.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
from functools import lru_cache
from pathlib import Path

import numpy as np

from tinyusfm_runtime.errors import UnsupportedError

VERSION = 2
"""TUE_NUMERICS_VERSION of runtime/capi/tue_numerics.h that this file was written for."""
SWITCH = "TINYUSFM_NATIVE"
"""Environment variable; ``0`` forces numpy."""
BLOCK = 8
"""Rows of filter weights are padded to a multiple of this many."""
FORMATS = {"grey": 0, "rgb": 1, "bgr": 2, "rgba": 3}
"""PixelFormat values and enum tue_format."""


class _Picture(ctypes.Structure):
    """struct tue_picture."""

    _fields_ = (
        ("pixels", ctypes.c_void_p),
        ("row_stride", ctypes.c_ssize_t),
        ("column_stride", ctypes.c_ssize_t),
        ("channel_stride", ctypes.c_ssize_t),
        ("rows", ctypes.c_int32),
        ("columns", ctypes.c_int32),
        ("format", ctypes.c_int32),
        ("limited", ctypes.c_int32),
    )


class _Filter(ctypes.Structure):
    """struct tue_filter."""

    _fields_ = (
        ("first", ctypes.c_void_p),
        ("weights", ctypes.c_void_p),
        ("in_size", ctypes.c_int32),
        ("out_size", ctypes.c_int32),
        ("span", ctypes.c_int32),
        ("stride", ctypes.c_int32),
    )


class ResampleFilter:
    """Weights of one axis in the layout of struct tue_filter; keep it and use it for every frame.

    Args:
        first: int32 (out_size,), first input sample of each output, never falling.
        weights: int32 (out_size, taps), 22-bit fixed point, zero beyond each output's support.
        in_size: samples along the axis.
    """

    __slots__ = ("_first", "_weights", "in_size", "out_size", "struct")

    def __init__(self, first: np.ndarray, weights: np.ndarray, in_size: int) -> None:
        used = np.flatnonzero(weights.any(axis=0))
        span = int(used[-1]) + 1 if used.size else 1
        stride = -(-span // BLOCK) * BLOCK
        self._first = np.ascontiguousarray(first, np.int32)
        self._weights = np.zeros((len(first), stride), np.int32)
        self._weights[:, :span] = weights[:, :span]
        self.in_size, self.out_size = in_size, len(first)
        self.struct = _Filter(_address(self._first), _address(self._weights), in_size, len(first), span, stride)


def available() -> bool:
    """True if the kernels are built, fit this file and are not switched off."""
    return _load()[0] is not None


def reason() -> str:
    """Why the kernels are not used, or where they were loaded from."""
    return _load()[1]


def luma_resize(
    pixels: np.ndarray,
    pixel_format: str,
    limited: bool,
    along_columns: ResampleFilter,
    along_rows: ResampleFilter,
    out: np.ndarray,
) -> None:
    """Brightness and resize of a picture, see preprocess.py.

    Args:
        pixels: uint8 HW or HWC, any strides.
        pixel_format: value of a PixelFormat.
        limited: True expands codes 16..235 first.
        along_columns: weights from the picture's columns to the result's.
        along_rows: weights from the picture's rows to the result's.
        out: uint8 HW that is written, columns next to each other, not overlapping ``pixels``.

    Raises:
        UnsupportedError: the kernels are not available, or the sizes do not fit each other.
    """
    if out.shape != (along_rows.out_size, along_columns.out_size) or out.dtype != np.uint8 or out.strides[1] != 1:
        raise UnsupportedError(f"native resize cannot write to {out.dtype} {out.shape} with strides {out.strides}")
    if not out.flags.writeable:
        raise UnsupportedError("native resize cannot write to a read-only array")
    strides = pixels.strides if pixels.ndim == 3 else (*pixels.strides, 0)
    rows, columns = pixels.shape[:2]
    picture = _Picture(_address(pixels), *strides, rows, columns, FORMATS[pixel_format], limited)
    library = _library()
    filters = ctypes.byref(along_columns.struct), ctypes.byref(along_rows.struct)
    scratch = np.empty(library.tue_preprocess_scratch(*filters), np.uint8)
    status = library.tue_preprocess(
        ctypes.byref(picture), *filters, _address(out), out.strides[0], _address(scratch), scratch.size
    )
    _check(status, f"resize of {pixels.shape} to {out.shape}")


def threshold(logits: np.ndarray, cut: float, out: np.ndarray) -> None:
    """Writes ``logits > cut`` as 0 and 1; a NaN is not greater.

    Args:
        logits: float32, C-contiguous.
        cut: taken as float32.
        out: uint8 of the same size, C-contiguous.

    Raises:
        UnsupportedError: the kernels are not available, or the arrays do not fit.
    """
    good = logits.dtype == np.float32 and out.dtype == np.uint8 and logits.size == out.size
    if not (good and logits.flags.c_contiguous and out.flags.c_contiguous and out.flags.writeable):
        raise UnsupportedError(f"native threshold cannot take {logits.dtype} {logits.shape} to {out.dtype} {out.shape}")
    _check(_library().tue_threshold(_address(logits), logits.size, cut, _address(out)), "threshold")


def largest_component(mask_HW: np.ndarray) -> np.ndarray:
    """The largest 8-connected component, see measure.py.

    Args:
        mask_HW: uint8; whatever is not 0 belongs to the mask.

    Returns:
        uint8 HW, 1 on the component.

    Raises:
        UnsupportedError: the kernels are not available, or the array is not a uint8 picture.
    """
    mask = _plain_mask(mask_HW)
    library = _library()
    out = np.empty(mask.shape, np.uint8)
    area = ctypes.c_int64()
    scratch = np.empty(library.tue_components_scratch(*mask.shape), np.uint8)
    status = library.tue_largest_component(
        _address(mask), *mask.shape, _address(out), ctypes.byref(area), _address(scratch), scratch.size
    )
    _check(status, f"component of {mask.shape}")
    return out


def moments(mask_HW: np.ndarray) -> tuple[int, int, int, int, int, int]:
    """Raw moments, see measure.py.

    Args:
        mask_HW: uint8; whatever is not 0 belongs to the mask.

    Returns:
        Sums of 1, x, y, x x, x y and y y over the mask, x = column, y = row.

    Raises:
        UnsupportedError: the kernels are not available, or the array is not a uint8 picture.
    """
    mask = _plain_mask(mask_HW)
    sums = (ctypes.c_int64 * 6)()
    _check(_library().tue_moments(_address(mask), *mask.shape, sums), f"moments of {mask.shape}")
    m00, m10, m01, m20, m11, m02 = sums
    return m00, m10, m01, m20, m11, m02


def crc64(octets: np.ndarray) -> int:
    """CRC-64 of ECMA-182, see crc64.py.

    Args:
        octets: uint8 (N,), C-contiguous.

    Returns:
        0 .. 2^64 - 1.

    Raises:
        UnsupportedError: the kernels are not available, or the array is not a row of bytes.
    """
    if octets.dtype != np.uint8 or octets.ndim != 1 or not octets.flags.c_contiguous:
        raise UnsupportedError(f"a checksum is taken of a row of bytes, not of {octets.dtype} {octets.shape}")
    out = ctypes.c_uint64()
    _check(_library().tue_crc64(_address(octets), octets.size, ctypes.byref(out)), "checksum")
    return out.value


@lru_cache(maxsize=1)
def _load() -> tuple[ctypes.CDLL | None, str]:
    if os.environ.get(SWITCH, "").strip() == "0":
        return None, f"switched off by {SWITCH}=0"
    spec = importlib.util.find_spec("tinyusfm_runtime._native")
    if spec is None or not spec.origin or not Path(spec.origin).is_file():
        return None, "not built: install with a C compiler present, or run python setup.py build_ext --inplace"
    return _open(spec.origin)


def _open(path: str) -> tuple[ctypes.CDLL | None, str]:
    try:
        library = ctypes.CDLL(path)
        version = library.tue_numerics_version()
    except (OSError, AttributeError) as error:
        return None, f"cannot be loaded: {error}"
    if version != VERSION:
        return None, f"built from version {version} of the kernels, not {VERSION}: build it again"
    pointer, size, i32 = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int32
    signatures: dict[str, tuple[type, list[type]]] = {
        "tue_preprocess_scratch": (size, [pointer, pointer]),
        "tue_preprocess": (i32, [pointer, pointer, pointer, pointer, ctypes.c_ssize_t, pointer, size]),
        "tue_threshold": (i32, [pointer, size, ctypes.c_float, pointer]),
        "tue_components_scratch": (size, [i32, i32]),
        "tue_largest_component": (i32, [pointer, i32, i32, pointer, pointer, pointer, size]),
        "tue_moments": (i32, [pointer, i32, i32, pointer]),
        "tue_crc64": (i32, [pointer, size, pointer]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library, f"loaded from {Path(path).name}"


def _library() -> ctypes.CDLL:
    library, why_not = _load()
    if library is None:
        raise UnsupportedError(f"the compiled kernels are not available: {why_not}")
    return library


def _address(array: np.ndarray) -> int:
    # half a microsecond; array.ctypes.data takes three times as long
    return int(array.__array_interface__["data"][0])


def _plain_mask(mask_HW: np.ndarray) -> np.ndarray:
    if mask_HW.dtype != np.uint8 or mask_HW.ndim != 2:
        raise UnsupportedError(f"a mask must be a uint8 picture, not {mask_HW.dtype} {mask_HW.shape}")
    return np.ascontiguousarray(mask_HW)


def _check(status: int, what: str) -> None:
    if status != 0:
        raise UnsupportedError(f"native {what} was refused with status {status}")


__all__ = [
    "BLOCK",
    "FORMATS",
    "SWITCH",
    "VERSION",
    "ResampleFilter",
    "available",
    "crc64",
    "largest_component",
    "luma_resize",
    "moments",
    "reason",
    "threshold",
]
