"""Fallback order: the artefacts of a bundle, each checked.

The next one takes over when one fails.

Every level passed its gate at export (Session.open asks for it), answered the golden frames when it was opened, and
answers one more before its first frame as a stand-in. A level fails when it raises, takes too long, hangs, misses its
deadline several times in a row, gives an output that is not finite, or no longer answers golden frames as it did at the
start. A level that was pruned to a sector refuses a frame of another sector: the first level that looks at whole frames
answers that frame and all that follow. What answers from then on is flagged degraded, logged and reported. It never
switches back automatically: call ``request``.

It does not know sources, states or results.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np

from tinyusfm_runtime.bundle.reader import Bundle, open_trusted
from tinyusfm_runtime.device.machine import pin
from tinyusfm_runtime.errors import BundleError, EdgeError, EngineError, InputError, SectorError
from tinyusfm_runtime.frame import Frame
from tinyusfm_runtime.live.watchdog import CallLimits, Predictor, Watchdog
from tinyusfm_runtime.results import LiveEvent, LiveEventKind, Prediction
from tinyusfm_runtime.session import Session

if TYPE_CHECKING:
    from tinyusfm_runtime.bundle.manifest import Manifest
    from tinyusfm_runtime.spec import ModelSpec
    from tinyusfm_runtime.trust.policy import Trust

_log = logging.getLogger(__name__)
_ROOM = 1.1  # a gap that a golden frame fits into is so many times as long as they take
_LATEST = 3  # times recheck_s, after which none is waited for
_SCORE_DRIFT = 0.02  # of golden answers between start and now; the same engine gives the same bits, so this is wide
_DIFFERING_PIXELS = 0.005
Report = Callable[[LiveEvent], None]
"""Called with what happens, in the thread in which it happens."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FallbackOptions:
    """When a level is left.

    Attributes:
        misses_in_a_row: calls past their deadline, one after another, before the next level takes over; 0 is never.
        recheck_s: time between two golden frames that are slipped in between live ones, None is never; an engine
            that answers nonsense of the right shape is found by nothing else. A golden frame waits for a gap between
            live frames that is long enough for it; the longer it waits the shorter a gap will do, and after three
            times ``recheck_s`` none is needed.
        retry_s: time between two tries of levels that failed, once none is left.
        isolate: run each level in a process of its own, which can be killed when a kernel hangs.
        threads: threads inside each engine, None is the runtime's default.
        cpus: CPUs the engines are pinned to (Linux), or None.
        second_pass: as in ``Session.open``.
        drift: as in ``Session.open``.
        progress: as in ``Session.open``; with ``isolate`` called in a thread of its own.
    """

    misses_in_a_row: int = 5
    recheck_s: float | None = 1.0
    retry_s: float = 1.0
    isolate: bool = False
    threads: int | None = None
    cpus: frozenset[int] | None = None
    second_pass: bool = True
    drift: bool = True
    progress: Callable[[str, float], None] | None = None


@dataclass(kw_only=True, slots=True)
class FallbackLevel:
    """One artefact, ready, with what it said about golden frames when it was opened."""

    index: int
    name: str
    watchdog: Watchdog
    golden: Sequence[tuple[Frame, Prediction]]
    sector: str = ""
    failed: str | None = None
    misses: int = 0
    checked: int = 0
    last_check_s: float = field(default_factory=time.monotonic)
    check_took_s: float = 0.0

    @property
    def description(self) -> str:
        """Artefact and engine really used, one line."""
        return self.watchdog.predictor.description


@dataclass(frozen=True, kw_only=True, slots=True)
class Answered:
    """What a fallback says about one frame.

    Attributes:
        prediction: the answer, or None.
        error: why there is none, or None.
        late: the engine passed its deadline.
        level: who was asked last.
        engine: artefact and engine of that level.
    """

    prediction: Prediction | None
    error: str | None
    late: bool
    level: int
    engine: str


