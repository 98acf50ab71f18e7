"""Stress: a perfect reader stays perfect under every change of geometry, and a blind one is found out."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tinyusfm_edge.data.ellipses import Ellipse
from tinyusfm_edge.data.table import Sample
from tinyusfm_edge.evaluation.stress import CHANGES, stress
from tinyusfm_runtime.errors import InputError
from tinyusfm_runtime.frame import Frame
from tinyusfm_runtime.reading_rules import LabelThresholds, ReadingRates, ReadingRules
from tinyusfm_runtime.spec import ModelSpec, PostProcess, PreprocessSpec, SecondPass, Task

SPEC = ModelSpec(
    name="oracle",
    task=Task.SEGMENT,
    labels=("head",),
    preprocess=PreprocessSpec(height=224, width=224),
    postprocess=PostProcess.ELLIPSE_HC,
)


def head(grey: int = 220) -> Sample:
    """A bright ellipse on dark: thresholding is a perfect model."""
    ellipse = Ellipse.from_axes((200.0, 130.0), 70.0, 50.0, 20.0)
    inside = ellipse.coverage(256, 380) >= 0.5
    pixels = np.where(inside, grey, 20).astype(np.uint8)
    frame = Frame(pixels=pixels, spacing_mm=(0.4, 0.4))
    return Sample(
        id="a",
        group="g",
        frame=frame,
        mask_HW=inside.astype(np.uint8),
        hc_mm=ellipse.circumference((0.4, 0.4)),
        sha256="0" * 64,
        ellipse=ellipse,
        original_hw=(256, 380),
    )


def bright(tensor: np.ndarray) -> np.ndarray:
    return np.where(tensor > 120, 10.0, -10.0).astype(np.float32)


@pytest.mark.parametrize(
    "name", ["none", "zoom out 0.6", "zoom out 0.4", "rotate 90", "rotate 30", "mirrored across", "bars to 16:9"]
)
def test_geometry_moves_frame_ellipse_and_spacing_alike(name: str) -> None:
    (row,) = stress(bright, SPEC, [head()], (name,))
    assert row.dice > 0.97 and row.lost == 0
    assert row.hc_mae_mm is not None and row.hc_mae_mm < 0.01 * head().hc_mm  # type: ignore[operator]


def test_a_model_that_follows_the_screen_is_caught() -> None:
    """The whole screen holds bright writing, which this model takes in: wrong, and without a flag."""
    (row,) = stress(
        lambda tensor: np.where(tensor > 30, 9.0, -9.0).astype(np.float32), SPEC, [head()], ("whole screen",)
    )
    assert row.dice < 0.9
    (shaded,) = stress(bright, SPEC, [head()], ("shadow, one wide",))
    assert shaded.dice < 0.97, "a shadow hides part of the head from a threshold"


def test_what_the_thresholds_call_doubtful_is_not_silent() -> None:
    off = replace(head(), hc_mm=1.3 * head().hc_mm)  # type: ignore[operator]
    rates = ReadingRates(
        frames=9, groups=9, good=9, doubtful=0, none=0, wrong=0, good_but_wrong=0, doubtful_but_right=0,
        good_but_wrong_limit=0.3, wrong_means="off",
    )  # fmt: skip
    judged = replace(
        SPEC, reading=ReadingRules(thresholds=(LabelThresholds(label="head", confidence=0.9),), rates=rates)
    )

    def unsure(tensor: np.ndarray) -> np.ndarray:
        return np.where(tensor > 120, 1.0, -1.0).astype(np.float32)

    found = [stress(run, spec, [off], ("none",))[0] for run in (unsure, bright) for spec in (SPEC, judged)]
    assert [(row.wrong, row.silent) for row in found] == [(1, 1), (1, 0), (1, 1), (1, 1)]


def test_small_heads_are_looked_at_twice_as_the_model_says() -> None:
    runs = []

    def counted(tensor: np.ndarray) -> np.ndarray:
        runs.append(tensor.shape)
        return bright(tensor)

    for when, count in ((SecondPass.NEVER, 1), (SecondPass.SMALL, 2)):
        runs.clear()
        stress(counted, replace(SPEC, second_pass=when), [head()], ("zoom out 0.6",))
        assert len(runs) == count


def test_a_blind_model_loses_every_frame_and_unknown_names_are_refused() -> None:
    (row,) = stress(lambda tensor: np.full(tensor.shape, -5.0, np.float32), SPEC, [head()], ("none",))
    assert (row.lost, row.dice, row.measured) == (1, 0.0, 0)
    with pytest.raises(InputError, match="known transformations"):
        stress(bright, SPEC, [head()], ("sunshine",))
    several = replace(SPEC, labels=("head", "body"), postprocess=PostProcess.MASK)
    with pytest.raises(InputError, match="does not answer with one mask"):
        stress(bright, several, [head()], ("none",))
    assert len(CHANGES) > 20
