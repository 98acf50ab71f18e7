"""CUDA over ctypes: NVIDIA's symbols and prototypes, a lane on a fake that keeps watch, and broken controls."""

from __future__ import annotations

import ctypes
import importlib.util
import re
from pathlib import Path

import numpy as np
import pytest

from tests.fakes.cudart import FakeCudart
from tinyusfm_runtime.engines.trt import cuda
from tinyusfm_runtime.engines.trt.cuda import SIGNATURES, Cuda, Lane, lane, load_library, open_cuda
from tinyusfm_runtime.errors import EngineError, MissingExtra, UnsupportedError


@pytest.fixture
def fake() -> FakeCudart:
    return FakeCudart()


def header() -> str:
    spec = importlib.util.find_spec("nvidia")
    for root in (spec.submodule_search_locations or []) if spec else []:
        for path in Path(root).glob("*/include/cuda_runtime_api.h"):
            return path.read_text(encoding="utf-8", errors="replace")
    pytest.skip("the wheel nvidia-cuda-runtime with its headers is not installed")


def declared(text: str, name: str) -> list[type]:
    """Kinds of a prototype's arguments, as ctypes that have the same size and passing."""
    match = re.search(rf"CUDARTAPI {name}\(([^;]*)\);", text)
    assert match, f"the header has no {name}"
    kinds = []
    for argument in match.group(1).split(","):
        words = argument.replace("__dv(0)", "").strip()
        if "*" in words or re.match(r"cuda(Stream|Graph|GraphExec)_t\b", words):
            kinds.append(ctypes.c_void_p)
        elif words.startswith("unsigned long long"):
            kinds.append(ctypes.c_ulonglong)
        elif words.startswith("size_t"):
            kinds.append(ctypes.c_size_t)
        elif words.startswith("unsigned int"):
            kinds.append(ctypes.c_uint)
        else:
            assert words.startswith(("int", "enum")), words
            kinds.append(ctypes.c_int)
    return kinds


def plain(kind: type) -> type:
    return ctypes.c_void_p if issubclass(kind, ctypes._Pointer) else kind


@pytest.mark.parametrize("name", sorted(SIGNATURES))
def test_signatures_are_those_of_nvidias_header(name: str) -> None:
    assert [plain(kind) for kind in SIGNATURES[name]] == declared(header(), name)


def test_another_prototype_would_be_seen() -> None:
    text = "extern cudaError_t CUDARTAPI cudaMalloc(void **devPtr, int size);"
    assert declared(text, "cudaMalloc") != [plain(kind) for kind in SIGNATURES["cudaMalloc"]]


def test_the_real_library_has_every_symbol_and_says_that_there_is_no_gpu() -> None:
    try:
        real = open_cuda()
    except MissingExtra as error:
        pytest.skip(str(error))
    try:
        found = real.device()
    except UnsupportedError as error:
        assert "NVIDIA GPU" in str(error) and "\n" not in str(error)
    else:
        assert re.fullmatch(r"\d+\.\d", found.compute_capability)


@pytest.mark.needs_gpu
def test_a_lane_on_a_real_gpu() -> None:
    try:
        real = open_cuda()
        real.device()
    except (MissingExtra, UnsupportedError) as error:
        pytest.skip(str(error))
    with lane(real) as made:
        buffer = made.buffer((4, 5), np.uint8)
        buffer.host[:] = 7
        made.capture(lambda: (made.upload(buffer), made.download(buffer)))
        buffer.host[:] = 9
        made.launch()
        made.synchronise()
        assert (buffer.host == 9).all()


def test_missing_library_names_the_pip_line() -> None:
    with pytest.raises(MissingExtra, match=r"pip install '.+\[tensorrt\]'"):
        load_library(["libnothing.so.99"])


def test_an_old_library_is_refused(monkeypatch: pytest.MonkeyPatch, fake: FakeCudart) -> None:
    monkeypatch.setattr(cuda, "load_library", lambda: object())
    with pytest.raises(UnsupportedError, match="too old"):
        open_cuda()


def test_device_tells_name_capability_size_and_driver(fake: FakeCudart) -> None:
    fake.driver = 12060
    found = Cuda(fake).device()
    assert (found.name, found.compute_capability, found.processors) == ("Fake RTX", "8.6", 20)
    assert found.gpu == "Fake RTX (20 SMs)" and found.driver.startswith("CUDA 12.6")


def test_no_gpu_and_a_failing_driver() -> None:
    with pytest.raises(UnsupportedError, match="no NVIDIA GPU found on this machine: install its driver"):
        Cuda(FakeCudart(devices=0)).device()
    failing = FakeCudart()
    failing.refuse["cudaGetDeviceCount"] = 999
    with pytest.raises(EngineError, match="999"):
        Cuda(failing).device()


def test_copies_run_in_order_and_only_when_waited_for(fake: FakeCudart) -> None:
    with lane(Cuda(fake)) as made:
        buffer = made.buffer((2, 3), np.float32)
        buffer.host[:] = 5.0
        made.upload(buffer)
        buffer.host[:] = 0.0  # too early: the copy has not run, so the device gets zeros
        made.synchronise()
        buffer.host[:] = 8.0
        made.download(buffer)
        assert (buffer.host == 8.0).all(), "nothing has come back yet"
        made.synchronise()
        assert (buffer.host == 0.0).all()
    assert not fake.faults and not fake.leaks()


