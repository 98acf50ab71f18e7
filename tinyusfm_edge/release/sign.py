"""Signing a bundle: the statement over all its files.

Signed with a key file or a PKCS#11 token.

The private key never leaves its file or token, and this module never runs on a device. Keys are ECDSA P-256 or P-384:
what HSMs, TPMs and PKCS#11 tokens give and what the OpenSSF model-signing tool reads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinyusfm_runtime.atomic import write_file
from tinyusfm_runtime.bundle.reader import MANIFEST_NAME, Bundle, signed_facts
from tinyusfm_runtime.errors import InputError, MissingExtra
from tinyusfm_runtime.trust.envelope import CURVES, fingerprint, pre_authentication, write_envelope
from tinyusfm_runtime.trust.statement import SIGNATURE_NAME, Binding, spec_sha256, statement_bytes


@dataclass(frozen=True, kw_only=True)
class Signer:
    """A key that can sign.

    Attributes:
        sign: bytes -> ASN.1 DER of an ECDSA signature with the hash of the key's curve.
        fingerprint: sha256 (hex) of the public key's PEM.
    """

    sign: Callable[[bytes], bytes]
    fingerprint: str


def key_signer(path: Path, password: bytes | None = None) -> Signer:
    """A signer from a private key in PEM.

    Args:
        path: the key file.
        password: of an encrypted key.

    Raises:
        InputError: no such file, or no P-256 or P-384 private key, or the password does not open it.
        MissingExtra: ``cryptography`` is not installed.
    """
    try:
        from cryptography.hazmat.primitives import hashes
        from cryptography.hazmat.primitives.asymmetric.ec import ECDSA, EllipticCurvePrivateKey
        from cryptography.hazmat.primitives.serialization import load_pem_private_key
    except ImportError as error:
        raise MissingExtra("signing", "cryptography", "signed") from error
    try:
        key: Any = load_pem_private_key(path.read_bytes(), password)
    except OSError as error:
        raise InputError(f"the key {path} cannot be read: {error.strerror or error}") from error
    except (ValueError, TypeError) as error:
        raise InputError(f"{path} is no private key in PEM, or its password is missing or wrong") from error
    if not isinstance(key, EllipticCurvePrivateKey) or key.curve.name not in CURVES:
        raise InputError(f"{path} is not a key on one of the curves {', '.join(CURVES)}")
    digest = hashes.SHA256() if CURVES[key.curve.name] == "sha256" else hashes.SHA384()
    return Signer(sign=lambda data: key.sign(data, ECDSA(digest)), fingerprint=fingerprint(key.public_key()))


def sign_bundle(
    path: Path, signer: Signer, *, security_version: int, device_class: str | None = None, replace: bool = False
) -> Path:
    """Signs a bundle: writes ``model.sig`` into its folder.

    Args:
        path: the bundle; every byte of it is verified first.
        signer: makes the signature.
        security_version: from 0 up; never lower than that of the release before.
        device_class: kind of device it is for, or None for the one in its manifest.
        replace: a signature that is there may be replaced.

    Returns:
        The signature file.

    Raises:
        BundleError: the bundle is damaged.
        InputError: it is signed already, or its manifest names another device class.
        OutputError: the file cannot be written.
    """
    place = path / SIGNATURE_NAME
    if place.exists() and not replace:
        raise InputError(f"{path.name} is signed already: give --replace to sign it again")
    bundle = Bundle.open(path, on_device=False)
    named = bundle.manifest.device_class
    if named is not None and device_class not in (None, named):
        raise InputError(f"the manifest says {named}, not {device_class}: export the bundle for that class of device")
    facts = signed_facts(bundle.manifest, (path / MANIFEST_NAME).read_bytes())
    binding = Binding(
        bundle_id=facts.bundle_id,
        spec_sha256=spec_sha256(facts.spec),
        device_class=device_class or named,
        security_version=security_version,
    )
    payload = statement_bytes(path.name, facts.signed_files(), binding)
    raw = write_envelope(payload, signer.sign(pre_authentication(payload)), signer.fingerprint)
    write_file(place, raw, "the signature")
    return place


__all__ = ["Signer", "key_signer", "sign_bundle"]
