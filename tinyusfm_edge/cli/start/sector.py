"""``tinyusfm-edge sector``: finds the part of the frames that a probe fills.

It writes the file that ``export --sector`` takes.
"""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tinyusfm_edge.cli import console
from tinyusfm_edge.cli.output import SILENT, ReportOutput, reports
from tinyusfm_edge.cli.streams.input_report import InputReport
from tinyusfm_edge.cli.streams.loop_options import open_stream, source_options

if TYPE_CHECKING:
    from tinyusfm_edge.sector import FoundSector

STILL_SHARE = 0.05
"""Share of the kept patches that may never change before it is said."""


@reports("sector")
def sector(
    clip: Annotated[str, typer.Argument(help="Clip, or folder of images, that one probe took in one mode.")],
    out: Annotated[Path | None, typer.Option(help="Sector file to write, for export --sector. Default: none.")] = None,
    image: Annotated[Path | None, typer.Option(help="Image of what was found.")] = None,
    name: Annotated[str, typer.Option(help="Name of the probe's geometry.")] = "sector",
    image_size: Annotated[str, typer.Option(help="Model's input: side, or ROWSxCOLUMNS such as 224x320.")] = "224",
    limit: Annotated[int | None, typer.Option(min=1, max=console.MOST, help="Stop after so many frames.")] = None,
    crop: Annotated[str | None, typer.Option(help="ROW,COL,HEIGHT,WIDTH in pixels, or region.")] = None,
    output: ReportOutput = SILENT,
) -> None:
    """Find the sector of a probe in its frames, as patches of a model's input.

    What lies outside can be left out of an export (export --sector FILE).
    """
    from tinyusfm_edge.cli.train.adapt import read_size
    from tinyusfm_edge.sector import find_sector, sector_bytes, sector_image
    from tinyusfm_runtime.spec import PreprocessSpec

    for place, what in ((out, "the sector file"), (image, "the image")):
        if place is not None:
            console.check_writable(place, what)
    rows, columns = read_size(image_size)
    source = open_stream(clip, source_options(crop, None))
    report = InputReport(source)
    with source as frames:
        whole = report.whole(frames)
        found = find_sector(islice(whole, limit), PreprocessSpec(height=rows, width=columns), name=name)
    _print(found)
    output.result(found.to_json())
    if out is not None:
        console.write_file(out, sector_bytes(found), "the sector file")
        output.written.append(str(out))
    if image is not None:
        console.write_file(image, sector_image(found), "the image")
        output.written.append(str(image))
    if found.sector is None:
        output.end()
    elif out is None:
        output.end("sector", clip, "--out", f"{name}.json")
    else:
        output.end("export", "STUDENT", "--int8", "--data", "FOLDER", "--sector", out)
    report.end()


def _print(found: FoundSector) -> None:
    rows, columns = found.grid
    share = found.kept / (rows * columns)
    shape = "none fits" if found.probe is None else "upright sides" if found.probe.kind == "linear" else "fan"
    facts = [
        ("frames", f"{found.frames}" + (f", {found.black} of them black" if found.black else "")),
        ("patches", f"{found.kept} of {rows * columns} kept ({100 * share:.0f} %), {rows} rows of {columns}"),
        ("shape", f"{shape}, overlap {found.fit:.3f}"),
        ("outside", f"at most {100 * found.outside:.1f} % of a frame's field of view"),
    ]
    if found.probe is not None and found.probe.kind == "sector":
        left, right = found.probe.angles_deg
        near, far = found.probe.radii
        facts.append(("angles", f"{left:.1f} to {right:.1f} degrees"))
        facts.append(("depth", f"{near:.3f} to {far:.3f} of the input's rows from the apex"))
    console.say(console.table(("what", "found"), facts))
    if found.still > STILL_SHARE * found.kept:
        console.note(f"note: {found.still} kept patches never change: words or scales near the sector? See --crop")
    if found.sector is None:
        console.note("note: every patch is in view, so there is nothing to leave out")
        return
    console.say()
    for row in found.sector.kept:
        console.say("             " + row.replace("1", "#").replace("0", "."))
