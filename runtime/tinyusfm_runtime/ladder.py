"""Fallback ladder: the artefacts of a bundle in their order, each checked, and the next one takes over when one fails.

Every rung passed its gate at export (Session.open asks for it), answered the golden frames when it was opened, and
answers one more before its first frame as a stand-in. A rung fails when it raises, takes too long, hangs, misses its
deadline several times in a row, gives an output that is not finite, or no longer answers golden frames as it did at the
start. What answers from then on is flagged degraded, logged and told; nothing climbs back by itself: ``request`` does.

It does not know sources, states or results.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np

from tinyusfm_runtime.bundle import Bundle
from tinyusfm_runtime.errors import BundleError, EdgeError, EngineError, InputError
from tinyusfm_runtime.frame import Frame
from tinyusfm_runtime.live_result import LiveEvent, LiveEventKind
from tinyusfm_runtime.session import Prediction, Session
from tinyusfm_runtime.watchdog import CallLimits, Predictor, Watchdog, pin

if TYPE_CHECKING:
    from tinyusfm_runtime.manifest import Manifest
    from tinyusfm_runtime.spec import ModelSpec

_log = logging.getLogger(__name__)
_RETRY_S = 1.0  # with no rung left, one is tried again at most so often
_SCORE_DRIFT = 0.02  # of golden answers between start and now; the same engine gives the same bits, so this is wide
_DIFFERING_PIXELS = 0.005
Report = Callable[[LiveEvent], None]
"""Told of what happens, in the thread in which it happens."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LadderOptions:
    """When a rung is left.

    Attributes:
        misses_in_a_row: calls past their deadline, one after another, before the next rung takes over; 0 is never.
        recheck_s: time between two golden frames that are slipped in between live ones, None is never; an engine
            that answers nonsense of the right shape is found by nothing else.
        isolate: run each rung in a process of its own, which can be killed when a kernel hangs.
        threads: threads inside each engine, None is the runtime's default.
        cpus: CPUs the engines are pinned to (Linux), or None.
    """

    misses_in_a_row: int = 5
    recheck_s: float | None = 1.0
    isolate: bool = False
    threads: int | None = None
    cpus: frozenset[int] | None = None


@dataclass(kw_only=True, slots=True)
class Rung:
    """One artefact, ready, with what it said about golden frames when it was opened."""

    index: int
    name: str
    dog: Watchdog
    golden: Sequence[tuple[Frame, Prediction]]
    failed: str | None = None
    misses: int = 0
    checked: int = 0
    last_check_s: float = field(default_factory=time.monotonic)

    @property
    def description(self) -> str:
        """Artefact and engine really used, one line."""
        return self.dog.predictor.description


@dataclass(frozen=True, kw_only=True, slots=True)
class Answered:
    """What a ladder says about one frame.

    Attributes:
        prediction: the answer, or None.
        error: why there is none, or None.
        late: the engine passed its deadline.
        rung: who was asked last.
        engine: artefact and engine of that rung.
    """

    prediction: Prediction | None
    error: str | None
    late: bool
    rung: int
    engine: str


