"""The compiled kernels of runtime/capi, reached through ctypes.

Their results are numpy's, byte for byte.

The shared object is an optional part of the installation: ``available()`` says whether it can be used and ``reason()``
why not. preprocess.py and measure.py fall back to numpy, which changes the time and not one byte. Calls release the
interpreter lock and share no state, so any number of threads may make them.

It does not know what the kernels are for, and checks of its arguments only what C could not survive.

``TINYUSFM_NATIVE=0`` in the environment, read once, switches the kernels off; ``using`` takes another build of them for
a while.

Shapes: HW, HWC as in frame.py.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from tinyusfm_runtime.errors import UnsupportedError

VERSION = 3
"""TUE_NUMERICS_VERSION of runtime/capi/tue_numerics.h that this file was written for."""
SWITCH = "TINYUSFM_NATIVE"
"""Environment variable; ``0`` forces numpy."""
BLOCK = 8
"""Rows of filter weights are padded to a multiple of this many."""
FORMATS = {"grey": 0, "rgb": 1, "bgr": 2, "rgba": 3}
"""PixelFormat values and enum tue_format."""


class _Image(ctypes.Structure):
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


class _View(ctypes.Structure):
    """struct tue_view."""

    _fields_ = (
        ("crop", ctypes.c_int32 * 4),
        ("box", ctypes.c_int32 * 4),
        ("spacing_mm", ctypes.c_double * 2),
        ("has_spacing", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
    )


class _LabelRequest(ctypes.Structure):
    """struct tue_asked."""

    _fields_ = (
        ("rows", ctypes.c_int32),
        ("columns", ctypes.c_int32),
        ("channels", ctypes.c_int32),
        ("index", ctypes.c_int32),
        ("ellipse", ctypes.c_int32),
        ("cut", ctypes.c_float),
        ("min_area", ctypes.c_double),
    )


class _Measured(ctypes.Structure):
    """struct tue_measurement."""

    _fields_ = (
        ("found", ctypes.c_int32),
        ("touches_border", ctypes.c_int32),
        ("cut_by_sector", ctypes.c_int32),
        ("contour_points", ctypes.c_int32),
        ("pixels", ctypes.c_int64),
        ("confidence", ctypes.c_double),
        ("area_px", ctypes.c_double),
        ("area_mm2", ctypes.c_double),
        ("box_px", ctypes.c_double * 4),
        ("centroid_px", ctypes.c_double * 2),
        ("centre_px", ctypes.c_double * 2),
        ("axes_px", ctypes.c_double * 2),
        ("axes_mm", ctypes.c_double * 2),
        ("angle_deg", ctypes.c_double),
        ("hc_px", ctypes.c_double),
        ("hc_mm", ctypes.c_double),
        ("agreement", ctypes.c_double),
        ("contour_px", ctypes.c_double * (2 * 64)),
    )


class ResampleFilter:
    """Weights of one axis in the layout of struct tue_filter.

    Keep it and use it for every frame.

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


@contextmanager
def using(path: str | Path | None) -> Iterator[None]:
    """Another build of the kernels, or numpy, as long as the block runs.

    For comparing builds with each other and with numpy in one process. It holds for all threads: begin it where no
    other thread computes. ``reason()`` says what came of it.

    Args:
        path: the shared object; None computes with numpy.
    """
    global _chosen
    before = _chosen
    _chosen = (None, "switched off for a while") if path is None else _open(str(path))
    try:
        yield
    finally:
        _chosen = before


def available() -> bool:
    """True if the kernels are built, fit this file and are not switched off."""
    return _load()[0] is not None


def reason() -> str:
    """Why the kernels are not used, or where they were loaded from."""
    return _load()[1]


def shared_object() -> tuple[ctypes.CDLL | None, str]:
    """The shared object, or None, and where it is from or why it is missing.

    For what else the library holds.
    """
    return _load()


def luma_resize(
    pixels: np.ndarray,
    pixel_format: str,
    limited: bool,
    along_columns: ResampleFilter,
    along_rows: ResampleFilter,
    out: np.ndarray,
) -> None:
    """Brightness and resize of an image, see preprocess.py.

    Args:
        pixels: uint8 HW or HWC, any strides.
        pixel_format: value of a PixelFormat.
        limited: True expands codes 16..235 first.
        along_columns: weights from the image's columns to the result's.
        along_rows: weights from the image's rows to the result's.
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
    image = _Image(_address(pixels), *strides, rows, columns, FORMATS[pixel_format], limited)
    library = _library()
    filters = ctypes.byref(along_columns.struct), ctypes.byref(along_rows.struct)
    scratch = np.empty(library.tue_preprocess_scratch(*filters), np.uint8)
    status = library.tue_preprocess(
        ctypes.byref(image), *filters, _address(out), out.strides[0], _address(scratch), scratch.size
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
        UnsupportedError: the kernels are not available, or the array is not a uint8 image.
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
        UnsupportedError: the kernels are not available, or the array is not a uint8 image.
    """
    mask = _plain_mask(mask_HW)
    sums = (ctypes.c_int64 * 6)()
    _check(_library().tue_moments(_address(mask), *mask.shape, sums), f"moments of {mask.shape}")
    m00, m10, m01, m20, m11, m02 = sums
    return m00, m10, m01, m20, m11, m02


