"""A bundle that Python refuses, C refuses with the same class of error; one that Python opens, C opens."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.capi.binding import Failed, Library, Session
from tests.capi.conftest import MakeStub, files_of, stub_parts
from tests.conftest import SIDE, tiny_spec
from tinyusfm_runtime import errors
from tinyusfm_runtime.bundle.arrays import pack_arrays
from tinyusfm_runtime.bundle.manifest import GOLDEN_FRAMES, GOLDEN_REFERENCE, GOLDEN_SECTOR, MANIFEST_NAME
from tinyusfm_runtime.reading_rules import TokenSector
from tinyusfm_runtime.session import Session as PythonSession

pytestmark = pytest.mark.usefixtures("stub_plug_in")
CLASSES: tuple[tuple[type[errors.EdgeError], str], ...] = (
    (errors.UnverifiedError, "UNVERIFIED"), (errors.TamperedError, "TAMPERED"), (errors.BundleError, "BUNDLE"),
    (errors.MissingExtra, "MISSING"), (errors.UnsupportedError, "UNSUPPORTED"), (errors.EngineError, "ENGINE"),
    (errors.FrameError, "FRAME"), (errors.InputError, "INPUT"),
)  # fmt: skip
MUTATIONS = 1000


def in_python(bundle: Path, **options: Any) -> str:
    """Class of the error with which Python refuses a bundle, or ``OK``."""
    try:
        PythonSession.open(bundle, **options).close()
    except errors.EdgeError as error:
        return next(name for kind, name in CLASSES if isinstance(error, kind))
    return "OK"


def in_c(library: Library, bundle: Path | dict[str, bytes], **options: Any) -> str:
    """Class of the status with which C refuses a bundle, or ``OK``."""
    try:
        Session(library, bundle, **options).close()
    except Failed as error:
        assert "\n" not in str(error) and len(str(error)) > 20
        return error.code
    return "OK"


def resealed(data: dict[str, Any]) -> bytes:
    """The bytes of a manifest whose own hash fits again, as somebody would write them who means harm."""
    body = {key: value for key, value in data.items() if key != "manifest_sha256"}
    compact = json.dumps(body, sort_keys=True, separators=(",", ":"))
    data["manifest_sha256"] = hashlib.sha256(compact.encode("ascii")).hexdigest()
    return (json.dumps(data, sort_keys=True, indent=1) + "\n").encode("ascii")


def rewrite(bundle: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes a manifest and seals it again."""
    path = bundle / MANIFEST_NAME
    data = json.loads(path.read_bytes())
    change(data)
    path.unlink()
    path.write_bytes(resealed(data))


def test_whole_bundles_open_from_a_folder_from_memory_and_through_a_reader(
    library: Library, make_stub: MakeStub
) -> None:
    bundle = make_stub()
    files = files_of(bundle)
    assert in_python(bundle) == in_c(library, bundle) == in_c(library, files) == "OK"
    assert in_c(library, files, reader=True) == "OK"
    sha256 = json.loads(files[MANIFEST_NAME])["manifest_sha256"]
    with Session(library, files, reader=True) as session:
        info = session.info()
        assert info.bundle_sha256.decode() == sha256 and info.artefact == b"stub-fp32" and info.verified
        assert library.lib.tusfm_label(session.handle, 0) == b"head" and not library.lib.tusfm_label(session.handle, 1)


def test_a_thousand_mutated_bundles_are_refused_alike(library: Library, make_stub: MakeStub, tmp_path: Path) -> None:
    """Bytes flipped, cut, added; files exchanged, removed, added: in the folder for both, the classes compared."""
    rng = random.Random(7)
    good = make_stub()
    files = files_of(good)
    seen: dict[str, int] = {}
    for number in range(MUTATIONS):
        copy = tmp_path / "mutated"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(good, copy)
        _mutate(copy, rng, sorted(files))
        here, there = in_c(library, copy), in_python(copy)
        assert here == there, f"mutation {number}: C says {here}, Python says {there}"
        seen[here] = seen.get(here, 0) + 1
    assert seen.get("TAMPERED", 0) > 0.9 * MUTATIONS and "OK" not in seen, seen


