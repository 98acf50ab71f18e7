"""``tinyusfm-edge run``: real frames through the thin runtime.

With an overlay video and JSON lines if wanted.

A file is read whole, in order. A probe, a budget or a sink makes it run live (run_live.py); both are the
runtime's loop.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence, Sized
from contextlib import ExitStack
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Annotated

import typer

from tinyusfm_edge.cli import console
from tinyusfm_edge.cli.output import SILENT, STANDARD_OUTPUT, ReportOutput, reports
from tinyusfm_edge.cli.streams import loop_options, sink_list
from tinyusfm_edge.cli.streams.input_report import InputReport
from tinyusfm_edge.cli.streams.run_counts import RunCounts
from tinyusfm_runtime.errors import InputError

if TYPE_CHECKING:
    from tinyusfm_edge.cli.streams.run_live import LiveRun
    from tinyusfm_runtime.frame import Frame, FrameSource
    from tinyusfm_runtime.live.loop import Live
    from tinyusfm_runtime.results import Prediction
    from tinyusfm_runtime.session import Session
    from tinyusfm_runtime.sinks import Sink

FILE_LABELS = {"video": "overlay video", "jsonl": "JSON lines"}
DEFAULT_RATE_HZ = 25.0
"""Of the overlay video, where the source tells no time."""


@reports("run")
def run(
    bundles: loop_options.Bundles,
    source: Annotated[str, typer.Argument(help="Folder of images, DICOM file, video, phantom:FIRST-LAST, or a probe.")],
    overlay: Annotated[str | None, typer.Option(help="Write an MP4 with mask, ellipse and reading.")] = None,
    jsonl: Annotated[str | None, typer.Option(help="Write one JSON object per frame; - is standard output.")] = None,
    target: loop_options.Target = None,
    precision: loop_options.Precision = None,
    threads: loop_options.Threads = None,
    recipe: loop_options.Recipe = None,
    limit: Annotated[int | None, typer.Option(min=1, max=console.MOST, help="Stop after so many frames.")] = None,
    budget_ms: Annotated[
        float | None,
        typer.Option(
            min=0.001,
            help="Age of a late result, not shown of a probe. Default: 100 for probes.",
        ),
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
    window: loop_options.Window = None,
    allow_no_crc: loop_options.AllowNoCrc = False,
    connect_timeout: loop_options.ConnectTimeout = loop_options.CONNECT_TIMEOUT_S,
    drift: loop_options.Drift = None,
    allow_unverified: loop_options.AllowUnverified = False,
    full_depth: loop_options.FullDepth = False,
    require_signed: loop_options.RequireSigned = None,
    device_class: loop_options.DeviceClass = None,
    no_second_pass: loop_options.NoSecondPass = False,
    rules: loop_options.Rules = None,
    output: ReportOutput = SILENT,
    names: loop_options.Names = False,
) -> None:
    """Run a bundle, or several, on frames."""
    from tinyusfm_edge.cli.streams.run_live import LiveRun, run_live
    from tinyusfm_runtime.frame import LiveSource

    sinks = list(sink or ())
    files = [f"{name}:{place}" for name, place in (("video", overlay), ("jsonl", jsonl)) if place is not None]
    sink_list.refuse_overwriting(source, [*files, *sinks])
    models = loop_options.read_bundles(bundles)
    if recipe is not None and len(models) > 1:
        raise InputError("--recipe chooses the artefact of one bundle: leave it out where there are several")
    chosen = loop_options.chosen_artefact(recipe, models[0][1], target, precision, threads)
    opened = loop_options.open_stream(source, loop_options.source_options(crop, spacing, window, allow_no_crc, names))
    request = LiveRun(
        bundle=models[0][1], models=models, rules=rules, budget_ms=budget_ms, policy=policy, sinks=[*files, *sinks],
        fallback=fallback, isolate=isolate, smooth=smooth, target=chosen.target, precision=chosen.precision,
        threads=chosen.threads, cpus=chosen.cpus, limit=limit,
        allow_unverified=allow_unverified, drift=drift, full_depth=full_depth, connect_timeout_s=connect_timeout,
        trust=loop_options.trust_of(require_signed, device_class),
        second_pass=not no_second_pass, source=source,
    )  # fmt: skip
    live = isinstance(opened, LiveSource) or budget_ms or sinks or policy or fallback or isolate or smooth
    live = live or len(models) > 1 or rules is not None
    if output.json_place == STANDARD_OUTPUT and {"jsonl:-", "csv:-"} & set(request.sinks):
        raise InputError("standard output takes either the results of frames or --json: give one of them a file")
    if {"jsonl:-", "csv:-"} & set(request.sinks):
        console.voice.results_aside = True
    (run_live if live else _run_file)(request, opened, output)


def _run_file(request: LiveRun, source: FrameSource, output: ReportOutput) -> None:
    """Every frame of a file, in order, none left out; what goes wrong ends the run."""
    from tinyusfm_edge.cli.streams.run_live import drift_monitor, open_answering
    from tinyusfm_runtime.errors import EngineError
    from tinyusfm_runtime.live.fallback import Fallback, FallbackOptions
    from tinyusfm_runtime.live.loop import Live
    from tinyusfm_runtime.session import Session
    from tinyusfm_runtime.sinks import RunFacts

    counts = RunCounts()
    stopped = False
    with ExitStack() as stack:
        opened = stack.enter_context(source)
        session = stack.enter_context(open_answering(request))
        assert isinstance(session, Session)  # neither fallback nor isolation was asked for
        report = InputReport(opened)
        report.say()
        clip = Clip(opened, report.whole(opened), request.limit)
        facts = RunFacts(rate_hz=clip.rate_hz, labels=tuple(session.spec.labels))
        sinks = sink_list.open_sinks(stack, request.sinks, facts)
        one = Fallback.of(session, advanced=FallbackOptions(recheck_s=None, cpus=request.pinned_cpus))
        stack.callback(one.close)
        listening = (*(FileRecord(sink) for sink in sinks), counts)
        with Live(one, clip, sinks=listening, drift=drift_monitor(session, request.drift) or False) as live:  # type: ignore[arg-type]
            try:
                for result in console.track(live, "frames", clip.expected):
                    if result.prediction is None:
                        raise EngineError(result.error or "the engine gave no answer")
            except KeyboardInterrupt:
                stopped = True
    _print_file_result(request, counts, live, session)
    output.result(
        {
            "engine": session.description,
            "bundle": session.manifest.bundle_id,
            "whole": not stopped,
            "left_out": dict(live.counters.rejected),
            **counts.to_json(),
        }
    )
    if stopped:
        raise KeyboardInterrupt
    report.end()
    output.end("profile", request.bundle, indent=14)


def _print_file_result(request: LiveRun, counts: RunCounts, live: Live, session: Session) -> None:
    """The summary of a file's run, also of one that was stopped."""
    from tinyusfm_runtime.early_exit import exit_names

    for line in counts.lines(session.description, session.spec.labels, exit_names(session.spec.exits)):
        console.say(line)
    if rejected := live.counters.rejected:
        reasons = ", ".join(f"{name.replace('_', ' ')} {count}" for name, count in sorted(rejected.items()))
        console.say(f"{'left out':<14}{sum(rejected.values())} frames that cannot be used: {reasons}")
        if session.artefact.sector and "misplaced" in rejected:
            console.note(f"note: {sector_advice(session)}")
    for name, _, place in (text.partition(":") for text in request.sinks):
        if place != "-":
            console.say(f"{FILE_LABELS[name]:<14}{place}")


