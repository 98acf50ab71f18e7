"""The thread's stack for signal handlers, kept through calls into a library.

OpenVINO 2026.4 puts one of its own in place when it compiles a model, and takes it back when the model is freed. Of
two models freed in another order, a stack that no longer exists stays behind, and the next signal, such as Ctrl-C,
ends the process with a segmentation fault (Python's handlers run on that stack). So the thread's own is put back.

Linux only; elsewhere nothing is done. It does not know engines.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Iterator
from contextlib import contextmanager


class _Stack(ctypes.Structure):
    """``stack_t`` of Linux (sigaltstack(2))."""

    _fields_ = (("sp", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))


_OFF = 2
"""SS_DISABLE."""


@functools.cache
def _library() -> ctypes.CDLL:
    return ctypes.CDLL(None)


def signal_stack() -> tuple[int, int]:
    """Where the calling thread's stack for signal handlers lies.

    Returns:
        Address and bytes; zeros where it has none, and on other systems than Linux.
    """
    if sys.platform != "linux":
        return 0, 0
    found = _Stack()
    _library().sigaltstack(None, ctypes.byref(found))
    return (0, 0) if found.flags & _OFF else (found.sp or 0, found.size)


@contextmanager
def kept_signal_stack() -> Iterator[None]:
    """Leaves the calling thread's stack for signal handlers as it was."""
    if sys.platform != "linux":
        yield
        return
    library, before = _library(), _Stack()
    library.sigaltstack(None, ctypes.byref(before))
    try:
        yield
    finally:
        library.sigaltstack(ctypes.byref(before), None)


__all__ = ["kept_signal_stack", "signal_stack"]
