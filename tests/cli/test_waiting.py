"""A probe that does not answer is no silence: a line says what is waited for, ever more rarely, and when it is over."""

from __future__ import annotations

import time
from types import SimpleNamespace

from tinyusfm_edge.cli.streams.waiting import Waiting


def test_lines_come_with_back_off_and_end_with_the_first_frame() -> None:
    said: list[str] = []
    counters = SimpleNamespace(received=0, source={"no_connection": 7})
    live = SimpleNamespace(counters=counters, is_live=True)
    waiting = Waiting("igtl://127.0.0.1:1", say=said.append, first_s=0.02)
    waiting.event(SimpleNamespace(kind=SimpleNamespace(value="source"), reason="nobody listens"))  # type: ignore[arg-type]
    with waiting.watch(live):  # type: ignore[arg-type]
        end = time.monotonic() + 20
        while len(said) < 3 and time.monotonic() < end:
            time.sleep(0.01)
        counters.received = 1
        while "frames arrive" not in said[-1] and time.monotonic() < end:
            time.sleep(0.01)
    assert said[0].startswith("waiting for igtl://127.0.0.1:1 for 0 s, 7 tries: nobody listens")
    assert said[-1] == "frames arrive from igtl://127.0.0.1:1"


def test_a_loop_that_gets_frames_and_a_file_are_silent() -> None:
    said: list[str] = []
    still = SimpleNamespace(counters=SimpleNamespace(received=0, source={}), is_live=False)
    with Waiting("clip.dcm", say=said.append, first_s=0.01).watch(still):  # type: ignore[arg-type]
        time.sleep(0.1)
    assert not said
