"""Spacing rules that all sources share.

Millimetres belong to a frame, and figures that cannot be are never handed on.

A spacing is (row, column), the distance of neighbouring pixel centres in mm. It does not know any file or model.
"""

from __future__ import annotations

from tinyusfm_runtime.errors import FrameError
from tinyusfm_runtime.sources._findings import Findings

Spacing = tuple[float, float]
PLAUSIBLE_MM = (0.01, 1.0)
"""Least and largest distance of pixels that an ultrasound image has; below and above it units were mixed up."""
SAME = 0.02
"""Two ratios that differ by less are one: densities in headers are rounded."""


class SpacingRule:
    """Decides which spacing a frame carries.

    A spacing that the user gives was measured on images of one size: frames of another size than the first carry none.
    The same holds where the source's own spacing changes below a given one: depth was changed. A spacing that cannot be
    is not handed on. Each of these is a doubt.

    Args:
        given: (row, column) that overrules what frames bring, mm, or None.
        findings: takes the doubts.
    """

    def __init__(self, given: Spacing | None, findings: Findings) -> None:
        self.given = given
        self._findings = findings
        self._size: tuple[int, ...] | None = None
        self._own: Spacing | None = None

    def of(self, size: tuple[int, ...], own: Spacing | None = None, aspect: float | None = None) -> Spacing | None:
        """The spacing of a frame.

        Args:
            size: (rows, columns) before any crop.
            own: what the frame itself brings, mm, or None.
            aspect: shape of its pixels where the file tells it, see ``with_aspect``.

        Raises:
            FrameError: the given spacing says another shape of pixels than the file.
        """
        if self.given is None:
            return plausible(own, self._findings) if own else with_aspect(None, aspect, self._findings)
        if own is not None and self._own is None:
            self._own = own
            if not _alike(own, self.given):
                self._findings.note(f"the given spacing overrules the source's own {own[0]:.4g},{own[1]:.4g} mm")
        if self._size is None:
            self._size = size[:2]
        if size[:2] != self._size:
            self._findings.doubt(
                f"the frame size changes: the given spacing was measured on {self._size[1]}x{self._size[0]} pixels, "
                "frames of other sizes carry no millimetres"
            )
            return None
        if own is not None and self._own is not None and not _alike(own, self._own):
            self._findings.doubt(
                "the source's own spacing changes while another is given: frames after the change carry no millimetres"
            )
            return None
        return plausible(with_aspect(self.given, aspect, self._findings), self._findings)


def plausible(spacing_mm: Spacing | None, findings: Findings) -> Spacing | None:
    """A spacing, or None and a doubt where no ultrasound image has it.

    Args:
        spacing_mm: (row, column), mm, or None.
        findings: takes the doubt.
    """
    low, high = PLAUSIBLE_MM
    if spacing_mm is None or all(low <= side <= high for side in spacing_mm):
        return spacing_mm
    shown = ",".join(f"{side:.4g}" for side in spacing_mm)
    hint = "are these centimetres?" if min(spacing_mm) < low else "are these micrometres, or a unit that is mistaken?"
    findings.doubt(
        f"a pixel spacing of {shown} mm lies outside {low:g} to {high:g} mm ({hint}): no millimetres are given"
    )
    return None


def _alike(one: Spacing, other: Spacing) -> bool:
    return all(abs(a / b - 1) <= SAME for a, b in zip(one, other, strict=True))


def with_aspect(spacing_mm: Spacing | None, aspect: float | None, findings: Findings) -> Spacing | None:
    """A given spacing, made to fit what a file says about the shape of its pixels.

    Args:
        spacing_mm: (row, column) as given, or None.
        aspect: column spacing divided by row spacing as the file tells it, or None if it tells nothing.
        findings: called with what was obeyed.

    Returns:
        The spacing; a square one is stretched along the columns.

    Raises:
        FrameError: the given spacing says another shape than the file.
    """
    if aspect is None:
        return spacing_mm
    if spacing_mm is None:
        findings.note(f"the file says that pixels are not square (columns {aspect:.4g} times as wide as rows)")
        return None
    given = spacing_mm[1] / spacing_mm[0]
    if abs(given / aspect - 1) <= SAME:
        return spacing_mm
    if abs(given - 1) > SAME:
        raise FrameError(
            f"the spacing says that columns are {given:.4g} times as wide as rows, the file says {aspect:.4g} times: "
            "give the spacing of the file's own pixels"
        )
    findings.note(f"pixels are not square: the column spacing is {aspect:.4g} times the given row spacing")
    return spacing_mm[0], spacing_mm[0] * aspect


__all__ = [
    "PLAUSIBLE_MM",
    "SAME",
    "Spacing",
    "SpacingRule",
    "plausible",
    "with_aspect",
]
