"""Signed bundles in C: refused as Python refuses them, opened as Python opens them; the samples verify."""

from __future__ import annotations

import base64
import ctypes as c
import hashlib
import json
import random
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from tests.capi.binding import FLOOR_RAISE, FLOOR_READ, Failed, Library, Session
from tests.capi.conftest import MakeStub, files_of
from tests.capi.test_refusals import rewrite
from tinyusfm_runtime.bundle.manifest import MANIFEST_NAME
from tinyusfm_runtime.bundle.reader import Bundle
from tinyusfm_runtime.errors import EdgeError, InputError, TamperedError, UntrustedError
from tinyusfm_runtime.trust.policy import Trust
from tinyusfm_runtime.trust.rollback import FileFloor
from tinyusfm_runtime.trust.statement import SIGNATURE_NAME

pytest.importorskip("cryptography", reason="install tinyusfm-edge[signed]")

from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from tests.runtime.test_trust import SAMPLES, Maker, spoilt, swap_payload

TODAY = date(2026, 6, 1)
CODES = ((UntrustedError, "UNTRUSTED"), (TamperedError, "TAMPERED"), (InputError, "INPUT"))


@pytest.fixture
def maker(tmp_path: Path) -> Maker:
    """A key and a store of its own."""
    place = tmp_path / "maker"
    place.mkdir()
    return Maker(place)


def in_c(library: Library, bundle: Path | Mapping[str, bytes], maker: Maker, **trust: Any) -> str:
    """Class of the status with which C refuses a bundle, or ``OK``."""
    fields = {"store": str(maker.store), "today": 20260601, "floor_file": str(maker.folder / "c" / "floor.json")}
    try:
        Session(library, bundle, trust={**fields, **trust}).close()
    except Failed as error:
        return error.code
    return "OK"


def in_python(bundle: Path, maker: Maker, device_class: str | None = None) -> str:
    """The same of Python."""
    floor = FileFloor(maker.folder / "python" / "floor.json")
    try:
        trust = replace(Trust.open(maker.store, device_class=device_class), floor=floor, today=TODAY)
        Bundle.open(bundle, trust=trust)
    except EdgeError as error:
        return next(name for kind, name in CODES if isinstance(error, kind))
    return "OK"


def alike(library: Library, bundle: Path, maker: Maker, device_class: str | None = None) -> str:
    """What both say, which must be one thing."""
    here = in_c(library, bundle, maker, **({} if device_class is None else {"device_class": device_class}))
    assert here == in_python(bundle, maker, device_class)
    return here


@pytest.mark.parametrize("curve", [ec.SECP256R1(), ec.SECP384R1()], ids=["P-256", "P-384"])
def test_a_signed_bundle_opens_from_every_source(
    curve: ec.EllipticCurve, library: Library, make_stub: MakeStub, tmp_path: Path
) -> None:
    place = tmp_path / "maker"
    place.mkdir()
    maker, bundle = Maker(place, curve), make_stub()
    assert alike(library, bundle, maker) == "UNTRUSTED"
    assert in_c(library, bundle, maker, require_signed=0) == "OK"
    maker.sign(bundle, version=7, device_class="cart")
    assert alike(library, bundle, maker, "cart") == "OK"
    assert in_c(library, files_of(bundle), maker, device_class="cart") == "OK"
    Session(library, bundle).close()  # without a demand the signature is not looked at
    Session(library, files_of(bundle), reader=True).close()
    for here in ("handheld", None):
        assert alike(library, bundle, maker, here) == "UNTRUSTED"


def test_changed_moved_and_unlisted_files_are_refused_alike(
    library: Library, make_stub: MakeStub, maker: Maker
) -> None:
    bundle, other = make_stub(), make_stub("shift_from=9")
    for one in (bundle, other):
        maker.sign(one)
    for name in (".gitattributes", ".git", "ignore-me", "golden/model.sig"):
        (bundle / name).write_bytes(b"x")
        assert alike(library, bundle, maker) == "TAMPERED"
        (bundle / name).unlink()
    assert alike(library, bundle, maker) == "OK"
    kept = (bundle / SIGNATURE_NAME).read_bytes()
    (bundle / SIGNATURE_NAME).write_bytes((other / SIGNATURE_NAME).read_bytes())
    assert alike(library, bundle, maker) == "UNTRUSTED"
    (bundle / SIGNATURE_NAME).write_bytes(kept)
    rewrite(bundle, lambda data: data.update(created_utc="2031-01-01T00:00:00Z"))
    assert alike(library, bundle, maker) == "UNTRUSTED"
    Session(library, bundle).close()  # who hashes again passes without a signature


