"""Engines built on a device: a cache outside the bundle.

It is trusted only where key, hash and owner are right.

An engine is native code for one GPU, driver and version of its library. So each entry is keyed by the content hash of
the ONNX, GPU, compute capability, library, driver and build flags; it carries the hash of every file and of itself, and
the outcome of the gate on that device. The folder and all in it must belong to the user and be writable by nobody else,
since whoever can write here runs code. A *stale* entry is built again; one of another GPU is
*foreign*, one whose bytes changed *tampered*: both are refused.

Layout, below $TINYUSFM_EDGE_CACHE, else $XDG_CACHE_HOME/tinyusfm-edge, else ~/.cache/tinyusfm-edge::

    engines/<first 24 hex digits of the content hash>/<gpu, or ampere-plus>/entry.json
    engines/<...>/<...>/engine-<hash>.plan, runtime-<hash>.cache
    timing/<library, version, gpu>.cache            sha256 in hex, a newline, the bytes

``entry.json`` is replaced last and in one step, so after a kill at any moment the old entry is there or the new one. A
lock beside each folder (``.<gpu>.lock``) lets one writer in at a time and no reader beside it, and dies with its
process. It knows no TensorRT.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from tinyusfm_runtime.atomic import hold
from tinyusfm_runtime.device.owned_files import (
    _check_owner,
    default_root,
    json_sha256,
    make_owned,
    read_owned,
    write_owned,
)
from tinyusfm_runtime.engines import one_line
from tinyusfm_runtime.errors import OutputError, TamperedError, UnsupportedError
from tinyusfm_runtime.strict_json import parse_json

ENTRY_VERSION = 1
"""Version of ``entry.json``."""
ANY_AMPERE = "ampere-plus"
"""Folder of engines that run on every GPU from compute capability 8.0 on."""
BUILD_HINT = "run `tinyusfm-edge build BUNDLE` on this machine"
"""What mends nearly everything here."""
CACHE_SUFFIX = ".cache"
"""Suffix of the files in the folder ``timing``."""
_ENTRY = "entry.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineKey:
    """What an engine was built of and for.

    Attributes:
        content_sha256: of the ONNX.
        gpu: name and number of multiprocessors.
        compute_capability: such as ``8.7``.
        library: distribution that built it.
        library_version: its version.
        driver: of the GPU.
        flags: of the build.
    """

    content_sha256: str
    gpu: str
    compute_capability: str
    library: str
    library_version: str
    driver: str
    flags: Mapping[str, Any] = field(default_factory=dict)

    @property
    def portable(self) -> bool:
        """Whether it was built to run on other GPUs too."""
        return bool(self.flags.get("hardware_compatible"))

    @property
    def device(self) -> str:
        """The device the engine runs on, as gate records name it."""
        return f"{self.gpu}, compute capability {self.compute_capability}"

    def stale_against(self, now: EngineKey) -> list[str]:
        """Why an engine with this key is out of date, one phrase each.

        On a device with another key.
        """
        changed = ("content_sha256", "library", "library_version", "driver")
        return [
            f"{name.replace('_', ' ')} {getattr(self, name)!r} is now {getattr(now, name)!r}"
            for name in changed
            if getattr(self, name) != getattr(now, name)
        ]

    def foreign_to(self, now: EngineKey) -> bool:
        """Whether it was built for another GPU than this one."""
        same = (self.gpu, self.compute_capability) == (now.gpu, now.compute_capability)
        return not same and not (self.portable and float(now.compute_capability) >= 8.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class CachedEngine:
    """One entry, its files read and checked.

    Attributes:
        key: what it was built of and for.
        origin: ``built here`` or ``from the bundle``.
        seconds: how long building took.
        files: role (``plan``, ``runtime``) -> sha256 of the file.
        gates: device -> outcome of the gate on it: ``passed``, ``bundle_id``, ``driver``, ``report``.
        created_utc: ISO 8601.
        content: role -> bytes; not written into the entry.
    """

    key: EngineKey
    origin: str
    seconds: float
    files: Mapping[str, str]
    gates: Mapping[str, Any]
    created_utc: str
    content: Mapping[str, bytes] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain data without the bytes, with its own hash."""
        data = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "content"}
        data = {**data, "version": ENTRY_VERSION, "key": asdict(self.key)}
        return {**data, "entry_sha256": json_sha256(data)}

    @classmethod
    def from_json(cls, data: Any) -> CachedEngine:
        """Reads what ``to_json`` gave.

        Raises:
            TamperedError: its own hash does not match, or it is no entry.
            UnsupportedError: another version.
        """
        if not isinstance(data, dict) or "entry_sha256" not in data:
            raise TamperedError("entry.json is no entry of an engine cache")
        body = {name: value for name, value in data.items() if name != "entry_sha256"}
        if data["entry_sha256"] != json_sha256(body):
            raise TamperedError("entry.json is not the one that was written: its own hash does not match")
        if body.pop("version", None) != ENTRY_VERSION:
            raise UnsupportedError(f"the cached engine has another entry version: {BUILD_HINT} with --rebuild")
        return cls(**{**body, "key": EngineKey(**body["key"])})


