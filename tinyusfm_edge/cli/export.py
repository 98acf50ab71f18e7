"""``tinyusfm-edge export``: a student becomes a bundle.

If the gate is missed, its reasons are printed and nothing is written.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tinyusfm_edge.cli import console
from tinyusfm_edge.cli.data_options import reads_data
from tinyusfm_edge.cli.output import SILENT, ReportOutput, reports
from tinyusfm_edge.cli.train.student import DEFAULT_STUDENT, ForeignOptions, patients
from tinyusfm_edge.data.folder import split_names
from tinyusfm_edge.data.reading import AS_IT_IS, Reading
from tinyusfm_edge.export import ExportRequest, StudentExport, prepare_export
from tinyusfm_edge.report.failed_gate import failed_report, forget_failed
from tinyusfm_edge.report.results import export_page, page_place
from tinyusfm_runtime.device.engine_facts import with_place
from tinyusfm_runtime.errors import GateError, InputError
from tinyusfm_runtime.isolate import command

if TYPE_CHECKING:
    from tinyusfm_export.pipeline import ExportResult
    from tinyusfm_runtime.bundle.manifest import Artefact

CONFIDENCE_HEADER = ("target", "precision", "probability", "threshold", "ECE before", "ECE after", "flicker")
"""Of the table that says how far an artefact's probabilities moved, see tinyusfm_export/confidence.py."""


WAITS = {"tensorrt": "ONNX passed; engine not built yet", "coreml": "saved program passed; Core ML not run yet"}
"""The gate's column of an artefact that was judged by its stand-in."""


