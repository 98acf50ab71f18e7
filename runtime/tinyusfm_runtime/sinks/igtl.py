"""Sink: an OpenIGTLink server.

Slicer, PLUS, MITK and others see mask and reading live.

``igtl://HOST:PORT``; without a host it listens on this machine alone. Each result becomes three
messages: IMAGE ``Mask`` (labels, uint8, at the size and spacing of the frame), STRING ``Reading``
(one JSON object) and STATUS (1 where all is well, 7 where late, 13 where the source is gone or
frozen, with the state in words). What may not be shown is sent as an empty mask and a reading
without numbers, so that no viewer goes on showing the last one; so is a state without answers.
Between results STATUS goes out as a sign of life.

The loop hands over a reference and goes on. One thread packs the newest result, one per client sends
it; a client that is slow gets fewer results, one that takes nothing for ``SEND_TIMEOUT_S`` is left.

Where the loop smooths over time, the reading has ``smoothed`` beside its own numbers (sinks.smoothed); the mask stays
that of the frame.

Cropped frames start at their own corner; where that lies in the received image stands in the
reading's ``crop``. In a loop of several models each has a mask and a reading of its own, ``Mask-NAME`` and
``Reading-NAME``; where that is longer than a device name may be, ``Mask-1`` and so on in the models' order. Every
reading says its ``model``, and ``skipped`` where a rule left it out. Bytes on the wire are igtl_wire.py's matter.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import math
import socket
import threading
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from tinyusfm_runtime.errors import InputError, OutputError
from tinyusfm_runtime.frame import Frame
from tinyusfm_runtime.plugins import Availability
from tinyusfm_runtime.results import LiveResult, LiveState, Prediction, StateChange
from tinyusfm_runtime.sinks import labels_of, likeliest, listen_address, reading_of, shown, smoothed
from tinyusfm_runtime.transport.closing import ClosedOnExit
from tinyusfm_runtime.transport.igtl_wire import IgtlEnvelope, pack_image, pack_status, pack_string

SCHEMA = 3
"""Version of the reading's JSON; 1 had no ``smoothed``, 2 no ``reading``."""
PORT = 18945
"""One above the port registered for OpenIGTLink, where the source usually is."""
MASK, READING, STATUS = "Mask", "Reading", "tinyusfm-edge"
"""Device names."""
DEVICE_CHARACTERS = 20
"""Of a device name (OpenIGTLink protocol, header)."""
MAX_CLIENTS = 16
SEND_TIMEOUT_S = 2.0
KEEP_ALIVE_S = 0.5
PAUSE_S = 0.1
"""After a connection that could not be taken."""
_log = logging.getLogger(__name__)
SEND_BUFFER_BYTES = 1 << 18
"""Of the system, a client: results that wait there would be old when they arrive."""
CODES = {LiveState.STALE: 7, LiveState.FROZEN: 13, LiveState.LOST: 13}
"""STATUS codes (OpenIGTLink protocol, STATUS): 7 timeout, 13 device not ready; the others are 1, well."""
_EMPTY = (LiveState.STALE, LiveState.LOST)
"""States without a fresh answer: the mask is withdrawn."""


def available() -> Availability:
    """Always works: standard library and numpy only."""
    return Availability(usable=True, reason="own OpenIGTLink, header versions 1 and 2", extra=None)


def open_sink(location: str, *, header_version: int = 1, labels: tuple[str, ...] = ()) -> IgtlSink:
    """Starts to listen.

    Args:
        location: ``//HOST:PORT``; an empty host is 127.0.0.1, port 0 any that is free.
        header_version: 1 for protocols 1 and 2, 2 for protocol 3.
        labels: names of a classifier's classes, so that a reading names the likeliest.

    Raises:
        InputError: the location cannot be read, or the version is neither.
        OutputError: the address cannot be listened on.
    """
    if header_version not in (1, 2):
        raise InputError(f"OpenIGTLink header version {header_version} is not written: choose 1 or 2")
    return IgtlSink(*listen_address(location, PORT), header_version, labels)