class Fallback:
    """The levels and the one in use; a context manager.

    Use ``Fallback.open``, or ``of`` around one session.

    ``answer`` belongs to one thread; ``request``, ``level`` and ``close`` may come from others.
    """

    def __init__(
        self, levels: Sequence[FallbackLevel], manifest: Manifest, unavailable: Sequence[str], options: FallbackOptions
    ) -> None:
        """Binds opened levels. Use ``Fallback.open``."""
        self.levels = tuple(levels)
        self.manifest = manifest
        self.unavailable = tuple(unavailable)
        self.options = options
        self.trust: Trust | None = None
        """What was demanded of the bundle; one that takes its place must satisfy the same."""
        self._current = self.levels[0]
        self._wanted: int | None = None
        self._retry_at_s = 0.0
        self._lock = threading.Lock()

    @classmethod
    def open(
        cls,
        bundle: str | Path | Bundle,
        *,
        targets: Sequence[str] | None = None,
        advanced: FallbackOptions | None = None,
        trust: Trust | None = None,
    ) -> Fallback:
        """Opens every artefact of a bundle that runs here, in the bundle's order.

        Args:
            bundle: a bundle's folder, or an open bundle.
            targets: names such as ``openvino-int8``, to take only these and in this order.
            advanced: when a level is left, and how levels run.
            trust: demands a signature by a trusted key before anything is loaded.

        Returns:
            The fallback. What could not be opened stands in ``unavailable``, with the reason; if that holds for the
            first artefact, every answer is flagged degraded.

        Raises:
            InputError: no such bundle, or no such artefact in it.
            BundleError: the bundle was tampered with or cannot be read.
            EngineError: not one artefact could be opened.
        """
        options = advanced or FallbackOptions()
        opened = open_trusted(bundle, trust)
        levels: list[FallbackLevel] = []
        unavailable: list[str] = []
        try:
            for index, name in enumerate(_chosen(opened.manifest, targets)):
                try:
                    levels.append(_open_level(opened, index, name, options))
                except EdgeError as error:
                    unavailable.append(f"{name}: {error}")
                    _log.warning("fallback order: level %d is not available: %s", index, error)
            if not levels:
                raise EngineError(f"no artefact of the bundle can be opened here ({'; '.join(unavailable)})")
        except BaseException:
            for level in levels:
                level.watchdog.close()
            raise
        made = cls(levels, opened.manifest, unavailable, options)
        made.trust = opened.trust
        return made

    @classmethod
    def of(cls, session: Session, *, owns: bool = False, advanced: FallbackOptions | None = None) -> Fallback:
        """A fallback of one level around an open session.

        Args:
            session: an open session.
            owns: closing the fallback closes the session; else it stays its opener's to close.
            advanced: when a level is left; with one level never.
        """
        options = advanced or FallbackOptions()
        golden = _golden_answers(session, session.golden_frames)
        level = FallbackLevel(
            index=0,
            name=session.artefact.name,
            watchdog=Watchdog(session, options.cpus, owns=owns),
            golden=golden,
            sector=session.artefact.sector,
        )
        made = cls([level], session.manifest, (), options)
        made.trust = session.trust
        return made

    @property
    def spec(self) -> ModelSpec:
        """The model."""
        return self.manifest.spec

    @property
    def level(self) -> int:
        """Place in the bundle's order of the artefact in use; 0 is the chosen one."""
        return self._current.index

    @property
    def description(self) -> str:
        """Artefact and engine in use, one line."""
        return self._current.description

    def request(self, index: int) -> None:
        """Asks for another level, upward or downward, from the next frame on.

        It is golden-checked first.

        Args:
            index: its place in the bundle's order.

        Raises:
            InputError: there is no such level.
        """
        if index not in {level.index for level in self.levels}:
            there = ", ".join(str(level.index) for level in self.levels)
            raise InputError(f"the fallback has no level {index}; it has: {there}")
        with self._lock:
            self._wanted = index

    def answer(self, frame: Frame, limits: CallLimits, report: Report, *, insist: bool = False) -> Answered:
        """Answers one frame with the level in use, and moves on when that fails.

        Args:
            frame: what to answer for.
            limits: of one call.
            report: called with misses, failures and changes.
            insist: for files: ask a level again that failed at an earlier frame, and the next one when it fails.

        Returns:
            The answer, or why there is none.

        Raises:
            FrameError: the frame cannot be used.
            SectorError: it shows another sector than the one in use was pruned to, and no level looks at whole frames.
        """
        while True:
            level = self._current
            try:
                prediction, error, late = self._ask(level, frame, limits, report, insist)
            except SectorError as refusal:
                if not self._leave_sector(refusal, limits, report, frame.seq):
                    raise
                continue
            self._after(level, error, late, limits, report, frame.seq)
            if error is None or not insist or self._current is level:
                return Answered(
                    prediction=prediction, error=error, late=late, level=level.index, engine=level.description
                )

    def between_frames(self, limits: CallLimits, report: Report, spare_ms: float = math.inf) -> None:
        """What is due between two frames.

        A requested level, a golden frame, a retry when no level is left. A golden frame that would not be done when
        the next live one is expected is put off, for three times ``recheck_s`` at most.

        Args:
            limits: of one call.
            report: called with misses, failures and changes.
            spare_ms: time until the next frame is expected; infinite: none is.
        """
        with self._lock:
            wanted, self._wanted = self._wanted, None
        if wanted is not None and wanted != self._current.index:
            self._change(next(level for level in self.levels if level.index == wanted), limits, report, "asked for")
        now_s = time.monotonic()
        current, due = self._current, self.options.recheck_s
        if current.failed is not None:
            if now_s >= self._retry_at_s:
                self._next(limits, report, None)
            return
        if due is None or (since_s := now_s - current.last_check_s) < due:
            return
        since = since_s / due if due else _LATEST
        fits = since >= _LATEST or spare_ms >= 1e3 * _ROOM * current.check_took_s * (_LATEST - since) / (_LATEST - 1)
        if fits and (why := self._check(current, limits)) is not None:
            self._after(current, why, False, limits, report, None)

    def close(self) -> None:
        """Frees every level. Idempotent."""
        for level in self.levels:
            level.watchdog.close()

    def __enter__(self) -> Fallback:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _ask(
        self, level: FallbackLevel, frame: Frame, limits: CallLimits, report: Report, insist: bool
    ) -> tuple[Prediction | None, str | None, bool]:
        late: list[int] = []

        def missed() -> None:
            late.append(frame.seq)
            text = f"{level.name} passed its deadline of {limits.deadline_ms:.0f} ms"
            report(_event(LiveEventKind.DEADLINE_MISSED, text, frame.seq))

        if level.failed is not None and not insist:
            return None, f"no artefact is left that answers; {level.name}: {level.failed}", False
        try:
            prediction = level.watchdog.call(frame, limits, missed)
        except EngineError as failure:
            return None, str(failure), bool(late)
        error = None if prediction.valid else "it gave an output that is not finite"
        return prediction, error, bool(late)

    def _after(
        self, level: FallbackLevel, error: str | None, late: bool, limits: CallLimits, report: Report, seq: int | None
    ) -> None:
        level.misses = level.misses + 1 if late else 0
        if error is None and 0 < self.options.misses_in_a_row <= level.misses and len(self.levels) > 1:
            error = f"it passed its deadline {level.misses} times in a row"
        if error is None or level.failed is not None:
            return
        level.failed, level.misses = error, 0
        report(_event(LiveEventKind.ENGINE_FAILED, f"{level.name}: {error}", seq))
        _log.warning("engine %s failed: %s", level.name, error)
        self._next(limits, report, seq)

    def _next(self, limits: CallLimits, report: Report, seq: int | None) -> None:
        """Takes the next level that answers its golden frames.

        The ones below first, then those that failed before.
        """
        here = self.levels.index(self._current)
        sound = [level for level in (*self.levels[here + 1 :], *self.levels[:here]) if level.failed is None]
        again: list[FallbackLevel] = []
        if (now_s := time.monotonic()) >= self._retry_at_s:
            # not at once, or a level that fails at every frame would be tried at every frame
            self._retry_at_s = now_s + self.options.retry_s
            again = [level for level in self.levels if level.failed is not None]
        for level in (*sound, *again):
            if not level.watchdog.abandoned and self._change(level, limits, report, "the one before it failed", seq):
                return

    def _leave_sector(self, refusal: SectorError, limits: CallLimits, report: Report, seq: int) -> bool:
        """Takes the first sound level that looks at whole frames."""
        whole = [level for level in self.levels if not level.sector and level.failed is None]
        return any(
            self._change(level, limits, report, str(refusal), seq) for level in whole if not level.watchdog.abandoned
        )

    def _change(
        self, level: FallbackLevel, limits: CallLimits, report: Report, why: str, seq: int | None = None
    ) -> bool:
        if (fault := self._check(level, limits)) is not None:
            level.failed = fault
            report(_event(LiveEventKind.ENGINE_FAILED, f"{level.name} cannot take over: {fault}", seq))
            _log.warning("engine %s cannot take over: %s", level.name, fault)
            return False
        level.failed, level.misses = None, 0
        self._current = level
        text = f"{level.name} answers from now on ({why})"
        report(_event(LiveEventKind.LEVEL_CHANGED, text, seq))
        _log.warning("fallback order: level %d, %s", level.index, text)
        return True

    def _check(self, level: FallbackLevel, limits: CallLimits) -> str | None:
        """Asks about one golden frame; why the answer is wrong, or None."""
        begin_s = level.last_check_s = time.monotonic()
        if not level.golden:
            return None
        frame, want = level.golden[level.checked % len(level.golden)]
        level.checked += 1
        try:
            got = level.watchdog.call(frame, limits, lambda: None)
        except EdgeError as error:
            return f"a golden frame failed: {error}"
        difference = golden_difference(got, want)
        took_s = time.monotonic() - begin_s
        level.check_took_s = (3 * level.check_took_s + took_s) / 4 if level.check_took_s else took_s
        return difference


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


