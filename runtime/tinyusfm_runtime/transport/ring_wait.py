"""Waking and waiting for the newest number in a ring of shared memory.

A writer on Linux wakes whoever waits at the low half of ``published`` (futex) and says so in the ring's header. A
reader waits there instead of looking again and again. Only the kernel looks at the mapping: where a writer cut the
object short it answers with an error, while a look of our own would end the process by SIGBUS.

It does not know what a ring holds.
"""

from __future__ import annotations

import ctypes
import mmap
import platform
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np

from tinyusfm_runtime.transport.shm_ring import HEADER_BYTES, STATE_OFFSET, WAKES_OFFSET

_CALLS = {"x86_64": 202, "aarch64": 98, "riscv64": 98, "ppc64le": 221, "s390x": 238}
"""Number of the futex call by machine; 64-bit alone, where a time has two words of 64 bits."""
_WAIT, _WAKE, _ALL = 0, 1, 0x7FFFFFFF


class _Time(ctypes.Structure):
    """timespec."""

    _fields_ = (("seconds", ctypes.c_int64), ("nanoseconds", ctypes.c_int64))


def _find() -> Callable[..., int] | None:
    number = _CALLS.get(platform.machine())
    if sys.platform != "linux" or number is None or sys.maxsize < 1 << 32:
        return None
    try:
        call = ctypes.CDLL(None).syscall
    except (OSError, AttributeError):
        return None
    call.restype = ctypes.c_long

    def futex(address: int, operation: int, value: int, wait: _Time | None) -> int:
        pointer = None if wait is None else ctypes.byref(wait)
        result: int = call(
            ctypes.c_long(number), ctypes.c_void_p(address), ctypes.c_int(operation), ctypes.c_uint32(value), pointer,
            None, ctypes.c_uint32(0),
        )  # fmt: skip
        return result

    return futex


_futex = _find()


def can_wake() -> bool:
    """Whether this machine has what waking needs, as far as Python reaches it."""
    return _futex is not None


class Waker:
    """Wakes those who wait at a ring.

    Args:
        memory: the writer's own mapping of the ring.
    """

    def __init__(self, memory: mmap.mmap) -> None:
        self._word: Any = ctypes.c_uint32.from_buffer(memory, STATE_OFFSET) if can_wake() else None

    def wake(self) -> None:
        """Wakes everybody."""
        if _futex is not None and self._word is not None:
            _futex(ctypes.addressof(self._word), _WAKE, _ALL, None)

    def close(self) -> None:
        """Gives the mapping back, which cannot be closed before."""
        self._word = None


class Waiter:
    """Waits until a ring holds something newer.

    Args:
        file: descriptor of the ring, open for reading; it stays the caller's.
        header: the ring's header.

    Attributes:
        usable: the ring's writer wakes, and this machine can wait.
    """

    def __init__(self, file: int, header: bytes) -> None:
        self._memory: mmap.mmap | None = None
        self._view: np.ndarray | None = None
        self.usable = False
        if _futex is None or int.from_bytes(header[WAKES_OFFSET : WAKES_OFFSET + 4], "little") != 1:
            return
        with suppress(OSError, ValueError):
            self._memory = mmap.mmap(file, HEADER_BYTES, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
            self._view = np.frombuffer(self._memory, np.uint8)  # its address alone is used
            self.usable = True

    def wait(self, seen: int, seconds: float) -> bool:
        """Sleeps until the newest number is not ``seen`` any more, or so long.

        Other threads go on.

        Args:
            seen: number of the newest frame as it was read.
            seconds: at most.

        Returns:
            False where it cannot wait: the caller sleeps by itself.
        """
        view = self._view  # close may come meanwhile; the kernel refuses an address that is gone
        if _futex is None or view is None or seconds <= 0:
            return False
        ns = int(seconds * 1e9)
        wait = _Time(ns // 1_000_000_000, ns % 1_000_000_000)
        address = view.ctypes.data + STATE_OFFSET
        del view
        _futex(address, _WAIT, seen & 0xFFFFFFFF, wait)
        return True

    def close(self) -> None:
        """Unmaps the ring; idempotent."""
        self._view, memory, self._memory, self.usable = None, self._memory, None, False
        if memory is not None:
            with suppress(BufferError):  # another thread is about to wait: the mapping goes with its last user
                memory.close()


__all__ = ["Waiter", "Waker", "can_wake"]
