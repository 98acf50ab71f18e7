"""JSON as this project writes it.

Anything that would surprise whoever uses the values is refused while it is read.

``json.loads`` takes NaN, whole numbers of any length (which no float can hold), objects nested until the stack ends,
and the last of two keys of one name. Here each of these is a ValueError, like any other damage, so that a reader needs
to catch one thing. ``check_values`` does the same for values that came another way, such as TOML.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from tinyusfm_runtime.errors import EdgeError

_P = ParamSpec("_P")
_T = TypeVar("_T")

MAX_BYTES = 64 << 20
"""A longer text is none of ours."""
MAX_DEPTH = 64
"""Objects and lists inside one another."""
LARGEST = (1 << 64) - 1
"""Largest whole number: 64 bits without a sign."""
LARGEST_SIGNED = (1 << 63) - 1
"""Largest whole number that also fits 64 bits with a sign."""
_DIGITS = 19  # of the largest whole number of 64 bits


def parse_json(text: str | bytes, *, largest: int = LARGEST) -> Any:
    """Reads a text.

    Args:
        text: UTF-8, if bytes.
        largest: whole numbers above it are refused.

    Returns:
        Plain data: whole numbers of 64 bits at most, floats that are finite, no two keys of one name.

    Raises:
        ValueError: not JSON, or with one of the surprises above.
    """
    if len(text) > MAX_BYTES:
        raise ValueError(f"more than {MAX_BYTES >> 20} MiB")
    read = text.decode("utf-8") if isinstance(text, bytes) else text
    try:
        data = json.loads(
            read, parse_int=_whole, parse_float=_real, parse_constant=_constant, object_pairs_hook=_without_doubles
        )
    except RecursionError as error:
        raise ValueError("objects and lists inside one another without an end") from error
    return check_values(data, largest=largest)


def check_values(data: Any, depth: int = 0, *, largest: int = LARGEST) -> Any:
    """Checks plain data.

    Args:
        data: any.
        depth: how deep it lies.
        largest: whole numbers above it are refused.

    Returns:
        The data.

    Raises:
        ValueError: too deep, a number that is not finite or longer than 64 bits, a text with a NUL in it.
    """
    if depth > MAX_DEPTH:
        raise ValueError(f"objects and lists deeper than {MAX_DEPTH}")
    if isinstance(data, dict):
        for key, value in data.items():
            check_values(key, depth + 1, largest=largest)
            check_values(value, depth + 1, largest=largest)
    elif isinstance(data, list | tuple):
        for value in data:
            check_values(value, depth + 1, largest=largest)
    elif isinstance(data, str) and "\x00" in data:
        raise ValueError("a text with a NUL in it")
    elif isinstance(data, float) and not math.isfinite(data):
        raise ValueError(f"{data} is not a number")
    elif isinstance(data, int) and not -(1 << 63) <= data <= largest:
        raise ValueError("a whole number of more than 64 bits")
    return data


def refusing(what: str, kind: type[EdgeError]) -> Callable[[Callable[_P, _T]], Callable[_P, _T]]:
    """Makes a reader of plain data refuse whatever does not fit by one error of ours.

    Args:
        what: is read, for the message.
        kind: of error.
    """

    def around(read: Callable[_P, _T]) -> Callable[_P, _T]:
        @wraps(read)
        def reading(*arguments: _P.args, **options: _P.kwargs) -> _T:
            try:
                for value in arguments[1:]:
                    check_values(value)
                return read(*arguments, **options)
            except EdgeError:
                raise
            except (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError) as error:
                raise kind(f"{what} cannot be used: {' '.join(str(error).split())[:200]}") from error

        return reading

    return around


def _whole(digits: str) -> int:
    if len(digits) > _DIGITS + 2:
        raise ValueError("a whole number of more than 64 bits")
    return int(digits)


def _real(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(f"{digits[:20]} is larger than any number here")
    return number


def _constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands twice in one object")
    return found


__all__ = ["LARGEST", "LARGEST_SIGNED", "MAX_BYTES", "MAX_DEPTH", "check_values", "parse_json", "refusing"]
