"""``tinyusfm-edge export``: a student becomes a bundle, or the gate's reasons are printed and nothing is written."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer

from tinyusfm_edge.cli import console
from tinyusfm_edge.cli.data_folder import DataFolder, read_data, split_names
from tinyusfm_edge.cli.student import DEFAULT_STUDENT, ForeignOptions, load, patients, require
from tinyusfm_runtime.errors import GateError, InputError

if TYPE_CHECKING:
    from tinyusfm_export.calibration_file import CalibrationFile
    from tinyusfm_export.gate import Gate
    from tinyusfm_export.pipeline import ExportResult
    from tinyusfm_export.recipe import Recipe
    from tinyusfm_runtime.drift import DriftStatistic
    from tinyusfm_runtime.manifest import Artefact

CONFIDENCE_HEADER = ("target", "precision", "probability", "threshold", "ECE before", "ECE after", "flicker")
"""Of the table that says how far an artefact's probabilities moved, see tinyusfm_export/confidence.py."""


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
    full_depth: Annotated[
        bool, typer.Option("--full-depth", help="Leave early exits out: one graph that always runs to its end.")
    ] = False,
) -> None:
    """Export a student to a verified bundle."""
    _publish(SimpleNamespace(**locals()))


def _publish(wish: Any) -> None:
    """What the command does with its options, which ``wish`` has by name."""
    from tinyusfm_calibration.methods import METHODS

    flags = {name: getattr(wish, name) for name in ("int8", "w4", "w6", "bf16", "fp16", "fp32")}
    asked = [name for name, wanted in flags.items() if wanted]
    plan = make_plan(wish.recipe, wish.target, asked, wish.threads, wish.gate)
    targets, precisions = plan.targets, plan.precisions
    _check_names(targets)
    if wish.method not in METHODS:
        raise InputError(f"--method {wish.method}: choose one of {', '.join(METHODS)}")
    require("export", ("torch", "safetensors", "onnx"), "export")
    _check_libraries(targets)
    options = ForeignOptions(
        task=wish.task,
        num_classes=wish.num_classes,
        labels=split_names(wish.labels) or None,
        name=wish.name,
        postprocess=wish.postprocess,
    )
    loaded, shipped = load(wish.student, options)
    stored = _stored_calibration(wish.calibration)
    declared = wish.calibration if stored is None else None
    loaded = _with_ranges(loaded, stored, wish.ranges)
    calibrate = "int8" in precisions and stored is None and (declared is not None or loaded.ranges is None)
    folder = None if wish.data is None else read_data(wish.data, calibrate=calibrate, calibration=declared)
    if folder is not None:
        console.note(f"note: {folder.note}")
    statistic = _drift_statistic(wish.drift, stored, loaded.name if shipped else "")
    place = bundle_place(wish.out, loaded.spec.name, targets, precisions)
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
            gated=not wish.no_gate,
            progress=told,
            options=replace(
                _with_calibration(_advanced(folder, wish.method, plan.threads, wish.compare), stored, statistic),
                compute_capabilities=tuple(split_names(wish.compute_capability or "")),
                require_verified=wish.require_verified,
                full_depth=wish.full_depth,
                policies=_policies(wish.mixed, wish.weight_bits, loaded.spec),
            ),
        )
    _tell(result, plan, loaded.name if shipped else "")
    if wish.require_worth_it and not all(result.verdicts):
        raise GateError(f"INT8 was not worth it here: the bundle stands in {place.name}, this exit code says no")


def _tell(result: ExportResult, plan: Plan, shipped: str) -> None:
    """Prints what was published, and warns of what is unverified."""
    for line in describe(result, shipped):
        console.say(line)
    for line in plan.recipe.describe(result.verdicts) if plan.recipe else ():
        console.say(line)
    for artefact, why in result.pending.items():
        console.note(f"warning: {artefact} is unverified: {why}")


def _policies(mixed: Path | None, weight_bits: int, spec: Any) -> tuple[Any, ...]:
    """INT8 policies to try in turn: the default ones, or ever fewer layers by what they were measured to cost."""
    from tinyusfm_export.ladder import default_policies
    from tinyusfm_export.ptq import PtqPolicy
    from tinyusfm_export.sensitivity import Sensitivity, mixed_policies

    limit = 2 ** (weight_bits - 1) - 1
    if mixed is None:
        return tuple(replace(policy, weight_limit=limit) for policy in default_policies(spec.task))
    try:
        found = Sensitivity.from_json(json.loads(mixed.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise InputError(f"--mixed {mixed.name} cannot be read: tinyusfm-edge sensitivity writes it") from error
    if found.weights_sha256 != spec.weights_sha256:
        raise InputError(f"--mixed {mixed.name} was measured on another student: measure this one")
    return mixed_policies(found, PtqPolicy(weight_limit=limit))


def _with_ranges(loaded: Any, stored: CalibrationFile | None, ranges: Path | None) -> Any:
    """The student with the ranges that were named, if any were."""
    from tinyusfm_calibration.ranges import Ranges

    if stored is not None and ranges is not None:
        raise InputError("--calibration FILE.json carries ranges: leave --ranges out")
    if stored is not None:
        return replace(loaded, ranges=stored.ranges)
    if ranges is None:
        return loaded
    try:
        found = Ranges.from_json(json.loads(ranges.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise InputError(f"--ranges {ranges.name} cannot be read: tinyusfm-edge qat writes it") from error
    return replace(loaded, ranges=found)


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
    moved = [row for verdict in result.verdicts for row in verdict.confidence_table()]
    if moved:
        lines[1:1] = ["", console.table(CONFIDENCE_HEADER, moved)]
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


def _truths(folder: DataFolder, spec: Any) -> list[Any]:
    """What is right on each validation frame, as far as the table says: a class, or a mask at the input's size."""
    from tinyusfm_edge.training.data import resize_mask
    from tinyusfm_runtime.sources import open_source
    from tinyusfm_runtime.spec import Task

    if spec.task is Task.CLASSIFY:
        known = {label: index for index, label in enumerate(spec.labels)}
        return [known.get(named.stratum) for named in folder.validation]
    if spec.task is not Task.SEGMENT or len(spec.labels) != 1 or not any(folder.masks):
        return []
    truths: list[Any] = []
    for named, mask in zip(folder.validation, folder.masks, strict=True):
        if mask is None:
            truths.append(None)
            continue
        with open_source(f"folder:{mask}") as source:
            pixels = next(iter(source)).pixels
        grey = pixels if pixels.ndim == 2 else pixels[..., 0]
        truths.append(resize_mask((grey > 127).astype(np.uint8), named.frame, spec.preprocess))
    return truths


def _export(loaded: Any, *, folder: DataFolder | None, shipped: bool, options: Any, **rest: Any) -> ExportResult:
    from tinyusfm_export.gate_frames import choose_gate_frames
    from tinyusfm_export.pipeline import export_bundle

    calibration = folder.calibration if folder is not None and folder.calibration else None
    frames = choose_gate_frames(
        data=folder.validation if folder else None,
        calibration=calibration,
        shipped=shipped,
        source=folder.name if folder else "",
        truths=_truths(folder, loaded.spec) if folder else (),
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
