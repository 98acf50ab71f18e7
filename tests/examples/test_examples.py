"""The scripts in examples/ do what they say, each run as a person would run it."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import child_environment, make_parts
from tinyusfm_runtime import Session, plugins
from tinyusfm_runtime.phantom import make_phantom

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
ENGINES = [name for name in ("ort", "ov") if plugins.available("engines", name).usable]


@pytest.fixture(scope="module")
def bundle(engine_parts: Callable[[str], Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of the tiny model, for an engine that works here."""
    if not ENGINES:
        pytest.skip("no engine is installed: pip install 'tinyusfm-edge[onnxruntime]'")
    path: Path = engine_parts(ENGINES[0]).publish(tmp_path_factory.mktemp("examples") / "tiny.bundle")
    return path


def run(name: str, *arguments: object, timeout_s: float = 250) -> subprocess.CompletedProcess[str]:
    """Runs an example in an interpreter of its own."""
    line = [sys.executable, str(EXAMPLES / name), *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, env=child_environment(), timeout=timeout_s)


def test_a_clip_is_read_frame_by_frame(bundle: Path) -> None:
    done = run("run_clip.py", bundle, "phantom:0-3")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Session(tiny.bundle: ") and done.stdout.count("Prediction(seq=") == 4
    assert re.search(r"median circumference of \d frames: \d+\.\d mm\n$", done.stdout)


def test_a_link_is_watched_with_a_callback(bundle: Path) -> None:
    from tinyusfm_runtime.replay.faults import plan
    from tinyusfm_runtime.replay.outlets import IgtlOutlet
    from tinyusfm_runtime.replay.player import play
    from tinyusfm_runtime.transport.igtl_server import IgtlServer

    frames = (replace(make_phantom(seed % 4).frame, seq=seed) for seed in range(100_000))
    stop = threading.Event()
    outlet = IgtlOutlet(IgtlServer())
    sending = threading.Thread(
        target=play, args=(plan(frames, rate_hz=20, faults=frozenset(), seed=0), outlet),
        kwargs={"rate_hz": 20, "seed": 0, "stop": stop},
    )  # fmt: skip
    sending.start()
    try:
        done = run("live_igtl.py", bundle, outlet.address, 5)
    finally:
        stop.set()
        sending.join()
        outlet.close()
    assert done.returncode == 0, done.stderr
    assert "state lost -> " in done.stdout, "the callback was told"
    assert len(re.findall(r"^frame \d+: .*ms old$", done.stdout, flags=re.MULTILINE)) == 5
    assert "LiveCounters(received=" in done.stdout


def test_a_sink_of_ones_own_is_a_sink_in_code_and_on_the_command_line(bundle: Path, tmp_path: Path) -> None:
    done = run("own_sink.py", bundle, "phantom:0-5", tmp_path / "head.txt")
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"\d+\.\d mm, live\n", done.stdout) and (tmp_path / "head.txt").read_text() == done.stdout
    plug_in(tmp_path, "own_sink", "sinks", "median")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from tinyusfm_edge.cli.main import main; sys.exit(main())"
    )
    line = ["run", str(bundle), "phantom:0-5", "--sink", f"median:{tmp_path / 'other.txt'}"]
    again = subprocess.run(
        [sys.executable, "-c", code, *line], capture_output=True, text=True, env=child_environment(), timeout=900
    )
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "other.txt").read_text() == done.stdout


def test_an_engine_of_ones_own_answers_like_the_others(
    tiny_files: Callable[[str], dict[str, bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnx", reason="onnx is not installed: pip install 'tinyusfm-edge[export]'")
    plug_in(tmp_path, "own_engine", "engines", "onnx-reference")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "own_engine", raising=False)
    assert plugins.available("engines", "onnx-reference").usable
    parts = make_parts({"fake": tiny_files("ort")})
    (artefact,) = parts.artefacts
    named = replace(parts, artefacts=(replace(artefact, engine="onnx-reference"),))
    with Session.open(named.publish(tmp_path / "own.bundle")) as session:
        assert "reference evaluator" in session.description and session.verified
        frame = make_phantom(3).frame
        prediction = session.predict(frame)
        assert prediction.mask is not None and prediction.measurement is not None
        truth_mm = make_phantom(3).hc_mm
        assert prediction.mask.shape == frame.pixels.shape and np.isfinite(truth_mm)


@pytest.mark.slow
def test_a_student_is_exported_and_verified_from_python(tmp_path: Path) -> None:
    for library in ("torch", "onnx", "pydicom"):
        pytest.importorskip(library, reason=f"{library} is not installed: pip install 'tinyusfm-edge[demo]'")
    if not ENGINES:
        pytest.skip("no engine is installed: pip install 'tinyusfm-edge[onnxruntime]'")
    done = run("export_and_verify.py", tmp_path / "out.bundle", "onnx" if "ort" in ENGINES else "openvino")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "published " in done.stdout and "passed: full gate against the live PyTorch reference" in done.stdout


def plug_in(folder: Path, module: str, kind: str, name: str) -> None:
    """Puts an example into a folder as an installed distribution with one entry point."""
    shutil.copy(EXAMPLES / f"{module}.py", folder / f"{module}.py")
    info = folder / f"{module}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n", encoding="utf-8")
    (info / "entry_points.txt").write_text(f"[tinyusfm.{kind}]\n{name} = {module}\n", encoding="utf-8")
