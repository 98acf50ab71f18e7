"""Hot swap: another bundle takes over between two frames of a running loop.

The old one comes back if it fails.

    load and golden-check    beside the running bundle, which goes on answering
    shadow run, if wanted    both answer the same live frames; the difference is measured, nobody sees the new answers
    switch                   between two frames, so none is lost and none is answered twice
    probation                the first answers are watched; one that fails brings the old bundle back

It changes nothing about what happens to frames: what the loop drops during a swap it drops by its policy.

Shapes: HW = rows, columns of the model's input.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from tinyusfm_runtime.errors import EdgeError, EngineError, InputError
from tinyusfm_runtime.frame import Frame
from tinyusfm_runtime.live.fallback import Answered, Fallback, FallbackOptions
from tinyusfm_runtime.live.options import LiveOptions
from tinyusfm_runtime.numerics.measure import dice
from tinyusfm_runtime.numerics.order import wide
from tinyusfm_runtime.results import LiveCounters, LiveEvent, LiveEventKind, LiveResult, Prediction

_log = logging.getLogger(__name__)
Tap = Callable[[Fallback, Frame, Answered, LiveResult], None]
"""Called in the inference thread with who answered which frame, and the result."""
_BEFORE = 200  # results before the swap that its ages are compared with


class SwappableLoop(Protocol):
    """What a swap asks a running loop to do."""

    def take_over(self, fallback: Fallback) -> float:
        """Lets another fallback answer from the next frame on.

        Returns how long that took, ms.
        """
        ...

    def hand_back(self, fallback: Fallback) -> None:
        """Closes a fallback that no longer answers, if it is the loop's to close."""
        ...

    def report(self, event: LiveEvent) -> None:
        """Reports an event of the swap to whoever listens to the loop."""
        ...


@dataclass(frozen=True, kw_only=True)
class RunningLoop:
    """What a swap reads of a running loop.

    Attributes:
        fallback: the one that answers now.
        options: how the loop treats its engine.
        taps: called with every result; a swap adds one and removes it.
        counters: the loop's frame accounting at this instant.
        ages_ms: age at result of the results so far, ms, oldest first.
    """

    fallback: Fallback
    options: LiveOptions
    taps: list[Tap]
    counters: Callable[[], LiveCounters]
    ages_ms: Sequence[float]


