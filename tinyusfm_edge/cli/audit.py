"""``tinyusfm-edge audit``: check an audit log; the exit code is the verdict."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tinyusfm_edge.cli import console
from tinyusfm_edge.cli.output import SILENT, ReportOutput, reports
from tinyusfm_edge.cli.panels import show_help_alone

audit = typer.Typer(help="Check audit logs of live runs.")


@audit.callback(invoke_without_command=True)
def _audit(context: typer.Context) -> None:
    """Check audit logs of live runs."""
    show_help_alone(context)


@audit.command(epilog="Example: tinyusfm-edge audit verify run.audit --head HEAD")
@reports("audit verify")
def verify(
    file: Annotated[Path, typer.Argument(help="The log, as written by --sink audit:FILE.")],
    head: Annotated[
        str | None, typer.Option(help="The head printed when the log was closed: finds a cut or rewritten end.")
    ] = None,
    output: ReportOutput = SILENT,
) -> int:
    """Tell whether a log was edited, cut, or had records inserted or moved."""
    from tinyusfm_runtime.sinks.audit.chain import verify_file

    report = verify_file(file, head=head)
    output.result(
        {"passed": bool(report), "records": report.records, "head": report.head, "closed": report.closed}
        | {"head_at": report.head_at, "fault": report.fault}
    )
    console.say(f"{'records':<14}{report.records}")
    console.say(f"{'audit head':<14}{report.head}")
    if report.head_at is not None:
        console.say(f"{'known head':<14}found at record {report.head_at}")
    if not report:
        console.say(f"{'BROKEN':<14}{report.fault}")
        return 1
    end = "closed in order" if report.closed else "no closing record: still being written, killed, or cut off"
    console.say(f"{'chain':<14}whole, {end}")
    if head is None:
        console.say(f"{'note':<14}without --head a cut or wholly rewritten end is not found")
    output.end(*(() if head else ("audit", "verify", file, "--head", report.head)), indent=14)
    return 0
