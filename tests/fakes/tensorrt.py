"""TensorRT's device side without a GPU, generated from the installed ``tensorrt_rtx``; parsing and building stay real.

Every class that needs a driver (Runtime, ICudaEngine, IExecutionContext, IRuntimeConfig, IRuntimeCache) is faked by the
signatures that the real one carries in its docstrings: a method, property or argument that it lacks is an error, and so
is a value of another type. What an engine computes is its ONNX in ONNX Runtime, through the fake CUDA runtime's memory
and streams. ``edition="tensorrt"`` gives the same without what only TensorRT for RTX has.
"""

from __future__ import annotations

import ctypes
import hashlib
import inspect
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from tests.fakes.cudart import FakeCudart, Operation

RTX_ONLY = ("ComputeCapability", "IRuntimeCache", "IRuntimeConfig")
"""What ``tensorrt`` 10 does not have."""


def real_module() -> Any:
    """The installed TensorRT for RTX."""
    return pytest.importorskip(
        "tensorrt_rtx", reason="tensorrt-rtx is not installed: pip install 'tinyusfm-edge[tensorrt]'"
    )


def signatures(doc: str, name: str) -> list[inspect.Signature]:
    """Signatures that a pybind11 docstring lists, annotations as text.

    Args:
        doc: of a method.
        name: of the method.
    """
    found = []
    for line in doc.splitlines():
        match = re.match(rf"^(?:\d+\. )?{re.escape(name)}\((.*)\)(?: -> .*)?$", line.strip())
        if match and match.group(1) != "*args, **kwargs":
            found.append(inspect.Signature([_parameter(part) for part in _split(match.group(1))]))
    return found


def _split(text: str) -> list[str]:
    parts, depth, start = [], 0, 0
    for index, letter in enumerate(text):
        depth += (letter in "[(<") - (letter in "])>")
        if letter == "," and depth == 0:
            parts.append(text[start:index].strip())
            start = index + 1
    return [*parts, text[start:].strip()] if text.strip() else []


def _parameter(text: str) -> inspect.Parameter:
    declared, _, default = text.partition(" = ")
    name, _, kind = declared.partition(":")
    value = default if default else inspect.Parameter.empty
    return inspect.Parameter(
        name.strip(), inspect.Parameter.POSITIONAL_OR_KEYWORD, default=value, annotation=kind.strip()
    )


def fits(value: Any, annotation: str) -> bool:
    """Whether a value may be handed over where a docstring names a type; unknown types take anything."""
    if annotation == "str":
        return isinstance(value, str)
    if annotation == "bool":
        return isinstance(value, bool)
    if annotation.endswith("SupportsInt"):
        return hasattr(value, "__int__")
    if annotation.endswith("Buffer"):
        return isinstance(value, (bytes, bytearray, memoryview))
    wanted = annotation.replace("::", ".").rpartition(".")[2]
    if hasattr(sys.modules["tensorrt_rtx_bindings.tensorrt_rtx"], wanted):
        return wanted in {kind.__name__ for kind in type(value).__mro__} | {getattr(value, "_name", "")}
    return True


class Fake:
    """An instance of a generated class: only what the real class has, behaving as ``behaviour`` says.

    Args:
        module: the real module.
        name: of the class.
        behaviour: method -> function, property -> value.
        hidden: attributes that this edition lacks.
    """

    def __init__(self, module: Any, name: str, behaviour: dict[str, Any], hidden: tuple[str, ...] = ()) -> None:
        self.__dict__.update(_name=name, _real=getattr(module, name), _behaviour=behaviour, _hidden=hidden)

    def __getattr__(self, name: str) -> Any:
        real, behaviour = self.__dict__["_real"], self.__dict__["_behaviour"]
        if not hasattr(real, name) or name in self.__dict__["_hidden"]:
            raise AttributeError(f"the real {self.__dict__['_name']} has no {name}")
        found = getattr(real, name)
        if isinstance(found, property):
            return behaviour[name]
        if name not in behaviour:
            raise NotImplementedError(f"the fake does not do {self.__dict__['_name']}.{name}")
        return checked(self, signatures(found.__doc__, name), name, behaviour[name])

    def __setattr__(self, name: str, value: Any) -> None:
        found = getattr(self.__dict__["_real"], name, None)
        if not isinstance(found, property) or found.fset is None:
            raise AttributeError(f"the real {self.__dict__['_name']} has no {name} to be set")
        self.__dict__["_behaviour"][name] = value


