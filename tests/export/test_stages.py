"""An early-exit student as a chain: equal answers, work really saved, and chains that are wrong miss the gate."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.export.students import make_student, observed, phantom_inputs
from tinyusfm_calibration.sets import phantom_frames
from tinyusfm_edge.models.early_exit import all_exits
from tinyusfm_edge.models.student import ClassificationStudent
from tinyusfm_export.graph.build import build_graph, exit_logits
from tinyusfm_export.graph.stages import split_graph, stage_products
from tinyusfm_export.pipeline import ExportOptions, export_bundle
from tinyusfm_export.quantize.drift_outputs import sampler
from tinyusfm_export.quantize.ptq import PtqPolicy, decide
from tinyusfm_export.verify.artefact import stage_decision
from tinyusfm_export.verify.bundle import verify_bundle
from tinyusfm_export.verify.gate import Gate
from tinyusfm_export.verify.gate_frames import GateFrames
from tinyusfm_export.verify.reference import normalise, reference_mode, reference_outputs
from tinyusfm_runtime import plugins
from tinyusfm_runtime.bundle.manifest import file_entry
from tinyusfm_runtime.bundle.reader import Bundle
from tinyusfm_runtime.early_exit import TOKENS_IN, TOKENS_OUT, ChainEngine, normalised_entropy, stage_file
from tinyusfm_runtime.errors import EngineError, GateError, InputError, TamperedError, UnsupportedError
from tinyusfm_runtime.numerics.order import wide
from tinyusfm_runtime.numerics.postprocess import probabilities
from tinyusfm_runtime.session import Session
from tinyusfm_runtime.spec import ExitPolicy, ModelSpec

BLOCKS = (2, 3)
LABELS = ("a", "b", "c")
NEEDED = [name for name in ("onnx", "openvino") if plugins.available("targets", name).usable]
LOOSE = Gate(top1=0.9, same_exit=0.9, drift_mean=0.1, probability_drift=0.5)
"""For INT8 of a student that was never trained; the controls below must miss even this."""


@lru_cache(maxsize=1)
def judged_frames() -> GateFrames:
    """40 phantoms to judge on."""
    return GateFrames(kind="data", frames=tuple(phantom_frames(range(200, 240))), source="phantoms")


def between(entropies: np.ndarray) -> float:
    """The middle of the widest gap among the inner values, so that rounding moves no frame across."""
    inner = np.sort(wide(entropies))[len(entropies) // 4 : -len(entropies) // 4]
    widest = int(np.argmax(np.diff(inner)))
    return float(inner[widest : widest + 2].mean())


@pytest.fixture(scope="module")
def student() -> tuple[nn.Module, ModelSpec]:
    """A small random student that is sure of some frames, and thresholds that make it use all its exits."""
    module, spec = make_student("classify", depth=4, exits=BLOCKS, num_classes=3, image_size=48)
    made: Any = module
    for head in (made.exits["2"].head, made.exits["3"].head, made.head):
        head.weight.data *= 6.0
    never = replace(spec, labels=LABELS, exits=ExitPolicy(blocks=BLOCKS, entropy=(0.0, 0.0)))
    outputs = reference_outputs(module, never, [named.frame for named in judged_frames().frames])
    found = np.array([[normalised_entropy(probabilities(row)) for row in output.logits[0]] for output in outputs])
    first = between(found[:, 0])
    second = between(found[found[:, 0] > first, 1])
    return module, replace(never, exits=ExitPolicy(blocks=BLOCKS, entropy=(first, second)))


@pytest.fixture(scope="module")
def bundle(student: tuple[nn.Module, ModelSpec], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """fp32 and int8 chains for every target that works here."""
    if not NEEDED:
        pytest.skip("no target works here: pip install 'tinyusfm-edge[export,onnxruntime]'")
    module, spec = student
    return export_bundle(
        module,
        spec,
        targets=NEEDED,
        precisions=["fp32", "int8"],
        out=tmp_path_factory.mktemp("chain") / "chain.bundle",
        gate_frames=judged_frames(),
        gate=LOOSE,
        calibration=phantom_frames(range(1000, 1032)),
        advanced=ExportOptions(rounds=1, runs=1, compare=False),
    ).path


def artefacts(path: Path) -> list[tuple[str, str]]:
    return [(artefact.target, artefact.precision) for artefact in Bundle.open(path).manifest.artefacts]


# ---- the graph


def test_the_whole_graph_and_its_stages_answer_as_the_student(student: tuple[nn.Module, ModelSpec]) -> None:
    module, spec = student
    assert isinstance(module, ClassificationStudent)
    graph = build_graph(module, spec, auxiliary=("tokens_block1", "peak_block0"))
    assert graph.outputs == ("logits", "tokens_block1", "peak_block0", exit_logits(2), exit_logits(3))
    stages = split_graph(graph)
    assert [stage.outputs for stage in stages] == [
        ("logits", TOKENS_OUT, "tokens_block1", "peak_block0"),
        ("logits", TOKENS_OUT),
        ("logits",),
    ]
    assert [stage.input.name for stage in stages] == ["image", TOKENS_IN, TOKENS_IN]
    for tensor in phantom_inputs(spec, 3):
        codes: Any = torch.from_numpy(tensor)
        whole = dict(zip(graph.outputs, graph.module(codes), strict=True))
        tokens, found = codes, []
        for stage in stages:
            outputs = dict(zip(stage.outputs, stage.module(tokens), strict=True))
            tokens = outputs.get(TOKENS_OUT)
            found.append(outputs["logits"])
        torch.testing.assert_close(torch.stack(found), torch.stack([whole[n] for n in (*graph.outputs[3:], "logits")]))
        with reference_mode(module):
            wanted = all_exits(module, normalise(codes.float(), spec.preprocess))
        torch.testing.assert_close(torch.stack(found), wanted, rtol=1e-3, atol=1e-3)


def test_every_layer_stands_in_exactly_one_stage(student: tuple[nn.Module, ModelSpec]) -> None:
    graph = build_graph(*student)
    stages = split_graph(graph)
    held = [set(stage.linear_inputs) for stage in stages]
    assert set.union(*held) == set(graph.linear_inputs) and sum(map(len, held)) == len(graph.linear_inputs)
    names = [{name for name, _ in stage.module.named_parameters()} for stage in stages]
    assert sum(map(len, names)) == len(set.union(*names)) == len(dict(graph.module.named_parameters()))


def test_a_stage_gets_its_part_of_the_decision(student: tuple[nn.Module, ModelSpec]) -> None:
    graph = build_graph(*student)
    decision = decide(
        graph, "int8", observed(graph), policy=PtqPolicy(keep_float=("blocks.2.*",), rest_precision="f32")
    )
    parts = [stage_decision(stage, decision) for stage in split_graph(graph)]
    assert [part.precision for part in parts] == ["int8", "fp32", "int8"], "block 3 alone is the second stage"
    together = {name: quant for part in parts for name, quant in part.quantized().items()}
    assert together == decision.quantized()


def test_products_by_hand(student: tuple[nn.Module, ModelSpec]) -> None:
    """One block of N tokens, width D: 12 N D^2 for its linears and 2 N^2 D for attention."""
    tokens, width = 1 + 9, 48
    block = 12 * tokens * width**2 + 2 * tokens**2 * width
    first, second, third = stage_products(build_graph(*student))
    head = width * len(LABELS)
    assert first == 9 * 256 * width + 2 * block + head
    assert second == block + head
    # the last block computes keys and values for all tokens, the rest without the class token, fc2 of the mean alone
    patches = tokens - 1
    last = (3 * tokens + patches + 4 * patches + 4) * width**2 + 2 * patches * tokens * width
    assert third == last + head


def test_exits_that_the_student_lacks(student: tuple[nn.Module, ModelSpec]) -> None:
    module, spec = student
    for blocks in ((1, 3), (2, 4)):
        wrong = replace(spec, exits=ExitPolicy(blocks=blocks, entropy=(0.1, 0.1)))
        with pytest.raises(InputError, match="exits|not a student"):
            build_graph(module, wrong)
    with pytest.raises(InputError, match="no early exits"):
        split_graph(build_graph(module, replace(spec, exits=None)))


def test_drift_listens_before_the_first_exit_only(student: tuple[nn.Module, ModelSpec]) -> None:
    module, spec = student
    sample = sampler(module, spec)(phantom_frames([1])[0])
    assert sample.tokens_T.size == 48, "the first block alone: the default ones lie behind the exit"
    with pytest.raises(InputError, match="behind the first early exit"):
        build_graph(module, spec, auxiliary=("tokens_block2",))


# ---- the bundle


def test_the_chain_answers_as_the_reference_with_the_same_rule(
    bundle: Path, student: tuple[nn.Module, ModelSpec]
) -> None:
    module, spec = student
    frames = [named.frame for named in judged_frames().frames]
    wanted = reference_outputs(module, spec, frames)
    assert {output.exit_index for output in wanted} == {0, 1, 2}, "every exit is used"
    for target, precision in artefacts(bundle):
        with Session.open(bundle, target=target, precision=precision, threads=1) as session:
            assert "chain of 3 stages" in session.description
            found = [session.predict(frame) for frame in frames]
        if precision == "fp32":
            assert [p.exit_index for p in found] == [output.exit_index for output in wanted]
            for got, want in zip(found, wanted, strict=True):
                np.testing.assert_allclose(got.scores, want.answer.scores, atol=1e-3)
        else:
            same = [p.exit_index == output.exit_index for p, output in zip(found, wanted, strict=True)]
            assert np.mean(same) >= LOOSE.same_exit


def test_full_depth_gives_the_student_without_exits(bundle: Path, student: tuple[nn.Module, ModelSpec]) -> None:
    module, spec = student
    frames = [named.frame for named in judged_frames().frames[:8]]
    wanted = reference_outputs(module, replace(spec, exits=None), frames)
    target, precision = artefacts(bundle)[0]
    with Session.open(bundle, target=target, precision=precision, threads=1, full_depth=True) as session:
        assert session.full_depth and "run to its end" in session.description
        for frame, want in zip(frames, wanted, strict=True):
            found = session.predict(frame)
            assert found.exit_index == 2
            np.testing.assert_allclose(found.scores, want.answer.scores, atol=1e-3)


def test_saved_work_is_counted(bundle: Path, student: tuple[nn.Module, ModelSpec]) -> None:
    """A stage runs once for each frame that no exit before it answered, and for no other."""
    module, spec = student
    frames = [named.frame for named in judged_frames().frames]
    wanted = reference_outputs(module, spec, frames)
    reached = [sum(output.exit_index >= stage for output in wanted) for stage in range(3)]  # type: ignore[operator]
    products = stage_products(build_graph(module, spec))
    done: dict[bool, int] = {}
    for full_depth in (False, True):
        with Session.open(bundle, precision="fp32", threads=1, full_depth=full_depth) as session:
            engine = session._engine
            assert isinstance(engine, ChainEngine)
            before = list(engine.runs)
            for frame in frames:
                session.predict(frame)
            runs = [after - earlier for after, earlier in zip(engine.runs, before, strict=True)]
        assert runs == ([len(frames)] * 3 if full_depth else reached)
        done[full_depth] = sum(count * size for count, size in zip(runs, products, strict=True))
    assert done[True] == len(frames) * sum(products)
    skipped = sum((len(frames) - count) * size for count, size in zip(reached, products, strict=True))
    assert done[True] - done[False] == skipped > 0.1 * done[True]


def test_the_gate_judges_answers_exits_and_full_depth(bundle: Path, student: tuple[nn.Module, ModelSpec]) -> None:
    module, spec = student
    opened = Bundle.open(bundle)
    for artefact in opened.manifest.artefacts:
        assert len(artefact.files) == 3 * (2 if artefact.target == "openvino" else 1)
        assert {"same_exit", "full_top1", "full_drift_worst", "exit_rule"} <= set((artefact.gate or {})["statistics"])
    for report in (
        verify_bundle(opened, gate=LOOSE),
        verify_bundle(opened, gate=LOOSE, module=module, exits=spec.exits, frames=judged_frames()),
    ):
        assert report, report.failures
        assert {"exit_rule", "same_exit", "full_top1", "full_drift"} <= {row[1] for row in report.table()}
        assert not any("other limits" in note for check in report.checks for note in check.notes)


# ---- controls: what must not pass


def test_one_changed_byte_in_one_stage_is_refused(bundle: Path, tmp_path: Path) -> None:
    import shutil

    stages = sorted(bundle.glob("artefacts/*/stage*"))
    assert len(stages) >= 2
    for path in stages:
        copy = tmp_path / path.name / path.parent.name
        shutil.copytree(bundle, copy)
        damaged = copy / path.relative_to(bundle)
        content = bytearray(damaged.read_bytes())
        content[len(content) // 2] ^= 1
        damaged.write_bytes(bytes(content))
        with pytest.raises(TamperedError, match=path.name.replace(".", r"\.")):
            Session.open(copy)


def forged(bundle: Path, content: dict[str, bytes], **changes: Any) -> Bundle:
    """A bundle with other bytes whose manifest was made to fit, as somebody with write access could."""
    opened = Bundle.open(bundle)
    files = {path: content.get(path, opened.read(path)) for path in opened.manifest.files}
    kept = [
        replace(artefact, files={path: file_entry(files[path]) for path in artefact.files})
        for artefact in opened.manifest.artefacts
    ]
    listed = {path: file_entry(raw) for path, raw in files.items()}
    manifest = replace(opened.manifest, artefacts=tuple(kept), files=listed, **changes).sealed()
    return Bundle(opened.path, manifest, files)


@pytest.mark.parametrize("target", NEEDED)
def test_changed_thresholds_miss_the_gate(bundle: Path, student: tuple[nn.Module, ModelSpec], target: str) -> None:
    module, spec = student
    assert spec.exits is not None
    loose = replace(spec, exits=replace(spec.exits, entropy=(1.0, 1.0)))
    other = forged(bundle, {}, spec=loose)
    for report in (
        verify_bundle(other, gate=LOOSE, target=target, precision="fp32"),
        verify_bundle(
            other, gate=LOOSE, target=target, precision="fp32", module=module, exits=spec.exits, frames=judged_frames()
        ),
    ):
        assert not report
        assert any("rule" in line for line in report.failures)
    assert any("reference's exit" in line for line in report.failures), "and by what it does"
    hardly = replace(spec, exits=replace(spec.exits, entropy=(spec.exits.entropy[0] + 1e-9, spec.exits.entropy[1])))
    report = verify_bundle(forged(bundle, {}, spec=hardly), gate=LOOSE, target=target, precision="fp32")
    assert [line for line in report.failures if "rule" in line], "also where no frame shows it"


def test_swapped_stages_are_refused(bundle: Path, student: tuple[nn.Module, ModelSpec]) -> None:
    """First and second take other shapes; two middle ones of a student with three exits differ in answers alone."""
    opened = Bundle.open(bundle)
    one, two = (f"artefacts/onnx-fp32/{stage_file(stage, 'model.onnx')}" for stage in (1, 2))
    other = forged(bundle, {one: opened.read(two), two: opened.read(one)})
    with pytest.raises(EngineError, match="inputs"):
        Session.open(other, target="onnx", precision="fp32")


def test_two_alike_stages_exchanged_miss_the_gate(tmp_path: Path) -> None:
    module, spec = make_student("classify", depth=4, exits=(1, 2, 3), num_classes=3, image_size=48)
    made: Any = module
    for head in (*(exit_.head for exit_ in made.exits.values()), made.head):
        head.weight.data *= 6.0
    spec = replace(spec, labels=LABELS, exits=ExitPolicy(blocks=(1, 2, 3), entropy=(0.3, 0.3, 0.3)))
    path = export_bundle(
        module, spec, targets=["onnx"], precisions=["fp32"], out=tmp_path / "x.bundle", gate_frames=judged_frames(),
        advanced=ExportOptions(rounds=1, runs=1),
    ).path  # fmt: skip
    opened = Bundle.open(path)
    two, three = (f"artefacts/onnx-fp32/{stage_file(stage, 'model.onnx')}" for stage in (2, 3))
    other = forged(path, {two: opened.read(three), three: opened.read(two)})
    for report in (verify_bundle(other), verify_bundle(other, module=module, exits=spec.exits, frames=judged_frames())):
        assert not report
        assert any("drift" in line for line in report.failures)
    with pytest.raises(EngineError, match="does not answer as the artefact should"):
        Session.open(other)


def test_a_student_whose_stages_answer_otherwise_is_not_published(
    student: tuple[nn.Module, ModelSpec], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gate at export sees a chain whose first exit asks another head."""
    from tinyusfm_export.verify import artefact

    cut = artefact.split_graph

    def crossed(graph: Any) -> list[Any]:
        made: Any = cut(graph)[0].module.get_submodule("exits.2.head")
        made.weight.data = -made.weight.data
        return cut(graph)

    monkeypatch.setattr(artefact, "split_graph", crossed)
    with pytest.raises(GateError, match="onnx-fp32"):
        export_bundle(
            *student, targets=["onnx"], precisions=["fp32"], out=tmp_path / "x.bundle", gate_frames=judged_frames(),
            gate=LOOSE, advanced=ExportOptions(rounds=1, runs=1),
        )  # fmt: skip
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("target", ["coreml", "tensorrt"])
def test_targets_without_chains_say_what_to_do(
    student: tuple[nn.Module, ModelSpec], tmp_path: Path, target: str
) -> None:
    if not (answer := plugins.available("targets", target)).usable:
        pytest.skip(answer.reason)
    with pytest.raises(UnsupportedError, match="--full-depth") as caught:
        export_bundle(
            *student, targets=[target], precisions=["fp16"], out=tmp_path / "x.bundle", gate_frames=judged_frames()
        )
    assert "openvino or litert" in str(caught.value) and "\n" not in str(caught.value)


def test_full_depth_export_is_one_graph(student: tuple[nn.Module, ModelSpec], tmp_path: Path) -> None:
    path = export_bundle(
        *student, targets=["onnx"], precisions=["fp32"], out=tmp_path / "x.bundle", gate_frames=judged_frames(),
        advanced=ExportOptions(rounds=1, runs=1, full_depth=True),
    ).path  # fmt: skip
    with Session.open(path, threads=1) as session:
        assert session.spec.exits is None
        assert session.predict(judged_frames().frames[0].frame).exit_index is None
