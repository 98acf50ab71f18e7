"""Rigs: what stands on the other side of each live source in a test, real wherever it can be real.

An OpenIGTLink server on a socket, a ring in shared memory, callbacks; only the camera's driver is imitated, in the
place of ``cv2.VideoCapture``, since a capture device cannot be had everywhere.
"""

from __future__ import annotations

import os
import queue
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from tinyusfm_runtime.frame import Frame, LiveSource
from tinyusfm_runtime.sources import open_source
from tinyusfm_runtime.transport.igtl_server import IgtlServer
from tinyusfm_runtime.transport.shm_writer import ShmWriter

SPACING_MM = (0.25, 0.5)


def image(index: int, rows: int = 32, columns: int = 48) -> np.ndarray:
    """An image that differs from index to index."""
    return ((np.arange(rows * columns).reshape(rows, columns) * 7 + 13 * index) % 251).astype(np.uint8)


@dataclass(kw_only=True)
class Rig:
    """One live source and its other side.

    Attributes:
        source: not entered yet.
        send: sends one image (index, pixels).
        spoil: sends one thing that must be refused.
        alive: a sign of life without an image, or None where the transport has none.
    """

    source: LiveSource
    send: Callable[[int, np.ndarray], None]
    spoil: Callable[[], None]
    alive: Callable[[], None] | None = None


def until(condition: Callable[[], Any], seconds: float = 10.0) -> bool:
    """Waits for a condition, politely; True if it came."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.005)
    return True


@contextmanager
def igtl_rig(monkeypatch: pytest.MonkeyPatch, **options: Any) -> Iterator[Rig]:
    with IgtlServer() as server:

        def pack(index: int, pixels: np.ndarray) -> bytes:
            assert until(lambda: server.clients), "nobody connected"
            frame = Frame(pixels=pixels, spacing_mm=SPACING_MM, seq=index)
            return server.pack(frame, 1_700_000_000_000_000_000 + index * 1_000_000)

        def spoil() -> None:
            data = bytearray(pack(99, image(99)))
            data[200] ^= 1
            server.send(bytes(data))

        def alive() -> None:
            assert until(lambda: server.clients)
            server.keep_alive()

        source = open_source(server.address, **options)
        yield Rig(source=source, send=lambda i, p: server.send(pack(i, p)) and None, spoil=spoil, alive=alive)


@contextmanager
def shm_rig(monkeypatch: pytest.MonkeyPatch, **options: Any) -> Iterator[Rig]:
    with ShmWriter(f"tinyusfm-test-{os.getpid()}-{time.monotonic_ns()}", 1 << 14) as writer:

        def send(index: int, pixels: np.ndarray) -> None:
            writer.write(Frame(pixels=pixels, spacing_mm=SPACING_MM, seq=index), t_source_ns=index)

        def spoil() -> None:
            writer.write(Frame(pixels=image(99), seq=99), spoil_at=3)

        source = open_source(writer.address, **options)
        yield Rig(source=source, send=send, spoil=spoil, alive=writer.keep_alive)


@contextmanager
def push_rig(monkeypatch: pytest.MonkeyPatch, **options: Any) -> Iterator[Rig]:
    source: Any = open_source("push:test", spacing_mm=SPACING_MM, **options)
    yield Rig(
        source=source,
        send=lambda i, p: source.push(p, i, i) and None,
        spoil=lambda: source.push(np.zeros((32, 48), np.float32)) and None,
        alive=source.alive,
    )


@contextmanager
def clarius_rig(monkeypatch: pytest.MonkeyPatch, **options: Any) -> Iterator[Rig]:
    source: Any = open_source("clarius:test", **options)

    def send(index: int, pixels: np.ndarray) -> None:
        rows, columns = pixels.shape
        source.newProcessedImage(pixels.tobytes(), columns, rows, pixels.size, 250.0, index, 0.0, [])

    yield Rig(
        source=source,
        send=send,
        spoil=lambda: source.newProcessedImage(b"\xff\xd8", 48, 32, 2, 250.0, 0, 0.0, []),
        alive=lambda: source.freeze(True),
    )


class FakeCapture:
    """``cv2.VideoCapture`` of a device that codes YUYV, as far as the camera source uses it."""

    plugged = True
    coding = "YUYV"
    opened = 0
    images: queue.Queue[np.ndarray | None]

    def __init__(self, path: str, backend: int) -> None:
        self._converting = True
        self._open = type(self).plugged
        type(self).opened += self._open

    def isOpened(self) -> bool:
        return self._open

    def set(self, key: int, value: float) -> bool:
        import cv2

        if key == cv2.CAP_PROP_CONVERT_RGB:
            self._converting = bool(value)
        return True

    def get(self, key: int) -> float:
        import cv2

        if key == cv2.CAP_PROP_FOURCC:
            return float(int.from_bytes(self.coding.encode(), "little"))
        return {cv2.CAP_PROP_FRAME_HEIGHT: 32.0, cv2.CAP_PROP_POS_MSEC: time.monotonic() * 1e3}.get(key, 0.0)

    def read(self) -> tuple[bool, np.ndarray | None]:
        if not type(self).plugged:
            return False, None
        try:
            # OpenCV waits for READ_TIMEOUT_S; the tests should not wait so long
            image = self.images.get(timeout=0.5)
        except queue.Empty:
            return False, None
        if image is None:
            return False, None
        if image.ndim == 2 and not self._converting:
            image = np.stack([image, np.full_like(image, 128)], axis=-1)
        return True, image

    def release(self) -> None:
        self._open = False


@contextmanager
def camera_rig(monkeypatch: pytest.MonkeyPatch, **options: Any) -> Iterator[Rig]:
    cv2 = pytest.importorskip("cv2", reason="install tinyusfm-edge[opencv]")

    class Capture(FakeCapture):
        images: queue.Queue[np.ndarray | None] = queue.Queue()

    monkeypatch.setattr(cv2, "VideoCapture", Capture)
    source = open_source("camera:7", spacing_mm=SPACING_MM, **options)
    try:
        yield Rig(
            source=source,
            send=lambda i, p: Capture.images.put(p),
            spoil=lambda: Capture.images.put(np.zeros((32, 48, 3), np.uint8)),
        )
    finally:
        Capture.plugged = False


RIGS = {"camera": camera_rig, "clarius": clarius_rig, "igtl": igtl_rig, "push": push_rig, "shm": shm_rig}
"""Live source -> its rig."""
