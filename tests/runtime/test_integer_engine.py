"""The integer engine: every compiled implementation equals the definition; files that are no model are refused."""

from __future__ import annotations

import json
import math
import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.runtime import integer_models as models
from tinyusfm_export.targets.integer.writer import ModelWriter
from tinyusfm_runtime.engines import EngineConfig
from tinyusfm_runtime.engines.integer import MODEL_FILE, Engine, arithmetic, compiled
from tinyusfm_runtime.engines.integer.execute import Definition
from tinyusfm_runtime.engines.integer.layout import F32, FIELDS, I16, NUMBERS, U8
from tinyusfm_runtime.engines.integer.model_file import read_model, read_tensors
from tinyusfm_runtime.errors import EngineError, UnsupportedError
from tinyusfm_runtime.plugins import available
from tinyusfm_runtime.spec import ModelSpec, PreprocessSpec, Task

SEEDS = st.integers(0, 2**32 - 1)
Made = tuple[models.OneOperation, models.Tensors]
MAKERS: dict[str, Callable[[np.random.Generator], Made]] = {
    "linear": lambda rng: models.linear(rng, 127),
    "linear with small weights": lambda rng: models.linear(rng, 63),
    "norm": lambda rng: models.norm(rng, int(rng.integers(1, 80))),
    "norm of vectors": lambda rng: models.norm(rng, 16 * int(rng.integers(1, 13))),
    "attention": lambda rng: models.attention(rng, int(rng.choice([1, 3, 8, 16, 20, 64]))),
    "convolution": lambda rng: models.window(rng, "convolution", 127),
    "convolution with small weights": lambda rng: models.window(rng, "convolution", 63),
    "depthwise": lambda rng: models.window(rng, "depthwise", 127),
    "resize": models.resize,
    **{kind: lambda rng, kind=kind: models.simple(rng, kind) for kind in ("halve", "codes", "mean", "peak", "sum")},
    "affine": lambda rng: models.simple(rng, "affine"),
    "gather": lambda rng: models.gather(rng, 0),
    "gather with a blank row": lambda rng: models.gather(rng, 1),
}


@pytest.fixture(autouse=True, scope="module")
def built() -> None:
    """These tests compare compiled code."""
    if not compiled.available():
        pytest.skip(compiled.reason())


def compare(tensors: models.Tensors, inputs: list[np.ndarray]) -> None:
    """All instruction sets and thread counts answer as the definition does."""
    model = read_model(tensors)
    definition = Definition(model)
    wanted = [definition.run(tensor) for tensor in inputs]
    for isa in compiled.instruction_sets():
        for threads in (1, 3):
            engine = compiled.CompiledModel(tensors, model, threads=threads, isa=isa)
            for tensor, want in zip(inputs, wanted, strict=True):
                got = engine.run(tensor)
                assert want is not None and got is not None
                for name, value in want.items():
                    np.testing.assert_array_equal(got[name], value, err_msg=f"{isa}, {threads} threads")
            engine.close()


