"""``tinyusfm-edge qat``: fine-tunes a student through its own int8 graph.

What that recovered is measured.

Frames come from the training split; what PTQ loses and QAT gives back is measured on the validation split, in fake
quantization, against the float student. The result is a student file with its activation ranges beside it; early exits
learn with the end, and their thresholds are chosen again on the labelled validation frames.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import numpy as np
import typer

from tinyusfm_edge.cli import console
from tinyusfm_edge.cli.data_options import reads_data
from tinyusfm_edge.cli.output import SILENT, ReportOutput, reports
from tinyusfm_edge.cli.train.settings import Changes, Config, ShowConfig, check_settings, show
from tinyusfm_edge.cli.train.student import (
    DEFAULT_STUDENT,
    ContainerOption,
    LabelsOption,
    TaskOption,
    check_student,
    foreign,
    load,
)
from tinyusfm_edge.data.fingerprint import images_sha256
from tinyusfm_edge.data.folder import DataFolder, evenly, read_data
from tinyusfm_edge.data.given_ranges import GivenRanges, given_ranges
from tinyusfm_edge.data.reading import AS_IT_IS, Reading
from tinyusfm_edge.extras import require
from tinyusfm_edge.models.upstream import joined
from tinyusfm_edge.settings import build, laid_over, to_json
from tinyusfm_edge.training.trainer.lock import one_run
from tinyusfm_runtime.errors import GateError, InputError

if TYPE_CHECKING:
    from torch import nn

    from tinyusfm_calibration.ranges import Ranges
    from tinyusfm_edge.data.table import Sample
    from tinyusfm_edge.models.student import Student
    from tinyusfm_export.graph.build import ExportGraph
    from tinyusfm_export.quantize.decision import QuantDecision
    from tinyusfm_export.quantize.ptq import PtqPolicy
    from tinyusfm_export.quantize.qat import QatConfig
    from tinyusfm_runtime.spec import ModelSpec

Cost = Callable[["nn.Module", Mapping[str, float]], float]
"""A student and the factors on its ranges -> what it costs; lower is better."""

KEPT_BY = 16
"""Validation frames by which the best weights are chosen."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SideCost:
    """What one side costs against the float student, mean over frames.

    Attributes:
        cost: the error that ``QatReport.measure`` names.
        logit_abs: mean absolute change of the logits.
    """

    cost: float
    logit_abs: float


@dataclass(frozen=True, kw_only=True, slots=True)
class QatReport:
    """What PTQ costs, and what QAT costs in the same int8 graph.

    Attributes:
        measure: the error, in words.
        frames: how many frames measured.
        ptq: of the student before.
        qat: of the trained student.
    """

    measure: str
    frames: int
    ptq: SideCost
    qat: SideCost

    @property
    def better(self) -> bool:
        """Whether the trained student costs less."""
        return self.qat.cost < self.ptq.cost

    @property
    def recovered(self) -> float | None:
        """Share of the cost that is gone, -inf..1; None where PTQ costs nothing."""
        lost = self.ptq.cost
        return (lost - self.qat.cost) / lost if lost > 0 else None

    def rows(self) -> list[tuple[str, str, str]]:
        """Side, cost and change of the logits, for people."""
        sides = (("PTQ", self.ptq), ("QAT", self.qat))
        return [(name, f"{side.cost:.6f}", f"{side.logit_abs:.5f}") for name, side in sides]

    def to_json(self) -> dict[str, Any]:
        """The report as plain data."""
        costs = {"PTQ": asdict(self.ptq), "QAT": asdict(self.qat)}
        return {"measure": self.measure, "frames": self.frames, "costs": costs, "recovered": self.recovered}


