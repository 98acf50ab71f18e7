"""What listening for drift costs: the shipped student with and without auxiliary outputs, and the monitor itself.

``python benchmarks/drift_cost.py [--rounds 9] [--runs 12]`` builds each artefact twice, with and without the outputs
that the drift statistic reads, runs both interleaved on one thread, and prints medians of CPU time (other programs
waiting for the same cores do not count) and of its ratio inside a round; then it times ``DriftMonitor.observe`` on
one frame. It judges no accuracy.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

import rounds
from tinyusfm_edge import students
from tinyusfm_export.graph.build import build_graph
from tinyusfm_export.quantize.ptq import PtqPolicy, decide
from tinyusfm_export.verify.artefact import load_target
from tinyusfm_export.verify.engine_run import open_engine
from tinyusfm_runtime import plugins
from tinyusfm_runtime.drift import DriftMonitor
from tinyusfm_runtime.errors import InputError
from tinyusfm_runtime.numerics.order import wide
from tinyusfm_runtime.numerics.preprocess import preprocess
from tinyusfm_runtime.phantom import make_phantom

STUDENT = "fetal-head"


def block(engine: Any, tensor: np.ndarray, runs: int) -> list[float]:
    """CPU times of some runs in a row, all threads together, ms."""
    times = []
    for _ in range(runs):
        start = time.process_time_ns()
        engine.run(tensor)
        times.append((time.process_time_ns() - start) / 1e6)
    return times


def observe_ms(statistic: Any, auxiliary: dict[str, np.ndarray], height: int, width: int) -> float:
    """Median time of the monitor on a frame of some size, ms."""
    monitor = DriftMonitor(statistic, tuple(auxiliary))
    frame = make_phantom(1, height=height, width=width).frame
    prediction: Any = SimpleNamespace(auxiliary=auxiliary, valid=True, drift=None)
    times = []
    for _ in range(50):
        start = time.process_time_ns()
        monitor.observe(prediction, frame)
        times.append((time.process_time_ns() - start) / 1e6)
    return float(np.median(wide(times)))


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--runs", type=int, default=12)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    loaded, statistic = students.load(STUDENT), students.drift(STUDENT)
    if statistic is None:
        raise InputError(f"{STUDENT} has no drift statistic")
    graphs = {
        "without": build_graph(loaded.module, loaded.spec),
        "with": build_graph(loaded.module, loaded.spec, auxiliary=statistic.auxiliary),
    }
    tensor = preprocess(make_phantom(1).frame, loaded.spec.preprocess)[0]
    found = []
    with ExitStack() as stack:
        workers: dict[str, Callable[[], list[float]]] = {}
        auxiliary: dict[str, np.ndarray] = {}
        for target in ("ov", "ort"):
            for precision in ("int8", "fp32"):
                for kind, graph in graphs.items():
                    decision = decide(graph, precision, loaded.ranges, policy=PtqPolicy(rest_precision="f32"))
                    with tempfile.TemporaryDirectory() as folder:
                        built = load_target(target).build(graph, decision, Path(folder))
                        files = {path.name: path.read_bytes() for path in built.files}
                    engine = stack.enter_context(
                        open_engine(target, files, graph.spec, threads=1, rest_precision=built.rest_precision)
                    )
                    block(engine, tensor, 5)
                    name = f"{plugins.public_name(target)} {precision} {kind}"
                    workers[name] = lambda engine=engine: block(engine, tensor, options.runs)  # type: ignore[misc]
                    if kind == "with":
                        auxiliary = {n: np.array(v) for n, v in engine.run(tensor).items() if n != "logits"}
        samples = rounds.interleave(workers, rounds=options.rounds, seed=0)
        for name in [name.removesuffix(" without") for name in workers if name.endswith(" without")]:
            ratios = [
                float(np.median(wide(b)) / np.median(wide(a)))
                for a, b in zip(samples[f"{name} without"], samples[f"{name} with"], strict=True)
            ]
            middle, low, high = np.percentile(wide(ratios), (50, 10, 90))
            p50 = float(np.median(wide(np.concatenate(samples[f"{name} without"]))))
            found.append({"artefact": name, "cpu_p50_ms": p50, "ratio": middle, "p10": low, "p90": high})
            print(f"{name:<16} {p50:7.2f} ms of CPU, with the outputs x {middle:.3f} ({low:.3f} to {high:.3f})")
    for height, width in ((256, 384), (1080, 1920)):
        taken = observe_ms(statistic, auxiliary, height, width)
        found.append({"artefact": f"monitor {width}x{height}", "cpu_p50_ms": taken})
        print(f"monitor on {width}x{height}: {taken:.2f} ms of CPU")
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
