"""A key in a PKCS#11 token (HSM, smart card) signs; it never leaves the token.

Named by a URI of RFC 7512: ``pkcs11:token=release;object=key?module-path=/usr/lib/softhsm/libsofthsm2.so``. The PIN is
read from the environment; it has no place in a URI or on a command line. Needs python-pkcs11 (extra ``pkcs11``).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

from tinyusfm_edge.release.sign import Signer
from tinyusfm_runtime.errors import InputError, MissingExtra
from tinyusfm_runtime.trust.envelope import CURVES, fingerprint

PIN_VARIABLE = "TINYUSFM_TOKEN_PIN"
"""Environment variable with the token's PIN."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenKey:
    """Where a key lies.

    Attributes:
        module: path of the PKCS#11 module.
        token: label of the token.
        label: of the key, or empty.
        id: of the key, or empty.
    """

    module: str
    token: str
    label: str
    id: bytes


def parse_uri(text: str) -> TokenKey:
    """A PKCS#11 URI.

    Args:
        text: with ``token``, ``object`` or ``id``, and ``module-path``.

    Raises:
        InputError: no such URI, or one with a PIN in it.
    """
    path, _, query = text.removeprefix("pkcs11:").partition("?")
    if not text.startswith("pkcs11:"):
        raise InputError("--pkcs11: give a URI, pkcs11:token=NAME;object=KEY?module-path=/usr/lib/....so")
    named = dict(part.partition("=")[::2] for part in path.split(";") if part)
    asked = dict(part.partition("=")[::2] for part in query.split("&") if part)
    if "pin-value" in {**named, **asked} or "pin-source" in {**named, **asked}:
        raise InputError(f"--pkcs11: a PIN has no place on a command line: set {PIN_VARIABLE}")
    unknown = {*named, *asked} - {"token", "object", "id", "type", "module-path"}
    if unknown:
        raise InputError(f"--pkcs11: {sorted(unknown)[0]!r} is not read: use token, object, id, module-path")
    if not named.get("token") or not asked.get("module-path") or not (named.get("object") or named.get("id")):
        raise InputError("--pkcs11: the URI must name token, object or id, and module-path")
    number = bytes(ord(letter) for letter in unquote(named.get("id", ""), encoding="latin-1"))
    return TokenKey(
        module=unquote(asked["module-path"]),
        token=unquote(named["token"]),
        label=unquote(named.get("object", "")),
        id=number,
    )


def token_signer(uri: str, pin: str | None) -> Signer:
    """A signer whose key stays in a token.

    Args:
        uri: see ``parse_uri``.
        pin: of the token's user, or None.

    Raises:
        InputError: no such module, token or key, a wrong PIN, or a key on another curve.
        MissingExtra: python-pkcs11 or ``cryptography`` is not installed.
    """
    place = parse_uri(uri)
    with _opened(place, pin) as session:
        public = _public_key(session, place)
    digest = CURVES[public.curve.name]

    def sign(data: bytes) -> bytes:
        from pkcs11 import Mechanism, ObjectClass
        from pkcs11.util.ec import encode_ecdsa_signature

        with _opened(place, pin) as session:
            key = session.get_key(object_class=ObjectClass.PRIVATE_KEY, **_wanted(place))
            raw = key.sign(hashlib.new(digest, data).digest(), mechanism=Mechanism.ECDSA)
        return bytes(encode_ecdsa_signature(raw))

    return Signer(sign=sign, fingerprint=fingerprint(public))


@contextmanager
def _opened(place: TokenKey, pin: str | None) -> Iterator[Any]:
    try:
        import pkcs11
        from pkcs11.exceptions import PKCS11Error
    except ImportError as error:
        raise MissingExtra("signing with a token", "python-pkcs11", "pkcs11") from error
    if pin is None:
        raise InputError(f"the token's PIN is not known: set {PIN_VARIABLE}")
    try:
        token = pkcs11.lib(place.module).get_token(token_label=place.token)
        with token.open(user_pin=pin) as session:
            yield session
    except PKCS11Error as error:
        said = f"{type(error).__name__} {error}".strip()
        raise InputError(f"token {place.token!r}: {said}: check module, token, key and PIN") from error
    except RuntimeError as error:  # what python-pkcs11 raises where the module cannot be loaded
        raise InputError(f"the PKCS#11 module {place.module} cannot be loaded: {error}") from error


def _wanted(place: TokenKey) -> Mapping[str, Any]:
    named = {"label": place.label or None, "id": place.id or None}
    return {name: value for name, value in named.items() if value is not None}


def _public_key(session: Any, place: TokenKey) -> Any:
    from pkcs11 import KeyType, ObjectClass
    from pkcs11.util.ec import encode_ec_public_key

    try:
        from cryptography.hazmat.primitives.serialization import load_der_public_key
    except ImportError as error:
        raise MissingExtra("signing", "cryptography", "signed") from error
    found = session.get_key(object_class=ObjectClass.PUBLIC_KEY, **_wanted(place))
    if found.key_type is not KeyType.EC:
        raise InputError(f"the token's key is not on one of the curves {', '.join(CURVES)}")
    public: Any = load_der_public_key(encode_ec_public_key(found))
    if public.curve.name not in CURVES:
        raise InputError(f"the token's key is on {public.curve.name}, not on one of {', '.join(CURVES)}")
    return public


__all__ = ["PIN_VARIABLE", "TokenKey", "parse_uri", "token_signer"]
