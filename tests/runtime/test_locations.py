"""Locations: a path is a path whatever it looks like, and what nothing reads is named with a way out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.needs import needs
from tinyusfm_runtime.errors import InputError
from tinyusfm_runtime.overlay import encode_png
from tinyusfm_runtime.sources import open_source, path_of
from tinyusfm_runtime.sources._location import CONVERT

needs("PIL", reason="install tinyusfm-edge[images]")
PNG = encode_png(np.full((16, 24), 77, np.uint8))


@pytest.mark.parametrize(
    "name", ["10:30:00.png", "camera:0.png", "igtl:x.png", "folder:a.png", "phantom:1", "http:a.png"]
)
def test_a_file_that_exists_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_bytes(PNG)
    with open_source(name) as source:
        assert [int(frame.pixels[0, 0]) for frame in source] == [77]
    assert path_of(name).resolve() == tmp_path / name


@pytest.mark.parametrize("name", ["a b.png", "a%20b.png", "a#b?c.png", "\u00e4.png"])
def test_file_urls(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(PNG)
    with open_source((tmp_path / name).as_uri()) as source:
        assert len(list(source)) == 1
    assert path_of((tmp_path / name).as_uri()) == tmp_path / name


def test_the_path_behind_a_scheme(tmp_path: Path) -> None:
    assert path_of(f"dicom:{tmp_path}/a.dcm") == tmp_path / "a.dcm"
    assert path_of("10:30:00.mp4") == Path("10:30:00.mp4")


@pytest.mark.parametrize("address", ["http://x/a.mp4", "https://x/a.png", "rtsp://camera/1", "udp://1.2.3.4:5"])
def test_network_addresses_are_named(address: str) -> None:
    with pytest.raises(InputError, match=r"addresses are not read.*ffmpeg"):
        open_source(address)


@pytest.mark.parametrize("suffix", sorted(suffix for suffixes in CONVERT for suffix in suffixes))
def test_containers_that_are_not_read_are_named_with_a_way_out(tmp_path: Path, suffix: str) -> None:
    for there in (False, True):
        if there:
            (tmp_path / f"clip{suffix}").write_bytes(b"content of no known kind")
        with pytest.raises(InputError) as caught:
            open_source(str(tmp_path / f"clip{suffix}"))
        assert f"{suffix} files are not read (" in str(caught.value) and "clip" not in str(caught.value)


def test_a_missing_file_is_said_to_be_missing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file or folder"):
        open_source(str(tmp_path / "gone"))
    with pytest.raises(InputError, match="no source reads"):
        open_source("nonsense\0")
