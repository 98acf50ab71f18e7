"""TensorRT on an NVIDIA GPU.

An engine from this device's cache, pinned buffers, one CUDA graph, no torch.

Loading never builds: without an engine for exactly this GPU, driver and library it says which command makes one. The
copies in, the engine and the copies out are captured once as a CUDA graph; where that cannot be done (parts on a DLA)
they are queued one by one, and the description says so. Threads do not matter to it. It does not know gates; the
outcome that ``tinyusfm-edge build`` stored beside the engine is handed on as it is (``device_gate``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from tinyusfm_runtime.device.forks import ForkMark
from tinyusfm_runtime.engines import EngineConfig, one_line
from tinyusfm_runtime.engines.trt.build import NOT_RUN, heard, import_tensorrt, messages
from tinyusfm_runtime.engines.trt.cache import CachedEngine, EngineCache
from tinyusfm_runtime.engines.trt.cuda import Lane, PinnedBuffer, open_cuda
from tinyusfm_runtime.engines.trt.device import engine_key, model_of
from tinyusfm_runtime.errors import EdgeError, EngineError, MissingExtra, UnsupportedError
from tinyusfm_runtime.graphs.onnx import check
from tinyusfm_runtime.installation import pip_line
from tinyusfm_runtime.plugins import Availability
from tinyusfm_runtime.spec import INPUT_NAME, LOGITS_NAME, ModelSpec

_TYPES = {"UINT8": np.uint8, "FLOAT": np.float32}
"""TensorRT's names of the types that go in and out."""


def available() -> Availability:
    """Tells whether TensorRT engines can run here; never raises."""
    missing = [(name, reason) for name, works, reason, _ in pieces() if not works]
    if missing:
        reason = missing[0][1]
        more = "" if reason.endswith("is not installed") else f"; {NOT_RUN}"
        return Availability(usable=False, reason=reason + more, extra="tensorrt")
    found = "; ".join(reason for _, _, reason, _ in pieces())
    return Availability(usable=True, reason=f"{found}; {NOT_RUN}", extra="tensorrt")


def pieces() -> list[tuple[str, bool, str, str]]:
    """Everything it needs, piece by piece.

    Each with name, whether it is there, what it is or why not, and what brings it.
    """
    return [
        _piece("TensorRT", _library_line, f"{pip_line('tensorrt')} (x86-64), or JetPack's tensorrt"),
        _piece("CUDA runtime", _runtime_line, f"{pip_line('tensorrt')} (x86-64), or JetPack, or CUDA 12/13"),
        _piece("NVIDIA GPU", lambda: open_cuda().device().gpu, "a GPU and its driver"),
    ]


