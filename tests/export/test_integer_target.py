"""The integer target: every kind of student becomes a model that answers as the float graph does, to the same byte."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.export.students import make_student, phantom_inputs
from tinyusfm_calibration.ranges import SPAN, Observer, Ranges
from tinyusfm_export.graph.build import ExportGraph, build_graph
from tinyusfm_export.graph.stages import split_graph
from tinyusfm_export.quantize.decision import QuantDecision
from tinyusfm_export.quantize.equalise import equalise
from tinyusfm_export.quantize.fake_quant import float_net
from tinyusfm_export.quantize.ptq import PtqPolicy, decide
from tinyusfm_export.quantize.spans import calibration_taps
from tinyusfm_export.targets.integer import Target, write_model
from tinyusfm_export.verify.artefact import stage_decision
from tinyusfm_runtime.early_exit import TOKENS_OUT
from tinyusfm_runtime.engines.integer import compiled
from tinyusfm_runtime.engines.integer.execute import Definition
from tinyusfm_runtime.engines.integer.layout import I16
from tinyusfm_runtime.engines.integer.model_file import read_model, read_tensors
from tinyusfm_runtime.errors import CalibrationError, UnsupportedError
from tinyusfm_runtime.spec import ExitPolicy

STUDENTS: dict[str, tuple[str, dict[str, Any]]] = {
    "segment": ("segment", {}),
    "one wide head": ("segment", {"width": 64, "heads": 1}),
    "three heads of 64": ("classify", {"width": 192, "heads": 3, "depth": 2}),
    "wide": ("segment", {"width": 96, "heads": 6}),
    "three labels": ("segment", {"num_classes": 3}),
    "light head": ("segment", {"seg_head": "lite"}),
    "shallow": ("classify", {"depth": 6}),
    "classify": ("classify", {}),
    "features": ("features", {}),
}


def ranges_of(graph: ExportGraph) -> Ranges:
    """Ranges and spans on six phantoms."""
    observer, taps = Observer(), calibration_taps(graph)
    for tensor in phantom_inputs(graph.spec, 6):
        observer.add(taps(tensor))
    return Ranges(tensors=observer.tensors("minmax"), method="minmax", set_id="test", frame_sha256=("0" * 64,))


def graph_of(name: str, **more: Any) -> ExportGraph:
    task, changes = STUDENTS[name]
    module, spec = make_student(task, **changes)
    return build_graph(calm(module), spec, **more)


def calm(module: Any) -> Any:
    """Attention as trained students have it: scores of a few nats, which queries and keys of 8 bits can tell apart."""
    for block in module.backbone.blocks:
        block.attn.qkv.weight.data *= 0.25
    return module


def decided(graph: ExportGraph, **policy: Any) -> QuantDecision:
    return decide(graph, "int8", ranges_of(graph), policy=PtqPolicy(rest_precision="f32", **policy))


def run_both(graph: ExportGraph, decision: QuantDecision, tensor: np.ndarray) -> dict[str, np.ndarray]:
    """The definition's answer, which the compiled engine has to give too."""
    tensors = read_tensors(write_model(graph, decision).file())
    model = read_model(tensors)
    want = Definition(model).run(tensor)
    assert want is not None
    for isa in compiled.instruction_sets():
        got = compiled.CompiledModel(tensors, model, threads=2, isa=isa).run(tensor)
        assert got is not None and {n: v.tobytes() for n, v in got.items()} == {n: v.tobytes() for n, v in want.items()}
    return want


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """Root mean square difference over the root mean square of the second."""
    return float(np.sqrt(np.square(a - b).mean() / np.square(b).mean()))


@pytest.mark.parametrize("name", STUDENTS)
def test_a_student_answers_as_in_float(name: str) -> None:
    graph = graph_of(name)
    tensor = phantom_inputs(graph.spec, 6)[4]
    found = run_both(graph, decided(graph), tensor)["logits"]
    wanted = float_net(graph)(tensor)["logits"]
    assert found.shape == wanted.shape and found.dtype == np.float32
    assert distance(found, wanted) < 0.2


