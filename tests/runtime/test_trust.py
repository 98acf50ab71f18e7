"""Signed bundles: what opens, what is refused and why, and that nothing is used before the signature was checked."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyusfm_runtime.bundle.manifest import manifest_bytes
from tinyusfm_runtime.bundle.reader import MANIFEST_NAME, Bundle
from tinyusfm_runtime.errors import EdgeError, InputError, TamperedError, UntrustedError
from tinyusfm_runtime.session import Session
from tinyusfm_runtime.trust.envelope import check_signature, read_envelope, read_public_key
from tinyusfm_runtime.trust.policy import POLICY_VARIABLE, Trust
from tinyusfm_runtime.trust.rollback import FileFloor
from tinyusfm_runtime.trust.statement import SIGNATURE_NAME, read_statement
from tinyusfm_runtime.trust.store import TrustStore

pytest.importorskip("cryptography", reason="install tinyusfm-edge[signed]")

from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from tinyusfm_edge.release.sign import key_signer, sign_bundle

TODAY = date(2026, 6, 1)


class Maker:
    """A release key, the trust store that knows it, and a device.

    Args:
        folder: for keys, store and the device's floor.
        curve: of the key.
    """

    def __init__(self, folder: Path, curve: ec.EllipticCurve | None = None) -> None:
        self.folder = folder
        self.key = folder / "release.pem"
        private = ec.generate_private_key(curve or ec.SECP256R1())
        self.key.write_bytes(private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        self.signer = key_signer(self.key)
        self.store = folder / "trust"
        self.store.mkdir()
        public = private.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        (self.store / "release.pub").write_bytes(public)
        self.list()

    def list(self, *, roles: tuple[str, ...] = ("release",), expires: str | None = None, revoked: bool = False) -> None:
        """Writes the store's list."""
        key = {"file": "release.pub", "roles": list(roles), **({"expires": expires} if expires else {})}
        data = {"version": 1, "keys": [key], "revoked": [self.signer.fingerprint] if revoked else []}
        (self.store / "trust.json").write_text(json.dumps(data), encoding="utf-8")

    def trust(self, device_class: str | None = None) -> Trust:
        """What the device demands."""
        floor = FileFloor(self.folder / "device" / "floor.json")
        return replace(Trust.open(self.store, device_class=device_class), floor=floor, today=TODAY)

    def sign(self, bundle: Path, version: int = 3, device_class: str | None = None) -> None:
        """Signs a bundle."""
        sign_bundle(bundle, self.signer, security_version=version, device_class=device_class, replace=True)


@pytest.fixture
def maker(tmp_path: Path) -> Maker:
    """A key and a store of its own."""
    place = tmp_path / "maker"
    place.mkdir()
    return Maker(place)


@pytest.mark.parametrize("curve", [ec.SECP256R1(), ec.SECP384R1()], ids=["P-256", "P-384"])
def test_a_signed_bundle_opens_and_says_what_was_signed(
    curve: ec.EllipticCurve, fresh_bundle: Path, tmp_path: Path
) -> None:
    place = tmp_path / "maker"
    place.mkdir()
    maker = Maker(place, curve)
    maker.sign(fresh_bundle, version=7, device_class="cart")
    opened = Bundle.open(fresh_bundle, trust=maker.trust("cart"))
    assert opened.binding is not None
    assert (opened.binding.security_version, opened.binding.device_class) == (7, "cart")
    assert opened.binding.bundle_id == opened.manifest.bundle_id
    Bundle.open(fresh_bundle)  # without a demand the signature is not looked at


@pytest.mark.usefixtures("plug_in")
def test_a_session_demands_it_before_an_engine_is_loaded(fresh_bundle: Path, maker: Maker) -> None:
    with pytest.raises(UntrustedError, match=r"no model\.sig"):
        Session.open(fresh_bundle, trust=maker.trust())
    maker.sign(fresh_bundle)
    trust = maker.trust()
    with Session.open(fresh_bundle, trust=trust) as session:
        assert session.trust is trust
    with pytest.raises(InputError, match="without this trust"):
        Session.open(Bundle.open(fresh_bundle), trust=trust)


def test_a_changed_file_and_a_rewritten_manifest_are_refused(fresh_bundle: Path, maker: Maker) -> None:
    maker.sign(fresh_bundle)
    manifest = Bundle.open(fresh_bundle).manifest
    longer = replace(manifest, created_utc="2031-01-01T00:00:00Z", manifest_sha256="").sealed()
    (fresh_bundle / MANIFEST_NAME).write_bytes(manifest_bytes(longer))
    Bundle.open(fresh_bundle)  # an attacker who hashes again passes without a signature
    with pytest.raises(UntrustedError, match="belongs to another one"):
        Bundle.open(fresh_bundle, trust=maker.trust())


def test_an_unlisted_file_is_refused_whatever_the_statement_ignores(fresh_bundle: Path, maker: Maker) -> None:
    maker.sign(fresh_bundle)
    for name in (".gitattributes", ".git", "ignore-me"):
        (fresh_bundle / name).write_bytes(b"x")
        with pytest.raises(TamperedError, match="does not list"):
            Bundle.open(fresh_bundle, trust=maker.trust())
        (fresh_bundle / name).unlink()
    Bundle.open(fresh_bundle, trust=maker.trust())


