"""What many tests share: a tiny segmentation model in every engine's form, and bundles made of it.

The model blurs a 64x64 image and asks where it is bright; it is computed in numpy too, so that a
bundle, a session and their failures can be tested without any inference library (``plug_in``).
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.plugged import plug_in_module, plugged
from tinyusfm_runtime.bundle.arrays import pack_arrays
from tinyusfm_runtime.bundle.golden import pack_golden
from tinyusfm_runtime.bundle.manifest import Artefact, ArtefactState, file_entry
from tinyusfm_runtime.bundle.reader import GOLDEN_FRAMES, GOLDEN_REFERENCE
from tinyusfm_runtime.bundle.writer import write_bundle
from tinyusfm_runtime.device.machine import machine_card
from tinyusfm_runtime.device.signal_stack import signal_stack
from tinyusfm_runtime.engines import EngineConfig
from tinyusfm_runtime.errors import EngineError
from tinyusfm_runtime.frame import Frame
from tinyusfm_runtime.numerics.preprocess import preprocess
from tinyusfm_runtime.phantom import make_phantom
from tinyusfm_runtime.spec import ModelSpec, PostProcess, PreprocessSpec, Task

# importing OpenVINO reports to a web analytics service (see engines/ov.py); tests import it in many places
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
# so does ONNX Runtime, from inside its library (see engines/ort.py)
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

SIDE = 64
"""Side of the tiny model's input."""
REACH = 3
"""The blur averages a square of 2 * REACH + 1 pixels."""
GOLDEN_SEEDS = tuple(range(8))
"""Phantoms in a test bundle; a real one holds 32 or more."""
LIBRARY = {
    "ort": "onnxruntime",
    "ov": "openvino",
    "trt": "tensorrt-rtx",
    "coreml": "coremltools",
    "litert": "ai_edge_litert",
}
"""Engine -> distribution; of those that tests can run, as it is imported."""
TARGET = {"ort": "onnx", "ov": "openvino", "trt": "tensorrt", "coreml": "coreml", "litert": "litert", "fake": "fake"}
"""Engine -> target."""


def tiny_spec(**changes: Any) -> ModelSpec:
    """Spec of the tiny model."""
    values: dict[str, Any] = {
        "name": "tiny",
        "task": Task.SEGMENT,
        "labels": ("head",),
        "preprocess": PreprocessSpec(height=SIDE, width=SIDE),
        "postprocess": PostProcess.ELLIPSE_HC,
    }
    return ModelSpec(**{**values, **changes})


def tiny_kernel() -> np.ndarray:
    """The blur, 1x1xSxS float32, sum 1, not symmetric, so that a flipped axis would show."""
    side = 2 * REACH + 1
    kernel = np.random.default_rng(5).uniform(0.5, 1.5, (1, 1, side, side))
    return (kernel / kernel.sum()).astype(np.float32)


def tiny_logits(tensor: np.ndarray) -> np.ndarray:
    """The tiny model in numpy: uint8 NCHW -> float32 1x1xHxW."""
    scaled = tensor[0, 0].astype(np.float32) / np.float32(255)
    padded = np.pad(scaled, REACH)
    windows = np.lib.stride_tricks.sliding_window_view(padded, (2 * REACH + 1, 2 * REACH + 1))
    blurred = np.einsum("hwij,ij->hw", windows, tiny_kernel()[0, 0])
    return ((blurred - np.float32(0.3)) * np.float32(20)).astype(np.float32)[None, None]


