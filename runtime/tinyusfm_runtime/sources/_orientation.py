"""PLUS's orientation letters: what they say, and what is made of them.

The first letter is the side that columns grow towards (M marked, U unmarked), the second the end that rows grow towards
(F far from the transducer, N near it). Frames with the transducer at the bottom are upside down for a model that was
trained on images with the transducer at the top.
"""

from __future__ import annotations

from tinyusfm_runtime.sources._findings import Findings


def note_orientation(orientation: str | None, findings: Findings) -> None:
    """Says what a live source's orientation means.

    For frames that are handed on as they come.

    Args:
        orientation: two letters, or None.
        findings: takes a note of it.
    """
    if orientation and orientation[1:2] == "N":
        findings.note(f"orientation {orientation}: the transducer is at the bottom, and frames are not turned")


__all__ = ["note_orientation"]
