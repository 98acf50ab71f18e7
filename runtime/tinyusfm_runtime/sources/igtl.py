"""Source ``igtl://HOST:PORT``: pictures of an OpenIGTLink server (PLUS, 3D Slicer, MITK), newest first.

It connects by itself and goes on connecting until it is closed. A burst is drained to its newest picture. Whatever is
damaged is refused and counted; where a message's frame cannot be believed any more, the connection is made anew. STATUS
and any other whole message count as a sign of life, so a frozen probe (messages without pictures) can be told from a
dead link (nothing at all): OpenIGTLink itself notices neither.

Spacing comes from the message's matrix. A matrix of exactly 1 mm both ways is what senders write who know no
millimetres, so it counts as unknown; ``spacing_mm`` overrules it. Orientation comes from PLUS's metadata entry, or from
``orientation``. ``seq`` counts the device's whole messages, those that were overtaken or could not be used included.
A header is not under the CRC: a time that jumps against this machine's clock is counted as ``time_jump``.

It does not know the model, other message types, or video streams inside OpenIGTLink (VIDEO), which count as ignored.
"""

from __future__ import annotations

import re
import selectors
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from types import TracebackType

from tinyusfm_runtime.errors import FrameError, SourceError
from tinyusfm_runtime.frame import Frame, PixelFormat
from tinyusfm_runtime.igtl_stream import EndOfStream, MessageReader
from tinyusfm_runtime.igtl_wire import MAX_BODY_BYTES, PORT, Message, WireError, unpack_image
from tinyusfm_runtime.plugins import Probe
from tinyusfm_runtime.slot import Counters

ADDRESS = re.compile(r"igtl:(?://)?(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9.-]+)(?::(\d{1,5}))?(?:/([^\s/]{1,20}))?")
CONNECT_TIMEOUT_S = 1.0
RETRY_S = (0.02, 0.1)
"""First and longest pause between two attempts to connect; a server that is back is found within the second."""
SILENCE_S = 5.0
"""A connection without a byte for so long is made anew: a host that vanished closes nothing."""
HALF_MESSAGE_S = 2.0
"""A message that has begun must be whole after so long."""
DRAIN_MESSAGES = 128
"""A burst is drained so far before a picture is handed over; PLUS sends up to 100 at once."""
UNKNOWN_SPACING = (1.0, 1.0)
JUMP_NS = 60_000_000_000
"""Source time and reception may drift apart by so much from one picture to the next; more is a jump."""
FORMATS = {1: PixelFormat.GREY, 3: PixelFormat.RGB, 4: PixelFormat.RGBA}
ORIENTATION_KEY = "UltrasoundImageOrientation"


def probe() -> Probe:
    """Always works: standard library and numpy."""
    return Probe(works=True, reason="OpenIGTLink 1 to 3, own receiver", extra=None)


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
) -> IgtlSource:
    """Reads the address; the server need not be there yet.

    Args:
        location: ``igtl://HOST:PORT`` or ``igtl://HOST:PORT/DEVICE``; the port is 18944 if it is left out.
        spacing_mm: (row, column) spacing that overrules the server's, mm, or None.
        orientation: PLUS letters that overrule the server's, or None.
        device: name of the only device whose pictures are wanted; None takes the first one that sends any.
        silence_s: a connection without a byte for so long is made anew, more than 0.

    Returns:
        The source.

    Raises:
        SourceError: the address or an option cannot be used.
    """
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
    )


