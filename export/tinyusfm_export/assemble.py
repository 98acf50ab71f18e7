"""From checked artefacts to a bundle's files and manifest entries.

Also the rehearsal before it is published.

The rehearsal opens the bundle in memory with the runtime's own Session, as a user will, so that a bundle that cannot be
opened is never written. It does not know targets or PyTorch, and the writing itself is the runtime's (publish.py).
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from tinyusfm_calibration.ranges import Ranges
from tinyusfm_export.artefacts import ArtefactSet
from tinyusfm_export.quantize.range_choice import Preparation
from tinyusfm_export.trace import made_trace
from tinyusfm_export.verify.artefact import CheckedArtefact
from tinyusfm_export.verify.expected import Expected
from tinyusfm_export.verify.golden import pack_frames, pack_own, pack_reference
from tinyusfm_export.verify.verdict import Verdict
from tinyusfm_runtime import plugins
from tinyusfm_runtime.bundle.manifest import (
    GOLDEN_FRAMES,
    GOLDEN_REFERENCE,
    GOLDEN_SECTOR,
    Artefact,
    ArtefactState,
    Manifest,
    file_entry,
)
from tinyusfm_runtime.bundle.reader import Bundle
from tinyusfm_runtime.bundle.writer import write_bundle
from tinyusfm_runtime.drift import DRIFT_FILE, DriftStatistic
from tinyusfm_runtime.errors import InputError
from tinyusfm_runtime.frame import Frame
from tinyusfm_runtime.session import Session
from tinyusfm_runtime.spec import ModelSpec

QUANT_FILE = "quant.json"
"""The one quantization decision of all targets, the ranges and the preparation behind it, and notes on both."""

QUANT_VERSION = 2
"""Version of ``quant.json``."""

EPOCH_VARIABLE = "SOURCE_DATE_EPOCH"
"""Environment variable with the time of making, so that two builds of the same parts carry the same one."""

TOOLS = (
    "tinyusfm-edge", "numpy", "torch", "onnx", "onnxruntime", "openvino", "nncf", "tensorrt-rtx", "tensorrt",
    "coremltools", "ai-edge-litert", "tflite",
)  # fmt: skip
"""Distributions whose versions a bundle names, where they are installed."""


def golden_path(name: str) -> str:
    """Where an artefact's own golden answers lie in the bundle."""
    return f"golden/{name}.safetensors"


def artefact_path(artefact: CheckedArtefact, name: str) -> str:
    """Where one of an artefact's files lies in the bundle.

    A target may ask for folders of its own (``FOLDERS``).
    """
    folders: Mapping[str, str] = getattr(plugins.load("targets", artefact.target), "FOLDERS", {})
    return f"artefacts/{artefact.name}/{folders.get(name, name)}"


def bundle_files(
    fallback: ArtefactSet,
    golden: Expected,
    frames: Sequence[Frame],
    *,
    spec: ModelSpec,
    ranges: Ranges | None,
    verdicts: Sequence[Verdict],
    preparation: Preparation | None = None,
    drift: DriftStatistic | None = None,
    pruned: Expected | None = None,
) -> dict[str, bytes]:
    """Everything but the manifest.

    Args:
        fallback: checked artefacts, best first, and the decision they share.
        golden: golden frames with the reference's answers.
        frames: the golden frames.
        spec: the model, as the manifest will hold it.
        ranges: activation ranges, where any artefact is int8.
        verdicts: one per target.
        preparation: how the graph was changed before it became int8.
        drift: what the calibration frames look like, where it is known.
        pruned: the golden frames with the answers of the reference without the patches outside the sector, or None.

    Returns:
        Path relative to the bundle -> content.
    """
    files = {
        GOLDEN_FRAMES: pack_frames(frames),
        GOLDEN_REFERENCE: pack_reference(golden.outputs, spec, golden.inputs, golden.exits),
    }
    if pruned is not None:
        files[GOLDEN_SECTOR] = pack_reference(pruned.outputs, spec, pruned.inputs, pruned.exits)
    for artefact in fallback.artefacts:
        files.update({artefact_path(artefact, name): raw for name, raw in artefact.files.items()})
        own = pack_own(artefact.golden, spec, golden.inputs, exact=artefact.exact)
        files[golden_path(artefact.name)] = own
        files[f"reports/{artefact.name}.json"] = to_bytes(artefact.report.to_json())
    for verdict in verdicts:
        files[f"reports/verdict-{verdict.target}.json"] = to_bytes(verdict.to_json())
    decision = fallback.decisions.get("int8")
    if decision is not None:
        quant = {
            "version": QUANT_VERSION,
            "decision": decision.to_json(),
            "ranges": None if ranges is None else ranges.to_json(),
            "preparation": (preparation or Preparation()).to_json(),
            "notes": list(fallback.notes),
        }
        files[QUANT_FILE] = to_bytes(quant)
    if drift is not None:
        files[DRIFT_FILE] = drift.to_bytes()
    return files