def fill_holes(mask_HW: np.ndarray) -> np.ndarray:
    """A mask without its holes, see shape.py.

    Args:
        mask_HW: uint8; whatever is not 0 belongs to the mask.

    Returns:
        uint8 HW, 0 and 1.

    Raises:
        UnsupportedError: the kernels are not available, or the array is not a uint8 image.
    """
    mask = _plain_mask(mask_HW)
    library = _library()
    out = np.empty(mask.shape, np.uint8)
    scratch = np.empty(library.tue_holes_scratch(*mask.shape), np.uint8)
    status = library.tue_fill_holes(_address(mask), *mask.shape, _address(out), _address(scratch), scratch.size)
    _check(status, f"holes of {mask.shape}")
    return out


def contour(mask_HW: np.ndarray, most: int) -> np.ndarray:
    """Border of the component that holds the mask's first pixel, see shape.py.

    Args:
        mask_HW: uint8; whatever is not 0 belongs to the mask.
        most: points at most.

    Returns:
        int32 (points, 2) of row and column.

    Raises:
        UnsupportedError: the kernels are not available, or the array is not a uint8 image.
    """
    mask = _plain_mask(mask_HW)
    points, count = np.empty((most, 2), np.int32), ctypes.c_int32()
    status = _library().tue_contour(_address(mask), *mask.shape, most, _address(points), ctypes.byref(count))
    _check(status, f"contour of {mask.shape}")
    return points[: count.value].copy()


def cut_by_sector(mask_HW: np.ndarray, codes_HW: np.ndarray) -> bool:
    """Whether the edge of the field of view cuts a mask, see shape.py.

    Args:
        mask_HW: uint8, 0 and 1.
        codes_HW: uint8 brightness, of the same size.

    Raises:
        UnsupportedError: the kernels are not available, or the arrays do not fit.
    """
    mask, codes = _plain_mask(mask_HW), _plain_mask(codes_HW)
    if mask.shape != codes.shape:
        raise UnsupportedError(f"mask {mask.shape} and image {codes.shape} differ in size")
    library, cut = _library(), ctypes.c_int32()
    scratch = np.empty(library.tue_view_scratch(*mask.shape), np.uint8)
    status = library.tue_cut_by_sector(
        _address(mask), _address(codes), *mask.shape, ctypes.byref(cut), _address(scratch), scratch.size
    )
    _check(status, f"field of view of {mask.shape}")
    return bool(cut.value)


def blend(
    second_KHW: np.ndarray,
    at_rows: np.ndarray,
    row_places: np.ndarray,
    at_columns: np.ndarray,
    column_places: np.ndarray,
    out_KHW: np.ndarray,
) -> None:
    """Averages a second pass into the first one's logits, see second_pass.py.

    Args:
        second_KHW: float32.
        at_rows: int32, rows of the result.
        row_places: float64, where they lie in the second field.
        at_columns: int32.
        column_places: float64.
        out_KHW: float32, C-contiguous; the first pass's logits, changed in place.

    Raises:
        UnsupportedError: the kernels are not available, or the arrays do not fit.
    """
    second = np.ascontiguousarray(second_KHW)
    good = second.dtype == out_KHW.dtype == np.float32 and second.shape == out_KHW.shape and second.ndim == 3
    if not good or not out_KHW.flags.c_contiguous or not out_KHW.flags.writeable:
        raise UnsupportedError(f"native blend cannot take {second.dtype} {second.shape} to {out_KHW.shape}")
    rows, cols = (np.ascontiguousarray(array, np.int32) for array in (at_rows, at_columns))
    down, right = (np.ascontiguousarray(array, np.float64) for array in (row_places, column_places))
    if rows.shape != down.shape or cols.shape != right.shape:
        raise UnsupportedError("native blend: rows or columns and their places differ in number")
    status = _library().tue_blend(
        _address(second), *second.shape, _address(rows), _address(down), rows.size, _address(cols), _address(right),
        cols.size, _address(out_KHW),
    )  # fmt: skip
    _check(status, f"blend of {second.shape}")