def sector_advice(session: Session) -> str:
    """What to do where frames show another sector than that of a pruned artefact.

    Args:
        session: of a pruned artefact.
    """
    artefact = session.artefact
    whole = next((one for one in session.manifest.artefacts if not one.sector), None)
    what = f"{artefact.name} looks at sector {artefact.sector!r} alone, and these frames show another one"
    if whole is None:
        return f"{what}: the bundle holds no artefact that looks at all patches, export it without --sector-only"
    return f"{what}: run with --fallback, or with --target {whole.target} --precision {whole.precision}"


class Clip:
    """An open file's frames.

    The first two are read ahead for their rate, and no more are read than are wanted.

    Args:
        opened: the open source; it stays its opener's to close.
        frames: its frames, as they are to be read.
        limit: most frames, or None for all.

    Attributes:
        rate_hz: from the source's clock between the first two frames.
        expected: how many frames will come, or None where nobody knows.
    """

    def __init__(self, opened: FrameSource, frames: Iterator[Frame], limit: int | None) -> None:
        ahead = list(itertools.islice(frames, 2))
        self.rate_hz = _rate_hz([frame.t_source_ns for frame in ahead])
        total = len(opened) if isinstance(opened, Sized) else None
        self.expected = min(filter(None, (total, limit)), default=None)
        self._frames = itertools.islice(itertools.chain(ahead, frames), limit)

    def __enter__(self) -> Clip:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def __iter__(self) -> Iterator[Frame]:
        return self._frames


class FileRecord:
    """A sink of a file's run.

    Frames waited for the engine, so an age since reception would say nothing.
    """

    def __init__(self, sink: Sink) -> None:
        self._sink = sink

    def write(self, frame: Frame, prediction: Prediction) -> None:
        """Hands frame and prediction on, without times of reception."""
        self._sink.write(replace(frame, t_recv_ns=None), replace(prediction, t_recv_ns=None, age_ms=None))


def _rate_hz(times_ns: Sequence[int | None]) -> float:
    if len(times_ns) == 2 and times_ns[0] is not None and times_ns[1] is not None and times_ns[1] > times_ns[0]:
        return min(max(1e9 / (times_ns[1] - times_ns[0]), 1.0), 120.0)
    return DEFAULT_RATE_HZ
