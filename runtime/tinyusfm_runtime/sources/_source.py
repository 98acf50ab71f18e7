"""What sources share: findings, a context, and for live ones counters and an end.

``ReportingSource`` is a file: it is open only while it is iterated. ``LinkedSource`` is live and counts what it
refuses. ``PolledSource`` is live and works in the thread that iterates, so an end from another thread waits for its
turn. None of them knows where frames come from.
"""

from __future__ import annotations

import threading
from abc import abstractmethod
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import TypeVar

from tinyusfm_runtime.sources._findings import Findings
from tinyusfm_runtime.transport.closing import ClosedOnExit

_Source = TypeVar("_Source", bound="ReportingSource")


class Counters:
    """Events by name, counted from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: dict[str, int] = {}

    def add(self, name: str, count: int = 1) -> None:
        """Counts an event.

        Args:
            name: what happened, one word.
            count: how often, 0 or more.
        """
        with self._lock:
            self._counts[name] = self._counts.get(name, 0) + count

    def snapshot(self) -> Mapping[str, int]:
        """What was counted so far; a copy."""
        with self._lock:
            return dict(self._counts)


class ReportingSource:
    """A source with findings; entering opens nothing, leaving closes nothing.

    Attributes:
        findings: what a user should know about the source.

    Args:
        notes: what is known before the first frame.
        doubts: likewise.
    """

    def __init__(self, notes: Iterable[str] = (), doubts: Iterable[str] = ()) -> None:
        self.findings = Findings(notes, doubts)

    @property
    def notes(self) -> tuple[str, ...]:
        """What was obeyed or neglected so far, one line each.

        The first refusal of each kind is among it.
        """
        return self.findings.notes

    @property
    def doubts(self) -> tuple[str, ...]:
        """What is incomplete or contradicts itself so far, one line each."""
        return self.findings.doubts

    def __enter__(self: _Source) -> _Source:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None


class LinkedSource(ClosedOnExit, ReportingSource):
    """A live source: counters, a last sign of life, and an end.

    Attributes:
        tally: what was refused, by reason, and what else is counted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.tally = Counters()
        self._contact_ns: int | None = None

    @property
    def last_contact_ns(self) -> int | None:
        """``time.monotonic_ns`` of the last sign of life, or None before the first."""
        return self._contact_ns

    @property
    def counters(self) -> Mapping[str, int]:
        """What was refused, by reason, and what else the source counts."""
        return self.tally.snapshot()

    @abstractmethod
    def close(self) -> None:
        """Ends the iteration soon, from any thread; idempotent."""


class PolledSource(LinkedSource):
    """A live source that works in the thread that iterates.

    Whoever holds ``_turn`` may use what ``_release`` gives back.
    """

    def __init__(self) -> None:
        super().__init__()
        self._turn = threading.Lock()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
        with self._turn:
            self._release()

    def _release_if_idle(self) -> None:
        """Releases now if nobody iterates; else the iterating thread does at its end."""
        if self._turn.acquire(blocking=False):
            self._release()
            self._turn.release()

    @abstractmethod
    def _release(self) -> None:
        """Gives back the link or the file; idempotent, under ``_turn``."""


__all__ = ["Counters", "LinkedSource", "PolledSource", "ReportingSource"]
