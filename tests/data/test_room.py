"""A mapped file has its room before anything is written into it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tinyusfm_edge.data.room import take_room
from tinyusfm_runtime.errors import OutputError

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="posix_fallocate is looked at on Linux")


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A memory disk of one megabyte; only root may mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)]
    if subprocess.run(words, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a memory disk takes root")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_sparse_file_keeps_its_content_and_is_sparse_no_more(tmp_path: Path) -> None:
    path = tmp_path / "a.f32"
    array = np.memmap(path, np.float32, "w+", shape=(1 << 16,))
    array[7] = 3.0
    take_room(path)
    assert path.stat().st_blocks * 512 >= path.stat().st_size == 1 << 18
    assert array[7] == 3.0 and array.sum() == 3.0
    (tmp_path / "empty").touch()
    take_room(tmp_path / "empty")


def test_without_room_it_is_an_error_and_no_file_stays(full_disk: Path) -> None:
    path = full_disk / "a.f32"
    np.memmap(path, np.float32, "w+", shape=(1 << 20,))
    with pytest.raises(OutputError, match=r"cannot write a.f32: no room for 4 MB, free some and go on"):
        take_room(path)
    assert not list(full_disk.iterdir())
