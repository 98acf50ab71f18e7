"""A protocol of predetermined changes: kinds that are allowed, and criteria.

    version = 1
    model = "fetal-head"

    [description]
    allowed = ["calibration", "engine", "tools"]
    rationale = "calibrated again when a site sends frames"

    [protocol]
    data_sha256 = "<hash of the test data, see `bundle diff`>"
    split = "test"
    strata = true
    [protocol.margins]
    dice = 0.01
    [protocol.limits]
    flips = 0.02
    latency_ratio = 1.1

    [impact]
    benefit = "..."
    risk = "..."

Its three parts are those of the FDA's final guidance on predetermined change control plans (August 2025). It does not
know bundles.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tinyusfm_edge.change.kinds import KINDS
from tinyusfm_edge.evaluation.noninferiority import check_margins
from tinyusfm_runtime.errors import InputError
from tinyusfm_runtime.strict_json import parse_json

PROTOCOL_VERSION = 1
MAX_BYTES = 1 << 20
LIMITS = ("flips", "latency_ratio")
"""Largest share of frames whose answer changes; largest ratio of the median latencies, new to old."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Protocol:
    """What was declared beforehand.

    Attributes:
        model: name of the model that it is for.
        allowed: kinds of modification, see ``kinds.KINDS``.
        rationale: why these.
        data_sha256: hash of the test data's files.
        split: of the test data.
        strata: margins hold for each kind of frame too.
        margins: metric -> how much worse is allowed.
        limits: see ``LIMITS``.
        benefit: what the changes are good for.
        risk: what they may do, and what stands against it.
    """

    model: str
    allowed: frozenset[str]
    rationale: str
    data_sha256: str
    split: str = "test"
    strata: bool = False
    margins: Mapping[str, float] = field(default_factory=dict)
    limits: Mapping[str, float] = field(default_factory=dict)
    benefit: str = ""
    risk: str = ""

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            InputError: an unknown kind, metric or limit, no acceptance criterion, or a hash that is none.
        """
        if unknown := sorted(self.allowed - set(KINDS)):
            raise InputError(f"the protocol allows {unknown[0]!r}: kinds are {', '.join(KINDS)}")
        if not self.allowed or not self.rationale.strip():
            raise InputError("the protocol's description names no kind of modification, or not why")
        check_margins(self.margins)
        if not self.margins:
            raise InputError("the protocol states no margin: without acceptance criteria nothing can be accepted")
        for name, limit in self.limits.items():
            if name not in LIMITS or not 0.0 <= limit < float("inf"):
                raise InputError(f"the protocol's limit {name} = {limit}: limits are {', '.join(LIMITS)}, from 0 up")
        if not re.fullmatch(r"[0-9a-f]{64}", self.data_sha256):
            raise InputError("the protocol's data_sha256 is no sha256: `bundle diff --data` prints that of a folder")
        if self.split not in ("train", "val", "test"):
            raise InputError(f"the protocol's split {self.split!r} is not train, val or test")


def read_protocol(path: Path) -> Protocol:
    """Reads a protocol.

    Args:
        path: ``.toml`` or ``.json``.

    Raises:
        InputError: it cannot be read, or says something that cannot be used.
    """
    try:
        raw = path.read_bytes()
        if len(raw) > MAX_BYTES:
            raise InputError(f"{path.name} is larger than any protocol")
        data = _parse(path, raw.decode("utf-8"))
    except OSError as error:
        raise InputError(f"protocol {path} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"protocol {path.name} cannot be read: {' '.join(str(error).split())[:200]}") from error
    return _protocol(data, path.name)


def _parse(path: Path, text: str) -> Any:
    if path.suffix == ".json":
        return parse_json(text)
    try:
        import tomllib
    except ImportError as error:  # Python 3.10
        raise InputError(f"{path.name}: .toml needs Python 3.11; write the protocol as .json") from error
    return tomllib.loads(text)


def _protocol(data: Any, name: str) -> Protocol:
    parts = {"description": ("allowed", "rationale"), "impact": ("benefit", "risk")}
    inner = ("data_sha256", "split", "strata", "margins", "limits")
    try:
        if data["version"] != PROTOCOL_VERSION:
            raise InputError(f"{name} is of version {data['version']!r}; this release reads {PROTOCOL_VERSION}")
        unknown = {key for key in data if key not in ("version", "model", "protocol", *parts)}
        unknown |= {key for part, keys in parts.items() for key in data[part] if key not in keys}
        unknown |= {key for key in data["protocol"] if key not in inner}
        if unknown:
            raise InputError(f"{name} has unknown keys: {', '.join(sorted(unknown))}")
        protocol = data["protocol"]
        return Protocol(
            model=_text(data["model"]),
            allowed=frozenset(_text(kind) for kind in data["description"]["allowed"]),
            rationale=_text(data["description"]["rationale"]),
            data_sha256=_text(protocol["data_sha256"]),
            split=_text(protocol.get("split", "test")),
            strata=bool(protocol.get("strata", False)),
            margins={str(key): float(value) for key, value in protocol.get("margins", {}).items()},
            limits={str(key): float(value) for key, value in protocol.get("limits", {}).items()},
            benefit=_text(data["impact"]["benefit"]),
            risk=_text(data["impact"]["risk"]),
        )
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
        raise InputError(f"{name} lacks or misuses {error}: see docs/trust/evidence.md") from error


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"text, where {value!r:.40} stands")
    return value


__all__ = ["LIMITS", "MAX_BYTES", "PROTOCOL_VERSION", "Protocol", "read_protocol"]
