"""Signing with a key that stays in a PKCS#11 token: SoftHSM2, from Debian, as the real module."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tinyusfm_edge.cli.main import main
from tinyusfm_edge.release.token import parse_uri
from tinyusfm_runtime.bundle.reader import Bundle
from tinyusfm_runtime.errors import InputError
from tinyusfm_runtime.trust.policy import Trust

MODULES = ("/usr/lib/softhsm/libsofthsm2.so", "/usr/lib/x86_64-linux-gnu/softhsm/libsofthsm2.so")
PIN = "1234"


@pytest.fixture(scope="module")
def token(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a trust store; the token that goes with it holds a P-256, a P-384 and an RSA key."""
    pkcs11 = pytest.importorskip("pkcs11", reason="install tinyusfm-edge[pkcs11]")
    pytest.importorskip("cryptography", reason="install tinyusfm-edge[signed]")
    module = next((place for place in MODULES if Path(place).is_file()), None)
    if module is None or shutil.which("softhsm2-util") is None:
        pytest.skip("SoftHSM2 is not installed: apt-get install softhsm2")
    folder = tmp_path_factory.mktemp("token")
    (folder / "tokens").mkdir()
    settings = f"directories.tokendir = {folder}/tokens\nobjectstore.backend = file\nlog.level = ERROR\n"
    (folder / "softhsm2.conf").write_text(settings, encoding="utf-8")
    before = os.environ.get("SOFTHSM2_CONF")
    os.environ["SOFTHSM2_CONF"] = str(folder / "softhsm2.conf")
    try:
        made = ["softhsm2-util", "--init-token", "--free", "--label", "release", "--pin", PIN, "--so-pin", "5678"]
        subprocess.run(made, check=True, capture_output=True)
        (folder / "module").write_text(module, encoding="utf-8")
        _fill(pkcs11, module, folder)
        yield folder
    finally:
        if before is None:
            del os.environ["SOFTHSM2_CONF"]
        else:
            os.environ["SOFTHSM2_CONF"] = before


def _fill(pkcs11: object, module: str, folder: Path) -> None:
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_der_public_key
    from pkcs11 import Attribute, KeyType, lib
    from pkcs11.util.ec import encode_ec_public_key, encode_named_curve_parameters

    store = folder / "trust"
    store.mkdir()
    keys = []
    with lib(module).get_token(token_label="release").open(rw=True, user_pin=PIN) as session:
        for label, curve in (("p256", "secp256r1"), ("p384", "secp384r1")):
            named = {Attribute.EC_PARAMS: encode_named_curve_parameters(curve)}
            parameters = session.create_domain_parameters(KeyType.EC, named, local=True)
            public, _ = parameters.generate_keypair(store=True, label=label)
            key = load_der_public_key(encode_ec_public_key(public))
            (store / f"{label}.pub").write_bytes(key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
            keys.append({"file": f"{label}.pub", "roles": ["release"]})
        session.generate_keypair(KeyType.RSA, 2048, store=True, label="rsa")
    (store / "trust.json").write_text(json.dumps({"version": 1, "keys": keys, "revoked": []}), encoding="utf-8")


def uri(token: Path, label: str) -> str:
    return f"pkcs11:token=release;object={label}?module-path={(token / 'module').read_text()}"


@pytest.mark.parametrize("label", ["p256", "p384"])
def test_a_bundle_signed_by_a_token_opens_where_its_key_is_trusted(
    token: Path, label: str, fresh_bundle: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TINYUSFM_TOKEN_PIN", PIN)
    monkeypatch.setenv("TINYUSFM_EDGE_CACHE", str(tmp_path))
    words = ["bundle", "sign", str(fresh_bundle), "--pkcs11", uri(token, label), "--security-version", "3"]
    assert main(words) == 0
    opened = Bundle.open(fresh_bundle, trust=Trust.open(token / "trust"))
    assert opened.binding is not None and opened.binding.security_version == 3


@pytest.mark.parametrize(
    ("label", "pin", "why"),
    [
        ("p256", "0000", "PinIncorrect"),
        ("gone", PIN, "NoSuchKey"),
        ("rsa", PIN, "curves"),
        ("p256", None, "PIN is not"),
    ],
)
def test_what_does_not_sign_is_one_line(
    token: Path,
    label: str,
    pin: str | None,
    why: str,
    fresh_bundle: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if pin is None:
        monkeypatch.delenv("TINYUSFM_TOKEN_PIN", raising=False)
    else:
        monkeypatch.setenv("TINYUSFM_TOKEN_PIN", pin)
    words = ["bundle", "sign", str(fresh_bundle), "--pkcs11", uri(token, label), "--security-version", "3"]
    assert main(words) == 2
    said = capsys.readouterr().err.strip()
    assert why in said and len(said.splitlines()) == 1
    assert not (fresh_bundle / "model.sig").exists()


@pytest.mark.parametrize(
    "text",
    [
        "softhsm",
        "pkcs11:token=a?module-path=/m.so",
        "pkcs11:token=a;object=b",
        "pkcs11:token=a;object=b?module-path=/m.so&pin-value=1234",
        "pkcs11:token=a;object=b;slot=0?module-path=/m.so",
    ],
)
def test_a_uri_that_names_no_key_or_holds_a_pin_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="--pkcs11"):
        parse_uri(text)


def test_a_uri_is_decoded() -> None:
    found = parse_uri("pkcs11:token=my%20token;object=k%3B1;id=%01%ff?module-path=/usr/lib/m.so")
    assert (found.token, found.label, found.id, found.module) == ("my token", "k;1", b"\x01\xff", "/usr/lib/m.so")


def test_one_key_and_no_more(fresh_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bundle", "sign", str(fresh_bundle), "--security-version", "3"]) == 2
    assert "--key or --pkcs11" in capsys.readouterr().err