def tiny_scores(tensor: np.ndarray) -> np.ndarray:
    """A tiny classifier in numpy, no head or head by the brightest block of 8x8: uint8 NCHW -> float32 1x2."""
    blocks = tensor[0, 0].astype(np.float32).reshape(SIDE // 8, 8, SIDE // 8, 8).mean(axis=(1, 3))
    margin = (blocks.max() / np.float32(255) - np.float32(0.3)) * np.float32(20)
    return np.array([[-margin, margin]], np.float32)


def gate_spec(**changes: Any) -> ModelSpec:
    """Spec of the tiny classifier."""
    values = {"name": "gate", "task": Task.CLASSIFY, "labels": ("no head", "head"), "postprocess": PostProcess.NONE}
    return tiny_spec(**{**values, **changes})


def tiny_onnx() -> bytes:
    """The tiny model as ONNX, with an auxiliary output ``pooled``."""
    onnx = pytest.importorskip("onnx", reason="onnx is not installed: pip install 'tinyusfm-edge[export]'")
    helper, to_tensor = onnx.helper, onnx.numpy_helper.from_array
    nodes = [
        helper.make_node("Cast", ["image"], ["floats"], to=onnx.TensorProto.FLOAT),
        helper.make_node("Div", ["floats", "white"], ["scaled"]),
        helper.make_node("Conv", ["scaled", "kernel"], ["blurred"], pads=[REACH] * 4),
        helper.make_node("Sub", ["blurred", "level"], ["raised"]),
        helper.make_node("Mul", ["raised", "gain"], ["logits"]),
        helper.make_node("GlobalAveragePool", ["blurred"], ["pooled"]),
    ]
    shape = [1, 1, SIDE, SIDE]
    values = {"white": 255.0, "level": 0.3, "gain": 20.0}
    weights = [to_tensor(np.float32(value), name) for name, value in values.items()]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("image", onnx.TensorProto.UINT8, shape)],
        [
            helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, shape),
            helper.make_tensor_value_info("pooled", onnx.TensorProto.FLOAT, [1, 1, 1, 1]),
        ],
        [*weights, to_tensor(tiny_kernel(), "kernel")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


def tiny_openvino(folder: Path) -> tuple[bytes, bytes]:
    """The tiny model as OpenVINO IR (xml, bin), with an auxiliary output ``pooled``."""
    ov = pytest.importorskip("openvino", reason="openvino is not installed: pip install 'tinyusfm-edge[openvino]'")
    ops = ov.opset13
    image = ops.parameter([1, 1, SIDE, SIDE], ov.Type.u8, name="image")
    scaled = ops.divide(ops.convert(image, "f32"), np.float32(255))
    pads = [REACH, REACH]
    blurred = ops.convolution(scaled, ops.constant(tiny_kernel()), [1, 1], pads, pads, [1, 1])
    logits = ops.multiply(ops.subtract(blurred, np.float32(0.3)), np.float32(20))
    pooled = ops.reduce_mean(blurred, ops.constant(np.array([2, 3], np.int64)), keep_dims=True)
    named = {"image": image, "logits": logits, "pooled": pooled}
    for name, node in named.items():
        node.output(0).set_names({name})
    results = [ops.result(logits), ops.result(pooled)]
    ov.save_model(ov.Model(results, [image], "tiny"), folder / "model.xml", compress_to_fp16=False)
    return (folder / "model.xml").read_bytes(), (folder / "model.bin").read_bytes()


def tiny_litert() -> bytes:
    """The tiny model as LiteRT, with an auxiliary output ``pooled``."""
    pytest.importorskip("tflite", reason="tflite is not installed: pip install 'tinyusfm-edge[litert]'")
    from tinyusfm_export.targets.litert.flatbuffer import ModelFile

    file, square, last = ModelFile("tiny"), (1, 1, SIDE, SIDE), (1, SIDE, SIDE, 1)
    names = {"image": square, "floats": square, "map": last, "scaled": last, "blurred": last, "raised": last}
    names |= {"large": last, "logits": square, "mean": (1, 1, 1, 1)}
    t = {n: file.tensor(n, shape, "uint8" if n == "image" else "float32") for n, shape in names.items()}
    file.tensors[t["mean"]].name = "pooled"

    def number(value: float) -> int:
        return file.constant("number", np.asarray([value], np.float32))

    def whole(*values: int) -> int:
        return file.constant("numbers", np.asarray(values, np.int32))

    kernel, none = file.constant("kernel", tiny_kernel()[0, 0][None, :, :, None]), number(0.0)
    sides = {"Padding": 0, "StrideW": 1, "StrideH": 1, "DilationWFactor": 1, "DilationHFactor": 1}
    file.operator("CAST", [t["image"]], [t["floats"]])
    file.operator("RESHAPE", [t["floats"], whole(*last)], [t["map"]])
    file.operator("DIV", [t["map"], number(255.0)], [t["scaled"]])
    file.operator("CONV_2D", [t["scaled"], kernel, none], [t["blurred"]], **sides)
    file.operator("SUB", [t["blurred"], number(0.3)], [t["raised"]])
    file.operator("MUL", [t["raised"], number(20.0)], [t["large"]])
    file.operator("RESHAPE", [t["large"], whole(*square)], [t["logits"]])
    file.operator("MEAN", [t["blurred"], whole(1, 2)], [t["mean"]], KeepDims=True)
    return file.finish([t["image"]], [t["logits"], t["mean"]])


class NumpyEngine:
    """An engine without a library: the tiny model in numpy. Attributes bend it for a test."""

    made: list[NumpyEngine] = []
    bend: Callable[[dict[str, np.ndarray]], Any] = staticmethod(lambda outputs: outputs)

    def __init__(self) -> None:
        self.closed = self.cancelled = False
        self.runs = 0
        self.files: Mapping[str, bytes] = {}
        self.config: EngineConfig | None = None
        self.spec = tiny_spec()
        NumpyEngine.made.append(self)

    @property
    def description(self) -> str:
        return f"numpy {np.__version__}"

    def load(self, files: Mapping[str, bytes], spec: ModelSpec, config: EngineConfig) -> None:
        self.files, self.spec, self.config = dict(files), spec, config

    def run(self, tensor: np.ndarray) -> dict[str, np.ndarray]:
        if self.closed:
            raise EngineError("used after close")
        self.runs += 1
        return NumpyEngine.bend({"logits": _answers(self.spec)(tensor)})

    def cancel(self) -> None:
        self.cancelled = True

    def close(self) -> None:
        self.closed = True


def _answers(spec: ModelSpec) -> Callable[[np.ndarray], np.ndarray]:
    return tiny_scores if spec.task is Task.CLASSIFY else tiny_logits


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Everything ``write_bundle`` asks for; ``publish`` calls it."""

    spec: ModelSpec
    artefacts: tuple[Artefact, ...]
    files: Mapping[str, bytes]
    tools: Mapping[str, str] = field(default_factory=lambda: {"tinyusfm-edge": "0.0.test"})

    def publish(self, path: Path, **changes: Any) -> Path:
        """Publishes these parts."""
        values: dict[str, Any] = {
            "spec": self.spec,
            "artefacts": self.artefacts,
            "weights_sha256": "0" * 64,
            "calibration_id": None,
            "tools": self.tools,
            "files": self.files,
            "created_utc": "2026-01-01T00:00:00Z",
        }
        return write_bundle(path, **{**values, **changes})

    def with_artefact(self, **changes: Any) -> Parts:
        """The same parts with the first artefact changed."""
        return replace(self, artefacts=(replace(self.artefacts[0], **changes), *self.artefacts[1:]))

    def with_files(self, **files: bytes) -> Parts:
        """The same parts with more files, or others; ``__`` in a name stands for a slash, ``_dot_`` for a dot."""
        named = {name.replace("__", "/").replace("_dot_", "."): content for name, content in files.items()}
        return replace(self, files={**self.files, **named})


if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # jobs that a shell puts into the background ignore Ctrl-C, and so would every child that a test starts
    signal.signal(signal.SIGINT, signal.default_int_handler)


def child_environment(**changes: str) -> dict[str, str]:
    """The environment of a process that finds the packages this one finds."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path), **changes}


def golden_frames() -> dict[str, np.ndarray]:
    """Arrays of ``golden/frames.safetensors`` for the test bundles."""
    phantoms = [make_phantom(seed, height=96, width=128) for seed in GOLDEN_SEEDS]
    return {
        "pixels": np.stack([phantom.frame.pixels for phantom in phantoms]),
        "spacing_mm": np.array([phantom.frame.spacing_mm for phantom in phantoms]),
        "seeds": np.array(GOLDEN_SEEDS, np.int64),
    }


def make_parts(artefact_files: Mapping[str, Mapping[str, bytes]], spec: ModelSpec | None = None) -> Parts:
    """Parts of a bundle whose artefacts all compute the tiny model, or the tiny classifier where the spec says so.

    Args:
        artefact_files: engine -> file name -> content, best first.
        spec: another spec, should the test need one.
    """
    spec = spec or tiny_spec()
    arrays = golden_frames()
    frames = [
        Frame(pixels=pixels, spacing_mm=tuple(mm))
        for pixels, mm in zip(arrays["pixels"], arrays["spacing_mm"], strict=True)
    ]
    prepared = [preprocess(frame, spec.preprocess) for frame in frames]
    logits = np.concatenate([_answers(spec)(tensor) for tensor, _ in prepared])
    files = {
        GOLDEN_FRAMES: pack_arrays(arrays),
        GOLDEN_REFERENCE: pack_golden(logits, spec, prepared),
        "reports/parity.json": b"{}\n",
    }
    artefacts = []
    for engine, content in artefact_files.items():
        artefact = _artefact(engine, content)
        files |= {path: content[path.rsplit("/", 1)[-1]] for path in artefact.files}
        files[artefact.golden] = pack_golden(logits.astype(np.float16), spec, prepared)
        artefacts.append(artefact)
    return Parts(spec=spec, artefacts=tuple(artefacts), files=files)


def _artefact(engine: str, content: Mapping[str, bytes]) -> Artefact:
    target = TARGET[engine]
    return Artefact(
        target=target,
        engine=engine,
        precision="fp32",
        rest_precision="f32",
        form="plain float",
        files={f"artefacts/{target}-fp32/{name}": file_entry(raw) for name, raw in content.items()},
        requirements={
            "cpu_features": list(machine_card().features),
            "library": LIBRARY.get(engine, "numpy"),
            "library_version": _version(LIBRARY.get(engine, "numpy")),
        },
        gate={"passed": True, "gate": {"dice_mean": 0.99, "hc_p95_mm": 10.0}},
        state=ArtefactState.VERIFIED,
        golden=f"golden/{target}-fp32.safetensors",
        tolerance={"logit_abs": 0.02, "differing_pixels": 0.005, "hc_mm": 2.0},
    )


def _version(library: str) -> str:
    from importlib.metadata import version

    return version(library)


@pytest.fixture(scope="session")
def tiny_files(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, bytes]]:
    """Engine -> file name -> content of the tiny model; skips where the library that writes it is missing."""
    made: dict[str, dict[str, bytes]] = {"fake": {"model.onnx": bytes(range(256)) * 4}}

    def build(engine: str) -> dict[str, bytes]:
        if engine not in made:
            if engine in ("ort", "trt"):
                made[engine] = {"model.onnx": tiny_onnx()}
            elif engine == "ov":
                xml, weights = tiny_openvino(tmp_path_factory.mktemp("ir"))
                made[engine] = {"model.xml": xml, "model.bin": weights}
            elif engine == "litert":
                made[engine] = {"model.tflite": tiny_litert()}
            else:
                pytest.skip(f"the tests have no tiny model for engine {engine!r}")
        return made[engine]

    return build