def _mutate(bundle: Path, rng: random.Random, names: list[str]) -> None:
    path = bundle / rng.choice([*names, MANIFEST_NAME, MANIFEST_NAME])
    raw = bytearray(path.read_bytes())
    kind = rng.randrange(7)
    if kind <= 2 and raw:
        for _ in range(rng.choice((1, 1, 3))):
            raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
    elif kind == 3:
        del raw[rng.randrange(len(raw) + 1) :]
    elif kind == 4:
        raw += rng.randbytes(rng.randrange(1, 40))
    elif kind == 5:
        (bundle / f"more{rng.randrange(9)}").write_bytes(b"x")
        return
    if bytes(raw) == path.read_bytes():
        raw += b"?"
    path.unlink()
    if kind != 6:
        path.write_bytes(raw)
    if kind == 4 and rng.random() < 0.2:
        path.unlink()
        path.symlink_to("/dev/null")


def _set(*keys: Any, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(data: dict[str, Any]) -> None:
        place: Any = data
        for key in keys[:-1]:
            place = place[key]
        place[keys[-1]] = value

    change.__name__ = "/".join(map(str, keys)) + f"={str(value)[:30]}"
    return change


def _drop(*keys: Any) -> Callable[[dict[str, Any]], None]:
    def change(data: dict[str, Any]) -> None:
        place: Any = data
        for key in keys[:-1]:
            place = place[key]
        del place[keys[-1]]

    change.__name__ = "no " + "/".join(map(str, keys))
    return change


A, S, P = ("artefacts", 0), ("spec",), ("spec", "preprocess")
GRID = ["0" + "1" * (SIDE // 16 - 1)] * (SIDE // 16)
"""A sector of the tiny model's input that leaves its first column out."""
CHANGES = [
    _set("schema", value=1), _set("schema", value=99), _set("schema", value="2"), _set("schema", value=True),
    _drop("schema"), _drop("tools"), _set("more", value=1), _set("files", value=[]), _set("artefacts", value=[]),
    _set("artefacts", value={}), _set("weights_sha256", value=None), _set("calibration_id", value=7),
    _set("tools", value=[]), _set("created_utc", value=None), _set("drift", value="drift/statistic.safetensors"),
    _set("drift", value=7), _set("device_class", value="a b"), _set("device_class", value="cart"),
    _set("security_version", value=-1), _set("security_version", value=1 << 31), _set("security_version", value=7),
    _set("security_version", value=True), _set("trace", value={"data": "x"}), _set("trace", value={"data": "0" * 64}),
    _set(*A, "target", value="../x"), _set(*A, "target", value=""), _set(*A, "engine", value="nothing"),
    _set(*A, "precision", value="int 8"), _set(*A, "rest_precision", value="f64"), _set(*A, "form", value=None),
    _set(*A, "files", value={}), _set(*A, "files", value={"a": 1}), _set(*A, "requirements", value=None),
    _set(*A, "gate", value=None), _set(*A, "gate", value=[]), _set(*A, "state", value="unverified"),
    _set(*A, "state", value="good"), _set(*A, "gated", value=False), _set(*A, "gated", value=1),
    _set(*A, "golden", value="golden/none"), _set(*A, "golden", value="golden/frames.safetensors"),
    _set(*A, "tolerance", value={"logit_abs": -1}), _set(*A, "tolerance", value={"logit_abs": True}),
    _set(*A, "tolerance", value={"logit_abs": 1000.5}), _set(*A, "tolerance", value={"logit_abs": 1e308}),
    _set(*A, "tolerance", value={"logit_abs": 1, "differing_pixels": 0.06}),
    _set(*A, "tolerance", value={"logit_abs": 1, "hc_mm": 5.1}),
    _set(*A, "tolerance", value={"logit_abs": 1000, "differing_pixels": 0.05, "hc_mm": 5}),
    _set(*A, "tolerance", value={"logit_abs": 1, "pixels": 0}), _set(*A, "tolerance", value={"logit_abs": 10**400}),
    _set(*A, "tolerance", value={"logit_abs": "1"}), _set(*A, "tolerance", value={}), _drop(*A, "tolerance"),
    _set(*A, "more", value=1), _set(*A, "requirements", "pending", value="a device"),
    _set(*S, "name", value=""), _set(*S, "name", value="a b"), _set(*S, "name", value=".a"), _set(*S, "name", value=7),
    _set(*S, "name", value="kopfgr\u00f6\u00dfe"),
    _set(*S, "task", value="paint"), _set(*S, "task", value="classify"), _set(*S, "labels", value="head"),
    _set(*S, "labels", value=[1]), _set(*S, "labels", value=None), _set(*S, "labels", value=["background", "head"]),
    _set(*S, "labels", value=[]), _set(*S, "postprocess", value="x"), _set(*S, "postprocess", value="mask"),
    _set(*S, "threshold", value=0), _set(*S, "threshold", value=1.0), _set(*S, "threshold", value="0.5"),
    _set(*S, "threshold", value=True), _set(*S, "threshold", value=0.95), _set(*S, "threshold", value=None),
    _set(*S, "architecture", value=[]), _set(*S, "licence", value=None), _set(*S, "origin", value=7),
    _set(*S, "intended_use", value=None), _set(*S, "weights_sha256", value=None), _set(*S, "more", value=1),
    _drop(*S, "licence"), _drop(*S, "second_pass"), _set(*S, "second_pass", value="often"),
    _set(*S, "min_area", value=1), _set(*S, "min_area", value=-0.1), _set(*S, "min_area", value="0"),
    _set(*S, "exits", value={"blocks": [1], "entropy": [0.5], "patience": 0}), _set(*S, "exits", value=7),
    _set(*S, "reading", value={}), _set(*S, "reading", value=7), _set(*S, "anatomy", value={"name": "x"}),
    _set(*S, "anatomy", value={"name": "x", "size_mm": [2, 1], "spacing_mm": [0.01, 1]}),
    _set(*S, "anatomy", value={"name": "x", "size_mm": [1, 900], "spacing_mm": [0.01, 1]}),
    _set(*S, "probe", value={"name": "x"}), _set(*S, "probe", value=7),
    _set(*S, "sector", value=None), _set(*S, "sector", value={}), _set(*S, "sector", value=7),
    _set(*S, "sector", value={"name": "fan", "kept": GRID}), _set(*S, "sector", value={"name": "a b", "kept": GRID}),
    _set(*S, "sector", value={"name": "f" * 81, "kept": GRID}),
    _set(*S, "sector", value={"name": "f" * 80, "kept": GRID}),
    _set(*S, "sector", value={"name": "fan", "kept": GRID[1:]}),
    _set(*S, "sector", value={"name": "fan", "kept": "0110"}),
    _set(*S, "sector", value={"name": "fan", "kept": [row + "0" for row in GRID]}),
    _set(*S, "sector", value={"name": "fan", "kept": [row.replace("1", "0") for row in GRID]}),
    _set(*S, "sector", value={"name": "fan", "kept": [row.replace("0", "1") for row in GRID]}),
    _set(*S, "sector", value={"name": "fan", "kept": [row.replace("0", "2") for row in GRID]}),
    _set(*S, "sector", value={"name": "fan", "kept": [7, *GRID[1:]]}),
    _set(*S, "sector", value={"name": "fan", "kept": GRID, "more": 1}),
    _set(*A, "requirements", "sector", value="fan"), _set(*A, "requirements", "sector", value=7),
    _set(*A, "requirements", "sector", value=None), _set(*A, "requirements", "sector", value=""),
    _set(*P, "height", value=15), _set(*P, "height", value=5000), _set(*P, "height", value=64.0),
    _set(*P, "height", value="64"), _set(*P, "height", value=True), _set(*P, "width", value=None),
    _set(*P, "grey", value=1), _set(*P, "grey", value=None), _set(*P, "aspect", value="crop"),
    _set(*P, "crop", value=[0, 0, 8]), _set(*P, "crop", value=[0, 0, 9999, 9999]),
    _set(*P, "crop", value=[0, 0, 9.5, 9]),
    _set(*P, "crop", value="none"), _set(*P, "mean", value=[0, 0]), _set(*P, "mean", value=["0", 0, 0]),
    _set(*P, "std", value=[0, 1, 1]), _set(*P, "std", value=[1, 1, 11]), _set(*P, "std", value=None),
    _set(*P, "more", value=1), _drop(*P, "std"),
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=[change.__name__ for change in CHANGES])
def test_a_manifest_changed_and_sealed_again_is_judged_alike(
    change: Callable[[dict[str, Any]], None], library: Library, make_stub: MakeStub
) -> None:
    bundle = make_stub()
    rewrite(bundle, change)
    here, there = in_c(library, bundle), in_python(bundle)
    assert here == there, f"C says {here}, Python says {there}"


def test_a_pruned_artefact_is_refused_by_c_and_the_whole_one_behind_it_opens(
    library: Library, make_stub: MakeStub, tmp_path: Path
) -> None:
    spec = tiny_spec(sector=TokenSector(name="fan", kept=tuple(GRID)))
    parts = stub_parts("", spec=spec)
    whole = parts.artefacts[0]
    files = {**parts.files, GOLDEN_SECTOR: parts.files[GOLDEN_REFERENCE]}
    path = "artefacts/stub-fp32-sector/model.stub"
    files[path] = files[next(iter(whole.files))]
    entry = {path: whole.files[next(iter(whole.files))]}
    pruned = replace(whole, files=entry, requirements={**whole.requirements, "sector": "fan"})
    bundle = replace(parts, artefacts=(pruned, whole), files=files).publish(tmp_path / "pruned.bundle")
    assert in_python(bundle) == "OK" and in_c(library, bundle) == "UNSUPPORTED", "it does not check frames"
    assert in_python(bundle, precision="fp32") == in_c(library, bundle, precision="fp32") == "OK"
    assert in_c(library, bundle, precision="fp32-sector") == "UNSUPPORTED"
    with pytest.raises(Failed, match="open an artefact that looks at all patches by its precision, such as fp32"):
        Session(library, bundle)


def test_files_may_be_listed_only_as_python_lets_them(library: Library, make_stub: MakeStub) -> None:
    listed = {"sha256": "0" * 64, "size_bytes": 0}
    names = [
        "a/../b",
        "/a",
        "a//b",
        "a/",
        ".a",
        "A.b",
        "a.b",
        "manifest.json",
        "Manifest.json",
        "x" * 121,
        "a b",
        "\u00e4",
        "",
    ]
    for name in names:
        bundle = make_stub()
        rewrite(bundle, lambda data, name=name: data["files"].update({name: listed, "a.B": listed}))  # type: ignore[misc]
        assert in_c(library, bundle) == in_python(bundle) != "OK", name
    for entry in ({**listed, "size_bytes": -1}, {**listed, "size_bytes": 1 << 31}, {**listed, "sha256": "0" * 63}, {}):
        bundle = make_stub()
        rewrite(bundle, lambda data, entry=entry: data["files"].update({"a.b": entry}))  # type: ignore[misc]
        assert in_c(library, bundle) == in_python(bundle) == "BUNDLE", entry


TEXTS = [
    b"", b"{", b"[]", b"7", b'"x"', b"null", b"\xff", b"{}\n", b'{"schema": 2}\n', b'{"schema": NaN}', b"[" * 5000,
    b'{"schema": 2, "schema": 2}', b'{"schema": 1e999}', b'{"a": "\\ud800"}', b'{"a": "\\u0000"}',
    b'{"a": 99999999999999999999}',
    b'{"schema": 2.0}', b'{"schema":\t2}',
]  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
def test_what_is_no_manifest_is_refused_alike(text: bytes, library: Library, make_stub: MakeStub) -> None:
    bundle = make_stub()
    (bundle / MANIFEST_NAME).unlink()
    (bundle / MANIFEST_NAME).write_bytes(text)
    assert in_c(library, bundle) == in_python(bundle) != "OK"


@pytest.mark.parametrize("text", ['"\\ud800"', '"\\u0000"', "99999999999999999999", "-9223372036854775809", "1e400"])
def test_values_that_not_every_reader_keeps_are_refused_alike(text: str, library: Library, make_stub: MakeStub) -> None:
    bundle = make_stub()
    path = bundle / MANIFEST_NAME
    data = json.loads(path.read_bytes())
    data["tools"]["odd"] = "VALUE"
    body = {key: value for key, value in data.items() if key != "manifest_sha256"}
    compact = json.dumps(body, sort_keys=True, separators=(",", ":")).replace('"VALUE"', text)
    data["manifest_sha256"] = hashlib.sha256(compact.encode("ascii")).hexdigest()
    path.unlink()
    path.write_text(json.dumps(data, sort_keys=True, indent=1).replace('"VALUE"', text) + "\n", encoding="ascii")
    assert in_c(library, bundle) == in_python(bundle) == "TAMPERED"


def test_every_number_is_written_as_python_writes_it(library: Library, make_stub: MakeStub) -> None:
    """The manifest's own hash is over a text, so C must write every finite number as Python's repr does."""
    rng = np.random.default_rng(0)
    random_bits = rng.integers(0, 1 << 63, 3000, dtype=np.uint64).view(np.float64)
    values = [float(v) for v in random_bits if np.isfinite(v)]
    values += [2.0**k for k in range(-1074, 1024, 7)] + [
        0.1,
        -0.0,
        1e22,
        1e-5,
        123456789012345680.0,
        5e-324,
        1.0,
        100.0,
    ]
    values += [float(np.nextafter(v, 0)) for v in (1e16, 1e-4, 1.0, 2.0**-44)] + [9007199254740993.0, 1e16, 1e-4]
    bundle = make_stub()
    rewrite(bundle, lambda data: data["tools"].update(numbers=values, letters='\u00e4\x7f\x1f\U0001f600"\\/\b\f'))
    assert in_python(bundle) == in_c(library, bundle) == "OK"


def test_links_and_special_files_are_refused_alike(library: Library, make_stub: MakeStub, tmp_path: Path) -> None:
    bundle = make_stub()
    (tmp_path / "link.bundle").symlink_to(bundle)
    assert in_c(library, tmp_path / "link.bundle") == in_python(tmp_path / "link.bundle") == "OK"
    (tmp_path / "lost.bundle").symlink_to(tmp_path / "nowhere")
    assert in_c(library, tmp_path / "lost.bundle") == in_python(tmp_path / "lost.bundle") == "INPUT"
    assert in_c(library, tmp_path / "nothing") == in_python(tmp_path / "nothing") == "INPUT"
    (tmp_path / "file").write_bytes(b"x")
    assert in_c(library, tmp_path / "file") == in_python(tmp_path / "file") == "BUNDLE"
    (tmp_path / "empty").mkdir()
    assert in_c(library, tmp_path / "empty") == in_python(tmp_path / "empty") == "BUNDLE"
    makers: list[Callable[[Path], object]] = [
        lambda b: os.mkfifo(b / "pipe"),
        lambda b: (b / "golden/more").symlink_to("/etc/hostname"),
        lambda b: os.link(b / MANIFEST_NAME, tmp_path / "other-name"),
        lambda b: (b / "empty").mkdir(),
        lambda b: (b / "a/b/c/d/e/f/g/h/i/j").mkdir(parents=True),
        lambda b: (b / ".hidden").write_bytes(b""),
        lambda b: (b / "golden/.DS_Store").write_bytes(b""),
        lambda b: (b / "golden\udcff").write_bytes(b""),
    ]
    for maker in makers:
        bundle = make_stub()
        maker(bundle)
        assert in_c(library, bundle) == in_python(bundle) == "TAMPERED"
        (tmp_path / "other-name").unlink(missing_ok=True)


def test_golden_files_that_do_not_fit_are_refused_alike(library: Library, tmp_path: Path) -> None:
    parts = stub_parts()
    rng = np.random.default_rng(0)
    frames = {
        "pixels": rng.integers(0, 255, (8, 96, 128), np.uint8), "spacing_mm": np.full((8, 2), 0.3),
        "seeds": np.arange(8),
    }  # fmt: skip
    changes: list[dict[str, bytes]] = [
        {GOLDEN_FRAMES: b""}, {GOLDEN_FRAMES: b"x" * 100}, {GOLDEN_FRAMES: pack_arrays({})},
        {GOLDEN_FRAMES: pack_arrays({**frames, "pixels": frames["pixels"][:7]})},
        {GOLDEN_FRAMES: pack_arrays({**frames, "spacing_mm": np.zeros((8, 2))})},
        {GOLDEN_FRAMES: pack_arrays({**frames, "pixels": frames["pixels"][:, :4]})},
        {GOLDEN_FRAMES: pack_arrays(frames)},
        {"golden/stub-fp32.safetensors": pack_arrays({"logits": np.zeros((8, 1, 64, 64), np.float16)})},
        {"golden/stub-fp32.safetensors": pack_arrays({"logits": np.zeros((7, 1, 64, 64), np.float16)})},
        {"golden/stub-fp32.safetensors": pack_arrays({"logits": np.zeros((8, 2), np.float16)})},
        {"golden/stub-fp32.safetensors": pack_arrays({"other": np.zeros(3)})},
        {"golden/stub-fp32.safetensors": pack_arrays({"logits": np.zeros((8, 1, 64, 64), np.int16)})},
        {GOLDEN_REFERENCE: b"broken"},
    ]  # fmt: skip
    for number, change in enumerate(changes):
        files = {**parts.files, **change}
        bundle = type(parts)(spec=parts.spec, artefacts=parts.artefacts, files=files).publish(
            tmp_path / f"{number}.bundle"
        )
        here, there = in_c(library, bundle), in_python(bundle)
        if change.get(GOLDEN_REFERENCE) == b"broken":  # Python reads it when it is needed
            assert (here, there) == ("BUNDLE", "OK")
            continue
        assert here == there != "OK", number


def test_unverified_and_pending_artefacts_are_asked_for(library: Library, make_stub: MakeStub) -> None:
    from tinyusfm_runtime.bundle.manifest import ArtefactState

    for changes in ({"state": ArtefactState.UNVERIFIED}, {"gated": False}):
        bundle = make_stub(**changes)
        assert in_c(library, bundle) == in_python(bundle) == "UNVERIFIED"
        assert in_c(library, bundle, allow_unverified=1) == in_python(bundle, allow_unverified=True) == "OK"
        with Session(library, bundle, allow_unverified=1) as session:
            assert not session.info().verified


def test_the_artefact_that_was_asked_for_is_taken_or_nothing(library: Library, make_stub: MakeStub) -> None:
    bundle = make_stub("", "")
    for wanted in ({"target": "stub2"}, {"precision": "FP32"}, {"target": "Stub", "precision": "fp32"}):
        with Session(library, bundle, **wanted) as session:
            assert session.info().artefact.decode().startswith(wanted.get("target", "stub").lower())
    for wanted in ({"target": "openvino"}, {"precision": "int8"}):
        assert in_c(library, bundle, **wanted) == in_python(bundle, **wanted) == "INPUT"
