"""Scores are those of live frames: a perfect model scores perfectly, each fault shows in its own number."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tinyusfm_edge.data.table import Sample, resize_mask
from tinyusfm_edge.evaluation.segmentation import Runner, evaluate_split, parse_thresholds, sweep_thresholds
from tinyusfm_runtime.errors import InputError
from tinyusfm_runtime.frame import Frame
from tinyusfm_runtime.numerics.preprocess import preprocess
from tinyusfm_runtime.passes import read_outputs
from tinyusfm_runtime.phantom import make_phantom
from tinyusfm_runtime.reading import SecondPassState
from tinyusfm_runtime.reading_rules import LabelThresholds, ReadingRates, ReadingRules
from tinyusfm_runtime.spec import LOGITS_NAME, ModelSpec, PostProcess, PreprocessSpec, SecondPass, Task

SPEC = ModelSpec(
    name="oracle",
    task=Task.SEGMENT,
    labels=("head",),
    preprocess=PreprocessSpec(height=96, width=96),
    postprocess=PostProcess.ELLIPSE_HC,
)
Change = Callable[[np.ndarray], np.ndarray]


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    found = []
    for seed in range(8):
        phantom = make_phantom(seed, height=160, width=220)
        found.append(
            Sample(
                id=f"{seed}.png",
                group=f"p{seed // 2}",
                frame=phantom.frame,
                mask_HW=phantom.mask_HW,
                hc_mm=phantom.hc_mm,
                sha256=f"{seed:064x}",
            )
        )
    return found


def oracle(samples: list[Sample], change: Change = lambda mask: mask) -> Runner:
    """A model that knows the label masks by their image and answers with them, changed."""
    known = {
        preprocess(s.frame, SPEC.preprocess)[0].tobytes(): resize_mask(s.mask_HW, s.frame, SPEC.preprocess)
        for s in samples
    }

    def run(tensor: np.ndarray) -> np.ndarray:
        return ((change(known[tensor.tobytes()]).astype(np.float32) - 0.5) * 20)[None, None]

    return run


def test_a_perfect_model_scores_perfectly(samples: list[Sample]) -> None:
    report = evaluate_split(oracle(samples), SPEC, samples, "val")
    assert (report.dice.mean, report.iou.mean, report.worst_dice, report.not_found) == (1.0, 1.0, 1.0, 0)
    assert (report.dice.num_values, report.dice.num_groups) == (8, 4)
    assert report.hc_mae_mm is not None and report.label_bias_mm is not None and report.hc_bias_mm is not None
    assert report.hc_mae_mm.mean < 1.0
    # the ellipse is that of the logits, the label's that of its moments
    assert report.hc_bias_mm.mean == pytest.approx(report.label_bias_mm.mean, abs=0.05)


def test_a_grown_mask_shows_as_a_bias(samples: list[Sample]) -> None:
    def grow(mask: np.ndarray) -> np.ndarray:
        padded = np.pad(mask, 1)
        return np.maximum.reduce([padded[i : i + 96, j : j + 96] for i in range(3) for j in range(3)])

    report = evaluate_split(oracle(samples, grow), SPEC, samples, "val")
    assert report.hc_bias_mm is not None and report.label_bias_mm is not None
    assert report.hc_bias_mm.mean > report.label_bias_mm.mean + 2
    assert report.iou.mean < report.dice.mean < 1.0


def test_an_empty_mask_is_counted_and_has_no_circumference(samples: list[Sample]) -> None:
    report = evaluate_split(oracle(samples, np.zeros_like), SPEC, samples, "val")
    assert (report.dice.mean, report.not_found, report.hc_mae_mm, report.hc_p95_mm) == (0.0, 8, None, None)
    assert ("no mask found", "8") in report.table()


def test_outputs_that_are_not_finite_score_nothing(samples: list[Sample]) -> None:
    def broken(tensor: np.ndarray) -> np.ndarray:
        return np.full((1, 1, 96, 96), np.nan, np.float32)

    assert evaluate_split(broken, SPEC, samples, "val").not_found == 8


def test_islands_are_dropped_as_live_and_borders_flagged(samples: list[Sample]) -> None:
    def island(mask: np.ndarray) -> np.ndarray:
        out = mask.copy()
        out[:3, :3] = 1
        return out

    assert evaluate_split(oracle(samples, island), SPEC, samples, "val").worst_dice > 0.99
    plain = replace(SPEC, postprocess=PostProcess.MASK)
    kept = evaluate_split(oracle(samples, island), plain, samples, "val")
    assert kept.worst_dice < 1.0
    assert kept.hc_mae_mm is None
    flagged = evaluate_split(oracle(samples, np.ones_like), SPEC, samples, "val")
    assert flagged.border == 1.0


def test_frames_without_spacing_are_scored_in_pixels_only(samples: list[Sample]) -> None:
    bare = [replace(s, frame=Frame(pixels=s.frame.pixels)) for s in samples]
    report = evaluate_split(oracle(samples), SPEC, bare, "val")
    assert report.dice.mean == 1.0
    assert report.hc_mae_mm is None and report.label_bias_mm is None


def test_thresholds_share_one_run_of_the_model(samples: list[Sample]) -> None:
    calls = []
    soft = oracle(samples)

    def run(tensor: np.ndarray) -> np.ndarray:
        calls.append(1)
        return soft(tensor) / 10

    reports = sweep_thresholds(run, SPEC, samples, "val", [0.5, 0.9])
    assert len(calls) == 8
    assert [r.dice.mean for r in reports] == [1.0, 0.0], "probabilities are 0.73 inside"


def test_small_heads_are_scored_as_they_are_read_after_a_second_pass(samples: list[Sample]) -> None:
    """A model that sees only what is large: the first pass finds a blob, the crop around it the head."""
    small = replace(SPEC, second_pass=SecondPass.SMALL)
    known = {preprocess(s.frame, SPEC.preprocess)[0].tobytes() for s in samples}
    once, calls = oracle(samples, lambda mask: mask * (np.arange(96) % 96 > 60)), []

    def run(tensor: np.ndarray) -> np.ndarray:
        calls.append(tensor)
        return once(tensor) if tensor.tobytes() in known else np.full((1, 1, 96, 96), 30.0, np.float32)

    never = evaluate_split(run, SPEC, samples, "val")
    assert never.looked_twice is None and len(calls) == len(samples)
    found = evaluate_split(run, small, samples, "val")
    assert found.looked_twice == len(calls) - 2 * len(samples) > 0
    assert ("looked at twice", f"{found.looked_twice} of 8 frames") in found.table()
    changed = [a.dice != b.dice for a, b in zip(never.images, found.images, strict=True)]
    assert changed == [image.second_pass is SecondPassState.DONE for image in found.images]
    tensor, placement = preprocess(samples[0].frame, SPEC.preprocess)
    live = read_outputs(
        {LOGITS_NAME: run(tensor)}, lambda x: {LOGITS_NAME: run(x)}, small, samples[0].frame, tensor, placement
    )
    assert live.answer.measurement is not None
    assert found.images[0].hc_mm == live.answer.measurement.hc_mm, "what a live frame says"
    paper = sweep_thresholds(run, small, samples, "val", [0.5], paper=True)[0]
    assert not paper.looked_twice, "the official repository looks once"


def test_readings_are_counted_and_so_is_what_their_doubt_is_worth(samples: list[Sample]) -> None:
    rates = ReadingRates(
        frames=9, groups=9, good=9, doubtful=0, none=0, wrong=0, good_but_wrong=0, doubtful_but_right=0,
        good_but_wrong_limit=0.3, wrong_means="off",
    )  # fmt: skip
    rules = ReadingRules(thresholds=(LabelThresholds(label="head", confidence=0.9),), rates=rates)
    judged = replace(SPEC, reading=rules)
    know = oracle(samples)
    dark = {preprocess(s.frame, SPEC.preprocess)[0].tobytes() for s in samples[:2]}

    def run(tensor: np.ndarray) -> np.ndarray:
        return know(tensor) * (0.1 if tensor.tobytes() in dark else 1.0)

    off = replace(samples[7], hc_mm=1.3 * samples[7].hc_mm)  # type: ignore[operator]
    frames = [*samples[:7], off]
    rows = dict(evaluate_split(run, judged, frames, "val").table())
    assert rows["readings"] == (
        "5 good, 3 doubtful (3 of 3 doubtful circumferences are within a tenth); good, but not within a tenth: 1"
    ), "two are dark, and the sector cuts the sixth phantom"
    assert "readings" not in dict(evaluate_split(run, SPEC, frames, "val").table()), "no thresholds: nobody knows"


def test_only_binary_masks_are_scored(samples: list[Sample]) -> None:
    with pytest.raises(InputError, match="one mask"):
        evaluate_split(oracle(samples), replace(SPEC, task=Task.CLASSIFY), samples, "val")
    with pytest.raises(InputError, match="no frames"):
        evaluate_split(oracle(samples), SPEC, [], "val")


def test_report_is_plain_data(samples: list[Sample]) -> None:
    text = json.dumps(evaluate_split(oracle(samples), SPEC, samples, "val").to_json())
    assert "0.png" not in text, "hashes stand for files"


@pytest.mark.parametrize("text", ["0.5,x", "1.5", "0"])
def test_thresholds_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="thresholds"):
        parse_thresholds(text)


def test_border_distance_in_pixels_and_mm(samples: list[Sample]) -> None:
    def shift(mask: np.ndarray) -> np.ndarray:
        return np.roll(mask, 4, axis=0)

    report = evaluate_split(oracle(samples, shift), SPEC, samples, "val")
    assert report.hd95_px is not None and report.hd95_mm is not None
    assert 3.0 <= report.hd95_px.mean <= 4.0
    placement = preprocess(samples[0].frame, SPEC.preprocess)[1]
    assert placement.spacing_mm is not None
    assert report.images[0].hd95_mm is not None and report.images[0].hd95_px is not None
    assert report.images[0].hd95_mm == pytest.approx(report.images[0].hd95_px * placement.spacing_mm[0], rel=0.3)
    assert evaluate_split(oracle(samples), SPEC, samples, "val").hd95_px is not None


def test_empty_labels_follow_the_rule_and_paper_mode_the_repository(samples: list[Sample]) -> None:
    blank = [replace(s, mask_HW=np.zeros_like(s.mask_HW)) for s in samples[:2]]
    both = [*samples[2:], *blank]

    def run(tensor: np.ndarray) -> np.ndarray:
        known = oracle(samples[2:])
        try:
            return known(tensor)
        except KeyError:
            return np.full((1, 1, 96, 96), -9.0, np.float32)

    ours = sweep_thresholds(run, SPEC, both, "val", [0.5])[0]
    assert (ours.dice.mean, ours.both_empty) == (1.0, 2)
    assert ours.dice_non_empty is not None and ours.dice_non_empty.num_values == 6
    paper = sweep_thresholds(run, SPEC, both, "val", [0.5], paper=True)[0]
    assert paper.dice.mean == pytest.approx(6 / 8)
    assert any("quirks" in value for _, value in paper.table())


def test_label_masks_of_hc18_overstate_the_circumference(shared_folder: Path) -> None:
    """The reason for the card's remark: the filled outline lies outside the stated ellipse."""
    from tinyusfm_edge.data.table import read_table

    found = read_table(shared_folder / "data" / "hc18", "val", limit=20)
    report = evaluate_split(oracle(found), SPEC, found, "val")
    assert report.label_bias_mm is not None
    assert 0.8 < report.label_bias_mm.mean < 1.7
