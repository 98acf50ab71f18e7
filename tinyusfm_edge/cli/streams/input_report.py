"""What a command says about its input.

Notes of the source, doubts about it, and the exit code that follows.

Results of a source that is incomplete or contradicts itself are kept; the command then ends with INCOMPLETE.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, TypeVar

from tinyusfm_edge.cli import console
from tinyusfm_runtime.errors import IncompleteError

if TYPE_CHECKING:
    from tinyusfm_runtime.results import LiveEvent, StateChange

Item = TypeVar("Item")


class InputReport:
    """Says each note and each doubt of a source once, on standard error.

    Args:
        source: any frame source; one without ``notes`` and ``doubts`` has nothing to say.
    """

    def __init__(self, source: object) -> None:
        self._source = source
        self._printed: set[str] = set()
        self.doubtful = False

    def say(self) -> None:
        """Says what is new."""
        for text in getattr(self._source, "notes", ()):
            self._once(f"note: {text}")
        for text in getattr(self._source, "doubts", ()):
            self.doubt(text)

    def doubt(self, text: str) -> None:
        """Says a doubt, and that the command ends with INCOMPLETE."""
        self.doubtful = True
        self._once(f"note: doubtful input: {text}")

    def whole(self, items: Iterable[Item]) -> Iterator[Item]:
        """The items of a source.

        Where it breaks off after good ones, that is a doubt and the end.

        Args:
            items: frames of the source, or results of them.
        """
        try:
            yield from items
        except IncompleteError as error:
            self.doubt(str(error))

    def listening(
        self, print_event: Callable[[StateChange | LiveEvent], None]
    ) -> Callable[[StateChange | LiveEvent], None]:
        """A callback for a live loop, so that the end does not repeat it.

        What the source says there is not said again at the end.

        Args:
            tell: says events.
        """

        def on_event(event: StateChange | LiveEvent) -> None:
            # both kinds of lines, since an event does not tell which of them it was
            self._printed.update((f"note: {event.reason}", f"note: doubtful input: {event.reason}"))
            print_event(event)

        return on_event

    def end(self) -> None:
        """Says what is new, and ends the command where there was a doubt.

        Raises:
            typer.Exit: with INCOMPLETE.
        """
        self.say()
        if self.doubtful:
            console.end_with_doubts()

    def _once(self, line: str) -> None:
        if line not in self._printed:
            self._printed.add(line)
            console.note(line)


__all__ = ["InputReport", "Item"]
