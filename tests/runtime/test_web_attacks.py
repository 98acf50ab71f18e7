"""The live page under attack: odd frames, failing tasks, connections that say nothing, messages that no page sends."""

from __future__ import annotations

import socket
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.browser import chromium
from tests.runtime.live_driver import live_result
from tests.runtime.test_sink_web import feed, looking, unpack
from tinyusfm_runtime.frame import Frame, PixelFormat
from tinyusfm_runtime.sinks import igtl, web
from tinyusfm_runtime.sinks.web import connections
from tinyusfm_runtime.sinks.web.feed import encode

if not web.available().usable:
    pytest.skip(web.available().reason, allow_module_level=True)

WAIT_S = 60.0


@pytest.fixture
def page() -> Iterator[web.WebSink]:
    with web.open_sink("//127.0.0.1:0", title="tiny", budget_ms=60_000.0, overlay_ms=60_000.0) as sink:
        yield sink


def wait_for(true: Callable[[], bool]) -> None:
    end_s = time.monotonic() + WAIT_S
    while not true():
        assert time.monotonic() < end_s, "it never came true"
        time.sleep(0.02)


def odd(rows: int, columns: int, seq: int) -> Any:
    """A result about a frame of any size, without an answer."""
    pixels = np.random.default_rng(seq).integers(0, 256, (rows, columns), dtype=np.uint8)
    return live_result(seq, frame=Frame(pixels=pixels, seq=seq), prediction=None, valid=False)


def get(url: str) -> int:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(url, timeout=WAIT_S) as answer:
        return int(answer.status)


def next_image(connection: Any) -> dict[str, Any]:
    """The next message with a frame in it."""
    end_s = time.monotonic() + WAIT_S
    while time.monotonic() < end_s:
        header, _, _ = unpack(connection.recv(timeout=WAIT_S))
        connection.send("drawn")
        if header["frame"] is not None:
            return header
    raise AssertionError("no image came")


# the page never dies


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(8, 3000), columns=st.integers(8, 3000), colour=st.booleans())
def test_every_frame_that_is_a_frame_can_be_shown(rows: int, columns: int, colour: bool) -> None:
    if rows * columns > 3_000_000:
        columns = 1 + 3_000_000 // rows
    shape = (rows, max(columns, 8), 3) if colour else (rows, max(columns, 8))
    frame = Frame(pixels=np.zeros(shape, np.uint8), pixel_format=PixelFormat.RGB if colour else PixelFormat.GREY)
    made = encode(live_result(1, frame=frame, prediction=None, valid=False), 0, ())
    assert 1 <= made.header["width"] <= 1024 and 1 <= made.header["height"] <= 1024


@pytest.mark.parametrize("size", [(14, 1100), (1100, 14), (8, 3000), (3000, 8), (8, 8)])
def test_a_long_narrow_frame_is_shown_and_so_are_those_behind_it(page: web.WebSink, size: tuple[int, int]) -> None:
    with looking(page.url) as connection:
        page.write_live(live_result(1))
        assert next_image(connection)["frame"]["seq"] == 1
        page.write_live(odd(*size, 2))
        assert next_image(connection)["frame"]["full"] == [size[1], size[0]]
        page.write_live(live_result(3))
        assert next_image(connection)["frame"]["seq"] == 3


