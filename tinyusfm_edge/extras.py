"""Extras: whether the libraries that a feature needs are installed.

Asked before any work is done.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

from tinyusfm_runtime.errors import MissingExtra

_DISTRIBUTIONS = {"sklearn": "scikit-learn"}


def require(feature: str, modules: Sequence[str], extra: str) -> None:
    """Checks that libraries are there before any work is done.

    Args:
        feature: what was wanted, in the user's words.
        modules: import names.
        extra: the extra that brings them.

    Raises:
        MissingExtra: one is not installed.
    """
    for name in modules:
        if importlib.util.find_spec(name) is None:
            raise MissingExtra(feature, _DISTRIBUTIONS.get(name, name), extra)


__all__ = ["require"]
