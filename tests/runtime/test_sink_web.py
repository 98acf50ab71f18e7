"""The live page: what is sent, to whom, that a slow browser holds up nobody, and what Chromium makes of it."""

from __future__ import annotations

import json
import socket
import sys
import threading
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.browser import chromium
from tests.runtime.live_driver import driver, live_result, phantoms
from tinyusfm_runtime.errors import InputError, MissingExtra, OutputError
from tinyusfm_runtime.frame import PixelFormat
from tinyusfm_runtime.overlay import as_rgb
from tinyusfm_runtime.reading import Judged, ReadingState, Reason, SecondPassState
from tinyusfm_runtime.results import LiveCounters, LiveEvent, LiveEventKind, LiveState, SmoothedReading, StateChange
from tinyusfm_runtime.sinks import listen_address, open_sink, web
from tinyusfm_runtime.sinks.web.feed import EVENTS, PageFeed, encode, reading

if not web.available().usable:
    pytest.skip(web.available().reason, allow_module_level=True)

WAIT_S = 30.0


def unpack(message: bytes) -> tuple[dict[str, Any], bytes, bytes]:
    """Header, PNG and mask bits of a message, as the page takes it apart."""
    length = int.from_bytes(message[:4], "little")
    header = json.loads(message[4 : 4 + length])
    png_end = 4 + length + header["png_bytes"]
    assert len(message) == png_end + header["mask_bytes"]
    return header, message[4 + length : png_end], message[png_end:]


def decode_grey(png: bytes) -> np.ndarray:
    """Pixels of one of our grey PNGs."""
    width, height = int.from_bytes(png[16:20], "big"), int.from_bytes(png[20:24], "big")
    length = int.from_bytes(png[33:37], "big")
    rows = np.frombuffer(zlib.decompress(png[41 : 41 + length]), np.uint8).reshape(height, 1 + width)
    assert (rows[:, 0] == 1).all()
    return np.cumsum(rows[:, 1:], axis=1, dtype=np.uint8)


def feed(**changes: Any) -> PageFeed:
    return PageFeed(**{"title": "tiny", "labels": ("head",), "budget_ms": 33.0, "overlay_ms": 250.0, **changes})


@contextmanager
def looking(url: str, origin: str | None = None) -> Iterator[Any]:
    """A WebSocket to a page, as a browser on it would open it."""
    from websockets.sync.client import connect

    base, _, query = url.partition("?")
    target = base.replace("http", "ws") + "ws" + (f"?{query}" if query else "")
    with connect(target, origin=origin or base.rstrip("/"), proxy=None, max_size=None) as connection:  # type: ignore[arg-type]
        yield connection


