"""One engine in one process, asked over stdin and answering over stdout, one JSON document a line.

``python engine_worker.py '{"kind": "artefact", ...}'``. Requests: ``{"do": "time", "warm": 4, "runs": 20}`` gives
samples in ms, ``{"do": "answers", "out": FILE}`` writes the logits of all frames, ``{"do": "card"}`` describes the
engine, ``{"do": "cpu"}`` gives the CPU seconds used so far, and end of input ends the process. The kinds:

* ``eager``: the student in PyTorch, normalised float input.
* ``compiled``: the same by ``torch.compile``, compiled before the first answer.
* ``litert``: a .tflite file in LiteRT, normalised float input.
* ``ncnn``: a .param file with its .bin in ncnn, normalised float input.
* ``onnx``: any ONNX of the same network in ONNX Runtime, float32.
* ``openvino``: any ONNX or IR of the same network in OpenVINO, precision named.
* ``artefact``: one artefact of a bundle in the runtime's own engine, uint8 input.
* ``session``: whole 1080p RGB frames through ``Session.predict``, with every stage.
* ``typical``: the same frames through OpenCV's area resize, numpy and ONNX Runtime float32.

Each kind imports its own libraries and no others, so memory and threads are its own. It does not know rounds.

Shapes: SNCHW uint8 inputs; SHWC frames.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np


class Case(Protocol):
    """One prepared engine."""

    description: str
    stages: tuple[str, ...]

    def run(self, index: int) -> tuple[float, ...]:
        """Computes frame ``index`` (modulo their number); ms of each stage."""
        ...

    def logits(self, index: int) -> np.ndarray:
        """Logits of frame ``index``, float32."""
        ...

    def count(self) -> int:
        """How many frames there are."""
        ...


class TensorCase:
    """A function from a prepared input to logits."""

    stages: tuple[str, ...] = ("infer",)

    def __init__(self, call: Callable[[Any], np.ndarray], inputs: list[Any], description: str) -> None:
        self._call, self._inputs, self.description = call, inputs, description

    def count(self) -> int:
        return len(self._inputs)

    def run(self, index: int) -> tuple[float, ...]:
        value = self._inputs[index % len(self._inputs)]
        started = time.perf_counter()
        self._call(value)
        return (1e3 * (time.perf_counter() - started),)

    def logits(self, index: int) -> np.ndarray:
        return np.array(self._call(self._inputs[index]), np.float32)


def _normalised(job: dict[str, Any]) -> list[np.ndarray]:
    """Float inputs of the unchanged net: three equal channels, normalised outside the timing."""
    mean, std = (np.array(job[key], np.float32).reshape(1, 3, 1, 1) for key in ("mean", "std"))
    return [(code.astype(np.float32).repeat(3, axis=1) / 255 - mean) / std for code in _codes(job)]


def _codes(job: dict[str, Any]) -> list[np.ndarray]:
    with np.load(job["inputs"], allow_pickle=False) as arrays:
        return list(arrays["codes_SNCHW"])


def eager(job: dict[str, Any]) -> Case:
    """The student in PyTorch."""
    return _by_torch(job, "eager", lambda module: module)


def compiled(job: dict[str, Any]) -> Case:
    """The student by torch.compile with its defaults."""
    import torch

    return _by_torch(job, "compile", torch.compile)


def _by_torch(job: dict[str, Any], how: str, made: Callable[[Any], Any]) -> Case:
    """The student's module in PyTorch, ``made`` into what is called."""
    import torch

    from tinyusfm_edge.models.checkpoint import load_student_file

    torch.set_num_threads(job["threads"])
    module = made(load_student_file(job["student"]).module.eval())

    def call(value: torch.Tensor) -> np.ndarray:
        with torch.inference_mode():
            logits: torch.Tensor = module(value)
            return logits.numpy()

    inputs = [torch.from_numpy(value) for value in _normalised(job)]
    return TensorCase(call, inputs, f"PyTorch {torch.__version__} {how} float32")


