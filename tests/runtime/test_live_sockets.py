"""A loop opens no socket but the one its source was told to; listened to by an audit hook in a fresh process."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import Parts, child_environment
from tinyusfm_runtime import plugins

ENGINES = [name for name in ("ort", "ov") if plugins.available("engines", name).usable]
SIDE, COUNT = 64, 12
CHILD = """
import json, socket, sys

heard = []

def hear(event, arguments):
    if event in ("socket.connect", "socket.bind", "socket.sendto", "socket.getaddrinfo", "socket.gethostbyname"):
        heard.append([event, str(arguments[-1] if event.startswith(("socket.connect", "socket.bind", "socket.sendto"))
                                 else arguments[0])])
    if event in ("socket.__new__",):
        heard.append([event, ""])

sys.addaudithook(hear)

import numpy as np
from tinyusfm_runtime.frame import Frame
from tinyusfm_runtime.live.fallback import Fallback
from tinyusfm_runtime.live.loop import Live

bundle, port, chatty = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "chatty"

class Remote:
    count = 0
    last_contact_ns = None
    counters = {}

    def __enter__(self):
        self.link = socket.create_connection(("127.0.0.1", port))
        return self

    def __exit__(self, *error):
        self.link.close()

    def close(self):
        pass

    def __iter__(self):
        with self.link.makefile("rb") as stream:
            while len(raw := stream.read(SIDE * SIDE)) == SIDE * SIDE:
                self.count += 1
                yield Frame(pixels=np.frombuffer(raw, np.uint8).reshape(SIDE, SIDE), seq=self.count)

class Chatty:
    def write_live(self, result):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as out:
            out.sendto(b"home", ("127.0.0.1", 9))

with Fallback.open(bundle) as fallback:
    with Live(fallback, Remote(), budget_ms=60000, sinks=[Chatty()] if chatty else []) as live:
        results = sum(1 for _ in live)
print(json.dumps({"heard": heard, "received": live.counters.received, "results": results}))
"""


def heard_in_a_run(bundle: Path, manner: str) -> tuple[dict[str, Any], int]:
    """Runs a loop in a fresh process on frames from a socket of ours; what its audit hook heard, and our port."""
    frames = np.random.default_rng(4).integers(0, 256, (COUNT, SIDE, SIDE), dtype=np.uint8)
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(120)
        port = server.getsockname()[1]

        def serve() -> None:
            link, _ = server.accept()
            with link:
                link.sendall(frames.tobytes())

        server_thread = threading.Thread(target=serve)
        server_thread.start()
        code = textwrap.dedent(CHILD).replace("SIDE", str(SIDE))
        done = subprocess.run(
            [sys.executable, "-c", code, str(bundle), str(port), manner],
            capture_output=True, text=True, env=child_environment(), timeout=900,
        )  # fmt: skip
        server_thread.join()
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert found["received"] == COUNT and found["results"] >= 1
    return found, port


@pytest.fixture(scope="module")
def bundle(engine_parts: Callable[[str], Parts], tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not ENGINES:
        pytest.skip("no engine is installed: pip install 'tinyusfm-edge[onnxruntime]'")
    return engine_parts(ENGINES[-1]).publish(tmp_path_factory.mktemp("sockets") / "b.bundle")


def strangers(found: dict[str, Any], port: int) -> list[list[str]]:
    """What was heard that does not belong to the source: anything but one socket, asked for and connected."""
    expected = [
        ["socket.getaddrinfo", "127.0.0.1"],
        ["socket.__new__", ""],
        ["socket.connect", f"('127.0.0.1', {port})"],
    ]
    rest = [list(item) for item in found["heard"]]
    for item in expected:
        assert item in rest, "the control: the source's own socket is heard"
        rest.remove(item)
    return rest


def test_no_socket_is_opened_but_the_sources_own(bundle: Path) -> None:
    assert not strangers(*heard_in_a_run(bundle, "quiet"))


def test_another_socket_is_heard(bundle: Path) -> None:
    assert any(event == "socket.sendto" for event, _ in strangers(*heard_in_a_run(bundle, "chatty")))
