"""Interleaved rounds: who runs when, which rounds were quiet, and the ratios that come out.

On a shared machine everything is slower for minutes at a time, so absolute times of two programs measured one after
the other say little. Here each round asks every worker once, in a shuffled order, and a ratio is taken inside its
round. A round is *quiet* if, over all workers, the median of (its median / that worker's best median) is at most
``QUIET``.

It knows no engine and no model: samples in, statistics out.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tinyusfm_runtime.numerics.order import wide

QUIET = 1.05
"""Largest slowdown of a quiet round."""
MIN_QUIET = 3
"""Fewer quiet rounds than this, and all rounds count (the table says so)."""

Samples = list[list[float]]
"""Milliseconds, one list a round."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MachineNoise:
    """What else the machine did during the rounds.

    Attributes:
        foreign: CPU time of other processes over all CPU time, 0..1, or None where it cannot be read.
        steal: CPU time that the host took away over all CPU time, 0..1, or None.
    """

    foreign: float | None
    steal: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Statistics:
    """One worker's figures.

    Attributes:
        quiet_p50_ms: median over the quiet rounds.
        p50_ms: median over all rounds.
        p90_ms: 90th percentile over all rounds.
        p99_ms: 99th percentile over all rounds.
        ratios: rival -> (median, p10, p90) over the quiet rounds of rival's median / this worker's median.
    """

    quiet_p50_ms: float
    p50_ms: float
    p90_ms: float
    p99_ms: float
    ratios: dict[str, tuple[float, float, float]]


def interleave(workers: Mapping[str, Callable[[], list[float]]], *, rounds: int, seed: int) -> dict[str, Samples]:
    """Asks every worker once a round, in another order each time.

    Args:
        workers: name -> function that takes one block of samples, ms.
        rounds: how many rounds.
        seed: of the order.

    Returns:
        name -> samples, one list a round.
    """
    order, rng = list(workers), random.Random(seed)
    samples: dict[str, Samples] = {name: [] for name in order}
    for _ in range(rounds):
        rng.shuffle(order)
        for name in order:
            samples[name].append(workers[name]())
    return samples


def slowdowns(samples: Mapping[str, Samples]) -> list[float]:
    """Slowdown of each round: median over workers of its median over that worker's best median."""
    medians = np.array([[np.median(wide(block)) for block in blocks] for blocks in samples.values()])
    return [float(value) for value in np.median(wide(medians / medians.min(axis=1, keepdims=True)), axis=0)]


def quiet_rounds(samples: Mapping[str, Samples]) -> list[int]:
    """Indices of the quiet rounds, or of all where too few are quiet."""
    found = [index for index, value in enumerate(slowdowns(samples)) if value <= QUIET]
    num_rounds = len(next(iter(samples.values())))
    return found if len(found) >= min(MIN_QUIET, num_rounds) else list(range(num_rounds))


def statistics(samples: Mapping[str, Samples], rivals: Sequence[str]) -> dict[str, Statistics]:
    """Figures of every worker.

    Args:
        samples: what ``interleave`` gave.
        rivals: workers that the others are compared with.

    Returns:
        name -> figures; a ratio of 2 means twice as fast as the rival.
    """
    quiet = quiet_rounds(samples)
    found = {}
    for name, blocks in samples.items():
        everything = np.concatenate([np.asarray(block) for block in blocks])
        p50, p90, p99 = (float(v) for v in np.percentile(wide(everything), (50, 90, 99)))
        ratios = {rival: _ratio(samples[rival], blocks, quiet) for rival in rivals if rival in samples}
        found[name] = Statistics(
            quiet_p50_ms=float(np.median(wide(np.concatenate([np.asarray(blocks[index]) for index in quiet])))),
            p50_ms=p50,
            p90_ms=p90,
            p99_ms=p99,
            ratios=ratios,
        )
    return found


def _ratio(rival: Samples, own: Samples, rounds: Sequence[int]) -> tuple[float, float, float]:
    values = [float(np.median(wide(rival[index])) / np.median(wide(own[index]))) for index in rounds]
    middle, low, high = np.percentile(wide(values), (50, 10, 90))
    return float(middle), float(low), float(high)


class NoiseMeter:
    """CPU time of everybody else between two moments (Linux; elsewhere unknown)."""

    def __init__(self, own: Callable[[], float]) -> None:
        """Starts measuring.

        Args:
            own: CPU seconds used so far by this benchmark and its workers.
        """
        self._own = own
        self._start = (_cpu_seconds(), own())

    def stop(self) -> MachineNoise:
        """What happened since the start."""
        before, after = self._start[0], _cpu_seconds()
        if before is None or after is None:
            return MachineNoise(foreign=None, steal=None)
        total = max(after[0] - before[0], 1e-9)
        busy = after[1] - before[1] - (self._own() - self._start[1])
        return MachineNoise(foreign=max(0.0, busy / total), steal=(after[2] - before[2]) / total)


def _cpu_seconds() -> tuple[float, float, float] | None:
    """(all, busy, stolen) CPU seconds since boot, from /proc/stat."""
    try:
        fields = [float(v) / 100.0 for v in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    except (OSError, ValueError):
        return None
    user, nice, system, idle, iowait, irq, softirq, steal = fields
    return sum(fields), user + nice + system + irq + softirq, steal


__all__ = [
    "MIN_QUIET",
    "QUIET",
    "MachineNoise",
    "NoiseMeter",
    "Samples",
    "Statistics",
    "interleave",
    "quiet_rounds",
    "slowdowns",
    "statistics",
]
