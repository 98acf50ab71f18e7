"""The C runtime under sanitizers and valgrind, without growth, without an allocation a frame after its warm-up."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from tests.capi.conftest import MakeStub, configure, run, stub_parts
from tests.capi.test_same_answers import rules, statistic
from tests.conftest import tiny_spec
from tinyusfm_runtime.bundle.manifest import DRIFT_FILE
from tinyusfm_runtime.spec import SecondPass

ROUNDS = 60


def exercised(folder: Path, make_stub: MakeStub, tmp_path: Path, *before: object) -> str:
    """Runs the program that calls everything; what it says."""
    other = make_stub(spec=tiny_spec(name="other"))
    return run(*before, folder / "tests" / "exercise", whole_bundle(tmp_path / "whole.bundle"), other, ROUNDS)


def whole_bundle(path: Path) -> Path:
    """Two artefacts that look twice, are judged by thresholds, and are watched for drift by their tokens."""
    spec = tiny_spec(second_pass=SecondPass.ALWAYS, reading=rules("head"))
    parts = stub_parts("tokens=7", "tokens=7", spec=spec)
    return replace(parts, files={**parts.files, DRIFT_FILE: statistic(7).to_bytes()}).publish(path)


@pytest.mark.parametrize(("sanitizers", "compiler"), [("address,undefined", "gcc"), ("thread", "clang")])
def test_sanitizers_find_nothing(
    sanitizers: str, compiler: str, tmp_path: Path, make_stub: MakeStub, monkeypatch: pytest.MonkeyPatch
) -> None:
    if shutil.which(compiler) is None:
        pytest.skip(f"{compiler} is not installed: sudo make capi-deps")
    monkeypatch.setenv("CC", compiler)
    monkeypatch.setenv("CXX", "g++" if compiler == "gcc" else "clang++")
    monkeypatch.setenv("TSAN_OPTIONS", "halt_on_error=1")
    configure(tmp_path, "-DTUSFM_STUB=ON", "-DTUSFM_PROGRAMS=OFF", f"-DTUSFM_SANITIZE={sanitizers}")
    assert exercised(tmp_path, make_stub, tmp_path) == "exercised\n"


def test_valgrind_finds_nothing(build_folder: Path, make_stub: MakeStub, tmp_path: Path) -> None:
    if shutil.which("valgrind") is None:
        pytest.skip("valgrind is not installed: sudo make capi-deps")
    strict = ("--error-exitcode=9", "--leak-check=full", "--errors-for-leak-kinds=definite")
    assert exercised(build_folder, make_stub, tmp_path, "valgrind", "-q", *strict) == "exercised\n"


def test_a_hundred_thousand_bent_frame_headers_crash_nothing(build_folder: Path, make_stub: MakeStub) -> None:
    said = run(build_folder / "tests" / "frames", make_stub(), 100_000)
    found = {name: int(value) for name, value in re.findall(r"(\w+) (-?\d+)", said)}
    assert found["wrong"] == 0 and found["answered"] > 10_000 and found["refused"] > 10_000, found


def grown(build_folder: Path, bundle: Path, predicts: int, opens: int) -> dict[str, int]:
    """Allocations and growth in kB, as the program counts them."""
    said = run(build_folder / "tests" / "growth", bundle, predicts, opens)
    return {name: int(value) for name, value in re.findall(r"(\w+) (-?\d+)", said)}


def test_nothing_is_allocated_and_nothing_grows(build_folder: Path, make_stub: MakeStub) -> None:
    """100,000 predictions, 10,000 results of a stream and 1,000 openings."""
    found = grown(build_folder, make_stub(), 100_000, 1_000)
    assert found["allocations"] == 0
    assert found["memory_kb"] < 256 and found["opens_kb"] < 1024, found


def test_two_passes_and_drift_allocate_nothing_either(build_folder: Path, tmp_path: Path) -> None:
    found = grown(build_folder, whole_bundle(tmp_path / "whole.bundle"), 10_000, 50)
    assert found["allocations"] == 0
    assert found["memory_kb"] < 512 and found["opens_kb"] < 1024, found
