"""Whether a gate has enough frames to be judged on.

Asked before anything is built.

It does not compare anything; the gate itself counts again (gate.py).
"""

from __future__ import annotations

import numpy as np

from tinyusfm_export.verify.expected import Expected
from tinyusfm_export.verify.gate import Gate
from tinyusfm_runtime.errors import GateError
from tinyusfm_runtime.spec import ModelSpec, Task


def check_frame_count(found: int, gate: Gate, source: str) -> None:
    """Refuses fewer frames than the gate is judged on.

    Args:
        found: validation frames.
        gate: thresholds.
        source: the data, in the user's words.

    Raises:
        GateError: how many are needed and found, and both ways out.
    """
    if found < gate.min_frames:
        raise GateError(
            f"nothing was published: needs {gate.min_frames} validation frames, {source} has {found}; "
            f"{_ways_out(found)}"
        )


def check_counted_frames(expected: Expected, spec: ModelSpec, gate: Gate, source: str) -> None:
    """Refuses too few frames in which the student finds a mask.

    Too few are fewer than the gate is judged on.

    Args:
        expected: the reference's answers.
        spec: its spec.
        gate: thresholds.
        source: the data, in the user's words.

    Raises:
        GateError: how many are needed and found, and both ways out.
    """
    if spec.task is not Task.SEGMENT:
        return
    masks = [output.mask_HW for output in expected.outputs]
    counted = [mask is None or np.count_nonzero(mask) >= gate.min_coverage * mask.size for mask in masks]
    found = sum(map(bool, counted))
    if found < gate.min_frames:
        raise GateError(
            f"nothing was published: needs {gate.min_frames} validation frames with a mask of the student (at least "
            f"{gate.min_coverage:.2%} "
            f"of the image), {source} has {found} of {len(masks)}; {_ways_out(found)}"
        )


def _ways_out(found: int) -> str:
    if found < 1:
        return "add frames"
    return f"add frames, or --gate with min_frames = {found}, recorded in the bundle"


__all__ = ["check_counted_frames", "check_frame_count"]
