"""The OpenIGTLink source beyond the contract: addresses, devices, keep-alives, bursts, broken framing, silence."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from tests.fakes.live_rigs import image, until
from tinyusfm_runtime.errors import OutputError, SourceError
from tinyusfm_runtime.frame import Frame, PixelFormat
from tinyusfm_runtime.sources import igtl as igtl_source
from tinyusfm_runtime.sources import open_source
from tinyusfm_runtime.transport.igtl_server import IgtlServer, read_listen_address
from tinyusfm_runtime.transport.igtl_wire import IgtlEnvelope, pack, pack_image


def message(index: int, device: str = "probe", **more: Any) -> bytes:
    around = IgtlEnvelope(device=device, t_unix_ns=1_700_000_000_000_000_000 + index * 10_000_000)
    return pack_image(image(index), around, **more)


@pytest.fixture
def server() -> Iterator[IgtlServer]:
    with IgtlServer() as made:
        yield made


def send_when_connected(server: IgtlServer, *pieces: bytes) -> threading.Thread:
    def send() -> None:
        assert until(lambda: server.clients)
        for piece in pieces:
            server.send(piece)

    thread = threading.Thread(target=send)
    thread.start()
    return thread


@pytest.mark.parametrize(
    ("location", "address", "device"),
    [
        ("igtl://host.local:18945", ("host.local", 18945), None),
        ("igtl:10.0.0.7", ("10.0.0.7", 18944), None),
        ("igtl://[::1]:99/Image_Probe", ("::1", 99), "Image_Probe"),
    ],
)
def test_addresses(location: str, address: tuple[str, int], device: str | None) -> None:
    with igtl_source.open_source(location) as source:
        assert (source.address, source.device) == (address, device)


@pytest.mark.parametrize("location", ["igtl://", "igtl://host:0", "igtl://host:70000", "igtl://a b", "igtl://h:1/a/b"])
def test_addresses_that_are_none(location: str) -> None:
    with pytest.raises(SourceError, match="written igtl://HOST:PORT"):
        open_source(location)


def test_a_burst_is_drained_to_its_newest(server: IgtlServer) -> None:
    with open_source(server.address) as source:
        first = send_when_connected(server, message(0))
        frames = iter(source)
        next(frames)
        first.join()
        for index in range(1, 60):
            server.send(message(index))
        time.sleep(0.2)
        frame = next(frames)
        np.testing.assert_array_equal(frame.pixels, image(59))
        assert source.counters["overtaken"] == 58 and frame.seq == 59  # type: ignore[attr-defined]


def test_other_devices_and_types_are_counted_and_left(server: IgtlServer) -> None:
    with open_source(f"{server.address}/mine") as source:
        pieces = [
            message(1, "other"),
            pack("TRANSFORM", b"\0" * 48, IgtlEnvelope(device="tracker")),
            message(2, "mine"),
        ]
        thread = send_when_connected(server, b"".join(pieces))
        np.testing.assert_array_equal(next(iter(source)).pixels, image(2))
        thread.join()
        assert source.counters == {"other_device": 1, "ignored": 1}  # type: ignore[attr-defined]


def test_a_unit_matrix_is_no_spacing_and_options_overrule(server: IgtlServer) -> None:
    with open_source(server.address) as source:
        thread = send_when_connected(server, message(1))
        assert next(iter(source)).spacing_mm is None
        thread.join()
    server.hang_up()
    with open_source(server.address, spacing_mm=(0.1, 0.2), orientation="MN") as source:
        thread = send_when_connected(server, message(1, spacing_mm=(0.5, 0.5)))
        frame = next(iter(source))
        thread.join()
    assert (frame.spacing_mm, frame.orientation) == ((0.1, 0.2), "MN")


def test_colour_of_every_kind_keeps_its_meaning(server: IgtlServer) -> None:
    colour = np.stack([image(1), image(2), image(3)], axis=-1)
    with open_source(server.address) as source:
        thread = send_when_connected(server, server.pack(Frame(pixels=colour, pixel_format=PixelFormat.BGR), 0))
        frame = next(iter(source))
        thread.join()
    assert frame.pixel_format is PixelFormat.RGB
    np.testing.assert_array_equal(frame.pixels, colour[..., ::-1])


@pytest.mark.parametrize("pixels", [np.zeros((16, 16), np.uint16), np.zeros((16, 16, 2), np.uint8)])
def test_images_that_are_no_frames_are_counted(server: IgtlServer, pixels: np.ndarray) -> None:
    with open_source(server.address) as source:
        odd = pack_image(pixels, IgtlEnvelope(device="probe"))
        thread = send_when_connected(server, odd + message(1))
        np.testing.assert_array_equal(next(iter(source)).pixels, image(1))
        thread.join()
        assert source.counters["type"] == 1  # type: ignore[attr-defined]


def test_a_time_that_jumps_is_counted(server: IgtlServer) -> None:
    with open_source(server.address) as source:
        thread = send_when_connected(server, message(1) + message(50_000_000) + message(2))
        next(iter(source))
        thread.join()
        until(lambda: source.counters.get("time_jump"), 1)  # type: ignore[attr-defined]
        assert source.counters["time_jump"] == 2  # type: ignore[attr-defined]


def test_a_stream_out_of_step_is_connected_anew(server: IgtlServer) -> None:
    with open_source(server.address) as source:
        frames = iter(source)
        thread = send_when_connected(server, message(1), b"GET / HTTP/1.1\r\n" * 8)
        next(frames)
        thread.join()
        again: list[Frame] = []
        reader = threading.Thread(target=lambda: again.append(next(frames)))
        reader.start()
        assert until(lambda: server.counts["clients"] == 2)
        server.hang_up()
        assert until(lambda: server.counts["clients"] >= 3 and server.clients)
        server.send(message(2))
        reader.join()
        np.testing.assert_array_equal(again[0].pixels, image(2))
        counters = source.counters  # type: ignore[attr-defined]
        assert counters["header"] == 1 and counters["reconnects"] == server.counts["clients"] - 1


def test_silence_ends_the_connection_and_opens_another(server: IgtlServer) -> None:
    with open_source(server.address, silence_s=0.3) as source:
        reader = threading.Thread(target=lambda: list(source))
        reader.start()
        assert until(lambda: source.counters.get("silent"))  # type: ignore[attr-defined]
        assert until(lambda: server.counts["clients"] >= 2)
        source.close()  # type: ignore[attr-defined]
        reader.join()


def test_half_a_message_ends_the_connection(server: IgtlServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(igtl_source, "HALF_MESSAGE_S", 0.2)
    with open_source(server.address, silence_s=60.0) as source:
        reader = threading.Thread(target=lambda: list(source))
        reader.start()
        assert until(lambda: server.clients)
        server.send(message(1)[:100])
        assert until(lambda: source.counters.get("half"))  # type: ignore[attr-defined]
        assert until(lambda: server.counts["clients"] >= 2)
        source.close()  # type: ignore[attr-defined]
        reader.join()


def test_a_slow_drip_does_not_hold_the_source(server: IgtlServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(igtl_source, "HALF_MESSAGE_S", 0.3)
    with open_source(server.address) as source:
        reader = threading.Thread(target=lambda: list(source))
        reader.start()
        assert until(lambda: server.clients)
        begun = time.monotonic()
        for byte in message(1):
            server.send(bytes([byte]))
            time.sleep(0.02)
            if source.counters.get("half"):  # type: ignore[attr-defined]
                break
        assert time.monotonic() - begun < 5 and source.last_contact_ns is None  # type: ignore[attr-defined]
        source.close()  # type: ignore[attr-defined]
        reader.join()


def test_several_receivers_get_the_same_and_one_that_sleeps_holds_nobody_up(server: IgtlServer) -> None:
    with socket.create_connection((server.host, server.port)):  # never reads
        with open_source(server.address) as one, open_source(server.address) as two:
            got: list[Frame] = []
            threads = [threading.Thread(target=lambda s=s: got.append(next(iter(s)))) for s in (one, two)]  # type: ignore[misc]
            for thread in threads:
                thread.start()
            assert until(lambda: server.clients == 3)
            server.send(message(4))
            for thread in threads:
                thread.join()
        assert len(got) == 2 and all(np.array_equal(frame.pixels, image(4)) for frame in got)
        heavy = pack_image(np.zeros((4000, 4000), np.uint8), IgtlEnvelope(device="probe"))
        assert server.send(heavy) == 0 and server.clients == 0, "who takes nothing is left"


def test_a_taken_port_is_one_clear_error(server: IgtlServer) -> None:
    with pytest.raises(OutputError, match="is in use: give port 0"):
        IgtlServer(port=server.port)


@pytest.mark.parametrize(
    ("text", "want"), [(":0", ("127.0.0.1", 0)), ("18944", ("127.0.0.1", 18944)), ("0.0.0.0:7", ("0.0.0.0", 7))]
)
def test_listen_addresses(text: str, want: tuple[str, int]) -> None:
    assert read_listen_address(text) == want


def test_a_listen_address_that_is_none() -> None:
    with pytest.raises(SourceError, match="HOST:PORT"):
        read_listen_address("port")
