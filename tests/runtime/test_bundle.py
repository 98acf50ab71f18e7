"""A bundle is trusted byte by byte: whatever was changed, added, removed or linked is refused."""

from __future__ import annotations

import json
import os
import random
import shutil
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import GOLDEN_SEEDS, Parts
from tinyusfm_runtime.bundle.arrays import pack_arrays, unpack_arrays
from tinyusfm_runtime.bundle.manifest import (
    Artefact,
    ArtefactState,
    Manifest,
    check_paths,
    file_entry,
    manifest_bytes,
    read_manifest,
)
from tinyusfm_runtime.bundle.reader import GOLDEN_FRAMES, MANIFEST_NAME, MAX_MANIFEST_BYTES, SCHEMA_VERSION, Bundle
from tinyusfm_runtime.errors import BundleError, EdgeError, InputError, TamperedError

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


def reseal(path: Path) -> None:
    """Rewrites the manifest's hashes to fit the files, as whoever may write there could."""
    manifest = read_manifest((path / MANIFEST_NAME).read_bytes())

    def fitting(files: Mapping[str, Any]) -> dict[str, Any]:
        return {name: file_entry((path / name).read_bytes()) for name in files}

    artefacts = tuple(replace(artefact, files=fitting(artefact.files)) for artefact in manifest.artefacts)
    changed = replace(manifest, files=fitting(manifest.files), artefacts=artefacts)
    (path / MANIFEST_NAME).write_bytes(manifest_bytes(changed))


def test_only_the_hashes_notice_the_flips(fresh_bundle: Path) -> None:
    """The control: with hashes that fit, the same flips of all files but the manifest pass."""
    sealed = (fresh_bundle / MANIFEST_NAME).read_bytes()
    rng, files = random.Random(11), [file for file in files_of(fresh_bundle) if file.name != MANIFEST_NAME]
    for number in range(20):
        file = files[number % len(files)]
        before = flip(file, rng)
        with pytest.raises(TamperedError):
            Bundle.open(fresh_bundle)
        reseal(fresh_bundle)
        assert Bundle.open(fresh_bundle).read(file.relative_to(fresh_bundle).as_posix()) != before
        file.write_bytes(before)
        (fresh_bundle / MANIFEST_NAME).write_bytes(sealed)


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


@pytest.mark.parametrize(
    "name", ["extra.txt", ".hidden", "golden/extra.safetensors", "artefacts/fake-fp32/model.bin", "a\nb"]
)
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


def test_a_link_to_a_bundle_is_resolved_and_what_it_means_is_trusted_byte_by_byte(
    fresh_bundle: Path, tmp_path: Path
) -> None:
    link = tmp_path / "current"
    link.symlink_to(fresh_bundle)
    assert Bundle.open(link).path == fresh_bundle.resolve()
    (fresh_bundle / ".hidden").write_bytes(b"x")
    assert "does not list" in refusal(link)
    link.unlink()
    link.symlink_to(tmp_path / "nowhere")
    assert "leads nowhere" in refusal(link, InputError)
    link.unlink()
    link.symlink_to(link)
    assert "leads nowhere" in refusal(link, InputError)


@contextmanager
def at_first_listing(action: Callable[[], object]) -> Iterator[None]:
    """Does something just before the first folder is listed."""
    real, calls = os.scandir, list[int]()

    def listing(folder: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            action()
        return real(folder)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "scandir", listing)
        yield


def test_a_link_that_is_moved_while_the_bundle_is_read_is_followed_again(fresh_bundle: Path, tmp_path: Path) -> None:
    newer, link = tmp_path / "newer.bundle", tmp_path / "current"
    shutil.copytree(fresh_bundle, newer)
    (fresh_bundle / ".hidden").write_bytes(b"x")
    link.symlink_to(fresh_bundle)

    def moved() -> None:
        link.unlink()
        link.symlink_to(newer)

    with at_first_listing(moved):
        assert Bundle.open(link).path == newer.resolve()


@pytest.mark.parametrize("name", [".DS_Store", "golden/Thumbs.db", "reports/desktop.ini", "artefacts/._model.onnx"])
def test_what_a_file_browser_left_is_named_with_how_to_mend_it(fresh_bundle: Path, name: str) -> None:
    (fresh_bundle / name).write_bytes(b"x")
    assert f"{name}, left by a file browser: delete it" in refusal(fresh_bundle)
    (fresh_bundle / name).unlink()
    Bundle.open(fresh_bundle)


def test_a_folder_without_a_manifest_is_not_walked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a/b/c/d/e/f/g/h/i/j/k").mkdir(parents=True)
    assert "no manifest.json, so it is no bundle" in refusal(tmp_path, BundleError)


def test_a_linked_folder_inside_a_bundle_is_refused(fresh_bundle: Path, tmp_path: Path) -> None:
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


@contextmanager
def at_open(name: str, action: Callable[[], object], times: int = 1) -> Iterator[None]:
    """Does something just before files of this name are opened; a bundle's manifest is what is opened first."""
    real, left, busy = os.open, [times], list[int]()

    def opening(path: Any, *arguments: Any, **options: Any) -> int:
        if path == name and left[0] and not busy:
            left[0] -= 1
            busy.append(1)
            action()
            busy.clear()
        return real(path, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "open", opening)
        yield


