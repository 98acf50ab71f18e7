"""Signature files: a DSSE envelope in a sigstore bundle.

As the OpenSSF model-signing project writes them.

The signature is over the pre-authentication encoding of the payload (DSSE v1, github.com/secure-systems-lab/dsse):
``DSSEv1 <length of type> <type> <length of payload> <payload>``. Curves and hashes: P-256 with SHA-256, P-384 with
SHA-384; nothing else is accepted. Certificates are refused by name: they would need a chain and a clock.

It does not know which keys are trusted.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tinyusfm_runtime.errors import MissingExtra, UntrustedError
from tinyusfm_runtime.strict_json import parse_json

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey

PAYLOAD_TYPE = "application/vnd.in-toto+json"
"""Type of the payload; no other one is read."""
MEDIA_TYPES = ("application/vnd.dev.sigstore.bundle.v0.3+json", "application/vnd.dev.sigstore.bundle+json;version=0.3")
"""Versions of the sigstore bundle that are read; the first is written."""
MAX_SIGNATURE_BYTES = 4 << 20
"""A signature file lists every file of a bundle once; a larger one is none."""
CURVES = {"secp256r1": "sha256", "secp384r1": "sha384"}
"""Curve -> hash that goes with it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SignedEnvelope:
    """A signature file, read and not yet checked.

    Attributes:
        payload: the signed statement, bytes.
        signature: ASN.1 DER of the ECDSA signature.
        hint: sha256 (hex) of the public key's PEM, or empty where the file holds the key itself.
    """

    payload: bytes
    signature: bytes
    hint: str


def read_envelope(raw: bytes) -> SignedEnvelope:
    """Reads a signature file.

    Args:
        raw: its bytes.

    Raises:
        UntrustedError: too large, malformed, of another type, or made with a certificate.
    """
    if len(raw) > MAX_SIGNATURE_BYTES:
        raise UntrustedError(f"the signature file has {len(raw)} bytes; {MAX_SIGNATURE_BYTES} are allowed")
    try:
        data = parse_json(raw)
        if data["mediaType"] not in MEDIA_TYPES:
            raise UntrustedError(f"the signature file is of type {str(data['mediaType'])[:80]!r}, which is not read")
        material = data["verificationMaterial"]
        if "publicKey" not in material:
            raise UntrustedError("the signature was made with a certificate: sign with a P-256 or P-384 key")
        envelope = data["dsseEnvelope"]
        if envelope["payloadType"] != PAYLOAD_TYPE or len(envelope["signatures"]) != 1:
            raise UntrustedError("the signature file holds no single signature of an in-toto statement")
        payload = base64.b64decode(envelope["payload"], validate=True)
        signature = base64.b64decode(envelope["signatures"][0]["sig"], validate=True)
        return SignedEnvelope(payload=payload, signature=signature, hint=_hint(material["publicKey"]))
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError, IndexError) as error:
        raise UntrustedError(
            f"the signature file cannot be read: {type(error).__name__}: sign the bundle again"
        ) from error


def _hint(public_key: dict[str, Any]) -> str:
    """Hash of the signer's public key: given, or of the key that older files hold."""
    if "hint" in public_key:
        return str(public_key["hint"])[:64]
    try:
        return hashlib.sha256(base64.b64decode(public_key["rawBytes"], validate=True)).hexdigest()
    except binascii.Error:
        return ""


def write_envelope(payload: bytes, signature: bytes, hint: str) -> bytes:
    """A signature file, as bytes.

    Args:
        payload: the statement.
        signature: ASN.1 DER of the ECDSA signature over ``pre_authentication(payload)``.
        hint: sha256 (hex) of the public key's PEM.
    """
    data = {
        "mediaType": MEDIA_TYPES[0],
        "verificationMaterial": {"publicKey": {"hint": hint}, "tlogEntries": []},
        "dsseEnvelope": {
            "payload": base64.b64encode(payload).decode("ascii"),
            "payloadType": PAYLOAD_TYPE,
            "signatures": [{"sig": base64.b64encode(signature).decode("ascii"), "keyid": ""}],
        },
    }
    return json.dumps(data, sort_keys=True).encode("ascii")


def pre_authentication(payload: bytes) -> bytes:
    """What is signed: DSSE's pre-authentication encoding of a payload."""
    kind = PAYLOAD_TYPE.encode("ascii")
    return b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(payload), payload)


def read_public_key(pem: bytes) -> EllipticCurvePublicKey:
    """A public key from PEM; text before the key is passed over.

    Args:
        pem: one ``BEGIN PUBLIC KEY`` block.

    Raises:
        UntrustedError: not a P-256 or P-384 public key.
        MissingExtra: ``cryptography`` is not installed.
    """
    try:
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
        from cryptography.hazmat.primitives.serialization import load_pem_public_key
    except ImportError as error:
        raise MissingExtra("checking a signature", "cryptography", "signed") from error
    begin = pem.find(b"-----BEGIN PUBLIC KEY-----")
    try:
        key = load_pem_public_key(pem[max(0, begin) :])
    except (ValueError, UnsupportedAlgorithm) as error:
        raise UntrustedError("a trusted key is not a public key in PEM") from error
    if not isinstance(key, EllipticCurvePublicKey) or key.curve.name not in CURVES:
        raise UntrustedError(f"a trusted key is not on one of the curves {', '.join(CURVES)}")
    return key


def fingerprint(key: EllipticCurvePublicKey) -> str:
    """sha256 (hex) of a public key's PEM.

    The name of the key in hints, stores and revocations.
    """
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    return hashlib.sha256(key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)).hexdigest()


def check_signature(envelope: SignedEnvelope, key: EllipticCurvePublicKey) -> None:
    """Checks that a key made an envelope's signature.

    Args:
        envelope: as read.
        key: on P-256 or P-384.

    Raises:
        UntrustedError: it did not.
    """
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric.ec import ECDSA

    digest = hashes.SHA256() if CURVES[key.curve.name] == "sha256" else hashes.SHA384()
    try:
        key.verify(envelope.signature, pre_authentication(envelope.payload), ECDSA(digest))
    except InvalidSignature:
        raise UntrustedError("the signature does not belong to this statement and key") from None


__all__ = [
    "CURVES",
    "MAX_SIGNATURE_BYTES",
    "MEDIA_TYPES",
    "PAYLOAD_TYPE",
    "SignedEnvelope",
    "check_signature",
    "fingerprint",
    "pre_authentication",
    "read_envelope",
    "read_public_key",
    "write_envelope",
]