def test_a_frame_that_cannot_be_shown_is_counted_told_and_survived(
    page: web.WebSink, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tinyusfm_runtime.sinks.web import feed as feed_module

    true_encode = feed_module.encode

    def broken(result: Any, *arguments: Any, **options: Any) -> Any:
        if result.frame.seq == 2:
            raise MemoryError("nothing left")
        return true_encode(result, *arguments, **options)

    monkeypatch.setattr(feed_module, "encode", broken)
    with looking(page.url) as connection:
        page.write_live(live_result(1))
        next_image(connection)
        page.write_live(live_result(2))
        headers = []
        wait_for(lambda: page.feed.unshown == 1)
        while not headers or headers[-1]["unshown"]["count"] == 0:
            headers.append(unpack(connection.recv(timeout=WAIT_S))[0])
            connection.send("drawn")
        assert headers[-1]["unshown"] == {"count": 1, "newest": "MemoryError"}
        page.write_live(live_result(3))
        last = next_image(connection)
        assert last["frame"]["seq"] == 3 and last["unshown"] == {"count": 1, "newest": None}


@pytest.mark.parametrize("part", ["try_image", "message"])
def test_any_task_that_fails_begins_again(page: web.WebSink, part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    true_part, failures = getattr(page.feed, part), [3]

    def failing(*arguments: Any, **options: Any) -> Any:
        if failures[0]:
            failures[0] -= 1
            raise ZeroDivisionError
        return true_part(*arguments, **options)

    monkeypatch.setattr(page.feed, part, failing)
    end_s = time.monotonic() + WAIT_S
    seen: list[int] = []
    while time.monotonic() < end_s and not seen:
        try:
            with looking(page.url) as connection:
                page.write_live(live_result(5))
                for _ in range(20):
                    header, _, _ = unpack(connection.recv(timeout=1.0))
                    connection.send("drawn")
                    seen += [header["frame"]["seq"]] if header["frame"] else []
                    page.write_live(live_result(5))
        except Exception:  # it is let go and comes again, as the page's script does
            continue
    assert seen and failures == [0] and page.restarts == 3


def test_a_result_that_cannot_be_sent_does_not_end_the_igtl_sink(monkeypatch: pytest.MonkeyPatch) -> None:
    with igtl.open_sink("//127.0.0.1:0") as sink, socket.create_connection(("127.0.0.1", sink.port)) as client:
        client.settimeout(WAIT_S)
        true_pack = igtl.pack_image
        monkeypatch.setattr(igtl, "pack_image", lambda *a, **k: 1 / 0)
        wait_for(lambda: sink.counters["clients"] == 1)
        sink.write_live(live_result(1))
        wait_for(lambda: sink.counters.get("unsent", 0) >= 1)
        monkeypatch.setattr(igtl, "pack_image", true_pack)
        sink.write_live(live_result(2))
        received = b""
        while b"LABELMAP" not in received and b"IMAGE" not in received:
            part = client.recv(1 << 16)
            assert part, "the link is closed before an image came"
            received += part


# connections that say nothing


def test_idle_connections_lock_nobody_out(page: web.WebSink) -> None:
    with ExitStack() as stack:
        for _ in range(3 * connections.MAX_PER_ADDRESS):
            idle = stack.enter_context(socket.create_connection(("127.0.0.1", page.port), timeout=WAIT_S))
            idle.sendall(b"GET / HT")
        assert get(page.url) == 200
        assert len(page._server.connections) <= connections.MAX_PER_ADDRESS
        with looking(page.url) as connection:
            page.write_live(live_result(1))
            assert next_image(connection)["frame"]["seq"] == 1


@pytest.mark.parametrize(
    "said", [b"", b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nX-A: ", b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"]
)
def test_a_request_that_does_not_come_is_not_waited_for(
    page: web.WebSink, said: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "HEADER_S", 0.5)
    monkeypatch.setattr(connections, "IDLE_S", 0.5)
    with socket.create_connection(("127.0.0.1", page.port), timeout=WAIT_S) as slow:
        slow.sendall(said)
        start_s = time.monotonic()
        received = b""
        try:
            while part := slow.recv(1 << 16):
                received += part
        except ConnectionResetError:
            pass
        assert time.monotonic() - start_s < 30
        assert (b"200 OK" in received) is said.endswith(b"\r\n\r\n")
    assert get(page.url) == 200


def test_a_request_of_any_length_is_answered(page: web.WebSink) -> None:
    for path in ("/ws?key=" + "k" * 15_000, "/" + "a" * 100_000):
        with socket.create_connection(("127.0.0.1", page.port), timeout=WAIT_S) as client:
            request = f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
            try:
                client.sendall(request.encode())
                assert b"400" in client.recv(1 << 16)
            except ConnectionError:
                pass  # closed before it was all sent
    assert get(page.url) == 200


def test_browsers_that_draw_nothing_lock_nobody_out(page: web.WebSink, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as may look, none of which ever draws: a further one gets the place of one of them, and keeps it."""
    from websockets.exceptions import ConnectionClosed, InvalidStatus

    monkeypatch.setattr(web, "MAX_CLIENTS", 3)
    with ExitStack() as stack:
        silent = [stack.enter_context(looking(page.url)) for _ in range(3)]
        for each in silent:
            each.recv(timeout=WAIT_S)
        with pytest.raises(InvalidStatus), looking(page.url):
            pass  # none of them was still for long enough
        monkeypatch.setattr(web, "STILL_S", 0.5)
        wait_for(lambda: all(client.still_s > 0.5 for client in list(page._server.clients)))
        with looking(page.url) as drawing:
            page.write_live(live_result(1))
            assert next_image(drawing)["frame"]["seq"] == 1
            assert page.clients == 3
            with pytest.raises(ConnectionClosed):
                for each in silent:
                    for _ in range(2 * web.IN_FLIGHT):
                        with suppress(TimeoutError):
                            each.recv(timeout=0.3)
    assert page.restarts == 0


# messages that no page sends


@pytest.mark.parametrize("message", [b"\x00binary", b"", "x" * 100_000, "acks"])
def test_a_message_that_no_page_sends_ends_the_connection_without_a_traceback(
    page: web.WebSink, message: bytes | str, caplog: pytest.LogCaptureFixture
) -> None:
    from websockets.exceptions import ConnectionClosed

    with looking(page.url) as connection, pytest.raises(ConnectionClosed):
        for _ in range(100_000):
            connection.send("drawn" if message == "acks" else message)
            if message != "acks":
                while True:
                    connection.recv(timeout=WAIT_S)
    wait_for(lambda: page.clients == 0)
    assert not [record for record in caplog.records if record.exc_info] and page.restarts == 0
    assert get(page.url) == 200


def test_a_page_feed_that_was_never_told_anything_says_so() -> None:
    header, _, _ = unpack(feed().message(None, after=0)[0])
    assert header["schema"] == 4 and header["unshown"] == {"count": 0, "newest": None}


@pytest.mark.slow
def test_chromium_goes_on_behind_a_narrow_frame_and_says_when_it_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tinyusfm_runtime.sinks.web import feed as feed_module

    true_encode, silent = feed_module.encode, threading.Event()

    def broken(result: Any, *arguments: Any, **options: Any) -> Any:
        if result.frame.seq == 3:
            raise MemoryError("nothing left")
        return true_encode(result, *arguments, **options)

    monkeypatch.setattr(feed_module, "encode", broken)
    with web.open_sink("//:0", budget_ms=60_000.0, overlay_ms=60_000.0) as sink, chromium(tmp_path) as tab:
        tab.open(sink.url)
        tab.wait("window.livePage && livePage.messages > 0", 60)
        notice = "document.getElementById('notice').textContent"
        sink.write_live(live_result(1))
        tab.wait("livePage.frames === 1", 60)
        wide = tab.run("return document.getElementById('frame').width")
        sink.write_live(odd(14, 1100, 2))
        tab.wait("livePage.frames === 2", 60)
        assert tab.run("return document.getElementById('frame').height") < 20 and "cannot be shown" not in tab.run(
            f"return {notice}"
        )
        sink.write_live(live_result(3))
        tab.wait(f"{notice}.includes('cannot be shown (MemoryError), this is an older one')", 60)
        assert "1 frames could not be shown" in tab.run("return document.getElementById('skipped').textContent")
        assert not tab.run("return livePage.overlay"), "no reading stands on a frame that is not the newest"
        sink.write_live(live_result(4))
        tab.wait(f"livePage.frames === 3 && !{notice}.includes('cannot be shown')", 60)
        assert tab.run("return document.getElementById('frame').width") == wide and tab.log() == []
        # results go on and no image comes: the page says so by itself
        monkeypatch.setattr(sink.feed, "try_image", lambda: None)
        for seq in range(5, 9):
            sink.write_live(live_result(seq))
        tab.wait(f"{notice}.includes('stands still while results go on')", 60)
        # nothing comes at all although the connection is open
        true_message = sink.feed.message

        def waiting(*arguments: Any, **options: Any) -> Any:
            silent.wait(60)
            return true_message(*arguments, **options)

        monkeypatch.setattr(sink.feed, "message", waiting)
        try:
            tab.wait("document.body.dataset.state === 'offline'", 60)
        finally:
            silent.set()
        tab.wait("document.body.dataset.state !== 'offline'", 60)
