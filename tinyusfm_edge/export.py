"""Exporting a student with everything around it.

Its data folder, calibration file, recipe and gate.

    request = ExportRequest(student="mine.safetensors", targets=("openvino",), data=Path("my_frames"))
    exported = export_student(request)
    print(exported.result.path, exported.result.verdicts)

``tinyusfm_export.export_bundle`` does the work and knows none of these; the command line prints what comes out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tinyusfm_edge.data.folder import DataFolder, check_folder, read_data, split_names
from tinyusfm_edge.data.given_ranges import given_ranges
from tinyusfm_edge.data.reading import AS_IT_IS, Reading
from tinyusfm_edge.extras import require
from tinyusfm_edge.students.choice import DEFAULT_STUDENT, ForeignOptions, choose_student
from tinyusfm_edge.students.policies import int8_policies
from tinyusfm_runtime.atomic import check_writable
from tinyusfm_runtime.bundle.manifest import MANIFEST_NAME
from tinyusfm_runtime.errors import InputError
from tinyusfm_runtime.strict_json import parse_json

if TYPE_CHECKING:
    from tinyusfm_calibration.tables import Row
    from tinyusfm_edge.models.checkpoint import LoadedStudent
    from tinyusfm_edge.sector import ChosenSector
    from tinyusfm_export.pipeline import ExportOptions, ExportResult, Progress
    from tinyusfm_export.quantize.calibration_file import CalibrationFile
    from tinyusfm_export.recipe import Recipe
    from tinyusfm_export.verify.gate import Gate
    from tinyusfm_export.verify.gate_frames import Truth
    from tinyusfm_runtime.drift import DriftStatistic
    from tinyusfm_runtime.frame import Frame
    from tinyusfm_runtime.spec import ModelSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportRequest:
    """What to export and how; everything has a default.

    Attributes:
        student: name of a shipped student, or path of a weights file.
        targets: names or aliases, first choice first; empty is the recipe's, else openvino.
        precisions: fastest first; empty is the recipe's, else int8.
        out: the bundle's folder (NAME.bundle), or a folder to put it in; None is the current one.
        data: folder of images with a split.csv; its validation split is for the gate, its training split may calibrate.
        calibration: file that calibrating wrote, or name of a declared set, or None.
        drift: put the drift statistic in; None where there is one.
        method: how ranges are found in calibration frames.
        gate: file of other thresholds, or None.
        gated: False publishes unverified, and the bundle says so permanently.
        foreign: what a weights file cannot say itself.
        threads: of the engine while it is checked; None is the recipe's, else 1.
        compare: measure float siblings beside INT8 for the verdict.
        recipe: name or file, or None.
        compute_capabilities: build TensorRT engines ahead of time for these, such as ``8.6``.
        timing_caches: files that TensorRT measured on devices, put into its artefacts.
        ranges: file of activation ranges, or None.
        weight_bits: bits of INT8's weights, 4 to 8, stored in 8.
        mixed: file that the sensitivity measurement wrote, or None.
        require_verified: refuse targets whose engine cannot run here.
        full_depth: leave early exits out.
        reading: how the files of ``data`` are read.
        sector: also prune every artefact to a sector: ``auto``, a file or a fan (sector.choose_sector); or None.
        sector_only: leave the artefacts out that look at whole frames.
    """

    student: str | Path = DEFAULT_STUDENT
    targets: tuple[str, ...] = ()
    precisions: tuple[str, ...] = ()
    out: Path | None = None
    data: Path | None = None
    calibration: str | None = None
    drift: bool | None = None
    method: str = "percentile"
    gate: Path | None = None
    gated: bool = True
    foreign: ForeignOptions = field(default_factory=ForeignOptions)
    threads: int | None = None
    compare: bool = True
    recipe: str | None = None
    compute_capabilities: tuple[str, ...] = ()
    timing_caches: tuple[Path, ...] = ()
    ranges: Path | None = None
    weight_bits: int = 8
    mixed: Path | None = None
    require_verified: bool = False
    full_depth: bool = False
    reading: Reading = AS_IT_IS
    sector: str | None = None
    sector_only: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class StudentExport:
    """A published student.

    Attributes:
        result: the bundle with its reports.
        recipe: the recipe it was made by, or None.
        shipped: name of the shipped student it is, or nothing.
    """

    result: ExportResult
    recipe: Recipe | None
    shipped: str


def export_student(
    request: ExportRequest, *, progress: Progress | None = None, on_note: Callable[[str], None] | None = None
) -> StudentExport:
    """Exports a student to a verified bundle.

    Args:
        request: what to export and how.
        progress: called with what is being done and the share done.
        on_note: called with lines that a user should know, such as how a data folder was understood.

    Returns:
        The published bundle.

    Raises:
        GateError: an artefact misses the gate, or there are too few frames for it; nothing is published.
        EdgeError: whatever else cannot be read, used, run or written.
    """
    return prepare_export(request, on_note=on_note).publish(progress)


def prepare_export(request: ExportRequest, *, on_note: Callable[[str], None] | None = None) -> PreparedExport:
    """Reads and checks everything that a request names, before anything slow starts.

    Args:
        request: what to export and how.
        on_note: called with lines that a user should know.

    Raises:
        InputError: a name, file or option that cannot be used.
        CalibrationError: a calibration file that cannot be used.
        MissingExtra: a library is missing.
        OutputError: the bundle could not be written.
    """
    from tinyusfm_calibration.methods import RANGE_METHODS

    note = on_note or (lambda line: None)
    targets = ",".join(request.targets) if request.targets else None
    plan = make_plan(request.recipe, targets, request.precisions, request.threads, request.gate)
    _check_names(plan.targets)
    if request.method not in RANGE_METHODS:
        raise InputError(f"--method {request.method}: choose one of {', '.join(RANGE_METHODS)}")
    require("export", ("torch", "safetensors", "onnx"), "export")
    _check_libraries(plan.targets)
    if request.data is not None and request.gated:
        _check_rows(request.data, plan.gate, request.reading)
    student, shipped = choose_student(request.student, request.foreign, on_note=note)
    given = given_ranges(student, request.calibration, request.ranges)
    student, stored = given.student, given.stored
    calibrate = "int8" in plan.precisions and given.from_data
    folder = None
    if request.data is not None:
        folder = read_data(request.data, calibrate=calibrate, calibration=given.declared, reading=request.reading)
        for line in (folder.note, *folder.notes):
            note(line)
    sector = _sector(request, student.spec, folder, note)
    lacks_drift = False if sector is not None and request.drift is None else request.drift
    drift = _drift_statistic(lacks_drift, stored, student.name if shipped else "")
    place = bundle_place(request.out, _file_name(request.student), plan.targets, plan.precisions, request.weight_bits)
    check_writable(place, "the bundle")
    if (before := replaced(place)) is not None:
        note(before)
    return PreparedExport(
        request=request,
        plan=plan,
        student=student,
        shipped=student.name if shipped else "",
        folder=folder,
        place=place,
        options=replace(
            _options(request, plan, student, folder, stored, drift, student.name if shipped else ""),
            sector=None if sector is None else sector.sector,
            probe=None if sector is None else sector.probe,
            sector_only=sector is not None and request.sector_only,
        ),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class PreparedExport:
    """An export that is read and checked; ``publish`` is the slow part.

    Attributes:
        request: what was asked for.
        plan: targets, precisions, gate.
        student: the loaded student, with the ranges that were named.
        shipped: name of the shipped student it is, or nothing.
        folder: frames, or None.
        place: the bundle's folder.
        options: of the export.
    """

    request: ExportRequest
    plan: Plan
    student: LoadedStudent
    shipped: str
    folder: DataFolder | None
    place: Path
    options: ExportOptions

    def publish(self, progress: Progress | None = None) -> StudentExport:
        """Builds, checks and publishes.

        Raises:
            GateError: an artefact misses the gate; nothing is published.
            CalibrationError, InputError, MissingExtra, UnsupportedError, EngineError, OutputError: as in
                ``export_bundle``.
        """
        from tinyusfm_export.pipeline import export_bundle
        from tinyusfm_export.verify.gate_frames import choose_gate_frames

        folder = self.folder
        calibration = folder.calibration if folder is not None and folder.calibration else None
        frames = choose_gate_frames(
            data=folder.validation if folder else None,
            calibration=calibration,
            shipped=bool(self.shipped),
            source=folder.name if folder else "",
            truths=_truths(folder, self.student.spec) if folder else (),
            reading=folder.reading.to_json() if folder else None,
        )
        result = export_bundle(
            self.student.module,
            self.student.spec,
            targets=self.plan.targets,
            precisions=self.plan.precisions,
            out=self.place,
            gate_frames=frames,
            ranges=self.student.ranges,
            calibration=calibration,
            gate=self.plan.gate,
            gated=self.request.gated,
            progress=progress,
            advanced=self.options,
        )
        return StudentExport(result=result, recipe=self.plan.recipe, shipped=self.shipped)


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
    """Options as given, then those of a recipe, then the defaults.

    Defaults: openvino, int8, one thread, the default gate.

    Args:
        recipe: name or file, or None.
        target: names with commas between, or None.
        precisions: those asked for, fastest first.
        threads: or None.
        gate: a file, or None.

    Raises:
        InputError: no such recipe or gate file, or one that cannot be used.
    """
    from tinyusfm_export.recipe import load_recipe
    from tinyusfm_export.verify.gate import Gate

    found = None if recipe is None else load_recipe(recipe)
    named = split_names(target) if target is not None else list(found.targets if found else ("openvino",))
    return Plan(
        targets=named,
        precisions=list(precisions or (found.precisions if found else ("int8",))),
        threads=threads or (found.threads if found else 1),
        gate=Gate.from_file(gate) if gate is not None else (found.gate if found else Gate()),
        recipe=found,
    )


def bundle_place(
    out: Path | None, name: str, targets: Sequence[str], precisions: Sequence[str], weight_bits: int = 8
) -> Path:
    """The bundle's folder.

    ``out`` itself if it ends in .bundle, else ``NAME-TARGET-PRECISION.bundle`` inside it.

    Args:
        out: as asked for, or None for this folder.
        name: of the student's file, without its suffix.
        targets: as typed.
        precisions: fastest first.
        weight_bits: of INT8's weights; others than 8 stand behind the precision, as in ``int8w4``.
    """
    if out is not None and out.suffix == ".bundle":
        return out
    bits = "" if weight_bits == 8 else f"w{weight_bits}"
    named = [f"{precision}{bits}" if precision == "int8" else precision for precision in precisions]
    return (out or Path()) / f"{'-'.join([name, *targets, *named])}.bundle"


def replaced(place: Path) -> str | None:
    """What is said about a bundle that is going to be replaced, or None.

    Args:
        place: folder of the bundle to be.
    """
    manifest = place / MANIFEST_NAME
    if not manifest.is_file():
        return None
    try:
        made = parse_json(manifest.read_bytes()).get("created_utc")
    except (OSError, ValueError, AttributeError):
        made = None
    when = f" of {made.replace('T', ' ').removesuffix('Z')} UTC" if isinstance(made, str) else ""
    return f"{place.name} is there already: the bundle{when} is replaced when the new one has passed its gate"


def _file_name(student: str | Path) -> str:
    """What a bundle is named after.

    The student's file without its suffix, or a shipped student's name.
    """
    return Path(student).stem if Path(student).suffix else Path(student).name


def _check_names(targets: list[str]) -> None:
    from tinyusfm_runtime import plugins

    if not targets:
        raise InputError("no target: give --target openvino, --target onnx or both with a comma between")
    for target in targets:
        plugins.canonical("targets", target)


def _check_libraries(targets: list[str]) -> None:
    """Before anything slow starts."""
    from tinyusfm_export.verify.artefact import load_target

    for target in targets:
        load_target(target)


def _check_rows(data: Path, gate: Gate, reading: Reading) -> None:
    """Before anything slow starts: enough validation rows for the gate.

    A folder without a table is counted later.
    """
    from tinyusfm_calibration.tables import clean, find_table, read_table_rows
    from tinyusfm_export.verify.frame_count import check_frame_count

    check_folder(data)
    if find_table(data) is not None:
        rows = clean(read_table_rows(data, ("file", "split"), reading.table))[0]
        check_frame_count(sum(row.split == "val" for row in rows), gate, data.name)


def _options(
    request: ExportRequest,
    plan: Plan,
    student: LoadedStudent,
    folder: DataFolder | None,
    stored: CalibrationFile | None,
    drift: DriftStatistic | None,
    shipped: str,
) -> ExportOptions:
    from tinyusfm_edge import students
    from tinyusfm_export.pipeline import ExportOptions

    options = ExportOptions(
        method=request.method,
        threads=plan.threads,
        compare=request.compare,
        drift=drift,
        compute_capabilities=request.compute_capabilities,
        timing_caches=request.timing_caches,
        require_verified=request.require_verified,
        full_depth=request.full_depth,
        policies=int8_policies(student.spec, shipped, mixed=request.mixed, weight_bits=request.weight_bits),
        upstream=student.report.stages or (students.stages(shipped) if shipped else {}),
    )
    if folder is not None:
        options = replace(options, calibration_name=folder.calibration_name, test_sha256=folder.test_sha256)
    if stored is not None:
        options = replace(options, preparation=stored.preparation, notes=(stored.summary,))
    return options


def _sector(
    request: ExportRequest, spec: ModelSpec, folder: DataFolder | None, note: Callable[[str], None]
) -> ChosenSector | None:
    """What to prune to, or None; what follows from it is noted."""
    from tinyusfm_edge.sector import choose_sector
    from tinyusfm_runtime.spec import SecondPass

    if request.sector is None:
        if request.sector_only:
            raise InputError("--sector-only goes with --sector")
        return None
    named = (*folder.calibration, *folder.validation) if folder is not None else ()
    chosen = choose_sector(request.sector, [one.frame for one in named], spec.preprocess)
    note(chosen.note)
    if chosen.sector is None:
        return None
    if request.drift is None:
        note("no drift statistic goes in: it is taken of all patches")
    if spec.second_pass is not SecondPass.NEVER:
        note("no second pass: it looks at a crop, where the sector lies elsewhere")
    return chosen


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


def _truths(folder: DataFolder, spec: ModelSpec) -> list[Truth]:
    """The truth of each validation frame, as far as the table says.

    A class, or a mask at the input's size.
    """
    from tinyusfm_edge.data.lacking import check_values, doubt_of
    from tinyusfm_edge.data.marks import label_numbers
    from tinyusfm_edge.data.table import read_row_mask, resize_mask
    from tinyusfm_runtime.spec import Task

    if spec.task is Task.CLASSIFY:
        index = label_numbers(spec.labels)
        return [index.get(named.stratum) for named in folder.validation]
    if spec.task is not Task.SEGMENT or not any(row.mask for row in folder.rows):
        return []
    if len(spec.labels) > 1 and not set(spec.read_labels) <= set(folder.reading.masks.classes):
        return []  # nobody said which value of a mask is which label
    pairs = zip(folder.validation, folder.rows, strict=True)
    if len(spec.labels) > 1:
        maps = [None if row.mask is None else _classes(row, one.frame, folder.reading, spec) for one, row in pairs]
        _doubt_absent(maps, folder.reading, spec)
        return maps
    masks = [None if row.mask is None else read_row_mask(row, one.frame, folder.reading) for one, row in pairs]
    known = [(bool(mask.mask_HW.any()), mask.others) for mask in masks if mask is not None]
    check_values(known, "the validation frames", folder.reading.masks)
    found: list[Truth] = []
    for mask, one, row in zip(masks, folder.validation, folder.rows, strict=True):
        if mask is not None and not mask.mask_HW.any() and folder.reading.doubts is not None:
            folder.reading.doubts.add(row.where, doubt_of(mask.others, folder.reading.masks))
        found.append(None if mask is None else resize_mask(mask.mask_HW, one.frame, spec.preprocess))
    return found


def _doubt_absent(maps: Sequence[Truth], reading: Reading, spec: ModelSpec) -> None:
    """A doubt about labels that no validation mask holds.

    Their thresholds and scores have nothing to go by.
    """
    from tinyusfm_edge.data.lacking import absent_classes

    if reading.doubts is not None:
        held = [
            [name for number, name in enumerate(spec.read_labels, 1) if np.any(np.asarray(one) == number)]
            for one in maps
            if one is not None
        ]
        absent = absent_classes(held, "the validation frames", reading.masks)
        reading.doubts.add("the masks", (absent,) if absent else ())


def _classes(row: Row, frame: Frame, reading: Reading, spec: ModelSpec) -> Truth:
    """A row's labels at the input's size, of a model of several.

    0 for the background and the number of each label.
    """
    from tinyusfm_edge.data.table import read_row_classes, resize_mask

    classes_HW = read_row_classes(row, frame, spec.read_labels, reading)
    found = np.zeros((spec.preprocess.height, spec.preprocess.width), np.uint8)
    for number in range(1, len(spec.read_labels) + 1):
        found[resize_mask((classes_HW == number).astype(np.uint8), frame, spec.preprocess) > 0] = number
    return found


__all__ = [
    "ExportRequest",
    "Plan",
    "PreparedExport",
    "StudentExport",
    "bundle_place",
    "export_student",
    "make_plan",
    "prepare_export",
    "replaced",
]
