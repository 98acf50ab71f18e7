"""Every engine keeps the contract of engine.py; a new file in engines/ is picked up by itself."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import textwrap
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import LIBRARY, REACH, SIDE, Parts, child_environment, tiny_kernel, tiny_logits, tiny_spec
from tinyusfm_export.targets.litert.flatbuffer import ModelFile
from tinyusfm_runtime import plugins
from tinyusfm_runtime.device.machine import machine_card
from tinyusfm_runtime.engines import Engine, EngineConfig
from tinyusfm_runtime.errors import EngineError, FrameError, MissingExtra, UnsupportedError
from tinyusfm_runtime.phantom import make_phantom
from tinyusfm_runtime.session import Session
from tinyusfm_runtime.spec import PreprocessSpec, Task

ENGINES = plugins.names("engines")
Files = Callable[[str], dict[str, bytes]]
ROUNDS = 300
"""Operators of the slow model."""


@pytest.fixture(params=ENGINES)
def name(request: pytest.FixtureRequest) -> str:
    """An engine that works here."""
    if request.param == "trt":
        pytest.skip(
            "its engines are built on the device: tests/runtime/test_trt_engine.py has its contract, on a fake GPU"
        )
    if request.param == "coreml":
        pytest.skip("it predicts on macOS only: tests/runtime/test_coreml_engine.py has its contract")
    answer = plugins.available("engines", request.param)
    if not answer.usable:
        pytest.skip(answer.reason)
    return str(request.param)


@pytest.fixture
def engine(name: str, tiny_files: Files) -> Engine:
    """A loaded engine."""
    made = new(name)
    made.load(tiny_files(name), tiny_spec(), EngineConfig(threads=1, rest_precision="f32"))
    return made


@pytest.fixture
def tensor() -> np.ndarray:
    """Some input."""
    return np.random.default_rng(1).integers(0, 256, (1, 1, SIDE, SIDE), dtype=np.uint8)


def new(name: str) -> Engine:
    """A fresh engine."""
    made = plugins.load("engines", name).Engine()
    assert isinstance(made, Engine)
    return made  # type: ignore[no-any-return]


def load_error(name: str, files: dict[str, bytes], error: type[Exception] = EngineError, **changes: object) -> str:
    """The message with which an engine refuses some files."""
    config = EngineConfig(threads=1, rest_precision="f32")
    with pytest.raises(error) as caught:
        new(name).load(files, tiny_spec(**changes), config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("listed", ENGINES)
def test_probe_answers_and_never_raises(listed: str) -> None:
    answer = plugins.load("engines", listed).available()
    assert isinstance(answer, plugins.Availability)
    assert answer.reason and (answer.extra or answer.usable), "what does not work here names what brings it"


def test_it_computes_the_model(engine: Engine, tensor: np.ndarray) -> None:
    outputs = engine.run(tensor)
    assert list(outputs) == ["logits", "pooled"]
    assert outputs["logits"].dtype == np.float32
    np.testing.assert_allclose(outputs["logits"], tiny_logits(tensor), atol=2e-5)


def test_the_same_input_gives_the_same_bits(engine: Engine, tensor: np.ndarray) -> None:
    first = engine.run(tensor)["logits"]
    engine.run(255 - tensor)
    np.testing.assert_array_equal(engine.run(tensor)["logits"], first)


def test_outputs_belong_to_the_caller(engine: Engine, tensor: np.ndarray) -> None:
    first = engine.run(tensor)
    kept = {key: value.copy() for key, value in first.items()}
    second = engine.run(255 - tensor)
    assert not np.array_equal(second["logits"], kept["logits"])
    for key, value in first.items():
        np.testing.assert_array_equal(value, kept[key])


def test_description_names_library_version_device_and_precision(engine: Engine) -> None:
    assert engine.description.count("\n") == 0
    for word in ("CPU", "float32", "1 thread"):
        assert word in engine.description


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_are_what_was_asked(name: str, tiny_files: Files, tensor: np.ndarray, threads: int) -> None:
    made = new(name)
    made.load(tiny_files(name), tiny_spec(), EngineConfig(threads=threads, rest_precision="f32"))
    assert f" {threads} thread" in made.description
    np.testing.assert_allclose(made.run(tensor)["logits"], tiny_logits(tensor), atol=2e-5)


def test_bf16_runs_where_the_cpu_has_it_and_is_refused_elsewhere(
    name: str, tiny_files: Files, tensor: np.ndarray
) -> None:
    made, config = new(name), EngineConfig(threads=1, rest_precision="bf16")
    if name in ("ort", "litert") or not machine_card().has_bf16:
        with pytest.raises(UnsupportedError, match="bf16|in bf16"):
            made.load(tiny_files(name), tiny_spec(), config)
        return
    made.load(tiny_files(name), tiny_spec(), config)
    assert "bfloat16" in made.description
    difference = np.abs(made.run(tensor)["logits"] - tiny_logits(tensor)).max()
    assert 1e-4 < difference < 0.2, "bf16 was really used, and is no more than roundings away"


def test_bf16_is_refused_on_a_cpu_without_it(name: str, tiny_files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    module = plugins.load("engines", name)
    card = replace(machine_card(), features=("avx2", "avx512f", "fma"))
    if hasattr(module, "machine_card"):
        monkeypatch.setattr(module, "machine_card", lambda: card)
    with pytest.raises(UnsupportedError):
        new(name).load(tiny_files(name), tiny_spec(), EngineConfig(threads=1, rest_precision="bf16"))


def test_broken_models_are_refused_in_one_line(name: str, tiny_files: Files) -> None:
    files = tiny_files(name)
    first = next(iter(files))
    load_error(name, {**files, first: b"no model at all" * 20})
    load_error(name, {**files, first: files[first][: len(files[first]) // 2]})
    load_error(name, {**files, first: b""})
    load_error(name, {})
    load_error(name, {**files, "more.bin": b"1"})


def test_a_model_of_another_input_is_refused(name: str, tiny_files: Files) -> None:
    message = load_error(name, tiny_files(name), preprocess=PreprocessSpec(height=32, width=SIDE))
    assert "input" in message
    load_error(name, tiny_files(name), preprocess=PreprocessSpec(height=SIDE, width=SIDE, grey=False))


def test_used_before_loading_and_after_closing(name: str, tiny_files: Files, tensor: np.ndarray) -> None:
    made = new(name)
    with pytest.raises(EngineError):
        made.run(tensor)
    made.cancel()
    made.load(tiny_files(name), tiny_spec(), EngineConfig(threads=1, rest_precision="f32"))
    made.close()
    made.close()
    made.cancel()
    with pytest.raises(EngineError):
        made.run(tensor)


def test_cancel_stops_a_run_and_the_engine_lives_on(name: str) -> None:
    files = slow_model(name)
    made = new(name)
    spec = tiny_spec(preprocess=PreprocessSpec(height=SIDE, width=SIDE))
    made.load(files, spec, EngineConfig(threads=1, rest_precision="f32"))
    tensor = np.full((1, 1, SIDE, SIDE), 7, np.uint8)
    expected = made.run(tensor)["logits"]
    caught: list[Exception] = []
    stop = threading.Event()

    def keep_cancelling() -> None:
        while not stop.wait(0.001):
            made.cancel()

    thread = threading.Thread(target=keep_cancelling)
    thread.start()
    try:
        for _ in range(50):
            try:
                made.run(tensor)
            except EngineError as error:
                caught.append(error)
                break
    finally:
        stop.set()
        thread.join()
    assert caught, "a run of many operators can be stopped between two of them"
    np.testing.assert_array_equal(made.run(tensor)["logits"], expected)


def test_external_weights_are_not_read_and_nothing_is_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_files: Files, capfd: pytest.CaptureFixture[str]
) -> None:
    onnx = pytest.importorskip("onnx")
    if not plugins.available("engines", "ort").usable:
        pytest.skip("onnxruntime is not installed")
    model = onnx.load_from_string(tiny_files("ort")["model.onnx"])
    onnx.save(model, tmp_path / "out.onnx", save_as_external_data=True, location="out.bin", size_threshold=0)
    monkeypatch.chdir(tmp_path)
    assert "xternal" in load_error("ort", {"model.onnx": (tmp_path / "out.onnx").read_bytes()})
    wasteful = onnx.load_from_string(tiny_files("ort")["model.onnx"])
    wasteful.graph.initializer.append(onnx.numpy_helper.from_array(np.float32(1), "of_no_use"))  # worth a warning
    config = EngineConfig(threads=1, rest_precision="f32")
    new("ort").load({"model.onnx": wasteful.SerializeToString()}, tiny_spec(), config)
    assert capfd.readouterr() == ("", "")


def test_nothing_is_printed_and_no_socket_is_opened(name: str, tiny_files: Files, tmp_path: Path) -> None:
    for file, content in tiny_files(name).items():
        (tmp_path / file).write_bytes(content)
    code = """
    import sys
    sys.addaudithook(lambda event, args: event in ("socket.connect", "socket.getaddrinfo") and sys.exit(event))
    import numpy as np
    from pathlib import Path
    from tinyusfm_runtime import plugins
    from tinyusfm_runtime.engines import EngineConfig
    from tinyusfm_runtime.errors import EngineError
    from tinyusfm_runtime.spec import ModelSpec, PreprocessSpec, Task
    spec = ModelSpec(name="t", task=Task.SEGMENT, labels=("a",), preprocess=PreprocessSpec(height=64, width=64))
    files = {p.name: p.read_bytes() for p in Path(sys.argv[2]).iterdir()}
    module, config = plugins.load("engines", sys.argv[1]), EngineConfig(threads=1, rest_precision="f32")
    assert module.available().usable
    engine = module.Engine()
    engine.load(files, spec, config)
    engine.run(np.zeros((1, 1, 64, 64), np.uint8))
    engine.close()
    try:
        module.Engine().load({p: b"bad" for p in files}, spec, config)
    except EngineError:
        pass
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), name, str(tmp_path)], capture_output=True, text=True, check=False,
        env=child_environment(),
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_missing_library_names_the_pip_line(name: str, tiny_files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    files = tiny_files(name)
    monkeypatch.setitem(sys.modules, LIBRARY[name], None)
    with pytest.raises(MissingExtra, match=r"pip install '.+\[\w+\]'"):
        new(name).load(files, tiny_spec(), EngineConfig(threads=1, rest_precision="f32"))
    answer = plugins.available("engines", name)
    assert not answer.usable and "not installed" in answer.reason


VALUES = [float("nan"), float("inf"), -float("inf")]
DTYPES = ["float16", "float32", "float64", "int32", "complex64"]
SHAPES = [(1, 1, SIDE, SIDE), (1, 3, SIDE, SIDE), (1, SIDE, SIDE), (SIDE, SIDE), (2, 1, SIDE, SIDE), (1, 1, SIDE, 1)]


def test_no_engine_is_handed_another_type_shape_or_value(
    name: str, engine_parts: Callable[[str], Parts], tmp_path: Path
) -> None:
    path = engine_parts(name).publish(tmp_path / "b.bundle")
    with Session.open(path) as session:
        good = np.zeros(session.spec.input.shape, np.uint8)
        assert session.predict_tensor(good).valid
        accepted = []
        for shape in SHAPES:
            inputs = [np.full(shape, value, dtype) for value in VALUES for dtype in DTYPES if dtype != "int32"]
            inputs += [np.zeros(shape, dtype) for dtype in (*DTYPES, "int8", "uint16", "bool")]
            inputs += [np.zeros(shape, np.uint8)] if shape != good.shape else []
            for tensor in inputs:
                try:
                    session.predict_tensor(tensor)
                    accepted.append((tensor.dtype, tensor.shape))
                except FrameError as error:
                    assert "\n" not in str(error)
        for odd in (good[..., ::-1], good.transpose(0, 1, 3, 2)[..., ::-1], None, [1], good.tolist()):
            with pytest.raises(FrameError):
                session.predict_tensor(odd)
        assert not accepted


def test_task_specs_load_for_classifiers_as_well() -> None:
    assert tiny_spec(task=Task.CLASSIFY).input.shape == (1, 1, SIDE, SIDE)


def slow_model(name: str) -> dict[str, bytes]:
    """The tiny model's shape with a chain of many convolutions: some hundred operators to stop between."""
    if name == "ort":
        return {"model.onnx": slow_onnx(pytest.importorskip("onnx"))}
    if name == "ov":
        return slow_openvino(pytest.importorskip("openvino"))
    if name == "litert":
        return {"model.tflite": slow_litert()}
    pytest.skip(f"the tests have no slow model for engine {name!r}")


def slow_onnx(onnx: Any) -> bytes:
    helper, shape = onnx.helper, [1, 1, SIDE, SIDE]
    nodes = [helper.make_node("Cast", ["image"], ["x0"], to=onnx.TensorProto.FLOAT)]
    nodes += [helper.make_node("Conv", [f"x{i}", "w"], [f"x{i + 1}"], pads=[REACH] * 4) for i in range(ROUNDS)]
    nodes += [helper.make_node("Identity", [f"x{ROUNDS}"], ["logits"])]
    graph = helper.make_graph(
        nodes,
        "slow",
        [helper.make_tensor_value_info("image", onnx.TensorProto.UINT8, shape)],
        [helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, shape)],
        [onnx.numpy_helper.from_array(tiny_kernel(), "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return bytes(model.SerializeToString())


def slow_openvino(ov: Any) -> dict[str, bytes]:
    ops, pads = ov.opset13, [REACH, REACH]
    image = ops.parameter([1, 1, SIDE, SIDE], ov.Type.u8, name="image")
    value = ops.convert(image, "f32")
    for _ in range(ROUNDS):
        value = ops.convolution(value, ops.constant(tiny_kernel()), [1, 1], pads, pads, [1, 1])
    image.output(0).set_names({"image"})
    value.output(0).set_names({"logits"})
    with tempfile.TemporaryDirectory() as folder:
        ov.save_model(ov.Model([ops.result(value)], [image], "slow"), f"{folder}/model.xml", compress_to_fp16=False)
        return {name: (Path(folder) / name).read_bytes() for name in ("model.xml", "model.bin")}


def slow_litert() -> bytes:
    file, last = ModelFile("slow"), (1, SIDE, SIDE, 1)
    image, value = file.tensor("image", (1, 1, SIDE, SIDE), "uint8"), file.tensor("x0", (1, 1, SIDE, SIDE))
    kernel = file.constant("kernel", tiny_kernel()[0, 0][None, :, :, None])
    none, shape = file.constant("none", np.zeros(1, np.float32)), file.constant("shape", np.asarray(last, np.int32))
    file.operator("CAST", [image], [value])
    before, value = value, file.tensor("map", last)
    file.operator("RESHAPE", [before, shape], [value])
    sides = {"Padding": 0, "StrideW": 1, "StrideH": 1, "DilationWFactor": 1, "DilationHFactor": 1}
    for index in range(ROUNDS):
        before, value = value, file.tensor(f"x{index + 1}", last)
        file.operator("CONV_2D", [before, kernel, none], [value], **sides)
    square = file.constant("square", np.asarray((1, 1, SIDE, SIDE), np.int32))
    logits = file.tensor("logits", (1, 1, SIDE, SIDE))
    file.operator("RESHAPE", [value, square], [logits])
    return file.finish([image], [logits])


def test_reused_outputs_are_right_every_time(name: str, tiny_files: Files, tensor: np.ndarray) -> None:
    made = new(name)
    made.load(tiny_files(name), tiny_spec(), EngineConfig(threads=1, rest_precision="f32", reuse_outputs=True))
    for image in (tensor, 255 - tensor, tensor):
        outputs = made.run(image)
        assert list(outputs) == ["logits", "pooled"]
        np.testing.assert_allclose(outputs["logits"], tiny_logits(image), atol=2e-5)
    made.close()


def test_a_session_uses_its_buffers_again_and_its_answers_do_not_change(
    name: str, engine_parts: Callable[[str], Parts], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Session.open(engine_parts(name).publish(tmp_path / "b.bundle")) as session:
        places = set()
        engine = session._engine
        assert engine is not None
        run = engine.run

        def noted(tensor: np.ndarray) -> dict[str, np.ndarray]:
            outputs = run(tensor)
            places.add((tensor.ctypes.data, outputs["logits"].ctypes.data))
            return outputs

        monkeypatch.setattr(engine, "run", noted)
        held = []
        for seed in range(6):
            prediction = session.predict(make_phantom(seed, height=96, width=128).frame)
            assert prediction.mask_HW is not None
            arrays = [prediction.mask_HW, *prediction.auxiliary.values()]
            held.append((arrays, [array.copy() for array in arrays]))
        assert len(places) == 1, "one tensor in, one array of logits out"
        for arrays, copies in held:
            for array, copy in zip(arrays, copies, strict=True):
                np.testing.assert_array_equal(array, copy)
