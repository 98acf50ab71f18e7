"""What a session cannot survive is said: forks, artefacts that hang or eat memory; a full check is passed once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import GOLDEN_SEEDS, NumpyEngine, Parts
from tinyusfm_edge.cli import console
from tinyusfm_runtime import session as session_module
from tinyusfm_runtime.device import golden_memory
from tinyusfm_runtime.device.forks import ForkMark
from tinyusfm_runtime.device.machine import machine_card
from tinyusfm_runtime.errors import EngineError
from tinyusfm_runtime.isolate import command
from tinyusfm_runtime.isolate import session as isolate
from tinyusfm_runtime.phantom import make_phantom
from tinyusfm_runtime.session import GOLDEN_FRAMES_AT_START, Session

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")


def in_child(work: Callable[[], str], timeout_s: float = 60.0) -> str:
    """What some work says in a forked child; fails where the child hangs."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.write(write, work().encode())
        finally:
            os._exit(0)
    os.close(write)
    end_s = time.monotonic() + timeout_s
    while os.waitpid(pid, os.WNOHANG)[0] == 0:
        if time.monotonic() > end_s:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise AssertionError("the child hangs")
        time.sleep(0.05)
    with os.fdopen(read, "rb") as said:
        return said.read().decode()


def error_of(work: Callable[[], Any]) -> str:
    try:
        work()
    except EngineError as error:
        return str(error)
    return "no error"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.parametrize("threads", [1, 2])
def test_openvino_after_a_fork_is_one_line_and_not_a_hang(
    engine_parts: Callable[[str], Parts], tmp_path: Path, threads: int
) -> None:
    path = engine_parts("ov").publish(tmp_path / "b.bundle")
    frame = make_phantom(3).frame
    with Session.open(path, threads=threads) as session:
        assert "fork" in in_child(lambda: error_of(lambda: session.predict(frame)))

        def close_in_child() -> str:
            session.cancel()
            session.close()
            return "closed"

        assert in_child(close_in_child) == "closed"
        assert session.predict(frame).valid, "the parent goes on"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_mark_knows_a_child_and_what_is_opened_there_works() -> None:
    mark = ForkMark()
    mark.check("it")
    assert "before fork" in in_child(lambda: error_of(lambda: mark.check("it")))
    assert in_child(lambda: error_of(lambda: ForkMark().check("it"))) == "no error", "the control"


def runs(path: Path) -> int:
    """Golden frames that opening a bundle runs."""
    session = Session.open(path)
    session.close()
    return NumpyEngine.made[-1].runs - 1 - session_module.WARM_UP_RUNS


@pytest.fixture
def foreign(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, plug_in: type[NumpyEngine]) -> None:
    """A machine of another class, with a cache of its own."""
    monkeypatch.setattr(session_module, "machine_card", lambda: replace(machine_card(), features=("avx2",)))
    monkeypatch.setenv("TINYUSFM_EDGE_CACHE", str(tmp_path / "cache"))


