"""What a bundle was made of, as hashes, and whether they still match.

    images -> coreset -> teacher -> start -> student -> calibration -> gate-frames -> artefact.NAME -> report.NAME

``made_trace`` writes the stages into a manifest. ``trace_bundle`` computes again whatever it can: artefacts, reports
and calibration from the bundle itself, the earlier stages from files that are at hand. A stage that nobody recorded is
said to be so; it is never guessed.

It does not know where students and images lie.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any

from tinyusfm_calibration.ranges import Ranges
from tinyusfm_runtime.bundle.manifest import DRIFT_FILE, GOLDEN_FRAMES, GOLDEN_REFERENCE, GOLDEN_SECTOR, Artefact
from tinyusfm_runtime.bundle.reader import Bundle
from tinyusfm_runtime.drift import DriftStatistic
from tinyusfm_runtime.errors import BundleError, CalibrationError
from tinyusfm_runtime.strict_json import parse_json

TRACE_VERSION = 1
"""Version of the JSON that ``Trace.to_json`` writes."""
UPSTREAM = ("images", "negatives", "unlabelled", "coreset", "teacher", "start")
"""Stages before the student, in the order of the chain."""
ORDER = (*UPSTREAM, "student", "calibration", "golden", "gate-frames", "artefact", "report")
"""All stages in the order of the chain; a stage of an artefact has the artefact's name behind a dot."""


class Match(str, Enum):
    """How a recorded hash compares with what is there."""

    MATCHES = "matches"
    DIFFERS = "differs"
    """What is there is not what the bundle was made of."""
    NOT_AT_HAND = "not at hand"
    """Recorded; what it belongs to was not given, so nothing was computed again."""
    NOT_RECORDED = "not recorded"


@dataclass(frozen=True, kw_only=True, slots=True)
class Link:
    """One stage of the chain.

    Attributes:
        stage: its name.
        recorded: sha256 (hex) in the manifest, or empty.
        found: sha256 (hex) of what is there now, or empty.
        match: how they compare.
        note: what was compared, one phrase.
    """

    stage: str
    recorded: str
    found: str
    match: Match
    note: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Trace:
    """The chain of one bundle.

    True where nothing that could be computed again differs.

    Attributes:
        bundle_id: short name of exactly these bytes.
        links: in the order of the chain.
    """

    bundle_id: str
    links: tuple[Link, ...]

    def __bool__(self) -> bool:
        return not self.broken

    @property
    def broken(self) -> tuple[Link, ...]:
        """Stages that no longer match."""
        return tuple(link for link in self.links if link.match is Match.DIFFERS)

    def to_json(self) -> dict[str, Any]:
        """Plain data, ready for ``json.dumps``."""
        links = [{**asdict(link), "match": link.match.value} for link in self.links]
        return {"version": TRACE_VERSION, "bundle_id": self.bundle_id, "matches": bool(self), "links": links}

    def table(self) -> list[tuple[str, str, str, str]]:
        """Rows (stage, recorded, match, note) for people."""
        return [(link.stage, link.recorded[:16] or "-", link.match.value, link.note) for link in self.links]


def lines_sha256(lines: Iterable[str]) -> str:
    """sha256 (hex) over sorted lines, a line feed after each."""
    return hashlib.sha256("".join(f"{line}\n" for line in sorted(lines)).encode("utf-8")).hexdigest()


def artefact_sha256(artefact: Artefact) -> str:
    """Hash of an artefact's files: over lines of path and sha256."""
    return lines_sha256(f"{path} {entry.sha256}" for path, entry in artefact.files.items())


def made_trace(
    files: Mapping[str, bytes],
    artefacts: Sequence[Artefact],
    *,
    weights_sha256: str,
    calibration_id: str | None,
    upstream: Mapping[str, str],
) -> dict[str, str]:
    """The stages of a bundle that is being made.

    Args:
        files: path relative to the bundle -> content.
        artefacts: manifest entries.
        weights_sha256: of the student's file, hex.
        calibration_id: id of the calibration set, hex, or None.
        upstream: stages before the student, as the student's file has them.
    """
    found = {**upstream, "student": weights_sha256, "golden": _golden_sha256(files)}
    if calibration_id is not None:
        found["calibration"] = calibration_id
    for artefact in artefacts:
        found[f"artefact.{artefact.name}"] = artefact_sha256(artefact)
        if (path := _report_path(artefact)) in files:
            found[f"report.{artefact.name}"] = hashlib.sha256(files[path]).hexdigest()
        if frames := _gate_frames(artefact.gate):
            found["gate-frames"] = lines_sha256(frames)
    return {stage: digest for stage, digest in found.items() if re.fullmatch(r"[0-9a-f]{64}", digest)}


def trace_bundle(
    bundle: Bundle,
    at_hand: Mapping[str, tuple[str, str]] | None = None,
    known: Mapping[str, str] | None = None,
) -> Trace:
    """Compares what a bundle says it was made of with what is there.

    Args:
        bundle: an open bundle; its bytes are the manifest's.
        at_hand: stage -> (sha256 (hex) of what is there now, what that is), for stages outside the bundle.
        known: stage -> what is known of one that nobody recorded, one phrase.

    Raises:
        BundleError: a file of the bundle cannot be read.
    """
    recorded, given = {**_named(bundle), **(bundle.manifest.trace or {})}, dict(at_hand or {})
    here = {**_inside(bundle), **given}
    stages = sorted(
        {*recorded, *here, *ORDER[: ORDER.index("student") + 1]} - set(_left_out(recorded, here)), key=_rank
    )
    told = known or {}
    links = [_link(stage, recorded.get(stage, ""), here.get(stage), told.get(stage, "")) for stage in stages]
    links += _inner_links(bundle)
    return Trace(bundle_id=bundle.manifest.bundle_id, links=tuple(links))


