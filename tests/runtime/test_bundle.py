"""A bundle is trusted byte by byte: whatever was changed, added, removed or linked is refused."""

from __future__ import annotations

import json
import os
import random
import shutil
import socket
from collections.abc import Callable
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import GOLDEN_SEEDS, Parts
from tinyusfm_runtime import bundle as bundle_module
from tinyusfm_runtime.arrays import pack_arrays, unpack_arrays
from tinyusfm_runtime.bundle import GOLDEN_FRAMES, MANIFEST_NAME, SCHEMA_VERSION, Bundle
from tinyusfm_runtime.errors import BundleError, EdgeError, InputError, TamperedError
from tinyusfm_runtime.manifest import (
    Artefact,
    ArtefactState,
    Manifest,
    check_paths,
    file_entry,
    manifest_bytes,
    read_manifest,
)

FLIPS = 400


def files_of(path: Path) -> list[Path]:
    """Every file below a folder."""
    return sorted(file for file in path.rglob("*") if file.is_file())


def flip(file: Path, rng: random.Random) -> bytes:
    """Changes one byte of a file and returns what stood there."""
    before = file.read_bytes()
    place = rng.randrange(len(before))
    changed = bytearray(before)
    changed[place] ^= rng.randrange(1, 256)
    file.write_bytes(bytes(changed))
    return before


def accepted_flips(path: Path, count: int) -> list[str]:
    """Flips one byte after another, each in a file by turns, and names those with which the bundle still opens."""
    rng, accepted = random.Random(11), []
    files = files_of(path)
    for i in range(count):
        file = files[i % len(files)]
        before = flip(file, rng)
        try:
            Bundle.open(path)
            accepted.append(file.name)
        except (TamperedError, BundleError):
            pass
        file.write_bytes(before)
    Bundle.open(path)
    return accepted


