"""The integer engine against stock engines on the same student: interleaved, one thread, with the gate's statistics.

``python benchmarks/integer.py --rounds 15`` builds every artefact of the shipped fetal-head student, times them in turn
and prints the ratio to the integer engine, median and range over rounds. Beside each stands how far its logits lie from
the float graph's on phantoms. An instruction set can be forced with ``--isa``.

``--bundle FILE`` measures an exported bundle's integer artefact instead, in fresh processes: import, opening before the
golden frames (limit 60 ms together), memory that both add (25 MB), and frame to reading at 1080p over the network's own
time (1.3).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from tinyusfm_edge import students
from tinyusfm_export.graph.build import build_graph
from tinyusfm_export.quantize.fake_quant import float_net
from tinyusfm_export.quantize.ptq import PtqPolicy, decide
from tinyusfm_export.verify.artefact import load_target
from tinyusfm_export.verify.engine_run import open_engine
from tinyusfm_export.verify.verdict import measure_interleaved
from tinyusfm_runtime.engines import Engine as AnyEngine
from tinyusfm_runtime.engines import EngineConfig
from tinyusfm_runtime.engines.integer import Engine
from tinyusfm_runtime.numerics.order import wide
from tinyusfm_runtime.numerics.preprocess import preprocess
from tinyusfm_runtime.phantom import make_phantom

RIVALS = (("ov", "int8"), ("ort", "int8"), ("ort", "fp32"))
"""Targets and precisions to compare with."""


START = """
import json, sys, time
def held():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 1e6
def now():
    return np.array([time.perf_counter(), time.process_time()])
import numpy as np
memory, begin = held(), now()
from tinyusfm_runtime import session
imported = now()
from tinyusfm_runtime.bundle.reader import Bundle
from tinyusfm_runtime.engines import EngineConfig
bundle = Bundle.open(sys.argv[1])
artefact = next(each for each in bundle.manifest.artefacts if each.target == "integer")
engine = session._load_engine(bundle, artefact, EngineConfig(threads=1, rest_precision="f32"), full_depth=False)
loaded = now()
print(json.dumps([*(1e3 * (imported - begin)), *(1e3 * (loaded - imported)), held() - memory]))
"""
"""What a fresh process does, numpy imported before: import, hashes and engine, in ms of wall and of CPU; MB."""
READING = """
import json, sys, time
import numpy as np
from tinyusfm_runtime.phantom import make_phantom
from tinyusfm_runtime.session import Session
with Session.open(sys.argv[1], target="integer", threads=1, second_pass=False, drift=False) as opened:
    frames = [make_phantom(seed, height=1080, width=1920).frame for seed in range(8)]
    rows = []
    for turn in range(12):
        for frame in frames:
            took = opened.predict(frame).timings
            rows.append((took.total_ms, took.infer_ms))
print(json.dumps(rows[16:]))
"""
"""Frame to reading and the network's part of it, ms."""


def fresh(program: str, bundle: str) -> list[float]:
    """What a program prints in a process of its own."""
    words = [sys.executable, "-c", program, bundle]
    found: list[float] = json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout)
    return found


def measure_bundle(bundle: str, rounds: int) -> None:
    """Start and frame to reading of an exported bundle.

    Args:
        bundle: path.
        rounds: fresh processes for the start.
    """
    starts = np.array([fresh(START, bundle) for _ in range(rounds)])
    for name, column in (("import", 0), ("open", 2)):
        wall, busy = starts[:, column], starts[:, column + 1]
        print(
            f"{name:13s} wall median {np.median(wide(wall)):6.1f} ms, least {wall.min():6.1f}; "
            f"CPU least {busy.min():6.1f} ms"
        )
    print(f"added memory  median {np.median(wide(starts[:, 4])):6.1f} MB")
    rows = np.array(fresh(READING, bundle))
    ratios = rows[:, 0] / rows[:, 1]
    print(
        f"1080p         frame to reading {np.median(wide(rows[:, 0])):.2f} ms, "
        f"network {np.median(wide(rows[:, 1])):.2f} ms"
    )
    print(f"ratio         median {np.median(wide(ratios)):.3f}, p90 {np.percentile(wide(ratios), 90):.3f}")


def main() -> None:
    """Builds, times, prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--isa", default="", help="instruction set of the integer engine; empty: the fastest")
    parser.add_argument("--bundle", help="an exported bundle with an integer artefact: measure its start and readings")
    options = parser.parse_args()
    if options.bundle:
        measure_bundle(options.bundle, options.rounds)
        return
    torch.set_num_threads(1)
    student = students.load("fetal-head")
    graph = build_graph(student.module, student.spec)
    inputs = [preprocess(make_phantom(seed).frame, student.spec.preprocess)[0] for seed in range(8)]
    wanted = [float_net(graph)(tensor)["logits"].copy() for tensor in inputs]
    with ExitStack() as stack:
        engines: dict[str, AnyEngine] = {}
        for target, precision in (("integer", "int8"), *RIVALS):
            decision = decide(graph, precision, student.ranges, policy=PtqPolicy(rest_precision="f32"))
            folder = Path(stack.enter_context(TemporaryDirectory()))
            files = {p.name: p.read_bytes() for p in load_target(target).build(graph, decision, folder).files}
            if target == "integer":
                own = Engine(options.isa)
                own.load(files, student.spec, EngineConfig(threads=1, rest_precision="f32"))
                engines["integer int8"] = own
                stack.callback(own.close)
                continue
            opened = open_engine(target, files, student.spec, threads=1, rest_precision="f32")
            engines[f"{target} {precision}"] = stack.enter_context(opened)
        runners = {name: engine.run for name, engine in engines.items()}
        samples = measure_interleaved(runners, inputs, rounds=options.rounds, runs=6, warm_up=1)
        for name, rounds in samples.items():
            gap = np.mean([np.abs(runners[name](t)["logits"] - w).mean() for t, w in zip(inputs, wanted, strict=True)])
            ratios = [
                np.median(wide(a)) / np.median(wide(b)) for a, b in zip(rounds, samples["integer int8"], strict=True)
            ]
            every = np.concatenate(rounds)
            print(
                f"{name:14s} median {np.median(wide(every)):7.2f} ms, "
                f"p10 {np.percentile(wide(every), 10):7.2f} ms, ratio "
                f"{np.median(wide(ratios)):.2f} ({min(ratios):.2f} to {max(ratios):.2f}), logit error {gap:.3f}, "
                f"{engines[name].description}"
            )


if __name__ == "__main__":
    main()
