"""Video output: structures of the kernel's sizes, and the protocol of videobuf2 kept by an imitation that is strict."""

from __future__ import annotations

import errno
import os
from typing import Any

import numpy as np
import pytest

from tests.fakes.live_rigs import image
from tinyusfm_runtime.errors import OutputError, UnsupportedError
from tinyusfm_runtime.frame import Frame
from tinyusfm_runtime.replay import outlets
from tinyusfm_runtime.transport import v4l2, v4l2_output
from tinyusfm_runtime.transport.v4l2_output import BUFFER, BUFFERS, VideoOutput

ROWS, COLS = image(0).shape
CODES = {name: int.from_bytes(name.encode(), "little") for name in ("GREY", "YUYV")}


class Driver:
    """What the kernel keeps of one output device, whoever opens it.

    It answers as videobuf2 does (drivers/media/common/videobuf2): a call out of turn is EINVAL, buffers while
    something else holds them EBUSY, an image shorter than the format EINVAL. Of the buffers that were queued it shows
    all but the last one.
    """

    def __init__(self, *, ways: int, codes: tuple[str, ...] = ("GREY",), writes: str = "well", shows: bool = True):
        self.caps = v4l2.OUTPUT | ways
        self.codes, self.writes, self.shows = codes, writes, shows
        self.format: tuple[int, int, str, int] | None = None
        self.seen: list[bytes] = []
        self.opened = self.closed = 0
        self.log: list[str] = []
        self.plugged = True
        self.alignment = 1

    def open(self, path: str) -> Opened:
        self.opened += 1
        return Opened(self)


class Opened:
    def __init__(self, driver: Driver) -> None:
        self.driver = driver
        self.memory: list[bytearray] = []
        self.queued: list[int] = []
        self.done: list[int] = []
        self.streaming = self.emulated = False
        self.mapped = 0

    def ioctl(self, request: int, argument: bytearray) -> None:
        assert len(argument) == request >> 16 & 0x3FFF, "the size stands in the request"
        if not self.driver.plugged:
            raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))
        names = {
            v4l2.QUERYCAP: self.querycap, v4l2.SET_FORMAT: self.s_fmt,
            v4l2_output.REQUEST_BUFFERS: self.reqbufs, v4l2_output.QUERY_BUFFER: self.querybuf,
            v4l2_output.QUEUE: self.qbuf, v4l2_output.DEQUEUE: self.dqbuf,
            v4l2_output.STREAM_ON: self.streamon, v4l2_output.STREAM_OFF: self.streamoff,
        }  # fmt: skip
        self.driver.log.append(names[request].__name__)
        names[request](argument)

    def querycap(self, argument: bytearray) -> None:
        caps = self.driver.caps
        argument[:] = v4l2.CAPABILITY.pack(b"fake", b"fake", b"", 0x60100, caps | v4l2.DEVICE_CAPS, caps)

    def s_fmt(self, argument: bytearray) -> None:
        kind, width, height, code, field, row_bytes, size, *rest = v4l2.FORMAT.unpack(argument)
        check(kind == v4l2.OUTPUT_TYPE)
        check(not self.memory and not self.emulated, errno.EBUSY)
        known = {CODES[name]: name for name in self.driver.codes}
        code = code if code in known else next(iter(known))
        least = width * (1 if known[code] == "GREY" else 2)
        row_bytes = -(-max(row_bytes, least) // self.driver.alignment) * self.driver.alignment
        self.driver.format = (width, height, known[code], row_bytes)
        argument[:] = v4l2.FORMAT.pack(kind, width, height, code, field, row_bytes, row_bytes * height, *rest)

    @property
    def size(self) -> int:
        assert self.driver.format is not None
        return self.driver.format[1] * self.driver.format[3]

    def reqbufs(self, argument: bytearray) -> None:
        count, kind, memory, _ = BUFFERS.unpack(argument)
        check(self.driver.caps & v4l2.STREAMING and kind == v4l2.OUTPUT_TYPE and memory == 1)
        check(not self.emulated, errno.EBUSY)
        self.memory = [bytearray(self.size) for _ in range(max(2, count))]
        argument[:] = BUFFERS.pack(len(self.memory), kind, memory, 0)

    def querybuf(self, argument: bytearray) -> None:
        index, kind, *_ = BUFFER.unpack(argument)
        check(kind == v4l2.OUTPUT_TYPE and index < len(self.memory))
        fields = list(BUFFER.unpack(argument))
        fields[9:11] = [index << 20, self.size]
        argument[:] = BUFFER.pack(*fields)

    def map(self, length: int, offset: int) -> Any:
        check(length == self.size and offset & 0xFFFFF == 0)
        self.mapped += 1
        return Mapped(self, memoryview(self.memory[offset >> 20]))

    def qbuf(self, argument: bytearray) -> None:
        index, kind, used, _, field, seconds, micros, _, memory, _, _ = BUFFER.unpack(argument)
        check(kind == v4l2.OUTPUT_TYPE and memory == 1 and index < len(self.memory) and field == v4l2.FIELD_NONE)
        check(index not in self.queued and index not in self.done and used >= self.size and 0 <= micros < 1_000_000)
        assert seconds >= 0
        self.queued.append(index)
        self.work()

    def work(self) -> None:
        while self.streaming and self.driver.shows and len(self.queued) > 1:
            index = self.queued.pop(0)
            self.driver.seen.append(bytes(self.memory[index]))
            self.done.append(index)

    def dqbuf(self, argument: bytearray) -> None:
        check(self.streaming)
        if not self.done:
            raise BlockingIOError(errno.EAGAIN, "nothing is done yet")
        fields = list(BUFFER.unpack(argument))
        fields[0] = self.done.pop(0)
        argument[:] = BUFFER.pack(*fields)

    def streamon(self, argument: bytearray) -> None:
        check(bool(self.memory) and int.from_bytes(argument, "little") == v4l2.OUTPUT_TYPE)
        self.streaming = True
        self.work()

    def streamoff(self, argument: bytearray) -> None:
        self.streaming, self.queued, self.done = False, [], []

    def write(self, data: memoryview) -> int:
        check(bool(self.driver.caps & v4l2.READWRITE))
        if self.driver.writes == "refused":  # as vivid of Linux 6.1: the emulation of write() keeps the buffers
            self.emulated = True
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        if self.driver.writes == "half":
            return len(data) // 2
        if self.driver.writes == "gone":
            raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))
        if self.driver.writes == "busy once":
            self.driver.writes = "well"
            raise BlockingIOError(errno.EAGAIN, "not yet")
        if self.driver.writes == "never":
            raise BlockingIOError(errno.EAGAIN, "not yet")
        check(len(data) == self.size)
        self.driver.seen.append(bytes(data))
        return len(data)

    def wait(self, timeout_ms: int) -> bool:
        return bool(self.done) or (not self.streaming and self.driver.writes != "never")

    def close(self) -> None:
        assert self.mapped == 0, "memory is given back before the file is closed"
        self.driver.closed += 1


