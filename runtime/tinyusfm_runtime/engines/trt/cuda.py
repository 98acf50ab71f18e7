"""Device memory, a stream and a graph over the CUDA runtime, through ctypes.

Nothing is loaded before it is asked for.

ctypes on libcudart and not cuda-bindings: JetPack brings the library and no such wheel for its Python 3.10, the few
calls needed here have kept their signatures since CUDA 11.4, and nothing has to match a Python version. The library is
taken from the system, from the wheel ``nvidia-cuda-runtime``, or from /usr/local/cuda, CUDA 13 before 12.

A ``Lane`` owns everything it allocates and frees it once, in the order graph, stream, memory. It works on device 0;
``CUDA_VISIBLE_DEVICES`` says which one that is. It does not know TensorRT or models.
"""

from __future__ import annotations

import ctypes
import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from ctypes import POINTER, c_char_p, c_int, c_size_t, c_uint, c_ulonglong, c_void_p
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tinyusfm_runtime.errors import EngineError, MissingExtra, UnsupportedError

EXTRA = "tensorrt"
"""The extra that brings the library."""
LIBRARIES = ("libcudart.so.13", "libcudart.so.12")
"""Names by which the system's loader knows it."""
SIGNATURES: dict[str, tuple[Any, ...]] = {
    "cudaGetDeviceCount": (POINTER(c_int),),
    "cudaDeviceGetAttribute": (POINTER(c_int), c_int, c_int),
    "cudaGetDeviceProperties": (c_void_p, c_int),
    "cudaDriverGetVersion": (POINTER(c_int),),
    "cudaMalloc": (POINTER(c_void_p), c_size_t),
    "cudaFree": (c_void_p,),
    "cudaHostAlloc": (POINTER(c_void_p), c_size_t, c_uint),
    "cudaFreeHost": (c_void_p,),
    "cudaMemcpyAsync": (c_void_p, c_void_p, c_size_t, c_int, c_void_p),
    "cudaStreamCreateWithFlags": (POINTER(c_void_p), c_uint),
    "cudaStreamSynchronize": (c_void_p,),
    "cudaStreamDestroy": (c_void_p,),
    "cudaStreamBeginCapture": (c_void_p, c_int),
    "cudaStreamEndCapture": (c_void_p, POINTER(c_void_p)),
    "cudaGraphInstantiateWithFlags": (POINTER(c_void_p), c_void_p, c_ulonglong),
    "cudaGraphLaunch": (c_void_p, c_void_p),
    "cudaGraphExecDestroy": (c_void_p,),
    "cudaGraphDestroy": (c_void_p,),
}
"""Every call that is made, with the types of its arguments; all return cudaError_t."""

# driver_types.h of CUDA 13, the same since CUDA 10
_TO_DEVICE, _TO_HOST = 1, 2  # cudaMemcpyKind
_MAJOR, _MINOR, _PROCESSORS = 75, 76, 16  # cudaDeviceAttr
_NON_BLOCKING = 1  # cudaStreamNonBlocking: does not wait for the default stream of other code in the process
_THREAD_LOCAL = 1  # cudaStreamCaptureModeThreadLocal: other threads of the program may go on allocating
_NO_DEVICE, _OLD_DRIVER = 100, 35  # cudaErrorNoDevice, cudaErrorInsufficientDriver
_PROPERTIES_BYTES = 4096  # cudaDeviceProp is about 1 KiB; the name is its first 256 bytes in every version
_DRIVER_FILES = ("/sys/module/nvidia/version", "/etc/nv_tegra_release")


@dataclass(frozen=True, kw_only=True, slots=True)
class CudaDevice:
    """One GPU, as far as an engine built for it cares.

    Attributes:
        name: as its maker gives it.
        compute_capability: such as ``8.7``.
        processors: streaming multiprocessors; all Orin boards share one name and differ here.
        driver: highest CUDA version of the driver, and the driver's own version where the system tells it.
    """

    name: str
    compute_capability: str
    processors: int
    driver: str

    @property
    def gpu(self) -> str:
        """Name and size in one string."""
        return f"{self.name} ({self.processors} SMs)"


