"""Golden vectors: same bytes every time, read back as the runtime reads them, tolerances that see what they should."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tinyusfm_export.verify.golden import (
    CEILINGS,
    FLOORS,
    GOLDEN_SEEDS,
    find_tolerance,
    golden_frames,
    pack_frames,
    pack_own,
    pack_reference,
    round_logits,
    stack_logits,
)
from tinyusfm_export.verify.parity import Output, read_output
from tinyusfm_runtime.bundle.arrays import unpack_arrays, unpack_metadata
from tinyusfm_runtime.bundle.golden import NUMBERS, SPEC_DIGEST, golden_check, spec_faults
from tinyusfm_runtime.bundle.reader import frames_from_arrays
from tinyusfm_runtime.errors import EngineError
from tinyusfm_runtime.frame import Frame
from tinyusfm_runtime.numerics.preprocess import Placement, preprocess
from tinyusfm_runtime.reading_rules import Anatomy
from tinyusfm_runtime.spec import ModelSpec, PostProcess, PreprocessSpec, SecondPass, Task

SIDE = 64
SPEC = ModelSpec(
    name="head",
    task=Task.SEGMENT,
    labels=("head",),
    preprocess=PreprocessSpec(height=SIDE, width=SIDE),
    postprocess=PostProcess.ELLIPSE_HC,
)
FRAMES = golden_frames(range(4))
PREPARED = [preprocess(frame, SPEC.preprocess) for frame in FRAMES]
PLACEMENTS: list[Placement] = [placement for _, placement in PREPARED]


def answers(noise: float = 0.0, seed: int = 0) -> list[Output]:
    """A smooth head for each frame, with noise on the logits."""
    rng = np.random.default_rng(seed)
    rows, cols = np.mgrid[0:SIDE, 0:SIDE]
    out = []
    for i, placement in enumerate(PLACEMENTS):
        logits = 18 + i - np.hypot(rows - 32, cols - 30) + noise * rng.normal(size=(SIDE, SIDE))
        out.append(read_output({"logits": logits[None, None].astype(np.float32)}, SPEC, placement))
    return out


def test_there_are_at_least_32_golden_seeds_and_none_is_a_training_seed() -> None:
    assert len(set(GOLDEN_SEEDS)) >= 32
    assert max(GOLDEN_SEEDS) < 1_000_000


def test_frames_come_back_as_they_were_and_pack_to_the_same_bytes() -> None:
    raw = pack_frames(FRAMES)
    assert raw == pack_frames(golden_frames(range(4)))
    back = frames_from_arrays(unpack_arrays(raw, "frames"))
    for want, got in zip(FRAMES, back, strict=True):
        assert np.array_equal(want.pixels, got.pixels)
        assert got.spacing_mm == want.spacing_mm
        assert got.seq == want.seq


def test_the_reference_keeps_every_bit_of_its_logits_and_its_measurements() -> None:
    outputs = answers(0.3)
    raw = pack_reference(outputs, SPEC, PREPARED)
    assert raw == pack_reference(answers(0.3), SPEC, PREPARED)
    arrays = unpack_arrays(raw, "reference")
    assert arrays["logits"].dtype == np.float32
    assert np.array_equal(arrays["logits"], stack_logits(outputs))
    want = [o.answer.measurement.hc_mm for o in outputs if o.answer.measurement is not None]
    assert arrays["readings"][:, NUMBERS.index("hc_mm")].tolist() == want
    assert arrays["readings"][:, NUMBERS.index("found")].all()
    assert unpack_metadata(raw, "reference") == {SPEC_DIGEST: SPEC.digest}


EDITS: dict[str, dict[str, Any]] = {
    "threshold": {"threshold": 0.95},
    "labels": {"labels": ("fetal_abdomen",)},
    "intended use": {"intended_use": "diagnosis"},
    "post-processing": {"postprocess": PostProcess.MASK},
    "least area": {"min_area": 0.9},
    "second pass": {"second_pass": SecondPass.ALWAYS},
    "anatomy": {"anatomy": Anatomy(name="head", size_mm=(1, 9))},
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS.keys())
def test_answers_that_another_spec_reads_are_noticed(edit: dict[str, Any]) -> None:
    raw = pack_own(answers(0.3), SPEC, PREPARED)
    arrays, digest = unpack_arrays(raw, "own"), unpack_metadata(raw, "own")[SPEC_DIGEST]
    assert spec_faults(arrays, digest, SPEC, PREPARED, range(4)) == ()
    assert spec_faults(arrays, digest, replace(SPEC, **edit), PREPARED, range(4))


def test_a_threshold_or_spacing_is_noticed_even_where_the_digest_was_forged() -> None:
    arrays = unpack_arrays(pack_own(answers(0.3), SPEC, PREPARED), "own")
    moved = replace(SPEC, threshold=0.95)
    assert spec_faults(arrays, moved.digest, moved, PREPARED, range(4))
    wider = [(tensor, replace(placement, spacing_mm=(9.0, 9.0))) for tensor, placement in PREPARED]
    assert spec_faults(arrays, SPEC.digest, SPEC, wider, range(4))
    assert spec_faults({"logits": arrays["logits"]}, SPEC.digest, SPEC, PREPARED, range(4)), "no readings at all"


def test_stored_answers_that_are_not_finite_are_a_fault_like_any_other() -> None:
    arrays = dict(unpack_arrays(pack_own(answers(0.3), SPEC, PREPARED), "own"))
    arrays["logits"] = arrays["logits"].copy()
    arrays["logits"][1].flat[0] = np.nan
    assert spec_faults(arrays, SPEC.digest, SPEC, PREPARED, range(4))


def test_a_head_that_was_not_found_is_stored_as_no_number() -> None:
    empty = read_output({"logits": np.full((1, 1, SIDE, SIDE), -1, np.float32)}, SPEC, PLACEMENTS[0])
    arrays = unpack_arrays(pack_reference([empty], SPEC, PREPARED[:1]), "reference")
    assert np.isnan(arrays["readings"][0, NUMBERS.index("hc_mm")])
    assert not arrays["readings"][0, NUMBERS.index("found")]


def test_rounding_the_own_logits_moves_no_pixel_of_a_mask() -> None:
    outputs = answers(2.0)
    rounded = round_logits(outputs)
    assert rounded.dtype == np.float16
    assert np.array_equal(rounded > 0, stack_logits(outputs) > 0)
    assert len(pack_own(outputs, SPEC, PREPARED)) < len(pack_reference(outputs, SPEC, PREPARED))


def test_logits_too_large_for_float16_stay_finite() -> None:
    huge = read_output({"logits": np.full((1, 1, SIDE, SIDE), 1e6, np.float32)}, SPEC, PLACEMENTS[0])
    assert np.isfinite(round_logits([huge])).all()


def tolerance(drift: float, noise: float) -> dict[str, float]:
    own = answers(drift, seed=1)
    moved = [
        read_output(
            {"logits": output.logits + np.float32(noise) * np.float32(np.cos(np.arange(SIDE)))}, SPEC, placement
        )
        for output, placement in zip(own, PLACEMENTS, strict=True)
    ]
    return find_tolerance(own, [own, moved], answers(), SPEC, PLACEMENTS)


def test_an_artefact_that_repeats_itself_passes_its_own_tolerance_and_another_one_does_not() -> None:
    own = answers(0.02, seed=1)
    limits = find_tolerance(own, [own], answers(), SPEC, PLACEMENTS)
    stored = round_logits(own)
    assert golden_check(stack_logits(own), stored, SPEC, PLACEMENTS, limits)
    # the control: the same artefact as if computed in a coarser precision
    assert not golden_check(stack_logits(answers(0.2, seed=2)), stored, SPEC, PLACEMENTS, limits)


def test_a_tolerance_grows_with_the_noise_and_with_the_distance_from_the_reference() -> None:
    calm, noisy, far = tolerance(0.0, 0.0), tolerance(0.0, 0.02), tolerance(0.5, 0.0)
    assert FLOORS["logit_abs"] <= calm["logit_abs"] < noisy["logit_abs"]
    assert calm["logit_abs"] < far["logit_abs"]
    assert noisy["logit_abs"] > 4 * 0.018


def test_a_tolerance_never_grows_beyond_what_the_gate_allows() -> None:
    far = tolerance(5.0, 0.0)
    assert far["differing_pixels"] <= CEILINGS["differing_pixels"] + FLOORS["differing_pixels"]
    assert far["hc_mm"] <= CEILINGS["hc_mm"] + FLOORS["hc_mm"]


def test_an_artefact_that_does_not_repeat_itself_is_refused() -> None:
    own = answers(0.0)
    with pytest.raises(EngineError, match="does not repeat itself"):
        find_tolerance(own, [own, answers(6.0, seed=9)], answers(), SPEC, PLACEMENTS)


def test_an_artefact_that_gives_nan_is_refused() -> None:
    own = answers(0.0)
    bad = own[0].logits.copy()
    bad[0, 0, 0, 0] = np.nan
    broken = [read_output({"logits": bad}, SPEC, PLACEMENTS[0]), *own[1:]]
    with pytest.raises(EngineError, match="does not repeat itself"):
        find_tolerance(broken, [broken], own, SPEC, PLACEMENTS)


def test_scores_have_a_tolerance_on_logits_alone() -> None:
    spec = ModelSpec(name="s", task=Task.CLASSIFY, labels=("a", "b"))
    frame = Frame(pixels=np.zeros((8, 8), np.uint8))
    own = [read_output({"logits": np.array([[1.0, 2.0]], np.float32)}, spec, preprocess(frame, spec.preprocess)[1])]
    assert find_tolerance(own, [own], own, spec, [PLACEMENTS[0]]) == {"logit_abs": FLOORS["logit_abs"]}
    arrays = unpack_arrays(pack_reference(own, spec, [preprocess(frame, spec.preprocess)]), "r")
    assert set(arrays) == {"logits", "readings"} and arrays["readings"][0].sum() == pytest.approx(1)