class IgtlSink(ClosedOnExit):
    """Serves the newest result to whoever connects.

    Attributes:
        host: address it listens on.
        port: port it listens on.
    """

    def __init__(self, host: str, port: int, header_version: int, labels: tuple[str, ...] = ()) -> None:
        self.host = host
        self._version, self._labels = header_version, labels
        try:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            self._listener = socket.create_server((host, port), family=family)
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or type(error).__name__
            if getattr(error, "errno", None) == errno.EADDRINUSE:
                raise OutputError(f"port {port} is in use: give port 0 for a free one, or another one") from error
            raise OutputError(f"the OpenIGTLink sink cannot listen on port {port}: {reason}") from error
        self.port = int(self._listener.getsockname()[1])
        self._news = threading.Condition()
        self._result: LiveResult | None = None
        self._state = LiveState.LOST
        self._stamp = self._messages = 0
        self._geometry: tuple[tuple[int, int], tuple[float, float] | None] | None = None
        self._models: tuple[str, ...] = ("",)
        self._closing = False
        self._clients: list[_Client] = []
        self._counts = {"clients": 0, "clients_lost": 0, "results_sent": 0}
        self._threads = [
            threading.Thread(target=work, name=f"tinyusfm-igtl-{name}", daemon=True)
            for name, work in (("accept", self._accept), ("pack", self._pack_newest))
        ]
        for thread in self._threads:
            thread.start()

    @property
    def counters(self) -> dict[str, int]:
        """Clients so far, clients that left, results handed to the system.

        Clients that went by themselves or were left, results handed to the system for a client.
        """
        with self._news:
            return dict(self._counts)

    def write(self, frame: Frame, prediction: Prediction) -> None:
        """Offers one result from outside the live loop."""
        self.write_live(LiveResult.outside_loop(frame, prediction, self._stamp))

    def write_live(self, result: LiveResult) -> None:
        """Offers one result of the live loop; never waits for a client."""
        with self._news:
            self._result, self._state = result, result.state
            self._stamp += 1
            self._news.notify_all()

    def on_state(self, change: StateChange) -> None:
        """Reports a change of state to the clients.

        The mask is withdrawn where there is no fresh answer.
        """
        with self._news:
            self._state = change.after
            if change.after in _EMPTY:
                self._result = None
            self._stamp += 1
            self._news.notify_all()

    def close(self) -> None:
        """Lets the clients go and stops listening. Idempotent."""
        with self._news:
            if self._closing:
                return
            self._closing = True
            clients = list(self._clients)
            self._news.notify_all()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes accept(), which close() alone does not
        self._listener.close()
        for client in clients:
            client.stop()
        for thread in [*self._threads, *(client.thread for client in clients)]:
            thread.join()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                if self._closing:
                    return
                time.sleep(PAUSE_S)  # out of descriptors, or the client went away: the next one may come in
                continue
            with self._news:
                if self._closing or len(self._clients) >= MAX_CLIENTS:
                    connection.close()
                    continue
                client = _Client(connection, self._left, self._sent)
                self._clients.append(client)
                self._counts["clients"] += 1
                # a late client gets what is there
                self._stamp += 1
                self._news.notify_all()
            client.thread.start()

    def _pack_newest(self) -> None:
        done = 0
        while True:
            with self._news:
                if not self._closing and self._stamp == done:
                    self._news.wait(KEEP_ALIVE_S)
                fresh = self._stamp != done
                if self._closing:
                    return
                done, result, state, clients = self._stamp, self._result, self._state, list(self._clients)
            if clients:
                try:
                    data = self._packed(result, state) if fresh else self._status(state)
                except Exception as error:  # whatever it is, the next result is another one
                    self._counts["unsent"] = self._counts.get("unsent", 0) + 1
                    _log.warning("a result cannot be sent over OpenIGTLink: %s", type(error).__name__)
                    continue
                for client in clients:
                    client.offer(data, keep_alive=not fresh)

    def _packed(self, result: LiveResult | None, state: LiveState) -> bytes:
        parts = []
        if result is not None:
            self._geometry = (result.frame.pixels.shape[0], result.frame.pixels.shape[1]), result.frame.spacing_mm
            self._models = tuple(each.model for each in result.each)
            for each, (image, text) in zip(result.each, device_names(self._models), strict=True):
                spacing_mm = each.frame.spacing_mm
                parts.append(pack_image(_mask(each), self._envelope(image, each), spacing_mm=spacing_mm))
                parts.append(pack_string(json.dumps(as_reading(each, self._labels)), self._envelope(text, each)))
        elif self._geometry is not None:
            size, spacing_mm = self._geometry
            for model, (image, text) in zip(self._models, device_names(self._models), strict=True):
                parts.append(pack_image(np.zeros(size, np.uint8), self._envelope(image, None), spacing_mm=spacing_mm))
                gone = {"schema": SCHEMA, "state": state.value, "valid": False} | ({"model": model} if model else {})
                parts.append(pack_string(json.dumps(gone), self._envelope(text, None)))
        return b"".join([*parts, self._status(state)])

    def _status(self, state: LiveState) -> bytes:
        return pack_status(self._envelope(STATUS, None), code=CODES.get(state, 1), text=state.value.upper())

    def _envelope(self, device: str, result: LiveResult | None) -> IgtlEnvelope:
        now_ns = time.time_ns()
        received = None if result is None else result.frame.t_recv_ns
        self._messages += 1
        return IgtlEnvelope(
            device=device,
            # the frame's reception, by the clock that others know
            t_unix_ns=now_ns if received is None else now_ns - max(0, time.monotonic_ns() - received),
            header_version=self._version,
            message_id=self._messages,
        )

    def _left(self, client: _Client) -> None:
        with self._news:
            if client in self._clients:
                self._clients.remove(client)
                self._counts["clients_lost"] += 1

    def _sent(self) -> None:
        with self._news:
            self._counts["results_sent"] += 1