def test_a_graph_runs_again_with_new_input(fake: FakeCudart) -> None:
    with lane(Cuda(fake)) as made:
        buffer = made.buffer((3,), np.uint8)
        made.capture(lambda: (made.upload(buffer), made.download(buffer)))
        assert made.captured
        for value in (1, 2):
            buffer.host[:] = value
            made.launch()
            made.synchronise()
            assert (buffer.host == value).all()
    assert not fake.faults and not fake.leaks()


def test_closing_twice_frees_once_and_in_order(fake: FakeCudart) -> None:
    made = Lane(Cuda(fake))
    buffer = made.buffer((3,), np.uint8)
    made.capture(lambda: made.upload(buffer))
    made.close()
    made.close()
    assert not fake.faults and not fake.leaks()
    order = [name for name in fake.calls if "Destroy" in name or "Free" in name]
    assert order == ["cudaGraphExecDestroy", "cudaGraphDestroy", "cudaStreamDestroy", "cudaFree", "cudaFreeHost"]


@pytest.mark.parametrize("call", ["cudaHostAlloc", "cudaMalloc"])
def test_no_memory_leaves_nothing_behind(fake: FakeCudart, call: str) -> None:
    fake.refuse[call] = 2
    with pytest.raises(EngineError, match=call), lane(Cuda(fake)) as made:
        made.buffer((3,), np.uint8)
    assert not fake.faults and not fake.leaks()


@pytest.mark.parametrize("call", ["cudaGraphInstantiateWithFlags"])
def test_a_graph_that_cannot_be_made_leaves_a_working_lane(fake: FakeCudart, call: str) -> None:
    fake.refuse[call] = 801
    with lane(Cuda(fake)) as made:
        buffer = made.buffer((3,), np.uint8)
        with pytest.raises(EngineError, match=call):
            made.capture(lambda: made.upload(buffer))
        assert not made.captured
        made.upload(buffer)
        made.synchronise()
    assert not fake.faults and not fake.leaks()


def test_a_failing_device_is_freed_all_the_same(fake: FakeCudart) -> None:
    made = Lane(Cuda(fake))
    made.buffer((3,), np.uint8)
    fake.refuse["cudaStreamSynchronize"] = 700
    with pytest.raises(EngineError, match="700"):
        made.synchronise()
    made.close()
    assert not fake.leaks()


# broken controls: what the fake must catch


def test_control_allocation_inside_a_capture(fake: FakeCudart) -> None:
    with lane(Cuda(fake)) as made:
        with pytest.raises(EngineError, match="900"):
            made.capture(lambda: made.buffer((3,), np.uint8))
        assert not made.captured
    assert any("while a stream is captured" in fault for fault in fake.faults)


def test_control_waiting_inside_a_capture(fake: FakeCudart) -> None:
    with lane(Cuda(fake)) as made, pytest.raises(EngineError, match="900"):
        made.capture(made.synchronise)
    assert any("cudaStreamSynchronize while" in fault for fault in fake.faults)


def test_control_use_after_free(fake: FakeCudart) -> None:
    library = Cuda(fake)
    with lane(library) as made:
        buffer = made.buffer((3,), np.uint8)
        made.upload(buffer)
        library.call("cudaFree", buffer.address)
        made.synchronise()
        made._memory.remove(("cudaFree", buffer.address))
    assert any("queued work still uses" in fault for fault in fake.faults)
    assert any("uses memory that was freed" in fault for fault in fake.faults)


def test_control_double_free(fake: FakeCudart) -> None:
    library = Cuda(fake)
    with lane(library) as made:
        buffer = made.buffer((3,), np.uint8)
        library.call("cudaFree", buffer.address)
    assert any("was freed before" in fault for fault in fake.faults)


def test_control_a_stream_destroyed_with_work_in_it(fake: FakeCudart) -> None:
    library = Cuda(fake)
    made = Lane(library)
    made.upload(made.buffer((3,), np.uint8))
    library.call("cudaStreamDestroy", made.stream)
    assert any("work left" in fault for fault in fake.faults)
    made.stream = 0


def test_control_a_wrong_direction_and_a_wrong_number_of_arguments(fake: FakeCudart) -> None:
    library = Cuda(fake)
    with lane(library) as made:
        buffer = made.buffer((3,), np.uint8)
        with pytest.raises(EngineError):
            library.call("cudaMemcpyAsync", buffer.address, buffer.host.ctypes.data, 3, 2, made.stream)
        with pytest.raises(EngineError):
            library.call("cudaStreamSynchronize")
    assert len(fake.faults) == 2


def test_control_a_leak(fake: FakeCudart) -> None:
    Lane(Cuda(fake)).buffer((3,), np.uint8)
    assert fake.leaks() == {"device memory": 1, "pinned memory": 1, "streams": 1}
