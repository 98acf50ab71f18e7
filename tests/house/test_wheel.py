"""The wheel: every module and data file of the four packages, the licence, and nothing else."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {
    "tinyusfm_calibration": ROOT / "calibration",
    "tinyusfm_edge": ROOT,
    "tinyusfm_export": ROOT / "export",
    "tinyusfm_runtime": ROOT / "runtime",
}
DATA_SUFFIXES = {
    ".toml",
    ".json",
    ".safetensors",
    ".md",
    ".typed",
    ".html",
    ".css",
    ".js",
    ".svg",
    ".npz",
    ".xml",
    ".bin",
    ".onnx",
}
CHECKOUT_ONLY = {"tinyusfm_edge/students/breast-lesion/weights.safetensors"}
"""Files that a wheel may not hold: the licence of the data behind them is not stated."""
BUILD_INPUTS = ("pyproject.toml", "setup.py", "README.md", "LICENSE", "MANIFEST.in")


def expected_files() -> set[str]:
    """Every module and data file in the four packages, as the wheel names them."""
    found = set()
    for package, root in PACKAGES.items():
        for path in (root / package).rglob("*"):
            if path.suffix == ".py" or (path.suffix in DATA_SUFFIXES and path.is_file()):
                found.add(path.relative_to(root).as_posix())
    assert found >= CHECKOUT_ONLY, "they are in the checkout"
    return found - CHECKOUT_ONLY


def unexpected(names: list[str]) -> list[str]:
    """What a wheel may not hold: anything that is neither a module nor data of ours, nor metadata."""
    native = [name for name in names if name.startswith("tinyusfm_runtime/_native") and name.endswith((".so", ".pyd"))]
    allowed = expected_files() | set(native)
    return [name for name in names if name not in allowed and ".dist-info/" not in name]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel, built from a copy so that the checkout stays clean."""
    if importlib.util.find_spec("setuptools") is None:
        pytest.skip("setuptools is not installed here, and building without isolation needs it")
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in BUILD_INPUTS:
        if (ROOT / name).is_file():
            shutil.copy(ROOT / name, source / name)
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info", "build", "*.so")
    for name in ("tinyusfm_edge", "export", "runtime", "calibration"):
        shutil.copytree(ROOT / name, source / name, ignore=ignore)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--quiet"]
    done = subprocess.run([*command, "--wheel-dir", str(folder), str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    (found,) = folder.glob("*.whl")
    return zipfile.ZipFile(found)


def test_wheel_holds_every_file_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    names = wheel.namelist()
    assert not unexpected(names)
    assert not sorted(expected_files() - set(names))


def test_wheel_has_four_packages_and_its_metadata(wheel: zipfile.ZipFile) -> None:
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == set(PACKAGES)
    (info,) = (top for top in tops if top.endswith(".dist-info"))
    assert f"{info}/licenses/LICENSE" in wheel.namelist()
    entry_points = wheel.read(f"{info}/entry_points.txt").decode()
    assert "tinyusfm-edge = tinyusfm_edge.cli.main:main" in entry_points
    metadata = wheel.read(f"{info}/METADATA").decode()
    assert "License-Expression: Apache-2.0" in metadata
    assert "Requires-Python: >=3.10" in metadata


def test_wheel_carries_the_shipped_student(wheel: zipfile.ZipFile) -> None:
    names = {Path(name).name for name in wheel.namelist() if name.startswith("tinyusfm_edge/students/fetal-head/")}
    assert {"weights.safetensors", "ranges.json", "card.json", "CARD.md"} <= names


def test_a_stray_file_would_be_caught() -> None:
    stray = ["tests/test_x.py", "tinyusfm_edge/notes.npy", "setup.py", "tinyusfm_runtime/evil.so"]
    assert unexpected([*stray, "tinyusfm_runtime/_native.cpython-311.so", "x.dist-info/METADATA"]) == stray
