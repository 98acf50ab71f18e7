"""The models of a loop: each with its own fallback, smoothing, drift and state.

A loop of one model holds one of these. With several, ``take_turn`` asks them about a frame one after another, in the
order of their rules; one that fails, hangs or is left out changes nothing for the others. It knows no source and no
queue.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tinyusfm_runtime.bundle.reader import Bundle
from tinyusfm_runtime.drift import DriftMonitor
from tinyusfm_runtime.errors import EdgeError, FrameError, InputError
from tinyusfm_runtime.frame import Frame
from tinyusfm_runtime.live.fallback import Answered, Fallback, FallbackOptions, Report
from tinyusfm_runtime.live.rules import ModelRule, why_skipped
from tinyusfm_runtime.live.smoothing import Temporal, TemporalOptions
from tinyusfm_runtime.live.swap import Tap
from tinyusfm_runtime.live.watchdog import CallLimits
from tinyusfm_runtime.numerics.preprocess import preprocess
from tinyusfm_runtime.numerics.shared_input import SharedInput
from tinyusfm_runtime.results import LiveEvent, LiveState, Prediction, SmoothedReading
from tinyusfm_runtime.session import Session
from tinyusfm_runtime.spec import ModelSpec

Given = Session | Fallback | Bundle | str | Path
"""What a loop can be given as a model."""


class LiveModel:
    """One model of a loop.

    Args:
        given: a bundle, which is opened and closed here, or what its opener closes.
        name: in the loop, or empty for that of the model.
        temporal: smoothing over time, or None.
        drift: a monitor, True for the bundle's own, or None.

    Attributes:
        name: in the loop.
        taps: called with every answer of this model; a swap adds one and removes it.
        report: tells the loop's listeners of an event.
    """

    def __init__(
        self,
        given: Given,
        *,
        name: str = "",
        temporal: TemporalOptions | None = None,
        drift: DriftMonitor | bool | None = None,
    ) -> None:
        self.name, self.given = name, given
        self.taps: list[Tap] = []
        self.report: Report = _nobody
        self._temporal = None if temporal is None else Temporal(temporal)
        self._drift = drift or None
        self._fallback: Fallback | None = None
        self._shared: SharedInput | None = None
        self._owned: list[Fallback] = []
        self._incoming: tuple[Fallback, threading.Event] | None = None
        self._degraded_left = 0
        self._answers: Callable[[], bool] = lambda: False
        self._tick_s = 0.02

    @property
    def is_open(self) -> bool:
        """True once it was opened."""
        return self._fallback is not None

    @property
    def fallback(self) -> Fallback:
        """What answers now.

        Raises:
            InputError: it was not opened.
        """
        if self._fallback is None:
            raise InputError("the live loop has not begun: enter it first")
        return self._fallback

    def watch_drift(self, monitor: DriftMonitor | None) -> None:
        """Takes a monitor of its own, where there is one."""
        self._drift = monitor or self._drift

    def look_up(self) -> ModelSpec:
        """Its spec, before anything but the bundle's files is opened.

        Raises:
            InputError: there is no such bundle.
            BundleError: it cannot be read, or was tampered with.
        """
        if isinstance(self.given, str | Path):
            self.given = Bundle.open(self.given)
        return self.given.manifest.spec

    def open(
        self,
        *,
        stand_by: bool,
        isolate: bool,
        answers: Callable[[], bool],
        tick_s: float,
        shared: SharedInput | None = None,
    ) -> None:
        """Opens what answers.

        Args:
            stand_by: of a bundle: all of its artefacts, else the first.
            isolate: of a bundle: in a process of its own.
            answers: whether somebody still asks it; a change waits no longer than that.
            tick_s: how often a change looks whether it happened.
            shared: makes the inputs of several models, or None.

        Raises:
            EdgeError: it cannot be opened.
        """
        self._answers, self._tick_s, self._shared = answers, tick_s, shared
        fallback = self._opened(stand_by, isolate)
        if fallback is not self.given:
            self._owned.append(fallback)
        self._use(fallback)
        self.name = self.name or fallback.spec.name

    def between_frames(self, limits: CallLimits, spare_ms: float) -> None:
        """Does what is due between two frames.

        A change that was asked for, a golden frame.

        Args:
            limits: of one call.
            spare_ms: time until the next frame is expected (see ``FramePeriod.spare_ms``).
        """
        incoming, self._incoming = self._incoming, None
        if incoming is not None:
            self._use(incoming[0])
            incoming[1].set()
        self.fallback.between_frames(limits, self.report, spare_ms)

    def answer(self, frame: Frame, limits: CallLimits, *, insist: bool) -> Answered:
        """Answers one frame (see ``Fallback.answer``).

        Raises:
            FrameError: the frame cannot be used.
        """
        return self.fallback.answer(frame, limits, self.report, insist=insist)

    def final(self, answered: Answered, frame: Frame) -> Prediction | None:
        """The answer, with what the loop knows of it.

        Whether another artefact gave it, and the drift of the stream.
        """
        prediction, drift = answered.prediction, self._drift
        if prediction is not None and answered.level > 0:
            prediction = replace(prediction, degraded=True)
        if isinstance(drift, DriftMonitor) and prediction is not None and prediction.drift is not None:
            prediction = replace(prediction, drift=drift.observe(prediction, frame))
        return prediction

    def smoothed(self, prediction: Prediction | None, t_recv_ns: int) -> SmoothedReading | None:
        """What smoothing makes of it, where that was asked for."""
        return None if self._temporal is None else self._temporal.add(prediction, t_recv_ns)

    def state_in(self, stream: LiveState) -> LiveState:
        """The state of this model in a stream.

        Args:
            stream: state of the loop.

        Returns:
            That of the stream where frames or results are late or missing, else LIVE or DEGRADED by this model's own
            answers.
        """
        if stream not in (LiveState.LIVE, LiveState.DEGRADED):
            return stream
        return LiveState.DEGRADED if self._degraded_left else LiveState.LIVE

    def note(self, *, degraded: bool, fresh_results: int) -> None:
        """Takes note of how one answer went.

        Args:
            degraded: the answer counts so.
            fresh_results: good answers before DEGRADED ends.
        """
        self._degraded_left = fresh_results if degraded else max(self._degraded_left - 1, 0)

    def take_over(self, fallback: Fallback) -> float:
        """Lets another fallback answer from the next frame on.

        Args:
            fallback: an open one; from now on it is closed here, unless it is the one the loop began with.

        Returns:
            How long the change waited for the end of the frame in the engine, ms. A loop that ends meanwhile changes
            nothing, and nobody asks the fallback any more.
        """
        begin_ns, done = time.perf_counter_ns(), threading.Event()
        if fallback is not self.given and fallback not in self._owned:
            self._owned.append(fallback)
        self._incoming = (fallback, done)
        while not done.wait(self._tick_s) and self._answers():
            pass
        return (time.perf_counter_ns() - begin_ns) / 1e6

    def hand_back(self, fallback: Fallback) -> None:
        """Closes a fallback that no longer answers, if it is the loop's to close."""
        if fallback in self._owned and fallback is not self._fallback:
            self._owned.remove(fallback)
            fallback.close()

    def close(self) -> None:
        """Closes what was opened here; what was given makes its own inputs again."""
        if self._fallback is not None:
            _prepare_by(self._fallback, preprocess)
        for fallback in self._owned:
            fallback.close()

    def _use(self, fallback: Fallback) -> None:
        if self._shared is not None:
            if self._fallback is not None:
                _prepare_by(self._fallback, preprocess)
            _prepare_by(fallback, self._shared)
        self._fallback = fallback

    def _opened(self, stand_by: bool, isolate: bool) -> Fallback:
        """What answers: what was given, or the bundle opened as it was asked for."""
        given = self.given
        if isinstance(given, Fallback):
            return given
        if isinstance(given, Session):
            session, owns = given, False
        elif stand_by or isolate:
            bundle = given if isinstance(given, Bundle) else Bundle.open(given)
            names = [artefact.name for artefact in bundle.manifest.artefacts]
            options = FallbackOptions(isolate=isolate)
            return Fallback.open(bundle, targets=names if stand_by else names[:1], advanced=options)
        else:
            session, owns = Session.open(given), True
        try:
            self._drift = session.watch_drift() if self._drift is True else self._drift
            return Fallback.of(session, owns=owns)
        except BaseException:
            if owns:
                session.close()
            raise


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelTurn:
    """What came of asking one model about one frame.

    Attributes:
        model: which one.
        answered: its answer; where it was left out, none, with no error.
        skipped: why a rule left it out, or None.
        misplaced: the frame cannot be used by this model.
    """

    model: LiveModel
    answered: Answered
    skipped: str | None = None
    misplaced: bool = False


