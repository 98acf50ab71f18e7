"""Engine ``trt`` on a fake GPU: real parsing and building, faked execution by real signatures, and broken controls."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import SIDE, tiny_logits, tiny_onnx, tiny_spec
from tests.fakes import tensorrt as fake_tensorrt
from tests.fakes.tensorrt import Fake, World, fits, real_module, signatures
from tinyusfm_export.targets.trt import timing_files
from tinyusfm_runtime import plugins
from tinyusfm_runtime.engines import Engine, EngineConfig, trt
from tinyusfm_runtime.engines.trt.build import BuildFlags, import_tensorrt
from tinyusfm_runtime.engines.trt.cache import EngineCache
from tinyusfm_runtime.engines.trt.cuda import Cuda, lane, open_cuda
from tinyusfm_runtime.engines.trt.device import DeviceEngine, ensure_engine, timing_name
from tinyusfm_runtime.errors import EngineError, MissingExtra, TamperedError, UnsupportedError
from tinyusfm_runtime.spec import PreprocessSpec

CONFIG = EngineConfig(threads=1, rest_precision="f32")


@pytest.fixture(scope="module")
def files() -> dict[str, bytes]:
    real_module()
    return {"model.onnx": tiny_onnx()}


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> World:
    monkeypatch.setenv("TINYUSFM_EDGE_CACHE", str(tmp_path / "cache"))
    return fake_tensorrt.install(monkeypatch)


def build(files: dict[str, bytes], **options: Any) -> DeviceEngine:
    values = {"flags": BuildFlags(), **options}
    return ensure_engine(files, "fp32", import_tensorrt(), open_cuda().device(), EngineCache(), **values)


@pytest.fixture
def engine(world: World, files: dict[str, bytes]) -> Iterator[trt.Engine]:
    build(files)
    made = trt.Engine()
    made.load(files, tiny_spec(), CONFIG)
    yield made
    made.close()
    assert not world.cudart.faults and not world.cudart.leaks()


@pytest.fixture
def tensor() -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (1, 1, SIDE, SIDE), dtype=np.uint8)


def test_it_is_an_engine_and_its_probe_tells_the_truth(world: World) -> None:
    assert isinstance(trt.Engine(), Engine)
    answer = plugins.available("engines", "tensorrt")
    assert answer.usable and "Fake RTX (20 SMs)" in answer.reason and "not run by us" in answer.reason


def test_it_computes_the_model_logits_first(engine: trt.Engine, tensor: np.ndarray) -> None:
    found = engine.run(tensor)
    assert list(found) == ["logits", "pooled"]
    np.testing.assert_allclose(found["logits"], tiny_logits(tensor), atol=2e-5)


def test_every_answer_is_that_of_its_own_input_and_belongs_to_the_caller(
    engine: trt.Engine, tensor: np.ndarray
) -> None:
    first = engine.run(tensor)["logits"]
    kept = first.copy()
    np.testing.assert_allclose(engine.run(255 - tensor)["logits"], tiny_logits(255 - tensor), atol=2e-5)
    np.testing.assert_array_equal(first, kept)
    np.testing.assert_array_equal(engine.run(tensor)["logits"], kept)


def test_one_graph_a_run_and_nothing_is_allocated(engine: trt.Engine, world: World, tensor: np.ndarray) -> None:
    world.cudart.calls.clear()
    engine.run(tensor)
    assert world.cudart.calls == ["cudaGraphLaunch", "cudaStreamSynchronize"]
    assert "CUDA graph" in engine.description and "Fake RTX" in engine.description and "f32" in engine.description


def test_what_cannot_be_captured_is_queued_and_said(world: World, files: dict[str, bytes], tensor: np.ndarray) -> None:
    build(files)
    world.capturable = False
    made = trt.Engine()
    made.load(files, tiny_spec(), CONFIG)
    assert "without a CUDA graph" in made.description
    np.testing.assert_allclose(made.run(tensor)["logits"], tiny_logits(tensor), atol=2e-5)
    made.close()
    assert not world.cudart.faults and not world.cudart.leaks()


def test_loading_never_builds(world: World, files: dict[str, bytes]) -> None:
    with pytest.raises(UnsupportedError, match="tinyusfm-edge build BUNDLE"):
        trt.Engine().load(files, tiny_spec(), CONFIG)
    assert world.builds == 0


def test_build_is_remembered_and_a_new_driver_makes_it_stale(world: World, files: dict[str, bytes]) -> None:
    assert build(files).action == "built"
    assert build(files).action == "cached" and world.builds == 1
    world.cudart.driver = 13010
    with pytest.raises(UnsupportedError, match="stale.*CUDA 13.0"):
        trt.Engine().load(files, tiny_spec(), CONFIG)
    again = build(files)
    assert again.action == "built" and "stale: driver" in again.reason and world.builds == 2


def test_another_version_of_tensorrt_makes_it_stale(
    world: World, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    build(files)
    fake_tensorrt.put(monkeypatch, world, "tensorrt_rtx", "9.9.9")
    with pytest.raises(UnsupportedError, match="stale.*library version.*9.9.9"):
        trt.Engine().load(files, tiny_spec(), CONFIG)


def test_other_flags_build_anew(world: World, files: dict[str, bytes]) -> None:
    build(files)
    again = build(files, flags=BuildFlags(hardware_compatible=True))
    assert again.action == "built" and "flags" in again.reason
    made = trt.Engine()
    made.load(files, tiny_spec(), CONFIG)
    made.close()


def test_a_tampered_engine_is_refused_before_it_is_deserialised(world: World, files: dict[str, bytes]) -> None:
    build(files)
    (plan,) = EngineCache().root.rglob("*.plan")
    raw = bytearray(plan.read_bytes())
    raw[1000] ^= 1
    plan.write_bytes(bytes(raw))
    for attempt in (lambda: trt.Engine().load(files, tiny_spec(), CONFIG), lambda: build(files)):
        with pytest.raises(TamperedError, match="--rebuild"):
            attempt()
    assert build(files, rebuild=True).action == "built"
    assert not world.cudart.leaks()


def test_what_the_library_does_not_take_is_one_line(world: World, files: dict[str, bytes]) -> None:
    build(files)
    world.plans.clear()
    with pytest.raises(EngineError, match="does not take the cached engine: .*not compatible"):
        trt.Engine().load(files, tiny_spec(), CONFIG)
    assert not world.cudart.faults and not world.cudart.leaks()


def test_a_model_of_another_input_is_refused(world: World, files: dict[str, bytes]) -> None:
    build(files)
    spec = tiny_spec(preprocess=PreprocessSpec(height=32, width=SIDE))
    with pytest.raises(EngineError, match="inputs"):
        trt.Engine().load(files, spec, CONFIG)
    assert not world.cudart.leaks()


def test_other_files_and_precisions_are_refused(world: World, files: dict[str, bytes]) -> None:
    for wrong in ({}, {**files, "more.bin": b"1"}):
        with pytest.raises(EngineError, match="TensorRT needs model.onnx"):
            trt.Engine().load(wrong, tiny_spec(), CONFIG)
    with pytest.raises(UnsupportedError, match="bf16"):
        trt.Engine().load(files, tiny_spec(), EngineConfig(threads=1, rest_precision="bf16"))


def test_wrong_input_and_use_after_close(engine: trt.Engine, tensor: np.ndarray) -> None:
    for wrong in (tensor.astype(np.float32), tensor[..., :-1]):
        with pytest.raises(EngineError, match="the engine takes uint8"):
            engine.run(wrong)
    engine.close()
    engine.close()
    engine.cancel()
    with pytest.raises(EngineError, match="not loaded"):
        engine.run(tensor)


def test_a_cancelled_run_raises_and_the_engine_lives_on(
    engine: trt.Engine, world: World, tensor: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = engine.run(tensor)["logits"]
    engine.cancel()  # nothing is running: no effect
    np.testing.assert_array_equal(engine.run(tensor)["logits"], expected)
    lane, real = engine._lane, type(engine._lane).synchronise

    def cancel_meanwhile(self: Any) -> None:
        thread = threading.Thread(target=engine.cancel)
        thread.start()
        thread.join()
        real(self)

    assert lane is not None
    with monkeypatch.context() as patch:
        patch.setattr(type(lane), "synchronise", cancel_meanwhile)
        with pytest.raises(EngineError, match="cancelled"):
            engine.run(tensor)
    np.testing.assert_array_equal(engine.run(tensor)["logits"], expected)


def test_a_device_error_while_running_is_one_of_ours(engine: trt.Engine, world: World, tensor: np.ndarray) -> None:
    world.cudart.refuse["cudaGraphLaunch"] = 700
    with pytest.raises(EngineError, match="cudaGraphLaunch failed with error 700"):
        engine.run(tensor)
    world.cudart.refuse.clear()


def test_the_full_edition_has_a_timing_cache_and_no_runtime_cache(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, files: dict[str, bytes], tensor: np.ndarray
) -> None:
    monkeypatch.setenv("TINYUSFM_EDGE_CACHE", str(tmp_path / "cache"))
    world = fake_tensorrt.install(monkeypatch, edition="tensorrt", version="10.3.0", capability=(8, 7), name="Orin")
    seen: list[str] = []
    found = build(files, progress=lambda what, share: seen.append(what))
    assert found.entry.key.library == "tensorrt" and found.entry.key.library_version == "10.3.0"
    assert seen and list((tmp_path / "cache" / "timing").iterdir())
    made = trt.Engine()
    made.load(files, tiny_spec(), CONFIG)
    assert made.runtime_cache() == b"" and "tensorrt 10.3.0 on GPU Orin" in made.description
    np.testing.assert_allclose(made.run(tensor)["logits"], tiny_logits(tensor), atol=2e-5)
    made.close()
    assert not world.cudart.faults and not world.cudart.leaks()


def test_a_timing_cache_in_the_bundle_is_taken_before_the_devices_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, files: dict[str, bytes]
) -> None:
    monkeypatch.setenv("TINYUSFM_EDGE_CACHE", str(tmp_path / "cache"))
    fake_tensorrt.install(monkeypatch, edition="tensorrt", version="10.3.0", capability=(8, 7), name="Orin")
    given: list[bytes] = []

    def fake_build(*_: object, timing_cache: bytes, **__: object) -> tuple[bytes, bytes]:
        given.append(timing_cache)
        return b"plan", b"measured"

    monkeypatch.setattr("tinyusfm_runtime.engines.trt.device.build_plan", fake_build)
    key = build(files).entry.key
    assert given == [b""] and EngineCache().timing(key) == b"measured"
    build(files, rebuild=True)
    signed = {**files, timing_name(key): b"signed", "tensorrt-9.9.9-Orin-1-SMs-sm8.7.timing": b"of another"}
    build(signed, rebuild=True)
    assert given == [b"", b"measured", b"signed"]
    (kept,) = (tmp_path / "cache" / "timing").iterdir()
    assert timing_files([kept]) == {timing_name(key): b"measured"}, "an export takes what a device keeps"


def test_a_dla_is_asked_for_where_there_is_one_only(world: World, files: dict[str, bytes]) -> None:
    with pytest.raises(UnsupportedError, match="no DLA core"):
        build(files, flags=BuildFlags(dla=True))


def test_hardware_compatible_engines_start_with_ampere(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, files: dict[str, bytes]
) -> None:
    monkeypatch.setenv("TINYUSFM_EDGE_CACHE", str(tmp_path / "cache"))
    fake_tensorrt.install(monkeypatch, capability=(7, 5))
    with pytest.raises(UnsupportedError, match="8.0 or more"):
        build(files, flags=BuildFlags(hardware_compatible=True))


def test_missing_pieces_are_named_one_by_one(monkeypatch: pytest.MonkeyPatch, files: dict[str, bytes]) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "tensorrt", None)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    monkeypatch.setattr("tinyusfm_runtime.engines.trt.build.importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"pip install '.+\[tensorrt\]'"):
        trt.Engine().load(files, tiny_spec(), CONFIG)
    answer = trt.available()
    assert not answer.usable and answer.reason == "tensorrt-rtx is not installed" and answer.extra == "tensorrt"
    assert [name for name, works, _, mend in trt.pieces() if not works and mend][0] == "TensorRT"


# broken controls: what the fakes must catch


def test_control_a_call_that_the_real_module_lacks() -> None:
    module = real_module()
    made = Fake(module, "IExecutionContext", {"execute_async_v3": lambda stream: True})
    with pytest.raises(AttributeError, match="no execute_async_v2"):
        made.execute_async_v2([], 1)
    with pytest.raises(AttributeError, match="no num_bindings"):
        Fake(module, "ICudaEngine", {}).num_bindings  # noqa: B018
    with pytest.raises(AttributeError, match="to be set"):
        made.engine_name = "x"


def test_control_arguments_that_the_real_method_lacks() -> None:
    made = Fake(real_module(), "IExecutionContext", {"execute_async_v3": lambda stream: True})
    assert made.execute_async_v3(7) is True and made.execute_async_v3(stream_handle=7) is True
    for arguments, named in (((), {}), ((7, 8), {}), ((), {"handle": 7}), (("seven",), {})):
        with pytest.raises(TypeError, match="execute_async_v3 takes"):
            made.execute_async_v3(*arguments, **named)


def test_every_method_that_is_faked_has_signatures() -> None:
    module = real_module()
    for name, method in (
        ("Runtime", "deserialize_cuda_engine"),
        ("ICudaEngine", "create_execution_context"),
        ("ICudaEngine", "get_tensor_dtype"),
        ("IRuntimeCache", "deserialize"),
    ):
        assert signatures(getattr(getattr(module, name), method).__doc__, method), (name, method)
    assert fits(b"plan", "typing_extensions.Buffer") and not fits("plan", "typing_extensions.Buffer")


def test_control_a_tensor_without_an_address(world: World, files: dict[str, bytes]) -> None:
    plan = build(files).entry.content["plan"]
    engine = import_tensorrt().module.Runtime(None).deserialize_cuda_engine(plan)
    context = engine.create_execution_context()
    with lane(open_cuda()) as made:
        held = {}
        for name in ("logits", "pooled", "image"):
            assert not context.execute_async_v3(made.stream), f"{name} has no address yet"
            held[name] = made.buffer(tuple(engine.get_tensor_shape(name)), np.dtype(np.float32))
            assert context.set_tensor_address(name, held[name].address)
        assert context.execute_async_v3(made.stream)
    assert len(world.cudart.faults) == 3
    assert all("without an address" in fault for fault in world.cudart.faults)


def test_control_reading_before_waiting_is_stale(engine: trt.Engine, tensor: np.ndarray) -> None:
    engine.run(tensor)
    assert engine._lane is not None and engine._input is not None
    np.copyto(engine._input.host, 255 - tensor)
    engine._lane.launch()
    early = engine._outputs["logits"].host.copy()
    engine._lane.synchronise()
    assert not np.allclose(early, tiny_logits(255 - tensor), atol=2e-5)
    np.testing.assert_allclose(engine._outputs["logits"].host, tiny_logits(255 - tensor), atol=2e-5)


def test_control_closing_the_lane_first_is_seen(world: World, files: dict[str, bytes], tensor: np.ndarray) -> None:
    build(files)
    made = trt.Engine()
    made.load(files, tiny_spec(), CONFIG)
    lane = made._lane
    assert lane is not None
    Cuda(world.cudart).call("cudaFree", made._outputs["logits"].address)
    made.run(tensor)
    assert any("freed" in fault for fault in world.cudart.faults)


@pytest.mark.needs_gpu
def test_on_a_real_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tensor: np.ndarray) -> None:
    answer = trt.available()
    if not answer.usable:
        pytest.skip(answer.reason)
    monkeypatch.setenv("TINYUSFM_EDGE_CACHE", str(tmp_path / "cache"))
    files = {"model.onnx": tiny_onnx()}
    build(files)
    made = trt.Engine()
    made.load(files, tiny_spec(), CONFIG)
    np.testing.assert_allclose(made.run(tensor)["logits"], tiny_logits(tensor), atol=2e-3)
    made.close()
