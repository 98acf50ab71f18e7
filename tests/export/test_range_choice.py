"""Simulated int8, bias correction, and the choice among range methods by measurement."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from tests.export.students import observed, phantom_inputs, small_graph
from tests.export.test_equalise import outlier_graph
from tinyusfm_calibration.sets import describe_frames, phantom_frames
from tinyusfm_export.graph.build import ExportGraph
from tinyusfm_export.graph.net import as_array
from tinyusfm_export.quantize import range_choice
from tinyusfm_export.quantize.bias_correction import correct_biases, mean_shift, measure_means
from tinyusfm_export.quantize.fake_quant import float_net, int8_net
from tinyusfm_export.quantize.ptq import PtqPolicy, activation_taps, decide, quantize_weight
from tinyusfm_export.quantize.range_choice import Preparation, RangeChoice, choose_ranges, mask_dice
from tinyusfm_runtime.errors import CalibrationError, InputError
from tinyusfm_runtime.numerics.preprocess import preprocess

FLOAT_REST = PtqPolicy(rest_precision="f32")


def rms(values: np.ndarray) -> float:
    """Root mean square."""
    return float(np.sqrt(np.square(values, dtype=np.float64).mean()))


def inputs_of(graph: ExportGraph, seeds: range) -> list[np.ndarray]:
    """Inputs made of phantoms."""
    return [preprocess(named.frame, graph.spec.preprocess)[0] for named in phantom_frames(seeds)]


def test_a_dynamic_tensor_takes_each_frames_own_range() -> None:
    graph = small_graph()
    dynamic = decide(graph, "int8", observed(graph), policy=replace(FLOAT_REST, decoder=False, dynamic=("blocks.*",)))
    tensor = phantom_inputs(graph.spec)[0]
    want = float_net(graph)(tensor)["logits"]
    assert 0.0 < rms(int8_net(graph, dynamic)(tensor)["logits"] - want) < 0.1 * rms(want)


def test_correction_takes_the_mean_shift_of_rounded_weights_out_of_the_bias() -> None:
    graph = small_graph()
    inputs = inputs_of(graph, range(4))
    found = measure_means(graph, inputs)
    assert set(found) == set(graph.linear_inputs.values()) - {"patch_embed"}, "the one layer without a bias"
    path, name = "blocks.3.mlp.fc1", "blocks.3.mlp.fc1.input"
    only = PtqPolicy(layers=(path,), decoder=False, rest_precision="f32", dynamic=(path,))
    decision = decide(graph, "int8", observed(graph), policy=only)
    corrected = correct_biases(graph, decision, found)
    assert set(decision.quantized()) == {name}
    moved = [p for p in found if not torch.equal(*(g.module.get_submodule(p).bias for g in (graph, corrected)))]
    assert moved == [path], "layers that stay float keep their bias"
    means = [_mean_outputs(g, path, inputs, 127) for g in (graph, corrected)]
    want = _mean_outputs(graph, path, inputs, 0)
    assert rms(means[1] - want) < 0.35 * rms(means[0] - want)


def test_correction_is_that_of_the_codes_really_written() -> None:
    """On a CPU without 8-bit dot products OpenVINO's weights have 7 bits: their shift is another one, and larger."""
    ov = pytest.importorskip("tinyusfm_export.targets.ov")
    graph = small_graph()
    inputs = inputs_of(graph, range(4))
    found, path = measure_means(graph, inputs), "blocks.3.mlp.fc1"
    only = PtqPolicy(layers=(path,), decoder=False, rest_precision="f32", dynamic=(path,))
    decision = decide(graph, "int8", observed(graph), policy=only)
    want = _mean_outputs(graph, path, inputs, 0)
    narrow = correct_biases(graph, decision, found, partial(ov.written_weight, limit=63))
    wide = correct_biases(graph, decision, found)
    left = [rms(_mean_outputs(g, path, inputs, 63) - want) for g in (graph, wide, narrow)]
    assert left[2] < 0.35 * left[0], "the codes really written leave no mean shift"
    assert left[2] < 0.5 * left[1], "the decision's own codes are not those"