def test_a_chain_stops_where_its_definition_stops_and_is_near_the_float_graph() -> None:
    graph = build_graph(*chained())
    decision = decided(graph)
    stages = split_graph(graph)
    for tensor in phantom_inputs(graph.spec, 3):
        wanted = float_net(graph)(tensor)
        given, answers = tensor, []
        for stage in stages:
            found = run_both(stage, stage_decision(stage, decision), given)
            answers.append(found["logits"])
            given = found.get(TOKENS_OUT, given)
        names = [name for name in wanted if name.startswith("logits_exit")] + ["logits"]
        for name, answer in zip(names, answers, strict=True):
            assert np.abs(answer - wanted[name]).max() < 0.25 * max(1.0, float(np.abs(wanted[name]).max()))


def chained() -> tuple[Any, Any]:
    """A small classifier with exits after blocks 2 and 3."""
    module, spec = make_student("classify", depth=4, exits=(2, 3), num_classes=3)
    policy = ExitPolicy(blocks=(2, 3), entropy=(0.1, 0.1))
    return calm(module), replace(spec, labels=("a", "b", "c"), exits=policy)


def test_auxiliary_outputs_are_there() -> None:
    graph = graph_of("segment", auxiliary=("tokens_block4", "peak_block10"))
    tensor = phantom_inputs(graph.spec, 6)[2]
    found, wanted = run_both(graph, decided(graph), tensor), float_net(graph)(tensor)
    assert list(found) == list(wanted)
    for name in ("tokens_block4", "peak_block10"):
        assert found[name].shape == wanted[name].shape and distance(found[name], wanted[name]) < 0.1


def test_layers_that_stay_float_elsewhere_keep_sixteen_bits_here() -> None:
    graph = graph_of("segment")
    ranges = ranges_of(graph)
    words = []
    for kept in ((), ("blocks.*.attn.qkv", "blocks.*.mlp.fc1")):
        decision = decide(graph, "int8", ranges, policy=PtqPolicy(rest_precision="f32", keep_float=kept))
        writer = write_model(graph, decision)
        words.append(sum(row[0] == 5 and writer.buffers[row[2]][0] == I16 for row in writer.operations))
        tensor = phantom_inputs(graph.spec, 1)[0]
        assert distance(run_both(graph, decision, tensor)["logits"], float_net(graph)(tensor)["logits"]) < 0.2
    assert words == [2, 24], "two norms per block"


def test_equalised_graphs_are_written_as_they_are() -> None:
    graph = graph_of("segment")
    rng = np.random.default_rng(0)
    names = [name for name in graph.linear_inputs if name.endswith((".qkv.input", ".proj.input", ".fc1.input"))]
    changed = equalise(graph, {name: np.exp(rng.normal(0, 0.5, 48)).astype(np.float32) for name in names})
    tensor = phantom_inputs(graph.spec, 6)[3]
    found = run_both(changed, decided(changed), tensor)["logits"]
    assert distance(found, float_net(graph)(tensor)["logits"]) < 0.2


def test_the_same_arguments_give_the_same_bytes(tmp_path: Path) -> None:
    contents = []
    for name in ("a", "b"):
        graph = graph_of("segment")
        (tmp_path / name).mkdir()
        built = Target().build(graph, decided(graph), tmp_path / name)
        contents.append([path.read_bytes() for path in built.files])
        assert built.requirements.cpu_features == ()
    assert contents[0] == contents[1]


def test_ranges_without_spans_are_refused_with_what_to_do() -> None:
    graph = graph_of("segment")
    ranges = ranges_of(graph)
    bare = replace(ranges, tensors={n: r for n, r in ranges.tensors.items() if not n.endswith(SPAN)})
    with pytest.raises(CalibrationError, match="calibrate again with --data"):
        write_model(graph, decide(graph, "int8", bare, policy=PtqPolicy(rest_precision="f32")))


def test_float_precisions_are_refused(tmp_path: Path) -> None:
    graph = graph_of("segment")
    with pytest.raises(UnsupportedError, match="export with int8"):
        Target().build(graph, decide(graph, "fp32"), tmp_path)
