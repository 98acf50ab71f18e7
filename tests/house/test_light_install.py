"""``pip install tinyusfm-edge[openvino]`` in an environment of its own.

It brings no torch and no onnx, and the runtime's commands work with it; the others name the extra that they need.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import venv
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from conftest import Exported

ROOT = Path(__file__).resolve().parents[2]
OFFLINE = ("Could not find a version", "No matching distribution", "NewConnectionError", "Temporary failure")
WORKSHOP = {
    "torch",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "safetensors",
    "opencv-python-headless",
    "pydicom",
    "av",
    "nncf",
}


class LightInstall:
    """An environment with the wheel and the openvino extra."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.python = folder / "env" / "bin" / "python"

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Runs the installed command, far from the checkout."""
        env = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
        command = [str(self.folder / "env" / "bin" / "tinyusfm-edge"), *arguments]
        return subprocess.run(command, capture_output=True, text=True, env=env, cwd=self.folder, timeout=120)

    def packages(self) -> set[str]:
        """Distributions that are installed."""
        done = subprocess.run(
            [str(self.python), "-m", "pip", "list", "--format", "json"], capture_output=True, text=True
        )
        return {row["name"].lower() for row in json.loads(done.stdout)}


@pytest.fixture(scope="module")
def light(tmp_path_factory: pytest.TempPathFactory) -> LightInstall:
    """Installs from a copy of the checkout with pip, as a user would."""
    folder = tmp_path_factory.mktemp("light")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info", "build", "*.so")
    for name in ("tinyusfm_edge", "export", "runtime", "calibration"):
        shutil.copytree(ROOT / name, source / name, ignore=ignore)
    venv.create(folder / "env", with_pip=True)
    install = LightInstall(folder)
    command = [str(install.python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--retries", "1"]
    env = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run(
        [*command, "--constraint", str(ROOT / "constraints.txt"), f"{source}[openvino]"],
        capture_output=True,
        text=True,
        env=env,
        cwd=folder,
        timeout=280,
    )
    if done.returncode != 0 and any(sign in done.stderr for sign in OFFLINE):
        pytest.skip("pip reaches no package index here")
    assert done.returncode == 0, done.stderr[-3000:]
    return install


pytestmark = [pytest.mark.slow, pytest.mark.needs_network]


def test_it_brings_no_workshop(light: LightInstall) -> None:
    packages = light.packages()
    assert {"numpy", "typer", "openvino", "tinyusfm-edge"} <= packages
    assert not packages & WORKSHOP


def test_doctor_tells_what_is_missing(light: LightInstall) -> None:
    done = light.run("doctor")
    assert done.returncode == 0, done.stderr
    assert "tinyusfm-edge[onnxruntime]" in done.stdout


def test_run_answers(light: LightInstall, exported: Exported) -> None:
    done = light.run("run", str(exported.bundle), "phantom:0-3", "--target", "openvino", "--jsonl", "answers.jsonl")
    assert done.returncode == 0, done.stderr
    assert len((light.folder / "answers.jsonl").read_text(encoding="utf-8").splitlines()) == 4


def test_profile_times(light: LightInstall, exported: Exported) -> None:
    done = light.run("profile", str(exported.bundle), "--rounds", "1", "--json", "profile.json")
    assert done.returncode == 0, done.stderr
    assert (light.folder / "profile.json").is_file()


def test_verify_uses_the_stored_reference_and_says_so(light: LightInstall, exported: Exported) -> None:
    done = light.run("verify", str(exported.bundle), "--target", "openvino")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "stored" in done.stdout + done.stderr


@pytest.mark.parametrize("command", [("export", "--target", "openvino", "--int8"), ("demo",)], ids=lambda c: c[0])
def test_other_commands_name_the_extra_in_one_line(light: LightInstall, command: tuple[str, ...]) -> None:
    before = sorted(path.name for path in light.folder.iterdir())
    done = light.run(*command)
    assert done.returncode == 3
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1
    assert "pip install 'tinyusfm-edge[" in lines[0]
    assert sorted(path.name for path in light.folder.iterdir()) == before