def measure(
    mask_HW: np.ndarray,
    logits: np.ndarray,
    codes_HW: np.ndarray | None,
    *,
    crop: tuple[int, int, int, int],
    box: tuple[int, int, int, int],
    spacing_mm: tuple[float, float] | None,
    index: int,
    cut: float,
    min_area: float,
    ellipse: bool,
) -> tuple[np.ndarray, dict[str, Any]]:
    """What is measured of one label, see measure.py.

    Args:
        mask_HW: uint8 labels at the input's size.
        logits: float32 NKHW.
        codes_HW: uint8 brightness at the input's size, or None.
        crop: region of the frame that is used: row, column, rows, columns.
        box: what it fills in the input, likewise.
        spacing_mm: (row, column) spacing of the input's pixels, or None.
        index: the label's value in the mask.
        cut: what one channel must exceed.
        min_area: least share of the box.
        ellipse: fill holes, fit an ellipse.

    Returns:
        The component (uint8 HW), and the values of a Measurement but its label.

    Raises:
        UnsupportedError: the kernels are not available, or the arrays do not fit.
    """
    mask = _plain_mask(mask_HW)
    codes = None if codes_HW is None else _plain_mask(codes_HW)
    solid = np.ascontiguousarray(logits[0])
    if solid.dtype != np.float32 or solid.shape[1:] != mask.shape or (codes is not None and codes.shape != mask.shape):
        raise UnsupportedError(f"native measure cannot take {solid.dtype} {solid.shape} with a mask of {mask.shape}")
    view = _View(crop, box, spacing_mm or (0.0, 0.0), spacing_mm is not None, 0)
    wanted = _LabelRequest(*mask.shape, len(solid), index, ellipse, cut, min_area)
    library, out, found = _library(), np.empty(mask.shape, np.uint8), _Measured()
    scratch = np.empty(library.tue_measure_scratch(*box[2:]), np.uint8)
    status = library.tue_measure(
        _address(mask), _address(solid), None if codes is None else _address(codes), ctypes.byref(view),
        ctypes.byref(wanted), _address(out), ctypes.byref(found), _address(scratch), scratch.size,
    )  # fmt: skip
    _check(status, f"measure of {mask.shape}")
    return out, _values(found, in_mm=spacing_mm is not None, ellipse=ellipse)


def _values(found: _Measured, *, in_mm: bool, ellipse: bool) -> dict[str, Any]:
    if not found.found:
        return {"found": False}
    walked = found.contour_px[: 2 * found.contour_points]
    values: dict[str, Any] = {
        "found": True,
        "confidence": found.confidence,
        "area_px": found.area_px,
        "area_mm2": found.area_mm2 if in_mm else None,
        "box_px": tuple(found.box_px),
        "centroid_px": tuple(found.centroid_px),
        "contour_px": tuple(zip(walked[::2], walked[1::2], strict=True)),
        "touches_border": bool(found.touches_border),
        "cut_by_sector": bool(found.cut_by_sector),
    }
    if not ellipse:
        return values
    return values | {
        "hc_mm": found.hc_mm if in_mm else None,
        "hc_px": found.hc_px,
        "axes_mm": tuple(found.axes_mm) if in_mm else None,
        "axes_px": tuple(found.axes_px),
        "centre_px": tuple(found.centre_px),
        "angle_deg": found.angle_deg,
        "agreement": found.agreement,
    }


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


_chosen: tuple[ctypes.CDLL | None, str] | None = None


def _load() -> tuple[ctypes.CDLL | None, str]:
    return _chosen or _installed()


@lru_cache(maxsize=1)
def _installed() -> tuple[ctypes.CDLL | None, str]:
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
        "tue_holes_scratch": (size, [i32, i32]),
        "tue_fill_holes": (i32, [pointer, i32, i32, pointer, pointer, size]),
        "tue_contour": (i32, [pointer, i32, i32, i32, pointer, pointer]),
        "tue_view_scratch": (size, [i32, i32]),
        "tue_cut_by_sector": (i32, [pointer, pointer, i32, i32, pointer, pointer, size]),
        "tue_blend": (i32, [pointer, i32, i32, i32, pointer, pointer, i32, pointer, pointer, i32, pointer]),
        "tue_logit": (ctypes.c_float, [ctypes.c_double]),
        "tue_measure_scratch": (size, [i32, i32]),
        "tue_measure": (i32, [pointer, pointer, pointer, pointer, pointer, pointer, pointer, pointer, size]),
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
        raise UnsupportedError(f"a mask must be a uint8 image, not {mask_HW.dtype} {mask_HW.shape}")
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
    "blend",
    "contour",
    "crc64",
    "cut_by_sector",
    "fill_holes",
    "largest_component",
    "luma_resize",
    "measure",
    "moments",
    "reason",
    "shared_object",
    "threshold",
    "using",
]
