"""Candidates in turns, and the file that a killed run goes on from.

The first round asks every candidate once; later ones those that hold their gate and are within ``KEEP`` of the fastest
one of their variant, so that minutes go where the choice is. The order inside a round is shuffled, so that a slow phase
of the machine hits all of them. After every visit the file is written whole; what it holds is never measured again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tinyusfm_edge.tuning.candidates import TuneCandidate
from tinyusfm_runtime.atomic import write_file
from tinyusfm_runtime.errors import InputError
from tinyusfm_runtime.numerics.order import wide
from tinyusfm_runtime.strict_json import parse_json

STATE_VERSION = 1
"""Version of the file."""
KEEP = 1.3
"""A candidate whose median is more than this many times the best of its variant gets no further round."""
Visit = Callable[[TuneCandidate], Mapping[str, Any]]
"""Times one candidate; see visit.py."""
TuneProgress = Callable[[str, float], None]
"""Called with what is being done and the share that is done."""


@dataclass(kw_only=True, slots=True)
class TuneState:
    """What was measured so far.

    Attributes:
        place: of the file, or None where nothing is kept.
        about: what the measurements are of: machine, bundles, source; two runs that differ in it are never mixed.
        visits: ``{"round", "key", ...}`` each, in the order in which they were made.
    """

    place: Path | None
    about: Mapping[str, Any]
    visits: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def open(cls, place: Path, about: Mapping[str, Any]) -> TuneState:
        """Goes on from a file, or begins one.

        Args:
            place: of the file.
            about: what is going to be measured.

        Raises:
            InputError: the file cannot be read, or holds measurements of something else.
        """
        if not place.is_file():
            return cls(place=place, about=about)
        try:
            found = parse_json(place.read_bytes())
            version, then, visits = found["version"], found["about"], found["visits"]
            whole = version == STATE_VERSION and all(
                isinstance(one["round"], int) and isinstance(one["key"], str) for one in visits
            )
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise InputError(f"{place.name} cannot be read: remove it, or give another --out") from error
        if not whole:
            raise InputError(f"{place.name} is of another version: remove it, or give another --out")
        plain = json.loads(json.dumps(about))
        if then != plain:
            differ = ", ".join(sorted(key for key in {*then, *plain} if then.get(key) != plain.get(key)))
            raise InputError(
                f"{place.name} holds measurements of something else ({differ}): give --fresh, or another --out"
            )
        return cls(place=place, about=about, visits=list(visits))

    def take(self, number: int, key: str) -> dict[str, Any] | None:
        """The visit of a candidate in a round, if it was made."""
        return next((one for one in self.visits if one["round"] == number and one["key"] == key), None)

    def of(self, key: str) -> list[dict[str, Any]]:
        """All visits of a candidate."""
        return [one for one in self.visits if one["key"] == key]

    def add(self, number: int, key: str, found: Mapping[str, Any]) -> None:
        """Keeps a visit.

        Raises:
            OutputError: the file cannot be written.
        """
        self.visits.append({"round": number, "key": key, **found})
        if self.place is not None:
            write_file(self.place, (json.dumps(self.to_json()) + "\n").encode(), "the state of the run")

    def to_json(self) -> dict[str, Any]:
        """Plain data, as the file holds it."""
        return {"version": STATE_VERSION, "about": dict(self.about), "visits": self.visits}


def measure_rounds(
    candidates: Sequence[TuneCandidate],
    state: TuneState,
    visit: Visit,
    *,
    rounds: int,
    progress: TuneProgress | None = None,
) -> None:
    """Makes the visits that are not in the state yet.

    Args:
        candidates: all of them.
        state: what is there already; filled.
        visit: times one.
        rounds: at least one.
        progress: progress.

    Raises:
        OutputError: the state cannot be written.
    """
    say = progress or (lambda what, share: None)
    done = 0
    for number in range(rounds):
        chosen = candidates if number == 0 else kept(candidates, state, number)
        # how many are kept is known after the first round only; until then a third is expected
        later = len(chosen) * (rounds - number - 1) if number else (rounds - 1) * max(1, len(candidates) // 3)
        for index, candidate in enumerate(_shuffled(chosen, number)):
            planned = done + len(chosen) - index + later
            say(f"round {number + 1} of {rounds}: {candidate.key}", done / planned if planned else 1.0)
            if state.take(number, candidate.key) is None:
                state.add(number, candidate.key, visit(candidate))
            done += 1
    say("measured", 1.0)


def kept(candidates: Sequence[TuneCandidate], state: TuneState, number: int) -> list[TuneCandidate]:
    """Candidates that get a round.

    Those that hold their gate and are within ``KEEP`` of the fastest of their variant.

    Args:
        candidates: all of them.
        state: of the rounds before.
        number: of the round, from 1.
    """
    medians = {one.key: _median(state, one.key, number) for one in candidates}
    best: dict[str, float] = {}
    for one in candidates:
        value = medians[one.key]
        if value is not None:
            best[one.variant] = min(value, best.get(one.variant, value))
    found = []
    for one in candidates:
        value = medians[one.key]
        if value is not None and value <= KEEP * best[one.variant]:
            found.append(one)
    return found


def why_not(visit: Mapping[str, Any]) -> str:
    """Why a visit speaks against its candidate, or nothing.

    Args:
        visit: what ``visit`` gave.
    """
    if "error" in visit:
        return f"failed: {visit['error']}"
    if not visit["verified"]:
        return "never passed its gate"
    if not visit["golden"]["passed"]:
        return f"misses the gate on the golden frames here: {'; '.join(visit['golden']['reasons'])}"
    return "gave answers that are not finite" if visit["invalid"] else ""


def _median(state: TuneState, key: str, number: int) -> float | None:
    """Median time of a candidate before a round.

    None where it failed, missed its gate or was left out.
    """
    visits = [one for one in state.of(key) if one["round"] < number]
    if len(visits) < number or any(why_not(one) for one in visits):
        return None
    samples = [sample for one in visits for sample in one["samples_ms"]["total_ms"]]
    return float(np.median(wide(samples))) if samples else None


def _shuffled(candidates: Sequence[TuneCandidate], number: int) -> Iterator[TuneCandidate]:
    order = np.random.default_rng((2026, number)).permutation(len(candidates))
    return (candidates[int(index)] for index in order)


__all__ = ["KEEP", "STATE_VERSION", "TuneProgress", "TuneState", "Visit", "kept", "measure_rounds", "why_not"]
