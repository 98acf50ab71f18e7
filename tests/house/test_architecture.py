"""ARCHITECTURE.md stays short and true: folders, packages and links that it names exist; files describe themselves."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "ARCHITECTURE.md"
ROOTS = ("runtime/tinyusfm_runtime", "calibration/tinyusfm_calibration", "export/tinyusfm_export", "tinyusfm_edge")
MAX_LINES = 200
MAX_FILES = 20
SKIPPED = ("__pycache__", "students")


def packages() -> list[Path]:
    """Every package folder of the four roots."""
    found = []
    for root in ROOTS:
        found += [
            init.parent for init in sorted((ROOT / root).rglob("__init__.py")) if not set(SKIPPED) & set(init.parts)
        ]
    return found


def page_faults(text: str, folders: list[str]) -> list[str]:
    """What a page gets wrong: too long, a package that it does not name, a path that does not exist.

    Args:
        text: the page.
        folders: names of packages that it has to mention.
    """
    found = [f"{text.count(chr(10))} lines, {MAX_LINES} at most"] if text.count("\n") > MAX_LINES else []
    found += [f"{name}/ is not named" for name in folders if f"{name}/" not in text and f"`{name}`" not in text]
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link]
    paths = re.findall(r"\b((?:tests|docs|scripts|benchmarks)/[\w./-]+)", text)
    return found + [f"{path} does not exist" for path in [*links, *paths] if path and not (ROOT / path).exists()]


def folder_faults(folder: Path) -> list[str]:
    """What is wrong with one package folder: too many files, or an opening that says nothing."""
    count = len(list(folder.glob("*.py")))
    found = [f"{folder.name}: {count} files, {MAX_FILES} at most"] if count > MAX_FILES else []
    docstring = (folder / "__init__.py").read_text(encoding="utf-8").strip()
    if not docstring.startswith('"""') or len(docstring.split('"""')[1].split()) < 5:
        found.append(f"{folder.name}: its __init__ does not say its idea")
    return found


def test_the_page_is_short_and_true() -> None:
    assert not page_faults(PAGE.read_text(encoding="utf-8"), [folder.name for folder in packages()])


def test_every_folder_is_small_and_says_its_idea() -> None:
    assert not [fault for folder in packages() for fault in folder_faults(folder)]


def test_the_tree_prints_every_file_with_its_purpose() -> None:
    script = ROOT / "scripts" / "tree.py"
    printed = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True).stdout
    silent = [line for line in printed.splitlines() if line.rstrip().endswith((".py", ".c", ".h"))]
    assert "errors.py" in printed and not silent


def cited_sections(text: str) -> set[str]:
    """Sections of docs/methods.md that a text cites, such as ``methods.md 1.7``."""
    return set(re.findall(r"methods\.md,? (\d(?:\.\d+)?)", text))


def test_every_cited_section_of_the_methods_exists() -> None:
    page = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    sections = set(re.findall(r"^##+ (\d(?:\.\d+)?)", page, re.MULTILINE))
    cited = set()
    for root in ROOTS:
        for path in (ROOT / root).rglob("*.py"):
            cited |= cited_sections(path.read_text(encoding="utf-8"))
    assert len(cited) > 5 and cited <= sections
    assert cited_sections("see methods.md 9.9") == {"9.9"}


def test_a_long_page_a_missing_package_and_a_dead_path_are_caught(tmp_path: Path) -> None:
    assert page_faults("x\n" * 201, []) == ["201 lines, 200 at most"]
    assert page_faults("see tests/nothing.py and [a](docs/none.md)", ["live"]) == [
        "live/ is not named",
        "docs/none.md does not exist",
        "tests/nothing.py does not exist",
        "docs/none.md does not exist",
    ]
    for number in range(21):
        (tmp_path / f"file{number}.py").write_text("", encoding="utf-8")
    (tmp_path / "__init__.py").write_text('"""Data."""\n', encoding="utf-8")
    assert len(folder_faults(tmp_path)) == 2
