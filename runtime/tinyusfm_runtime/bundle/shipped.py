"""Bundles that come with this package, found by a bare name.

    Session.open("fetal-head")

An existing path wins over a shipped bundle of the same name; the log says which of the two was taken. Shipped bundles
are read and hashed as any other. Their files may have several names on the disk, since some installers link files out
of a cache of their own instead of copying them. Of a shipped bundle the first artefact whose engine is installed is
taken where none is asked for; the log says so where that is not the first of all. It opens nothing.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

from tinyusfm_runtime import plugins
from tinyusfm_runtime.bundle.manifest import choose_artefact
from tinyusfm_runtime.errors import InputError

if TYPE_CHECKING:
    from tinyusfm_runtime.bundle.manifest import Artefact, Manifest

SHIPPED = Path(__file__).resolve().parent.parent / "bundles"
"""Folder of the shipped bundles, each in ``NAME.bundle``."""
_SUFFIX = ".bundle"
_log = logging.getLogger(__name__)


def shipped_names() -> list[str]:
    """Names of the bundles that ship with this package, sorted."""
    return sorted(path.name.removesuffix(_SUFFIX) for path in SHIPPED.glob(f"*{_SUFFIX}"))


def shipped_bundle(name: str | Path) -> Path | None:
    """Folder of the shipped bundle that is meant, or None.

    Args:
        name: as typed.

    Returns:
        Its folder where the name is bare, a bundle ships under it, and no path of that name exists.
    """
    typed = os.fspath(name)
    if typed not in shipped_names() or os.path.lexists(typed):
        return None
    return SHIPPED / f"{typed}{_SUFFIX}"


def find_bundle(path: str | Path) -> Path:
    """The folder that is meant: an existing path, else a shipped bundle of that name.

    Args:
        path: a folder, or a bare name.

    Raises:
        InputError: a bare name that is neither; the message lists the shipped ones.
    """
    found = shipped_bundle(path)
    if found is not None:
        _log.info("%s: the bundle that ships with this package", path)
        return found
    folder = Path(path)
    if os.fspath(path) in shipped_names():
        _log.info("%s: the folder of that name here, not the bundle that ships with this package", path)
    elif folder.parts == (os.fspath(path),) and folder.suffix != _SUFFIX and not os.path.lexists(folder):
        shipped = ", ".join(shipped_names()) or "none"
        raise InputError(f"there is no bundle at {folder}, and none ships under that name (shipped: {shipped})")
    return folder


def names_allowed(folder: Path) -> int | None:
    """How many names a bundle's files may have on the disk: one, or any (None).

    Any number where an installer put them.
    """
    return None if is_shipped(folder) else 1


def is_shipped(folder: Path) -> bool:
    """Whether a folder is that of a shipped bundle."""
    return folder.resolve().parent == SHIPPED


def choose_here(manifest: Manifest, folder: Path, target: str | None, precision: str | None) -> Artefact:
    """The artefact that was asked for.

    Of a shipped bundle, unasked, the first whose engine works here.

    Args:
        manifest: of an open bundle.
        folder: of that bundle.
        target: name or alias, or None.
        precision: such as ``int8``, or None.

    Raises:
        InputError: none fits.
    """
    first = choose_artefact(manifest, target, precision)
    if target is not None or precision is not None or not is_shipped(folder):
        return first
    for artefact in manifest.artefacts:
        if plugins.available("engines", artefact.engine).usable:
            if artefact is not first:
                why = plugins.available("engines", first.engine).reason
                _log.info("%s answers: %s cannot (%s)", artefact.name, first.name, why)
            return artefact
    return first


__all__ = ["SHIPPED", "choose_here", "find_bundle", "is_shipped", "names_allowed", "shipped_bundle", "shipped_names"]
