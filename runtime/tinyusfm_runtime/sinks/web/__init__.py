"""Sink: a page that shows what the loop sees.

Served to browsers by Starlette and uvicorn in a thread of its own.

``web://HOST:PORT``; without a host it listens on this machine alone. The page and its three files
come with the package; nothing is fetched from anywhere else, and a strict content security policy
keeps it so. A browser gets one frame at a time: the next is sent when it has said that it drew the
last, and it is then the newest, so a slow browser sees fewer frames and the loop waits for nobody.

Who may look: requests must name a host by address, as ``localhost`` or as this machine (no rebinding
of foreign names), and a WebSocket must come from the page itself (same origin). Where the page is
served to other machines, its address carries a key, made again each time; without it no image is sent.

What is sent is defined in live_page.py. It knows no frame source and no engine.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hmac
import ipaddress
import logging
import secrets
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from tinyusfm_runtime.errors import MissingExtra, OutputError
from tinyusfm_runtime.frame import Frame
from tinyusfm_runtime.plugins import Availability
from tinyusfm_runtime.results import LiveCounters, LiveEvent, LiveResult, Prediction, StateChange
from tinyusfm_runtime.sinks import listen_address
from tinyusfm_runtime.sinks.web.connections import IDLE_S, MAX_HEAD_BYTES, Registry, guarded_protocol
from tinyusfm_runtime.sinks.web.feed import PageFeed, PageImage
from tinyusfm_runtime.transport.closing import ClosedOnExit

_log = logging.getLogger(__name__)
PORT = 8765
MAX_CLIENTS = 8
IN_FLIGHT = 2
"""Frames a browser may have received and not yet drawn."""
STILL_S = 10.0
"""A browser that has drawn nothing of what it was sent for so long makes room for another when there is none."""
STATUS_EVERY_S = 0.25
"""State and counters are sent so often when no frame comes."""
START_S = 10.0
RESTART_S = 0.2
"""Pause before a part of the server that failed begins again."""
EXTRA_ACKS = 64
"""So many frames more than it was sent a browser may claim to have drawn; then it is no page of ours."""
PAGE = Path(__file__).with_name("page")
FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/live.css": ("live.css", "text/css; charset=utf-8"),
    "/live.js": ("live.js", "text/javascript; charset=utf-8"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}
SECURITY_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Cache-Control": "no-store",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


def available() -> Availability:
    """Works where Starlette, uvicorn and websockets are installed."""
    try:
        import starlette
        import uvicorn
        import websockets  # noqa: F401
    except ImportError as error:
        return Availability(usable=False, reason=f"{error.name or 'a library'} is not installed", extra="live")
    except Exception as error:  # a broken installation may raise anything
        return Availability(
            usable=False, reason=f"Starlette or uvicorn is broken: {type(error).__name__}", extra="live"
        )
    return Availability(
        usable=True, reason=f"Starlette {starlette.__version__}, uvicorn {uvicorn.__version__}", extra="live"
    )


def open_sink(
    location: str,
    *,
    title: str = "",
    labels: Sequence[str] = (),
    budget_ms: float | None = None,
    overlay_ms: float = 1000.0,
) -> WebSink:
    """Starts the server; ``url`` on the sink is where to look.

    Args:
        location: ``//HOST:PORT``; an empty host is 127.0.0.1, port 0 any that is free.
        title: model and bundle, for people.
        labels: of the model.
        budget_ms: age above which a result is stale, shown on the page, or None.
        overlay_ms: age above which the page takes an overlay off.

    Raises:
        InputError: the location cannot be read.
        OutputError: the address cannot be listened on.
        MissingExtra: Starlette or uvicorn is not installed.
    """
    host, port = listen_address(location, PORT)
    feed = PageFeed(title=title, labels=labels, budget_ms=budget_ms, overlay_ms=overlay_ms)
    return WebSink(feed, host, port)


class WebSink(ClosedOnExit):
    """The page's server. ``write_live`` costs the loop a copy of the frame.

    Attributes:
        url: address of the page, with its key where it has one.
        host: address it listens on.
        port: port it listens on.
        key: what a browser must know, or None where only this machine is listened to.
    """

    def __init__(self, feed: PageFeed, host: str, port: int) -> None:
        self.feed, self.host = feed, host
        self._socket = _listen(host, port)
        self.port = int(self._socket.getsockname()[1])
        self.key = None if _is_loopback(host) else secrets.token_urlsafe(16)
        shown_host = f"[{host}]" if ":" in host else host
        self.url = f"http://{shown_host}:{self.port}/" + ("" if self.key is None else f"?key={self.key}")
        try:
            self._server = _PageServer(self)
        except BaseException:
            self._socket.close()
            raise
        self._index = 0

    @property
    def restarts(self) -> int:
        """How often a part of the server failed and was begun again."""
        return self._server.restarts

    @property
    def clients(self) -> int:
        """Browsers that are looking now."""
        return len(self._server.clients)

    def watch(self, counters: Callable[[], LiveCounters]) -> None:
        """Names the loop's counters; they are asked for in the server's thread."""
        self.feed.counters = counters

    def write(self, frame: Frame, prediction: Prediction) -> None:
        """Shows one result from outside the live loop."""
        self.write_live(LiveResult.outside_loop(frame, prediction, self._index))

    def write_live(self, result: LiveResult) -> None:
        """Shows one result of the live loop."""
        self._index = result.index + 1
        self.feed.add(result)
        self._server.wake(frame=True)

    def on_state(self, change: StateChange) -> None:
        """Shows a change of state."""
        self.feed.change(change)
        self._server.wake(frame=False)

    def on_event(self, event: LiveEvent) -> None:
        """Shows an event of the loop, such as another artefact that answers from now on.

        From any thread.
        """
        self.feed.event(event)
        self._server.wake(frame=False)

    def end(self, reason: str) -> None:
        """Says on the page that nothing more will come; the page stays up."""
        self.feed.end(reason)
        self._server.wake(frame=False)

    def close(self) -> None:
        """Stops the server and lets the browsers go. Idempotent."""
        self._server.stop()
        self._socket.close()


class _Client:
    """What the server keeps of one browser."""

    def __init__(self) -> None:
        self.news = asyncio.Event()
        self.state_changed = True
        self.status_s = 0.0
        self.after = 0
        self.drawn = self.sent = 0
        self.last_number = -1
        self.skipped = 0
        self.heard_s = time.monotonic()
        self.tasks: list[asyncio.Task[None]] = []

    @property
    def still_s(self) -> float:
        """How long it has drawn nothing of what it was sent, s; 0 where it has drawn all."""
        return time.monotonic() - self.heard_s if self.sent > self.drawn else 0.0


class _PageServer:
    """uvicorn in a thread with an event loop of its own.

    One task encodes for all; one task per browser sends.
    """

    def __init__(self, sink: WebSink) -> None:
        self._sink, self._feed = sink, sink.feed
        self.clients: set[_Client] = set()
        self.connections = Registry()
        self.restarts = 0
        self._image: PageImage | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._fresh: asyncio.Event | None = None
        self._uvicorn = self._configured()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, name="tinyusfm-page", daemon=True)
        self._thread.start()
        if not self._ready.wait(START_S):
            self.stop()
            raise OutputError("the live page did not start: try another port")

    def wake(self, *, frame: bool) -> None:
        """Tells the server that there is something new; from any thread, never waits."""
        loop = self._loop
        if loop is None or not self.clients:
            return
        with contextlib.suppress(RuntimeError):  # the loop has just ended
            loop.call_soon_threadsafe(self._awake, frame)

    def stop(self) -> None:
        self._uvicorn.should_exit = True
        self._thread.join(START_S)

    def _configured(self) -> Any:
        try:
            import uvicorn
            import websockets  # noqa: F401
            from starlette.applications import Starlette
            from starlette.routing import Route, WebSocketRoute
        except ImportError as error:
            raise MissingExtra("the live page", error.name or "starlette", "live") from error
        routes: list[Any] = [Route(path, _file_endpoint(*known)) for path, known in FILES.items()]
        app = Starlette(routes=[*routes, WebSocketRoute("/ws", self._serve_browser)])
        config = uvicorn.Config(
            guarded(app),
            ws="websockets-sansio",
            ws_max_size=256,
            ws_per_message_deflate=False,
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            http=guarded_protocol(self.connections),
            h11_max_incomplete_event_size=MAX_HEAD_BYTES,
            timeout_keep_alive=IDLE_S,
            timeout_graceful_shutdown=2,
        )
        return uvicorn.Server(config)

    def _run(self) -> None:
        """Serves until it is stopped; a failure is reported and serving begins again."""
        while not self._uvicorn.should_exit:
            try:
                asyncio.run(self._serve())
            except Exception:
                if self._uvicorn.should_exit:
                    return
                self.restarts += 1
                _log.exception("the live page's server failed and is started again")
                time.sleep(RESTART_S)
                self._uvicorn = self._configured()

    async def _serve(self) -> None:
        self._loop, self._fresh = asyncio.get_running_loop(), asyncio.Event()
        encoder = asyncio.create_task(self._keep(self._encode_newest))
        ready = asyncio.create_task(self._say_ready())
        try:
            await self._uvicorn.serve(sockets=[self._sink._socket])
        finally:
            for task in (encoder, ready):
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task
            self._loop = None

    async def _say_ready(self) -> None:
        while not self._uvicorn.started:
            await asyncio.sleep(0.01)
        self._ready.set()

    def _awake(self, frame: bool) -> None:
        assert self._fresh is not None
        if frame:
            self._fresh.set()
        else:
            for client in self.clients:
                client.state_changed = True
                client.news.set()

    async def _keep(self, work: Callable[[], Awaitable[None]]) -> None:
        """Does something that never ends, and begins again where it fails all the same."""
        while True:
            try:
                await work()
            except Exception:
                self.restarts += 1
                _log.exception("a task of the live page failed and is started again")
                await asyncio.sleep(RESTART_S)

    async def _encode_newest(self) -> None:
        """Encodes the newest frame whenever there is one and somebody looks.

        Frames in between are left out.
        """
        assert self._fresh is not None
        while True:
            await self._fresh.wait()
            self._fresh.clear()
            image = await asyncio.to_thread(self._feed.try_image)
            if image is not None:
                self._image = image
            for client in self.clients:
                client.state_changed |= image is None
                client.news.set()

    async def _serve_browser(self, socket_: Any) -> None:
        if not self._may_look(socket_):
            await socket_.close(1008)
            return
        if len(self.clients) >= MAX_CLIENTS and not self._make_room():
            await socket_.close(1013)
            return
        await socket_.accept()
        client = _Client()
        self.clients.add(client)
        if self._fresh is not None:
            self._fresh.set()
        tasks = [asyncio.create_task(work) for work in (self._send(socket_, client), self._hear(socket_, client))]
        client.tasks = tasks
        try:
            # whichever ends first ends both: a browser that gets nothing more must see that, and connect again
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self.clients.discard(client)
            for task in tasks:
                task.cancel()
            ends = await asyncio.gather(*tasks, return_exceptions=True)
            for end in ends:
                if isinstance(end, Exception) and not _is_farewell(end):
                    self.restarts += 1
                    _log.error("a browser of the live page was let go: %s", type(end).__name__)
            with contextlib.suppress(Exception):
                await socket_.close(1011)

    def _make_room(self) -> bool:
        """Lets the browser go that has been still for longest, where one has for STILL_S."""
        still = max(self.clients, key=lambda client: client.still_s)
        if still.still_s < STILL_S:
            return False
        self.clients.discard(still)
        for task in still.tasks:
            task.cancel()
        return True

    async def _hear(self, socket_: Any, client: _Client) -> None:
        """Takes what a browser says, which is only ever that it has drawn a frame.

        Anything else ends it.
        """
        extra = 0
        while True:
            message = await socket_.receive()
            if message["type"] != "websocket.receive":
                return
            extra += client.drawn >= client.sent
            if message.get("text") is None or extra > EXTRA_ACKS:
                await socket_.close(1003 if message.get("text") is None else 1008)
                return
            client.drawn, client.heard_s = min(client.drawn + 1, client.sent), time.monotonic()
            client.news.set()

    async def _send(self, socket_: Any, client: _Client) -> None:
        while True:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(client.news.wait(), STATUS_EVERY_S)
            client.news.clear()
            if client.sent - client.drawn >= IN_FLIGHT:
                # it is still drawing; what it is sent later is the newest
                continue
            image = self._image
            if image is not None and image.number <= client.last_number:
                image = None
            now_s = time.monotonic()
            if image is None and not client.state_changed and now_s - client.status_s < STATUS_EVERY_S:
                continue
            if image is not None:
                client.skipped += image.number - client.last_number - 1 if client.last_number >= 0 else 0
                client.last_number = image.number
            client.state_changed, client.status_s = False, now_s
            message, client.after = self._feed.message(image, after=client.after, skipped=client.skipped)
            client.sent += 1
            await socket_.send_bytes(message)

    def _may_look(self, socket_: Any) -> bool:
        """Same origin, and the key where there is one."""
        origin, host = socket_.headers.get("origin", ""), socket_.headers.get("host", "")
        if origin != f"http://{host}":
            return False
        given = parse_qs(socket_.url.query).get("key", [""])[0]
        return self._sink.key is None or hmac.compare_digest(given.encode(), self._sink.key.encode())


def _is_farewell(error: BaseException) -> bool:
    """Whether an error only says that the browser went away."""
    from starlette.websockets import WebSocketDisconnect

    return isinstance(error, WebSocketDisconnect | RuntimeError | OSError)


def guarded(app: Any) -> Any:
    """An ASGI application that answers only requests to a plausible host.

    It puts the security headers on answers.
    """

    async def guard(scope: Any, receive: Any, send: Any) -> None:
        hosts = [value.decode("latin-1") for name, value in scope.get("headers", ()) if name == b"host"]
        if len(hosts) != 1 or not host_is_ours(hosts[0]):
            await _refuse(scope, send)
            return

        async def send_guarded(message: Any) -> None:
            if message["type"] == "http.response.start":
                extra = [(name.lower().encode(), value.encode()) for name, value in SECURITY_HEADERS.items()]
                message = {**message, "headers": [*message.get("headers", ()), *extra]}
            await send(message)

        await app(scope, receive, send_guarded)

    return guard


def host_is_ours(header: str) -> bool:
    """True for an address, ``localhost`` or this machine's name.

    A page of a foreign name cannot claim these.

    Args:
        header: value of the Host header.
    """
    try:
        name = urlsplit(f"//{header}").hostname or ""
        if name in ("localhost", socket.gethostname().lower()):
            return True
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


async def _refuse(scope: Any, send: Any) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008})
        return
    await send({"type": "http.response.start", "status": 400, "headers": [(b"content-type", b"text/plain")]})
    await send({"type": "http.response.body", "body": b"this host name is not served here"})


def _file_endpoint(name: str, media_type: str) -> Any:
    from starlette.responses import Response

    content = (PAGE / name).read_bytes()

    async def endpoint(request: Any) -> Any:
        return Response(content, media_type=media_type)

    return endpoint


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        if getattr(error, "errno", None) == errno.EADDRINUSE:
            raise OutputError(f"port {port} is in use: give port 0 for a free one, or another address") from error
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise OutputError(f"the live page cannot listen on port {port}: {reason}; give another address") from error


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


__all__ = [
    "EXTRA_ACKS",
    "FILES",
    "IN_FLIGHT",
    "MAX_CLIENTS",
    "PAGE",
    "PORT",
    "RESTART_S",
    "SECURITY_HEADERS",
    "START_S",
    "STATUS_EVERY_S",
    "STILL_S",
    "WebSink",
    "available",
    "guarded",
    "host_is_ours",
    "open_sink",
]
