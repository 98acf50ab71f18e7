"""``tinyusfm-edge live``: a page to watch a source by: frame, overlay, reading, ages, drops, state.

A probe is shown as it is. Files, folders and phantoms are played at their own rate, as a probe would give them:
newest frame first, late ones dropped and counted.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tinyusfm_edge.cli import console, loop_options, run_live, sink_list

if TYPE_CHECKING:
    from tinyusfm_runtime.frame import Frame, FrameSource
    from tinyusfm_runtime.live import Live
    from tinyusfm_runtime.live_result import LiveEvent, StateChange
    from tinyusfm_runtime.sinks import Sink

DEFAULT_RATE_HZ = 25.0
"""Of files that tell no time."""


def live(
    bundle: Annotated[Path, typer.Argument(help="The bundle's folder.")],
    source: Annotated[
        str, typer.Argument(help="A probe (igtl://HOST:PORT and others), a file, or phantom:FIRST-LAST.")
    ],
    budget_ms: Annotated[float, typer.Option(min=1.0, help="A result older than this is late, and not shown.")] = 100.0,
    host: Annotated[
        str, typer.Option(help="Address to serve the page on; others than this machine need the key.")
    ] = "",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port of the page; 0 takes a free one.")] = 8765,
    sink: loop_options.Sinks = None,
    fps: Annotated[float | None, typer.Option(min=0.1, max=240, help="Play a file at this rate, not its own.")] = None,
    loop: Annotated[bool, typer.Option("--loop", help="Play a file again and again.")] = False,
    once: Annotated[bool, typer.Option("--once", help="Stop when the source ends; else the page stays up.")] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="Stop after so many results.")] = None,
    target: loop_options.Target = None,
    precision: loop_options.Precision = None,
    threads: loop_options.Threads = None,
    fallback: loop_options.Fallback = False,
    isolate: loop_options.Isolate = False,
    smooth: loop_options.Smooth = False,
    crop: loop_options.Crop = None,
    spacing: loop_options.Spacing = None,
    drift: loop_options.Drift = None,
    allow_unverified: loop_options.AllowUnverified = False,
    full_depth: loop_options.FullDepth = False,
) -> None:
    """Watch a source in the browser."""
    from tinyusfm_runtime.live import Live
    from tinyusfm_runtime.live_options import LiveOptions
    from tinyusfm_runtime.live_result import DropPolicy
    from tinyusfm_runtime.sinks import announce, web
    from tinyusfm_runtime.sources import open_source
    from tinyusfm_runtime.temporal import TemporalOptions

    locations = list(sink or ())
    sink_list.refuse_overwriting(source, locations)
    options = loop_options.source_options(crop, spacing)

    def opened() -> FrameSource:
        return open_source(source, **options)

    sinks: list[Sink] = []

    def tell(change: StateChange) -> None:
        for each in (page, *sinks):
            announce(each, change)

    def happened(event: LiveEvent) -> None:
        page.on_event(event)
        run_live.say_event(event)

    with ExitStack() as stack:
        frames = _as_probe(opened, fps, loop)
        answering = run_live.open_answering(
            bundle, target=target, precision=precision, threads=threads, fallback=fallback, isolate=isolate,
            allow_unverified=allow_unverified, full_depth=full_depth,
        )  # fmt: skip
        stack.enter_context(answering)
        page = web.open_sink(
            f"//{host and _bracketed(host)}:{port}",
            title=answering.spec.name,
            labels=answering.spec.labels,
            budget_ms=budget_ms,
            overlay_ms=LiveOptions().overlay_ms(budget_ms),
        )
        stack.enter_context(page)
        facts = sink_list.facts_of(answering, getattr(frames, "first", frames), budget_ms=budget_ms)
        sinks += sink_list.open_sinks(stack, locations, facts)
        console.say(f"{'page':<14}{page.url}")
        console.say(f"{'engine':<14}{answering.description}")
        loop_wishes = LiveOptions(
            on_event=happened,
            temporal=TemporalOptions() if smooth else None,
            drift=run_live.drift_monitor(answering, drift),
        )
        running = Live(
            answering, frames, budget_ms=budget_ms, policy=DropPolicy.NEWEST, sinks=(page, *sinks), on_state=tell,
            advanced=loop_wishes,
        )  # fmt: skip
        with running:
            page.watch(lambda: running.counters)
            _follow(running, page, limit=limit, stay=not once)
        counters = running.counters
    dropped = ", ".join(f"{name} {number}" for name, number in counters.dropped.items() if number) or "none"
    console.say(f"{'frames':<14}{counters.received} received, {counters.processed} answered, dropped: {dropped}")
    for line in sink_list.closing_lines(locations, sinks):
        console.say(line)


def _follow(running: Live, page: Any, *, limit: int | None, stay: bool) -> None:
    """Waits until Ctrl-C, so many results, or the end of the source."""
    try:
        for number, _ in enumerate(running, 1):
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

    first = opened()
    return first if isinstance(first, LiveSource) else Played(first, opened if loop else None, fps)


class Played:
    """A file that behaves like a probe: each frame comes when it is due, whether or not somebody is ready for it.

    Args:
        first: the open source.
        again: opens it anew for another round, or None to end.
        fps: frames a second, or None for the source's own times.
    """

    def __init__(self, first: FrameSource, again: Callable[[], FrameSource] | None, fps: float | None) -> None:
        self.first, self._again, self._fps = first, again, fps
        self.notes: tuple[str, ...] = getattr(first, "notes", ())
        self._closed = threading.Event()

    def __enter__(self) -> Played:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed.set()

    def __iter__(self) -> Iterator[Frame]:
        source, seq, due_ns, before_ns = self.first, 0, time.monotonic_ns(), None
        while True:
            with source as frames:
                for frame in frames:
                    due_ns += self._step_ns(before_ns, frame.t_source_ns) if seq else 0
                    before_ns = frame.t_source_ns
                    if self._closed.wait(max(0.0, (due_ns - time.monotonic_ns()) / 1e9)):
                        return
                    # a frame that could not be read in time is late by nobody's fault: the clock starts anew
                    due_ns = max(due_ns, time.monotonic_ns() - 1_000_000_000)
                    yield replace(frame, seq=seq, t_recv_ns=time.monotonic_ns(), t_source_ns=None)
                    seq += 1
            if self._again is None or seq == 0:
                return
            source = self._again()

    def _step_ns(self, before_ns: int | None, now_ns: int | None) -> int:
        usual_ns = round(1e9 / (self._fps or DEFAULT_RATE_HZ))
        if self._fps is not None or before_ns is None or now_ns is None:
            return usual_ns
        step_ns = now_ns - before_ns
        return step_ns if 0 < step_ns < 2_000_000_000 else usual_ns
