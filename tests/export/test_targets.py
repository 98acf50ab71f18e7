"""OpenVINO's form of the decision: which kernels really run, and that the offset in the bias is exact."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.export.students import observed, phantom_inputs, small_graph
from tests.needs import needs
from tinyusfm_calibration.ranges import Ranges
from tinyusfm_export.graph.build import ExportGraph
from tinyusfm_export.onnx_files.int8 import ort_onnx
from tinyusfm_export.onnx_files.writer import write_onnx
from tinyusfm_export.quantize.decision import QuantDecision, TensorQuant, float_decision
from tinyusfm_export.quantize.ptq import PtqPolicy, decide, natural_grid, quantize_weight
from tinyusfm_export.targets import ort as onnx_target
from tinyusfm_export.targets import ov as openvino_target
from tinyusfm_export.targets.ov import insert_int8
from tinyusfm_runtime import plugins
from tinyusfm_runtime.device.machine import MachineCard, machine_card
from tinyusfm_runtime.device.signal_stack import kept_signal_stack
from tinyusfm_runtime.engines import EngineConfig
from tinyusfm_runtime.engines.ov import import_openvino
from tinyusfm_runtime.errors import MissingExtra, UnsupportedError

needs("openvino", reason="openvino is not installed: pip install 'tinyusfm-edge[openvino]'")

needs_bf16 = pytest.mark.skipif(not machine_card().has_bf16, reason="this CPU does not compute bf16")


@pytest.fixture(scope="module")
def graph() -> ExportGraph:
    return small_graph()


@pytest.fixture(scope="module")
def decision(graph: ExportGraph, ranges: Ranges) -> QuantDecision:
    return decide(graph, "int8", ranges, policy=PtqPolicy(rest_precision="f32"))


@pytest.fixture(scope="module")
def ranges(graph: ExportGraph) -> Ranges:
    return observed(graph)


@pytest.fixture(scope="module")
def exact(graph: ExportGraph) -> Any:
    """The float32 model."""
    return compile_model(graph, float_decision("fp32"))


def compile_model(graph: ExportGraph, decision: QuantDecision, rest: str = "f32") -> Any:
    core = import_openvino().Core()
    model = core.read_model(write_onnx(graph))
    insert_int8(model, graph, decision)
    with kept_signal_stack():
        return core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": rest, "INFERENCE_NUM_THREADS": 1})


def executed(compiled: Any) -> list[tuple[str, str, str]]:
    """(layer type, primitive, names of the layers in it) of every node that runs."""
    found = []
    for node in compiled.get_runtime_model().get_ordered_ops():
        info = {key: node.rt_info[key].astype(str) for key in ("layerType", "primitiveType", "originalLayersNames")}
        found.append((info["layerType"], info["primitiveType"], info["originalLayersNames"]))
    return found


def answer(compiled: Any, tensor: np.ndarray) -> np.ndarray:
    return np.array(compiled.create_infer_request().infer({0: tensor})[0])


def relative(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.sqrt(np.mean((found - wanted) ** 2)) / wanted.std())


@pytest.mark.parametrize("rest", ["f32", pytest.param("bf16", marks=needs_bf16)])
def test_linears_run_in_int8_and_attention_in_the_rest_precision(
    graph: ExportGraph, decision: QuantDecision, rest: str
) -> None:
    nodes = executed(compile_model(graph, decision, rest))
    linears = [kind for layer, kind, names in nodes if "FullyConnected" in layer and "blocks." in names]
    assert len(linears) == 48
    assert all(kind.lower().endswith("i8") for kind in linears), linears
    convolutions = [kind for layer, kind, names in nodes if layer == "Convolution" and "head.smooth" in names]
    assert len(convolutions) == 4 and all(kind.lower().endswith("i8") for kind in convolutions), convolutions
    attention = [kind for _, kind, names in nodes if ".attn.weights" in names]
    assert attention and all(kind.endswith(rest) for kind in attention), attention


def test_a_float_model_runs_no_int8(exact: Any) -> None:
    nodes = executed(exact)
    products = [kind for layer, kind, _ in nodes if layer.startswith(("FullyConnected", "Convolution", "MatMul"))]
    assert products and not [kind for kind in products if kind.lower().endswith("i8")]


def test_int8_stays_close_to_float(graph: ExportGraph, decision: QuantDecision, exact: Any) -> None:
    int8 = compile_model(graph, decision)
    for tensor in phantom_inputs(graph.spec):
        assert 0 < relative(answer(int8, tensor), answer(exact, tensor)) < 0.15


@pytest.mark.parametrize("task", ["classify", "features"])
def test_other_tasks_have_an_int8_form(task: str) -> None:
    other = small_graph(task)
    decision = decide(other, "int8", observed(other), policy=PtqPolicy(rest_precision="f32"))
    exact, int8 = compile_model(other, float_decision("fp32")), compile_model(other, decision)
    # the classifier averages its tokens before the last fc2, which is one row and stays float
    assert len(decision.quantized()) == (48 if task == "features" else 47)
    for tensor in phantom_inputs(other.spec):
        wanted = answer(exact, tensor)
        assert 0 < relative(answer(int8, tensor), wanted) < 0.15
        (dynamic,) = onnx_answer(ort_onnx(other, decision), tensor)
        assert 0 < relative(dynamic, wanted) < 0.15


def onnx_answer(data: bytes, tensor: np.ndarray) -> list[np.ndarray]:
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    session = runtime.InferenceSession(data, providers=["CPUExecutionProvider"])
    return list(session.run(None, {"image": tensor}))


def test_ranges_are_used_as_they_are(graph: ExportGraph, ranges: Ranges, exact: Any) -> None:
    """The natural grid is finer than the symmetric one on skewed tensors, so its error is smaller."""
    errors = {}
    for symmetric in (False, True):
        policy = PtqPolicy(symmetric=symmetric, rest_precision="f32", layers=("blocks.*.mlp.fc2",), decoder=False)
        int8 = compile_model(graph, decide(graph, "int8", ranges, policy=policy))
        errors[symmetric] = np.mean([relative(answer(int8, t), answer(exact, t)) for t in phantom_inputs(graph.spec)])
    assert errors[False] < errors[True]


def emulated(graph: ExportGraph, name: str, quant: TensorQuant, tensor: np.ndarray) -> np.ndarray:
    """The answer of the module in which one layer computes on codes, in exact arithmetic."""
    module = copy.deepcopy(graph.module)
    layer = module.get_submodule(graph.linear_inputs[name])
    grid, weight = natural_grid(quant), layer.weight.detach().numpy()
    codes, scales = quantize_weight(weight, limit=127 if machine_card().has_int8_dot else 63)
    layer.weight.data = torch.from_numpy(codes * scales.reshape((-1,) + (1,) * (weight.ndim - 1)))
    smallest, largest = (-128, 127) if grid.signed else (0, 255)

    def on_grid(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
        found = torch.clamp(torch.round(inputs[0] / grid.scale) + grid.zero, smallest, largest)
        return (found - grid.zero) * grid.scale

    layer.register_forward_pre_hook(on_grid)
    with torch.inference_mode():
        return np.asarray(module(torch.from_numpy(tensor))[0].numpy())


@pytest.mark.parametrize("layer", ["patch_embed.input", "blocks.0.mlp.fc2.input", "head.lateral.0.input"])
def test_offset_in_the_bias_is_exact(graph: ExportGraph, ranges: Ranges, layer: str) -> None:
    """A wide, lopsided range is computed as the codes say, with and without an own bias."""
    low, high = ranges.tensors[layer]
    for quant in (
        TensorQuant(mode="static", low=min(3 * low, -0.3 * high), high=high),
        TensorQuant(mode="static", low=low, high=high, symmetric=True),
    ):
        int8 = compile_model(graph, QuantDecision(precision="int8", rest_precision="f32", tensors={layer: quant}))
        for tensor in phantom_inputs(graph.spec, 2):
            assert relative(answer(int8, tensor), emulated(graph, layer, quant, tensor)) < 0.02


def test_padded_convolution_with_negative_inputs_keeps_its_zero(graph: ExportGraph, ranges: Ranges, exact: Any) -> None:
    """Padding inserts zeros behind FakeQuantize: an offset there would change the border."""
    name = "head.smooth.1.input"
    high = ranges.tensors[name][1]
    quant = TensorQuant(mode="static", low=-0.7 * high, high=high)
    tensors = {name: quant}
    int8 = compile_model(graph, QuantDecision(precision="int8", rest_precision="f32", tensors=tensors))
    (tensor,) = phantom_inputs(graph.spec, 1)
    found, wanted = answer(int8, tensor), answer(exact, tensor)
    assert relative(found[..., :8], wanted[..., :8]) < 0.1


def test_dynamic_tensors_are_refused(graph: ExportGraph, ranges: Ranges, tmp_path: Path) -> None:
    decision = decide(graph, "int8", ranges, policy=PtqPolicy(dynamic=("*.fc1",), rest_precision="f32"))
    with pytest.raises(UnsupportedError, match="static ranges only"):
        openvino_target.Target().build(graph, decision, tmp_path)


def test_decision_of_another_graph_is_refused(graph: ExportGraph, tmp_path: Path) -> None:
    tensors = {"nowhere.input": TensorQuant(mode="static", low=-1.0, high=1.0)}
    decision = QuantDecision(precision="int8", rest_precision="f32", tensors=tensors)
    with pytest.raises(UnsupportedError, match="nowhere"):
        openvino_target.Target().build(graph, decision, tmp_path)


def test_bf16_needs_a_cpu_that_computes_it(graph: ExportGraph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    card = MachineCard(cpu="Old CPU", architecture="x86_64", cores=1, usable_cpus=1, features=("avx2",))
    monkeypatch.setattr(openvino_target, "machine_card", lambda: card)
    with pytest.raises(UnsupportedError, match="Old CPU does not compute bf16"):
        openvino_target.Target().build(graph, float_decision("bf16"), tmp_path)
    assert not list(tmp_path.iterdir())


def test_onnx_has_no_bf16_and_says_what_has(graph: ExportGraph, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="openvino"):
        onnx_target.Target().build(graph, float_decision("bf16"), tmp_path)


def test_onnx_writes_a_bf16_decision_with_a_float32_rest(graph: ExportGraph, ranges: Ranges, tmp_path: Path) -> None:
    decision = decide(graph, "int8", ranges, policy=PtqPolicy(rest_precision="bf16"))
    built = onnx_target.Target().build(graph, decision, tmp_path)
    assert built.rest_precision == "f32" and "float32" in built.form


def test_fp16_on_a_cpu_is_called_storage(graph: ExportGraph, tmp_path: Path) -> None:
    for target in (onnx_target.Target(), openvino_target.Target()):
        folder = tmp_path / target.name
        folder.mkdir()
        built = target.build(graph, float_decision("fp16"), folder)
        assert built.rest_precision == "f32"
        assert "float16 storage, computed in float32" in built.form


def test_missing_openvino_is_one_clear_line(
    graph: ExportGraph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> Any:
        raise ImportError("No module named 'openvino'", name="openvino")

    monkeypatch.setattr(openvino_target, "import_openvino", missing)
    with pytest.raises(MissingExtra, match="openvino"):
        openvino_target.Target().build(graph, float_decision("fp32"), tmp_path)
    probe = openvino_target.available()
    assert not probe.usable and probe.extra == "openvino"


@pytest.mark.parametrize("name", ["openvino", "onnx", "integer"])
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_light_head_is_written_and_opened_by_its_engine(name: str, precision: str, tmp_path: Path) -> None:
    target = plugins.load("targets", name).Target()
    if precision not in target.precisions:
        pytest.skip(f"{name} writes no {precision}")
    light = small_graph("segment", seg_head="lite", heads=3)
    made = target.build(light, decide(light, precision, observed(light)), tmp_path)
    engine = plugins.load("engines", name).Engine()
    engine.load(
        {path.name: path.read_bytes() for path in made.files}, light.spec, EngineConfig(threads=1, rest_precision="f32")
    )
    (tensor,) = phantom_inputs(light.spec, 1)
    wanted = light.module(torch.from_numpy(tensor))[0].numpy()
    away = np.abs(engine.run(tensor)["logits"] - wanted).max() / np.abs(wanted).max()
    engine.close()
    assert away < (1e-4 if precision == "fp32" else 0.5)
