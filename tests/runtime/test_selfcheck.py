"""Golden checks: the numbers are right, and nothing that is not finite or not there passes."""

from __future__ import annotations

import numpy as np
import pytest

from tests.conftest import SIDE, tiny_logits, tiny_spec
from tinyusfm_runtime.bundle.golden import golden_check, reference_check
from tinyusfm_runtime.numerics.preprocess import place, preprocess
from tinyusfm_runtime.phantom import make_phantom
from tinyusfm_runtime.spec import PostProcess, Task


def test_golden_check_counts_what_differs() -> None:
    spec = tiny_spec()
    frame = make_phantom(0, height=96, width=128).frame
    placement = place(frame, spec.preprocess)
    want = tiny_logits(preprocess(frame, spec.preprocess)[0])
    got = want.copy()
    flat = np.flatnonzero(np.abs(got) > 1)[:41]
    got.flat[flat] *= -1
    report = golden_check(got, want, spec, [placement], {"logit_abs": 100, "differing_pixels": 1, "hc_mm": 1000})
    assert report
    assert report.numbers["logit_abs"] == pytest.approx(2 * np.abs(want.flat[flat]).max(), rel=1e-6)
    assert not golden_check(got, want, spec, [placement], {})
    assert golden_check(want, want, spec, [placement], {}), "equal is within any tolerance"
    assert not golden_check(want[:0], want[:0], spec, [], {}), "nothing compared proves nothing"
    assert not golden_check(want[:, :, :9], want, spec, [placement], {"logit_abs": 100})
    one_mask_pixel = {"logit_abs": 100, "differing_pixels": 1 / SIDE**2, "hc_mm": 1000}
    single = want.copy()
    single[0, 0][tuple(np.argwhere(want[0, 0] > 0)[0])] = -9
    assert golden_check(single, want, spec, [placement], one_mask_pixel).numbers["differing_pixels"] <= 1 / SIDE**2


def test_the_worst_frame_counts() -> None:
    spec = tiny_spec()
    frame = make_phantom(0, height=96, width=128).frame
    placements = [place(frame, spec.preprocess)] * 3
    want = np.repeat(tiny_logits(preprocess(frame, spec.preprocess)[0]), 3, axis=0)
    got = want.copy()
    got[1] = -9
    numbers = golden_check(got, want, spec, placements, {}).numbers
    assert numbers["differing_pixels"] > 0.05 and numbers["hc_mm"] > 10
    against = reference_check(got, want, spec, placements)
    assert against.numbers["dice_worst"] == 0 and against.numbers["dice_mean"] == pytest.approx(2 / 3)
    assert against.numbers["hc_p95_mm"] > 10 and not against


def test_small_masks_are_judged_by_their_pixels() -> None:
    spec = tiny_spec()
    placements = [place(make_phantom(0, height=96, width=128).frame, spec.preprocess)] * 2
    want = np.full((2, 1, SIDE, SIDE), -5, np.float32)
    got = want.copy()
    got[1, 0, :4, :4] = 5
    report = reference_check(got, want, spec, placements)
    assert set(report.numbers) == {"differing_pixels"} and report.numbers["differing_pixels"] == 16 / SIDE**2
    assert report
    got[1, 0, :5, :5] = 5
    assert not reference_check(got, want, spec, placements)


def test_reference_check_of_other_tasks() -> None:
    rng = np.random.default_rng(2)
    classify = tiny_spec(task=Task.CLASSIFY, labels=("a", "b", "c"), postprocess=PostProcess.NONE)
    logits = rng.normal(0, 3, (40, 3)).astype(np.float32)
    assert reference_check(logits, logits, classify, [])
    assert not reference_check(logits[:, ::-1].copy(), logits, classify, [])
    assert not reference_check(np.full_like(logits, np.nan), logits, classify, [])
    features = tiny_spec(task=Task.FEATURES, postprocess=PostProcess.NONE)
    assert reference_check(2 * logits, logits, features, [])
    assert not reference_check(logits + 3, logits, features, [])
    assert not reference_check(np.full_like(logits, np.inf), logits, features, [])