def checked(owner: Fake, known: list[inspect.Signature], name: str, work: Callable[..., Any]) -> Callable[..., Any]:
    """A method that takes what one of the real signatures takes."""

    def call(*arguments: Any, **named: Any) -> Any:
        for signature in known:
            try:
                bound = signature.bind(owner, *arguments, **named)
            except TypeError:
                continue
            values = {key: value for key, value in bound.arguments.items() if key != "self"}
            if all(fits(value, signature.parameters[key].annotation) for key, value in values.items()):
                return work(*values.values())
        raise TypeError(f"{name} takes {[str(signature) for signature in known]}, not {arguments} {named}")

    return call


@dataclass
class World:
    """What a test may bend.

    Attributes:
        cudart: the fake CUDA runtime.
        capturable: False makes the engine refuse to be captured, as parts on a DLA do.
        shift: added to the logits.
        builds: number of engines built.
        timing: timing caches that builds were given.
        plans: hash of a plan -> its ONNX.
        compiled: what the runtime caches were given to start with.
    """

    cudart: FakeCudart
    capturable: bool = True
    shift: float = 0.0
    builds: int = 0
    timing: list[bytes] = field(default_factory=list)
    plans: dict[str, bytes] = field(default_factory=dict)
    compiled: list[bytes] = field(default_factory=list)


def install(monkeypatch: pytest.MonkeyPatch, *, edition: str = "tensorrt_rtx", version: str = "", **gpu: Any) -> World:
    """Puts the fake library and a fake GPU in place.

    Args:
        monkeypatch: undoes it.
        edition: the module that seems to be installed.
        version: its version; empty keeps the real one.
        gpu: of FakeCudart.
    """
    from tinyusfm_runtime.engines.trt import cuda

    world = World(cudart=FakeCudart(**gpu))
    monkeypatch.setattr(cuda, "load_library", lambda: world.cudart)
    put(monkeypatch, world, edition, version)
    return world


def put(monkeypatch: pytest.MonkeyPatch, world: World, edition: str, version: str = "") -> Any:
    """Puts another edition or version in place, on the same GPU."""
    real = real_module()
    module: Any = ModuleType(edition)
    hidden = RTX_ONLY if edition == "tensorrt" else ()
    module.__dict__.update({k: v for k, v in vars(real).items() if k not in hidden})
    module.__version__ = version or real.__version__
    module.OnnxParser = lambda network, logger: _Parser(real, network, logger)
    module.Builder = lambda logger: _Builder(real, logger, world)
    module.Runtime = lambda logger: _runtime(real, world, logger, rtx=edition != "tensorrt")
    monkeypatch.setitem(sys.modules, "tensorrt", module if edition == "tensorrt" else None)
    monkeypatch.setitem(sys.modules, edition, module)
    return module


class _Parser:
    """The real parser; remembers which ONNX a network came from."""

    sources: dict[int, bytes] = {}

    def __init__(self, real: Any, network: Any, logger: Any) -> None:
        self._network, self._parser = network, real.OnnxParser(network, logger)

    def parse(self, raw: bytes) -> bool:
        self.sources[id(self._network)] = raw
        return bool(self._parser.parse(raw))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._parser, name)


class _Builder:
    """The real builder, aimed at SM86 where it would ask the GPU; the same network is built once a process."""

    made: dict[tuple[str, int], bytes] = {}

    def __init__(self, real: Any, logger: Any, world: World) -> None:
        self._real, self._world, self._builder = real, world, real.Builder(logger)

    def build_serialized_network(self, network: Any, config: Any) -> Any:
        if config.num_compute_capabilities == 0:
            config.num_compute_capabilities = 1
            config.set_compute_capability(self._real.ComputeCapability.SM86, 0)
        source = _Parser.sources[id(network)]
        known = (hashlib.sha256(source).hexdigest(), config.num_compute_capabilities)
        if known not in self.made:
            plan = self._builder.build_serialized_network(network, config)
            if plan is None:
                return None
            self.made[known] = bytes(plan)
        elif (monitor := config.progress_monitor) is not None:
            monitor.phase_start("Building engine", None, 1)
            monitor.step_complete("Building engine", 0)
            monitor.phase_finish("Building engine")
        self._world.builds += 1
        self._world.plans[hashlib.sha256(self.made[known]).hexdigest()] = source
        return self.made[known]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._builder, name)


