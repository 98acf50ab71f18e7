"""Integer artefacts that were pruned to a sector.

The same bytes everywhere, near the float graph without these patches.

Grids are 5x5 and 6x8 patches, so that no count of tokens is a multiple of a tile; the shipped students have 14x14.
"""

from __future__ import annotations

import json
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.export.students import make_student, phantom_inputs
from tests.export.test_integer_target import calm, chained, decided, distance, run_both
from tinyusfm_edge import students
from tinyusfm_export.graph.build import ExportGraph, build_graph
from tinyusfm_export.graph.stages import split_graph
from tinyusfm_export.quantize.decision import QuantDecision
from tinyusfm_export.quantize.fake_quant import float_net
from tinyusfm_export.quantize.ptq import PtqPolicy, decide
from tinyusfm_export.targets.integer import MODEL_FILE, Target, write_model
from tinyusfm_export.verify.artefact import stage_decision
from tinyusfm_runtime.early_exit import TOKENS_OUT
from tinyusfm_runtime.engines.integer import DESCRIPTION_FILE
from tinyusfm_runtime.engines.integer.execute import RUN
from tinyusfm_runtime.engines.integer.layout import NUMBERS, TYPES
from tinyusfm_runtime.engines.integer.model_file import read_model, read_tensors
from tinyusfm_runtime.numerics.order import wide
from tinyusfm_runtime.reading_rules import TokenSector
from tinyusfm_runtime.spec import ModelSpec, SecondPass

ALL_BUT_ONE = ("11111", "11111", "11111", "11111", "11110")
MOST = ("01110", "11111", "11111", "01110", "00000")
ONE = ("00000", "00000", "00100", "00000", "00000")
FAN = ("00111100", "01111110", "11111111", "11111111", "01111110", "00011000")
STUDENTS: dict[str, tuple[str, dict[str, Any]]] = {
    "segment": ("segment", {}),
    "three labels": ("segment", {"num_classes": 3}),
    "light head": ("segment", {"seg_head": "lite"}),
    "one wide head": ("segment", {"width": 64, "heads": 1}),
    "classify": ("classify", {"num_classes": 3}),
    "features": ("features", {}),
}


def sector_of(kept: tuple[str, ...]) -> TokenSector:
    return TokenSector(name="fan", kept=kept)


@lru_cache(maxsize=16)
def whole_of(name: str, rows: int, columns: int) -> tuple[Any, ModelSpec, QuantDecision]:
    """A student, its spec, and the decision of all of it."""
    task, changes = STUDENTS[name]
    module, spec = make_student(task, **changes, image_size=16 * rows, image_width=16 * columns)
    return calm(module), spec, decided(build_graph(module, spec))


def graphs_of(name: str, kept: tuple[str, ...]) -> tuple[ExportGraph, QuantDecision]:
    """A student without the patches outside, and the decision of the whole student."""
    module, spec, decision = whole_of(name, len(kept), len(kept[0]))
    return build_graph(module, replace(spec, sector=sector_of(kept)), pruned=True), decision


@pytest.mark.parametrize("name", STUDENTS)
@pytest.mark.parametrize("kept", [ALL_BUT_ONE, MOST, ONE, FAN], ids=["one absent", "65 %", "one kept", "rectangle"])
def test_a_pruned_student_answers_as_in_float(name: str, kept: tuple[str, ...]) -> None:
    graph, decision = graphs_of(name, kept)
    tensor = phantom_inputs(graph.spec, 6)[4]
    found, wanted = run_both(graph, decision, tensor)["logits"], float_net(graph)(tensor)["logits"]
    assert found.shape == wanted.shape and distance(found, wanted) < 0.2
    if kept in (MOST, FAN):
        module, spec, _ = whole_of(name, len(kept), len(kept[0]))
        whole = float_net(build_graph(module, spec))(tensor)["logits"]
        assert distance(found, wanted) < 0.5 * distance(whole, wanted), "or the patches would not matter"


def test_it_looks_at_no_other_patch() -> None:
    graph, decision = graphs_of("segment", FAN)
    tensor = phantom_inputs(graph.spec, 6)[4]
    outside = np.where(sector_of(FAN).pixels_HW, tensor, np.uint8(7))
    answers = [run_both(graph, decision, each)["logits"].tobytes() for each in (tensor, outside)]
    assert answers[0] == answers[1]


