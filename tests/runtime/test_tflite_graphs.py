"""LiteRT files that attack or do not fit: each is refused before the library sees it, in one line."""

from __future__ import annotations

import struct
import time
import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.conftest import SIDE, tiny_litert, tiny_spec
from tests.needs import needs
from tinyusfm_export.targets.litert.flatbuffer import ModelFile
from tinyusfm_runtime.engines import EngineConfig
from tinyusfm_runtime.engines.litert import Engine
from tinyusfm_runtime.errors import EngineError
from tinyusfm_runtime.graphs.budget import Budget
from tinyusfm_runtime.graphs.tflite import check

needs("tflite", "tflite is not installed: pip install 'tinyusfm-edge[litert]'")
SPEC = tiny_spec()
SQUARE = (1, 1, SIDE, SIDE)


def refused(content: bytes) -> str:
    tracemalloc.start()
    start_s = time.process_time()
    with pytest.raises(EngineError) as caught:
        Engine().load({"model.tflite": content}, SPEC, EngineConfig(threads=1, rest_precision="f32"))
    assert time.process_time() - start_s < 5 and tracemalloc.get_traced_memory()[1] < 64 << 20
    tracemalloc.stop()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def model(work: Callable[[ModelFile, int], int], name: str = "logits") -> bytes:
    """A file that casts its image, does ``work`` and gives the result as ``logits``."""
    file = ModelFile("hostile")
    image, floats = file.tensor("image", SQUARE, "uint8"), file.tensor("floats", SQUARE)
    file.operator("CAST", [image], [floats])
    result = work(file, floats)
    file.tensors[result].name = name
    return file.finish([image], [result])


def added(file: ModelFile, value: int, *, shape: tuple[int, ...] = SQUARE) -> int:
    made = file.tensor("sum", shape)
    file.operator("ADD", [value, value], [made])
    return made


def test_what_our_tests_write_passes_and_is_counted() -> None:
    budget = Budget(SPEC, 0)
    operators = check(tiny_litert(), SPEC.input, SPEC, budget)
    assert [operator.kind for operator in operators][:3] == ["CAST", "RESHAPE", "DIV"]
    assert budget.used_macs == SIDE * SIDE * 7 * 7
    check(model(added), SPEC.input, SPEC)


def test_shapes_that_lie_are_refused() -> None:
    assert "otherwise" in refused(model(lambda file, value: added(file, value, shape=(1, 1, SIDE, SIDE + 1))))
    assert "first output" in refused(model(added, name="answers"))

    def unknown(file: ModelFile, value: int) -> int:
        made, never = file.tensor("sum", SQUARE), file.tensor("never computed", SQUARE)
        file.operator("ADD", [value, never], [made])
        return made

    assert "nothing before it computes" in refused(model(unknown))


def test_what_is_too_large_is_refused() -> None:
    def doubled(file: ModelFile, value: int) -> int:
        side = SIDE
        for _ in range(16):
            side *= 2
            made = file.tensor("more", (1, 1, side, SIDE))
            file.operator("CONCATENATION", [value, value], [made], Axis=2)
            value = made
        return value

    assert "numbers" in refused(model(doubled))


def test_weights_must_be_whole_aligned_and_have_a_scale_for_each_channel() -> None:
    def linear(codes: np.ndarray, scales: np.ndarray) -> bytes:
        def work(file: ModelFile, value: int) -> int:
            weight, made = file.constant("w", codes, scales), file.tensor("y", SQUARE)
            bias = file.constant("b", np.zeros(SIDE, np.float32))
            file.operator("FULLY_CONNECTED", [value, weight, bias], [made], KeepNumDims=True)
            return made

        return model(work)

    codes = np.full((SIDE, SIDE), 77, np.int8)
    good = linear(codes, np.full(SIDE, 0.5, np.float32))
    assert [operator.weight for operator in check(good, SPEC.input, SPEC)] == ["", "int8"]
    assert "scale" in refused(linear(codes, np.full(SIDE - 1, 0.5, np.float32)))
    assert "scale" in refused(linear(codes, np.full(SIDE, np.nan, np.float32)))
    place = good.index(codes.tobytes()) - 4
    assert struct.unpack_from("<I", good, place)[0] == codes.size
    shorter = good[:place] + struct.pack("<I", codes.size - 1) + good[place + 4 :]
    assert "bytes" in refused(shorter)


def gathered(index: list[int]) -> bytes:
    """Rows of the image by their numbers, as a file of ours stores them."""

    def work(file: ModelFile, value: int) -> int:
        made = file.tensor("rows", (1, 1, len(index), SIDE))
        file.operator("GATHER", [value, file.constant("index", np.array(index, np.int32))], [made], Axis=2)
        return made

    return model(work)


def test_a_gather_takes_stored_rows_that_are_there() -> None:
    check(gathered([0, SIDE - 1, 3]), SPEC.input, SPEC)
    assert "that are not there" in refused(gathered([0, SIDE]))
    assert "that are not there" in refused(gathered([0, -1]))

    def computed(file: ModelFile, value: int) -> int:
        made = file.tensor("rows", (1, 1, *SQUARE, SIDE))
        file.operator("GATHER", [value, value], [made], Axis=2)
        return made

    assert "not a constant" in refused(model(computed))


def test_operators_and_fields_that_none_of_ours_has_are_refused() -> None:
    content = bytearray(tiny_litert())
    found = 0
    for place in range(0, len(content) - 4, 4):
        if content[place : place + 4] == struct.pack("<i", 42):  # DIV
            changed = bytes(content[:place]) + struct.pack("<i", 145) + bytes(content[place + 4 :])
            try:
                check(changed, SPEC.input, SPEC)
            except EngineError as error:
                found += "operator of number 145" in str(error)
    assert found >= 1
    assert "points outside" in refused(b"TFL3" * 40)
    assert "format" in refused(b"\x00" * 400)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(places=st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(0, 255)), min_size=1, max_size=8))
def test_changed_bytes_are_read_or_refused_but_nothing_else(places: list[tuple[int, int]]) -> None:
    content = bytearray(CONTENT)
    for place, value in places:
        content[place % len(content)] = value
    try:
        assert check(bytes(content), SPEC.input, SPEC)
    except EngineError as error:
        assert "\n" not in str(error)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(length=st.integers(0, 1 << 20))
def test_a_file_cut_short_is_refused(length: int) -> None:
    with pytest.raises(EngineError):
        check(CONTENT[: length % len(CONTENT)], SPEC.input, SPEC)


CONTENT = tiny_litert()
