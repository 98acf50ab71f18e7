"""Calibration: which frames, what ranges, and no leak from the test split.

It needs numpy and the runtime only.

It does not know torch, targets or how a range becomes INT8.
"""

from tinyusfm_calibration.leakage import check_leakage
from tinyusfm_calibration.ranges import Ranges, collect_ranges
from tinyusfm_calibration.sets import CalibrationSet, NamedFrame, describe_frames, draw, load_declaration

__all__ = [
    "CalibrationSet",
    "NamedFrame",
    "Ranges",
    "check_leakage",
    "collect_ranges",
    "describe_frames",
    "draw",
    "load_declaration",
]