def litert(job: dict[str, Any]) -> Case:
    """A stock .tflite file."""
    from importlib import metadata

    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_path=job["model"], num_threads=job["threads"])
    interpreter.allocate_tensors()
    into, out = interpreter.get_input_details()[0], interpreter.get_output_details()[0]

    def call(value: np.ndarray) -> np.ndarray:
        interpreter.set_tensor(into["index"], value)
        interpreter.invoke()
        return np.asarray(interpreter.get_tensor(out["index"]))

    return TensorCase(call, _normalised(job), f"ai-edge-litert {metadata.version('ai-edge-litert')}")


def ncnn(job: dict[str, Any]) -> Case:
    """A stock ncnn model: FILE.param with FILE.bin beside it."""
    import ncnn as library

    network = library.Net()
    network.opt.num_threads = job["threads"]
    path = Path(job["model"])
    if network.load_param(str(path)) or network.load_model(str(path.with_suffix(".bin"))):
        raise ValueError(f"ncnn cannot load {path.name}")

    def call(value: np.ndarray) -> np.ndarray:
        with network.create_extractor() as extractor:
            extractor.input(network.input_names()[0], library.Mat(np.ascontiguousarray(value[0])).clone())
            return np.array(extractor.extract(network.output_names()[0])[1])[None]

    return TensorCase(call, _normalised(job), f"ncnn {library.__version__}")


def onnx(job: dict[str, Any]) -> Case:
    """An ONNX file in ONNX Runtime, plain options."""
    session, name, version = _ort_session(job["model"], job["threads"])
    return TensorCase(
        lambda value: np.asarray(session.run(None, {name: value})[0]),
        _normalised(job),
        f"onnxruntime {version} CPUExecutionProvider",
    )


def _ort_session(model: str, threads: int) -> tuple[Any, str, str]:
    from tinyusfm_runtime.engines.ort import import_onnxruntime

    onnxruntime = import_onnxruntime()

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return session, session.get_inputs()[0].name, onnxruntime.__version__


def openvino(job: dict[str, Any]) -> Case:
    """An ONNX or IR file in OpenVINO; only precision and threads are set."""
    from tinyusfm_runtime.engines.ov import import_openvino

    library = import_openvino()
    settings = {"INFERENCE_PRECISION_HINT": job["rest_precision"], "INFERENCE_NUM_THREADS": job["threads"]}
    compiled = library.Core().compile_model(job["model"], "CPU", {**settings, "PERFORMANCE_HINT": "LATENCY"})
    request = compiled.create_infer_request()

    def call(value: np.ndarray) -> np.ndarray:
        request.infer({0: value}, share_inputs=True)
        return np.asarray(request.get_output_tensor(0).data)

    return TensorCase(call, _normalised(job), f"openvino {library.__version__.split('-')[0]} {job['rest_precision']}")


def artefact(job: dict[str, Any]) -> Case:
    """An artefact of a bundle in the runtime's engine."""
    from tinyusfm_runtime import plugins
    from tinyusfm_runtime.bundle.reader import Bundle
    from tinyusfm_runtime.engines import EngineConfig
    from tinyusfm_runtime.spec import LOGITS_NAME

    bundle = Bundle.open(job["bundle"])
    found = next(a for a in bundle.manifest.artefacts if a.name == job["artefact"])
    engine = plugins.load("engines", found.engine).Engine()
    config = EngineConfig(threads=job["threads"], rest_precision=found.rest_precision)
    engine.load(bundle.artefact_files(found), bundle.manifest.spec, config)
    return TensorCase(lambda value: np.asarray(engine.run(value)[LOGITS_NAME]), _codes(job), engine.description)


class FrameCase:
    """Frames through a pipeline that reports its stages."""

    stages: tuple[str, ...] = ("preprocess", "infer", "postprocess", "total")

    def __init__(self, call: Callable[[int], tuple[float, ...]], count: int, description: str) -> None:
        self._call, self._count, self.description = call, count, description

    def count(self) -> int:
        return self._count

    def run(self, index: int) -> tuple[float, ...]:
        return self._call(index % self._count)

    def logits(self, index: int) -> np.ndarray:
        raise ValueError("a pipeline gives masks; ask its engine for logits")


