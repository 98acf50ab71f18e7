"""Whether an artefact repeats itself to the last bit.

Run to run, load to load, and with other numbers of threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from tinyusfm_export.verify.engine_run import open_engine
from tinyusfm_export.verify.expected import judged_spec
from tinyusfm_runtime.bundle.manifest import Artefact
from tinyusfm_runtime.bundle.reader import Bundle
from tinyusfm_runtime.spec import LOGITS_NAME

RUNS = 3
"""Runs of each frame."""
MAX_FRAMES = 4
"""Frames that are repeated."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Determinism:
    """How far an artefact repeats itself, in logits.

    Attributes:
        artefact: its name.
        frames: frames that were repeated.
        runs: largest difference between runs of one engine; 0 where every bit is the same.
        loads: largest difference between two loads of the same files.
        threads: number of threads -> largest difference from one thread.
    """

    artefact: str
    frames: int
    runs: float
    loads: float
    threads: dict[int, float]

    def to_json(self) -> dict[str, Any]:
        """Plain data, ready for ``json.dumps``."""
        plain = asdict(self)
        return {**plain, "threads": {str(count): value for count, value in self.threads.items()}}

    def rows(self) -> list[tuple[str, str, str]]:
        """(artefact, what was repeated, outcome) for people."""
        parts = [("run to run", self.runs), ("load to load", self.loads)]
        parts += [(f"{count} threads against 1", value) for count, value in sorted(self.threads.items())]
        return [
            (self.artefact, what, "same bits" if value == 0.0 else f"differs by {value:.3g}") for what, value in parts
        ]


def repeat(
    bundle: Bundle, artefact: Artefact, inputs: Sequence[np.ndarray], threads: Sequence[int] = (1, 2, 4)
) -> Determinism:
    """Repeats frames.

    Args:
        bundle: holds the artefact.
        artefact: of that bundle.
        inputs: uint8 NCHW inputs; the first ``MAX_FRAMES`` are used.
        threads: numbers of threads to try; the first is what the others are compared with.

    Raises:
        EngineError: the engine failed.
        MissingExtra, UnsupportedError: it does not work here.
    """
    chosen = [np.ascontiguousarray(tensor) for tensor in inputs[:MAX_FRAMES]]
    first = _answers(bundle, artefact, chosen, threads[0], RUNS)
    again = _answers(bundle, artefact, chosen, threads[0], 1)
    others = {count: _answers(bundle, artefact, chosen, count, 1) for count in threads[1:]}
    return Determinism(
        artefact=artefact.name,
        frames=len(chosen),
        runs=max(_gap(first[0], run) for run in first),
        loads=_gap(first[0], again[0]),
        threads={count: _gap(first[0], found[0]) for count, found in others.items()},
    )


def _answers(
    bundle: Bundle, artefact: Artefact, inputs: Sequence[np.ndarray], threads: int, runs: int
) -> list[list[np.ndarray]]:
    spec, files = judged_spec(bundle), bundle.artefact_files(artefact)
    rest = artefact.rest_precision
    with open_engine(artefact.engine, files, spec, threads=threads, rest_precision=rest) as engine:
        return [[np.array(engine.run(tensor)[LOGITS_NAME]) for tensor in inputs] for _ in range(runs)]


def _gap(left: Sequence[np.ndarray], right: Sequence[np.ndarray]) -> float:
    """Largest difference.

    Bits that differ without one (a sign of zero) count as the least number above 0.
    """
    found = 0.0
    for a, b in zip(left, right, strict=True):
        if a.tobytes() != b.tobytes():
            distance = float(np.nanmax(np.abs(a.astype(np.float64) - b.astype(np.float64)), initial=0.0))
            found = max(found, distance, float(np.finfo(np.float32).tiny))
    return found


__all__ = ["MAX_FRAMES", "RUNS", "Determinism", "repeat"]
