"""``tinyusfm-edge build``: engines made on the device that runs them.

A bundle's TensorRT engines, made on the device they run on, with the gate completed there.

The engine goes into a cache outside the bundle; no engine is ever built inside the first inference.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tinyusfm_edge.cli import console
from tinyusfm_edge.cli.output import SILENT, ReportOutput, reports
from tinyusfm_runtime.errors import GateError


@reports("build")
def build(
    bundle: Annotated[Path, typer.Argument(help="The bundle's folder.")],
    cache: Annotated[
        Path | None, typer.Option(help="Cache folder, also to be named by TINYUSFM_EDGE_CACHE when running.")
    ] = None,
    precision: Annotated[str | None, typer.Option(help="Only artefacts of this precision.")] = None,
    hardware_compatible: Annotated[
        bool, typer.Option("--hardware-compatible", help="One engine for every GPU from compute capability 8.0 on.")
    ] = False,
    dla: Annotated[bool, typer.Option("--dla", help="Use the Deep Learning Accelerator where it can (Orin).")] = False,
    rebuild: Annotated[
        bool, typer.Option("--rebuild", help="Replace what stands in the cache, whatever state it is in.")
    ] = False,
    gate: Annotated[Path | None, typer.Option(help="Other thresholds, a .toml or .json file.")] = None,
    output: ReportOutput = SILENT,
) -> None:
    """Build a bundle's TensorRT engines on this device."""
    from tinyusfm_export.device_build import build_bundle
    from tinyusfm_export.verify.gate import Gate
    from tinyusfm_runtime.device.owned_files import CACHE_VARIABLE, default_root
    from tinyusfm_runtime.engines.trt.build import BuildFlags
    from tinyusfm_runtime.engines.trt.cache import EngineCache

    thresholds = Gate.from_file(gate) if gate is not None else None
    place = cache.absolute() if cache is not None else default_root()
    with console.progress() as progress:
        report = build_bundle(
            bundle,
            cache=EngineCache(place),
            flags=BuildFlags(hardware_compatible=hardware_compatible, dla=dla),
            rebuild=rebuild,
            precision=precision,
            gate=thresholds,
            progress=progress,
        )
    output.result(report.to_json())
    rows = [(made.name, *line) for made in report.builds for line in made.report.table()]
    console.say(console.table(("artefact", "demand", "measured", "limit", "verdict"), rows))
    console.say()
    for made in report.builds:
        took = "" if made.action == "cached" else f" in {made.seconds:.1f} s"
        console.say(f"engine       {made.name}: {made.action}{took}, {made.engine}")
        if made.reason:
            console.say(f"note         {made.name}: {made.reason}")
    console.say(f"cache        {report.cache}")
    if cache is not None and place != default_root():
        console.say(f"             name it when running: {CACHE_VARIABLE}={place}")
    word = "passed" if report else "FAILED"
    console.say(f"{word}: gate against the stored PyTorch reference on {report.device.gpu}, recorded beside the engine")
    if not report:
        raise GateError("; ".join(report.failures), report)
    output.end("profile", bundle)
