"""Live sources on the command line: what cannot work is said at once, and giving up has an exit code of its own."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from tinyusfm_edge.cli.main import main


@pytest.mark.parametrize("command", ["run", "live"])
@pytest.mark.parametrize("source", ["push:", "clarius:", "push:LABEL"])
def test_sources_that_only_a_program_can_feed_are_refused(
    bundle: Path, capfd: pytest.CaptureFixture[str], command: str, source: str
) -> None:
    assert main([command, str(bundle), source]) == 2
    assert "fed by a program" in capfd.readouterr().err


def test_giving_up_ends_with_6_and_says_why(bundle: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"igtl://127.0.0.1:{taken.getsockname()[1]}"
    assert main(["run", str(bundle), address, "--connect-timeout", "1.5"]) == 6
    said = capfd.readouterr().err
    assert "nobody listens" in said and "no frame within 1.5 s" in said
    assert said.index("connection") < said.index("no frame within"), "told while it tries, and not only at the end"


def test_a_window_reaches_the_source_and_a_wrong_one_is_named(
    bundle: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    np = pytest.importorskip("numpy")
    image = pytest.importorskip("PIL.Image", reason="install tinyusfm-edge[images]")
    ramp = np.add.outer(np.arange(64), np.arange(96)).astype(np.uint16) * 16
    image.fromarray(ramp).save(tmp_path / "deep.png")
    assert main(["run", str(bundle), str(tmp_path / "deep.png")]) == 2
    assert "--window LO,HI" in capfd.readouterr().err
    assert main(["run", str(bundle), str(tmp_path / "deep.png"), "--window", "0,2544"]) == 0
    assert main(["run", str(bundle), str(tmp_path / "deep.png"), "--window", "9,3"]) == 2
    assert "window 9,3" in capfd.readouterr().err
