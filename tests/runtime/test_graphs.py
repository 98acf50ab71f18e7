"""Model files that attack: each is refused before a library sees it, in one line, without time and without memory."""

from __future__ import annotations

import json
import time
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.conftest import SIDE, Parts, tiny_onnx, tiny_spec
from tinyusfm_runtime.engines import EngineConfig, ort, ov
from tinyusfm_runtime.errors import EngineError
from tinyusfm_runtime.graphs import ir, mil, onnx
from tinyusfm_runtime.graphs.budget import Budget
from tinyusfm_runtime.graphs.tensors import Node, Tensor, known

SPEC = tiny_spec()
Files = Callable[[str], dict[str, bytes]]
CONFIG = EngineConfig(threads=1, rest_precision="f32")


@pytest.fixture(scope="module")
def library() -> Any:
    return pytest.importorskip("onnx", reason="onnx is not installed: pip install 'tinyusfm-edge[export]'")


def model(library: Any, nodes: list[Any], weights: dict[str, np.ndarray] | None = None, **more: Any) -> Any:
    """A model that casts its image to ``floats``, does what is asked for and gives ``logits``."""
    helper = library.helper
    first = helper.make_node("Cast", ["image"], ["floats"], to=library.TensorProto.FLOAT)
    graph = helper.make_graph(
        [first, *nodes],
        "hostile",
        [helper.make_tensor_value_info("image", library.TensorProto.UINT8, [1, 1, SIDE, SIDE])],
        [helper.make_tensor_value_info("logits", library.TensorProto.FLOAT, None)],
        [library.numpy_helper.from_array(array, name) for name, array in (weights or {}).items()],
    )
    opsets = more.pop("opset_imports", [helper.make_opsetid("", 17)])
    return helper.make_model(graph, opset_imports=opsets, ir_version=8, **more)


def refused(raw: bytes) -> str:
    """Why a model is refused, by the engine too; quickly, and without memory."""
    tracemalloc.start()
    start_s = time.process_time()
    with pytest.raises(EngineError) as caught:
        ort.Engine().load({"model.onnx": raw}, SPEC, CONFIG)
    assert time.process_time() - start_s < 5 and tracemalloc.get_traced_memory()[1] < 64 << 20
    tracemalloc.stop()
    with pytest.raises(EngineError):
        onnx.check(raw, SPEC.input, SPEC)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def identity(library: Any, source: str) -> Any:
    return library.helper.make_node("Identity", [source], ["logits"])


def test_what_our_tests_and_targets_write_passes(library: Any) -> None:
    onnx.check(tiny_onnx(), SPEC.input, SPEC)
    onnx.check(model(library, [identity(library, "floats")]).SerializeToString(), SPEC.input, SPEC)


def loop(library: Any) -> Any:
    helper, proto = library.helper, library.TensorProto
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["still"]), helper.make_node("Identity", ["x"], ["y"])],
        "body",
        [
            helper.make_tensor_value_info("i", proto.INT64, []),
            helper.make_tensor_value_info("go", proto.BOOL, []),
            helper.make_tensor_value_info("x", proto.FLOAT, None),
        ],
        [helper.make_tensor_value_info("still", proto.BOOL, []), helper.make_tensor_value_info("y", proto.FLOAT, None)],
    )
    return helper.make_node("Loop", ["", "yes", "floats"], ["logits"], body=body)


def doubled(library: Any) -> list[Any]:
    names = ["floats", *(f"c{i}" for i in range(40))]
    pairs = zip(names, names[1:], strict=False)
    nodes = [library.helper.make_node("Concat", [a, a], [b], axis=3) for a, b in pairs]
    return [*nodes, identity(library, names[-1])]


