"""Files and functions stay small enough to read: 600 lines, and 45 statements in a function (ruff PLR0915 too)."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MAX_FILE_LINES = 600
MAX_STATEMENTS = 45
FOLDERS = ("tinyusfm_edge", "export", "runtime", "calibration", "examples", "tests", "benchmarks", "scripts")


def oversized(text: str, *, python: bool = True) -> list[str]:
    """Names what is too large in one file's text; a statement over several lines is one statement."""
    num_lines = text.count("\n")
    found = [f"{num_lines} lines"] if num_lines > MAX_FILE_LINES else []
    for node in ast.walk(ast.parse(text)) if python else ():
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            count = sum(isinstance(inner, ast.stmt) for inner in ast.walk(node)) - 1
            if count > MAX_STATEMENTS:
                found.append(f"{node.name} has {count} statements")
    return found


def test_files_and_their_functions_are_small() -> None:
    found = {}
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".c", ".h") and "build" not in path.parts:
                found[str(path.relative_to(ROOT))] = oversized(
                    path.read_text(encoding="utf-8"), python=path.suffix == ".py"
                )
    assert len(found) > 300
    assert not {name: faults for name, faults in found.items() if faults}


def test_a_long_file_and_a_large_function_are_caught() -> None:
    assert oversized("x = 1\n" * (MAX_FILE_LINES + 1)) == ["601 lines"]
    assert oversized("def f():\n" + "    x = 1\n" * (MAX_STATEMENTS + 1)) == ["f has 46 statements"]
    assert not oversized("def f():\n" + "    x = 1\n" * MAX_STATEMENTS)
    parameters = "".join(f"    a{number}=1,\n" for number in range(60))
    assert not oversized(f"def f(\n{parameters}):\n    return 1\n"), "a long signature is no statement"
