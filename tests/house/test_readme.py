"""The README's commands exist, with every option it shows, and its code runs."""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from conftest import Exported

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("README.md", "CONTRIBUTING.md", "benchmarks/README.md", "runtime/README.md")
CHEAP = {"tinyusfm-edge doctor"}
"""Commands that are run as they stand; of the others the help is asked."""
GROUPS = {"audit"}
"""Commands that have commands of their own."""


def fenced(text: str, language: str) -> list[str]:
    """Contents of a page's fenced blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def commands() -> list[tuple[str, str]]:
    """(page, command line) of every shell block."""
    found = []
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8") if (ROOT / page).is_file() else ""
        for block in fenced(text, "bash"):
            lines = block.replace("\\\n", " ").splitlines()
            found += [(page, line.partition(" #")[0].strip()) for line in lines if line.strip()]
    return found


@cache
def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs an interpreter that sees the source roots; the same question is asked once."""
    roots = [str(ROOT / folder) for folder in (".", "export", "runtime", "calibration")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(roots), "COLUMNS": "200", "NO_COLOR": "1"}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=env, timeout=120)


def run_cli(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs the command line from the checkout."""
    return run_python("-m", "tinyusfm_edge", *arguments)


def missing_options(words: list[str], help_text: str) -> list[str]:
    """Options of a command line that its help does not know."""
    shown = {word.split("=")[0] for word in words if word.startswith("--")}
    return sorted(option for option in shown if not re.search(rf"(?<![\w-]){option}(?![\w-])", help_text))


def make_targets() -> set[str]:
    """Targets of the Makefile."""
    return set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))


@pytest.mark.parametrize(("page", "line"), commands(), ids=[f"{page}:{line}" for page, line in commands()])
def test_command_exists_with_its_options(page: str, line: str) -> None:
    words = shlex.split(line)
    if words[0] == "make":
        assert words[1] in make_targets()
    elif words[0] == "pip":
        assert words[1] == "install"
    elif words[0] == "cd":
        assert (ROOT / words[1]).is_dir()
    elif words[0] == "python":
        assert (ROOT / words[1]).is_file()
        done = run_python(str(ROOT / words[1]), "--help")
        assert done.returncode == 0, done.stderr
        assert not missing_options(words, done.stdout)
    else:
        assert words[0] == "tinyusfm-edge", f"{page} shows {words[0]}, which this test does not know"
        asked = words[1:3] if words[1] in GROUPS else words[1:2]
        done = run_cli(*words[1:]) if line in CHEAP else run_cli(*asked, "--help")
        assert done.returncode == 0, done.stderr
        assert line in CHEAP or not missing_options(words, done.stdout)


def test_readme_opens_with_what_it_is_a_picture_and_two_commands() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    picture, first = re.search(r"!\[.+\]\((.+)\)", text), fenced(text, "bash")[0]
    assert picture is not None
    assert (ROOT / picture.group(1)).is_file()
    assert first.split("\n")[:2] == ["make demo", "make test"]
    assert text.index(first) < 1500


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)", text) if "://" not in link]
    assert not [link for link in links if not ((ROOT / page).parent / link).exists()]


def test_ci_runs_the_readmes_test_command() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert re.search(r"^make test\b", script, flags=re.MULTILINE)
    assert "set -euo pipefail" in script


def python_blocks() -> list[tuple[str, str]]:
    """(page, code) of every Python block."""
    pages = {page: ROOT / page for page in PAGES if (ROOT / page).is_file()}
    return [(p, code) for p, path in pages.items() for code in fenced(path.read_text(encoding="utf-8"), "python")]


@pytest.mark.parametrize(("page", "code"), python_blocks(), ids=[p for p, _ in python_blocks()])
def test_imports_of_the_code_exist(page: str, code: str) -> None:
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom):
            module = __import__(node.module or "", fromlist=["_"])
            assert not [alias.name for alias in node.names if not hasattr(module, alias.name)]


@pytest.mark.slow
@pytest.mark.parametrize(("page", "code"), python_blocks(), ids=[p for p, _ in python_blocks()])
def test_code_runs_beside_a_bundle(page: str, code: str, exported: Exported) -> None:
    done = exported.room.run("-c", code)
    assert done.returncode == 0, done.stderr[-2000:]
    assert page != "README.md" or len(done.stdout.splitlines()) >= 3, "the student finds heads in phantoms"


def test_a_wrong_option_is_caught() -> None:
    words = shlex.split("tinyusfm-edge run BUNDLE clip.dcm --overlay out.mp4 --no-such-thing")
    assert missing_options(words, run_cli("run", "--help").stdout) == ["--no-such-thing"]