class _Client:
    """One connection: a slot for the newest messages, and a thread that sends them."""

    def __init__(self, connection: socket.socket, left: Any, sent: Any) -> None:
        self._connection, self._left, self._sent = connection, left, sent
        connection.settimeout(SEND_TIMEOUT_S)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._slot = threading.Condition()
        self._waiting: tuple[bytes, bool] | None = None
        self._stopped = False
        self.thread = threading.Thread(target=self._send, name="tinyusfm-igtl-client", daemon=True)

    def offer(self, data: bytes, *, keep_alive: bool) -> None:
        """Puts messages into the slot; a sign of life never replaces a result."""
        with self._slot:
            if not (keep_alive and self._waiting is not None):
                self._waiting = data, keep_alive
                self._slot.notify()

    def stop(self) -> None:
        with self._slot:
            self._stopped = True
            self._slot.notify()
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)

    def _send(self) -> None:
        try:
            while True:
                with self._slot:
                    self._slot.wait_for(lambda: self._stopped or self._waiting is not None)
                    if self._stopped or self._waiting is None:
                        return
                    (data, keep_alive), self._waiting = self._waiting, None
                self._connection.sendall(data)
                if not keep_alive:
                    self._sent()
        except OSError:
            # it vanished or takes nothing; half a message may be out, so the connection is of no use any more
            pass
        finally:
            self._connection.close()
            self._left(self)


def device_names(models: Sequence[str]) -> list[tuple[str, str]]:
    """Names under which a viewer finds each model's mask and reading.

    Args:
        models: names in the loop; a single empty one where there is but one model.

    Returns:
        For each the devices of mask and reading, at most 20 characters and all different.
    """
    if list(models) == [""]:
        return [(MASK, READING)]
    if any(len(f"{READING}-{model}") > DEVICE_CHARACTERS for model in models):
        models = [str(number) for number in range(1, len(models) + 1)]
    return [(f"{MASK}-{model}", f"{READING}-{model}") for model in models]


def as_reading(result: LiveResult, labels: Sequence[str] = ()) -> dict[str, Any]:
    """The reading's JSON object: what is known about a result, without pixels.

    Numbers only where they may be shown.
    """
    prediction = shown(result)
    record: dict[str, Any] = {
        "schema": SCHEMA,
        "seq": result.frame.seq,
        "state": result.state.value,
        "valid": result.valid and prediction is not None,
        "stale": result.stale,
        "degraded": result.degraded,
        "age_ms": round(result.age_ms, 2) if math.isfinite(result.age_ms) else None,
        "engine": result.engine,
        "crop": result.frame.crop,
        **({"model": result.model, "skipped": result.skipped} if result.model else {}),
    }
    if prediction is not None:
        record |= reading_of(prediction)
    if prediction is not None and prediction.measurement is not None:
        measured = prediction.measurement
        record |= {"hc_mm": measured.hc_mm, "axes_mm": measured.axes_mm, "touches_border": measured.touches_border}
        kept = ("label", "found", "reading", "reasons", "confidence", "area_px", "area_mm2", "box_px", "centroid_px")
        record["labels"] = [{name: label[name] for name in kept} for label in labels_of(prediction)]
    if prediction is not None and prediction.scores is not None:
        record["scores"] = [round(float(score), 6) for score in prediction.scores.ravel()[:256]]
        record |= likeliest(prediction, result.labels or labels)
    if (over_time := smoothed(result)) is not None:
        record["smoothed"] = over_time
    return record


def _mask(result: LiveResult) -> np.ndarray:
    prediction = shown(result)
    if prediction is None or prediction.mask_HW is None:
        return np.zeros(result.frame.pixels.shape[:2], np.uint8)
    return prediction.mask_on_frame()


__all__ = [
    "CODES",
    "DEVICE_CHARACTERS",
    "KEEP_ALIVE_S",
    "MASK",
    "MAX_CLIENTS",
    "PAUSE_S",
    "PORT",
    "READING",
    "SCHEMA",
    "SEND_BUFFER_BYTES",
    "SEND_TIMEOUT_S",
    "STATUS",
    "IgtlSink",
    "as_reading",
    "available",
    "device_names",
    "open_sink",
]