def _open_level(bundle: Bundle, index: int, name: str, options: FallbackOptions) -> FallbackLevel:
    artefact = next(artefact for artefact in bundle.manifest.artefacts if artefact.name == name)
    predictor: Predictor
    if options.isolate:
        from tinyusfm_runtime.isolate.session import WorkerSession

        predictor = WorkerSession.open(
            bundle.path, target=artefact.target, precision=artefact.variant, threads=options.threads,
            cpus=options.cpus, bundle_id=bundle.manifest.bundle_id, second_pass=options.second_pass,
            drift=options.drift, progress=options.progress,
        )  # fmt: skip
        frames = bundle.golden_frames()[:GOLDEN_AT_WORK]
    else:
        before = _affinity() if options.cpus is not None else None
        pin(options.cpus)  # the engine's own threads inherit it
        try:
            session = Session.open(
                bundle,
                target=artefact.target,
                precision=artefact.variant,
                threads=options.threads,
                second_pass=options.second_pass,
                drift=options.drift,
                progress=options.progress,
            )
        finally:
            pin(before)
        predictor, frames = session, list(session.golden_frames)
    try:
        golden = _golden_answers(predictor, frames)
    except BaseException:
        predictor.close()
        raise
    return FallbackLevel(
        index=index, name=name, watchdog=Watchdog(predictor, options.cpus), golden=golden, sector=artefact.sector
    )


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
        raise BundleError("a fallback needs at least one artefact")
    return list(targets)


def _event(kind: LiveEventKind, reason: str, seq: int | None) -> LiveEvent:
    return LiveEvent(kind=kind, t_ns=time.monotonic_ns(), reason=reason, seq=seq)


__all__ = ["GOLDEN_AT_WORK", "Answered", "Fallback", "FallbackLevel", "FallbackOptions", "Report", "golden_difference"]