@pytest.fixture(scope="session")
def fake_parts(tiny_files: Callable[[str], dict[str, bytes]]) -> Parts:
    """Parts of a bundle that only the ``plug_in`` engine runs."""
    return make_parts({"fake": tiny_files("fake")})


@pytest.fixture(scope="session")
def engine_parts(tiny_files: Callable[[str], dict[str, bytes]]) -> Callable[[str], Parts]:
    """Engine -> parts of a bundle with one artefact for it."""
    made: dict[str, Parts] = {}

    def build(engine: str) -> Parts:
        if engine not in made:
            made[engine] = make_parts({engine: tiny_files(engine)})
        return made[engine]

    return build


@pytest.fixture(scope="session")
def fake_bundle(fake_parts: Parts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A published bundle for the ``plug_in`` engine; do not change it, copy it (``fresh_bundle``)."""
    return fake_parts.publish(tmp_path_factory.mktemp("published") / "tiny.bundle")


@pytest.fixture
def fresh_bundle(fake_bundle: Path, tmp_path: Path) -> Path:
    """A copy of the bundle, to be spoilt."""
    copy = Path(shutil.copytree(fake_bundle, tmp_path / "tiny.bundle"))
    for path in copy.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    return copy


@pytest.fixture
def plug_in(monkeypatch: pytest.MonkeyPatch) -> type[NumpyEngine]:
    """Registers the numpy engine as ``fake`` by an entry point and gives its class, with a clean record."""
    plugged(monkeypatch, "engines", fake=plug_in_module("fake", Engine=NumpyEngine))
    monkeypatch.setattr(NumpyEngine, "made", [])
    monkeypatch.setattr(NumpyEngine, "bend", staticmethod(lambda outputs: outputs))
    return NumpyEngine


@pytest.fixture(scope="session")
def phantom_frame() -> Frame:
    """One phantom at an ordinary size."""
    return make_phantom(3).frame


@pytest.fixture(scope="session")
def shared_folder() -> Path:
    """The data folder beside the checkout (or TINYUSFM_SHARED); skips where there is none."""
    folder = Path(os.environ.get("TINYUSFM_SHARED", Path(__file__).resolve().parents[2] / "shared"))
    if not folder.is_dir():
        pytest.skip(f"no data folder at {folder}: set TINYUSFM_SHARED")
    return folder


@pytest.fixture(autouse=True)
def cache_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """What a session remembers of this machine does not reach the next test, nor the user's own cache."""
    monkeypatch.setenv("TINYUSFM_EDGE_CACHE", str(tmp_path_factory.getbasetemp() / f"cache-{secrets.token_hex(6)}"))


@pytest.fixture(autouse=True)
def signal_stack_stays() -> Iterator[None]:
    """No test leaves another stack for signal handlers: the next signal would end the process (device/signal_stack)."""
    before = signal_stack()
    yield
    assert signal_stack() == before, "a library's stack for signal handlers stays behind: use kept_signal_stack()"
