"""``pip install .`` in an environment of its own: something to run at once, and nothing heavy.

It brings numpy and typer, no inference library, no torch and no onnx. The runtime's commands work with it; the others
name the extra that they need.
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
    "openvino",
    "safetensors",
    "opencv-python-headless",
    "pydicom",
    "av",
    "nncf",
}


class LightInstall:
    """An environment with the wheel and no extra."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.python = folder / "env" / "bin" / "python"

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Runs the installed command, far from the checkout."""
        env = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
        command = [str(self.folder / "env" / "bin" / "tinyusfm-edge"), *arguments]
        return subprocess.run(command, capture_output=True, text=True, env=env, cwd=self.folder, timeout=900)

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
        [*command, "--constraint", str(ROOT / "constraints.txt"), str(source)],
        capture_output=True,
        text=True,
        env=env,
        cwd=folder,
        timeout=900,
    )
    if done.returncode != 0 and any(sign in done.stderr for sign in OFFLINE):
        pytest.skip("pip reaches no package index here")
    assert done.returncode == 0, done.stderr[-3000:]
    return install


pytestmark = [pytest.mark.slow, pytest.mark.needs_network]


def size_of(install: LightInstall, *names: str) -> int:
    """Bytes of files that some distributions own, found in the files that pip lists for them."""
    script = (
        "import sys\nfrom importlib.metadata import distribution\n"
        "paths = {f.locate() for name in sys.argv[1:] for f in distribution(name).files or ()}\n"
        "print(sum(path.stat().st_size for path in paths if path.is_file() and path.suffix != '.pyc'))\n"
    )
    done = subprocess.run([str(install.python), "-c", script, *names], capture_output=True, text=True, check=True)
    return int(done.stdout)


def test_the_shipped_bundle_runs_by_its_name(light: LightInstall) -> None:
    done = light.run("run", "fetal-head", "phantom:0-2", "--jsonl", "ready.jsonl")
    assert done.returncode == 0, done.stderr
    assert "fetal-head: the bundle that ships with this package" in done.stderr
    rows = [json.loads(line) for line in (light.folder / "ready.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 3 and all(row["verified"] and row["target"] == "integer" for row in rows)


def test_the_runtime_needs_numpy_alone(light: LightInstall) -> None:
    script = (
        "import sys, tinyusfm_runtime\n"
        "from tinyusfm_runtime import Session, make_phantom\n"
        "import tinyusfm_runtime.session\n"
        "tops = {name.partition('.')[0] for name in sys.modules} - set(sys.stdlib_module_names)\n"
        "print(sorted(top for top in tops if not top.startswith('_') and top != 'tinyusfm_runtime'))\n"
    )
    done = subprocess.run([str(light.python), "-I", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['numpy']"


def test_sizes_on_disk(light: LightInstall) -> None:
    own = size_of(light, "tinyusfm-edge")
    assert own <= 29_000_000, f"package with bundle and weights: {own / 1e6:.1f} MB"
    stack = own + size_of(light, "numpy")
    assert stack <= 120_000_000, f"with numpy: {stack / 1e6:.1f} MB"


def test_weights_of_unstated_licence_are_not_installed(light: LightInstall) -> None:
    (students,) = light.folder.glob("env/lib/*/site-packages/tinyusfm_edge/students")
    assert not (students / "breast-lesion" / "weights.safetensors").exists()
    assert (students / "fetal-head" / "weights.safetensors").is_file()


def test_it_brings_no_workshop(light: LightInstall) -> None:
    packages = light.packages()
    assert {"numpy", "typer", "tinyusfm-edge"} <= packages
    assert not packages & WORKSHOP


def test_doctor_tells_what_is_missing(light: LightInstall) -> None:
    done = light.run("doctor")
    assert done.returncode == 0, done.stderr
    assert "[onnxruntime]'" in done.stdout


def test_profile_times(light: LightInstall) -> None:
    done = light.run("profile", "fetal-head", "--rounds", "1", "--json", "profile.json")
    assert done.returncode == 0, done.stderr
    assert (light.folder / "profile.json").is_file()


def test_verify_uses_the_stored_reference_and_says_so(light: LightInstall) -> None:
    done = light.run("verify", "fetal-head")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "stored" in done.stdout + done.stderr


def test_another_bundle_names_the_library_it_needs(light: LightInstall, exported: Exported) -> None:
    done = light.run("run", str(exported.bundle), "phantom:0-3")
    assert done.returncode == 3 and "[openvino]'" in done.stderr


@pytest.mark.parametrize("command", [("export", "--target", "openvino", "--int8"), ("demo",)], ids=lambda c: c[0])
def test_other_commands_name_the_extra_in_one_line(light: LightInstall, command: tuple[str, ...]) -> None:
    before = sorted(path.name for path in light.folder.iterdir())
    done = light.run(*command)
    assert done.returncode == 3
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1
    assert "pip install '" in lines[0]
    assert sorted(path.name for path in light.folder.iterdir()) == before


def test_with_an_extra_another_bundle_answers(light: LightInstall, exported: Exported) -> None:
    """The last test of this file: it adds an engine to the environment."""
    pip = [str(light.python), "-m", "pip"]
    quiet = ["--quiet", "--disable-pip-version-check", "--retries", "1", "--constraint", str(ROOT / "constraints.txt")]
    done = subprocess.run([*pip, "install", *quiet, "openvino"], capture_output=True, text=True, timeout=900)
    if done.returncode != 0 and any(sign in done.stderr for sign in OFFLINE):
        pytest.skip("pip reaches no package index here")
    done = light.run("run", str(exported.bundle), "phantom:0-3", "--target", "openvino", "--jsonl", "answers.jsonl")
    assert done.returncode == 0, done.stderr
    assert len((light.folder / "answers.jsonl").read_text(encoding="utf-8").splitlines()) == 4
    done = light.run("run", "fetal-head", "phantom:0-1")
    assert done.returncode == 0 and "integer-int8" in done.stdout, done.stdout + done.stderr
