"""Manifest: what a bundle says about itself, and how that is written and read.

``manifest.json`` names every other file of the bundle with size and sha256, the artefacts in the
order in which they may stand in for one another, and where the weights come from. It carries the
hash of itself, so a flipped byte in it is found like one in any other file. That finds damage; it
is no signature: who can rewrite all files can rewrite the manifest as well. Compare
``manifest_sha256`` with a value from elsewhere where that matters.

It does not touch the disk (bundle.py reads, publish.py writes).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from enum import Enum
from typing import Any

from tinyusfm_runtime.bundle.golden import DEFAULT_LIMITS
from tinyusfm_runtime.errors import BundleError, InputError, TamperedError
from tinyusfm_runtime.plugins import stem
from tinyusfm_runtime.spec import REST_PRECISIONS, ModelSpec
from tinyusfm_runtime.strict_json import LARGEST_SIGNED, parse_json

_GATE_NAMES = {"probability_drift": "drift_worst", "cosine": "cosine_worst"}  # gate.py of the export -> selfcheck.py


def choose_artefact(manifest: Manifest, target: str | None, precision: str | None) -> Artefact:
    """The first artefact of the fallback that fits what was asked for.

    Raises:
        InputError: none fits; the message lists what there is.
    """
    fitting = [
        artefact
        for artefact in manifest.artefacts
        if target is None or stem(target) in (stem(artefact.target), artefact.engine)
    ]
    if precision is not None:
        typed = precision.strip().lower()
        # ``int8`` is the one that looks at all patches where there is one, ``int8-sector`` the pruned one
        exact = [artefact for artefact in fitting if artefact.variant == typed]
        fitting = exact or [artefact for artefact in fitting if artefact.precision == typed]
    if fitting:
        return fitting[0]
    wanted = " ".join(part for part in (target, precision) if part)
    there = ", ".join(artefact.name for artefact in manifest.artefacts)
    raise InputError(f"the bundle has no artefact {wanted!r}; it has: {there}")


MAX_LIMIT = 1e6
"""A larger number in a gate's report is no limit."""


def gate_limits(artefact: Artefact) -> dict[str, float]:
    """Thresholds the artefact was gated with, under the names used here.

    As far as its gate report names them.
    """
    report = artefact.gate or {}
    found = report.get("limits", report.get("gate"))
    if not isinstance(found, Mapping):
        return {}
    named = {_GATE_NAMES.get(name, name): value for name, value in found.items()}
    plain = {n: value for n, value in named.items() if n in DEFAULT_LIMITS and type(value) in (int, float)}
    return {n: float(value) for n, value in plain.items() if abs(value) <= MAX_LIMIT}


SCHEMA_VERSION = 2
"""Version of the folder layout and of the manifest's keys that this code reads and writes."""
MANIFEST_NAME = "manifest.json"
"""The one file that the manifest does not list."""
GOLDEN_FRAMES = "golden/frames.safetensors"
"""``pixels`` uint8 SHW, ``spacing_mm`` float64 S2 (row, column), ``seeds`` int64 S: phantom frames."""
GOLDEN_REFERENCE = "golden/reference.safetensors"
"""``logits`` float32 SKHW or SK of the PyTorch float32 reference, and what was made of them."""
GOLDEN_SECTOR = "golden/reference-sector.safetensors"
"""The same of the reference without the patches outside the model's sector, for artefacts that were pruned to it."""
DRIFT_FILE = "drift/statistic.safetensors"
"""Where a bundle keeps its drift statistic, if it has one."""
MAX_BUNDLE_BYTES = 1 << 30
"""A bundle of more than 1 GiB is not one for the edge; the cap bounds what a hostile one can make us read."""
TOLERANCE_CEILINGS: Mapping[str, float] = {"logit_abs": 1000.0, "differing_pixels": 0.05, "hc_mm": 5.0}
"""What the start-up check may allow at most, so that no manifest switches it off. Ours are 1.1, 0.001 and 0.2 or so;
logits have no scale of their own, so golden.py holds them against their spread as well."""
MAX_FILES = 4096
"""Files in one bundle, for the same reason."""

_COMPONENT = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,119}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


