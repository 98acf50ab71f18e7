"""``tinyusfm-edge evaluate``: accuracy of a student on a labelled split, with intervals over patients."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tinyusfm_edge.cli import console
from tinyusfm_edge.cli.student import load, require
from tinyusfm_runtime.errors import InputError

if TYPE_CHECKING:
    from tinyusfm_edge.evaluation.exits import ExitReport
    from tinyusfm_edge.models.checkpoint import LoadedStudent
    from tinyusfm_edge.training.data import Sample

SPLITS = ("train", "val", "test")


def evaluate(
    student: Annotated[str, typer.Argument(help="Shipped student or student file.")],
    data: Annotated[Path, typer.Option(help="Folder with split.csv (file,label,mask,split,group,...).")],
    split: Annotated[str, typer.Option(help="train, val or test; look at test once, for the report.")] = "val",
    thresholds: Annotated[str, typer.Option(help="Probability cuts of a mask to compare, such as 0.4,0.5.")] = "",
    limit: Annotated[int | None, typer.Option(min=1, help="At most this many frames, the first of the table.")] = None,
    paper_compat: Annotated[
        bool, typer.Option("--paper-compat", help="Masks scored with the quirks of the official repository.")
    ] = False,
    json_out: Annotated[str | None, typer.Option("--json", help="Write every frame's scores; - is the output.")] = None,
) -> None:
    """Score a student in PyTorch float32, frame by frame as the runtime would answer."""
    require("evaluating a student", ("torch", "safetensors", "cv2"), "train")
    from tinyusfm_edge.evaluation.segmentation import parse_thresholds, score_student
    from tinyusfm_edge.training.data import read_table
    from tinyusfm_runtime.spec import Task

    if split not in SPLITS:
        raise InputError(f"--split {split}: use {', '.join(SPLITS)}")
    stops = None
    cuts = parse_thresholds(thresholds)
    if split == "test" and cuts:
        raise InputError("thresholds are chosen on validation: no --thresholds with --split test")
    loaded, _ = load(student)
    if loaded.spec.task is Task.CLASSIFY:
        if cuts or paper_compat:
            raise InputError("--thresholds and --paper-compat are about masks; this student is a classifier")
        from tinyusfm_edge.evaluation.classification import score_class_student

        samples = read_table(data, split, need="label", limit=limit)
        reports = [score_class_student(loaded, samples, split)]
        stops = _exits(loaded, samples)
    else:
        samples = read_table(data, split, limit=limit)
        reports = score_student(loaded, samples, split, cuts, paper=paper_compat)  # type: ignore[assignment]
    for report in reports:
        console.say(f"{loaded.name} {loaded.weights_sha256[:12]}")
        for name, value in report.table():
            console.say(f"  {name:34s}{value}")
    for name, value in stops.table() if stops is not None else ():
        console.say(f"  {name:34s}{value}")
    if json_out is not None:
        content = {
            "version": 1,
            "weights_sha256": loaded.weights_sha256,
            "exits": None if stops is None else stops.to_json(),
            "reports": [json.loads(json.dumps(report.to_json())) for report in reports],
        }
        console.write_json(json_out, content, "the scores")


def _exits(loaded: LoadedStudent, samples: list[Sample]) -> ExitReport | None:
    """What the early exits do, where the student has calibrated ones."""
    from tinyusfm_edge.evaluation.exits import exit_probabilities, measure_exits
    from tinyusfm_edge.training.task import class_indices

    policy = loaded.spec.exits
    if policy is None:
        return None
    module: Any = loaded.module
    found = exit_probabilities(module, loaded.spec, samples)
    return measure_exits(policy, found, class_indices(samples, loaded.spec.labels), module.config.depth)
