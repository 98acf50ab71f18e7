"""``run`` with several bundles: the table tells of each, rules are checked first, names can be given."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conftest import NumpyEngine, gate_spec, make_parts
from tinyusfm_edge.cli.main import main


@pytest.fixture
def bundles(plug_in: type[NumpyEngine], tmp_path: Path) -> list[str]:
    gate = make_parts({"fake": {"model.onnx": b"gate"}}, gate_spec())
    mask = make_parts({"fake": {"model.onnx": b"mask"}})
    return [str(gate.publish(tmp_path / "gate.bundle")), str(mask.publish(tmp_path / "tiny.bundle"))]


def test_both_are_told_and_a_rule_leaves_one_out(
    bundles: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rules, out, summary = tmp_path / "rules.toml", tmp_path / "out.jsonl", tmp_path / "summary.json"
    rules.write_text('[tiny]\nafter = "gate"\nneeds_label = "no head"\n', encoding="utf-8")
    line = ["run", *bundles, "phantom:0-3", "--rules", str(rules), "--sink", f"jsonl:{out}", "--json", str(summary)]
    assert main(line) == 0
    said = capsys.readouterr().out
    assert "gate: fake-fp32" in said and "tiny: fake-fp32" in said and "0 frames asked, 4 left out by rule" in said
    told = [json.loads(text) for text in out.read_text().splitlines()]
    results = [one for one in told if one["kind"] == "result"]
    assert [one["model"] for one in results] == ["gate", "tiny"] * 4
    assert {one["skipped"] for one in results if one["model"] == "tiny"} == {"gate says head, not no head"}
    models = json.loads(summary.read_text())["models"]
    assert models["tiny"]["skipped"] == 4 and models["gate"]["asked"] == 4


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('[liver]\nafter = "gate"\n', "no model 'liver'"),
        ('[tiny]\nafter = "gate"\nneeds_label = "spine"\n', "no label 'spine'"),
        ('[tiny]\nafter = "gate"\nmin_confidence = 7\n', "from 0 to 1"),
        ('[tiny]\nwhen = "gate"\n', "no key 'when'"),
    ],
)
def test_bad_rules_are_one_line_before_an_engine_is_loaded(
    bundles: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, says: str
) -> None:
    rules = tmp_path / "rules.toml"
    rules.write_text(text, encoding="utf-8")
    NumpyEngine.made.clear()
    assert main(["run", *bundles, "phantom:0-3", "--rules", str(rules)]) == 2
    error = capsys.readouterr().err
    assert says in error and len(error.strip().splitlines()) == 1 and not NumpyEngine.made


def test_two_of_one_name_are_named(bundles: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", bundles[1], bundles[1], "phantom:0-1"]) == 2
    assert "give them names of their own" in capsys.readouterr().err
    assert main(["run", f"left={bundles[1]}", f"right={bundles[1]}", "phantom:0-1"]) == 0
    said = capsys.readouterr().out
    assert "left: fake-fp32" in said and "right: fake-fp32" in said


def test_rules_need_several(bundles: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rules = tmp_path / "rules.toml"
    rules.write_text('[tiny]\nafter = "gate"\n', encoding="utf-8")
    assert main(["run", bundles[1], "phantom:0-1", "--rules", str(rules)]) == 2
    assert "several models" in capsys.readouterr().err