def test_another_gather_is_noticed() -> None:
    """The broken control: the same number of patches, from other places."""
    graph, decision = graphs_of("segment", MOST)
    tensor = phantom_inputs(graph.spec, 6)[4]
    turned, _ = graphs_of("segment", tuple(row[::-1] for row in MOST[::-1]))
    assert distance(run_both(turned, decision, tensor)["logits"], float_net(graph)(tensor)["logits"]) > 0.3


def test_absent_patches_have_what_the_layer_makes_of_zeros() -> None:
    """The definition of the blank row, computed by the layer itself."""
    graph, decision = graphs_of("segment", MOST)
    model = read_model(read_tensors(write_model(graph, decision).file()))
    scattered = [n for n, op in enumerate(model.operations) if op.kind == "gather" and op["blank"]]
    assert len(scattered) == 4, "one for each tapped block"
    for number in scattered:
        layer, gather = model.operations[number - 1], model.operations[number]
        assert layer.kind == "linear" and layer.target == gather.source
        buffers = [np.zeros(each.shape, TYPES[each.dtype]) for each in model.buffers]
        RUN["linear"](layer, buffers)
        np.testing.assert_array_equal(buffers[layer.target][0], gather.tensors["blank"])
        assert gather.tensors["blank"].any()
        assert (gather.tensors["index"] < 0).sum() == "".join(MOST).count("0")


def test_a_chain_is_pruned_in_its_first_stage() -> None:
    module, spec = chained()
    whole = build_graph(module, spec)
    graph = build_graph(module, replace(spec, sector=sector_of(MOST)), pruned=True)
    decision, given = decided(whole), phantom_inputs(spec, 1)[0]
    gathers = []
    for stage in split_graph(graph):
        rows = write_model(stage, stage_decision(stage, decision)).operations
        gathers.append(sum(row[0] == NUMBERS["gather"] for row in rows))
        found = run_both(stage, stage_decision(stage, decision), given)
        given = found.get(TOKENS_OUT, given)
    assert gathers == [1, 0, 0]
    assert np.abs(found["logits"] - float_net(graph)(phantom_inputs(spec, 1)[0])["logits"]).max() < 1.0


def test_the_description_names_the_sector_and_says_nothing_without_one(tmp_path: Path) -> None:
    graph, decision = graphs_of("segment", FAN)
    described = []
    module, spec, _ = whole_of("segment", len(FAN), len(FAN[0]))
    for name, each in (("pruned", graph), ("whole", build_graph(module, spec))):
        (tmp_path / name).mkdir()
        Target().build(each, decision, tmp_path / name)
        described.append(json.loads((tmp_path / name / DESCRIPTION_FILE).read_text(encoding="ascii")))
        assert (tmp_path / name / MODEL_FILE).stat().st_size
    assert described[0]["sector"] == {"name": "fan", "kept_patches": 34, "patches": 48}
    assert "sector" not in described[1]


def nearest(count: int) -> TokenSector:
    """So many of 14x14 patches: those nearest to a point below the middle."""
    rows, columns = np.mgrid[:14, :14] + 0.5
    order = np.argsort(wide(np.hypot(rows - 8.0, columns - 7.0)), axis=None, kind="stable")
    kept = np.zeros(196, int)
    kept[order[:count]] = 1
    return TokenSector(name="fan", kept=tuple("".join(map(str, row)) for row in kept.reshape(14, 14)))


@pytest.mark.parametrize("name", ["fetal-head", "breast-lesion"])
@pytest.mark.parametrize("count", [195, 127], ids=["one absent", "65 %"])
def test_a_shipped_student_gives_the_same_bytes_everywhere(name: str, count: int) -> None:
    weights = Path(students.__file__).with_name(name) / students.WEIGHTS
    if not weights.is_file():
        pytest.skip(f"the weights of {name} are in a source checkout only")
    loaded = students.load(name, None if name in students.names() else weights)
    assert loaded.ranges is not None
    spec = replace(loaded.spec, sector=nearest(count), second_pass=SecondPass.NEVER)
    graph = build_graph(loaded.module, spec, pruned=True)
    decision = decide(graph, "int8", loaded.ranges, policy=PtqPolicy(rest_precision="f32"))
    assert spec.sector is not None
    tensor = spec.sector.masked(phantom_inputs(spec, 4)[3])
    found, wanted = run_both(graph, decision, tensor)["logits"], float_net(graph)(tensor)["logits"]
    assert distance(found, wanted) < 0.1