class ArtefactState(str, Enum):
    """Whether an artefact has shown that it agrees with the reference."""

    VERIFIED = "verified"
    """It passed its gate in its own engine before it was published."""
    UNVERIFIED = "unverified"
    """It did not, or was not asked to."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FileEntry:
    """One file's fingerprint.

    Attributes:
        sha256: hash of the content, 64 hex digits.
        size_bytes: length of the content.
    """

    sha256: str
    size_bytes: int

    def __post_init__(self) -> None:
        """Checks the form.

        Raises:
            BundleError: not a hash, or not a size.
        """
        if not isinstance(self.sha256, str) or not _SHA256.fullmatch(self.sha256):
            raise BundleError(f"{self.sha256!r} is not a sha256 in small hex digits")
        if type(self.size_bytes) is not int or not 0 <= self.size_bytes <= MAX_BUNDLE_BYTES:
            raise BundleError(f"{self.size_bytes!r} is not a file size of at most {MAX_BUNDLE_BYTES} bytes")


@dataclass(frozen=True, kw_only=True, slots=True)
class Artefact:
    """One way to run the model: a target in a precision.

    Attributes:
        target: the name people type, such as ``openvino``.
        engine: file stem of the engine that runs it, such as ``ov``.
        precision: ``fp32``, ``fp16``, ``bf16`` or ``int8``.
        rest_precision: ``f32``, ``f16`` or ``bf16``: in what everything is computed that is not INT8.
        form: how the quantization decision was written for this target, one phrase.
        files: path relative to the bundle -> fingerprint; the file names are the engine's own.
        requirements: ``cpu_features`` it was verified with, ``library``, ``library_version``, and ``pending``: what has
            still to complete its gate, one phrase, where its own engine could not run when it was exported; ``sector``
            where it was pruned: the name of the model's sector.
        gate: the parity report it passed or missed, or None.
        state: whether it may be used without asking.
        gated: False if the gate was switched off.
        golden: path of this artefact's own golden outputs.
        tolerance: ``logit_abs``, ``differing_pixels`` (fraction of the pixels), ``hc_mm`` for the start-up self-test.
    """

    target: str
    engine: str
    precision: str
    rest_precision: str
    form: str
    files: Mapping[str, FileEntry]
    requirements: Mapping[str, Any]
    gate: Mapping[str, Any] | None
    state: ArtefactState
    gated: bool = True
    golden: str
    tolerance: Mapping[str, float]

    def __post_init__(self) -> None:
        """Checks what a session relies on.

        Raises:
            BundleError: a value that no artefact can have.
        """
        for name in ("target", "engine", "precision"):
            value = getattr(self, name)
            if not isinstance(value, str) or not _COMPONENT.fullmatch(value):
                raise BundleError(f"artefact {name} {value!r} is not a plain name")
        if self.rest_precision not in REST_PRECISIONS:
            raise BundleError(f"artefact {self.name}: rest precision {self.rest_precision!r} is not known")
        if not self.files:
            raise BundleError(f"artefact {self.name} has no files")
        if len({path.rsplit("/", 1)[-1] for path in self.files}) != len(self.files):
            raise BundleError(f"artefact {self.name} has two files of the same name")
        sector = self.requirements.get("sector", "-")
        if not isinstance(sector, str) or not sector:
            raise BundleError(f"artefact {self.name}: sector {sector!r:.40} is not a name")
        for key, value in self.tolerance.items():
            ceiling = TOLERANCE_CEILINGS.get(key)
            if ceiling is None:
                raise BundleError(f"artefact {self.name}: tolerance {key!r} is not known")
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= ceiling:
                raise BundleError(f"artefact {self.name}: tolerance {key} = {value!r:.40} is not from 0 to {ceiling}")

    @property
    def name(self) -> str:
        """Target and variant, such as ``openvino-int8``; also the name of its folder."""
        return f"{self.target}-{self.variant}"

    @property
    def sector(self) -> str:
        """Name of the sector whose patches alone it looks at; empty where it looks at all."""
        return str(self.requirements.get("sector", ""))

    @property
    def variant(self) -> str:
        """Its precision, with ``-sector`` behind it where it was pruned to a sector."""
        return f"{self.precision}-sector" if self.sector else self.precision

    @property
    def reference(self) -> str:
        """Path of the reference's golden answers that it is held against."""
        return GOLDEN_SECTOR if self.sector else GOLDEN_REFERENCE

    @property
    def trusted(self) -> bool:
        """True if it passed a gate, so that it opens without ``allow_unverified``."""
        return self.state is ArtefactState.VERIFIED and self.gated

    @property
    def pending(self) -> str:
        """What has still to complete the gate, in words.

        Empty where nothing has, or the gate was switched off.
        """
        waits = self.gated and self.state is ArtefactState.UNVERIFIED
        return str(self.requirements.get("pending") or "") if waits else ""

    def to_json(self) -> dict[str, Any]:
        """Plain data, ready for ``json.dumps``."""
        plain = {f.name: getattr(self, f.name) for f in fields(self)}
        plain["files"] = _files_to_json(self.files)
        plain["state"] = ArtefactState(self.state).value
        return plain

    @classmethod
    def from_json(cls, data: Any) -> Artefact:
        """Reads what ``to_json`` wrote.

        Raises:
            BundleError: unknown or missing keys, or values of another kind.
        """
        kinds: dict[str, Any] = {
            "target": str, "engine": str, "precision": str, "rest_precision": str, "form": str, "files": dict,
            "requirements": dict, "gate": (dict, type(None)), "state": str, "gated": bool, "golden": str,
            "tolerance": dict,
        }  # fmt: skip
        values = _checked(data, kinds, "an artefact")
        values["files"] = _files_from_json(values["files"])
        if values["state"] not in {state.value for state in ArtefactState}:
            raise BundleError(f"artefact state {values['state']!r} is not known")
        values["state"] = ArtefactState(values["state"])
        return cls(**values)


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """What a bundle is.

    Attributes:
        schema: version of this layout.
        spec: the model.
        artefacts: ways to run it, best first: the fallback order.
        weights_sha256: hash of the float weights file the artefacts were made of.
        calibration_id: id of the calibration set, or None where nothing was calibrated.
        tools: tool -> version, of everything that had a hand in it.
        created_utc: time of making, ISO 8601, UTC.
        files: every file but the manifest -> fingerprint.
        drift: path of the drift statistic among the files, or None: then no frame is checked for drift.
        device_class: kind of device that the bundle is meant for, a plain name, or None for any.
        security_version: never falls from one release to the next, from 0 up, or None where nobody counts.
        trace: what it was made of: name of a stage -> hash (hex) of what went in, or None.
        manifest_sha256: hash of the manifest without this field; filled in by ``sealed`` and ``from_json``.
    """

    schema: int = SCHEMA_VERSION
    spec: ModelSpec
    artefacts: tuple[Artefact, ...]
    weights_sha256: str
    calibration_id: str | None
    tools: Mapping[str, str]
    created_utc: str
    files: Mapping[str, FileEntry]
    drift: str | None = None
    device_class: str | None = None
    security_version: int | None = None
    trace: Mapping[str, str] | None = None
    manifest_sha256: str = ""

    def __post_init__(self) -> None:
        """Checks that the parts fit together.

        Raises:
            BundleError: paths that leave the bundle, files nobody lists, two artefacts of one name, none at all.
        """
        check_paths(self.files)
        if not self.artefacts:
            raise BundleError("the manifest names no artefact")
        known = [artefact.name for artefact in self.artefacts]
        if len(set(known)) != len(known):
            raise BundleError(f"the manifest names an artefact twice: {', '.join(known)}")
        own = [path for artefact in self.artefacts for path in (artefact.golden, artefact.reference)]
        for needed in (GOLDEN_FRAMES, GOLDEN_REFERENCE, *own):
            if needed not in self.files:
                raise BundleError(f"the manifest does not list {needed!r}")
        for artefact in self.artefacts:
            if artefact.sector and artefact.sector != (self.spec.sector.name if self.spec.sector else ""):
                raise BundleError(f"artefact {artefact.name} was pruned to a sector that is not the model's")
            for path, entry in artefact.files.items():
                if self.files.get(path) != entry:
                    raise BundleError(f"artefact {artefact.name} and the file list disagree about {path!r}")
        if self.drift != (DRIFT_FILE if DRIFT_FILE in self.files else None):
            raise BundleError("the manifest and the file list disagree about the drift statistic")
        self._check_identity()

    def _check_identity(self) -> None:
        if self.device_class is not None and not _COMPONENT.fullmatch(self.device_class):
            raise BundleError(f"device class {self.device_class!r} is not a plain name")
        version = self.security_version
        if version is not None and (type(version) is not int or not 0 <= version < 1 << 31):
            raise BundleError(f"security version {version!r} is not a whole number from 0 to 2147483647")
        for stage, digest in (self.trace or {}).items():
            if not _COMPONENT.fullmatch(stage) or not isinstance(digest, str) or not _SHA256.fullmatch(digest):
                raise BundleError(f"trace {stage!r} -> {digest!r} is not a plain name and a sha256 in small hex digits")

    @property
    def bundle_id(self) -> str:
        """First 16 hex digits of ``manifest_sha256``.

        A short name for exactly these bytes.
        """
        return (self.manifest_sha256 or self.sealed().manifest_sha256)[:16]

    def sealed(self) -> Manifest:
        """The same manifest with its own hash filled in."""
        return replace(self, manifest_sha256=_self_hash(self.to_json()))

    def to_json(self) -> dict[str, Any]:
        """Plain data, ready for ``json.dumps``."""
        return {
            "schema": self.schema,
            "spec": self.spec.to_json(),
            "artefacts": [artefact.to_json() for artefact in self.artefacts],
            "weights_sha256": self.weights_sha256,
            "calibration_id": self.calibration_id,
            "tools": dict(self.tools),
            "created_utc": self.created_utc,
            "files": _files_to_json(self.files),
            "drift": self.drift,
            "device_class": self.device_class,
            "security_version": self.security_version,
            "trace": None if self.trace is None else dict(self.trace),
            "manifest_sha256": self.manifest_sha256,
        }

    @classmethod
    def from_json(cls, data: Any) -> Manifest:
        """Reads what ``to_json`` of a sealed manifest gave.

        Raises:
            TamperedError: the manifest's own hash does not match.
            BundleError: another schema version, unknown or missing keys, or values of another kind.
        """
        _check_schema(data)
        if data.get("manifest_sha256") != _self_hash(data):
            raise TamperedError("manifest.json is not the one that was published: its own hash does not match")
        kinds: dict[str, Any] = {
            "schema": int, "spec": dict, "artefacts": list, "weights_sha256": str,
            "calibration_id": (str, type(None)), "tools": dict, "created_utc": str, "files": dict,
            "drift": (str, type(None)), "device_class": (str, type(None)), "security_version": (int, type(None)),
            "trace": (dict, type(None)), "manifest_sha256": str,
        }  # fmt: skip
        values = _checked(data, kinds, "the manifest")
        written = values["spec"]
        try:
            values["spec"] = ModelSpec.from_json(written)
        except InputError as error:
            raise BundleError(f"the manifest's model cannot be read: {error}") from error
        whole = values["spec"].to_json()
        if set(whole) != set(written) or set(whole["preprocess"]) != set(written["preprocess"]):
            missing = sorted({*whole, *whole["preprocess"]} - {*written, *written["preprocess"]})
            raise BundleError(f"the manifest's model lacks {', '.join(missing)}: a manifest names every key")
        values["artefacts"] = tuple(Artefact.from_json(artefact) for artefact in values["artefacts"])
        values["files"] = _files_from_json(values["files"])
        return cls(**values)


