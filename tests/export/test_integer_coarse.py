"""Layers whose sums are coarser than the step that their result asks for.

The integer model takes a coarser step, or 16 bits in front of the layer, as long as enough bits are left; else it says
which layer it is and what to do. Without that the same students are refused, which is the broken control.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.export.students import phantom_inputs
from tests.export.test_integer_sector import MOST, sector_of, whole_of
from tests.export.test_integer_sector import STUDENTS as SECTOR_STUDENTS
from tests.export.test_integer_target import STUDENTS, chained, decided, distance, graph_of, ranges_of, run_both
from tinyusfm_edge.models.checkpoint import load_student_file
from tinyusfm_export.graph.build import ExportGraph, build_graph
from tinyusfm_export.graph.stages import split_graph
from tinyusfm_export.quantize.decision import QuantDecision
from tinyusfm_export.quantize.fake_quant import float_net
from tinyusfm_export.quantize.ptq import PtqPolicy, decide
from tinyusfm_export.quantize.qat import learned_ranges
from tinyusfm_export.targets.integer import Target, context, decoder, tokens, write_model
from tinyusfm_export.targets.integer.context import Context
from tinyusfm_export.targets.integer.scales import (
    CODE_BITS,
    Step,
    coarser_step,
    fraction_bits,
    layer_units,
    plain_factors,
    scaled_layer,
    split_factor,
    word_bits,
)
from tinyusfm_export.targets.integer.writer import ModelWriter
from tinyusfm_export.verify.artefact import stage_decision
from tinyusfm_runtime.early_exit import TOKENS_OUT
from tinyusfm_runtime.engines.integer.layout import I16, NUMBERS
from tinyusfm_runtime.errors import UnsupportedError

LIMIT = 63
TWIN = Path(__file__).resolve().parents[2] / "benchmarks/students/stages/fetal-head-fast.taught-2.safetensors"
POLICY = PtqPolicy(rest_precision="f32")


def residual_bits(writer: ModelWriter) -> int:
    """Fraction bits of the residual, from what the last sum of a block gives."""
    note = next(note for note in writer.notes if note["label"].endswith("attn.proj"))
    return -round(math.log2(note["gives"]))


def with_large_weight(graph: ExportGraph, block: int, kind: str, ratio: float) -> ExportGraph:
    """One output of a layer gets a weight of so many residual steps a unit, on an input that is the same everywhere.

    Its bias takes the product off again, so that the float graph's answer stays.
    """
    path = f"blocks.{block}"
    module: Any = graph.module
    layer = module.get_submodule(f"{path}.{kind}")
    inside = layer.weight.shape[1]
    if kind == "mlp.fc2":
        before, row, constant = module.get_submodule(f"{path}.mlp.fc1"), 5, 0.5
        given_ = 0.5 * constant * (1.0 + math.erf(constant / math.sqrt(2.0)))
    else:
        before, row, constant = module.get_submodule(f"{path}.attn.qkv"), 2 * inside + 5, 0.5
        given_ = constant
    with torch.no_grad():
        before.weight[row] = 0.0
        before.bias[row] = constant
        known = Context(graph=graph, decision=decided(graph), writer=ModelWriter())
        weight = ratio * LIMIT * 2.0**-known.range_bits / known.input_step(f"{path}.{kind}.input").scale
        layer.weight[7, 5] = weight
        layer.bias[7] -= weight * given_
    return graph


@pytest.fixture
def as_before(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Switches off what is tested here: steps are those that the ranges ask for."""

    def switch_off() -> None:
        for place in (tokens, decoder):
            monkeypatch.setattr(place, "coarser_step", lambda label, step, unit: step)
        for place in (tokens, decoder, context):
            monkeypatch.setattr(place, "word_bits", lambda label, bits, unit, **more: bits)
            if hasattr(place, "layer_units"):
                monkeypatch.setattr(place, "layer_units", lambda weight, *more, **limit: np.zeros(len(weight)))

    return switch_off


