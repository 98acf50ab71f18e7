"""Which quantization decision is fastest and still right: the accuracy-latency frontier of one student.

``python benchmarks/frontier.py --data DIR`` builds every variant of the decision (which layers, which ranges, which
form), compares each with the PyTorch float32 reference on the validation split and on phantoms, times all of them
beside eager PyTorch and stock ONNX Runtime in interleaved rounds on one thread, and prints a table, fastest first, and
one JSON line. ``*`` marks the frontier: nothing that holds the gate is both faster and closer.

``--clock cpu`` counts CPU time in place of wall time, which a busy machine spoils less (one thread only). Everything
runs in this process; bench_engines.py, with a process per engine, has the figures to quote.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from bench_engines import load
from prepare import CALIBRATION_SEED, FIRST_SEED
from rivals import write_stock_onnx
from tinyusfm_calibration.methods import find_range
from tinyusfm_calibration.ranges import Observer, Ranges
from tinyusfm_calibration.sets import NamedFrame, phantom_frames
from tinyusfm_edge.models.checkpoint import LoadedStudent
from tinyusfm_export.graph.build import ExportGraph, build_graph
from tinyusfm_export.quantize.decision import QuantDecision
from tinyusfm_export.quantize.ptq import PtqPolicy, activation_taps, decide
from tinyusfm_export.verify.artefact import compare_outputs, load_target
from tinyusfm_export.verify.engine_run import open_engine, run_engine
from tinyusfm_export.verify.expected import Expected, expect
from tinyusfm_export.verify.gate import Gate
from tinyusfm_export.verify.gate_frames import GateFrames
from tinyusfm_export.verify.reference import reference_mode, run_reference
from tinyusfm_runtime.device.machine import machine_card
from tinyusfm_runtime.numerics.order import wide
from tinyusfm_runtime.numerics.preprocess import preprocess
from tinyusfm_runtime.spec import ModelSpec

METHODS = ("minmax", "percentile", "mse", "entropy")
POLICIES: dict[str, PtqPolicy] = {
    "": PtqPolicy(),
    "symmetric": PtqPolicy(symmetric=True),
    "decoder float": PtqPolicy(decoder=False),
    "classifier float": PtqPolicy(keep_float=("head.classifier.*",)),
    "qkv float": PtqPolicy(keep_float=("*.qkv",)),
    "proj float": PtqPolicy(keep_float=("*.proj",)),
    "fc1 float": PtqPolicy(keep_float=("*.fc1",)),
    "fc2 float": PtqPolicy(keep_float=("*.fc2",)),
    "everything": PtqPolicy(layers=("*",)),
    "rest f32": PtqPolicy(rest_precision="f32"),
}
"""Every policy is tried with the ranges of ``--method``, the default one with all ranges."""
SHOWN = ("dice_mean", "dice_worst", "hc_p95_mm", "hc_max_mm", "logit_max_abs")
RUNS_OF_WARM_UP = 2

Runner = Callable[[np.ndarray], object]
Variants = dict[str, tuple[str, QuantDecision]]


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    options = parse(argv)
    loaded, _ = load(options.student)
    graph = build_graph(loaded.module, loaded.spec)
    ranges = collect(graph, options.data, options.calibration)
    ranges |= {"shipped": loaded.ranges} if loaded.ranges else {}
    variants = choose(make_variants(graph, ranges, options.method), options)
    sets = reference_sets(loaded, options)
    rows: dict[str, dict[str, Any]] = {name: {} for name in variants}
    with ExitStack() as stack, tempfile.TemporaryDirectory(prefix="tinyusfm-frontier-") as folder:
        runners = rivals(loaded, Path(folder), stack)
        for name, (target, decision) in variants.items():
            out = Path(folder) / name.replace(" ", "_")
            out.mkdir()
            built = load_target(target).build(graph, decision, out)
            files = {path.name: path.read_bytes() for path in built.files}
            config = {"threads": 1, "rest_precision": built.rest_precision}
            engine = stack.enter_context(open_engine(target, files, loaded.spec, **config))
            rows[name] = agreement(engine, loaded.spec, sets)
            rows[name] |= {"megabytes": sum(map(len, files.values())) / 1e6, "form": built.form}
            runners[name] = engine.run
            print(f"# {name}: {json.dumps(rows[name]['sets'])}", flush=True)
        tensors = [tensor for tensor, _ in next(iter(sets.values())).inputs[:8]]
        samples = measure(runners, tensors, options)
    report(rows, samples, options)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description="accuracy-latency frontier of the quantization decision, one thread")
    parser.add_argument("--student", default="fetal-head", help="shipped student or student file")
    parser.add_argument("--data", type=Path, default=None, help="labelled folder; its train split calibrates")
    parser.add_argument("--calibration", type=int, default=64, help="calibration frames")
    parser.add_argument("--frames", type=int, default=64, help="frames of each set that agreement is measured on")
    parser.add_argument("--method", default="mse", choices=METHODS, help="ranges used with the policies")
    parser.add_argument("--only", default="", help="comma-separated words: measure the rivals and what matches")
    parser.add_argument("--rounds", type=int, default=10, help="interleaved rounds")
    parser.add_argument("--runs", type=int, default=10, help="timed runs a round and engine")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="what is counted")
    parser.add_argument("--out", type=Path, default=None, help="JSON file for everything, raw samples included")
    return parser.parse_args(argv)


def collect(graph: ExportGraph, data: Path | None, count: int) -> dict[str, Ranges]:
    """Ranges by method, over frames spread evenly through the training split, or over phantoms."""
    if data is None:
        frames = [named.frame for named in phantom_frames(range(CALIBRATION_SEED, CALIBRATION_SEED + count))]
    else:
        from tinyusfm_edge.data.table import read_table

        samples = read_table(data, "train")
        frames = [samples[i].frame for i in np.linspace(0, len(samples) - 1, min(count, len(samples))).astype(int)]
    observer, taps = Observer(), activation_taps(graph)
    for frame in frames:
        observer.add(taps(preprocess(frame, graph.spec.preprocess)[0]))
    return {
        method: Ranges(
            tensors={name: find_range(found, method) for name, found in observer.histograms.items()},
            method=method,
            set_id=f"frontier-{len(frames)}",
            frame_sha256=("0" * 64,),
        )
        for method in METHODS
    }


def make_variants(graph: ExportGraph, ranges: Mapping[str, Ranges], method: str) -> Variants:
    """Name -> target and decision."""
    floats = ("fp32", "bf16") if machine_card().has_bf16 else ("fp32",)
    variants: Variants = {f"ov {precision}": ("openvino", decide(graph, precision)) for precision in floats}
    for name, found in ranges.items():
        variants[f"ov int8 {name}"] = ("openvino", decide(graph, "int8", found))
    for words, policy in POLICIES.items():
        if words:
            variants[f"ov int8 {method} {words}"] = ("openvino", decide(graph, "int8", ranges[method], policy=policy))
    variants["ort fp32 ours"] = ("onnx", decide(graph, "fp32"))
    for words in ("", "decoder float"):
        decision = decide(graph, "int8", ranges[method], policy=POLICIES[words])
        variants[f"ort int8 {method} {words}".strip()] = ("onnx", decision)
    return variants


def choose(variants: Variants, options: argparse.Namespace) -> Variants:
    """The variants whose names hold one of the words."""
    return {name: value for name, value in variants.items() if any(word in name for word in options.only.split(","))}


def reference_sets(loaded: LoadedStudent, options: argparse.Namespace) -> dict[str, Expected]:
    """The live reference's answers on the validation split (with data) and on phantoms."""
    phantoms = phantom_frames(range(FIRST_SEED, FIRST_SEED + options.frames))
    frames = {"phantom": GateFrames(kind="phantom", frames=tuple(phantoms))}
    if options.data is not None:
        from tinyusfm_edge.data.table import read_table

        samples = read_table(options.data, "val", limit=options.frames)
        named = tuple(NamedFrame(id=sample.id, frame=sample.frame) for sample in samples)
        frames = {"val": GateFrames(kind="data", frames=named), **frames}
    return {name: expect(loaded.module, loaded.spec, found) for name, found in frames.items()}


