"""The compiled integer engine (runtime/capi/integer_engine.h).

Reached through ctypes as native.py reaches the kernels.

It does not know what a model computes.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from functools import lru_cache

import numpy as np

from tinyusfm_runtime.engines.integer.layout import TYPES, Ports
from tinyusfm_runtime.errors import EngineError, UnsupportedError
from tinyusfm_runtime.numerics import native

VERSION = 1
"""TUE_INT_VERSION that this file was written for."""
_CANCELLED, _UNSUPPORTED = 5, 4


class _Tensor(ctypes.Structure):
    """tue_int_tensor."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("data", ctypes.c_void_p),
        ("bytes", ctypes.c_size_t),
        ("shape", ctypes.c_int64 * 4),
        ("dims", ctypes.c_int32),
        ("dtype", ctypes.c_int32),
    )


class _Options(ctypes.Structure):
    """tue_int_options."""

    _fields_ = (("struct_size", ctypes.c_size_t), ("threads", ctypes.c_int32), ("isa", ctypes.c_char_p))


def available() -> bool:
    """True if the library holds the engine and fits this file."""
    return _load()[0] is not None


def reason() -> str:
    """Why the compiled engine is not used, or where it was loaded from."""
    return _load()[1]


def instruction_sets() -> tuple[str, ...]:
    """What the library holds and this CPU has, fastest first.

    Empty without the library.
    """
    library, _ = _load()
    return tuple(library.tue_int_isas().decode().split(",")) if library is not None else ()


class CompiledModel:
    """One model in the compiled engine.

    Args:
        tensors: of the file; the engine checks them.
        ports: of the same.
        threads: inside the engine; the bytes do not depend on it.
        isa: instruction set, or empty for the fastest.

    Raises:
        UnsupportedError: no such instruction set here.
        EngineError: the engine refused the model.
    """

    def __init__(self, tensors: Mapping[str, np.ndarray], ports: Ports, *, threads: int, isa: str = "") -> None:
        library, why_not = _load()
        if library is None:
            raise UnsupportedError(f"the compiled integer engine is not available: {why_not}")
        self._library = library
        table = (_Tensor * len(tensors))(*(_entry(name, value) for name, value in tensors.items()))
        options = _Options(ctypes.sizeof(_Options), min(threads, 64), isa.encode() or None)
        handle, text = ctypes.c_void_p(), ctypes.create_string_buffer(256)
        status = library.tue_int_open(
            table, len(tensors), ctypes.byref(options), ctypes.byref(handle), text, ctypes.sizeof(text)
        )
        if status != 0:
            message = text.value.decode("ascii", "replace")
            raise (UnsupportedError if status == _UNSUPPORTED else EngineError)(f"the integer engine: {message}")
        self._handle = handle
        self._outputs = ports.outputs
        self._answers = self._fresh()

    @property
    def description(self) -> str:
        """Instruction set and threads."""
        return str(self._library.tue_int_describe(self._handle).decode())

    def run(self, tensor: np.ndarray, *, reuse: bool = False) -> dict[str, np.ndarray] | None:
        """Computes one answer.

        Args:
            tensor: what the model takes, C-contiguous.
            reuse: answer in the same arrays every time.

        Returns:
            Outputs by name, float32; None if it was cancelled.

        Raises:
            EngineError: the engine is closed, or failed.
        """
        if not self._handle:
            raise EngineError("the integer engine is closed")
        answers = self._answers if reuse else self._fresh()
        places = (ctypes.c_void_p * len(answers))(*(value.ctypes.data for value in answers.values()))
        status = self._library.tue_int_run(self._handle, tensor.ctypes.data, places)
        if status == _CANCELLED:
            return None
        if status != 0:
            raise EngineError(f"the integer engine failed with status {status}")
        return dict(answers)

    def cancel(self) -> None:
        """Asks a run in progress to stop."""
        if self._handle:
            self._library.tue_int_cancel(self._handle)

    def close(self) -> None:
        """Frees the model; idempotent."""
        handle, self._handle = self._handle, ctypes.c_void_p()
        if handle:
            self._library.tue_int_close(handle)

    def __del__(self) -> None:
        if getattr(self, "_handle", None):
            self.close()

    def _fresh(self) -> dict[str, np.ndarray]:
        return {port.name: np.empty(port.shape, np.float32) for port in self._outputs}


def _entry(name: str, value: np.ndarray) -> _Tensor:
    shape = (ctypes.c_int64 * 4)(*value.shape)
    kind = TYPES.index(value.dtype.str.replace("|", ""))
    return _Tensor(name.encode("ascii", "replace"), value.ctypes.data, value.nbytes, shape, value.ndim, kind)


@lru_cache(maxsize=1)
def _load() -> tuple[ctypes.CDLL | None, str]:
    library, why = native.shared_object()
    if library is None:
        return None, why
    try:
        version = library.tue_int_version()
    except AttributeError:
        return None, "lack the integer engine: build them again"
    if version != VERSION:
        return None, f"hold version {version} of the integer engine, not {VERSION}: build them again"
    pointer, size, i32 = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int32
    library.tue_int_isas.restype, library.tue_int_isas.argtypes = ctypes.c_char_p, []
    library.tue_int_open.restype = i32
    library.tue_int_open.argtypes = [pointer, size, pointer, pointer, ctypes.c_char_p, size]
    library.tue_int_describe.restype, library.tue_int_describe.argtypes = ctypes.c_char_p, [pointer]
    library.tue_int_run.restype, library.tue_int_run.argtypes = i32, [pointer, pointer, pointer]
    library.tue_int_cancel.restype, library.tue_int_cancel.argtypes = None, [pointer]
    library.tue_int_close.restype, library.tue_int_close.argtypes = None, [pointer]
    return library, why


__all__ = ["VERSION", "CompiledModel", "available", "instruction_sets", "reason"]
