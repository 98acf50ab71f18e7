"""The gate on patients, repeated where the real data is at hand: the card's figures are true."""

from __future__ import annotations

from pathlib import Path

import pytest

from tinyusfm_edge import students
from tinyusfm_edge.release.patient_gate import TARGETS, judge_on_patients, main, offered, patient_frames


def _entries() -> dict[tuple[str, str], dict[str, object]]:
    return {(gate["target"], gate["precision"]): gate for gate in students.card("fetal-head")["gates"]}


def test_the_card_holds_a_passed_gate_for_every_artefact_of_these_weights() -> None:
    student, entries = students.load("fetal-head"), _entries()
    assert TARGETS and all("int8" in offered(target) for target in TARGETS)
    for target in TARGETS:
        for precision in offered(target):
            gate = entries[target, precision]
            assert gate["weights_sha256"] == student.weights_sha256
            assert gate["summary"]["passed"], (target, precision)
            assert len(gate["summary"]["frames"]["pixels_sha256"]) == gate["summary"]["frames"]["count"] == 151


@pytest.mark.parametrize("target", TARGETS)
def test_int8_holds_the_gate_on_patients_as_the_card_says(target: str, shared_folder: Path) -> None:
    frames = patient_frames(shared_folder / "data" / "hc18")
    (entry,) = judge_on_patients(students.load("fetal-head"), frames, target, ["int8"], shipped="fetal-head")
    known = _entries()[target, "int8"]
    assert entry["summary"]["passed"], entry["summary"]["failures"]
    assert entry["summary"]["frames"]["pixels_sha256"] == known["summary"]["frames"]["pixels_sha256"]
    found, said = entry["summary"]["statistics"], known["summary"]["statistics"]
    # another CPU class may round differently, so the figures agree only to what a reader would call equal
    assert found["dice_mean"] == pytest.approx(said["dice_mean"], abs=2e-3)
    assert found["hc_p95_mm"] == pytest.approx(said["hc_p95_mm"], abs=0.3)


def test_a_folder_without_a_table_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--data", str(tmp_path)]) == 2
    assert capsys.readouterr().out.startswith("error: ")
