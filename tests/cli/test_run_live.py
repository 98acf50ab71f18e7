"""``run`` as a live loop: the table adds up, sinks are whole, exit codes and Ctrl-C are those of every command."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import child_environment, make_parts
from tests.plugged import plug_in_module, plugged
from tests.runtime.live_sources import HandSource, PacedSource, images, wait_until
from tinyusfm_edge.cli.main import INTERRUPTED, main
from tinyusfm_runtime import plugins
from tinyusfm_runtime.errors import SourceError

ENGINES = [name for name in ("ort", "ov") if plugins.available("engines", name).usable]
FRAMES = images(4)


@pytest.fixture(scope="module")
def bundle(tiny_files: Callable[[str], Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose artefacts are for every engine that works here."""
    if not ENGINES:
        pytest.skip("no engine is installed: pip install 'tinyusfm-edge[onnxruntime]'")
    parts = make_parts({name: tiny_files(name) for name in ENGINES})
    return parts.publish(tmp_path_factory.mktemp("live") / "tiny.bundle")


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Any:
    before = threading.active_count()
    yield
    wait_until(lambda: threading.active_count() <= before)


def probe(monkeypatch: pytest.MonkeyPatch, source: HandSource) -> None:
    """Lets ``hand:1`` be this source."""
    module = plug_in_module("hand", open_source=lambda location, **options: source, accepts=lambda location: False)
    plugged(monkeypatch, "sources", hand=module)


def test_a_file_with_a_budget_runs_live_and_loses_nothing(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "out.jsonl"
    line = ["run", str(bundle), "phantom:0-11", "--budget-ms", "60000", "--sink", f"jsonl:{place}", "--smooth"]
    assert main(line) == 0
    out = capsys.readouterr().out
    assert re.search(r"frames +12 received = 12 answered \+ 0 dropped \+ 0 rejected\n", out)
    assert "12 = 12 usable" in out and "age at result" in out and "p99" in out
    assert re.search(r"^drift +not checked 12$", out, re.M), "this bundle has no statistic"
    records = [json.loads(text) for text in place.read_text(encoding="utf-8").splitlines()]
    assert [record["seq"] for record in records if "seq" in record] == list(range(12))


def test_a_probe_runs_live_without_being_told(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = PacedSource(50, FRAMES, seconds=1.0)
    probe(monkeypatch, source)
    assert main(["run", str(bundle), "hand:1"]) == 0
    captured = capsys.readouterr()
    assert f"{source.sent} received" in captured.out and "state lost -> live" in captured.err
    assert "states" in captured.out
    numbers = re.search(r"(\d+) received = (\d+) answered \+ (\d+) dropped.*\+ (\d+) rejected", captured.out)
    assert numbers is not None
    received, answered, dropped, rejected = (int(text) for text in numbers.groups())
    assert received == answered + dropped + rejected


def test_a_limit_ends_a_probe(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = PacedSource(50, FRAMES)
    probe(monkeypatch, source)
    assert main(["run", str(bundle), "hand:1", "--limit", "3", "--budget-ms", "500"]) == 0
    assert source.closed == source.left == 1


def test_fallback_opens_every_artefact(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(bundle), "phantom:0-3", "--fallback", "--target", plugins.public_name(ENGINES[-1])]) == 0
    assert f"{plugins.public_name(ENGINES[-1])}-fp32" in capsys.readouterr().out


def test_a_killable_process_answers_the_same(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(bundle), "phantom:0-3", "--isolate", "--threads", "1"]) == 0
    assert "in a process of its own" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--sink", "out.jsonl"], "jsonl:"),
        (["--sink", "carrier-pigeon:x"], "carrier-pigeon|sink"),
        (["--policy", "sometimes"], "newest or lossless"),
        (["--fallback", "--allow-unverified"], "verified"),
        (["--fallback", "--precision", "int8"], "it has"),
    ],
)
def test_wrong_words_are_one_line_and_exit_code_2(
    bundle: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", str(bundle), "phantom:0-1", *words]) == 2
    captured = capsys.readouterr()
    assert re.search(message, captured.err) and captured.err.count("\n") == 1 and not captured.out


def test_a_probe_that_breaks_off_ends_with_its_error_and_the_table(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    source = HandSource()
    source.push(FRAMES[0], SourceError("the probe was pulled out"))
    probe(monkeypatch, source)
    assert main(["run", str(bundle), "hand:1", "--sink", f"jsonl:{tmp_path / 'o.jsonl'}"]) == 2
    captured = capsys.readouterr()
    assert "pulled out" in captured.err and "1 received" in captured.out
    records = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text(encoding="utf-8").splitlines()]
    assert sum(record["kind"] == "result" for record in records) == 1, "what was recorded before the error stays"


def test_ctrl_c_closes_the_sinks_and_prints_the_table(bundle: Path, tmp_path: Path) -> None:
    place = tmp_path / "out.jsonl"
    code = (
        "import sys\n"
        "from tests.runtime.live_sources import PacedSource, images\n"
        "from tinyusfm_runtime import sources\n"
        "frames = [*images(4) * 5, *images(1) * 10_000]\n"
        "sources.open_source = lambda location, **options: PacedSource(20, frames)\n"
        "from tinyusfm_edge.cli.main import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    root = str(Path(__file__).resolve().parents[2])
    environment = child_environment()
    environment["PYTHONPATH"] = root + ":" + environment.get("PYTHONPATH", "")
    child = subprocess.Popen(
        [sys.executable, "-c", code, "run", str(bundle), "igtl://x", "--budget-ms", "60000",
         "--sink", f"jsonl:{place}"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=root,
    )  # fmt: skip
    assert child.stderr is not None
    line = child.stderr.readline()
    assert line.startswith("state lost -> live"), line
    while "-> frozen" not in line:  # the image stands still after a second
        line = child.stderr.readline()
        assert line.startswith("state "), line
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=900)
    assert child.returncode == INTERRUPTED, err
    assert "received" in out and "stopped" in err and "Traceback" not in err
    assert "live state" not in err, "said once"
    assert place.exists()
