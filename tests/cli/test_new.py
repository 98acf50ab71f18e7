"""``tinyusfm-edge new``: a project whose every command exists, whose data is clean, and which runs on phantoms."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.test_contract import COMMANDS
from tinyusfm_edge.cli.main import main


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new project."""
    folder = tmp_path_factory.mktemp("projects") / "mine"
    assert main(["new", str(folder)]) == 0
    return folder


def test_its_commands_exist_with_their_options(project: Path) -> None:
    lines = [
        line[8:] for line in (project / "Makefile").read_text(encoding="utf-8").splitlines() if "\t$(TOOL)" in line
    ]
    assert len(lines) == 6
    for line in lines:
        words = shlex.split(line.replace("$@", "x").replace("$(SIZE)", "64"))
        command = next(found for name, found in COMMANDS.items() if list(name) == words[: len(name)])
        options = {option for parameter in command.params for option in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= options, line


def test_its_data_is_clean_and_its_files_are_read(
    project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", "check", str(project / "data"), "--report", str(tmp_path / "c.html")]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"^val +36 +36 +36 +0 +0", shown, re.MULTILINE)
    assert main(["gate", "show", str(project / "gate.toml")]) == 0
    from tinyusfm_export.recipe import load_recipe

    assert load_recipe(str(project / "recipe.toml")).targets == ("openvino",)
    assert main(["new", str(project)]) == 2
    assert "is not empty" in capsys.readouterr().err


@pytest.mark.slow
def test_make_runs_it_whole(project: Path) -> None:
    for name in ("torch", "lightning_fabric", "cv2", "openvino", "onnx"):
        pytest.importorskip(name, reason="install tinyusfm-edge[train,export,openvino]")
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    tool = f"TOOL={sys.executable} -m tinyusfm_edge"
    asked = ["make", "-C", str(project), tool, "evaluate", "verify", "run"]
    done = subprocess.run(asked, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert (project / "student.bundle").is_dir() and (project / "results.jsonl").is_file()
