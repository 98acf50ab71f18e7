"""Source ``igtl://HOST:PORT``: images of an OpenIGTLink server.

PLUS, 3D Slicer, MITK; newest first.

It connects by itself and goes on connecting until it is closed. A burst is drained to its newest image. Whatever is
damaged is refused and counted; where a message's frame cannot be trusted, the connection is reopened. STATUS
and any other whole message count as a sign of life, so a frozen probe (messages without images) can be distinguished
from a dead link (nothing at all): OpenIGTLink itself notices neither.

Spacing comes from the message's matrix. A matrix of exactly 1 mm both ways is what senders write who know no
millimetres, so it counts as unknown; ``spacing_mm`` overrules it. Orientation comes from PLUS's metadata entry, or from
``orientation``. ``seq`` counts the device's whole messages, those that were overtaken or could not be used included.
A header is not under the CRC: a time that jumps against this machine's clock is counted as ``time_jump``.

What is refused is counted, and the first of each kind becomes a note that says how to mend it; ``status`` says what the
connection is at. Images of more than 8 bits, and floats, need a window.

It does not know the model, other message types, or video streams inside OpenIGTLink (VIDEO), which count as ignored.
"""

from __future__ import annotations

import re
import selectors
import socket
import time
from collections.abc import Iterator

import numpy as np

from tinyusfm_runtime.errors import FrameError, SourceError
from tinyusfm_runtime.frame import Frame, PixelFormat
from tinyusfm_runtime.images.window import Window, apply_window, check_window, needs_window
from tinyusfm_runtime.plugins import Availability
from tinyusfm_runtime.sources._orientation import note_orientation
from tinyusfm_runtime.sources._source import PolledSource
from tinyusfm_runtime.sources._spacing import SpacingRule
from tinyusfm_runtime.transport.igtl_stream import EndOfStream, MessageReader
from tinyusfm_runtime.transport.igtl_wire import MAX_BODY_BYTES, PORT, IgtlMessage, WireError, unpack_image

ADDRESS = re.compile(r"igtl:(?://)?(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9.-]+)(?::(\d{1,5}))?(?:/([^\s/]{1,20}))?")
CONNECT_TIMEOUT_S = 1.0
RETRY_S = (0.02, 0.1)
"""First and longest pause between two attempts to connect; a server that is back is found within the second."""
SILENCE_S = 5.0
"""A connection without a byte for so long is made again: a host that vanished closes nothing."""
HALF_MESSAGE_S = 2.0
"""A message that has begun must be whole after so long."""
DRAIN_MESSAGES = 128
"""A burst is drained so far before an image is handed over; PLUS sends up to 100 at once."""
MANY_IGNORED = 20
"""So many messages of other types, and no image among them, are worth a note."""
UNKNOWN_SPACING = (1.0, 1.0)
JUMP_NS = 60_000_000_000
"""Source time and reception may drift apart by so much from one image to the next; more is a jump."""
FORMATS = {1: PixelFormat.GREY, 3: PixelFormat.RGB, 4: PixelFormat.RGBA}
ORIENTATION_KEY, TYPE_KEY = "UltrasoundImageOrientation", "UltrasoundImageType"
IMAGE_TYPES = ("BRIGHTNESS", "RGB_COLOR", "")
"""PLUS's image types that are images; the others are lines before scan conversion."""
REFUSED = "OpenIGTLink message refused: "
HINTS = {
    "no_crc": "switch its CRC on, or give --allow-no-crc",
    "crc": "the link or its sender damages messages",
    "size": "check that the sender speaks OpenIGTLink 1 to 3",
    "header": "check that an OpenIGTLink server of version 1 to 3 is at this address",
    "time": "set the sender's clock",
    "geometry": "check the sender's matrix and spacing",
    "content": "send whole 2D images of 1, 3 or 4 channels",
    "rf": "let the sender scan-convert them to B-mode",
}
"""Reason of a refusal -> how to mend it."""


def available() -> Availability:
    """Always works: standard library and numpy."""
    return Availability(usable=True, reason="OpenIGTLink 1 to 3, own receiver", extra=None)


def accepts(location: str) -> bool:
    """True for the scheme ``igtl:``."""
    return location.startswith("igtl:")


