"""Files and functions stay small enough to read: 600 and 90 lines at most."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MAX_FILE_LINES = 600
MAX_FUNCTION_LINES = 90
FOLDERS = ("tinyusfm_edge", "export", "runtime", "calibration", "tests", "benchmarks", "scripts")
FILES = sorted(
    path
    for folder in FOLDERS
    for suffix in ("*.py", "*.c", "*.h")
    for path in (ROOT / folder).rglob(suffix)
    if "build" not in path.parts
)


def oversized(text: str, *, python: bool = True) -> list[str]:
    """Names what is too long in one file's text."""
    num_lines = text.count("\n")
    found = [f"{num_lines} lines"] if num_lines > MAX_FILE_LINES else []
    for node in ast.walk(ast.parse(text)) if python else ():
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > MAX_FUNCTION_LINES:
                found.append(f"{node.name} has {length} lines")
    return found


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(ROOT)) for path in FILES])
def test_file_and_its_functions_are_short(path: Path) -> None:
    assert not oversized(path.read_text(encoding="utf-8"), python=path.suffix == ".py")


def test_a_long_file_and_a_long_function_are_caught() -> None:
    assert oversized("x = 1\n" * (MAX_FILE_LINES + 1)) == ["601 lines"]
    assert oversized("def f():\n" + "    x = 1\n" * MAX_FUNCTION_LINES) == ["f has 91 lines"]
    assert not oversized("def f():\n" + "    x = 1\n" * (MAX_FUNCTION_LINES - 1))
