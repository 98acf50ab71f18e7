"""Engines built on a device: a cache outside the bundle that is trusted only where key, hash and owner are right.

An engine is native code for one GPU, driver and version of its library. So each entry is keyed by the content hash of
the ONNX, GPU, compute capability, library, driver and build flags; it carries the hash of every file and of itself, and
the outcome of the gate on that device. The folder and all in it must belong to the user and be writable by nobody else,
since whoever can write here runs code. An entry that is out of date is *stale* and is built anew; one of another GPU is
*foreign*, one whose bytes changed *tampered*: both are refused.

Layout, below $TINYUSFM_EDGE_CACHE, else $XDG_CACHE_HOME/tinyusfm-edge, else ~/.cache/tinyusfm-edge::

    engines/<first 24 hex digits of the content hash>/<gpu, or ampere-plus>/entry.json
    engines/<...>/<...>/engine-<hash>.plan, runtime-<hash>.cache
    timing/<library, version, gpu>.cache            sha256 in hex, a newline, the bytes

``entry.json`` is replaced last and in one step, so a reader finds the old entry or the new one. It knows no TensorRT.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import stat
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from tinyusfm_runtime.errors import InputError, OutputError, TamperedError, UnsupportedError

ENTRY_VERSION = 1
"""Version of ``entry.json``."""
CACHE_VARIABLE = "TINYUSFM_EDGE_CACHE"
"""Environment variable that names another cache folder, for building and for running."""
ANY_AMPERE = "ampere-plus"
"""Folder of engines that run on every GPU from compute capability 8.0 on."""
MAX_FILE_BYTES = 1 << 30
"""A larger file is no engine of a model for the edge."""
BUILD_HINT = "run `tinyusfm-edge build BUNDLE` on this machine"
"""What mends nearly everything here."""
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
        """Why an engine with this key is out of date on a device with another key, one phrase each."""
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
        """Writes an entry in place of an older one; killed at any moment, the old or the new one is there.

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
            make_owned(self.root, folder)
            for role, raw in content.items():
                write_owned(folder / _file_name(role, stored.files[role]), raw)
            write_owned(
                folder / _ENTRY, (json.dumps(stored.to_json(), indent=1, sort_keys=True) + "\n").encode("ascii")
            )
            kept = {_ENTRY, *(_file_name(role, digest) for role, digest in stored.files.items())}
            for path in folder.iterdir():
                if path.name not in kept:
                    path.unlink()
        except OSError as error:
            raise OutputError(f"cannot write the engine cache {self.root}: {error.strerror or error}") from error
        return stored

    def remove(self, now: EngineKey) -> None:
        """Deletes whatever stands where entries for a device stand.

        Raises:
            OutputError: it cannot be deleted.
        """
        for slot in self._slots(now):
            folder = self._folder(now, slot)
            try:
                if folder.is_symlink():
                    folder.unlink()
                for path in sorted(folder.iterdir()) if folder.is_dir() else []:
                    path.unlink()
                if folder.is_dir():
                    folder.rmdir()
            except OSError as error:
                raise OutputError(f"cannot clear the engine cache {folder}: {error.strerror or error}") from error

    def timing(self, now: EngineKey) -> bytes:
        """What earlier builds on this device measured, or nothing; damaged bytes count as nothing."""
        with suppress(OSError, TamperedError):
            digest, _, raw = read_owned(self._timing_path(now)).partition(b"\n")
            if hashlib.sha256(raw).hexdigest().encode() == digest:
                return raw
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
            return sorted(path.name for path in self._folder(now, "x").parent.iterdir())[:5]
        return []

    def _timing_path(self, now: EngineKey) -> Path:
        return self.root / "timing" / f"{_plain(f'{now.library}-{now.library_version}')}-{_slug(now)}.cache"

    def _read(self, folder: Path, now: EngineKey) -> CachedEngine:
        try:
            for place in (self.root, folder.parent, folder):
                _check_owner(place, os.lstat(place))
            entry = CachedEngine.from_json(json.loads(read_owned(folder / _ENTRY)))
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
            why = _one_line(error)
            raise TamperedError(f"engine cache {folder} is damaged ({why}); {BUILD_HINT} with --rebuild") from error
        return replace(entry, content=content)