def open_source(
    location: str,
    *,
    spacing_mm: tuple[float, float] | None = None,
    orientation: str | None = None,
    device: str | None = None,
    silence_s: float = SILENCE_S,
    window: Window | None = None,
    allow_no_crc: bool = False,
) -> IgtlSource:
    """Reads the address; the server need not be there yet.

    Args:
        location: ``igtl://HOST:PORT`` or ``igtl://HOST:PORT/DEVICE``; the port is 18944 if it is left out.
        spacing_mm: (row, column) spacing that overrules the server's, mm, or None.
        orientation: PLUS letters that overrule the server's, or None.
        device: name of the only device whose images are wanted; None takes the first one that sends any.
        silence_s: a connection without a byte for so long is made again, more than 0.
        window: (code that becomes 0, code that becomes 255) for images of more than 8 bits, or None to refuse them.
        allow_no_crc: take images of a sender that writes no CRC (0); damage on the way then shows as noise.

    Returns:
        The source.

    Raises:
        InputError: the window has no two ends.
        SourceError: the address or an option cannot be used.
    """
    if window is not None:
        check_window(window)
    match = ADDRESS.fullmatch(location)
    port = int(match[2] or PORT) if match else 0
    if match is None or not 0 < port < 65536:
        raise SourceError("an OpenIGTLink source is written igtl://HOST:PORT or igtl://HOST:PORT/DEVICE")
    if silence_s <= 0:
        raise SourceError(f"silence_s {silence_s}: give more than 0 seconds")
    return IgtlSource(
        (match[1].strip("[]"), port),
        device=device or match[3],
        spacing_mm=spacing_mm,
        orientation=orientation,
        silence_s=silence_s,
        window=window,
        allow_no_crc=allow_no_crc,
    )


