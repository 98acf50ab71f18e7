"""Packaging: what is stored is scored, the test split is looked at once, the card holds only measured numbers."""

from __future__ import annotations

import copy
import hashlib
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tables import change_rows
from tinyusfm_calibration.drift_fit import DriftSample, fit_drift
from tinyusfm_calibration.ranges import SPAN, Ranges
from tinyusfm_calibration.sets import describe_frames, phantom_frames
from tinyusfm_edge import students
from tinyusfm_edge.data.table import read_table
from tinyusfm_edge.models.checkpoint import LoadedStudent, load_student_file
from tinyusfm_edge.models.student import StudentConfig, build_student
from tinyusfm_edge.release.card import render_card
from tinyusfm_edge.release.package import (
    PackagePlan,
    add_drift,
    add_gates,
    add_wide,
    empty_answers,
    main,
    package,
    size_stratified,
)
from tinyusfm_edge.training.adapt.config import AdaptConfig
from tinyusfm_edge.training.adapt.run import adapt, student_spec, write_student
from tinyusfm_export.graph.build import build_graph
from tinyusfm_export.quantize.calibration_file import CalibrationFile
from tinyusfm_export.quantize.spans import calibration_taps
from tinyusfm_runtime.drift import GREY_NAMES
from tinyusfm_runtime.errors import CalibrationError, InputError

SMALL = AdaptConfig(
    steps=2,
    batch=4,
    phantom_share=0.25,
    num_phantoms=6,
    held_phantoms=2,
    evaluate_every=1,
    student=StudentConfig(image_size=32, width=48, heads=3),
)


