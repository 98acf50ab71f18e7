"""Options of a live loop: everything that has a good default.

Plain data; loop.py reads it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from tinyusfm_runtime.errors import InputError
from tinyusfm_runtime.live.state import StateLimits
from tinyusfm_runtime.live.watchdog import CallLimits

WITHOUT_BUDGET_MS = 60_000.0
"""An engine that takes a minute over a file's frame hangs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LiveOptions:
    """Limits and tuning of a live loop.

    Attributes:
        limits: thresholds of the states.
        period_ms: time between frames if it is known, else it is estimated.
        deadline_ms: of one engine call, None is the budget and a frame period.
        give_up_ms: when a call is cancelled, None is eight deadlines, at least 500 ms.
        grace_ms: how long a cancelled call may take to stop before it counts as hanging.
        withhold_stale: results of live sources that are older than the budget are marked as not to be shown.
        overlay_limit_ms: age at which the last shown result is withdrawn, None is three budgets, at least 250 ms.
        copy_frames: copy pixels at reception, for sources that fill the same buffer again.
        queue_places: frames, and results, of a file that may wait.
        capture_cpus: CPUs the capture thread is pinned to (Linux), or None.
        infer_cpus: CPUs the inference thread is pinned to (Linux), or None; the engine's own threads are pinned where
            it is opened (FallbackOptions.cpus).
        tick_ms: how often states and overlay are looked at.
        connect_timeout_s: a live source that gave no frame after so long ends the loop with NoSourceError; None waits.
    """

    limits: StateLimits = field(default_factory=StateLimits)
    period_ms: float | None = None
    deadline_ms: float | None = None
    give_up_ms: float | None = None
    grace_ms: float = 500.0
    withhold_stale: bool = True
    overlay_limit_ms: float | None = None
    copy_frames: bool = False
    queue_places: int = 4
    capture_cpus: frozenset[int] | None = None
    infer_cpus: frozenset[int] | None = None
    tick_ms: float = 20.0
    connect_timeout_s: float | None = None

    def __post_init__(self) -> None:
        """Checks the numbers.

        Raises:
            InputError: one of them is not above 0.
        """
        for name in (
            "period_ms",
            "deadline_ms",
            "give_up_ms",
            "grace_ms",
            "overlay_limit_ms",
            "tick_ms",
            "connect_timeout_s",
        ):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise InputError(f"live options: {name} must be above 0, not {value}")
        if self.queue_places < 1:
            raise InputError(f"live options: queue_places must be at least 1, not {self.queue_places}")

    def call_limits(self, budget_ms: float | None, period_ms: float) -> CallLimits:
        """Limits of one engine call.

        For a budget (None: a file without one) and a frame period in ms.
        """
        usual = WITHOUT_BUDGET_MS if budget_ms is None else budget_ms + period_ms
        deadline_ms = usual if self.deadline_ms is None else self.deadline_ms
        give_up_ms = max(8 * deadline_ms, 500.0) if self.give_up_ms is None else max(self.give_up_ms, deadline_ms)
        return CallLimits(deadline_ms=deadline_ms, give_up_ms=give_up_ms, grace_ms=self.grace_ms)

    def overlay_ms(self, budget_ms: float | None) -> float:
        """Age at which the last shown result is withdrawn, ms."""
        if self.overlay_limit_ms is not None:
            return self.overlay_limit_ms
        return WITHOUT_BUDGET_MS if budget_ms is None else max(3 * budget_ms, 250.0)


__all__ = ["WITHOUT_BUDGET_MS", "LiveOptions"]