class IgtlSource(PolledSource):
    """A receiver that works in the thread that iterates.

    ``close`` may come from any other. ``last_contact_ns`` is of the last whole message; ``counters`` hold what was
    refused, by reason, overtaken images, keep-alives, other devices and new connections.
    """

    def __init__(
        self,
        address: tuple[str, int],
        *,
        device: str | None = None,
        spacing_mm: tuple[float, float] | None = None,
        orientation: str | None = None,
        silence_s: float = SILENCE_S,
        window: Window | None = None,
        allow_no_crc: bool = False,
    ) -> None:
        self.address, self.device, self.silence_s = address, device, silence_s
        self.spacing_mm, self.orientation, self.window, self.allow_no_crc = (
            spacing_mm,
            orientation,
            window,
            allow_no_crc,
        )
        super().__init__()
        self.status = f"connecting to {self._where}"
        self._rule = SpacingRule(spacing_mm, self.findings)
        self._refused, self._reported = "", set[str]()
        self._closed = False
        self._wake_r, self._wake_w = socket.socketpair()
        self._link: Connection | None = None
        self._links = 0
        self._seq = -1
        self._ended = ""
        self._link_seq = -1
        self._chosen: str | None = device
        self._times_ns: tuple[int, int] | None = None

    @property
    def _where(self) -> str:
        host, port = self.address
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    @property
    def _is_linked(self) -> bool:
        return self._link is not None

    def _refuse(self, reason: str, text: str) -> None:
        self.tally.add(reason)
        hint = HINTS.get(reason, "")
        self._refused = text.removeprefix(REFUSED) + (hint and f": {hint}")
        if reason not in self._reported:
            self._reported.add(reason)
            self.findings.note(f"refused: {self._refused}")

    def close(self) -> None:
        """Ends the iteration within CONNECT_TIMEOUT_S; idempotent."""
        if not self._closed:
            self._closed = True
            # closing this end is what the iterating thread wakes from
            self._wake_w.close()
            self._release_if_idle()

    def __iter__(self) -> Iterator[Frame]:
        pause_s = RETRY_S[0]
        while not self._closed:
            with self._turn:
                if self._link is None:
                    self._link = self._connect()
                if self._link is None:
                    self._wait(pause_s)
                    pause_s = min(2 * pause_s, RETRY_S[1])
                    continue
                frame = self._next_frame(self._link)
                if frame is not None:
                    pause_s = RETRY_S[0]
                elif not self._is_linked:  # lost without an image: a server that hangs up at once is not hammered
                    self._wait(pause_s)
                    pause_s = min(2 * pause_s, RETRY_S[1])
            if frame is not None and not self._closed:
                yield frame
        with self._turn:
            self._release()

    def _connect(self) -> Connection | None:
        sock = _connected(self.address)
        if isinstance(sock, str):
            self.tally.add("no_connection")
            self.status = f"no connection to {self._where} ({sock}); trying on"
            return None
        ended = f"; the connection before it ended: {self._ended}" if self._ended else ""
        self.status = f"connected to {self._where}, waiting for the first image{ended}"
        self._links, self._link_seq = self._links + 1, self._seq
        if self._links > 1:
            self.tally.add("reconnects")
        return Connection(sock, self._wake_r, allow_no_crc=self.allow_no_crc)

    def _release(self) -> None:
        link, self._link = self._link, None
        if link is not None:
            link.close()
        if self._closed:
            self._wake_r.close()

    def _wait(self, seconds: float) -> None:
        if self._closed:
            return
        with selectors.DefaultSelector() as selector:
            selector.register(self._wake_r, selectors.EVENT_READ)
            selector.select(seconds)

    def _next_frame(self, link: Connection) -> Frame | None:
        """The newest image that is there, else None.

        None after a time without one or where the link was lost.
        """
        newest: Frame | None = None
        for _ in range(DRAIN_MESSAGES):
            try:
                message, t_recv_ns = link.reader.read()
            except BlockingIOError:
                if newest is not None or self._closed:
                    break
                if not link.wait(self.silence_s):
                    if not self._closed:
                        self._lose(link)
                    return None
            except WireError as error:
                self._refuse(error.reason, str(error))
                self.status = f"connected to {self._where}, but messages are refused: {self._refused}"
                self._ended = self._refused
                if not link.reader.in_step:
                    self._release()
                    break
            except EndOfStream as error:
                self._end(half=error.half)
                break
            except OSError:
                self._end(half=link.reader.half_since_ns is not None)
                break
            else:
                self._contact_ns = t_recv_ns
                frame = self._frame(message, t_recv_ns)
                if frame is not None:
                    if newest is not None:
                        self.tally.add("overtaken")
                    newest = frame
        return newest

    def _lose(self, link: Connection) -> None:
        half = link.reader.half_since_ns is not None
        self.tally.add("half" if half else "silent")
        if half:
            self._say_ended(f"half a message came, and then nothing: {HINTS['header']}")
        elif self._seq < 0:
            self._say_ended(f"nothing came for {self.silence_s:g} s: let the server send images")
        self._release()

    def _end(self, half: bool) -> None:
        if half:
            self.tally.add("half")
        self._say_ended(f"the server hung up: {HINTS['header']}, with room for one more client")
        self._release()

    def _say_ended(self, text: str) -> None:
        """Keeps why a connection without an image ended, as a note too."""
        if self._seq == self._link_seq and not self._refused and not self._closed:
            self._ended = text
            self.findings.note(f"no image came: {text}")

    def _frame(self, message: IgtlMessage, t_recv_ns: int) -> Frame | None:
        header = message.header
        if header.kind != "IMAGE":
            self._ignore(header.kind)
            return None
        if self._chosen is None:
            self._chosen = header.device
        if header.device != self._chosen:
            self.tally.add("other_device")
            self.findings.note(
                "images of another device than the chosen one are left out: name the wanted one, igtl://HOST:PORT/DEVICE"
            )
            return None
        self._seq += 1
        self._ended = ""
        self._watch_time(header.t_unix_ns, t_recv_ns)
        try:
            image = unpack_image(message)
            channels = 1 if image.pixels.ndim == 2 else image.pixels.shape[2]
            if channels not in FORMATS:
                raise WireError("type", f"images of {channels} channels are not known")
            known = None if image.spacing_mm == UNKNOWN_SPACING else image.spacing_mm
            if message.metadata.get(TYPE_KEY, "").upper() not in IMAGE_TYPES:
                raise WireError("rf", "the images are lines before scan conversion")
            pixels = self._eight_bits(image.pixels)
            orientation = self.orientation or message.metadata.get(ORIENTATION_KEY, "")[:2] or None
            note_orientation(orientation, self.findings)
            self.status = f"receiving from {self._where}"
            return Frame(
                pixels=pixels,
                pixel_format=FORMATS[channels],
                spacing_mm=self._rule.of(pixels.shape, known),
                seq=self._seq,
                t_source_ns=header.t_unix_ns or None,
                t_recv_ns=t_recv_ns,
                orientation=orientation,
            )
        except WireError as error:
            self._refuse(error.reason, str(error))
        except FrameError as error:
            self._refuse("type", str(error))
        self.status = f"connected to {self._where}, but its images are refused: {self._refused}"
        return None

    def _ignore(self, kind: str) -> None:
        """Counts a message that carries no image; a server that sends no others is named."""
        self.tally.add("keep_alives" if kind == "STATUS" else "ignored")
        if kind != "STATUS" and self._seq < 0 and self.counters.get("ignored", 0) >= MANY_IGNORED:
            self.findings.note(f"the server sends {kind} messages and no IMAGE: let it send images, uncompressed")

    def _eight_bits(self, pixels: np.ndarray) -> np.ndarray:
        if pixels.dtype == np.uint8:
            return pixels
        if self.window is None:
            raise needs_window(f"images of {pixels.dtype}")
        return apply_window(pixels, self.window)

    def _watch_time(self, t_source_ns: int, t_recv_ns: int) -> None:
        before, self._times_ns = self._times_ns, (t_source_ns, t_recv_ns)
        if before is not None and abs((t_source_ns - before[0]) - (t_recv_ns - before[1])) > JUMP_NS:
            self.tally.add("time_jump")


