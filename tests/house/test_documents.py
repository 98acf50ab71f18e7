"""Every Python block of every document imports from a face, runs, and passes a strict type check as a user's file."""

from __future__ import annotations

import ast
import importlib
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from conftest import Exported

ROOT = Path(__file__).resolve().parents[2]
ROOTS = ("runtime", "calibration", "export", ".")
SKIPPED = {".git", ".venv", "build", "dist", "demo-out", "runs", "node_modules"}
FACES = {"tinyusfm_runtime", "tinyusfm_export", "tinyusfm_edge", "tinyusfm_runtime.errors"}
CONTRACTS = {
    "tinyusfm_runtime.engines",
    "tinyusfm_runtime.sources",
    "tinyusfm_runtime.sinks",
    "tinyusfm_export.targets",
}
"""What a plug-in keeps to, for those who write one."""
NOT_RUN = re.compile(r"#.*\b(not run|type-checked only)\b")
"""The first line of a block that needs hardware says so."""
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def documents() -> list[Path]:
    """Every Markdown file of the project."""
    found = []
    for folder, names, files in os.walk(ROOT):
        names[:] = [name for name in names if name not in SKIPPED and not name.startswith(".")]
        found += [Path(folder) / name for name in files if name.endswith(".md")]
    return sorted(found)


def blocks() -> list[tuple[str, str]]:
    """(page:number, code) of every Python block."""
    found = []
    for path in documents():
        text = path.read_text(encoding="utf-8")
        fenced = re.findall(r"^( *)```python\n(.*?)^\1```", text, flags=re.DOTALL | re.MULTILINE)
        found += [(f"{path.relative_to(ROOT)}:{number}", textwrap.dedent(c)) for number, (_, c) in enumerate(fenced)]
    return found


def import_faults(code: str, allowed: set[str]) -> list[str]:
    """Imports of the project that come from no face, or that are not there."""
    found = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            found += [
                f"import {alias.name}"
                for alias in node.names
                if alias.name.startswith("tinyusfm_") and alias.name not in allowed
            ]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tinyusfm_"):
            module = node.module or ""
            if module not in allowed:
                found.append(f"from {module}")
            else:
                there = importlib.import_module(module)
                found += [f"{module} has no {alias.name}" for alias in node.names if not hasattr(there, alias.name)]
    return found


def strictly_checked(folder: Path) -> str:
    """What mypy --strict says about a folder of files of somebody who uses the packages."""
    paths = os.pathsep.join(str(ROOT / root) for root in ROOTS)
    # a user's project checks its own files; what lies in installed packages is read for its types alone
    (folder / "mypy.ini").write_text(
        "[mypy]\nstrict = True\nfollow_imports = silent\nexplicit_package_bases = True\nignore_missing_imports = True\n"
        "warn_unused_ignores = False\n[mypy-torch.*,onnx.*]\nfollow_imports = skip\n",
        encoding="utf-8",
    )
    cache = ROOT / ".mypy_cache" / "documents"
    done = subprocess.run(
        [sys.executable, "-m", "mypy", f"--cache-dir={cache}", *map(str, sorted(folder.glob("*.py")))],
        capture_output=True, text=True, env={**os.environ, "MYPYPATH": paths}, cwd=folder,
    )  # fmt: skip
    return done.stdout + done.stderr


BLOCKS = blocks()


def test_there_are_blocks_to_look_at() -> None:
    pages = {name.partition(":")[0] for name, _ in BLOCKS}
    assert {"README.md", "docs/guides/python.md"} <= pages and len(EXAMPLES) == 5


@pytest.mark.parametrize(("name", "code"), BLOCKS, ids=[name for name, _ in BLOCKS])
def test_a_document_imports_from_faces_only(name: str, code: str) -> None:
    plug_in = "def available(" in code
    assert not import_faults(code, FACES | (CONTRACTS if plug_in else set()))


@pytest.mark.parametrize("path", EXAMPLES, ids=[path.name for path in EXAMPLES])
def test_an_example_imports_from_faces_only(path: Path) -> None:
    code = path.read_text(encoding="utf-8")
    assert not import_faults(code, FACES | (CONTRACTS if "def available(" in code else set()))


@pytest.mark.slow
def test_documents_and_examples_pass_a_strict_type_check(tmp_path: Path) -> None:
    pytest.importorskip("mypy", reason="mypy is not installed: pip install 'tinyusfm-edge[lint]'")
    for name, code in BLOCKS:
        (tmp_path / f"{re.sub(r'[^a-z0-9]', '_', name.lower())}.py").write_text(code, encoding="utf-8")
    for path in EXAMPLES:
        (tmp_path / path.name).write_text(path.read_text(encoding="utf-8"), encoding="utf-8")
    broken = "from tinyusfm_runtime import Session\nSession.open(3)\nfrom tinyusfm_runtime import Sesion\n"
    (tmp_path / "broken.py").write_text(broken, encoding="utf-8")
    said = [line for line in strictly_checked(tmp_path).splitlines() if ": error:" in line]
    caught = [line for line in said if line.startswith("broken.py")]
    assert len(caught) == 2, "a wrong argument and a wrong name are seen through the face"
    assert not [line for line in said if line not in caught]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "code"), BLOCKS, ids=[name for name, _ in BLOCKS])
def test_a_block_runs_beside_a_bundle(name: str, code: str, exported: Exported) -> None:
    if NOT_RUN.search(code.lstrip().splitlines()[0]):
        compile(code, name, "exec")
        return
    done = exported.room.run("-c", code)
    assert done.returncode == 0, done.stderr[-2000:]
    assert not name.startswith("README.md") or len(done.stdout.splitlines()) >= 3, "the student finds heads in phantoms"


def test_a_deep_import_and_a_missing_name_are_caught() -> None:
    assert import_faults("from tinyusfm_runtime.live.loop import Live", FACES) == ["from tinyusfm_runtime.live.loop"]
    assert import_faults("import tinyusfm_runtime.session", FACES) == ["import tinyusfm_runtime.session"]
    assert import_faults("from tinyusfm_runtime import Sesion", FACES) == ["tinyusfm_runtime has no Sesion"]
    assert not import_faults("import numpy\nfrom tinyusfm_export import Gate", FACES)
