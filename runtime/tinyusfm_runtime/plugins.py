"""A folder is a registry: plug-ins are files, found by name.

Engines, sources, sinks and targets are one file or folder each.

``names`` lists without importing anything, so a broken or missing library never hides a plug-in.
Other distributions add theirs through the entry-point groups ``tinyusfm.engines``,
``tinyusfm.sources``, ``tinyusfm.sinks`` and ``tinyusfm.targets``; a built-in name wins over a
foreign one. It does not know what any plug-in does beyond ``available()``.

Targets live one floor up, in tinyusfm_export. That folder is looked up without importing it and is
simply empty where the package is not installed.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from tinyusfm_runtime.errors import EdgeError, InputError

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

KINDS = ("engines", "sources", "sinks", "targets")
"""Everything that can be plugged in."""
ALIASES = {"onnx": "ort", "onnxruntime": "ort", "openvino": "ov", "tensorrt": "trt", "shm-out": "shm_out"}
"""What people type -> file stem, for all kinds alike."""
PUBLIC_NAMES = {"ort": "onnx", "ov": "openvino", "trt": "tensorrt", "shm_out": "shm-out"}
"""File stem -> what a manifest, a table or a message calls it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Availability:
    """Whether a plug-in can work on this machine.

    Attributes:
        usable: True if it can be used now.
        reason: library, version and device when it works; else why not.
        extra: the extra of ``tinyusfm-edge`` that brings what it needs, or None if it needs nothing.
    """

    usable: bool
    reason: str
    extra: str | None = None


def names(kind: str) -> list[str]:
    """Lists the plug-ins of one kind without importing any.

    Args:
        kind: ``engines``, ``sources``, ``sinks`` or ``targets``.

    Returns:
        Canonical names: built-in ones in alphabetical order, then other distributions' ones.

    Raises:
        InputError: no such kind.
    """
    built_in = _built_in(kind)
    return built_in + sorted(set(_entry_points(kind)) - set(built_in))


def canonical(kind: str, typed: str) -> str:
    """Turns what someone typed into a plug-in's name.

    Args:
        kind: ``engines``, ``sources``, ``sinks`` or ``targets``.
        typed: a name or an alias; capitals do not matter.

    Returns:
        The file stem or entry-point name.

    Raises:
        InputError: nothing of that name exists; the message lists what does.
    """
    wanted = stem(typed)
    if wanted in _built_in(kind):
        return wanted
    existing = names(kind)
    if wanted in existing:
        return wanted
    if typed in existing:
        return typed
    shown = ", ".join(public_name(name) for name in existing) or "none is installed"
    raise InputError(f"there is no {kind[:-1]} named {typed!r}; there is: {shown}")


def load(kind: str, typed: str) -> ModuleType:
    """Imports one plug-in.

    Args:
        kind: ``engines``, ``sources``, ``sinks`` or ``targets``.
        typed: a name or an alias.

    Returns:
        The plug-in's module; it has ``available()`` and what its kind asks for.

    Raises:
        InputError: no plug-in of that name, or its own file cannot be imported.
    """
    name = canonical(kind, typed)
    try:
        if name in _built_in(kind):
            return importlib.import_module(f"{_package(kind)}.{name}")
        module = _entry_points(kind)[name].load()
    except EdgeError:
        raise
    except Exception as error:  # a foreign plug-in may raise anything while it is imported
        raise InputError(f"{kind[:-1]} {name!r} cannot be imported: {type(error).__name__}: {error}") from error
    if not isinstance(module, ModuleType) or not callable(getattr(module, "available", None)):
        raise InputError(f"{kind[:-1]} {name!r}: its entry point must name a module with an available() function")
    return module


def available(kind: str, typed: str) -> Availability:
    """Asks a plug-in whether it works here, whatever state it is in.

    Args:
        kind: ``engines``, ``sources``, ``sinks`` or ``targets``.
        typed: a name or an alias.

    Returns:
        The plug-in's own answer, or ``usable=False`` with the reason where it cannot even be imported.

    Raises:
        InputError: no such kind.
    """
    _check_kind(kind)
    try:
        answer = load(kind, typed).available()
    except Exception as error:  # available() promises not to raise; a foreign one may break that
        return Availability(usable=False, reason=" ".join(str(error).split()) or type(error).__name__)
    if not isinstance(answer, Availability):
        return Availability(
            usable=False, reason=f"its available() answered {type(answer).__name__} instead of an Availability"
        )
    return answer


def stem(typed: str) -> str:
    """The file stem behind an alias: ``onnx`` -> ``ort``.

    Other names come back in small letters.
    """
    lowered = typed.strip().lower()
    return ALIASES.get(lowered, lowered)


def public_name(name: str) -> str:
    """The name people know a plug-in by: ``ort`` -> ``onnx``.

    Names without an alias stay as they are.
    """
    return PUBLIC_NAMES.get(name, name)


def _check_kind(kind: str) -> None:
    if kind not in KINDS:
        raise InputError(f"there is no kind of plug-in named {kind!r}; there is: {', '.join(KINDS)}")


def _package(kind: str) -> str:
    return "tinyusfm_export.targets" if kind == "targets" else f"tinyusfm_runtime.{kind}"


def _built_in(kind: str) -> list[str]:
    _check_kind(kind)
    found: set[str] = set()
    for folder in _folders(kind):
        if folder.is_dir():
            found.update(file.stem for file in folder.glob("*.py") if not file.stem.startswith("_"))
            found.update(file.parent.name for file in folder.glob("[!_]*/__init__.py"))
    return sorted(found)


def _folders(kind: str) -> list[Path]:
    if kind != "targets":
        return [Path(__file__).parent / kind]
    # only the top package is looked up: asking for the sub-package would import its parent
    spec = importlib.util.find_spec("tinyusfm_export")
    return [Path(place) / "targets" for place in (spec.submodule_search_locations or [])] if spec else []


def _entry_points(kind: str) -> dict[str, EntryPoint]:
    return _scanned(kind, tuple(sys.path))


@lru_cache(maxsize=16)
def _scanned(kind: str, places: tuple[str, ...]) -> dict[str, EntryPoint]:
    """Entry points of every distribution on the path, read once for each path.

    Reading opens one file per distribution.

    What is installed into a folder that was searched already is found by the next process.
    """
    from importlib.metadata import entry_points

    return {point.name: point for point in entry_points(group=f"tinyusfm.{kind}")}


__all__ = [
    "ALIASES",
    "KINDS",
    "PUBLIC_NAMES",
    "Availability",
    "available",
    "canonical",
    "load",
    "names",
    "public_name",
    "stem",
]