HOSTILE: dict[str, Callable[[Any], Any]] = {
    "endless loop": lambda o: model(o, [loop(o)], {"yes": np.array(True)}),
    "ConstantOfShape": lambda o: model(
        o,
        [
            o.helper.make_node("ConstantOfShape", ["s"], ["big"]),
            o.helper.make_node("Add", ["big", "floats"], ["logits"]),
        ],
        {"s": np.array([30000, 30000], np.int64)},
    ),
    "outer product": lambda o: model(
        o,
        [o.helper.make_node("MatMul", ["a", "b"], ["ab"]), o.helper.make_node("ReduceMax", ["ab"], ["logits"])],
        {"a": np.zeros((60000, 1), np.float32), "b": np.zeros((1, 60000), np.float32)},
    ),
    "broadcast": lambda o: model(
        o,
        [o.helper.make_node("Add", ["a", "b"], ["ab"]), identity(o, "ab")],
        {"a": np.zeros((60000, 1), np.float32), "b": np.zeros((1, 60000), np.float32)},
    ),
    "doubled forty times": lambda o: model(o, doubled(o)),
    "resize": lambda o: model(
        o,
        [o.helper.make_node("Resize", ["floats", "", "by"], ["logits"], mode="nearest")],
        {"by": np.array([1, 1, 4000, 4000], np.float32)},
    ),
    "resize by what is not known": lambda o: model(
        o,
        [
            o.helper.make_node("Resize", ["floats", "", "by"], ["logits"], mode="nearest"),
        ],
        {"by": np.zeros((0,), np.float32)},
    ),
    "tile": lambda o: model(
        o, [o.helper.make_node("Tile", ["floats", "n"], ["logits"])], {"n": np.array([1, 9999, 99, 9], np.int64)}
    ),
    "gather": lambda o: model(
        o,
        [o.helper.make_node("Gather", ["floats", "i"], ["g"], axis=3), identity(o, "g")],
        {"i": np.zeros((1 << 20,), np.int64)},
    ),
    "custom operator": lambda o: model(
        o,
        [o.helper.make_node("PyOp", ["floats"], ["logits"], domain="ai.onnx.contrib")],
        opset_imports=[o.helper.make_opsetid("", 17), o.helper.make_opsetid("ai.onnx.contrib", 1)],
    ),
    "EPContext": lambda o: model(
        o,
        [o.helper.make_node("EPContext", ["floats"], ["logits"], domain="com.microsoft", ep_cache_context="/etc/x")],
        opset_imports=[o.helper.make_opsetid("", 17), o.helper.make_opsetid("com.microsoft", 1)],
    ),
    "unknown attribute": lambda o: model(o, [o.helper.make_node("Relu", ["floats"], ["logits"], path="/etc/passwd")]),
    "function": lambda o: model(
        o,
        [identity(o, "floats")],
        functions=[o.helper.make_function("f", "F", ["x"], ["y"], [o.helper.make_node("Relu", ["x"], ["y"])], [])],
    ),
    "notes on the model": lambda o: with_notes(o),
    "uses before it computes": lambda o: model(
        o, [o.helper.make_node("Relu", ["later"], ["logits"]), o.helper.make_node("Relu", ["floats"], ["later"])]
    ),
    "computes twice": lambda o: model(o, [identity(o, "floats"), identity(o, "floats")]),
    "another operator version": lambda o: model(
        o, [identity(o, "floats")], opset_imports=[o.helper.make_opsetid("", 99)]
    ),
    "an output declared larger": lambda o: declared(o),
    "free side": lambda o: free_side(o),
    "text tensor": lambda o: model(o, [identity(o, "floats")], {"t": np.array(["a", "b"], object)}),
}


def with_notes(library: Any) -> Any:
    made = model(library, [identity(library, "floats")])
    library.helper.set_model_props(made, {"ort_config": "{}"})
    return made


def declared(library: Any) -> Any:
    made = model(library, [identity(library, "floats")])
    value = library.helper.make_tensor_value_info("floats", library.TensorProto.FLOAT, [1, 1, 30000, 30000])
    made.graph.value_info.append(value)
    return made


