"""``tinyusfm-edge export``: a student becomes a bundle, or the gate's reasons are printed and nothing is written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tinyusfm_edge.cli import console
from tinyusfm_edge.cli.data_folder import DataFolder, read_data, split_names
from tinyusfm_edge.cli.student import DEFAULT_STUDENT, ForeignOptions, load, patients, require
from tinyusfm_runtime.errors import InputError

if TYPE_CHECKING:
    from tinyusfm_export.calibration_file import CalibrationFile
    from tinyusfm_export.pipeline import ExportResult
    from tinyusfm_runtime.drift import DriftStatistic


def export(
    student: Annotated[str, typer.Argument(help="Shipped student or weights file.")] = DEFAULT_STUDENT,
    target: Annotated[
        str, typer.Option(help="Targets with commas between; the first is the first choice.")
    ] = "openvino",
    int8: Annotated[bool, typer.Option("--int8", help="INT8 (also if no precision is given).")] = False,
    bf16: Annotated[bool, typer.Option("--bf16", help="bfloat16, on a CPU that has it.")] = False,
    fp16: Annotated[bool, typer.Option("--fp16", help="float16 (on a CPU: stored so, computed in float32).")] = False,
    fp32: Annotated[bool, typer.Option("--fp32", help="float32.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="NAME.bundle to write, or a folder to put it in. Default: this folder.")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="Pictures, with a split.csv: its validation split judges, its training split may calibrate."),
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(help="SET.json of the calibrate command, or a declared set to calibrate on anew (with --data)."),
    ] = None,
    drift: Annotated[
        bool | None, typer.Option(help="Put the drift statistic and its outputs in. Default: where there is one.")
    ] = None,
    method: Annotated[str, typer.Option(help="Ranges by minmax, percentile, entropy or mse.")] = "percentile",
    gate: Annotated[Path | None, typer.Option(help="Other thresholds, a .toml or .json file.")] = None,
    no_gate: Annotated[
        bool, typer.Option("--no-gate", help="Publish unverified; the bundle says so for ever.")
    ] = False,
    task: Annotated[
        str | None, typer.Option(help="Of a weights file that does not say: segment, classify, features.")
    ] = None,
    labels: Annotated[str | None, typer.Option(help="Names of its outputs, with commas between.")] = None,
    num_classes: Annotated[int | None, typer.Option(min=1, help="Number of its classes.")] = None,
    postprocess: Annotated[str | None, typer.Option(help="none, mask or ellipse_hc.")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the model in the bundle.")] = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads of the engine while it is checked.")] = 1,
    compare: Annotated[bool, typer.Option(help="Measure float siblings beside INT8 for the verdict.")] = True,
) -> None:
    """Export a student to a verified bundle."""
    from tinyusfm_calibration.methods import METHODS
    from tinyusfm_export.gate import Gate

    targets, precisions = split_names(target), chosen_precisions(int8=int8, bf16=bf16, fp16=fp16, fp32=fp32)
    _check_names(targets)
    thresholds = Gate.from_file(gate) if gate is not None else Gate()
    if method not in METHODS:
        raise InputError(f"--method {method}: choose one of {', '.join(METHODS)}")
    require("export", ("torch", "safetensors", "onnx"), "export")
    _check_libraries(targets)
    options = ForeignOptions(
        task=task, num_classes=num_classes, labels=split_names(labels) or None, name=name, postprocess=postprocess
    )
    loaded, shipped = load(student, options)
    stored = _stored_calibration(calibration)
    declared = calibration if stored is None else None
    calibrate = "int8" in precisions and stored is None and (declared is not None or loaded.ranges is None)
    folder = None if data is None else read_data(data, calibrate=calibrate, calibration=declared)
    if folder is not None:
        console.note(f"note: {folder.note}")
    statistic = _drift_statistic(drift, stored, loaded.name if shipped else "")
    if stored is not None:
        loaded = replace(loaded, ranges=stored.ranges)
    place = bundle_place(out, loaded.spec.name, targets, precisions)
    console.check_writable(place, "the bundle")
    with console.progress() as told:
        result = _export(
            loaded,
            targets=targets,
            precisions=precisions,
            out=place,
            folder=folder,
            shipped=shipped,
            gate=thresholds,
            gated=not no_gate,
            progress=told,
            options=_with_calibration(_advanced(folder, method, threads, compare), stored, statistic),
        )
    for line in describe(result, loaded.name if shipped else ""):
        console.say(line)


def chosen_precisions(*, int8: bool, bf16: bool, fp16: bool, fp32: bool) -> list[str]:
    """Precisions asked for, fastest first; INT8 where none is."""
    asked = {"int8": int8, "bf16": bf16, "fp16": fp16, "fp32": fp32}
    return [precision for precision, wanted in asked.items() if wanted] or ["int8"]


def bundle_place(out: Path | None, name: str, targets: list[str], precisions: list[str]) -> Path:
    """The bundle's folder: ``out`` itself if it ends in .bundle, else ``NAME-TARGET-PRECISION.bundle`` inside it."""
    if out is not None and out.suffix == ".bundle":
        return out
    return (out or Path()) / f"{'-'.join([name, *targets, *precisions])}.bundle"


