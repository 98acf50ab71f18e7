"""The sector of one probe, as patches that an artefact looks at.

Around the field of view an ultrasound image is black. An artefact that was exported with ``--sector`` leaves the
patches there out, so it may only be asked about frames whose field of view (shape.py) lies inside. ``SectorWatch``
checks that for the frames of a stream: each of the first ones, then every so often, and each one after a frame that
did not fit, until one fits again. A field of view that is smaller than the sector fits: nothing is lost.

It does not know engines, bundles or how a sector is found.

Shapes: HW = rows, columns of the model's input; one token is a patch of 16x16 pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tinyusfm_runtime.errors import FrameError, SectorError
from tinyusfm_runtime.numerics.shape import field_of_view
from tinyusfm_runtime.reading_rules import TokenSector

FIRST_FRAMES = 8
"""So many frames of a stream are checked one by one."""
EVERY = 16
"""After them one of so many frames is checked."""
OUTSIDE_LIMIT = 0.02
"""Largest share of the field of view that may lie outside the sector."""


def outside_share(sector: TokenSector, codes_HW: np.ndarray) -> float:
    """Share of an input's field of view that lies outside a sector, 0..1.

    Args:
        sector: which patches are looked at.
        codes_HW: uint8 brightness of the model's input.

    Raises:
        FrameError: another size.
    """
    inside = sector.pixels_HW
    if codes_HW.shape != inside.shape:
        raise FrameError(f"an input of {codes_HW.shape} pixels does not fit a sector of {inside.shape}")
    view = field_of_view(codes_HW)
    return float(np.count_nonzero(view & ~inside)) / max(1, int(np.count_nonzero(view)))


class SectorWatch:
    """Checks the frames of one stream against a sector.

    Args:
        sector: which patches the artefact looks at.
        remedy: what to do about a frame that does not fit, for the message.
    """

    def __init__(self, sector: TokenSector, remedy: str = "") -> None:
        self.sector = sector
        self._remedy = remedy
        self._seen = 0

    def restart(self) -> None:
        """Begins a new stream: its first frames are checked one by one."""
        self._seen = 0

    def look(self, tensor: np.ndarray) -> None:
        """Checks one input, if it is its turn.

        Args:
            tensor: uint8 NCHW of the model's input.

        Raises:
            SectorError: too much of the frame's field of view lies where the artefact does not look.
        """
        turn = self._seen < FIRST_FRAMES or self._seen % EVERY == 0
        self._seen += 1
        if not turn:
            return
        share = outside_share(self.sector, tensor[0, 0])
        if share > OUTSIDE_LIMIT:
            self.restart()
            raise SectorError(
                f"the frame shows another sector than {self.sector.name!r}: {100 * share:.0f} % of its field of view "
                f"lies where this artefact does not look{self._remedy}"
            )


def watch_of(sector: TokenSector | None, whole: Sequence[str]) -> SectorWatch | None:
    """What checks the frames of an artefact.

    Args:
        sector: which patches it looks at, or None for all of them.
        whole: names of the bundle's artefacts that look at all patches.

    Returns:
        None where there is nothing to check.
    """
    if sector is None:
        return None
    none = "the bundle has no artefact that looks at all of it, so export it again without --sector-only"
    return SectorWatch(sector, f": {f'open {whole[0]}, or run with --fallback' if whole else none}")


__all__ = ["EVERY", "FIRST_FRAMES", "OUTSIDE_LIMIT", "SectorWatch", "outside_share", "watch_of"]