def free_side(library: Any) -> Any:
    made = model(library, [identity(library, "floats")])
    made.graph.input[0].type.tensor_type.shape.dim[2].dim_param = "rows"
    return made


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_graph_is_refused_without_running_anything(name: str, library: Any) -> None:
    refused(HOSTILE[name](library).SerializeToString())


@pytest.mark.parametrize("location", ["weights.bin", "../../etc/passwd", "*/_ORT_MEM_ADDR_/*", "/proc/self/mem"])
def test_external_data_are_refused_whatever_they_name(location: str, library: Any) -> None:
    made = library.load_from_string(tiny_onnx())
    tensor = made.graph.initializer[-1]
    tensor.ClearField("raw_data")
    tensor.data_location = library.TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", "31337"), ("length", "196")):
        entry = tensor.external_data.add()
        entry.key, entry.value = key, value
    assert "external data" in refused(made.SerializeToString())


def test_lies_about_sizes_are_refused(library: Any) -> None:
    made = library.load_from_string(tiny_onnx())
    for dims in ([1, 1, 7, 8], [1 << 40, 1 << 40], [-1, 49], [1, 1, 7]):
        del made.graph.initializer[-1].dims[:]
        made.graph.initializer[-1].dims.extend(dims)
        assert "weight" in refused(made.SerializeToString())


def test_bytes_that_two_readers_understand_in_two_ways_are_refused(library: Any) -> None:
    raw = tiny_onnx()
    assert "twice" in refused(raw + raw), "a library merges what comes twice"
    ort_format = bytes([0x08, 8, 0x12, 4]) + b"ORTM" + raw[2:]
    assert library.load_from_string(ort_format).producer_name == "ORTM", "it is valid ONNX all the same"
    assert "ONNX format" in refused(ort_format)
    assert "number 99" in refused(raw + bytes([0x9A, 0x06, 0x00]))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_damaged_bytes_raise_nothing_but_engine_errors(data: st.DataObject) -> None:
    raw = bytearray(tiny_onnx())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    raw = raw[: data.draw(st.integers(0, len(raw)))]
    try:
        onnx.check(bytes(raw), SPEC.input, SPEC)
    except EngineError as error:
        assert "\n" not in str(error)


# OpenVINO


@pytest.fixture
def tiny_ir(tiny_files: Files) -> tuple[str, bytes]:
    files = tiny_files("ov")
    return files["model.xml"].decode(), files["model.bin"]


def ir_refused(xml: bytes | str, weights: bytes) -> str:
    raw = xml.encode() if isinstance(xml, str) else xml
    start_s = time.process_time()
    with pytest.raises(EngineError) as caught:
        ov.Engine().load({"model.xml": raw, "model.bin": weights}, SPEC, CONFIG)
    assert time.process_time() - start_s < 5
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_openvino_is_handed_is_the_same_model(tiny_ir: tuple[str, bytes]) -> None:
    xml, weights = tiny_ir
    written = ir.check(xml.encode(), weights, SPEC.input, SPEC)
    assert ir.check(written, weights, SPEC.input, SPEC) == written, "writing it again changes nothing"
    assert b"rt_info" not in written


@pytest.mark.parametrize("place", ["memory", "file"])
def test_onnx_under_the_name_of_xml_never_reaches_openvino(
    place: str, library: Any, tiny_ir: tuple[str, bytes]
) -> None:
    made = library.load_from_string(tiny_onnx())
    tensor = made.graph.initializer[-1]
    tensor.ClearField("raw_data")
    tensor.data_location = library.TensorProto.EXTERNAL
    location = "*/_ORT_MEM_ADDR_/*" if place == "memory" else "weights.bin"
    for key, value in (("location", location), ("offset", "4096"), ("length", "196")):
        entry = tensor.external_data.add()
        entry.key, entry.value = key, value
    for raw in (made.SerializeToString(), tiny_onnx(), b"<net" + made.SerializeToString()):
        assert "XML" in ir_refused(raw, tiny_ir[1])