@reports("export", page=True)
@reads_data
def export(
    student: Annotated[str, typer.Argument(help="Shipped student or weights file.")] = DEFAULT_STUDENT,
    target: Annotated[
        str | None, typer.Option(help="Targets with commas between; the first is the first choice. Default: openvino.")
    ] = None,
    int8: Annotated[bool, typer.Option("--int8", help="INT8 (also if no precision is given).")] = False,
    w4: Annotated[bool, typer.Option("--w4", help="Palettes of 16 values for weights (coreml).")] = False,
    w6: Annotated[bool, typer.Option("--w6", help="Palettes of 64 values for weights (coreml).")] = False,
    bf16: Annotated[bool, typer.Option("--bf16", help="bfloat16, on a CPU that has it.")] = False,
    fp16: Annotated[bool, typer.Option("--fp16", help="float16 (on a CPU: stored so, computed in float32).")] = False,
    fp32: Annotated[bool, typer.Option("--fp32", help="float32.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="NAME.bundle to write, or a folder to put it in. Default: this folder.")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="Images, with a split.csv: its validation split is for the gate, its training split may calibrate."
        ),
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(help="SET.json of the calibrate command, or a declared set to calibrate on again (with --data)."),
    ] = None,
    drift: Annotated[
        bool | None, typer.Option(help="Put the drift statistic and its outputs in. Default: where there is one.")
    ] = None,
    method: Annotated[str, typer.Option(help="Ranges by minmax, percentile, entropy or mse.")] = "percentile",
    gate: Annotated[Path | None, typer.Option(help="Other thresholds, a .toml or .json file.")] = None,
    no_gate: Annotated[
        bool, typer.Option("--no-gate", help="Skip the accuracy check; the bundle says UNVERIFIED.")
    ] = False,
    task: Annotated[
        str | None, typer.Option(help="Task, if the weights file does not state it: segment, classify, features.")
    ] = None,
    labels: Annotated[str | None, typer.Option(help="Names of the model's outputs, with commas between.")] = None,
    num_classes: Annotated[
        int | None, typer.Option(min=1, max=console.MOST, help="Number of the model's classes.")
    ] = None,
    postprocess: Annotated[str | None, typer.Option(help="none, mask or ellipse_hc.")] = None,
    container: Annotated[
        str | None, typer.Option(help="Which model of a file that holds several, such as model_ema.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the model in the bundle.")] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, max=1024, help="Threads of the engine while it is checked. Default: 1.")
    ] = None,
    compare: Annotated[bool, typer.Option(help="Measure float siblings beside INT8 for the verdict.")] = True,
    recipe: Annotated[
        str | None, typer.Option(help="Use a device recipe (cart_x86, ...) or .toml; options on the line win.")
    ] = None,
    compute_capability: Annotated[
        str | None, typer.Option(help="Also build TensorRT engines ahead of time, such as 8.6,8.9 (TensorRT for RTX).")
    ] = None,
    timing_cache: Annotated[
        str | None, typer.Option(help="Timing caches of devices, so that they build the same TensorRT engine again.")
    ] = None,
    ranges: Annotated[Path | None, typer.Option(help="Activation ranges that qat wrote beside its student.")] = None,
    weight_bits: Annotated[int, typer.Option(min=4, max=8, help="Bits of INT8's weights, stored in 8.")] = 8,
    mixed: Annotated[
        Path | None, typer.Option(help="Keep layers float by what sensitivity found, the fewest that hold the gate.")
    ] = None,
    require_worth_it: Annotated[
        bool, typer.Option("--require-worth-it", help="Exit with 1 where the verdict says that INT8 is not worth it.")
    ] = False,
    require_verified: Annotated[
        bool, typer.Option("--require-verified", help="Refuse targets whose engine cannot run here (exit code 3).")
    ] = False,
    twice: Annotated[
        bool, typer.Option("--twice", help="Build again in a fresh process; say what differs and why (exit code 1).")
    ] = False,
    full_depth: Annotated[
        bool, typer.Option("--full-depth", help="Leave early exits out: one graph that always runs to its end.")
    ] = False,
    sector: Annotated[
        str | None,
        typer.Option(help="Also prune to a sector: auto (of --data), a file of the sector command, or a fan."),
    ] = None,
    sector_only: Annotated[
        bool, typer.Option("--sector-only", help="Pruned artefacts alone, without those to fall back to.")
    ] = False,
    max_minutes: Annotated[
        float, typer.Option(min=0.001, help="Stop the export's process after so many minutes.")
    ] = command.MAX_MINUTES,
    max_gb: Annotated[
        float, typer.Option(min=0.001, help="Stop the export's process when it holds so many GB of memory.")
    ] = command.MAX_GB,
    reading: Reading = AS_IT_IS,
    output: ReportOutput = SILENT,
) -> None:
    """Export a student to a verified bundle."""
    if command.should_start():
        again = [sys.executable, "-m", "tinyusfm_edge", *sys.argv[1:]]
        raise typer.Exit(command.run_bounded(again, "the export", minutes=max_minutes, gigabytes=max_gb))
    flags = {"int8": int8, "w4": w4, "w6": w6, "bf16": bf16, "fp16": fp16, "fp32": fp32}
    if target is not None and not split_names(target):
        raise InputError("no target: give --target openvino, --target onnx or both with a comma between")
    if require_worth_it and not compare:
        raise InputError("--require-worth-it needs a comparison: leave --no-compare out")
    foreign = ForeignOptions(
        task=task,
        num_classes=num_classes,
        labels=split_names(labels) or None,
        name=name,
        postprocess=postprocess,
        container=container,
    )
    request = ExportRequest(
        student=student,
        targets=tuple(split_names(target)),
        precisions=tuple(precision for precision, wanted in flags.items() if wanted),
        out=out,
        data=data,
        calibration=calibration,
        drift=drift,
        method=method,
        gate=gate,
        gated=not no_gate,
        foreign=foreign,
        threads=threads,
        compare=compare,
        recipe=recipe,
        compute_capabilities=tuple(split_names(compute_capability)),
        timing_caches=tuple(Path(name) for name in split_names(timing_cache)),
        ranges=ranges,
        weight_bits=weight_bits,
        mixed=mixed,
        require_verified=require_verified,
        full_depth=full_depth,
        reading=reading,
        sector=sector,
        sector_only=sector_only,
    )
    prepared = prepare_export(request, on_note=lambda line: console.note(f"note: {line}"))
    with console.progress() as progress, failed_report(prepared.place):
        exported = prepared.publish(progress)
    forget_failed(prepared.place)
    _print_result(exported)
    if twice:
        _compare_builds(request, exported)
    output.result(exported.result.to_json())
    output.page(lambda: export_page(exported.result), page_place(prepared.place))
    output.end("run", exported.result.path, "phantom:0-9")
    if require_worth_it and not all(exported.result.verdicts):
        place = prepared.place.name
        raise GateError(f"INT8 was not worth it here: the bundle stands in {place}, this exit code says no")