def _left_out(recorded: Mapping[str, str], here: Mapping[str, tuple[str, str]]) -> list[str]:
    """Stages that a training need not have; where they are missing nothing is lacking."""
    return [stage for stage in ("negatives", "unlabelled") if stage not in recorded and stage not in here]


def _rank(stage: str) -> tuple[int, int, str]:
    """Place in the chain; what a start was made of comes before what was made of it."""
    bare = stage.split("start.")[-1]
    kind = bare.split(".")[0]
    return (-stage.count("start."), ORDER.index(kind) if kind in ORDER else len(ORDER), stage)


def _link(stage: str, recorded: str, found: tuple[str, str] | None, known: str) -> Link:
    digest, note = found or ("", "")
    if not recorded:
        match = Match.NOT_RECORDED
        note = "; ".join(part for part in (known, note) if part) or "whoever made the student did not say"
    elif not digest:
        match = Match.NOT_AT_HAND
    else:
        match = Match.MATCHES if digest == recorded else Match.DIFFERS
    return Link(stage=stage, recorded=recorded, found=digest, match=match, note=note)


def _inside(bundle: Bundle) -> dict[str, tuple[str, str]]:
    """Stages that the bundle itself holds: stage -> (hash now, what it is)."""
    files = {path: bundle.read(path) for path in bundle.manifest.files if not path.startswith("artefacts/")}
    found = {"golden": (_golden_sha256(files), "golden frames and the reference's answers")}
    for artefact in bundle.manifest.artefacts:
        found[f"artefact.{artefact.name}"] = (artefact_sha256(artefact), f"{len(artefact.files)} files")
        if (path := _report_path(artefact)) in files:
            found[f"report.{artefact.name}"] = (hashlib.sha256(files[path]).hexdigest(), path)
        if frames := _gate_frames(artefact.gate):
            found["gate-frames"] = (lines_sha256(frames), f"{len(frames)} frames that the gate was judged on")
    return found


def _named(bundle: Bundle) -> dict[str, str]:
    """Stages that a manifest names without a trace."""
    manifest = bundle.manifest
    named = {"student": manifest.weights_sha256, "calibration": manifest.calibration_id or ""}
    return {stage: digest for stage, digest in named.items() if digest}


def _inner_links(bundle: Bundle) -> list[Link]:
    """What one part of a bundle says of another.

    Ranges and drift name the student, ranges their calibration set.
    """
    manifest = bundle.manifest
    traced = manifest.trace or {}
    found = [
        _said(f"manifest -> {stage}", digest, traced[stage])
        for stage, digest in _named(bundle).items()
        if stage in traced
    ]
    if "quant.json" in manifest.files:
        ranges = _ranges(bundle)
        if ranges is not None:
            if ranges.weights_sha256:
                found.append(_said("quant.json -> student", manifest.weights_sha256, ranges.weights_sha256))
            found.append(_said("quant.json -> calibration", manifest.calibration_id or "", ranges.set_id))
    if DRIFT_FILE in manifest.files:
        weights = DriftStatistic.from_bytes(bundle.read(DRIFT_FILE)).about.get("weights_sha256")
        if weights:
            found.append(_said("drift -> student", manifest.weights_sha256, str(weights)))
    for artefact in manifest.artefacts:
        found += _report_links(bundle, artefact)
    return found


def _said(stage: str, recorded: str, found: str) -> Link:
    match = Match.MATCHES if recorded == found else Match.DIFFERS
    return Link(stage=stage, recorded=recorded, found=found, match=match, note="what one part says of another")


def _report_links(bundle: Bundle, artefact: Artefact) -> list[Link]:
    """A report and the manifest's summary of it must tell of the same frames."""
    path = _report_path(artefact)
    if path not in bundle.manifest.files or not (own := _gate_frames(artefact.gate)):
        return []
    try:
        told = _gate_frames(parse_json(bundle.read(path)))
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{path} is not JSON: export the bundle again") from error
    return [_said(f"{path} -> gate-frames", lines_sha256(own), lines_sha256(told))]


def _ranges(bundle: Bundle) -> Ranges | None:
    try:
        data = parse_json(bundle.read("quant.json"))["ranges"]
        return None if data is None else Ranges.from_json(data)
    except (CalibrationError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise BundleError(f"quant.json cannot be read: {error}") from error


def _golden_sha256(files: Mapping[str, bytes]) -> str:
    # the third is there where artefacts were pruned to a sector
    named = [GOLDEN_FRAMES, GOLDEN_REFERENCE, *(path for path in (GOLDEN_SECTOR,) if path in files)]
    return lines_sha256(f"{path} {hashlib.sha256(files[path]).hexdigest()}" for path in named)


def _report_path(artefact: Artefact) -> str:
    return f"reports/{artefact.name}.json"


def _gate_frames(report: Mapping[str, Any] | None) -> list[str]:
    """Hashes of the frames that a parity report was judged on."""
    frames = (report or {}).get("frames")
    listed = frames.get("pixels_sha256") if isinstance(frames, Mapping) else None
    return [str(digest) for digest in listed] if isinstance(listed, (list, tuple)) else []


__all__ = [
    "ORDER",
    "TRACE_VERSION",
    "UPSTREAM",
    "Link",
    "Match",
    "Trace",
    "artefact_sha256",
    "lines_sha256",
    "made_trace",
    "trace_bundle",
]
