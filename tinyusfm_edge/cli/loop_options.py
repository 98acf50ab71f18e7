"""Options that ``run`` and ``live`` share: which artefact answers, what stands behind it, what is made over time."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from tinyusfm_edge.cli import console

Target = Annotated[str | None, typer.Option(help="Artefact to run, such as openvino or onnx.")]
Precision = Annotated[str | None, typer.Option(help="Artefact to run, such as int8.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads inside the engine.")]
AllowUnverified = Annotated[bool, typer.Option("--allow-unverified", help="Also run an artefact that passed no gate.")]
Fallback = Annotated[
    bool, typer.Option("--fallback", help="Live: when the artefact fails, the bundle's next one answers.")
]
Isolate = Annotated[
    bool, typer.Option("--isolate", help="Live: run the engine in a process that is killed when it hangs.")
]
Smooth = Annotated[bool, typer.Option("--smooth", help="Live: smooth masks and readings over time.")]
Sinks = Annotated[list[str] | None, typer.Option(help="Live: where results go, such as jsonl:out.jsonl.")]
Crop = Annotated[
    str | None, typer.Option(help="ROW,COL,HEIGHT,WIDTH in pixels, or region (the one a DICOM file marks).")
]
Spacing = Annotated[str | None, typer.Option(help="ROW,COL distance of pixels in mm, over the file's own.")]
Drift = Annotated[
    bool | None, typer.Option(help="Say whether the frames look like calibration. Default: where the bundle can.")
]
FullDepth = Annotated[bool, typer.Option("--full-depth", help="Never stop at an early exit.")]


def source_options(crop: str | None, spacing: str | None) -> dict[str, Any]:
    """What a source is opened with, as typed.

    Raises:
        InputError: no such crop or spacing.
    """
    options: dict[str, Any] = {"crop": console.crop(crop)}
    if spacing:
        options["spacing_mm"] = console.numbers(spacing, 2, "--spacing ROW,COL in mm")
    return options


__all__ = [
    "AllowUnverified",
    "Crop",
    "Drift",
    "Fallback",
    "FullDepth",
    "Isolate",
    "Precision",
    "Sinks",
    "Smooth",
    "Spacing",
    "Target",
    "Threads",
    "source_options",
]