class Mapped:
    def __init__(self, opened: Opened, memory: memoryview) -> None:
        self.opened, self.memory = opened, memory

    def __setitem__(self, where: slice, data: memoryview) -> None:
        self.memory[where] = data

    def close(self) -> None:
        self.opened.mapped -= 1


def check(holds: object, code: int = errno.EINVAL) -> None:
    if not holds:
        raise OSError(code, os.strerror(code))


@pytest.fixture
def outlet(monkeypatch: pytest.MonkeyPatch) -> Any:
    def made(driver: Driver) -> outlets.CameraOutlet:
        monkeypatch.setattr(outlets, "find_output", lambda path: path)
        monkeypatch.setattr(outlets, "VideoOutput", lambda path: VideoOutput(path, driver.open))
        monkeypatch.setattr(v4l2_output, "TAKES_MS", 50)
        return outlets.CameraOutlet("/dev/video9")

    return made


def send(outlet: outlets.CameraOutlet, count: int) -> None:
    for seq in range(count):
        outlet.send(Frame(pixels=image(seq), seq=seq), seq=seq, t_unix_ns=0, damage=None)


def test_structures_have_the_kernels_sizes_and_places() -> None:
    for request, layout in (
        (v4l2.QUERYCAP, v4l2.CAPABILITY), (v4l2.SET_FORMAT, v4l2.FORMAT),
        (v4l2_output.REQUEST_BUFFERS, BUFFERS), (v4l2_output.QUEUE, BUFFER),
    ):  # fmt: skip
        assert request >> 16 & 0x3FFF == layout.size and request >> 8 & 0xFF == ord("V")
    packed = BUFFER.pack(1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11)
    words = np.frombuffer(packed, "<u4")
    assert len(packed) == 88
    # offsetof of linux/videodev2.h on a 64-bit machine, over 4
    assert [words[i] for i in (0, 1, 2, 3, 4)] == [1, 2, 3, 4, 5] and [words[i] for i in (6, 8)] == [6, 7]
    assert [words[i] for i in (14, 15, 16, 18)] == [8, 9, 10, 11]


