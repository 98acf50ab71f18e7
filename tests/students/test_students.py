"""Shipped students are whole: weights, ranges and card agree, and phantoms are segmented."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from tinyusfm_calibration.ranges import SPAN
from tinyusfm_edge import students
from tinyusfm_edge.data.table import resize_mask
from tinyusfm_edge.models.checkpoint import LoadedStudent
from tinyusfm_edge.release.card import render_card
from tinyusfm_edge.release.wide import choose_layers
from tinyusfm_edge.students.choice import load_student
from tinyusfm_edge.students.policies import int8_policies
from tinyusfm_export.graph.build import build_graph
from tinyusfm_export.quantize.spans import calibration_taps
from tinyusfm_export.verify.reference import reference_outputs
from tinyusfm_runtime.errors import CalibrationError, InputError
from tinyusfm_runtime.numerics.measure import dice
from tinyusfm_runtime.numerics.preprocess import preprocess
from tinyusfm_runtime.phantom import make_phantom

ROOT = Path(__file__).resolve().parents[2]
GOLDEN_SEEDS = range(16)
"""Below the seeds of training (task.PHANTOM_TRAIN_SEED)."""


@pytest.fixture(scope="module")
def fetal_head() -> LoadedStudent:
    return students.load("fetal-head")


def test_fetal_head_is_shipped_with_ranges_for_its_graph(fetal_head: LoadedStudent) -> None:
    assert fetal_head.name == fetal_head.spec.name == "fetal-head"
    assert students.find_by_hash(fetal_head.weights_sha256) == "fetal-head"
    assert fetal_head.ranges is not None
    graph = build_graph(fetal_head.module, fetal_head.spec)
    golden = preprocess(make_phantom(0).frame, fetal_head.spec.preprocess)[0]
    # ranges for every quantized layer and spans for the integer engine
    assert set(fetal_head.ranges.tensors) == set(calibration_taps(graph)(golden)) > set(graph.linear_inputs)
    assert fetal_head.spec.licence == "CC-BY-4.0"
    assert "not a medical device" in fetal_head.spec.intended_use


def test_breast_lesion_is_opt_in_and_says_what_is_unclear() -> None:
    student, card = students.load("breast-lesion"), students.card("breast-lesion")
    assert student.spec.labels == ("benign (demo only)", "malignant (demo only)", "normal (demo only)")
    assert student.spec.licence == "LicenseRef-BUSI-not-stated" and students.opt_in("breast-lesion")
    text = (students.folder("breast-lesion") / students.CARD_TEXT).read_text(encoding="utf-8")
    assert "not stated at its source" in text and text.splitlines()[2].startswith("**Demo only: on breast images")
    assert "demonstration" in student.spec.intended_use and not students.demo_only("fetal-head")
    assert card["metrics"]["test"]["metrics"]["auc"]["low"] > 0.5
    assert not students.opt_in("fetal-head")


@pytest.mark.parametrize("name", students.names())
def test_card_agrees_with_the_files(name: str) -> None:
    card, student, place = students.card(name), students.load(name), students.folder(name)
    assert card["weights"]["sha256"] == student.weights_sha256
    assert card["weights"]["bytes"] == (place / students.WEIGHTS).stat().st_size
    assert card["spec"] == student.spec.to_json()
    assert card["ranges"]["set_id"] == student.ranges.set_id
    assert card["ranges"]["tensors"] == sum(not tensor.endswith(SPAN) for tensor in student.ranges.tensors)
    text = (place / students.CARD_TEXT).read_text(encoding="utf-8")
    assert text == render_card(card), "CARD.md was edited by hand, or card.json without it"
    for rule in (card["spec"]["reading"] or {}).get("thresholds", ()):
        assert f"| {rule['label']} | {rule['confidence']:.4f} |" in text and "called good (upper end" in text
    kept = students.wide_layers(name)
    assert card.get("wide") == (json.loads((place / students.WIDE).read_bytes()) if kept else None)
    assert all(f"more than 8 bits in every int8 artefact: `{layer}`" in text for layer in kept[:1])
    assert set(p.name for p in place.iterdir()) == {
        students.WEIGHTS,
        students.RANGES,
        students.CARD,
        students.CARD_TEXT,
        *([students.DRIFT] if card.get("drift") else []),
        *([students.WIDE] if students.wide_layers(name) else []),
        *([students.READING] if card["spec"]["reading"] else []),
    }


@pytest.mark.parametrize("name", students.names())
def test_the_drift_statistic_is_of_these_weights_and_what_the_card_says(name: str) -> None:
    statistic, said = students.drift(name), students.card(name).get("drift")
    if said is None:
        assert statistic is None
        return
    assert statistic is not None
    raw = (students.folder(name) / students.DRIFT).read_bytes()
    assert hashlib.sha256(raw).hexdigest() == said["sha256"] and len(raw) < 1_000_000
    assert said["auxiliary"] == list(statistic.auxiliary) and said["false_alarms"] == statistic.false_alarms


@pytest.mark.parametrize("name", students.names())
def test_gates_in_the_card_are_of_these_weights(name: str) -> None:
    card = students.card(name)
    assert {gate["weights_sha256"] for gate in card["gates"]} == {card["weights"]["sha256"]}


def test_phantoms_are_segmented(fetal_head: LoadedStudent) -> None:
    """Golden inputs are phantoms, so the student must see their heads."""
    phantoms = [make_phantom(seed) for seed in GOLDEN_SEEDS]
    outputs = reference_outputs(fetal_head.module, fetal_head.spec, [p.frame for p in phantoms])
    scores = []
    for phantom, output in zip(phantoms, outputs, strict=True):
        assert output.mask_HW is not None
        label = resize_mask(phantom.mask_HW, phantom.frame, fetal_head.spec.preprocess)
        scores.append(dice(output.mask_HW, label))
    assert np.mean(scores) > 0.9 and min(scores) > 0.6


def test_unknown_name_lists_the_known_ones() -> None:
    for name in ("liver", "", "..", "fetal-head/..", "__pycache__"):
        with pytest.raises(InputError, match="there are breast-lesion, fetal-head"):
            students.load(name)


@pytest.fixture
def without_breast_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The students as a wheel installs them; returns a checkout's weights of the one that is left out."""
    source = students.folder("breast-lesion")
    installed = tmp_path / "students"
    for name in ("breast-lesion", "fetal-head"):
        (installed / name).mkdir(parents=True)
        for file in students.folder(name).iterdir():
            if (name, file.name) != ("breast-lesion", students.WEIGHTS):
                (installed / name / file.name).symlink_to(file)
    monkeypatch.setenv(students.STUDENTS_VARIABLE, str(installed))
    return source / students.WEIGHTS