def test_older_versions_and_damaged_floors_are_refused_alike(
    library: Library, make_stub: MakeStub, maker: Maker
) -> None:
    bundle = make_stub()
    for version, want in ((7, "OK"), (6, "UNTRUSTED"), (7, "OK"), (9, "OK"), (8, "UNTRUSTED")):
        maker.sign(bundle, version=version)
        assert alike(library, bundle, maker) == want
    here, there = (maker.folder / name / "floor.json" for name in ("c", "python"))
    assert json.loads(here.read_text()) == json.loads(there.read_text())
    assert here.stat().st_mode & 0o777 == 0o600
    maker.sign(bundle, version=9)
    for text in ("{}", '{"version": 1, "floors": {"a": -1}}', '{"version": 1, "floors": {}, "version": 1}', "x"):
        for floor in (here, there):
            floor.write_text(text)
        assert alike(library, bundle, maker) == "UNTRUSTED"
    for floor in (here, there):
        floor.write_text('{"version": 1, "floors": {}}')
        floor.chmod(0o666)
    assert alike(library, bundle, maker) == "TAMPERED"


def test_the_floor_is_kept_by_the_programs_own_functions(library: Library, make_stub: MakeStub, maker: Maker) -> None:
    bundle, kept = make_stub(), {"tiny": 4}
    maker.sign(bundle, version=5)
    name = json.loads((bundle / MANIFEST_NAME).read_text())["spec"]["name"]
    kept = {name: 4}

    def raise_to(_user: Any, model: bytes, version: int) -> int:
        kept[model.decode()] = version
        return 0

    read = FLOOR_READ(lambda _user, model: kept.get(model.decode(), 0))
    functions = {"floor_read": read, "floor_raise": FLOOR_RAISE(raise_to)}
    assert in_c(library, bundle, maker, **functions) == "OK" and kept == {name: 5}
    kept[name] = 6
    assert in_c(library, bundle, maker, **functions) == "UNTRUSTED"
    assert in_c(library, bundle, maker, **{**functions, "floor_read": FLOOR_READ(lambda _u, _m: -1)}) == "UNTRUSTED"
    kept[name] = 0
    refusing = {**functions, "floor_raise": FLOOR_RAISE(lambda _u, _m, _v: 1)}
    assert in_c(library, bundle, maker, **refusing) == "OUTPUT"
    assert in_c(library, bundle, maker, floor_read=read) == "INPUT"


def test_a_bundle_that_is_refused_does_not_raise_the_floor(library: Library, make_stub: MakeStub, maker: Maker) -> None:
    bundle = make_stub()
    maker.sign(bundle, version=9)
    path = bundle / "golden" / "frames.safetensors"
    content = path.read_bytes()
    path.chmod(0o644)
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert alike(library, bundle, maker) == "TAMPERED"
    assert not (maker.folder / "c" / "floor.json").exists()


def test_keys_and_stores_are_judged_alike(library: Library, make_stub: MakeStub, maker: Maker, tmp_path: Path) -> None:
    bundle = make_stub()
    maker.sign(bundle)
    changes: list[tuple[dict[str, Any], str]] = [
        ({"revoked": True}, "UNTRUSTED"), ({"expires": "2026-05-31"}, "UNTRUSTED"), ({"expires": "2026-06-01"}, "OK"),
        ({"expires": "2026-02-30"}, "INPUT"), ({"roles": ("development",)}, "UNTRUSTED"),
        ({"roles": ("everything",)}, "INPUT"), ({"roles": ()}, "INPUT"), ({"roles": ("development", "release")}, "OK"),
    ]  # fmt: skip
    for change, want in changes:
        maker.list(**change)
        assert alike(library, bundle, maker) == want, change
    maker.list()
    place = tmp_path / "stranger"
    place.mkdir()
    assert alike(library, bundle, Maker(place)) == "UNTRUSTED"
    good = (maker.store / "release.pub").read_bytes()
    publics = [
        ec.generate_private_key(ec.SECP521R1()).public_key(), ec.generate_private_key(ec.SECP256K1()).public_key(),
        rsa.generate_private_key(65537, 2048).public_key(),
    ]  # fmt: skip
    pems = [key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo) for key in publics]
    for raw, want in (
        *((pem, "UNTRUSTED") for pem in pems), (b"", "UNTRUSTED"), (b"text before\n" + good, "OK"),
        (base64.b64decode(b"".join(good.splitlines()[1:-1])), "UNTRUSTED"), (good[:60], "UNTRUSTED"),
    ):  # fmt: skip
        (maker.store / "release.pub").write_bytes(raw)
        assert alike(library, bundle, maker) == want
    (maker.store / "release.pub").write_bytes(good)
    for text in (
        "", "[]", '{"version": 2, "keys": []}', '{"version": 1}', '{"version": 1, "keys": [], "more": 1}',
        '{"version": 1, "keys": [{"file": "../release.pem", "roles": ["release"]}]}',
        '{"version": 1, "keys": [{"file": "nothing.pub", "roles": ["release"]}]}',
        '{"version": 1, "keys": [{"file": "release.pub", "roles": ["release"], "name": "x"}]}',
    ):  # fmt: skip
        (maker.store / "trust.json").write_text(text)
        assert alike(library, bundle, maker) == "INPUT", text
    (maker.store / "trust.json").unlink()
    assert alike(library, bundle, maker) == "INPUT"


