"""Latency: how long a session takes, stage by stage, with every raw sample.

``profile`` measures a warm session in this process and a cold start in a fresh one. It reports
percentiles and keeps the raw samples, so that those can be recomputed. A cold start here
means a new process: the operating system may still hold the files in memory. It compares nothing
and judges nothing; benchmarks/ do.

``python -m tinyusfm_runtime.latency --cold BUNDLE`` does one cold start and prints one line of JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tinyusfm_runtime.device.circumstances import circumstances
from tinyusfm_runtime.device.machine import machine_card
from tinyusfm_runtime.errors import EdgeError, EngineError, InputError
from tinyusfm_runtime.numerics.order import wide
from tinyusfm_runtime.profiling.quantiles import quantile

if TYPE_CHECKING:
    from tinyusfm_runtime.frame import Frame
    from tinyusfm_runtime.session import Session

LATENCY_VERSION = 2
"""Version of the JSON that ``LatencyReport.to_json`` writes."""
STAGES = ("preprocess_ms", "infer_ms", "postprocess_ms", "total_ms")
"""Stages of one prediction, as in session.Timings."""
PERCENTILES = (50, 90, 99)
"""Percentiles reported, interpolated linearly between neighbouring samples."""
COLD_TIMEOUT_S = 300
"""A cold start that takes longer has hung."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ColdStart:
    """One start in a fresh process, ms.

    Attributes:
        import_ms: importing the runtime (numpy included).
        startup_ms: stage of ``Session.open`` -> ms: verify_hashes, load (library import included), first_frame, golden,
            warm_up.
        cold_load_ms: ``Session.open`` as a whole.
        process_ms: from asking for the process to its end.
    """

    import_ms: float
    startup_ms: Mapping[str, float]
    cold_load_ms: float
    process_ms: float

    @property
    def first_frame_ms(self) -> float:
        """The very first frame through the freshly loaded engine."""
        return self.startup_ms["first_frame"]


@dataclass(frozen=True, kw_only=True, slots=True)
class LatencyReport:
    """What ``profile`` measured.

    True if there are samples and every prediction was valid.

    Attributes:
        description: artefact and engine really used.
        threads: threads asked of the engine.
        machine: the machine's card as plain data.
        cold: the cold start, or None if it was not asked for.
        samples_ms: stage -> one time a prediction, in the order they were taken.
        frames: distinct frames used.
        warmup: predictions made and thrown away before.
        invalid: predictions whose outputs were not finite.
        subject: what was timed: bundle, its id, target, precision, engine.
        setup: system, tools, governor, power mode and date, see device/circumstances.py.
        exits: of a chain with early exits, how many predictions each of them answered, the end last; else empty.
    """

    description: str
    threads: int
    machine: Mapping[str, Any]
    cold: ColdStart | None
    samples_ms: Mapping[str, tuple[float, ...]]
    frames: int
    warmup: int
    invalid: int
    exits: tuple[int, ...] = ()
    subject: Mapping[str, str] = field(default_factory=dict)
    setup: Mapping[str, Any] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return self.n > 0 and self.invalid == 0

    @property
    def n(self) -> int:
        """Predictions measured."""
        return len(self.samples_ms["total_ms"])

    @property
    def cold_load_ms(self) -> float | None:
        """``Session.open`` in a fresh process, or None."""
        return None if self.cold is None else self.cold.cold_load_ms

    @property
    def first_frame_ms(self) -> float | None:
        """First frame in a fresh process, or None."""
        return None if self.cold is None else self.cold.first_frame_ms

    def percentile(self, stage: str, percent: float) -> float:
        """One percentile of one stage, ms."""
        return float(np.percentile(wide(self.samples_ms[stage]), percent))

    def percentile_text(self, stage: str, percent: float) -> str:
        """One percentile of one stage in ms, or how many samples it needs."""
        found = quantile(self.samples_ms[stage], percent)
        return f"needs {found.needed} samples" if found.value is None else _ms(found.value)

    def to_json(self) -> dict[str, Any]:
        """Plain data with all samples, ready for ``json.dumps``."""
        cold = None
        if self.cold is not None:
            cold = {
                "import_ms": self.cold.import_ms,
                "startup_ms": dict(self.cold.startup_ms),
                "cold_load_ms": self.cold.cold_load_ms,
                "first_frame_ms": self.cold.first_frame_ms,
                "process_ms": self.cold.process_ms,
            }
        stages = {s: {f"p{p}": self.percentile(s, p) for p in PERCENTILES} for s in STAGES} if self.n else {}
        return {
            "version": LATENCY_VERSION,
            "description": self.description,
            "threads": self.threads,
            "machine": dict(self.machine),
            "subject": dict(self.subject),
            "setup": dict(self.setup),
            "n": self.n,
            "frames": self.frames,
            "warmup": self.warmup,
            "invalid": self.invalid,
            "exits": list(self.exits),
            "cold": cold,
            "stages": stages,
            "samples_ms": {stage: list(samples) for stage, samples in self.samples_ms.items()},
        }

    def table(self) -> list[tuple[str, str, str, str]]:
        """Rows (stage, p50, p90, p99), all ms; the cold start's stages have one value.

        A percentile that the sample cannot support is not printed.
        """
        rows = []
        if self.cold is not None:
            rows.append(("cold load", _ms(self.cold.cold_load_ms), "", ""))
            rows += [(f"  {stage.replace('_', ' ')}", _ms(ms), "", "") for stage, ms in self.cold.startup_ms.items()]
        for stage in STAGES if self.n else ():
            p50, p90, p99 = (self.percentile_text(stage, percent) for percent in PERCENTILES)
            rows.append((stage.removesuffix("_ms"), p50, p90, p99))
        return rows


