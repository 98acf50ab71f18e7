"""``tinyusfm-edge profile``: cold load, first frame and every stage of a warm prediction, with the raw samples."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Annotated

import typer

from tinyusfm_edge.cli import console, loop_options

MAX_FRAMES = 64
"""Distinct frames kept in memory; rounds repeat them."""


def profile(
    bundle: Annotated[Path, typer.Argument(help="The bundle's folder.")],
    source: Annotated[str, typer.Option(help=f"Frames to time, the first {MAX_FRAMES} of them.")] = "phantom:0-7",
    rounds: Annotated[int, typer.Option(min=1, help="How often each frame is answered for.")] = 25,
    json_file: Annotated[
        str | None, typer.Option("--json", help="Write the report with all samples; - is standard output.")
    ] = None,
    target: Annotated[str | None, typer.Option(help="Artefact to time, such as openvino or onnx.")] = None,
    precision: Annotated[str | None, typer.Option(help="Artefact to time, such as int8.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads inside the engine.")] = None,
    cold: Annotated[bool, typer.Option(help="Also time a start in a fresh process.")] = True,
    allow_unverified: Annotated[
        bool, typer.Option("--allow-unverified", help="Also time an artefact that passed no gate.")
    ] = False,
    full_depth: loop_options.FullDepth = False,
) -> None:
    """Time a bundle on this machine."""
    from tinyusfm_runtime import latency
    from tinyusfm_runtime.early_exit import exit_names
    from tinyusfm_runtime.session import Session
    from tinyusfm_runtime.sources import open_source

    with open_source(source) as opened:
        frames = list(itertools.islice(opened, MAX_FRAMES))
    with Session.open(
        bundle,
        target=target,
        precision=precision,
        threads=threads,
        allow_unverified=allow_unverified,
        full_depth=full_depth,
    ) as session:
        report = latency.profile(session, frames, rounds=rounds, cold=cold)
        exits = exit_names(session.spec.exits)
    if json_file is not None:
        console.write_json(json_file, report.to_json(), "the latency report")
    if json_file != "-":
        machine = report.machine
        rows, cols = frames[0].pixels.shape[:2]
        console.say(f"{report.description}")
        console.say(
            f"{machine['cpu']}, {machine['usable_cpus']} CPUs, {' '.join(machine['features']) or 'features unknown'}"
        )
        console.say(f"{report.n} predictions of {report.frames} frames, the first of {rows}x{cols} rows x columns; ms")
        if report.exits:
            shown = (f"{name} {count}" for name, count in zip(exits, report.exits, strict=True))
            console.say(f"answered at {', '.join(shown)}")
        console.say(console.table(("stage", "p50", "p90", "p99"), report.table()))
