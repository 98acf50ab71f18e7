"""The tests keep rules too: each can fail, and each is named by what it shows, not by a code from a list."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
PROOF = TESTS.parent / "docs" / "live_proof.md"
CODE = re.compile(r"(?:^|_)r\d+(?:_|$)")
"""Codes of the list of promises stand in docs/live_proof.md only."""
ASSERTING = {"raises", "warns", "fail", "skip"}
"""Calls of pytest that state something; a test that only skips stands in the list of what was not run."""


def parsed() -> dict[str, ast.Module]:
    """File name -> syntax tree of every file of the tests."""
    return {str(path.relative_to(TESTS)): ast.parse(path.read_text(encoding="utf-8")) for path in TESTS.rglob("*.py")}


def called(node: ast.AST) -> set[str]:
    """Names of everything that is called somewhere below a node, without their modules."""
    calls = [part.func for part in ast.walk(node) if isinstance(part, ast.Call)]
    return {call.attr if isinstance(call, ast.Attribute) else getattr(call, "id", "") for call in calls}


def asserts(node: ast.AST, helpers: set[str]) -> bool:
    """Whether a function states something, itself or by a helper that does."""
    names = called(node)
    stated = any(isinstance(part, ast.Assert) for part in ast.walk(node))
    return stated or bool(names & (ASSERTING | helpers)) or any(name.startswith(("assert", "check")) for name in names)


def functions(tree: ast.Module) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]


def always_true(node: ast.Assert) -> bool:
    """``assert x or True``, ``assert (x, "message")`` and ``assert True``."""
    parts = node.test.values if isinstance(node.test, ast.BoolOp) and isinstance(node.test.op, ast.Or) else [node.test]
    return any(
        (isinstance(part, ast.Constant) and bool(part.value)) or (isinstance(part, ast.Tuple) and bool(part.elts))
        for part in parts
    )


def faults(trees: dict[str, ast.Module]) -> list[str]:
    """Tests that state nothing, statements that always hold, and names that are codes."""
    helpers = {f.name for tree in trees.values() for f in functions(tree) if asserts(f, set())}
    helpers = {name for name in helpers if not name.startswith(("test_", "_"))}
    found = []
    for file, tree in trees.items():
        own = {f.name for f in functions(tree) if asserts(f, set())}
        for test in functions(tree):
            if test.name.startswith("test_"):
                if not asserts(test, helpers | own):
                    found.append(f"{file}:{test.lineno} {test.name} states nothing")
                if CODE.search(test.name):
                    found.append(f"{file}:{test.lineno} {test.name} is named by a code")
        found += [
            f"{file}:{node.lineno} always holds"
            for node in ast.walk(tree)
            if isinstance(node, ast.Assert) and always_true(node)
        ]
    return found


def test_every_test_can_fail_and_is_named_by_what_it_shows() -> None:
    trees = parsed()
    assert len(trees) > 150
    assert faults(trees) == []


@pytest.mark.parametrize(
    ("code", "fault"),
    [
        ("def test_it():\n    open('x')", "states nothing"),
        ("def test_it():\n    assert open('x') or True", "always holds"),
        ("def test_it():\n    assert (open('x'), 'it is there')", "always holds"),
        ("def test_r10_it():\n    assert open('x')", "named by a code"),
    ],
)
def test_a_test_that_cannot_fail_is_found(code: str, fault: str) -> None:
    (found,) = faults({"test_x.py": ast.parse(code)})
    assert fault in found


def test_the_proof_names_tests_and_files_that_exist() -> None:
    page = PROOF.read_text(encoding="utf-8")
    there = {f.name for tree in parsed().values() for f in functions(tree)}
    files = {path.name for path in TESTS.rglob("*.py")}
    names, places = re.findall(r"\btest_\w+(?:\.\.\.)?(?!\.py)\b", page), re.findall(r"\btest_\w+\.py\b", page)
    assert len(places) > 20 and set(places) <= files, set(places) - files
    starts = {name.removesuffix("_") for name in names if f"{name}.py" not in page}
    missing = {start for start in starts if not any(name.startswith(start) for name in there)}
    assert len(starts) > 5 and not missing, missing
