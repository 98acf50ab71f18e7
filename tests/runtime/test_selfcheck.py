"""Golden checks: the numbers are right, and nothing that is not finite or not there passes."""

from __future__ import annotations

import numpy as np
import pytest

from tests.conftest import SIDE, tiny_logits, tiny_spec
from tinyusfm_runtime.phantom import make_phantom
from tinyusfm_runtime.preprocess import place, preprocess
from tinyusfm_runtime.selfcheck import golden_check, reference_check
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
