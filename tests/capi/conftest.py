"""Builds the C runtime once for the tests that drive it, with an engine that needs no library."""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from tests import conftest as shared
from tests.capi.binding import Failed, Library, Session
from tests.plugged import plug_in_module, plugged
from tinyusfm_runtime.bundle.arrays import pack_arrays
from tinyusfm_runtime.bundle.golden import pack_golden
from tinyusfm_runtime.bundle.manifest import GOLDEN_FRAMES, GOLDEN_REFERENCE
from tinyusfm_runtime.engines import EngineConfig
from tinyusfm_runtime.frame import Frame
from tinyusfm_runtime.numerics.preprocess import preprocess
from tinyusfm_runtime.spec import ModelSpec, Task

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "runtime" / "capi"
NEEDS = "the C runtime cannot be built here: sudo make capi-deps brings jansson, mbedTLS and CMake"
shared.LIBRARY["stub"], shared.TARGET["stub"] = "numpy", "stub"


def configure(folder: Path, *options: str) -> None:
    """Configures and builds into a folder; skips where compiler or libraries are missing.

    Args:
        folder: of the build.
        options: for CMake.
    """
    if shutil.which("cmake") is None or shutil.which("cc") is None or not _has_libraries():
        pytest.skip(NEEDS)
    openvino = openvino_folder()
    places = [] if openvino is None else [f"-DTUSFM_OPENVINO_INCLUDE={openvino / 'include'}"]
    ort = ROOT / "build" / "capi-deps" / "include" / "onnxruntime"
    places += [f"-DTUSFM_ORT_INCLUDE={ort}"] if ort.is_dir() else []
    run("cmake", "-S", SOURCE, "-B", folder, "-DTUSFM_WERROR=ON", *places, *options)
    run("cmake", "--build", folder, "--parallel", "2")