IR_CHANGES: dict[str, tuple[str, str]] = {
    "document type": ("<net", '<!DOCTYPE net [<!ENTITY a "b">]><net'),
    "instruction": ("<net", "<?go there?><net"),
    "encoding": ('version="1.0"', 'version="1.0" encoding="UTF-16"'),
    "loop": ('type="Convert"', 'type="TensorIterator"'),
    "condition": ('type="Convert"', 'type="If"'),
    "extension": ('type="Convert" version="opset1"', 'type="Convert" version="extension"'),
    "another attribute": ('destination_type="f32"', 'destination_type="f32" path="/etc/passwd"'),
    "another element": ("</layers>", "</layers><weights file='x'/>"),
    "outside the weights": ('offset="4"', 'offset="4000000"'),
    "before the weights": ('offset="4"', 'offset="-4"'),
    "constant of another size": ('size="196"', 'size="1960"'),
    "constant of another shape": ('shape="1, 1, 7, 7"', 'shape="7, 7"'),
    "a shape that is not that": ("<dim>64</dim>", "<dim>65</dim>"),
    "free side": ('shape="1,1,64,64"', 'shape="1,1,?,64"'),
    "negative side": ('shape="1,1,64,64"', 'shape="1,1,-1,64"'),
    "another input": ('element_type="u8"', 'element_type="f32"'),
    "paddings": ('pads_begin="3, 3"', 'pads_begin="300000, 3"'),
    "strides": ('strides="1, 1"', 'strides="0, 1"'),
    "joined twice": ("</edges>", '<edge from-layer="0" from-port="0" to-layer="1" to-port="0"/></edges>'),
    "joined to nothing": ('from-layer="11" from-port="2"', 'from-layer="11" from-port="9"'),
    "two of one number": ('<layer id="2"', '<layer id="1"'),
    "notes on a layer": ("<data dest", '<rt_info><attribute name="__weights_path"/></rt_info><data dest'),
    "text": ("<layers>", "<layers>words"),
    "another version": ('version="11"', 'version="7"'),
    "deep": ("<rt_info>", "<rt_info>" + "<a>" * 20 + "</a>" * 20),
}  # fmt: skip


@pytest.mark.parametrize("name", IR_CHANGES)
def test_a_changed_ir_is_refused(name: str, tiny_ir: tuple[str, bytes]) -> None:
    xml, weights = tiny_ir
    before, after = IR_CHANGES[name]
    assert before in xml
    ir_refused(xml.replace(before, after, 1), weights)


def test_a_bomb_of_entities_or_elements_takes_nothing(tiny_ir: tuple[str, bytes]) -> None:
    weights = tiny_ir[1]
    entities = "".join(f'<!ENTITY a{i + 1} "{f"&a{i};" * 10}">' for i in range(12))
    ir_refused(f'<?xml version="1.0"?><!DOCTYPE net [<!ENTITY a0 "x">{entities}]><net>&a12;</net>', weights)
    ir_refused("<net>" + "<layers>" * 200_000, weights)
    ir_refused("<net>" + "<layers/>" * (ir.MAX_ELEMENTS + 1), weights)
    ir_refused(b"<net\x00>", weights)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_damaged_xml_raises_nothing_but_engine_errors(tiny_ir: tuple[str, bytes], data: st.DataObject) -> None:
    raw = bytearray(tiny_ir[0].encode())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    try:
        ir.check(bytes(raw), tiny_ir[1], SPEC.input, SPEC)
    except EngineError as error:
        assert "\n" not in str(error)


# Core ML: the whole of it is in tests/export/test_mil_writer.py, whose packages are read here by the same check


