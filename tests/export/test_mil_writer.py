"""Core ML packages: what stands in them, W8A8 from our decision, palettes to the number, controls that must fail."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.export.mil_edit import Files, model_of, operations, with_input
from tests.export.students import make_student, observed, phantom_inputs, small_graph
from tests.needs import needs
from tinyusfm_export.graph.build import ExportGraph, build_graph
from tinyusfm_export.onnx_files.half import half_scale
from tinyusfm_export.quantize.decision import QuantDecision, TensorQuant
from tinyusfm_export.quantize.fake_quant import FakeQuant
from tinyusfm_export.quantize.ptq import PtqPolicy, decide, quantize_weight, symmetric_grid
from tinyusfm_export.targets.coreml import PENDING, Target
from tinyusfm_export.targets.coreml.ops import OPERATORS
from tinyusfm_export.targets.coreml.palette import find_table, make_palette
from tinyusfm_export.targets.coreml.stand_in import MilEngine
from tinyusfm_runtime.engines import EngineConfig
from tinyusfm_runtime.errors import EngineError, UnsupportedError
from tinyusfm_runtime.graphs import mil
from tinyusfm_runtime.numerics.order import wide
from tinyusfm_runtime.reading_rules import TokenSector

needs("coremltools", reason="coremltools is not installed: pip install 'tinyusfm-edge[coreml]'")
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def graph() -> ExportGraph:
    return small_graph("classify")


@pytest.fixture(scope="module")
def decision(graph: ExportGraph) -> QuantDecision:
    return decide(graph, "int8", observed(graph), policy=PtqPolicy(rest_precision="f32"))


@pytest.fixture(scope="module")
def built(
    graph: ExportGraph, decision: QuantDecision, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Files]:
    """Precision -> files, each built once."""
    made: dict[str, Files] = {}

    def build(precision: str) -> Files:
        if precision not in made:
            wanted = decision if precision == "int8" else decide(graph, precision)
            artefact = Target().build(graph, wanted, tmp_path_factory.mktemp(precision))
            made[precision] = {path.name: path.read_bytes() for path in artefact.files}
        return made[precision]

    return build


def engine_of(files: Files, graph: ExportGraph, rest: str = "f16") -> MilEngine:
    engine = MilEngine()
    engine.load(files, graph.spec, EngineConfig(threads=1, rest_precision=rest))
    return engine


def error(files: Files, graph: ExportGraph, rest: str = "f16") -> float:
    """Root mean square error of the logits in standard deviations, over two frames."""
    engine, found, wanted = engine_of(files, graph, rest), [], []
    for tensor in phantom_inputs(graph.spec, 2):
        found.append(engine.run(tensor)["logits"])
        wanted.append(graph.module(torch.from_numpy(tensor))[0].numpy())
    difference = np.concatenate(found) - np.concatenate(wanted)
    return float(np.sqrt(np.mean(difference**2)) / np.concatenate(wanted).std())


def test_the_package_says_what_it_is(built: Callable[[str], Files], graph: ExportGraph) -> None:
    model = model_of(built("fp16"))
    assert model.specificationVersion == 8, "iOS 17, macOS 14"
    image = model.description.input[0].type.imageType
    assert image.colorSpace == image.ColorSpace.Value("GRAYSCALE")
    assert (image.height, image.width) == graph.spec.input.shape[2:]
    about = dict(model.description.metadata.userDefined)
    assert json.loads(about["labels"]) == list(graph.spec.labels) and about["task"] == "classify"
    table = json.loads(built("fp16")["Manifest.json"])
    assert table["rootModelIdentifier"] in table["itemInfoEntries"]


def test_w8a8_has_the_decisions_own_ranges(
    built: Callable[[str], Files], graph: ExportGraph, decision: QuantDecision
) -> None:
    engine = engine_of(built("int8"), graph)
    assert engine._program is not None
    found = {op.outputs[0].name: op for op in engine._program._function.operations}
    quantized = decision.quantized()
    assert sum(op.op_type == "quantize" for op in found.values()) == len(quantized)
    for name, quant in quantized.items():
        path = graph.linear_inputs[name].replace(".", "_")
        scale = found[f"{path}_input_codes"].inputs["scale"].val
        assert float(scale) == float(half_scale(np.float32(symmetric_grid(quant).scale)))
        weight = graph.module.get_submodule(graph.linear_inputs[name]).weight.numpy()
        scales = found[f"{path}_weight"].inputs["scale"].val
        if path != "patch_embed":
            expected = half_scale(quantize_weight(weight, limit=decision.weight_limit)[1])
            np.testing.assert_array_equal(scales, expected.astype(np.float16))


def test_w8a8_is_what_fake_quantization_computes(
    built: Callable[[str], Files], graph: ExportGraph, decision: QuantDecision
) -> None:
    """Up to codes that FP16 tips over: its own error must lie clearly below that of the 8-bit grid."""
    engine, fake = engine_of(built("int8"), graph), FakeQuant(graph, decision)
    apart, grid = [], []
    for tensor in phantom_inputs(graph.spec, 6):
        with torch.no_grad():
            rounded = fake(torch.from_numpy(tensor).float()).numpy()
            exact = graph.module(torch.from_numpy(tensor))[0].numpy()
        apart.append(engine.run(tensor)["logits"] - rounded)
        grid.append(rounded - exact)
    assert np.sqrt(np.mean(np.square(apart))) < 0.7 * np.sqrt(np.mean(np.square(grid)))


@pytest.mark.parametrize("bits", [4, 6])
def test_palettes_to_the_number(built: Callable[[str], Files], graph: ExportGraph, bits: int) -> None:
    engine = engine_of(built(f"w{bits}"), graph)
    assert engine._program is not None
    stored = {var.name: value for var, value in engine._program._weights.items()}
    weight = graph.module.get_submodule("blocks.3.mlp.fc1").weight.numpy()
    palette = make_palette(weight, bits)
    expected = palette.table[palette.indices]
    np.testing.assert_array_equal(stored["blocks_3_mlp_fc1_weight"], expected)
    assert len(np.unique(wide(expected))) <= 1 << bits
    restored = expected.astype(np.float64) * palette.scales.astype(np.float64)[:, None]
    share = np.sqrt(np.mean((restored - weight) ** 2) / np.mean(weight**2))
    assert share < {4: 0.12, 6: 0.03}[bits]


def test_a_table_beats_equal_steps_and_knows_few_values() -> None:
    entries = np.random.default_rng(0).normal(size=4000)
    table = find_table(entries, 16).astype(np.float64)
    near = np.abs(entries[:, None] - table).min(1)
    steps = np.linspace(entries.min(), entries.max(), 16)
    assert np.mean(near**2) < 0.6 * np.mean(np.abs(entries[:, None] - steps).min(1) ** 2)
    np.testing.assert_array_equal(np.unique(wide(find_table(np.full(9, 0.5), 4))), [0.5])


def test_a_changed_weight_is_noticed(built: Callable[[str], Files], graph: ExportGraph) -> None:
    files = built("fp16")
    engine = engine_of(files, graph)
    assert engine._program is not None
    op = next(o for o in operations(model_of(files)) if o.outputs[0].name == "logits_weight")
    offset = op.attributes["val"].blobFileValue.offset
    raw = bytearray(files["weight.bin"])
    start = int(np.frombuffer(raw[offset + 16 : offset + 24], np.uint64)[0])
    raw[start : start + 2] = np.float16(500.0).tobytes()
    assert error(files, graph) < 0.02
    assert error({**files, "weight.bin": bytes(raw)}, graph) > 1.0


def test_a_changed_axis_is_noticed(built: Callable[[str], Files], graph: ExportGraph) -> None:
    files = built("fp16")
    model = model_of(files)
    changed = False
    for op in operations(model):
        if op.type == "const" and op.outputs[0].name == "fc_norm_axes_0":
            op.attributes["val"].immediateValue.tensor.ints.values[:] = [0]  # over the batch
            changed = True
    assert changed
    broken = {**files, "model.mlmodel": model.SerializeToString(deterministic=True)}
    intact, found = error(files, graph), error(broken, graph)
    assert intact < 0.02 and found > 0.1, (intact, found)


def test_what_it_cannot_express_is_refused(graph: ExportGraph, decision: QuantDecision, tmp_path: Path) -> None:
    name = next(iter(decision.quantized()))
    dynamic = replace(decision, tensors={**decision.tensors, name: TensorQuant(mode="dynamic")})
    with pytest.raises(UnsupportedError, match="dynamic"):
        Target().build(graph, dynamic, tmp_path)
    foreign = replace(decision, tensors={**decision.tensors, "no.such": decision.tensors[name]})
    with pytest.raises(UnsupportedError, match=r"no\.such"):
        Target().build(graph, foreign, tmp_path)
    assert not list(tmp_path.iterdir()) and PENDING.isascii()


def test_the_stand_in_says_what_computed_what(built: Callable[[str], Files], graph: ExportGraph) -> None:
    engine = engine_of(built("int8"), graph)
    engine.run(phantom_inputs(graph.spec, 1)[0])
    assert engine._program is not None
    ways = engine._program.operators
    assert ways["torch"] == engine._program.counts["torch"] and ways["coremltools"] > 0
    assert f"{ways['torch']} operators over torch" in engine.description and "no Core ML" in engine.description
    with pytest.raises(EngineError, match="exactly"):
        engine_of({"model.mlmodel": b""}, graph)


@pytest.mark.parametrize("scale", [0.02, 0.5])
def test_quantize_and_dequantize_are_torchs(scale: float) -> None:
    x = torch.linspace(-40.0, 40.0, 401)
    codes = OPERATORS["quantize"]({"input": x, "scale": np.float32(scale), "output_dtype": "int8"})
    wanted = torch.quantize_per_tensor(x, float(np.float32(scale)), 0, torch.qint8)
    assert (codes - wanted.int_repr().float()).abs().max() <= 1.0
    back = OPERATORS["dequantize"]({"input": codes, "scale": np.float32(scale)})
    torch.testing.assert_close(back, codes * scale)


def test_resize_constexpr_and_reductions_are_torchs() -> None:
    x = torch.randn(1, 2, 5, 4, generator=torch.Generator().manual_seed(0))
    size = {"target_size_height": 12, "target_size_width": 7}
    found = OPERATORS["resize_bilinear"]({"x": x, "sampling_mode": "UNALIGN_CORNERS", **size})
    rows = ((np.arange(12) + 0.5) * 5 / 12 - 0.5).clip(0, 4)  # the formula of Core ML's own reference
    low = np.floor(rows).astype(int)
    share = torch.from_numpy(rows - low).float()[:, None]
    high = np.minimum(low + 1, 4)
    column = x[0, 0, low] * (1 - share) + x[0, 0, high] * share
    one = OPERATORS["resize_bilinear"]({"x": x, "sampling_mode": "UNALIGN_CORNERS", **size, "target_size_width": 4})
    torch.testing.assert_close(one[0, 0], column)
    assert found.shape == (1, 2, 12, 7)
    with pytest.raises(UnsupportedError):
        OPERATORS["resize_bilinear"]({"x": x, "sampling_mode": "ALIGN_CORNERS", **size})
    torch.testing.assert_close(OPERATORS["reduce_mean"]({"x": x, "axes": [1]}), x.mean(1))
    torch.testing.assert_close(OPERATORS["reduce_max"]({"x": x, "axes": [1, 2]}), x.amax((1, 2)))
    codes, scales = np.arange(-3, 3, dtype=np.int8).reshape(2, 3), np.array([0.5, 2.0], np.float16)
    weight = OPERATORS["constexpr_affine_dequantize"](
        {"quantized_data": codes, "zero_point": np.int8(0), "scale": scales, "axis": 0}
    )
    torch.testing.assert_close(weight, torch.from_numpy(codes.astype(np.float32) * scales.astype(np.float32)[:, None]))


# sizes are measured before Core ML sees a byte


def _edited(files: Files, change: Callable[[Any], object]) -> Files:
    model = model_of(files)
    change(operations(model))
    return {**files, "model.mlmodel": model.SerializeToString()}


def _declare(op: Any, place: int, size: int) -> None:
    op.outputs[0].type.tensorType.dimensions[place].constant.size = size


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("linear", lambda op: _declare(op, -1, 8)),
        ("softmax", lambda op: _declare(op, -1, 1)),
        ("gelu", lambda op: _declare(op, -1, 1)),
        ("layer_norm", lambda op: _declare(op, -1, 4)),
        ("reshape", lambda op: _declare(op, 0, 2)),
        ("const", lambda op: _declare(op, 0, 1 << 20)),
    ],
    ids=["linear", "softmax", "gelu", "layer_norm", "reshape", "const"],
)
def test_a_size_that_is_declared_smaller_or_larger_than_it_is_made_is_refused(
    built: Callable[[str], Files], graph: ExportGraph, kind: str, change: Callable[[Any], object]
) -> None:
    files = built("fp16")
    mil.check(files, graph.spec)

    def edit(ops: Any) -> None:
        change(next(op for op in ops if op.type == kind and len(op.outputs[0].type.tensorType.dimensions) > 0))

    with pytest.raises(EngineError, match=f"operation {kind}|constant {kind}|declares"):
        mil.check(_edited(files, edit), graph.spec)


def test_a_weight_that_claims_more_than_the_file_holds_is_refused(
    built: Callable[[str], Files], graph: ExportGraph
) -> None:
    files = built("fp16")
    cut = {**files, "weight.bin": files["weight.bin"][: len(files["weight.bin"]) // 2]}
    with pytest.raises(EngineError, match="outside its own weights"):
        mil.check(cut, graph.spec)

    def grow(ops: Any) -> None:
        op = next(op for op in ops if op.type == "const" and op.attributes["val"].HasField("blobFileValue"))
        for kind in (op.outputs[0].type, op.attributes["val"].type):
            kind.tensorType.dimensions[0].constant.size *= 2

    with pytest.raises(EngineError, match="another size than its weights have"):
        mil.check(_edited(files, grow), graph.spec)


def test_what_multiplies_without_end_is_refused_by_what_it_makes(
    built: Callable[[str], Files], graph: ExportGraph
) -> None:
    """A chain of concatenations that doubles, declared as if it did not."""

    def double(ops: Any) -> None:
        model_ops = list(ops)
        softmax = next(op for op in model_ops if op.type == "softmax")
        name = softmax.outputs[0].name
        axis = next(op for op in model_ops if op.type == "concat").inputs["axis"]
        at = model_ops.index(softmax) + 1
        added = []
        for number in range(40):
            op = type(softmax)()
            op.CopyFrom(softmax)
            op.type = "concat"
            for key in list(op.inputs):
                del op.inputs[key]
            for _ in range(2):
                op.inputs["values"].arguments.add().name = name
            op.inputs["axis"].CopyFrom(axis)
            name = f"doubled_{number}"
            op.outputs[0].name = name
            added.append(op)
        del ops[:]
        ops.extend([*model_ops[:at], *added, *model_ops[at:]])

    with pytest.raises(EngineError, match="concat"):
        mil.check(_edited(built("fp16"), double), graph.spec)


def test_a_gather_takes_stored_rows_that_are_there(tmp_path: Path) -> None:
    module, spec = make_student("classify")
    spec = replace(spec, sector=TokenSector(name="fan", kept=("11111", "11111", "11011", "11111", "11111")))
    graph = build_graph(module, spec, pruned=True)
    artefact = Target().build(graph, decide(graph, "fp32"), tmp_path)
    files = {path.name: path.read_bytes() for path in artefact.files}
    mil.check(files, spec)
    kept = next(op for op in operations(model_of(files)) if op.type == "gather").outputs[0].name
    for places in ([25, *range(23)], [-26, *range(23)]):
        with pytest.raises(EngineError, match="gather"):
            mil.check(with_input(files, kept, "indices", places), spec)
    with pytest.raises(EngineError, match="gather"):
        mil.check(with_input(files, kept, "axis", 2), spec)


def test_a_segmentation_net_passes_the_check(tmp_path: Path) -> None:
    graph = small_graph("segment")
    artefact = Target().build(graph, decide(graph, "fp16"), tmp_path)
    files = {path.name: path.read_bytes() for path in artefact.files}
    mil.check(files, graph.spec)
    kinds = {op.type for op in operations(model_of(files))}
    assert {"conv", "resize_bilinear", "concat"} & kinds, "it has operations that the classifier lacks"
