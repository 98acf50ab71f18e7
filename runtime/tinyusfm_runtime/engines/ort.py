"""ONNX Runtime on the CPU: ``model.onnx`` from memory, one provider, no fallback.

The model is checked strictly before the library sees a byte of it (graphs/onnx.py). ONNX Runtime falls back to another
provider silently and reads external weight files from the working directory; both are shut here as well. It computes
in float32 whatever the weights are stored in, so a rest precision of bf16 is refused. It does not check tensor values
(Session does).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from tinyusfm_runtime.engines import EngineConfig, computes_in, one_line
from tinyusfm_runtime.errors import EngineError, MissingExtra, UnsupportedError
from tinyusfm_runtime.graphs.onnx import check
from tinyusfm_runtime.plugins import Availability
from tinyusfm_runtime.spec import LOGITS_NAME, ModelSpec, TensorSpec

PROVIDER = "CPUExecutionProvider"
QUANTISED = b"QuantizeLinear"
"""Operator that every quantised graph holds, as its bytes spell it."""
"""The only provider used, and the one asserted after loading."""
MODEL_FILE = "model.onnx"
"""The one file of an artefact."""
QUIET = "ORT_DISABLE_TELEMETRY"
"""Environment variable that the library reads."""
CHAINS = True
"""This engine runs the later stages of a chain as well, see chain.py."""
_NOWHERE = "/nonexistent/no-external-data"  # external tensors are looked up here, so none is ever found
_ERRORS_ONLY = 4  # ORT_LOGGING_LEVEL_FATAL: what it has to say reaches the user through EngineError


def import_onnxruntime() -> Any:
    """Imports ONNX Runtime with its telemetry off.

    Whoever needs the library takes it from here.

    Official Linux builds since 1.29 report sessions (names, hashes and timings of models) to a collector of their maker
    by a client inside the library, write an id and a database under ``.cache/Microsoft`` of the home folder, and start
    threads for it in the middle of a run. The library reads ``ORT_DISABLE_TELEMETRY`` when it is loaded. A value that
    somebody set stays.

    Raises:
        ImportError: ONNX Runtime is not installed.
    """
    os.environ.setdefault(QUIET, "1")
    import onnxruntime

    if os.environ[QUIET] == "1":
        onnxruntime.disable_telemetry_events()  # a program around us may have loaded it before
    return onnxruntime


def available() -> Availability:
    """Tells whether ONNX Runtime can run here; never raises."""
    try:
        onnxruntime = import_onnxruntime()
        if PROVIDER not in onnxruntime.get_available_providers():
            return Availability(usable=False, reason=f"this onnxruntime has no {PROVIDER}", extra="onnxruntime")
        return Availability(usable=True, reason=f"onnxruntime {onnxruntime.__version__}, CPU", extra="onnxruntime")
    except ImportError:
        return Availability(usable=False, reason="onnxruntime is not installed", extra="onnxruntime")
    except Exception as error:  # a broken installation may raise anything
        return Availability(usable=False, reason=f"onnxruntime is broken: {one_line(error)}", extra="onnxruntime")


class Engine:
    """One ONNX model in one inference session."""

    optimisation = "ORT_ENABLE_ALL"
    """ONNX Runtime's graph optimisation level."""

    def __init__(self) -> None:
        self._library: Any = None
        self._session: Any = None
        self._options: Any = None
        self._outputs: list[str] = []
        self._binding: Any = None
        self._input: np.ndarray = np.zeros(0, np.uint8)
        self._takes = ""
        self._answers: dict[str, np.ndarray] = {}
        self._description = "ONNX Runtime, not loaded"
        self.executed = "each operator as the graph says, the rest f32"
        """What it is computed in: the library does not tell more."""

    @property
    def description(self) -> str:
        """Library, version, provider, precision and threads, one line."""
        return self._description

    def load(self, files: Mapping[str, bytes], spec: ModelSpec, config: EngineConfig) -> None:
        """Builds the session from bytes and asserts provider, inputs and outputs.

        See engine.Engine.
        """
        if config.rest_precision != "f32":
            raise UnsupportedError(
                f"ONNX Runtime computes in f32 on a CPU, not in {config.rest_precision}: take one that rests on f32"
            )
        if set(files) != {MODEL_FILE}:
            raise EngineError(f"ONNX Runtime needs exactly {MODEL_FILE}, got {', '.join(sorted(files)) or 'nothing'}")
        takes = config.takes or spec.input
        check(files[MODEL_FILE], takes, spec)
        try:
            onnxruntime = import_onnxruntime()
        except ImportError as error:
            raise MissingExtra("running an onnx artefact", "onnxruntime", "onnxruntime") from error
        try:
            session = _session(onnxruntime, files[MODEL_FILE], config.threads, self.optimisation)
        except Exception as error:  # onnxruntime has a dozen classes without a common one of its own
            raise EngineError(f"ONNX Runtime cannot load the model: {one_line(error)}") from error
        _check_interface(session, takes)
        self._library, self._session, self._takes = onnxruntime, session, takes.name
        self._outputs = [output.name for output in session.get_outputs()]
        if config.reuse_outputs:
            self._bind(session, takes)
        words = computes_in("f32", quantised=QUANTISED in files[MODEL_FILE])
        self._description = f"ONNX Runtime {onnxruntime.__version__}, {PROVIDER}, {words}, {_threads(config.threads)}"

    def run(self, tensor: np.ndarray) -> dict[str, np.ndarray]:
        """Computes one answer (see engine.Engine)."""
        if self._session is None:
            raise EngineError("the ONNX Runtime engine is not loaded")
        options = self._library.RunOptions()  # a fresh one: a cancelled one stays cancelled
        options.log_severity_level = _ERRORS_ONLY
        self._options = options
        try:
            if self._binding is not None and tensor.shape == self._input.shape and tensor.dtype == self._input.dtype:
                np.copyto(self._input, tensor)
                self._session.run_with_iobinding(self._binding, options)
                return dict(self._answers)
            answers = self._session.run(self._outputs, {self._takes: tensor}, options)
        except Exception as error:
            raise EngineError(f"ONNX Runtime failed: {one_line(error)}") from error
        finally:
            self._options = None
        return dict(zip(self._outputs, answers, strict=True))

    def cancel(self) -> None:
        """Stops a run in progress between two operators (see engine.Engine)."""
        options = self._options
        if options is not None:
            options.terminate = True

    def close(self) -> None:
        """Frees the session."""
        self._session = self._binding = None

    def _bind(self, session: Any, takes: TensorSpec) -> None:
        """Gives input and outputs their place once for all.

        Outputs without a fixed shape stay new ones every time.
        """
        outputs = session.get_outputs()
        if any(o.type != "tensor(float)" or not all(isinstance(side, int) for side in o.shape) for o in outputs):
            return
        binding = session.io_binding()
        self._input = np.zeros(takes.shape, takes.dtype)
        binding.bind_input(takes.name, "cpu", 0, self._input.dtype.type, self._input.shape, self._input.ctypes.data)
        for output in outputs:
            kept = self._answers[output.name] = np.zeros(output.shape, np.float32)
            binding.bind_output(output.name, "cpu", 0, np.float32, kept.shape, kept.ctypes.data)
        self._binding = binding


