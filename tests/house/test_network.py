"""Nothing phones home: an export, a run and a profile are listened to, child processes included."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from conftest import Exported, QuietRoom


@pytest.mark.slow
def test_export_calls_nobody_and_leaves_the_home_alone(exported: Exported) -> None:
    assert not exported.room.heard()
    assert not [path for path in exported.room.home.rglob("*") if {"intel", "Microsoft"} & set(path.parts)]


@pytest.mark.slow
@pytest.mark.parametrize("target", ["openvino", "onnx"])
def test_run_and_profile_call_nobody(exported: Exported, target: str, tmp_path: Path) -> None:
    room, bundle = exported.room, str(exported.bundle)
    ran = room.run(
        "-m", "tinyusfm_edge", "run", bundle, "phantom:0-2", "--target", target, "--jsonl", str(tmp_path / "r.jsonl")
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-2000:]
    timed = room.run("-m", "tinyusfm_edge", "profile", bundle, "--target", target, "--rounds", "1")
    assert timed.returncode == 0, timed.stderr[-2000:]
    assert not room.heard()
    assert not list(room.home.rglob("*Microsoft*"))


def test_onnx_runtime_is_quiet_inside_too(quiet_room: QuietRoom) -> None:
    # its client is native code, which no audit hook hears; the id that it leaves in the home folder betrays it
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    quiet = "from tinyusfm_runtime.engines.ort import import_onnxruntime as get; get().get_available_providers()"
    assert quiet_room.run("-c", quiet).returncode == 0
    assert not list(quiet_room.home.rglob("*Microsoft*"))
    quiet_room.run("-c", "import onnxruntime; onnxruntime.get_available_providers()")
    if not list(quiet_room.home.rglob("*Microsoft*")):
        pytest.skip("this build of ONNX Runtime has no telemetry: nothing to keep quiet")


def test_doctor_calls_nobody(quiet_room: QuietRoom) -> None:
    done = quiet_room.run("-m", "tinyusfm_edge", "doctor")
    assert done.returncode == 0, done.stderr[-2000:]
    assert not quiet_room.heard()
    assert not list(quiet_room.home.rglob("*intel*"))


def test_a_call_is_heard(quiet_room: QuietRoom) -> None:
    quiet_room.run("-c", "import socket; socket.getaddrinfo('nobody.invalid', 443)")
    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', {!r}])"
    quiet_room.run("-c", child.format("import socket; socket.create_connection(('203.0.113.1', 9), timeout=1)"))
    assert any("nobody.invalid" in line for line in quiet_room.heard())
    assert any("203.0.113.1" in line for line in quiet_room.heard())