class Cuda:
    """The library with its calls typed.

    Every failure becomes an EngineError that names the call.
    """

    def __init__(self, library: Any) -> None:
        self._calls = {}
        for name, types in SIGNATURES.items():
            call = getattr(library, name)
            call.argtypes, call.restype = types, c_int
            self._calls[name] = call
        self._text = library.cudaGetErrorString
        self._text.argtypes, self._text.restype = (c_int,), c_char_p

    def call(self, name: str, *arguments: Any) -> None:
        """Makes one call.

        Raises:
            EngineError: it did not return cudaSuccess.
        """
        code = self._calls[name](*arguments)
        if code:
            raise EngineError(f"CUDA: {name} failed with error {code}: {self._error_text(code)}")

    def device(self) -> CudaDevice:
        """Looks at device 0.

        Raises:
            UnsupportedError: there is no driver or no GPU.
            EngineError: CUDA failed.
        """
        count = c_int()
        code = self._calls["cudaGetDeviceCount"](ctypes.byref(count))
        if code in (_NO_DEVICE, _OLD_DRIVER) or (not code and not count.value):
            if code == _OLD_DRIVER and any(Path(place).exists() for place in _DRIVER_FILES):
                raise UnsupportedError("the NVIDIA driver of this machine is too old for this CUDA library: update it")
            raise UnsupportedError("no NVIDIA GPU found on this machine: install its driver, or run where there is one")
        if code:
            raise EngineError(f"CUDA: cudaGetDeviceCount failed with error {code}: {self._error_text(code)}")
        properties = ctypes.create_string_buffer(_PROPERTIES_BYTES)
        self.call("cudaGetDeviceProperties", properties, 0)
        major, minor, processors = (self._attribute(which) for which in (_MAJOR, _MINOR, _PROCESSORS))
        highest = c_int()
        self.call("cudaDriverGetVersion", ctypes.byref(highest))
        return CudaDevice(
            name=ctypes.string_at(properties).decode("ascii", "replace") or "unnamed GPU",
            compute_capability=f"{major}.{minor}",
            processors=processors,
            driver=" ".join([f"CUDA {highest.value // 1000}.{highest.value % 1000 // 10}", *_driver_version()]),
        )

    def _attribute(self, which: int) -> int:
        value = c_int()
        self.call("cudaDeviceGetAttribute", ctypes.byref(value), which, 0)
        return value.value

    def _error_text(self, code: int) -> str:
        return (self._text(code) or b"unknown").decode("ascii", "replace")


@dataclass(frozen=True, kw_only=True, slots=True)
class PinnedBuffer:
    """One tensor, twice: pinned on the host and on the device.

    Attributes:
        host: the pinned copy; it dies with its lane.
        address: of the copy on the device.
    """

    host: np.ndarray
    address: int


