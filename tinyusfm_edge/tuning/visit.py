"""One visit: a fresh process opens one artefact, checks and times it.

A process of its own, so that threads, pinning and memory are the candidate's alone and an engine that crashes or hangs
takes nothing along. ``python -m tinyusfm_edge.tuning.visit JSON`` prints one line of JSON.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tinyusfm_edge.tuning.candidates import TuneCandidate
from tinyusfm_runtime.errors import EdgeError

if TYPE_CHECKING:
    from tinyusfm_runtime.frame import Frame
    from tinyusfm_runtime.session import Session

TIMEOUT_S = 300.0
"""A visit that takes longer has hung."""
WARM_UP = 4
"""Predictions before the timed ones."""
LEAST_RUNS = 8
"""Timed predictions of a candidate however slow it is."""
MAX_FRAMES = 16
"""Distinct frames in turn."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VisitPlan:
    """How a candidate is timed.

    Attributes:
        source: where frames come from, as ``run`` takes it.
        runs: timed predictions, if the time suffices.
        seconds: most time of the timed ones; ``LEAST_RUNS`` are made all the same.
    """

    source: str = "phantom:200-215"
    runs: int = 40
    seconds: float = 3.0


def visit(candidate: TuneCandidate, plan: VisitPlan) -> dict[str, Any]:
    """Times a candidate in a process of its own.

    Args:
        candidate: what is tried.
        plan: how.

    Returns:
        What ``measure`` gives, or ``{"error": reason}``; it never raises for what the candidate does.
    """
    job = {
        "bundle": str(candidate.bundle.absolute()), "target": candidate.target, "precision": candidate.opens,
        "threads": candidate.threads, "cpus": list(candidate.cpus), "source": plan.source, "runs": plan.runs,
        "seconds": plan.seconds,
    }  # fmt: skip
    command = [sys.executable, "-m", "tinyusfm_edge.tuning.visit", json.dumps(job)]
    # the child finds the same packages, wherever this process found them
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, env=environment, timeout=TIMEOUT_S, check=False
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return {"error": f"no answer within {TIMEOUT_S:g} s"}
    except OSError as error:
        return {"error": f"a process cannot be started: {error.strerror or error}"}
    try:
        found = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        last = (done.stderr.strip().splitlines() or ["it printed nothing"])[-1]
        return {"error": f"its process ended with {done.returncode}: {last[:200]}"}
    return found if isinstance(found, dict) else {"error": "its process answered something else"}


def measure(session: Session, frames: Sequence[Frame], plan: VisitPlan) -> dict[str, Any]:
    """Checks an open session on the golden frames and times it.

    Args:
        session: open and warm.
        frames: in turn.
        plan: how many predictions, and for how long.

    Returns:
        ``samples_ms`` by stage, ``golden`` (the comparison on this machine), ``invalid``, ``description``,
        ``startup_ms``, ``conditions`` after the runs.
    """
    from tinyusfm_runtime.latency import STAGES
    from tinyusfm_runtime.profiling.watch import look

    golden = session.run_golden(full=True)
    for index in range(WARM_UP):
        session.predict(frames[index % len(frames)])
    samples: dict[str, list[float]] = {stage: [] for stage in STAGES}
    invalid, begun = 0, time.perf_counter()
    for index in range(plan.runs):
        if index >= LEAST_RUNS and time.perf_counter() - begun > plan.seconds:
            break
        prediction = session.predict(frames[index % len(frames)])
        invalid += not prediction.valid
        for stage, values in samples.items():
            values.append(getattr(prediction.timings, stage))
    return {
        "samples_ms": samples,
        "golden": golden.to_json(),
        "invalid": invalid,
        "verified": session.verified,
        "description": session.description,
        "startup_ms": dict(session.startup),
        "conditions": look().to_json(),
    }


def main(arguments: Sequence[str]) -> int:
    """What the process does; prints one line of JSON.

    Args:
        arguments: one text of JSON, as ``visit`` writes it.
    """
    from tinyusfm_runtime.device.machine import pin

    job = json.loads(arguments[0])
    pin(job["cpus"] or None)
    from tinyusfm_export.verify.sector import masked_frames
    from tinyusfm_runtime.session import Session
    from tinyusfm_runtime.sources import open_source

    plan = VisitPlan(source=job["source"], runs=job["runs"], seconds=job["seconds"])
    try:
        with open_source(plan.source) as opened:
            frames = list(itertools.islice(opened, MAX_FRAMES))
        if not frames:
            print(json.dumps({"error": "the source gave no frame"}))
            return 0
        with Session.open(
            job["bundle"], target=job["target"], precision=job["precision"], threads=job["threads"],
            allow_unverified=True,
        ) as session:  # fmt: skip
            # both artefacts of a bundle with a sector see the same: nothing outside it
            found = measure(session, masked_frames(frames, session.spec), plan)
    except EdgeError as error:
        found = {"error": " ".join(str(error).split())}
    print(json.dumps(found))
    return 0


__all__ = ["LEAST_RUNS", "MAX_FRAMES", "TIMEOUT_S", "WARM_UP", "VisitPlan", "main", "measure", "visit"]

if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
