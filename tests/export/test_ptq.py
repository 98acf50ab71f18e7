"""The decision, its policy, its JSON, and the arithmetic of grids and weights."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.export.students import observed, phantom_inputs, small_graph
from tinyusfm_calibration.ranges import Ranges
from tinyusfm_export.graph.build import ExportGraph
from tinyusfm_export.quantize.decision import DECISION_VERSION, QuantDecision, TensorQuant, float_decision
from tinyusfm_export.quantize.ptq import (
    PtqPolicy,
    activation_taps,
    decide,
    natural_grid,
    quantize_weight,
    symmetric_grid,
)
from tinyusfm_runtime.errors import CalibrationError, InputError
from tinyusfm_runtime.numerics.order import wide


@pytest.fixture(scope="module")
def graph() -> ExportGraph:
    return small_graph()


@pytest.fixture(scope="module")
def ranges(graph: ExportGraph) -> Ranges:
    return observed(graph)


def quantized_layers(graph: ExportGraph, decision: QuantDecision) -> set[str]:
    return {graph.linear_inputs[name] for name in decision.quantized()}


def test_default_is_safe_for_a_vit(graph: ExportGraph, ranges: Ranges) -> None:
    decision = decide(graph, "int8", ranges)
    layers = quantized_layers(graph, decision)
    blocks = {f"blocks.{i}.{part}" for i in range(12) for part in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")}
    decoder = {f"head.{part}.{i}" for part in ("smooth", "classifier") for i in range(4)}
    assert layers == blocks | decoder
    assert all(quant.mode == "static" for quant in decision.quantized().values())
    assert (decision.set_id, decision.method) == ("test", "minmax")
    assert decision.tensors["patch_embed.input"].mode == "float"


@pytest.mark.parametrize(
    "policy, gone",
    [
        (PtqPolicy(decoder=False), {"head.smooth.0", "head.classifier.3"}),
        (PtqPolicy(keep_float=("*.fc1",)), {"blocks.0.mlp.fc1", "blocks.11.mlp.fc1"}),
        (PtqPolicy(layers=("blocks.0.*",)), {"blocks.1.attn.qkv"}),
    ],
)
def test_policy_keeps_layers_float(graph: ExportGraph, ranges: Ranges, policy: PtqPolicy, gone: set[str]) -> None:
    layers = quantized_layers(graph, decide(graph, "int8", ranges, policy=policy))
    assert layers and not layers & gone
    assert gone <= quantized_layers(graph, decide(graph, "int8", ranges))


def test_policy_without_any_layer_is_an_error(graph: ExportGraph, ranges: Ranges) -> None:
    with pytest.raises(InputError, match="no layer"):
        decide(graph, "int8", ranges, policy=PtqPolicy(layers=("block.*",), decoder=False))


def test_int8_without_ranges_is_an_error_never_a_fallback(graph: ExportGraph) -> None:
    with pytest.raises(CalibrationError, match="calibrate"):
        decide(graph, "int8", None)


def test_a_missing_range_is_named(graph: ExportGraph, ranges: Ranges) -> None:
    tensors = {name: value for name, value in ranges.tensors.items() if name != "blocks.7.mlp.fc2.input"}
    other = Ranges(tensors=tensors, method="minmax", set_id="x", frame_sha256=("0" * 64,))
    with pytest.raises(CalibrationError, match=r"blocks\.7\.mlp\.fc2\.input"):
        decide(graph, "int8", other)


@pytest.mark.parametrize("precision, rest", [("fp32", "f32"), ("fp16", "f32"), ("bf16", "bf16")])
def test_float_precisions_need_no_ranges(graph: ExportGraph, precision: str, rest: str) -> None:
    decision = decide(graph, precision)
    assert (decision.precision, decision.rest_precision, decision.quantized()) == (precision, rest, {})


def test_rest_precision_can_be_chosen(graph: ExportGraph, ranges: Ranges) -> None:
    for rest in ("f32", "bf16"):
        policy = PtqPolicy(rest_precision=rest)  # type: ignore[arg-type]
        assert decide(graph, "int8", ranges, policy=policy).rest_precision == rest


def test_taps_see_what_the_layers_read(graph: ExportGraph) -> None:
    (tensor,) = phantom_inputs(graph.spec, 1)
    values = activation_taps(graph)(tensor)
    assert set(values) == set(graph.linear_inputs)
    np.testing.assert_array_equal(np.sort(wide(values["patch_embed.input"].ravel())), np.sort(wide(tensor.ravel())))
    normed = values["blocks.5.mlp.fc1.input"]
    assert np.abs(normed.mean(-1)).max() < 1e-4 and abs(normed.std(-1).mean() - 1) < 0.01
    assert values["head.smooth.0.input"].min() >= 0
    layer = graph.module.get_submodule("blocks.5.mlp.fc1")
    assert not layer._forward_pre_hooks, "hooks stay behind"
    assert torch.is_grad_enabled()


def test_decision_survives_json(graph: ExportGraph, ranges: Ranges) -> None:
    decision = decide(graph, "int8", ranges, policy=PtqPolicy(dynamic=("*.fc2",)))
    text = json.dumps(decision.to_json())
    assert QuantDecision.from_json(json.loads(text)) == decision
    assert json.dumps(QuantDecision.from_json(json.loads(text)).to_json()) == text


def version_1() -> dict[str, Any]:
    """A decision as version 1 wrote it; stays here when the version rises."""
    tensor = {"mode": "static", "low": -1.0, "high": 2.0, "symmetric": False}
    return {
        "precision": "int8",
        "rest_precision": "bf16",
        "tensors": {"a.input": tensor, "b.input": {"mode": "dynamic", "low": None, "high": None, "symmetric": False}},
        "set_id": "set",
        "method": "mse",
        "version": 1,
    }


def test_version_1_is_read() -> None:
    decision = QuantDecision.from_json(version_1())
    assert decision.tensors["a.input"].bound == 2.0
    assert list(decision.quantized()) == ["a.input", "b.input"]


@pytest.mark.parametrize(
    "change",
    [
        {"version": DECISION_VERSION + 1},
        {"precision": "int4"},
        {"rest_precision": "f16"},
        {"surprise": 1},
        {"tensors": {}},
        {"tensors": {"a": {"mode": "static", "low": 1.0, "high": 2.0}}},
        {"tensors": {"a": {"mode": "static", "low": -1.0, "high": float("nan")}}},
        {"tensors": {"a": {"mode": "static"}}},
        {"tensors": {"a": {"mode": "dynamic", "low": -1.0, "high": 1.0}}},
        {"tensors": {"a": {"mode": "auto"}}},
        {"tensors": {"a": {"kind": "static"}}},
        {"precision": "fp32"},
        {"precision": "bf16", "rest_precision": "f32", "tensors": {}},
    ],
)
def test_a_broken_decision_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        QuantDecision.from_json({**version_1(), **change})


def test_int8_is_no_float_decision() -> None:
    with pytest.raises(InputError):
        float_decision("int8")


def test_weights_are_symmetric_per_output_channel() -> None:
    weight = np.random.default_rng(0).normal(0, 1, (6, 4, 3, 3)).astype(np.float32)
    weight[2] *= 100
    weight[4] = 0
    codes, scales = quantize_weight(weight)
    assert codes.dtype == np.int8 and codes.min() >= -127 and scales.shape == (6,)
    assert (scales > 0).all()
    error = np.abs(codes * scales[:, None, None, None].astype(np.float64) - weight).reshape(6, -1).max(1)
    assert (error <= scales * 0.5001).all()
    assert not codes[4].any()


reach = st.floats(0.0, 1e4, width=32)


@settings(max_examples=80, deadline=None)
@given(low=reach, high=reach)
def test_grids_cover_their_range_and_hold_zero(low: float, high: float) -> None:
    if low + high < 1e-3:
        return
    quant = TensorQuant(mode="static", low=-low, high=high)
    for grid, codes in ((natural_grid(quant), 255), (symmetric_grid(quant), 254)):
        assert grid.low <= 0 <= grid.high
        assert grid.low <= -low + grid.scale and grid.high >= high - grid.scale
        assert grid.scale * codes <= 2 * max(low, high) * 1.01
    assert 0 <= natural_grid(quant).zero <= 255
    assert symmetric_grid(quant).zero == 0
    skewed = natural_grid(quant)
    assert skewed.scale <= symmetric_grid(quant).scale * 1.001


def test_demanded_symmetry_is_kept() -> None:
    quant = TensorQuant(mode="static", low=-0.2, high=8.0, symmetric=True)
    assert natural_grid(quant) == symmetric_grid(quant)
    assert symmetric_grid(quant).signed
