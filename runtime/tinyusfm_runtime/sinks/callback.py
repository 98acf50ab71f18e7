"""Sink: a Python callable, called with every live result in the loop's own thread.

``CallbackSink(function)`` in code, ``callback:MODULE:FUNCTION`` on a command line. The callable gets
the LiveResult, or ``(frame, prediction)`` where there is no live loop. It runs between two frames:
what takes long in it makes results late. An error in it ends the run, under its type alone, since
its words may quote what must not be logged.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import TracebackType
from typing import Any

from tinyusfm_runtime.errors import InputError, OutputError
from tinyusfm_runtime.frame import Frame
from tinyusfm_runtime.plugins import Availability
from tinyusfm_runtime.results import LiveResult, Prediction, StateChange


def available() -> Availability:
    """Always works: standard library only."""
    return Availability(usable=True, reason="standard library only", extra=None)


def open_sink(location: str, *, on_state: Callable[[StateChange], Any] | None = None) -> CallbackSink:
    """Finds the callable.

    Args:
        location: ``MODULE:FUNCTION``, importable from where the program runs.
        on_state: called with every change of state, or None.

    Raises:
        InputError: there is no such module or function.
    """
    module, colon, name = location.partition(":")
    if not colon or not module or not name.isidentifier():
        raise InputError("a callback is MODULE:FUNCTION, such as callback:my_module:on_result")
    try:
        function = getattr(importlib.import_module(module), name)
    except Exception as error:  # a module of the user's may raise anything while it is imported
        raise InputError(f"callback {module}:{name} cannot be imported: {type(error).__name__}") from error
    if not callable(function):
        raise InputError(f"callback {module}:{name} is not a function")
    return CallbackSink(function, on_state=on_state)


class CallbackSink:
    """Calls a function with every result.

    Args:
        function: takes one LiveResult, or a frame and a prediction where there is no live loop.
        on_state: takes one StateChange, or None.
    """

    def __init__(self, function: Callable[..., Any], *, on_state: Callable[[StateChange], Any] | None = None) -> None:
        self._function, self._on_state = function, on_state

    def __enter__(self) -> CallbackSink:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def write(self, frame: Frame, prediction: Prediction) -> None:
        """Calls with frame and prediction.

        Raises:
            OutputError: the callable raised.
        """
        self._call(self._function, frame, prediction)

    def write_live(self, result: LiveResult) -> None:
        """Calls with the result.

        Raises:
            OutputError: the callable raised.
        """
        self._call(self._function, result)

    def on_state(self, change: StateChange) -> None:
        """Calls with the change of state, if that was asked for.

        Raises:
            OutputError: the callable raised.
        """
        if self._on_state is not None:
            self._call(self._on_state, change)

    def close(self) -> None:
        """Nothing to close."""

    @staticmethod
    def _call(function: Callable[..., Any], *values: Any) -> None:
        try:
            function(*values)
        except Exception as error:
            raise OutputError(
                f"the callback raised {type(error).__name__}: mend the function that was given"
            ) from error


__all__ = ["CallbackSink", "available", "open_sink"]