@pytest.mark.usefixtures("foreign")
def test_a_full_check_is_passed_once_a_machine(fake_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[float] = []
    Session.open(fake_bundle, progress=lambda what, share: told.append(share)).close()
    assert told[-1] == 1.0 and len(told) == len(GOLDEN_SEEDS)
    assert runs(fake_bundle) == GOLDEN_FRAMES_AT_START
    NumpyEngine.bend = staticmethod(lambda outputs: {"logits": outputs["logits"] * np.float32(1.0001)})
    assert runs(fake_bundle) == GOLDEN_FRAMES_AT_START + len(GOLDEN_SEEDS), "one other bit, and all of it is repeated"
    monkeypatch.setattr(session_module, "machine_card", lambda: replace(machine_card(), features=("fma",)))
    assert runs(fake_bundle) == len(GOLDEN_SEEDS), "another machine"


@pytest.mark.usefixtures("foreign")
def test_a_missed_or_a_changed_record_counts_for_nothing(fake_bundle: Path, tmp_path: Path) -> None:
    NumpyEngine.bend = staticmethod(lambda outputs: {"logits": -outputs["logits"]})
    with pytest.raises(EngineError, match="reference"):
        Session.open(fake_bundle)
    assert not list((tmp_path / "cache").rglob("*.json")), "a miss is not remembered"
    NumpyEngine.bend = staticmethod(lambda outputs: outputs)
    assert runs(fake_bundle) == len(GOLDEN_SEEDS)
    (record,) = (tmp_path / "cache").rglob("*.json")
    record.write_bytes(record.read_bytes().replace(b"true", b"True"))
    assert runs(fake_bundle) == len(GOLDEN_SEEDS)


@pytest.mark.usefixtures("foreign")
def test_without_a_cache_every_start_checks_all(fake_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINYUSFM_EDGE_CACHE", "/proc/none")
    assert [runs(fake_bundle), runs(fake_bundle)] == [len(GOLDEN_SEEDS)] * 2
    memory = golden_memory.GoldenMemory("ab" * 32, "a", "b", replace(machine_card(), features=()))
    memory.keep("digest", {})
    assert memory.digest() is None, "a machine that cannot be known"


HANGS = "import time\nwhile True:\n    time.sleep(1)\n"
EATS = "held = []\nwhile True:\n    held.append(bytearray(b'x' * (8 << 20)))\n"
SAYS = """
import os, sys
from tinyusfm_runtime.isolate import messages as wire
pipe = os.fdopen(int(sys.argv[2]), "wb", buffering=0)
for share in (0.5, 1.0):
    wire.send(pipe, {"kind": wire.PROGRESS, "what": "checking this machine", "share": share})
wire.send(pipe, {"kind": wire.HELLO, "number": 0, "hello": {"bundle_id": "x", "description": "y"}})
"""
CRASHES = "import os\nos.kill(os.getpid(), 11)\n"


@pytest.mark.parametrize(("does", "said"), [(HANGS, "within"), (EATS, "GiB"), (CRASHES, "signal 11")])
def test_an_artefact_that_hangs_eats_or_crashes_ends_its_own_process(
    does: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In place of an engine that does so: a process that is started in the same way."""
    (tmp_path / "tinyusfm_fake_process.py").write_text(does, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    true_popen = isolate.subprocess.Popen

    def other(command: list[str], **options: Any) -> Any:
        return true_popen([sys.executable, "-m", "tinyusfm_fake_process", *command[3:]], **options)

    monkeypatch.setattr(isolate.subprocess, "Popen", other)
    monkeypatch.setattr(isolate, "START_S", 3.0 if does == HANGS else 60.0)
    monkeypatch.setattr(isolate, "MAX_MEMORY_BYTES", 200 << 20)
    with pytest.raises(EngineError, match=said) as caught:
        isolate.try_open(tmp_path / "b.bundle", target="onnx", precision="int8")
    assert "\n" not in str(caught.value) and "onnx-int8" in str(caught.value)


def test_what_opens_and_what_the_session_itself_refuses_is_no_error_here(
    engine_parts: Callable[[str], Parts], tmp_path: Path
) -> None:
    path = engine_parts("ort").publish(tmp_path / "b.bundle")
    for there in (path, tmp_path / "nothing"):
        assert isolate.try_open(there, target="onnx", precision="fp32") is None


# a command in a process of its own


@pytest.mark.parametrize(
    ("does", "minutes", "said"),
    [
        ("import time\ntime.sleep(60)", 0.01, "more than 0.01 minutes and was stopped: --max-minutes"),
        ("hold = bytearray(400 << 20)\nimport time\ntime.sleep(60)", 5.0, "of memory, more than 0.2.*--max-gb"),
        ("import os\nos.kill(os.getpid(), 11)", 5.0, "died of signal 11"),
    ],
    ids=["time", "memory", "crash"],
)
def test_a_bounded_command_is_stopped(does: str, minutes: float, said: str) -> None:
    with pytest.raises(EngineError, match=said) as caught:
        command.run_bounded([sys.executable, "-c", does], "the export", minutes=minutes, gigabytes=0.2)
    assert "\n" not in str(caught.value)


def test_a_bounded_command_keeps_its_exit_code_and_knows_where_it_is() -> None:
    does = f"import os\nraise SystemExit(7 if os.environ['{command.INSIDE}'] else 1)"
    assert command.run_bounded([sys.executable, "-c", does], "the export", minutes=5, gigabytes=1) == 7
    assert not command.should_start(), "a Python program that calls main stays in its own process"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="Ctrl-C is another thing here")
def test_ctrl_c_reaches_a_bounded_command_once(tmp_path: Path) -> None:
    inner = f"import pathlib,time\ntry:\n open(r'{tmp_path}/up','w').close()\n time.sleep(60)\n"
    inner += f"except KeyboardInterrupt:\n pathlib.Path(r'{tmp_path}/closed').touch()"
    outer = "import sys\nfrom tinyusfm_runtime.isolate.command import run_bounded\n"
    outer += "try:\n run_bounded([sys.executable, '-c', sys.argv[1]], 'it', minutes=5, gigabytes=1)\n"
    outer += "except KeyboardInterrupt:\n sys.exit(130)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    process = subprocess.Popen([sys.executable, "-c", outer, inner], env=environment)
    end_s = time.monotonic() + 900
    while not (tmp_path / "up").exists():
        assert time.monotonic() < end_s and process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130 and (tmp_path / "closed").exists()


def test_the_program_exports_in_a_process_that_can_be_stopped(tmp_path: Path) -> None:
    place = tmp_path / "x.bundle"
    program = [sys.executable, "-m", "tinyusfm_edge", "export", "--out", str(place), "--max-minutes", "0.001"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == EngineError.exit_code, done.stderr
    assert "the export took more than 0.001 minutes" in done.stderr and not place.exists()


def test_opening_says_how_far_it_is_where_that_takes_long(capsys: pytest.CaptureFixture[str]) -> None:
    now_s = [0.0]
    told = console.Opening(lambda: now_s[0])
    for second in range(12):
        now_s[0] = float(second)
        told("checking this machine", second / 12)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and "17%" in lines[0] and "58%" in lines[1] and "golden frames" in lines[0]
    told("checking this machine", 1.0)
    assert capsys.readouterr().err == ""


def test_how_far_opening_is_comes_out_of_the_process_too(
    fake_bundle: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """In place of the engine's process: one that says how far it is, and then that it is open."""
    (tmp_path / "tinyusfm_fake_process.py").write_text(SAYS, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    true_popen = isolate.subprocess.Popen

    def other(line: list[str], **options: Any) -> Any:
        return true_popen([sys.executable, "-m", "tinyusfm_fake_process", *line[3:]], **options)

    monkeypatch.setattr(isolate.subprocess, "Popen", other)
    heard: list[tuple[str, float]] = []
    isolate.try_open(fake_bundle, target="onnx", precision="int8", progress=lambda *said: heard.append(said))
    assert heard == [("checking this machine", 0.5), ("checking this machine", 1.0)]


def test_what_a_bounded_command_starts_is_not_taken_for_it() -> None:
    """A program without an input, started inside, would otherwise end at once as one whose parent died."""
    head = "from tinyusfm_runtime.isolate.command import as_program, should_start\nas_program()\n"
    again = head + "import time\ntime.sleep(1)\nassert should_start()"
    inner = head + "import subprocess, sys\nassert not should_start()\n"
    inner += f"done = subprocess.run([sys.executable, '-c', {again!r}], stdin=subprocess.DEVNULL)\n"
    inner += "raise SystemExit(done.returncode)"
    assert command.run_bounded([sys.executable, "-c", inner], "it", minutes=5, gigabytes=4) == 0