class Ladder:
    """Rungs and the one in use. A context manager; open it with ``Ladder.open`` or around one session with ``of``.

    ``answer`` belongs to one thread; ``request``, ``rung`` and ``close`` may come from others.
    """

    def __init__(
        self, rungs: Sequence[Rung], manifest: Manifest, unavailable: Sequence[str], options: LadderOptions
    ) -> None:
        """Binds opened rungs. Use ``Ladder.open``."""
        self.rungs = tuple(rungs)
        self.manifest = manifest
        self.unavailable = tuple(unavailable)
        self.options = options
        self._current = self.rungs[0]
        self._wanted: int | None = None
        self._retry_at_s = 0.0
        self._lock = threading.Lock()

    @classmethod
    def open(
        cls, bundle: str | Path | Bundle, *, targets: Sequence[str] | None = None, advanced: LadderOptions | None = None
    ) -> Ladder:
        """Opens every artefact of a bundle that runs here, in the bundle's order.

        Args:
            bundle: a bundle's folder, or an open bundle.
            targets: names such as ``openvino-int8``, to take only these and in this order.
            advanced: when a rung is left, and how rungs run.

        Returns:
            The ladder. What could not be opened stands in ``unavailable``, with the reason; if that holds for the
            first artefact, every answer is flagged degraded.

        Raises:
            InputError: no such bundle, or no such artefact in it.
            BundleError: the bundle was tampered with or cannot be read.
            EngineError: not one artefact could be opened.
        """
        options = advanced or LadderOptions()
        opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
        rungs: list[Rung] = []
        unavailable: list[str] = []
        try:
            for index, name in enumerate(_chosen(opened.manifest, targets)):
                try:
                    rungs.append(_open_rung(opened, index, name, options))
                except EdgeError as error:
                    unavailable.append(f"{name}: {error}")
                    _log.warning("fallback ladder: rung %d is not available: %s", index, error)
            if not rungs:
                raise EngineError(f"no artefact of the bundle can be opened here ({'; '.join(unavailable)})")
        except BaseException:
            for rung in rungs:
                rung.dog.close()
            raise
        return cls(rungs, opened.manifest, unavailable, options)

    @classmethod
    def of(cls, session: Session, *, advanced: LadderOptions | None = None) -> Ladder:
        """A ladder of one rung around an open session, which stays its opener's to close."""
        options = advanced or LadderOptions()
        golden = _golden_answers(session, session.golden_frames)
        rung = Rung(index=0, name=session.artefact.name, dog=Watchdog(session, options.cpus, owns=False), golden=golden)
        return cls([rung], session.manifest, (), options)

    @property
    def spec(self) -> ModelSpec:
        """The model."""
        return self.manifest.spec

    @property
    def rung(self) -> int:
        """Place in the bundle's order of the artefact in use; 0 is the chosen one."""
        return self._current.index

    @property
    def description(self) -> str:
        """Artefact and engine in use, one line."""
        return self._current.description

    def request(self, index: int) -> None:
        """Asks for another rung, upward or downward, from the next frame on; it is golden-checked first.

        Args:
            index: its place in the bundle's order.

        Raises:
            InputError: there is no such rung.
        """
        if index not in {rung.index for rung in self.rungs}:
            there = ", ".join(str(rung.index) for rung in self.rungs)
            raise InputError(f"the ladder has no rung {index}; it has: {there}")
        with self._lock:
            self._wanted = index

    def answer(self, frame: Frame, limits: CallLimits, report: Report, *, insist: bool = False) -> Answered:
        """Answers one frame with the rung in use, and moves on when that fails.

        Args:
            frame: what to answer for.
            limits: of one call.
            report: told of misses, failures and changes.
            insist: ask the next rung about the same frame when one fails; for files.

        Returns:
            The answer, or why there is none.

        Raises:
            FrameError: the frame cannot be used.
        """
        while True:
            rung = self._current
            prediction, error, late = self._ask(rung, frame, limits, report)
            self._after(rung, error, late, limits, report, frame.seq)
            if error is None or not insist or self._current is rung:
                return Answered(prediction=prediction, error=error, late=late, rung=rung.index, engine=rung.description)

    def between_frames(self, limits: CallLimits, report: Report) -> None:
        """What is due between two frames: a rung that was asked for, a golden frame, a second try with no rung left."""
        with self._lock:
            wanted, self._wanted = self._wanted, None
        if wanted is not None and wanted != self._current.index:
            self._change(next(rung for rung in self.rungs if rung.index == wanted), limits, report, "asked for")
        now_s = time.monotonic()
        current, due = self._current, self.options.recheck_s
        if current.failed is not None:
            if now_s >= self._retry_at_s:
                self._next(limits, report, None)
            return
        is_due = due is not None and now_s - current.last_check_s >= due
        if is_due and (why := self._check(current, limits)) is not None:
            self._after(current, why, False, limits, report, None)

    def close(self) -> None:
        """Frees every rung. Closing twice is harmless."""
        for rung in self.rungs:
            rung.dog.close()

    def __enter__(self) -> Ladder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _ask(
        self, rung: Rung, frame: Frame, limits: CallLimits, report: Report
    ) -> tuple[Prediction | None, str | None, bool]:
        late: list[int] = []

        def missed() -> None:
            late.append(frame.seq)
            text = f"{rung.name} passed its deadline of {limits.deadline_ms:.0f} ms"
            report(_event(LiveEventKind.DEADLINE_MISSED, text, frame.seq))

        if rung.failed is not None:
            return None, f"no artefact is left that answers; {rung.name}: {rung.failed}", False
        try:
            prediction = rung.dog.call(frame, limits, missed)
        except EngineError as failure:
            return None, str(failure), bool(late)
        error = None if prediction.valid else "it gave an output that is not finite"
        return prediction, error, bool(late)

    def _after(
        self, rung: Rung, error: str | None, late: bool, limits: CallLimits, report: Report, seq: int | None
    ) -> None:
        rung.misses = rung.misses + 1 if late else 0
        if error is None and 0 < self.options.misses_in_a_row <= rung.misses and len(self.rungs) > 1:
            error = f"it passed its deadline {rung.misses} times in a row"
        if error is None or rung.failed is not None:
            return
        rung.failed, rung.misses = error, 0
        report(_event(LiveEventKind.ENGINE_FAILED, f"{rung.name}: {error}", seq))
        _log.warning("engine %s failed: %s", rung.name, error)
        self._next(limits, report, seq)

    def _next(self, limits: CallLimits, report: Report, seq: int | None) -> None:
        """Takes the next rung that answers its golden frames: the ones below first, then those that failed before."""
        here = self.rungs.index(self._current)
        sound = [rung for rung in (*self.rungs[here + 1 :], *self.rungs[:here]) if rung.failed is None]
        again: list[Rung] = []
        if (now_s := time.monotonic()) >= self._retry_at_s:
            # not more often than once a second, or a rung that fails at every frame would be tried at every frame
            self._retry_at_s = now_s + _RETRY_S
            again = [rung for rung in self.rungs if rung.failed is not None]
        for rung in (*sound, *again):
            if not rung.dog.abandoned and self._change(rung, limits, report, "the one before it failed", seq):
                return

    def _change(self, rung: Rung, limits: CallLimits, report: Report, why: str, seq: int | None = None) -> bool:
        if (fault := self._check(rung, limits)) is not None:
            rung.failed = fault
            report(_event(LiveEventKind.ENGINE_FAILED, f"{rung.name} cannot take over: {fault}", seq))
            _log.warning("engine %s cannot take over: %s", rung.name, fault)
            return False
        rung.failed, rung.misses = None, 0
        self._current = rung
        text = f"{rung.name} answers from now on ({why})"
        report(_event(LiveEventKind.RUNG_CHANGED, text, seq))
        _log.warning("fallback ladder: rung %d, %s", rung.index, text)
        return True

    def _check(self, rung: Rung, limits: CallLimits) -> str | None:
        """Asks about one golden frame; why the answer is wrong, or None."""
        rung.last_check_s = time.monotonic()
        if not rung.golden:
            return None
        frame, want = rung.golden[rung.checked % len(rung.golden)]
        rung.checked += 1
        try:
            got = rung.dog.call(frame, limits, lambda: None)
        except EdgeError as error:
            return f"a golden frame failed: {error}"
        return golden_difference(got, want)


