"""``tinyusfm-edge sensitivity``: which layer costs how much in INT8.

It also measures accuracy against latency with fewer INT8 layers.

The JSON file is what ``export --mixed`` reads; a stopped measurement goes on from it.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tinyusfm_edge.cli import console
from tinyusfm_edge.cli.data_options import reads_data
from tinyusfm_edge.cli.output import SILENT, ReportOutput, reports
from tinyusfm_edge.cli.train.student import (
    DEFAULT_STUDENT,
    ContainerOption,
    LabelsOption,
    TaskOption,
    check_student,
    foreign,
    load,
)
from tinyusfm_edge.data.folder import evenly, read_data
from tinyusfm_edge.data.given_ranges import given_ranges, prepared_graph
from tinyusfm_edge.data.reading import AS_IT_IS, Reading
from tinyusfm_edge.extras import require
from tinyusfm_edge.training.trainer.lock import one_run
from tinyusfm_runtime.errors import InputError
from tinyusfm_runtime.strict_json import parse_json

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np

    from tinyusfm_calibration.ranges import Ranges
    from tinyusfm_edge.models.checkpoint import LoadedStudent
    from tinyusfm_export.frontier import FrontierPoint
    from tinyusfm_export.graph.build import ExportGraph
    from tinyusfm_export.quantize.ptq import PtqPolicy
    from tinyusfm_export.quantize.sensitivity import Sensitivity
    from tinyusfm_export.verify.gate_frames import GateFrames
    from tinyusfm_runtime.spec import ModelSpec

COUNTS = (0, 1, 2, 4, 8, 16, 32)
"""Float layers at the points of the accuracy-latency plot."""


@reports("sensitivity")
@reads_data
def sensitivity(
    student: Annotated[str, typer.Argument(help="Shipped student or weights file.")] = DEFAULT_STUDENT,
    data: Annotated[
        Path | None, typer.Option(help="Images with a split.csv; the validation split measures. Default: phantoms.")
    ] = None,
    out: Annotated[Path, typer.Option(help="JSON file to write or to go on with; a .html page beside it.")] = Path(
        "sensitivity.json"
    ),
    frames: Annotated[int, typer.Option(min=1, max=console.MOST, help="Frames each layer is measured on.")] = 16,
    weight_bits: Annotated[int, typer.Option(min=4, max=8, help="Bits of the weights.")] = 8,
    target: Annotated[str, typer.Option(help="Target of the accuracy-latency plot.")] = "openvino",
    plot: Annotated[bool, typer.Option(help="Also build and time artefacts with 0, 1, 2, 4, ... float layers.")] = True,
    threads: Annotated[int, typer.Option(min=1, max=1024, help="Threads of the engine.")] = 1,
    calibration: Annotated[
        str | None, typer.Option(help="SET.json of the calibrate command, or a declared set to draw (with --data).")
    ] = None,
    ranges: Annotated[Path | None, typer.Option(help="Activation ranges that qat wrote beside its student.")] = None,
    task: TaskOption = None,
    labels: LabelsOption = None,
    container: ContainerOption = None,
    reading: Reading = AS_IT_IS,
    output: ReportOutput = SILENT,
) -> None:
    """Measure what each layer costs in INT8."""
    check_student(student)
    console.check_writable(out, "the sensitivity file")
    from tinyusfm_export.graph.build import build_graph
    from tinyusfm_export.quantize.ptq import PtqPolicy, decide
    from tinyusfm_export.quantize.sensitivity import measure_sensitivity
    from tinyusfm_export.verify.gate_frames import choose_gate_frames

    require("sensitivity", ("torch", "safetensors", "onnx"), "export")
    loaded, shipped = load(student, foreign(task, labels, container))
    given = given_ranges(loaded, calibration, ranges)
    loaded = given.student
    folder = (
        None
        if data is None
        else read_data(data, calibrate=given.from_data, calibration=given.declared, reading=reading)
    )
    for line in (folder.note, *folder.notes) if folder else ():
        console.note(f"note: {line}")
    gate_frames = choose_gate_frames(
        data=folder.validation if folder else None,
        calibration=None,
        shipped=shipped,
        source=folder.name if folder else "",
    )
    console.check_writable(out, "the sensitivity file")
    graph, used = prepared_graph(build_graph(loaded.module.eval(), loaded.spec), given, folder)
    policy = PtqPolicy(weight_limit=2 ** (weight_bits - 1) - 1, rest_precision="f32")
    decision = decide(graph, "int8", used, policy=policy)
    inputs, identity = _inputs(gate_frames, loaded.spec, frames)
    started = _Started(out, {"frames_sha256": identity, "decision": decision.to_json()})
    with one_run(out.absolute().parent, f".{out.name}.lock"), console.progress() as progress:
        found = measure_sensitivity(
            graph, decision, inputs, frames_sha256=identity, known=started.known, keep=started.keep, progress=progress
        )
        wanted = _Plot(
            graph=graph, student=loaded, ranges=used, policy=policy, frames=gate_frames, target=target, threads=threads
        )
        points = _frontier(wanted, found, progress) if plot else ()
    console.write_json(str(out), {**found.to_json(), "frontier": [p.to_json() for p in points]}, "the sensitivity file")
    started.done()
    page = out.with_suffix(".html")
    console.write_file(page, _page(loaded.spec.name, found, points, target).encode(), "the sensitivity page")
    _print(found, points)
    console.say(f"\nfiles        {out}, {page}")
    output.result({**found.to_json(), "frontier": [point.to_json() for point in points]})
    options = ["--calibration", calibration] if calibration else ["--ranges", ranges] if ranges else []
    options += ["--data", data] if data is not None else []
    output.end("export", student, "--int8", *options, "--mixed", out)


class _Started:
    """Costs found so far, beside the goal, so that a stopped run goes on."""

    def __init__(self, out: Path, identity: dict[str, Any]) -> None:
        self.path, self.identity = out.with_name(f".{out.name}.part"), identity
        self.known: dict[str, dict[str, float]] = {}
        try:
            stored = parse_json(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return
        if stored.get("identity") == json.loads(json.dumps(identity)):
            self.known = stored["costs"]
            console.note(f"note: going on with {len(self.known)} layers measured before")

    def keep(self, costs: dict[str, dict[str, float]]) -> None:
        """Stores what was found."""
        text = json.dumps({"identity": self.identity, "costs": costs})
        console.write_file(self.path, text.encode(), "the measurement so far")

    def done(self) -> None:
        """Removes it."""
        self.path.unlink(missing_ok=True)


def _inputs(gate_frames: GateFrames, spec: ModelSpec, most: int) -> tuple[list[np.ndarray], str]:
    """Evenly spaced frames, preprocessed, and the hash of which ones."""
    from tinyusfm_export.verify.engine_run import preprocess_all

    named = list(gate_frames.frames)
    if not named:
        raise InputError("there is no frame to measure on")
    chosen = evenly(named, most)
    inputs = [tensor for tensor, _ in preprocess_all([item.frame for item in chosen], spec)]
    return inputs, hashlib.sha256(b"".join(tensor.tobytes() for tensor in inputs)).hexdigest()


@dataclass(frozen=True, kw_only=True, slots=True)
class _Plot:
    """What the artefacts of the accuracy-latency plot are built of and judged on.

    Attributes:
        graph: the export graph as it becomes int8.
        student: the float student, which the gate compares with.
        ranges: activation ranges of the graph.
        policy: what becomes int8 at first.
        frames: the gate's frames.
        target: which target builds the artefacts.
        threads: of its engine.
    """

    graph: ExportGraph
    student: LoadedStudent
    ranges: Ranges
    policy: PtqPolicy
    frames: GateFrames
    target: str
    threads: int


def _frontier(plot: _Plot, found: Sensitivity, progress: Callable[[str, float], None]) -> tuple[FrontierPoint, ...]:
    """Artefacts with ever more expensive layers kept float, judged and timed."""
    from tinyusfm_export.frontier import measure_frontier
    from tinyusfm_export.verify.artefact import Checks
    from tinyusfm_export.verify.expected import expect, expect_golden
    from tinyusfm_export.verify.gate import Gate
    from tinyusfm_export.verify.golden import golden_frames

    checks = Checks(
        gate=Gate(),
        frames=expect(plot.student.module, plot.student.spec, plot.frames),
        golden=expect_golden(plot.student.module, plot.student.spec, golden_frames()[:1]),
        threads=plot.threads,
    )
    counts = [count for count in COUNTS if count < len(found.layers)]
    return measure_frontier(
        plot.graph, plot.target, plot.ranges, found, checks, counts, policy=plot.policy, progress=progress
    )


FRONTIER_HEADER = ("artefact", "agreement", "worst", "MB", "p50", "p90", "p99", "gate")


def _print(found: Sensitivity, points: tuple[FrontierPoint, ...]) -> None:
    console.say(console.table(("layer", "cost", "logits"), found.table(12)))
    console.say(f"\ncost: {found.measure}, on {found.frames} frames; layers below the first 12 are in the file")
    if points:
        console.say()
        console.say(console.table(FRONTIER_HEADER, [point.row() for point in points]))


def _page(name: str, found: Sensitivity, points: tuple[FrontierPoint, ...], target: str) -> str:
    from tinyusfm_edge.report.charts import bars, scatter
    from tinyusfm_edge.report.page import Block, Chart, Page, Table, render

    passed = [point for point in points if point.report and point.kept_float >= 0]
    headline = (
        f"The gate holds with {min(p.kept_float for p in passed)} layers kept float."
        if passed
        else "Costs of layers alone: no INT8 artefact was built and timed."
        if not points
        else "The gate is missed whatever was kept float."
    )
    blocks: list[Block] = []
    if points:
        spots = [(point.name, point.percentile(50), point.accuracy, bool(point.report)) for point in points]
        blocks.append(
            Chart(
                title="Accuracy against latency",
                note=f"{target}, engine alone; filled points hold the gate.",
                svg=scatter(spots, "p50 ms", "agreement with the float reference"),
            )
        )
        blocks.append(Table(title="Artefacts", header=FRONTIER_HEADER, rows=[point.row() for point in points]))
    costs = [(row.layer, row.cost) for row in found.layers]
    blocks.append(Chart(title="Cost of each layer, most expensive first", note=found.measure, svg=bars(costs, "cost")))
    blocks.append(Table(title="Layers", header=("layer", "cost", "logits"), rows=found.table()))
    return render(
        Page(
            title=f"INT8 sensitivity of {name}",
            passed=bool(passed) if points else None,
            headline=headline,
            blocks=blocks,
        )
    )
