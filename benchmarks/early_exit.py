"""What early exits save: a chain beside itself run to its end, frame by frame, with every sample kept.

``python benchmarks/early_exit.py lesion.bundle --frames folder:IMAGES --count 60 --out early.json`` opens each artefact
of a bundle twice in one process, once stopping early and once at full depth. In every round both answer every
frame, in a shuffled order and the two sides of a frame one after the other, the first by lot. Wall time is what a user
waits; CPU time leaves out other programs on the same cores. Work is counted, not timed: stage runs times the products
of each stage. It judges no accuracy (the gate and ``evaluate`` do).
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tinyusfm_runtime.bundle.reader import Bundle
from tinyusfm_runtime.device.machine import machine_card
from tinyusfm_runtime.early_exit import exit_names
from tinyusfm_runtime.errors import InputError
from tinyusfm_runtime.frame import Frame
from tinyusfm_runtime.numerics.order import wide
from tinyusfm_runtime.results import Prediction
from tinyusfm_runtime.session import Session
from tinyusfm_runtime.sources import open_source
from tinyusfm_runtime.spec import ModelSpec

VERSION = 1
"""Of the JSON."""
SIDES = ("early", "full")
"""Stopping early, and run to the end."""
PERCENTILES = (50, 90, 99)


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One answer.

    Attributes:
        frame: its place among the frames.
        round: counted from 0.
        side: ``early`` or ``full``.
        exit_index: which exit answered.
        wall_ms: tensor to answer.
        cpu_ms: CPU time of the whole process meanwhile.
    """

    frame: int
    round: int
    side: str
    exit_index: int
    wall_ms: float
    cpu_ms: float


def take(
    sides: Mapping[str, Callable[[Frame], Prediction]], frames: Sequence[Frame], *, rounds: int, seed: int = 0
) -> list[Sample]:
    """Every frame once a round on both sides, neighbours in time.

    Args:
        sides: ``early`` and ``full``.
        frames: at least one.
        rounds: at least one.
        seed: of the order.

    Raises:
        InputError: nothing to measure, or an answer of something that is no chain.
    """
    if not frames or rounds < 1:
        raise InputError("at least one frame and one round are needed")
    rng, found = random.Random(seed), []
    for number in range(rounds):
        order = list(range(len(frames)))
        rng.shuffle(order)
        for index in order:
            turn = list(sides)
            rng.shuffle(turn)
            for side in turn:
                before = time.process_time_ns()
                prediction = sides[side](frames[index])
                cpu_ms = (time.process_time_ns() - before) / 1e6
                if prediction.exit_index is None:
                    raise InputError("this artefact is no chain of early exits: export a student that has some")
                found.append(
                    Sample(
                        frame=index,
                        round=number,
                        side=side,
                        exit_index=prediction.exit_index,
                        wall_ms=prediction.timings.total_ms,
                        cpu_ms=cpu_ms,
                    )
                )
    return found


def summarise(samples: Sequence[Sample], products: Sequence[int]) -> dict[str, Any]:
    """Percentiles of each side, how often each exit answered, and the work saved.

    Args:
        samples: of both sides.
        products: multiply-accumulates of each stage.

    Returns:
        ``exits`` counts the frames of one round, ``work_share`` is the early side's part of the full side's products,
        ``ratio_*`` are medians over rounds of a frame's early time / its full time, by the exit that answered.
    """
    of = {side: [sample for sample in samples if sample.side == side] for side in SIDES}
    report: dict[str, Any] = {}
    for side, clock in itertools.product(SIDES, ("wall_ms", "cpu_ms")):
        values = [getattr(sample, clock) for sample in of[side]]
        report[f"{side}_{clock}"] = {f"p{p}": float(np.percentile(wide(values), p)) for p in PERCENTILES} | {
            "mean": float(np.mean(values))
        }
    first = [sample.exit_index for sample in of["early"] if sample.round == 0]
    report["exits"] = [first.count(index) for index in range(len(products))]
    done = np.cumsum(products)
    report["products"] = list(products)
    report["work_share"] = float(np.mean([done[index] for index in first]) / done[-1])
    for clock in ("wall_ms", "cpu_ms"):
        full = {(s.frame, s.round): getattr(s, clock) for s in of["full"]}
        pairs = [(s.exit_index, getattr(s, clock) / max(full[s.frame, s.round], 1e-6)) for s in of["early"]]
        by_exit = [[ratio for index, ratio in pairs if index == wanted] for wanted in range(len(products))]
        report[f"ratio_{clock}"] = [float(np.median(wide(ratios))) if ratios else None for ratios in by_exit]
        totals = [sum(getattr(s, clock) for s in of[side]) for side in SIDES]
        report[f"saved_{clock}"] = 1.0 - totals[0] / totals[1]
    return report


def products_of(spec: ModelSpec) -> list[int]:
    """Multiply-accumulates of each stage, from the architecture alone.

    Args:
        spec: of a student with early exits.
    """
    from tinyusfm_edge.models.student import StudentConfig, build_student
    from tinyusfm_export.graph.build import build_graph
    from tinyusfm_export.graph.stages import stage_products

    return stage_products(build_graph(build_student(StudentConfig.from_json(spec.architecture)).eval(), spec))


def print_report(name: str, report: Mapping[str, Any], names: Sequence[str]) -> None:
    """A few lines for people."""
    counts = ", ".join(f"{exit_name} {count}" for exit_name, count in zip(names, report["exits"], strict=True))
    print(f"{name}: answered at {counts}; work {report['work_share']:.3f} of full depth")
    for clock in ("cpu_ms", "wall_ms"):
        for side in SIDES:
            found = report[f"{side}_{clock}"]
            print(f"  {side:<6}{clock:<9}" + "  ".join(f"{key} {value:.2f}" for key, value in found.items()))
        ratios = ", ".join("-" if ratio is None else f"{ratio:.3f}" for ratio in report[f"ratio_{clock}"])
        print(f"  saved {100 * report[f'saved_{clock}']:.1f} % of {clock}; early / full by exit: {ratios}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--frames", default="phantom:0-31", help="a source, as for tinyusfm-edge run")
    parser.add_argument("--count", type=int, default=60, help="frames at most, spread evenly over the source")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="JSON with all samples")
    options = parser.parse_args(arguments)
    bundle = Bundle.open(options.bundle)
    spec = bundle.manifest.spec
    if spec.exits is None:
        raise SystemExit("the bundle's model has no early exits")
    with open_source(options.frames) as source:
        everything = list(source)
    chosen = np.unique(np.linspace(0, len(everything) - 1, min(options.count, len(everything))).astype(int))
    frames = [everything[index] for index in chosen]
    products, reports = products_of(spec), {}
    for artefact in bundle.manifest.artefacts:
        target = {"target": artefact.target, "precision": artefact.precision, "threads": options.threads}
        with Session.open(bundle, **target) as early, Session.open(bundle, **target, full_depth=True) as full:
            samples = take({"early": early.predict, "full": full.predict}, frames, rounds=options.rounds)
        reports[artefact.name] = summarise(samples, products)
        print_report(artefact.name, reports[artefact.name], exit_names(spec.exits))
        reports[artefact.name]["samples"] = [asdict(sample) for sample in samples]
    if options.out is not None:
        card = {"version": VERSION, "command": sys.argv[1:], "machine": machine_card().to_json(), "frames": len(frames)}
        options.out.write_text(json.dumps({**card, "artefacts": reports}) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
