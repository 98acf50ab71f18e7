"""``tinyusfm-edge qat``: a student is fine-tuned through its own int8 graph, and what that recovered is measured.

Frames come from the training split; what PTQ loses and QAT gives back is measured on the validation split, in fake
quantization, against the float student. The result is a student file with its activation ranges beside it; early exits
learn with the end, and their thresholds are chosen anew on the labelled validation frames.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import numpy as np
import typer

from tinyusfm_edge.cli import console
from tinyusfm_edge.cli.data_folder import DataFolder, evenly, read_data
from tinyusfm_edge.cli.student import DEFAULT_STUDENT, load, require
from tinyusfm_runtime.errors import InputError

if TYPE_CHECKING:
    from tinyusfm_edge.training.data import Sample


def qat(
    student: Annotated[str, typer.Argument(help="Shipped student or weights file.")] = DEFAULT_STUDENT,
    data: Annotated[Path, typer.Option(help="Pictures with a split.csv: train teaches, val measures.")] = ...,  # type: ignore[assignment]
    out: Annotated[Path, typer.Option(help="Student file to write; NAME.ranges.json stands beside it.")] = Path(
        "qat.safetensors"
    ),
    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps.")] = 200,
    batch: Annotated[int, typer.Option(min=1, help="Frames a step.")] = 4,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 1e-5,
    range_rate: Annotated[
        float, typer.Option(min=0.0, help="Peak learning rate of the activation ranges; 0 keeps them as they are.")
    ] = 2e-3,
    range_method: Annotated[
        str | None,
        typer.Option(
            help="Find the ranges to start from anew: minmax, percentile, entropy or mse. Default: the student's."
        ),
    ] = None,
    weight_bits: Annotated[int, typer.Option(min=4, max=8, help="Bits of the weights.")] = 8,
    seed: Annotated[int, typer.Option(help="Of the order of the frames.")] = 42,
    frames: Annotated[int, typer.Option(min=1, help="Validation frames that measure.")] = 32,
) -> None:
    """Fine-tune a student with quantization in the loop."""
    from tinyusfm_edge.evaluation.exits import choose_exits
    from tinyusfm_edge.models.checkpoint import save_student
    from tinyusfm_export.engine_run import preprocess_all
    from tinyusfm_export.graph import build_graph
    from tinyusfm_export.pipeline import ExportOptions, find_ranges
    from tinyusfm_export.ptq import PtqPolicy, decide
    from tinyusfm_export.qat import QatConfig, finetune

    require("QAT", ("torch", "safetensors"), "torch")
    loaded, _ = load(student)
    judged = _labelled(data, loaded.spec.labels) if loaded.spec.exits is not None else []
    folder = read_data(data, calibrate=True, teach=True)
    console.note(f"note: {folder.note}")
    console.check_writable(out, "the student")
    spec = loaded.spec
    graph = build_graph(loaded.module.eval(), spec)
    options = ExportOptions(calibration_name=folder.calibration_name, test_sha256=folder.test_sha256)
    if range_method is not None:
        options = replace(options, method=range_method)
    stored = loaded.ranges if range_method is None else None
    ranges = find_ranges(graph, stored, None if stored else folder.calibration, options)
    policy = PtqPolicy(weight_limit=2 ** (weight_bits - 1) - 1, rest_precision="f32")
    decision = decide(graph, "int8", ranges, policy=policy)
    inputs = [tensor[0] for tensor, _ in preprocess_all([named.frame for named in folder.training], spec)]
    config = QatConfig(steps=steps, batch=batch, learning_rate=learning_rate, range_rate=range_rate, seed=seed)
    with console.progress() as told:
        result = finetune(
            loaded.module,
            spec,
            decision,
            inputs,
            config,
            checkpoint=out.with_name(f".{out.name}.checkpoint"),
            progress=lambda what, share: told(what, 0.9 * share),
        )
        told("measuring", 0.9)
        ranges = result.learned(ranges)
        trained = decide(graph, "int8", ranges, policy=policy)
        report = measure(graph, result.student, (decision, trained), folder, spec, frames)
    import torch

    spec = replace(spec, origin=f"{spec.origin}; fine-tuned with int8 in the loop ({steps} steps of {batch})")
    stops = None
    if spec.exits is not None:
        policy_of_exits, stops = choose_exits(cast(Any, result.student), spec, judged)
        spec = replace(spec, exits=policy_of_exits)
    sha256 = save_student(out, cast(Any, result.student), spec, dtype=torch.float32)
    beside = out.with_suffix(".ranges.json")
    written = replace(ranges, weights_sha256=sha256).to_json()
    console.write_file(beside, (json.dumps(written, indent=1) + "\n").encode(), "the ranges")
    out.with_name(f".{out.name}.checkpoint").unlink(missing_ok=True)
    console.say(console.table(("student", "cost", "logits"), report["rows"]))
    console.say(f"\nmeasured     {report['measure']}, {report['frames']} validation frames, {weight_bits}-bit weights")
    console.say(f"recovered    {report['recovered']:.0%} of what PTQ loses")
    for what, value in stops.table() if stops is not None else ():
        console.say(f"{what:<26} {value}")
    console.say(f"files        {out}, {beside}")


def _labelled(data: Path, labels: tuple[str, ...]) -> list[Sample]:
    """The validation frames, on whose labels thresholds of early exits are chosen."""
    from tinyusfm_edge.training.data import read_table
    from tinyusfm_edge.training.task import class_indices

    try:
        samples = read_table(data, "val", need="label")
        class_indices(samples, labels)
        return samples
    except InputError as error:
        raise InputError(
            f"this student has early exits, whose thresholds need labelled validation frames: {error}"
        ) from error


def measure(
    graph: Any, trained: Any, decisions: tuple[Any, Any], folder: DataFolder, spec: Any, most: int
) -> dict[str, Any]:
    """What PTQ costs, and what the trained student costs in the same int8 graph, against the float student.

    Args:
        graph: the float student's export graph.
        trained: the trained student.
        decisions: the int8 decision before and after.
        folder: its validation frames measure.
        spec: of the student.
        most: frames to use.

    Returns:
        ``rows`` for people, ``measure``, ``frames`` and ``recovered``, the share of the cost that is gone, -inf..1.
    """
    from tinyusfm_export.engine_run import preprocess_all
    from tinyusfm_export.graph import build_graph
    from tinyusfm_export.sensitivity import MEASURES, frame_costs

    chosen = evenly(folder.validation, most)
    inputs = [tensor for tensor, _ in preprocess_all([item.frame for item in chosen], spec)]
    before, after = decisions
    sides = {"PTQ": (graph, before), "QAT": (build_graph(trained, spec), after)}
    costs = {
        name: {key: float(np.mean([cost[key] for cost in each])) for key in ("cost", "logit_abs")}
        for name, each in frame_costs(graph, sides, inputs).items()
    }
    lost, left = costs["PTQ"]["cost"], costs["QAT"]["cost"]
    return {
        "rows": [(name, f"{cost['cost']:.6f}", f"{cost['logit_abs']:.5f}") for name, cost in costs.items()],
        "measure": MEASURES[spec.task],
        "frames": len(inputs),
        "recovered": (lost - left) / lost if lost > 0 else float(np.nan),
    }
