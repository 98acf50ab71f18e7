"""``tinyusfm-edge data check``: what a data folder holds, before training.

It also says how the folder is understood.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tinyusfm_edge.cli import console
from tinyusfm_edge.cli.data_options import reads_data
from tinyusfm_edge.cli.output import SILENT, ReportOutput, reports
from tinyusfm_edge.cli.panels import show_help_alone
from tinyusfm_edge.data.reading import AS_IT_IS, Reading
from tinyusfm_runtime.errors import InputError

if TYPE_CHECKING:
    from tinyusfm_edge.data.check import DataReport

data = typer.Typer(help="Look at a data folder before it is used.")


@data.callback(invoke_without_command=True)
def _data(context: typer.Context) -> None:
    """Look at a data folder before it is used."""
    show_help_alone(context)


@data.command(epilog="Example: tinyusfm-edge data check my_frames/")
@reports("data check")
@reads_data
def check(
    folder: Annotated[Path, typer.Argument(help="Folder with images, with or without a split.csv.")],
    report: Annotated[
        Path | None, typer.Option(help="Page with images and masks. Default: FOLDER.check.html in this folder.")
    ] = None,
    shown: Annotated[int, typer.Option(min=1, max=200, help="Images of each split on the page.")] = 9,
    names: Annotated[
        bool, typer.Option("--names", help="File names instead of lines of the table, on the page and in the JSON.")
    ] = False,
    reading: Reading = AS_IT_IS,
    output: ReportOutput = SILENT,
) -> None:
    """Read a folder as training would, and report what is in it.

    Rows, splits, patients, classes, masks, spacing, copies, leaks.

    Exit code 1 says that something is to be mended first.
    """
    from tinyusfm_calibration.tables import folder_name
    from tinyusfm_edge.data.check import DOUBTFUL, check_folder_data
    from tinyusfm_edge.report.data_check import data_page
    from tinyusfm_edge.report.page import render
    from tinyusfm_runtime.errors import GateError

    if not folder.exists():
        raise InputError(f"{folder} does not exist: give a folder with images, with or without a split.csv")
    page = report or Path(f"{folder_name(folder)}.check.html")
    console.check_writable(page, "the page")
    found = check_folder_data(folder, reading, shown=shown, track=console.track)
    console.write_file(page, render(data_page(found, names=names)).encode(), "the page")
    output.result(to_json(found, names=names))
    _print_result(found)
    console.say(f"page         {page}")
    if not found:
        grave = sum(fault.grave for fault in found.faults)
        raise GateError(f"{found.name} has something to mend before training ({grave}): {page} shows it")
    output.end("adapt", "--task", "segment", "--data", folder, "--out", "my_student.safetensors")
    if any(fault.kind == DOUBTFUL for fault in found.faults):
        console.end_with_doubts()


def _print_result(found: DataReport) -> None:
    from tinyusfm_edge.report.data_check import lines_of

    console.say(f"{found.name}: {found.table or 'no table'}")
    if found.splits:
        rows = [
            (name, str(s.rows), str(s.patients), str(s.masks), str(s.empty), str(s.unreadable), _classes(s.labels))
            for name, s in found.splits.items()
        ]
        header = ("split", "rows", "patients", "masks", "empty", "unreadable", "classes")
        console.say(f"\n{console.table(header, rows)}\n")
    for why, count in found.unused.items():
        console.say(f"not used     {count} rows: {why}")
    for note in found.notes:
        console.say(f"note         {note}")
    spacing = [item.spacing_mm for item in found.looked if item.spacing_mm]
    known = f"{min(s[0] for s in spacing):.4g} to {max(s[0] for s in spacing):.4g} mm" if spacing else "none"
    console.say(f"spacing      {known}, {len(spacing)} of {len(found.looked)} images")
    for fault in found.faults:
        where = f" (lines {lines_of(fault)})" if fault.lines else ""
        console.say(f"{'MEND' if fault.grave else 'doubt':<13}{fault.text}{where}")


def _classes(labels: dict[str, int]) -> str:
    shown = [f"{label} {count}" for label, count in list(labels.items())[:6]]
    return ", ".join(shown) + (", ..." if len(labels) > 6 else "")


def to_json(found: DataReport, *, names: bool = False) -> dict[str, Any]:
    """A report as plain data; file names only if they are asked for.

    Args:
        found: the report.
        names: name files.
    """
    return {
        "kind": "tinyusfm-edge data check",
        "version": 1,
        "name": found.name,
        "passed": bool(found),
        "table": found.table,
        "columns": list(found.columns),
        "reading": found.reading,
        "splits": {
            name: {
                "rows": split.rows,
                "patients": split.patients,
                "masks": split.masks,
                "empty_masks": split.empty,
                "unreadable": split.unreadable,
                "labels": split.labels,
            }
            for name, split in found.splits.items()
        },
        "unused": found.unused,
        "notes": list(found.notes),
        "faults": [
            {"kind": fault.kind, "text": fault.text, "lines": list(fault.lines), "grave": fault.grave}
            for fault in found.faults
        ],
        "rows": [
            {
                **({"file": item.row.columns.get("file", item.row.id)} if names else {}),
                "line": item.row.line,
                "split": item.row.split,
                "label": item.row.label,
                "size": item.size,
                "spacing_mm": item.spacing_mm,
                "mask_share": item.mask_share,
                "mask_value": item.mask_value,
                "fault": item.fault,
            }
            for item in found.looked
        ],
    }