def take_turn(
    models: Mapping[str, LiveModel],
    order: Sequence[str],
    rules: Mapping[str, ModelRule],
    frame: Frame,
    limits: CallLimits,
    *,
    insist: bool,
) -> dict[str, ModelTurn]:
    """Asks several models about one frame.

    Args:
        models: by name.
        order: in which they are asked, as ``rules.ordered`` gives it.
        rules: by model.
        frame: what to answer for.
        limits: of each call.
        insist: as in ``Fallback.answer``.

    Returns:
        Of every model what came of it, by name, in the order of ``models``. Nothing that goes wrong with one keeps
        another from being asked.
    """
    done: dict[str, ModelTurn] = {}
    for name in order:
        model, rule = models[name], rules.get(name)
        why = None
        if rule is not None:
            before = done[rule.after]
            why_none = before.skipped or before.answered.error
            why = why_skipped(rule, before.answered.prediction, why_none, before.model.fallback.spec)
        if why is not None:
            done[name] = ModelTurn(model=model, answered=_none(model, None), skipped=why)
            continue
        try:
            done[name] = ModelTurn(model=model, answered=model.answer(frame, limits, insist=insist))
        except FrameError as error:
            done[name] = ModelTurn(model=model, answered=_none(model, str(error)), misplaced=True)
        except EdgeError as error:
            done[name] = ModelTurn(model=model, answered=_none(model, str(error)))
    return {name: done[name] for name in models}


