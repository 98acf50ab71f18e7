"""What is trained with fake quantization is what the integer model computes: one code a layer at most."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from tests.export.students import make_student, phantom_inputs
from tests.export.test_integer_target import calm, graph_of, ranges_of
from tinyusfm_calibration.ranges import SPAN
from tinyusfm_export.graph.build import ExportGraph, build_graph
from tinyusfm_export.quantize.decision import QuantDecision
from tinyusfm_export.quantize.fake_quant import FakeQuant
from tinyusfm_export.quantize.ptq import PtqPolicy, decide, natural_grid
from tinyusfm_export.quantize.qat import QatConfig, finetune, learned_ranges
from tinyusfm_export.targets.integer import write_model
from tinyusfm_runtime.engines.integer.execute import RUN, Definition
from tinyusfm_runtime.engines.integer.layout import ADD, U8, Model, Operation
from tinyusfm_runtime.engines.integer.model_file import read_model, read_tensors

HEADS = 3
POLICY = PtqPolicy(rest_precision="f32", weight_limit=63)


def layers(model: Model, notes: list[dict[str, Any]], tensor: np.ndarray) -> Any:
    """Runs the definition; yields operation, note, what it read, and what its target held before and after."""
    definition = Definition(model)
    buffers = [definition.buffer(number) for number in range(len(model.buffers))]
    buffers[0][:] = tensor.reshape(buffers[0].shape)
    for operation, note in zip(model.operations, notes, strict=True):
        if operation.kind == "output":
            continue
        source, before = buffers[operation.source].copy(), buffers[operation.target].copy()
        RUN[operation.kind](operation, buffers)
        after = buffers[operation.target].copy()
        if operation.kind == "linear" and operation["table"]:  # the codes in front of the GELU's table
            plain: Operation = replace(operation, fields={**operation.fields, "table": 0})
            RUN["linear"](
                plain, scratch := [*buffers[: operation.target], after.copy(), *buffers[operation.target + 1 :]]
            )
            after = scratch[operation.target]
        yield operation, note, source, before, after


def codes_off(
    operation: Operation,
    note: dict[str, Any],
    before: np.ndarray,
    after: np.ndarray,
    wanted: np.ndarray,
    decision: QuantDecision,
) -> float:
    """Largest distance of a layer's result from the fake quantization's, in codes of its target."""
    label = note["label"]
    span = decision.spans.get(f"{label}{SPAN}")
    rows = slice(operation["target_row"], operation["target_row"] + operation["rows"])
    if operation["mode"] == ADD:
        got = after[rows].astype(np.int64) - before[rows]
        return float(np.abs(got - np.rint(wanted / note["gives"])).max())
    if label.endswith("attn.qkv"):
        path, width = label.removesuffix(".qkv"), wanted.shape[1] // 3
        spans = [decision.spans[f"{path}.{part}.{head}{SPAN}"] for part in "qkv" for head in range(HEADS)]
        step = np.repeat([max(map(abs, each)) / 127.0 for each in spans], width // HEADS)
    else:
        assert span is not None
        low = max(span[0], -4.0)
        step = np.float64((max(span[1], 0.1) - low) / 255.0)
    inside = np.clip(np.rint(wanted / step) + operation["zero"], 0, 255)
    return float(np.abs(after[rows] - inside).max())


def test_every_layer_is_within_one_code_of_the_fake_quantization() -> None:
    graph = graph_of("segment")
    ranges = learned_ranges(ranges_of(graph), dict.fromkeys(graph.linear_inputs, 1.0))
    check_layers(graph, decide(graph, "int8", ranges, policy=POLICY))


def test_a_student_trained_on_the_integer_grids_too() -> None:
    """Training moves weights and ranges; what comes out is still what the integer model computes."""
    module, spec = make_student("segment")
    graph = build_graph(calm(module), spec)
    ranges = ranges_of(graph)
    frames = [tensor[0] for tensor in phantom_inputs(spec, 2)]
    config = QatConfig(steps=2, batch=1, warmup=1, learning_rate=1e-3, range_rate=0.1, form="static")
    result = finetune(module, spec, decide(graph, "int8", ranges, policy=POLICY), frames, config)
    trained = build_graph(result.student, spec)
    learned = result.learned(ranges)
    assert any(learned.tensors[name] != ranges.tensors[name] for name in trained.linear_inputs)
    check_layers(trained, decide(trained, "int8", learned, policy=POLICY))


def check_layers(graph: ExportGraph, decision: QuantDecision) -> None:
    """Every layer of the blocks is within one code of what fake quantization computes of the same input."""
    fake = FakeQuant(graph, decision, form="static")
    writer = write_model(graph, decision)
    model = read_model(read_tensors(writer.file()))
    tensor = phantom_inputs(graph.spec, 6)[4]
    found: dict[str, float] = {}
    for operation, note, source, before, after in layers(model, writer.notes, tensor):
        name = f"{note['label']}.input"
        if (
            not name.startswith("blocks.")
            or name not in decision.quantized()
            or model.buffers[operation.source].dtype != U8
        ):
            continue
        grid = natural_grid(decision.tensors[name])
        zero = grid.zero + (128 if grid.signed else 0)
        rows = source[operation["row"] : operation["row"] + operation["rows"]].astype(np.float64)
        layer = fake.module.get_submodule(graph.linear_inputs[name])
        with torch.no_grad():
            wanted = layer(torch.from_numpy((rows - zero) * note["takes"]).float()[None])[0].double().numpy()
        found[note["label"]] = codes_off(operation, note, before, after, wanted, decision)
    kinds = {label.rsplit(".", 1)[-1] for label in found}
    assert kinds == {"qkv", "proj", "fc1", "fc2"} and len(found) > 20
    assert max(found.values()) <= 1.0, max(found.items(), key=lambda item: item[1])


def test_a_coarser_grid_is_noticed() -> None:
    """The broken control: weights of the fake quantization on four bits."""
    graph = graph_of("segment")
    ranges = learned_ranges(ranges_of(graph), dict.fromkeys(graph.linear_inputs, 1.0))
    decision = decide(graph, "int8", ranges, policy=POLICY)
    coarse = decide(graph, "int8", ranges, policy=PtqPolicy(rest_precision="f32", weight_limit=7))
    fake = FakeQuant(graph, coarse, form="static")
    writer = write_model(graph, decision)
    model = read_model(read_tensors(writer.file()))
    for operation, note, source, before, after in layers(model, writer.notes, phantom_inputs(graph.spec, 6)[4]):
        if note["label"] != "blocks.3.mlp.fc2":
            continue
        grid = natural_grid(decision.tensors["blocks.3.mlp.fc2.input"])
        layer = fake.module.get_submodule(graph.linear_inputs["blocks.3.mlp.fc2.input"])
        with torch.no_grad():
            taken = torch.from_numpy((source.astype(np.float64) - grid.zero) * note["takes"]).float()[None]
            wanted = layer(taken)[0].double().numpy()
        assert codes_off(operation, note, before, after, wanted, decision) > 1.0
        return
    raise AssertionError("there is no such layer")