def test_a_signature_of_another_bundle_is_refused(fresh_bundle: Path, maker: Maker, tmp_path: Path) -> None:
    maker.sign(fresh_bundle)
    signature = (fresh_bundle / SIGNATURE_NAME).read_bytes()
    manifest = Bundle.open(fresh_bundle).manifest
    other = replace(manifest, created_utc="2031-01-01T00:00:00Z", manifest_sha256="").sealed()
    (fresh_bundle / MANIFEST_NAME).write_bytes(manifest_bytes(other))
    (fresh_bundle / SIGNATURE_NAME).write_bytes(signature)
    with pytest.raises(UntrustedError):
        Bundle.open(fresh_bundle, trust=maker.trust())


def test_another_device_class_is_refused(fresh_bundle: Path, maker: Maker) -> None:
    maker.sign(fresh_bundle, device_class="cart")
    for here in ("handheld", None):
        with pytest.raises(UntrustedError, match="signed for cart"):
            Bundle.open(fresh_bundle, trust=maker.trust(here))
    maker.sign(fresh_bundle)
    Bundle.open(fresh_bundle, trust=maker.trust("handheld"))  # a bundle for any device


def test_an_older_version_is_refused_after_a_newer_one_ran(fresh_bundle: Path, maker: Maker) -> None:
    maker.sign(fresh_bundle, version=7)
    Bundle.open(fresh_bundle, trust=maker.trust())
    maker.sign(fresh_bundle, version=6)
    with pytest.raises(UntrustedError, match="security version is 6; this device has run 7"):
        Bundle.open(fresh_bundle, trust=maker.trust())
    maker.sign(fresh_bundle, version=7)
    Bundle.open(fresh_bundle, trust=maker.trust())


def test_a_refused_bundle_does_not_raise_the_floor(fresh_bundle: Path, maker: Maker) -> None:
    maker.sign(fresh_bundle, version=9, device_class="cart")
    with pytest.raises(UntrustedError):
        Bundle.open(fresh_bundle, trust=maker.trust("handheld"))
    maker.sign(fresh_bundle, version=9)
    artefact = next(iter(Bundle.open(fresh_bundle).manifest.files))
    content = (fresh_bundle / artefact).read_bytes()
    (fresh_bundle / artefact).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(TamperedError):
        Bundle.open(fresh_bundle, trust=maker.trust())
    assert maker.trust().floor.read(json.loads((fresh_bundle / MANIFEST_NAME).read_text())["spec"]["name"]) == 0


def test_a_damaged_floor_refuses_instead_of_starting_again(fresh_bundle: Path, maker: Maker) -> None:
    maker.sign(fresh_bundle, version=7)
    Bundle.open(fresh_bundle, trust=maker.trust())
    (maker.folder / "device" / "floor.json").write_text("{}")
    with pytest.raises(UntrustedError, match="damaged"):
        Bundle.open(fresh_bundle, trust=maker.trust())


def test_revoked_expired_and_wrongly_used_keys_are_refused(fresh_bundle: Path, maker: Maker, tmp_path: Path) -> None:
    maker.sign(fresh_bundle)
    for change, words in (
        ({"revoked": True}, "revoked"),
        ({"expires": "2026-05-31"}, "expired on 2026-05-31"),
        ({"roles": ("development",)}, "trusted for development, not for release"),
    ):
        maker.list(**change)  # type: ignore[arg-type]
        with pytest.raises(UntrustedError, match=words):
            Bundle.open(fresh_bundle, trust=maker.trust())
    maker.list(expires="2026-06-01")
    Bundle.open(fresh_bundle, trust=maker.trust())
    stranger = tmp_path / "stranger"
    stranger.mkdir()
    with pytest.raises(UntrustedError, match="not in the trust store"):
        Bundle.open(fresh_bundle, trust=Maker(stranger).trust())


def test_a_rotated_key_signs_and_the_old_one_no_longer_counts(fresh_bundle: Path, maker: Maker, tmp_path: Path) -> None:
    maker.sign(fresh_bundle)
    place = tmp_path / "next"
    place.mkdir()
    following = Maker(place)
    (maker.store / "next.pub").write_bytes((following.store / "release.pub").read_bytes())
    keys = [{"file": "release.pub", "roles": ["release"]}, {"file": "next.pub", "roles": ["release"]}]
    listed = {"version": 1, "keys": keys, "revoked": []}
    (maker.store / "trust.json").write_text(json.dumps(listed), encoding="utf-8")
    Bundle.open(fresh_bundle, trust=maker.trust())
    (maker.store / "trust.json").write_text(
        json.dumps({**listed, "revoked": [maker.signer.fingerprint]}), encoding="utf-8"
    )
    with pytest.raises(UntrustedError, match="revoked"):
        Bundle.open(fresh_bundle, trust=maker.trust())
    following.sign(fresh_bundle)
    Bundle.open(fresh_bundle, trust=maker.trust())


