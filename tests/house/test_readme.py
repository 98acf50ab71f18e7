"""The README's commands exist, with every option it shows; its code is looked at in test_documents.py."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import textwrap
from dataclasses import replace
from functools import cache
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import pytest

from tests.runtime.test_sinks import predicted
from tinyusfm_runtime.numerics.measure import Measurement
from tinyusfm_runtime.results import Prediction

ROOT = Path(__file__).resolve().parents[2]
NOT_TRIED = {"docs/log.md"}
"""Pages that quote commands of the past."""
PAGES = (
    *("README.md", "CONTRIBUTING.md", "benchmarks/README.md", "runtime/README.md"),
    *sorted({path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md")} - NOT_TRIED),
)
CHEAP = {"tinyusfm-edge doctor"}
"""Commands that are run as they stand; of the others the help is asked."""
GROUPS = {"audit", "bundle", "data", "gate"}
"""Commands that have commands of their own."""


def fenced(text: str, language: str) -> list[str]:
    """Contents of a page's fenced blocks of one language."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^\1```", text, flags=re.DOTALL | re.MULTILINE)
    return [textwrap.dedent(block) for _, block in found]


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
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=env, timeout=900)


def run_cli(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs the command line from the checkout."""
    return run_python("-m", "tinyusfm_edge", *arguments)


def missing_options(words: list[str], help_text: str) -> list[str]:
    """Options of a command line that its help does not know."""
    shown = {word.split("=")[0] for word in words if word.startswith("--")}
    return sorted(option for option in shown if not re.search(rf"(?<![\w-]){option}(?![\w-])", help_text))


def make_targets() -> set[str]:
    """Targets of the Makefile."""
    return set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))


@pytest.mark.parametrize(("page", "line"), commands(), ids=[f"{page}:{line}" for page, line in commands()])
def test_command_exists_with_its_options(page: str, line: str) -> None:
    words = shlex.split(line)
    while re.fullmatch(r"[A-Z_]+=\S*", words[0]):  # a variable of the environment in front of the command
        words.pop(0)
    if words[0] == "make":
        assert words[1] in make_targets()
    elif words[0] == "pip":
        assert words[1] == "install"
    elif words[0] == "cd":
        assert (ROOT / words[1]).is_dir()
    elif words[:2] == ["python", "-m"]:
        done = run_python("-m", words[2], "--help")
        assert done.returncode == 0, done.stderr
        assert not missing_options(words, done.stdout)
    elif words[0] == "bash":
        assert (ROOT / words[1]).is_file()
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


def test_readme_opens_with_what_it_is_an_image_and_two_commands() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    image, first = re.search(r"!\[.+\]\((.+)\)", text), fenced(text, "bash")[0]
    assert image is not None
    assert (ROOT / image.group(1)).is_file()
    assert first.split("\n")[:2] == ["make demo", "make test"]
    assert text.index(first) < 1500


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)", text) if "://" not in link]
    assert not [link for link in links if not ((ROOT / page).parent / link).exists()]


def test_the_readme_is_short() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert text.count("\n") <= 120 and len(text.split()) <= 900


def answers() -> list[Prediction]:
    """One answer of each kind: an ellipse, a mask of two labels, classes, features, and one that is not valid."""
    frame, ellipse = predicted()
    area = replace(ellipse.measurement, has_ellipse=False, hc_mm=None, label="liver")  # type: ignore[type-var]
    mask = replace(ellipse, measurements=(area, Measurement(found=False, label="kidney")))
    no_mask = replace(ellipse, mask_HW=None, measurements=())
    classes = replace(no_mask, scores=np.array([0.1, 0.9], np.float32))
    return [ellipse, mask, classes, replace(no_mask, scores=np.zeros(8, np.float32)), replace(no_mask, valid=False)]


def test_the_readmes_loop_runs_with_any_model(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (loop,) = fenced((ROOT / "README.md").read_text(encoding="utf-8"), "python")
    todo = answers()
    session = MagicMock()
    session.__enter__.return_value = session
    session.spec.labels = ("benign", "malignant")
    session.predict.side_effect = lambda frame: todo.pop(0)
    monkeypatch.setattr("tinyusfm_runtime.session.Session.open", lambda name: session)
    exec(compile(loop, "README.md", "exec"), {})
    said = capsys.readouterr().out
    assert not todo and "liver" in said and "kidney" in said and "'malignant': " in said and "head" in said


def test_ci_runs_the_readmes_test_command() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert re.search(r"^make test\b", script, flags=re.MULTILINE)
    assert "set -euo pipefail" in script


def test_a_wrong_option_is_caught() -> None:
    words = shlex.split("tinyusfm-edge run BUNDLE clip.dcm --overlay out.mp4 --no-such-thing")
    assert missing_options(words, run_cli("run", "--help").stdout) == ["--no-such-thing"]
