"""Live sources: what the connection is at, first refusals and giving up are told at once, each with its mend."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import pytest

from tests.conftest import NumpyEngine
from tests.fakes.live_rigs import image
from tinyusfm_runtime.errors import InputError, NoSourceError
from tinyusfm_runtime.live.loop import Live
from tinyusfm_runtime.live.options import LiveOptions
from tinyusfm_runtime.results import LiveEvent, LiveEventKind, StateChange
from tinyusfm_runtime.session import Session
from tinyusfm_runtime.sources import igtl, open_source
from tinyusfm_runtime.sources.igtl import IgtlSource
from tinyusfm_runtime.transport import igtl_wire as wire

PATIENCE_S = 30.0


class Sender:
    """An OpenIGTLink server that says whatever bytes it is given, again and again, to whoever connects."""

    def __init__(self, *messages: bytes) -> None:
        self.messages = messages
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._stop = threading.Event()
        self._links: list[socket.socket] = []
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    @property
    def address(self) -> str:
        return f"igtl://127.0.0.1:{self._listener.getsockname()[1]}"

    def _serve(self) -> None:
        self._listener.settimeout(0.02)
        while not self._stop.is_set():
            try:
                link, _ = self._listener.accept()
                self._links.append(link)
            except TimeoutError:
                pass
            for link in list(self._links):
                try:
                    for message in self.messages:
                        link.sendall(message)
                except OSError:
                    self._links.remove(link)
                    link.close()

    def hang_up(self) -> None:
        """Closes every connection; the receiver comes again."""
        for link in list(self._links):
            with suppress(OSError):
                link.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
        for listener in (self._listener, *self._links):
            listener.close()


@contextmanager
def sending(*messages: bytes) -> Iterator[Sender]:
    sender = Sender(*messages)
    try:
        yield sender
    finally:
        sender.close()


def packed(pixels: np.ndarray, device: str = "US", seconds: int = 1, **metadata: str) -> bytes:
    envelope = wire.IgtlEnvelope(
        device=device, t_unix_ns=seconds * 10**9, header_version=2 if metadata else 1, metadata=metadata
    )
    return wire.pack_image(pixels, envelope, spacing_mm=(0.2, 0.2))


def without_crc(message: bytes) -> bytes:
    return message[:50] + bytes(8) + message[58:]


def wait_for(condition: Any) -> None:
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


@contextmanager
def reading(source: IgtlSource) -> Iterator[list[Any]]:
    """Iterates in another thread; gives the frames."""
    frames: list[Any] = []

    def drain() -> None:
        for frame in source:
            frames.append(frame)

    thread = threading.Thread(target=drain, daemon=True)
    with source:
        thread.start()
        yield frames
        source.close()
        thread.join(PATIENCE_S)


@pytest.mark.parametrize(
    ("message", "reason", "words"),
    [
        (packed(image(1).astype(np.uint16)), "type", "--window LO,HI"),
        (packed(image(1).astype(np.float32)), "type", "--window LO,HI"),
        (without_crc(packed(image(1))), "no_crc", "--allow-no-crc"),
        (packed(image(1))[:-1] + b"\x7f", "crc", "damages"),
        (packed(np.stack([image(1)] * 2, axis=-1)), "type", "2 channels"),
        (packed(image(1), UltrasoundImageType="RF_REAL"), "rf", "scan-convert"),
        (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 20, "header", "OpenIGTLink server"),
    ],
    ids=["16 bits", "float", "CRC 0", "damaged", "channels", "RF", "another server"],
)
def test_the_first_refusal_of_a_kind_is_told_with_its_mend(message: bytes, reason: str, words: str) -> None:
    with sending(message) as sender:
        source = open_source(sender.address)
        assert isinstance(source, IgtlSource)
        with reading(source) as frames:
            wait_for(lambda: source.counters.get(reason, 0) >= 3)
            refusals = [note for note in source.notes if note.startswith("refused: ")]
            assert len(refusals) == 1 and words in refusals[0], "told once, and not for each message"
            wait_for(lambda: "refused" in source.status)
            assert not frames


@pytest.mark.parametrize("dtype", [np.uint16, np.int16, np.float32])
def test_deep_images_go_through_the_window(dtype: Any) -> None:
    deep = (image(1).astype(np.int64) * 16).astype(dtype)
    with sending(packed(deep)) as sender:
        source = open_source(sender.address, window=(0, 4080))
        with reading(source) as frames:  # type: ignore[arg-type]
            wait_for(lambda: frames)
            np.testing.assert_array_equal(frames[0].pixels, image(1))
    with pytest.raises(InputError, match="window"):
        open_source("igtl://localhost", window=(9, 3))


def test_a_sender_without_crc_is_taken_when_asked_for_and_damage_still_is_not() -> None:
    good, spoilt = without_crc(packed(image(1))), bytearray(packed(image(2)))
    spoilt[-1] ^= 1
    with sending(good, bytes(spoilt)) as sender:
        source = open_source(sender.address, allow_no_crc=True)
        with reading(source) as frames:  # type: ignore[arg-type]
            wait_for(lambda: len(frames) > 2 and source.counters.get("crc", 0) > 2)  # type: ignore[attr-defined]
            for frame in frames:
                np.testing.assert_array_equal(frame.pixels, image(1))


def test_the_chosen_device_stays_chosen_after_a_reconnect() -> None:
    with sending(packed(image(1), "FIRST")) as sender:
        source = open_source(sender.address)
        with reading(source) as frames:  # type: ignore[arg-type]
            wait_for(lambda: frames)
            sender.messages = (packed(image(2), "SECOND"), packed(image(1), "FIRST"))
            sender.hang_up()
            wait_for(lambda: source.counters.get("reconnects", 0) >= 1)  # type: ignore[attr-defined]
            wait_for(lambda: source.counters.get("other_device", 0) >= 3)  # type: ignore[attr-defined]
            before = len(frames)
            wait_for(lambda: len(frames) > before + 2)
            assert all(int(frame.pixels[0, 0]) == int(image(1)[0, 0]) for frame in frames)
            assert any("another device" in note for note in source.notes)  # type: ignore[attr-defined]


def test_a_given_spacing_does_not_outlive_a_change_of_depth_or_size() -> None:
    with sending(packed(image(1))) as sender:
        source = open_source(sender.address, spacing_mm=(0.3, 0.3))
        with reading(source) as frames:  # type: ignore[arg-type]
            wait_for(lambda: frames)
            assert frames[0].spacing_mm == (0.3, 0.3)
            sender.messages = (packed(np.repeat(image(1), 2, axis=0)),)
            wait_for(lambda: frames[-1].spacing_mm is None)
            assert any("frame size changes" in doubt for doubt in source.doubts)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (None, "the server hung up"),
        (b"SSH-2.0-OpenSSH_9.6\r\n", "half a message came"),
        (b"", "nothing came for 0.2 s"),
    ],
    ids=["hangs up at once", "another server", "silent"],
)
def test_a_connection_without_an_image_says_why_it_ended_and_is_not_made_without_end(
    said: bytes | None, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(igtl, "HALF_MESSAGE_S", 0.2)
    made: list[socket.socket] = []

    def accept() -> None:
        with suppress(OSError):
            while True:
                made.append(listener.accept()[0])
                if said is None:
                    made[-1].close()
                else:
                    made[-1].sendall(said)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=accept, daemon=True).start()
        source = open_source(f"igtl://127.0.0.1:{listener.getsockname()[1]}")
        assert isinstance(source, IgtlSource)
        source.silence_s = 0.2
        start_s = time.monotonic()
        with reading(source):
            wait_for(lambda: any(words in note for note in source.notes))
            wait_for(lambda: words in source.status)
            wait_for(lambda: time.monotonic() - start_s > 0.5)
            assert len(made) <= 5 + 60 * (time.monotonic() - start_s), "it comes again and again without a pause"
        listener.shutdown(socket.SHUT_RDWR)
    for link in made:
        link.close()


def test_a_server_that_sends_no_images_is_named() -> None:
    with sending(wire.pack("VIDEO", bytes(100), wire.IgtlEnvelope(device="US"))) as sender:
        source = open_source(sender.address)
        with reading(source) as frames:  # type: ignore[arg-type]
            wait_for(lambda: any("VIDEO messages and no IMAGE" in note for note in source.notes))  # type: ignore[attr-defined]
            assert not frames


# the loop


class Heard:
    """Events and states of a loop."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def __call__(self, event: StateChange | LiveEvent) -> None:
        if isinstance(event, StateChange) or event.kind is LiveEventKind.SOURCE:
            self.lines.append(event.reason)

    def has(self, words: str) -> bool:
        return any(words in line for line in self.lines)