def profile(
    session: Session, frames: Sequence[Frame], *, rounds: int = 10, warmup: int = 5, cold: bool = True
) -> LatencyReport:
    """Measures a session.

    Args:
        session: an open session.
        frames: frames to answer for, at least one.
        rounds: how often each frame is answered for.
        warmup: predictions made first and thrown away.
        cold: also start a fresh process on the same bundle, artefact and threads.

    Returns:
        The report; ``rounds * len(frames)`` samples per stage.

    Raises:
        InputError: no frames, or no rounds.
        EngineError: the engine failed, or the fresh process did.
    """
    if not frames or rounds < 1 or warmup < 0:
        raise InputError("profiling needs at least one frame, at least one round, and no negative warm-up")
    started = cold_start_of(session) if cold else None
    for i in range(warmup):
        session.predict(frames[i % len(frames)])
    samples: dict[str, list[float]] = {stage: [] for stage in STAGES}
    invalid = 0
    stopped: list[int] = []
    for _ in range(rounds):
        for frame in frames:
            prediction = session.predict(frame)
            invalid += not prediction.valid
            stopped += [] if prediction.exit_index is None else [prediction.exit_index]
            for stage, values in samples.items():
                values.append(getattr(prediction.timings, stage))
    exits = len(session.spec.exits.blocks) + 1 if stopped and session.spec.exits is not None else 0
    return LatencyReport(
        description=session.description,
        threads=session.threads,
        machine=machine_card().to_json(),
        cold=started,
        samples_ms={stage: tuple(values) for stage, values in samples.items()},
        frames=len(frames),
        warmup=warmup,
        invalid=invalid,
        exits=tuple(stopped.count(index) for index in range(exits)),
        subject={
            "bundle": session.path.name,
            "bundle_id": session.manifest.bundle_id,
            "target": session.artefact.target,
            "precision": session.artefact.precision,
            "engine": session.engine_description,
        },
        setup=circumstances(),
    )


def cold_start_of(session: Session) -> ColdStart:
    """Starts a fresh process that opens what this session has open.

    Raises:
        EngineError: the process failed, hung, or printed something else.
    """
    artefact = session.artefact
    return cold_start(
        session.path,
        target=artefact.target,
        precision=artefact.variant,
        threads=session.threads,
        allow_unverified=not artefact.trusted,
        full_depth=session.full_depth,
    )


def cold_start(
    bundle: str | Path,
    *,
    target: str | None = None,
    precision: str | None = None,
    threads: int | None = None,
    allow_unverified: bool = False,
    full_depth: bool = False,
) -> ColdStart:
    """Opens a bundle in a fresh process and reports how long it took.

    Args:
        bundle: the bundle's folder.
        target: as in ``Session.open``.
        precision: as in ``Session.open``.
        threads: as in ``Session.open``.
        allow_unverified: as in ``Session.open``.
        full_depth: as in ``Session.open``.

    Raises:
        EngineError: the process failed, hung, or printed something else.
    """
    options = {
        "target": target, "precision": precision, "threads": threads, "allow_unverified": allow_unverified,
        "full_depth": full_depth,
    }  # fmt: skip
    command = [sys.executable, "-m", "tinyusfm_runtime.latency", "--cold", str(Path(bundle).absolute())]
    # the child finds the same packages, wherever this process found them
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    start = time.perf_counter_ns()
    try:
        done = subprocess.run(
            [*command, json.dumps(options)],
            capture_output=True,
            text=True,
            env=environment,
            timeout=COLD_TIMEOUT_S,
            check=False,
        )
        process_ms = (time.perf_counter_ns() - start) / 1e6
        answer = json.loads(done.stdout.splitlines()[-1])
        if "error" in answer:
            raise EngineError(f"a fresh process could not open the bundle: {answer['error']}")
        return ColdStart(process_ms=process_ms, **answer)
    except (subprocess.TimeoutExpired, OSError) as error:
        raise EngineError(f"a fresh process could not open the bundle: {error}") from error
    except (IndexError, ValueError, TypeError) as error:
        last = (done.stderr.strip().splitlines() or ["it printed nothing"])[-1]
        raise EngineError(f"a fresh process could not open the bundle: {last}") from error


def _cold_main(arguments: Sequence[str]) -> int:
    """What the fresh process does; prints one line of JSON."""
    if len(arguments) not in (2, 3) or arguments[0] != "--cold":
        print(json.dumps({"error": "usage: python -m tinyusfm_runtime.latency --cold BUNDLE [OPTIONS as JSON]"}))
        return 2
    options = json.loads(arguments[2]) if len(arguments) == 3 else {}
    start = time.perf_counter_ns()
    from tinyusfm_runtime.session import Session

    imported = time.perf_counter_ns()
    try:
        with Session.open(arguments[1], **options) as session:
            opened = time.perf_counter_ns()
            startup = dict(session.startup)
    except EdgeError as error:
        print(json.dumps({"error": str(error)}))
        return error.exit_code
    report = {
        "import_ms": (imported - start) / 1e6,
        "startup_ms": startup,
        "cold_load_ms": (opened - imported) / 1e6,
    }
    print(json.dumps(report))
    return 0


def _ms(value: float) -> str:
    return f"{value:.2f}"


__all__ = [
    "COLD_TIMEOUT_S",
    "LATENCY_VERSION",
    "PERCENTILES",
    "STAGES",
    "ColdStart",
    "LatencyReport",
    "cold_start",
    "cold_start_of",
    "profile",
]

if __name__ == "__main__":
    raise SystemExit(_cold_main(sys.argv[1:]))
