"""Package faces: one list of names, each fetched from its module when first used.

    _HOMES = {"session": ("Session",), "frame": ("Frame", "PixelFormat")}
    if not TYPE_CHECKING:
        __getattr__, __dir__ = lazy_names(__name__, _HOMES)

The classes and functions of a face carry the face as their ``__module__``, so help and tracebacks show the name that
people import. Type checkers read the imports in the face's ``if TYPE_CHECKING`` block instead.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from types import FunctionType
from typing import Any

DISTRIBUTION = "tinyusfm-edge"
"""What is installed, whose version is that of every package in it."""


def lazy_names(
    package: str, homes: Mapping[str, tuple[str, ...]]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """``__getattr__`` and ``__dir__`` of a package face.

    Args:
        package: the package's ``__name__``.
        homes: module inside the package, dotted -> the names that it gives to the face.

    Returns:
        Both functions. The first raises AttributeError for names that the face does not have, and answers
        ``__version__`` with that of the installed distribution.
    """
    home_of = {name: module for module, names in homes.items() for name in names}

    def fetch(name: str) -> Any:
        if name == "__version__":
            return _version()
        if name not in home_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(import_module(f"{package}.{home_of[name]}"), name)
        if isinstance(value, type | FunctionType):
            value.__module__ = package
        setattr(sys.modules[package], name, value)
        return value

    def listing() -> list[str]:
        return sorted({*vars(sys.modules[package]), *home_of})

    return fetch, listing


def _version() -> str:
    from importlib import metadata

    try:
        return metadata.version(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return "0+checkout"


__all__ = ["DISTRIBUTION", "lazy_names"]
