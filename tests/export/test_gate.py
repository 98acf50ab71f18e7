"""Gate: the default thresholds, files that change them, and that every demand can fail."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from tinyusfm_export.verify.gate import GATE_KEYS, Gate, gate_toml, judge
from tinyusfm_export.verify.parity import Comparison
from tinyusfm_runtime.errors import InputError
from tinyusfm_runtime.spec import PostProcess, Task

SEGMENT = {
    "frames": 78,
    "counted": 48,
    "broken": 0,
    "dice_mean": 0.995,
    "dice_worst": 0.97,
    "differing_pixels_worst": 0.001,
    "hc_p95_mm": 0.5,
    "hc_frames": 48,
    "hc_p95_share": 0.002,
    "hc_share_frames": 3,
}
CLASSIFY = {"frames": 40, "broken": 0, "top1": 1.0, "drift_mean": 0.01, "drift_worst": 0.05}
FEATURES = {"frames": 40, "broken": 0, "cosine_mean": 0.999, "cosine_worst": 0.99}
GOOD = {Task.SEGMENT: SEGMENT, Task.CLASSIFY: CLASSIFY, Task.FEATURES: FEATURES}


def measured(task: Task = Task.SEGMENT, **changes: float | None) -> Comparison:
    numbers = {**GOOD[task], **changes}
    return Comparison(
        task=task,
        post=PostProcess.ELLIPSE_HC if task is Task.SEGMENT else PostProcess.NONE,
        engine="e",
        reference="r",
        frames=(),
        statistics={key: value for key, value in numbers.items() if value is not None},
        provenance={},
    )


@pytest.mark.parametrize("task", list(Task))
def test_a_good_artefact_passes(task: Task) -> None:
    report = judge(measured(task), Gate())
    assert report
    assert not report.failures


@pytest.mark.parametrize(
    ("task", "statistic", "value", "says"),
    [
        (Task.SEGMENT, "dice_mean", 0.9899, "mean Dice"),
        (Task.SEGMENT, "dice_worst", 0.9499, "worst Dice"),
        (Task.SEGMENT, "hc_p95_mm", 1.01, "HC difference"),
        (Task.SEGMENT, "differing_pixels_worst", 0.0051, "differing pixels"),
        (Task.SEGMENT, "counted", 31, "31 frames"),
        (Task.SEGMENT, "broken", 1, "no finite output"),
        (Task.CLASSIFY, "top1", 0.98, "top-1"),
        (Task.CLASSIFY, "drift_mean", 0.03, "mean probability drift"),
        (Task.CLASSIFY, "drift_worst", 0.11, "worst probability drift"),
        (Task.CLASSIFY, "frames", 31, "31 frames"),
        (Task.FEATURES, "cosine_mean", 0.98, "mean cosine"),
        (Task.FEATURES, "cosine_worst", 0.9, "worst cosine"),
    ],
)
def test_each_demand_fails_alone_and_is_named(task: Task, statistic: str, value: float, says: str) -> None:
    report = judge(measured(task, **{statistic: value}), Gate())
    assert not report
    assert len(report.failures) == 1
    assert says in report.failures[0]


def test_the_thresholds_themselves_pass() -> None:
    edge = {"dice_mean": 0.99, "dice_worst": 0.95, "hc_p95_mm": 1.0, "differing_pixels_worst": 0.005, "counted": 32}
    assert judge(measured(**edge), Gate())


def test_a_value_that_is_no_number_never_passes() -> None:
    assert not judge(measured(dice_mean=float("nan")), Gate())
    assert not judge(measured(hc_p95_mm=float("nan")), Gate())


def test_nothing_measured_never_passes() -> None:
    empty = replace(measured(), statistics={})
    assert not judge(empty, Gate())
    assert not judge(empty, Gate(), count_all=True)


def test_heads_without_any_spacing_are_judged_as_a_share_and_said_so() -> None:
    report = judge(measured(hc_p95_mm=None, hc_frames=None, hc_share_frames=48), Gate())
    assert report
    assert any("as a share on 48 frames" in note for note in report.notes)
    assert not judge(measured(hc_p95_mm=None, hc_frames=None, hc_p95_share=0.01), Gate())


def test_where_some_frames_have_a_spacing_only_they_judge_the_circumference_and_the_report_says_how_many() -> None:
    report = judge(measured(hc_p95_share=0.5), Gate())
    assert report
    assert any("in mm on 48 frames; 3 frames without spacing" in note for note in report.notes)


def test_golden_frames_of_a_model_that_sees_no_head_may_all_be_small() -> None:
    blind = measured(counted=0, dice_mean=None, dice_worst=None, hc_p95_mm=None, hc_p95_share=None)
    assert not judge(blind, Gate())
    assert judge(blind, Gate(), count_all=True)
    assert not judge(measured(counted=0, differing_pixels_worst=0.01), Gate(), count_all=True)


def test_an_artefact_that_rounds_nothing_has_the_references_logits() -> None:
    """A mask hardly feels a wrong axis in a late block; the logits do. INT8 moves them by design."""
    for precision, share, passes in (
        ("fp32", 0.009, True), ("fp16", 0.011, False), ("fp32", float("nan"), False),
        ("bf16", 0.011, True), ("int8", 0.05, True), ("w4", 0.3, True),
    ):  # fmt: skip
        report = judge(measured(logit_share=share), Gate(), precision=precision)
        assert bool(report) is passes, precision
        assert any(line.name == "float_logits" for line in report.lines) is (precision in ("fp32", "fp16"))
    assert judge(measured(logit_share=0.05), Gate(float_logits=0.06), precision="fp32")


def test_a_mask_without_a_head_is_not_judged_by_circumference() -> None:
    report = judge(replace(measured(hc_p95_mm=9.0), post=PostProcess.MASK), Gate())
    assert report
    assert not any(line.name.startswith("hc") for line in report.lines)


def test_files_change_what_they_name_and_nothing_else(tmp_path: Path) -> None:
    toml, js = tmp_path / "g.toml", tmp_path / "g.json"
    toml.write_text("dice_mean = 0.98\nmin_frames = 10\n")
    js.write_text('{"dice_mean": 0.98, "min_frames": 10}')
    assert Gate.from_file(toml) == Gate.from_file(js) == Gate(dice_mean=0.98, min_frames=10)


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("g.toml", "dice = 0.9", "unknown keys dice"),
        ("g.toml", "dice_mean = 1.5", "out of range"),
        ("g.toml", "dice_mean = true", "not a number"),
        ("g.toml", "dice_mean = nan", "not a number"),
        ("g.toml", 'dice_mean = "0.9"', "not a number"),
        ("g.toml", "min_frames = 2.5", "whole number"),
        ("g.toml", "min_frames = 0", "whole number"),
        ("g.toml", "version = 2", "version 2"),
        ("g.toml", "dice_mean =", "not readable"),
        ("g.json", "[1]", "no table"),
        ("g.json", "{", "not readable"),
        ("g.yaml", "dice_mean: 1", ".toml or .json"),
        ("g.json", "[" * 40000 + "]" * 20000, "not readable|no gate"),
        ("g.json", " " * 70000, "that is no gate"),
    ],
)
def test_a_gate_file_that_cannot_be_used_says_why(tmp_path: Path, name: str, text: str, says: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(InputError, match=says):
        Gate.from_file(path)


def test_a_missing_gate_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere\.toml"):
        Gate.from_file(tmp_path / "nowhere.toml")


def test_the_gate_round_trips_and_its_limits_stand_in_the_report() -> None:
    gate = Gate(dice_worst=0.9)
    assert Gate.from_json(json.loads(json.dumps(gate.to_json()))) == gate
    limits: dict[str, Any] = judge(measured(), gate).summary()["limits"]
    assert limits == asdict(gate)


def test_the_page_of_the_gate_shows_the_file_that_the_command_writes() -> None:
    page = Path(__file__).resolve().parents[2] / "docs" / "reference" / "gate.md"
    assert f"```toml\n{gate_toml()}```\n" in page.read_text(encoding="utf-8")
    for key in GATE_KEYS:
        assert f"\n{key} = " in gate_toml()
