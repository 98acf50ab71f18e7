"""Whether a bundle may run here.

Its signature, its signer, its device class, its version.

    trust = Trust.open("trust/", device_class="cart")
    Session.open("fetal-head.bundle", trust=trust)

A policy file makes the rule permanent: ``policy.json`` in the folder that ``TINYUSFM_EDGE_POLICY`` names, else in
``/etc/tinyusfm-edge``, with ``{"version": 1, "require_signed": "/path/of/trust", "device_class": "cart"}``. Every
bundle is then checked, whatever a program asks for; a policy file that cannot be read refuses everything.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

from tinyusfm_runtime.errors import UntrustedError
from tinyusfm_runtime.strict_json import parse_json
from tinyusfm_runtime.trust.envelope import check_signature, read_envelope
from tinyusfm_runtime.trust.rollback import FileFloor, Floor
from tinyusfm_runtime.trust.statement import SIGNATURE_NAME, Binding, read_statement, spec_sha256
from tinyusfm_runtime.trust.store import TrustStore

POLICY_VARIABLE = "TINYUSFM_EDGE_POLICY"
"""Environment variable that names the folder of the policy file."""
POLICY_NAME = "policy.json"
_SYSTEM = Path("/etc/tinyusfm-edge")


@dataclass(frozen=True, kw_only=True, slots=True)
class SignedFacts:
    """What a bundle's manifest says of itself.

    Attributes:
        name: of the model.
        bundle_id: first 16 hex digits of the manifest's own hash.
        spec: the ModelSpec as plain data.
        digests: file -> sha256 (hex), without the manifest and the signature.
        manifest_bytes: the very bytes of the manifest.
    """

    name: str
    bundle_id: str
    spec: Mapping[str, Any]
    digests: Mapping[str, str]
    manifest_bytes: bytes

    def signed_files(self) -> dict[str, str]:
        """What a signature must list: every file with its sha256, the manifest too."""
        return {**self.digests, "manifest.json": hashlib.sha256(self.manifest_bytes).hexdigest()}


@dataclass(frozen=True, kw_only=True, slots=True)
class Trust:
    """What a device demands of a bundle.

    Attributes:
        store: keys that are trusted.
        device_class: of this device, or None: then only bundles for any device open.
        role: what the signer must be trusted for.
        floor: where the highest security version is kept.
        today: the day on which keys must be valid; None is the clock's.
    """

    store: TrustStore
    device_class: str | None = None
    role: str = "release"
    floor: Floor = field(default_factory=FileFloor)
    today: date | None = None

    @classmethod
    def open(cls, folder: str | Path, *, device_class: str | None = None) -> Trust:
        """Demands a signature by a key of a folder.

        Args:
            folder: a trust store (see store.py).
            device_class: of this device.

        Raises:
            InputError: the store cannot be read.
            UntrustedError: it holds something that is no key.
            MissingExtra: ``cryptography`` is not installed.
        """
        return cls(store=TrustStore.open(folder), device_class=device_class)

    def check(self, facts: SignedFacts, signature: bytes | None) -> Binding:
        """Checks a bundle before any of its files is used.

        Args:
            facts: of its manifest.
            signature: the bytes of ``model.sig``, or None where the bundle has none.

        Returns:
            What was signed.

        Raises:
            UntrustedError: with the reason.
        """
        if signature is None:
            raise UntrustedError(f"the bundle has no {SIGNATURE_NAME}, and this device runs signed bundles only")
        envelope = read_envelope(signature)
        key = self.store.find(envelope.hint, self.role, self.today or date.today())
        check_signature(envelope, key.key)
        statement = read_statement(envelope.payload)
        if dict(statement.digests) != facts.signed_files():
            raise UntrustedError("the signed list of files is not this bundle's: the signature belongs to another one")
        if statement.binding is None:
            raise UntrustedError("the signature names no security version and no device: sign with tinyusfm-edge")
        self._check_binding(statement.binding, facts)
        return statement.binding

    def accept(self, facts: SignedFacts, binding: Binding) -> None:
        """Raises the floor to the version of a bundle that opened.

        Raises:
            OutputError: the floor cannot be kept.
        """
        self.floor.raise_to(facts.name, binding.security_version)

    def _check_binding(self, binding: Binding, facts: SignedFacts) -> None:
        if binding.bundle_id != facts.bundle_id or binding.spec_sha256 != spec_sha256(facts.spec):
            raise UntrustedError("the signed statement was made for another bundle")
        if binding.device_class is not None and binding.device_class != self.device_class:
            here = self.device_class or "a device without a class"
            raise UntrustedError(f"the bundle is signed for {binding.device_class}, and this is {here}")
        floor = self.floor.read(facts.name)
        if binding.security_version < floor:
            raise UntrustedError(
                f"the bundle's security version is {binding.security_version}; this device has run {floor} and takes "
                "no older one"
            )


def permanent_policy(environment: Mapping[str, str] | None = None) -> Trust | None:
    """The rule that the machine's policy file sets, or None.

    None where there is no such file.

    Args:
        environment: variables; None is the process's own.

    Raises:
        UntrustedError: the file is there and cannot be read.
        InputError, MissingExtra: its trust store cannot be used.
    """
    variables = os.environ if environment is None else environment
    path = Path(variables.get(POLICY_VARIABLE) or _SYSTEM) / POLICY_NAME
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UntrustedError(f"{path} cannot be read: {error.strerror or error}") from error
    try:
        data = parse_json(raw)
        if data["version"] != 1 or set(data) - {"version", "require_signed", "device_class"}:
            raise ValueError("another version")
        store, device_class = str(data["require_signed"]), data.get("device_class")
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise UntrustedError(f"{path} is no policy: no bundle opens until it is mended") from error
    return Trust.open(store, device_class=None if device_class is None else str(device_class))


__all__ = ["POLICY_NAME", "POLICY_VARIABLE", "SignedFacts", "Trust", "permanent_policy"]