def manifest_bytes(manifest: Manifest) -> bytes:
    """What stands in ``manifest.json``.

    Sealed, keys sorted, ASCII, indented for people.
    """
    return _pretty(manifest.sealed().to_json())


def read_manifest(raw: bytes) -> Manifest:
    """Parses ``manifest.json``.

    Args:
        raw: content of the file.

    Returns:
        The manifest, its own hash checked.

    Raises:
        TamperedError: the bytes are not what ``manifest_bytes`` writes, so somebody changed them.
        BundleError: another schema version, or not a manifest.
    """
    try:
        data = parse_json(raw.decode("ascii"), largest=LARGEST_SIGNED)
        # half a surrogate pair: not every reader keeps it, so none takes it
        json.dumps(data, ensure_ascii=False).encode("utf-8")
    except ValueError as error:
        raise TamperedError(f"manifest.json cannot be parsed: {' '.join(str(error).split())[:200]}") from error
    _check_schema(data)
    if _pretty(data) != raw:
        raise TamperedError("manifest.json is not byte for byte as it was written")
    return Manifest.from_json(data)


def file_entry(content: bytes) -> FileEntry:
    """Fingerprint of some content."""
    return FileEntry(sha256=hashlib.sha256(content).hexdigest(), size_bytes=len(content))