class EngineCache:
    """A cache folder.

    Args:
        root: the folder; None takes the one the environment names.
    """

    def __init__(self, root: Path | None = None) -> None:
        self.root = root if root is not None else default_root()

    def find(self, now: EngineKey) -> CachedEngine | None:
        """The entry for a device, fresh or stale; None if nothing was built for it.

        Args:
            now: what would be built now; its flags do not matter.

        Raises:
            TamperedError: bytes, hashes, links, owners or permissions are not as they were written.
            UnsupportedError: the entry is of another GPU, or of another version.
        """
        for slot in self._slots(now):
            folder = self._folder(now, slot)
            if not os.path.lexists(folder):  # a writer makes the lock before the folder: then there is one to wait for
                continue
            with self._turn(folder, alone=False):
                if os.path.lexists(folder):
                    return self._read(folder, now)
        return None

    def load(self, now: EngineKey) -> CachedEngine:
        """The entry for a device, as a session wants it.

        Raises:
            UnsupportedError: nothing was built, or it is stale or foreign; the message says what to run.
            TamperedError: see ``find``.
        """
        entry = self.find(now)
        if entry is None:
            others = self._others(now)
            more = f" (there are engines of other GPUs, which cannot run here: {', '.join(others)})" if others else ""
            raise UnsupportedError(f"no engine was built yet for {now.device}{more}: {BUILD_HINT}")
        if stale := entry.key.stale_against(now):
            raise UnsupportedError(f"the cached engine is stale ({'; '.join(stale)}): {BUILD_HINT}")
        return entry

    def store(self, entry: CachedEngine, content: Mapping[str, bytes]) -> CachedEngine:
        """Writes an entry in place of an older one.

        Killed at any moment, the old or the new one is there.

        Args:
            entry: what to say about it; ``files`` is filled in here.
            content: role -> bytes.

        Returns:
            The entry as stored.

        Raises:
            OutputError: no room, or no permission.
            TamperedError: the folder belongs to somebody else, or others may write to it.
        """
        folder = self._folder(entry.key, ANY_AMPERE if entry.key.portable else _slug(entry.key))
        stored = replace(
            entry, files={role: hashlib.sha256(raw).hexdigest() for role, raw in content.items()}, content=dict(content)
        )
        try:
            make_owned(self.root, folder.parent)
            with self._turn(folder, alone=True):
                make_owned(self.root, folder)
                self._write(folder, stored)
        except OSError as error:
            raise OutputError(f"cannot write the engine cache {self.root}: {error.strerror or error}") from error
        return stored

    @staticmethod
    def _write(folder: Path, entry: CachedEngine) -> None:
        """Writes an entry's files, then the entry.

        Then it removes what belongs to neither.
        """
        for role, raw in entry.content.items():
            write_owned(folder / _file_name(role, entry.files[role]), raw)
        write_owned(folder / _ENTRY, (json.dumps(entry.to_json(), indent=1, sort_keys=True) + "\n").encode("ascii"))
        kept = {_ENTRY, *(_file_name(role, digest) for role, digest in entry.files.items())}
        for path in folder.iterdir():
            if path.name not in kept:
                path.unlink(missing_ok=True)

    @staticmethod
    @contextmanager
    def _turn(folder: Path, *, alone: bool) -> Iterator[None]:
        """Waits for the entry's lock.

        A reader goes without one where nobody has ever written.

        Raises:
            OSError: the lock cannot be made.
        """
        flags = (os.O_RDWR | os.O_CREAT if alone else os.O_RDONLY) | getattr(os, "O_NOFOLLOW", 0) | os.O_CLOEXEC
        try:
            handle = os.open(folder.with_name(f".{folder.name}.lock"), flags, 0o600)
        except OSError:
            if alone:
                raise
            yield
            return
        try:
            hold(handle, wait=True, shared=not alone)
            yield
        finally:
            os.close(handle)

    def remove(self, now: EngineKey) -> None:
        """Deletes whatever stands where entries for a device stand.

        Raises:
            OutputError: it cannot be deleted.
        """
        for slot in self._slots(now):
            folder = self._folder(now, slot)
            try:
                if not os.path.lexists(folder):
                    continue
                with self._turn(folder, alone=True):
                    if folder.is_symlink():
                        folder.unlink()
                    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
                        path.unlink(missing_ok=True)
                    if folder.is_dir():
                        folder.rmdir()
            except OSError as error:
                raise OutputError(f"cannot clear the engine cache {folder}: {error.strerror or error}") from error

    def timing(self, now: EngineKey) -> bytes:
        """What earlier builds on this device measured, or nothing.

        Damaged bytes count as nothing.
        """
        with suppress(OSError, TamperedError):
            return timing_content(read_owned(self._timing_path(now)))
        return b""

    def keep_timing(self, now: EngineKey, raw: bytes) -> None:
        """Keeps measurements for the next build; nothing is written if there are none.

        Raises:
            OutputError: no room, or no permission.
        """
        if not raw:
            return
        path = self._timing_path(now)
        try:
            make_owned(self.root, path.parent)
            write_owned(path, hashlib.sha256(raw).hexdigest().encode() + b"\n" + raw)
        except OSError as error:
            raise OutputError(f"cannot write the timing cache {path}: {error.strerror or error}") from error

    def _slots(self, now: EngineKey) -> list[str]:
        portable = [ANY_AMPERE] if float(now.compute_capability) >= 8.0 else []
        mine = [_slug(now)]
        return portable + mine if now.portable else mine + portable

    def _folder(self, key: EngineKey, slot: str) -> Path:
        return self.root / "engines" / key.content_sha256[:24] / slot

    def _others(self, now: EngineKey) -> list[str]:
        with suppress(OSError):
            found = (path.name for path in self._folder(now, "x").parent.iterdir())
            return sorted(name for name in found if not name.startswith("."))[:5]
        return []

    def _timing_path(self, now: EngineKey) -> Path:
        return self.root / "timing" / f"{timing_stem(now)}{CACHE_SUFFIX}"

    def _read(self, folder: Path, now: EngineKey) -> CachedEngine:
        try:
            for place in (self.root, folder.parent, folder):
                _check_owner(place, os.lstat(place))
            entry = CachedEngine.from_json(parse_json(read_owned(folder / _ENTRY)))
            if entry.key.foreign_to(now):
                raise UnsupportedError(
                    f"the cached engine was built for {entry.key.device}, this is {now.device}: "
                    f"{BUILD_HINT} with --rebuild"
                )
            content = {}
            for role, digest in entry.files.items():
                content[role] = read_owned(folder / _file_name(role, digest))
                if hashlib.sha256(content[role]).hexdigest() != digest:
                    raise TamperedError(f"the {role} is not the one that was built: its hash does not match")
        except TamperedError as error:
            raise TamperedError(f"engine cache {folder}: {error}; {BUILD_HINT} with --rebuild") from error
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            why = one_line(error, 200)
            raise TamperedError(f"engine cache {folder} is damaged ({why}); {BUILD_HINT} with --rebuild") from error
        return replace(entry, content=content)


