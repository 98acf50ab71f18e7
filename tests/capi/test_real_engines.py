"""Real engines in C: the same library gives the same bits as in Python, and reports what it ran."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.capi.binding import Failed, Library, Session
from tests.capi.conftest import ROOT, engine_folders
from tests.capi.test_same_answers import assert_same
from tests.conftest import child_environment, golden_frames, make_parts, tiny_spec
from tinyusfm_runtime.bundle.golden import pack_golden
from tinyusfm_runtime.bundle.manifest import GOLDEN_REFERENCE
from tinyusfm_runtime.engines import EngineConfig
from tinyusfm_runtime.errors import EngineError
from tinyusfm_runtime.frame import Frame
from tinyusfm_runtime.numerics.preprocess import preprocess
from tinyusfm_runtime.phantom import make_phantom
from tinyusfm_runtime.plugins import load
from tinyusfm_runtime.session import Session as PythonSession

TinyFiles = Callable[[str], dict[str, bytes]]


def test_readings_are_those_of_python(opened: tuple[str, Path, Path], library: Library) -> None:
    _, bundle, folder = opened
    with Session(library, bundle, engine_folder=str(folder)) as here, PythonSession.open(bundle) as there:
        for seed in range(12):
            frame = make_phantom(100 + seed, height=120 + seed, width=160).frame
            mm = frame.spacing_mm
            assert mm is not None
            given = library.frame(
                np.ascontiguousarray(frame.pixels), seq=seed, spacing_row_mm=mm[0], spacing_column_mm=mm[1]
            )
            reading = here.predict(given)
            want = there.predict(Frame(pixels=frame.pixels, spacing_mm=mm, seq=seed))
            assert_same(here, reading, want, placed=True)
        info = here.info()
        assert info.engine.decode() == there.engine_description
        assert info.executed.decode() == there.executed != "" and info.golden_frames == 4


def test_a_damaged_model_and_a_missing_library_are_statuses(
    opened: tuple[str, Path, Path], library: Library, tmp_path: Path
) -> None:
    name, bundle, folder = opened
    with pytest.raises(Failed, match="MISSING.*engine_folder"):
        Session(library, bundle, engine_folder=str(tmp_path))
    parts = make_parts(
        {
            name: {file: b"damaged" for file in ("model.onnx",)}
            if name == "ort"
            else {"model.xml": b"<x/>", "model.bin": b""}
        }
    )
    broken = parts.publish(tmp_path / "broken.bundle")
    # held against the list of operators before the library sees a byte
    with pytest.raises(Failed, match="ENGINE.*(the model holds|is not XML).*do not use it"):
        Session(library, broken, engine_folder=str(folder))


def quantised_openvino(folder: Path, *, weights: bool) -> dict[str, bytes]:
    """Two convolutions behind quantised inputs; without quantised weights no plug-in runs them in 8 bits."""
    ov = pytest.importorskip("openvino", reason="openvino is not installed: pip install 'tinyusfm-edge[openvino]'")
    ops, rng = ov.opset13, np.random.default_rng(2)

    def quantised(node: object, low: float, high: float) -> object:
        bounds = [ops.constant(np.float32(value)) for value in (low, high, low, high)]
        return ops.fake_quantize(node, *bounds, 256 if low >= 0 else 255)

    def convolved(node: object, inputs: int, outputs: int) -> object:
        kernel = ops.constant(rng.normal(0, 0.3, (outputs, inputs, 3, 3)).astype(np.float32))
        return ops.convolution(node, quantised(kernel, -1, 1) if weights else kernel, [1, 1], [1, 1], [1, 1], [1, 1])

    image = ops.parameter([1, 1, 64, 64], ov.Type.u8, name="image")
    scaled = ops.divide(ops.convert(image, "f32"), np.float32(255))
    wide = ops.relu(convolved(quantised(scaled, 0, 1) if weights else scaled, 1, 32))
    logits = convolved(quantised(wide, 0, 4) if weights else wide, 32, 1)
    logits = logits if weights else quantised(logits, -8, 8)
    for name, node in {"image": image, "logits": logits}.items():
        node.output(0).set_names({name})
    ov.save_model(ov.Model([ops.result(logits)], [image], "int8"), folder / "model.xml", compress_to_fp16=False)
    return {name: (folder / name).read_bytes() for name in ("model.xml", "model.bin")}


def quantised_bundle(folder: Path, *, weights: bool, recorded: int | None = None) -> Path:
    """A bundle of these, with golden answers of OpenVINO's own."""
    files, spec = quantised_openvino(folder, weights=weights), tiny_spec()
    engine = load("engines", "ov").Engine()
    engine.load(files, spec, EngineConfig(threads=1, rest_precision="f32"))
    parts = make_parts({"ov": files}, spec)
    arrays = golden_frames()
    prepared = [
        preprocess(Frame(pixels=pixels, spacing_mm=tuple(mm)), spec.preprocess)
        for pixels, mm in zip(arrays["pixels"], arrays["spacing_mm"], strict=True)
    ]
    logits = np.concatenate([engine.run(tensor)["logits"] for tensor, _ in prepared])
    engine.close()
    first = parts.artefacts[0]
    needs = {**first.requirements, **({} if recorded is None else {"int8_layers": recorded})}
    golden = {GOLDEN_REFERENCE: pack_golden(logits, spec, prepared)}
    golden[first.golden] = pack_golden(logits.astype(np.float16), spec, prepared)
    artefact = replace(first, precision="int8", requirements=needs)
    whole = replace(parts, artefacts=(artefact,), files={**parts.files, **golden})
    return whole.publish(folder / f"{weights}{recorded}.bundle")


