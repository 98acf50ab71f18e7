"""Confidence: how far an artefact's probabilities moved.

Beside it, whether its decisions did.

INT8 can leave every mask in place and still make a model surer or less sure of itself, which moves every threshold that
a user sets on a score. Measured over the gate's frames, artefact against float32 reference:

* ``probability_change``: mean absolute change of a probability.
* ``confidence_shift``: mean confidence (the probability of the decision taken) of the artefact minus the reference's.
* ``threshold_shift``: for one-channel masks, the threshold at which the artefact marks as many pixels as the reference
  does at the model's own, minus that one; by bisection on the pooled probabilities.
* ``ece_reference``, ``ece_artefact``: expected calibration error in 15 bins of equal width (Guo et al., ICML 2017,
  eq. 3), only where the truth of the frames is at hand.
* ``flicker_excess``: over consecutive frames of a clip, mean of 1 - Dice of neighbouring masks (or mean change of the
  probabilities of a classifier), the artefact's minus the reference's: above 0 the artefact is less steady.

numpy only; it does not know engines or where truth comes from.

Shapes: NKHW or NK logits; HW masks; P pooled decisions.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tinyusfm_export.verify.parity import Output
from tinyusfm_runtime.spec import ModelSpec, Task

ECE_BINS = 15
"""As in Guo et al."""
CLIP_MARK = "#"
"""Frames ``NAME#0``, ``NAME#1``, ... are consecutive frames of one clip."""

Truth = np.ndarray | int | None
"""A label map HW at the input's size, the index of the right class, or None where it is not known."""


def confidence_drift(
    spec: ModelSpec,
    ids: Sequence[str],
    reference: Sequence[Output],
    found: Sequence[Output],
    truths: Sequence[Truth] = (),
) -> dict[str, float]:
    """Measures what the module's docstring names.

    Args:
        spec: the model.
        ids: names of the frames, in order.
        reference: the reference's answers.
        found: the artefact's.
        truths: what is right on each frame, or nothing.

    Returns:
        Name -> number; what cannot be measured is absent. Empty for feature models and broken outputs.
    """
    if spec.task is Task.FEATURES or not all(output.answer.valid for output in (*reference, *found)):
        return {}
    before = [probabilities(output.logits) for output in reference]
    after = [probabilities(output.logits) for output in found]
    numbers = {
        "probability_change": float(np.mean([np.abs(a - b).mean() for a, b in zip(after, before, strict=True)])),
        "confidence_shift": float(np.mean([_confidence(a, spec).mean() for a in after]))
        - float(np.mean([_confidence(b, spec).mean() for b in before])),
    }
    if spec.task is Task.SEGMENT and before[0].shape[1] == 1:
        numbers["threshold_shift"] = threshold_shift(before, after, spec.threshold)
    known = [i for i, truth in enumerate(truths) if truth is not None]
    if known:
        for name, side in (("ece_reference", before), ("ece_artefact", after)):
            numbers[name] = _ece_of([side[i] for i in known], [truths[i] for i in known], spec)
    excess = flicker_excess(ids, reference, found, spec)
    if excess is not None:
        numbers["flicker_excess"] = excess
    return numbers


def probabilities(logits: np.ndarray) -> np.ndarray:
    """Sigmoid of one channel, else softmax over the channels.

    float64, of the logits' shape.
    """
    x = logits.astype(np.float64)
    if x.shape[1] == 1:
        return np.asarray(1.0 / (1.0 + np.exp(-np.clip(x, -60, 60))))
    shifted = np.exp(x - x.max(1, keepdims=True))
    return np.asarray(shifted / shifted.sum(1, keepdims=True))