@pytest.mark.parametrize("kind", ["mlp.fc2", "attn.proj"])
@pytest.mark.parametrize(("ratio", "fewer"), [(0.9, 0), (1.09, 1), (1.9, 1), (2.1, 2), (7.0, 3)])
def test_the_residual_follows_its_coarsest_layer(
    kind: str, ratio: float, fewer: int, tmp_path: Path, as_before: Callable[[], None]
) -> None:
    graph = with_large_weight(graph_of("segment"), 9, kind, ratio)
    decision = decided(graph)
    writer = write_model(graph, decision)
    tensor = phantom_inputs(graph.spec, 6)[4]
    assert distance(run_both(graph, decision, tensor)["logits"], float_net(graph)(tensor)["logits"]) < 0.2
    assert f", {16 - fewer}-bit residual;" in Target().build(graph, decision, tmp_path).form
    plain = graph_of("segment")
    assert residual_bits(writer) == residual_bits(write_model(plain, decided(plain))) - fewer
    as_before()
    if fewer:
        with pytest.raises(UnsupportedError, match="shift to the left"):
            write_model(graph, decision)
    else:
        assert write_model(graph, decision).file() == writer.file()


def test_too_few_bits_are_refused_with_layer_and_remedy() -> None:
    graph = with_large_weight(graph_of("segment"), 9, "mlp.fc2", 17.0)
    wanted = r"'blocks\.9\.mlp\.fc2' is too coarse.* 17 steps.*fewer than 12 of 16 bits.*calibrate.*qat.*openvino"
    with pytest.raises(UnsupportedError, match=wanted):
        write_model(graph, decided(graph))


@pytest.mark.parametrize("layer", ["attn.qkv", "mlp.fc1"])
def test_a_coarse_input_of_a_block_gets_sixteen_bits(layer: str, as_before: Callable[[], None]) -> None:
    graph = graph_of("segment")
    decision = widened(graph, f"blocks.7.{layer}.input", 300.0)
    writer = write_model(graph, decision)
    wide = [
        note["gives"] == 2.0**-11
        for row, note in zip(writer.operations, writer.notes, strict=True)
        if row[0] == NUMBERS["norm"] and writer.buffers[row[2]][0] == I16
    ]
    assert len(wide) == 3 and all(wide), "both of block 0, and this one"
    tensor = phantom_inputs(graph.spec, 6)[4]
    assert distance(run_both(graph, decision, tensor)["logits"], float_net(graph)(tensor)["logits"]) < 0.2
    as_before()
    with pytest.raises(UnsupportedError, match="shift to the left"):
        write_model(graph, decision)


def widened(graph: ExportGraph, name: str, factor: float) -> QuantDecision:
    """The decision for ranges of which training has widened one so often."""
    ranges = learned_ranges(ranges_of(graph), {**dict.fromkeys(graph.linear_inputs, 1.0), name: factor})
    return decide(graph, "int8", ranges, policy=POLICY)


def gives_of(writer: ModelWriter, label: str) -> float:
    """The step of a layer's result."""
    return next(float(note["gives"]) for note in writer.notes if note["label"] == label)


@pytest.mark.parametrize(
    ("name", "smooth"),
    [
        ("segment", "head.smooth.0"),
        ("segment", "head.smooth.3"),
        ("light head", "head.smooth.1.pointwise"),
        ("three labels", "head.smooth.2"),
    ],
)
def test_a_classifier_of_a_large_weight_has_coarser_words(
    name: str, smooth: str, as_before: Callable[[], None]
) -> None:
    graph = graph_of(name)
    module: Any = graph.module
    level = smooth.split(".")[2]
    before, layer = module.get_submodule(smooth), module.get_submodule(f"head.classifier.{level}")
    before.weight.data[5] = 0.0
    before.bias.data[5] = 0.5
    for each in range(4):  # logits of a trained student's size
        module.get_submodule(f"head.classifier.{each}").weight.data *= 200.0
    plain = decided(graph)
    step = Context(graph=graph, decision=plain, writer=ModelWriter()).input_step(f"head.classifier.{level}.input").scale
    gives = gives_of(write_model(graph, plain), f"head.classifier.{level}")
    unit = 3.0 * gives / step
    layer.weight.data.copy_(torch.round(layer.weight.data / unit) * unit)  # so that only steps matter
    layer.weight.data[:, 5] = LIMIT * unit
    layer.bias.data -= LIMIT * unit * 0.5
    decision, tensor = decided(graph), phantom_inputs(graph.spec, 6)[4]
    assert gives_of(write_model(graph, decision), f"head.classifier.{level}") == 4.0 * gives
    found, wanted = run_both(graph, decision, tensor)["logits"], float_net(graph)(tensor)["logits"]
    assert distance(found, wanted) < 0.2
    as_before()
    with pytest.raises(UnsupportedError, match="shift to the left"):
        write_model(graph, decision)


