"""Outcome of a gate that ran on the device itself.

Kept outside the bundle; it turns ``unverified`` into verified.

A bundle is read-only, and what an artefact does on one device says little about another. So the outcome is keyed by the
content hash of the artefact's files, device, operating system, library and settings, and carries its own hash; a record
of anything else, or one that was changed, counts as none. TensorRT keeps its outcomes with its engines instead
(engine_cache.py). It knows no engine and no gate.

Layout, in the same cache folder as engines::

    gates/<first 24 hex digits of the content hash>/<first 16 hex digits of the key's hash>.json
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tinyusfm_runtime.device.owned_files import default_root, json_sha256, make_owned, read_owned, write_owned
from tinyusfm_runtime.errors import OutputError, TamperedError
from tinyusfm_runtime.strict_json import parse_json

RECORD_VERSION = 1
"""Version of a record's file."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GateKey:
    """What was judged and where.

    Attributes:
        content_sha256: of the artefact's files, see ``files_sha256``.
        device: the machine, such as ``Apple M2 (Mac14,2)``.
        system: operating system and version.
        library: what ran the artefact.
        library_version: its version.
        settings: what else changes the answers, such as the compute units.
    """

    content_sha256: str
    device: str
    system: str
    library: str
    library_version: str
    settings: str

    @property
    def words(self) -> str:
        """Device, system, library and settings, one line."""
        return f"{self.device}, {self.system}, {self.library} {self.library_version}, {self.settings}"


def files_sha256(files: Mapping[str, bytes]) -> str:
    """Hash of an artefact's files by name.

    Args:
        files: file name -> content.
    """
    digest = hashlib.sha256()
    for name, content in sorted(files.items()):
        digest.update(f"{name}|{hashlib.sha256(content).hexdigest()}|".encode())
    return digest.hexdigest()


def read_record(key: GateKey, root: Path | None = None) -> Mapping[str, Any] | None:
    """The outcome kept under a key.

    None if there is none, or none that can be trusted.

    Args:
        key: what is judged, here and now.
        root: the cache's folder; None takes the one the environment names.
    """
    try:
        data = parse_json(read_owned(_path(key, root)))
        body = {name: value for name, value in data.items() if name != "record_sha256"}
        whole = data["record_sha256"] == json_sha256(body)
        known = body["version"] == RECORD_VERSION and body["key"] == asdict(key)
        return body["outcome"] if whole and known and isinstance(body["outcome"], dict) else None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, TamperedError):
        return None


def keep_record(key: GateKey, outcome: Mapping[str, Any], root: Path | None = None) -> Path:
    """Writes an outcome in place of an older one.

    Args:
        key: what was judged, and where.
        outcome: plain data: ``passed``, ``bundle_id``, ``report``.
        root: the cache's folder; None takes the one the environment names.

    Returns:
        The record's file.

    Raises:
        OutputError: no room, or no permission.
        TamperedError: the folder belongs to somebody else, or others may write to it.
        InputError: the environment names no usable cache folder.
    """
    path = _path(key, root)
    body = {"version": RECORD_VERSION, "key": asdict(key), "outcome": dict(outcome)}
    raw = json.dumps({**body, "record_sha256": json_sha256(body)}, indent=1, sort_keys=True) + "\n"
    try:
        make_owned(path.parents[2], path.parent)
        write_owned(path, raw.encode("ascii"))
    except OSError as error:
        raise OutputError(f"cannot keep the gate's outcome in {path.parent}: {error.strerror or error}") from error
    return path


def _path(key: GateKey, root: Path | None) -> Path:
    place = default_root() if root is None else root
    return place / "gates" / key.content_sha256[:24] / f"{json_sha256(asdict(key))[:16]}.json"


__all__ = ["RECORD_VERSION", "GateKey", "files_sha256", "keep_record", "read_record"]
