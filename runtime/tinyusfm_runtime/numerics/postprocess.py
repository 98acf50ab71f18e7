"""Logits -> answer: mask, measurements of its labels, or scores.

The one definition.

It applies the model's own post-processing and withdraws everything when an output is not finite: an
image that cannot be trusted is never shown as a mask. It does not know engines, bundles or time; the
arithmetic itself is in measure.py, whether an answer is good in reading.py.

Shapes: NKHW = 1, classes, rows, columns; NK = 1, classes; HW = rows, columns of the model's input.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from tinyusfm_runtime.errors import EngineError
from tinyusfm_runtime.numerics.preprocess import Placement
from tinyusfm_runtime.spec import LOGITS_NAME, ModelSpec, PostProcess, Task

if TYPE_CHECKING:
    from tinyusfm_runtime.numerics.measure import Measurement


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What a model says about one tensor.

    Attributes:
        valid: False if any output was not finite; everything else is then None or empty.
        mask_HW: uint8 label map at the input's size (0/1 for one channel; a head's largest component), or None.
        scores: float32 K, probabilities of a classifier; a feature model's raw values in their own shape; or None.
        measurements: of a mask, one for each label but the background, in the labels' order; else none.
        auxiliary: further outputs of the graph by name.
    """

    valid: bool
    mask_HW: np.ndarray | None = None
    scores: np.ndarray | None = None
    measurements: tuple[Measurement, ...] = ()
    auxiliary: Mapping[str, np.ndarray]

    @property
    def measurement(self) -> Measurement | None:
        """Of the first label, or None."""
        return self.measurements[0] if self.measurements else None


def answer(
    outputs: Mapping[str, np.ndarray], spec: ModelSpec, placement: Placement, *, codes_HW: np.ndarray | None = None
) -> Answer:
    """Makes a model's answer out of an engine's outputs.

    Args:
        outputs: ``logits`` (float32 NKHW or NK) and auxiliary outputs.
        spec: the model.
        placement: where the frame lies in the input.
        codes_HW: the input's brightness, by which a mask that the field of view cuts is known; None leaves that out.

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
        mask, measurements = _mask_and_measurements(logits, spec, placement, codes_HW)
        return Answer(valid=True, mask_HW=mask, measurements=measurements, auxiliary=auxiliary)
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
    """Softmax of K > 1 logits, sigmoid of one; as in exact.py, float32 at the end."""
    from tinyusfm_runtime.numerics.exact import sigmoid, softmax

    return (sigmoid(logits_K) if logits_K.size == 1 else softmax(logits_K)).astype(np.float32)


def _mask_and_measurements(
    logits: np.ndarray, spec: ModelSpec, placement: Placement, codes_HW: np.ndarray | None
) -> tuple[np.ndarray, tuple[Measurement, ...]]:
    from tinyusfm_runtime.numerics.measure import LabelRequest, binary_mask, measure_label

    mask = _inside(binary_mask(logits, spec.threshold), placement)
    ellipse = spec.postprocess is PostProcess.ELLIPSE_HC
    # of an ellipse model label 1 is the head, should there be more labels than background and head
    labels = spec.read_labels[:1] if ellipse else spec.read_labels[: max(1, logits.shape[1] - 1)]
    found = []
    for index, label in enumerate(labels, start=1):
        asked = LabelRequest(
            label=label, index=index, threshold=spec.threshold, min_area=spec.min_area, ellipse=ellipse
        )
        component, measured = measure_label(mask, logits, placement, asked, codes_HW)
        found.append(measured)
        if ellipse:
            mask = component if measured.found else np.zeros_like(mask)
    return mask, tuple(found)


def _inside(mask_HW: np.ndarray, placement: Placement) -> np.ndarray:
    """Clears what a model says about the black bars of a letterbox: no frame is there."""
    row, col, height, width = placement.box
    if (height, width) == mask_HW.shape:
        return mask_HW
    kept = np.zeros_like(mask_HW)
    kept[row : row + height, col : col + width] = mask_HW[row : row + height, col : col + width]
    return kept


__all__ = ["Answer", "answer", "check_logits", "probabilities"]
