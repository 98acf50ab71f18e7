"""What is signed: an in-toto statement.

It lists every file of a bundle, and what the bundle is.

The layout is that of the OpenSSF model-signing project (predicate ``https://model_signing/signature/v1.0``): resources
with sha256, and a subject whose digest is the sha256 of their digests one after another. Beside it stands the
*binding*: bundle id, hash of the ModelSpec, device class and security version, so that a statement fits one bundle for
one kind of device.

It does not know keys, and it opens no file.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from tinyusfm_runtime.errors import UntrustedError
from tinyusfm_runtime.strict_json import parse_json

STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
"""Type of the statement."""
PREDICATE_TYPE = "https://model_signing/signature/v1.0"
"""Type of what it says."""
SIGNATURE_NAME = "model.sig"
"""Name of the signature file in a bundle; the one file that a bundle may hold and its manifest does not list."""
BINDING = "tinyusfm_bundle"
"""Key of the binding inside the predicate."""
_HEX = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Binding:
    """What a signature is for.

    Attributes:
        bundle_id: first 16 hex digits of the manifest's own hash.
        spec_sha256: hash of the ModelSpec as compact JSON.
        device_class: kind of device, or None for any.
        security_version: from 0 up; a device refuses lower ones than it has seen.
    """

    bundle_id: str
    spec_sha256: str
    device_class: str | None
    security_version: int

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            UntrustedError: one is of another type or out of range.
        """
        version = self.security_version
        if isinstance(version, bool) or not isinstance(version, int) or not 0 <= version < 1 << 31:
            raise UntrustedError(f"a security version is a whole number from 0 to 2147483647, not {version!r}")
        if not all(isinstance(text, str) for text in (self.bundle_id, self.spec_sha256)):
            raise UntrustedError("the signed statement names no bundle")
        if self.device_class is not None and not isinstance(self.device_class, str):
            raise UntrustedError("the signed statement's device class is no name")


@dataclass(frozen=True, kw_only=True, slots=True)
class Statement:
    """A statement, read.

    Attributes:
        digests: file -> sha256 (hex), as listed.
        binding: what it is for, or None in statements of other tools.
    """

    digests: Mapping[str, str]
    binding: Binding | None


def statement_bytes(name: str, digests: Mapping[str, str], binding: Binding | None) -> bytes:
    """A statement as the bytes that are signed.

    Args:
        name: of the bundle's folder, for people.
        digests: file -> sha256 (hex).
        binding: what the bundle is, or None.
    """
    resources = [{"name": path, "algorithm": "sha256", "digest": digests[path]} for path in sorted(digests)]
    predicate: dict[str, Any] = {
        "resources": resources,
        "serialization": {
            "allow_symlinks": False,
            "hash_type": "sha256",
            "ignore_paths": [SIGNATURE_NAME],
            "method": "files",
        },
    }
    if binding is not None:
        predicate[BINDING] = asdict(binding)
    data = {
        "_type": STATEMENT_TYPE,
        "subject": [{"name": name, "digest": {"sha256": _root(resources)}}],
        "predicateType": PREDICATE_TYPE,
        "predicate": predicate,
    }
    return json.dumps(data, sort_keys=True).encode("utf-8")


def read_statement(payload: bytes) -> Statement:
    """Reads a statement whose signature was checked.

    Args:
        payload: its bytes.

    Raises:
        UntrustedError: of another type, malformed, or its parts contradict one another.
    """
    try:
        data = parse_json(payload)
        predicate, resources = data["predicate"], data["predicate"]["resources"]
        if data["_type"] != STATEMENT_TYPE or data["predicateType"] != PREDICATE_TYPE:
            raise UntrustedError("the signed statement is of another type")
        if predicate["serialization"]["method"] != "files" or predicate["serialization"]["hash_type"] != "sha256":
            raise UntrustedError("the signed statement hashes files in another way than sha256 file by file")
        digests = {str(item["name"]): str(item["digest"]) for item in resources}
        if len(digests) != len(resources) or not all(map(_HEX.fullmatch, digests.values())):
            raise UntrustedError("the signed statement lists a file twice, or with something that is no sha256")
        if data["subject"][0]["digest"]["sha256"] != _root(resources):
            raise UntrustedError("the signed statement's subject does not fit the files that it lists")
        found = predicate.get(BINDING)
        return Statement(digests=digests, binding=Binding(**found) if found is not None else None)
    except (KeyError, TypeError, AttributeError, ValueError, IndexError, RecursionError) as error:
        raise UntrustedError(f"the signed statement cannot be read: {type(error).__name__}") from error


def spec_sha256(spec: Mapping[str, Any]) -> str:
    """Hash of a ModelSpec's plain data, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(spec, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _root(resources: list[dict[str, Any]]) -> str:
    return hashlib.sha256(b"".join(bytes.fromhex(item["digest"]) for item in resources)).hexdigest()


__all__ = [
    "BINDING",
    "PREDICATE_TYPE",
    "SIGNATURE_NAME",
    "STATEMENT_TYPE",
    "Binding",
    "Statement",
    "read_statement",
    "spec_sha256",
    "statement_bytes",
]
