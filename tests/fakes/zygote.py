"""A process that forks probes on demand, so that a test can kill one every quarter of a second without starting Python.

    python zygote.py igtl|shm PLACE PERIOD_MS

Each line on standard input forks a probe: ``steady`` serves an image a period forever; ``half`` serves ten and then
breaks off in the middle of a message (or of a slot) and hangs. A line ``PID monotonic_ns`` on standard output says that
it can be reached.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from contextlib import suppress

import numpy as np

from tinyusfm_runtime.errors import OutputError
from tinyusfm_runtime.frame import Frame
from tinyusfm_runtime.transport.igtl_server import IgtlServer
from tinyusfm_runtime.transport.shm_writer import ShmWriter

IMAGE = np.arange(48 * 64, dtype=np.int64).reshape(48, 64)


def frames(period_s: float):  # type: ignore[no-untyped-def]
    for index in range(10**9):
        yield Frame(pixels=((IMAGE + 31 * index) % 251).astype(np.uint8), seq=index)
        time.sleep(period_s)


def say_ready() -> None:
    os.write(1, f"{os.getpid()} {time.monotonic_ns()}\n".encode())


def serve_igtl(port: int, period_s: float, half: bool) -> None:
    server = None
    while server is None:
        # the one before may not be quite dead yet
        with suppress(OutputError):
            server = IgtlServer(port=port)
    say_ready()
    while not server.clients:
        time.sleep(0.002)
    for frame in frames(period_s):
        data = server.pack(frame, time.time_ns())
        if half and frame.seq == 10:
            server.send(data[: len(data) // 2])
            time.sleep(3600)
        server.send(data)


def serve_shm(name: str, period_s: float, half: bool) -> None:
    writer = ShmWriter(name, IMAGE.size)
    say_ready()
    for frame in frames(period_s):
        if half and frame.seq == 10:
            # the lock stays odd, as a writer leaves it that dies inside a slot
            at = 128 + writer.published % 4 * writer._stride
            writer._memory[at : at + 8] = (2 * writer.published + 1).to_bytes(8, "little")
            time.sleep(3600)
        writer.write(frame)


def main() -> None:
    kind, place, period_ms = sys.argv[1:]
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    children = []
    # line by line: iterating over the file would read ahead
    for line in iter(sys.stdin.readline, ""):
        child = os.fork()
        if child == 0:
            half, period_s = line.strip() == "half", float(period_ms) / 1000
            if kind == "igtl":
                serve_igtl(int(place), period_s, half)
            else:
                serve_shm(place, period_s, half)
        children.append(child)
    for child in children:
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)


if __name__ == "__main__":
    main()
