"""Anti-rollback: the highest security version a device has opened.

Nothing below it opens.

``Floor`` has two methods, so that a device can keep the number where it is safest: a TPM counter, a fuse, a memory
block that is protected against replay. ``FileFloor`` keeps it in a file of the user's own, written atomically; whoever
can write that user's files can lower it, which a TPM counter prevents.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Protocol

from tinyusfm_runtime.device.owned_files import default_root, make_owned, read_owned, write_owned
from tinyusfm_runtime.errors import OutputError, UntrustedError
from tinyusfm_runtime.strict_json import parse_json


class Floor(Protocol):
    """Where a device keeps the lowest security version that it opens."""

    def read(self, name: str) -> int:
        """The floor of one model, 0 where none was set.

        Args:
            name: of the model, as in its ModelSpec.
        """
        ...

    def raise_to(self, name: str, version: int) -> None:
        """Raises the floor of one model; never lowers it.

        Args:
            name: of the model.
            version: security version of a bundle that was opened.
        """
        ...


class FileFloor:
    """A floor in a file that belongs to the user.

    Args:
        path: the file; None is ``trust/floor.json`` in the toolkit's cache folder.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path if path is not None else default_root() / "trust" / "floor.json"

    def read(self, name: str) -> int:
        """The floor of one model, 0 where none was set.

        Raises:
            UntrustedError: the file is damaged: an update must not start from nothing without a word.
            TamperedError: it is a link or belongs to somebody else.
        """
        return self._all().get(name, 0)

    def raise_to(self, name: str, version: int) -> None:
        """Raises the floor of one model.

        Raises:
            OutputError: the file cannot be written.
        """
        floors = self._all()
        if version <= floors.get(name, 0):
            return
        try:
            make_owned(self.path.parent, self.path.parent)
            text = json.dumps({"version": 1, "floors": {**floors, name: version}}, sort_keys=True)
            write_owned(self.path, text.encode("utf-8"))
        except OSError as error:
            raise OutputError(f"the floor of security versions cannot be kept: {error.strerror or error}") from error

    def _all(self) -> dict[str, int]:
        try:
            raw = read_owned(self.path)
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise UntrustedError(f"the floor of security versions cannot be read: {error.strerror or error}") from error
        try:
            data = parse_json(raw)
            floors = data["floors"]
            if data["version"] != 1 or not all(type(value) is int and value >= 0 for value in floors.values()):
                raise ValueError("another version")
            return dict(floors)
        except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
            raise UntrustedError(
                f"{self.path} is damaged: restore it, or remove it if you accept older bundles"
            ) from error


class ReadOnlyFloor:
    """A floor that is looked at and never raised, for checks on a workstation.

    Args:
        kept: the device's floor, or None for no floor.
    """

    def __init__(self, kept: Floor | None = None) -> None:
        self._kept = kept

    def read(self, name: str) -> int:
        """The floor of one model."""
        return self._kept.read(name) if self._kept is not None else 0

    def raise_to(self, name: str, version: int) -> None:
        """Does nothing."""


__all__ = ["FileFloor", "Floor", "ReadOnlyFloor"]
