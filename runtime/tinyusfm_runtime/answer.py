"""Logits -> answer: mask, largest component and measurement, or scores. The one definition.

It applies the model's own post-processing, in the input's pixels, and withdraws everything when an
output is not finite: a picture that cannot be trusted is never shown as a mask. It does not know
engines, bundles or time; the arithmetic itself is in measure.py.

Shapes: NKHW = 1, classes, rows, columns; NK = 1, classes; HW = rows, columns of the model's input.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from tinyusfm_runtime.engine import LOGITS_NAME
from tinyusfm_runtime.errors import EngineError
from tinyusfm_runtime.preprocess import Placement
from tinyusfm_runtime.spec import ModelSpec, PostProcess, Task

if TYPE_CHECKING:
    from tinyusfm_runtime.measure import HeadMeasurement


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What a model says about one tensor.

    Attributes:
        valid: False if any output was not finite; everything else is then None or empty.
        mask_HW: uint8 label map at the input's size (0/1 for one channel; a head's largest component), or None.
        scores: float32 K, probabilities of a classifier; a feature model's raw values in their own shape; or None.
        measurement: head measurement in mm and input pixels, where the model's post-processing asks for it.
        auxiliary: further outputs of the graph by name.
    """

    valid: bool
    mask_HW: np.ndarray | None = None
    scores: np.ndarray | None = None
    measurement: HeadMeasurement | None = None
    auxiliary: Mapping[str, np.ndarray]


def answer(outputs: Mapping[str, np.ndarray], spec: ModelSpec, placement: Placement) -> Answer:
    """Makes a model's answer out of an engine's outputs.

    Args:
        outputs: ``logits`` (float32 NKHW or NK) and auxiliary outputs.
        spec: the model.
        placement: where the frame lies in the input.

    Returns:
        The answer; the arrays are its own.

    Raises:
        EngineError: logits are missing, or of another shape or type than the model's.
    """
    logits = check_logits(outputs, spec)
    if not all(np.isfinite(value).all() for value in outputs.values() if value.dtype.kind == "f"):
        return Answer(valid=False, auxiliary={})
    auxiliary = {name: value for name, value in outputs.items() if name != LOGITS_NAME}
    if spec.task is Task.SEGMENT:
        mask, measurement = _mask_and_measurement(logits, spec, placement)
        return Answer(valid=True, mask_HW=mask, measurement=measurement, auxiliary=auxiliary)
    scores = probabilities(logits[0]) if spec.task is Task.CLASSIFY else logits[0].copy()
    return Answer(valid=True, scores=scores, auxiliary=auxiliary)


def check_logits(outputs: Mapping[str, np.ndarray], spec: ModelSpec) -> np.ndarray:
    """Takes the logits out of an engine's outputs.

    Returns:
        float32 NKHW for a mask, NK for scores, any shape starting with 1 for features.

    Raises:
        EngineError: logits are missing, or of another shape or type than the model's.
    """
    logits = outputs.get(LOGITS_NAME)
    if logits is None or logits.dtype != np.float32:
        raise EngineError(f"the engine gave no float32 {LOGITS_NAME}")
    height, width = spec.preprocess.height, spec.preprocess.width
    labels = len(spec.labels)
    if spec.task is Task.SEGMENT:
        fits = logits.ndim == 4 and logits.shape[2:] == (height, width) and logits.shape[1] in (1, labels)
    elif spec.task is Task.CLASSIFY:
        fits = logits.ndim == 2 and logits.shape[1] in (1, labels)
    else:
        fits = logits.ndim >= 2
    if not fits or logits.shape[0] != 1:
        raise EngineError(f"the engine gave logits of shape {logits.shape}, which no {spec.task.value} model gives")
    return logits


def probabilities(logits_K: np.ndarray) -> np.ndarray:
    """Softmax of K > 1 logits, sigmoid of one; float64 inside, float32 out."""
    wide = logits_K.astype(np.float64)
    if wide.size == 1:
        return (0.5 * (1.0 + np.tanh(0.5 * wide))).astype(np.float32)
    power = np.exp(wide - wide.max())
    return (power / power.sum()).astype(np.float32)


def _mask_and_measurement(
    logits: np.ndarray, spec: ModelSpec, placement: Placement
) -> tuple[np.ndarray, HeadMeasurement | None]:
    from tinyusfm_runtime.measure import binary_mask, largest_component, measure_head

    mask = _inside(binary_mask(logits, spec.threshold), placement)
    if spec.postprocess is not PostProcess.ELLIPSE_HC:
        return mask, None
    # label 1 is the head, should there be more labels than background and head
    head = largest_component(mask if logits.shape[1] == 1 else (mask == 1).astype(np.uint8))
    row, col, height, width = placement.box
    found = measure_head(np.ascontiguousarray(head[row : row + height, col : col + width]), placement.spacing_mm)
    if found.found and (row, col) != (0, 0):
        found = replace(found, centre_px=(found.centre_px[0] + row, found.centre_px[1] + col))
    return head, found


def _inside(mask_HW: np.ndarray, placement: Placement) -> np.ndarray:
    """Clears what a model says about the black bars of a letterbox: no frame is there."""
    row, col, height, width = placement.box
    if (height, width) == mask_HW.shape:
        return mask_HW
    kept = np.zeros_like(mask_HW)
    kept[row : row + height, col : col + width] = mask_HW[row : row + height, col : col + width]
    return kept


__all__ = ["Answer", "answer", "check_logits", "probabilities"]
