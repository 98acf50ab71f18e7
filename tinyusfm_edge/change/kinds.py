"""What kinds of modification lie between two bundles; it runs nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tinyusfm_runtime.bundle.manifest import DRIFT_FILE
from tinyusfm_runtime.bundle.reader import Bundle
from tinyusfm_runtime.errors import BundleError
from tinyusfm_runtime.strict_json import parse_json

KINDS: Mapping[str, str] = {
    "weights": "the student's weights",
    "architecture": "the student's architecture",
    "calibration": "frames or ranges that INT8 is calibrated with",
    "quantization": "which tensors are 8-bit, and how the graph is prepared",
    "artefacts": "targets and precisions that the bundle offers, their order, or whether they passed a gate",
    "graph": "files of an artefact, where nothing above explains it",
    "engine": "version of the inference library that an artefact was verified with",
    "tools": "versions of what made the bundle",
    "preprocessing": "how a frame becomes the input",
    "postprocessing": "what is made of the logits: post-processing, second pass, least area",
    "thresholds": "probability cuts, and when a reading is good",
    "labels": "task and names of the outputs",
    "intended-use": "name, intended use, licence and origin, plausible anatomy, probe",
    "early-exits": "when a classifier stops early",
    "drift": "what the calibration frames look like",
    "tolerance": "how far a start may lie from the golden answers",
    "golden": "golden frames, or the reference's answers to them where the weights are the same",
    "device": "device class or security version",
}
"""Kind of modification -> what it is."""

_SPEC_KINDS = {
    "preprocess": "preprocessing", "postprocess": "postprocessing", "second_pass": "postprocessing",
    "min_area": "postprocessing", "threshold": "thresholds", "reading": "thresholds", "labels": "labels",
    "task": "labels", "architecture": "architecture", "exits": "early-exits",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Modification:
    """One modification.

    Attributes:
        kind: a key of ``KINDS``.
        what: the part, such as ``threshold``.
        before: short text of the old value.
        after: short text of the new value.
    """

    kind: str
    what: str
    before: str
    after: str


def modifications(old: Bundle, new: Bundle) -> tuple[Modification, ...]:
    """Everything that differs between two bundles, sorted into kinds.

    Args:
        old: the bundle in use.
        new: the one that shall replace it.

    Raises:
        BundleError: a file of a bundle cannot be read.
    """
    found = [*_spec(old, new), *_quantized(old, new), *_tools(old, new), *_artefacts(old, new), *_rest(old, new)]
    explained = {item.kind for item in found}
    return tuple([*found, *_unexplained(old, new, explained)])


def _short(value: Any) -> str:
    return " ".join(str(value).split())[:60]


def _changed(kind: str, what: str, before: Any, after: Any) -> list[Modification]:
    if before == after:
        return []
    return [Modification(kind=kind, what=what, before=_short(before), after=_short(after))]


def _spec(old: Bundle, new: Bundle) -> list[Modification]:
    before, after = old.manifest.spec.to_json(), new.manifest.spec.to_json()
    found = _changed("weights", "weights file", old.manifest.weights_sha256, new.manifest.weights_sha256)
    for name in sorted({*before, *after} - {"weights_sha256"}):
        found += _changed(_SPEC_KINDS.get(name, "intended-use"), name, before.get(name), after.get(name))
    return found


def _quant(bundle: Bundle) -> dict[str, Any]:
    if "quant.json" not in bundle.manifest.files:
        return {}
    try:
        found: dict[str, Any] = parse_json(bundle.read("quant.json"))
    except (ValueError, RecursionError) as error:
        raise BundleError(f"quant.json cannot be read: {error}") from error
    return found


def _quantized(old: Bundle, new: Bundle) -> list[Modification]:
    before, after = _quant(old), _quant(new)
    found = _changed("calibration", "calibration set", old.manifest.calibration_id, new.manifest.calibration_id)
    ranges = [(side.get("ranges") or {}).get("tensors", {}) for side in (before, after)]
    moved = [name for name in {*ranges[0], *ranges[1]} if ranges[0].get(name) != ranges[1].get(name)]
    if moved:
        found += _changed("calibration", f"{len(moved)} activation ranges", "before", "moved")
    for name in ("decision", "preparation"):
        if before.get(name) != after.get(name):
            tensors = [len((side.get(name) or {}).get("tensors", ())) for side in (before, after)]
            shown = [f"{count} tensors" for count in tensors] if name == "decision" else ["before", "changed"]
            if shown[0] == shown[1]:
                shown[1] += ", others"
            found += _changed("quantization", name, *shown)
    return found


def _tools(old: Bundle, new: Bundle) -> list[Modification]:
    before, after = old.manifest.tools, new.manifest.tools
    found = []
    for name in sorted({*before, *after}):
        found += _changed("tools", name, before.get(name, "-"), after.get(name, "-"))
    return found


def _artefacts(old: Bundle, new: Bundle) -> list[Modification]:
    before = {artefact.name: artefact for artefact in old.manifest.artefacts}
    after = {artefact.name: artefact for artefact in new.manifest.artefacts}
    found = _changed("artefacts", "offered", ", ".join(before), ", ".join(after))
    for name in before.keys() & after.keys():
        left, right = before[name], after[name]
        found += _changed("artefacts", f"{name} passed its gate", left.trusted, right.trusted)
        found += _changed("tolerance", name, dict(left.tolerance), dict(right.tolerance))
        for key in sorted({*left.requirements, *right.requirements}):
            said = left.requirements.get(key), right.requirements.get(key)
            found += _changed("engine", f"{name} {key}", *said)
    return found


def _rest(old: Bundle, new: Bundle) -> list[Modification]:
    found = []
    digests = [bundle.manifest.files[DRIFT_FILE].sha256 if bundle.manifest.drift else None for bundle in (old, new)]
    found += _changed("drift", "drift statistic", *digests)
    found += _changed("device", "device class", old.manifest.device_class, new.manifest.device_class)
    found += _changed("device", "security version", old.manifest.security_version, new.manifest.security_version)
    return found


def _unexplained(old: Bundle, new: Bundle, explained: set[str]) -> list[Modification]:
    """Files that differ though nothing that was said accounts for it."""
    causes = {"weights", "architecture", "calibration", "quantization", "artefacts", "early-exits", "drift", "tools"}
    found = []
    if not explained & (causes | {"preprocessing"}):
        for name in _files(old).keys() & _files(new).keys():
            found += _changed("graph", f"files of {name}", _files(old)[name], _files(new)[name])
    for path in ("golden/frames.safetensors", "golden/reference.safetensors"):
        digests = [bundle.manifest.files[path].sha256 for bundle in (old, new)]
        if "frames" in path or not explained - {"tools", "engine", "tolerance", "device"}:
            found += _changed("golden", path, *digests)
    return found


def _files(bundle: Bundle) -> dict[str, tuple[tuple[str, str], ...]]:
    return {
        artefact.name: tuple(sorted((path, entry.sha256) for path, entry in artefact.files.items()))
        for artefact in bundle.manifest.artefacts
    }


__all__ = ["KINDS", "Modification", "modifications"]
