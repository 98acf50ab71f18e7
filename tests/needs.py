"""Files of tests that need a library skip where it is missing, without importing it while tests are collected."""

from __future__ import annotations

from importlib.util import find_spec

import pytest


def needs(library: str, reason: str) -> None:
    """Skips the whole file if a library is not installed.

    Args:
        library: its import name.
        reason: how to install it.
    """
    if find_spec(library) is None:
        pytest.skip(reason, allow_module_level=True)
