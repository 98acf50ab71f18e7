"""Fake quantization computes as the exported Q/DQ graph, and gradients reach the student."""

from __future__ import annotations

from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.export.students import make_student, observed, phantom_inputs
from tinyusfm_calibration.ranges import Ranges
from tinyusfm_export.graph.build import ExportGraph, build_graph, live_weights
from tinyusfm_export.onnx_files.int8 import qdq_onnx
from tinyusfm_export.quantize.decision import QuantDecision
from tinyusfm_export.quantize.fake_quant import FakeQuant, on_grid, weight_on_grid
from tinyusfm_export.quantize.ptq import Grid, PtqPolicy, activation_taps, decide, quantize_weight, symmetric_grid
from tinyusfm_runtime.errors import UnsupportedError
from tinyusfm_runtime.numerics.order import wide


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
    """What the exported file answers."""
    return np.asarray(session_of(qdq_onnx(graph, decision)).run(None, {"image": codes})[0])


def session_of(model: bytes) -> Any:
    """ONNX Runtime with every optimisation off."""
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    options = runtime.SessionOptions()
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def relative(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.sqrt(np.mean((found - wanted) ** 2)) / wanted.std())


LAYERS = ("blocks.0.*", "blocks.5.attn.*", "blocks.11.mlp.*", "head.smooth.*", "head.classifier.*")
"""Every kind of quantized layer, at both ends of the network and in its middle."""


@pytest.mark.parametrize("limit", [127, 7])
def test_each_layer_alone_is_the_exported_one(graph: ExportGraph, ranges: Ranges, limit: int) -> None:
    """Of many layers together only the places can be compared: one value that float rounding puts on the other side of
    a code's border changes every later one, and how many do depends on the machine.
    """
    (codes,) = phantom_inputs(graph.spec, 1)
    whole = decide(graph, "int8", ranges, policy=PtqPolicy(rest_precision="f32", weight_limit=limit))
    chosen = [name for name, layer in graph.linear_inputs.items() if any(fnmatchcase(layer, p) for p in LAYERS)]
    exact = graph.module(torch.from_numpy(codes))[0].numpy()
    costs = []
    for name in chosen:
        alone = replace(whole, tensors={name: whole.tensors[name]})
        found, wanted = FakeQuant(graph, alone).outputs(codes)["logits"], qdq_answer(graph, alone, codes)
        costs.append(relative(exact, wanted))
        assert relative(found, wanted) < costs[-1] / 4, name
    assert len(chosen) == 16 and min(costs) > 1e-4 and np.median(wide(costs)) > 1e-3, "rounding one layer shows"


@pytest.mark.parametrize("limit", [127, 7])
def test_the_whole_net_rounds_in_the_exported_places(graph: ExportGraph, ranges: Ranges, limit: int) -> None:
    """Up to the first block in which a code differs every code is the same, and few differ there."""
    decision = decide(graph, "int8", ranges, policy=PtqPolicy(rest_precision="f32", weight_limit=limit))
    (codes,) = phantom_inputs(graph.spec, 1)
    shares = list(differing_codes(FakeQuant(graph, decision), graph, decision, codes).values())
    first = next((share for share in shares if share > 0), 0.0)
    assert len(shares) == len(decision.quantized())
    assert shares[0] == 0.0 and first < 0.01


def differing_codes(
    fake: FakeQuant, graph: ExportGraph, decision: QuantDecision, codes: np.ndarray
) -> dict[str, float]:
    """Share of each quantized layer's input that is another code in the exported file, in the order of the network."""
    onnx = pytest.importorskip("onnx", reason="onnx is not installed")
    model = onnx.load_from_string(qdq_onnx(graph, decision))
    names = [name for name in graph.linear_inputs if name in decision.quantized()]
    for name in names:
        model.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    session = session_of(model.SerializeToString())
    wanted = dict(zip(names, session.run(names, {"image": codes}), strict=True))
    found = dict(activation_taps(graph, fake.module)(codes))
    steps = {name: symmetric_grid(decision.tensors[name]).scale for name in names}
    coded = {name: np.clip(np.rint(wanted[name] / steps[name]), -128, 127) for name in names}
    return {name: float(np.mean(np.rint(found[name] / steps[name]).ravel() != coded[name].ravel())) for name in names}


def test_another_place_of_rounding_is_noticed(graph: ExportGraph, ranges: Ranges) -> None:
    """The control: one layer left out of the fake graph shows at the very next one."""
    decision = decide(graph, "int8", ranges, policy=PtqPolicy(rest_precision="f32"))
    (codes,) = phantom_inputs(graph.spec, 1)
    fewer = replace(decision, tensors={k: v for k, v in decision.tensors.items() if k != "blocks.0.mlp.fc1.input"})
    shares = differing_codes(FakeQuant(graph, fewer), graph, decision, codes)
    assert shares["blocks.0.attn.proj.input"] == 0.0 and shares["blocks.0.mlp.fc2.input"] > 0.01


def test_the_static_form_of_symmetric_ranges_is_the_qdq_form(graph: ExportGraph, ranges: Ranges) -> None:
    (codes,) = phantom_inputs(graph.spec, 1)
    for symmetric in (True, False):
        decision = decide(graph, "int8", ranges, policy=PtqPolicy(rest_precision="f32", symmetric=symmetric))
        both = [FakeQuant(graph, decision, form=form).outputs(codes)["logits"] for form in ("qdq", "static")]  # type: ignore[arg-type]
        assert np.array_equal(*both) is symmetric


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
    y = on_grid(x, Grid(scale=scale, zero=0, signed=True))
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