@reports("qat")
@reads_data
def qat(
    student: Annotated[str, typer.Argument(help="Shipped student or weights file.")] = DEFAULT_STUDENT,
    data: Annotated[Path, typer.Option(help="Images with a split.csv: train teaches, val measures.")] = ...,  # type: ignore[assignment]
    out: Annotated[Path, typer.Option(help="Student file to write; NAME.ranges.json stands beside it.")] = Path(
        "qat.safetensors"
    ),
    steps: Annotated[int | None, typer.Option(min=1, max=console.MOST, help="Optimiser steps. Default: 200.")] = None,
    batch: Annotated[int | None, typer.Option(min=1, max=console.MOST, help="Frames per step. Default: 4.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Peak learning rate. Default: 1e-5.")] = None,
    range_rate: Annotated[
        float | None,
        typer.Option(min=0.0, help="Peak learning rate of activation ranges; 0 keeps them. Default: 2e-3."),
    ] = None,
    range_method: Annotated[
        str | None,
        typer.Option(
            help="Find the ranges to start from again: minmax, percentile, entropy or mse. Default: the student's."
        ),
    ] = None,
    weight_bits: Annotated[int, typer.Option(min=4, max=8, help="Bits of the weights.")] = 8,
    seed: Annotated[int | None, typer.Option(help="Random seed of the order of frames. Default: 42.")] = None,
    frames: Annotated[int, typer.Option(min=1, max=console.MOST, help="Validation frames that measure.")] = 32,
    calibration: Annotated[
        str | None, typer.Option(help="SET.json of the calibrate command, or a declared set to draw from the data.")
    ] = None,
    given_file: Annotated[
        Path | None, typer.Option("--ranges", help="Activation ranges to start from, as an earlier qat wrote them.")
    ] = None,
    config: Config = None,
    change: Changes = None,
    show_config: ShowConfig = False,
    require_better: Annotated[
        bool, typer.Option("--require-better", help="Exit with 1 where the result is no better than PTQ.")
    ] = False,
    task: TaskOption = None,
    labels: LabelsOption = None,
    container: ContainerOption = None,
    reading: Reading = AS_IT_IS,
    output: ReportOutput = SILENT,
) -> None:
    """Fine-tune a student with quantization in the loop."""
    _check(student, out, config, change, range_method is not None and bool(calibration or given_file))
    given_settings = {
        "steps": steps, "batch": batch, "learning_rate": learning_rate, "range_rate": range_rate, "seed": seed,
    }  # fmt: skip
    settings = qat_config(config, change, given_settings)
    if show_config:
        show(to_json(settings))
        return
    from tinyusfm_edge.evaluation.exits import choose_exits
    from tinyusfm_export.graph.build import build_graph
    from tinyusfm_export.quantize.ptq import PtqPolicy, decide
    from tinyusfm_export.quantize.qat import finetune
    from tinyusfm_export.verify.engine_run import preprocess_all

    require("QAT", ("torch", "safetensors"), "torch")
    loaded, _ = load(student, foreign(task, labels, container))
    judged = _labelled(data, loaded.spec.labels, reading) if loaded.spec.exits is not None else []
    given = given_ranges(loaded, calibration, given_file)
    folder = read_data(data, calibrate=True, teach=True, calibration=given.declared, reading=reading)
    console.notes((folder.note, *folder.notes))
    spec = loaded.spec
    graph = build_graph(loaded.module.eval(), spec)
    ranges = _first_ranges(graph, given, folder, range_method)
    policy = PtqPolicy(weight_limit=2 ** (weight_bits - 1) - 1, rest_precision="f32")
    decision = decide(graph, "int8", ranges, policy=policy)
    inputs = [tensor[0] for tensor, _ in preprocess_all([named.frame for named in folder.training], spec)]
    lock = one_run(out.absolute().parent, f".{out.name}.lock")
    with lock, console.progress() as progress:
        result = finetune(
            loaded.module,
            spec,
            decision,
            inputs,
            settings,
            checkpoint=out.with_name(f".{out.name}.checkpoint"),
            progress=lambda what, share: progress(what, 0.9 * share),
            cost=_cost_on(folder, graph, ranges, policy, spec),
        )
        progress("measuring", 0.9)
        ranges = result.learned(ranges)
        trained = decide(graph, "int8", ranges, policy=policy)
        report = measure(graph, result.student, (decision, trained), folder, spec, frames)
    spec = replace(
        spec, origin=f"{spec.origin}; fine-tuned with int8 in the loop ({settings.steps} steps of {settings.batch})"
    )
    stops = None
    if spec.exits is not None:
        policy_of_exits, stops = choose_exits(cast(Any, result.student), spec, judged)
        spec = replace(spec, exits=policy_of_exits)
    stages = joined({"images": images_sha256([data], ("train",), reading)}, loaded.report.stages, loaded.weights_sha256)
    beside = _write(out, result.student, spec, ranges, stages)
    exits = stops.table() if stops is not None else []
    _print_result(report, exits, f"{weight_bits}-bit weights", (out, beside))
    output.result(
        {"student": str(out), "ranges": str(beside), "weight_bits": weight_bits, "steps": settings.steps}
        | {"best_step": result.best_step, **report.to_json()}
    )
    if require_better and not report.better:
        raise GateError(f"QAT is not better than PTQ here: {out} is kept, this exit code says no")
    output.end("export", out if report.better else student, "--int8", "--data", data, *ranges_option(report, beside))


