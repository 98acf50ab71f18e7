"""Gate outcomes kept for a device: found under exactly their key, replaced whole, and nothing changed is believed."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path

import pytest

from tinyusfm_runtime.device.gate_record import GateKey, files_sha256, keep_record, read_record
from tinyusfm_runtime.errors import OutputError

KEY = GateKey(
    content_sha256=files_sha256({"a": b"1", "b": b"2"}),
    device="Apple M2 (Mac14,2)",
    system="macOS 15.1",
    library="coremltools",
    library_version="9.0",
    settings="units all",
)
PASSED = {"passed": True, "bundle_id": "0" * 16, "report": {"engine": "Core ML"}}


def test_it_is_found_under_exactly_its_key(tmp_path: Path) -> None:
    root = tmp_path / "cache"
    assert read_record(KEY, root) is None
    path = keep_record(KEY, PASSED, root)
    assert read_record(KEY, root) == PASSED and path.stat().st_mode & 0o077 == 0
    for field in fields(KEY):
        assert read_record(replace(KEY, **{field.name: "x" * 64}), root) is None, field.name
    failed = {**PASSED, "passed": False}
    assert keep_record(KEY, failed, root) == path and read_record(KEY, root) == failed


def test_content_is_names_and_bytes() -> None:
    assert files_sha256({"b": b"2", "a": b"1"}) == KEY.content_sha256
    assert files_sha256({"a": b"1", "c": b"2"}) != KEY.content_sha256 != files_sha256({"a": b"1", "b": b"3"})


@pytest.mark.parametrize("spoil", ["changed", "cut", "version", "link", "open"])
def test_what_was_changed_counts_as_none(tmp_path: Path, spoil: str) -> None:
    root = tmp_path / "cache"
    path = keep_record(KEY, {**PASSED, "passed": False}, root)
    text = path.read_text(encoding="ascii")
    if spoil == "changed":
        path.write_text(text.replace("false", "true"), encoding="ascii")
    elif spoil == "cut":
        path.write_text(text[:40], encoding="ascii")
    elif spoil == "version":
        path.write_text(json.dumps({**json.loads(text), "version": 2}), encoding="ascii")
    elif spoil == "link":
        path.rename(tmp_path / "elsewhere.json")
        path.symlink_to(tmp_path / "elsewhere.json")
    else:
        path.chmod(0o666)
    assert read_record(KEY, root) is None


def test_no_room_is_an_error_of_ours(tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir(mode=0o700)
    (tmp_path / "cache" / "gates").write_text("in the way", encoding="ascii")
    with pytest.raises((OutputError, OSError)) as caught:
        keep_record(KEY, PASSED, tmp_path / "cache")
    assert isinstance(caught.value, OutputError)
