"""A CUDA runtime without a GPU: the calls of cuda.py over Python memory, asynchronous as the real one, and watchful.

Queued work runs only when the stream is waited for, so a result read too early is stale. ``faults`` collects what a
real device would punish later or never: memory used after it was freed or freed twice, work left in a stream that is
destroyed, allocation or waiting while a stream is captured, arguments of another number or type.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

INVALID, CAPTURE_UNSUPPORTED, CAPTURE_INVALID, NO_DEVICE = 1, 900, 901, 100
"""cudaErrorInvalidValue, cudaErrorStreamCaptureUnsupported, cudaErrorStreamCaptureInvalidated, cudaErrorNoDevice."""


@dataclass
class Stream:
    """Queued work, and the work recorded while the stream is captured."""

    queue: list[Operation] = field(default_factory=list)
    captured: list[Operation] | None = None
    broken: bool = False


@dataclass(frozen=True)
class Operation:
    """Something to be done later, and the memory it touches."""

    what: str
    work: Callable[[], None]
    touches: tuple[int, ...]


class Call:
    """One function of the library: like ctypes it holds its types and refuses what does not fit them."""

    def __init__(self, library: FakeCudart, name: str) -> None:
        self.library, self.name = library, name
        self.argtypes: tuple[Any, ...] = ()
        self.restype: Any = None

    def __call__(self, *arguments: Any) -> Any:
        self.library.calls.append(self.name)
        if len(arguments) != len(self.argtypes):
            self.library.fault(f"{self.name} takes {len(self.argtypes)} arguments, not {len(arguments)}")
            return INVALID
        for kind, value in zip(self.argtypes, arguments, strict=True):
            kind.from_param(value)
        return getattr(self.library, f"_{self.name}")(*arguments)


class FakeCudart:
    """The library. ``refuse`` names calls that fail with an error code.

    Args:
        name: of the GPU.
        capability: (major, minor).
        processors: streaming multiprocessors.
        devices: number of GPUs.
    """

    def __init__(
        self, name: str = "Fake RTX", capability: tuple[int, int] = (8, 6), processors: int = 20, devices: int = 1
    ) -> None:
        self.name, self.capability, self.processors, self.devices = name, capability, processors, devices
        self.driver = 13000
        self.calls: list[str] = []
        self.faults: list[str] = []
        self.refuse: dict[str, int] = {}
        self.memory: dict[int, ctypes.Array[Any]] = {}
        self.pinned: dict[int, ctypes.Array[Any]] = {}
        self.freed: dict[int, ctypes.Array[Any]] = {}
        self.streams: dict[int, Stream] = {}
        self.graphs: dict[int, list[Operation]] = {}
        self.executables: dict[int, list[Operation]] = {}
        self._handle = 1000
        self._made: dict[str, Call] = {}

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or f"_{name}" not in dir(type(self)):
            raise AttributeError(f"undefined symbol: {name}")
        return self._made.setdefault(name, Call(self, name))

    def fault(self, what: str) -> None:
        """Notes a violation."""
        self.faults.append(what)

    def leaks(self) -> dict[str, int]:
        """What was made and not freed."""
        found = {
            "device memory": len(self.memory),
            "pinned memory": len(self.pinned),
            "streams": len(self.streams),
            "graphs": len(self.graphs),
            "executables": len(self.executables),
        }
        return {what: count for what, count in found.items() if count}

    def enqueue(self, stream: int, operation: Operation) -> int:
        """Queues work on a stream, or records it while the stream is captured."""
        if stream not in self.streams:
            self.fault(f"{operation.what} on a stream that does not exist")
            return INVALID
        self._check_alive(operation)
        found = self.streams[stream]
        (found.queue if found.captured is None else found.captured).append(operation)
        return 0

    def view(self, address: int, size: int) -> ctypes.Array[Any]:
        """Bytes at an address; whatever was freed is still there, as on a device, and a fault."""
        for pool in (self.memory, self.pinned):
            for start, raw in pool.items():
                if start <= address and address + size <= start + len(raw):
                    return (ctypes.c_char * size).from_buffer(raw, address - start)
        self.fault(f"memory at {address} is not allocated, or shorter than {size} bytes")
        return (ctypes.c_char * size)()

    def _check_alive(self, operation: Operation) -> None:
        for address in operation.touches:
            if address in self.freed:
                self.fault(f"{operation.what} uses memory that was freed")
            elif not any(address in pool for pool in (self.memory, self.pinned)):
                self.fault(f"{operation.what} uses memory that is not allocated")

    def _new(self, pointer: Any, pool: dict[int, Any], value: Any) -> int:
        self._handle += 8
        pointer._obj.value = self._handle
        pool[self._handle] = value
        return 0

    def _refused(self, name: str) -> int:
        return self.refuse.get(name, 0)

    def _in_capture(self, name: str) -> int:
        """Error of a call that a capture forbids; the capture is spoilt by it."""
        captured = [stream for stream in self.streams.values() if stream.captured is not None]
        for stream in captured:
            stream.broken = True
        if captured:
            self.fault(f"{name} while a stream is captured")
        return CAPTURE_UNSUPPORTED if captured else 0

    def _allocate(self, name: str, pointer: Any, size: int, pool: dict[int, Any]) -> int:
        code = self._refused(name) or self._in_capture(name)
        if code:
            return code
        raw = (ctypes.c_char * size).from_buffer(bytearray(b"\xab" * size))
        address = ctypes.addressof(raw)
        pointer._obj.value = address
        pool[address] = raw
        self.freed.pop(address, None)
        return 0

    def _free(self, name: str, address: Any, pool: dict[int, Any]) -> int:
        if address not in pool:
            self.fault(f"{name} of memory that {'was freed before' if address in self.freed else 'is not its own'}")
            return INVALID
        for stream in self.streams.values():
            if any(address in operation.touches for operation in stream.queue):
                self.fault(f"{name} while queued work still uses the memory")
        self.freed[address] = pool.pop(address)
        return self._in_capture(name)

    def cudaGetErrorString_text(self, code: int) -> bytes:
        """What the error codes of the tests mean."""
        return {NO_DEVICE: b"no CUDA-capable device is detected", CAPTURE_UNSUPPORTED: b"operation not permitted"}.get(
            code, b"invalid argument"
        )

    def _cudaGetErrorString(self, code: int) -> bytes:
        return self.cudaGetErrorString_text(code)

    def _cudaGetDeviceCount(self, pointer: Any) -> int:
        pointer._obj.value = self.devices
        return self._refused("cudaGetDeviceCount") or (0 if self.devices else NO_DEVICE)

    def _cudaDeviceGetAttribute(self, pointer: Any, which: int, device: int) -> int:
        pointer._obj.value = {75: self.capability[0], 76: self.capability[1], 16: self.processors}[which]
        return 0

    def _cudaGetDeviceProperties(self, buffer: Any, device: int) -> int:
        buffer.value = self.name.encode()
        return 0

    def _cudaDriverGetVersion(self, pointer: Any) -> int:
        pointer._obj.value = self.driver
        return 0

    def _cudaMalloc(self, pointer: Any, size: int) -> int:
        return self._allocate("cudaMalloc", pointer, size, self.memory)

    def _cudaFree(self, address: int) -> int:
        return self._free("cudaFree", address, self.memory)

    def _cudaHostAlloc(self, pointer: Any, size: int, flags: int) -> int:
        return self._allocate("cudaHostAlloc", pointer, size, self.pinned)

    def _cudaFreeHost(self, address: int) -> int:
        return self._free("cudaFreeHost", address, self.pinned)

    def _cudaMemcpyAsync(self, target: int, source: int, size: int, kind: int, stream: int) -> int:
        sides = (self.memory, self.pinned) if kind == 1 else (self.pinned, self.memory)
        if target not in sides[0] or source not in sides[1]:
            self.fault(f"cudaMemcpyAsync of kind {kind} between memory that is freed or on the wrong side")
            return INVALID

        def copy() -> None:
            ctypes.memmove(self.view(target, size), self.view(source, size), size)

        return self.enqueue(stream, Operation("cudaMemcpyAsync", copy, (target, source)))

    def _cudaStreamCreateWithFlags(self, pointer: Any, flags: int) -> int:
        return self._refused("cudaStreamCreateWithFlags") or self._new(pointer, self.streams, Stream())

    def _cudaStreamSynchronize(self, stream: int) -> int:
        if stream not in self.streams:
            self.fault("cudaStreamSynchronize of a stream that does not exist")
            return INVALID
        code = self._refused("cudaStreamSynchronize") or self._in_capture("cudaStreamSynchronize")
        found = self.streams[stream]
        queue, found.queue = ([], found.queue) if code else (found.queue, [])
        for operation in queue:
            self._check_alive(operation)
            operation.work()
        return code

    def _cudaStreamDestroy(self, stream: int) -> int:
        found = self.streams.pop(stream, None)
        if found is None:
            self.fault("cudaStreamDestroy of a stream that does not exist")
            return INVALID
        if found.queue or found.captured is not None:
            self.fault("cudaStreamDestroy with work left in the stream")
        return 0

    def _cudaStreamBeginCapture(self, stream: int, mode: int) -> int:
        found = self.streams[stream]
        if found.captured is not None:
            self.fault("cudaStreamBeginCapture of a stream that is captured")
            return INVALID
        found.captured, found.broken = [], False
        return self._refused("cudaStreamBeginCapture")

    def _cudaStreamEndCapture(self, stream: int, pointer: Any) -> int:
        found = self.streams[stream]
        captured, found.captured = found.captured, None
        if captured is None:
            self.fault("cudaStreamEndCapture of a stream that is not captured")
            return INVALID
        if found.broken:
            pointer._obj.value = None
            return CAPTURE_INVALID
        return self._new(pointer, self.graphs, captured)

    def _cudaGraphInstantiateWithFlags(self, pointer: Any, graph: int, flags: int) -> int:
        code = self._refused("cudaGraphInstantiateWithFlags")
        return code or self._new(pointer, self.executables, list(self.graphs[graph]))

    def _cudaGraphLaunch(self, executable: int, stream: int) -> int:
        if executable not in self.executables:
            self.fault("cudaGraphLaunch of a graph that does not exist")
            return INVALID
        code = self._refused("cudaGraphLaunch")
        for operation in [] if code else self.executables[executable]:
            self.enqueue(stream, operation)
        return code

    def _cudaGraphExecDestroy(self, executable: int) -> int:
        if self.executables.pop(executable, None) is None:
            self.fault("cudaGraphExecDestroy of a graph that does not exist")
        return 0

    def _cudaGraphDestroy(self, graph: int) -> int:
        if self.graphs.pop(graph, None) is None:
            self.fault("cudaGraphDestroy of a graph that does not exist")
        return 0


__all__ = ["FakeCudart", "Operation"]
