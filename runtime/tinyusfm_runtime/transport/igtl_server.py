"""IgtlServer: frames as an OpenIGTLink server.

For several clients at once, header version 1 or 2.

One thread accepts, and whoever calls ``send`` writes to everybody. A client that does not read loses its connection
rather than holding up the others. Between frames the caller sends keep-alives. It does not know pacing or faults.
"""

from __future__ import annotations

import errno
import socket
import threading
import time
from contextlib import suppress

from tinyusfm_runtime.errors import OutputError, SourceError
from tinyusfm_runtime.frame import Frame, PixelFormat
from tinyusfm_runtime.transport.closing import ClosedOnExit
from tinyusfm_runtime.transport.igtl_wire import IgtlEnvelope, pack_image, pack_status

DEVICE = "Image_Probe"
SEND_TIMEOUT_S = 0.5
"""A client that takes nothing for so long is left (PLUS's own limit)."""
MAX_CLIENTS = 16
PAUSE_S = 0.1
"""After a connection that could not be taken."""


class IgtlServer(ClosedOnExit):
    """Listens from the moment it is made.

    Args:
        host: address to listen on; only this machine by default.
        port: 0 takes any that is free.
        header_version: 1 for protocols 1 and 2, 2 for protocol 3.
        device: name in every message.

    Attributes:
        port: the one it listens on.

    Raises:
        OutputError: the address cannot be listened on.
    """

    def __init__(
        self, *, host: str = "127.0.0.1", port: int = 0, header_version: int = 1, device: str = DEVICE
    ) -> None:
        self.header_version, self.device = header_version, device
        try:
            self._listener = socket.create_server((host, port))
        except (OSError, OverflowError) as error:
            if getattr(error, "errno", None) == errno.EADDRINUSE:
                raise OutputError(f"port {port} is in use: give port 0 for a free one, or another one") from error
            raise OutputError(f"cannot listen on port {port}: {getattr(error, 'strerror', None) or error}") from error
        self.host, self.port = self._listener.getsockname()[:2]
        self._lock = threading.Lock()
        self._clients: list[socket.socket] = []
        self.counts = {"clients": 0, "clients_lost": 0, "messages": 0}
        self._thread = threading.Thread(target=self._accept, name="igtl-server", daemon=True)
        self._thread.start()

    @property
    def address(self) -> str:
        """What a receiver is given."""
        return f"igtl://{self.host}:{self.port}"

    @property
    def clients(self) -> int:
        """How many are connected."""
        with self._lock:
            return len(self._clients)

    def pack(self, frame: Frame, t_unix_ns: int) -> bytes:
        """A frame as a message.

        Args:
            frame: grey, RGB, BGR (becomes RGB) or RGBA.
            t_unix_ns: the time to write into it, ns since 1970.

        Returns:
            The bytes of the message.

        Raises:
            WireError: the frame cannot be said in this protocol.
        """
        pixels = frame.pixels[..., ::-1] if frame.pixel_format is PixelFormat.BGR else frame.pixels
        metadata = {"UltrasoundImageOrientation": frame.orientation} if frame.orientation else {}
        around = IgtlEnvelope(
            device=self.device,
            t_unix_ns=t_unix_ns,
            header_version=self.header_version,
            message_id=frame.seq & 0xFFFFFFFF,
            metadata=metadata,
        )
        return pack_image(pixels, around, spacing_mm=frame.spacing_mm)

    def keep_alive(self) -> None:
        """Sends a STATUS message to everybody."""
        around = IgtlEnvelope(device=self.device, t_unix_ns=time.time_ns(), header_version=self.header_version)
        self.send(pack_status(around))

    def send(self, data: bytes) -> int:
        """Sends bytes to everybody.

        Args:
            data: a message, or a part of one if that is wanted.

        Returns:
            How many clients took them.
        """
        with self._lock:
            clients = list(self._clients)
        lost = []
        for client in clients:
            try:
                client.sendall(data)
            except OSError:
                lost.append(client)
        for client in lost:
            self._drop(client)
        self.counts["messages"] += 1
        return len(clients) - len(lost)

    def hang_up(self) -> None:
        """Drops every client; they may come again."""
        with self._lock:
            clients = list(self._clients)
        for client in clients:
            self._drop(client)

    def close(self) -> None:
        """Drops every client and stops listening; idempotent."""
        with suppress(OSError):
            # wakes the accepting thread, which close() alone does not
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()
        self.hang_up()

    def _drop(self, client: socket.socket) -> None:
        with self._lock:
            if client not in self._clients:
                return
            self._clients.remove(client)
            self.counts["clients_lost"] += 1
        client.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                if self._listener.fileno() < 0:
                    return
                time.sleep(PAUSE_S)  # out of descriptors, or the client went away: the next one may come in
                continue
            client.settimeout(SEND_TIMEOUT_S)
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._lock:
                if len(self._clients) < MAX_CLIENTS:
                    self._clients.append(client)
                    self.counts["clients"] += 1
                    continue
            client.close()


def read_listen_address(text: str) -> tuple[str, int]:
    """``HOST:PORT``, ``:PORT`` or ``PORT`` as host and port.

    Args:
        text: what was typed; without a host it is this machine only.

    Returns:
        Host and port, 0 .. 65535.

    Raises:
        SourceError: it is none of these.
    """
    host, _, port = text.rpartition(":")
    if not port.isdecimal() or int(port) > 65535:
        raise SourceError(f"an address to listen on is written HOST:PORT or :PORT, not {text!r}")
    return host.strip("[]") or "127.0.0.1", int(port)


__all__ = ["DEVICE", "MAX_CLIENTS", "PAUSE_S", "SEND_TIMEOUT_S", "IgtlServer", "read_listen_address"]
