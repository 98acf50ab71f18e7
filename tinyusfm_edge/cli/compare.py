"""``tinyusfm-edge compare``: two reports of one kind.

The exit code is the verdict.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tinyusfm_edge.cli import console
from tinyusfm_edge.cli.output import SILENT, ReportOutput, reports
from tinyusfm_runtime.errors import InputError

if TYPE_CHECKING:
    from tinyusfm_edge.report.comparison import ReportComparison
    from tinyusfm_edge.report.page import Page


@reports("compare", page=True)
def compare(
    before: Annotated[Path, typer.Argument(help="Report that profile, verify, evaluate or export wrote.")],
    after: Annotated[Path, typer.Argument(help="Report of the same kind.")],
    fail_if: Annotated[
        list[str] | None,
        typer.Option(metavar="LIMIT", help="Other limit, such as 'p50>+10%' or 'dice_mean<-0.01'; repeat."),
    ] = None,
    across: Annotated[
        bool, typer.Option("--across", help="Also compare what other machines, tools or frames gave.")
    ] = False,
    output: ReportOutput = SILENT,
) -> None:
    """Compare two reports: exit 1 on a regression, 5 where a comparison means nothing."""
    from tinyusfm_edge.report.comparison import HEADER, compare_reports

    found = compare_reports(read_report(before), read_report(after), fail_if=fail_if or (), across=across)
    output.result(found.to_json())
    output.page(lambda: comparison_page(found, before.name, after.name))
    console.say(console.table(HEADER, [change.row() for change in found.changes]))
    console.say()
    for name, left, right in found.differences:
        console.say(f"differs      {name}: {left} and {right}")
    for line in found.notes:
        console.say(f"note         {line}")
    console.say(f"verdict      {found.headline}")
    following = (
        ["profile", "BUNDLE", "--baseline", after] if found.kind == "profile" else ["compare", after, "NEXT.json"]
    )
    output.end(*following) if found else output.end()
    found.demand()


def read_report(place: Path) -> dict[str, Any]:
    """A report that some command wrote with ``--json``.

    Args:
        place: of the file.

    Raises:
        InputError: it cannot be read or is no report.
    """
    from tinyusfm_runtime.strict_json import parse_json

    if not place.exists():
        raise InputError(f"{place} does not exist: give a report that profile, verify, evaluate or export wrote")
    try:
        found = parse_json(place.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"the report {place} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise InputError(f"{place} holds no report")
    return found


def comparison_page(found: ReportComparison, before: str, after: str) -> Page:
    """The comparison to look at.

    Args:
        found: it.
        before: name of the first report.
        after: name of the second one.
    """
    from tinyusfm_edge.report.comparison import HEADER
    from tinyusfm_edge.report.page import Block, Facts, Page, Table

    blocks: list[Block] = [Table(title="Measures", header=HEADER, rows=[change.row() for change in found.changes])]
    if found.differences:
        header = ("what", before, after)
        note = "What both reports must share."
        blocks.append(Table(title="Differences", note=note, header=header, rows=found.differences))
    blocks.append(Facts(title="Reports", facts=[("before", before), ("after", after), ("kind", found.kind)]))
    return Page(
        title=f"{after} against {before}",
        passed=bool(found),
        headline=found.headline,
        lead=list(found.notes),
        blocks=blocks,
    )
