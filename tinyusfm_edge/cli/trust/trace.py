"""``tinyusfm-edge bundle trace``: the chain from images to reports.

What no longer matches ends with exit code 1.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tinyusfm_edge.cli import console
from tinyusfm_edge.cli.data_options import reads_data
from tinyusfm_edge.cli.output import SILENT, ReportOutput, reports
from tinyusfm_edge.data.folder import split_names
from tinyusfm_edge.data.reading import AS_IT_IS, Reading
from tinyusfm_runtime.errors import GateError


@reports("bundle trace")
@reads_data
def trace(
    folder: Annotated[Path, typer.Argument(metavar="bundle", help="The bundle's folder.")],
    student: Annotated[Path | None, typer.Option(help="The student's weights file; shipped ones are found.")] = None,
    images: Annotated[
        str, typer.Option(help="Folders whose training split trained it, with commas between, or its coreset.json.")
    ] = "",
    coreset: Annotated[Path | None, typer.Option(help="The coreset.json it was distilled on.")] = None,
    teacher: Annotated[Path | None, typer.Option(help="The teacher's weights file.")] = None,
    start: Annotated[Path | None, typer.Option(help="Weights file that the training started from.")] = None,
    calibration: Annotated[Path | None, typer.Option(help="SET.json of the calibrate command.")] = None,
    reading: Reading = AS_IT_IS,
    output: ReportOutput = SILENT,
) -> None:
    """Print what a bundle was made of, and find what no longer matches."""
    from tinyusfm_edge.release.at_hand import AtHand, lost
    from tinyusfm_export.trace import trace_bundle
    from tinyusfm_runtime.bundle.reader import Bundle

    opened = Bundle.open(folder, on_device=False)
    there = AtHand(
        student=student,
        images=[Path(place) for place in split_names(images)],
        coreset=coreset,
        teacher=teacher,
        start=start,
        calibration=calibration,
        reading=reading,
    )
    weights = opened.manifest.weights_sha256
    found = trace_bundle(opened, there.stages(weights), lost(weights))
    output.result(found.to_json())
    console.say(console.table(("stage", "recorded", "match", "what was compared"), found.table()))
    if not found:
        broken = ", ".join(link.stage for link in found.broken)
        raise GateError(f"the bundle was not made of what is there: {broken}", found)
    output.end("verify", folder)


__all__ = ["trace"]