def refused(url: str, **headers: str) -> int:
    """Status of a page that may not be had."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with pytest.raises(urllib.error.HTTPError) as caught:
        opener.open(urllib.request.Request(url, headers=headers), timeout=WAIT_S)
    caught.value.close()
    return caught.value.code


# what is sent


def test_a_message_holds_frame_mask_and_ellipse() -> None:
    result, page = live_result(3), feed()
    page.add(result)
    header, png, mask = unpack(page.message(page.image(), after=0)[0])
    assert result.prediction is not None and result.prediction.measurement is not None
    np.testing.assert_array_equal(decode_grey(png), result.frame.pixels)
    bits = np.unpackbits(np.frombuffer(mask, np.uint8))[: result.frame.pixels.size]
    np.testing.assert_array_equal(bits.reshape(result.frame.pixels.shape), result.prediction.mask_on_frame())
    frame = header["frame"]
    assert frame["value"] == pytest.approx(result.prediction.measurement.hc_mm, abs=0.01)
    assert frame["engine"] == result.engine and frame["age_ms"] >= result.age_ms
    points = np.array(frame["ellipse"])
    rows, cols = np.nonzero(result.prediction.mask_on_frame())
    assert np.abs(points.mean(0) - (cols.mean() + 0.5, rows.mean() + 0.5)).max() < 1.5
    assert header["trend"] == [[3, header["trend"][0][1], frame["value"], 12.5, 3.6, 0]]


@pytest.mark.parametrize(
    "changes",
    [{"stale": True}, {"stale": True, "withheld": True, "valid": False}, {"prediction": None, "valid": False}],
)
def test_no_overlay_of_what_is_late_withheld_or_missing(changes: dict[str, Any]) -> None:
    image = encode(live_result(3, **changes), time.monotonic_ns(), ("head",))
    assert image.mask == b"" and image.header["ellipse"] is None
    assert encode(live_result(3), time.monotonic_ns(), ("head",)).mask, "the control"


def test_smoothed_and_held_readings_are_told_beside_the_raw_one() -> None:
    raw = live_result(3)
    assert raw.prediction is not None and raw.prediction.mask_HW is not None
    mask = np.roll(raw.prediction.mask_HW, 3, axis=1)
    over_time = SmoothedReading(mask_HW=mask, hc_mm=171.5, held=False, held_ms=0.0, flicker=0.04, flicker_smoothed=0.01)
    header = encode(replace(raw, reading=over_time), time.monotonic_ns(), ("head",)).header
    assert header["smoothed"]["hc_mm"] == 171.5 and header["mask_smoothed"] is True
    plain = encode(raw, time.monotonic_ns(), ("head",))
    assert header["value"] == plain.header["value"] and plain.header["smoothed"] is None
    assert plain.header["mask_smoothed"] is False
    assert encode(replace(raw, reading=over_time), 0, ("head",)).mask != plain.mask
    held = replace(over_time, mask_HW=None, held=True, held_ms=120.0)
    header = encode(live_result(3, reading=held, prediction=None, valid=False), 0, ("head",)).header
    assert header["value"] is None and header["smoothed"]["held"] is True and header["smoothed"]["held_ms"] == 120.0


def test_events_of_artefacts_are_listed_and_noise_is_not() -> None:
    page = feed()
    for number in range(10):
        page.event(LiveEvent(kind=LiveEventKind.LEVEL_CHANGED, t_ns=time.monotonic_ns(), reason=f"level {number}"))
        page.event(LiveEvent(kind=LiveEventKind.DEADLINE_MISSED, t_ns=time.monotonic_ns(), reason="late"))
    events = unpack(page.message(None, after=0)[0])[0]["events"]
    assert [event["reason"] for event in events] == [f"level {number}" for number in range(10 - EVENTS, 10)]
    assert {event["kind"] for event in events} == {"level_changed"} and events[-1]["ago_ms"] >= 0


@pytest.mark.slow
def test_chromium_shows_a_switch_to_the_fallback_and_what_is_held(tmp_path: Path) -> None:
    over_time = SmoothedReading(mask_HW=None, hc_mm=171.5, held=False, held_ms=0.0, flicker=0.04, flicker_smoothed=0.01)
    with (
        web.open_sink("//:0", title="tiny", budget_ms=60_000.0, overlay_ms=60_000.0) as sink,
        chromium(tmp_path) as tab,
    ):
        tab.open(sink.url)
        tab.wait("window.livePage && livePage.state !== 'offline' && livePage.messages > 0", 60)
        sink.write_live(live_result(1, reading=over_time))
        text = "document.getElementById('{}').textContent"
        tab.wait(text.format("smoothed") + ".includes('smoothed 171.5 mm')", 60)
        assert "flicker 4.0 %, smoothed 1.0 %" in tab.run("return " + text.format("smoothed"))
        raw = tab.run("return " + text.format("reading"))
        assert raw not in ("", "171.5", "\u2013"), "the reading of the frame itself stays"
        assert tab.run("return document.getElementById('events').hidden")
        reason = "second-fp32 answers from now on (the one before it failed)"
        sink.on_event(LiveEvent(kind=LiveEventKind.LEVEL_CHANGED, t_ns=time.monotonic_ns(), reason=reason))
        held = replace(over_time, held=True, held_ms=120.0)
        change = {"degraded": True, "level": 1, "state": LiveState.DEGRADED}
        sink.write_live(live_result(2, reading=held, prediction=None, valid=False, **change))
        tab.wait(text.format("smoothed") + ".includes('HELD for 120 ms: smoothed 171.5 mm')", 60)
        assert "fallback 1 answers" in tab.run("return " + text.format("flags"))
        assert tab.run("return " + text.format("state")) == "DEGRADED"
        assert "(fallback 1)" in tab.run("return " + text.format("engine"))
        tab.wait(text.format("events") + f".includes('{reason}')", 60)
        assert tab.run("return " + text.format("reading")) == "\u2013" and tab.log() == []


@pytest.mark.slow
def test_chromium_dashes_the_ellipse_of_a_doubtful_reading(tmp_path: Path) -> None:
    yellow = """
        const c = document.getElementById("overlay");
        const p = c.getContext("2d").getImageData(0, 0, c.width, c.height).data;
        let n = 0;
        for (let i = 0; i < p.length; i += 4) n += p[i] > 200 && p[i + 1] > 150 && p[i + 2] < 120 && p[i + 3] > 120;
        return n;"""
    with (
        web.open_sink("//:0", title="tiny", budget_ms=60_000.0, overlay_ms=60_000.0) as sink,
        chromium(tmp_path) as tab,
    ):
        tab.open(sink.url)
        tab.wait("window.livePage && livePage.state !== 'offline' && livePage.messages > 0", 60)
        said, drawn = [], []
        for index, judged in enumerate(
            (Judged(ReadingState.GOOD), Judged(ReadingState.DOUBTFUL, (Reason.SECTOR,)), Judged())
        ):
            result = live_result(1)
            assert result.prediction is not None
            said_of_it = replace(result.prediction, judged=(judged,), second_pass=SecondPassState.OFF)
            sink.write_live(replace(result, prediction=said_of_it))
            tab.wait(f"livePage.frames === {index + 1} && livePage.overlay", 60)
            drawn.append(tab.run(yellow))
            said.append(tab.run("return document.getElementById('flags').textContent"))
        assert drawn[0] == drawn[2] and 0.3 * drawn[0] < drawn[1] < 0.7 * drawn[0]
        assert all("second pass off" in words and "drift: not checked" in words for words in said)
        assert ["DOUBTFUL" in words for words in said] == [False, True, False]
        assert "cut by the field of view" in said[1] and "reading unchecked" in said[2]


def test_a_withheld_reading_is_not_told() -> None:
    assert reading(live_result(3, withheld=True), ("head",))[0] is None
    assert reading(live_result(3), ("head",))[0] is not None


def test_large_and_coloured_frames_are_thinned() -> None:
    result = live_result(3)
    big = np.kron(as_rgb(result.frame), np.ones((4, 4, 1), np.uint8))
    frame = replace(result.frame, pixels=big, pixel_format=PixelFormat.RGB)
    image = encode(replace(result, frame=frame, prediction=None), time.monotonic_ns(), ())
    assert (image.header["width"], image.header["height"]) == (800, 540) and image.header["full"] == [1600, 1080]


def test_pixels_are_copied_for_the_page() -> None:
    result, page = live_result(3), feed()
    before = result.frame.pixels
    held = before.copy()
    page.add(replace(result, frame=replace(result.frame, pixels=held)))
    held[:] = 0
    _, png, _ = unpack(page.message(page.image(), after=0)[0])
    np.testing.assert_array_equal(decode_grey(png), before)


def test_trend_and_counters_are_told_once_and_whole() -> None:
    page = feed()
    for seed in range(5):
        page.add(live_result(seed))
    page.counters = lambda: LiveCounters(received=7, processed=5, dropped={"overtaken": 2})
    first, after = page.message(None, after=0)
    page.add(live_result(5))
    second, _ = page.message(None, after=after)
    assert [point[0] for point in unpack(first)[0]["trend"]] == [0, 1, 2, 3, 4]
    assert [point[0] for point in unpack(second)[0]["trend"]] == [5]
    counters = unpack(first)[0]["counters"]
    assert counters["dropped"] == {"overtaken": 2} and counters["balanced"] is True


# who may look


@pytest.fixture
def page() -> Iterator[web.WebSink]:
    with web.open_sink("//:0", title="tiny", labels=("head",), budget_ms=33.0) as sink:
        yield sink


def test_the_page_is_served_with_a_strict_policy_and_no_address_of_others(page: web.WebSink) -> None:
    assert page.host == "127.0.0.1" and page.key is None
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    for path, (name, _) in web.FILES.items():
        with opener.open(f"http://127.0.0.1:{page.port}{path}", timeout=WAIT_S) as answer:
            content = answer.read()
            assert content == (web.PAGE / name).read_bytes()
            for header, value in web.SECURITY_HEADERS.items():
                assert answer.headers[header] == value
        text = content.decode().replace('xmlns="http://www.w3.org/2000/svg"', "")
        assert "http://" not in text and "https://" not in text and "//cdn" not in text
        assert name != "index.html" or not any(word in text for word in ("<style", "style=", "onclick=", "<script>"))
    policy = web.SECURITY_HEADERS["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "*" not in policy
    assert refused(f"http://127.0.0.1:{page.port}/../live_page.py") == 404


def test_a_foreign_name_and_a_foreign_page_are_refused(page: web.WebSink) -> None:
    from websockets.exceptions import InvalidStatus

    assert refused(page.url, Host="evil.example") == 400
    for origin in ("http://evil.example", f"http://127.0.0.1:{page.port + 1}", "null"):
        with pytest.raises(InvalidStatus), looking(page.url, origin):
            pass
    with looking(page.url) as connection:
        assert unpack(connection.recv(WAIT_S))[0]["state"] == "lost"


@pytest.mark.parametrize(
    ("header", "ours"),
    [
        ("127.0.0.1:8765", True), ("localhost:1", True), ("[::1]:8765", True), ("192.168.1.7:8765", True),
        (socket.gethostname(), True), ("evil.example", False), ("127.0.0.1.evil.example", False), ("", False),
        ("[::1", False),
    ],
)  # fmt: skip
def test_hosts(header: str, ours: bool) -> None:
    assert web.host_is_ours(header) is ours


def test_other_machines_need_the_key() -> None:
    from websockets.exceptions import InvalidStatus

    with web.open_sink("//0.0.0.0:0") as sink:
        assert sink.key is not None and sink.key in sink.url
        here = f"http://127.0.0.1:{sink.port}/"
        for wrong in (here, here + "?key=wrong"):
            with pytest.raises(InvalidStatus), looking(wrong):
                pass
        with looking(f"{here}?key={sink.key}") as connection:
            assert unpack(connection.recv(WAIT_S))[0]["results"] == 0


def test_no_more_browsers_than_agreed(page: web.WebSink, monkeypatch: pytest.MonkeyPatch) -> None:
    from websockets.exceptions import InvalidStatus

    monkeypatch.setattr(web, "MAX_CLIENTS", 1)
    with looking(page.url) as connection:
        connection.recv(WAIT_S)
        with pytest.raises(InvalidStatus), looking(page.url):
            pass


# that nobody waits


def test_a_browser_that_says_nothing_gets_two_messages_and_the_loop_goes_on(page: web.WebSink) -> None:
    results = [live_result(seed) for seed in range(4)]
    with looking(page.url) as deaf, looking(page.url) as quick:
        got: list[int] = []
        slowest_s = 0.0
        for index in range(60):
            start = time.monotonic()
            page.write_live(replace(results[index % 4], index=index))
            slowest_s = max(slowest_s, time.monotonic() - start)
            header, _, _ = unpack(quick.recv(WAIT_S))
            quick.send("drawn")
            got += [header["frame"]["index"]] if header["frame"] else []
        assert slowest_s < 1.0, "the loop waited for a browser"
        assert got == sorted(set(got)) and len(got) > 5
        waiting = 0
        with pytest.raises(TimeoutError):
            while True:
                deaf.recv(4 * web.STATUS_EVERY_S)
                waiting += 1
        assert waiting == web.IN_FLIGHT, "no queue grows for it"
        deaf.send("drawn")
        deaf.send("drawn")
        end = time.monotonic() + WAIT_S
        while (unpack(deaf.recv(WAIT_S))[0]["frame"] or {}).get("index") != 59:
            deaf.send("drawn")
            assert time.monotonic() < end, "what it gets then is the newest"


def test_states_and_the_end_are_told(page: web.WebSink) -> None:
    with looking(page.url) as connection:

        def told(state: str) -> dict[str, Any]:
            end = time.monotonic() + WAIT_S
            while (header := unpack(connection.recv(WAIT_S))[0])["state"] != state:
                connection.send("drawn")
                assert time.monotonic() < end
            connection.send("drawn")
            return header

        page.write_live(live_result(1))
        told("live")
        page.on_state(StateChange(before=LiveState.LIVE, after=LiveState.FROZEN, t_ns=1, reason="same image"))
        assert told("frozen")["reason"] == "same image"
        page.end("the source has ended")
        assert told("ended")["reason"] == "the source has ended"


def test_closing_leaves_no_thread_and_a_taken_port_is_one_line() -> None:
    before = threading.active_count()
    with web.open_sink("//:0") as sink:
        with pytest.raises(OutputError, match=f"port {sink.port} is in use: give port 0"):
            web.open_sink(f"//127.0.0.1:{sink.port}")
        with looking(sink.url) as connection:
            connection.recv(WAIT_S)
            sink.close()
    sink.write_live(live_result(1))
    end = time.monotonic() + WAIT_S
    while threading.active_count() > before:
        assert time.monotonic() < end
        time.sleep(0.02)


def test_without_starlette_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(MissingExtra, match=r"pip install .+\[live\]"):
        open_sink("web://:0")
    assert not web.available().usable


@pytest.mark.parametrize(
    ("text", "address"),
    [("//:7", ("127.0.0.1", 7)), ("", ("127.0.0.1", 9)), ("//[::1]:7", ("::1", 7)), ("0.0.0.0:0", ("0.0.0.0", 0))],
)
def test_where_to_listen(text: str, address: tuple[str, int]) -> None:
    assert listen_address(text, 9) == address


@pytest.mark.parametrize("text", ["//a:b", "//a:1:2", "//:70000", "a b", "//a/b"])
def test_where_nobody_can_listen(text: str) -> None:
    with pytest.raises(InputError, match="where to listen"):
        listen_address(text, 9)


# in a browser


@pytest.mark.slow
def test_chromium_draws_the_page_and_takes_the_overlay_off(fake_bundle: Path, plug_in: object, tmp_path: Path) -> None:
    with (
        web.open_sink("//:0", title="tiny", labels=("head",), budget_ms=5000.0, overlay_ms=3000.0) as sink,
        driver(fake_bundle) as live,
        chromium(tmp_path) as browser,
    ):
        sink.watch(lambda: live.counters)
        browser.resize(1280, 800)
        browser.open(sink.url)
        frames = phantoms(3)

        def drawn(count: int) -> None:
            for _ in range(200):
                live.run(frames, [sink])
                if browser.run("return window.livePage.frames") >= count:
                    return
            raise AssertionError(browser.run("return window.livePage"))

        browser.wait("window.livePage && livePage.messages > 0")
        drawn(3)
        browser.wait("document.body.dataset.state === 'live'")
        assert browser.run("return document.getElementById('unit').textContent") == "mm"
        coloured = "Array.from(document.getElementById('overlay').getContext('2d').getImageData(0,0,400,270).data).some(v => v > 0)"  # noqa: E501
        live.run(frames, [sink])
        assert browser.wait(f"livePage.overlay && {coloured}")
        assert len(browser.screenshot()) > 10_000
        # nothing new comes: the overlay goes by itself, the frame stays and says so
        browser.wait("!livePage.overlay")
        assert browser.run(f"return !({coloured})")
        assert browser.run("return document.getElementById('notice').textContent").endswith("overlay withdrawn")
        assert browser.run("return document.getElementById('reading').textContent") == "\u2013"
        for state in (LiveState.STALE, LiveState.FROZEN, LiveState.DEGRADED, LiveState.LOST):
            sink.on_state(StateChange(before=LiveState.LIVE, after=state, t_ns=1, reason="seen by the test"))
            browser.wait(f"document.getElementById('state').textContent === '{state.value.upper()}'")
        colours = browser.run("return getComputedStyle(document.getElementById('state')).color")
        assert colours == "rgb(255, 93, 93)"
        for width, height in ((1280, 800), (800, 1280)):
            browser.resize(width, height)
            assert browser.run("return document.documentElement.scrollWidth") <= width
            low = "Math.min(...[...document.querySelectorAll('button')].map(b => b.getBoundingClientRect().height))"
            assert browser.run(f"return {low}") >= 44, "a finger hits it"
        requests = browser.run("return performance.getEntriesByType('resource').map(entry => entry.name)")
        assert all(name.startswith(sink.url) for name in requests)
        # "rendering": Chromium's advice about this test's own reading of the canvas
        assert [line for line in browser.log() if not line.startswith("rendering")] == [], "nor of the policy"
        browser.run("const image = new Image(); image.src = 'http://127.0.0.1:1/x.png'; document.body.append(image)")
        assert any("Content Security Policy" in line for line in browser.log()), "the control: a foreign address is"
        sink.close()
        browser.wait("document.body.dataset.state === 'offline'")
