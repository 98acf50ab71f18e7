"""MessageReader: bytes of a non-blocking stream become whole messages.

OpenIGTLink messages, without ever waiting for one.

It keeps a half-received message between calls, asks for memory only after a header has passed its checks, and compares
an image's own size with the header's length as soon as both are there, so that a wrong length is seen at once and not
after megabytes of other messages. It does not know sockets, reconnecting or which messages matter.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from tinyusfm_runtime.transport.igtl_wire import (
    EXTENDED_BYTES,
    HEADER_BYTES,
    IMAGE_HEADER_BYTES,
    MAX_BODY_BYTES,
    IgtlHeader,
    IgtlMessage,
    check_image_start,
    unpack_body,
    unpack_header,
)

ReceiveInto = Callable[[memoryview], int]
"""Fills a buffer as far as bytes are there: how many, 0 at the end of the stream, BlockingIOError if there are none."""
START_BYTES = EXTENDED_BYTES + IMAGE_HEADER_BYTES
"""So much of an image's body tells how long it must be."""


class EndOfStream(Exception):
    """The other side closed the connection.

    ``half`` tells whether it did so inside a message.
    """

    def __init__(self, half: bool) -> None:
        super().__init__("the stream ended")
        self.half = half


class MessageReader:
    """Assembles messages.

    Args:
        receive_into: where bytes come from.
        max_body_bytes: cap on one message.
        check_crc: False only to show that damage would pass without it.
        allow_no_crc: take messages whose sender writes no CRC, which is 0; others are still checked.
    """

    def __init__(
        self,
        receive_into: ReceiveInto,
        *,
        max_body_bytes: int = MAX_BODY_BYTES,
        check_crc: bool = True,
        allow_no_crc: bool = False,
    ) -> None:
        self._receive_into, self._max_body_bytes, self._check_crc = receive_into, max_body_bytes, check_crc
        self._allow_no_crc = allow_no_crc
        self._header, self._body = bytearray(HEADER_BYTES), bytearray()
        self._parsed: IgtlHeader | None = None
        self._have, self._want = 0, HEADER_BYTES
        self._first_ns: int | None = None
        self.in_step = True

    @property
    def half_since_ns(self) -> int | None:
        """``time.monotonic_ns`` of the first byte of a half message, or None.

        A half message is one that is not whole yet; None between messages.
        """
        return self._first_ns

    def read(self) -> tuple[IgtlMessage, int]:
        """Goes on with the current message.

        Returns:
            The message and ``time.monotonic_ns`` of its first byte.

        Raises:
            BlockingIOError: it is not whole yet.
            EndOfStream: the other side is gone.
            WireError: it must be refused. Reason ``crc`` leaves the stream in step; after any other that stems from
                framing, ``in_step`` is False and only a new connection helps.
        """
        while True:
            room = memoryview(self._header if self._parsed is None else self._body)[self._have : self._want]
            if len(room):
                self._fill(room)
            if self._have < self._want:
                continue
            if self._parsed is None:
                self._parsed = self._take_header()
                self._body = bytearray(self._parsed.body_bytes)
                self._have, self._want = 0, self._first_part(self._parsed)
            elif self._want < len(self._body):
                self._check_start(self._parsed)
                self._want = len(self._body)
            else:
                parsed, body, first_ns = self._parsed, self._body, self._first_ns or time.monotonic_ns()
                self._begin()
                check = self._check_crc and not (self._allow_no_crc and parsed.crc == 0)
                return unpack_body(parsed, body, check_crc=check), first_ns

    def _begin(self) -> None:
        self._header, self._body, self._parsed = bytearray(HEADER_BYTES), bytearray(), None
        self._have, self._want = 0, HEADER_BYTES
        self._first_ns = None
        self.in_step = True

    def _first_part(self, header: IgtlHeader) -> int:
        return min(START_BYTES, header.body_bytes) if header.kind == "IMAGE" else header.body_bytes

    def _fill(self, room: memoryview) -> None:
        count = self._receive_into(room)
        if count == 0:
            raise EndOfStream(half=self._first_ns is not None)
        if self._first_ns is None:
            self._first_ns = time.monotonic_ns()
        self._have += count

    def _take_header(self) -> IgtlHeader:
        self.in_step = False
        header = unpack_header(self._header, max_body_bytes=self._max_body_bytes)
        self.in_step = True
        return header

    def _check_start(self, header: IgtlHeader) -> None:
        self.in_step = False
        check_image_start(header, self._body[: self._want])
        self.in_step = True


__all__ = ["START_BYTES", "EndOfStream", "MessageReader", "ReceiveInto"]
