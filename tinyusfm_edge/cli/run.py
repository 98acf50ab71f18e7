"""``tinyusfm-edge run``: real frames through the thin runtime, with an overlay video and JSON lines if wanted.

A file is read whole, in order. A probe, a budget or a sink makes it the live loop (run_live.py).
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence, Sized
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import typer

from tinyusfm_edge.cli import console, loop_options, sink_list

if TYPE_CHECKING:
    from tinyusfm_runtime.drift import DriftReading
    from tinyusfm_runtime.frame import Frame, FrameSource
    from tinyusfm_runtime.session import Prediction
    from tinyusfm_runtime.sinks import Sink

DEFAULT_RATE_HZ = 25.0
"""Of the overlay video, where the source tells no time."""


def run(
    bundle: Annotated[Path, typer.Argument(help="The bundle's folder.")],
    source: Annotated[
        str, typer.Argument(help="Folder of pictures, DICOM file, video, phantom:FIRST-LAST, or a probe.")
    ],
    overlay: Annotated[str | None, typer.Option(help="Write an MP4 with mask, ellipse and reading.")] = None,
    jsonl: Annotated[str | None, typer.Option(help="Write one JSON object a frame; - is standard output.")] = None,
    target: loop_options.Target = None,
    precision: loop_options.Precision = None,
    threads: loop_options.Threads = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Stop after so many frames.")] = None,
    budget_ms: Annotated[
        float | None, typer.Option(min=0.001, help="Live: a result older than this is stale, and of a probe withheld.")
    ] = None,
    sink: loop_options.Sinks = None,
    policy: Annotated[
        str | None, typer.Option(help="Live: newest (frames are dropped, for probes) or lossless (for files).")
    ] = None,
    fallback: loop_options.Fallback = False,
    isolate: loop_options.Isolate = False,
    smooth: loop_options.Smooth = False,
    crop: loop_options.Crop = None,
    spacing: loop_options.Spacing = None,
    drift: loop_options.Drift = None,
    allow_unverified: loop_options.AllowUnverified = False,
    full_depth: loop_options.FullDepth = False,
) -> None:
    """Run a bundle on frames."""
    from tinyusfm_edge.cli.run_live import LiveRun, run_live
    from tinyusfm_runtime.frame import LiveSource
    from tinyusfm_runtime.sources import open_source

    sinks = list(sink or ())
    files = [f"{name}:{place}" for name, place in (("video", overlay), ("jsonl", jsonl)) if place is not None]
    sink_list.refuse_overwriting(source, [*files, *sinks])
    opened = open_source(source, **loop_options.source_options(crop, spacing))
    if not (isinstance(opened, LiveSource) or budget_ms or sinks or policy or fallback or isolate or smooth):
        _run_file(
            bundle, opened, overlay=overlay, jsonl=jsonl, target=target, precision=precision, threads=threads,
            limit=limit, allow_unverified=allow_unverified, drift=drift, full_depth=full_depth,
        )  # fmt: skip
        return
    asked = LiveRun(
        bundle=bundle, budget_ms=budget_ms, policy=policy, sinks=[*files, *sinks],
        fallback=fallback, isolate=isolate, smooth=smooth, target=target, precision=precision, threads=threads,
        limit=limit,
        allow_unverified=allow_unverified, drift=drift, full_depth=full_depth,
    )  # fmt: skip
    run_live(asked, opened)


def _run_file(
    bundle: Path,
    source: FrameSource,
    *,
    overlay: str | None,
    jsonl: str | None,
    target: str | None,
    precision: str | None,
    threads: int | None,
    limit: int | None,
    allow_unverified: bool,
    drift: bool | None,
    full_depth: bool,
) -> None:
    """Every frame of a file, in this thread."""
    from tinyusfm_runtime.early_exit import exit_names
    from tinyusfm_runtime.session import Session
    from tinyusfm_runtime.sinks import jsonl as jsonl_sink
    from tinyusfm_runtime.sinks import video as video_sink

    with ExitStack() as stack:
        opened = stack.enter_context(source)
        session = stack.enter_context(
            Session.open(
                bundle,
                target=target,
                precision=precision,
                threads=threads,
                allow_unverified=allow_unverified,
                full_depth=full_depth,
            )  # fmt: skip
        )
        for line in getattr(opened, "notes", ()):
            console.note(f"note: {line}")
        frames, rate_hz = _with_rate(iter(opened))
        sinks: list[Sink] = []
        if overlay is not None:
            sinks.append(stack.enter_context(video_sink.open_sink(overlay, rate_hz=rate_hz)))
        if jsonl is not None:
            sinks.append(stack.enter_context(jsonl_sink.open_sink(jsonl)))
        tally = Tally()
        # without being asked, a bundle that carries the statistic is listened to
        monitor = session.watch_drift() if drift or (drift is None and session.has_drift) else None
        total = len(opened) if isinstance(opened, Sized) else None
        expected = min(filter(None, (total, limit)), default=None)
        for frame in console.track(itertools.islice(frames, limit), "frames", expected):
            prediction = session.predict(frame)
            if monitor is not None:
                reading = monitor.observe(prediction, frame)
                tally.add_drift(reading)
                prediction = replace(prediction, drift=reading)
            for sink in sinks:
                sink.write(frame, prediction)
            tally.add(prediction)
    print_line = console.note if jsonl == "-" else console.say
    exits = exit_names(session.spec.exits)
    for line in tally.lines(session.description, session.spec.labels, exits):
        print_line(line)
    for place, what in ((overlay, "overlay video"), (jsonl, "JSON lines")):
        if place not in (None, "-"):
            print_line(f"{what:<14}{place}")


@dataclass(kw_only=True, slots=True)
class Tally:
    """What is kept of each result for the summary: numbers only, so that hours of frames fit in memory."""

    total_ms: list[float] = field(default_factory=list)
    hc_mm: list[float] = field(default_factory=list)
    hc_px: list[float] = field(default_factory=list)
    invalid: int = 0
    measured: int = 0
    at_border: int = 0
    unverified: int = 0
    winners: Counter[int] = field(default_factory=Counter)
    stopped: Counter[int] = field(default_factory=Counter)
    strange: int = 0
    watched: int = 0
    alarms: int = 0
    last: DriftReading | None = None

    def add_drift(self, reading: DriftReading) -> None:
        """Counts one drift reading."""
        self.watched += 1
        self.strange += reading.strange
        self.alarms += reading.alarm
        self.last = reading

    def add(self, prediction: Prediction) -> None:
        """Counts one result."""
        self.total_ms.append(prediction.timings.total_ms)
        self.invalid += not prediction.valid
        self.unverified += not prediction.verified
        if prediction.scores is not None:
            self.winners[int(prediction.scores.argmax())] += 1
        if prediction.exit_index is not None:
            self.stopped[prediction.exit_index] += 1
        measured = prediction.measurement
        if measured is not None:
            self.measured += 1
            self.at_border += measured.touches_border
            if measured.found:
                self.hc_px.append(measured.hc_px)
            if measured.hc_mm is not None:
                self.hc_mm.append(measured.hc_mm)

    def lines(self, description: str, labels: Sequence[str], exits: Sequence[str] = ()) -> list[str]:
        """The summary for people.

        Args:
            description: artefact and engine.
            labels: of the model.
            exits: names of its early exits and of its end, if it has any.
        """
        lines = [f"{'engine':<14}{description}", f"{'frames':<14}{len(self.total_ms)}, {self.invalid} invalid"]
        if self.total_ms:
            p50, p90, p99 = np.percentile(self.total_ms, (50, 90, 99))
            lines.append(f"{'frame to mask':<14}p50 {p50:.1f} ms, p90 {p90:.1f} ms, p99 {p99:.1f} ms")
        if self.measured:
            lines.append(f"{'head found':<14}{self._heads()}")
        if self.last is not None:
            lines.append(f"{'drift':<14}{self._drift(self.last)}")
        if self.winners and len(labels) > 1:
            shown = (f"{labels[index]} {count}" for index, count in self.winners.most_common())
            lines.append(f"{'labels':<14}{', '.join(shown)}")
        if self.stopped:
            shown = (f"{name} {self.stopped[index]}" for index, name in enumerate(exits))
            lines.append(f"{'answered at':<14}{', '.join(shown)}")
        if self.unverified:
            lines.append(f"{'UNVERIFIED':<14}this artefact passed no gate: do not rely on what it says")
        return lines

    def _drift(self, last: DriftReading) -> str:
        text = f"{self.strange} of {self.watched} frames look unlike the calibration set, by {last.kind}"
        if self.alarms:
            return f"{text}; DRIFTED on {self.alarms} frames, last by {last.strangest}: do not rely on what it says"
        if self.watched < last.window:
            return f"{text}; {last.window} frames decide"
        return f"{text}; no alarm"

    def _heads(self) -> str:
        text = f"{len(self.hc_px)} of {self.measured} frames, {self.at_border} at the border"
        if self.hc_mm:
            low, high = min(self.hc_mm), max(self.hc_mm)
            return f"{text}, HC median {np.median(self.hc_mm):.1f} mm ({low:.1f} to {high:.1f})"
        return f"{text}, HC median {np.median(self.hc_px):.0f} input pixels (no spacing)" if self.hc_px else text


def _with_rate(frames: Iterator[Frame]) -> tuple[Iterator[Frame], float]:
    """The frames and their rate in Hz, from the source's clock between the first two."""
    ahead = list(itertools.islice(frames, 2))
    times = [frame.t_source_ns for frame in ahead]
    rate_hz = DEFAULT_RATE_HZ
    if len(times) == 2 and times[0] is not None and times[1] is not None and times[1] > times[0]:
        rate_hz = min(max(1e9 / (times[1] - times[0]), 1.0), 120.0)
    return itertools.chain(ahead, frames), rate_hz
