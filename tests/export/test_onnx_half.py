"""FP16 with explicit casts: what is typed how, that answers stay close, and that TensorRT's parser sees the same."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import ModelProto, numpy_helper

from tests.export.students import observed, phantom_inputs, small_graph
from tests.fakes.tensorrt import real_module
from tinyusfm_export.graph.build import ExportGraph
from tinyusfm_export.onnx_files.half import KEPT_FLOAT, half_onnx, half_scale
from tinyusfm_export.onnx_files.int8 import qdq_onnx
from tinyusfm_export.onnx_files.writer import write_onnx
from tinyusfm_export.quantize.decision import QuantDecision
from tinyusfm_export.quantize.ptq import decide
from tinyusfm_runtime.engines.trt.build import (
    BuildFlags,
    build_plan,
    check_capabilities,
    check_types,
    import_tensorrt,
    parse,
)
from tinyusfm_runtime.errors import UnsupportedError

FLOAT, HALF = onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16


@pytest.fixture(scope="module")
def graph() -> ExportGraph:
    return small_graph()


@pytest.fixture(scope="module")
def decision(graph: ExportGraph) -> QuantDecision:
    return decide(graph, "int8", observed(graph))


def types(model: ModelProto) -> dict[str, int]:
    """Tensor -> element type, by ONNX's own inference."""
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True)
    values = [*inferred.graph.value_info, *inferred.graph.input, *inferred.graph.output]
    found = {value.name: value.type.tensor_type.elem_type for value in values}
    return {**found, **{tensor.name: tensor.data_type for tensor in model.graph.initializer}}


def run(data: bytes, tensor: np.ndarray) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    return list(session.run(None, {"image": tensor}))


def both(graph: ExportGraph, decision: QuantDecision) -> list[bytes]:
    return [half_onnx(write_onnx(graph)), qdq_onnx(graph, decision, half=True)]


def test_layernorm_softmax_and_means_are_float32_and_products_are_not(
    graph: ExportGraph, decision: QuantDecision
) -> None:
    for data in both(graph, decision):
        model = onnx.load_from_string(data)
        onnx.checker.check_model(model, full_check=True)
        known, seen = types(model), Counter[str]()
        for node in model.graph.node:
            kinds = {known[name] for name in [*node.input, *node.output] if known.get(name) in (FLOAT, HALF)}
            if node.op_type in KEPT_FLOAT:
                assert kinds == {FLOAT}, node.name
            elif node.op_type != "Cast":
                assert kinds <= {HALF}, (node.op_type, node.name)
            seen[node.op_type] += 1
        assert {"LayerNormalization", "Softmax", "MatMul", "Conv"} <= set(seen)


def test_input_and_outputs_keep_their_types(graph: ExportGraph, decision: QuantDecision) -> None:
    for data in both(graph, decision):
        model = onnx.load_from_string(data)
        assert [(o.name, o.type.tensor_type.elem_type) for o in model.graph.output] == [
            (name, FLOAT) for name in graph.outputs
        ]
        assert model.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.UINT8


def test_fp16_answers_like_the_module(graph: ExportGraph) -> None:
    tensor = phantom_inputs(graph.spec, 1)[0]
    want = graph.module(torch.from_numpy(tensor))[0].numpy()
    found = run(half_onnx(write_onnx(graph)), tensor)[0]
    error = float(np.sqrt(np.mean((found - want) ** 2)) / want.std())
    assert 1e-5 < error < 1e-2, "FP16 is really used, and costs no more than its roundings"


def test_int8_with_an_fp16_rest_is_the_same_decision(graph: ExportGraph, decision: QuantDecision) -> None:
    tensor = phantom_inputs(graph.spec, 1)[0]
    want = graph.module(torch.from_numpy(tensor))[0].numpy()
    whole, half = (run(qdq_onnx(graph, decision, half=half), tensor)[0] for half in (False, True))
    lost, with_half = (float(np.sqrt(np.mean((found - want) ** 2)) / want.std()) for found in (whole, half))
    assert lost > 0.01 and with_half < 2 * lost, "FP16 between the layers flips codes here and there, no more"


def test_scales_are_exact_in_fp16_and_still_cover_the_weights(graph: ExportGraph, decision: QuantDecision) -> None:
    model = onnx.load_from_string(qdq_onnx(graph, decision, half=True))
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    checked = 0
    for name, codes in constants.items():
        if not name.endswith(".weight_codes"):
            continue
        path = name.removesuffix(".weight_codes")
        scale = constants[f"{path}.weight_scale/half"]
        weight = graph.module.get_submodule(path).weight.detach().numpy()
        if weight.ndim == 2:
            codes = codes.T
        step = scale.astype(np.float32).reshape((-1,) + (1,) * (weight.ndim - 1))
        assert scale.dtype == np.float16 and np.abs(codes).max() <= 127
        assert (np.abs(codes * step - weight) <= 0.5001 * step).all(), "no weight is clipped"
        checked += 1
    assert checked == len(decision.quantized())


