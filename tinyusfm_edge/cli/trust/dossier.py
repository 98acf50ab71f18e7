"""``tinyusfm-edge bundle dossier``: the papers that go with a bundle, as a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tinyusfm_edge.cli import console
from tinyusfm_edge.cli.output import SILENT, ReportOutput, reports
from tinyusfm_runtime.errors import InputError


@reports("bundle dossier")
def dossier(
    folder: Annotated[Path, typer.Argument(metavar="bundle", help="The bundle's folder.")],
    out: Annotated[Path, typer.Option(help="Folder for the papers.")] = Path("dossier"),
    scores: Annotated[
        Path | None, typer.Option(help="File of evaluate --json for these weights. Default: a shipped student's card.")
    ] = None,
    runtime: Annotated[
        str, typer.Option(metavar="python|c", help="Runtime of the device, whose libraries are listed.")
    ] = ("python"),
    c_build: Annotated[
        Path | None, typer.Option(help="Build folder of the C runtime: its versions and hashes (with --runtime c).")
    ] = None,
    output: ReportOutput = SILENT,
) -> None:
    """Write bill of materials, SOUP list, cards, evidence and threat model."""
    from tinyusfm_edge.dossier.write import write_dossier
    from tinyusfm_runtime.bundle.reader import Bundle

    if runtime not in ("python", "c"):
        raise InputError(f"--runtime {runtime}: use python or c")
    if c_build is not None and runtime != "c":
        raise InputError("--c-build is for --runtime c")
    opened = Bundle.open(folder, on_device=False)
    written = write_dossier(opened, out, scores=scores, in_c=runtime == "c", c_build=c_build)
    for note in written.notes:
        console.note(f"note: {note}")
    console.say(console.table(("file", "bytes"), [(path.name, str(path.stat().st_size)) for path in written.files]))
    console.say(f"materials    {written.checked}")
    console.say(f"trace        {'holds' if written.trace else 'is BROKEN'}")
    console.say(f"begin with   {written.files[0]}")
    output.result(
        {
            "folder": str(out),
            "files": {path.name: path.stat().st_size for path in written.files},
            "materials": written.checked,
            "trace": bool(written.trace),
            "notes": list(written.notes),
        }
    )
    output.end("bundle", "trace", folder)


__all__ = ["dossier"]