def manifest_artefacts(
    artefacts: Sequence[CheckedArtefact], files: Mapping[str, bytes], *, gated: bool
) -> tuple[Artefact, ...]:
    """The manifest's entries, in the order of the fallback order.

    Args:
        artefacts: checked artefacts, best first.
        files: path relative to the bundle -> content.
        gated: False where the gate was switched off; nothing then counts as verified.
    """
    return tuple(
        Artefact(
            target=artefact.public_target,
            engine=artefact.target,
            precision=artefact.decision.precision,
            rest_precision=artefact.rest_precision,
            form=artefact.form,
            files={path: file_entry(files[path]) for path in (artefact_path(artefact, n) for n in artefact.files)},
            requirements=artefact.requirements,
            gate=artefact.report.summary(),
            state=_state(artefact, gated),
            gated=gated,
            golden=golden_path(artefact.name),
            tolerance=artefact.tolerance,
        )
        for artefact in artefacts
    )


def _state(artefact: CheckedArtefact, gated: bool) -> ArtefactState:
    passed = gated and artefact.report and not artefact.pending
    return ArtefactState.VERIFIED if passed else ArtefactState.UNVERIFIED


def rehearse_and_publish(
    out: Path,
    *,
    spec: ModelSpec,
    artefacts: tuple[Artefact, ...],
    files: Mapping[str, bytes],
    calibration_id: str | None,
    upstream: Mapping[str, str] | None = None,
) -> Path:
    """Opens every artefact of the bundle-to-be in memory, then publishes.

    Args:
        out: the bundle's folder.
        spec: the model, with the hash of its weights.
        artefacts: manifest entries.
        files: path relative to the bundle -> content.
        calibration_id: id of the calibration set, or None.
        upstream: what the student was made of, stage -> sha256 (hex), as its file says it.

    Returns:
        The published folder.

    Raises:
        EngineError: an artefact does not open, or does not give its own answers again.
        OutputError: the folder cannot be written; nothing is left behind.
        InputError: SOURCE_DATE_EPOCH is no time.
    """
    created = made_at()
    trace = made_trace(
        files,
        artefacts,
        weights_sha256=spec.weights_sha256,
        calibration_id=calibration_id,
        upstream=upstream or {},
    )
    tools = tool_versions()
    manifest = Manifest(
        spec=spec,
        artefacts=artefacts,
        weights_sha256=spec.weights_sha256,
        calibration_id=calibration_id,
        tools=tools,
        created_utc=created,
        files={path: file_entry(content) for path, content in files.items()},
        drift=DRIFT_FILE if DRIFT_FILE in files else None,
        trace=trace,
    ).sealed()
    bundle = Bundle(out, manifest, dict(files))
    for artefact in artefacts:
        if artefact.requirements.get("pending"):  # its engine runs elsewhere; its stand-in has run these bytes
            continue
        Session.open(bundle, target=artefact.target, precision=artefact.variant, allow_unverified=True).close()
    return write_bundle(
        out,
        spec=spec,
        artefacts=artefacts,
        weights_sha256=spec.weights_sha256,
        calibration_id=calibration_id,
        tools=tools,
        files=files,
        created_utc=created,
        trace=trace,
    )


def made_at(environment: Mapping[str, str] | None = None) -> str:
    """Time of making, ISO 8601, UTC.

    SOURCE_DATE_EPOCH where it is set (reproducible-builds.org), else now.

    Args:
        environment: variables; None is the process's own.

    Raises:
        InputError: the variable is no number of seconds since 1970.
    """
    text = (os.environ if environment is None else environment).get(EPOCH_VARIABLE)
    if text is None or text == "":
        moment = datetime.now(timezone.utc)
    else:
        try:
            moment = datetime.fromtimestamp(int(text), timezone.utc)
        except (ValueError, OverflowError, OSError):
            raise InputError(f"{EPOCH_VARIABLE} is {text[:40]!r}: give whole seconds since 1970") from None
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")


def tool_versions() -> dict[str, str]:
    """Versions of everything that had a hand in a bundle."""
    found = {"python": platform.python_version()}
    for name in TOOLS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def to_bytes(data: Any) -> bytes:
    """JSON as it stands in a bundle: sorted, indented, ASCII, no NaN."""
    return (json.dumps(data, sort_keys=True, indent=1, allow_nan=False) + "\n").encode("ascii")


__all__ = [
    "EPOCH_VARIABLE",
    "QUANT_FILE",
    "QUANT_VERSION",
    "TOOLS",
    "artefact_path",
    "bundle_files",
    "golden_path",
    "made_at",
    "manifest_artefacts",
    "rehearse_and_publish",
    "to_bytes",
    "tool_versions",
]
