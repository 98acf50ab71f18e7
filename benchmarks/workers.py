"""The benchmark's side of the workers: start them, take interleaved rounds, collect their answers.

It speaks the workers' language (engine_worker.py) and knows no engine.

Shapes: SKHW logits.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from rounds import MachineNoise, NoiseMeter, Samples, Statistics, interleave, quiet_rounds, slowdowns, statistics
from tinyusfm_runtime.numerics.order import wide

SCRIPT = Path(__file__).resolve().parent / "engine_worker.py"
WARM = 4
"""Runs before the timed ones of each block."""

Job = dict[str, Any]
"""What a worker is started with, see engine_worker.py."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """Rounds of some workers.

    Attributes:
        statistics: worker -> figures.
        cards: worker -> what it says of itself.
        noise: what else the machine did.
        slowdowns: of each round.
        quiet: indices of the quiet rounds.
        stages_ms: worker -> stage -> samples.
    """

    statistics: dict[str, Statistics]
    cards: dict[str, dict[str, Any]]
    noise: MachineNoise
    slowdowns: list[float]
    quiet: list[int]
    stages_ms: dict[str, dict[str, Samples]]

    def stage_medians(self) -> dict[str, dict[str, float]]:
        """Worker -> stage -> median over the quiet rounds, ms."""
        return {
            name: {stage: float(np.median(wide([blocks[i] for i in self.quiet]))) for stage, blocks in stages.items()}
            for name, stages in self.stages_ms.items()
        }

    def to_json(self, *, samples: bool) -> dict[str, Any]:
        """Plain data, with or without the raw samples."""
        plain = asdict(self)
        if not samples:
            del plain["stages_ms"]
        return plain


class Worker:
    """One engine's process."""

    def __init__(self, name: str, job: Job) -> None:
        self.name = name
        command = [sys.executable, str(SCRIPT), json.dumps(job)]
        # a worker finds what this process finds, installed or not
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
        self.card = self.ask(do="card")

    def ask(self, **request: Any) -> dict[str, Any]:
        """Sends one request and waits for the answer.

        Raises:
            SystemExit: the worker ended; its own message stands above.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise SystemExit(f"the worker {self.name} ended") from None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"the worker {self.name} ended")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """Ends the process."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(timeout=30)
        self._process.stdout.close()


@contextmanager
def started(jobs: Mapping[str, Job]) -> Iterator[dict[str, Worker]]:
    """Starts a worker for each job and ends them all afterwards."""
    workers: dict[str, Worker] = {}
    try:
        for name, job in jobs.items():
            workers[name] = Worker(name, job)
        yield workers
    finally:
        for worker in workers.values():
            worker.close()


def measure(workers: Mapping[str, Worker], rivals: Sequence[str], *, rounds: int, runs: int, seed: int) -> Measured:
    """Takes the rounds.

    Args:
        workers: all alive.
        rivals: workers that the others are compared with.
        rounds: interleaved rounds.
        runs: timed runs a round and worker.
        seed: of the order inside the rounds.
    """
    stages: dict[str, dict[str, Samples]] = {name: {} for name in workers}

    def block(name: str) -> list[float]:
        answer = workers[name].ask(do="time", warm=WARM, runs=runs)
        for stage, values in answer.items():
            stages[name].setdefault(stage, []).append(values)
        # the last stage is the whole
        return list(answer[list(answer)[-1]])

    def cpu_seconds() -> float:
        return time.process_time() + sum(float(worker.ask(do="cpu")["seconds"]) for worker in workers.values())

    meter = NoiseMeter(cpu_seconds)
    samples = interleave({name: partial(block, name) for name in workers}, rounds=rounds, seed=seed)
    noise = meter.stop()
    return Measured(
        statistics=statistics(samples, rivals),
        cards={name: worker.ask(do="card") for name, worker in workers.items()},
        noise=noise,
        slowdowns=slowdowns(samples),
        quiet=quiet_rounds(samples),
        stages_ms=stages,
    )


def collect_logits(workers: Mapping[str, Worker], folder: Path) -> dict[str, np.ndarray]:
    """Worker -> logits SKHW of all frames, passed through files in ``folder``."""
    found = {}
    for index, (name, worker) in enumerate(workers.items()):
        path = folder / f"logits{index}.npz"
        worker.ask(do="answers", out=str(path))
        with np.load(path, allow_pickle=False) as arrays:
            found[name] = arrays["logits"]
    return found


__all__ = ["SCRIPT", "WARM", "Job", "Measured", "Worker", "collect_logits", "measure", "started"]