def golden_difference(got: Prediction, want: Prediction) -> str | None:
    """Compares two answers of one engine to one golden frame.

    Returns:
        None if they agree (masks but for half a percent of the pixels, scores within 0.02), else what differs.
    """
    if not got.valid:
        return "a golden frame gave an output that is not finite"
    if (got.mask_HW is None) != (want.mask_HW is None) or (got.scores is None) != (want.scores is None):
        return "a golden frame gave another kind of answer than at the start"
    if got.mask_HW is not None and want.mask_HW is not None:
        differing = float(np.mean(got.mask_HW != want.mask_HW)) if got.mask_HW.shape == want.mask_HW.shape else 1.0
        if differing > _DIFFERING_PIXELS:
            return f"a golden frame's mask differs in {100 * differing:.1f} % of the pixels from the one at the start"
    if got.scores is not None and want.scores is not None:
        drift = float(np.abs(got.scores.astype(np.float64) - want.scores).max())
        if not drift <= _SCORE_DRIFT:
            return f"a golden frame's scores differ by {drift:.3f} from those at the start"
    return None


def _open_rung(bundle: Bundle, index: int, name: str, options: LadderOptions) -> Rung:
    artefact = next(artefact for artefact in bundle.manifest.artefacts if artefact.name == name)
    predictor: Predictor
    if options.isolate:
        from tinyusfm_runtime.worker import WorkerSession

        predictor = WorkerSession.open(
            bundle.path, target=artefact.target, precision=artefact.precision, threads=options.threads,
            cpus=options.cpus, bundle_id=bundle.manifest.bundle_id,
        )  # fmt: skip
        frames = bundle.golden_frames()[:GOLDEN_AT_WORK]
    else:
        before = _affinity() if options.cpus is not None else None
        pin(options.cpus)  # the engine's own threads inherit it
        try:
            session = Session.open(
                bundle, target=artefact.target, precision=artefact.precision, threads=options.threads
            )
        finally:
            pin(before)
        predictor, frames = session, list(session.golden_frames)
    try:
        golden = _golden_answers(predictor, frames)
    except BaseException:
        predictor.close()
        raise
    return Rung(index=index, name=name, dog=Watchdog(predictor, options.cpus), golden=golden)


GOLDEN_AT_WORK = 4
"""Golden frames that are asked again while the loop runs, one at a time."""


def _golden_answers(predictor: Predictor, frames: Sequence[Frame]) -> list[tuple[Frame, Prediction]]:
    return [(frame, predictor.predict(frame)) for frame in frames[:GOLDEN_AT_WORK]]


def _affinity() -> Iterable[int] | None:
    import os

    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None


def _chosen(manifest: Manifest, targets: Sequence[str] | None) -> list[str]:
    there = [artefact.name for artefact in manifest.artefacts]
    if targets is None:
        return there
    if unknown := [name for name in targets if name not in there]:
        raise InputError(f"the bundle has no artefact {unknown[0]!r}; it has: {', '.join(there)}")
    if not targets:
        raise BundleError("a ladder needs at least one artefact")
    return list(targets)


def _event(kind: LiveEventKind, reason: str, seq: int | None) -> LiveEvent:
    return LiveEvent(kind=kind, t_ns=time.monotonic_ns(), reason=reason, seq=seq)


__all__ = ["GOLDEN_AT_WORK", "Answered", "Ladder", "LadderOptions", "Report", "Rung", "golden_difference"]