def _runtime(real: Any, world: World, logger: Any, *, rtx: bool) -> Fake:
    def deserialize(plan: bytes) -> Fake | None:
        onnx = world.plans.get(hashlib.sha256(plan).hexdigest())
        if onnx is None:
            logger.log(real.ILogger.ERROR, "the engine plan file is not compatible with this version or GPU")
            return None
        return _engine(real, world, onnx, rtx=rtx)

    return Fake(real, "Runtime", {"deserialize_cuda_engine": deserialize})


def _engine(real: Any, world: World, onnx: bytes, *, rtx: bool) -> Fake:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    session = onnxruntime.InferenceSession(onnx, options, providers=["CPUExecutionProvider"])
    # the order of tensors is the library's own affair, so the fake turns it round
    tensors = {node.name: node for node in [*reversed(session.get_outputs()), *session.get_inputs()]}
    inputs = {node.name for node in session.get_inputs()}
    kinds = {"tensor(uint8)": real.DataType.UINT8, "tensor(float)": real.DataType.FLOAT}
    modes = real.TensorIOMode

    def cache() -> Fake:
        return Fake(
            real,
            "IRuntimeCache",
            {
                "serialize": lambda: b"compiled kernels",
                "deserialize": lambda raw: not world.compiled.append(bytes(raw)),
            },
        )

    settings = {"create_runtime_cache": cache, "set_runtime_cache": lambda made: True}
    return Fake(
        real,
        "ICudaEngine",
        {
            "num_io_tensors": len(tensors),
            "get_tensor_name": lambda index: list(tensors)[index],
            "get_tensor_mode": lambda name: modes.INPUT if name in inputs else modes.OUTPUT,
            "get_tensor_dtype": lambda name: kinds[tensors[name].type],
            "get_tensor_shape": lambda name: real.Dims(tensors[name].shape),
            "create_runtime_config": lambda: Fake(real, "IRuntimeConfig", settings),
            "create_execution_context": lambda config=None: _context(real, world, session, tensors, inputs),
        },
        hidden=() if rtx else ("create_runtime_config",),
    )


def _context(real: Any, world: World, session: Any, tensors: dict[str, Any], inputs: set[str]) -> Fake:
    addresses: dict[str, int] = {}
    cudart = world.cudart

    def size(name: str) -> int:
        return int(np.prod(tensors[name].shape)) * (1 if name in inputs else 4)

    def compute() -> None:
        (source,) = inputs
        raw = bytes(cudart.view(addresses[source], size(source)))
        image = np.frombuffer(raw, np.uint8).reshape(tensors[source].shape)
        names = [name for name in tensors if name not in inputs]
        for name, value in zip(names, session.run(names, {source: image}), strict=True):
            found = np.ascontiguousarray(value + np.float32(world.shift if name == "logits" else 0.0), np.float32)
            ctypes.memmove(cudart.view(addresses[name], size(name)), found.tobytes(), size(name))

    def execute(stream: int) -> bool:
        if set(addresses) != set(tensors):
            cudart.fault("execute_async_v3 without an address for every tensor")
            return False
        if cudart.streams[stream].captured is not None and not world.capturable:
            cudart.streams[stream].broken = True
            return False
        return cudart.enqueue(stream, Operation("execute_async_v3", compute, tuple(addresses.values()))) == 0

    def set_address(name: str, memory: int) -> bool:
        if name not in tensors:
            return False
        addresses[name] = memory
        return True

    return Fake(real, "IExecutionContext", {"execute_async_v3": execute, "set_tensor_address": set_address})


__all__ = ["Fake", "World", "checked", "fits", "install", "put", "real_module", "signatures"]