def set_opposed(layer: Any) -> None:
    """A linear behind a LayerNorm reads the difference of two channels.

    Beside a large weight on all of them, which changes nothing since their sum is 0.
    """
    with torch.no_grad():
        layer.weight[:] = 60.0 * 4.0
        for row in range(len(layer.weight)):
            layer.weight[row, 2 * row] += 4.0
            layer.weight[row, 2 * row + 1] -= 4.0


@pytest.mark.parametrize("name", ["classify", "shallow"])
def test_logits_of_large_weights_have_coarser_words(name: str, as_before: Callable[[], None]) -> None:
    graph = graph_of(name)
    module: Any = graph.module
    set_opposed(module.get_submodule("logits"))
    decision, tensor = decided(graph), phantom_inputs(graph.spec, 6)[4]
    found, wanted = run_both(graph, decision, tensor)["logits"], float_net(graph)(tensor)["logits"]
    assert distance(found, wanted) < 0.4, "roundings of all channels are multiplied with the large weight"
    as_before()
    with pytest.raises(UnsupportedError, match="shift to the left"):
        write_model(graph, decision)


def test_an_exit_of_large_weights_and_a_coarse_second_stage(as_before: Callable[[], None]) -> None:
    """Stages of a chain may differ in the residual's step: tokens are rounded to that of the next one."""
    graph = with_large_weight(build_graph(*chained()), 2, "mlp.fc2", 3.0)
    module: Any = graph.module
    set_opposed(module.get_submodule("exits.2.head"))
    decision, stages = decided(graph), split_graph(graph)
    tensor = phantom_inputs(graph.spec, 3)[1]
    wanted, given_, bits = float_net(graph)(tensor), tensor, []
    for stage, name in zip(stages, ("logits_exit2", "logits_exit3", "logits"), strict=True):
        mine = stage_decision(stage, decision)
        found = run_both(stage, mine, given_)
        bits.append(residual_bits(write_model(stage, mine)))
        assert np.abs(found["logits"] - wanted[name]).max() < 0.25 * max(1.0, float(np.abs(wanted[name]).max()))
        given_ = found.get(TOKENS_OUT, given_)
    assert bits[0] == bits[1] + 2 == bits[2]
    as_before()
    for stage in stages[:2]:
        with pytest.raises(UnsupportedError, match="shift to the left"):
            write_model(stage, stage_decision(stage, decision))


def test_a_lateral_of_large_weights_makes_the_maps_coarser(as_before: Callable[[], None]) -> None:
    graph = graph_of("segment")
    module: Any = graph.module
    plain = decided(graph)
    bits = write_model(graph, plain).notes
    gives = [note["gives"] for note in bits if note["label"] == "head.lateral.0"][0]
    takes = [note["takes"] for note in bits if note["label"] == "head.lateral.0"][0]
    layer = module.get_submodule("head.lateral.0")
    layer.weight.data[3] *= 3.0 * LIMIT * gives / takes / float(layer.weight[3].abs().max())
    decision = decide(graph, "int8", ranges_of(graph_of("segment")), policy=POLICY)  # ranges of smaller weights
    notes = write_model(graph, decision).notes
    assert [note["gives"] for note in notes if note["label"] == "head.lateral.0"] == [4.0 * gives]
    run_both(graph, decision, phantom_inputs(graph.spec, 1)[0])
    as_before()
    with pytest.raises(UnsupportedError, match="shift to the left"):
        write_model(graph, decision)


KINDS = [name for name in STUDENTS if name != "three heads of 64"]


def any_graph(rng: np.random.Generator) -> tuple[ExportGraph, ExportGraph]:
    """A student of any kind, and the graph to write: its own, or one pruned to a sector."""
    if rng.random() < 0.7:
        graph = graph_of(str(rng.choice(KINDS)))
        return graph, graph
    module, spec, _ = whole_of(str(rng.choice(sorted(SECTOR_STUDENTS))), 5, 5)
    return build_graph(module, spec), build_graph(module, replace(spec, sector=sector_of(MOST)), pruned=True)