def expected_calibration_error(confidence_P: np.ndarray, right_P: np.ndarray, bins: int = ECE_BINS) -> float:
    """Mean over decisions of |accuracy - confidence| of their bin.

    Guo et al. 2017, eq. 3.

    Args:
        confidence_P: probability of the decision taken, 0..1.
        right_P: whether it was right.
        bins: of equal width over 0..1.

    Returns:
        0 for perfect calibration, at most 1; 0 without decisions.
    """
    if confidence_P.size == 0:
        return 0.0
    index = np.minimum((confidence_P * bins).astype(np.int64), bins - 1)
    count = np.bincount(index, minlength=bins)
    gap = np.bincount(index, right_P.astype(np.float64), bins) - np.bincount(index, confidence_P, bins)
    return float(np.abs(gap).sum() / count.sum())


def threshold_shift(before: Sequence[np.ndarray], after: Sequence[np.ndarray], threshold: float) -> float:
    """How far the threshold must move to mark as many pixels.

    As many in the artefact's answer as in the reference's.

    Args:
        before: the reference's probabilities, a frame each.
        after: the artefact's.
        threshold: the model's own.
    """
    wanted = sum(int((p > threshold).sum()) for p in before)
    low, high = 0.0, 1.0
    for _ in range(30):
        middle = (low + high) / 2
        marked = sum(int((p > middle).sum()) for p in after)
        low, high = (middle, high) if marked > wanted else (low, middle)
    return (low + high) / 2 - threshold


def flicker_excess(
    ids: Sequence[str], reference: Sequence[Output], found: Sequence[Output], spec: ModelSpec
) -> float | None:
    """The artefact's flicker minus the reference's; None without any.

    Over consecutive frames.
    """
    pairs = [(i, i + 1) for i in range(len(ids) - 1) if _follows(ids[i], ids[i + 1])]
    if not pairs:
        return None
    moves = [float(np.mean([_move(side[i], side[j], spec) for i, j in pairs])) for side in (found, reference)]
    return moves[0] - moves[1]


def flicker(outputs: Sequence[Output], spec: ModelSpec) -> float:
    """Mean of 1 - Dice of neighbouring masks, or mean change of a probability.

    Args:
        outputs: of consecutive frames of one clip.
        spec: the model.
    """
    moves = [_move(outputs[i], outputs[i + 1], spec) for i in range(len(outputs) - 1)]
    return float(np.mean(moves)) if moves else 0.0


def _follows(first: str, second: str) -> bool:
    (clip, _, a), (same, _, b) = first.rpartition(CLIP_MARK), second.rpartition(CLIP_MARK)
    return bool(clip) and clip == same and a.isdigit() and b.isdigit() and int(b) == int(a) + 1


def _move(first: Output, second: Output, spec: ModelSpec) -> float:
    if spec.task is Task.CLASSIFY or first.mask_HW is None or second.mask_HW is None:
        return float(np.abs(probabilities(first.logits) - probabilities(second.logits)).max())
    a, b = first.mask_HW > 0, second.mask_HW > 0
    total = int(a.sum()) + int(b.sum())
    return 0.0 if total == 0 else 1.0 - 2.0 * int((a & b).sum()) / total


def _confidence(p: np.ndarray, spec: ModelSpec) -> np.ndarray:
    """Probability of the decision taken.

    By threshold for one channel, else the largest.
    """
    if p.shape[1] == 1:
        return np.where(p > spec.threshold, p, 1.0 - p)
    return np.asarray(p.max(1))


def _ece_of(side: Sequence[np.ndarray], truths: Sequence[Truth], spec: ModelSpec) -> float:
    sure, right = [], []
    for p, truth in zip(side, truths, strict=True):
        decided = (p[0, 0] > spec.threshold).astype(np.int64) if p.shape[1] == 1 else p[0].argmax(0)
        sure.append(np.ravel(_confidence(p, spec)))
        right.append(np.ravel(decided == np.asarray(truth)))
    return expected_calibration_error(np.concatenate(sure), np.concatenate(right))


__all__ = [
    "CLIP_MARK",
    "ECE_BINS",
    "Truth",
    "confidence_drift",
    "expected_calibration_error",
    "flicker",
    "flicker_excess",
    "probabilities",
    "threshold_shift",
]
