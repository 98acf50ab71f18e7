"""Files that a table names.

They are found as people spell them, and never outside the table's folder.

Spellings that are understood: backslashes, ``./``, composed and decomposed letters (NFC, NFD), other case where only
one file fits, an absolute path into the folder, and ``FILE#12`` for one frame of a cine or video. A link that leads
outside the folder is refused unless it was asked for. Nothing is opened here.
"""

from __future__ import annotations

import os
import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath

from tinyusfm_runtime.errors import InputError

_FRAME = re.compile(r"(?P<file>.+)#(?P<frame>\d{1,7})")


@dataclass(frozen=True, kw_only=True, slots=True)
class NamedFile:
    """A file that a cell names.

    Attributes:
        path: where it is, whether or not it exists.
        inside: its path inside the folder, with slashes; the same for every spelling of one file that exists.
        frame: number of the frame meant, or None.
        respelt: the folder spells it otherwise than the table.
    """

    path: Path
    inside: str
    frame: int | None = None
    respelt: bool = False


class FileFinder:
    """Finds the files of one table; remembers the folders it looked into."""

    def __init__(self, folder: Path, *, follow_links: bool = False) -> None:
        """Sets out from a folder.

        Args:
            folder: the table's own.
            follow_links: links inside it may lead anywhere.
        """
        self.folder, self.follow_links = folder, follow_links
        self._root = folder.resolve()
        self._listed: dict[Path, dict[str, list[str]]] = {}

    def find(self, typed: str, where: str) -> NamedFile:
        """The file that a cell means.

        Args:
            typed: the cell.
            where: table and line, for messages.

        Raises:
            InputError: an address, a path outside the folder, or a link that leads outside it.
        """
        if "\0" in typed or "://" in typed:
            raise InputError(f"{where} names no file of this folder: write paths relative to {self.folder.name}")
        found = self._spelling(typed, where)
        if not os.path.lexists(found.path) and (match := _FRAME.fullmatch(typed)):
            base = self._spelling(match["file"], where)
            number = int(match["frame"])
            found = NamedFile(path=base.path, inside=f"{base.inside}#{number}", frame=number, respelt=base.respelt)
        if not self.follow_links and not self._is_inside(found.path):
            raise InputError(f"{where} names a file outside its folder: a link leads there; --follow-links allows it")
        return found

    def _is_inside(self, path: Path) -> bool:
        try:
            return path.resolve().is_relative_to(self._root)
        except (OSError, RuntimeError):  # a link that leads to itself, or a name longer than names can be
            return False

    def exists(self, typed: str) -> bool:
        """Whether a cell names a file that is there."""
        try:
            return self.find(typed, "").path.is_file()
        except InputError:
            return False

    def _spelling(self, typed: str, where: str) -> NamedFile:
        inside = self._relative(typed, where)
        path = self.folder / inside
        if os.path.lexists(path):
            return NamedFile(path=path, inside=inside, respelt=inside != typed)
        found = self.folder
        for part in PurePosixPath(inside).parts:
            names = self._names(found).get(_fold(part), [])
            same = [name for name in names if unicodedata.normalize("NFC", name) == unicodedata.normalize("NFC", part)]
            chosen = same if len(same) == 1 else names
            if len(chosen) != 1:
                return NamedFile(path=path, inside=inside, respelt=inside != typed)
            found = found / chosen[0]
        return NamedFile(path=found, inside=found.relative_to(self.folder).as_posix(), respelt=True)

    def _relative(self, typed: str, where: str) -> str:
        """The cell as a path with slashes inside the folder."""
        windows = PureWindowsPath(typed)
        text = typed
        if not os.path.lexists(self.folder / typed) and "\\" in typed:
            text = windows.as_posix()
        if Path(text).is_absolute() or windows.drive:
            path = Path(os.path.normpath(text))
            for root in (self.folder.absolute(), self._root):
                if path.is_relative_to(root):
                    return path.relative_to(root).as_posix()
            raise InputError(f"{where} names an absolute path: write it relative to {self.folder.name}")
        normal = PurePosixPath(os.path.normpath(text)).as_posix()
        if normal == ".." or normal.startswith("../"):
            raise InputError(f"{where} names a file outside its folder")
        return normal

    def _names(self, folder: Path) -> dict[str, list[str]]:
        """Entries of a folder by their folded spelling."""
        if folder not in self._listed:
            found: dict[str, list[str]] = {}
            try:
                for name in sorted(path.name for path in folder.iterdir()):
                    found.setdefault(_fold(name), []).append(name)
            except OSError:
                pass
            self._listed[folder] = found
        return self._listed[folder]


def _fold(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


__all__ = ["FileFinder", "NamedFile"]