def _images(job: dict[str, Any]) -> list[np.ndarray]:
    with np.load(job["images"], allow_pickle=False) as arrays:
        return list(arrays["rgb_SHWC"])


def session(job: dict[str, Any]) -> Case:
    """Frames through a session of the runtime."""
    from tinyusfm_runtime.frame import Frame, PixelFormat
    from tinyusfm_runtime.session import Session

    images = _images(job)
    frames = [Frame(pixels=p, pixel_format=PixelFormat.RGB, spacing_mm=(0.1, 0.1)) for p in images]
    target, _, precision = job["artefact"].partition("-")
    opened = Session.open(
        job["bundle"], target=target, precision=precision, threads=job["threads"], allow_unverified=True
    )

    def call(index: int) -> tuple[float, ...]:
        times = opened.predict(frames[index]).timings
        return times.preprocess_ms, times.infer_ms, times.postprocess_ms, times.total_ms

    return FrameCase(call, len(frames), opened.description)


def typical(job: dict[str, Any]) -> Case:
    """What people write first: OpenCV's area resize, numpy normalisation, ONNX Runtime float32, threshold."""
    import cv2

    cv2.setNumThreads(job["threads"])
    ort, name, version = _ort_session(job["model"], job["threads"])
    mean, std = (np.array(job[key], np.float32) for key in ("mean", "std"))
    images = _images(job)

    def call(index: int) -> tuple[float, ...]:
        laps = [time.perf_counter()]
        small = cv2.resize(images[index], (job["width"], job["height"]), interpolation=cv2.INTER_AREA)
        value = ((small.astype(np.float32) / 255 - mean) / std).transpose(2, 0, 1)[None]
        laps.append(time.perf_counter())
        logits = ort.run(None, {name: np.ascontiguousarray(value)})[0]
        laps.append(time.perf_counter())
        (logits > 0).astype(np.uint8)
        laps.append(time.perf_counter())
        return (*(1e3 * (b - a) for a, b in zip(laps, laps[1:], strict=False)), 1e3 * (laps[-1] - laps[0]))

    return FrameCase(call, len(images), f"OpenCV {cv2.__version__} + onnxruntime {version}")


KINDS: dict[str, Callable[[dict[str, Any]], Case]] = {
    "eager": eager,
    "compiled": compiled,
    "litert": litert,
    "ncnn": ncnn,
    "onnx": onnx,
    "openvino": openvino,
    "artefact": artefact,
    "session": session,
    "typical": typical,
}
"""Name -> function that prepares a case."""


def peak_rss_mb() -> float:
    """Largest resident memory of this process so far.

    Linux hands ``ru_maxrss`` of the parent on to a child, so VmHWM is read where there is one.
    """
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return int(status.split("VmHWM:")[1].split()[0]) / 1024
    except (OSError, IndexError, ValueError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def serve(case: Case, load_ms: float) -> None:
    """Answers requests until the input ends."""
    position = 0
    answers = os.fdopen(os.dup(1), "w")
    # whatever a library prints goes to stderr, so that answers stay JSON
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        if request["do"] == "time":
            for _ in range(request["warm"]):
                case.run(position)
            rows = [case.run(position + index) for index in range(request["runs"])]
            position += request["runs"]
            reply: dict[str, Any] = dict(zip(case.stages, map(list, zip(*rows, strict=True)), strict=True))
        elif request["do"] == "answers":
            logits = np.concatenate([case.logits(index) for index in range(case.count())])
            np.savez(request["out"], logits=logits)
            reply = {"shape": logits.shape}
        elif request["do"] == "card":
            reply = {
                "description": case.description,
                "load_ms": load_ms,
                "peak_rss_mb": peak_rss_mb(),
                "torch": "torch" in sys.modules,
            }
        else:
            reply = {"seconds": time.process_time()}
        answers.write(json.dumps(reply) + "\n")
        answers.flush()


def main() -> None:
    """Command line of the worker."""
    job = json.loads(sys.argv[1])
    started = time.perf_counter()
    case = KINDS[job["kind"]](job)
    case.run(0)
    serve(case, 1e3 * (time.perf_counter() - started))


if __name__ == "__main__":
    main()
