"""Findings: what a source has to say about its input, gathered while it is read.

A note tells what was obeyed or neglected. A doubt tells that the input is incomplete or contradicts itself: results
stand, but whoever made them must know (the command line ends with exit code 4). Texts are whole lines for people,
without file names.
"""

from __future__ import annotations

from collections.abc import Iterable

MOST = 200
"""Notes, and doubts, of one source that are kept: a stream of days does not fill the memory."""


class Findings:
    """Notes and doubts, each once, in the order in which they came up.

    Any thread may add and read.

    Args:
        notes: what is known before the first frame.
        doubts: likewise.
    """

    def __init__(self, notes: Iterable[str] = (), doubts: Iterable[str] = ()) -> None:
        self._notes = dict.fromkeys(notes, 0)
        self._doubts = dict.fromkeys(doubts, 0)

    def note(self, text: str) -> None:
        """Adds a note."""
        if text in self._notes or len(self._notes) < MOST:
            self._notes[text] = self._notes.get(text, 0) + 1

    def doubt(self, text: str) -> None:
        """Adds a doubt."""
        if text in self._doubts or len(self._doubts) < MOST:
            self._doubts[text] = self._doubts.get(text, 0) + 1

    @property
    def notes(self) -> tuple[str, ...]:
        """All notes so far."""
        return tuple(list(self._notes))

    @property
    def doubts(self) -> tuple[str, ...]:
        """All doubts so far."""
        return tuple(list(self._doubts))

    def count(self, text: str) -> int:
        """How often a note or doubt was added while reading."""
        return self._notes.get(text, 0) + self._doubts.get(text, 0)


__all__ = [
    "MOST",
    "Findings",
]
