"""``bundle sign`` and ``--require-signed``, as typed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tinyusfm_edge.cli.main import main

pytest.importorskip("cryptography", reason="install tinyusfm-edge[signed]")

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, PrivateFormat, PublicFormat


@pytest.fixture
def keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with an encrypted key and the trust store that knows it."""
    private = ec.generate_private_key(ec.SECP256R1())
    secret = private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"open"))
    (tmp_path / "release.pem").write_bytes(secret)
    store = tmp_path / "trust"
    store.mkdir()
    public = private.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    (store / "release.pub").write_bytes(public)
    listed = {"version": 1, "keys": [{"file": "release.pub", "roles": ["release"]}], "revoked": []}
    (store / "trust.json").write_text(json.dumps(listed), encoding="utf-8")
    monkeypatch.setenv("TINYUSFM_EDGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TINYUSFM_KEY_PASSWORD", "open")
    return tmp_path


def test_sign_check_and_run(fresh_bundle: Path, keys: Path, capsys: pytest.CaptureFixture[str]) -> None:
    signed = ["bundle", "sign", str(fresh_bundle), "--key", str(keys / "release.pem"), "--security-version", "7"]
    trusted = ["--require-signed", str(keys / "trust")]
    assert main(["run", str(fresh_bundle), "phantom:0-0", *trusted]) == 2
    assert "runs signed bundles only" in capsys.readouterr().err
    assert main(signed) == 0
    assert main(["bundle", "check-signature", str(fresh_bundle), "--trust", str(keys / "trust")]) == 0
    assert "security version      7" in capsys.readouterr().out
    assert main(signed) == 2, "a signature is not replaced unless asked for"
    assert main([*signed[:-1], "8", "--replace"]) == 0
    capsys.readouterr()


def test_a_wrong_password_is_one_line(
    fresh_bundle: Path, keys: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TINYUSFM_KEY_PASSWORD", "wrong")
    words = ["bundle", "sign", str(fresh_bundle), "--key", str(keys / "release.pem"), "--security-version", "7"]
    assert main(words) == 2
    said = capsys.readouterr().err.strip()
    assert "password is missing or wrong" in said and len(said.splitlines()) == 1
    assert not (fresh_bundle / "model.sig").exists()


def test_a_device_class_without_a_store_is_refused(fresh_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(fresh_bundle), "phantom:0-0", "--device-class", "cart"]) == 2
    assert "goes with --require-signed" in capsys.readouterr().err
