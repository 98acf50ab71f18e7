"""``tinyusfm-edge run`` with a budget, sinks or a probe: the live loop.

It ends with the table of what became of every frame.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinyusfm_edge.cli import console
from tinyusfm_edge.cli.output import ReportOutput
from tinyusfm_edge.cli.streams import sink_list
from tinyusfm_edge.cli.streams.input_report import InputReport
from tinyusfm_edge.cli.streams.run_counts import RunCounts
from tinyusfm_edge.cli.streams.waiting import Waiting
from tinyusfm_runtime.errors import InputError

if TYPE_CHECKING:
    from tinyusfm_runtime.bundle.reader import Bundle
    from tinyusfm_runtime.drift import DriftMonitor
    from tinyusfm_runtime.frame import FrameSource
    from tinyusfm_runtime.live.fallback import Fallback
    from tinyusfm_runtime.live.loop import Live
    from tinyusfm_runtime.results import DropPolicy, LiveEvent, LiveResult, StateChange
    from tinyusfm_runtime.session import Session
    from tinyusfm_runtime.sinks import RunFacts, Sink
    from tinyusfm_runtime.trust.policy import Trust


@dataclass(frozen=True, kw_only=True, slots=True)
class LiveRun:
    """What was typed.

    Attributes:
        bundle: the bundle's folder, or the open bundle.
        models: names and folders of all bundles, this one first.
        rules: file of the rules of several bundles, or None.
        budget_ms: age above which a result is stale, or None.
        policy: ``newest``, ``lossless``, or None for the source's own.
        sinks: ``NAME:WHERE`` each.
        fallback: open the other artefacts of the bundle too.
        isolate: run each artefact in a process of its own.
        smooth: smooth masks and readings over time.
        target: artefact to run, or None.
        precision: artefact to run, or None.
        threads: threads inside the engine, or None.
        cpus: CPUs that the engine is pinned to, or None.
        limit: stop after so many results, or None.
        allow_unverified: also run an artefact that passed no gate.
        drift: watch for drift, None where the bundle can.
        full_depth: never stop at an early exit.
        connect_timeout_s: give up after so long without a first frame, or None.
        trust: demands a signature, or None.
        second_pass: False never looks twice at a frame.
        source: where frames come from, as typed.
    """

    bundle: Path | Bundle
    models: tuple[tuple[str, Path], ...] = ()
    rules: Path | None = None
    budget_ms: float | None = None
    policy: str | None = None
    sinks: Sequence[str] = ()
    fallback: bool = False
    isolate: bool = False
    smooth: bool = False
    target: str | None = None
    precision: str | None = None
    threads: int | None = None
    cpus: Sequence[int] | None = None
    limit: int | None = None
    allow_unverified: bool = False
    drift: bool | None = None
    full_depth: bool = False
    connect_timeout_s: float | None = None
    trust: Trust | None = None
    second_pass: bool = True
    source: str = "the source"

    @property
    def pinned_cpus(self) -> frozenset[int] | None:
        """CPUs that the engine is pinned to, or None."""
        return None if self.cpus is None else frozenset(self.cpus)


@dataclass(kw_only=True, slots=True)
class ModelWatch:
    """What became of one of several models; numbers only."""

    labels: tuple[str, ...]
    counts: RunCounts = field(default_factory=RunCounts)
    asked: int = 0
    skipped: int = 0
    invalid: int = 0
    degraded: int = 0

    def write_live(self, result: LiveResult) -> None:
        """Counts one result of this model, but not what it says."""
        self.skipped += result.skipped is not None
        self.asked += result.skipped is None
        usable = result.prediction is not None and result.prediction.valid
        self.invalid += result.skipped is None and not usable
        self.degraded += result.degraded

    def lines(self, name: str, description: str) -> list[str]:
        """What became of it, for people.

        Args:
            name: of the model.
            description: artefact and engine.
        """
        parts = [f"{self.asked} frames asked", f"{self.skipped} left out by rule" if self.skipped else ""]
        parts += [f"{self.invalid} without a valid answer" if self.invalid else ""]
        parts += [f"{self.degraded} by a fallback or after one" if self.degraded else ""]
        lines = [f"{'model':<14}{name}: {description}", f"{'asked':<14}{', '.join(part for part in parts if part)}"]
        lines += self.counts.reading_lines(self.labels)
        return lines + self.counts.check_lines(self.counts.drift.stream_line())

    def to_json(self) -> dict[str, Any]:
        """The counts as plain data."""
        return {
            "asked": self.asked,
            "skipped": self.skipped,
            "invalid": self.invalid,
            "degraded": self.degraded,
            "answers": self.counts.to_json(),
        }


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
    unshown: int = 0
    labels: tuple[str, ...] = ()
    counts: RunCounts = field(default_factory=RunCounts)
    models: dict[str, ModelWatch] = field(default_factory=dict)

    def follow(self, answering: Mapping[str, Session | Fallback]) -> None:
        """Takes note of which models there are.

        Args:
            answering: what answers, by name.
        """
        self.labels = tuple(next(iter(answering.values())).spec.labels)
        if len(answering) > 1:
            self.models = {name: ModelWatch(labels=tuple(one.spec.labels)) for name, one in answering.items()}

    def event(self, event: StateChange | LiveEvent) -> None:
        """Takes note of a change of state or an event, and says it."""
        from tinyusfm_runtime.results import StateChange

        if isinstance(event, StateChange):
            self._spent(event.before.value, event.t_ns)
            console.note(f"state {event.before.value} -> {event.after.value}: {event.reason}")
            return
        kind = event.kind.value
        self.events[kind] = self.events.get(kind, 0) + 1
        say_event(event)

    def write_live(self, result: LiveResult) -> None:
        """Counts one result; as a sink among the others it sees every one."""
        self.results += 1
        asked = [each.prediction for each in result.each if each.skipped is None]
        usable = all(prediction is not None and prediction.valid for prediction in asked)
        self.invalid += not usable
        self.degraded += result.degraded
        self.withheld += result.withheld
        self.stale += result.stale
        self.unshown += usable and result.withheld
        for each in result.models:
            self.models[each.model].write_live(each)
        counts = [(each, self.models[each.model].counts) for each in result.models] or [(result, self.counts)]
        for each, kept in counts:
            alarms = kept.drift.alarms
            kept.write_live(each)
            if kept.drift.last is not None and kept.drift.alarms and not alarms:
                whose = f"{each.model}: " if each.model else ""
                by = kept.drift.last.strangest
                console.note(f"{whose}drift: frames no longer look like the calibration set, by {by}")

    def begin(self) -> None:
        """The loop runs now: loading the engine before it is no time without a source."""
        self.begin_ns = time.monotonic_ns()

    def end(self, live: Live) -> None:
        """The loop is over."""
        self._spent(live.state.value, time.monotonic_ns())

    def _spent(self, state: str, now_ns: int) -> None:
        self.states_ms[state] = self.states_ms.get(state, 0.0) + (now_ns - self.begin_ns) / 1e6
        self.begin_ns = now_ns


def run_live(request: LiveRun, source: FrameSource, output: ReportOutput) -> None:
    """Runs the loop until the source ends, the limit is reached, or Ctrl-C.

    Args:
        request: what was typed.
        source: where frames come from, not entered yet.
        output: where the summary goes.

    Raises:
        EdgeError: whatever goes wrong.
        KeyboardInterrupt: Ctrl-C; the sinks are closed whole and the table is printed first.
    """
    from tinyusfm_runtime.live.loop import Live
    from tinyusfm_runtime.live.options import LiveOptions

    # what the loop logs is said below as notes; without a handler Python would print it a second time
    logging.getLogger("tinyusfm_runtime").addHandler(logging.NullHandler())
    watch = Watch()
    sinks: list[Sink] = []
    live: Live | None = None
    report = InputReport(source)
    report.say()
    waiting = Waiting(request.source)
    try:
        with ExitStack() as stack:
            answering = open_models(request, stack)
            watch.follow(answering)
            sinks += sink_list.open_sinks(stack, request.sinks, facts(answering, source, budget_ms=request.budget_ms))

            live = Live(
                _levels(answering, request, stack),
                source,
                budget_ms=request.budget_ms,
                policy=_policy(request.policy),
                sinks=(*sinks, watch),  # type: ignore[arg-type]
                on_event=both(waiting.event, report.listening(watch.event)),
                temporal=request.smooth,
                drift=drift_monitors(answering, request.drift),
                rules=request.rules,
                advanced=LiveOptions(connect_timeout_s=request.connect_timeout_s),
            )
            with live, waiting.watch(live):
                watch.begin()
                for _ in itertools.islice(report.whole(live), request.limit):
                    pass
            watch.end(live)
    finally:
        if live is not None and live.description:
            closing = sink_list.closing_lines(request.sinks[: len(sinks)], sinks)
            for line in (*table(watch, live), *closing):
                console.say(line)
            output.result(to_json(watch, live))
    report.end()
    output.end("profile", request.models[0][1] if request.models else request.bundle, indent=14)


def both(
    first: Callable[[StateChange | LiveEvent], None], second: Callable[[StateChange | LiveEvent], None]
) -> Callable[[StateChange | LiveEvent], None]:
    """Two listeners as one.

    Args:
        first: hears an event before the other.
        second: hears it then.
    """

    def hear(event: StateChange | LiveEvent) -> None:
        first(event)
        second(event)

    return hear


def table(watch: Watch, live: Live) -> list[str]:
    """The table at the end.

    Args:
        watch: what happened.
        live: the loop, ended or not.
    """
    counters, latency = live.counters, live.latency()
    lines = [] if watch.models else [f"{'engine':<14}{live.description}"]
    dropped = _listed(counters.dropped)
    lines.append(
        f"{'frames':<14}{counters.received} received = {counters.processed} answered + "
        f"{sum(counters.dropped.values())} dropped{f' ({dropped})' if dropped else ''} + "
        f"{sum(counters.rejected.values())} rejected{f' ({_listed(counters.rejected)})' if counters.rejected else ''}"
        + (f" + {counters.waiting} waiting" if counters.waiting else "")
    )
    lines.append(f"{'results':<14}{result_words(watch, live.budget_ms)}")
    for name, label in (("age_ms", "age at result"), ("infer_ms", "engine")):
        if (found := latency.percentiles().get(name)) is not None:
            times = ", ".join(f"{which} {value:.1f}" for which, value in found.items())
            lines.append(f"{label:<14}{times} ms")
    if watch.states_ms:
        spent = ", ".join(f"{name} {ms / 1e3:.1f} s" for name, ms in sorted(watch.states_ms.items()))
        lines.append(f"{'states':<14}{spent}")
    for name, model in watch.models.items():
        lines += model.lines(name, live.fallback_of(name).description)
    lines += watch.counts.reading_lines(watch.labels)
    lines += watch.counts.check_lines(watch.counts.drift.stream_line())
    if watch.events:
        lines.append(f"{'events':<14}{_listed({name.replace('_', ' '): n for name, n in watch.events.items()})}")
    if counters.source:
        lines.append(f"{'source':<14}{_listed(counters.source)}")
    return lines


def result_words(watch: Watch, budget_ms: float | None) -> str:
    """What became of the results, in parts that add up.

    Args:
        watch: what happened.
        budget_ms: age above which a result is late, or None.
    """
    late = "" if budget_ms is None else f" later than {budget_ms:g} ms"
    usable = watch.results - watch.invalid
    parts = [f"{usable - watch.unshown} usable"]
    if watch.unshown:
        parts.append(f"{watch.unshown} computed{late} and therefore not shown")
    if watch.invalid:
        parts.append(f"{watch.invalid} without a valid answer")
    text = f"{watch.results} = {' + '.join(parts)}"
    shown_late = watch.stale - watch.withheld
    if shown_late > 0:
        text += f"; {shown_late} of them{late}, shown all the same"
    return text + (f"; {watch.degraded} by a fallback or after one" if watch.degraded else "")


def to_json(watch: Watch, live: Live) -> dict[str, Any]:
    """The table as plain data.

    Args:
        watch: what happened.
        live: the loop, ended or not.
    """
    counters = live.counters
    return {
        "engine": live.description,
        "budget_ms": live.budget_ms,
        "frames": {
            "received": counters.received,
            "answered": counters.processed,
            "dropped": dict(counters.dropped),
            "rejected": dict(counters.rejected),
            "waiting": counters.waiting,
        },
        "results": {
            "all": watch.results,
            "invalid": watch.invalid,
            "stale": watch.stale,
            "withheld": watch.withheld,
            "degraded": watch.degraded,
        },
        "states_ms": dict(watch.states_ms),
        "events": dict(watch.events),
        "source": dict(counters.source),
        "latency_ms": {name: dict(values) for name, values in live.latency().percentiles().items()},
        "answers": watch.counts.to_json(),
        **({"models": {name: model.to_json() for name, model in watch.models.items()}} if watch.models else {}),
    }


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {count}" for name, count in sorted(counts.items()) if count)


def say_event(event: StateChange | LiveEvent) -> None:
    """Prints what concerns artefacts and bundles.

    A missed deadline shows in the states and the table.
    """
    from tinyusfm_runtime.results import LiveEvent

    if isinstance(event, LiveEvent) and event.kind.value not in ("deadline_missed", "overlay_expired"):
        console.note(f"{event.kind.value.replace('_', ' ')}: {event.reason}")


def drift_monitor(answering: Session | Fallback, wanted: bool | None) -> DriftMonitor | None:
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


def _levels(
    answering: Mapping[str, Session | Fallback], request: LiveRun, stack: ExitStack
) -> Session | Fallback | dict[str, Session | Fallback]:
    """What the loop is given: the only model, or several by name.

    Pinned sessions are given as levels.
    """
    given = {name: _level(one, request, stack) for name, one in answering.items()}
    return given if len(given) > 1 else next(iter(given.values()))


def _level(answering: Session | Fallback, request: LiveRun, stack: ExitStack) -> Session | Fallback:
    """A pinned session as a level that answers on its CPUs; all else as it is.

    The stack closes the level.
    """
    from tinyusfm_runtime.live.fallback import Fallback, FallbackOptions

    if request.cpus is None or isinstance(answering, Fallback):
        return answering
    level = Fallback.of(answering, advanced=FallbackOptions(cpus=request.pinned_cpus))
    stack.callback(level.close)
    return level


def drift_monitors(
    answering: Mapping[str, Session | Fallback], wanted: bool | None
) -> DriftMonitor | bool | dict[str, DriftMonitor]:
    """The drift monitor of the bundle, or those of several by name.

    Args:
        answering: what answers, by name.
        wanted: as in ``drift_monitor``.

    Raises:
        InputError: it was asked for, and cannot be had.
    """
    found = {name: drift_monitor(one, wanted) for name, one in answering.items()}
    if len(found) == 1:
        return next(iter(found.values())) or False
    return {name: monitor for name, monitor in found.items() if monitor is not None}


def facts(answering: Mapping[str, Session | Fallback], source: FrameSource, *, budget_ms: float | None) -> RunFacts:
    """What sinks may know about a run of one model or several.

    Args:
        answering: what answers, by name.
        source: where frames come from.
        budget_ms: age above which a result is stale, or None.
    """
    if len(answering) > 1:
        return sink_list.facts_of_several(answering, source, budget_ms=budget_ms)
    return sink_list.facts_of(next(iter(answering.values())), source, budget_ms=budget_ms)


def open_models(request: LiveRun, stack: ExitStack) -> dict[str, Session | Fallback]:
    """Opens what answers, by name; names and rules of several are checked first.

    Args:
        request: what was typed.
        stack: closes what was opened.

    Raises:
        InputError: two of one name, or rules that cannot hold.
        EdgeError: one of them cannot be opened.
    """
    from tinyusfm_runtime.bundle.reader import Bundle
    from tinyusfm_runtime.live.models import settled_names
    from tinyusfm_runtime.live.rules import ordered, read_rules

    if len(request.models) < 2:
        one = open_answering(request)
        stack.enter_context(one)
        return {one.spec.name: one}
    rules = {} if request.rules is None else read_rules(request.rules)
    bundles = [Bundle.open(folder, trust=request.trust) for _, folder in request.models]
    specs = [bundle.manifest.spec for bundle in bundles]
    names = settled_names([name for name, _ in request.models], specs)
    ordered(rules, dict(zip(names, specs, strict=True)))
    answering = {}
    for name, bundle in zip(names, bundles, strict=True):
        answering[name] = open_answering(replace(request, bundle=bundle))
        stack.enter_context(answering[name])
    return answering


def _policy(typed: str | None) -> DropPolicy | None:
    from tinyusfm_runtime.results import DropPolicy

    if typed is None:
        return None
    try:
        return DropPolicy(typed.strip().lower())
    except ValueError:
        raise InputError(f"--policy is newest or lossless, not {typed!r}") from None


def open_answering(request: LiveRun) -> Session | Fallback:
    """A session, or a fallback whose first level is the requested artefact.

    The other artefacts of the bundle are the levels behind it.

    Raises:
        InputError: the words contradict one another, or the bundle has no such artefact.
        EdgeError: it cannot be opened.
    """
    from tinyusfm_runtime.bundle.reader import open_trusted
    from tinyusfm_runtime.bundle.shipped import choose_here
    from tinyusfm_runtime.device.machine import pinned
    from tinyusfm_runtime.live.fallback import Fallback, FallbackOptions
    from tinyusfm_runtime.session import Session

    if not request.fallback and not request.isolate:
        with pinned(request.cpus):  # the engine's own threads inherit it
            return Session.open(
                request.bundle,
                target=request.target,
                precision=request.precision,
                threads=request.threads,
                allow_unverified=request.allow_unverified,
                full_depth=request.full_depth,
                trust=request.trust,
                second_pass=request.second_pass,
                drift=request.drift is not False,
                progress=console.Opening(),
            )
    if request.full_depth:
        raise InputError("--full-depth goes with one session: leave --fallback and --isolate out")
    if request.allow_unverified:
        raise InputError("--fallback and --isolate take verified artefacts only: leave --allow-unverified out")
    opened = open_trusted(request.bundle, request.trust)
    first = choose_here(opened.manifest, opened.path, request.target, request.precision).name
    others = [artefact.name for artefact in opened.manifest.artefacts if artefact.name != first and request.fallback]
    options = FallbackOptions(
        isolate=request.isolate,
        threads=request.threads,
        cpus=request.pinned_cpus,
        second_pass=request.second_pass,
        drift=request.drift is not False,
        progress=console.Opening(),
    )
    levels = Fallback.open(opened, targets=[first, *others], advanced=options)
    for line in levels.unavailable:
        console.note(f"note: not available: {line}")
    return levels
