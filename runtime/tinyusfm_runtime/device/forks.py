"""Whether this process was made by fork() after something was opened.

Native threads do not survive a fork.

``os.fork`` copies the memory of a program but only one of its threads. A library with a pool of threads then waits for
ever, without a word. ``ForkMark`` remembers in which process a thing was made; in a child it says so, in one line.
"""

from __future__ import annotations

import os

from tinyusfm_runtime.errors import EngineError

_generation = 0


def _forked() -> None:
    global _generation
    _generation += 1


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)


class ForkMark:
    """Made where something is opened that does not survive a fork."""

    def __init__(self) -> None:
        self._generation = _generation

    @property
    def forked(self) -> bool:
        """Whether this is a child of the process in which it was made."""
        return self._generation != _generation

    def check(self, what: str) -> None:
        """Refuses in a child.

        Args:
            what: that was opened, for the message.

        Raises:
            EngineError: this is a child.
        """
        if self.forked:
            raise EngineError(
                f"{what} was opened before fork() and does not work in the child: open the session there, or start "
                "processes by multiprocessing's 'spawn' or 'forkserver'"
            )


__all__ = ["ForkMark"]
