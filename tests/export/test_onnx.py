"""The ONNX file: what is in it, that readers agree with the module, and the two int8 forms."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from tests.export.students import make_student, observed, phantom_inputs, small_graph
from tinyusfm_export.graph.build import ExportGraph, build_graph
from tinyusfm_export.onnx_files.int8 import ort_onnx, qdq_onnx
from tinyusfm_export.onnx_files.writer import OPSET, FloatForm, save_checked, write_onnx
from tinyusfm_export.quantize.decision import QuantDecision, TensorQuant, float_decision
from tinyusfm_export.quantize.ptq import PtqPolicy, decide
from tinyusfm_runtime.errors import OutputError, UnsupportedError

ort = pytest.importorskip(
    "onnxruntime", reason="onnxruntime is not installed: pip install 'tinyusfm-edge[onnxruntime]'"
)


@pytest.fixture(scope="module")
def graph() -> ExportGraph:
    return build_graph(*make_student(), auxiliary=("tokens_block4",))


@pytest.fixture(scope="module")
def decision(graph: ExportGraph) -> QuantDecision:
    return decide(graph, "int8", observed(graph))


def run(data: bytes, tensor: np.ndarray) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    return list(session.run(None, {"image": tensor}))


def kinds(data: bytes) -> list[str]:
    return [node.op_type for node in onnx.load_from_string(data).graph.node]


def relative(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.sqrt(np.mean((found - wanted) ** 2)) / wanted.std())


@pytest.mark.parametrize("task", ["segment", "classify", "features"])
def test_onnx_runtime_agrees_with_the_module(task: str) -> None:
    graph = small_graph(task)
    for tensor in phantom_inputs(graph.spec):
        wanted = graph.module(torch.from_numpy(tensor))[0].numpy()
        found = run(write_onnx(graph), tensor)[0]
        assert np.abs(found - wanted).max() <= 2e-5 * np.abs(wanted).max()


def test_file_is_checked_static_and_self_contained(graph: ExportGraph, tmp_path: Path) -> None:
    path = save_checked(write_onnx(graph), tmp_path / "model.onnx")
    model = onnx.load(str(path), load_external_data=False)
    assert [(o.domain, o.version) for o in model.opset_import] == [("", OPSET)]
    assert 17 <= OPSET <= 20
    assert [i.name for i in model.graph.input] == ["image"]
    assert [o.name for o in model.graph.output] == ["logits", "tokens_block4"]
    assert model.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.UINT8
    for value in (*model.graph.input, *model.graph.output):
        assert all(dim.dim_value > 0 for dim in value.type.tensor_type.shape.dim)
    assert not any(t.data_location == onnx.TensorProto.EXTERNAL for t in model.graph.initializer)
    assert list(tmp_path.iterdir()) == [path]
    assert not model.metadata_props and not model.doc_string and not model.graph.doc_string


def test_norms_gelu_and_softmax_are_single_nodes(graph: ExportGraph) -> None:
    found = kinds(write_onnx(graph))
    assert found.count("LayerNormalization") == 24
    assert found.count("Gelu") == found.count("Softmax") == 12
    assert not {"Erf", "Exp", "Sqrt", "Pow"} & set(found)


@pytest.mark.parametrize("task", ["segment", "classify", "features"])
def test_heads_without_a_batch_axis_give_the_same_numbers(task: str) -> None:
    graph = small_graph(task)
    four, three = write_onnx(graph), write_onnx(graph, flat_heads=True)
    for tensor in phantom_inputs(graph.spec):
        for got, want in zip(run(three, tensor), run(four, tensor), strict=True):
            np.testing.assert_allclose(got, want, rtol=0, atol=2e-5 * np.abs(want).max())
    shapes = onnx.shape_inference.infer_shapes(onnx.load_from_string(three), strict_mode=True)
    sides = {value.name: len(value.type.tensor_type.shape.dim) for value in shapes.graph.value_info}
    within = [name for name in sides if re.search(r"\.attn\.([qkv]|scores|weights|mix|context)$", name)]
    assert len(within) == 7 * 12 and {sides[name] for name in within} == {3}


def test_names_are_those_of_the_decision(graph: ExportGraph) -> None:
    model = onnx.load_from_string(write_onnx(graph))
    tensors = {name for node in model.graph.node for name in node.input}
    assert set(graph.linear_inputs) <= tensors
    weights = {t.name for t in model.graph.initializer}
    assert {f"{layer}.weight" for layer in graph.linear_inputs.values()} <= weights
    names = [node.name for node in model.graph.node]
    assert len(set(names)) == len(names) and "blocks.3.mlp.fc1/matmul" in names


def test_float_input_takes_the_same_codes(graph: ExportGraph) -> None:
    (tensor,) = phantom_inputs(graph.spec, 1)
    data = write_onnx(graph, float_input=True)
    assert onnx.load_from_string(data).graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    wanted = run(write_onnx(graph), tensor)
    for got, want in zip(run(data, tensor.astype(np.float32)), wanted, strict=True):
        np.testing.assert_array_equal(got, want)


def test_half_storage_halves_the_file_and_computes_in_float32(graph: ExportGraph) -> None:
    data = write_onnx(graph, form=FloatForm(half_storage=True))
    assert len(data) < 0.6 * len(write_onnx(graph))
    (tensor,) = phantom_inputs(graph.spec, 1)
    wanted, found = run(write_onnx(graph), tensor)[0], run(data, tensor)[0]
    assert found.dtype == np.float32
    assert 0 < relative(found, wanted) < 5e-3


def test_half_storage_refuses_what_does_not_fit() -> None:
    student, spec = make_student()
    student.backbone.blocks[0].mlp.fc2.weight.data[0, 0] = 1e5  # type: ignore[index, union-attr]
    with pytest.raises(UnsupportedError, match=r"blocks\.0\.mlp\.fc2\.weight.*float16"):
        write_onnx(build_graph(student, spec), form=FloatForm(half_storage=True))


def test_qdq_is_explicit_symmetric_with_float_bias(graph: ExportGraph, decision: QuantDecision, tmp_path: Path) -> None:
    data = qdq_onnx(graph, decision)
    save_checked(data, tmp_path / "qdq.onnx")
    model = onnx.load_from_string(data)
    constants = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    layers = len(decision.quantized())
    assert layers == 48 + 8
    quantize = [node for node in model.graph.node if node.op_type == "QuantizeLinear"]
    dequantize = [node for node in model.graph.node if node.op_type == "DequantizeLinear"]
    assert len(quantize) == layers and len(dequantize) == 2 * layers
    for node in (*quantize, *dequantize):
        zero = constants[node.input[2]]
        assert zero.dtype == np.int8 and not zero.any()
    weights = [constants[node.input[0]] for node in dequantize if node.input[0] in constants]
    assert len(weights) == layers and all(w.dtype == np.int8 and w.min() >= -127 for w in weights)
    assert all(value.dtype != np.int32 for value in constants.values())
    assert not [node for node in quantize if node.input[0].endswith((".mid", ".out", ".scores", ".weights"))]


def test_ort_form_is_dynamic_linears_and_static_convolutions(graph: ExportGraph, decision: QuantDecision) -> None:
    data = ort_onnx(graph, decision)
    onnx.checker.check_model(onnx.load_from_string(data), full_check=True)
    found = kinds(data)
    assert found.count("MatMulInteger") == 48
    assert found.count("QLinearConv") == 4
    assert len(data) < 0.5 * len(write_onnx(graph))


def test_onnx_runtime_fuses_every_dynamic_linear(graph: ExportGraph, decision: QuantDecision, tmp_path: Path) -> None:
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "fused.onnx")
    options.log_severity_level = 3
    ort.InferenceSession(ort_onnx(graph, decision), options, providers=["CPUExecutionProvider"])
    fused = [node.op_type for node in onnx.load(tmp_path / "fused.onnx").graph.node]
    assert fused.count("DynamicQuantizeMatMul") == 48
    assert "MatMulInteger" not in fused


@pytest.mark.parametrize("form", ["float", "qdq"])
def test_tensorrt_parses_it(graph: ExportGraph, decision: QuantDecision, form: str) -> None:
    tensorrt = pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    network = tensorrt.Builder(tensorrt.Logger(tensorrt.Logger.ERROR)).create_network(0)
    parser = tensorrt.OnnxParser(network, tensorrt.Logger(tensorrt.Logger.ERROR))
    parsed = parser.parse(qdq_onnx(graph, decision) if form == "qdq" else write_onnx(graph))
    assert parsed, [str(parser.get_error(i)) for i in range(parser.num_errors)]


@pytest.mark.parametrize("write", [ort_onnx, qdq_onnx])
def test_int8_forms_stay_close_to_float(graph: ExportGraph, decision: QuantDecision, write: Any) -> None:
    for tensor in phantom_inputs(graph.spec):
        wanted = run(write_onnx(graph), tensor)
        found = run(write(graph, decision), tensor)
        for got, want in zip(found, wanted, strict=True):
            assert 0 < relative(got, want) < 0.15


@pytest.mark.parametrize("write", [ort_onnx, qdq_onnx])
def test_a_wrong_range_would_show(graph: ExportGraph, decision: QuantDecision, write: Any) -> None:
    # the input of a convolution, since ONNX Runtime's linears find their own range
    narrow = {**decision.tensors, "head.smooth.0.input": TensorQuant(mode="static", low=0.0, high=0.05)}
    spoilt = QuantDecision(precision="int8", rest_precision="f32", tensors=narrow)
    (tensor,) = phantom_inputs(graph.spec, 1)
    wanted = run(write_onnx(graph), tensor)[0]
    assert relative(run(write(graph, spoilt), tensor)[0], wanted) > 2 * relative(
        run(write(graph, decision), tensor)[0], wanted
    )


def test_light_head_keeps_its_depthwise_convolutions_float() -> None:
    graph = small_graph(seg_head="lite")
    decision = decide(graph, "int8", observed(graph))
    found = kinds(ort_onnx(graph, decision))
    assert found.count("QLinearConv") == 4 and found.count("Conv") == 4 + 4


def test_float_decision_writes_the_float_file(graph: ExportGraph) -> None:
    assert qdq_onnx(graph, float_decision("fp32")) == write_onnx(graph)


def test_dynamic_tensor_has_no_qdq_form(graph: ExportGraph) -> None:
    decision = decide(graph, "int8", observed(graph), policy=PtqPolicy(dynamic=("blocks.*",)))
    with pytest.raises(UnsupportedError, match="dynamic"):
        qdq_onnx(graph, decision)


@pytest.mark.parametrize("write", [ort_onnx, qdq_onnx])
def test_decision_of_another_graph_is_refused(graph: ExportGraph, write: Any) -> None:
    tensors = {"blocks.99.mlp.fc1.input": TensorQuant(mode="static", low=-1.0, high=1.0)}
    with pytest.raises(UnsupportedError, match=r"blocks\.99"):
        write(graph, QuantDecision(precision="int8", rest_precision="f32", tensors=tensors))


def test_unwritable_folder_is_one_clear_line(graph: ExportGraph, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot write"):
        save_checked(write_onnx(graph), tmp_path / "missing" / "model.onnx")


def test_broken_file_does_not_pass_the_checker(graph: ExportGraph, tmp_path: Path) -> None:
    model = onnx.load_from_string(write_onnx(graph))
    del model.graph.node[10]
    with pytest.raises(UnsupportedError, match="not valid"):
        save_checked(model.SerializeToString(), tmp_path / "broken.onnx")
