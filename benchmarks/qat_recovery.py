"""What QAT gives back of what PTQ loses, on real frames, in three settings in which PTQ is made to lose.

``w4``: weights of 4 bits. ``outliers``: 8-bit weights, and min-max ranges that single values made ``--wider`` times too
wide. ``full``: weights of 4 bits in every layer, patch embedding and laterals too. The training split teaches and the
validation split measures, in fake quantization of the exported Q/DQ graph, against the float student.

``python benchmarks/qat_recovery.py --data DATA/hc18 --setting outliers --out outliers.json``
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from tinyusfm_edge.cli.train.student import load
from tinyusfm_edge.data.folder import evenly, read_data
from tinyusfm_edge.evaluation.bootstrap import estimate_statistic
from tinyusfm_export.graph.build import build_graph
from tinyusfm_export.pipeline import ExportOptions, find_ranges
from tinyusfm_export.quantize.ptq import PtqPolicy, decide
from tinyusfm_export.quantize.qat import QatConfig, finetune
from tinyusfm_export.quantize.sensitivity import MEASURES, frame_costs
from tinyusfm_export.verify.engine_run import preprocess_all
from tinyusfm_runtime.atomic import write_file
from tinyusfm_runtime.errors import EdgeError

POLICIES = {
    "w4": PtqPolicy(weight_limit=7, rest_precision="f32"),
    "outliers": PtqPolicy(rest_precision="f32"),
    "full": PtqPolicy(weight_limit=7, rest_precision="f32", layers=("*",)),
}
"""Setting -> what is quantized."""


def recovery(data: Path, student: str, setting: str, wider: float, frames: int, config: QatConfig) -> dict[str, Any]:
    """Trains and measures.

    Args:
        data: folder with ``split.csv``.
        student: shipped student or weights file.
        setting: key of ``POLICIES``.
        wider: factor on the min-max ranges of ``outliers``.
        frames: validation frames that measure, evenly over the split.
        config: of the training.

    Returns:
        Costs of every frame before and after, their means, the share recovered and its 95 % interval over patients.
    """
    loaded, name = load(student)
    spec, graph = loaded.spec, build_graph(loaded.module.eval(), loaded.spec)
    folder = read_data(data, calibrate=True, teach=True)
    options = ExportOptions(calibration_name=folder.calibration_name, test_sha256=folder.test_sha256)
    stored = None if setting == "outliers" else loaded.ranges
    if setting == "outliers":
        options = replace(options, method="minmax")
    ranges = find_ranges(graph, stored, None if stored else folder.calibration, options)
    if setting == "outliers":
        wide = {name: (wider * low, wider * high) for name, (low, high) in ranges.tensors.items()}
        ranges = replace(ranges, tensors=wide)
    policy = POLICIES[setting]
    decision = decide(graph, "int8", ranges, policy=policy)
    taught = [tensor[0] for tensor, _ in preprocess_all([named.frame for named in folder.training], spec)]
    started = time.monotonic()
    result = finetune(loaded.module, spec, decision, taught, config, progress=_print_progress)
    seconds = time.monotonic() - started
    chosen = evenly(folder.validation, frames)
    inputs = [tensor for tensor, _ in preprocess_all([item.frame for item in chosen], spec)]
    after = build_graph(result.student, spec)
    learned = decide(after, "int8", result.learned(ranges), policy=policy)
    costs = frame_costs(graph, {"ptq": (graph, decision), "qat": (after, learned)}, inputs)
    ptq, qat = (np.array([cost["cost"] for cost in costs[which]]) for which in ("ptq", "qat"))
    return {
        "student": name,
        "setting": setting,
        "wider": wider if setting == "outliers" else None,
        "config": asdict(config),
        "measure": MEASURES[spec.task],
        "mean": {
            which: {key: float(np.mean([c[key] for c in rows])) for key in rows[0]} for which, rows in costs.items()
        },
        "recovered": 1 - float(qat.mean() / ptq.mean()),
        "interval": interval(ptq, qat, [item.group for item in chosen]),
        "seconds": round(seconds, 1),
        "frames": [
            {"id": item.sha256[:16], "ptq": a, "qat": b}
            for item, a, b in zip(chosen, costs["ptq"], costs["qat"], strict=True)
        ],
    }


def interval(ptq: np.ndarray, qat: np.ndarray, groups: Sequence[str]) -> tuple[float, float]:
    """95 % interval of the share recovered, resampled by patient."""
    found = estimate_statistic(
        lambda drawn: 1 - float(qat[drawn].mean() / max(float(ptq[drawn].mean()), 1e-12)), groups
    )
    assert found is not None, "there are frames, and the share is defined"
    return found.low, found.high


def _print_progress(what: str, share: float) -> None:
    print(f"\r{what} {share:4.0%}", end="", file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description="what QAT gives back of what PTQ loses")
    parser.add_argument("--data", type=Path, required=True, help="folder with split.csv")
    parser.add_argument("--student", default="fetal-head")
    parser.add_argument("--setting", choices=sorted(POLICIES), required=True)
    parser.add_argument("--wider", type=float, default=8.0, help="factor on the ranges of the setting outliers")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=3e-5)
    parser.add_argument("--range-rate", type=float, default=2e-3)
    parser.add_argument("--logit-weight", type=float, default=0.5)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--frames", type=int, default=151, help="validation frames that measure")
    parser.add_argument("--out", type=Path, required=True, help="JSON file of every frame's cost")
    options = parser.parse_args(arguments)
    try:
        config = QatConfig(
            steps=options.steps, batch=options.batch, learning_rate=options.learning_rate,
            range_rate=options.range_rate, logit_weight=options.logit_weight, seed=options.seed,
        )  # fmt: skip
        found = recovery(options.data, options.student, options.setting, options.wider, options.frames, config)
        write_file(options.out, (json.dumps(found, indent=1) + "\n").encode())
    except EdgeError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    mean, (low, high) = found["mean"], found["interval"]
    print(f"\n{found['measure']}, {len(found['frames'])} validation frames")
    print(f"PTQ {mean['ptq']['cost']:.6f}, QAT {mean['qat']['cost']:.6f}: {found['recovered']:.0%} recovered")
    print(f"95 % interval over patients {low:.0%} to {high:.0%}; {found['seconds']} s of training")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
