"""``tinyusfm-edge profile``: cold load, first frame, stages of a prediction.

Every stage of a warm prediction comes with its raw samples.
"""

from __future__ import annotations

import itertools
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tinyusfm_edge.cli import console
from tinyusfm_edge.cli.output import SILENT, STANDARD_OUTPUT, ReportOutput, reports
from tinyusfm_edge.cli.streams import loop_options
from tinyusfm_edge.cli.streams.input_report import InputReport
from tinyusfm_runtime.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tinyusfm_edge.cli.timing.baseline import Baseline
    from tinyusfm_edge.report.comparison import ReportComparison
    from tinyusfm_edge.report.page import Page
    from tinyusfm_runtime.latency import LatencyReport

MAX_FRAMES = 64
"""Distinct frames kept in memory; rounds repeat them."""


@reports("profile", page=True)
def profile(
    bundle: Annotated[Path, typer.Argument(help="The bundle's folder.")],
    source: Annotated[str, typer.Option(help=f"Frames to time, the first {MAX_FRAMES} of them.")] = "phantom:0-7",
    rounds: Annotated[int, typer.Option(min=1, max=console.MOST, help="How often each frame is answered for.")] = 25,
    target: Annotated[str | None, typer.Option(help="Artefact to time, such as openvino or onnx.")] = None,
    precision: Annotated[str | None, typer.Option(help="Artefact to time, such as int8.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, max=1024, help="Threads inside the engine.")] = None,
    cold: Annotated[bool, typer.Option(help="Also time a start in a fresh process.")] = True,
    allow_unverified: Annotated[
        bool, typer.Option("--allow-unverified", help="Also time an artefact that passed no gate.")
    ] = False,
    full_depth: loop_options.FullDepth = False,
    fps: Annotated[
        float | None, typer.Option(help="Also an open loop: frames arrive at this rate, answers or not.")
    ] = None,
    duration: Annotated[float, typer.Option(help="Seconds of the open loop.")] = 10.0,
    operators: Annotated[bool, typer.Option(help="Time by operator, with the precision it really runs in.")] = True,
    baseline: Annotated[
        Path | None,
        typer.Option(help="Bundle, or report of an earlier profile: exit 1 on a regression, 5 if it means nothing."),
    ] = None,
    baseline_bundle: Annotated[
        Path | None,
        typer.Option(help="Bundle of that report, measured in turns. Default: one of its name and id beside it."),
    ] = None,
    compare: Annotated[Path | None, typer.Option(help="A second bundle, measured in turns with this one.")] = None,
    host: Annotated[str | None, typer.Option(help="Measure on user@device over SSH; the report comes back.")] = None,
    ssh: Annotated[str, typer.Option(help="The ssh program with its options (with --host).")] = "ssh",
    remote_python: Annotated[str, typer.Option(help="Python on the device (with --host).")] = "python3",
    wheel: Annotated[Path | None, typer.Option(help="Wheel of this toolkit to copy there (with --host).")] = None,
    output: ReportOutput = SILENT,
) -> None:
    """Time a bundle on this machine."""
    from tinyusfm_edge.cli.timing.baseline import find_baseline
    from tinyusfm_edge.cli.timing.profiled import Beside, Wanted
    from tinyusfm_edge.cli.timing.remote import Device, profile_on
    from tinyusfm_edge.report.results import profile_page
    from tinyusfm_runtime import latency
    from tinyusfm_runtime.bundle.reader import Bundle
    from tinyusfm_runtime.bundle.shipped import choose_here
    from tinyusfm_runtime.early_exit import exit_names
    from tinyusfm_runtime.isolate.session import try_open
    from tinyusfm_runtime.session import Session
    from tinyusfm_runtime.sources import open_source

    before = find_baseline(baseline, baseline_bundle, bundle, there=host is not None)
    if host is not None:
        if compare is not None:
            raise InputError("--compare needs both bundles on one machine: leave --host out")
        device = Device(host=host, ssh=shlex.split(ssh), python=remote_python, wheel=wheel)
        words = _words(target, precision, threads, fps, duration)
        words += ["--source", source, "--rounds", str(rounds), *(["--allow-unverified"] if allow_unverified else [])]
        words += [*([] if cold else ["--no-cold"]), *([] if operators else ["--no-operators"])]
        _finish(*profile_on(device, bundle, words), before, output)
        return
    with open_source(source) as opened:
        input_report = InputReport(opened)
        frames = list(itertools.islice(input_report.whole(opened), MAX_FRAMES))
    input_report.say()
    found = Bundle.open(bundle)
    chosen = choose_here(found.manifest, found.path, target, precision)
    try_open(bundle, target=chosen.target, precision=chosen.precision, progress=console.Opening())
    with Session.open(
        bundle,
        target=target,
        precision=precision,
        threads=threads,
        allow_unverified=allow_unverified,
        full_depth=full_depth,
        progress=console.Opening(),
    ) as session:
        wanted = Wanted(fps=fps, duration_s=duration, operators=operators, other=compare, rounds=rounds)
        beside = Beside(found, session, frames, wanted)
        report = latency.profile(session, frames, rounds=rounds, cold=cold)
        data = {"kind": "tinyusfm-edge profile", **report.to_json(), **beside.finish(report)}
        exits = exit_names(session.spec.exits)
        judged = before.judge(data, session, frames, rounds) if before is not None else None
    output.result(data)
    output.page(lambda: _page(profile_page(report, bundle.name), data))
    _tell(report, exits, frames[0].pixels.shape[:2], beside.lines)
    _demand(judged)
    again = [output.json_place] if output.json_place not in (None, STANDARD_OUTPUT) else ["before.json"]
    output.end("compare", *again, "after.json")
    input_report.end()


def _words(
    target: str | None, precision: str | None, threads: int | None, fps: float | None, duration: float
) -> list[str]:
    """Options that were given, as they are typed."""
    given = {"--target": target, "--precision": precision, "--threads": threads, "--fps": fps}
    words = [word for name, value in given.items() if value is not None for word in (name, str(value))]
    return [*words, *(["--duration", str(duration)] if fps is not None else [])]


def _page(page: Page, data: dict[str, Any]) -> Page:
    from dataclasses import replace

    from tinyusfm_edge.report.profile_blocks import profile_blocks

    return replace(page, blocks=[*page.blocks, *profile_blocks(data)])


def _finish(data: dict[str, Any], said: str, before: Baseline | None, output: ReportOutput) -> None:
    """What came back from a device."""
    from tinyusfm_edge.report.page import Page
    from tinyusfm_edge.report.profile_blocks import profile_blocks

    judged = before.stored(data) if before is not None else None
    output.result(data)
    title = f"Latency on {data['host']}"
    headline = str(data.get("description", ""))
    output.page(lambda: Page(title=title, passed=True, headline=headline, blocks=profile_blocks(data)))
    console.say(said.rstrip())
    console.say(f"measured on  {data['host']}")
    _demand(judged)
    output.end()


def _demand(judged: tuple[str, ReportComparison] | None) -> None:
    if judged is not None:
        console.say(f"\n{judged[0]}")
        judged[1].demand()


def _tell(report: LatencyReport, exits: Sequence[str], size: tuple[int, ...], lines: Sequence[str]) -> None:
    """What was measured, for people."""
    machine = report.machine
    console.say(f"{report.description}")
    console.say(
        f"{machine['cpu']}, {machine['usable_cpus']} CPUs, {' '.join(machine['features']) or 'features unknown'}"
    )
    console.say(
        f"{report.n} predictions of {report.frames} frames, the first of {size[0]}x{size[1]} rows x columns; ms"
    )
    if report.exits:
        shown = (f"{name} {count}" for name, count in zip(exits, report.exits, strict=True))
        console.say(f"answered at {', '.join(shown)}")
    console.say(console.table(("stage", "p50 ms", "p90 ms", "p99 ms"), report.table()))
    for line in lines:
        console.say(f"\n{line}")