def _check(student: str, out: Path, config: Path | None, change: list[str] | None, two_ranges: bool) -> None:
    """Refuses what can be refused before torch is imported."""
    check_student(student)
    check_settings(config, change)
    if two_ranges:
        raise InputError("--range-method finds ranges again: leave --calibration and --ranges out")
    console.check_writable(out, "the student")


def qat_config(config: Path | None, changes: list[str] | None, given: dict[str, Any]) -> QatConfig:
    """Settings from the defaults, a file, ``--set`` and the options.

    Args:
        config: JSON file, or None.
        changes: of ``--set``.
        given: options by field; None is one that was not given.

    Raises:
        InputError: an unknown key, or a value that does not fit.
    """
    from dataclasses import asdict

    from tinyusfm_export.quantize.qat import QatConfig

    data = laid_over(asdict(QatConfig()), config, changes)
    data.update({name: value for name, value in given.items() if value is not None})
    return build(QatConfig, data)


def _print_result(report: QatReport, exits: list[tuple[str, str]], bits: str, files: tuple[Path, Path]) -> None:
    """What came out, for people."""
    console.say(console.table(("student", "cost", "logits"), report.rows()))
    console.say(f"\nmeasured     {report.measure}, {report.frames} validation frames, {bits}")
    console.say(outcome_line(report))
    for what, value in exits:
        console.say(f"{what:<26} {value}")
    console.say(f"files        {files[0]}, {files[1]}")


def _cost_on(folder: DataFolder, graph: ExportGraph, ranges: Ranges, policy: PtqPolicy, spec: ModelSpec) -> Cost:
    """What a student on its way costs in int8 on some validation frames.

    Its best weights are kept by that.
    """
    from tinyusfm_export.graph.build import build_graph
    from tinyusfm_export.quantize.ptq import decide
    from tinyusfm_export.quantize.qat import learned_ranges
    from tinyusfm_export.quantize.sensitivity import frame_costs
    from tinyusfm_export.verify.engine_run import preprocess_all

    chosen = evenly(folder.validation, KEPT_BY)
    inputs = [tensor for tensor, _ in preprocess_all([item.frame for item in chosen], spec)]

    def cost(student: nn.Module, factors: Mapping[str, float]) -> float:
        decision = decide(graph, "int8", learned_ranges(ranges, factors), policy=policy)
        found = frame_costs(graph, {"QAT": (build_graph(student, spec), decision)}, inputs)["QAT"]
        return float(np.mean([each["cost"] for each in found]))

    return cost


