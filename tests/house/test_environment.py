"""scripts/environment.py: says what it installs, reuses what is there, and puts no second OpenCV beside a first."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "environment.py"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """The script as a module, its project a folder of the test's own."""
    spec = importlib.util.spec_from_file_location("environment", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    (tmp_path / "pyproject.toml").write_text("[project]\n", encoding="utf-8")
    return module


def site_packages(folder: Path) -> Path:
    """Where a virtual environment keeps its packages."""
    return Path(sysconfig.get_path("purelib", "venv", {"base": str(folder), "platbase": str(folder)}))


def pretend_installed(folder: Path, name: str, version: str) -> None:
    """Puts a distribution's metadata, and nothing else, into an environment."""
    place = site_packages(folder) / f"{name.replace('-', '_')}-{version}.dist-info"
    place.mkdir(parents=True)
    (place / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n", encoding="utf-8")


def test_size_is_said_and_torch_is_not_counted_where_it_is(
    script: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    script.announce(Path("env"), ["demo"], reuse=False)
    script.announce(Path("env"), ["demo"], reuse=True)
    fresh, reused = capsys.readouterr().out.split("Installing")[1:]
    assert f"about {script.DEMO_MB[0] + script.TORCH_MB[0]} MB to download" in fresh
    assert f"about {script.DEMO_MB[0]} MB to download" in reused
    assert "already here" in reused


def test_nothing_is_done_twice_and_a_changed_pin_counts_as_new(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    done: list[list[str]] = []
    monkeypatch.setattr(script, "install", lambda python, extras: done.append(extras))
    monkeypatch.setattr(script, "create", lambda folder, reuse: folder.mkdir(exist_ok=True) or Path(sys.executable))
    arguments = ["--venv", str(tmp_path / "env"), "--extras"]
    assert script.main([*arguments, "demo"]) == 0
    assert script.main([*arguments, "demo"]) == 0
    assert done == [["demo"]]
    assert script.main([*arguments, "test"]) == 0
    assert done[1:] == [["demo", "test"]], "what is installed stays"
    (tmp_path / "constraints.txt").write_text("numpy==2.0.0\n", encoding="utf-8")
    assert script.main([*arguments, "demo"]) == 0
    assert len(done) == 3


def test_a_failed_install_leaves_no_stamp(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(python: Path, extras: list[str]) -> None:
        raise subprocess.CalledProcessError(1, [str(python), "-m", "pip", "install"])

    monkeypatch.setattr(script, "install", fail)
    monkeypatch.setattr(script, "create", lambda folder, reuse: folder.mkdir() or Path(sys.executable))
    assert script.main(["--venv", str(tmp_path / "env"), "--extras", "demo"]) == 1
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert script.read_stamp(tmp_path / "env") == {}


@pytest.mark.parametrize(("installed", "left_out"), [("opencv-python", True), ("numpy", False)])
def test_headless_opencv_is_left_out_beside_another_build(
    script: ModuleType, tmp_path: Path, installed: str, left_out: bool
) -> None:
    venv.create(tmp_path / "env")
    pretend_installed(tmp_path / "env", installed, "4.9.0")
    extras = script.without_second_opencv(tmp_path / "env" / "bin" / "python", ["test", "opencv"])
    assert extras == (["test"] if left_out else ["test", "opencv"])


@pytest.mark.parametrize(("version", "used"), [("2.13.0+cpu", True), ("2.13.0", True), ("2.12.1", False)])
def test_only_the_pinned_torch_is_reused(script: ModuleType, tmp_path: Path, version: str, used: bool) -> None:
    venv.create(tmp_path / "env")
    pretend_installed(tmp_path / "env", "torch", version)
    assert script.has_pinned_torch(tmp_path / "env" / "bin" / "python") is used


def test_a_damaged_stamp_counts_as_none(script: ModuleType, tmp_path: Path) -> None:
    for content in ("{", "[]", json.dumps({"extras": "demo"})):
        (tmp_path / "tinyusfm-edge.json").write_text(content, encoding="utf-8")
        assert script.installed_extras(script.read_stamp(tmp_path)) == set()
