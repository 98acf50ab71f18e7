"""``tinyusfm-edge build``: a bundle's TensorRT engines, made on the device they run on, with the gate completed there.

The engine goes into a cache outside the bundle; no engine is ever built inside the first inference.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from tinyusfm_edge.cli import console
from tinyusfm_runtime.errors import GateError


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
    json_file: Annotated[str | None, typer.Option("--json", help="Write the report; - is standard output.")] = None,
) -> None:
    """Build a bundle's TensorRT engines on this device."""
    from tinyusfm_export.device_build import build_bundle
    from tinyusfm_export.gate import Gate
    from tinyusfm_runtime.engine_cache import CACHE_VARIABLE, EngineCache, default_root
    from tinyusfm_runtime.trt_build import BuildFlags

    thresholds = Gate.from_file(gate) if gate is not None else None
    place = cache.absolute() if cache is not None else default_root()
    with _progress() as told:
        report = build_bundle(
            bundle,
            cache=EngineCache(place),
            flags=BuildFlags(hardware_compatible=hardware_compatible, dla=dla),
            rebuild=rebuild,
            precision=precision,
            gate=thresholds,
            told=told,
        )
    if json_file is not None:
        console.write_json(json_file, report.to_json(), "the build report")
    if json_file != "-":
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
        console.say(
            f"{word}: gate against the stored PyTorch reference on {report.device.gpu}, recorded beside the engine"
        )
    if not report:
        raise GateError("; ".join(report.failures), report)


@contextmanager
def _progress() -> Iterator[Callable[[str, float], None]]:
    """The bar of a terminal; elsewhere a line on standard error for every new thing that is done."""
    if sys.stderr.isatty():
        with console.progress() as told:
            yield told
        return
    last = ""

    def tell(what: str, share: float) -> None:
        nonlocal last
        if what != last:
            console.note(f"{share:4.0%} {what}")
        last = what

    yield tell