@pytest.fixture(scope="module")
def run(table: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with an adapted student and its run beside it."""
    out = tmp_path_factory.mktemp("runs")
    adapt(table, out / "small.run", SMALL, ("head",), quiet=True)
    spec = student_spec(SMALL, ("head",), name="small", postprocess="ellipse_hc")
    write_student(out / "small.run", out / "small.safetensors", SMALL, spec, data=table)
    return out


@pytest.fixture
def plan(run: Path, table: Path, tmp_path: Path) -> PackagePlan:
    return PackagePlan(
        weights=run / "small.safetensors",
        data=table,
        name="fetal-head",
        out=tmp_path / "students" / "fetal-head",
        recipe=run / "small.run" / "config.json",
        threshold=0.4,
        start="random",
    )


@pytest.fixture(scope="module")
def packaged(run: Path, table: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of shipped students with one in it, not scored on the test split; copy it before changing it."""
    folder = tmp_path_factory.mktemp("students")
    package(
        PackagePlan(
            weights=run / "small.safetensors",
            data=table,
            name="fetal-head",
            out=folder / "fetal-head",
            recipe=run / "small.run" / "config.json",
            provisional=True,
            sweep=(0.3, 0.7),
        )
    )
    return folder


def gate(card: dict[str, Any], target: str = "openvino", precision: str = "int8", **summary: Any) -> dict[str, Any]:
    found = {
        "passed": True,
        "failures": [],
        "statistics": {"dice_mean": 0.9912, "dice_worst": 0.9634, "hc_p95_mm": 0.71},
    }
    return {
        "target": target,
        "precision": precision,
        "weights_sha256": card["weights"]["sha256"],
        "summary": {**found, **summary},
    }


def assert_ranges_cover(student: LoadedStudent) -> None:
    """Ranges for every quantized layer, and spans for the integer engine: all that calibration sees, no more."""
    graph = build_graph(student.module, student.spec)
    seen = set(calibration_taps(graph)(np.zeros(student.spec.input.shape, np.uint8)))
    found = set(student.ranges.tensors)
    assert {name for name in found if not name.endswith(SPAN)} == set(graph.linear_inputs)
    assert found == seen and found > set(graph.linear_inputs)


def test_package_loads_as_a_shipped_student(packaged: Path, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(students.STUDENTS_VARIABLE, str(packaged))
    assert students.names() == ["fetal-head"]
    student = students.load("fetal-head")
    card = students.card("fetal-head")
    assert student.weights_sha256 == card["weights"]["sha256"] == student.ranges.weights_sha256
    assert students.find_by_hash(student.weights_sha256.upper()) == "fetal-head"
    assert students.find_by_hash("0" * 64) is None
    trained = load_file(run / "small.safetensors")
    own = student.module.state_dict()
    assert all(torch.equal(own[name], tensor.half().float()) for name, tensor in trained.items())
    assert student.spec.to_json() == card["spec"]
    assert_ranges_cover(student)


def test_ranges_come_from_training_frames_alone(packaged: Path, table: Path) -> None:
    ranges = Ranges.from_json(json.loads((packaged / "fetal-head" / students.RANGES).read_text()))
    files = {split: {s.sha256 for s in read_table(table, split)} for split in ("train", "val", "test")}
    named = set(ranges.frame_sha256)
    assert len(named & files["train"]) == 24
    assert not named & (files["val"] | files["test"])


def test_frames_shared_with_the_test_split_are_refused(plan: PackagePlan, tmp_path: Path) -> None:
    data = Path(shutil.copytree(plan.data, tmp_path / "leak"))
    shutil.copy(data / "528.png", data / "500.png")
    with pytest.raises(CalibrationError, match="test"):
        package(replace(plan, data=data))
    assert not plan.out.exists()


def test_packaging_twice_gives_the_same_bytes(plan: PackagePlan, tmp_path: Path) -> None:
    package(plan)
    package(replace(plan, out=tmp_path / "again"))
    for path in plan.out.iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes(), path.name


def test_test_split_is_looked_at_once(plan: PackagePlan, table: Path, tmp_path: Path) -> None:
    assert package(plan)["metrics"]["test"] is None
    first = package(replace(plan, final=True))
    assert first["metrics"]["test"]["dice"]["num_values"] == 4
    data = Path(shutil.copytree(table, tmp_path / "blind"))
    for seed in range(528, 532):
        (data / f"{seed}_mask.png").write_bytes((data / "500_mask.png").read_bytes())
    again = package(replace(plan, data=data, final=True))
    assert again["metrics"]["test"] == first["metrics"]["test"], "the earlier look is kept"
    torch.manual_seed(9)
    save_file(build_student(SMALL.student).state_dict(), tmp_path / "other.safetensors")
    with pytest.raises(InputError, match="looked at once.*--successor"):
        package(replace(plan, weights=tmp_path / "other.safetensors", final=True))
    next_one = package(replace(plan, weights=tmp_path / "other.safetensors", final=True, successor=True))
    assert next_one["weights"]["sha256"] != first["weights"]["sha256"]
    (look,) = next_one["earlier_looks"]
    assert look["weights_sha256"] == first["weights"]["sha256"]
    assert look["scores"]["dice"] == first["metrics"]["test"]["dice"]
    text = (plan.out / students.CARD_TEXT).read_text()
    assert "had been looked at before" in text and look["weights_sha256"][:12] in text
    repeated = package(replace(plan, weights=tmp_path / "other.safetensors", final=True, successor=True))
    assert repeated["earlier_looks"] == [look], "the same weights once more are no further look"


def test_images_without_a_head_are_counted(packaged: Path, table: Path) -> None:
    student = load_student_file(packaged / "fetal-head" / students.WEIGHTS)
    sure = replace(student, spec=replace(student.spec, threshold=1 - 1e-9))
    never, always = (
        empty_answers(sure, table),
        empty_answers(replace(student, spec=replace(student.spec, threshold=1e-9)), table),
    )
    assert never == {"name": table.name, "frames": 4, "groups": 2, "empty": 4, "largest": 0.0}
    assert always["empty"] == 0 and always["largest"] == 1.0


def test_card_says_what_was_measured(packaged: Path) -> None:
    card = json.loads((packaged / "fetal-head" / students.CARD).read_text())
    text = (packaged / "fetal-head" / students.CARD_TEXT).read_text()
    assert "Provisional" in text and "not a medical device" in text and "CC BY 4.0" in text
    assert card["weights"]["sha256"] in text
    assert f"{card['metrics']['val']['dice']['mean']:.4f}" in text
    assert [row["threshold"] for row in card["thresholds"]] == [0.3, 0.7]
    assert card["data"]["splits"]["train"] == {"frames": 24, "groups": 12}
    assert "The test split has not been looked at." in text
    assert "Not measured yet" in text


def test_every_number_of_the_text_comes_from_the_card(packaged: Path) -> None:
    """Numbers that stay when every number of the card changes would be typed by hand."""
    card = json.loads((packaged / "fetal-head" / students.CARD).read_text())
    card["gates"] = [gate(card)]

    def shifted(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: shifted(item) for key, item in value.items()}
        if isinstance(value, list):
            return [shifted(item) for item in value]
        return value if isinstance(value, bool | str) or value is None else value * 1000.7 + 13

    changed = shifted(copy.deepcopy(card))
    changed["weights"]["sha256"], changed["ranges"]["set_id"] = "f" * 64, "e" * 64
    numbers = re.compile(r"(?<![\w.])\d[\d,]*\.?\d*")
    kept = set(numbers.findall(render_card(card))) & set(numbers.findall(render_card(changed)))
    strings = [json.dumps(card["data"]), card["spec"]["origin"], card["spec"]["licence"], card["architecture"]["heads"]]
    sources = set(numbers.findall(" ".join(strings)))
    # 95 % intervals, float32 and float16, 8-connected, 8-bit arithmetic, p95, and the copies' 256 pixels are words
    words = {"95", "32", "16", "8", "256"}
    assert not {n.strip(",.") for n in kept} - {n.strip(",.") for n in sources} - words


def test_gates_are_added_replaced_and_checked(packaged: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(packaged / "fetal-head", tmp_path / "fetal-head"))
    card = json.loads((out / students.CARD).read_text())
    add_gates(out, [gate(card), gate(card, "onnx")])
    failed = gate(card, passed=False, failures=["mean Dice 0.98, at least 0.99 wanted"])
    found = add_gates(out, [failed])
    assert [(g["target"], g["summary"]["passed"]) for g in found["gates"]] == [("onnx", True), ("openvino", False)]
    text = (out / students.CARD_TEXT).read_text()
    assert "mean Dice 0.98, at least 0.99 wanted" in text and "| onnx | int8 | 0.9912 |" in text
    with pytest.raises(InputError, match="other weights"):
        add_gates(out, [{**gate(card), "weights_sha256": "0" * 64}])
    with pytest.raises(InputError, match="lacks summary"):
        add_gates(out, [{"target": "onnx", "precision": "fp16", "weights_sha256": card["weights"]["sha256"]}])
    with pytest.raises(InputError, match="package the student first"):
        add_gates(tmp_path / "none", [])


def calibration_file(path: Path, weights_sha256: str, *, with_drift: bool = True) -> Path:
    """What calibrate would write, with a statistic over made-up grey levels."""
    rng = np.random.default_rng(0)
    fit, held_out = (
        [
            DriftSample(
                grey=rng.normal(size=len(GREY_NAMES)), tokens_T=np.zeros(0), peaks=np.zeros(0), group=f"{side}{i}"
            )
            for i in range(60)
        ]
        for side in "ab"
    )
    drift = fit_drift(fit, held_out, about={"weights_sha256": weights_sha256}) if with_drift else None
    frames = describe_frames("made-up", phantom_frames(range(16)))
    ranges = Ranges(
        tensors={"a": (0.0, 1.0)}, method="minmax", set_id=frames.id, frame_sha256=tuple(sorted(frames.hashes))
    )
    path.write_text(json.dumps(CalibrationFile(frames=frames, ranges=ranges, drift=drift).to_json()), encoding="utf-8")
    return path


def test_a_drift_statistic_is_added_and_goes_with_its_weights(
    packaged: Path, plan: PackagePlan, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "copy"
    found = next(path.parent for path in packaged.rglob(students.CARD))
    shutil.copytree(found, out)
    sha = json.loads((out / students.CARD).read_text(encoding="utf-8"))["weights"]["sha256"]
    for wrong in (
        calibration_file(tmp_path / "other.json", "0" * 64),
        calibration_file(tmp_path / "none.json", sha, with_drift=False),
    ):
        assert main(["--name", "fetal-head", "--out", str(out), "--drift", str(wrong)]) == 2
        assert "no drift statistic of these weights" in capsys.readouterr().out
    card = add_drift(out, calibration_file(tmp_path / "set.json", sha))
    raw = (out / students.DRIFT).read_bytes()
    assert card["drift"]["sha256"] == hashlib.sha256(raw).hexdigest() and card["drift"]["held_out"] == 60
    assert "## Drift" in (out / students.CARD_TEXT).read_text(encoding="utf-8")
    others = "1" * 64
    stale = {
        **card,
        "weights": {**card["weights"], "sha256": others},
        "drift": {**card["drift"], "weights_sha256": others},
    }
    (out / students.CARD).write_text(json.dumps(stale), encoding="utf-8")
    assert package(replace(plan, out=out))["drift"] is None and not (out / students.DRIFT).exists()


def test_how_a_mask_is_read_goes_with_its_weights(plan: PackagePlan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(students.STUDENTS_VARIABLE, str(plan.out.parent))
    sha = package(plan)["weights"]["sha256"]
    read = {"version": 1, "weights_sha256": sha, "second_pass": "small", "min_area": 0.005}
    path = plan.out / students.READING
    path.write_text(json.dumps({**read, "reading": None, "anatomy": None}), encoding="utf-8")
    card = package(plan)
    assert card["spec"]["second_pass"] == "small" and card["spec"]["min_area"] == 0.005
    assert students.load("fetal-head").spec.to_json() == card["spec"]
    path.write_text(
        json.dumps({**read, "weights_sha256": "0" * 64, "reading": None, "anatomy": None}), encoding="utf-8"
    )
    card = package(plan)
    assert not path.exists() and card["spec"]["second_pass"] == "never"
    assert students.load("fetal-head").spec.to_json() == card["spec"]


def test_layers_above_8_bits_go_into_the_card_with_their_weights(plan: PackagePlan) -> None:
    sha, path = package(plan)["weights"]["sha256"], plan.out / students.WIDE
    found = {"version": 1, "weights_sha256": sha, "layers": ["a.mlp.fc1", "b.mlp.fc2"], "frames": 8}
    assert add_wide(plan.out, {**found, "worst_dice": [0.87, 0.91, 0.97]})["wide"] == json.loads(path.read_text())
    text = (plan.out / students.CARD_TEXT).read_text()
    assert "Some layers keep more than 8 bits in every int8 artefact: `a.mlp.fc1`, `b.mlp.fc2` (`wide.json`)" in text
    assert "worst of 8 validation frames would have Dice 0.8700" in text and "so the worst has 0.9700" in text
    assert package(plan)["wide"]["layers"] == found["layers"], "the same weights keep them"
    with pytest.raises(InputError, match="other weights"):
        add_wide(plan.out, {**found, "weights_sha256": "0" * 64})
    with pytest.raises(InputError, match="package the student first"):
        add_wide(plan.out / "none", None)
    path.write_text(json.dumps({**found, "weights_sha256": "0" * 64}))
    assert package(plan)["wide"] is None and not path.exists(), "other weights lose them"
    add_wide(plan.out, {**found, "worst_dice": [0.87, 0.97]})
    assert add_wide(plan.out, None)["wide"] is None and not path.exists()
    assert "8 bits in every" not in (plan.out / students.CARD_TEXT).read_text()


def test_gates_of_other_weights_do_not_survive_a_new_package(plan: PackagePlan, tmp_path: Path) -> None:
    add_gates(plan.out, [gate(package(plan))])
    assert len(package(plan)["gates"]) == 1
    torch.manual_seed(9)
    save_file(build_student(SMALL.student).state_dict(), tmp_path / "other.safetensors")
    assert package(replace(plan, weights=tmp_path / "other.safetensors"))["gates"] == []


def test_strata_are_even_over_head_sizes(table: Path) -> None:
    frames = size_stratified(read_table(table, "train"))
    counts = {stratum: sum(f.stratum == stratum for f in frames) for stratum in {f.stratum for f in frames}}
    assert set(counts) == {"size1", "size2", "size3", "size4"}
    assert all(count == 6 for count in counts.values())


def test_command_line(plan: PackagePlan, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["--name", "fetal-head", "--out", str(plan.out)]
    assert main([*common, "--weights", str(plan.weights), "--data", str(plan.data), "--provisional"]) == 0
    card = json.loads((plan.out / students.CARD).read_text())
    (tmp_path / "gates.json").write_text(json.dumps([gate(card)]))
    assert main([*common, "--gates", str(tmp_path / "gates.json")]) == 0
    assert "| openvino | int8 |" in (plan.out / students.CARD_TEXT).read_text()
    capsys.readouterr()
    for wrong in (
        common,
        [*common, "--gates", str(tmp_path / "none")],
        ["--name", "liver", "--weights", str(plan.weights), "--data", str(plan.data), "--out", str(tmp_path / "liver")],
    ):
        assert main(wrong) == 2
        out = capsys.readouterr().out
        assert out.startswith("error: ") and out.count("\n") == 1
    assert not (tmp_path / "liver").exists()


@pytest.fixture(scope="module")
def classes(table: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The table with BUSI's three labels by patient."""
    folder = tmp_path_factory.mktemp("data") / "classes"
    shutil.copytree(table, folder)
    labels = ("benign", "malignant", "normal")
    return change_rows(folder, lambda number, row: {"label": labels[number // 2 % 3]})


def test_a_classifier_is_packaged_with_its_licence_note_and_scored_by_class(
    classes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = ("benign", "malignant", "normal")
    student = replace(SMALL.student, task="classify", num_classes=3, exits=(6, 9))
    config = replace(SMALL, student=student, phantom_share=0.0)
    adapt(classes, tmp_path / "c.run", config, labels, quiet=True)
    spec = student_spec(config, labels, name="c")
    write_student(tmp_path / "c.run", tmp_path / "c.safetensors", config, spec, data=classes)
    folder = tmp_path / "students"
    arguments = ["--name", "breast-lesion", "--weights", str(tmp_path / "c.safetensors"), "--data", str(classes)]
    assert main([*arguments, "--out", str(folder / "breast-lesion"), "--final"]) == 0, capsys.readouterr().out
    monkeypatch.setenv(students.STUDENTS_VARIABLE, str(folder))
    loaded, card = students.load("breast-lesion"), students.card("breast-lesion")
    assert loaded.spec.labels == tuple(f"{label} (demo only)" for label in labels) and loaded.spec.exits is not None
    assert loaded.spec.to_json() == card["spec"]
    assert_ranges_cover(loaded)
    assert set(card["ranges"]["strata"]) == set(labels)
    assert card["metrics"]["test"]["metrics"]["accuracy"]["num_values"] == 4
    text = (folder / "breast-lesion" / students.CARD_TEXT).read_text(encoding="utf-8")
    assert "licence of BUSI" in text and "Opt-in" in text
    # what other sources showed, as the first thing said and among the limits
    assert text.splitlines()[2].startswith("**Demo only: ") and "images of two other sources" in text
    assert "Early exits" in text and "| true benign |" in text
    assert students.opt_in("breast-lesion").startswith("the licence of BUSI")
    known = card["metrics"]["val"]["metrics"]["accuracy"]["mean"]
    assert f"{known:.4f}" in text
    add_gates(
        folder / "breast-lesion",
        [gate(card, statistics={"top1": 0.9912, "drift_mean": 0.001, "drift_worst": 0.0123})],
    )
    assert "| openvino | int8 | 0.9912 | 0.0010 | 0.0123 | passed |" in (
        folder / "breast-lesion" / students.CARD_TEXT
    ).read_text(encoding="utf-8")


def test_a_student_of_another_task_is_refused(run: Path, classes: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="task"):
        package(
            PackagePlan(
                weights=run / "small.safetensors", data=classes, name="breast-lesion", out=tmp_path / "breast-lesion"
            )
        )