@pytest.mark.parametrize("kind", MAKERS)
@given(seed=SEEDS)
@settings(max_examples=25, deadline=None)
def test_every_implementation_equals_the_definition(kind: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    model, tensors = MAKERS[kind](rng)
    compare(tensors, [model.input(extreme=extreme) for extreme in (False, True, False)])


def test_a_wrong_bit_is_noticed() -> None:
    """The broken control: another multiplier in one channel."""
    rng = np.random.default_rng(5)
    model, tensors = models.window(rng, "convolution", 63)
    names = [name for name in tensors if name.endswith(".factor")]
    tensors[names[0]] = np.full_like(tensors[names[0]], 32767)
    wrong = {**tensors, names[0]: np.full_like(tensors[names[0]], 32000)}
    tensor = model.input(extreme=False)
    want = Definition(read_model(tensors)).run(tensor)
    got = compiled.CompiledModel(wrong, read_model(wrong), threads=1).run(tensor)
    assert want is not None and got is not None and not np.array_equal(want["logits"], got["logits"])


@given(values=st.lists(st.integers(-(2**15), 2**15 - 1), min_size=16, max_size=192))
@settings(max_examples=50, deadline=None)
def test_layer_norm_is_near_the_real_one(values: list[int]) -> None:
    row = np.array([values], np.int16)
    width = len(values)
    bits = int(np.floor(14 - np.log2(np.sqrt(width)) - 1e-9))
    found = arithmetic.layer_norm(row, 1, round(math.sqrt(width) * 2.0 ** (15 + bits)))[0] / 2.0**bits
    centred = row[0] - row[0].mean()
    # with an epsilon of 1 in these units a constant row gives zeros
    wanted = centred / max(math.sqrt(float((centred**2).mean())), 1e-9)
    np.testing.assert_allclose(found, wanted, atol=2.0 ** (2 - bits), rtol=2e-4)


def test_the_exponential_is_near_the_real_one_and_never_negative() -> None:
    exponents = np.arange(arithmetic.LAST_EXPONENT + 1, dtype=np.int32)
    found = arithmetic.exp2(exponents, 0)
    wanted = 32768.0 * 2.0 ** (-exponents / 1024)
    assert found[0] == 32767 and found.min() == 0
    # the shift drops what is behind the point, at most one unit
    assert (np.abs(found - wanted) <= 1.0 + 4e-4 * wanted).all()


@given(seed=SEEDS)
@settings(max_examples=150, deadline=None)
def test_hostile_tables_are_refused_by_both_readers_alike(seed: int) -> None:
    rng = np.random.default_rng(seed)
    kind = list(MAKERS)[int(rng.integers(len(MAKERS)))]
    model, tensors = MAKERS[kind](rng)
    name = str(rng.choice([n for n in tensors if tensors[n].size]))
    broken = tensors[name].copy()
    low, high = np.iinfo(broken.dtype).min, np.iinfo(broken.dtype).max
    near = int(broken.flat[0]) + int(rng.integers(-2, 3))
    broken.flat[int(rng.integers(broken.size))] = int(rng.choice([low, high, 0, 1, min(max(near, low), high)]))
    tensors = {**tensors, name: broken}
    try:
        checked = read_model(tensors)
    except EngineError:
        with pytest.raises(EngineError):
            compiled.CompiledModel(tensors, read_model(models.simple(rng, "sum")[1]), threads=1)
        return
    tensor = model.input(extreme=True)
    if checked.input.shape == tensor.shape:
        want, got = Definition(checked).run(tensor), compiled.CompiledModel(tensors, checked, threads=1).run(tensor)
        assert want is not None and got is not None
        assert [value.tobytes() for value in want.values()] == [value.tobytes() for value in got.values()]


def gathered(**changes: np.ndarray) -> tuple[models.OneOperation, models.Tensors]:
    """Rows 4, -1 and 0 of five rows of words, with other tensors in place of its own."""
    model = models.OneOperation(np.random.default_rng(2), 5, 3, words=True)
    tensors = {"index": np.array([4, -1, 0], "<i4"), "blank": np.array([7, -8, 32767], "<i4")}
    target = model.target(I16, 3, 3)
    model.writer.add("gather", model.source, target, label="", tensors={**tensors, **changes}, blank=1)
    return model, model.finish(target)


def test_a_gather_takes_rows_and_the_blank_one() -> None:
    model, tensors = gathered()
    given = model.input(extreme=False)
    found = Definition(read_model(tensors)).run(given)
    assert found is not None
    np.testing.assert_array_equal(found["logits"][0], [given[0, 4], [7, -8, 32767], given[0, 0]])


@pytest.mark.parametrize(
    "change",
    [
        {"index": np.array([5, -1, 0], "<i4")},
        {"index": np.array([4, -2, 0], "<i4")},
        {"index": np.array([2**31 - 1, -(2**31), 0], "<i4")},
        {"index": np.array([4, 0], "<i4")},
        {"index": np.zeros((3, 1), "<i4")},
        {"index": np.array([4, -1, 0], "<i2")},
        {"blank": np.array([0, 0, 32768], "<i4")},
        {"blank": np.array([-32769, 0, 0], "<i4")},
        {"blank": np.array([0, 0], "<i4")},
        {"blank": np.array([0, 0, 0], "<i2")},
        {"more": np.array([0], "<i4")},
    ],
)
def test_a_gather_from_elsewhere_is_refused_by_both_readers(change: dict[str, np.ndarray]) -> None:
    _, tensors = gathered(**change)
    model = read_model(gathered()[1])
    with pytest.raises(EngineError, match="export"):
        read_model(tensors)
    for isa in compiled.instruction_sets():
        with pytest.raises(EngineError, match="export"):
            compiled.CompiledModel(tensors, model, threads=1, isa=isa)


@pytest.mark.parametrize("fields", [(1, -1), (2, 0), (-1, 0)])
def test_a_gather_without_a_blank_row_that_needs_one_is_refused(fields: tuple[int, int]) -> None:
    """No tensor for -1, and flags that are neither."""
    _, tensors = gathered(index=np.array([0, fields[1], 0], "<i4"))
    (number,) = [n for n, row in enumerate(tensors["operations"]) if row[0] == NUMBERS["gather"]]
    rows = tensors["operations"].copy()
    rows[number, 3] = 0 if fields[0] == 1 else fields[0]
    tensors = {name: value for name, value in tensors.items() if not name.endswith("blank")} | {"operations": rows}
    for read in (read_model, lambda given: compiled.CompiledModel(given, read_model(gathered()[1]), threads=1)):
        with pytest.raises(EngineError, match="export"):
            read(tensors)


def file_of(writer: ModelWriter) -> bytes:
    return writer.file()


@given(seed=SEEDS)
@settings(max_examples=200, deadline=None)
def test_mutated_files_are_refused_in_one_line_or_stay_models(seed: int) -> None:
    rng = np.random.default_rng(seed)
    content = bytearray(file_of(models.simple(np.random.default_rng(1), "sum")[0].writer))
    for _ in range(int(rng.integers(1, 4))):
        at = int(rng.integers(len(content)))
        what = int(rng.integers(3))
        if what == 0:
            content[at] = int(rng.integers(256))
        elif what == 1:
            del content[at : at + int(rng.integers(1, 9))]
        else:
            content[at:at] = bytes(rng.integers(0, 256, int(rng.integers(1, 9)), dtype=np.uint8))
    try:
        read_model(read_tensors(bytes(content)))
    except EngineError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize(
    "header",
    [
        {"a": {"dtype": "U8", "shape": [2**40], "data_offsets": [0, 2**40]}},
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}},
        {"a": {"dtype": "U8", "shape": [-1], "data_offsets": [0, 1]}},
        {"a": {"dtype": "U8", "shape": [1.0], "data_offsets": [0, 1]}},
        {"a": {"dtype": "U8", "shape": [1], "data_offsets": [1, 0]}},
        {"a": [1]},
        [],
    ],
)
def test_a_header_that_lies_is_refused_before_memory_is_taken(header: object) -> None:
    text = json.dumps(header).encode()
    with pytest.raises(EngineError, match="export it again"):
        read_tensors(len(text).to_bytes(8, "little") + text + b"\0" * 8)


