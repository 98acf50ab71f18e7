"""``tinyusfm-edge new``: a project of one's own that runs on phantoms at once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tinyusfm_edge.cli import console
from tinyusfm_edge.cli.output import SILENT, ReportOutput, reports


@reports("new")
def new(
    folder: Annotated[Path, typer.Argument(help="Folder to be made.")],
    output: ReportOutput = SILENT,
) -> None:
    """Make a project: data table, gate, recipe and Makefile.

    Phantoms stand in the place of images.
    """
    from tinyusfm_edge.project import make_project
    from tinyusfm_export.verify.gate import gate_toml

    files = make_project(folder, gate=gate_toml())
    for file in files:
        console.say(f"file         {file}")
    console.say(f"run it       make -C {folder}")
    output.result({"folder": str(folder), "files": [str(file) for file in files]})
    output.end("data", "check", folder / "data")