SPOILT: list[Callable[[dict[str, Any]], object]] = [
    swap_payload,
    lambda data: data.update(mediaType="text/plain"),
    lambda data: data.update(mediaType=7),
    lambda data: data.pop("mediaType"),
    lambda data: data.update(verificationMaterial={"x509CertificateChain": {}}),
    lambda data: data.update(verificationMaterial=[]),
    lambda data: data["verificationMaterial"].update(publicKey={}),
    lambda data: data["verificationMaterial"].update(publicKey={"hint": 7}),
    lambda data: data["verificationMaterial"].update(publicKey={"hint": "0" * 64}),
    lambda data: data.pop("dsseEnvelope"),
    lambda data: data.update(dsseEnvelope={"payload": "!", "payloadType": "x", "signatures": []}),
    lambda data: data["dsseEnvelope"].update(payloadType="text/plain"),
    lambda data: data["dsseEnvelope"].update(payload="!"),
    lambda data: data["dsseEnvelope"].update(payload=""),
    lambda data: data["dsseEnvelope"].update(signatures=data["dsseEnvelope"]["signatures"] * 2),
    lambda data: data["dsseEnvelope"]["signatures"][0].update(sig="AAAA"),
    lambda data: data["dsseEnvelope"]["signatures"][0].pop("sig"),
]


@pytest.mark.parametrize("change", SPOILT, ids=range(len(SPOILT)))
def test_spoilt_signature_files_are_refused_alike(
    change: Callable[[dict[str, Any]], None], library: Library, make_stub: MakeStub, maker: Maker
) -> None:
    bundle = make_stub()
    maker.sign(bundle)
    spoilt(bundle / SIGNATURE_NAME, change)
    assert alike(library, bundle, maker) == "UNTRUSTED"


def test_bent_signature_files_are_refused_alike(library: Library, make_stub: MakeStub, maker: Maker) -> None:
    """Bytes flipped, cut and repeated; what still says the same may still open, in both."""
    bundle, rng = make_stub(), random.Random(4)
    maker.sign(bundle)
    path = bundle / SIGNATURE_NAME
    good, said = path.read_bytes(), []
    for _ in range(120):
        raw = bytearray(good)
        for _ in range(rng.randrange(1, 4)):
            at = rng.randrange(len(raw))
            raw[at : at + rng.randrange(3)] = bytes(rng.randrange(256) for _ in range(rng.randrange(3)))
        path.write_bytes(bytes(raw[: rng.randrange(len(raw))] if rng.random() < 0.1 else raw))
        said.append(alike(library, bundle, maker))
    assert said.count("UNTRUSTED") > 100 and set(said) <= {"UNTRUSTED", "OK"}


STATEMENTS: list[Callable[[dict[str, Any]], object]] = [
    lambda s: s.update(_type="x"),
    lambda s: s.update(predicateType="x"),
    lambda s: s["predicate"]["serialization"].update(method="shards"),
    lambda s: s["predicate"]["resources"].pop(),
    lambda s: s["predicate"]["resources"].append(s["predicate"]["resources"][0]),
    lambda s: s["predicate"]["resources"][0].update(digest="x"),
    lambda s: s["subject"][0]["digest"].update(sha256="0" * 64),
    lambda s: s["predicate"].pop("tinyusfm_bundle"),
    lambda s: s["predicate"].update(tinyusfm_bundle=None),
    lambda s: s["predicate"]["tinyusfm_bundle"].update(security_version=-1),
    lambda s: s["predicate"]["tinyusfm_bundle"].update(security_version=True),
    lambda s: s["predicate"]["tinyusfm_bundle"].update(bundle_id="0" * 16),
    lambda s: s["predicate"]["tinyusfm_bundle"].update(spec_sha256="0" * 64),
    lambda s: s["predicate"]["tinyusfm_bundle"].update(more=1),
    lambda s: s["predicate"]["tinyusfm_bundle"].update(device_class=7),
]


