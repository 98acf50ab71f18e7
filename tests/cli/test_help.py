"""The overview, the help of every command with its example, and the table of exit codes."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from tinyusfm_edge.cli.main import app, main
from tinyusfm_edge.cli.panels import EXAMPLES, EXIT_CODES, PANELS

ROOT = Path(__file__).resolve().parents[2]


def help_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What some arguments print on stdout; they must succeed and print nothing else."""
    assert main(list(arguments)) == 0
    printed = capsys.readouterr()
    assert not printed.err
    return printed.out


@pytest.mark.parametrize("arguments", [(), ("-h",), ("--help",), ("audit",), ("audit", "-h")])
def test_help_is_on_stdout_with_exit_code_0(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert "Usage: tinyusfm-edge" in help_of(capsys, *arguments)


def test_the_overview_has_every_command_in_a_panel_and_the_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    shown = help_of(capsys)
    positions = [shown.index(f"\n{panel}:") for panel in PANELS]
    assert positions == sorted(positions) and "\nOther:" not in shown
    registered = {str(command.name) for command in app.registered_commands}
    registered |= {str(group.name) for group in app.registered_groups}
    assert registered == {name for names in PANELS.values() for name in names}
    assert all(f"  {code}" in shown and meaning in shown for code, meaning in EXIT_CODES.items())


@pytest.mark.parametrize("name", sorted(EXAMPLES))
def test_every_help_ends_with_an_example_of_real_options(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    shown = help_of(capsys, name, "--help")
    assert "Example: tinyusfm-edge" in shown.rstrip().rpartition("\n\n")[2]
    options = [word for word in shlex.split(EXAMPLES[name]) if word.startswith("--")]
    assert EXAMPLES[name].split()[0] == name
    assert not [
        option for option in options if not re.search(rf"(?<![\w-]){option}(?![\w-])", shown.split("Example:")[0])
    ]


def test_the_documents_table_of_exit_codes_is_the_programs() -> None:
    page = (ROOT / "docs" / "reference" / "errors.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \| (.+) \|$", page, re.MULTILINE)
    assert {int(code): meaning for code, meaning in rows} == EXIT_CODES


def test_an_unknown_command_is_one_line_and_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["exprot"]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
