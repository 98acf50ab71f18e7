"""Leakage: no image may calibrate and be tested on.

It compares hashes and knows nothing of files, splits or patients.
"""

from __future__ import annotations

from collections.abc import Iterable

from tinyusfm_runtime.errors import CalibrationError


def check_leakage(calibration_hashes: Iterable[str], test_hashes: Iterable[str]) -> None:
    """Refuses frames that stand on both sides.

    Args:
        calibration_hashes: sha256 of calibration files and pixels, hex.
        test_hashes: sha256 of the test split's files and pixels, hex.

    Raises:
        CalibrationError: naming how many hashes are shared.
    """
    shared = {h.lower() for h in calibration_hashes} & {h.lower() for h in test_hashes}
    if shared:
        raise CalibrationError(
            f"{len(shared)} calibration frame(s) also stand in the test split (first {min(shared)[:12]}): "
            "calibrate on the train or val split"
        )


__all__ = ["check_leakage"]