@pytest.mark.parametrize("codes", [("GREY",), ("YUYV",), ("YUYV", "GREY")])
@pytest.mark.parametrize(
    ("ways", "writes", "way"),
    [
        (v4l2.READWRITE, "well", "write"),
        (v4l2.READWRITE | v4l2.STREAMING, "well", "write"),
        (v4l2.READWRITE | v4l2.STREAMING, "busy once", "write"),
        (v4l2.STREAMING, "well", "buffers"),
        (v4l2.READWRITE | v4l2.STREAMING, "refused", "buffers"),
    ],
)
def test_every_image_arrives_in_order(outlet: Any, codes: tuple[str, ...], ways: int, writes: str, way: str) -> None:
    driver = Driver(ways=ways, codes=codes, writes=writes)
    out = outlet(driver)
    send(out, 9)
    assert out.way == way and driver.format is not None and driver.format[:2] == (COLS, ROWS)
    out.close()
    out.close()
    coding = driver.format[2]
    assert coding == ("GREY" if "GREY" in codes else "YUYV"), "grey as it is, where the device takes that"
    want = [image(seq) if coding == "GREY" else outlets.as_yuyv(image(seq)) for seq in range(9)]
    # the last one that was queued stays on the screen
    want = want if way == "write" else want[:-1]
    assert driver.seen == [each.tobytes() for each in want]
    assert driver.closed == driver.opened == (2 if writes == "refused" else 1)
    if way == "buffers":
        assert driver.log[-1] == "streamoff" and driver.log.count("streamon") == 1


def test_refusals_are_one_line(outlet: Any) -> None:
    out = outlet(Driver(ways=v4l2.READWRITE, writes="refused"))
    with pytest.raises(OutputError, match="takes no image: Invalid argument"):
        send(out, 1)
    out.close()
    for writes, words in (("half", "a part"), ("gone", "No such device"), ("never", "took no image for")):
        out = outlet(Driver(ways=v4l2.READWRITE | v4l2.STREAMING, writes=writes))
        with pytest.raises(OutputError, match=words):
            send(out, 1)
        out.close()
    out = outlet(Driver(ways=v4l2.STREAMING, shows=False))
    with pytest.raises(OutputError, match="took no image for"):
        send(out, v4l2_output.WANTED_BUFFERS + 1)
    out.close()
    driver = Driver(ways=v4l2.READWRITE)
    driver.alignment = 4096
    with pytest.raises(UnsupportedError, match="takes no"):
        send(outlet(driver), 1)


def test_unplugging_while_it_streams_is_said_and_leaves_nothing(outlet: Any) -> None:
    driver = Driver(ways=v4l2.STREAMING)
    out = outlet(driver)
    send(out, 4)
    driver.plugged = False
    with pytest.raises(OutputError, match="No such device"):
        send(out, 1)
    out.close()
    assert driver.closed == driver.opened == 1
    with pytest.raises(OutputError, match="closed"):
        send(out, 1)


def test_a_clip_that_changes_its_size_is_refused(outlet: Any) -> None:
    out = outlet(Driver(ways=v4l2.READWRITE))
    send(out, 1)
    with pytest.raises(OutputError, match="one size"):
        out.send(Frame(pixels=image(0)[:-8]), seq=1, t_unix_ns=0, damage=None)
    out.close()


def test_the_imitation_refuses_what_videobuf2_refuses() -> None:
    """The control: the calls in a wrong order, or too short an image, do not pass."""
    opened = Driver(ways=v4l2.STREAMING).open("x")
    opened.driver.format = (COLS, ROWS, "GREY", COLS)
    short = bytearray(BUFFER.pack(0, v4l2.OUTPUT_TYPE, 0, 0, v4l2.FIELD_NONE, 0, 0, 0, 1, 0, 0))
    for request, argument in (
        (v4l2_output.STREAM_ON, bytearray((2).to_bytes(4, "little"))),
        (v4l2_output.QUEUE, short),
        (v4l2_output.DEQUEUE, short),
    ):
        with pytest.raises(OSError, match="Invalid argument"):
            opened.ioctl(request, argument)
    opened.ioctl(v4l2_output.REQUEST_BUFFERS, bytearray(BUFFERS.pack(2, 2, 1, 0)))
    with pytest.raises(OSError, match="Invalid argument"):
        opened.ioctl(v4l2_output.QUEUE, short)
