"""The LiteRT writer: its files, computed in numpy, are the graph, and stay finite when computed in FP16."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from tests.export.students import make_student, observed, phantom_inputs, small_graph
from tests.export.tflite_numpy import NumpyModel
from tests.needs import needs
from tinyusfm_export.graph.build import ExportGraph, build_graph
from tinyusfm_export.graph.net import Net
from tinyusfm_export.graph.stages import split_graph
from tinyusfm_export.quantize.decision import QuantDecision, TensorQuant, float_decision
from tinyusfm_export.quantize.ptq import decide, quantize_weight
from tinyusfm_export.targets.litert.flatbuffer import ALIGNMENT, SIGNATURE, ModelFile
from tinyusfm_export.targets.litert.writer import write_model
from tinyusfm_runtime.early_exit import TOKENS_IN, TOKENS_OUT
from tinyusfm_runtime.engines import EngineConfig
from tinyusfm_runtime.engines.litert import Engine
from tinyusfm_runtime.errors import UnsupportedError
from tinyusfm_runtime.spec import ExitPolicy, ModelSpec, PreprocessSpec, TensorSpec

needs("tflite", "tflite is not installed: pip install 'tinyusfm-edge[litert]'")
FLOAT = float_decision("fp32")
EPS = 1e-6


def answers(graph: ExportGraph, tensor: np.ndarray) -> dict[str, np.ndarray]:
    with torch.inference_mode():
        found = graph.module(torch.from_numpy(tensor))
    return dict(zip(graph.outputs, (value.numpy() for value in found), strict=True))


def rectangle() -> tuple[torch.nn.Module, ModelSpec]:
    """A student for 80 rows and 112 columns: 5x7 patches."""
    student, spec = make_student(image_width=112)
    return student, replace(spec, preprocess=PreprocessSpec(height=80, width=112))


CASES: dict[str, Any] = {
    "segment": lambda: make_student(),
    "classify": lambda: make_student("classify"),
    "features": lambda: make_student("features"),
    "one head": lambda: make_student(heads=1),
    "light head": lambda: make_student(seg_head="lite"),
    "several classes": lambda: make_student(num_classes=3),
    "rectangle": rectangle,
    "heads of 64": lambda: make_student("classify", width=192, heads=3, depth=2),
}


@pytest.mark.parametrize("case", CASES)
def test_the_file_is_the_graph(case: str) -> None:
    graph = build_graph(*CASES[case]())
    model = NumpyModel(write_model(graph, FLOAT))
    for tensor in phantom_inputs(graph.spec, 1):
        wanted = answers(graph, tensor)
        found = model.run(tensor)
        assert tuple(found) == graph.outputs
        for name, value in wanted.items():
            np.testing.assert_allclose(found[name], value, rtol=0, atol=2e-5 * np.abs(value).max())
    counts = Counter(model.operators())
    assert "CUSTOM" not in counts and counts["SOFTMAX"] == counts["GELU"] == depth(graph)


def depth(graph: ExportGraph) -> int:
    return int(graph.spec.architecture["depth"])


@pytest.mark.parametrize("case", CASES)
def test_litert_computes_the_graph(case: str) -> None:
    pytest.importorskip("ai_edge_litert", reason="ai-edge-litert is not installed")
    graph = build_graph(*CASES[case]())
    tensor = phantom_inputs(graph.spec, 1)[0]
    wanted = answers(graph, tensor)["logits"]
    limits = {"fp32": 1e-4, "int8": 0.25}
    for precision, limit in limits.items():
        engine = Engine()
        content = write_model(graph, decide(graph, precision, observed(graph)))
        engine.load({"model.tflite": content}, graph.spec, EngineConfig(threads=1, rest_precision="f32"))
        found = engine.run(tensor)["logits"]
        engine.close()
        assert found.shape == wanted.shape
        assert np.abs(found - wanted).max() < limit * np.abs(wanted - wanted.mean()).max(), precision


def test_a_chain_of_exits_is_a_file_a_stage() -> None:
    student, spec = make_student("classify", depth=4, exits=(2,), num_classes=3, image_size=48)
    spec = replace(spec, labels=("a", "b", "c"), exits=ExitPolicy(blocks=(2,), entropy=(0.1,)))
    whole = build_graph(student, spec)
    tensor = phantom_inputs(spec, 1)[0]
    wanted = answers(whole, tensor)
    first, second = (NumpyModel(write_model(stage, FLOAT)) for stage in split_graph(whole))
    early = first.run(tensor)
    assert list(early) == ["logits", TOKENS_OUT]
    np.testing.assert_allclose(early["logits"], wanted["logits_exit2"], atol=1e-4)
    late = second.run(early[TOKENS_OUT].astype(np.float32))
    np.testing.assert_allclose(late["logits"], wanted["logits"], atol=1e-3)
    assert second.graph.Tensors(second.graph.Inputs(0)).Name().decode() == TOKENS_IN


def test_int8_weights_are_the_decision_and_the_rest_is_float() -> None:
    graph = small_graph()
    ranges = observed(graph)
    decision = decide(graph, "int8", ranges)
    float_ones = {name for name in graph.linear_inputs if "qkv" in graph.linear_inputs[name]}
    tensors = {n: TensorQuant(mode="float") if n in float_ones else q for n, q in decision.tensors.items()}
    model = NumpyModel(write_model(graph, replace(decision, tensors=tensors, weight_limit=63)))
    kinds = {}
    for number in range(model.graph.TensorsLength()):
        tensor = model.graph.Tensors(number)
        name = tensor.Name().decode()
        if name.endswith(".weight"):
            kinds[name.removesuffix(".weight")] = tensor
    for source, layer in graph.linear_inputs.items():
        quantization = kinds[layer].Quantization()
        coded = source not in float_ones and tensors[source].mode != "float"
        assert (kinds[layer].Type() == 9) == coded and (quantization is not None) == coded, layer
        if coded:
            weight = graph.module.get_submodule(layer).weight.numpy()
            weight = weight * 256 if layer == "patch_embed" else weight
            weight = weight.transpose(0, 2, 3, 1) if weight.ndim == 4 else weight
            codes, scales = quantize_weight(np.ascontiguousarray(weight), limit=63)
            stored = model.file.Buffers(kinds[layer].Buffer()).DataAsNumpy().view(np.int8)
            np.testing.assert_array_equal(stored, codes.reshape(-1))
            assert np.abs(stored).max() == 63
            np.testing.assert_array_equal(quantization.ScaleAsNumpy(), scales)
            assert quantization.QuantizedDimension() == 0 and not quantization.ZeroPointAsNumpy().any()


def test_a_decision_of_another_graph_is_refused() -> None:
    tensors = {"blocks.99.input": TensorQuant(mode="dynamic")}
    with pytest.raises(UnsupportedError, match="decide again"):
        write_model(small_graph(), QuantDecision(precision="int8", rest_precision="f32", tensors=tensors))


# ---- the file


def test_constants_are_aligned_and_stored_once_and_the_signature_names_the_ends() -> None:
    import tflite

    content = write_model(small_graph(), FLOAT)
    assert content[4:8] == b"TFL3"
    model = tflite.Model.GetRootAs(content, 0)
    seen, addresses = [], []
    start = np.frombuffer(content, np.uint8).__array_interface__["data"][0]
    for number in range(1, model.BuffersLength()):
        data = model.Buffers(number).DataAsNumpy()
        addresses.append(data.__array_interface__["data"][0] - start)
        seen.append(data.tobytes())
    assert addresses and all(0 < place < len(content) and place % ALIGNMENT == 0 for place in addresses)
    types = {model.Subgraphs(0).Tensors(n).Buffer(): model.Subgraphs(0).Tensors(n) for n in
             range(model.Subgraphs(0).TensorsLength())}  # fmt: skip
    plain = [(raw, types[n].Type(), types[n].ShapeAsNumpy().tobytes()) for n, raw in enumerate(seen, start=1)]
    assert len(plain) == len(set(plain))
    signature = model.SignatureDefs(0)
    assert signature.SignatureKey().decode() == SIGNATURE
    assert signature.Inputs(0).Name() == b"image" and signature.Outputs(0).Name() == b"logits"


def small_file() -> bytes:
    """relu(x W^T + b) with int8 weights, put together by hand."""
    file = ModelFile("golden")
    x, y, z = file.tensor("x", (1, 2, 3)), file.tensor("y", (1, 2, 2)), file.tensor("z", (1, 2, 2))
    weight = file.constant("w", np.array([[1, 2, 3], [4, 5, 6]], np.int8), np.array([0.5, 0.25], np.float32))
    bias = file.constant("b", np.array([1.0, -8.0], np.float32))
    file.operator("FULLY_CONNECTED", [x, weight, bias], [y], KeepNumDims=True, AsymmetricQuantizeInputs=True)
    file.operator("RELU", [y], [z])
    return file.finish([x], [z])


def test_a_small_file_is_what_it_was_and_computes() -> None:
    content = small_file()
    assert content == small_file()
    found = NumpyModel(content).run(np.ones((1, 2, 3), np.float32))
    np.testing.assert_array_equal(found["z"], [[[4.0, 0.0], [4.0, 0.0]]])
    import tflite

    model = tflite.Model.GetRootAs(content, 0)
    codes = [(model.OperatorCodes(n).BuiltinCode(), model.OperatorCodes(n).Version()) for n in range(2)]
    assert codes == [(9, 12), (19, 1)], "fully connected with int8 weights per channel, and relu"
    tensor = model.Subgraphs(0).Tensors(3)
    assert model.Buffers(tensor.Buffer()).DataAsNumpy().tolist() == [1, 2, 3, 4, 5, 6]


# ---- FP16


def norm_model(width: int, dtype: Any) -> NumpyModel:
    """LayerNorm alone, as the writer writes it."""
    net = Net((1, 4, width))
    net.image.name, net.image.target = "image", "image"
    out = net.normalise("logits", net.image, EPS)
    module = net.finish({"logits": out})
    spec = replace(make_student()[1])
    graph = ExportGraph(
        module=module,
        spec=spec,
        outputs=("logits",),
        linear_inputs={},
        takes=TensorSpec(name="image", dtype="float32", axes="BND", shape=(1, 4, width)),
    )
    return NumpyModel(write_model(graph, FLOAT), dtype)


def tokens(width: int, size: float) -> np.ndarray:
    """Four tokens in FP16: ordinary, one massive value, all massive with an offset, nearly constant."""
    random = np.random.default_rng(2)
    found = random.normal(size=(1, 4, width))
    found[0, 1, 7] = size
    found[0, 2] = 0.5 * size + found[0, 2] * 0.1 * size
    found[0, 3] = 1.0 + 1e-3 * found[0, 3]
    return found.clip(-60000, 60000).astype(np.float16).astype(np.float64)


def exact_norm(x: np.ndarray) -> np.ndarray:
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + EPS)


def plain_norm(x: np.ndarray) -> np.ndarray:
    """The usual steps in FP16: the form that overflows."""
    with np.errstate(all="ignore"):
        centred = x.astype(np.float16) - x.astype(np.float16).mean(-1, keepdims=True)
        square = np.square(centred)
        return centred / np.sqrt(square.mean(-1, keepdims=True) + np.float16(EPS))


@pytest.mark.parametrize("width", [48, 192, 768])
@pytest.mark.parametrize("size", [10.0, 300.0, 5000.0, 60000.0])
def test_layer_norm_does_not_overflow_fp16(width: int, size: float) -> None:
    x = tokens(width, size)
    exact = norm_model(width, np.float64).run(x)["logits"]
    np.testing.assert_allclose(exact, exact_norm(x), atol=1e-6)
    half = norm_model(width, np.float16).run(x.astype(np.float16))["logits"]
    assert np.isfinite(half).all()
    np.testing.assert_allclose(half[:, :3], exact[:, :3], atol=0.02 * np.abs(exact[:, :3]).max())
    if size >= 300:
        control = plain_norm(x)[:, 1].astype(np.float64)
        assert not np.allclose(control, exact[:, 1], atol=0.02 * np.abs(exact[:, 1]).max()), "the plain form does"


def test_the_whole_network_stays_finite_in_fp16() -> None:
    graph = small_graph("classify")
    tensor = phantom_inputs(graph.spec, 1)[0]
    content = write_model(graph, FLOAT)
    exact, half = (NumpyModel(content, dtype).run(tensor)["logits"] for dtype in (np.float64, np.float16))
    assert np.isfinite(half).all()
    assert np.abs(half - exact).max() < 0.05 * np.abs(exact).max()
