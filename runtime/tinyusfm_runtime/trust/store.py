"""Trust store: a folder of public keys, and a list of revoked keys.

Keys have roles and an expiry date.

    trust/
      trust.json      {"version": 1, "keys": [{"file": "release.pem", "roles": ["release"], "expires": "2027-12-31"}],
                       "revoked": ["<sha256 of a key's PEM>"]}
      release.pem     -----BEGIN PUBLIC KEY-----

``expires`` may be left out. To rotate a key, add the new one, sign with it, then revoke the old one. A key that is not
listed is not trusted, whatever lies in the folder.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinyusfm_runtime.errors import InputError, UntrustedError
from tinyusfm_runtime.strict_json import parse_json
from tinyusfm_runtime.trust.envelope import fingerprint, read_public_key

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey

LIST_NAME = "trust.json"
"""The file that says which keys are trusted for what."""
ROLES = ("release", "development")
"""What a key may sign; a device in use trusts ``release`` alone."""
_MAX_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class TrustedKey:
    """One key of a store.

    Attributes:
        key: the public key.
        fingerprint: sha256 (hex) of its PEM.
        roles: what it may sign.
        expires: last day on which its signatures count, or None.
    """

    key: EllipticCurvePublicKey
    fingerprint: str
    roles: tuple[str, ...]
    expires: date | None


@dataclass(frozen=True, kw_only=True, slots=True)
class TrustStore:
    """The keys of a folder. Open one with ``TrustStore.open``.

    Attributes:
        keys: by fingerprint.
        revoked: fingerprints that are trusted no longer.
    """

    keys: Mapping[str, TrustedKey]
    revoked: frozenset[str]

    @classmethod
    def open(cls, folder: str | Path) -> TrustStore:
        """Reads a folder.

        Args:
            folder: with ``trust.json`` and the key files that it names.

        Raises:
            InputError: no such folder, or its list cannot be read.
            UntrustedError: a file is not a P-256 or P-384 public key.
            MissingExtra: ``cryptography`` is not installed.
        """
        place = Path(folder)
        try:
            data = parse_json(_read(place / LIST_NAME))
            if data["version"] != 1 or set(data) - {"version", "keys", "revoked"}:
                raise InputError(f"{place / LIST_NAME} is of another version")
            keys = [_read_key(place, item) for item in data["keys"]]
            revoked = frozenset(str(item) for item in data.get("revoked", []))
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise InputError(f"{place / LIST_NAME} cannot be read: {error}") from error
        return cls(keys={key.fingerprint: key for key in keys}, revoked=revoked)

    def find(self, hint: str, role: str, today: date) -> TrustedKey:
        """The key that a signature names, if its signatures count.

        Args:
            hint: fingerprint of the key.
            role: what was signed.
            today: the day on which it is asked.

        Raises:
            UntrustedError: unknown, revoked, expired, or trusted for other things only.
        """
        if hint in self.revoked:
            raise UntrustedError(f"the signature's key {hint[:16]} is revoked")
        key = self.keys.get(hint)
        if key is None:
            raise UntrustedError(f"the signature's key {hint[:16] or 'without a name'} is not in the trust store")
        if role not in key.roles:
            raise UntrustedError(
                f"the signature's key {hint[:16]} is trusted for {', '.join(key.roles)}, not for {role}"
            )
        if key.expires is not None and today > key.expires:
            raise UntrustedError(f"the signature's key {hint[:16]} expired on {key.expires.isoformat()}")
        return key


def _read(path: Path) -> bytes:
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise InputError(f"{path} is larger than any list or key")
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"the trust store lacks {path}: {error.strerror or error}") from error


def _read_key(place: Path, item: Mapping[str, Any]) -> TrustedKey:
    name, roles = str(item["file"]), tuple(str(role) for role in item["roles"])
    if Path(name).name != name or set(item) - {"file", "roles", "expires"} or not roles or set(roles) - set(ROLES):
        raise InputError(
            f"{place / LIST_NAME}: a key has a file beside the list, roles among {', '.join(ROLES)}, expires"
        )
    key = read_public_key(_read(place / name))
    expires = date.fromisoformat(str(item["expires"])) if item.get("expires") else None
    return TrustedKey(key=key, fingerprint=fingerprint(key), roles=roles, expires=expires)


__all__ = ["LIST_NAME", "ROLES", "TrustStore", "TrustedKey"]
