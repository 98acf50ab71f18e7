"""ARCHITECTURE.md is true: its tree names every source file with a purpose, and none that does not exist."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("runtime", "calibration", "export", "tinyusfm_edge", "tests", "benchmarks", "scripts")
SUFFIXES = {".py", ".c", ".h", ".toml"}


def tree_entries(text: str) -> dict[str, str]:
    """Path -> purpose, from the fenced trees: two spaces a level, folders end in a slash."""
    entries: dict[str, str] = {}
    for block in re.findall(r"^```tree\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE):
        path: list[str] = []
        for line in block.splitlines():
            match = re.match(r"^( *)(\S+)(?:\s+(.*))?$", line)
            if not match:
                continue
            level = len(match.group(1)) // 2
            name, purpose = match.group(2), (match.group(3) or "").strip()
            path = [*path[:level], name.rstrip("/")]
            entries["/".join(path) + ("/" if name.endswith("/") else "")] = purpose
    return entries


def source_files() -> set[str]:
    """Every source file that a reader could wonder about; an ``__init__.py`` speaks for its folder."""
    found = set()
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*"):
            relative = path.relative_to(ROOT)
            if path.suffix in SUFFIXES and path.name != "__init__.py" and "build" not in relative.parts:
                found.add(relative.as_posix())
    return found


def faults(text: str, files: set[str]) -> list[str]:
    """What a page with trees gets wrong about a set of files."""
    entries = tree_entries(text)
    listed = {path for path in entries if not path.endswith("/")}
    found = [f"{path} is not in the tree" for path in sorted(files - listed)]
    found += [f"{path} does not exist" for path in sorted(entries) if not (ROOT / path).exists()]
    found += [f"{path} has no purpose" for path in sorted(listed) if len(entries[path]) < 8]
    return found


def test_tree_is_true() -> None:
    assert not faults((ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8"), source_files())


def test_a_missing_an_invented_and_a_silent_file_are_caught() -> None:
    tree = "runtime/\n  tinyusfm_runtime/\n    errors.py   the error tree\n    nothing.py  not there\n    frame.py\n"
    text = f"```tree\n{tree}```\n"
    found = faults(text, {"runtime/tinyusfm_runtime/errors.py", "runtime/tinyusfm_runtime/spec.py"})
    assert found == [
        "runtime/tinyusfm_runtime/spec.py is not in the tree",
        "runtime/tinyusfm_runtime/nothing.py does not exist",
        "runtime/tinyusfm_runtime/frame.py has no purpose",
    ]
