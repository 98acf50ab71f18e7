"""``tinyusfm-edge sensitivity``: which layer costs how much in INT8, and accuracy against latency with fewer of them.

The JSON file is what ``export --mixed`` reads; a stopped measurement goes on from it.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tinyusfm_edge.cli import console
from tinyusfm_edge.cli.data_folder import evenly, read_data
from tinyusfm_edge.cli.student import DEFAULT_STUDENT, load, require
from tinyusfm_runtime.errors import CalibrationError, InputError

if TYPE_CHECKING:
    from tinyusfm_export.frontier import FrontierPoint
    from tinyusfm_export.sensitivity import Sensitivity

COUNTS = (0, 1, 2, 4, 8, 16, 32)
"""Float layers at the points of the accuracy-latency plot."""


def sensitivity(
    student: Annotated[str, typer.Argument(help="Shipped student or weights file.")] = DEFAULT_STUDENT,
    data: Annotated[
        Path | None, typer.Option(help="Pictures with a split.csv; the validation split measures. Default: phantoms.")
    ] = None,
    out: Annotated[Path, typer.Option(help="JSON file to write or to go on with; a .html page beside it.")] = Path(
        "sensitivity.json"
    ),
    frames: Annotated[int, typer.Option(min=1, help="Frames each layer is measured on.")] = 16,
    weight_bits: Annotated[int, typer.Option(min=4, max=8, help="Bits of the weights.")] = 8,
    target: Annotated[str, typer.Option(help="Target of the accuracy-latency plot.")] = "openvino",
    plot: Annotated[bool, typer.Option(help="Also build and time artefacts with 0, 1, 2, 4, ... float layers.")] = True,
    threads: Annotated[int, typer.Option(min=1, help="Threads of the engine.")] = 1,
) -> None:
    """Measure what each layer costs in INT8."""
    from tinyusfm_export.gate_frames import choose_gate_frames
    from tinyusfm_export.graph import build_graph
    from tinyusfm_export.ptq import PtqPolicy, decide
    from tinyusfm_export.sensitivity import measure_sensitivity

    require("sensitivity", ("torch", "safetensors", "onnx"), "export")
    loaded, shipped = load(student)
    if loaded.ranges is None:
        raise CalibrationError(f"{student} carries no activation ranges: tinyusfm-edge calibrate makes them")
    folder = None if data is None else read_data(data, calibrate=False)
    gate_frames = choose_gate_frames(
        data=folder.validation if folder else None,
        calibration=None,
        shipped=shipped,
        source=folder.name if folder else "",
    )
    console.check_writable(out, "the sensitivity file")
    graph = build_graph(loaded.module.eval(), loaded.spec)
    policy = PtqPolicy(weight_limit=2 ** (weight_bits - 1) - 1, rest_precision="f32")
    decision = decide(graph, "int8", loaded.ranges, policy=policy)
    inputs, identity = _inputs(gate_frames, loaded.spec, frames)
    started = _Started(out, {"frames_sha256": identity, "decision": decision.to_json()})
    with console.progress() as told:
        found = measure_sensitivity(
            graph, decision, inputs, frames_sha256=identity, known=started.known, keep=started.keep, progress=told
        )
        points = _frontier(graph, target, loaded, found, gate_frames, policy, threads, told) if plot else ()
    console.write_json(str(out), {**found.to_json(), "frontier": [p.to_json() for p in points]}, "the sensitivity file")
    started.done()
    page = out.with_suffix(".html")
    console.write_file(page, _page(loaded.spec.name, found, points, target).encode(), "the sensitivity page")
    _print(found, points)
    console.say(f"\nfiles        {out}, {page}")
    console.say(f"use it       tinyusfm-edge export {student} --int8 --mixed {out}")


class _Started:
    """Costs found so far, beside the goal, so that a stopped run goes on."""

    def __init__(self, out: Path, identity: dict[str, Any]) -> None:
        self.path, self.identity = out.with_name(f".{out.name}.part"), identity
        self.known: dict[str, dict[str, float]] = {}
        try:
            stored = json.loads(self.path.read_text(encoding="utf-8"))
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


def _inputs(gate_frames: Any, spec: Any, most: int) -> tuple[list[Any], str]:
    """Evenly spaced frames, preprocessed, and the hash of which ones."""
    from tinyusfm_export.engine_run import preprocess_all

    named = list(gate_frames.frames)
    if not named:
        raise InputError("there is no frame to measure on")
    chosen = evenly(named, most)
    inputs = [tensor for tensor, _ in preprocess_all([item.frame for item in chosen], spec)]
    return inputs, hashlib.sha256(b"".join(tensor.tobytes() for tensor in inputs)).hexdigest()


def _frontier(
    graph: Any, target: str, loaded: Any, found: Sensitivity, gate_frames: Any, policy: Any, threads: int, told: Any
) -> tuple[FrontierPoint, ...]:
    from tinyusfm_export.checked import Checks
    from tinyusfm_export.expected import expect, expect_golden
    from tinyusfm_export.frontier import measure_frontier
    from tinyusfm_export.gate import Gate
    from tinyusfm_export.golden import golden_frames

    checks = Checks(
        gate=Gate(),
        frames=expect(loaded.module, loaded.spec, gate_frames),
        golden=expect_golden(loaded.module, loaded.spec, golden_frames()[:1]),
        threads=threads,
    )
    counts = [count for count in COUNTS if count < len(found.layers)]
    return measure_frontier(graph, target, loaded.ranges, found, checks, counts, policy=policy, progress=told)


FRONTIER_HEADER = ("artefact", "agreement", "worst", "MB", "p50", "p90", "p99", "gate")


def _print(found: Sensitivity, points: tuple[FrontierPoint, ...]) -> None:
    console.say(console.table(("layer", "cost", "logits"), found.table(12)))
    console.say(f"\ncost: {found.measure}, on {found.frames} frames; layers below the first 12 are in the file")
    if points:
        console.say()
        console.say(console.table(FRONTIER_HEADER, [point.row() for point in points]))


def _page(name: str, found: Sensitivity, points: tuple[FrontierPoint, ...], target: str) -> str:
    from tinyusfm_edge.report.charts import scatter, strip
    from tinyusfm_edge.report.page import Block, Chart, Page, Table, render

    passed = [point for point in points if point.report and point.kept_float >= 0]
    headline = (
        f"The gate holds with {min(p.kept_float for p in passed)} layers kept float."
        if passed
        else "No INT8 artefact was measured."
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
    costs = {"cost": [row.cost for row in found.layers]}
    blocks.append(
        Chart(
            title="Cost of each layer, most expensive first", note=found.measure, svg=strip(costs, "cost", axis="layer")
        )
    )
    blocks.append(Table(title="Layers", header=("layer", "cost", "logits"), rows=found.table()))
    return render(
        Page(title=f"INT8 sensitivity of {name}", passed=bool(passed) or not points, headline=headline, blocks=blocks)
    )
