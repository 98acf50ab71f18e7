"""``tinyusfm-edge``: all commands, and how an error becomes an exit code.

This is the one place where an error becomes a line and an exit code.

The exit codes stand in ``panels.EXIT_CODES`` and at the end of ``tinyusfm-edge --help``.
``--debug``, anywhere on the line, lets the traceback through.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated

import typer
from typer.main import get_command

from tinyusfm_edge.cli import console, stopping
from tinyusfm_edge.cli.audit import audit
from tinyusfm_edge.cli.build import build
from tinyusfm_edge.cli.bundle import bundle
from tinyusfm_edge.cli.calibrate import calibrate
from tinyusfm_edge.cli.compare import compare
from tinyusfm_edge.cli.data import data
from tinyusfm_edge.cli.export import export
from tinyusfm_edge.cli.gate import gate
from tinyusfm_edge.cli.panels import PanelGroup, example, present, show_help_alone
from tinyusfm_edge.cli.profile import profile
from tinyusfm_edge.cli.sensitivity import sensitivity
from tinyusfm_edge.cli.start.demo import demo
from tinyusfm_edge.cli.start.doctor import doctor
from tinyusfm_edge.cli.start.new import new
from tinyusfm_edge.cli.start.sector import sector
from tinyusfm_edge.cli.streams.live import live
from tinyusfm_edge.cli.streams.replay import replay
from tinyusfm_edge.cli.streams.run import run
from tinyusfm_edge.cli.timing.tune import tune
from tinyusfm_edge.cli.train.adapt import adapt
from tinyusfm_edge.cli.train.bank import bank
from tinyusfm_edge.cli.train.coreset import coreset
from tinyusfm_edge.cli.train.distill import distill, select
from tinyusfm_edge.cli.train.evaluate import evaluate
from tinyusfm_edge.cli.train.qat import qat
from tinyusfm_edge.cli.train.transfer_set import transfer_set
from tinyusfm_edge.cli.verify import verify
from tinyusfm_runtime.errors import EdgeError
from tinyusfm_runtime.isolate.command import as_program

BUG, INTERRUPTED, BROKEN_PIPE = 70, stopping.INTERRUPTED, 141
"""Exit codes outside the error tree: EX_SOFTWARE of sysexits.h, 128 + SIGINT, 128 + SIGPIPE."""

ANYWHERE = {
    "--debug": "--debug",
    "-q": "--quiet",
    "--quiet": "--quiet",
    "-v": "--verbose",
    "--verbose": "--verbose",
}
"""Flags that may stand anywhere on the line."""
PACKAGES = ("tinyusfm_runtime", "tinyusfm_calibration", "tinyusfm_export", "tinyusfm_edge")

app = typer.Typer(
    name="tinyusfm-edge",
    cls=PanelGroup,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
    pretty_exceptions_enable=False,
    help="From an ultrasound model to a verified INT8 artefact on live frames. For research; not a medical device.",
)
for command in (
    export,
    verify,
    run,
    live,
    replay,
    profile,
    tune,
    build,
    calibrate,
    sensitivity,
    qat,
    coreset,
    select,
    distill,
    bank,
    transfer_set,
    adapt,
    evaluate,
    compare,
    sector,
    doctor,
    new,
    demo,
):
    typed = command.__name__.replace("_", "-")
    app.command(name=typed, epilog=example(typed))(command)
app.add_typer(audit, name="audit")
app.add_typer(bundle, name="bundle")
app.add_typer(data, name="data")
app.add_typer(gate, name="gate")
present(app)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"tinyusfm-edge {console.version()}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _everywhere(
    context: typer.Context,
    show_version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and stop.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks; may stand anywhere on the line.")] = False,
    quiet: Annotated[
        bool, typer.Option("-q", "--quiet", help="Results, warnings and errors alone; may stand anywhere.")
    ] = False,
    verbose: Annotated[
        bool, typer.Option("-v", "--verbose", help="Also what the libraries log; may stand anywhere.")
    ] = False,
) -> None:
    """Options before every command; without a command, the overview."""
    show_help_alone(context)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: the arguments without the program's name; None takes those of the process.

    Returns:
        The exit code.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if argv is None:
        as_program()
    found, arguments = _everywhere_flags(arguments)
    console.voice.quiet, console.voice.verbose = "--quiet" in found, "--verbose" in found
    console.voice.results_aside = False
    debug = "--debug" in found
    with _logged(), stopping.signals_as_ctrl_c() as stop:
        return _run(arguments, stop, debug=debug)


def _everywhere_flags(arguments: list[str]) -> tuple[set[str], list[str]]:
    """Which flags stand anywhere on the line, and the line without them.

    What stands behind ``--`` is left alone.
    """
    end = arguments.index("--") if "--" in arguments else len(arguments)
    found = {ANYWHERE[argument] for argument in arguments[:end] if argument in ANYWHERE}
    return found, [a for i, a in enumerate(arguments) if i >= end or a not in ANYWHERE]


@contextmanager
def _logged() -> Iterator[None]:
    """With ``-v`` what the toolkit's packages log is printed on standard error."""
    if not console.voice.verbose:
        yield
        return
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(relativeCreated)8.0f ms  %(name)s: %(message)s"))
    loggers = [logging.getLogger(name) for name in PACKAGES]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.removeHandler(handler)
            logger.setLevel(level)


def _run(arguments: list[str], stop: stopping.Stop, *, debug: bool) -> int:
    console.show_log("tinyusfm_runtime.bundle.shipped")  # which bundle a bare name means
    try:
        if not debug:
            # libraries warn about their own affairs; what concerns the user is printed as a note
            warnings.simplefilter("ignore")
        done = get_command(app).main(args=arguments, prog_name="tinyusfm-edge", standalone_mode=False)
        sys.stdout.flush()
        # some versions of typer turn Ctrl-C into this code, others let it through
        if done == INTERRUPTED:
            return _end(stop.words, stop.exit_code)
        return done if isinstance(done, int) else 0
    except BrokenPipeError:
        # whatever Python still wants to flush goes nowhere, quietly
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except (KeyboardInterrupt, typer.Abort) as error:
        return _end(str(error) or stop.words, stop.exit_code)
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
