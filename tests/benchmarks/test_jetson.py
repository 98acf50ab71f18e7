"""What is checked of a board without one, and the script that somebody with a board runs."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from types import ModuleType

import pytest

from tinyusfm_edge.cli.start.doctor import PYTHON_3_10, describe, examine

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def check() -> ModuleType:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("jetson_check", ROOT / "scripts" / "jetson_check.py")
    assert spec is not None and spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    sys.modules["jetson_check"] = found
    spec.loader.exec_module(found)
    return found


def test_extras_are_followed_to_their_requirements(check: ModuleType) -> None:
    project = {
        "name": "tool", "dependencies": ["numpy>=1"],
        "optional-dependencies": {"a": ["tool[b,c]", "x"], "b": ["y"], "c": ["tool[b]", "z"]},
    }  # fmt: skip
    assert check.requirements("", project) == ["numpy>=1"]
    assert check.requirements("a", project) == ["y", "y", "z", "x"]


def test_a_row_says_what_resolved_and_what_moved(
    check: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def row(extra: str, code: int = 0, errors: str = "", **versions: str) -> tuple[str, str]:
        installed = [{"metadata": {"name": name, "version": version}} for name, version in versions.items()]
        (tmp_path / "r.json").write_text(json.dumps({"install": installed}), encoding="utf-8")
        found = check.wheel_row(extra, code, tmp_path / "r.json", errors)
        return found.outcome, found.detail

    assert row("onnxruntime", numpy=check.NUMPY, onnxruntime=check.ONNXRUNTIME) == (
        "holds", f"2 packages, numpy {check.NUMPY}, onnxruntime {check.ONNXRUNTIME}",
    )  # fmt: skip
    assert row("", numpy="2.9.0")[0] == "FAILED"
    assert row("dicom", 1, "x\nERROR: No matching distribution") == ("FAILED", "ERROR: No matching distribution")
    monkeypatch.setattr(check, "LACKING", {"gone": "no wheel for 3.10"})
    assert row("gone", 1, "ERROR: none") == ("not run", "no wheel for 3.10")


def test_the_time_limit_and_what_was_not_run_are_rows(check: ModuleType) -> None:
    rows = check.gather(check.Clock(seconds=0.0), None)
    outcomes = {row.what: row.outcome for row in rows}
    assert outcomes["wheels"] == outcomes["TensorRT"] == "out of time"
    assert outcomes["execution on Python 3.10"] == outcomes["TensorRT on a Jetson's GPU"] == "not run"
    assert len(check.table(rows).splitlines()) == len(rows)


def test_the_evidence_of_a_board_is_one_file_and_a_failing_command_is_counted(tmp_path: Path) -> None:
    if shutil.which("bash") is None:
        pytest.skip("there is no bash here")
    fake = tmp_path / "python"
    # a toolkit whose build fails, as on a board without TensorRT
    fake.write_text('#!/bin/sh\necho "$@"\ncase "$*" in *" build "*) exit 3 ;; esac\n', encoding="utf-8")
    fake.chmod(0o755)
    done = subprocess.run(
        ["bash", str(ROOT / "scripts" / "jetson_evidence.sh"), "gpu.bundle", "kept"], capture_output=True, text=True,
        cwd=tmp_path, env={**os.environ, "PYTHON": str(fake)}, check=False,
    )  # fmt: skip
    assert done.returncode == 1 and "1 commands failed; send kept.tar.gz" in done.stdout
    with tarfile.open(tmp_path / "kept.tar.gz") as tar:
        names = {Path(name).name for name in tar.getnames()}
        stream = tar.extractfile("kept/summary.txt")
        assert stream is not None
        lines = stream.read().decode().splitlines()
    assert {"doctor.txt", "build.txt", "verify.txt", "run.txt", "profile.txt", "tune.txt"} <= names
    assert any(line.startswith("build exit 3") for line in lines)
    assert any(line.startswith("verify exit 0") and "verify gpu.bundle" in line for line in lines)


def test_doctor_says_where_3_10_stops() -> None:
    report = examine()
    assert PYTHON_3_10.split()[0] in " ".join(describe({**report, "python": "3.10.12"}, 200))
    assert "onnxruntime 1.23.2" not in " ".join(describe({**report, "python": "3.11.7"}, 200))