def agreement(engine: Any, spec: ModelSpec, sets: Mapping[str, Expected]) -> dict[str, Any]:
    """Statistics on every set, and whether the gate holds on all."""
    found: dict[str, Any] = {"sets": {}, "gate": True}
    for name, expected in sets.items():
        outputs = run_engine(engine, spec, expected.inputs)
        verdict = compare_outputs(spec, expected, outputs, Gate(), engine.description, precision="int8")
        statistics = verdict.comparison.statistics
        found["sets"][name] = {key: round(float(statistics[key]), 5) for key in SHOWN if key in statistics}
        found["gate"] &= bool(verdict)
    return found


def rivals(loaded: LoadedStudent, folder: Path, stack: ExitStack) -> dict[str, Runner]:
    """Eager PyTorch and the unchanged network in ONNX Runtime float32, one thread each; both normalise."""
    import torch

    from tinyusfm_runtime.engines.ort import import_onnxruntime

    onnxruntime = import_onnxruntime()

    torch.set_num_threads(1)
    stack.enter_context(reference_mode(loaded.module))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    stock = write_stock_onnx(loaded.module, loaded.spec, folder)
    session = onnxruntime.InferenceSession(str(stock), options, providers=["CPUExecutionProvider"])
    name, pre = session.get_inputs()[0].name, loaded.spec.preprocess
    mean, std = (np.array(v, np.float32).reshape(1, 3, 1, 1) for v in (pre.mean, pre.std))

    def stock_run(tensor: np.ndarray) -> object:
        return session.run(None, {name: (tensor.astype(np.float32) / np.float32(255) - mean) / std})

    return {"eager": lambda tensor: run_reference(loaded.module, loaded.spec, tensor), "ort fp32 stock": stock_run}


