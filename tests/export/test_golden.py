"""Golden vectors: same bytes every time, read back as the runtime reads them, tolerances that see what they should."""

from __future__ import annotations

import numpy as np
import pytest

from tinyusfm_export.golden import (
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
from tinyusfm_export.parity import Output, read_output
from tinyusfm_runtime.arrays import unpack_arrays
from tinyusfm_runtime.bundle import frames_from_arrays
from tinyusfm_runtime.errors import EngineError
from tinyusfm_runtime.frame import Frame
from tinyusfm_runtime.preprocess import Placement, preprocess
from tinyusfm_runtime.selfcheck import golden_check
from tinyusfm_runtime.spec import ModelSpec, PostProcess, PreprocessSpec, Task

SIDE = 64
SPEC = ModelSpec(
    name="head",
    task=Task.SEGMENT,
    labels=("head",),
    preprocess=PreprocessSpec(height=SIDE, width=SIDE),
    postprocess=PostProcess.ELLIPSE_HC,
)
FRAMES = golden_frames(range(4))
PLACEMENTS: list[Placement] = [preprocess(frame, SPEC.preprocess)[1] for frame in FRAMES]


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
    raw = pack_reference(outputs)
    assert raw == pack_reference(answers(0.3))
    arrays = unpack_arrays(raw, "reference")
    assert arrays["logits"].dtype == np.float32
    assert np.array_equal(arrays["logits"], stack_logits(outputs))
    assert np.array_equal(arrays["masks"], np.stack([o.mask_HW for o in outputs if o.mask_HW is not None]))
    want = [o.answer.measurement.hc_mm for o in outputs if o.answer.measurement is not None]
    assert arrays["hc_mm"].tolist() == want
    assert arrays["found"].all()


def test_a_head_that_was_not_found_is_stored_as_no_number() -> None:
    empty = read_output({"logits": np.full((1, 1, SIDE, SIDE), -1, np.float32)}, SPEC, PLACEMENTS[0])
    arrays = unpack_arrays(pack_reference([empty]), "reference")
    assert np.isnan(arrays["hc_mm"][0])
    assert not arrays["found"][0]


def test_rounding_the_own_logits_moves_no_pixel_of_a_mask() -> None:
    outputs = answers(2.0)
    rounded = round_logits(outputs)
    assert rounded.dtype == np.float16
    assert np.array_equal(rounded > 0, stack_logits(outputs) > 0)
    assert len(pack_own(outputs)) < len(pack_reference(outputs))


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
    assert set(unpack_arrays(pack_reference(own), "r")) == {"logits"}
