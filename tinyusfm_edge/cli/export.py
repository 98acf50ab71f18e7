"""``tinyusfm-edge export``: a student becomes a bundle, or the gate's reasons are printed and nothing is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tinyusfm_edge.cli import console
from tinyusfm_edge.cli.data_folder import DataFolder, read_data, split_names
from tinyusfm_edge.cli.student import DEFAULT_STUDENT, ForeignOptions, load, patients, require
from tinyusfm_runtime.errors import InputError

if TYPE_CHECKING:
    from tinyusfm_export.gate import Gate
    from tinyusfm_export.pipeline import ExportResult
    from tinyusfm_export.recipe import Recipe
    from tinyusfm_runtime.manifest import Artefact


def export(
    student: Annotated[str, typer.Argument(help="Shipped student or weights file.")] = DEFAULT_STUDENT,
    target: Annotated[
        str | None, typer.Option(help="Targets with commas between; the first is the first choice. Default: openvino.")
    ] = None,
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
        str | None, typer.Option(help="Calibrate anew on this declared set (with --data) instead of the stored ranges.")
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
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads of the engine while it is checked. Default: 1.")
    ] = None,
    compare: Annotated[bool, typer.Option(help="Measure float siblings beside INT8 for the verdict.")] = True,
    recipe: Annotated[
        str | None, typer.Option(help="Take what is not given here from a recipe, such as cart_x86, or a .toml file.")
    ] = None,
    compute_capability: Annotated[
        str | None, typer.Option(help="Also build TensorRT engines ahead of time, such as 8.6,8.9 (TensorRT for RTX).")
    ] = None,
    require_verified: Annotated[
        bool, typer.Option("--require-verified", help="Refuse targets whose engine cannot run here (exit code 3).")
    ] = False,
) -> None:
    """Export a student to a verified bundle."""
    from tinyusfm_calibration.methods import METHODS

    flags = {"int8": int8, "bf16": bf16, "fp16": fp16, "fp32": fp32}
    plan = make_plan(recipe, target, [name for name, wanted in flags.items() if wanted], threads, gate)
    targets, precisions = plan.targets, plan.precisions
    _check_names(targets)
    if method not in METHODS:
        raise InputError(f"--method {method}: choose one of {', '.join(METHODS)}")
    require("export", ("torch", "safetensors", "onnx"), "export")
    _check_libraries(targets)
    options = ForeignOptions(
        task=task, num_classes=num_classes, labels=split_names(labels) or None, name=name, postprocess=postprocess
    )
    loaded, shipped = load(student, options)
    calibrate = "int8" in precisions and (calibration is not None or loaded.ranges is None)
    folder = None if data is None else read_data(data, calibrate=calibrate, calibration=calibration)
    if folder is not None:
        console.note(f"note: {folder.note}")
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
            gate=plan.gate,
            gated=not no_gate,
            progress=told,
            options=replace(
                _advanced(folder, method, plan.threads, compare),
                compute_capabilities=tuple(split_names(compute_capability or "")),
                require_verified=require_verified,
            ),
        )
    _tell(result, plan, loaded.name if shipped else "")


def _tell(result: ExportResult, plan: Plan, shipped: str) -> None:
    """Prints what was published, and warns of what is unverified."""
    for line in describe(result, shipped):
        console.say(line)
    for line in plan.recipe.describe(result.verdicts) if plan.recipe else ():
        console.say(line)
    for artefact, why in result.pending.items():
        console.note(f"warning: {artefact} is unverified: {why}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What to export and how to judge it, from the options and a recipe.

    Attributes:
        targets: names as typed.
        precisions: fastest first.
        threads: of the engine while it is checked.
        gate: thresholds.
        recipe: the recipe, if one was named.
    """

    targets: list[str]
    precisions: list[str]
    threads: int
    gate: Gate
    recipe: Recipe | None = None


def make_plan(
    recipe: str | None, target: str | None, precisions: Sequence[str], threads: int | None, gate: Path | None
) -> Plan:
    """Options as given, then what a recipe says, then the defaults: openvino, int8, one thread, the default gate.

    Args:
        recipe: name or file, or None.
        target: names with commas between, or None.
        precisions: those asked for, fastest first.
        threads: or None.
        gate: a file, or None.

    Raises:
        InputError: no such recipe or gate file, or one that cannot be used.
    """
    from tinyusfm_export.gate import Gate
    from tinyusfm_export.recipe import load_recipe

    found = None if recipe is None else load_recipe(recipe)
    named = split_names(target) if target is not None else list(found.targets if found else ("openvino",))
    return Plan(
        targets=named,
        precisions=list(precisions or (found.precisions if found else ("int8",))),
        threads=threads or (found.threads if found else 1),
        gate=Gate.from_file(gate) if gate is not None else (found.gate if found else Gate()),
        recipe=found,
    )


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
    rows += [_untimed_row(result, artefact) for artefact in result.artefacts if artefact.pending]
    header = ("target", "precision", "computes in", "MB", "against the reference", "p50", "p90", "p99", "gate")
    lines = [console.table(header, rows), ""]
    first = next(iter(result.reports.values()))
    frames = first.comparison.provenance
    lines.append(f"judged on    {frames['count']} frames: {frames['about']}")
    lines += [f"verdict      {verdict.target}: {verdict.recommendation}" for verdict in result.verdicts]
    for row in patients(shipped) if shipped else []:
        lines.append(f"on patients  {patient_line(row)} (model card, not measured now)")
    if any(not artefact.gated for artefact in result.artefacts):
        lines.append("UNVERIFIED   the gate was switched off; run and verify will say so")
    lines.append(f"bundle       {result.path}")
    return lines


def _untimed_row(result: ExportResult, artefact: Artefact) -> tuple[str, ...]:
    """The table's row of an artefact whose engine did not run here: judged by its stand-in, not timed."""
    from tinyusfm_export.verdict import agreement

    size = sum(entry.size_bytes for entry in artefact.files.values())
    report = result.reports[artefact.name]
    rest = artefact.rest_precision
    computes_in = f"int8 and {rest}" if artefact.precision == "int8" else rest
    verdict = "passed, its engine pending" if report else "MISSED"
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
