"""``tinyusfm-edge run`` with a budget, sinks or a probe: the live loop, and the table of what became of every frame."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinyusfm_edge.cli import console, sink_list
from tinyusfm_runtime.errors import InputError

if TYPE_CHECKING:
    from tinyusfm_runtime.drift import DriftMonitor
    from tinyusfm_runtime.frame import FrameSource
    from tinyusfm_runtime.ladder import Ladder
    from tinyusfm_runtime.live import Live
    from tinyusfm_runtime.live_result import LiveEvent, LiveResult, StateChange
    from tinyusfm_runtime.session import Session
    from tinyusfm_runtime.sinks import Sink

DEFAULT_BUDGET_MS = 100.0
"""For a probe, where none is given: three frames at 30 a second."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LiveRun:
    """What was typed.

    Attributes:
        bundle: the bundle's folder.
        budget_ms: age above which a result is stale, or None.
        policy: ``newest``, ``lossless``, or None for the source's own.
        sinks: ``NAME:WHERE`` each.
        fallback: open the other artefacts of the bundle too.
        isolate: run each artefact in a process of its own.
        smooth: smooth masks and readings over time.
        target: artefact to run, or None.
        precision: artefact to run, or None.
        threads: threads inside the engine, or None.
        limit: stop after so many results, or None.
        allow_unverified: also run an artefact that passed no gate.
        drift: watch for drift, None where the bundle can.
        full_depth: never stop at an early exit.
    """

    bundle: Path
    budget_ms: float | None
    policy: str | None
    sinks: Sequence[str]
    fallback: bool
    isolate: bool
    smooth: bool
    target: str | None
    precision: str | None
    threads: int | None
    limit: int | None
    allow_unverified: bool
    drift: bool | None = None
    full_depth: bool = False


@dataclass(kw_only=True, slots=True)
class Watch:
    """What happened while the loop ran, for the table; numbers only."""

    begin_ns: int = field(default_factory=time.monotonic_ns)
    states_ms: dict[str, float] = field(default_factory=dict)
    events: dict[str, int] = field(default_factory=dict)
    results: int = 0
    invalid: int = 0
    degraded: int = 0
    withheld: int = 0
    stale: int = 0
    strange: int = 0
    watched: int = 0
    drifted: int = 0

    def state(self, change: StateChange) -> None:
        """Takes note of a change and says it."""
        self._spent(change.before.value, change.t_ns)
        console.note(f"state {change.before.value} -> {change.after.value}: {change.reason}")

    def event(self, event: LiveEvent) -> None:
        """Takes note of an event; what concerns artefacts is said as well."""
        kind = event.kind.value
        self.events[kind] = self.events.get(kind, 0) + 1
        say_event(event)

    def write_live(self, result: LiveResult) -> None:
        """Counts one result; as a sink among the others it sees every one."""
        self.results += 1
        self.invalid += result.prediction is None or not result.prediction.valid
        self.degraded += result.degraded
        self.withheld += result.withheld
        self.stale += result.stale
        reading = None if result.prediction is None else result.prediction.drift
        if reading is not None:
            if reading.alarm and not self.drifted:
                console.note(f"drift: frames no longer look like the calibration set, by {reading.strangest}")
            self.watched += 1
            self.strange += reading.strange
            self.drifted += reading.alarm

    def end(self, live: Live) -> None:
        """The loop is over."""
        self._spent(live.state.value, time.monotonic_ns())

    def _spent(self, state: str, now_ns: int) -> None:
        self.states_ms[state] = self.states_ms.get(state, 0.0) + (now_ns - self.begin_ns) / 1e6
        self.begin_ns = now_ns


def run_live(asked: LiveRun, source: FrameSource) -> None:
    """Runs the loop until the source ends, the limit is reached, or Ctrl-C.

    Args:
        asked: what was typed.
        source: where frames come from, not entered yet.

    Raises:
        EdgeError: whatever goes wrong.
        KeyboardInterrupt: Ctrl-C; the sinks are closed whole and the table is printed first.
    """
    from tinyusfm_runtime.live import Live
    from tinyusfm_runtime.live_options import LiveOptions
    from tinyusfm_runtime.sinks import announce
    from tinyusfm_runtime.temporal import TemporalOptions

    # what the loop logs is said below as notes; without a handler Python would print it a second time
    logging.getLogger("tinyusfm_runtime").addHandler(logging.NullHandler())
    watch = Watch()
    sinks: list[Sink] = []
    live: Live | None = None
    standard_output = any(place in ("jsonl:-", "csv:-") for place in asked.sinks)
    try:
        with ExitStack() as stack:
            answering = open_answering(
                asked.bundle, target=asked.target, precision=asked.precision, threads=asked.threads,
                fallback=asked.fallback, isolate=asked.isolate, allow_unverified=asked.allow_unverified,
                full_depth=asked.full_depth,
            )  # fmt: skip
            stack.enter_context(answering)
            facts = sink_list.facts_of(answering, source, budget_ms=asked.budget_ms)
            sinks += sink_list.open_sinks(stack, asked.sinks, facts)

            def tell(change: StateChange) -> None:
                watch.state(change)
                for sink in sinks:
                    announce(sink, change)

            options = LiveOptions(
                on_event=watch.event,
                temporal=TemporalOptions() if asked.smooth else None,
                drift=drift_monitor(answering, asked.drift),
            )
            live = Live(
                answering,
                source,
                budget_ms=asked.budget_ms,
                policy=_policy(asked.policy),
                sinks=(*sinks, watch),  # type: ignore[arg-type]
                on_state=tell,
                advanced=options,
            )
            if live.is_live and asked.budget_ms is None:
                live.budget_ms = DEFAULT_BUDGET_MS
            with live:
                for _ in itertools.islice(live, asked.limit):
                    pass
            watch.end(live)
    finally:
        if live is not None and live.description:
            closing = sink_list.closing_lines(asked.sinks[: len(sinks)], sinks)
            for line in (*table(watch, live), *closing):
                (console.note if standard_output else console.say)(line)