def measure(runners: Mapping[str, Runner], tensors: Sequence[np.ndarray], options: argparse.Namespace) -> Any:
    """Name -> (rounds, runs) samples in ms; every runner once a round, in an order that changes."""
    clock = time.process_time_ns if options.clock == "cpu" else time.perf_counter_ns
    order, names = np.random.default_rng(0), list(runners)
    samples: dict[str, list[list[float]]] = {name: [] for name in names}
    for _ in range(options.rounds):
        for index in order.permutation(len(names)):
            run, taken = runners[names[index]], []
            for i in range(RUNS_OF_WARM_UP + options.runs):
                start = clock()
                run(tensors[i % len(tensors)])
                taken.append((clock() - start) / 1e6)
            samples[names[index]].append(taken[RUNS_OF_WARM_UP:])
    return {name: np.array(found) for name, found in samples.items()}


def report(rows: dict[str, dict[str, Any]], samples: Mapping[str, np.ndarray], options: argparse.Namespace) -> None:
    """Prints the table, fastest first, and the JSON line; writes everything to ``--out``."""
    middle = {name: np.median(wide(found), axis=1) for name, found in samples.items()}
    table: dict[str, dict[str, Any]] = {}
    for name, per_round in middle.items():
        row = {
            "p50_ms": float(np.median(wide(samples[name]))),
            "min_ms": float(samples[name].min()),
            **rows.get(name, {}),
        }
        row |= {
            f"x {rival}": float(np.median(wide(middle[rival] / per_round))) for rival in ("eager", "ort fp32 stock")
        }
        table[name] = row
    ranked = sorted(table, key=lambda name: -table[name]["x ort fp32 stock"])
    closest = -1.0
    print(
        f"{'':2}{'variant':32} {'p50':>6} {'min':>6} {'x eager':>7} {'x ort':>6} {'gate':>6}  Dice mean/worst, HC p95"
    )
    for name in ranked:
        row = table[name]
        sets = row.get("sets", {})
        worst = min((found.get("dice_mean", 0.0) for found in sets.values()), default=0.0)
        row["frontier"] = bool(row.get("gate")) and worst > closest
        closest = max(closest, worst) if row["frontier"] else closest
        shown = "; ".join(
            f"{key} {s.get('dice_mean', 0):.4f}/{s.get('dice_worst', 0):.4f}, {s.get('hc_p95_mm', 0):.2f} mm"
            for key, s in sets.items()
        )
        gate = {True: "holds", False: "MISSED", None: "-"}[row.get("gate")]
        print(
            f"{'* ' if row['frontier'] else '  '}{name:32} {row['p50_ms']:6.2f} {row['min_ms']:6.2f}"
            f" {row['x eager']:7.2f} {row['x ort fp32 stock']:6.2f} {gate:>6}  {shown}"
        )
    result = {"machine": machine_card().to_json(), "options": {k: str(v) for k, v in vars(options).items()}}
    print(json.dumps({**result, "table": table}))
    if options.out is not None:
        raw = {name: found.tolist() for name, found in samples.items()}
        options.out.write_text(json.dumps({**result, "table": table, "samples_ms": raw}) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
