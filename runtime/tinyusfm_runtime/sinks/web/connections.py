"""Connections of the live page's server, and their limits.

How long one may take over its request, and how many one address may hold.

Whoever opens connections and says nothing on them must not lock others out, with or without the page's key. So a
connection has ``HEADER_S`` for its request and ``IDLE_S`` until the next; an address, and all addresses together, have
a number of them, and where it is reached the oldest that is waiting for a request makes room. WebSockets do not count:
the page has its own number of browsers. It knows uvicorn's protocol for HTTP/1.1 and nothing of the page.
"""

from __future__ import annotations

import asyncio
from typing import Any

HEADER_S = 5.0
"""From opening a connection to the end of its first request."""
IDLE_S = 5
"""From an answer to the next request."""
MAX_CONNECTIONS = 256
MAX_PER_ADDRESS = 32
MAX_HEAD_BYTES = 8192
"""Request line and headers together; longer ones are answered with 400."""


class Registry:
    """The connections that are open, oldest first."""

    def __init__(self) -> None:
        self._open: dict[Any, str] = {}
        self.evicted = self.late = 0
        """Connections that had to make room, and that were too slow."""

    def __len__(self) -> int:
        return len(self._open)

    def add(self, protocol: Any, address: str) -> bool:
        """Takes a connection in; False if there is no room and none could be made."""
        mine = [other for other, whose in self._open.items() if whose == address]
        crowd = mine if len(mine) >= MAX_PER_ADDRESS else list(self._open) if len(self) >= MAX_CONNECTIONS else []
        if crowd:
            idle = next((other for other in crowd if other.is_idle), None)
            if idle is None:
                return False
            self.evicted += 1
            self.remove(idle)
            idle.transport.abort()
        self._open[protocol] = address
        return True

    def remove(self, protocol: Any) -> None:
        """Forgets a connection; idempotent."""
        self._open.pop(protocol, None)


def _end_unanswered(transport: Any) -> None:
    """A handshake that its protocol neither answered nor refused is over."""
    if not getattr(transport.get_protocol(), "handshake_complete", True):
        transport.abort()


def guarded_protocol(registry: Registry) -> Any:
    """uvicorn's protocol class for HTTP/1.1, with the limits of this file.

    Args:
        registry: where its connections are counted.

    Raises:
        ImportError: uvicorn is not installed.
    """
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class GuardedProtocol(H11Protocol):
        """One connection until it ends or becomes a WebSocket."""

        deadline: asyncio.TimerHandle | None = None

        @property
        def is_idle(self) -> bool:
            """Whether it waits for a request."""
            return self.cycle is None or self.cycle.response_complete

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            if not registry.add(self, self.client[0] if self.client else ""):
                transport.abort()
                return
            self.deadline = self.loop.call_later(HEADER_S, self._too_late)

        def connection_lost(self, exc: Exception | None) -> None:
            self._let_go()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.deadline is not None and not self.is_idle:
                self.deadline.cancel()
                self.deadline = None

        def handle_websocket_upgrade(self, event: Any) -> None:
            self._let_go()
            if (
                len(event.target) + sum(len(name) + len(value) + 4 for name, value in self.headers)
                > MAX_HEAD_BYTES - 64
            ):
                self.send_400_response("Invalid HTTP request received.")
                return
            super().handle_websocket_upgrade(event)
            self.loop.call_later(HEADER_S, _end_unanswered, self.transport)

        def on_response_complete(self) -> None:
            super().on_response_complete()
            if not self.transport.is_closing() and self.deadline is None:
                # a request that begins and does not end has no longer than one that does not begin
                self.deadline = self.loop.call_later(IDLE_S + HEADER_S, self._too_late)

        def _too_late(self) -> None:
            self.deadline = None
            if self.is_idle and not self.transport.is_closing():
                registry.late += 1
                self.transport.abort()

        def _let_go(self) -> None:
            registry.remove(self)
            if self.deadline is not None:
                self.deadline.cancel()
                self.deadline = None

    return GuardedProtocol


__all__ = [
    "HEADER_S",
    "IDLE_S",
    "MAX_CONNECTIONS",
    "MAX_HEAD_BYTES",
    "MAX_PER_ADDRESS",
    "Registry",
    "guarded_protocol",
]
