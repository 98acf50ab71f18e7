"""What a change does: two artefacts on the same frames.

Latency is measured in turns (old, new, new, old, ...), so that both see the same machine.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from tinyusfm_edge.data.table import Sample
from tinyusfm_edge.evaluation.artefact_scores import (
    FrameResult,
    difference,
    estimate,
    golden_samples,
    metric_names,
    run_artefact,
)
from tinyusfm_edge.evaluation.bootstrap import RESAMPLES, SEED, Estimate
from tinyusfm_export.verify.engine_run import open_engine, preprocess_all
from tinyusfm_export.verify.expected import judged_spec
from tinyusfm_runtime.bundle.manifest import Artefact
from tinyusfm_runtime.bundle.reader import Bundle
from tinyusfm_runtime.errors import InputError
from tinyusfm_runtime.numerics.order import wide

LATENCY_FRAMES = 8
WARM_UP = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Metric:
    """One metric of both sides.

    Attributes:
        name: of the metric.
        stratum: kind of frame, or empty for all.
        old: with its interval over patients.
        new: likewise.
        difference: new minus old on the same frames.
    """

    name: str
    stratum: str
    old: Estimate
    new: Estimate
    difference: Estimate

    def row(self) -> tuple[str, str, str, str, str]:
        """(metric, kind of frame, old, new, difference) for people."""
        shown = (self.old.text(4), self.new.text(4), self.difference.text(4, sign=True))
        return (self.name, self.stratum or "all", *shown)


@dataclass(frozen=True, kw_only=True, slots=True)
class Flip:
    """A frame whose answer is another one.

    Attributes:
        id: name of the frame.
        stratum: kind of frame.
        before: answer of the old bundle.
        after: answer of the new one.
    """

    id: str
    stratum: str
    before: str
    after: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Latency:
    """Inference of both, measured in turns; medians in ms.

    Attributes:
        old_ms: median.
        new_ms: median.
        ratio: new to old.
        low: 2.5 % end of the ratio's interval (bootstrap over rounds).
        high: 97.5 % end.
        rounds: of the measurement.
    """

    old_ms: float
    new_ms: float
    ratio: float
    low: float
    high: float
    rounds: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Impact:
    """What a change does on the frames given.

    Attributes:
        artefacts: names of the two artefacts.
        frames: number of frames.
        about: what the frames are.
        metrics: of both, on all frames and on each kind.
        flips: frames with another answer.
        hc_shift_mm: mean, 95th percentile and largest change of the circumference, or None without one.
        latency: or None where it was not measured.
    """

    artefacts: tuple[str, str]
    frames: int
    about: str
    metrics: tuple[Metric, ...]
    flips: tuple[Flip, ...]
    hc_shift_mm: tuple[float, float, float] | None
    latency: Latency | None

    @property
    def flip_share(self) -> float:
        """Share of the frames with another answer."""
        return len(self.flips) / self.frames if self.frames else 0.0

    def to_json(self) -> dict[str, Any]:
        """Plain data, ready for ``json.dumps``."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class Sides:
    """Both bundles on the same frames.

    Attributes:
        old: results of the old one.
        new: results of the new one.
        impact: what follows.
    """

    old: tuple[FrameResult, ...]
    new: tuple[FrameResult, ...]
    impact: Impact


def compare_sides(
    old: Bundle,
    new: Bundle,
    samples: Sequence[Sample] | None,
    *,
    about: str,
    target: str | None = None,
    precision: str | None = None,
    threads: int = 1,
    rounds: int = 10,
) -> Sides:
    """Runs both bundles on the same frames.

    Args:
        old: the bundle in use.
        new: the one that shall replace it.
        samples: labelled frames, or None for the new bundle's golden phantoms.
        about: what the frames are.
        target: artefact to compare; None is the first of the new bundle that the old one has too.
        precision: likewise.
        threads: inside the engines.
        rounds: of the latency measurement; 0 leaves it out.

    Raises:
        InputError: they have no artefact in common, or do not answer the same question.
        EngineError, MissingExtra, UnsupportedError: an engine failed or does not work here.
    """
    ours, theirs = shared_artefacts(old, new, target, precision)
    chosen = golden_samples(new.golden_frames()) if samples is None else list(samples)
    truth = samples is not None
    before = run_artefact(old, ours, chosen, truth=truth, threads=threads)
    after = run_artefact(new, theirs, chosen, truth=truth, threads=threads)
    impact = Impact(
        artefacts=(ours.name, theirs.name),
        frames=len(chosen),
        about=about,
        metrics=tuple(_metrics(before, after)),
        flips=tuple(_flips(before, after)),
        hc_shift_mm=_hc_shift(before, after),
        latency=_latency((old, ours), (new, theirs), chosen, threads, rounds) if rounds else None,
    )
    return Sides(old=before, new=after, impact=impact)


