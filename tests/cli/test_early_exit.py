"""A student file with early exits through the commands: export, verify, run and profile, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.cli.conftest import SPLITS
from tinyusfm_edge.cli.main import main
from tinyusfm_runtime import plugins
from tinyusfm_runtime.bundle import Bundle


@pytest.fixture(scope="module")
def exits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small classifier that stops at block 1 for about half of the phantoms."""
    torch = pytest.importorskip("torch", reason="install tinyusfm-edge[export]")
    from tinyusfm_edge.models.checkpoint import save_student
    from tinyusfm_edge.models.early_exit import all_exits
    from tinyusfm_edge.models.student import ClassificationStudent, StudentConfig, build_student
    from tinyusfm_export.reference import normalise
    from tinyusfm_runtime.early_exit import normalised_entropy
    from tinyusfm_runtime.phantom import make_phantom
    from tinyusfm_runtime.preprocess import preprocess
    from tinyusfm_runtime.spec import ExitPolicy, ModelSpec, PreprocessSpec, Task

    torch.manual_seed(7)
    config = StudentConfig(
        task="classify", num_classes=2, image_size=32, width=24, heads=3, depth=3, exits=(1,), drop_path=0.0
    )
    module = build_student(config).eval()
    assert isinstance(module, ClassificationStudent)
    for head in (module.exits["1"].head, module.head):  # type: ignore[union-attr]
        head.weight.data.normal_(0.0, 1.0)
    spec = ModelSpec(
        name="stops", task=Task.CLASSIFY, labels=("a", "b"), preprocess=PreprocessSpec(height=32, width=32),
        architecture=config.to_json(),
    )  # fmt: skip
    found = []
    for seed in SPLITS["val"]:
        codes = preprocess(make_phantom(seed, height=96, width=128).frame, spec.preprocess)[0]
        logits = all_exits(module, normalise(torch.from_numpy(codes).float(), spec))
        found.append(normalised_entropy(logits[0, 0].double().softmax(-1).numpy()))
    inner = np.sort(found)[len(found) // 4 : -len(found) // 4]
    widest = int(np.argmax(np.diff(inner)))
    threshold = float(inner[widest : widest + 2].mean())
    path = tmp_path_factory.mktemp("student") / "stops.safetensors"
    spec = ModelSpec.from_json({**spec.to_json(), "exits": {"blocks": [1], "entropy": [threshold], "patience": 0}})
    assert spec.exits == ExitPolicy(blocks=(1,), entropy=(threshold,))
    save_student(path, module, spec, torch.float32)
    return path


@pytest.fixture(scope="module")
def bundle(exits: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The student exported as a chain."""
    if not plugins.probe("targets", "onnx").works:
        pytest.skip("install tinyusfm-edge[export,onnxruntime]")
    out = tmp_path_factory.mktemp("bundles") / "stops.bundle"
    assert main(["export", str(exits), "--target", "onnx", "--fp32", "--data", str(data), "--out", str(out)]) == 0
    return out


def test_verify_judges_the_chain(bundle: Path, exits: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(bundle), "--student", str(exits), "--data", str(data)]) == 0
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("same_exit", "exit_rule", "full_top1", "live PyTorch reference"))
    assert main(["verify", str(bundle)]) == 0, "and without the student"


def test_run_tells_which_exit_answered(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = tmp_path / "out.jsonl"
    assert main(["run", str(bundle), "phantom:320-340", "--jsonl", str(lines)]) == 0
    indices = [json.loads(line)["exit_index"] for line in lines.read_text().splitlines()]
    assert set(indices) == {0, 1}
    assert f"block 1 {indices.count(0)}, end {indices.count(1)}" in capsys.readouterr().out
    assert main(["run", str(bundle), "phantom:320-340", "--full-depth"]) == 0
    assert "block 1 0, end 21" in capsys.readouterr().out
    live = tmp_path / "live.jsonl"
    assert main(["run", str(bundle), "phantom:320-340", "--sink", f"jsonl:{live}", "--full-depth"]) == 0
    told = [json.loads(line) for line in live.read_text().splitlines()]
    assert {line["exit_index"] for line in told if line["kind"] == "result"} == {1}


def test_an_isolated_engine_tells_it_too(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    live = tmp_path / "live.jsonl"
    command = ["run", str(bundle), "phantom:320-325", "--isolate"]
    assert main([*command, "--sink", f"jsonl:{live}"]) == 0
    told = [json.loads(line) for line in live.read_text().splitlines()]
    assert all(line["exit_index"] in (0, 1) for line in told if line["kind"] == "result")
    capsys.readouterr()
    assert main([*command, "--full-depth"]) == 2
    assert "leave --fallback and --isolate out" in capsys.readouterr().err


def test_profile_counts_the_exits(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["profile", str(bundle), "--source", "phantom:320-327", "--rounds", "2", "--json", "-"]
    assert main([*command, "--no-cold"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert sum(found["exits"]) == found["n"] == 16 and len(found["exits"]) == 2
    assert main([*command, "--full-depth"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["exits"] == [0, 16] and found["cold"] is not None
    assert main(["profile", str(bundle), "--rounds", "1", "--no-cold"]) == 0
    assert "answered at block 1" in capsys.readouterr().out


def test_a_target_without_chains_and_the_way_out(
    exits: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if not plugins.probe("targets", "coreml").works:
        pytest.skip("install tinyusfm-edge[coreml]")
    command = ["export", str(exits), "--target", "coreml", "--fp16", "--data", str(data), "--out", str(tmp_path)]
    assert main(command) == 3
    shown = capsys.readouterr().err
    assert "--full-depth" in shown and "Traceback" not in shown
    assert not list(tmp_path.iterdir())


def test_full_depth_export_has_no_exits(exits: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "whole.bundle"
    command = ["export", str(exits), "--target", "onnx", "--fp32", "--data", str(data), "--out", str(out)]
    assert main([*command, "--full-depth"]) == 0
    assert Bundle.open(out).manifest.spec.exits is None