def table(watch: Watch, live: Live) -> list[str]:
    """The table at the end.

    Args:
        watch: what happened.
        live: the loop, ended or not.
    """
    counters, latency = live.counters, live.latency()
    lines = [f"{'engine':<14}{live.description}"]
    dropped = _listed(counters.dropped)
    lines.append(
        f"{'frames':<14}{counters.received} received = {counters.processed} answered + "
        f"{sum(counters.dropped.values())} dropped{f' ({dropped})' if dropped else ''} + "
        f"{sum(counters.rejected.values())} rejected{f' ({_listed(counters.rejected)})' if counters.rejected else ''}"
        + (f" + {counters.waiting} waiting" if counters.waiting else "")
    )
    lines.append(
        f"{'results':<14}{watch.results - watch.invalid} usable, {watch.invalid} not, {watch.stale} stale, "
        f"{watch.withheld} withheld, {watch.degraded} degraded"
    )
    for name, label in (("age_ms", "age at result"), ("infer_ms", "engine")):
        if (found := latency.percentiles().get(name)) is not None:
            times = ", ".join(f"{which} {value:.1f}" for which, value in found.items())
            lines.append(f"{label:<14}{times} ms")
    if watch.states_ms:
        spent = ", ".join(f"{name} {ms / 1e3:.1f} s" for name, ms in sorted(watch.states_ms.items()))
        lines.append(f"{'states':<14}{spent}")
    if watch.watched:
        alarm = f", DRIFTED on {watch.drifted}" if watch.drifted else ", no alarm"
        lines.append(f"{'drift':<14}{watch.strange} of {watch.watched} look unlike the calibration set{alarm}")
    if watch.events:
        lines.append(f"{'events':<14}{_listed({name.replace('_', ' '): n for name, n in watch.events.items()})}")
    if counters.source:
        lines.append(f"{'source':<14}{_listed(counters.source)}")
    return lines


def _listed(counts: Any) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {count}" for name, count in sorted(counts.items()) if count)


def say_event(event: LiveEvent) -> None:
    """Says what concerns artefacts and bundles; a missed deadline shows in the states and the table."""
    if event.kind.value not in ("deadline_missed", "overlay_expired"):
        console.note(f"{event.kind.value.replace('_', ' ')}: {event.reason}")


def drift_monitor(answering: Session | Ladder, wanted: bool | None) -> DriftMonitor | None:
    """The bundle's drift monitor, where one session answers.

    Args:
        answering: what answers.
        wanted: True insists, None takes it where the bundle has one.

    Raises:
        InputError: it was asked for, and cannot be had.
    """
    from tinyusfm_runtime.session import Session

    if wanted is False or not isinstance(answering, Session):
        if wanted:
            raise InputError("--drift goes with one session: leave --fallback and --isolate out")
        return None
    return answering.watch_drift() if wanted or answering.has_drift else None


def _policy(typed: str | None) -> Any:
    from tinyusfm_runtime.live_result import DropPolicy

    if typed is None:
        return None
    try:
        return DropPolicy(typed.strip().lower())
    except ValueError:
        raise InputError(f"--policy is newest or lossless, not {typed!r}") from None


def open_answering(
    bundle: Path,
    *,
    target: str | None,
    precision: str | None,
    threads: int | None,
    fallback: bool,
    isolate: bool,
    allow_unverified: bool,
    full_depth: bool,
) -> Session | Ladder:
    """A session, or a ladder of the artefact that was asked for and the others behind it; see LiveRun for the words.

    Raises:
        InputError: the words contradict one another, or the bundle has no such artefact.
        EdgeError: it cannot be opened.
    """
    from tinyusfm_runtime.bundle import Bundle
    from tinyusfm_runtime.ladder import Ladder, LadderOptions
    from tinyusfm_runtime.session import Session, choose_artefact

    if not fallback and not isolate:
        return Session.open(
            bundle,
            target=target,
            precision=precision,
            threads=threads,
            allow_unverified=allow_unverified,
            full_depth=full_depth,
        )
    if full_depth:
        raise InputError("--full-depth goes with one session: leave --fallback and --isolate out")
    if allow_unverified:
        raise InputError("--fallback and --isolate take verified artefacts only: leave --allow-unverified out")
    opened = Bundle.open(bundle)
    first = choose_artefact(opened.manifest, target, precision).name
    others = [artefact.name for artefact in opened.manifest.artefacts if artefact.name != first and fallback]
    ladder = Ladder.open(opened, targets=[first, *others], advanced=LadderOptions(isolate=isolate, threads=threads))
    for line in ladder.unavailable:
        console.note(f"note: not available: {line}")
    return ladder