def describe(result: ExportResult, shipped: str) -> list[str]:
    """Lines that tell what was published.

    Args:
        result: the export.
        shipped: name of the shipped student, or nothing.
    """
    rows = [row for verdict in result.verdicts for row in verdict.table()]
    header = ("target", "precision", "computes in", "MB", "against the reference", "p50", "p90", "p99", "gate")
    lines = [console.table(header, rows), ""]
    first = next(iter(result.reports.values()))
    frames = first.comparison.provenance
    lines.append(f"judged on    {frames['count']} frames: {frames['about']}")
    lines += [f"verdict      {verdict.target}: {verdict.recommendation}" for verdict in result.verdicts]
    for row in patients(shipped) if shipped else []:
        lines.append(f"on patients  {patient_line(row)} (model card, not measured now)")
    if any(not artefact.trusted for artefact in result.artefacts):
        lines.append("UNVERIFIED   the gate was switched off; run and verify will say so")
    lines.append(f"bundle       {result.path}")
    return lines


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


def _check_names(targets: list[str]) -> None:
    from tinyusfm_runtime import plugins

    if not targets:
        raise InputError("no target: give --target openvino, --target onnx or both with a comma between")
    for target in targets:
        plugins.canonical("targets", target)


def _check_libraries(targets: list[str]) -> None:
    """Before anything slow starts."""
    from tinyusfm_export.checked import load_target

    for target in targets:
        load_target(target)


def _advanced(folder: DataFolder | None, method: str, threads: int, compare: bool) -> Any:
    from tinyusfm_export.pipeline import ExportOptions

    options = ExportOptions(method=method, threads=threads, compare=compare)
    if folder is None:
        return options
    return replace(options, calibration_name=folder.calibration_name, test_sha256=folder.test_sha256)


def _stored_calibration(typed: str | None) -> CalibrationFile | None:
    """The calibration file that was named; None for a declared set or nothing."""
    if typed is None or not typed.endswith(".json"):
        return None
    from tinyusfm_export.calibration_file import read_calibration_file

    return read_calibration_file(Path(typed))


def _drift_statistic(wanted: bool | None, stored: CalibrationFile | None, shipped: str) -> DriftStatistic | None:
    """The statistic of the calibration file, else that of the shipped student.

    Raises:
        InputError: it was demanded and there is none.
    """
    from tinyusfm_edge import students

    if wanted is False:
        return None
    found = stored.drift if stored is not None else students.drift(shipped) if shipped else None
    if found is None and wanted:
        raise InputError("there is no drift statistic: calibrate with enough patients and give --calibration SET.json")
    return found


def _with_calibration(options: Any, stored: CalibrationFile | None, drift: DriftStatistic | None) -> Any:
    if stored is None:
        return replace(options, drift=drift)
    return replace(options, drift=drift, preparation=stored.preparation, notes=(stored.summary,))


def _export(loaded: Any, *, folder: DataFolder | None, shipped: bool, options: Any, **rest: Any) -> ExportResult:
    from tinyusfm_export.gate_frames import choose_gate_frames
    from tinyusfm_export.pipeline import export_bundle

    calibration = folder.calibration if folder is not None and folder.calibration else None
    frames = choose_gate_frames(
        data=folder.validation if folder else None,
        calibration=calibration,
        shipped=shipped,
        source=folder.name if folder else "",
    )
    return export_bundle(
        loaded.module,
        loaded.spec,
        gate_frames=frames,
        ranges=loaded.ranges,
        calibration=calibration,
        advanced=options,
        **rest,
    )
