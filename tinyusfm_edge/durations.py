"""Spans of time in words that a person reads at a glance."""

from __future__ import annotations


def in_words(seconds: float) -> str:
    """``40 s``, ``3 min``, ``1 h 5 min``.

    Args:
        seconds: from 0 on.
    """
    whole = max(0, round(seconds))
    if whole < 90:
        return f"{whole} s"
    minutes = round(whole / 60)
    if minutes < 90:
        return f"{minutes} min"
    hours, left = divmod(minutes, 60)
    return f"{hours} h {left} min" if left else f"{hours} h"


__all__ = ["in_words"]
