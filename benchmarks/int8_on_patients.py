"""INT8 against FP32 of a shipped student on labelled patients: what quantization costs in clinical units.

``python benchmarks/int8_on_patients.py --student fetal-head --data DATA/hc18 --split test`` builds FP32 and INT8 of
every CPU target from the student's stored ranges, scores both in their own engines on the same frames against the
*truth* (the integer artefact, which has no float sibling, beside OpenVINO's FP32), and gives each difference with a
95 % interval over patients (paired bootstrap). The aims: Dice loss at most 0.2 points, growth of the mean circumference
error at most 0.1 mm; AUC loss at most 0.2 points. Prints a table and one JSON line.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from tinyusfm_edge.cli import console
from tinyusfm_edge.cli.train.student import load
from tinyusfm_edge.data.table import read_table
from tinyusfm_edge.evaluation.bootstrap import Estimate, estimate_statistic, paired_difference
from tinyusfm_edge.evaluation.classification import score_classifier
from tinyusfm_edge.evaluation.metrics import auc
from tinyusfm_edge.evaluation.segmentation import evaluate_split
from tinyusfm_edge.students.policies import int8_policies
from tinyusfm_export.graph.build import build_graph
from tinyusfm_export.quantize.decision import float_decision
from tinyusfm_export.quantize.ptq import decide
from tinyusfm_export.verify.engine_run import open_engine
from tinyusfm_runtime import plugins
from tinyusfm_runtime.device.machine import machine_card
from tinyusfm_runtime.errors import EdgeError
from tinyusfm_runtime.spec import Task

AIMS = {"Dice": -0.002, "HC error mm": 0.1, "AUC": -0.002}
"""Worst change that is still good: loss of Dice and AUC, growth of the absolute circumference error."""


def scores(run: Callable[[np.ndarray], np.ndarray], spec: Any, samples: Sequence[Any], split: str) -> Any:
    """The split's report under one artefact."""
    judge = score_classifier if spec.task is Task.CLASSIFY else evaluate_split
    return judge(run, spec, samples, split)


def differences(int8: Any, fp32: Any, task: Task) -> dict[str, Estimate | None]:
    """INT8 minus FP32 on the same frames, with intervals over patients."""
    groups = [image.group for image in fp32.images]
    if task is Task.CLASSIFY:
        first, second = (np.array([image.probabilities for image in side.images]) for side in (int8, fp32))
        truth = np.array([image.truth for image in fp32.images])
        same = first.argmax(1) == second.argmax(1)
        return {
            "AUC": estimate_statistic(lambda i: auc(first[i], truth[i]) - auc(second[i], truth[i]), groups),
            "same class": estimate_statistic(lambda i: float(same[i].mean()), groups),
        }
    dice = paired_difference([i.dice for i in int8.images], [i.dice for i in fp32.images], groups)
    pairs = [
        (abs(a.hc_error_mm), abs(b.hc_error_mm), a.group)
        for a, b in zip(int8.images, fp32.images, strict=True)
        if a.hc_error_mm is not None and b.hc_error_mm is not None
    ]
    hc = paired_difference([p[0] for p in pairs], [p[1] for p in pairs], [p[2] for p in pairs]) if pairs else None
    return {"Dice": dice, "HC error mm": hc}


def held(name: str, found: Estimate | None) -> str:
    """Whether an aim holds, by the mean and by the worse end of the interval."""
    if found is None or name not in AIMS:
        return "-"
    aim = AIMS[name]
    ends = (found.mean, found.low) if aim < 0 else (found.mean, found.high)
    good = [end >= aim if aim < 0 else end <= aim for end in ends]
    return "holds" if all(good) else "holds on average" if good[0] else "MISSED"


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description="INT8 against FP32 on labelled patients")
    parser.add_argument("--student", default="fetal-head")
    parser.add_argument("--data", type=Path, required=True, help="folder with split.csv")
    parser.add_argument("--split", default="test")
    options = parser.parse_args(arguments)
    try:
        loaded, shipped = load(options.student)
        spec = loaded.spec
        need: Literal["mask", "label"] = "label" if spec.task is Task.CLASSIFY else "mask"
        samples = read_table(options.data, options.split, need=need)
    except EdgeError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    graph = build_graph(loaded.module.eval(), spec)
    found: list[dict[str, Any]] = []
    sides: dict[str, Any] = {}
    policy = int8_policies(spec, options.student if shipped else "")[0]
    for target in ("ov", "integer", "ort"):
        for precision in ("int8",) if target == "integer" else ("fp32", "int8"):
            whole = precision == "fp32"
            decision = float_decision("fp32") if whole else decide(graph, "int8", loaded.ranges, policy=policy)
            with tempfile.TemporaryDirectory() as folder:
                built = plugins.load("targets", target).Target().build(graph, decision, Path(folder))
                files = {path.name: path.read_bytes() for path in built.files}
            with open_engine(target, files, spec, threads=1, rest_precision=built.rest_precision) as engine:
                sides[precision] = scores(lambda codes: engine.run(codes)["logits"], spec, samples, options.split)
        for name, estimate in differences(sides["int8"], sides["fp32"], spec.task).items():
            if estimate is not None:
                found.append({"target": plugins.public_name(target), "measure": name, "mean": estimate.mean,
                              "low": estimate.low, "high": estimate.high, "frames": estimate.num_values,
                              "patients": estimate.num_groups, "aim": held(name, estimate)})  # fmt: skip
    cells = [
        (r["target"], r["measure"], f"{r['mean']:+.5f}", f"{r['low']:+.5f}", f"{r['high']:+.5f}", r["aim"])
        for r in found
    ]
    print(console.table(("target", "INT8 - FP32", "mean", "low", "high", "aim"), cells))
    print(f"{len(samples)} frames of split {options.split}; intervals: 95 %, over patients")
    print(json.dumps({"version": 1, "student": spec.name, "split": options.split, "rows": found,
                      "machine": machine_card().to_json()}))  # fmt: skip
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
