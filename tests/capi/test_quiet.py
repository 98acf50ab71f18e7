"""The C runtime calls nobody: every call to another machine is heard, inside the libraries too."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.capi.conftest import run

LISTENER = Path(__file__).with_name("hear.c")


class Room:
    """A home folder that is empty at first, and an ear on every call to another machine.

    Args:
        folder: of both.
    """

    def __init__(self, folder: Path) -> None:
        self.home, self._heard, self._ear = folder / "home", folder / "heard.txt", folder / "hear.so"
        self.home.mkdir()
        run("cc", "-std=c11", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", LISTENER, "-o", self._ear, "-ldl")

    def run(self, *command: object, **variables: str) -> str:
        """Runs a program that knows nothing of this environment: some telemetry is silent where tests are run."""
        environment = {
            "HOME": str(self.home), "PATH": os.environ["PATH"], "LD_PRELOAD": str(self._ear), "HEARD": str(self._heard),
            **variables,
        }  # fmt: skip
        words = [str(word) for word in command]
        done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False, timeout=900)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def heard(self) -> list[str]:
        return self._heard.read_text(encoding="utf-8").splitlines() if self._heard.is_file() else []

    def left_behind(self) -> list[Path]:
        return [path for path in self.home.rglob("*") if path.is_file()]


@pytest.fixture
def room(tmp_path: Path) -> Room:
    if sys.platform != "linux" or shutil.which("cc") is None:
        pytest.skip("needs a C compiler and LD_PRELOAD of Linux")
    return Room(tmp_path)


@pytest.fixture
def opens(opened: tuple[str, Path, Path], build_folder: Path) -> list[object]:
    """The command that opens a bundle of one engine."""
    _, bundle, folder = opened
    return [build_folder / "tinyusfm-run", bundle, "--info", "--engines", folder]


def test_opening_and_golden_frames_call_nobody(opens: list[object], room: Room) -> None:
    assert "engine" in room.run(*opens)
    assert not room.heard() and not room.left_behind()


@pytest.mark.parametrize("opened", ["ort"], indirect=True)
def test_onnx_runtime_left_alone_is_noticed(opens: list[object], room: Room) -> None:
    """A value that the environment already has stays; with 0 the library prepares to report."""
    room.run(*opens, ORT_DISABLE_TELEMETRY="0")
    if not room.left_behind() and not room.heard():
        pytest.skip("this build of ONNX Runtime has no telemetry: nothing to keep quiet")


def test_a_call_is_heard(room: Room) -> None:
    quiet = "import socket\ntry: {}\nexcept OSError: pass"
    for call in (
        "socket.getaddrinfo('nobody.invalid', 443)",
        "socket.create_connection(('203.0.113.1', 9), timeout=1)",
        "socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('203.0.113.2', 9))",
    ):
        room.run(sys.executable, "-c", quiet.format(call))
    assert {"name nobody.invalid", "address 203.0.113.2"} <= set(room.heard()) and len(room.heard()) >= 3