@pytest.mark.parametrize("raw", [b"", b"\x08\x08", bytes(range(256)), b"\xaa\x1f\x02\x12\x00"])
def test_no_package_is_refused(raw: bytes) -> None:
    places = {"a": {"path": "com.apple.CoreML/model.mlmodel"}, "b": {"path": "com.apple.CoreML/weights"}}
    table = json.dumps({"itemInfoEntries": places}).encode()
    with pytest.raises(EngineError):
        mil.check({"model.mlmodel": raw, "weight.bin": b"", "Manifest.json": table}, SPEC)
    with pytest.raises(EngineError, match=r"Manifest\.json"):
        mil.check(
            {"model.mlmodel": raw, "weight.bin": b"", "Manifest.json": table.replace(b"weights", b"../../x")}, SPEC
        )


# rules


@pytest.mark.parametrize(
    ("node", "shape"),
    [
        (Node("matmul", [Tensor((2, 3, 4)), Tensor((4, 5))]), (2, 3, 5)),
        (Node("matmul", [Tensor((4,)), Tensor((4,))]), ()),
        (Node("reshape", [Tensor((2, 3, 4)), known(np.array([0, -1]))]), (2, 12)),
        (Node("cut", [Tensor((9,)), known(np.array([-1])), known(np.array([-99])), None, known(np.array([-2]))]), (5,)),
        (Node("conv", [Tensor((1, 4, 9, 9)), Tensor((8, 2, 3, 3))], {"groups": 2, "strides": [2, 2]}), (1, 8, 4, 4)),
        (Node("split", [Tensor((1, 10))], {"axis": 1, "count": 3}, 3), (1, 4)),
        (Node("reduce", [Tensor((2, 3))], {"axes": [-1], "keeps": False}), (2,)),
        (Node("gather", [Tensor((5, 6)), known(np.array([1, 2, 3]))], {"axis": 1}), (5, 3)),
        (Node("unsqueeze", [Tensor((5,)), known(np.array([0, 2]))]), (1, 5, 1)),
        (Node("spread", [Tensor((1, 5)), known(np.array([3, 5]))]), (3, 5)),
    ],
)
def test_rules_give_the_shape_that_numpy_gives(node: Node, shape: tuple[int, ...]) -> None:
    assert Budget(SPEC, 0).apply(node, "it")[0].shape == shape


@pytest.mark.parametrize(
    ("node", "values"),
    [
        (Node("split", [known(np.array([128, 1, 3, 3])), known(np.array([1, 3]))], {"axis": 0}, 2), [[128], [1, 3, 3]]),
        (Node("elementwise", [known(np.array([128])), known(np.array([2]))], {"does": "divide"}), [[64]]),
        (Node("elementwise", [known(np.array([128])), known(np.array([0]))], {"does": "divide"}), [None]),
    ],
)
def test_rules_follow_whole_numbers(node: Node, values: list[list[int] | None]) -> None:
    found = [tensor.value for tensor in Budget(SPEC, 0).apply(node, "it")]
    assert [None if value is None else value.tolist() for value in found] == values


def test_a_graph_that_multiplies_too_much_is_refused() -> None:
    budget = Budget(SPEC, 0)
    node = Node("matmul", [Tensor((1500, 1500)), Tensor((1500, 1500))])
    with pytest.raises(EngineError, match="more than a model of this input needs|larger together"):
        for _ in range(1000):
            budget.apply(node, "MatMul")


def test_a_hostile_bundle_ends_in_one_line(library: Any, engine_parts: Callable[[str], Parts], tmp_path: Any) -> None:
    """Rewritten with correct hashes, as an attacker would."""
    from tests.conftest import make_parts
    from tinyusfm_runtime.session import Session

    raw = HOSTILE["endless loop"](library).SerializeToString()
    parts = make_parts({"ort": {"model.onnx": raw}})
    with pytest.raises(EngineError, match="Loop|sub-graph"):
        Session.open(parts.publish(tmp_path / "loop.bundle"))
    xml = make_parts({"ov": {"model.xml": tiny_onnx(), "model.bin": b""}})
    with pytest.raises(EngineError, match="XML"):
        Session.open(xml.publish(tmp_path / "xml.bundle"))
