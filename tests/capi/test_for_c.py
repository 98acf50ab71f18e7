"""What a program in C ships is gathered into one folder, and runs from there alone."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.capi.conftest import ROOT, engine_folders, run
from tests.conftest import make_parts
from tinyusfm_edge.cli.main import main
from tinyusfm_runtime.bundle.reader import Bundle
from tinyusfm_runtime.session import Session as PythonSession

TinyFiles = Callable[[str], dict[str, bytes]]


@pytest.fixture(scope="module")
def prefix(build_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the library was installed."""
    folder = tmp_path_factory.mktemp("prefix")
    run("cmake", "--install", build_folder, "--prefix", folder)
    return folder


def test_a_folder_that_was_moved_runs_with_its_own_engine(
    prefix: Path, tiny_files: TinyFiles, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if "ort" not in engine_folders():
        pytest.skip("onnxruntime is not installed")
    bundle = make_parts({"ort": tiny_files("ort"), "ov": tiny_files("ov")}).publish(tmp_path / "tiny.bundle")
    words = ["bundle", "for-c", str(tmp_path / "device"), str(bundle), "--target", "onnx", "--prefix", str(prefix)]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert all(part in said for part in ("library", "engine", "bundle", "headers", "licences", "MB"))
    device = Path(shutil.move(tmp_path / "device", tmp_path / "elsewhere"))
    assert {file.name for file in (device / "lib").iterdir()} >= {"libtinyusfm.so.0", "libonnxruntime.so.1"}
    kept = Bundle.open(device / "tiny.bundle")
    assert [artefact.target for artefact in kept.manifest.artefacts] == ["onnx"]
    PythonSession.open(device / "tiny.bundle").close()  # its golden answers are those of its model
    assert kept.artefact_files(kept.manifest.artefacts[0]) == tiny_files("ort")
    assert any("onnxruntime" in file.name for file in (device / "licences").iterdir())
    if not (ROOT / "build" / "capi-deps" / "include" / "onnxruntime").is_dir():
        pytest.skip("the C library was built without ONNX Runtime: its header was not there (make capi-deps)")
    program = prefix / "bin" / "tinyusfm-run"
    info = run(
        program, device / "tiny.bundle", "--info", env={"LD_LIBRARY_PATH": str(device / "lib"), "PATH": "/usr/bin"}
    )
    assert "onnx-fp32, verified" in info and "CPUExecutionProvider" in info
    assert main(words[:2] + [str(device)] + words[3:]) == 2, "an existing folder is never filled"


def test_what_c_programs_cannot_have_is_refused(prefix: Path, tmp_path: Path, tiny_files: TinyFiles) -> None:
    bundle = str(make_parts({"ort": tiny_files("ort")}).publish(tmp_path / "tiny.bundle"))
    assert main(["bundle", "for-c", str(tmp_path / "a"), bundle, "--prefix", str(tmp_path)]) == 2
    assert main(["bundle", "for-c", str(tmp_path / "a"), bundle, "--target", "coreml", "--prefix", str(prefix)]) == 2
    assert not (tmp_path / "a").exists()
