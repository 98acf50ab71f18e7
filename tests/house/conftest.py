"""A bundle of the shipped student, exported once by the command line while something listens for network calls."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LISTENER = """
import os, sys

def hear(event, arguments):
    if event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.connect", "socket.sendto"):
        place = str(arguments[:2] if event.startswith("socket.get") else arguments[1:2])
        if "127.0.0.1" in place or "localhost" in place or place.startswith("('/"):
            return
        with open(os.environ["HEARD"], "a") as file:
            file.write(f"{event} {place}\\n")
        raise OSError("a test keeps the network shut")

sys.addaudithook(hear)
"""
"""A sitecustomize.py: every Python process that sees it, children too, reports and refuses calls to other machines."""


NOBODY_WATCHES = (
    *("CI", "TF_BUILD", "JENKINS_URL", "GITHUB_ACTIONS", "ORT_DISABLE_TELEMETRY", "ORT_RUNNING_UNIT_TESTS"),
    *("XDG_CACHE_HOME", "PYTEST_CURRENT_TEST"),
)


@dataclass(frozen=True, kw_only=True)
class QuietRoom:
    """Runs Python where every call to another machine is heard and refused.

    Attributes:
        folder: holds the listener, an empty home and what was heard.
    """

    folder: Path

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Runs a fresh interpreter that finds the source roots."""
        roots = [str(self.folder), *(str(ROOT / name) for name in (".", "export", "runtime", "calibration"))]
        # some telemetry is silent only where these say that nobody is watching
        env = {key: value for key, value in os.environ.items() if key not in NOBODY_WATCHES}
        env |= {"PYTHONPATH": os.pathsep.join(roots), "HEARD": str(self.heard_file), "HOME": str(self.home)}
        return subprocess.run(
            [sys.executable, *arguments], capture_output=True, text=True, env=env, cwd=self.folder, timeout=900
        )

    @property
    def heard_file(self) -> Path:
        """Where calls are noted."""
        return self.folder / "heard.txt"

    @property
    def home(self) -> Path:
        """The home folder, empty at first."""
        return self.folder / "home"

    def heard(self) -> list[str]:
        """Calls to other machines so far."""
        return self.heard_file.read_text(encoding="utf-8").splitlines() if self.heard_file.is_file() else []


@pytest.fixture
def quiet_room(tmp_path: Path) -> QuietRoom:
    """A room of its own."""
    return furnish(tmp_path)


@dataclass(frozen=True, kw_only=True)
class Exported:
    """An export and what was heard of it.

    Attributes:
        bundle: the published folder.
        room: where it ran.
        output: what the command printed.
    """

    bundle: Path
    room: QuietRoom
    output: str


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """The shipped student for OpenVINO and ONNX Runtime in INT8, straight from the command line."""
    for library in ("torch", "onnx", "openvino", "onnxruntime", "pydicom"):
        pytest.importorskip(library, reason=f"{library} is not installed: pip install 'tinyusfm-edge[demo]'")
    room = furnish(tmp_path_factory.mktemp("room"))
    bundle = room.folder / "fetal-head.bundle"
    done = room.run(
        "-m", "tinyusfm_edge", "export", "--target", "openvino,onnx", "--int8", "--no-compare", "--out", str(bundle)
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return Exported(bundle=bundle, room=room, output=done.stdout + done.stderr)


def furnish(folder: Path) -> QuietRoom:
    """Puts the listener and an empty home into a folder."""
    room = QuietRoom(folder=folder)
    room.home.mkdir()
    (folder / "sitecustomize.py").write_text(LISTENER, encoding="utf-8")
    return room