def check_paths(paths: Mapping[str, FileEntry]) -> None:
    """Checks that a list of files can only mean files inside the bundle.

    The same ones on every system.

    Raises:
        BundleError: a path is absolute, leaves the bundle, hides, or equals another one but for its capitals;
            there are too many files, or they are too large.
    """
    if len(paths) > MAX_FILES:
        raise BundleError(f"the manifest lists {len(paths)} files; {MAX_FILES} is the most")
    for path in paths:
        if not isinstance(path, str) or not all(_COMPONENT.fullmatch(part) for part in path.split("/")):
            raise BundleError(f"the manifest lists {path!r}, which is not a plain path inside the bundle")
        if path.lower() == MANIFEST_NAME:
            raise BundleError("the manifest lists itself")
    if len({path.lower() for path in paths}) != len(paths):
        raise BundleError("the manifest lists paths that differ in capitals only")
    if sum(entry.size_bytes for entry in paths.values()) > MAX_BUNDLE_BYTES:
        raise BundleError(f"the files in the manifest are larger than {MAX_BUNDLE_BYTES} bytes together")


def _check_schema(data: Any) -> None:
    if not isinstance(data, dict) or type(data.get("schema")) is not int:
        raise BundleError("manifest.json is not a bundle's manifest: it has no schema version")
    if data["schema"] != SCHEMA_VERSION:
        newer = data["schema"] > SCHEMA_VERSION
        raise BundleError(
            f"the bundle has schema version {data['schema']}, this tinyusfm-edge reads version {SCHEMA_VERSION}: "
            + ("upgrade tinyusfm-edge" if newer else f"export the bundle again: {_export_line(data)}")
        )


