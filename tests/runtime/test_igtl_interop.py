"""OpenIGTLink with others: pyigtl and the C++ library, as servers and as clients, equal to the byte."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from tests.fakes.live_rigs import until
from tinyusfm_runtime.frame import Frame, PixelFormat
from tinyusfm_runtime.sources import open_source
from tinyusfm_runtime.transport.igtl_server import IgtlServer

INCLUDE = Path("/usr/include/openigtlink")
CXX = shutil.which("g++") or shutil.which("clang++")
PEER = Path(__file__).parents[1] / "fakes" / "igtl_peer.cxx"
ROWS, COLUMNS, COUNT = 40, 56, 5

PYIGTL_SERVER = """
import sys, time, numpy as np, pyigtl
version, port = int(sys.argv[1]), int(sys.argv[2])
server = pyigtl.OpenIGTLinkServer(port=port)
while not server.is_connected():
    time.sleep(0.01)
r, c = np.mgrid[:40, :56]
for n in range(5):
    pixels = ((7 * r + 3 * c + 11 * n) % 251).astype(np.uint8)
    matrix = np.diag([0.25, 0.5, 1, 1])
    image = pyigtl.ImageMessage(pixels[None, :, :, None], ijk_to_world_matrix=matrix, device_name="py")
    image.header_version, image.timestamp = version, 1700000000 + n
    image.metadata = {"UltrasoundImageOrientation": "MF"} if version >= 2 else {}
    server.send_message(image, wait=True)
    time.sleep(0.05)
time.sleep(0.5)
"""
PYIGTL_CLIENT = """
import sys, pyigtl
client = pyigtl.OpenIGTLinkClient("127.0.0.1", int(sys.argv[1]))
for _ in range(3):
    image = client.wait_for_message("Image_Probe", timeout=15)
    print(image.header_version, *image.image.shape, image.ijk_to_world_matrix[0, 0], image.ijk_to_world_matrix[1, 1],
          image.image.tobytes().hex(), flush=True)
client.stop()
"""


def ramp(index: int) -> np.ndarray:
    rows, columns = np.mgrid[:ROWS, :COLUMNS]
    return ((7 * rows + 3 * columns + 11 * index) % 251).astype(np.uint8)


@pytest.fixture(scope="module")
def cpp_peer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if CXX is None or not INCLUDE.is_dir():
        pytest.skip("no C++ compiler or no OpenIGTLink headers (libopenigtlink-dev)")
    program = tmp_path_factory.mktemp("peer") / "igtl_peer"
    command = [CXX, "-O1", "-w", f"-I{INCLUDE}", str(PEER), "-lOpenIGTLink", "-lpthread", "-o", str(program)]
    subprocess.run(command, check=True, capture_output=True, timeout=900)
    return program


@contextmanager
def running(*command: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def check_received(location: str, device: str, orientation: str | None) -> None:
    """Every image of a peer's five is the one it sent."""
    frames: dict[int, Frame] = {}
    with open_source(location) as source:
        guard = threading.Timer(20, source.close)  # type: ignore[attr-defined]
        guard.start()
        for frame in source:
            assert frame.t_source_ns is not None
            frames[round(frame.t_source_ns / 1e9) - 1_700_000_000] = frame
            if COUNT - 1 in frames:
                break
        guard.cancel()
        guard.join()
        counters = dict(source.counters)  # type: ignore[attr-defined]
    assert set(counters) <= {"no_connection", "keep_alives", "overtaken"}
    assert len(frames) >= COUNT - counters.get("overtaken", 0) and COUNT - 1 in frames, device
    for index, frame in frames.items():
        np.testing.assert_array_equal(frame.pixels, ramp(index))
        assert (frame.spacing_mm, frame.orientation, frame.pixel_format) == ((0.5, 0.25), orientation, PixelFormat.GREY)


def test_images_of_the_cpp_library_arrive(cpp_peer: Path) -> None:
    with running(str(cpp_peer), "serve", str(ROWS), str(COLUMNS), str(COUNT)) as peer:
        assert peer.stdout is not None
        check_received(f"igtl://127.0.0.1:{peer.stdout.readline().strip()}", "cpp", None)


@pytest.mark.parametrize("colour", [False, True])
def test_the_cpp_library_takes_our_images(cpp_peer: Path, colour: bool) -> None:
    pixels = np.stack([ramp(1), ramp(2), ramp(3)], axis=-1) if colour else ramp(1)
    frame = Frame(pixels=pixels, pixel_format=PixelFormat.RGB if colour else PixelFormat.GREY, spacing_mm=(0.5, 0.25))
    with IgtlServer() as server, running(str(cpp_peer), "take", str(server.port), "2") as peer:
        assert until(lambda: server.clients)
        for _ in range(2):
            server.keep_alive()
            server.send(server.pack(frame, 1_700_000_000_000_000_000))
        out, _ = peer.communicate(timeout=20)
    want = f"Image_Probe {ROWS} {COLUMNS} {3 if colour else 1} 0.500000 0.250000 {pixels.tobytes().hex()}"
    assert out.splitlines() == [want, want] and peer.returncode == 0


@pytest.mark.parametrize("version", [1, 2, 3])
def test_images_of_pyigtl_arrive(version: int) -> None:
    pytest.importorskip("pyigtl", reason="install tinyusfm-edge[test]")
    with IgtlServer() as server:
        port = server.port  # free a moment later
    with running(sys.executable, "-c", PYIGTL_SERVER, str(version), str(port)):
        check_received(f"igtl://127.0.0.1:{port}", "py", "MF" if version >= 2 else None)


@pytest.mark.parametrize("version", [1, 2])
def test_pyigtl_takes_our_images(version: int) -> None:
    pytest.importorskip("pyigtl", reason="install tinyusfm-edge[test]")
    frame = Frame(pixels=ramp(4), spacing_mm=(0.5, 0.25), orientation="MF")
    with (
        IgtlServer(header_version=version) as server,
        running(sys.executable, "-c", PYIGTL_CLIENT, str(server.port)) as client,
    ):
        stop = threading.Event()

        def send() -> None:
            while not stop.wait(0.05):
                server.send(server.pack(frame, 1_700_000_000_000_000_000))

        sender = threading.Thread(target=send)
        sender.start()
        try:
            out, _ = client.communicate(timeout=900)
        finally:
            stop.set()
            sender.join()
    want = f"{version} 1 {ROWS} {COLUMNS} 0.25 0.5 {ramp(4).tobytes().hex()}"
    assert [line.replace(f"1 {ROWS} {COLUMNS} 1 ", f"1 {ROWS} {COLUMNS} ") for line in out.splitlines()] == [want] * 3