def test_the_machines_policy_holds_whatever_a_program_asks_for(
    fresh_bundle: Path, maker: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = tmp_path / "policy"
    policy.mkdir()
    monkeypatch.setenv(POLICY_VARIABLE, str(policy))
    monkeypatch.setenv("TINYUSFM_EDGE_CACHE", str(tmp_path / "cache"))
    Bundle.open(fresh_bundle)
    (policy / "policy.json").write_text(json.dumps({"version": 1, "require_signed": str(maker.store)}))
    with pytest.raises(UntrustedError, match="signed bundles only"):
        Bundle.open(fresh_bundle)
    maker.sign(fresh_bundle)
    Bundle.open(fresh_bundle)
    (policy / "policy.json").write_text("{")
    with pytest.raises(UntrustedError, match="is no policy"):
        Bundle.open(fresh_bundle)


def test_other_keys_than_p256_and_p384_cannot_sign(tmp_path: Path) -> None:
    for name, private in (
        ("rsa", rsa.generate_private_key(65537, 2048)),
        ("p521", ec.generate_private_key(ec.SECP521R1())),
        ("k1", ec.generate_private_key(ec.SECP256K1())),
    ):
        place = tmp_path / f"{name}.pem"
        place.write_bytes(private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        with pytest.raises(InputError, match="secp256r1, secp384r1"):
            key_signer(place)


def spoilt(path: Path, change: Callable[[dict[str, object]], None]) -> None:
    """Changes a signature file as JSON."""
    data = json.loads(path.read_text(encoding="utf-8"))
    change(data)
    path.write_text(json.dumps(data), encoding="utf-8")


def swap_payload(data: dict[str, object]) -> None:
    """Raises the security version in the payload, whose signature then no longer fits."""
    envelope = data["dsseEnvelope"]
    assert isinstance(envelope, dict)
    payload = base64.b64decode(envelope["payload"]).replace(b'"security_version": 3', b'"security_version": 9')
    envelope["payload"] = base64.b64encode(payload).decode()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (swap_payload, "does not belong"),
        (lambda data: data.update(mediaType="text/plain"), "is not read"),
        (lambda data: data.update(verificationMaterial={"x509CertificateChain": {}}), "certificate"),
        (lambda data: data.pop("dsseEnvelope"), "cannot be read"),
        (lambda data: data.update(dsseEnvelope={"payload": "!", "payloadType": "x", "signatures": []}), "no single"),
    ],
)
def test_a_spoilt_signature_file_is_refused(
    change: Callable[[dict[str, object]], None], words: str, fresh_bundle: Path, maker: Maker
) -> None:
    maker.sign(fresh_bundle)
    spoilt(fresh_bundle / SIGNATURE_NAME, change)
    with pytest.raises(UntrustedError, match=words):
        Bundle.open(fresh_bundle, trust=maker.trust())


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=400) | st.text(max_size=200).map(str.encode))
def test_no_bytes_make_the_reader_raise_anything_else(raw: bytes) -> None:
    for read in (read_envelope, read_statement, read_public_key):
        with pytest.raises(EdgeError):
            read(raw)


SAMPLES = ("v0.3.1", "v1.0.0", "v1.0.1", "v1.1.0")


@pytest.mark.needs_shared
@pytest.mark.parametrize("version", SAMPLES)
def test_elliptic_key_samples_of_the_model_signing_project_verify(version: str, shared_folder: Path) -> None:
    samples = shared_folder / "data" / "oms_samples"
    key = read_public_key((samples / "keys" / "certificate" / "signing-key-pub.pem").read_bytes())
    folder = samples / f"{version}-elliptic-key"
    envelope = read_envelope((folder / "model.sig").read_bytes())
    check_signature(envelope, key)
    statement = read_statement(envelope.payload)
    import hashlib

    for name, digest in statement.digests.items():
        path = folder / ("signme-1" if name == "." else name)
        assert hashlib.sha256(path.read_bytes()).hexdigest() == digest
    assert statement.binding is None and statement.digests
    wrong = replace(envelope, payload=envelope.payload.replace(b"signme", b"signed", 1) + b" ")
    with pytest.raises(UntrustedError):
        check_signature(wrong, key)


@pytest.mark.needs_shared
@pytest.mark.parametrize("version", ["v0.2.0", *SAMPLES])
def test_certificate_samples_are_refused_by_name(version: str, shared_folder: Path) -> None:
    raw = (shared_folder / "data" / "oms_samples" / f"{version}-certificate" / "model.sig").read_bytes()
    with pytest.raises(UntrustedError, match="certificate"):
        read_envelope(raw)


def test_a_store_with_a_path_outside_or_an_unknown_role_is_refused(maker: Maker) -> None:
    for key in ({"file": "../release.pem", "roles": ["release"]}, {"file": "release.pub", "roles": ["everything"]}):
        listed = {"version": 1, "keys": [key], "revoked": []}
        (maker.store / "trust.json").write_text(json.dumps(listed), encoding="utf-8")
        with pytest.raises(InputError, match="a key has a file"):
            TrustStore.open(maker.store)
