"""What holds for every command: help with an example, options in panels, ``--json``, the next command to type."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from tinyusfm_edge.cli import console, progress
from tinyusfm_edge.cli.main import app, main
from tinyusfm_edge.cli.output import ReportOutput, reports
from tinyusfm_edge.cli.panels import METAVARS, OPTION_PANELS
from tinyusfm_runtime.errors import InputError


def every_command(group: Any = None, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """(words, click command) of every command, those of groups included."""
    for name, command in (group or get_command(app)).commands.items():
        if hasattr(command, "commands"):
            yield from every_command(command, (*path, name))
        else:
            yield (*path, name), command


COMMANDS = dict(every_command())
NAMES = [" ".join(words) for words in COMMANDS]


@pytest.mark.parametrize("words", list(COMMANDS), ids=NAMES)
def test_every_command_explains_itself(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*words, "-h"]) == 0
    shown = capsys.readouterr().out
    assert f"Usage: tinyusfm-edge {' '.join(words)}" in shown
    assert f"Example: tinyusfm-edge {' '.join(words)}" in shown.rstrip().rpartition("\n\n")[2]
    assert "\nOutput:\n" in shown and "--json FILE" in shown
    assert not re.search(r"<[a-z]+( range)?>|<list|\bINTEGER\b|\bFLOAT\b|\bTEXT\b", shown), "metavars say what to type"


@pytest.mark.parametrize("words", list(COMMANDS), ids=NAMES)
def test_every_command_ends_with_the_next_one(words: tuple[str, ...]) -> None:
    """Its source hands a result to ``output`` and ends it; what is printed then is tried on real runs elsewhere."""
    callback = inspect.unwrap(COMMANDS[words].callback)
    module = ast.parse(Path(inspect.getsourcefile(callback) or "").read_text(encoding="utf-8"))
    called = {ast.unparse(node.func) for node in ast.walk(module) if isinstance(node, ast.Call)}
    assert "output.result" in called or "run_live" in called
    assert called & {"output.end", "console.next_step"} or "next: tinyusfm-edge" in ast.unparse(module)


def test_panels_and_metavars_are_of_options_that_exist() -> None:
    known = {parameter.name for command in COMMANDS.values() for parameter in command.params}
    assert not {name for names in OPTION_PANELS.values() for name in names} - known
    assert not set(METAVARS) - known


def test_json_has_standard_output_to_itself(capsys: pytest.CaptureFixture[str]) -> None:
    import json

    assert main(["gate", "show", "--json", "-"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["kind"] == "tinyusfm-edge gate"
    assert "dice_mean" in printed.err
    assert main(["gate", "show"]) == 0
    assert "dice_mean" in capsys.readouterr().out, "the next command prints where results belong again"


def test_quiet_leaves_results_and_errors(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["gate", "show", "-q"]) == 0
    printed = capsys.readouterr()
    assert "dice_mean" in printed.out and not printed.err
    assert main(["-q", "run", "gone.bundle", "phantom:0"]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_a_place_that_cannot_be_written_is_said_before_any_work(tmp_path: Path) -> None:
    worked = []

    @reports("thing", page=True)
    def thing(output: ReportOutput) -> None:
        worked.append(output)

    (tmp_path / "a.json").write_text("{}", encoding="ascii")
    thing(json_file=str(tmp_path / "a.json"))
    assert worked[0].page_place == tmp_path / "a.html"
    with pytest.raises(InputError, match="different files"):
        thing(json_file=str(tmp_path / "a"), page_file=tmp_path / "a")
    from tinyusfm_runtime.errors import OutputError

    with pytest.raises(OutputError):
        thing(json_file=str(tmp_path / "a.json" / "b.json"))
    assert len(worked) == 1


def test_a_table_fits_the_columns_and_loses_nothing() -> None:
    rows = [("openvino-int8", "a reason that goes on for quite a while and does not end soon", "12.50")]
    text = console.table(("artefact", "why", "ms"), rows, columns=40)
    assert max(map(len, text.splitlines())) <= 40
    assert set(rows[0][1].split()) <= set(text.split()) and "12.50" in text
    wide = console.table(("artefact", "why", "ms"), rows, columns=200)
    assert len(wide.splitlines()) == 3


def test_colours_only_on_a_terminal_and_never_with_no_color(monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert console.has_colour(Terminal()) and not console.has_colour(io.StringIO())
    monkeypatch.setattr("sys.stdout", screen := Terminal())
    console.say("gate passed")
    assert "\x1b[32mpassed\x1b[0m" in screen.getvalue()
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr("sys.stdout", screen := Terminal())
    console.say("gate passed")
    assert screen.getvalue() == "gate passed\n"


def test_long_work_says_how_far_it_is_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    import time

    with progress.Ticker(0.01) as ticker:
        ticker.update("converting", 0.5)
        end = time.monotonic() + 20
        while "converting" not in (said := capsys.readouterr().err) and time.monotonic() < end:
            time.sleep(0.01)
    assert " 50% converting" in said
    with progress.Ticker(60.0) as ticker:
        ticker.update("converting", 0.5)
        assert ticker.line.endswith("left")
        ticker._moved -= 3600.0
        assert "left" not in ticker.line, "a share that stands still says nothing about the time left"


def test_shell_completion_knows_the_commands(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("_TINYUSFM_EDGE_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "tinyusfm-edge ver")
    monkeypatch.setenv("COMP_CWORD", "1")
    with pytest.raises(SystemExit) as ended:
        main([])
    assert ended.value.code == 0
    assert "verify" in capsys.readouterr().out.split()