def settled_names(given: Sequence[str], specs: Sequence[ModelSpec]) -> list[str]:
    """Names of several models: those they were given, else those of their specs.

    Args:
        given: a name for each, or an empty text.
        specs: of each.

    Raises:
        InputError: two have the same name, or one has none that a file or a message can carry.
    """
    names = [name or spec.name for name, spec in zip(given, specs, strict=True)]
    if unusable := [name for name in names if not is_model_name(name)]:
        raise InputError(f"model name {unusable[0]!r}: use letters, digits, '.', '-' and '_'")
    if twice := [name for name in names if names.count(name) > 1]:
        raise InputError(
            f"two bundles are named {twice[0]!r}: give them names of their own, on the command line as "
            f"first={twice[0]}.bundle second=OTHER.bundle, in Python as Live({{'first': ..., 'second': ...}}, source)"
        )
    return names


def is_model_name(name: str) -> bool:
    """Whether a text may name a model: letters, digits, dot, dash and underscore."""
    letters = all((c.isascii() and c.isalnum()) or c in ".-_" for c in name)
    return bool(name) and letters and name[0] not in ".-"


def named_report(name: str, report: Report) -> Report:
    """Events that say which of several models they are about."""

    def tell(event: LiveEvent) -> None:
        report(replace(event, reason=f"{name}: {event.reason}", model=name))

    return tell


def why_degraded(answered: Answered) -> str | None:
    """Why an answer counts as degraded, or None."""
    if answered.error is not None:
        return f"no usable answer: {answered.error}"
    if answered.level > 0:
        return f"level {answered.level} answers instead of the chosen artefact: {answered.engine}"
    return "the engine missed its deadline" if answered.late else None


def _none(model: LiveModel, error: str | None) -> Answered:
    fallback = model.fallback
    return Answered(prediction=None, error=error, late=False, level=fallback.level, engine=fallback.description)


def _prepare_by(fallback: Fallback, prepare: Callable[..., object]) -> None:
    """Sets who makes the inputs of a fallback's sessions.

    A process of its own makes its inputs itself.
    """
    for level in fallback.levels:
        if isinstance(level.watchdog.predictor, Session):
            level.watchdog.predictor.prepare = prepare  # type: ignore[assignment]


def _nobody(event: LiveEvent) -> None:
    return None


__all__ = [
    "Given",
    "LiveModel",
    "ModelTurn",
    "is_model_name",
    "named_report",
    "settled_names",
    "take_turn",
    "why_degraded",
]
