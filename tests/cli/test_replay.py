"""``replay``: a receiver gets the clip from a real process, and every wrong option is one line."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tinyusfm_edge.cli.main import main
from tinyusfm_runtime.phantom import make_phantom
from tinyusfm_runtime.sources import open_source
from tinyusfm_runtime.transport.shm_writer import FOLDER

ROOT = Path(__file__).parents[2]


def start(*words: str) -> tuple[subprocess.Popen[str], str]:
    """The command and the address it printed."""
    roots = [str(ROOT / folder) for folder in (".", "export", "runtime", "calibration")]
    process = subprocess.Popen(
        [sys.executable, "-m", "tinyusfm_edge", "replay", "phantom:0-2", *words],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(roots)},
    )  # fmt: skip
    assert process.stdout is not None
    label, address = process.stdout.readline().split()
    assert label == "address"
    return process, address


def receive(address: str, count: int) -> tuple[list[Any], dict[str, int]]:
    frames = []
    source: Any
    with open_source(address) as source:
        guard = threading.Timer(60, source.close)
        guard.start()
        for frame in source:
            frames.append(frame)
            if len(frames) == count:
                break
        guard.cancel()
        guard.join()
        return frames, dict(source.counters)


@pytest.mark.parametrize("header", ["1", "2"])
def test_as_igtl(header: str) -> None:
    process, address = start("--listen", ":0", "--header", header, "--fps", "40", "--limit", "60", "--loop")
    frames, _ = receive(address, 12)
    out, _ = process.communicate(timeout=900)
    phantoms = [make_phantom(seed).frame for seed in range(3)]
    for frame in frames:
        assert any(np.array_equal(frame.pixels, phantom.pixels) for phantom in phantoms)
        assert frame.spacing_mm == pytest.approx(phantoms[0].spacing_mm, rel=0.5)
    assert process.returncode == 0 and "60 frames" in out and "receivers     1" in out
    assert "next          tinyusfm-edge run BUNDLE phantom:0-2" in out


@pytest.mark.skipif(not FOLDER.is_dir(), reason="no /dev/shm here")
def test_as_shm_with_faults_until_it_is_told_to_stop() -> None:
    name = f"tinyusfm-cli-{os.getpid()}"
    process, address = start("--as", "shm", "--name", name, "--fps", "60", "--loop", "--faults", "drop,reorder,corrupt")
    frames, counters = receive(address, 80)
    process.terminate()
    out, errors = process.communicate(timeout=900)
    assert process.returncode == 0, errors
    assert "corrupt" in out and "drop" in out and "reorder" in out
    assert counters["pixels"] >= 1, "corruption is seen by the receiver"
    assert any(b.seq < a.seq for a, b in zip(frames, frames[1:], strict=False)), "reordering arrives"
    assert not (FOLDER / name).exists()


@pytest.mark.parametrize(
    ("words", "message", "code"),
    [
        (["phantom:0", "--as", "carrier-pigeon"], "choose igtl, shm, camera", 2),
        (["phantom:0", "--faults", "explode"], "no fault named 'explode'", 2),
        (["phantom:0", "--as", "camera", "--faults", "corrupt"], "no checksum", 2),
        (["phantom:0", "--listen", "nowhere"], "HOST:PORT", 2),
        (["phantom:0", "--as", "shm", "--name", "../x"], "a ring needs a name", 2),
        (["no-such-thing.xyz"], "no-such-thing.xyz does not exist", 2),
        (["igtl://127.0.0.1:1"], "replay takes a clip", 2),
        (["phantom:0", "--as", "camera", "--device", "/dev/null"], "no Video4Linux output device", 3),
    ],
)
def test_what_cannot_be_replayed_is_one_line(
    words: list[str], message: str, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["replay", *words]) == code
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.strip().count("\n") == 0