def outcome_line(report: QatReport) -> str:
    """Whether training was worth it, one line.

    Args:
        report: of ``measure``.
    """
    lost, left = report.ptq.cost, report.qat.cost
    if report.better:
        return f"recovered    {report.recovered:.0%} of what PTQ loses (error {left:.4g} against {lost:.4g})"
    word = "no better" if left == lost else "worse"
    return f"warning      QAT is {word} than PTQ here (error {left:.4g} against {lost:.4g}): keep the PTQ export"


def ranges_option(report: QatReport, beside: Path) -> list[str]:
    """What goes with the student of QAT on export.

    Nothing where the student from before is the better one.
    """
    return ["--ranges", str(beside)] if report.better else []


def _write(out: Path, student: nn.Module, spec: ModelSpec, ranges: Ranges, stages: dict[str, str]) -> Path:
    """Writes the student file, float32, and its ranges beside it.

    Returns where those are.
    """
    import torch

    from tinyusfm_edge.models.checkpoint import save_student

    sha256 = save_student(out, cast("Student", student), spec, dtype=torch.float32, stages=stages)
    beside = out.with_suffix(".ranges.json")
    written = replace(ranges, weights_sha256=sha256).to_json()
    console.write_file(beside, (json.dumps(written, indent=1) + "\n").encode(), "the ranges")
    out.with_name(f".{out.name}.checkpoint").unlink(missing_ok=True)
    return beside


def _first_ranges(graph: ExportGraph, given: GivenRanges, folder: DataFolder, method: str | None) -> Ranges:
    """The ranges that training starts from.

    Those that were given, else those found on the training split.

    Those of a calibration file that equalises tensors belong to another graph than the one that is trained.
    """
    from tinyusfm_export.pipeline import ExportOptions, find_ranges

    options = ExportOptions(calibration_name=folder.calibration_name, test_sha256=folder.test_sha256)
    stored = given.stored
    if stored is not None and stored.preparation.divisors:
        method = stored.ranges.method
        console.note(
            "note: the calibration file equalises tensors, which training undoes: ranges are found again, by its "
            f"method ({method}), on the training split"
        )
    if method is not None:
        options = replace(options, method=method)
    kept = None if method is not None or given.from_data else given.student.ranges
    return find_ranges(graph, kept, None if kept else folder.calibration, options)


def _labelled(data: Path, labels: tuple[str, ...], reading: Reading) -> list[Sample]:
    """The validation frames, on whose labels thresholds of early exits are chosen."""
    from tinyusfm_edge.data.table import class_indices, read_table

    try:
        samples = read_table(data, "val", need="label", reading=reading)
        class_indices(samples, labels)
        return samples
    except InputError as error:
        raise InputError(
            f"this student has early exits, whose thresholds need labelled validation frames: {error}"
        ) from error


def measure(
    graph: ExportGraph,
    trained: nn.Module,
    decisions: tuple[QuantDecision, QuantDecision],
    folder: DataFolder,
    spec: ModelSpec,
    most: int,
) -> QatReport:
    """What PTQ costs against the float student, and what QAT costs.

    The trained student is measured in the same int8 graph.

    Args:
        graph: the float student's export graph.
        trained: the trained student.
        decisions: the int8 decision before and after.
        folder: its validation frames measure.
        spec: of the student.
        most: frames to use.

    Returns:
        What both sides cost on the same frames.
    """
    from tinyusfm_export.graph.build import build_graph
    from tinyusfm_export.quantize.sensitivity import MEASURES, frame_costs
    from tinyusfm_export.verify.engine_run import preprocess_all

    chosen = evenly(folder.validation, most)
    inputs = [tensor for tensor, _ in preprocess_all([item.frame for item in chosen], spec)]
    before, after = decisions
    sides = {"PTQ": (graph, before), "QAT": (build_graph(trained, spec), after)}
    ptq, qat = (
        SideCost(**{key: float(np.mean([cost[key] for cost in each])) for key in ("cost", "logit_abs")})
        for each in frame_costs(graph, sides, inputs).values()
    )
    return QatReport(measure=MEASURES[spec.task], frames=len(inputs), ptq=ptq, qat=qat)