def spec() -> ModelSpec:
    return ModelSpec(name="tiny", task=Task.SEGMENT, labels=("a",), preprocess=PreprocessSpec(height=16, width=16))


def test_the_engine_says_what_it_is_and_takes_what_it_says() -> None:
    assert "bit-identical" in available("engines", "integer").reason
    writer = image_model()
    engine = Engine()
    engine.load({MODEL_FILE: writer.file()}, spec(), EngineConfig(threads=2, rest_precision="f32"))
    slow = Engine(isa="numpy")
    slow.load({MODEL_FILE: writer.file()}, spec(), EngineConfig(threads=1, rest_precision="f32"))
    assert "bit-identical" in engine.description and "slow" in slow.description
    tensor = np.random.default_rng(0).integers(0, 256, (1, 1, 16, 16), dtype=np.uint8)
    assert engine.run(tensor)["logits"].tobytes() == slow.run(tensor)["logits"].tobytes()
    with pytest.raises(EngineError, match="takes uint8"):
        engine.run(tensor.astype(np.float32))
    engine.close()
    engine.close()
    with pytest.raises(EngineError, match="not loaded"):
        engine.run(tensor)


def test_an_instruction_set_that_is_not_there_is_unsupported() -> None:
    tensors = image_model().all_tensors()
    with pytest.raises(UnsupportedError, match="instruction set"):
        compiled.CompiledModel(tensors, read_model(tensors), threads=1, isa="altivec")


def image_model() -> ModelWriter:
    """A model from an image to a map: one patch, one linear, one enlargement."""
    rng = np.random.default_rng(3)
    writer = ModelWriter()
    writer.port("image", 0, (1, 1, 16, 16))
    source, codes = writer.buffer("input", 0, 16, 16), writer.buffer("patches", 0, 1, 256)
    writer.add("patches", source, codes, label="", size=16)
    words = writer.buffer("words", 2, 1, 256)
    layer = {
        "weight": rng.integers(-63, 64, (256, 256)).astype("i1"),
        "bias": np.zeros(256, "<i4"),
        "shift": np.full(256, 8, "i1"),
        "factor": np.full(256, 20000, "<i2"),
    }
    fields = {"row": 0, "target_row": 0, "rows": 1, "mode": 1, "bits": 0, "zero": 0, "table": 0}
    writer.add("linear", codes, words, label="", tensors=layer, **fields)
    port = writer.port("logits", 5, (1, 1, 16, 16))
    one = int(np.array([1.0], np.float32).view(np.int32)[0])
    writer.add("output", words, words, label="", port=port, scale=one, transposed=0)
    assert all(len(row) == FIELDS for row in writer.operations)
    return writer


@pytest.mark.parametrize("kind", ["memory", "products"])
def test_a_model_that_takes_more_than_any_of_ours_is_refused_before_memory_is_taken(kind: str) -> None:
    """A file of a few kilobytes whose buffers, or whose products, are beyond any model of this family."""
    buffers = [[U8, 8, 8]] + ([[F32, 1 << 13, 1 << 13]] * 8 if kind == "memory" else [[U8, 1 << 13, 1 << 12]] * 2)
    rows = [[3, 0, 1] + [0] * 9] if kind == "memory" else [[6, 1, 2, 1] + [0] * 8] * 16
    tensors = {
        "model": np.array([1, len(buffers), len(rows), 2], "<i4"),
        "buffers": np.array(buffers, "<i4"),
        "operations": np.array(rows, "<i4"),
        "ports": np.array([[U8, 4, 1, 1, 8, 8], [F32, 1, 1, 0, 0, 0]], "<i4"),
        "names": np.frombuffer(b"image\nlogits", np.uint8),
    }
    tracemalloc.start()
    try:
        with pytest.raises(EngineError, match="MiB" if kind == "memory" else "multiplies"):
            read_model(tensors)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()
