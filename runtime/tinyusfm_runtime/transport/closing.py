"""Closing: what is closed by leaving its context, whatever ended it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from types import TracebackType
from typing import TypeVar

_Closed = TypeVar("_Closed", bound="ClosedOnExit")


class ClosedOnExit(ABC):
    """A context manager that is open already and is closed on leaving."""

    def __enter__(self: _Closed) -> _Closed:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @abstractmethod
    def close(self) -> None:
        """Frees what is held; idempotent."""


__all__ = ["ClosedOnExit"]