def _connected(address: tuple[str, int]) -> socket.socket | str:
    """A connection to the first address of a host that answers, or why there is none."""
    try:
        found = socket.getaddrinfo(*address, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return "no such host"
    reason = "nobody listens"
    for family, kind, protocol, _, place in found:
        sock = socket.socket(family, kind, protocol)
        try:
            sock.settimeout(CONNECT_TIMEOUT_S)
            sock.bind(("", 0))
            # a port of the ephemeral range with nobody behind it can be connected to itself, and is then taken
            # from the server that is about to come back
            if sock.getsockname()[1] != address[1]:
                sock.connect(place)
                return sock
        except OSError as error:
            known = {TimeoutError: "no answer", ConnectionRefusedError: "nobody listens"}
            reason = known.get(type(error)) or error.strerror or type(error).__name__
        sock.close()
    return reason


class Connection:
    """One connection, and the bell that interrupts waiting for it."""

    def __init__(self, sock: socket.socket, wake_r: socket.socket, *, allow_no_crc: bool = False) -> None:
        sock.setblocking(False)
        self._sock, self._wake_r = sock, wake_r
        self._selector = selectors.DefaultSelector()
        self._selector.register(sock, selectors.EVENT_READ)
        self._selector.register(wake_r, selectors.EVENT_READ)
        self.reader = MessageReader(sock.recv_into, max_body_bytes=MAX_BODY_BYTES, allow_no_crc=allow_no_crc)

    def wait(self, silence_s: float) -> bool:
        """Waits for bytes: True if there are some.

        False if the time is over or the wake-up socket was written.
        """
        half_ns = self.reader.half_since_ns
        if half_ns is not None:
            silence_s = min(silence_s, HALF_MESSAGE_S - (time.monotonic_ns() - half_ns) / 1e9)
        if silence_s <= 0:
            return False
        events = self._selector.select(silence_s)
        return any(key.fileobj is self._sock for key, _ in events) and len(events) == 1

    def close(self) -> None:
        """Ends the connection."""
        self._selector.close()
        self._sock.close()


__all__ = [
    "ADDRESS",
    "CONNECT_TIMEOUT_S",
    "DRAIN_MESSAGES",
    "FORMATS",
    "HALF_MESSAGE_S",
    "HINTS",
    "IMAGE_TYPES",
    "JUMP_NS",
    "MANY_IGNORED",
    "ORIENTATION_KEY",
    "REFUSED",
    "RETRY_S",
    "SILENCE_S",
    "TYPE_KEY",
    "UNKNOWN_SPACING",
    "Connection",
    "IgtlSource",
    "accepts",
    "available",
    "open_source",
]
