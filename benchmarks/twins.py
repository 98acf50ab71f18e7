"""The artefacts of several bundles beside each other, such as a student's and its fast twin's.

    python benchmarks/twins.py fetal-head.bundle fetal-head-fast.bundle --json twins.json

Every artefact of every bundle is opened in one process. In every round each of them answers every frame, in an order
by lot, one look a frame. Where a bundle has artefacts that are pruned to a sector, frames are masked to it, for all
artefacts alike. The table gives how many times as fast as the first bundle's OpenVINO INT8 artefact (else its first
artefact) each one is. It judges no accuracy: that is what each bundle's own gate is for.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from tinyusfm_runtime.bundle.reader import Bundle
from tinyusfm_runtime.device.machine import machine_card
from tinyusfm_runtime.numerics.order import wide
from tinyusfm_runtime.numerics.preprocess import preprocess
from tinyusfm_runtime.phantom import make_phantom
from tinyusfm_runtime.session import Session

BASE = "openvino int8"
"""Artefact of the first bundle that the others are compared with."""
FIRST_SEED = 200
"""Of the phantoms."""


def inputs_of(sessions: Sequence[Session], frames: int) -> list[np.ndarray]:
    """Phantoms as every session takes them, masked to the first sector that one of them was pruned to."""
    sector = next((session.spec.sector for session in sessions if session.spec.sector is not None), None)
    phantoms = [make_phantom(FIRST_SEED + index).frame for index in range(frames)]
    tensors = [preprocess(frame, sessions[0].spec.preprocess)[0] for frame in phantoms]
    return tensors if sector is None else [sector.masked(tensor) for tensor in tensors]


def measure(folders: Sequence[Path], *, frames: int, rounds: int, threads: int) -> dict[str, list[float]]:
    """Medians of each round, ms, of the network alone.

    Args:
        folders: bundles.
        frames: phantoms of a round.
        rounds: how many.
        threads: of each engine.

    Returns:
        ``NAME target variant`` -> a median a round, in the order of the bundles.
    """
    found: dict[str, list[float]] = {}
    sessions: dict[str, Session] = {}
    with ExitStack() as stack:
        for folder in folders:
            for entry in Bundle.open(folder).manifest.artefacts:
                name = f"{folder.name.removesuffix('.bundle')} {entry.target} {entry.variant}"
                sessions[name] = stack.enter_context(
                    Session.open(
                        folder, target=entry.target, precision=entry.variant, threads=threads, second_pass=False
                    )
                )
                found[name] = []
        tensors = inputs_of(list(sessions.values()), frames)
        for number in range(rounds + 1):
            order = list(sessions)
            random.Random(number).shuffle(order)
            for name in order:
                times = [sessions[name].predict_tensor(tensor).timings.infer_ms for tensor in tensors]
                if number:
                    found[name].append(float(np.median(wide(times))))
    return found


def ratios(found: dict[str, list[float]]) -> dict[str, tuple[float, float, float]]:
    """How many times as fast as the base each artefact is: median over rounds, 10th and 90th percentile."""
    base = next((name for name in found if name.endswith(BASE)), next(iter(found)))
    made = {}
    for name, times in found.items():
        shares = np.array(found[base]) / np.array(times)
        made[name] = tuple(float(np.percentile(wide(shares), percent)) for percent in (50, 10, 90))
    return made  # type: ignore[return-value]


def main(argv: Sequence[str] | None = None) -> int:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description="artefacts of several bundles, interleaved")
    parser.add_argument("bundles", type=Path, nargs="+")
    parser.add_argument("--frames", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="file for every round")
    options = parser.parse_args(argv)
    found = measure(options.bundles, frames=options.frames, rounds=options.rounds, threads=options.threads)
    shares = ratios(found)
    for name, times in found.items():
        middle, low, high = shares[name]
        print(f"{name:40} {np.median(wide(times)):7.2f} ms  {middle:5.2f}  ({low:.2f} to {high:.2f})")
    if options.json is not None:
        report = {"machine": machine_card().to_json(), "rounds": found, "ratios": shares}
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
