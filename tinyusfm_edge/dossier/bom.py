"""The bill of materials as CycloneDX 1.6 JSON, with the model's card in it.

cyclonedx-python-lib writes no model card, so the JSON is written here and checked against the schemas inside its wheel
(extra ``dossier``). Nothing is fetched. Specification: https://cyclonedx.org/docs/1.6/json/.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Mapping
from typing import Any

from tinyusfm_edge.dossier.facts import MANUFACTURER, BundleFacts, InstalledLibrary, estimates
from tinyusfm_runtime.errors import MissingExtra

SPEC_VERSION = "1.6"
NAMESPACE = uuid.UUID("7c2f6c3a-2f52-5b7e-9a41-b0a1b0f5ad10")
"""Of the serial numbers: the same bundle has the same one."""
KNOWN_LICENCES = frozenset(
    {"Apache-2.0", "MIT", "BSD-2-Clause", "BSD-3-Clause", "CC-BY-4.0", "CC0-1.0", "PSF-2.0", "ISC", "MPL-2.0", "Zlib"}
)
"""SPDX identifiers that are written as such; anything else is written as a name."""
_EXPRESSION = re.compile(r"[A-Za-z0-9.+-]+( (AND|OR|WITH) [A-Za-z0-9.+()-]+)*")


def make_bom(facts: BundleFacts) -> dict[str, Any]:
    """The bill of materials of a bundle on a device.

    Args:
        facts: what is known.

    Returns:
        Plain data, CycloneDX 1.6.
    """
    manifest = facts.bundle.manifest
    digest = manifest.manifest_sha256 or manifest.sealed().manifest_sha256
    libraries = [_library(library) for library in facts.libraries]
    files = [
        {
            "type": "file",
            "bom-ref": f"file:{path}",
            "name": path,
            "hashes": [{"alg": "SHA-256", "content": entry.sha256}],
        }
        for path, entry in sorted(manifest.files.items())
    ]
    names = {library.name for library in facts.libraries}
    engines = {str(a.requirements.get("library")) for a in manifest.artefacts} & names
    depends = [
        {"ref": "model", "dependsOn": sorted({f"lib:{facts.libraries[0].name}", *(f"lib:{name}" for name in engines)})}
    ]
    depends += [
        {"ref": f"lib:{library.name}", "dependsOn": sorted(f"lib:{name}" for name in library.requires if name in names)}
        for library in facts.libraries
    ]
    return {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": SPEC_VERSION,
        "serialNumber": f"urn:uuid:{uuid.uuid5(NAMESPACE, digest)}",
        "version": 1,
        "metadata": {
            "timestamp": manifest.created_utc,
            "lifecycles": [{"phase": "post-build"}],
            "tools": {"components": [_tool(name, version) for name, version in sorted(manifest.tools.items())]},
            "component": _model(facts, digest),
            "properties": [{"name": "tinyusfm:note", "value": note} for note in facts.notes]
            + [{"name": "tinyusfm:manufacturer", "value": f"supplier, users and risk of the device: {MANUFACTURER}"}],
        },
        "components": [*libraries, *files],
        "dependencies": depends,
    }


def _tool(name: str, version: str) -> dict[str, Any]:
    return {"type": "application", "name": name, "version": version}


def _library(library: InstalledLibrary) -> dict[str, Any]:
    found: dict[str, Any] = {
        "type": "library",
        "bom-ref": f"lib:{library.name}",
        "name": library.name,
        "version": library.version,
        "purl": library.purl or f"pkg:pypi/{library.name}@{library.version}",
        "description": library.purpose,
        "scope": "required",
        "properties": [],
    }
    if library.supplier:
        found["supplier"] = {"name": library.supplier}
    if library.licence:
        found["licenses"] = _licences(library.licence)
    if library.anomalies:
        found["externalReferences"] = [{"type": "issue-tracker", "url": library.anomalies}]
    if library.record_sha256:
        hashed = "file-sha256" if library.purl else "record-sha256"
        found["properties"].append({"name": f"tinyusfm:{hashed}", "value": library.record_sha256})
    if library.verified_with:
        found["properties"].append({"name": "tinyusfm:verified-with", "value": library.verified_with})
    return found


def _licences(text: str) -> list[dict[str, Any]]:
    if text in KNOWN_LICENCES:
        return [{"license": {"id": text}}]
    if _EXPRESSION.fullmatch(text) and (" OR " in text or " AND " in text or " WITH " in text):
        return [{"expression": text}]
    return [{"license": {"name": text}}]


def _model(facts: BundleFacts, digest: str) -> dict[str, Any]:
    manifest = facts.bundle.manifest
    spec = manifest.spec
    found: dict[str, Any] = {
        "type": "machine-learning-model",
        "bom-ref": "model",
        "name": spec.name,
        "version": manifest.bundle_id,
        "description": spec.origin or "origin not stated",
        "hashes": [{"alg": "SHA-256", "content": digest}],
        "modelCard": _card(facts),
        "properties": [
            {"name": "tinyusfm:weights-sha256", "value": manifest.weights_sha256},
            {"name": "tinyusfm:security-version", "value": str(manifest.security_version)},
            {"name": "tinyusfm:device-class", "value": str(manifest.device_class)},
            *(
                {"name": f"tinyusfm:trace:{stage}", "value": value}
                for stage, value in sorted((manifest.trace or {}).items())
            ),
        ],
    }
    if spec.licence:
        found["licenses"] = _licences(spec.licence)
    return found


def _card(facts: BundleFacts) -> dict[str, Any]:
    spec = facts.bundle.manifest.spec
    pre = spec.preprocess
    architecture = ", ".join(f"{key} {value}" for key, value in sorted(spec.architecture.items()))
    parameters: dict[str, Any] = {
        "approach": {"type": "supervised"},
        "task": spec.task.value,
        "architectureFamily": "vision transformer",
        "modelArchitecture": architecture or "not stated",
        "inputs": [
            {"format": f"grey B-mode frame of any size, resized to {pre.height}x{pre.width} ({pre.aspect.value})"}
        ],
        "outputs": [{"format": f"{spec.task.value}: {', '.join(spec.labels) or 'features'}; {spec.postprocess.value}"}],
    }
    if datasets := _datasets(facts):
        parameters["datasets"] = datasets
    return {
        "bom-ref": "model-card",
        "modelParameters": parameters,
        "quantitativeAnalysis": {"performanceMetrics": _metrics(facts)},
        "considerations": {
            "users": [MANUFACTURER],
            "useCases": [spec.intended_use or MANUFACTURER],
            "technicalLimitations": limits(facts),
        },
    }


def _datasets(facts: BundleFacts) -> list[dict[str, Any]]:
    data = facts.card.get("data")
    if not isinstance(data, Mapping):
        return []
    splits = "; ".join(
        f"{name}: {counts['frames']} frames of {counts['groups']} patients"
        for name, counts in sorted((data.get("splits") or {}).items())
    )
    found: dict[str, Any] = {
        "type": "dataset",
        "name": str(data["name"]),
        "description": f"{data.get('title', '')}. {splits}. Licence: {data.get('licence', 'not stated')}.",
        "sensitiveData": ["images of patients, made public without names by their owners"],
    }
    if data.get("doi"):
        found["contents"] = {"url": f"https://doi.org/{data['doi']}"}
    others = data.get("others")
    return [found, {"type": "dataset", "name": "others", "description": str(others)}] if others else [found]


def _metrics(facts: BundleFacts) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for report in facts.scores:
        for name, value, low, high, frames, patients in estimates(report):
            counted = f", {frames} frames of {patients} patients" if frames else ""
            metric: dict[str, Any] = {
                "type": name,
                "value": f"{value:.6g}",
                "slice": f"PyTorch float32, split {report.get('split', '')}{counted}",
            }
            if low is not None and high is not None:
                metric["confidenceInterval"] = {"lowerBound": f"{low:.6g}", "upperBound": f"{high:.6g}"}
            found.append(metric)
    for artefact in facts.bundle.manifest.artefacts:
        gate = artefact.gate or {}
        about = (gate.get("frames") or {}).get("about", "")
        found += [
            {"type": name, "value": f"{value:.6g}", "slice": f"{artefact.name} against the reference, {about}"}
            for name, value in sorted((gate.get("statistics") or {}).items())
            if isinstance(value, (int, float))
        ]
    return found


def limits(facts: BundleFacts) -> list[str]:
    """What the model has not been shown to do, one sentence each.

    Args:
        facts: what is known.
    """
    from tinyusfm_edge.release.texts import TEXTS

    text = TEXTS.get(str(facts.card.get("name", "")))
    known = list(text.limits) if text is not None else []
    demo = facts.card.get("demo_only") or ""
    general = [
        "the gate proves that an artefact answers like the PyTorch reference; it says nothing about patients",
        "an artefact is verified on the CPU class or device that its manifest names",
    ]
    return [*([f"for demonstrations alone: {demo}"] if demo else []), *known, *general]


def check_bom(bom: Mapping[str, Any]) -> None:
    """Validates a bill of materials against the schema of its version.

    Args:
        bom: as made here.

    Raises:
        MissingExtra: cyclonedx-python-lib or its validators are not installed.
        ValueError: it does not follow the schema; the message says where.
    """
    try:
        from cyclonedx.exception import MissingOptionalDependencyException
        from cyclonedx.schema import SchemaVersion
        from cyclonedx.validation.json import JsonStrictValidator
    except ImportError as error:
        raise MissingExtra("checking a bill of materials", "cyclonedx-python-lib", "dossier") from error
    try:
        fault = JsonStrictValidator(SchemaVersion.V1_6).validate_str(json.dumps(bom))
    except MissingOptionalDependencyException as error:
        raise MissingExtra("checking a bill of materials", "jsonschema", "dossier") from error
    if fault is not None:
        raise ValueError(f"the bill of materials does not follow CycloneDX {SPEC_VERSION}: {str(fault)[:300]}")


__all__ = ["KNOWN_LICENCES", "NAMESPACE", "SPEC_VERSION", "check_bom", "limits", "make_bom"]
