"""``tinyusfm-edge qat``: what it says and writes, early exits included, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.tables import change_rows
from tinyusfm_edge.cli.main import main
from tinyusfm_runtime.bundle.reader import Bundle

torch = pytest.importorskip("torch", reason="install tinyusfm-edge[export]")

SHORT = ["--steps", "4", "--batch", "2"]


@pytest.fixture(scope="module")
def labelled(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The phantoms with the classes a and b in turn."""
    folder = tmp_path_factory.mktemp("labelled") / "phantoms"
    shutil.copytree(data, folder)
    return change_rows(folder, lambda number, row: {"label": "ab"[number % 2]})


def test_what_it_says_and_writes(
    exits: Path, labelled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "taught.safetensors"
    command = ["qat", str(exits), "--data", str(labelled), "--out", str(out), "--weight-bits", "4"]
    assert main([*command, *SHORT]) == 0
    shown = capsys.readouterr().out
    ptq, qat = (float(line.split()[1]) for line in shown.splitlines() if line.startswith(("PTQ", "QAT")))
    recovered = [line.split()[1] for line in shown.splitlines() if line.startswith("recovered")]
    if qat < ptq:
        assert float(recovered[0].rstrip("%")) / 100 == pytest.approx((ptq - qat) / ptq, abs=0.02), (
            "how much: tests/export/test_qat.py"
        )
    else:
        assert not recovered and "worse than PTQ" in shown, "a loss is not called a recovery"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["taught.ranges.json", "taught.safetensors"]
    ranges = json.loads((tmp_path / "taught.ranges.json").read_text(encoding="utf-8"))
    assert ranges["method"].endswith("learned")
    bundle = tmp_path / "taught.bundle"
    export = ["export", str(out), "--target", "onnx", "--int8", "--data", str(labelled), "--out", str(bundle)]
    assert main(export) == 0
    assert "int8" in {artefact.precision for artefact in Bundle.open(bundle).manifest.artefacts}


def test_early_exits_learn_with_the_end_and_stop_by_new_thresholds(
    exits: Path, labelled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tinyusfm_edge.data.table import read_table
    from tinyusfm_edge.evaluation.exits import choose_exits
    from tinyusfm_edge.models.checkpoint import load_student_file

    out = tmp_path / "taught.safetensors"
    assert main(["qat", str(exits), "--data", str(labelled), "--out", str(out), *SHORT, "--learning-rate", "1e-3"]) == 0
    assert "accuracy with early exits" in capsys.readouterr().out
    before, after = load_student_file(exits), load_student_file(out)
    name = "exits.1.head.weight"
    assert not torch.equal(before.module.state_dict()[name], after.module.state_dict()[name]), "the exit learned too"
    chosen, _ = choose_exits(after.module, after.spec, read_table(labelled, "val", need="label"))  # type: ignore[arg-type]
    assert after.spec.exits == chosen and before.spec.exits != chosen


def test_early_exits_without_labels_are_refused_before_any_work(
    exits: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = tmp_path / "plain"
    shutil.copytree(data, plain, ignore=shutil.ignore_patterns("split.csv"))
    for folder, words in ((plain, "need labelled validation frames"), (data, "'head' is not among the model's")):
        out = tmp_path / "no.safetensors"
        assert main(["qat", str(exits), "--data", str(folder), "--out", str(out), *SHORT]) == 2
        shown = capsys.readouterr().err
        assert words in shown and "Traceback" not in shown and not out.exists()
    assert not list(tmp_path.glob(".*checkpoint"))


def test_what_is_worse_is_called_worse_and_may_end_with_1(
    exits: Path, labelled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "spoiled.safetensors"
    command = ["qat", str(exits), "--data", str(labelled), "--out", str(out), *SHORT, "--learning-rate", "0.5"]
    assert main([*command, "--require-better", "--json", "-"]) == 1
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert found["costs"]["QAT"]["cost"] > found["costs"]["PTQ"]["cost"] and found["recovered"] < 0
    assert "QAT is worse than PTQ here" in printed.err and "recovered " not in printed.err
    assert out.is_file(), "what was made is kept"