def default_root() -> Path:
    """The cache folder that the environment names.

    Raises:
        InputError: it names a relative path, or there is no home folder.
    """
    if named := os.environ.get(CACHE_VARIABLE):
        if not Path(named).is_absolute():
            raise InputError(f"{CACHE_VARIABLE} must be an absolute path, not {named!r}")
        return Path(named)
    base = os.environ.get("XDG_CACHE_HOME", "")
    if base and Path(base).is_absolute():  # the XDG specification ignores relative ones
        return Path(base) / "tinyusfm-edge"
    try:
        return Path.home() / ".cache" / "tinyusfm-edge"
    except RuntimeError as error:
        raise InputError(f"there is no home folder for the engine cache: set {CACHE_VARIABLE}") from error


def make_owned(root: Path, folder: Path) -> None:
    """Makes a folder of a cache, and those above it from the cache's own on, for their owner only.

    Args:
        root: the cache's folder.
        folder: a folder below it.

    Raises:
        TamperedError: one of them is a link, belongs to somebody else, or others may write to it.
        OSError: no room, or no permission.
    """
    root.parent.mkdir(parents=True, exist_ok=True)
    below = folder.relative_to(root).parts
    for depth in range(len(below) + 1):
        place = root.joinpath(*below[:depth])
        with suppress(FileExistsError):
            os.mkdir(place, 0o700)  # noqa: PTH102  Path.mkdir would leave the mode to the umask for some of them
        _check_owner(place, os.lstat(place))


def _check_owner(place: Path, found: os.stat_result) -> None:
    if stat.S_ISLNK(found.st_mode):
        raise TamperedError(f"{place.name!r} is a link")
    if hasattr(os, "geteuid") and found.st_uid != os.geteuid():
        raise TamperedError(f"{place.name!r} belongs to another user")
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise TamperedError(f"{place.name!r} may be written to by others (chmod go-w mends it)")


def read_owned(path: Path) -> bytes:
    """Reads a plain file of ours once, following no link.

    Raises:
        TamperedError: it is none, or belongs to somebody else.
        OSError: it is not there, or cannot be read.
    """
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    with os.fdopen(handle, "rb") as file:
        found = os.fstat(handle)
        _check_owner(path, found)
        if not stat.S_ISREG(found.st_mode) or found.st_nlink != 1 or found.st_size > MAX_FILE_BYTES:
            raise TamperedError(f"{path.name!r} is no plain file of ours")
        return file.read(found.st_size + 1)


def write_owned(path: Path, raw: bytes) -> None:
    """Writes a file whole or not at all, readable and writable by its owner only.

    Raises:
        OSError: no room, or no permission.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "wb") as file:
            file.write(raw)
            file.flush()
            os.fsync(handle)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _file_name(role: str, digest: str) -> str:
    names = {"plan": "engine-{}.plan", "runtime": "runtime-{}.cache"}
    return names[role].format(digest[:16])


def _slug(key: EngineKey) -> str:
    return _plain(f"{key.gpu}-sm{key.compute_capability}")


def _plain(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "-", text).strip("-.")[:80] or "unnamed"


def json_sha256(data: Mapping[str, Any]) -> str:
    """Hash of plain data, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(data, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


__all__ = [
    "ANY_AMPERE",
    "BUILD_HINT",
    "CACHE_VARIABLE",
    "ENTRY_VERSION",
    "MAX_FILE_BYTES",
    "CachedEngine",
    "EngineCache",
    "EngineKey",
    "default_root",
    "json_sha256",
    "make_owned",
    "read_owned",
    "write_owned",
]