@pytest.mark.parametrize("seed", range(16))
def test_any_coarse_tensor_of_any_student_is_written_or_named(seed: int) -> None:
    rng = np.random.default_rng(seed)
    whole, graph = any_graph(rng)
    name = str(rng.choice(sorted(whole.linear_inputs)))
    decision = widened(whole, name, float(2.0 ** rng.uniform(3.0, 12.0)))
    tensor = phantom_inputs(graph.spec, 6)[3]
    try:
        found = run_both(graph, decision, tensor)
    except UnsupportedError as error:
        layer = name.removesuffix(".input")
        assert f"layer {layer!r} is too coarse" in str(error) and "export for another target" in str(error)
        return
    assert all(np.isfinite(value).all() for value in found.values())


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**31), inputs=st.integers(1, 40), wide=st.booleans(), power=st.floats(-8.0, 8.0))
def test_no_step_can_be_finer_than_a_unit_and_any_other_will_do(
    seed: int, inputs: int, wide: bool, power: float
) -> None:
    rng = np.random.default_rng(seed)
    weight = rng.normal(0.0, 1.0, (6, inputs)) * 10.0 ** rng.uniform(-3, 3, (6, 1))
    weight[int(rng.integers(6))] = 0.0
    takes = Step(scale=2.0**power, zero=0 if wide else int(rng.integers(256)), wide=wide)
    bias = rng.normal(0.0, 1.0, 6) * np.abs(weight).max(1) * takes.scale * 100.0
    unit_O = layer_units(weight, bias, takes, limit=LIMIT)
    assert (unit_O == 0.0).sum() == 1
    for step in (unit_O.max(), unit_O.max() * 37.0):
        layer, bits = scaled_layer(weight, bias, takes, np.array(step), most=CODE_BITS, limit=LIMIT)
        full = unit_O > 0.0
        ratio = layer["factor"][full] * 2.0 ** -(15.0 + bits + layer["shift"][full])
        np.testing.assert_allclose(ratio, unit_O[full] / step, rtol=2.0**-14)
    with pytest.raises(UnsupportedError, match="shift to the left"):
        scaled_layer(weight, bias, takes, np.array(unit_O.max() * 0.99), most=CODE_BITS, limit=LIMIT)


def test_the_twin_of_large_weights_is_written() -> None:
    student = load_student_file(TWIN)
    graph = build_graph(student.module, student.spec)
    decision, tensor = decided(graph), phantom_inputs(graph.spec, 4)[3]
    assert distance(run_both(graph, decision, tensor)["logits"], float_net(graph)(tensor)["logits"]) < 0.2


def test_values_beyond_sixteen_bits_and_multipliers_are_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"values reach 3e\+04, and words of 16 bits hold 29788"):
        fraction_bits(3e4)
    with pytest.raises(UnsupportedError, match="fits no multiplier"):
        plain_factors(np.array([1.0, 128.1]), 7)
    assert plain_factors(np.array([128.0]), 7)[0].tolist() == [32767]
    with pytest.raises(UnsupportedError, match="shift to the left"):
        split_factor(1.01, 0)


def test_steps_follow_the_sums_down_to_what_is_known_to_hold() -> None:
    assert coarser_step("a", 1.0, 0.5) == 1.0 and coarser_step("a", 1.0, 4.0) == 4.0
    with pytest.raises(UnsupportedError, match=r"layer 'a' .*fewer than 6 of 8 bits"):
        coarser_step("a", 1.0, 4.01)
    assert word_bits("a", 9, 2.0**-9) == 9 and word_bits("a", 9, 2.0**-9 * 1.01) == 8
    assert word_bits("a", 9, 2.0**-5) == 5
    with pytest.raises(UnsupportedError, match="fewer than 12 of 16 bits"):
        word_bits("a", 9, 2.0**-5 * 1.01)
    assert word_bits("a", 10, 2.0**-4, largest=8.0) == 4
    with pytest.raises(UnsupportedError, match="the answer would have fewer than 8 bits"):
        word_bits("a", 10, 2.0**-4, largest=7.9)
