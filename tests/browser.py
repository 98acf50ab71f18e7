"""A headless Chromium for the tests of pages, driven over the WebDriver protocol with the standard library.

Skips with the reason where Chromium or its driver is not installed. Every profile is fresh and thrown away.
"""

from __future__ import annotations

import base64
import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

ARGUMENTS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
)  # fmt: skip
START_S = 60.0


class Browser:
    """One window of one browser."""

    def __init__(self, driver: str, profile: Path) -> None:
        self._driver = driver
        options = {"args": [*ARGUMENTS, f"--user-data-dir={profile}"], "binary": shutil.which("chromium")}
        wanted = {"browserName": "chrome", "goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        made = self._ask("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
        self._session = f"/session/{made['sessionId']}"

    def open(self, url: str) -> None:
        """Goes to a page and waits until it has loaded."""
        self._ask("POST", f"{self._session}/url", {"url": url})

    def run(self, script: str, *arguments: Any) -> Any:
        """Runs JavaScript; ``return`` gives the value."""
        return self._ask("POST", f"{self._session}/execute/sync", {"script": script, "args": list(arguments)})

    def resize(self, width: int, height: int) -> None:
        """Gives the page exactly this size in CSS pixels, as a tablet would."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        command = {"cmd": "Emulation.setDeviceMetricsOverride", "params": metrics}
        self._ask("POST", f"{self._session}/goog/cdp/execute", command)

    def screenshot(self) -> bytes:
        """What is seen, as PNG."""
        return base64.b64decode(self._ask("GET", f"{self._session}/screenshot"))

    def log(self) -> list[str]:
        """What the browser complained about since the last call."""
        return [line["message"] for line in self._ask("POST", f"{self._session}/se/log", {"type": "browser"})]

    def wait(self, script: str, seconds: float = 30.0) -> Any:
        """Waits until a JavaScript expression is true and returns it."""
        end = time.monotonic() + seconds
        while not (value := self.run(f"return {script}")):
            assert time.monotonic() < end, f"{script} did not become true: {self.run('return window.livePage')}"
            time.sleep(0.05)
        return value

    def quit(self) -> None:
        """Closes the window."""
        self._ask("DELETE", self._session)

    def _ask(self, method: str, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._driver + path, data, {"Content-Type": "application/json"}, method=method)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=START_S) as answer:
                return json.loads(answer.read())["value"]
        except urllib.error.HTTPError as error:
            with error:
                raise AssertionError(error.read().decode(errors="replace")[:500]) from error


@contextmanager
def chromium(folder: Path) -> Iterator[Browser]:
    """A browser with its profile in an empty folder."""
    if shutil.which("chromium") is None or shutil.which("chromedriver") is None:
        pytest.skip("chromium and chromium-driver are not installed")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = subprocess.Popen(
        ["chromedriver", f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=folder
    )
    try:
        _until(lambda: _listens(port), "chromedriver listens")
        browser = Browser(f"http://127.0.0.1:{port}", folder / "profile")
        try:
            yield browser
        finally:
            browser.quit()
    finally:
        process.terminate()
        process.wait(30)


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _until(condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + START_S
    while not condition():
        assert time.monotonic() < end, f"waited in vain until {what}"
        time.sleep(0.05)