class Engine:
    """One deserialised engine with its context, buffers and graph.

    Args:
        cache: where engines stand; None takes the folder the environment names.
    """

    def __init__(self, cache: EngineCache | None = None) -> None:
        self._cache = cache
        self.device_gate: Mapping[str, Any] | None = None
        """What ``tinyusfm-edge build`` found when it ran the gate on this device, or None if it has not."""
        self._mark = ForkMark()
        self._lane: Lane | None = None
        self._alive: list[Any] = []
        self._context: Any = None
        self._input: PinnedBuffer | None = None
        self._outputs: dict[str, PinnedBuffer] = {}
        self._kept: Any = None
        self._running = self._cancelled = False
        self._description = "TensorRT, not loaded"

    @property
    def description(self) -> str:
        """Library, version, GPU, precision and whether a CUDA graph is used, one line."""
        return self._description

    def load(self, files: Mapping[str, bytes], spec: ModelSpec, config: EngineConfig) -> None:
        """Loads the cached engine and asserts its inputs and outputs (see engine.Engine)."""
        if config.rest_precision == "bf16":
            raise UnsupportedError("this TensorRT engine computes in f32 or f16, not in bf16: take another artefact")
        onnx = model_of(files)
        check(onnx, config.takes or spec.input, spec)
        library, cuda = import_tensorrt(), open_cuda()
        key = engine_key(onnx, library, cuda.device())
        entry = (self._cache or EngineCache()).load(key)
        self.close()
        lane = self._lane = Lane(cuda)
        self._mark = ForkMark()
        try:
            with heard(library) as logger:
                engine = self._deserialise(library, logger, entry)
                _check_interface(library.module, engine, spec)
                self._bind(library.module, engine, lane)
                how = self._prepare(lane, logger)
        except BaseException as error:
            self.close()
            if isinstance(error, EdgeError) or not isinstance(error, Exception):
                raise
            raise EngineError(f"TensorRT cannot load the engine: {one_line(error)}") from error
        gate = entry.gates.get(key.device)
        self.device_gate = gate if isinstance(gate, Mapping) and gate.get("driver") == key.driver else None
        dla = ", DLA" if entry.key.flags.get("dla") else ""
        self._description = f"{library.name} {library.version} on GPU {key.gpu}{dla} {config.rest_precision}, {how}"

    def run(self, tensor: np.ndarray) -> dict[str, np.ndarray]:
        """Computes one answer (see engine.Engine)."""
        if self._lane is None or self._input is None:
            raise EngineError("the TensorRT engine is not loaded")
        self._mark.check("TensorRT")
        host = self._input.host
        if tensor.shape != host.shape or tensor.dtype != host.dtype:
            raise EngineError(f"the engine takes {host.dtype} {host.shape}, not {tensor.dtype} {tensor.shape}")
        self._cancelled, self._running = False, True
        try:
            np.copyto(host, tensor)
            if self._lane.captured:
                self._lane.launch()
            else:
                self._queue(self._lane)
            self._lane.synchronise()
        finally:
            self._running = False
        if self._cancelled:
            raise EngineError("TensorRT: the run was cancelled")
        return {name: buffer.host.copy() for name, buffer in self._outputs.items()}

    def cancel(self) -> None:
        """Discards the answer of a run in progress.

        What a GPU has begun it finishes, within milliseconds.
        """
        if self._running:
            self._cancelled = True

    def close(self) -> None:
        """Frees graph, stream and buffers, then context and engine."""
        lane, self._lane = self._lane, None
        self._input, self._outputs, self.device_gate = None, {}, None
        if lane is not None and not self._mark.forked:  # a GPU's context does not come along
            lane.close()
        self._context = self._kept = None
        while self._alive:
            self._alive.pop()

    def runtime_cache(self) -> bytes:
        """What TensorRT for RTX compiled when this engine was loaded, for the next start.

        Empty elsewhere.
        """
        return b"" if self._kept is None else bytes(self._kept.serialize())

    def _deserialise(self, library: Any, logger: Any, entry: CachedEngine) -> Any:
        trt = library.module
        runtime = trt.Runtime(messages(trt))
        engine = runtime.deserialize_cuda_engine(entry.content["plan"])
        if engine is None:
            cause = logger.errors[-1] if logger.errors else "it gave no reason"
            raise EngineError(f"{library.name} {library.version} does not take the cached engine: {cause}")
        if hasattr(engine, "create_runtime_config") and hasattr(trt, "IRuntimeCache"):
            settings = engine.create_runtime_config()
            self._kept = settings.create_runtime_cache()
            if entry.content.get("runtime"):
                self._kept.deserialize(entry.content["runtime"])
            settings.set_runtime_cache(self._kept)
            self._context = engine.create_execution_context(settings)
        else:
            self._context = engine.create_execution_context()
        if self._context is None:
            raise EngineError("TensorRT could not make an execution context: is the GPU's memory full?")
        self._alive = [runtime, engine]
        return engine

    def _bind(self, trt: Any, engine: Any, lane: Lane) -> None:
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        for name in sorted(names, key=lambda name: name != LOGITS_NAME):  # the logits come first
            buffer = lane.buffer(tuple(engine.get_tensor_shape(name)), _dtype(engine.get_tensor_dtype(name)))
            if not self._context.set_tensor_address(name, buffer.address):
                raise EngineError(f"TensorRT does not take the address of tensor {name!r}")
            if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT:
                self._input = buffer
            else:
                self._outputs[name] = buffer

    def _prepare(self, lane: Lane, logger: Any) -> str:
        """One plain run, in which the library settles what is left open, then the graph.

        How it is run, in words.
        """
        self._queue(lane)
        lane.synchronise()
        try:
            lane.capture(lambda: self._queue(lane))
        except EngineError as error:
            return f"queued without a CUDA graph ({one_line(error)})"
        finally:
            logger.errors.clear()
        return "CUDA graph"

    def _queue(self, lane: Lane) -> None:
        assert self._input is not None
        lane.upload(self._input)
        if not self._context.execute_async_v3(lane.stream):
            raise EngineError("TensorRT could not queue the engine")
        for buffer in self._outputs.values():
            lane.download(buffer)


def _check_interface(trt: Any, engine: Any, spec: ModelSpec) -> None:
    names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
    kinds = {name: (_dtype(engine.get_tensor_dtype(name)), tuple(engine.get_tensor_shape(name))) for name in names}
    inputs = [name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
    if inputs != [INPUT_NAME] or kinds[INPUT_NAME] != (np.uint8, tuple(spec.input.shape)):
        found = {name: kinds[name] for name in inputs}
        raise EngineError(f"the engine's inputs are {found}; the manifest says {INPUT_NAME} uint8 {spec.input.shape}")
    if kinds.get(LOGITS_NAME, (None,))[0] != np.float32:
        raise EngineError(f"the engine has no output {LOGITS_NAME} in float32")


def _dtype(kind: Any) -> Any:
    word = str(kind).rsplit(".", 1)[-1]
    if word not in _TYPES:
        raise EngineError(f"the engine has a tensor of type {word}, which no artefact of ours has")
    return _TYPES[word]


def _library_line() -> str:
    library = import_tensorrt()
    return f"{library.name} {library.version}"


def _runtime_line() -> str:
    open_cuda()
    return "CUDA runtime found"


def _piece(name: str, look: Any, mend: str) -> tuple[str, bool, str, str]:
    try:
        return name, True, look(), ""
    except MissingExtra as error:
        return name, False, f"{error.library} is not installed", mend
    except EdgeError as error:
        return name, False, str(error), mend
    except Exception as error:  # a broken installation may raise anything
        return name, False, f"{name} is broken: {one_line(error)}", mend


__all__ = ["Engine", "available", "pieces"]
