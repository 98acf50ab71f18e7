"""OpenVINO on the CPU: ``model.xml`` and ``model.bin`` from memory, precision always said out loud.

Left alone, OpenVINO computes in bfloat16 wherever the CPU can. Here the precision is set and read
back from the compiled model, and the same is done with the device, the streams and the threads.
Its cache of compiled models is off: it trusts what it finds on the disk. It casts inputs of other
types in silence; Session checks them first.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import numpy as np

from tinyusfm_runtime.engine import INPUT_NAME, LOGITS_NAME, EngineConfig
from tinyusfm_runtime.errors import EngineError, MissingExtra, UnsupportedError
from tinyusfm_runtime.machine import machine_card
from tinyusfm_runtime.plugins import Probe
from tinyusfm_runtime.spec import ModelSpec, TensorSpec

DEVICE = "CPU"
"""The only device used, and the one asserted after loading."""
XML_FILE, BIN_FILE = "model.xml", "model.bin"
"""The two files of an artefact."""
CHAINS = True
"""This engine runs the later stages of a chain as well, see chain.py."""
_TYPES = {"uint8": "u8", "float32": "f32"}


def probe() -> Probe:
    """Tells whether OpenVINO can run here; never raises."""
    try:
        openvino = import_openvino()
        core = openvino.Core()
        if DEVICE not in core.available_devices:
            return Probe(works=False, reason="this openvino has no CPU plug-in", extra="openvino")
        device = core.get_property(DEVICE, "FULL_DEVICE_NAME")
        return Probe(works=True, reason=f"openvino {_version(openvino)}, {device}", extra="openvino")
    except ImportError:
        return Probe(works=False, reason="openvino is not installed", extra="openvino")
    except Exception as error:  # a broken installation may raise anything
        return Probe(works=False, reason=f"openvino is broken: {_one_line(error)}", extra="openvino")


def import_openvino() -> Any:
    """Imports OpenVINO with its telemetry left out; whoever needs the library takes it from here.

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
        self._request: Any = None
        self._compiled: Any = None
        self._input: np.ndarray = np.zeros(0, np.uint8)
        self._outputs: list[tuple[str, Any]] = []
        self._reuse = False
        self._answers: dict[str, np.ndarray] = {}
        self._description = "OpenVINO, not loaded"

    @property
    def description(self) -> str:
        """Library, version, device, precision and threads as the compiled model reports them, one line."""
        return self._description

    def load(self, files: Mapping[str, bytes], spec: ModelSpec, config: EngineConfig) -> None:
        """Compiles the model from bytes and asserts device, precision, inputs and outputs (see engine.Engine)."""
        if set(files) != {XML_FILE, BIN_FILE}:
            got = ", ".join(sorted(files)) or "nothing"
            raise EngineError(f"OpenVINO needs exactly {XML_FILE} and {BIN_FILE}, got {got}")
        if config.rest_precision == "f16":
            raise UnsupportedError("OpenVINO's CPU plug-in computes in f32 or bf16, not in f16: take another artefact")
        try:
            openvino = import_openvino()
        except ImportError as error:
            raise MissingExtra("running an openvino artefact", "openvino", "openvino") from error
        try:
            core = openvino.Core()
            if config.rest_precision == "bf16":
                _require_bf16(core)
            model = core.read_model(model=files[XML_FILE], weights=files[BIN_FILE])
            takes = config.takes or spec.input
            _check_interface(model, takes)
            compiled = core.compile_model(model, DEVICE, _properties(config))
            _check_properties(compiled, config)
            self._bind(openvino, compiled, takes)
            self._reuse = config.reuse_outputs
        except (EngineError, UnsupportedError):
            raise
        except Exception as error:  # openvino raises plain RuntimeError for everything
            raise EngineError(f"OpenVINO cannot load the model: {_one_line(error)}") from error
        threads = compiled.get_property("INFERENCE_NUM_THREADS")
        self._description = (
            f"OpenVINO {_version(openvino)} {DEVICE} {config.rest_precision} "
            f"{threads} thread{'' if threads == 1 else 's'}"
        )

    def run(self, tensor: np.ndarray) -> dict[str, np.ndarray]:
        """Computes one answer (see engine.Engine)."""
        if self._request is None:
            raise EngineError("the OpenVINO engine is not loaded")
        if tensor.shape != self._input.shape or tensor.dtype != self._input.dtype:
            raise EngineError(f"OpenVINO would cast {tensor.dtype} {tensor.shape} in silence, so it is not handed on")
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
            raise EngineError(f"OpenVINO failed: {_one_line(error)}") from error

    def cancel(self) -> None:
        """Stops a run in progress between two operators (see engine.Engine)."""
        request = self._request
        if request is not None:
            request.cancel()

    def close(self) -> None:
        """Frees the request and the compiled model."""
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

    def _bind(self, openvino: Any, compiled: Any, takes: TensorSpec) -> None:
        request = compiled.create_infer_request()
        self._input = np.zeros(takes.shape, takes.dtype)
        request.set_input_tensor(openvino.Tensor(self._input, shared_memory=True))
        self._outputs = [(_name(port), port) for port in compiled.outputs]
        self._compiled, self._request = compiled, request


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


def _version(openvino: Any) -> str:
    return str(openvino.__version__).split("-", 1)[0]


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


__all__ = ["BIN_FILE", "CHAINS", "DEVICE", "XML_FILE", "Engine", "import_openvino", "probe"]
