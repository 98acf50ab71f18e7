"""Equalisation is exact in float and smaller in error where a student has outlier channels."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tests.export.students import make_student, observed, phantom_inputs, small_graph
from tinyusfm_export.graph.build import ExportGraph, build_graph
from tinyusfm_export.onnx_files.writer import write_onnx
from tinyusfm_export.quantize.equalise import channel_peaks, equalisable, equalise, find_divisors, outlier_ratio
from tinyusfm_export.quantize.fake_quant import float_net, int8_net
from tinyusfm_export.quantize.ptq import PtqPolicy, activation_taps, decide
from tinyusfm_runtime.errors import InputError

BLOCKS = PtqPolicy(decoder=False, rest_precision="f32")


def outlier_graph() -> ExportGraph:
    """A student with a few value channels 60 times the others, as large networks grow them; its function stays."""
    student, spec = make_student()
    for block in student.backbone.blocks:  # type: ignore[union-attr]
        attn: Any = block.attn
        width = attn.proj.weight.shape[1]
        for channel in (3, 17):
            attn.qkv.weight.data[2 * width + channel] *= 60.0
            attn.qkv.bias.data[2 * width + channel] *= 60.0
            attn.proj.weight.data[:, channel] /= 60.0
    return build_graph(student, spec)


def peaks_of(graph: ExportGraph) -> dict[str, np.ndarray]:
    """Channel peaks on a few phantoms."""
    taps = activation_taps(graph)
    return channel_peaks(graph, (taps(tensor) for tensor in phantom_inputs(graph.spec)))


def error(graph: ExportGraph, wanted: ExportGraph) -> float:
    """Relative error of simulated int8 logits."""
    net = int8_net(graph, decide(graph, "int8", observed(graph), policy=BLOCKS))
    reference = float_net(wanted)
    gaps, sizes = [], []
    for tensor in phantom_inputs(graph.spec, 4):
        want = reference(tensor)["logits"]
        gaps.append(np.square(net(tensor)["logits"] - want).mean())
        sizes.append(np.square(want).mean())
    return float(np.sqrt(np.mean(gaps) / np.mean(sizes)))


@pytest.mark.parametrize("task", ["segment", "classify", "features"])
def test_any_divisors_leave_the_float_function_as_it_is(task: str) -> None:
    graph = small_graph(task)
    rng = np.random.default_rng(0)
    divisors = {
        name: np.exp(rng.normal(size=graph.module.get_submodule(graph.linear_inputs[name]).weight.shape[1]))
        for name in equalisable(graph)
    }
    assert any(name.endswith("attn.proj.input") for name in divisors) and len(divisors) == 36
    changed = equalise(graph, divisors)
    for tensor in phantom_inputs(graph.spec):
        before, after = (float_net(g)(tensor)["logits"] for g in (graph, changed))
        assert np.abs(before - after).max() <= 1e-5 * np.abs(before).max() + 1e-6
    before_taps, after_taps = (activation_taps(g)(phantom_inputs(graph.spec)[0]) for g in (graph, changed))
    for name, divisor in divisors.items():
        assert np.allclose(after_taps[name] * divisor, before_taps[name], rtol=1e-3, atol=1e-4)


def test_int8_loses_less_on_a_student_with_outlier_channels() -> None:
    graph = outlier_graph()
    divisors = find_divisors(graph, peaks_of(graph))
    assert sum(name.endswith("attn.proj.input") for name in divisors) == 12
    before, after = error(graph, graph), error(equalise(graph, divisors), graph)
    assert after < 0.6 * before, (before, after)


def test_only_what_needs_it_is_equalised() -> None:
    graph = small_graph()
    plain = peaks_of(graph)
    needy = peaks_of(outlier_graph())
    assert outlier_ratio(needy["blocks.2.attn.proj.input"]) > 10 > outlier_ratio(plain["blocks.2.attn.proj.input"])
    assert len(find_divisors(graph, plain, ratio=0.0)) == 36 and not find_divisors(graph, plain, ratio=1e6)
    flat = find_divisors(graph, plain, ratio=0.0, strength=1.0)
    name = "blocks.0.mlp.fc1.input"
    assert np.ptp(np.log(plain[name] / flat[name])) < 1e-4, "strength 1 makes all channels alike"


def test_equalised_graphs_export_and_equalise_again() -> None:
    onnx = pytest.importorskip("onnx", reason="install tinyusfm-edge[export]")
    graph = outlier_graph()
    divisors = find_divisors(graph, peaks_of(graph))
    twice = equalise(equalise(graph, divisors), {name: 1.0 / value for name, value in divisors.items()})
    tensor = phantom_inputs(graph.spec)[0]
    assert np.allclose(float_net(twice)(tensor)["logits"], float_net(graph)(tensor)["logits"], atol=1e-4)
    onnx.checker.check_model(onnx.load_from_string(write_onnx(equalise(graph, divisors))), full_check=True)
    assert equalise(graph, {}) is graph


def test_what_is_not_exact_is_refused() -> None:
    graph = small_graph()
    with pytest.raises(InputError, match="exactly"):
        equalise(graph, {"blocks.0.mlp.fc2.input": np.ones(192)})
    for divisor in (np.ones(7), np.zeros(48), np.full(48, np.nan), -np.ones(48)):
        with pytest.raises(InputError, match="do not fit"):
            equalise(graph, {"blocks.0.mlp.fc1.input": divisor})
    with pytest.raises(InputError, match="strength"):
        find_divisors(graph, {}, strength=1.5)
    assert torch.equal(
        graph.module.get_submodule("blocks.0.mlp.fc1").weight,
        small_graph().module.get_submodule("blocks.0.mlp.fc1").weight,
    )
