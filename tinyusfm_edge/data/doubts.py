"""Doubts about the files of a data folder, each named once.

A file whose tags contradict its data, or that holds fewer frames than it promises, is read as its data say; whether
that is good enough is the user's matter. It decodes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from tinyusfm_runtime.errors import IncompleteError, InputError

Item = TypeVar("Item")
MOST_LINES = 20
"""Doubts that are named one by one; further ones are only counted."""


class Doubts:
    """Takes the doubts of one command.

    Args:
        tell: says a line; None keeps the lines and says nothing.
    """

    def __init__(self, tell: Callable[[str], None] | None = None) -> None:
        self._tell = tell
        self._said: dict[str, None] = {}

    def __bool__(self) -> bool:
        return bool(self._said)

    @property
    def lines(self) -> tuple[str, ...]:
        """Every doubt once, in order."""
        return tuple(self._said)

    def add(self, where: str, texts: Iterable[str]) -> None:
        """Takes the doubts about one file.

        Args:
            where: table and line, or place in the folder.
            texts: of its source.
        """
        for text in texts:
            line = f"{where}: {text}"
            if line in self._said:
                continue
            self._said[line] = None
            if self._tell is not None and len(self._said) <= MOST_LINES:
                self._tell(line)


def hold(doubts: Doubts | None, where: str, texts: Iterable[str]) -> None:
    """Hands doubts on, or refuses the file where nobody takes them.

    Args:
        doubts: takes them, or None.
        where: table and line, or place in the folder.
        texts: of the file's source.

    Raises:
        InputError: there is a doubt and nobody to take it.
    """
    found = tuple(texts)
    if doubts is None and found:
        raise InputError(f"{where}: {found[0]}")
    if doubts is not None:
        doubts.add(where, found)


def kept(items: Iterable[Item], doubts: Doubts | None, where: str) -> Iterator[Item]:
    """The items of a source.

    Where it breaks off after good ones, that is a doubt and the end.

    Args:
        items: frames.
        doubts: takes the doubt; None lets the error through.
        where: table and line, or place in the folder.

    Raises:
        IncompleteError: it breaks off, and nobody takes the doubt.
    """
    try:
        yield from items
    except IncompleteError as error:
        if doubts is None:
            raise
        doubts.add(where, [str(error)])


__all__ = ["MOST_LINES", "Doubts", "Item", "hold", "kept"]
