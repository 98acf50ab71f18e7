"""Who may import whom, and how little an import loads; each in a fresh interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROOTS = [str(ROOT / folder) for folder in (".", "export", "runtime", "calibration")]
HEAVY = {
    "ai_edge_litert", "av", "coremltools", "cv2", "diffusers", "faiss", "flatbuffers", "nncf", "onnx", "onnxruntime",
    "onnxscript", "openvino", "pydicom", "safetensors", "scipy", "sklearn", "tensorrt", "tensorrt_rtx", "tflite",
    "torch",
}  # fmt: skip

LOADED = """
import importlib, json, pkgutil, sys
import numpy
before = set(sys.modules)
names = json.loads(sys.argv[1])
for name in names:
    module = importlib.import_module(name.removesuffix(".*"))
    if name.endswith(".*"):
        for found in pkgutil.walk_packages(module.__path__, module.__name__ + "."):
            importlib.import_module(found.name)
print(json.dumps(sorted({m.split(".")[0] for m in set(sys.modules) - before} - set(sys.stdlib_module_names))))
"""


def run_python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a fresh interpreter that sees the source roots."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(ROOTS), **environment}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=env, cwd=ROOT, timeout=900)


def loaded_by(*modules: str) -> set[str]:
    """Top-level packages beside numpy and the standard library that importing some modules loads."""
    done = run_python("-c", LOADED, json.dumps(modules))
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout))


def test_the_runtime_loads_numpy_and_the_standard_library_only() -> None:
    assert loaded_by("tinyusfm_runtime") == {"tinyusfm_runtime"}
    assert loaded_by("tinyusfm_runtime.*") == {"tinyusfm_runtime"}, "every module of it, plug-ins included"


def test_calibration_loads_the_runtime_only() -> None:
    assert loaded_by("tinyusfm_calibration.*") == {"tinyusfm_calibration", "tinyusfm_runtime"}


def test_export_loads_no_vendor() -> None:
    assert not loaded_by("tinyusfm_export.*") & HEAVY


def test_the_command_line_loads_no_vendor() -> None:
    loaded = loaded_by("tinyusfm_edge.cli.*")
    assert not loaded & HEAVY
    assert "typer" in loaded, "the walk reaches the commands"


def test_a_heavy_import_would_be_seen(tmp_path: Path) -> None:
    (tmp_path / "heavy_thing.py").write_text("import typer\n", encoding="utf-8")
    done = run_python("-c", LOADED, '["heavy_thing"]', PYTHONPATH=str(tmp_path))
    assert {"heavy_thing", "typer"} <= set(json.loads(done.stdout))


def lint_imports(folder: Path, roots: list[str]) -> subprocess.CompletedProcess[str]:
    """Runs import-linter on the contracts of a folder's pyproject.toml."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(roots)}
    code = "from importlinter.cli import lint_imports_command as c; c(['--no-cache'], standalone_mode=True)"
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=folder, timeout=900
    )


def test_import_contracts_hold() -> None:
    pytest.importorskip("importlinter", reason="install tinyusfm-edge[test]")
    done = lint_imports(ROOT, ROOTS)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert "0 broken" in done.stdout


def test_an_import_upwards_is_caught(tmp_path: Path) -> None:
    pytest.importorskip("importlinter", reason="install tinyusfm-edge[test]")
    for package in ("tinyusfm_edge", "tinyusfm_export", "tinyusfm_calibration", "tinyusfm_runtime"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("", encoding="utf-8")
    for child in (
        "cli",
        "build_twice",
        "change",
        "dossier",
        "examine",
        "tuning",
        "calibrate",
        "export",
        "release",
        "report",
        "training",
        "evaluation",
        "students",
        "data",
        "models",
    ):
        (tmp_path / "tinyusfm_edge" / f"{child}.py").write_text("", encoding="utf-8")
    (tmp_path / "tinyusfm_runtime" / "session.py").write_text(
        "def f() -> None:\n    import tinyusfm_export\n    import torch\n", encoding="utf-8"
    )
    (tmp_path / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text(encoding="utf-8"), encoding="utf-8")
    done = lint_imports(tmp_path, [str(tmp_path)])
    assert done.returncode == 1
    assert "tinyusfm_runtime.session -> tinyusfm_export" in done.stdout
    assert "tinyusfm_runtime.session -> torch" in done.stdout
