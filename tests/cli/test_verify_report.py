"""``verify --report``: truth, margins, worst frames, first tensor that drifts, repeats; with broken controls."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from tests.cli.test_trace import rebuilt
from tests.conftest import tiny_logits
from tests.evaluation.labelled import write_labelled
from tinyusfm_edge.cli.main import main
from tinyusfm_export.verify.determinism import repeat
from tinyusfm_export.verify.first_drift import find_first_drift
from tinyusfm_runtime.bundle.reader import Bundle
from tinyusfm_runtime.numerics.preprocess import preprocess

onnx = pytest.importorskip("onnx", reason="install tinyusfm-edge[export]")
pytest.importorskip("torch", reason="install tinyusfm-edge[export]")
pytest.importorskip("onnxruntime", reason="install tinyusfm-edge[onnxruntime]")

MODEL = "artefacts/onnx-fp32/model.onnx"


@pytest.fixture(scope="module")
def world(student: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Labelled frames and a float bundle of the small student."""
    folder = tmp_path_factory.mktemp("verify")
    (folder / "data").mkdir()
    write_labelled(folder / "data", frames=12, split="val")
    words = ["export", str(student), "--target", "onnx", "--fp32", "--out", str(folder / "small.bundle")]
    assert main([*words, "--no-gate", "--no-compare", "--postprocess", "mask", "--data", str(folder / "data")]) == 0
    return folder


def scaled(bundle: Path, name: str, factor: float) -> bytes:
    """The bundle's model with one weight made larger."""
    model = onnx.load_from_string(Bundle.open(bundle).read(MODEL))
    for tensor in model.graph.initializer:
        if tensor.name == name:
            tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor) * np.float32(factor), name))
            return bytes(model.SerializeToString())
    raise AssertionError([tensor.name for tensor in model.graph.initializer])


def verify(world: Path, bundle: str, student: Path, *words: str) -> int:
    data = ["--data", str(world / "data"), "--student", str(student)]
    return main(["verify", str(world / bundle), *data, "--report", str(world / "v.html"), *words])


def test_a_true_artefact_holds_its_margins(world: Path, student: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # the JSON's own page would have the name of the report
    out = ["--json", str(world / "v.json"), "--margins", "dice=0.01,iou=0.02", "--clip", "phantom:0-5"]
    done = verify(world, "small.bundle", student, *out)
    said = capsys.readouterr()
    told = json.loads((world / "v.json").read_text())["beside_the_gate"]
    assert [test["passed"] for test in told["clinical"][0]["margins"]] == [True] * 6, said
    rows = {(row["metric"], row["stratum"]) for row in told["clinical"][0]["rows"]}
    assert {("dice", ""), ("dice", "A"), ("hd95_mm", "B"), ("ece", "")} <= rows
    assert told["first_drift"][0]["first"] == "" and len(told["first_drift"][0]["shares"]) > 100
    assert told["determinism"][0]["runs"] == told["determinism"][0]["loads"] == 0.0
    assert told["flicker"]["onnx-fp32"]["frames"] == 6
    page = (world / "v.html").read_text(encoding="utf-8")
    assert page.count("data:image/png") == 6 and "First tensor that drifts" in page
    assert done == 0 or "margin" not in said.err, "the gate may miss on a random student, the margins do not"


def test_changed_weights_are_caught_and_named(world: Path, student: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weight = "blocks.2.mlp.fc1.weight"
    rebuilt(world / "small.bundle", world / "bent.bundle", **{MODEL: scaled(world / "small.bundle", weight, 3.0)})
    assert verify(world, "bent.bundle", student, "--margins", "dice=0.001") == 1
    said = capsys.readouterr()
    assert "blocks.2.mlp.fc1 is the first tensor that drifts" in said.out
    assert "onnx-fp32: dice on all frames" in said.err


def test_margins_without_the_report_are_refused(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(world / "small.bundle"), "--margins", "dice=0.1"]) == 2
    assert "give --report" in capsys.readouterr().err
    assert main(["verify", str(world / "small.bundle"), "--margins", "beauty=1", "--report", "x.html"]) == 2


@pytest.mark.parametrize(("target", "library"), [("openvino", "openvino"), ("litert", "ai_edge_litert")])
def test_other_engines_are_bisected_as_well(world: Path, student: Path, target: str, library: str) -> None:
    pytest.importorskip(library, reason=f"install tinyusfm-edge[{target}]")
    from tinyusfm_edge.models.checkpoint import load_student_file
    from tinyusfm_export.graph.build import build_graph

    out = world / f"{target}.bundle"
    words = ["export", str(student), "--target", target, "--fp32", "--out", str(out), "--no-gate", "--no-compare"]
    assert main([*words, "--postprocess", "mask", "--data", str(world / "data")]) == 0
    bundle, loaded = Bundle.open(out), load_student_file(student)
    artefact = bundle.manifest.artefacts[0]
    graph = build_graph(loaded.module, bundle.manifest.spec)
    tensors = [preprocess(frame, graph.spec.preprocess)[0] for frame in bundle.golden_frames()[:1]]
    true = find_first_drift(bundle, artefact, graph, tensors, limit=0.001)
    assert true.first == "" and len(true.shares) > 100, true.sentence
    loaded.module.backbone.blocks[5].mlp.fc2.weight.data *= 2.0  # type: ignore[union-attr, index]
    graph = build_graph(loaded.module, bundle.manifest.spec)
    found = find_first_drift(bundle, artefact, graph, tensors, limit=0.05)
    assert found.first.startswith("blocks.5.mlp.fc2") and len(found.alone) < 4


def test_an_engine_that_wobbles_is_caught(fake_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = Bundle.open(fake_bundle)
    artefact = bundle.manifest.artefacts[0]
    tensors = [preprocess(frame, bundle.manifest.spec.preprocess)[0] for frame in bundle.golden_frames()[:2]]
    level = {"noise": 0.0, "threads": 0.0}
    noise = np.random.default_rng(0)

    class Wobbly:
        def __init__(self, threads: int) -> None:
            self.off = level["threads"] * (threads - 1)

        def run(self, tensor: np.ndarray) -> dict[str, np.ndarray]:
            logits = tiny_logits(tensor) + np.float32(self.off)
            return {"logits": logits + noise.normal(0, level["noise"], logits.shape).astype(np.float32)}

    @contextmanager
    def opened(*_: object, threads: int, **__: object) -> Iterator[Wobbly]:
        yield Wobbly(threads)

    monkeypatch.setattr("tinyusfm_export.verify.determinism.open_engine", opened)
    steady = repeat(bundle, artefact, tensors)
    assert {row[2] for row in steady.rows()} == {"same bits"}
    level["threads"] = 1e-3
    found = repeat(bundle, artefact, tensors)
    assert found.runs == found.loads == 0.0 and found.threads[4] > found.threads[2] > 0.0
    level["noise"] = 1e-3
    found = repeat(bundle, artefact, tensors)
    assert found.runs > 0.0 and "differs by" in found.rows()[0][2]