def _export_line(data: Mapping[str, Any]) -> str:
    """The command that makes an older bundle again, as far as its manifest tells.

    Only plain names are repeated.
    """
    spec, artefacts = data.get("spec"), data.get("artefacts")
    name = spec.get("name") if isinstance(spec, dict) else None
    listed = [entry for entry in artefacts if isinstance(entry, dict)] if isinstance(artefacts, list) else []
    targets = dict.fromkeys(str(entry.get("target")) for entry in listed if _is_name(entry.get("target")))
    flags = dict.fromkeys(f"--{entry.get('precision')}" for entry in listed if _is_name(entry.get("precision")))
    student = name if _is_name(name) else "WEIGHTS"
    return " ".join(["tinyusfm-edge export", str(student), "--target", ",".join(targets) or "openvino", *flags])


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and _COMPONENT.fullmatch(value) is not None


def _checked(data: Any, kinds: Mapping[str, Any], what: str) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise BundleError(f"{what} is written as {type(data).__name__}, not as a JSON object")
    unknown, missing = sorted(set(data) - set(kinds)), sorted(set(kinds) - set(data))
    if unknown or missing:
        raise BundleError(f"{what} has unknown keys {unknown} and lacks {missing}")
    for key, kind in kinds.items():
        if not isinstance(data[key], kind) or (kind is int and isinstance(data[key], bool)):
            raise BundleError(f"{what}: {key} is written as {type(data[key]).__name__}")
    return dict(data)


def _files_to_json(files: Mapping[str, FileEntry]) -> dict[str, Any]:
    return {path: asdict(entry) for path, entry in files.items()}


def _files_from_json(data: dict[str, Any]) -> dict[str, FileEntry]:
    kinds = {"sha256": str, "size_bytes": int}
    return {path: FileEntry(**_checked(entry, kinds, f"the entry of {path!r}")) for path, entry in data.items()}


def _self_hash(data: Mapping[str, Any]) -> str:
    body = {key: value for key, value in data.items() if key != "manifest_sha256"}
    compact = json.dumps(body, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(compact.encode("ascii")).hexdigest()


def _pretty(data: Any) -> bytes:
    return (json.dumps(data, sort_keys=True, indent=1, allow_nan=False) + "\n").encode("ascii")


__all__ = [
    "DRIFT_FILE",
    "GOLDEN_FRAMES",
    "GOLDEN_REFERENCE",
    "GOLDEN_SECTOR",
    "MANIFEST_NAME",
    "MAX_BUNDLE_BYTES",
    "MAX_FILES",
    "MAX_LIMIT",
    "SCHEMA_VERSION",
    "TOLERANCE_CEILINGS",
    "Artefact",
    "ArtefactState",
    "FileEntry",
    "Manifest",
    "check_paths",
    "choose_artefact",
    "file_entry",
    "gate_limits",
    "manifest_bytes",
    "read_manifest",
]