class IgtlSource:
    """A receiver that works in the thread that iterates; ``close`` may come from any other."""

    def __init__(
        self,
        address: tuple[str, int],
        *,
        device: str | None = None,
        spacing_mm: tuple[float, float] | None = None,
        orientation: str | None = None,
        silence_s: float = SILENCE_S,
    ) -> None:
        self.address, self.device, self.silence_s = address, device, silence_s
        self.spacing_mm, self.orientation = spacing_mm, orientation
        self.notes: tuple[str, ...] = ()
        self.tally = Counters()
        self._contact_ns: int | None = None
        self._closed = False
        self._turn = threading.Lock()
        self._ear, self._bell = socket.socketpair()
        self._link: Link | None = None
        self._links = 0
        self._seq = -1
        self._chosen: str | None = device
        self._times_ns: tuple[int, int] | None = None

    def __enter__(self) -> IgtlSource:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
        with self._turn:
            self._hang_up()

    @property
    def last_contact_ns(self) -> int | None:
        """``time.monotonic_ns`` of the last whole message, or None before the first."""
        return self._contact_ns

    @property
    def counters(self) -> Mapping[str, int]:
        """What was refused, by reason; overtaken pictures, keep-alives, other devices, new connections."""
        return self.tally.snapshot()

    def close(self) -> None:
        """Ends the iteration within CONNECT_TIMEOUT_S; closing twice is harmless."""
        if not self._closed:
            self._closed = True
            # closing this end is what the iterating thread wakes from
            self._bell.close()
            if self._turn.acquire(blocking=False):
                self._hang_up()
                self._turn.release()

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
                pause_s = RETRY_S[0]
                frame = self._next_frame(self._link)
            if frame is not None and not self._closed:
                yield frame
        with self._turn:
            self._hang_up()

    def _connect(self) -> Link | None:
        sock = _connected(self.address)
        if sock is None:
            self.tally.add("no_connection")
            return None
        self._links += 1
        if self._links > 1:
            self.tally.add("reconnects")
        self._chosen = self.device
        return Link(sock, self._ear)

    def _hang_up(self) -> None:
        link, self._link = self._link, None
        if link is not None:
            link.close()
        if self._closed:
            self._ear.close()

    def _wait(self, seconds: float) -> None:
        if self._closed:
            return
        with selectors.DefaultSelector() as selector:
            selector.register(self._ear, selectors.EVENT_READ)
            selector.select(seconds)

    def _next_frame(self, link: Link) -> Frame | None:
        """The newest picture that is there, None after a time without one or where the link was lost."""
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
                self.tally.add(error.reason)
                if not link.reader.in_step:
                    self._hang_up()
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

    def _lose(self, link: Link) -> None:
        half_ns = link.reader.half_since_ns
        self.tally.add("half" if half_ns is not None else "silent")
        self._hang_up()

    def _end(self, half: bool) -> None:
        if half:
            self.tally.add("half")
        self._hang_up()

    def _frame(self, message: Message, t_recv_ns: int) -> Frame | None:
        header = message.header
        if header.kind != "IMAGE":
            self.tally.add("keep_alives" if header.kind == "STATUS" else "ignored")
            return None
        if self._chosen is None:
            self._chosen = header.device
        if header.device != self._chosen:
            self.tally.add("other_device")
            return None
        self._seq += 1
        self._watch_time(header.t_unix_ns, t_recv_ns)
        try:
            image = unpack_image(message)
            channels = 1 if image.pixels.ndim == 2 else image.pixels.shape[2]
            if channels not in FORMATS:
                raise WireError("type", f"pictures of {channels} channels are not known")
            known = None if image.spacing_mm == UNKNOWN_SPACING else image.spacing_mm
            return Frame(
                pixels=image.pixels,
                pixel_format=FORMATS[channels],
                spacing_mm=self.spacing_mm or known,
                seq=self._seq,
                t_source_ns=header.t_unix_ns or None,
                t_recv_ns=t_recv_ns,
                orientation=self.orientation or message.metadata.get(ORIENTATION_KEY, "")[:2] or None,
            )
        except WireError as error:
            self.tally.add(error.reason)
        except FrameError:
            self.tally.add("type")
        return None

    def _watch_time(self, t_source_ns: int, t_recv_ns: int) -> None:
        before, self._times_ns = self._times_ns, (t_source_ns, t_recv_ns)
        if before is not None and abs((t_source_ns - before[0]) - (t_recv_ns - before[1])) > JUMP_NS:
            self.tally.add("time_jump")


def _connected(address: tuple[str, int]) -> socket.socket | None:
    """A connection to the first address of a host that answers, or None."""
    try:
        found = socket.getaddrinfo(*address, type=socket.SOCK_STREAM)
    except OSError:
        return None
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
        except OSError:
            pass
        sock.close()
    return None


class Link:
    """One connection, and the bell that interrupts waiting for it."""

    def __init__(self, sock: socket.socket, ear: socket.socket) -> None:
        sock.setblocking(False)
        self._sock, self._ear = sock, ear
        self._selector = selectors.DefaultSelector()
        self._selector.register(sock, selectors.EVENT_READ)
        self._selector.register(ear, selectors.EVENT_READ)
        self.reader = MessageReader(sock.recv_into, max_body_bytes=MAX_BODY_BYTES)

    def wait(self, silence_s: float) -> bool:
        """Waits for bytes: True if there are some; False if the time is over or the bell rang."""
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
    "JUMP_NS",
    "ORIENTATION_KEY",
    "RETRY_S",
    "SILENCE_S",
    "UNKNOWN_SPACING",
    "IgtlSource",
    "Link",
    "accepts",
    "open_source",
    "probe",
]