def test_the_shift_of_a_convolution_is_that_of_its_outputs() -> None:
    graph = small_graph()
    inputs, path = inputs_of(graph, range(2)), "head.smooth.0"
    layer = graph.module.get_submodule(path)
    rounded = as_array(layer.weight) + np.float32(0.01) * np.random.default_rng(0).normal(size=layer.weight.shape)
    shift = mean_shift(layer, measure_means(graph, inputs)[path], rounded)
    seen: list[torch.Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    with torch.inference_mode():
        for tensor in inputs:
            graph.module(torch.from_numpy(tensor))
        handle.remove()
        error = torch.from_numpy(rounded - as_array(layer.weight)).float()
        moved = [torch.conv2d(x, error, padding=layer.padding).mean((0, 2, 3)) for x in seen]
    np.testing.assert_allclose(shift, torch.stack(moved).mean(0).numpy(), rtol=1e-3, atol=1e-5)


def _mean_outputs(graph: ExportGraph, path: str, inputs: list[np.ndarray], limit: int) -> np.ndarray:
    """Mean outputs of one layer, with its weights rounded to codes up to a limit; 0 leaves them float."""
    layer = graph.module.get_submodule(path)
    weight = as_array(layer.weight)
    if limit:
        codes, scales = quantize_weight(weight, limit=limit)
        weight = codes * scales[:, None]
    taps = activation_taps(graph)
    tokens = np.concatenate([taps(tensor)[f"{path}.input"].reshape(-1, weight.shape[1]) for tensor in inputs])
    return tokens.mean(0) @ weight.T + as_array(layer.bias)


@pytest.fixture(scope="module")
def choice() -> RangeChoice:
    """What is chosen for a student with outlier channels."""
    graph = outlier_graph()
    frames = phantom_frames(range(32))
    return choose_ranges(
        graph,
        inputs_of(graph, range(32)),
        inputs_of(graph, range(100, 106)),
        describe_frames("phantoms", frames),
        methods=("minmax", "percentile"),
        policy=FLOAT_REST,
    )


def test_every_candidate_is_measured_and_the_best_is_used(choice: RangeChoice) -> None:
    names = [trial.name for trial in choice.trials]
    assert names[:2] == ["minmax", "percentile"] and "equalised" in names[2] and "corrected" in names[3]
    chosen = [trial for trial in choice.trials if trial.chosen]
    assert len(chosen) == 1
    plain = min(choice.trials[:2], key=lambda trial: trial.error)
    assert choice.trials[2].error < plain.error, "outlier channels are what equalisation is for"
    assert chosen[0].error == min(t.error for t in choice.trials) or chosen[0].error <= plain.error
    assert choice.ranges.method == chosen[0].method == plain.method
    assert bool(choice.preparation.divisors) and chosen[0].name in choice.summary
    for trial in choice.trials:
        assert trial.dice_mean is not None and trial.dice_worst is not None
        assert 0.0 <= trial.dice_worst <= trial.dice_mean <= 1.0


def test_the_preparation_survives_json_and_makes_the_graph_it_was_measured_on(choice: RangeChoice) -> None:
    again = Preparation.from_json(json.loads(json.dumps(choice.preparation.to_json())))
    graph = outlier_graph()
    one, two = (p.equalised(graph) for p in (choice.preparation, again))
    decisions = [decide(g, "int8", choice.ranges, policy=FLOAT_REST) for g in (one, two)]
    nets = [
        int8_net(p.corrected(g, d), d)
        for p, g, d in zip((choice.preparation, again), (one, two), decisions, strict=True)
    ]
    tensor = phantom_inputs(graph.spec)[0]
    assert np.array_equal(*(net(tensor)["logits"] for net in nets))
    for broken in (
        {},
        {"version": 1, "divisors": {}, "shifts": {}},
        {"version": 9, "divisors": {}, "means": {}},
        {"version": 2, "divisors": {"a": [float("nan")]}, "means": {}},
        7,
    ):
        with pytest.raises(CalibrationError):
            Preparation.from_json(broken)


def test_additions_that_gain_nothing_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = small_graph()
    monkeypatch.setattr(range_choice, "MIN_GAIN", 0.999)
    inputs = inputs_of(graph, range(16))
    found = choose_ranges(
        graph,
        inputs,
        inputs_of(graph, range(100, 102)),
        describe_frames("phantoms", phantom_frames(range(16))),
        methods=("minmax",),
        policy=FLOAT_REST,
    )
    assert not found.preparation and found.trials[0].chosen
    assert any("no tensor that allows it has outlier channels" in note for note in found.notes)


def empty() -> Iterator[np.ndarray]:
    """No frames."""
    return iter(())


def test_too_few_frames_for_a_method_are_said_and_none_left_is_an_error() -> None:
    graph = small_graph()
    frames = phantom_frames(range(16))
    described, inputs = describe_frames("phantoms", frames), inputs_of(graph, range(16))
    judges = inputs_of(graph, range(100, 101))
    found = choose_ranges(
        graph, inputs, judges, described, methods=("minmax", "mse"), policy=FLOAT_REST, additions=False
    )
    assert [t.method for t in found.trials] == ["minmax"] and "mse was not tried: it needs 32" in found.notes[0]
    with pytest.raises(CalibrationError, match="needs 32"):
        choose_ranges(graph, inputs, judges, described, methods=("entropy",))
    with pytest.raises(CalibrationError, match="validation frames"):
        choose_ranges(graph, inputs, [], described)
    with pytest.raises(InputError, match="method"):
        choose_ranges(graph, inputs, judges, described, methods=("best",))
    with pytest.raises(CalibrationError, match="no calibration frames"):
        measure_means(graph, empty())


def test_dice_of_masks() -> None:
    graph = small_graph()
    up, down = np.full((1, 1, 80, 80), 5.0, np.float32), np.full((1, 1, 80, 80), -5.0, np.float32)
    assert mask_dice(up, up, graph.spec) == 1.0 == mask_dice(down, down, graph.spec)
    assert mask_dice(up, down, graph.spec) == 0.0
    assert mask_dice(up, up, small_graph("classify").spec) is None