def run(*command: object, **options: Any) -> str:
    """Runs a program; its output. A failure shows what it said."""
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, check=False, timeout=900, **options
    )
    assert done.returncode == 0, (
        f"{command} ended with {done.returncode}:\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    )
    return done.stdout


def openvino_folder() -> Path | None:
    """The installed OpenVINO wheel, or None."""
    folder = Path(sysconfig.get_paths()["purelib"])
    return next((place for place in _site_folders(folder, "openvino") if (place / "include").is_dir()), None)


def engine_folders() -> dict[str, Path]:
    """Engine -> folder of the library in its wheel, of those that are installed."""
    found = {"ov": openvino_folder(), "ort": None}
    for place in _site_folders(Path(sysconfig.get_paths()["purelib"]), "onnxruntime"):
        if any((place / "capi").glob("libonnxruntime.so.*")):
            found["ort"] = place / "capi"
    folders = {"ort": found["ort"], "ov": None if found["ov"] is None else found["ov"] / "libs"}
    return {name: folder for name, folder in folders.items() if folder is not None}


def _site_folders(first: Path, name: str) -> list[Path]:
    import importlib.util

    spec = importlib.util.find_spec(name)
    places = [] if spec is None or spec.origin is None else [Path(spec.origin).parent]
    return [*places, first / name]


def _has_libraries() -> bool:
    return all(Path("/usr/include", header).exists() for header in ("jansson.h", "mbedtls/sha256.h"))


@pytest.fixture(scope="session")
def build_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A build with the stub engine; ``TUSFM_TEST_BUILD`` names one that is kept."""
    kept = os.environ.get("TUSFM_TEST_BUILD")
    folder = Path(kept) if kept else tmp_path_factory.mktemp("capi")
    configure(folder, "-DTUSFM_STUB=ON")
    return folder


@pytest.fixture(scope="session")
def library(build_folder: Path) -> Library:
    """The library, loaded."""
    return Library(build_folder / "libtinyusfm.so")


@pytest.fixture(params=["ort", "ov"])
def opened(
    request: pytest.FixtureRequest, tiny_files: Callable[[str], dict[str, bytes]], tmp_path: Path, library: Library
) -> tuple[str, Path, Path]:
    """Name of an engine, a bundle of it, the folder of its library; skips where either cannot be had."""
    name: str = request.param
    folder = engine_folders().get(name)
    if folder is None:
        pytest.skip(f"the library of engine {name} is not installed")
    bundle = shared.make_parts({name: tiny_files(name)}).publish(tmp_path / f"{name}.bundle")
    try:
        Session(library, bundle, engine_folder=str(folder)).close()
    except Failed as error:
        if error.code == "UNSUPPORTED" and "does not have" in str(error):
            pytest.skip(f"the C library was built without engine {name}: its header was not there")
        raise
    return name, bundle, folder


def strip_means(plane_HW: np.ndarray, count: int) -> np.ndarray:
    """Mean codes of so many vertical strips, float32 (1, count)."""
    rows, columns = plane_HW.shape
    edges = [k * columns // count for k in range(count + 1)]
    sums = [plane_HW[:, a:b].astype(np.float64).sum() for a, b in zip(edges, edges[1:], strict=False)]
    areas = [rows * max(b - a, 1) for a, b in zip(edges, edges[1:], strict=False)]
    means = [np.float32(total) / np.float32(area) / np.float32(32) for total, area in zip(sums, areas, strict=True)]
    return np.array([means], np.float32)


def stub_logits(tensor: np.ndarray, spec: ModelSpec, classes: int = 1) -> np.ndarray:
    """What the stub engine computes, in numpy: uint8 NCHW -> float32."""
    plane = tensor[0, 0].astype(np.float32)
    if spec.task is not Task.SEGMENT:
        return strip_means(plane, classes)
    value = (plane / np.float32(255) - np.float32(0.3)) * np.float32(20)
    others = [value * (np.float32(1) / np.float32(k + 1)) for k in range(1, classes)]
    first = value if classes == 1 else np.zeros_like(value)
    return np.stack([first, *others])[None].astype(np.float32)


class StubEngine:
    """The stub engine of the C tests, in numpy, as an engine of the Python runtime."""

    def __init__(self) -> None:
        self._spec: ModelSpec | None = None
        self._classes, self._tokens = 1, 0

    @property
    def description(self) -> str:
        return "stub f32 1 thread"

    def load(self, files: Mapping[str, bytes], spec: ModelSpec, config: EngineConfig) -> None:
        self._spec = spec
        words = dict(word.split("=") for word in files["model.stub"].decode().split())
        self._classes, self._tokens = int(words.get("classes", 1)), int(words.get("tokens", 0))

    def run(self, tensor: np.ndarray) -> dict[str, np.ndarray]:
        assert self._spec is not None
        outputs = {"logits": stub_logits(tensor, self._spec, self._classes)}
        if self._tokens:
            outputs["tokens"] = strip_means(tensor[0, 0], self._tokens)
            outputs["peak"] = np.array([[np.float32(tensor[0, 0].max()) / np.float32(8)]], np.float32)
        return outputs

    def cancel(self) -> None:
        pass

    def close(self) -> None:
        pass


def stub_module() -> ModuleType:
    """An engine plug-in around ``StubEngine``."""
    return plug_in_module("stub", Engine=StubEngine)


@pytest.fixture
def stub_plug_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the Python runtime open stub bundles too."""
    plugged(monkeypatch, "engines", stub=stub_module())


MakeStub = Callable[..., Path]


@pytest.fixture
def make_stub(tmp_path: Path) -> MakeStub:
    """Publishes a bundle of one or more stub artefacts."""
    count = 0

    def make(*bends: str, spec: ModelSpec | None = None, **changes: Any) -> Path:
        nonlocal count
        count += 1
        parts = stub_parts(*bends, spec=spec)
        if changes:
            parts = parts.with_artefact(**changes)
        return parts.publish(tmp_path / f"stub{count}.bundle")

    return make


def stub_parts(*bends: str, spec: ModelSpec | None = None) -> shared.Parts:
    """Parts of a bundle whose artefacts run in the stub engine.

    Args:
        bends: words of ``model.stub``, one artefact each; a second one is called ``stub2`` and so on.
        spec: of the model.
    """
    spec = spec or shared.tiny_spec()
    words = bends or ("",)
    classes = int(dict(word.split("=") for word in words[0].split()).get("classes", 1))
    parts = shared.make_parts({"stub": {"model.stub": words[0].encode()}}, spec)
    arrays = shared.golden_frames()
    frames = [
        Frame(pixels=p, spacing_mm=tuple(mm)) for p, mm in zip(arrays["pixels"], arrays["spacing_mm"], strict=True)
    ]
    prepared = [preprocess(frame, spec.preprocess) for frame in frames]
    logits = np.concatenate([stub_logits(tensor, spec, classes) for tensor, _ in prepared])
    first = parts.artefacts[0]
    version = first.requirements["library_version"]  # numpy's, on which the stand-in in Python runs
    reference = pack_golden(logits, spec, prepared)
    files = {**parts.files, GOLDEN_FRAMES: pack_arrays(arrays), GOLDEN_REFERENCE: reference}
    artefacts = []
    for number, bend in enumerate(words):
        target = "stub" if number == 0 else f"stub{number + 1}"
        path, golden = f"artefacts/{target}-fp32/model.stub", f"golden/{target}-fp32.safetensors"
        bend = f"{bend} version={version}".strip()
        files[path] = bend.encode()
        files[golden] = pack_golden(logits.astype(np.float16), spec, prepared)
        entry = {path: shared.file_entry(bend.encode())}
        artefacts.append(replace(first, target=target, files=entry, golden=golden))
    return shared.Parts(spec=spec, artefacts=tuple(artefacts), files=files)


def files_of(bundle: Path) -> dict[str, bytes]:
    """Path inside the bundle -> content."""
    return {str(p.relative_to(bundle)): p.read_bytes() for p in sorted(bundle.rglob("*")) if p.is_file()}
