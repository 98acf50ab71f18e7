"""``export --target coreml`` and recipe ``handheld_ios`` where Core ML cannot run: what is written, said, refused."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.needs import needs
from tinyusfm_edge.cli.main import main
from tinyusfm_export import pipeline
from tinyusfm_export.verify.golden import golden_frames
from tinyusfm_runtime.bundle.reader import ArtefactState, Bundle

needs("coremltools", reason="coremltools is not installed: pip install 'tinyusfm-edge[coreml]'")
pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(sys.platform == "darwin", reason="this is a Mac, where Core ML itself judges"),
]


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four golden frames instead of 32."""
    monkeypatch.setattr(pipeline, "golden_frames", lambda: golden_frames(range(4)))


def test_the_recipe_for_ios_runs_end_to_end(
    student: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, gate = tmp_path / "ios.bundle", tmp_path / "gate.json"
    gate.write_text('{"dice_mean": 0.95, "dice_worst": 0.9, "hc_p95_mm": 30.0}', encoding="ascii")
    line = ["export", str(student), "--recipe", "handheld_ios", "--data", str(data), "--gate", str(gate)]
    assert main([*line, "--out", str(out)]) == 0
    said = capsys.readouterr()
    shown = " ".join((said.out + said.err).split())
    assert "NOT measured" in shown and "on a Mac" in shown and "Core ML execution: not run by us" in shown
    (artefact,) = Bundle.open(out).manifest.artefacts
    assert artefact.name == "coreml-fp16" and artefact.state is ArtefactState.UNVERIFIED and artefact.gated
    assert artefact.gate is not None and artefact.gate["passed"] and "interpreted" in artefact.gate["engine"]
    assert (out / "artefacts" / "coreml-fp16" / "model.mlpackage" / "Manifest.json").is_file()
    assert main(["verify", str(out)]) == 3
    assert "macOS only" in capsys.readouterr().err


@pytest.mark.parametrize("precision", ["--int8", "--w6", "--w4"])
def test_what_must_be_verified_is_refused_before_anything_slow(
    precision: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "ios.bundle"
    assert main(["export", "--target", "coreml", precision, "--require-verified", "--out", str(out)]) == 3
    assert "--require-verified" in capsys.readouterr().err and not out.exists()
