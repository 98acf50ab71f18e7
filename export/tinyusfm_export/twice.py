"""What differs between two builds of the same parts, each with its reason.

A time of making and a measured latency differ between any two builds and are named as such. Whatever has no known
reason counts against the build. It does not build anything.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from tinyusfm_export.assemble import EPOCH_VARIABLE
from tinyusfm_runtime.bundle.reader import Bundle
from tinyusfm_runtime.strict_json import parse_json

TWICE_VERSION = 1
"""Version of the JSON that ``Twice.to_json`` writes."""
MAX_LEAVES = 5
"""Places inside a JSON file that are named; the rest is counted."""
_TIMED = "latency was measured in both builds"
_REASONS = (
    (r"manifest\.json", r"created_utc", f"time of making: set {EPOCH_VARIABLE} to fix it"),
    (r"reports/verdict-[^/]+\.json", r".*(_ms|samples_ms)(/.*)?|recommendation|sides/\d+/(speed|faster).*", _TIMED),
    (
        r"artefacts/tensorrt[^/]*/[^/]+\.engine",
        r"",
        "TensorRT built this engine ahead of time and chooses its kernels itself",
    ),
)  # file, place inside it, reason
# what a manifest repeats of the files themselves, which are compared above
_FOLLOWS = r"(files/.*|manifest_sha256|trace/(report|artefact)\..*|artefacts/\d+/files/.*)"


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """One thing that two builds do not share.

    Attributes:
        file: path relative to the bundle.
        place: where inside it, such as ``sides/0/p50_ms``; empty where it is no JSON.
        reason: why, or empty where nobody knows.
    """

    file: str
    place: str
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Twice:
    """What two builds do not share. True where every difference has a reason.

    Attributes:
        files: files compared, the manifest included.
        differences: in the order of the files.
    """

    files: int
    differences: tuple[Difference, ...]

    def __bool__(self) -> bool:
        return not self.unexplained

    @property
    def unexplained(self) -> tuple[Difference, ...]:
        """Differences without a known reason."""
        return tuple(difference for difference in self.differences if not difference.reason)

    @property
    def headline(self) -> str:
        """How it ended, one line."""
        if not self.differences:
            return f"two builds are the same to the last byte, {self.files} files"
        changed = sorted({difference.file for difference in self.differences})
        if self:
            return f"{self.files - len(changed)} of {self.files} files are the same; the rest differs for known reasons"
        bad = sorted({difference.file for difference in self.unexplained})
        return f"two builds differ for no known reason in {', '.join(bad[:3])}"

    def to_json(self) -> dict[str, Any]:
        """Plain data, ready for ``json.dumps``."""
        rows = [asdict(difference) for difference in self.differences]
        return {"version": TWICE_VERSION, "reproducible": bool(self), "files": self.files, "differences": rows}

    def table(self) -> list[tuple[str, str]]:
        """Rows (what differs, reason) for people; one a file and reason."""
        grouped: dict[tuple[str, str], list[str]] = {}
        for difference in self.differences:
            grouped.setdefault((difference.file, difference.reason), []).append(difference.place)
        return [
            (f"{file}: {_some(places)}" if any(places) else file, reason or "UNKNOWN")
            for (file, reason), places in grouped.items()
        ]


def compare_builds(first: Bundle, second: Bundle) -> Twice:
    """Compares two bundles that were built of the same parts.

    Args:
        first: one build.
        second: the other.
    """
    found: list[Difference] = []
    paths = sorted({*first.manifest.files, *second.manifest.files})
    for path in paths:
        ours, theirs = first.manifest.files.get(path), second.manifest.files.get(path)
        if ours != theirs:
            both = ours is not None and theirs is not None
            found += _differences(path, first.read(path) if both else b"", second.read(path) if both else b"")
    one, other = first.manifest.to_json(), second.manifest.to_json()
    found += [_explained("manifest.json", place) for place in _leaves(one, other) if not re.fullmatch(_FOLLOWS, place)]
    return Twice(files=len(paths) + 1, differences=tuple(found))


def _differences(path: str, ours: bytes, theirs: bytes) -> list[Difference]:
    if not ours or not theirs:
        return [Difference(file=path, place="only one build has it", reason="")]
    if path.endswith(".json"):
        try:
            return [_explained(path, place) for place in _leaves(parse_json(ours), parse_json(theirs))]
        except (ValueError, RecursionError):
            pass
    return [_explained(path, "")]


def _explained(file: str, place: str) -> Difference:
    for files, places, reason in _REASONS:
        if re.fullmatch(files, file) and re.fullmatch(places, place):
            return Difference(file=file, place=place, reason=reason)
    return Difference(file=file, place=place, reason="")


def _leaves(ours: Any, theirs: Any, prefix: str = "") -> Iterator[str]:
    """Places at which two JSON values differ."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for key in sorted({*ours, *theirs}):
            inside = f"{prefix}/{key}" if prefix else str(key)
            if key in ours and key in theirs:
                yield from _leaves(ours[key], theirs[key], inside)
            else:
                yield inside
    elif isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        for index, pair in enumerate(zip(ours, theirs, strict=True)):
            yield from _leaves(*pair, f"{prefix}/{index}" if prefix else str(index))
    elif ours != theirs:
        yield prefix


def _some(places: list[str]) -> str:
    more = len(places) - MAX_LEAVES
    return ", ".join(places[:MAX_LEAVES]) + (f" and {more} more" if more > 0 else "")


__all__ = ["MAX_LEAVES", "TWICE_VERSION", "Difference", "Twice", "compare_builds"]