class Lane:
    """One stream, the buffers it copies, and one graph; from one thread at a time.

    Args:
        cuda: the library.

    Raises:
        EngineError: no stream can be made.
    """

    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda
        self._memory: list[tuple[str, int]] = []
        self._graph = self._executable = 0
        self.stream = self._create("cudaStreamCreateWithFlags", _NON_BLOCKING)

    def buffer(self, shape: tuple[int, ...], dtype: Any) -> PinnedBuffer:
        """Allocates a tensor on both sides.

        Raises:
            EngineError: no memory.
        """
        size = max(1, int(np.prod(shape)) * np.dtype(dtype).itemsize)
        pinned = self._create("cudaHostAlloc", size, 0)
        self._memory.append(("cudaFreeHost", pinned))
        address = self._create("cudaMalloc", size)
        self._memory.append(("cudaFree", address))
        raw = (ctypes.c_char * size).from_address(pinned)
        return PinnedBuffer(host=np.frombuffer(raw, dtype, int(np.prod(shape))).reshape(shape), address=address)

    def upload(self, buffer: PinnedBuffer) -> None:
        """Queues host -> device."""
        self._copy(buffer.address, buffer.host.ctypes.data, buffer.host.nbytes, _TO_DEVICE)

    def download(self, buffer: PinnedBuffer) -> None:
        """Queues device -> host."""
        self._copy(buffer.host.ctypes.data, buffer.address, buffer.host.nbytes, _TO_HOST)

    def capture(self, work: Callable[[], None]) -> None:
        """Records what ``work`` queues on the stream as the graph that ``launch`` starts.

        Nothing runs yet.

        Raises:
            EngineError: something in it cannot be captured; the lane works on without a graph.
        """
        self._cuda.call("cudaStreamBeginCapture", self.stream, _THREAD_LOCAL)
        try:
            work()
        except BaseException:
            # the stream must leave capture mode whatever happened, and this call then reports the same failure again
            with suppress(EngineError):
                self._graph = self._create("cudaStreamEndCapture", first=self.stream)
            self._drop_graph()
            raise
        self._graph = self._create("cudaStreamEndCapture", first=self.stream)
        try:
            self._executable = self._create("cudaGraphInstantiateWithFlags", self._graph, 0)
        except EngineError:
            self._drop_graph()
            raise

    @property
    def captured(self) -> bool:
        """Whether there is a graph to launch."""
        return bool(self._executable)

    def launch(self) -> None:
        """Queues the captured graph."""
        self._cuda.call("cudaGraphLaunch", self._executable, self.stream)

    def synchronise(self) -> None:
        """Waits for everything that was queued."""
        self._cuda.call("cudaStreamSynchronize", self.stream)

    def close(self) -> None:
        """Waits, then frees everything once; a second call finds nothing to free."""
        if not self.stream:
            return
        with suppress(EngineError):  # a device that failed reports it again here; freeing goes on
            self.synchronise()
        self._drop_graph()
        stream, self.stream = self.stream, 0
        memory, self._memory = self._memory, []
        for name, handle in [("cudaStreamDestroy", stream), *reversed(memory)]:
            with suppress(EngineError):
                self._cuda.call(name, handle)

    def _drop_graph(self) -> None:
        executable, self._executable = self._executable, 0
        graph, self._graph = self._graph, 0
        for name, handle in (("cudaGraphExecDestroy", executable), ("cudaGraphDestroy", graph)):
            if handle:
                with suppress(EngineError):
                    self._cuda.call(name, handle)

    def _create(self, name: str, *arguments: Any, first: int | None = None) -> int:
        """A call that gives a handle through its first argument, or behind ``first``."""
        handle = c_void_p()
        before = () if first is None else (first,)
        self._cuda.call(name, *before, ctypes.byref(handle), *arguments)
        return int(handle.value or 0)

    def _copy(self, target: int, source: int, size: int, kind: int) -> None:
        self._cuda.call("cudaMemcpyAsync", target, source, size, kind, self.stream)


def open_cuda() -> Cuda:
    """Loads the CUDA runtime.

    Raises:
        MissingExtra: it is nowhere to be found.
        UnsupportedError: what was found is not a CUDA runtime that has the calls needed.
    """
    library = load_library()
    try:
        return Cuda(library)
    except AttributeError as error:
        raise UnsupportedError(f"this CUDA runtime is too old: {error}; CUDA 12 or 13 is needed") from error


def load_library(places: Sequence[str] | None = None) -> Any:
    """The shared library itself.

    Args:
        places: names and paths that are tried in turn, or None for where wheels and systems put it.

    Raises:
        MissingExtra: it is nowhere to be found.
    """
    for place in _places() if places is None else places:
        with suppress(OSError):
            return ctypes.CDLL(place)
    raise MissingExtra("running on an NVIDIA GPU", "nvidia-cuda-runtime", EXTRA)


@contextmanager
def lane(cuda: Cuda) -> Iterator[Lane]:
    """A lane that is closed afterwards."""
    made = Lane(cuda)
    try:
        yield made
    finally:
        made.close()


def _places() -> list[str]:
    """Where the library may lie, in the order in which it is tried."""
    if sys.platform == "win32":  # the DLL of the wheel would need add_dll_directory; not tried by us
        return []
    found = list(LIBRARIES)
    spec = importlib.util.find_spec("nvidia")
    for root in (spec.submodule_search_locations or []) if spec else []:
        found += [
            str(path) for part in ("cu13", "cuda_runtime") for path in Path(root, part, "lib").glob("libcudart.so.*")
        ]
    return [*found, *(str(path) for path in sorted(Path("/usr/local/cuda/lib64").glob("libcudart.so.1[23]")))]


def _driver_version() -> list[str]:
    """The driver's own version, from the kernel module or from Jetson's release file."""
    for place in _DRIVER_FILES:
        with suppress(OSError):
            return [" ".join(Path(place).read_text(encoding="ascii", errors="replace").split("\n")[0].split())[:80]]
    return []


__all__ = [
    "EXTRA",
    "LIBRARIES",
    "SIGNATURES",
    "Cuda",
    "CudaDevice",
    "Lane",
    "PinnedBuffer",
    "lane",
    "load_library",
    "open_cuda",
]