def _compare_builds(request: ExportRequest, exported: StudentExport) -> None:
    """Builds a second time and prints what differs."""
    from tinyusfm_edge.build_twice import build_again

    found = build_again(request, exported.result.path)
    console.say()
    console.say(console.table(("what differs between two builds", "reason"), found.table()))
    console.say(f"twice        {found.headline}")
    if not found:
        raise GateError(f"{exported.result.path.name}: {found.headline}", found)


def _print_result(exported: StudentExport) -> None:
    """Prints what was published, and warns of what is unverified."""
    result, recipe = exported.result, exported.recipe
    for line in describe(result, exported.shipped):
        console.say(line)
    for line in recipe.describe(result.verdicts) if recipe else ():
        console.say(line)
    for artefact, why in result.pending.items():
        console.note(f"warning: {artefact} is unverified: {with_place(why, result.path)}")


def describe(result: ExportResult, shipped: str) -> list[str]:
    """Lines that tell what was published.

    Args:
        result: the export.
        shipped: name of the shipped student, or nothing.
    """
    rows = [row for verdict in result.verdicts for row in verdict.table()]
    rows += [_untimed_row(result, artefact) for artefact in result.artefacts if artefact.pending]
    header = ("target", "precision", "computes in", "MB", "against the reference", "p50 ms", "p90 ms", "p99 ms", "gate")
    lines = [console.table(header, rows), ""]
    moved = [row for verdict in result.verdicts for row in verdict.confidence_table()]
    if moved:
        lines[1:1] = ["", console.table(CONFIDENCE_HEADER, moved)]
    first = next(iter(result.reports.values()))
    frames = first.comparison.provenance
    lines.append(f"judged on    {frames['count']} frames: {frames['about']}")
    lines += [f"readings     {note.removeprefix('readings ')}" for note in result.notes if note.startswith("readings ")]
    lines += [f"verdict      {verdict.target}: {verdict.recommendation}" for verdict in result.verdicts]
    here = {(artefact.target, artefact.precision) for artefact in result.artefacts}
    for row in (row for row in patients(shipped) if (row["target"], row["precision"]) in here):
        lines.append(f"on patients  {patient_line(row)} (model card, not measured now)")
    if any(not artefact.gated for artefact in result.artefacts):
        lines.append("UNVERIFIED   the gate was switched off; run and verify will say so")
    lines.append(f"bundle       {result.path}")
    return lines


def _untimed_row(result: ExportResult, artefact: Artefact) -> tuple[str, ...]:
    """The table's row of an artefact whose engine did not run here.

    It is judged by its stand-in and not timed.
    """
    from tinyusfm_export.verify.verdict import agreement

    size = sum(entry.size_bytes for entry in artefact.files.values())
    report = result.reports[artefact.name]
    rest = artefact.rest_precision
    computes_in = f"int8 and {rest}" if artefact.precision == "int8" else rest
    verdict = WAITS.get(artefact.target, "passed; not run here") if report else "MISSED"
    shown = agreement(report).lstrip(", ") or "-"
    return (artefact.target, artefact.precision, computes_in, f"{size / 1e6:.1f}", shown, "-", "-", "-", verdict)


def patient_line(row: Mapping[str, Any]) -> str:
    """One gate result of a model card in words; see the card's ``gates``."""
    found = row["summary"]
    numbers = found["statistics"]
    shown = [
        f"{words} {numbers[key]:{form}}"
        for key, words, form in (
            ("dice_mean", "mean Dice", ".4f"),
            ("dice_worst", "worst", ".4f"),
            ("hc_p95_mm", "HC p95 mm", ".2f"),
        )
        if key in numbers
    ]
    verdict = "passed" if found["passed"] else "MISSED"
    return f"{row['target']} {row['precision']}: {', '.join(shown)}, {numbers['frames']:.0f} frames, gate {verdict}"