@given(st.floats(min_value=2.0**-26, max_value=60000.0, width=32))
def test_half_scale_is_the_next_fp16_number_upwards(value: float) -> None:
    found = half_scale(np.float32(value))
    assert np.float16(found) == found and found >= np.float32(value)
    below = np.nextafter(np.float16(found), np.float16(0))
    assert np.float32(below) < np.float32(value)


def test_equal_graphs_give_equal_bytes(graph: ExportGraph, decision: QuantDecision) -> None:
    again = small_graph()
    assert both(again, decision) == both(graph, decision)


def test_a_weight_outside_fp16_is_refused(graph: ExportGraph) -> None:
    model = onnx.load_from_string(write_onnx(graph))
    for tensor in model.graph.initializer:
        if tensor.name.endswith("fc1.weight"):
            array = numpy_helper.to_array(tensor).copy()
            array[0, 0] = 1e6
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
            break
    with pytest.raises(UnsupportedError, match="does not fit FP16"):
        half_onnx(model.SerializeToString())


# what TensorRT's own parser makes of it


@pytest.fixture(scope="module")
def library() -> Any:
    real_module()
    return import_tensorrt()


def test_tensorrt_sees_the_types_that_were_written(graph: ExportGraph, decision: QuantDecision, library: Any) -> None:
    count = len(decision.quantized())
    check_types(parse(library, write_onnx(graph)), "fp32", quantized=0)
    fp16, int8 = both(graph, decision)
    check_types(parse(library, fp16), "fp16", quantized=0)
    network = parse(library, int8)
    check_types(network, "int8", quantized=count)
    assert network.count("QUANTIZE", "INT8") == count and network.count("DEQUANTIZE", "HALF") == 2 * count


@pytest.mark.parametrize(
    ("which", "precision", "count", "message"),
    [
        ("fp32", "int8", None, "no Q/DQ nodes"),
        ("fp32", "fp16", 0, "not typed HALF"),
        ("fp16", "fp32", 0, "not typed FLOAT"),
        ("int8", "fp16", 0, "the decision has 0"),
        ("int8", "int8", 3, "the decision has 3"),
        ("careless", "fp16", 0, "not float32"),
    ],
)
def test_other_types_than_the_name_says_are_refused(
    graph: ExportGraph, decision: QuantDecision, library: Any, which: str, precision: str, count: int, message: str
) -> None:
    fp16, int8 = both(graph, decision)
    model = onnx.load_from_string(write_onnx(graph))
    files = {"fp32": write_onnx(graph), "fp16": fp16, "int8": int8, "careless": careless(model)}
    with pytest.raises(UnsupportedError, match=message):
        check_types(parse(library, files[which]), precision, quantized=count)


def careless(model: ModelProto) -> bytes:
    """Every type FP16, LayerNorm and softmax too: what a careless conversion writes."""
    for tensor in model.graph.initializer:
        if tensor.data_type == FLOAT:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), tensor.name))
    for node in model.graph.node:
        if node.op_type == "Cast":
            node.attribute[0].i = HALF
    for output in model.graph.output:
        output.type.tensor_type.elem_type = HALF
    return bytes(model.SerializeToString())


@pytest.mark.parametrize("spoil", ["nonsense", "operator"])
def test_what_tensorrt_cannot_parse_names_the_node(graph: ExportGraph, library: Any, spoil: str) -> None:
    model = onnx.load_from_string(write_onnx(graph))
    model.graph.node[5].op_type = "NoSuchOperator"
    data = b"nonsense" * 9 if spoil == "nonsense" else model.SerializeToString()
    with pytest.raises(UnsupportedError, match="cannot parse the model") as caught:
        parse(library, data)
    assert "\n" not in str(caught.value)
    assert spoil == "nonsense" or model.graph.node[5].name in str(caught.value)


@pytest.mark.slow
def test_int8_with_an_fp16_rest_builds_for_turing_and_later(
    graph: ExportGraph, decision: QuantDecision, library: Any
) -> None:
    network = parse(library, both(graph, decision)[1])
    seen: list[float] = []
    plan, timing = build_plan(
        library, network, BuildFlags(), compute_capabilities=("7.5",), progress=lambda what, share: seen.append(share)
    )
    assert len(plan) > 1000 and timing == b"" and seen == sorted(seen) and seen


def test_unknown_compute_capabilities_are_refused(library: Any) -> None:
    with pytest.raises(Exception, match=r"compute capability '9.0'.*8.6"):
        check_capabilities(library, ("8.6", "9.0"))
