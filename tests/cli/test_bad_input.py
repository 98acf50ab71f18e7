"""Bad input: one clear line on standard error, an exit code that is not 0, and no file left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import ENGINES
from tests.plugged import plug_in_module, plugged
from tinyusfm_edge.cli import main as cli
from tinyusfm_edge.cli.main import main
from tinyusfm_runtime import plugins
from tinyusfm_runtime.overlay import encode_png
from tinyusfm_runtime.phantom import make_phantom


@pytest.fixture
def fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command in an empty folder and returns its one line; whatever is written there is a fault."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)

    def run(*arguments: str, code: int | None = None) -> str:
        exit_code = main(list(arguments))
        captured = capfd.readouterr()
        lines = [line for line in captured.err.splitlines() if not line.startswith("note: ")]
        assert len(lines) == 1, captured.err
        assert lines[0].startswith("error: ") and "Traceback" not in captured.err
        assert exit_code != 0 and (code is None or exit_code == code)
        assert list(folder.iterdir()) == [], "a file was left behind"
        return lines[0].removeprefix("error: ")

    return run


def copy_of(bundle: Path, tmp_path: Path) -> Path:
    import shutil

    place = Path(shutil.copytree(bundle, tmp_path / "copy.bundle"))
    for path in place.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    return place


Fails = Callable[..., str]


def test_missing_bundle(fails: Fails) -> None:
    assert "no bundle at" in fails("run", "gone.bundle", "phantom:0", "--jsonl", "out.jsonl", code=2)


def test_every_file_of_a_bundle_is_guarded_against_a_flipped_byte(fails: Fails, bundle: Path, tmp_path: Path) -> None:
    names = [path.relative_to(bundle) for path in sorted(bundle.rglob("*")) if path.is_file()]
    assert len(names) >= 5
    place = copy_of(bundle, tmp_path)
    for name in names:
        good = (place / name).read_bytes()
        bad = bytearray(good)
        bad[len(bad) // 2] ^= 0x20
        (place / name).write_bytes(bad)
        message = fails("run", str(place), "phantom:0", "--jsonl", "out.jsonl", code=2)
        assert name.name in message or "manifest" in message
        (place / name).write_bytes(good)
    assert main(["run", str(place), "phantom:0"]) == 0, "whole again"


def test_truncated_model(fails: Fails, bundle: Path, tmp_path: Path) -> None:
    place = copy_of(bundle, tmp_path)
    model = next(path for path in sorted(place.glob("artefacts/*/model.*")))
    model.write_bytes(model.read_bytes()[:-10])
    assert model.name in fails("run", str(place), "phantom:0", code=2)


def test_unknown_target_and_precision_of_a_bundle(fails: Fails, bundle: Path) -> None:
    assert "it has" in fails("run", str(bundle), "phantom:0", "--target", "npu9000", code=2)
    assert "it has" in fails("profile", str(bundle), "--precision", "int3", code=2)


def test_unknown_target_of_an_export(fails: Fails) -> None:
    assert "npu9000" in fails("export", "--target", "npu9000", code=2)


def test_wrong_checkpoint(fails: Fails, tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="install tinyusfm-edge[export]")
    target = plugins.public_name(ENGINES[0]) if ENGINES else "openvino"
    if not plugins.names("targets"):
        pytest.skip("no target is there")
    for name, content in (("a.safetensors", b"\xff" * 64), ("b.pt", b"no zip"), ("c.pth", b"")):
        (tmp_path / name).write_bytes(content)
        message = fails(
            "export", str(tmp_path / name), "--target", target, "--task", "segment", "--labels", "head", code=2
        )
        assert name in message
    assert "no student 'nobody'" in fails("export", "nobody", "--target", target, code=2)


@pytest.mark.parametrize("command", ["export", "demo"])
def test_missing_extra(fails: Fails, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    message = fails(command, code=3)
    assert "pip install '" in message and "onnx" in message


def test_missing_engine_names_the_extra_and_what_else_there_is(
    fails: Fails, monkeypatch: pytest.MonkeyPatch, bundle: Path
) -> None:
    library = {"ort": "onnxruntime", "ov": "openvino"}[ENGINES[0]]
    monkeypatch.setitem(sys.modules, library, None)
    assert f"[{library}]'" in fails("run", str(bundle), "phantom:0", code=3)


def test_image_of_a_size_that_cannot_be(fails: Fails, bundle: Path, tmp_path: Path) -> None:
    pytest.importorskip("cv2", reason="install tinyusfm-edge[opencv]")
    (tmp_path / "tiny.png").write_bytes(encode_png(make_phantom(0).frame.pixels[:4, :4]))
    message = fails("run", str(bundle), str(tmp_path / "tiny.png"), "--jsonl", "out.jsonl", code=2)
    assert "sides must be 8" in message


def test_empty_folder(fails: Fails, bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "holds no image" in fails("run", str(bundle), str(tmp_path / "empty"), code=2)


def test_rubbish_leaves_neither_video_nor_lines(fails: Fails, bundle: Path, tmp_path: Path) -> None:
    pytest.importorskip("pydicom", reason="install tinyusfm-edge[dicom]")
    pytest.importorskip("av", reason="install tinyusfm-edge[video]")
    outputs = ("--overlay", "out.mp4", "--jsonl", "out.jsonl")
    (tmp_path / "rubbish.dcm").write_bytes(bytes(128) + b"DICM" + b"\x13" * 500)
    fails("run", str(bundle), str(tmp_path / "rubbish.dcm"), *outputs, code=2)


@pytest.mark.parametrize("place", ["gone/out.jsonl", "file/out.jsonl"])
def test_output_that_cannot_be_written(fails: Fails, bundle: Path, tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    message = fails("run", str(bundle), "phantom:0", "--jsonl", str(tmp_path / place), code=2)
    assert f"cannot write the JSON lines file {tmp_path / place}" in message, "the place as it was typed"
    message = fails("profile", str(bundle), "--rounds", "1", "--no-cold", "--json", str(tmp_path / place), code=2)
    assert f"cannot write the JSON {tmp_path / place}" in message


def test_output_over_the_source_is_refused(fails: Fails, bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "clip.mp4").write_bytes(b"the only copy")
    message = fails("run", str(bundle), str(tmp_path / "clip.mp4"), "--overlay", str(tmp_path / "clip.mp4"), code=2)
    assert "different files" in message
    assert (tmp_path / "clip.mp4").read_bytes() == b"the only copy"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run"], "Missing argument"),
        (["run", "{bundle}", "phantom:0", "--threads", "0"], "threads"),
        (["run", "{bundle}", "phantom:0", "--crop", "1,2,3"], "--crop"),
        (["run", "{bundle}", "phantom:0", "--crop", "0,0,9999,9999"], "does not lie inside"),
        (["run", "{bundle}", "phantom:0", "--spacing", "x"], "--spacing"),
        (["run", "{bundle}", "phantom:0", "--overlay", "out.avi"], ".mp4"),
        (["run", "{bundle}", "nowhere.xyz"], "nowhere.xyz does not exist"),
        (["paint"], "paint"),
        (["doctor", "--yaml"], "--yaml"),
        (["verify", "{bundle}", "--gate", "gone.toml"], "gone.toml"),
    ],
    ids=lambda value: "-".join(value[:4]) if isinstance(value, list) else "",
)
def test_wrong_options(fails: Fails, bundle: Path, arguments: list[str], words: str) -> None:
    assert words in fails(*(argument.replace("{bundle}", str(bundle)) for argument in arguments), code=2)


def test_a_bug_is_one_line_and_debug_shows_it(fails: Fails, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object, **options: object) -> None:
        raise RuntimeError("two\nlines")

    module = plug_in_module("broken", open_source=broken, accepts=lambda location: False)
    plugged(monkeypatch, "sources", broken=module)
    message = fails("run", str(bundle), "broken:0", code=cli.BUG)
    assert message == "unexpected RuntimeError: two lines (run again with --debug for the traceback)"
    with pytest.raises(RuntimeError, match="two"):
        main(["run", str(bundle), "broken:0", "--debug"])


def child(*arguments: str, **options: Any) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-m", "tinyusfm_edge", *arguments]
    return subprocess.Popen(command, text=True, env=environment, stderr=subprocess.PIPE, **options)


def test_ctrl_c_keeps_the_lines_so_far_and_says_stopped(bundle: Path, tmp_path: Path) -> None:
    place = tmp_path / "out.jsonl"
    process = child("run", str(bundle), "phantom:0-99999", "--jsonl", str(place), cwd=tmp_path)
    start = time.monotonic()
    while not (begun := place.is_file() and place.stat().st_size > 0) and time.monotonic() - start < 60:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    try:
        _, error = process.communicate(timeout=900)
    finally:
        process.kill()
    assert begun, "no line came within a minute"
    assert process.returncode == cli.INTERRUPTED
    assert error == "error: stopped\n"
    lines = place.read_text(encoding="utf-8").splitlines()
    assert lines and all(line.startswith("{") and line.endswith("}") for line in lines)
    assert [path.name for path in tmp_path.iterdir()] == [place.name]


def test_a_reader_that_goes_away_is_no_traceback(bundle: Path, tmp_path: Path) -> None:
    process = child("run", str(bundle), "phantom:0-200", "--jsonl", "-", stdout=subprocess.PIPE, cwd=tmp_path)
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    _, error = process.communicate(timeout=900)
    assert process.returncode != 0 and "Traceback" not in error and error.count("\n") <= 1


@pytest.mark.parametrize(
    "words",
    [
        ["--crop", "1e400,0,10,10"], ["--crop", "nan,0,10,10"], ["--crop", "0.5,0,10,10"], ["--crop", "0,0,1e18,10"],
        ["--spacing", "nan,nan"], ["--spacing", "1e999,1"], ["--window", "inf,0"], ["--window", "nan,1"],
        ["--limit", "9" * 30], ["--threads", "9" * 12],
    ],
    ids=lambda words: " ".join(words)[:24],
)  # fmt: skip
def test_numbers_that_cannot_be_are_one_line(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "no.bundle", "phantom:0", *words]) == 2
    said = capsys.readouterr().err
    assert said.count("error: ") == 1 and words[0] in said and "unexpected" not in said


def test_an_empty_source_is_not_the_folder_one_stands_in(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "no.bundle", ""]) == 2
    assert "the source is empty" in capsys.readouterr().err
