"""A session whose engine hangs in native code: closing ends, the process ends, and what can be freed is freed."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import NumpyEngine, child_environment, tiny_logits
from tests.plugged import plug_in_module, plugged
from tests.runtime.live_sources import images, wait_until
from tinyusfm_runtime import session as session_module
from tinyusfm_runtime.errors import EngineError
from tinyusfm_runtime.session import Session


class Hanging(NumpyEngine):
    """Hangs once it is told to, and looks at ``cancel`` only where it is told so too."""

    hang = threading.Event()
    entered = threading.Event()
    wake = threading.Event()
    listens = False

    def run(self, tensor: np.ndarray) -> dict[str, np.ndarray]:
        if Hanging.hang.is_set():
            Hanging.entered.set()
            Hanging.wake.wait(60)
        return {"logits": tiny_logits(tensor)}

    def cancel(self) -> None:
        if Hanging.listens:
            Hanging.wake.set()


@pytest.fixture
def session(fake_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> Session:
    plugged(monkeypatch, "engines", fake=plug_in_module("hanging", Engine=Hanging))
    monkeypatch.setattr(session_module, "CLOSE_WAIT_S", 0.1)
    monkeypatch.setattr(session_module, "CLOSE_GRACE_S", 0.1)
    for event in (Hanging.hang, Hanging.entered, Hanging.wake):
        event.clear()
    monkeypatch.setattr(Hanging, "listens", False)
    return Session.open(fake_bundle)


def stuck(session: Session) -> tuple[threading.Thread, list[Exception]]:
    """A thread inside the engine, and what came out of it."""
    failures: list[Exception] = []

    def ask() -> None:
        try:
            session.predict(images(1)[0])
        except EngineError as error:
            failures.append(error)

    Hanging.hang.set()
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    assert Hanging.entered.wait(20)
    return thread, failures


def test_closing_gives_up_an_engine_that_hangs_and_it_frees_itself_later(
    session: Session, caplog: pytest.LogCaptureFixture
) -> None:
    engine = session._engine
    assert isinstance(engine, Hanging)
    thread, _ = stuck(session)
    caplog.set_level(logging.WARNING)
    session.close()
    assert thread.is_alive() and not engine.closed, "nobody frees memory that a kernel is writing to"
    assert [record.getMessage() for record in caplog.records if "hangs" in record.getMessage()]
    Hanging.wake.set()
    thread.join(20)
    wait_until(lambda: engine.closed)
    with pytest.raises(EngineError, match="closed"):
        session.predict(images(1)[0])


def test_closing_cancels_before_it_gives_up(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Hanging, "listens", True)
    monkeypatch.setattr(session_module, "CLOSE_GRACE_S", 30.0)
    engine = session._engine
    assert isinstance(engine, Hanging)
    thread, _ = stuck(session)
    session.close()
    assert engine.closed
    thread.join(20)


def test_closing_waits_for_an_answer_that_is_on_its_way(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_module, "CLOSE_WAIT_S", 30.0)
    thread, failures = stuck(session)
    timer = threading.Timer(0.2, Hanging.wake.set)
    timer.start()
    session.close()
    thread.join(20)
    timer.join()
    assert not failures, "it was answered, not broken off"


PROGRAM = """
import ctypes, sys, threading
from pathlib import Path
import numpy as np
import pytest
from tests.conftest import NumpyEngine, tiny_logits
from tests.plugged import plug_in_module, plugged
from tests.runtime.live_sources import PacedSource, images
from tinyusfm_runtime import session as module
from tinyusfm_runtime.live.loop import Live
from tinyusfm_runtime.live.options import LiveOptions
from tinyusfm_runtime.session import Session

hang = threading.Event()

class Engine(NumpyEngine):
    def run(self, tensor):
        if hang.is_set():
            ctypes.CDLL(None).sleep(600)  # in C, where no Python reaches
        return {"logits": tiny_logits(tensor)}

plugged(pytest.MonkeyPatch(), "engines", fake=plug_in_module("native", Engine=Engine))
module.CLOSE_WAIT_S = module.CLOSE_GRACE_S = 0.2
options = LiveOptions(period_ms=50, give_up_ms=300, grace_ms=100)
source = PacedSource(20, images(4))
with Session.open(Path(sys.argv[1])) as session:
    with Live(session, source, budget_ms=200, advanced=options) as live:
        next(live)
        hang.set()
        for result in live:
            if result.error is not None:
                break
print("left", flush=True)
"""


def test_a_kernel_that_never_comes_back_does_not_keep_the_process(fake_bundle: Path) -> None:
    begin_s = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(fake_bundle)],
        capture_output=True, text=True, timeout=900, env=child_environment(), check=False,
        cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout.strip() == "left", done.stderr[-2000:]
    assert time.monotonic() - begin_s < 120, "the kernel sleeps ten minutes"