def test_weights_that_are_not_installed_are_named_with_their_path(without_breast_weights: Path) -> None:
    assert students.names() == ["fetal-head"] and students.left_out() == ["breast-lesion"]
    for refused in (lambda: students.load("breast-lesion"), lambda: load_student("breast-lesion")):
        with pytest.raises(InputError) as caught:
            refused()
        message = str(caught.value)
        assert str(without_breast_weights) in message and "source checkout only (the licence of BUSI" in message


def test_weights_of_a_checkout_are_the_same_student_with_all_its_marks(without_breast_weights: Path) -> None:
    with pytest.warns(UserWarning) as heard:
        student = load_student(without_breast_weights)
    assert student.spec.labels == ("benign (demo only)", "malignant (demo only)", "normal (demo only)")
    assert student.ranges is not None and student.spec.name == "breast-lesion"
    said = " ".join(str(warning.message) for warning in heard)
    assert "opt-in" in said and "for demonstrations alone" in said


def test_names_and_hashes_need_no_torch() -> None:
    script = (
        "import sys, json\n"
        "from tinyusfm_edge import students\n"
        "students.find_by_hash('0' * 64)\n"
        "print(json.dumps([students.names(), [m for m in ('torch', 'safetensors') if m in sys.modules]]))\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment, timeout=900, check=True
    )
    assert json.loads(done.stdout) == [students.names(), []]


def test_without_torch_the_missing_extra_is_named() -> None:
    script = (
        "import sys\n"
        "sys.modules['torch'] = None\n"
        "from tinyusfm_edge import students\n"
        "from tinyusfm_runtime.errors import MissingExtra\n"
        "try:\n"
        "    students.load('fetal-head')\n"
        "except MissingExtra as error:\n"
        "    print(error)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment, timeout=900, check=True
    )
    assert "needs torch" in done.stdout and "[torch]'" in done.stdout


def test_a_file_beside_the_weights_says_which_layers_keep_more_bits(
    without_breast_weights: Path, tmp_path: Path
) -> None:
    spec, place = students.load("fetal-head").spec, tmp_path / "students" / "fetal-head" / students.WIDE
    place.unlink(missing_ok=True)
    assert [policy.keep_float for policy in int8_policies(spec, "fetal-head")] == [(), ()], "none: the default ones"
    stored = {"version": students.WIDE_VERSION, "layers": ["blocks.1.attn.qkv"], "weights_sha256": spec.weights_sha256}
    place.write_text(json.dumps(stored), encoding="utf-8")
    kept = [policy.keep_float for policy in int8_policies(spec, "fetal-head")]
    assert kept == [("blocks.1.attn.qkv",)] * 2, "always, so that every export writes the same integers"
    assert not any(policy.keep_float for policy in int8_policies(spec, "fetal-head", weight_bits=4))
    assert not any(policy.keep_float for policy in int8_policies(spec))
    for wrong, message in (({**stored, "weights_sha256": "0" * 64}, "other weights"), ({"version": 1}, "damaged")):
        place.write_text(json.dumps(wrong), encoding="utf-8")
        with pytest.raises(CalibrationError, match=message):
            int8_policies(spec, "fetal-head")


def test_the_shipped_choice_is_of_layers_that_there_are() -> None:
    for name in students.names():
        student = students.load(name)
        graph = build_graph(student.module.eval(), student.spec)
        assert set(students.wide_layers(name)) <= set(graph.linear_inputs.values())


def test_layers_are_added_until_the_worst_frame_is_good_enough() -> None:
    gains = {"a": (0.0, 0.03), "b": (0.06, 0.0), "c": (0.03, 0.03)}

    def dices(kept: tuple[str, ...], frames: Sequence[int]) -> np.ndarray:
        base = np.array([0.88, 0.94, 0.99])
        for layer in kept:
            base[:2] += gains[layer]
        return base[list(frames)]

    kept, worst = choose_layers(["a", "b", "c"], dices, 3)
    assert kept == ("b", "c") and worst == pytest.approx([0.88, 0.94, 0.97]), "the fewest, the best first"
    assert choose_layers(["a"], lambda kept, frames: np.full(len(frames), 0.97), 3) == ((), [0.97])
    with pytest.raises(InputError, match="1 layers above 8 bits leave the worst frame at 0.900"):
        choose_layers(["a"], lambda kept, frames: np.full(len(frames), 0.9), 3)