def refusal(path: Path, error: type[EdgeError] = TamperedError) -> str:
    """The one line with which a bundle is refused."""
    with pytest.raises(error) as caught:
        Bundle.open(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_an_untouched_bundle_opens(fake_bundle: Path, fake_parts: Parts) -> None:
    bundle = Bundle.open(fake_bundle)
    assert bundle.manifest.spec == fake_parts.spec
    for name, content in fake_parts.files.items():
        assert bundle.read(name) == content
    (artefact,) = bundle.manifest.artefacts
    assert artefact == fake_parts.artefacts[0] and artefact.trusted and artefact.name == "fake-fp32"
    assert list(bundle.artefact_files(artefact)) == ["model.onnx"]
    assert len(bundle.manifest.bundle_id) == 16
    assert bundle.manifest.manifest_sha256.startswith(bundle.manifest.bundle_id)


def test_golden_files_are_read(fake_bundle: Path) -> None:
    bundle = Bundle.open(fake_bundle)
    frames = bundle.golden_frames()
    assert [frame.seq for frame in frames] == list(GOLDEN_SEEDS)
    assert frames[0].spacing_mm is not None and frames[0].pixels.dtype == np.uint8
    assert len(bundle.golden_reference()["logits"]) == len(frames)
    assert bundle.golden_outputs(bundle.manifest.artefacts[0])["logits"].dtype == np.float16


def test_a_file_outside_the_bundle_cannot_be_asked_for(fake_bundle: Path) -> None:
    bundle = Bundle.open(fake_bundle)
    for name in ("../x", "nothing", MANIFEST_NAME, "/etc/passwd"):
        with pytest.raises(InputError):
            bundle.read(name)


def test_every_flipped_byte_is_refused(fresh_bundle: Path) -> None:
    assert accepted_flips(fresh_bundle, FLIPS) == []


def test_the_flips_would_be_noticed(fresh_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: without the comparison of hashes the same flips pass."""
    monkeypatch.setattr(bundle_module, "_check_content", lambda path, raw, entry: None)
    accepted = accepted_flips(fresh_bundle, 40)
    assert len(accepted) >= 25
    assert MANIFEST_NAME not in accepted, "the manifest has a guard of its own"


def test_every_byte_of_the_manifest_counts(fake_bundle: Path) -> None:
    raw = (fake_bundle / MANIFEST_NAME).read_bytes()
    read_manifest(raw)
    rng = random.Random(3)
    for place in rng.sample(range(len(raw)), 300):
        changed = bytearray(raw)
        changed[place] = rng.choice([b for b in (9, 10, 32, 48, 0x7F, changed[place] ^ 0x20) if b != changed[place]])
        with pytest.raises(BundleError):
            read_manifest(bytes(changed))


def test_a_manifest_rewritten_by_hand_is_refused(fresh_bundle: Path) -> None:
    file = fresh_bundle / MANIFEST_NAME
    data = json.loads(file.read_bytes())
    data["artefacts"][0]["state"] = "verified" if data["artefacts"][0]["state"] != "verified" else "unverified"
    file.write_text(json.dumps(data, sort_keys=True, indent=1) + "\n", encoding="ascii")
    assert "own hash" in refusal(fresh_bundle)


def test_truncated_grown_and_emptied_files_are_refused(fresh_bundle: Path) -> None:
    for file in files_of(fresh_bundle):
        before = file.read_bytes()
        for changed in (before[:-1], before[: len(before) // 2], b"", before + b"\0"):
            file.write_bytes(changed)
            refusal(fresh_bundle, BundleError)
        file.write_bytes(before)
    Bundle.open(fresh_bundle)


def test_missing_files_are_refused(fresh_bundle: Path) -> None:
    for file in files_of(fresh_bundle):
        before = file.read_bytes()
        file.unlink()
        assert file.name in refusal(fresh_bundle, BundleError)
        file.write_bytes(before)


@pytest.mark.parametrize("name", ["extra.txt", ".hidden", "golden/extra.npz", "artefacts/fake-fp32/model.bin", "a\nb"])
def test_extra_files_are_refused(fresh_bundle: Path, name: str) -> None:
    (fresh_bundle / name).write_bytes(b"x")
    assert "does not list" in refusal(fresh_bundle)


def test_a_file_name_that_is_not_text_is_refused(fresh_bundle: Path) -> None:
    Path(os.fsdecode(os.fsencode(fresh_bundle) + b"/\xff\xfe")).write_bytes(b"x")
    refusal(fresh_bundle)


@pytest.mark.parametrize("name", ["empty", "golden/inner", "artefacts/other-fp32"])
def test_extra_folders_are_refused(fresh_bundle: Path, name: str) -> None:
    (fresh_bundle / name).mkdir(parents=True)
    assert "folder" in refusal(fresh_bundle)


def test_links_are_refused(fresh_bundle: Path, tmp_path: Path) -> None:
    file = fresh_bundle / "artefacts/fake-fp32/model.onnx"
    real = tmp_path / "elsewhere.onnx"
    file.rename(real)
    file.symlink_to(real)
    assert "link" in refusal(fresh_bundle)
    file.unlink()
    os.link(real, file)
    assert "hard link" in refusal(fresh_bundle)
    file.unlink()
    shutil.copy(real, file)
    Bundle.open(fresh_bundle)


def test_a_linked_folder_and_a_linked_bundle_are_refused(fresh_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "link.bundle").symlink_to(fresh_bundle)
    assert "link" in refusal(tmp_path / "link.bundle")
    (fresh_bundle / "golden").rename(tmp_path / "golden")
    (fresh_bundle / "golden").symlink_to(tmp_path / "golden")
    assert "link" in refusal(fresh_bundle)


def test_special_files_are_refused_at_once(fresh_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = fresh_bundle / "reports/parity.json"
    file.unlink()
    os.mkfifo(file)
    assert "special" in refusal(fresh_bundle)
    file.unlink()
    monkeypatch.chdir(file.parent)  # a socket's path must be short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(file.name)
        assert "special" in refusal(fresh_bundle)


def test_what_is_exchanged_after_the_walk_is_refused(fresh_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A link or a pipe put in a file's place between listing and reading is neither followed nor waited for."""
    real_walk, file = bundle_module._walk, fresh_bundle / "reports/parity.json"
    content = file.read_bytes()

    def walk_then(change: Callable[[], None]) -> Callable[..., Any]:
        def walk(folder: int, prefix: str, depth: int) -> Any:
            found = real_walk(folder, prefix, depth)
            if depth == 0:
                file.unlink()
                change()
            return found

        return walk

    (fresh_bundle.parent / "same").write_bytes(content)
    changes: list[Callable[[], None]] = [
        lambda: file.symlink_to(fresh_bundle.parent / "same"),
        lambda: os.mkfifo(file),
        lambda: None,
        lambda: os.link(fresh_bundle.parent / "same", file),
    ]
    for change in changes:
        monkeypatch.setattr(bundle_module, "_walk", walk_then(change))
        refusal(fresh_bundle, BundleError)
        file.unlink(missing_ok=True)
        file.write_bytes(content)
    monkeypatch.undo()
    Bundle.open(fresh_bundle)


def test_the_bytes_handed_out_are_the_bytes_that_were_hashed(fresh_bundle: Path) -> None:
    bundle = Bundle.open(fresh_bundle)
    file = fresh_bundle / "artefacts/fake-fp32/model.onnx"
    before = file.read_bytes()
    file.write_bytes(b"other bytes")
    assert bundle.read("artefacts/fake-fp32/model.onnx") == before


def test_no_bundle_there(tmp_path: Path) -> None:
    assert "no bundle at" in refusal(tmp_path / "nothing", InputError)
    (tmp_path / "file").write_bytes(b"x")
    assert "not a folder" in refusal(tmp_path / "file", BundleError)
    (tmp_path / "empty").mkdir()
    assert "manifest.json" in refusal(tmp_path / "empty", BundleError)
    refusal(tmp_path / "with\0zero", BundleError)


@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() == 0, reason="root may read everything")
def test_unreadable_bundle_is_one_clear_line(fresh_bundle: Path) -> None:
    for path in (fresh_bundle / "golden", fresh_bundle / "reports/parity.json", fresh_bundle):
        path.chmod(0)
        refusal(fresh_bundle, BundleError)
        path.chmod(0o755)


def rewritten(bundle: Path, change: Callable[[dict[str, Any]], None]) -> bytes:
    """A manifest changed and sealed anew, as a careless or hostile writer could make it."""
    from tinyusfm_runtime import manifest as module

    data = json.loads((bundle / MANIFEST_NAME).read_bytes())
    change(data)
    data["manifest_sha256"] = module._self_hash(data)
    return module._pretty(data)


@pytest.mark.parametrize("version", [0, SCHEMA_VERSION + 1, 99, "1", True, None, 1.0])
def test_another_schema_version_says_who_reads_it(fresh_bundle: Path, version: Any) -> None:
    raw = rewritten(fresh_bundle, lambda data: data.update(schema=version))
    (fresh_bundle / MANIFEST_NAME).write_bytes(raw)
    message = refusal(fresh_bundle, BundleError)
    assert "schema version" in message
    if version == SCHEMA_VERSION + 1:
        assert f"reads version {SCHEMA_VERSION}" in message and "upgrade" in message


def test_a_future_manifest_with_other_keys_still_names_its_version(fresh_bundle: Path) -> None:
    raw = rewritten(fresh_bundle, lambda data: (data.clear(), data.update(schema=2, everything="else")))
    (fresh_bundle / MANIFEST_NAME).write_bytes(raw)
    assert "schema version 2" in refusal(fresh_bundle, BundleError)


BAD_MANIFESTS: list[Callable[[dict[str, Any]], Any]] = [
    lambda data: data.update(surprise=1),
    lambda data: data.pop("tools"),
    lambda data: data.update(tools=[]),
    lambda data: data.update(artefacts=[]),
    lambda data: data.update(artefacts={}),
    lambda data: data["artefacts"].append(data["artefacts"][0]),
    lambda data: data["artefacts"][0].update(surprise=1),
    lambda data: data["artefacts"][0].pop("golden"),
    lambda data: data["artefacts"][0].update(golden="golden/other.npz"),
    lambda data: data["artefacts"][0].update(state="trusted"),
    lambda data: data["artefacts"][0].update(gated=1),
    lambda data: data["artefacts"][0].update(rest_precision="f64"),
    lambda data: data["artefacts"][0].update(files={}),
    lambda data: data["artefacts"][0].update(tolerance={"logit_abs": -1}),
    lambda data: data["artefacts"][0].update(tolerance={"logit_abs": "1"}),
    lambda data: data["artefacts"][0].update(target="../x"),
    lambda data: data["artefacts"][0]["files"]["artefacts/fake-fp32/model.onnx"].update(size_bytes=1),
    lambda data: data["files"]["artefacts/fake-fp32/model.onnx"].update(size_bytes=-1),
    lambda data: data["files"]["artefacts/fake-fp32/model.onnx"].update(size_bytes=True),
    lambda data: data["files"]["artefacts/fake-fp32/model.onnx"].update(sha256="A" * 64),
    lambda data: data["files"].update({MANIFEST_NAME: data["files"]["golden/frames.npz"]}),
    lambda data: data["files"].pop("golden/reference.npz"),
    lambda data: data["spec"].update(task="sing"),
    lambda data: data["spec"].update(surprise=1),
    lambda data: data["spec"]["preprocess"].update(height=1),
]


@pytest.mark.parametrize("change", BAD_MANIFESTS)
def test_a_manifest_that_makes_no_sense_is_refused(fresh_bundle: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    (fresh_bundle / MANIFEST_NAME).write_bytes(rewritten(fresh_bundle, change))
    refusal(fresh_bundle, BundleError)


@pytest.mark.parametrize(
    "path",
    ["../x", "/etc/passwd", "a/../b", "a//b", "./a", "a/", "", "a\\b", "a\0b", "C:/x", ".hidden", "a/.git", "a b", "é",
     "MANIFEST.JSON", "a/" + "b" * 200],
)  # fmt: skip
def test_paths_stay_inside(path: str, fresh_bundle: Path) -> None:
    entry = file_entry(b"x")
    with pytest.raises(BundleError):
        check_paths({path: entry})
    raw = rewritten(fresh_bundle, lambda data: data["files"].update({path: {"sha256": "0" * 64, "size_bytes": 1}}))
    (fresh_bundle / MANIFEST_NAME).write_bytes(raw)
    refusal(fresh_bundle, BundleError)


def test_paths_that_differ_in_capitals_only_are_refused() -> None:
    with pytest.raises(BundleError, match="capitals"):
        check_paths({"a/Model": file_entry(b"x"), "a/model": file_entry(b"x")})


def test_too_many_and_too_large_files_are_refused() -> None:
    with pytest.raises(BundleError, match="files"):
        check_paths({f"f{i}": file_entry(b"") for i in range(5000)})
    half = replace(file_entry(b""), size_bytes=600 << 20)
    with pytest.raises(BundleError, match="larger"):
        check_paths({"a": half, "b": half})


def test_a_huge_manifest_is_not_parsed(fresh_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle_module, "MAX_MANIFEST_BYTES", 100)
    assert "bytes" in refusal(fresh_bundle, BundleError)


@pytest.mark.parametrize(
    "raw",
    [b"", b"{}", b"[]", b"null", b"1", b"\xff", b"[" * 100_000, b'{"a":' * 50_000, b'{"schema":1,"schema":1}',
     b'{"schema": NaN}', b'{"schema":1e999}', b"{" + b'"a":1,' * 10 + b'"schema":1}'],
)  # fmt: skip
def test_what_is_no_manifest_is_refused(raw: bytes) -> None:
    with pytest.raises(BundleError) as caught:
        read_manifest(raw)
    assert "\n" not in str(caught.value)


def test_manifest_writes_and_reads_itself(fake_bundle: Path) -> None:
    raw = (fake_bundle / MANIFEST_NAME).read_bytes()
    manifest = read_manifest(raw)
    assert isinstance(manifest, Manifest) and manifest_bytes(manifest) == raw
    assert Manifest.from_json(json.loads(raw)) == manifest
    assert Artefact.from_json(manifest.artefacts[0].to_json()) == manifest.artefacts[0]
    with pytest.raises(FrozenInstanceError):
        manifest.schema = 2  # type: ignore[misc]


def test_an_artefact_without_its_gate_is_not_trusted(fake_parts: Parts) -> None:
    artefact = fake_parts.artefacts[0]
    assert artefact.trusted
    assert not replace(artefact, gated=False).trusted
    assert not replace(artefact, state=ArtefactState.UNVERIFIED).trusted


@pytest.mark.parametrize("moment", ["_walk", "_read_file"])
def test_a_bundle_that_is_replaced_while_it_is_read_is_read_anew(
    fake_parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    path = fake_parts.publish(tmp_path / "b.bundle")
    real, calls = getattr(bundle_module, moment), []

    def replacing(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            # before anything is listed, or listed and not yet read: the publisher takes the old files away
            fake_parts.publish(path, created_utc="2027-01-01T00:00:00Z")
        return real(*arguments)

    monkeypatch.setattr(bundle_module, moment, replacing)
    assert Bundle.open(path).manifest.created_utc.startswith("2027")


def test_a_bundle_that_is_replaced_again_and_again_ends_in_one_line(
    fake_parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = fake_parts.publish(tmp_path / "b.bundle")
    real = bundle_module._read_file

    def replacing(*arguments: Any) -> Any:
        monkeypatch.setattr(bundle_module, "_read_file", real)
        fake_parts.publish(path)
        monkeypatch.setattr(bundle_module, "_read_file", replacing)
        return real(*arguments)

    monkeypatch.setattr(bundle_module, "_read_file", replacing)
    assert "vanished" in refusal(path)


def test_golden_files_that_make_no_sense_are_refused(fake_parts: Parts, tmp_path: Path) -> None:
    good = unpack_arrays(fake_parts.files[GOLDEN_FRAMES], "golden")
    bad = [
        {},
        {**good, "spacing_mm": good["spacing_mm"][:-1]},
        {**good, "pixels": good["pixels"].astype(np.float32)},
        {**good, "pixels": good["pixels"][0]},
        {name: array[:0] for name, array in good.items()},
        {**good, "spacing_mm": np.full_like(good["spacing_mm"], np.nan)},
    ]
    for i, arrays in enumerate(bad):
        files = {**fake_parts.files, GOLDEN_FRAMES: pack_arrays(arrays)}
        bundle = Bundle.open(fake_parts.publish(tmp_path / f"{i}.bundle", files=files))
        with pytest.raises(BundleError):
            bundle.golden_frames()
