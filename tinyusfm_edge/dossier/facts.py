"""What is known of a bundle for its papers: libraries of the device, card, scores.

The libraries are those that the bundle's engines need on a device, with whatever they need in turn, as the metadata of
the installed distributions has it. It does not know any output format.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from tinyusfm_edge import students
from tinyusfm_runtime.bundle.reader import Bundle
from tinyusfm_runtime.errors import InputError
from tinyusfm_runtime.strict_json import parse_json

MANUFACTURER = "for the manufacturer to fill in"
"""Where only the manufacturer of the device can know."""
BASE = ("numpy", "typer")
"""Distributions that the runtime itself needs."""
PURPOSES = {
    "tinyusfm-edge": "runs the bundle: verification, preprocessing, post-processing, measurement, live loop",
    "numpy": "arrays of frames, tensors and results",
    "typer": "the command line; not needed by a program that uses the runtime in Python",
    "openvino": "computes the network on CPU, GPU or NPU",
    "onnxruntime": "computes the network on the CPU",
    "tensorrt": "computes the network on an NVIDIA GPU",
    "tensorrt-rtx": "computes the network on an NVIDIA GPU",
    "coremltools": "computes the network on a Mac",
    "ai-edge-litert": "computes the network on the CPU",
}
"""What a library is for; any other one is needed by one of these."""
TELEMETRY = "is installed with OpenVINO; its import is shut out, nothing is sent"


@dataclass(frozen=True, kw_only=True, slots=True)
class InstalledLibrary:
    """One library of the device.

    Attributes:
        name: of the distribution.
        version: installed here, or the bundle's word where it is not installed.
        verified_with: version that the artefact's gate ran with, or empty.
        licence: SPDX expression or words, as its metadata states it; empty if it states nothing.
        supplier: as its metadata states it.
        purpose: what it is for.
        needed_by: who needs it.
        record_sha256: hash (hex) of the installed list of files with their hashes (RECORD), or empty.
        anomalies: address of the list of known anomalies, or empty.
        requires: names of the libraries it needs.
        purl: package URL, or empty for that of a Python distribution.
    """

    name: str
    version: str
    verified_with: str = ""
    licence: str = ""
    supplier: str = ""
    purpose: str = ""
    needed_by: str = ""
    record_sha256: str = ""
    anomalies: str = ""
    requires: tuple[str, ...] = ()
    purl: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class BundleFacts:
    """What the papers are written from.

    Attributes:
        bundle: the open bundle.
        libraries: of the device, the runtime first.
        card: content of the shipped student's ``card.json``, or empty.
        scores: reports of ``evaluate --json`` on these weights, or of the card.
        reports: artefact -> its parity report in full, where the bundle holds it.
        notes: what a reader must know, such as a library that is not installed here.
    """

    bundle: Bundle
    libraries: tuple[InstalledLibrary, ...]
    card: Mapping[str, Any] = field(default_factory=dict)
    scores: tuple[Mapping[str, Any], ...] = ()
    reports: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def gather(
    bundle: Bundle,
    scores: Path | None = None,
    device: tuple[list[InstalledLibrary], tuple[str, ...]] | None = None,
) -> BundleFacts:
    """Gathers what is known.

    Args:
        bundle: an open bundle.
        scores: file that ``evaluate --json`` wrote, or None: a shipped student has its card.
        device: libraries of the device and notes on them, or None for those of a Python device.

    Raises:
        InputError: the scores cannot be read, or belong to other weights.
    """
    manifest = bundle.manifest
    known = students.find_by_hash(manifest.weights_sha256)
    card = students.card(known) if known is not None else {}
    libraries, notes = device or device_libraries(bundle)
    found = _scores(scores, manifest.weights_sha256) if scores is not None else _card_scores(card)
    paths = {artefact.name: f"reports/{artefact.name}.json" for artefact in manifest.artefacts}
    reports = {name: parse_json(bundle.read(path)) for name, path in paths.items() if path in manifest.files}
    if not found:
        notes += ("no accuracy on patients: give --scores, a file that evaluate --json wrote for these weights",)
    return BundleFacts(
        bundle=bundle, libraries=tuple(libraries), card=card, scores=tuple(found), reports=reports, notes=notes
    )


def _scores(path: Path, weights_sha256: str) -> list[Mapping[str, Any]]:
    try:
        data = parse_json(path.read_text(encoding="utf-8"))
        if data["version"] != 1 or data["weights_sha256"] != weights_sha256:
            raise InputError(f"{path.name} was not measured on this bundle's student: evaluate that one")
        return [dict(report) for report in data["reports"]]
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{path.name} is not what evaluate --json writes: {error}") from error


def _card_scores(card: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    metrics = card.get("metrics") or {}
    return [metrics[split] for split in ("val", "test") if isinstance(metrics.get(split), Mapping)]


def device_libraries(bundle: Bundle) -> tuple[list[InstalledLibrary], tuple[str, ...]]:
    """Libraries that a device with this bundle has, and what is not known here.

    Args:
        bundle: an open bundle.
    """
    engines = {
        str(artefact.requirements["library"]): str(artefact.requirements.get("library_version", ""))
        for artefact in bundle.manifest.artefacts
        if artefact.requirements.get("library")
    }
    found: dict[str, InstalledLibrary] = {"tinyusfm-edge": _library("tinyusfm-edge", "", "", ())}
    waiting = [(name, "tinyusfm-edge") for name in BASE] + [(name, "an artefact of the bundle") for name in engines]
    while waiting:
        name, needed_by = waiting.pop(0)
        key = _canonical(name)
        if key in found:
            continue
        inner = () if key == "tinyusfm-edge" else _requirements(key)
        found[key] = _library(key, engines.get(name, ""), needed_by, inner)
        waiting += [(inside, key) for inside in inner]
    notes = [
        f"{library.name} {library.version} is not installed here: licence and hash are not known"
        for library in found.values()
        if not library.record_sha256 and library.name != "tinyusfm-edge"
    ]
    notes += [
        f"{library.name} {library.version} is installed here; the gate ran with {library.verified_with}"
        for library in found.values()
        if library.verified_with and library.verified_with != library.version
    ]
    return list(found.values()), tuple(notes)


def _library(name: str, verified_with: str, needed_by: str, requires: tuple[str, ...]) -> InstalledLibrary:
    try:
        there = distribution(name)
    except PackageNotFoundError:
        purpose = PURPOSES.get(name, f"needed by {needed_by}")
        return InstalledLibrary(
            name=name, version=verified_with or "unknown", verified_with=verified_with, purpose=purpose,
            needed_by=needed_by, requires=requires,
        )  # fmt: skip
    record = there.read_text("RECORD")
    purpose = TELEMETRY if name == "openvino-telemetry" else PURPOSES.get(name, f"needed by {needed_by}")
    return InstalledLibrary(
        name=name,
        version=there.version,
        verified_with=verified_with,
        licence=_licence(there),
        supplier=_supplier(there),
        purpose=purpose,
        needed_by=needed_by,
        record_sha256=hashlib.sha256(record.encode("utf-8")).hexdigest() if record else "",
        anomalies=_anomalies(there),
        requires=requires,
    )


def _requirements(name: str) -> tuple[str, ...]:
    """Names that a distribution needs here without any extra."""
    try:
        lines = distribution(name).requires or []
    except PackageNotFoundError:
        return ()
    found = []
    for line in lines:
        needed = re.match(r"[A-Za-z0-9._-]+", line)
        _, _, marker = line.partition(";")
        # a marker names an extra or another system; what is not installed here is then not needed here
        elsewhere = re.search(r"['\"](Windows|win32|nt)['\"]", marker) is not None and os.name != "nt"
        if needed is None or elsewhere or "extra" in marker or (marker and not _installed(needed.group())):
            continue
        found.append(_canonical(needed.group()))
    return tuple(dict.fromkeys(found))


def _installed(name: str) -> bool:
    try:
        distribution(name)
    except PackageNotFoundError:
        return False
    return True


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _licence(there: Distribution) -> str:
    meta = there.metadata
    if "License-Expression" in meta:
        return str(meta["License-Expression"])
    named = [line.split("::")[-1].strip() for line in meta.get_all("Classifier") or [] if line.startswith("License ::")]
    if named:
        return " and ".join(named)
    return (str(meta["License"]) if "License" in meta else "").strip().split("\n")[0][:120]


def _supplier(there: Distribution) -> str:
    meta = there.metadata
    stated = [str(meta[key]) for key in ("Author", "Author-email", "Maintainer") if key in meta and meta[key]]
    text = stated[0] if stated else ""
    return text.split("<")[0].strip() or text


def _anomalies(there: Distribution) -> str:
    urls = [line.split(",", 1) for line in there.metadata.get_all("Project-URL") or [] if "," in line]
    named = {label.strip().lower(): url.strip() for label, url in urls}
    for label in ("issues", "bug tracker", "tracker", "bug reports"):
        if label in named:
            return named[label]
    known = {
        "openvino": "https://github.com/openvinotoolkit/openvino/issues",
        "onnxruntime": "https://github.com/microsoft/onnxruntime/issues",
        "ai-edge-litert": "https://github.com/google-ai-edge/LiteRT/issues",
        "protobuf": "https://github.com/protocolbuffers/protobuf/issues",
    }
    if there.name and _canonical(there.name) in known:
        return known[_canonical(there.name)]
    sources = [named[label] for label in ("source", "source code", "repository", "homepage") if label in named]
    hosted = [url for url in sources if re.match(r"https://git(hub|lab)\.com/[^/]+/[^/]+/?$", url)]
    return hosted[0].rstrip("/") + "/issues" if hosted else ""


def estimates(report: Mapping[str, Any]) -> list[tuple[str, float, float | None, float | None, int, int]]:
    """Numbers of a report of scores.

    (name, value, low, high, frames, patients); None without an interval.

    Args:
        report: one report of ``evaluate --json``, or of a card.
    """
    found: list[tuple[str, float, float | None, float | None, int, int]] = []
    for name, value in sorted(report.items()):
        if isinstance(value, Mapping) and {"mean", "low", "high"} <= set(value):
            found.append((name, value["mean"], value["low"], value["high"], value["num_values"], value["num_groups"]))
        elif type(value) is float and name not in ("threshold",):
            found.append((name, value, None, None, 0, 0))
    return found


__all__ = [
    "BASE",
    "MANUFACTURER",
    "PURPOSES",
    "TELEMETRY",
    "BundleFacts",
    "InstalledLibrary",
    "device_libraries",
    "estimates",
    "gather",
]
