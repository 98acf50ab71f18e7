"""Shipped students are whole: weights, ranges and card agree, and phantoms are segmented."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from tinyusfm_edge import students
from tinyusfm_edge.models.checkpoint import LoadedStudent
from tinyusfm_edge.training.card import render_card
from tinyusfm_edge.training.data import resize_mask
from tinyusfm_export.graph import build_graph
from tinyusfm_export.reference import reference_outputs
from tinyusfm_runtime.errors import InputError
from tinyusfm_runtime.measure import dice
from tinyusfm_runtime.phantom import make_phantom

GOLDEN_SEEDS = range(16)
"""Below the seeds of training (task.PHANTOM_TRAIN_SEED)."""


@pytest.fixture(scope="module")
def fetal_head() -> LoadedStudent:
    return students.load("fetal-head")


def test_fetal_head_is_shipped_with_ranges_for_its_graph(fetal_head: LoadedStudent) -> None:
    assert fetal_head.name == fetal_head.spec.name == "fetal-head"
    assert students.find_by_hash(fetal_head.weights_sha256) == "fetal-head"
    assert fetal_head.ranges is not None
    assert set(fetal_head.ranges.tensors) == set(build_graph(fetal_head.module, fetal_head.spec).linear_inputs)
    assert fetal_head.spec.licence == "CC-BY-4.0"
    assert "not a medical device" in fetal_head.spec.intended_use


def test_breast_lesion_is_opt_in_and_says_what_is_unclear() -> None:
    student, card = students.load("breast-lesion"), students.card("breast-lesion")
    assert student.spec.labels == ("benign", "malignant", "normal")
    assert student.spec.licence == "LicenseRef-BUSI-not-stated" and students.opt_in("breast-lesion")
    text = (students.folder("breast-lesion") / students.CARD_TEXT).read_text(encoding="utf-8")
    assert "not stated at its source" in text and "have **not been tested**" in text
    assert card["metrics"]["test"]["metrics"]["auc"]["low"] > 0.5
    assert not students.opt_in("fetal-head")


@pytest.mark.parametrize("name", students.names())
def test_card_agrees_with_the_files(name: str) -> None:
    card, student, place = students.card(name), students.load(name), students.folder(name)
    assert card["weights"]["sha256"] == student.weights_sha256
    assert card["weights"]["bytes"] == (place / students.WEIGHTS).stat().st_size
    assert card["spec"] == student.spec.to_json()
    assert card["ranges"]["set_id"] == student.ranges.set_id
    assert card["ranges"]["tensors"] == len(student.ranges.tensors)
    text = (place / students.CARD_TEXT).read_text(encoding="utf-8")
    assert text == render_card(card), "CARD.md was edited by hand, or card.json without it"
    assert set(p.name for p in place.iterdir()) == {
        students.WEIGHTS,
        students.RANGES,
        students.CARD,
        students.CARD_TEXT,
        *([students.DRIFT] if card.get("drift") else []),
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
    assert all(gate["weights_sha256"] == card["weights"]["sha256"] for gate in card["gates"])


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


def test_names_and_hashes_need_no_torch() -> None:
    script = (
        "import sys, json\n"
        "from tinyusfm_edge import students\n"
        "students.find_by_hash('0' * 64)\n"
        "print(json.dumps([students.names(), [m for m in ('torch', 'safetensors') if m in sys.modules]]))\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment, timeout=60, check=True
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
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment, timeout=60, check=True
    )
    assert "needs torch" in done.stdout and "tinyusfm-edge[torch]" in done.stdout
