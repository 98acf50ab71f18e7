"""``__all__`` of each module names exactly what the module defines for others, sorted."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = (
    "runtime/tinyusfm_runtime",
    "calibration/tinyusfm_calibration",
    "export/tinyusfm_export",
    "tinyusfm_edge",
)
MODULES = sorted(
    path
    for package in PACKAGES
    for path in (ROOT / package).rglob("*.py")
    if not path.stem.startswith("_") and "cli" not in path.parts
)
FACES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("__init__.py"))


def defined_names(tree: ast.Module) -> set[str]:
    """Public names that a module's top level defines (imports are not definitions)."""
    names: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names |= {part.id for target in node.targets for part in ast.walk(target) if isinstance(part, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
    return {name for name in names if not name.startswith("_")}


def imported_names(tree: ast.Module) -> set[str]:
    """Names that a module's top level takes from elsewhere in the project, ``if TYPE_CHECKING:`` included."""
    blocks = [tree.body, *(node.body for node in tree.body if isinstance(node, ast.If))]
    return {
        alias.asname or alias.name
        for block in blocks
        for node in block
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tinyusfm_")
        for alias in node.names
        if not (alias.asname or alias.name).startswith("_")
    }


def declared_names(tree: ast.Module) -> list[str] | None:
    """The literal ``__all__``, or None where there is none."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets):
            return list(ast.literal_eval(node.value))
    return None


def order(name: str) -> tuple[int, str]:
    """Constants, then classes, then functions, each by name (ruff's RUF022)."""
    return (0 if name.isupper() else 1 if name[:1].isupper() else 2, name)


def faults(source: str, *, face: bool = False) -> list[str]:
    """What is wrong with one module's ``__all__``.

    Args:
        source: text of the module.
        face: it is an ``__init__.py``.
    """
    tree = ast.parse(source)
    declared, defined, imported = declared_names(tree), defined_names(tree) - {"main"}, imported_names(tree)
    # a face that defines nothing itself is there for the names it takes up
    public = imported if face and not defined else defined
    if declared is None:
        return ["no __all__"] if public else []
    found = [f"{name} is declared and not defined" for name in declared if name not in defined | imported | {"main"}]
    found += [f"{name} is not declared" for name in sorted(public - set(declared))]
    if declared != sorted(declared, key=order) or len(declared) != len(set(declared)):
        found.append("not sorted")
    return found


def named_faults(paths: list[Path], *, face: bool = False) -> list[str]:
    """Faults of many files, each behind its path."""
    return [
        f"{path.relative_to(ROOT)}: {fault}"
        for path in paths
        for fault in faults(path.read_text(encoding="utf-8"), face=face)
    ]


def test_modules_declare_exactly_what_they_define() -> None:
    assert len(MODULES) > 100 and not named_faults(MODULES)


def test_package_faces_are_exact_and_sorted() -> None:
    assert len(FACES) > 10 and not named_faults(FACES, face=True)


@pytest.mark.parametrize(
    ("source", "fault"),
    [
        ("def f(): ...", "no __all__"),
        ("def f(): ...\n__all__ = []", "f is not declared"),
        ("__all__ = ['g']", "g is declared and not defined"),
        ("A = 1\ndef f(): ...\n__all__ = ['f', 'A']", "not sorted"),
    ],
)
def test_a_wrong_list_is_caught(source: str, fault: str) -> None:
    assert fault in faults(source)


def test_a_right_list_passes() -> None:
    assert not faults("A = 1\nclass B: ...\ndef c(): ...\ndef _d(): ...\n__all__ = ['A', 'B', 'c']")
