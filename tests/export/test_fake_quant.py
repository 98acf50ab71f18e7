"""Fake quantization computes as the exported Q/DQ graph, and gradients reach the student."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.export.students import make_student, observed, phantom_inputs
from tinyusfm_calibration.ranges import Ranges
from tinyusfm_export.decision import QuantDecision
from tinyusfm_export.fake_quant import FakeQuant, on_grid, weight_on_grid
from tinyusfm_export.graph import ExportGraph, build_graph, live_weights
from tinyusfm_export.onnx_int8 import qdq_onnx
from tinyusfm_export.ptq import PtqPolicy, decide, quantize_weight
from tinyusfm_runtime.errors import UnsupportedError


@pytest.fixture(scope="module")
def student() -> tuple[torch.nn.Module, object]:
    return make_student()


@pytest.fixture(scope="module")
def graph(student: tuple[torch.nn.Module, object]) -> ExportGraph:
    return build_graph(*student)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def ranges(graph: ExportGraph) -> Ranges:
    return observed(graph)


def qdq_answer(graph: ExportGraph, decision: QuantDecision, codes: np.ndarray) -> np.ndarray:
    """The exported file in ONNX Runtime with every optimisation off."""
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    options = runtime.SessionOptions()
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = runtime.InferenceSession(qdq_onnx(graph, decision), options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"image": codes})[0])


def relative(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.sqrt(np.mean((found - wanted) ** 2)) / wanted.std())


@pytest.mark.parametrize("limit", [127, 7])
def test_it_is_the_exported_graph_within_a_step(graph: ExportGraph, ranges: Ranges, limit: int) -> None:
    """Float rounding puts a few values on the other side of a code's border; the float graph is farther."""
    decision = decide(graph, "int8", ranges, policy=PtqPolicy(rest_precision="f32", weight_limit=limit))
    fake = FakeQuant(graph, decision)
    for codes in phantom_inputs(graph.spec, 2):
        wanted = qdq_answer(graph, decision, codes)
        with torch.inference_mode():
            found = fake(torch.from_numpy(codes).float()).numpy()
        exact = graph.module(torch.from_numpy(codes))[0].numpy()
        assert relative(found, wanted) < min(0.1, relative(exact, wanted) / 3)


def test_one_layer_alone_is_exact(graph: ExportGraph, ranges: Ranges) -> None:
    decision = decide(
        graph, "int8", ranges, policy=PtqPolicy(rest_precision="f32", layers=("blocks.11.mlp.fc2",), decoder=False)
    )
    (codes,) = phantom_inputs(graph.spec, 1)
    with torch.inference_mode():
        found = FakeQuant(graph, decision)(torch.from_numpy(codes).float()).numpy()
    assert np.abs(found - qdq_answer(graph, decision, codes)).max() < 1e-3


def test_another_place_of_rounding_is_noticed(graph: ExportGraph, ranges: Ranges) -> None:
    """The control: one layer left out of the fake graph shows."""
    decision = decide(graph, "int8", ranges, policy=PtqPolicy(rest_precision="f32", weight_limit=7))
    (codes,) = phantom_inputs(graph.spec, 1)
    fewer = replace(decision, tensors={k: v for k, v in decision.tensors.items() if k != "blocks.0.mlp.fc1.input"})
    wanted = qdq_answer(graph, decision, codes)
    with torch.inference_mode():
        found = FakeQuant(graph, fewer)(torch.from_numpy(codes).float()).numpy()
    assert relative(found, wanted) > 0.02


def test_live_weights_are_the_graphs_and_reach_the_student(
    student: tuple[torch.nn.Module, object], graph: ExportGraph, ranges: Ranges
) -> None:
    module, spec = student
    weights = live_weights(module, spec)  # type: ignore[arg-type]
    state = graph.module.state_dict()
    assert set(weights) == set(state)
    assert all(torch.equal(weights[name].detach(), state[name]) for name in state)
    decision = decide(graph, "int8", ranges, policy=PtqPolicy(rest_precision="f32"))
    codes = torch.from_numpy(phantom_inputs(graph.spec, 1)[0]).float()
    module.requires_grad_(True)
    FakeQuant(graph, decision)(codes, weights).square().mean().backward()
    without = {name for name, p in module.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0}
    # the backbone's final norm is in the file but the segmentation model does not use it
    assert without <= {"backbone.norm.weight", "backbone.norm.bias"} | {n for n in without if n.endswith(".bias")}
    module.zero_grad(set_to_none=True)


def test_dynamic_tensors_are_refused(graph: ExportGraph, ranges: Ranges) -> None:
    decision = decide(graph, "int8", ranges, policy=PtqPolicy(dynamic=("*.fc1",), rest_precision="f32"))
    with pytest.raises(UnsupportedError, match="static ranges only"):
        FakeQuant(graph, decision)


@settings(max_examples=60, deadline=None)
@given(scale=st.floats(1e-3, 10), value=st.floats(-2000, 2000))
def test_rounding_lies_on_the_grid_and_gradients_stop_outside(scale: float, value: float) -> None:
    x = torch.tensor([value], requires_grad=True)
    y = on_grid(x, scale, -128, 127)
    y.backward()
    code = float(y.detach()) / scale
    assert abs(code - round(code)) < 1e-3 and -128.001 <= code <= 127.001
    inside = -128 * scale < float(x.detach()) < 127 * scale
    assert x.grad is not None
    if abs(abs(value) - 127 * scale) > 1.01 * scale:
        assert float(x.grad) == (1.0 if inside else 0.0)


@pytest.mark.parametrize("limit", [127, 63, 7])
def test_weights_round_as_the_exporter_rounds(limit: int) -> None:
    weight = torch.randn(5, 7, generator=torch.Generator().manual_seed(1))
    weight[2] = 0.0
    codes, scales = quantize_weight(weight.numpy(), limit=limit)
    found = weight_on_grid(weight, limit).numpy()
    assert np.abs(found - codes * scales[:, None]).max() < 1e-6