@pytest.mark.parametrize("change", STATEMENTS, ids=range(len(STATEMENTS)))
def test_statements_that_do_not_fit_are_refused_though_their_signature_is_good(
    change: Callable[[dict[str, Any]], object], library: Library, make_stub: MakeStub, maker: Maker
) -> None:
    from tinyusfm_runtime.trust.envelope import pre_authentication, read_envelope, write_envelope

    bundle = make_stub()
    maker.sign(bundle)
    envelope = read_envelope((bundle / SIGNATURE_NAME).read_bytes())
    statement = json.loads(envelope.payload)
    change(statement)
    payload = json.dumps(statement).encode()
    signature = maker.signer.sign(pre_authentication(payload))
    (bundle / SIGNATURE_NAME).write_bytes(write_envelope(payload, signature, envelope.hint))
    assert alike(library, bundle, maker) == "UNTRUSTED"


def test_a_swap_satisfies_the_same_demand(library: Library, make_stub: MakeStub, maker: Maker) -> None:
    bundle, other = make_stub(), make_stub("shift_from=9999")
    maker.sign(bundle)
    fields = {"store": str(maker.store), "today": 20260601, "floor_file": str(maker.folder / "c" / "floor.json")}
    with Session(library, bundle, trust=fields) as session:
        report = session.swap(other)
        assert report.outcome == 1 and b"no model.sig" in report.reason
        maker.sign(other)
        assert session.swap(other).outcome == 0


def test_the_machines_policy_holds_whatever_a_program_asks_for(
    library: Library, make_stub: MakeStub, maker: Maker, tmp_path: Path, build_folder: Path
) -> None:
    bundle, policy = make_stub(), tmp_path / "policy"
    policy.mkdir()
    environment = {"TINYUSFM_EDGE_POLICY": str(policy), "TINYUSFM_EDGE_CACHE": str(tmp_path / "cache")}

    def said() -> str:
        done = subprocess.run(
            [build_folder / "tinyusfm-run", bundle, "--info"],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        return done.stderr if done.returncode else "OK"

    assert said() == "OK"
    (policy / "policy.json").write_text(json.dumps({"version": 1, "require_signed": str(maker.store)}))
    assert "signed bundles only" in said()
    maker.sign(bundle)
    assert said() == "OK" and (tmp_path / "cache" / "trust" / "floor.json").exists()
    for text in ("{", "{}", '{"version": 1, "require_signed": "x", "more": 1}'):
        (policy / "policy.json").write_text(text)
        assert "is no policy" in said()


def run_signature(build_folder: Path, signature: Path, key: Path) -> subprocess.CompletedProcess[str]:
    program = build_folder / "tests" / "signature"
    return subprocess.run([program, signature, key], capture_output=True, text=True, check=False)


@pytest.mark.needs_shared
@pytest.mark.parametrize("version", SAMPLES)
def test_elliptic_key_samples_of_the_model_signing_project_verify(
    version: str, shared_folder: Path, build_folder: Path, tmp_path: Path
) -> None:
    samples = shared_folder / "data" / "oms_samples"
    key, folder = samples / "keys" / "certificate" / "signing-key-pub.pem", samples / f"{version}-elliptic-key"
    done = run_signature(build_folder, folder / "model.sig", key)
    assert done.returncode == 0, done.stderr
    listed = dict(line.split(" ") for line in done.stdout.splitlines())
    assert listed
    for name, digest in listed.items():
        path = folder / ("signme-1" if name == "." else name)
        assert hashlib.sha256(path.read_bytes()).hexdigest() == digest
    data = json.loads((folder / "model.sig").read_text())
    payload = base64.b64decode(data["dsseEnvelope"]["payload"]).replace(b"signme", b"signed", 1) + b" "
    data["dsseEnvelope"]["payload"] = base64.b64encode(payload).decode()
    (tmp_path / "model.sig").write_text(json.dumps(data))
    assert "12 the signature does not belong" in run_signature(build_folder, tmp_path / "model.sig", key).stderr


@pytest.mark.needs_shared
@pytest.mark.parametrize("version", ["v0.2.0", *SAMPLES])
def test_certificate_samples_are_refused_by_name(version: str, shared_folder: Path, build_folder: Path) -> None:
    samples = shared_folder / "data" / "oms_samples"
    done = run_signature(
        build_folder, samples / f"{version}-certificate" / "model.sig",
        samples / "keys" / "certificate" / "signing-key-pub.pem",
    )  # fmt: skip
    assert done.returncode == 1 and "12 the signature was made with a certificate" in done.stderr


def test_struct_pointers_are_checked(library: Library, make_stub: MakeStub) -> None:
    nothing = library.make("trust_options")
    given = library.make("options", trust=c.addressof(nothing))
    handle = c.c_void_p()
    with pytest.raises(Failed, match=r"INPUT.*names no store"):
        library.check(library.lib.tusfm_open(str(make_stub()).encode(), c.byref(given), c.byref(handle)))
