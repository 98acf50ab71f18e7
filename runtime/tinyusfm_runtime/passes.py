"""One frame through a model: preprocessing, one pass or two, and the answer.

The same offline, live and in every check.

Whether there is a second pass depends on the spec and on the first mask alone, never on time or load, so the same frame
has the same reading everywhere. It does not know sessions or engines: it is handed a function that runs the model.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from tinyusfm_runtime.frame import Frame
from tinyusfm_runtime.numerics.postprocess import Answer, answer, check_logits
from tinyusfm_runtime.numerics.preprocess import Placement, preprocess
from tinyusfm_runtime.reading import Judged, SecondPassState, judge_measurement, judge_scores, top_probability
from tinyusfm_runtime.spec import LOGITS_NAME, ModelSpec, SecondPass, Task

Run = Callable[[np.ndarray], Mapping[str, np.ndarray]]
"""uint8 NCHW input -> outputs by name; they may change when it is called again."""


@dataclass(frozen=True, slots=True)
class Passed:
    """What one frame gave.

    Attributes:
        answer: of all passes.
        logits: float32 logits of the first pass, as the model gave them; owned.
        second_pass: what became of the second pass.
        second_ms: how long it took, 0 where there was none.
    """

    answer: Answer
    logits: np.ndarray
    second_pass: SecondPassState
    second_ms: float = 0.0


def read_outputs(
    outputs: Mapping[str, np.ndarray],
    run: Run,
    spec: ModelSpec,
    frame: Frame | None,
    tensor: np.ndarray,
    placement: Placement,
    *,
    second_pass: bool = True,
    spare: np.ndarray | None = None,
) -> Passed:
    """Makes the answer of a first pass's outputs.

    Looks again where the spec says so.

    Args:
        outputs: of the first pass.
        run: runs the model once more.
        spec: the model.
        frame: the frame, or None where only its tensor is known.
        tensor: input of the first pass.
        placement: where the frame lies in it.
        second_pass: False switches the second pass off.
        spare: tensor for the second pass, filled again; None makes one.

    Raises:
        EngineError: logits are missing, or of another shape or type than the model's.
    """
    first = check_logits(outputs, spec)
    if spec.task is not Task.SEGMENT or spec.second_pass is SecondPass.NEVER:
        return Passed(answer(outputs, spec, placement, codes_HW=tensor[0, 0]), first, SecondPassState.NEVER)
    # the engine may fill its buffers again: what the first pass said is kept before the second one runs
    kept = {name: np.array(value) for name, value in outputs.items()}
    answered = answer(kept, spec, placement, codes_HW=tensor[0, 0])
    if not second_pass or frame is None:
        return Passed(answered, kept[LOGITS_NAME], SecondPassState.OFF)
    region = None if answered.mask_HW is None else _region(answered.mask_HW, spec, placement)
    if region is None:
        return Passed(answered, kept[LOGITS_NAME], SecondPassState.NOT_NEEDED)
    return _second(kept, run, spec, frame, tensor, placement, region, spare)


def confidence_of(passed: Passed, spec: ModelSpec) -> float | None:
    """Mean probability in the first label's mask, or the top one; or None.

    The top probability is that of a classifier.
    """
    answered = passed.answer
    if answered.measurements:
        return answered.measurements[0].confidence
    return top_probability(answered.scores) if answered.scores is not None and spec.task is Task.CLASSIFY else None


def judged_of(passed: Passed, spec: ModelSpec, placement: Placement, *, strange: bool) -> tuple[Judged, ...]:
    """What is thought of each measurement, or of a classifier's answer.

    See reading.py.
    """
    answered = passed.answer
    if answered.scores is not None and spec.task is Task.CLASSIFY:
        return (judge_scores(answered.scores, spec, strange=strange),)
    return tuple(judge_measurement(one, spec, placement, strange=strange) for one in answered.measurements)


def _region(mask_HW: np.ndarray, spec: ModelSpec, placement: Placement) -> tuple[int, int, int, int] | None:
    from tinyusfm_runtime.numerics.second_pass import crop_around, is_small

    if spec.second_pass is SecondPass.SMALL and not is_small(mask_HW, placement):
        return None
    return crop_around(mask_HW, placement)


def _second(
    first: Mapping[str, np.ndarray],
    run: Run,
    spec: ModelSpec,
    frame: Frame,
    tensor: np.ndarray,
    placement: Placement,
    region: tuple[int, int, int, int],
    spare: np.ndarray | None,
) -> Passed:
    from tinyusfm_runtime.numerics.second_pass import blend

    start = time.perf_counter_ns()
    closer, where = preprocess(frame, replace(spec.preprocess, crop=region), spare)
    again = check_logits(run(closer), spec)
    if not np.isfinite(again).all():
        answered = Answer(valid=False, auxiliary={})
    else:
        logits = blend(first[LOGITS_NAME][0], again[0], placement, where)[None]
        answered = answer({**first, LOGITS_NAME: logits}, spec, placement, codes_HW=tensor[0, 0])
    took_ms = (time.perf_counter_ns() - start) / 1e6
    return Passed(answered, first[LOGITS_NAME], SecondPassState.DONE, took_ms)


__all__ = ["Passed", "Run", "confidence_of", "judged_of", "read_outputs"]