def test_how_many_layers_run_in_8_bits_is_counted_alike(
    library: Library, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = engine_folders().get("ov")
    if folder is None:
        pytest.skip("the library of engine ov is not installed")
    options = {"engine_folder": str(folder)}
    bundle, lines = quantised_bundle(tmp_path, weights=True, recorded=99), []
    with (
        Session(library, bundle, log=lambda _level, text: lines.append(text), **options) as here,
        PythonSession.open(bundle) as there,
    ):
        info = here.info()
        assert info.engine.decode() == there.engine_description and info.executed.decode() == there.executed
        ran, layers = (int(word) for word in re.findall(r"int8 in (\d+) of (\d+) layers", there.executed)[0])
        assert 1 <= ran <= layers == 2 and f"int8 in {ran} of 2 layers" in there.description
    assert any(f"{ran} layers run in int8 here, 99 did" in text for text in lines)
    assert f"{ran} layers run in int8 here, 99 did" in caplog.text
    for refused in (
        lambda: Session(library, bundle, allow_precision=-1, **options),
        lambda: PythonSession.open(bundle, need_int8="all"),
    ):
        with pytest.raises((Failed, EngineError), match="at least 99 are demanded"):
            refused()


def test_an_int8_artefact_that_runs_in_float_is_never_silent(library: Library, tmp_path: Path) -> None:
    folder = engine_folders().get("ov")
    if folder is None:
        pytest.skip("the library of engine ov is not installed")
    bundle, options = quantised_bundle(tmp_path, weights=False), {"engine_folder": str(folder)}
    with pytest.raises(Failed, match=r"ENGINE.*0 of 2 layers in int8"):
        Session(library, bundle, **options)
    with pytest.raises(EngineError, match="0 of 2 layers in int8"):
        PythonSession.open(bundle)
    with (
        Session(library, bundle, allow_precision=1, **options) as here,
        PythonSession.open(bundle, need_int8="none") as there,
    ):
        assert "int8 in 0 of 2 layers" in there.description
        assert here.info().executed.decode() == there.executed


FREED = """
import faulthandler, signal, sys
from pathlib import Path

faulthandler.enable()
signal.signal(signal.SIGINT, signal.default_int_handler)
from tests.capi.binding import Library, Session
from tinyusfm_runtime.device.signal_stack import signal_stack

library, before = Library(Path(sys.argv[1])), signal_stack()
first, second = (Session(library, Path(sys.argv[2]), engine_folder=sys.argv[3]) for _ in range(2))
assert signal_stack() == before, "opening left another stack behind"
first.close()
second.close()
assert signal_stack() == before, "closing left another stack behind"
try:
    signal.raise_signal(signal.SIGINT)
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""


def test_a_signal_after_two_models_are_freed_is_only_a_signal(opened: tuple[str, Path, Path], library: Library) -> None:
    """OpenVINO puts a stack for signal handlers of its own in place and frees it with the model."""
    _, bundle, folder = opened
    command = [sys.executable, "-c", FREED, str(library.path), str(bundle), str(folder)]
    said = subprocess.run(
        command, capture_output=True, text=True, env=child_environment(), timeout=900, check=False, cwd=ROOT
    )
    assert (said.returncode, said.stdout) == (0, "interrupted\n"), said.stderr[-2000:]


def test_openvino_by_itself_leaves_another_stack(tiny_files: TinyFiles, tmp_path: Path) -> None:
    """What the test above is for; a later OpenVINO may do without."""
    pytest.importorskip("openvino", reason="openvino is not installed: pip install 'tinyusfm-edge[openvino]'")
    for name, content in tiny_files("ov").items():
        (tmp_path / name).write_bytes(content)
    program = (
        "import sys, openvino\nfrom tinyusfm_runtime.device.signal_stack import signal_stack\n"
        "before = signal_stack()\nmodel = openvino.Core().compile_model(sys.argv[1], 'CPU')\n"
        "print(signal_stack() != before)"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "model.xml")]
    said = subprocess.run(command, capture_output=True, text=True, env=child_environment(), timeout=900, check=True)
    if said.stdout != "True\n":
        pytest.skip("this OpenVINO leaves the thread's stack for signal handlers alone")
