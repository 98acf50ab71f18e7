"""Prints the source files below a folder with the first line of each docstring: ``make tree``.

``python scripts/tree.py runtime/tinyusfm_runtime/live`` prints one folder. C files are described by the first line of
their opening comment. It needs the standard library only.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("tinyusfm_edge", "export", "calibration", "runtime")
SUFFIXES = (".py", ".c", ".h")


def purpose(path: Path) -> str:
    """First line of what a file says about itself; empty where it says nothing.

    Args:
        path: a Python or C file.
    """
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        return (ast.get_docstring(ast.parse(text)) or "").partition("\n")[0]
    return text.removeprefix("/*").lstrip(" *\n").partition("\n")[0].removesuffix("*/").strip() if text else ""


def lines(folder: Path, level: int = 0) -> Iterator[str]:
    """The tree below a folder, one line per folder or file.

    Args:
        folder: where to begin.
        level: how far to indent, in steps of two spaces.
    """
    indent = "  " * level
    init = folder / "__init__.py"
    yield f"{indent}{folder.name}/".ljust(40) + (purpose(init) if init.is_file() else "")
    for path in sorted(folder.iterdir(), key=lambda entry: (entry.is_dir(), entry.name)):
        if path.is_dir() and any(inner.suffix in SUFFIXES for inner in path.rglob("*")):
            yield from lines(path, level + 1)
        elif path.suffix in SUFFIXES and path.name != "__init__.py":
            yield f"{indent}  {path.name}".ljust(40) + purpose(path)


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the tree of the named folders, or of all source roots."""
    named = sys.argv[1:] if argv is None else argv
    for folder in [Path(name) for name in named] or [ROOT / name for name in FOLDERS]:
        if not folder.is_dir():
            print(f"tree: there is no folder {folder}", file=sys.stderr)
            return 2
        print("\n".join(line.rstrip() for line in lines(folder)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