def shared_artefacts(
    old: Bundle, new: Bundle, target: str | None = None, precision: str | None = None
) -> tuple[Artefact, Artefact]:
    """The artefacts to compare: the first of the new bundle that the old one has too.

    Raises:
        InputError: there is none.
    """
    from tinyusfm_export.verify.bundle import choose_artefacts

    there = {artefact.name: artefact for artefact in old.manifest.artefacts}
    for artefact in choose_artefacts(new, target, precision):
        if artefact.name in there:
            return there[artefact.name], artefact
    raise InputError("the two bundles have no artefact in common: name one of each target with --target, --precision")


def _metrics(before: Sequence[FrameResult], after: Sequence[FrameResult]) -> list[Metric]:
    found = []
    kinds = ["", *sorted({result.stratum for result in before} - {""})]
    for kind in kinds if len(kinds) > 2 else [""]:
        index = [i for i, result in enumerate(before) if kind in ("", result.stratum)]
        left, right = [before[i] for i in index], [after[i] for i in index]
        for name in metric_names(left):
            sides = estimate(left, name), estimate(right, name), difference(left, right, name)
            if sides[0] is not None and sides[1] is not None and sides[2] is not None:
                found.append(Metric(name=name, stratum=kind, old=sides[0], new=sides[1], difference=sides[2]))
    return found


def _flips(before: Sequence[FrameResult], after: Sequence[FrameResult]) -> list[Flip]:
    return [
        Flip(id=old.id, stratum=old.stratum, before=_answer(old), after=_answer(new))
        for old, new in zip(before, after, strict=True)
        if _answer(old) != _answer(new)
    ]


def _answer(result: FrameResult) -> str:
    said = result.top or ("found" if result.found else "nothing found")
    return f"{said}, reading {result.reading}"


def _hc_shift(before: Sequence[FrameResult], after: Sequence[FrameResult]) -> tuple[float, float, float] | None:
    shifts = [
        abs((new.hc_mm or 0.0) - (old.hc_mm or 0.0))
        for old, new in zip(before, after, strict=True)
        if old.hc_mm is not None or new.hc_mm is not None
    ]
    if not shifts:
        return None
    return float(np.mean(shifts)), float(np.percentile(wide(shifts), 95, method="higher")), max(shifts)


def _latency(
    old: tuple[Bundle, Artefact], new: tuple[Bundle, Artefact], samples: Sequence[Sample], threads: int, rounds: int
) -> Latency:
    frames = [sample.frame for sample in samples[:LATENCY_FRAMES]]
    sides = []
    for bundle, artefact in (old, new):
        spec, files = judged_spec(bundle), bundle.artefact_files(artefact)
        tensors = [np.ascontiguousarray(tensor) for tensor, _ in preprocess_all(frames, spec)]
        opened = open_engine(artefact.engine, files, spec, threads=threads, rest_precision=artefact.rest_precision)
        sides.append((opened, tensors))
    with sides[0][0] as first, sides[1][0] as second:
        runs = ((first, sides[0][1]), (second, sides[1][1]))
        for engine, tensors in runs:
            for i in range(WARM_UP):
                engine.run(tensors[i % len(tensors)])
        took_R2 = np.zeros((rounds, 2))
        for turn in range(rounds):
            for side in (0, 1) if turn % 2 == 0 else (1, 0):
                engine, tensors = runs[side]
                times = []
                for tensor in tensors:
                    start = time.perf_counter_ns()
                    engine.run(tensor)
                    times.append((time.perf_counter_ns() - start) / 1e6)
                took_R2[turn, side] = float(np.median(wide(times)))
    return latency_ratio(took_R2)


def latency_ratio(took_R2: np.ndarray) -> Latency:
    """Medians and their ratio with a bootstrap interval over rounds.

    Args:
        took_R2: ms a round, old and new.
    """
    draws = np.random.default_rng(SEED).integers(0, len(took_R2), (RESAMPLES, len(took_R2)))
    medians = np.median(wide(took_R2[draws]), axis=1)
    low, high = np.percentile(wide(medians[:, 1] / medians[:, 0]), [2.5, 97.5])
    old_ms, new_ms = (float(value) for value in np.median(wide(took_R2), axis=0))
    return Latency(
        old_ms=old_ms, new_ms=new_ms, ratio=new_ms / old_ms, low=float(low), high=float(high), rounds=len(took_R2)
    )


__all__ = [
    "LATENCY_FRAMES",
    "WARM_UP",
    "Flip",
    "Impact",
    "Latency",
    "Metric",
    "Sides",
    "compare_sides",
    "latency_ratio",
    "shared_artefacts",
]
