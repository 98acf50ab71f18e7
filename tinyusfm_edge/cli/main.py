"""``tinyusfm-edge``: the commands put together, and the one place where an error becomes a line and an exit code.

Exit codes: 0 done, 1 a gate was missed, 2 wrong input or options, 3 this machine or installation cannot,
70 an unexpected failure (a bug), 130 stopped by Ctrl-C, 141 the reader of the output went away.
``--debug``, anywhere on the line, lets the traceback through.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence
from typing import Annotated

import typer
from typer.main import get_command

from tinyusfm_edge.cli import console
from tinyusfm_edge.cli.audit import audit
from tinyusfm_edge.cli.demo import demo
from tinyusfm_edge.cli.doctor import doctor
from tinyusfm_edge.cli.export import export
from tinyusfm_edge.cli.live import live
from tinyusfm_edge.cli.profile import profile
from tinyusfm_edge.cli.replay import replay
from tinyusfm_edge.cli.run import run
from tinyusfm_edge.cli.verify import verify
from tinyusfm_runtime.errors import EdgeError

BUG, INTERRUPTED, BROKEN_PIPE = 70, 130, 141
"""Exit codes outside the error tree: EX_SOFTWARE of sysexits.h, 128 + SIGINT, 128 + SIGPIPE."""

app = typer.Typer(
    name="tinyusfm-edge",
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="From an ultrasound model to a verified INT8 artefact on live frames. For research; not a medical device.",
)
for command in (export, verify, run, live, replay, profile, doctor, demo):
    app.command()(command)
app.add_typer(audit, name="audit")


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"tinyusfm-edge {console.version()}")
        raise typer.Exit


@app.callback()
def _everywhere(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and stop.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks; may stand anywhere on the line.")] = False,
) -> None:
    """Options before every command."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: the arguments without the program's name; None takes those of the process.

    Returns:
        The exit code.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    try:
        if not debug:
            # libraries warn about their own affairs; what concerns the user is printed as a note
            warnings.simplefilter("ignore")
        done = get_command(app).main(args=arguments, prog_name="tinyusfm-edge", standalone_mode=False)
        sys.stdout.flush()
        # some versions of typer turn Ctrl-C into this code, others let it through
        if done == INTERRUPTED:
            return _end("stopped", INTERRUPTED)
        return done if isinstance(done, int) else 0
    except BrokenPipeError:
        # whatever Python still wants to flush goes nowhere, quietly
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except (KeyboardInterrupt, typer.Abort):
        return _end("stopped", INTERRUPTED)
    except Exception as error:
        if debug:
            raise
        return _end(*_explain(error))


def _explain(error: Exception) -> tuple[str, int]:
    """The line and the exit code for an error."""
    if isinstance(error, EdgeError):
        return str(error), error.exit_code
    # typer's own usage errors; their class moved between its versions, their face did not
    if hasattr(error, "format_message") and hasattr(error, "exit_code"):
        return f"{error.format_message()} (tinyusfm-edge COMMAND --help lists the options)", 2
    return f"unexpected {type(error).__name__}: {error} (run again with --debug for the traceback)", BUG


def _end(line: str, exit_code: int) -> int:
    console.note(f"error: {' '.join(line.split())}")
    return exit_code
