"""The OpenIGTLink sink: others see the very mask and reading, and no client holds up the loop."""

from __future__ import annotations

import json
import shutil
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.runtime.live_driver import driver, live_result, phantoms
from tinyusfm_runtime.errors import InputError, OutputError
from tinyusfm_runtime.results import LiveState, StateChange
from tinyusfm_runtime.sinks import igtl, open_sink
from tinyusfm_runtime.transport import igtl_wire as wire

WAIT_S = 30.0


class Reader:
    """A client that checks every CRC."""

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), WAIT_S)

    def message(self) -> wire.IgtlMessage:
        header = wire.unpack_header(self._exactly(wire.HEADER_BYTES))
        return wire.unpack_body(header, self._exactly(header.body_bytes))

    def until(self, kind: str) -> wire.IgtlMessage:
        while (message := self.message()).header.kind != kind:
            pass
        return message

    def close(self) -> None:
        self._socket.close()

    def _exactly(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            part = self._socket.recv(count - len(data))
            if not part:
                raise ConnectionError("the server left")
            data += part
        return data


@contextmanager
def served(**options: Any) -> Iterator[tuple[igtl.IgtlSink, Reader]]:
    with igtl.open_sink("//:0", **options) as sink:
        reader = Reader(sink.port)
        try:
            wait_for(lambda: sink.counters["clients"] == 1)
            yield sink, reader
        finally:
            reader.close()


def wait_for(condition: Any) -> None:
    end = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("version", [1, 2])
def test_mask_reading_and_status_arrive_as_they_were(version: int) -> None:
    result = live_result(3)
    assert result.prediction is not None and result.prediction.measurement is not None
    with served(header_version=version) as (sink, reader):
        sink.write_live(result)
        image = wire.unpack_image(message := reader.until("IMAGE"))
        np.testing.assert_array_equal(image.pixels, result.prediction.mask_on_frame())
        assert image.pixels.shape == result.frame.pixels.shape and image.pixels.any()
        assert image.spacing_mm == pytest.approx(result.frame.spacing_mm, rel=1e-5)
        assert message.header.device == igtl.MASK and (message.message_id is not None) == (version == 2)
        told = json.loads(wire.unpack_string(reader.until("STRING")))
        assert told["hc_mm"] == result.prediction.measurement.hc_mm and told["valid"] and told["seq"] == 3
        assert wire.unpack_status(reader.until("STATUS")) == (1, "LIVE")


def test_a_session_is_followed(fake_bundle: Path, plug_in: object) -> None:
    with driver(fake_bundle) as live, served() as (sink, reader):
        for frame in phantoms(3):
            (result,) = live.run([frame], [sink])
            assert result.prediction is not None
            image = wire.unpack_image(reader.until("IMAGE"))
            while json.loads(wire.unpack_string(reader.until("STRING"))).get("seq") != frame.seq:
                image = wire.unpack_image(reader.until("IMAGE"))
            np.testing.assert_array_equal(image.pixels, result.prediction.mask_on_frame())


@pytest.mark.parametrize(
    "changes", [{"withheld": True, "stale": True, "valid": False}, {"prediction": None, "valid": False}]
)
def test_what_may_not_be_shown_is_an_empty_mask_without_numbers(changes: dict[str, Any]) -> None:
    with served() as (sink, reader):
        sink.write_live(live_result(3, **changes))
        image = wire.unpack_image(reader.until("IMAGE"))
        assert image.pixels.shape == (270, 400) and not image.pixels.any()
        told = json.loads(wire.unpack_string(reader.until("STRING")))
        assert told["valid"] is False and "hc_mm" not in told


def test_a_lost_source_withdraws_the_mask_and_says_so() -> None:
    with served() as (sink, reader):
        sink.write_live(live_result(3))
        assert wire.unpack_image(reader.until("IMAGE")).pixels.any()
        sink.on_state(StateChange(before=LiveState.LIVE, after=LiveState.LOST, t_ns=1, reason="gone"))
        assert not wire.unpack_image(reader.until("IMAGE")).pixels.any()
        assert json.loads(wire.unpack_string(reader.until("STRING"))) == {
            "schema": igtl.SCHEMA,
            "state": "lost",
            "valid": False,
        }
        assert wire.unpack_status(reader.until("STATUS")) == (13, "LOST")


def test_signs_of_life_come_without_results() -> None:
    with served() as (_, reader):
        assert [wire.unpack_status(reader.message()) for _ in range(3)] == [(13, "LOST")] * 3


def test_a_client_that_reads_nothing_and_one_that_vanishes_hold_up_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(igtl, "SEND_TIMEOUT_S", 0.5)
    with served() as (sink, reader):
        deaf = socket.socket()
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.connect(("127.0.0.1", sink.port))
        gone = socket.create_connection(("127.0.0.1", sink.port))
        wait_for(lambda: sink.counters["clients"] == 3)
        # a reset, as a process that was killed leaves it
        gone.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        gone.close()
        results = [live_result(seed) for seed in range(4)]
        slowest_s, last, sent = 0.0, -1, 0
        end = time.monotonic() + WAIT_S
        while sink.counters["clients_lost"] < 2:
            start = time.monotonic()
            sink.write_live(results[sent % 4])
            slowest_s, sent = max(slowest_s, time.monotonic() - start), sent + 1
            last = json.loads(wire.unpack_string(reader.until("STRING"))).get("seq", last)
            assert time.monotonic() < end, sink.counters
        assert slowest_s < 0.5, "the loop waited for a client"
        assert last >= 0 and sink.counters["clients"] == 3
        deaf.close()


def test_a_blocked_send_would_be_seen() -> None:
    """The control: a plain send to a client that reads nothing does block."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        deaf = socket.create_connection(listener.getsockname())
        connection, _ = listener.accept()
        connection.settimeout(0.3)
        with pytest.raises(TimeoutError):
            while True:
                connection.sendall(bytes(1 << 20))
        connection.close()
        deaf.close()


def test_a_slow_client_gets_the_newest(monkeypatch: pytest.MonkeyPatch) -> None:
    results = [live_result(seed % 4, index=seed, age_ms=float(seed)) for seed in range(400)]
    with served() as (sink, reader):
        for result in results:
            sink.write_live(result)
        ages: list[float] = []
        while not ages or ages[-1] != 399.0:
            told = json.loads(wire.unpack_string(reader.until("STRING")))
            ages += [told["age_ms"]] if "age_ms" in told else []
        assert len(ages) < 400 and ages == sorted(ages)


def test_closing_leaves_no_thread_and_frees_the_port() -> None:
    before = {thread.ident for thread in threading.enumerate()}
    with served() as (sink, _):
        port = sink.port
        with pytest.raises(OutputError, match="is in use: give port 0"):
            igtl.open_sink(f"//127.0.0.1:{port}")
    sink.close()
    sink.write_live(live_result(1))
    assert {thread.ident for thread in threading.enumerate()} <= before
    with open_sink(f"igtl://127.0.0.1:{port}") as again:
        assert again.port == port  # type: ignore[attr-defined]


def test_only_this_machine_unless_told() -> None:
    with open_sink("igtl://:0") as sink:
        assert sink.host == "127.0.0.1"  # type: ignore[attr-defined]
    for wrong in ("igtl://host:port", "igtl://:99999", "igtl://a b:1"):
        with pytest.raises(InputError, match="where to listen"):
            open_sink(wrong)
    with pytest.raises(InputError, match="header version"):
        open_sink("igtl://:0", header_version=7)


def test_pyigtl_sees_mask_and_reading() -> None:
    pyigtl = pytest.importorskip("pyigtl", reason="install tinyusfm-edge[test]")
    result = live_result(3)
    assert result.prediction is not None
    with igtl.open_sink("//:0") as sink:
        client = pyigtl.OpenIGTLinkClient("127.0.0.1", sink.port)
        try:
            wait_for(lambda: client.is_connected() and sink.counters["clients"])
            sink.write_live(result)
            image = client.wait_for_message(igtl.MASK, timeout=WAIT_S)
            text = client.wait_for_message(igtl.READING, timeout=WAIT_S)
        finally:
            client.stop()
    np.testing.assert_array_equal(np.squeeze(image.image), result.prediction.mask_on_frame())
    assert image.image.tobytes() == result.prediction.mask_on_frame().tobytes(), "byte-equal"
    assert image.ijk_to_world_matrix[0, 0] == pytest.approx(result.frame.spacing_mm[1], rel=1e-5)  # type: ignore[index]
    assert json.loads(text.string)["seq"] == 3


CPP_CLIENT = r"""
#include <igtlClientSocket.h>
#include <igtlImageMessage.h>
#include <igtlMessageHeader.h>
#include <igtlStringMessage.h>
#include <cstdio>
#include <cstdlib>

// Receives one IMAGE and one STRING, both with a good CRC: size, spacing and text go out, pixels to a file.
int main(int argc, char** argv) {
  igtl::ClientSocket::Pointer socket = igtl::ClientSocket::New();
  if (socket->ConnectToServer("127.0.0.1", atoi(argv[1])) != 0) return 2;
  socket->SetReceiveTimeout(30000);
  bool image_seen = false, text_seen = false;
  while (!image_seen || !text_seen) {
    igtl::MessageHeader::Pointer header = igtl::MessageHeader::New();
    header->InitPack();
    bool timeout = false;
    if (socket->Receive(header->GetPackPointer(), header->GetPackSize(), timeout) != (igtlUint64)header->GetPackSize())
      return 3;
    header->Unpack();
    std::string kind = header->GetDeviceType();
    if (kind == "IMAGE") {
      igtl::ImageMessage::Pointer image = igtl::ImageMessage::New();
      image->SetMessageHeader(header);
      image->AllocatePack();
      socket->Receive(image->GetPackBodyPointer(), image->GetPackBodySize(), timeout);
      if (!(image->Unpack(1) & igtl::MessageHeader::UNPACK_BODY)) return 4;
      int size[3];
      float spacing[3];
      image->GetDimensions(size);
      image->GetSpacing(spacing);
      std::printf("%s %d %d %d %.6f %.6f\n", image->GetDeviceName(), size[0], size[1], size[2], spacing[0], spacing[1]);
      FILE* file = std::fopen(argv[2], "wb");
      std::fwrite(image->GetScalarPointer(), 1, image->GetImageSize(), file);
      std::fclose(file);
      image_seen = true;
    } else if (kind == "STRING") {
      igtl::StringMessage::Pointer text = igtl::StringMessage::New();
      text->SetMessageHeader(header);
      text->AllocatePack();
      socket->Receive(text->GetPackBodyPointer(), text->GetPackBodySize(), timeout);
      if (!(text->Unpack(1) & igtl::MessageHeader::UNPACK_BODY)) return 5;
      std::printf("%s\n", text->GetString());
      text_seen = true;
    } else {
      socket->Skip(header->GetBodySizeToRead(), 1);
    }
  }
  socket->CloseSocket();
  return 0;
}
"""


@pytest.fixture(scope="module")
def cpp_client(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A client built with the reference library in C++."""
    include = next((p.parent for p in Path("/usr/include").glob("*/igtlImageMessage.h")), None)
    if include is None or shutil.which("g++") is None:
        pytest.skip("libopenigtlink-dev or g++ is not installed")
    folder = tmp_path_factory.mktemp("cpp")
    (folder / "client.cxx").write_text(CPP_CLIENT, encoding="utf-8")
    command = ["g++", "-w", "-O1", f"-I{include}", "client.cxx", "-o", "client", "-lOpenIGTLink", "-lpthread"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder / "client"


def test_the_reference_library_sees_the_same_bytes(cpp_client: Path, tmp_path: Path) -> None:
    # the packaged library is built for protocol 2, so header version 1 is all that it reads
    result = live_result(5)
    assert result.prediction is not None and result.frame.spacing_mm is not None
    with igtl.open_sink("//:0") as sink:
        sink.write_live(result)
        command = [str(cpp_client), str(sink.port), str(tmp_path / "pixels")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, (done.returncode, done.stderr)
    geometry, text = done.stdout.splitlines()
    row_mm, col_mm = result.frame.spacing_mm
    assert geometry == f"Mask 400 270 1 {np.float32(col_mm):.6f} {np.float32(row_mm):.6f}"
    assert (tmp_path / "pixels").read_bytes() == result.prediction.mask_on_frame().tobytes()
    assert json.loads(text) == json.loads(json.dumps(igtl.as_reading(result)))
