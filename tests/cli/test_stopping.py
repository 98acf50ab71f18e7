"""SIGTERM in the middle of a run: what it was recording is closed, whole and readable, and nothing is left behind."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Parts, child_environment

PLACES = {"jsonl": "rec.jsonl", "csv": "rec.csv", "audit": "audit.jsonl", "video": "out.mp4"}


def plain_signals() -> None:
    """In the child: a run of the tests that ignores the hang-up hands that on to what it starts."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def started(tmp_path: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tinyusfm_edge", *arguments]
    return subprocess.Popen(
        command,
        cwd=tmp_path,
        env=child_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=plain_signals,
    )


def wait_for_lines(path: Path, count: int) -> None:
    end_s = time.monotonic() + 900
    while time.monotonic() < end_s:
        if path.is_file() and path.read_bytes().count(b"\n") >= count:
            return
        time.sleep(0.05)
    raise AssertionError(f"{path.name} never had {count} lines")


ONCE = """
import os, signal, time
from tinyusfm_edge.cli import stopping

before = signal.getsignal(signal.SIGTERM)
try:
    with stopping.signals_as_ctrl_c() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
        raise SystemExit("nothing was heard")
except KeyboardInterrupt:
    pass
assert (stop.exit_code, stop.words) == (143, "stopped by SIGTERM"), stop
assert signal.getsignal(signal.SIGTERM) is before
with stopping.signals_as_ctrl_c() as quiet:
    pass
assert (quiet.exit_code, quiet.words) == (130, "stopped"), quiet
print("heard")
"""


TWICE = """
import os, signal, time
from tinyusfm_edge.cli import stopping

try:
    with stopping.signals_as_ctrl_c():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.2)
            print("closed")
except KeyboardInterrupt:
    print("heard once")
"""


@pytest.mark.parametrize(
    ("program", "said"), [(ONCE, "heard\n"), (TWICE, "closed\nheard once\n")], ids=["one signal", "two signals"]
)
def test_a_signal_becomes_ctrl_c_once_and_a_second_one_does_not_disturb_the_closing(program: str, said: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=child_environment(),
        capture_output=True,
        text=True,
        preexec_fn=plain_signals,
        timeout=900,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, said), done.stderr[-2000:]


@pytest.mark.skipif(sys.platform == "win32", reason="there are no such signals")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
@pytest.mark.parametrize("command", ["run", "live"])
def test_a_stopped_command_keeps_its_records(
    command: str, number: signal.Signals, engine_parts: Callable[[str], Parts], tmp_path: Path
) -> None:
    pytest.importorskip("onnxruntime")
    bundle = engine_parts("ort").publish(tmp_path / "tiny.bundle")
    sinks = [f"--sink={name}:{place}" for name, place in PLACES.items()]
    more = ["--port=0"] if command == "live" else ["--budget-ms=1000"]
    process = started(tmp_path, command, str(bundle), "phantom:0-99999", *sinks, *more)
    wait_for_lines(tmp_path / "rec.jsonl", 12)
    process.send_signal(number)
    _, said = process.communicate(timeout=900)
    assert process.returncode == (0 if command == "live" else 128 + number), said
    lines = [json.loads(line) for line in (tmp_path / "rec.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(lines) >= 12
    audited = (tmp_path / "audit.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(audited[-1])["body"]["event"] == "close"
    assert (tmp_path / "rec.csv").read_bytes().endswith(b"\n")
    av = pytest.importorskip("av")
    with av.open(str(tmp_path / "out.mp4")) as container:
        assert sum(1 for _ in container.decode(video=0)) == sum(line["kind"] == "result" for line in lines)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*PLACES.values(), "tiny.bundle"])