def test_what_is_exchanged_after_the_walk_is_refused(fresh_bundle: Path) -> None:
    """A link or a pipe put in a file's place between listing and reading is neither followed nor waited for."""
    file = fresh_bundle / "reports/parity.json"
    content = file.read_bytes()

    (fresh_bundle.parent / "same").write_bytes(content)
    changes: list[Callable[[], None]] = [
        lambda: file.symlink_to(fresh_bundle.parent / "same"),
        lambda: os.mkfifo(file),
        lambda: None,
        lambda: os.link(fresh_bundle.parent / "same", file),
    ]
    for change in changes:
        with at_open(MANIFEST_NAME, lambda change=change: (file.unlink(), change())):  # type: ignore[misc]
            refusal(fresh_bundle, BundleError)
        file.unlink(missing_ok=True)
        file.write_bytes(content)
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
    """A manifest changed and sealed again, as a careless or hostile writer could make it."""
    from tinyusfm_runtime.bundle import manifest as module

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
    raw = rewritten(
        fresh_bundle, lambda data: (data.clear(), data.update(schema=SCHEMA_VERSION + 1, everything="else"))
    )
    (fresh_bundle / MANIFEST_NAME).write_bytes(raw)
    assert f"schema version {SCHEMA_VERSION + 1}" in refusal(fresh_bundle, BundleError)


def test_an_older_manifest_is_refused_with_the_line_that_exports_it_again(fresh_bundle: Path) -> None:
    raw = rewritten(fresh_bundle, lambda data: (data.pop("drift"), data.update(schema=SCHEMA_VERSION - 1)))
    (fresh_bundle / MANIFEST_NAME).write_bytes(raw)
    message = refusal(fresh_bundle, BundleError)
    assert f"schema version {SCHEMA_VERSION - 1}" in message
    assert message.endswith("export the bundle again: tinyusfm-edge export tiny --target fake --fp32")
    hostile = {"schema": 1, "spec": {"name": "x; rm -rf"}, "artefacts": [{"target": "a b", "precision": 3}, 7]}
    (fresh_bundle / MANIFEST_NAME).write_bytes((json.dumps(hostile, sort_keys=True, indent=1) + "\n").encode())
    assert refusal(fresh_bundle, BundleError).endswith("tinyusfm-edge export WEIGHTS --target openvino")


EDITS = {
    "a spec without every key": lambda data: data["spec"].pop("second_pass"),
    "a statistic that is not there": lambda data: data.update(drift="drift/statistic.safetensors"),
    "a device class with a blank": lambda data: data.update(device_class="a b"),
    "a security version below 0": lambda data: data.update(security_version=-1),
    "a security version that is true": lambda data: data.update(security_version=True),
    "a trace without a hash": lambda data: data.update(trace={"images": "all of them"}),
    "an unknown second pass": lambda data: data["spec"].update(second_pass="sometimes"),
    "an area of all": lambda data: data["spec"].update(min_area=1.0),
    "thresholds without rates": lambda data: data["spec"].update(reading={"thresholds": []}),
    "an anatomy upside down": lambda data: data["spec"].update(
        anatomy={"name": "head", "size_mm": [9, 1], "spacing_mm": [0.1, 1]}
    ),
    "a number beyond all": lambda data: data["spec"].update(
        anatomy={"name": "head", "size_mm": [1, 10**400], "spacing_mm": [0.1, 1]}
    ),
    "a probe of another kind": lambda data: data["spec"].update(
        probe={"name": "C5", "kind": "round", "apex": [0, 0.5], "radii": [0, 1], "angles_deg": [-30, 30]}
    ),
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS.keys())
def test_fields_of_the_manifest_are_checked(fresh_bundle: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    raw = rewritten(fresh_bundle, edit)
    (fresh_bundle / MANIFEST_NAME).write_bytes(raw)
    refusal(fresh_bundle, BundleError)


BAD_MANIFESTS: list[Callable[[dict[str, Any]], Any]] = [
    lambda data: data.update(surprise=1),
    lambda data: data.pop("tools"),
    lambda data: data.update(tools=[]),
    lambda data: data.update(artefacts=[]),
    lambda data: data.update(artefacts={}),
    lambda data: data["artefacts"].append(data["artefacts"][0]),
    lambda data: data["artefacts"][0].update(surprise=1),
    lambda data: data["artefacts"][0].pop("golden"),
    lambda data: data["artefacts"][0].update(golden="golden/other.safetensors"),
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
    lambda data: data["files"].update({MANIFEST_NAME: data["files"]["golden/frames.safetensors"]}),
    lambda data: data["files"].pop("golden/reference.safetensors"),
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


def test_a_huge_manifest_is_not_parsed(fresh_bundle: Path) -> None:
    with (fresh_bundle / MANIFEST_NAME).open("r+b") as file:
        file.truncate(MAX_MANIFEST_BYTES + 1)
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


@pytest.mark.parametrize("moment", ["listed", "read"])
def test_a_bundle_that_is_replaced_while_it_is_read_is_read_anew(
    fake_parts: Parts, tmp_path: Path, moment: str
) -> None:
    path = fake_parts.publish(tmp_path / "b.bundle")

    def replaced() -> None:
        # before anything is listed, or listed and not yet read: the publisher takes the old files away
        fake_parts.publish(path, created_utc="2027-01-01T00:00:00Z")

    with at_open(MANIFEST_NAME, replaced) if moment == "read" else at_first_listing(replaced):
        assert Bundle.open(path).manifest.created_utc.startswith("2027")


def test_a_bundle_that_is_replaced_again_and_again_ends_in_one_line(fake_parts: Parts, tmp_path: Path) -> None:
    path = fake_parts.publish(tmp_path / "b.bundle")
    with at_open(MANIFEST_NAME, lambda: fake_parts.publish(path), times=1000):
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
