"""``tinyusfm-edge evaluate``: accuracy of a student on a labelled split.

With intervals over patients.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tinyusfm_edge.cli import console
from tinyusfm_edge.cli.data_options import print_table_notes, reads_data
from tinyusfm_edge.cli.output import SILENT, ReportOutput, reports
from tinyusfm_edge.cli.train.settings import check_choice
from tinyusfm_edge.cli.train.student import (
    ContainerOption,
    LabelsOption,
    TaskOption,
    check_student,
    foreign,
    load,
)
from tinyusfm_edge.data.reading import AS_IT_IS, Reading
from tinyusfm_edge.extras import require
from tinyusfm_runtime.errors import InputError

if TYPE_CHECKING:
    from tinyusfm_edge.data.table import Sample
    from tinyusfm_edge.evaluation.exits import ExitReport
    from tinyusfm_edge.models.checkpoint import LoadedStudent

SPLITS = ("train", "val", "test")
EVERY = 3
"""Of so many frames, stress takes one."""
MOST_SILENT = 0.01
"""Largest share of readings that may be off by more than a tenth without a flag."""


@reports("evaluate", page=True)
@reads_data
def evaluate(
    student: Annotated[str, typer.Argument(help="Shipped student or student file.")],
    data: Annotated[Path, typer.Option(help="Folder with split.csv (file,label,mask,split,group,...).")],
    split: Annotated[str, typer.Option(help="train, val or test; look at test once, for the report.")] = "val",
    thresholds: Annotated[str, typer.Option(help="Probability cuts of a mask to compare, such as 0.4,0.5.")] = "",
    limit: Annotated[
        int | None, typer.Option(min=1, max=console.MOST, help="At most this many frames, the first of the table.")
    ] = None,
    paper_compat: Annotated[
        bool, typer.Option("--paper-compat", help="Masks scored with the quirks of the official repository.")
    ] = False,
    no_second_pass: Annotated[
        bool, typer.Option("--no-second-pass", help="Score the first pass alone; the result says so.")
    ] = False,
    task: TaskOption = None,
    labels: LabelsOption = None,
    container: ContainerOption = None,
    stress: Annotated[
        bool, typer.Option("--stress", help="Score a mask model on frames as they come at the bedside.")
    ] = False,
    every: Annotated[
        int | None, typer.Option(min=1, max=console.MOST, help="With --stress: take one frame of so many. Default: 3.")
    ] = None,
    reading: Reading = AS_IT_IS,
    output: ReportOutput = SILENT,
) -> None:
    """Score a student in PyTorch float32, frame by frame as the runtime would answer."""
    check_choice("--split", split, SPLITS)
    check_student(student)
    if split == "test" and (thresholds or stress):
        what = "thresholds are chosen" if thresholds else "stress is looked at"
        raise InputError(f"{what} on validation: leave --{'thresholds' if thresholds else 'stress'} or the test out")
    alone = {"--thresholds": bool(thresholds), "--limit": limit is not None, "--paper-compat": paper_compat}
    if stress and any(alone.values()):
        raise InputError(
            f"--stress has frames and cuts of its own: leave {', '.join(k for k in alone if alone[k])} out"
        )
    if every is not None and not stress:
        raise InputError("--every is for --stress: leave it out, or take fewer frames by --limit")
    print_table_notes(data, None, reading)
    require("evaluating a student", ("torch", "safetensors", "cv2"), "train")
    from tinyusfm_edge.data.table import frames_sha256, read_table
    from tinyusfm_edge.evaluation.segmentation import parse_thresholds, score_student
    from tinyusfm_edge.report.results import evaluate_page
    from tinyusfm_runtime.spec import SecondPass, Task

    stops = None
    cuts = parse_thresholds(thresholds)
    loaded, _ = load(student, foreign(task, labels, container))
    if no_second_pass or paper_compat:
        loaded = replace(loaded, spec=replace(loaded.spec, second_pass=SecondPass.NEVER))
    if stress:
        _stress(loaded, data, split, every or EVERY, reading, output)
        output.end("export", student, "--int8", "--data", data)
        return
    if loaded.spec.task is Task.CLASSIFY:
        if cuts or paper_compat:
            raise InputError("--thresholds and --paper-compat are about masks; this student is a classifier")
        from tinyusfm_edge.evaluation.classification import score_class_student

        samples = read_table(data, split, need="label", limit=limit, reading=reading)
        reports = [score_class_student(loaded, samples, split)]
        stops = _exits(loaded, samples)
    else:
        samples = read_table(data, split, limit=limit, reading=reading)
        reports = score_student(loaded, samples, split, cuts, paper=paper_compat)  # type: ignore[assignment]
    for report in reports:
        console.say(f"{loaded.name} {loaded.weights_sha256[:12]}")
        _say_rows(report.table())
    _say_rows(stops.table() if stops is not None else ())
    output.result(
        {
            "weights_sha256": loaded.weights_sha256,
            "origin": loaded.spec.origin,
            "frames_sha256": frames_sha256(samples),
            "split": split,
            "second_pass": loaded.spec.second_pass.value,
            "reading": reading.to_json(),
            "exits": None if stops is None else stops.to_json(),
            "reports": [json.loads(json.dumps(report.to_json())) for report in reports],
        }
    )
    output.page(lambda: evaluate_page(loaded.name, split, [report.table() for report in reports]))
    output.end("export", student, "--int8", "--data", data)


def _say_rows(rows: Sequence[tuple[str, str]]) -> None:
    width = max([34, *(len(name) + 2 for name, _ in rows)])
    for name, value in rows:
        console.say(f"  {name:{width}s}{value}")


def _stress(
    loaded: LoadedStudent,
    data: Path,
    split: str,
    every: int,
    reading: Reading,
    output: ReportOutput,
) -> None:
    """The table of every transformation, on a terminal, as JSON and as a page."""
    from dataclasses import asdict
    from functools import partial

    from tinyusfm_edge.data.table import read_table
    from tinyusfm_edge.evaluation.stress import HEADER, stress
    from tinyusfm_edge.report.page import Page, Table
    from tinyusfm_export.verify.reference import reference_mode, run_reference

    samples = read_table(data, split, reading=reading)[::every]
    with reference_mode(loaded.module):
        rows = stress(partial(run_reference, loaded.module, loaded.spec), loaded.spec, samples)
    cells = [row.cells() for row in rows]
    console.say(f"{loaded.name} {loaded.weights_sha256[:12]}, {split}, every frame of {every}: {len(samples)} frames")
    console.say(console.table(HEADER, cells))
    output.result(
        {
            "kind": "tinyusfm-edge evaluate stress",
            "weights_sha256": loaded.weights_sha256,
            "split": split,
            "second_pass": loaded.spec.second_pass.value,
            "every": every,
            "rows": [asdict(row) for row in rows],
        }
    )

    def stress_page() -> Page:
        note = "Circumferences where the frame does not cut the head; silent: off by more than a tenth and not flagged."
        block = Table(title="Frames as they come at the bedside", note=note, header=HEADER, rows=cells)
        silent = sum(row.silent for row in rows) / max(1, sum(row.measured for row in rows))
        headline = f"{loaded.name}: {silent:.1%} of all readings off by more than a tenth carry no flag"
        return Page(title=f"Stress of {loaded.name}", passed=silent <= MOST_SILENT, headline=headline, blocks=[block])

    output.page(stress_page)


def _exits(loaded: LoadedStudent, samples: list[Sample]) -> ExitReport | None:
    """What the early exits do, where the student has calibrated ones."""
    from tinyusfm_edge.data.table import class_indices
    from tinyusfm_edge.evaluation.exits import exit_probabilities, measure_exits

    policy = loaded.spec.exits
    if policy is None:
        return None
    module: Any = loaded.module
    found = exit_probabilities(module, loaded.spec, samples)
    return measure_exits(policy, found, class_indices(samples, loaded.spec.labels), module.config.depth)
