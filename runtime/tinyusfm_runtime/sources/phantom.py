"""Source ``phantom:SEED`` or ``phantom:FIRST-LAST``: synthetic heads.

They are drawn one after another.

Needs nothing but numpy, so it is there when no other source is. It knows nothing of truth masks;
whoever wants those calls ``make_phantom`` with the same seeds.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from dataclasses import replace

from tinyusfm_runtime.errors import SourceError
from tinyusfm_runtime.frame import Frame
from tinyusfm_runtime.phantom import make_phantom
from tinyusfm_runtime.plugins import Availability
from tinyusfm_runtime.sources._source import ReportingSource

MAX_FRAMES = 100_000
"""Upper bound of one range; a typing slip should not run for days."""
FRAME_PERIOD_NS = 33_333_333
"""A phantom's own clock runs at 30 frames per second."""


def available() -> Availability:
    """Always works: numpy only."""
    return Availability(usable=True, reason="numpy only", extra=None)


def accepts(location: str) -> bool:
    """True for the scheme ``phantom:``."""
    return location.startswith("phantom:")


def open_source(location: str, *, height: int = 270, width: int = 400) -> PhantomSource:
    """Opens a range of seeds.

    Args:
        location: ``phantom:7`` for one frame, ``phantom:0-31`` for 32.
        height: rows of each frame, 64 to 4096.
        width: columns of each frame, 64 to 4096.

    Returns:
        The source; ``seq`` runs from 0, spacing is the phantom's own.

    Raises:
        SourceError: the range or the size cannot be used.
    """
    match = re.fullmatch(r"(?:phantom:)?(\d{1,9})(?:-(\d{1,9}))?", location)
    if match is None:
        raise SourceError("a phantom source is written phantom:SEED or phantom:FIRST-LAST, such as phantom:0-31")
    first = int(match[1])
    last = first if match[2] is None else int(match[2])
    if last < first or last - first >= MAX_FRAMES:
        raise SourceError(
            f"phantom range {first}-{last}: the last seed must not lie before the first, {MAX_FRAMES} frames at most"
        )
    if not (64 <= height <= 4096 and 64 <= width <= 4096):
        raise SourceError(f"a phantom of {height}x{width} rows x columns: each side must be 64 to 4096")
    return PhantomSource(range(first, last + 1), height, width)


class PhantomSource(ReportingSource):
    """Draws the phantoms of a range of seeds."""

    def __init__(self, seeds: range, height: int, width: int) -> None:
        super().__init__()
        self.seeds, self.height, self.width = seeds, height, width

    def __len__(self) -> int:
        return len(self.seeds)

    def __iter__(self) -> Iterator[Frame]:
        for seq, seed in enumerate(self.seeds):
            frame = make_phantom(seed, height=self.height, width=self.width).frame
            yield replace(frame, seq=seq, t_source_ns=seq * FRAME_PERIOD_NS, t_recv_ns=time.monotonic_ns())


__all__ = ["FRAME_PERIOD_NS", "MAX_FRAMES", "PhantomSource", "accepts", "available", "open_source"]
