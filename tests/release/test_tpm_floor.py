"""The TPM floor of the documents, on the software TPM swtpm: it rises and it never falls."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

PAGE = Path(__file__).resolve().parents[2] / "docs" / "trust" / "signing.md"


def free_port() -> int:
    """A port whose successor, where tools look for the control channel, is free too."""
    while True:
        with socket.socket() as probe, socket.socket() as second:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
            try:
                second.bind(("127.0.0.1", port + 1))
            except OSError:
                continue
            return port


@pytest.fixture
def tcti(tmp_path: Path) -> Iterator[str]:
    """Address of a fresh software TPM."""
    if shutil.which("swtpm") is None or shutil.which("tpm2_nvread") is None:
        pytest.skip("there is no software TPM: apt-get install swtpm tpm2-tools")
    port = free_port()
    command = ["swtpm", "socket", "--tpm2", "--tpmstate", f"dir={tmp_path}", "--flags", "not-need-init,startup-clear"]
    command += ["--server", f"type=tcp,port={port}", "--ctrl", f"type=tcp,port={port + 1}"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    address = f"swtpm:host=127.0.0.1,port={port}"
    try:
        stop = time.monotonic() + 900
        while subprocess.run(["tpm2_getrandom", "1", "-T", address], capture_output=True).returncode != 0:
            assert time.monotonic() < stop, "the software TPM does not answer"
            time.sleep(0.1)
        yield address
    finally:
        process.terminate()
        process.wait()


def floor_class() -> Any:
    code = next(
        block for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL) if "TpmFloor" in block
    )
    names: dict[str, Any] = {}
    exec(code, names)
    return names["TpmFloor"]


def test_the_floor_rises_and_never_falls(tcti: str) -> None:
    floor = floor_class()(tools=("-T", tcti))
    floor.provision()
    assert floor.read("head") == 0
    floor.raise_to("head", 3)
    floor.raise_to("head", 2)
    assert floor.read("head") == 3
    again = floor_class()(tools=("-T", tcti))
    assert again.read("head") == 3, "the number lies in the TPM, not in the program"
    with pytest.raises(subprocess.CalledProcessError):
        again._run("nvwrite", again._base, "-C", "o", "-i", "-", given=(0).to_bytes(8, "big"))
