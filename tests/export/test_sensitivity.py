"""Sensitivity: the layer that was made bad is found, runs go on where they stopped, and the search keeps the fewest."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.export.students import make_student, observed, phantom_inputs
from tinyusfm_calibration.ranges import Ranges
from tinyusfm_export.graph.build import ExportGraph, build_graph
from tinyusfm_export.quantize.ptq import PtqPolicy, decide
from tinyusfm_export.quantize.sensitivity import Sensitivity, keep_most_expensive, measure_sensitivity, mixed_policies
from tinyusfm_runtime.errors import CalibrationError, InputError

POLICY = PtqPolicy(rest_precision="f32", layers=("blocks.0.mlp.*", "blocks.5.attn.qkv"), decoder=False)
BAD = "blocks.0.mlp.fc2"


@pytest.fixture(scope="module")
def graph() -> ExportGraph:
    return build_graph(*make_student())


@pytest.fixture(scope="module")
def ranges(graph: ExportGraph) -> Ranges:
    return observed(graph)


@pytest.fixture(scope="module")
def measured(graph: ExportGraph, ranges: Ranges) -> Sensitivity:
    """One layer's weights are made unfit for a grid: every row gets an outlier."""
    layer = graph.module.get_submodule(BAD)
    with torch.no_grad():
        layer.weight[:, 0] = 60 * layer.weight.abs().max()
    decision = decide(graph, "int8", ranges, policy=POLICY)
    return measure_sensitivity(graph, decision, phantom_inputs(graph.spec, 2))


def test_the_bad_layer_is_the_most_expensive(measured: Sensitivity) -> None:
    assert measured.layers[0].layer == BAD
    assert measured.layers[0].logit_abs > 3 * measured.layers[1].logit_abs
    assert len(measured.layers) == 3 and measured.whole.layer == "all"


def test_it_reads_what_it_writes(measured: Sensitivity) -> None:
    assert Sensitivity.from_json(measured.to_json()) == measured
    with pytest.raises(InputError, match="version"):
        Sensitivity.from_json({**measured.to_json(), "version": 99})
    with pytest.raises(InputError, match="not usable"):
        Sensitivity.from_json({**measured.to_json(), "layers": [{"layer": 1}]})


def test_a_stopped_measurement_goes_on_to_the_same_end(
    graph: ExportGraph, ranges: Ranges, measured: Sensitivity
) -> None:
    decision = decide(graph, "int8", ranges, policy=POLICY)
    inputs = phantom_inputs(graph.spec, 2)
    saved: dict[str, dict[str, float]] = {}

    class Stopped(Exception):
        pass

    def keep(costs: dict[str, dict[str, float]]) -> None:
        saved.update({name: dict(cost) for name, cost in costs.items()})
        if len(costs) == 2:
            raise Stopped

    with pytest.raises(Stopped):
        measure_sensitivity(graph, decision, inputs, keep=keep)
    seen: list[int] = []
    again = measure_sensitivity(graph, decision, inputs, known=saved, keep=lambda costs: seen.append(len(costs)))
    assert seen == [3, 4], "only what was missing is measured"
    assert again == measured


def test_no_frames_or_nothing_quantized_is_an_error(graph: ExportGraph, ranges: Ranges) -> None:
    decision = decide(graph, "int8", ranges, policy=POLICY)
    with pytest.raises(CalibrationError, match="frames"):
        measure_sensitivity(graph, decision, [])


def test_policies_keep_the_most_expensive_first(measured: Sensitivity) -> None:
    policies = mixed_policies(measured, POLICY)
    assert [len(policy.keep_float) for policy in policies] == [0, 1, 2]
    assert policies[1].keep_float == (BAD,) and not policies[1].quantizes(BAD)
    assert keep_most_expensive(measured, 3).keep_float == tuple(row.layer for row in measured.layers)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