@dataclass(frozen=True, kw_only=True, slots=True)
class SwapOptions:
    """How careful a swap is.

    Attributes:
        shadow_frames: live frames that both bundles answer before the switch; 0 is none.
        min_dice: mean Dice of both over the shadow frames that hold anything, below which there is no switch.
        probation_frames: number of results after the switch that must all succeed.
        patience_s: how long to wait for so many frames.
        targets: artefacts to open, as in ``Fallback.open``.
        fallback: how the new bundle's artefacts run.
    """

    shadow_frames: int = 0
    min_dice: float = 0.8
    probation_frames: int = 10
    patience_s: float = 30.0
    targets: tuple[str, ...] | None = None
    fallback: FallbackOptions = field(default_factory=FallbackOptions)

    def __post_init__(self) -> None:
        """Checks the numbers.

        Raises:
            InputError: one lies outside its range.
        """
        if self.shadow_frames < 0 or self.probation_frames < 0 or not 0 <= self.min_dice <= 1 or self.patience_s <= 0:
            raise InputError("swap options: counts not negative, min_dice 0 to 1, patience_s above 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class SwapReport:
    """How a swap went. True if the new bundle answers now.

    Attributes:
        outcome: ``switched``, ``refused`` (it never answered a live frame) or ``rolled_back``.
        reason: why, one line.
        bundle_id: of the new bundle, or empty where it could not be opened.
        load_ms: opening and golden-checking.
        switch_ms: from asking for the switch to the frame boundary at which it happened.
        shadow: frames both answered, ``dice_mean``, ``dice_worst``, ``hc_max_mm`` where there is any.
        age_p99_before_ms: 99th percentile of the age at result of up to 200 results before.
        age_p99_during_ms: the same from the beginning of the swap to its end; None without results.
        results: results during the swap.
        dropped: frames dropped during the swap, by reason.
    """

    outcome: str
    reason: str
    bundle_id: str
    load_ms: float
    switch_ms: float
    shadow: dict[str, float]
    age_p99_before_ms: float | None
    age_p99_during_ms: float | None
    results: int
    dropped: dict[str, int]

    def __bool__(self) -> bool:
        return self.outcome == "switched"

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {"version": 1, **asdict(self)}


def swap(
    loop: SwappableLoop, running: RunningLoop, bundle: str | Path, advanced: SwapOptions | None = None
) -> SwapReport:
    """Puts another bundle in the place of the one a loop runs. Call ``Live.swap``.

    Args:
        loop: a running loop; not to be called from one of its own threads.
        running: what the loop runs now.
        bundle: folder of the other bundle.
        advanced: how careful to be.

    Returns:
        What happened. A bundle that cannot be opened, does another task, or differs too much is refused; the running
        one goes on.
    """
    watch = _Watch(running)
    try:
        return _swapped(loop, running.fallback, Path(bundle), advanced or SwapOptions(), watch)
    finally:
        watch.stop()


def _swapped(loop: SwappableLoop, old: Fallback, path: Path, options: SwapOptions, watch: _Watch) -> SwapReport:
    begin_ns, new = time.perf_counter_ns(), None
    load_ms = switch_ms = 0.0
    shadow: dict[str, float] = {}

    def report(outcome: str, reason: str) -> SwapReport:
        kind = LiveEventKind.BUNDLE_CHANGED if outcome == "switched" else LiveEventKind.BUNDLE_REFUSED
        loop.report(LiveEvent(kind=kind, t_ns=time.monotonic_ns(), reason=reason))
        _log.warning("bundle swap %s: %s", outcome, reason)
        made = new.manifest.bundle_id if new is not None else ""
        return watch.report(outcome, reason, made, load_ms=load_ms, switch_ms=switch_ms, shadow=shadow)

    try:
        new = Fallback.open(path, targets=options.targets, advanced=options.fallback, trust=old.trust)
        load_ms = (time.perf_counter_ns() - begin_ns) / 1e6
        _same_task(old, new)
        if options.shadow_frames:
            shadow = _shadow(new, watch, options)
            if shadow["dice_mean"] < options.min_dice:
                raise EngineError(f"it differs: mean Dice {shadow['dice_mean']:.3f} in the shadow run")
    except EdgeError as error:
        decision = report("refused", str(error))
        if new is not None:
            new.close()
        return decision
    switch_ms = loop.take_over(new)
    fault = watch.probation(new, options)
    if fault is None:
        loop.hand_back(old)
        return report("switched", f"{new.description} answers")
    loop.take_over(old)
    decision = report("rolled_back", fault)
    loop.hand_back(new)
    return decision


def _same_task(old: Fallback, new: Fallback) -> None:
    here, there = old.spec, new.spec
    if here.task is not there.task or here.labels != there.labels:
        raise InputError(
            f"the other bundle does {there.task.value} of {len(there.labels)} labels, not {here.task.value} of "
            f"{len(here.labels)} as the running one: start another loop for it"
        )


def _shadow(new: Fallback, watch: _Watch, options: SwapOptions) -> dict[str, float]:
    """Lets the new bundle answer live frames in this thread.

    With the running bundle's answers beside its own.
    """
    scores: list[float] = []
    differences: list[float] = []
    end_s = time.monotonic() + options.patience_s
    frames = 0
    while frames < options.shadow_frames:
        pair = watch.newest(end_s)
        if pair is None:
            raise EngineError(f"only {frames} of {options.shadow_frames} frames came for the shadow run")
        frame, running = pair
        limits = watch.running.options.call_limits(None, 0.0)
        shadow = new.answer(frame, limits, lambda _: None)
        if shadow.error is not None or shadow.prediction is None:
            raise EngineError(f"it failed in the shadow run: {shadow.error}")
        frames += 1
        _compare(shadow.prediction, running, scores, differences)
    found = {
        "frames": float(frames),
        "dice_mean": float(np.mean(scores)) if scores else 1.0,
        "dice_worst": float(np.min(scores)) if scores else 1.0,
    }
    return found | ({"hc_max_mm": float(max(differences))} if differences else {})


def _compare(one: Prediction, other: Prediction, scores: list[float], differences: list[float]) -> None:
    if one.mask_HW is not None and other.mask_HW is not None:
        here, there = one.mask_on_frame(), other.mask_on_frame()
        labels = sorted({*np.unique(wide(here)), *np.unique(wide(there))} - {0})
        if labels:
            scores.append(float(np.mean([dice(here == label, there == label) for label in labels])))
    elif one.scores is not None and other.scores is not None:
        scores.append(1.0 - float(np.abs(one.scores - other.scores).max()))
    if one.measurement is not None and other.measurement is not None:
        hc = (one.measurement.hc_mm, other.measurement.hc_mm)
        if hc[0] is not None and hc[1] is not None:
            differences.append(abs(hc[0] - hc[1]))


class _Watch:
    """Sees every result of a loop while a swap goes on."""

    def __init__(self, running: RunningLoop) -> None:
        self.running = running
        self._condition = threading.Condition()
        self._ages: list[float] = []
        self._newest: tuple[Frame, Prediction] | None = None
        self._answered: deque[tuple[Fallback, Answered]] = deque(maxlen=4096)
        self._dropped = dict(running.counters().dropped)
        before = running.ages_ms[-_BEFORE:]
        self._p99_before = float(np.percentile(wide(before), 99)) if before else None
        running.taps.append(self._see)

    def stop(self) -> None:
        self.running.taps.remove(self._see)

    def newest(self, end_s: float) -> tuple[Frame, Prediction] | None:
        """The newest frame and its running answer that was not asked for yet."""
        with self._condition:
            self._condition.wait_for(lambda: self._newest is not None, max(0.0, end_s - time.monotonic()))
            pair, self._newest = self._newest, None
            return pair

    def probation(self, new: Fallback, options: SwapOptions) -> str | None:
        """Waits for the new bundle's first results; why one of them is not good, or None."""
        end_s = time.monotonic() + options.patience_s
        first = new.levels[0].name
        count = 0
        while count < options.probation_frames:
            with self._condition:
                self._condition.wait_for(lambda: bool(self._answered), max(0.0, end_s - time.monotonic()))
                if not self._answered:
                    return f"only {count} of {options.probation_frames} frames came after the switch"
                fallback, answered = self._answered.popleft()
            if fallback is not new:  # the one before, ahead of the switch
                continue
            count += 1
            if answered.error is not None:
                return f"it failed at a live frame: {answered.error}"
            if new.levels[0].failed is not None:
                return f"{first} failed: {new.levels[0].failed}"
        return None

    def report(
        self, outcome: str, reason: str, bundle_id: str, *, load_ms: float, switch_ms: float, shadow: dict[str, float]
    ) -> SwapReport:
        with self._condition:
            ages = list(self._ages)
        dropped = self.running.counters().dropped
        return SwapReport(
            outcome=outcome,
            reason=reason,
            bundle_id=bundle_id,
            load_ms=load_ms,
            switch_ms=switch_ms,
            shadow=shadow,
            age_p99_before_ms=self._p99_before,
            age_p99_during_ms=float(np.percentile(wide(ages), 99)) if ages else None,
            results=len(ages),
            dropped={key: count - self._dropped.get(key, 0) for key, count in dropped.items()},
        )

    def _see(self, fallback: Fallback, frame: Frame, answered: Answered, result: LiveResult) -> None:
        with self._condition:
            self._ages.append(result.age_ms)
            if answered.prediction is not None and answered.prediction.valid:
                self._newest = (frame, answered.prediction)
            self._answered.append((fallback, answered))
            self._condition.notify_all()


__all__ = ["RunningLoop", "SwapOptions", "SwapReport", "SwappableLoop", "Tap", "swap"]