def _session(onnxruntime: Any, model: bytes, threads: int, optimisation: str) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, optimisation)
    options.log_severity_level = _ERRORS_ONLY
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", _NOWHERE)
    session = onnxruntime.InferenceSession(model, options, providers=[PROVIDER])
    session.disable_fallback()
    return session


def _check_interface(session: Any, takes: TensorSpec) -> None:
    if session.get_providers() != [PROVIDER]:
        raise EngineError(f"asked for {PROVIDER}, got {session.get_providers()}")
    inputs = [(node.name, node.type, list(node.shape)) for node in session.get_inputs()]
    kind = {"float32": "float"}.get(takes.dtype, takes.dtype)
    wanted = [(takes.name, f"tensor({kind})", list(takes.shape))]
    if inputs != wanted:
        raise EngineError(f"the model's inputs are {inputs}; the manifest says {wanted}")
    outputs = [(node.name, node.type) for node in session.get_outputs()]
    if outputs[0] != (LOGITS_NAME, "tensor(float)"):
        raise EngineError(f"the model's first output is {outputs[0]}, not {LOGITS_NAME} in float32")


def _threads(count: int) -> str:
    return f"{count} thread" if count == 1 else f"{count} threads"


__all__ = ["CHAINS", "MODEL_FILE", "PROVIDER", "QUANTISED", "QUIET", "Engine", "available", "import_onnxruntime"]
