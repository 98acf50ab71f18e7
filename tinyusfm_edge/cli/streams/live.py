"""``tinyusfm-edge live``: a page to watch a source by.

Frame, overlay, reading, ages, drops, state.

A probe is shown as it is. Files, folders and phantoms are played at their own rate, as a probe would give them:
newest frame first, late ones dropped and counted.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tinyusfm_edge.cli import console
from tinyusfm_edge.cli.output import SILENT, ReportOutput, reports
from tinyusfm_edge.cli.streams import loop_options, run_live, sink_list
from tinyusfm_edge.cli.streams.input_report import InputReport
from tinyusfm_edge.cli.streams.waiting import Waiting

if TYPE_CHECKING:
    from tinyusfm_runtime.frame import FrameSource
    from tinyusfm_runtime.live.loop import Live
    from tinyusfm_runtime.sinks import Sink
    from tinyusfm_runtime.sinks.web import WebSink


@reports("live")
def live(
    bundles: loop_options.Bundles,
    source: Annotated[
        str, typer.Argument(help="A probe (igtl://HOST:PORT and others), a file, or phantom:FIRST-LAST.")
    ],
    budget_ms: Annotated[float, typer.Option(min=1.0, help="A result older than this is late, and not shown.")] = 100.0,
    host: Annotated[
        str, typer.Option(help="Address to serve the page on; others than this machine need the key.")
    ] = "",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port of the page; 0 takes a free one.")] = 8765,
    sink: loop_options.Sinks = None,
    record: Annotated[
        Path | None,
        typer.Option(help="Store every answered frame, results and states in a new folder. STORES IMAGES of patients."),
    ] = None,
    fps: Annotated[float | None, typer.Option(min=0.1, max=240, help="Play a file at this rate, not its own.")] = None,
    loop: Annotated[bool, typer.Option("--loop", help="Play a file again and again.")] = False,
    once: Annotated[bool, typer.Option("--once", help="Stop when the source ends; else the page stays up.")] = False,
    limit: Annotated[int | None, typer.Option(min=1, max=console.MOST, help="Stop after so many results.")] = None,
    target: loop_options.Target = None,
    precision: loop_options.Precision = None,
    threads: loop_options.Threads = None,
    fallback: loop_options.Fallback = False,
    isolate: loop_options.Isolate = False,
    smooth: loop_options.Smooth = False,
    crop: loop_options.Crop = None,
    spacing: loop_options.Spacing = None,
    window: loop_options.Window = None,
    allow_no_crc: loop_options.AllowNoCrc = False,
    connect_timeout: loop_options.ConnectTimeout = None,
    drift: loop_options.Drift = None,
    allow_unverified: loop_options.AllowUnverified = False,
    full_depth: loop_options.FullDepth = False,
    require_signed: loop_options.RequireSigned = None,
    device_class: loop_options.DeviceClass = None,
    no_second_pass: loop_options.NoSecondPass = False,
    rules: loop_options.Rules = None,
    output: ReportOutput = SILENT,
) -> None:
    """Watch a source in the browser, answered by a bundle or several."""
    from tinyusfm_runtime.live.loop import Live
    from tinyusfm_runtime.live.options import LiveOptions
    from tinyusfm_runtime.results import DropPolicy
    from tinyusfm_runtime.sinks import web

    locations = [*(sink or ()), *([f"record:{record}"] if record is not None else [])]
    if record is not None:
        console.note(f"warning: RECORDING IMAGES of patients into {record}: handle that folder as you do patient data")
    sink_list.refuse_overwriting(source, locations)
    options = loop_options.source_options(crop, spacing, window, allow_no_crc)

    def opened() -> FrameSource:
        return loop_options.open_stream(source, options)

    sinks: list[Sink] = []
    watch, waiting = run_live.Watch(), Waiting(source)
    logging.getLogger("tinyusfm_runtime").addHandler(logging.NullHandler())
    with ExitStack() as stack:
        frames = _as_probe(opened, fps, loop)
        models = loop_options.read_bundles(bundles)
        bundle = models[0][1]
        request = run_live.LiveRun(
            bundle=bundle, models=models, rules=rules,
            target=target, precision=precision, threads=threads, fallback=fallback, isolate=isolate,
            allow_unverified=allow_unverified, full_depth=full_depth, second_pass=not no_second_pass, drift=drift,
            trust=loop_options.trust_of(require_signed, device_class),
        )  # fmt: skip
        answering = run_live.open_models(request, stack)
        watch.follow(answering)
        facts = run_live.facts(answering, getattr(frames, "first", frames), budget_ms=budget_ms)
        page = web.open_sink(
            f"//{host and _bracketed(host)}:{port}",
            title=facts.title or "",
            labels=facts.labels or (),
            budget_ms=budget_ms,
            overlay_ms=LiveOptions().overlay_ms(budget_ms),
        )
        stack.enter_context(page)
        sinks += sink_list.open_sinks(stack, locations, facts)
        console.say(f"{'page':<14}{page.url}")
        for name, one in answering.items():
            console.say(f"{'engine':<14}{f'{name}: ' if len(answering) > 1 else ''}{one.description}")
        report = InputReport(frames)
        report.say()
        running = Live(
            answering if len(answering) > 1 else next(iter(answering.values())),
            frames,
            budget_ms=budget_ms,
            policy=DropPolicy.NEWEST,
            sinks=(page, *sinks, watch),  # type: ignore[arg-type]
            on_event=run_live.both(waiting.event, report.listening(watch.event)),
            temporal=smooth,
            drift=run_live.drift_monitors(answering, drift),
            rules=rules,
            advanced=LiveOptions(connect_timeout_s=connect_timeout),
        )
        with running, waiting.watch(running):
            watch.begin()
            page.watch(lambda: running.counters)
            _follow(running, page, report, limit=limit, stay=not once)
        watch.end(running)
    for line in (*run_live.table(watch, running)[1:], *sink_list.closing_lines(locations, sinks)):
        console.say(line)
    output.result(run_live.to_json(watch, running))
    report.end()
    recorded = ("replay", record / "clip.mha") if record is not None else None
    output.end(*(recorded or ("run", bundle, source, "--sink", "csv:results.csv")), indent=14)


def _follow(running: Live, page: WebSink, report: InputReport, *, limit: int | None, stay: bool) -> None:
    """Waits until Ctrl-C, so many results, or the end of the source."""
    try:
        for number, _ in enumerate(report.whole(running), 1):
            if number == limit:
                return
        page.end("the source has ended")
        if stay:
            console.note("note: the source has ended; the page stays up until Ctrl-C")
            threading.Event().wait()
    except KeyboardInterrupt:
        console.note("note: stopped")


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host and not host.startswith("[") else host


def _as_probe(opened: Callable[[], FrameSource], fps: float | None, loop: bool) -> FrameSource:
    """A probe as it is; anything else played at its rate."""
    from tinyusfm_runtime.frame import LiveSource
    from tinyusfm_runtime.replay.played import Played

    first = opened()
    return first if isinstance(first, LiveSource) else Played(first, opened if loop else None, fps)
