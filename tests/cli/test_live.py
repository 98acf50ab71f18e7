"""``tinyusfm-edge live``, whole: a source, a page that somebody looks at, further sinks, and an end that adds up."""

from __future__ import annotations

import inspect
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tests.browser import chromium
from tests.cli.conftest import ENGINES
from tests.conftest import child_environment
from tinyusfm_edge.cli.main import main
from tinyusfm_edge.cli.streams import live, run
from tinyusfm_runtime import plugins
from tinyusfm_runtime.replay.played import Played
from tinyusfm_runtime.sinks import web
from tinyusfm_runtime.sinks.audit.chain import verify_file
from tinyusfm_runtime.sources import open_source

if not web.available().usable:
    pytest.skip(web.available().reason, allow_module_level=True)


def test_a_file_is_played_and_every_sink_is_told(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log, lines = tmp_path / "audit.jsonl", tmp_path / "out.jsonl"
    command = ["live", str(bundle), "phantom:0-5", "--port", "0", "--once", "--fps", "20", "--budget-ms", "5000"]
    assert main([*command, "--sink", f"audit:{log}", "--sink", f"jsonl:{lines}", "--sink", "igtl://:0"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"page +http://127\.0\.0\.1:\d+/\n", out)
    received, answered = map(int, re.search(r"frames +(\d+) received = (\d+) answered", out).groups())  # type: ignore[union-attr]
    records = [json.loads(line) for line in lines.read_text(encoding="utf-8").splitlines()]
    results = [record for record in records if record["kind"] == "result"]
    assert received == 6 and len(results) == answered > 0
    report = verify_file(log)
    assert report and report.closed and report.head in out
    dropped = sum(record["live"]["dropped_since_last"] for record in results)
    assert answered + dropped <= received


def test_fallback_smoothing_and_isolation_are_those_of_run(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = tmp_path / "out.jsonl"
    command = ["live", str(bundle), "phantom:0-3", "--port", "0", "--once", "--fps", "10", "--budget-ms", "5000"]
    recorded = tmp_path / "recorded"
    line = [*command, "--fallback", "--isolate", "--smooth", "--sink", f"jsonl:{lines}", "--record", str(recorded)]
    assert main(line) == 0
    shown = capsys.readouterr()
    assert "in a process of its own" in shown.out and "RECORDING IMAGES" in shown.err
    assert f"tinyusfm-edge replay {recorded / 'clip.mha'}" in shown.out, "the command to type next plays it"
    assert main(["run", str(bundle), str(recorded / "clip.mha")]) == 0
    assert re.search(r"frames +[1-4], 0 invalid", capsys.readouterr().out)
    records = [json.loads(line) for line in lines.read_text(encoding="utf-8").splitlines()]
    smoothed = [record["smoothed"] for record in records if record["kind"] == "result"]
    assert smoothed and all(each is not None for each in smoothed)
    assert main([*command, "--fallback", "--allow-unverified"]) == 2
    assert main([*command, "--fallback", "--drift"]) == 2
    shared = {"fallback", "isolate", "smooth", "drift", "target", "precision", "threads", "crop", "spacing", "sink"}
    for name in shared | {"allow_unverified"}:
        of_live, of_run = (inspect.signature(inspect.unwrap(which)).parameters[name] for which in (live.live, run.run))
        assert of_live == of_run and str(of_live.annotation).startswith("loop_options."), "one definition"


def test_a_sink_over_the_source_or_over_another_is_refused(bundle: Path, tmp_path: Path) -> None:
    place = f"jsonl:{tmp_path / 'a'}"
    assert main(["live", str(bundle), "phantom:0", "--sink", place, "--sink", place]) == 2
    assert main(["live", str(bundle), str(tmp_path / "a"), "--sink", place]) == 2
    assert main(["live", str(bundle), "phantom:0", "--sink", "nothing:x", "--port", "0"]) == 2
    assert list(tmp_path.iterdir()) == []


def test_played_files_keep_their_rate_and_go_round() -> None:
    source = Played(open_source("phantom:0-1"), lambda: open_source("phantom:0-1"), rate_hz=50.0)
    begun = time.monotonic_ns()
    with source as playing:
        frames = [frame for _, frame in zip(range(6), playing, strict=False)]
    assert [frame.seq for frame in frames] == list(range(6))
    assert (frames[0].pixels == frames[2].pixels).all()
    # from the start on and not from frame to frame: after one that was late, the next may come sooner
    after_ns = [frame.t_recv_ns - begun for frame in frames if frame.t_recv_ns is not None]
    assert len(after_ns) == 6
    assert all(ns >= index * 20e6 for index, ns in enumerate(after_ns)), "never faster than asked"


def test_a_played_file_that_is_left_ends_at_once() -> None:
    source = Played(open_source("phantom:0-1"), None, rate_hz=0.1)
    seen: list[int] = []

    def read() -> None:
        seen.extend(frame.seq for frame in source)

    thread = threading.Thread(target=read)
    with source:
        thread.start()
    thread.join(20)
    assert not thread.is_alive() and len(seen) <= 1


@pytest.mark.slow
@pytest.mark.parametrize("clip", [None, "clips/sonosite-anon-eye1-video.mp4"], ids=["phantom", "clip"])
def test_chromium_watches_the_command(
    bundle: Path, tmp_path: Path, clip: str | None, request: pytest.FixtureRequest
) -> None:
    source = "phantom:0-3"
    if clip is not None:
        pytest.importorskip("av", reason="install tinyusfm-edge[video]")
        source = str(request.getfixturevalue("shared_folder") / "data" / clip)
        if not Path(source).is_file():
            pytest.skip("the clips are not in the data folder")
    command = [
        sys.executable,
        "-m",
        "tinyusfm_edge",
        "live",
        str(bundle),
        source,
        "--loop",
        "--fps",
        "5",
        "--port",
        "0",
    ]
    options = ["--budget-ms", "5000", "--sink", f"audit:{tmp_path / 'audit.jsonl'}"]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([*command, *options], env=child_environment(PYTHONUNBUFFERED="1"), **pipes)
    try:
        assert process.stdout is not None
        url = process.stdout.readline().split()[-1]
        with chromium(tmp_path) as browser:
            browser.resize(1280, 800)
            browser.open(url)
            browser.wait("window.livePage && livePage.frames >= 3 && livePage.results > 3", 60)
            browser.wait("document.getElementById('balance').textContent === 'every frame accounted for'")
            engine = browser.run("return document.getElementById('engine').textContent")
            assert plugins.public_name(ENGINES[0]) in engine, "the engine really used"
            assert browser.log() == []
        os.kill(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=900)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 0 and "stopped" in err and "received" in out
    report = verify_file(tmp_path / "audit.jsonl")
    assert report and report.closed and report.head in out
