"""A student file with early exits through the commands: export, verify, run and profile, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tinyusfm_edge.cli.main import main
from tinyusfm_runtime import plugins
from tinyusfm_runtime.bundle.reader import Bundle


@pytest.fixture(scope="module")
def bundle(exits: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The student exported as a chain."""
    if not plugins.available("targets", "onnx").usable:
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
    exits = [line["exit_index"] for line in told if line["kind"] == "result"]
    assert len(exits) == 6 and set(exits) <= {0, 1}
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
    if not plugins.available("targets", "coreml").usable:
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
