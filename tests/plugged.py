"""Plug-ins of the tests enter as those of other distributions do: by an entry point, and no code is patched."""

from __future__ import annotations

import sys
import tempfile
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tinyusfm_runtime.plugins import Availability


def plugged(monkeypatch: pytest.MonkeyPatch, kind: str, **modules: ModuleType) -> None:
    """Adds plug-ins for one test.

    Args:
        monkeypatch: takes them away again.
        kind: ``engines``, ``sources``, ``sinks`` or ``targets``.
        modules: name -> module.
    """
    folder = str(_distribution(kind, tuple(sorted(modules))))
    monkeypatch.setattr(sys, "path", [folder, *(place for place in sys.path if place != folder)])
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, f"plugged_{kind}_{name}", module)


def plug_in_module(name: str, **contents: Any) -> ModuleType:
    """A module that is a plug-in: ``available()`` and what its kind asks for."""
    module = ModuleType(name)
    for attribute, value in {"available": lambda: Availability(usable=True, reason="numpy"), **contents}.items():
        setattr(module, attribute, value)
    return module


@lru_cache(maxsize=64)
def _distribution(kind: str, names: tuple[str, ...]) -> Path:
    """A folder with an installed distribution whose entry points are these; the same one for the same names.

    The path of a test is then one that was searched before, and the entry points of all distributions are not read
    again.
    """
    folder = Path(_FOLDERS.name) / f"{kind}-{'-'.join(names)}"
    info = folder / f"plugged_{kind}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: plugged_{kind}\nVersion: 1.0\n", encoding="utf-8")
    points = "\n".join(f"{name} = plugged_{kind}_{name}" for name in names)
    (info / "entry_points.txt").write_text(f"[tinyusfm.{kind}]\n{points}\n", encoding="utf-8")
    return folder


_FOLDERS = tempfile.TemporaryDirectory(prefix="tinyusfm-plugged-")