def _file_name(role: str, digest: str) -> str:
    names = {"plan": "engine-{}.plan", "runtime": "runtime-{}.cache"}
    return names[role].format(digest[:16])


def _slug(key: EngineKey) -> str:
    return _plain(f"{key.gpu}-sm{key.compute_capability}")


def timing_stem(key: EngineKey) -> str:
    """Name of a timing cache without its suffix: library, version, GPU.

    Args:
        key: of a build.
    """
    return f"{_plain(f'{key.library}-{key.library_version}')}-{_slug(key)}"


def timing_content(raw: bytes) -> bytes:
    """What a file of the ``timing`` folder holds.

    Args:
        raw: the file: a hash, a newline, the bytes.

    Raises:
        TamperedError: its hash does not match.
    """
    digest, _, content = raw.partition(b"\n")
    if not content or hashlib.sha256(content).hexdigest().encode() != digest:
        raise TamperedError("the timing cache is not as it was written: its hash does not match")
    return content


def _plain(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "-", text).strip("-.")[:80] or "unnamed"


__all__ = [
    "ANY_AMPERE",
    "BUILD_HINT",
    "CACHE_SUFFIX",
    "ENTRY_VERSION",
    "CachedEngine",
    "EngineCache",
    "EngineKey",
    "timing_content",
    "timing_stem",
]
