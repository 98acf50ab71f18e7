"""Every live source keeps its contract: newest first, closable from anywhere, honest counters, nothing left open.

A new live source is picked up by itself; it needs a rig in tests/fakes/live_rigs.py.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.fakes.live_rigs import RIGS, SPACING_MM, Rig, image, until
from tinyusfm_runtime.frame import Frame, FrameSource, LiveSource

NUM_FRAMES = 4


@pytest.fixture
def rig(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    with RIGS[request.param](monkeypatch) as made:
        yield made


every_rig = pytest.mark.parametrize("rig", list(RIGS), indirect=True)


def take(rig: Rig, count: int, first: int = 0) -> list[Frame]:
    """Sends images one by one, each after the one before it was received, inside an entered source."""
    frames: list[Frame] = []
    iterator = iter(rig.source)
    for index in range(first, first + count):
        # cameras and links start with the iteration, so the sender runs beside it
        sender = threading.Thread(target=rig.send, args=(index, image(index)))
        sender.start()
        frames.append(next(iterator))
        sender.join()
    return frames


def open_files() -> int:
    place = Path("/proc/self/fd")
    return len(list(place.iterdir())) if place.is_dir() else 0


@every_rig
def test_frames_arrive_whole_with_what_is_known_about_them(rig: Rig) -> None:
    assert isinstance(rig.source, LiveSource) and isinstance(rig.source, FrameSource)
    before = time.monotonic_ns()
    with rig.source:
        assert rig.source.last_contact_ns is None or rig.source.last_contact_ns <= time.monotonic_ns()
        frames = take(rig, NUM_FRAMES)
        contact = rig.source.last_contact_ns
    for index, frame in enumerate(frames):
        np.testing.assert_array_equal(frame.pixels, image(index))
        assert frame.spacing_mm == SPACING_MM or frame.spacing_mm == (0.25, 0.25)
    assert [frame.seq for frame in frames] == sorted({frame.seq for frame in frames})
    received = [frame.t_recv_ns for frame in frames]
    assert received == sorted(received) and before <= received[0] and received[-1] <= time.monotonic_ns()
    own = [frame.t_source_ns for frame in frames]
    assert None not in own and own == sorted(set(own))
    assert contact is not None and before < contact <= time.monotonic_ns()


@every_rig
def test_frames_own_their_pixels(rig: Rig) -> None:
    with rig.source:
        frames = take(rig, NUM_FRAMES)
    for index, frame in enumerate(frames):
        np.testing.assert_array_equal(frame.pixels, image(index))


@every_rig
def test_a_late_reader_gets_the_newest(rig: Rig) -> None:
    with rig.source:
        take(rig, 1)
        for index in range(1, 4):
            rig.send(index, image(index))
        until(lambda: False, 0.3)
        iterator = iter(rig.source)
        shown = []
        # a burst that arrives in parts may show more than its last image, never an older one after a newer one
        while not shown or not np.array_equal(shown[-1].pixels, image(3)):
            shown.append(next(iterator))
        assert [frame.seq for frame in shown] == sorted({frame.seq for frame in shown})
        skipped = 3 - len(shown)
        assert rig.source.counters.get("overtaken", 0) == skipped >= 1


@every_rig
def test_what_is_refused_is_counted_and_the_stream_goes_on(rig: Rig) -> None:
    with rig.source:
        take(rig, 1)
        before = dict(rig.source.counters)

        def send_both() -> None:
            rig.spoil()
            until(lambda: dict(rig.source.counters) != before)
            rig.send(1, image(1))

        sender = threading.Thread(target=send_both)
        sender.start()
        frame = next(iter(rig.source))
        sender.join()
        after = rig.source.counters
    np.testing.assert_array_equal(frame.pixels, image(1))
    grown = {name: count - before.get(name, 0) for name, count in after.items() if count != before.get(name, 0)}
    assert sum(grown.values()) >= 1 and "overtaken" not in grown, grown
    assert all(isinstance(count, int) and count >= 0 for count in after.values())


@every_rig
def test_undamaged_frames_raise_no_counter(rig: Rig) -> None:
    with rig.source:
        take(rig, NUM_FRAMES)
        assert sum(rig.source.counters.values()) == 0, dict(rig.source.counters)


@every_rig
def test_closing_from_another_thread_ends_the_iteration(rig: Rig) -> None:
    with rig.source:
        take(rig, 1)
        timer = threading.Timer(0.1, rig.source.close)
        timer.start()
        begun = time.monotonic()
        assert list(rig.source) == []
        assert time.monotonic() - begun < 3
        timer.join()
        rig.source.close()
        assert list(rig.source) == [], "closed permanently"


@every_rig
def test_closing_before_anything_happened(rig: Rig) -> None:
    rig.source.close()
    rig.source.close()
    with rig.source:
        assert list(rig.source) == []


@every_rig
def test_leaving_while_another_thread_iterates(rig: Rig) -> None:
    ended = threading.Event()

    def watch() -> None:
        for _ in rig.source:
            pass
        ended.set()

    with rig.source:
        thread = threading.Thread(target=watch)
        thread.start()
        rig.send(0, image(0))
        time.sleep(0.05)
    assert ended.wait(5)
    thread.join()


@every_rig
def test_a_sign_of_life_without_an_image_counts_as_contact(rig: Rig) -> None:
    if rig.alive is None:
        pytest.skip("this transport has no sign of life but images")
    with rig.source:
        take(rig, 1)
        contact = rig.source.last_contact_ns
        thread = threading.Thread(target=lambda: list(rig.source))
        thread.start()
        time.sleep(0.02)
        rig.alive()
        assert until(lambda: (rig.source.last_contact_ns or 0) > (contact or 0))
        rig.source.close()
        thread.join()


@pytest.mark.parametrize("name", list(RIGS))
def test_nothing_is_left_open(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = []
    for _ in range(3):
        with RIGS[name](monkeypatch) as rig, rig.source:
            take(rig, 2)
        counts.append((open_files(), threading.active_count()))
    assert counts[0] == counts[1] == counts[2], counts