def nobody() -> str:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return f"igtl://127.0.0.1:{taken.getsockname()[1]}"


@pytest.mark.parametrize(
    ("address", "words"), [("", "nobody listens"), ("igtl://no.such.host.invalid", "no such host")]
)
def test_connecting_is_told_and_giving_up_is_an_error(
    plug_in: type[NumpyEngine], fake_bundle: Any, address: str, words: str
) -> None:
    heard = Heard()
    options = LiveOptions(connect_timeout_s=1.0)
    with (
        Session.open(fake_bundle) as session,
        Live(session, open_source(address or nobody()), on_event=heard, advanced=options) as live,
        pytest.raises(NoSourceError, match=words),
    ):
        next(live)
    assert heard.has("connecting to") or heard.has("no connection to")
    assert NoSourceError.exit_code == 6


def test_waiting_and_refusals_are_told_by_the_loop(plug_in: type[NumpyEngine], fake_bundle: Any) -> None:
    heard = Heard()
    with sending(packed(image(1).astype(np.uint16))) as sender:
        options = LiveOptions(connect_timeout_s=3.0)
        with (
            Session.open(fake_bundle) as session,
            Live(session, open_source(sender.address), on_event=heard, advanced=options) as live,
            pytest.raises(NoSourceError, match="--window"),
        ):
            next(live)
    assert heard.has("refused: images of uint16: give --window LO,HI")


def test_a_source_that_comes_in_time_is_not_given_up(plug_in: type[NumpyEngine], fake_bundle: Any) -> None:
    heard = Heard()
    with sending(packed(image(1, 64, 96))) as sender:
        options = LiveOptions(connect_timeout_s=20.0)
        with (
            Session.open(fake_bundle) as session,
            Live(session, open_source(sender.address), on_event=heard, advanced=options) as live,
        ):
            assert next(live).frame.pixels.shape == (64, 96)
            wait_for(lambda: heard.has("receiving from"))
