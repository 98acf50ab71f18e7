"""OpenVINO on the CPU: ``model.xml`` and ``model.bin`` from memory.

The precision is always set explicitly.

OpenVINO chooses its reader by what is in the bytes, and its ONNX reader follows paths and addresses. So the model is
checked strictly first, and OpenVINO is handed what that check wrote (graphs/ir.py).

Of a quantised graph it is counted which layers with weights the CPU plug-in really runs in 8 bits (on Arm some fall
back to float): ``description`` says how many, and a configuration may demand them.

Left alone, OpenVINO computes in bfloat16 wherever the CPU can. Here the precision is set and read
back from the compiled model, and the same is done with the device, the streams and the threads.
Its cache of compiled models is off: it trusts what it finds on the disk. It casts inputs of other
types silently; Session checks them first.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import numpy as np

from tinyusfm_runtime.device.forks import ForkMark
from tinyusfm_runtime.device.machine import machine_card
from tinyusfm_runtime.device.signal_stack import kept_signal_stack
from tinyusfm_runtime.engines import EngineConfig, computes_in, one_line
from tinyusfm_runtime.errors import EngineError, MissingExtra, UnsupportedError
from tinyusfm_runtime.graphs.ir import check
from tinyusfm_runtime.plugins import Availability
from tinyusfm_runtime.spec import INPUT_NAME, LOGITS_NAME, ModelSpec, TensorSpec

DEVICE = "CPU"
"""The only device used, and the one asserted after loading."""
XML_FILE, BIN_FILE = "model.xml", "model.bin"
"""The two files of an artefact."""
CHAINS = True
"""This engine runs the later stages of a chain as well, see chain.py."""
_LEFT: list[Any] = []
_TYPES = {"uint8": "u8", "float32": "f32"}


@kept_signal_stack()
def available() -> Availability:
    """Tells whether OpenVINO can run here; never raises."""
    try:
        openvino = import_openvino()
        core = openvino.Core()
        if DEVICE not in core.available_devices:
            return Availability(usable=False, reason="this openvino has no CPU plug-in", extra="openvino")
        device = core.get_property(DEVICE, "FULL_DEVICE_NAME")
        return Availability(usable=True, reason=f"openvino {library_version(openvino)}, {device}", extra="openvino")
    except ImportError:
        return Availability(usable=False, reason="openvino is not installed", extra="openvino")
    except Exception as error:  # a broken installation may raise anything
        return Availability(usable=False, reason=f"openvino is broken: {one_line(error)}", extra="openvino")


def import_openvino() -> Any:
    """Imports OpenVINO with its telemetry left out.

    Whoever needs the library takes it from here.

    ``import openvino`` alone reports to a web analytics service and leaves an id in the home folder
    (openvino/tools/ovc, seen with 2026.4.1). A None in ``sys.modules`` makes its own ``except
    ImportError`` take the stub that does nothing.

    Raises:
        ImportError: OpenVINO is not installed.
    """
    if "openvino" not in sys.modules:
        sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
    import openvino

    return openvino


class Engine:
    """One compiled model and its one inference request."""

    def __init__(self) -> None:
        self._mark = ForkMark()
        self._request: Any = None
        self._compiled: Any = None
        self._input: np.ndarray = np.zeros(0, np.uint8)
        self._outputs: list[tuple[str, Any]] = []
        self._reuse = False
        self._answers: dict[str, np.ndarray] = {}
        self._description = "OpenVINO, not loaded"
        self.int8_layers: int | None = None
        """Layers with weights that run in 8 bits, or None where the graph is not quantised."""
        self.executed = ""
        """What it is computed in, one line."""

    @property
    def description(self) -> str:
        """What the compiled model reports of itself, one line.

        Library, version, device, precision and threads.
        """
        return self._description

    # OpenVINO replaces the stack when its plug-in is loaded, which a question about properties does as well
    @kept_signal_stack()
    def load(self, files: Mapping[str, bytes], spec: ModelSpec, config: EngineConfig) -> None:
        """Compiles the model from bytes and asserts what it got.

        Device, precision, inputs and outputs (see engine.Engine).
        """
        if set(files) != {XML_FILE, BIN_FILE}:
            got = ", ".join(sorted(files)) or "nothing"
            raise EngineError(f"OpenVINO needs exactly {XML_FILE} and {BIN_FILE}, got {got}")
        if config.rest_precision == "f16":
            raise UnsupportedError("OpenVINO's CPU plug-in computes in f32 or bf16, not in f16: take another artefact")
        takes = config.takes or spec.input
        xml = check(files[XML_FILE], files[BIN_FILE], takes, spec)
        try:
            openvino = import_openvino()
        except ImportError as error:
            raise MissingExtra("running an openvino artefact", "openvino", "openvino") from error
        try:
            core = openvino.Core()
            if config.rest_precision == "bf16":
                _require_bf16(core)
            model = core.read_model(model=xml, weights=files[BIN_FILE])
            _check_interface(model, takes)
            compiled = core.compile_model(model, DEVICE, _properties(config))
            _check_properties(compiled, config)
            self.executed = config.rest_precision
            counted = _count_int8(compiled) if _is_quantised(model) else None
            if counted is not None:
                self._check_int8(counted, config)
            self._bind(openvino, compiled, takes)
            self._reuse = config.reuse_outputs
        except (EngineError, UnsupportedError):
            raise
        except Exception as error:  # openvino raises plain RuntimeError for everything
            raise EngineError(f"OpenVINO cannot load the model: {one_line(error)}") from error
        threads = compiled.get_property("INFERENCE_NUM_THREADS")
        self._description = (
            f"OpenVINO {library_version(openvino)}, {DEVICE}, "
            f"{computes_in(config.rest_precision, quantised=counted is not None)}, "
            f"{threads} thread{'' if threads == 1 else 's'}"
        )
        if counted is not None:
            self._description += f", int8 in {counted[0]} of {counted[1]} layers"

    def run(self, tensor: np.ndarray) -> dict[str, np.ndarray]:
        """Computes one answer (see engine.Engine)."""
        if self._request is None:
            raise EngineError("the OpenVINO engine is not loaded")
        self._mark.check("OpenVINO")
        if tensor.shape != self._input.shape or tensor.dtype != self._input.dtype:
            raise EngineError(f"OpenVINO would cast {tensor.dtype} {tensor.shape} silently, so it is not passed on")
        try:
            np.copyto(self._input, tensor)
            self._request.start_async()
            self._request.wait()
            if not self._reuse:
                return {name: self._request.get_tensor(port).data.copy() for name, port in self._outputs}
            for name, port in self._outputs:
                self._answer(name, self._request.get_tensor(port).data)
            return dict(self._answers)
        except Exception as error:
            raise EngineError(f"OpenVINO failed: {one_line(error)}") from error

    def cancel(self) -> None:
        """Stops a run in progress between two operators (see engine.Engine)."""
        request = self._request
        if request is not None and not self._mark.forked:
            request.cancel()

    @kept_signal_stack()
    def close(self) -> None:
        """Frees the request and the compiled model.

        In a forked child they are left to its end.
        """
        if self._mark.forked:
            _LEFT.append((self._request, self._compiled))  # freeing them would wait for threads that are not there
        self._request = None
        self._compiled = None
        self._outputs = []
        self._answers = {}

    def _answer(self, name: str, data: np.ndarray) -> None:
        """Copies an output into the array kept for it."""
        kept = self._answers.get(name)
        if kept is None or kept.shape != data.shape or kept.dtype != data.dtype:
            self._answers[name] = data.copy()
        else:
            np.copyto(kept, data)

    def _check_int8(self, counted: tuple[int, int], config: EngineConfig) -> None:
        self.int8_layers, layers = counted
        self.executed = f"int8 in {self.int8_layers} of {layers} layers with weights, the rest {config.rest_precision}"
        if self.int8_layers < config.int8_layers:
            raise EngineError(
                f"OpenVINO runs {self.int8_layers} of {layers} layers in int8 here, at least {config.int8_layers} are "
                "demanded: take another artefact, or allow it to compute in float"
            )

    def _bind(self, openvino: Any, compiled: Any, takes: TensorSpec) -> None:
        request = compiled.create_infer_request()
        self._input = np.zeros(takes.shape, takes.dtype)
        request.set_input_tensor(openvino.Tensor(self._input, shared_memory=True))
        self._outputs = [(_name(port), port) for port in compiled.outputs]
        self._compiled, self._request = compiled, request
        self._mark = ForkMark()


def _properties(config: EngineConfig) -> dict[str, Any]:
    return {
        "INFERENCE_PRECISION_HINT": config.rest_precision,
        # PERFORMANCE, since ACCURACY would choose a precision of its own
        "EXECUTION_MODE_HINT": "PERFORMANCE",
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        "INFERENCE_NUM_THREADS": config.threads,
        # pinned threads of two programs meet on core 0; the operating system places them better
        "ENABLE_CPU_PINNING": False,
        "CACHE_DIR": "",
    }


def _check_properties(compiled: Any, config: EngineConfig) -> None:
    devices = list(compiled.get_property("EXECUTION_DEVICES"))
    if devices != [DEVICE]:
        raise EngineError(f"asked OpenVINO for {DEVICE}, got {devices}")
    precision = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
    if precision != config.rest_precision:
        raise EngineError(f"asked OpenVINO for {config.rest_precision}, got {precision}")
    threads = compiled.get_property("INFERENCE_NUM_THREADS")
    if threads > config.threads:
        raise EngineError(f"asked OpenVINO for {config.threads} threads, got {threads}")


def _require_bf16(core: Any) -> None:
    listed = core.get_property(DEVICE, "OPTIMIZATION_CAPABILITIES")
    card = machine_card()
    # OpenVINO emulates bf16 on CPUs that have only AVX-512; where the features are known they decide as well
    if "BF16" not in listed or (card.features and not card.has_bf16):
        raise UnsupportedError(f"{card.cpu} does not compute bf16: use an artefact whose rest is f32")


def _is_quantised(model: Any) -> bool:
    return any(node.get_type_name() == "FakeQuantize" for node in model.get_ops())


def _count_int8(compiled: Any) -> tuple[int, int]:
    """(layers with weights that run in 8 bits, layers with weights)."""
    ran, layers = 0, 0
    for node in compiled.get_runtime_model().get_ops():
        kind, primitive = (node.rt_info[key].astype(str) for key in ("layerType", "primitiveType"))
        if kind.startswith(("Convolution", "FullyConnected")):
            layers += 1
            ran += primitive.rpartition("_")[2].lower() in ("i8", "u8")
    return ran, layers


@kept_signal_stack()
def int8_here() -> str:
    """Whether quantised layers run in 8 bits on this machine, in words.

    A linear layer and a convolution are tried in the CPU plug-in. Never raises.
    """
    try:
        core, found = import_openvino().Core(), []
        for name, make in (("linear", _small_linear), ("convolution", _small_convolution)):
            compiled = core.compile_model(make(), DEVICE, {"INFERENCE_NUM_THREADS": 1})
            ran, layers = _count_int8(compiled)
            found.append(f"{name} {'int8' if ran == layers and layers else 'float'}")
        return "quantised layers run as " + ", ".join(found)
    except Exception as error:  # a broken installation may raise anything
        return f"cannot tell how quantised layers run: {one_line(error, 80)}"


def _quantised(ops: Any, node: Any, low: float, high: float) -> Any:
    bounds = [ops.constant(np.float32(value)) for value in (low, high, low, high)]
    return ops.fake_quantize(node, *bounds, 256 if low >= 0 else 255)


def _small_linear() -> Any:
    ops = import_openvino().opset13
    given = ops.parameter([1, 32, 64], np.float32)
    weights = ops.constant(np.linspace(-1, 1, 64 * 64, dtype=np.float32).reshape(64, 64))
    product = ops.matmul(_quantised(ops, given, 0.0, 4.0), _quantised(ops, weights, -1.0, 1.0), False, True)
    return import_openvino().Model([ops.result(product)], [given], "linear")


def _small_convolution() -> Any:
    ops = import_openvino().opset13
    given = ops.parameter([1, 32, 16, 16], np.float32)
    weights = ops.constant(np.linspace(-1, 1, 32 * 32 * 9, dtype=np.float32).reshape(32, 32, 3, 3))
    first, second = _quantised(ops, given, 0.0, 4.0), _quantised(ops, weights, -1.0, 1.0)
    product = ops.convolution(first, second, [1, 1], [1, 1], [1, 1], [1, 1])
    return import_openvino().Model([ops.result(product)], [given], "convolution")


def _check_interface(model: Any, takes: TensorSpec) -> None:
    inputs = [(_name(port), _type(port), str(port.get_partial_shape())) for port in model.inputs]
    shape = f"[{','.join(str(side) for side in takes.shape)}]"
    kind = _TYPES.get(takes.dtype, takes.dtype)
    if inputs != [(takes.name, kind, shape)]:
        raise EngineError(f"the model's inputs are {inputs}; the manifest says {takes.name} {kind} {shape}")
    first = model.outputs[0]
    got = (_name(first), _type(first))
    if got != (LOGITS_NAME, "f32"):
        raise EngineError(f"the model's first output is {got}, not {LOGITS_NAME} in float32")


def _name(port: Any) -> str:
    """The tensor's name; OpenVINO keeps a set of them, of which ours is one."""
    found = sorted(port.get_names())
    for wanted in (INPUT_NAME, LOGITS_NAME):
        if wanted in found:
            return wanted
    if not found:
        raise EngineError("the model has a tensor without a name")
    return found[0]


def _type(port: Any) -> str:
    return str(port.get_element_type().get_type_name())


def library_version(openvino: Any) -> str:
    """Version of the library, without the build behind the dash."""
    return str(openvino.__version__).split("-", 1)[0]


__all__ = [
    "BIN_FILE",
    "CHAINS",
    "DEVICE",
    "XML_FILE",
    "Engine",
    "available",
    "import_openvino",
    "int8_here",
    "library_version",
]
