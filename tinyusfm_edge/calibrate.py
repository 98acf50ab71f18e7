"""Calibrating a student: frames that cover a pool.

Ranges chosen by measurement, a drift statistic if it can be had.

    found = calibrate_student(load_student("mine.safetensors"), open_pool(Path("my_frames"), None))
    Path("set.json").write_text(json.dumps(found.file.to_json()))

The file is what ``export_student(ExportRequest(calibration="set.json"))`` takes. Nothing is printed or written here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from tinyusfm_edge.data.calibration_pool import CalibrationPool, PoolFrame, is_flat
from tinyusfm_edge.data.folder import outline
from tinyusfm_runtime.errors import CalibrationError, InputError

if TYPE_CHECKING:
    from tinyusfm_calibration.coverage import Axis
    from tinyusfm_calibration.drift_fit import DriftSample
    from tinyusfm_calibration.sets import NamedFrame
    from tinyusfm_edge.models.checkpoint import LoadedStudent
    from tinyusfm_export.quantize.calibration_file import CalibrationFile
    from tinyusfm_export.quantize.range_choice import RangeChoice
    from tinyusfm_runtime.drift import DriftStatistic

FRAMES = 128
"""Frames of a set."""
MAX_VALIDATION = 24
"""Validation frames that compare range methods, one per patient."""
AUTO = "auto"
Track = Callable[[Iterable[PoolFrame], str], Iterable[PoolFrame]]
"""Gives the items back, and may show how far they are."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CalibrateOptions:
    """How to calibrate.

    Attributes:
        count: frames wanted.
        methods: range methods to compare; empty compares all of them.
        drift: fit the drift statistic; None where there are enough patients.
        false_alarms: rate of windows that may alarm without drift, 0 to 1.
        seed: of clusters and ties.
    """

    count: int = FRAMES
    methods: tuple[str, ...] = ()
    drift: bool | None = None
    false_alarms: float = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            InputError: an unknown method, or a rate outside 0 to 1.
            CalibrationError: too few frames.
        """
        from tinyusfm_calibration.methods import RANGE_METHODS
        from tinyusfm_calibration.sets import MIN_FRAMES

        if unknown := [method for method in self.methods if method not in RANGE_METHODS]:
            raise InputError(f"--method {unknown[0]}: choose {AUTO} or one of {', '.join(RANGE_METHODS)}")
        if self.count < MIN_FRAMES:
            raise CalibrationError(f"--count {self.count}: at least {MIN_FRAMES} frames calibrate")
        if not 0.0 < self.false_alarms < 1.0:
            raise InputError(f"--false-alarms {self.false_alarms} must lie between 0 and 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibrated:
    """What calibrating gave.

    Attributes:
        file: to be written.
        choice: everything that was measured.
        chosen: the frames, for the report's images.
        notes: what was left out and why.
    """

    file: CalibrationFile
    choice: RangeChoice
    chosen: Sequence[NamedFrame]
    notes: Sequence[str]


def calibrate_student(
    student: LoadedStudent,
    pool: CalibrationPool,
    options: CalibrateOptions | None = None,
    *,
    progress: Callable[[str, float], None] | None = None,
    track: Track | None = None,
) -> Calibrated:
    """Chooses frames, ranges and the drift statistic.

    Args:
        student: the student, see ``load_student``.
        pool: where frames come from, see ``open_pool``.
        options: how; None is the usual.
        progress: called with what is being done and the share done.
        track: goes around the frames while every one is looked at, to show how far that is.

    Raises:
        CalibrationError: too few frames, frames of the test split, or frames that cannot calibrate.
    """
    from tinyusfm_calibration.coverage import coverage_report
    from tinyusfm_calibration.methods import RANGE_METHODS
    from tinyusfm_calibration.sets import describe_frames, exclude_test_frames
    from tinyusfm_export.graph.build import build_graph
    from tinyusfm_export.quantize.calibration_file import CalibrationFile, trial_rows
    from tinyusfm_export.quantize.drift_outputs import sampler
    from tinyusfm_export.quantize.range_choice import choose_ranges
    from tinyusfm_runtime.numerics.preprocess import preprocess

    options = options or CalibrateOptions()
    if options.drift:
        _check_patients(pool, options.false_alarms)
    sample = sampler(student.module, student.spec)
    notes: list[str] = []
    report = progress or (lambda what, share: None)
    report("looking at the pool", 0.0)
    looked = _look(pool, sample, notes, track or _untracked)
    report("choosing frames", 0.45)
    rows, axes, selection = choose_frames(looked, options.count, options.seed)
    names = [looked.ids[row] for row in rows]
    by_name = {named.id: named for named, _ in pool.frames("train", set(names))}
    # the stratum of a set's frame is its kind along every axis
    chosen = [_with_stratum(by_name[looked.ids[row]], [axis.kinds[row] for axis in axes]) for row in rows]
    exclude_test_frames(chosen, pool.test_hashes())
    described = describe_frames(f"{pool.name}-calibrate", chosen)
    if len(rows) < options.count:
        notes.append(fewer_frames(len(rows), len(looked.ids), options.count))
    report("comparing range methods", 0.5)
    judged = _validation(pool, options.seed)
    inputs, validation = (
        [preprocess(named.frame, student.spec.preprocess)[0] for named in frames] for frames in (chosen, judged)
    )
    methods = options.methods or tuple(RANGE_METHODS)
    choice = choose_ranges(build_graph(student.module, student.spec), inputs, validation, described, methods=methods)
    notes += choice.notes
    report("fitting the drift statistic", 0.85)
    statistic = None
    if options.drift is not False:
        statistic = _fit(pool, sample, looked.samples, student, options, notes)
    file = CalibrationFile(
        frames=described,
        ranges=choice.ranges,
        preparation=choice.preparation,
        summary=choice.summary,
        trials=trial_rows(choice.trials),
        coverage=coverage_report(axes, rows),
        selection={**selection, "pool": len(looked.ids), "judges": len(validation), **_how_read(pool)},
        drift=statistic,
    )
    report("done", 1.0)
    return Calibrated(file=file, choice=choice, chosen=chosen, notes=notes)


def _untracked(frames: Iterable[PoolFrame], label: str) -> Iterable[PoolFrame]:
    return frames


@dataclass(frozen=True, kw_only=True, slots=True)
class Looked:
    """What is kept of a pool after looking at every frame once: no pixels."""

    ids: list[str]
    groups: list[str]
    samples: list[DriftSample]
    kinds: list[Mapping[str, str | float]]


def _how_read(pool: CalibrationPool) -> dict[str, Any]:
    """How the pool's files were read, where something was asked for."""
    asked = pool.reading.to_json()
    return {"reading": asked} if asked else {}


def _look(pool: CalibrationPool, sample: Callable[[NamedFrame], DriftSample], notes: list[str], track: Track) -> Looked:
    from tinyusfm_calibration.coverage import describe_frame

    looked = Looked(ids=[], groups=[], samples=[], kinds=[])
    flat = 0
    for named, row in track(pool.frames("train"), "looking at the pool"):
        if is_flat(named.frame):
            flat += 1
            continue
        looked.ids.append(named.id)
        looked.groups.append(named.group or named.id)
        looked.samples.append(sample(named))
        looked.kinds.append(describe_frame(named.frame, row))
    if flat:
        notes.append(f"{flat} frames of one colour were left out")
    if not looked.ids:
        raise CalibrationError(f"{pool.name} has no frame that could calibrate ({flat} are of one colour)")
    return looked


def choose_frames(looked: Looked, count: int, seed: int) -> tuple[np.ndarray, list[Axis], dict[str, Any]]:
    """Clusters the pool and chooses.

    Args:
        looked: the pool.
        count: frames wanted.
        seed: of clusters and ties.

    Returns:
        Chosen rows, the axes they cover, and how they were chosen as plain data.

    Raises:
        CalibrationError: fewer frames than a set needs.
    """
    from tinyusfm_calibration.clusters import cluster
    from tinyusfm_calibration.coverage import choose_covering, find_axes
    from tinyusfm_calibration.sets import MIN_FRAMES
    from tinyusfm_export.quantize.drift_outputs import tokens_of

    if len(looked.ids) < MIN_FRAMES:
        raise CalibrationError(f"{len(looked.ids)} frames may calibrate: give at least {MIN_FRAMES}")
    tokens_NT = tokens_of(looked.samples)
    axes = find_axes(looked.kinds)
    labels = next((axis.kinds for axis in axes if axis.name == "label"), None)
    clusters = cluster(tokens_NT, strata=labels, seed=seed)
    wanted = min(count, len(looked.ids))
    rows = choose_covering(tokens_NT, looked.ids, clusters, axes, wanted, groups=looked.groups, seed=seed)
    facts = {
        "method": "coreset clusters with coverage",
        "clusters": len(clusters.centres_KP),
        "algorithm": clusters.algorithm,
        "seed": seed,
        "axes": [axis.name for axis in axes],
        "patients": len({looked.groups[row] for row in rows}),
    }
    return rows, axes, facts


def _with_stratum(named: NamedFrame, kinds: Sequence[str]) -> NamedFrame:
    return replace(named, stratum=" | ".join(kinds))


def _validation(pool: CalibrationPool, seed: int) -> list[NamedFrame]:
    """Validation frames that compare methods.

    One per patient, drawn by hash, at most MAX_VALIDATION.
    """
    from tinyusfm_calibration.sets import SetDeclaration, draw

    if pool.rows is not None:
        outlines = [outline(row) for row in pool.rows if row.split == "val"]
        declared = SetDeclaration(name="judges", source="table", about="", count=MAX_VALIDATION, split="val", seed=seed)
        wanted: set[str] | None = {named.id for named in draw(declared, outlines)}
    else:
        wanted = None
    found = [named for named, _ in _first(pool.frames("val", wanted), MAX_VALIDATION) if not is_flat(named.frame)]
    if not found:
        raise CalibrationError(f"{pool.name} has no validation frame to compare range methods on: give a val split")
    return found


def _first(frames: Iterator[PoolFrame], most: int) -> Iterator[PoolFrame]:
    for number, frame in enumerate(frames):
        if number == most:
            return
        yield frame


def fewer_frames(taken: int, pool: int, wanted: int) -> str:
    """Why fewer frames calibrate than were asked for, one line.

    Args:
        taken: frames that were chosen.
        pool: frames of the training split.
        wanted: frames that were asked for.
    """
    if taken == pool:
        return f"{taken} frames used: the training split has no more ({wanted} wanted)"
    return f"{taken} of {pool} frames used ({wanted} wanted): the others are near-duplicates of them"


def _check_patients(pool: CalibrationPool, false_alarms: float) -> None:
    """Checks that there are enough validation patients for a demanded statistic.

    Called before anything slow starts.

    Raises:
        CalibrationError: how many are needed.
    """
    from tinyusfm_calibration.drift_fit import conformal_threshold
    from tinyusfm_runtime.results import STRANGE_SHARE

    if pool.rows is not None:
        patients = {row.group for row in pool.rows if row.split == "val"}
        conformal_threshold(np.zeros(len(patients)), false_alarms * STRANGE_SHARE)


def _fit(
    pool: CalibrationPool,
    sample: Callable[[NamedFrame], DriftSample],
    fit: Sequence[DriftSample],
    student: LoadedStudent,
    options: CalibrateOptions,
    notes: list[str],
) -> DriftStatistic | None:
    from tinyusfm_calibration.drift_fit import fit_drift
    from tinyusfm_export.quantize.drift_outputs import drift_outputs

    tokens, peaks = drift_outputs(len(student.module.backbone.blocks))
    try:
        if pool.rows is None:
            raise CalibrationError("without a table nobody knows which frames are of the same patient")
        held_out = [sample(named) for named, _ in pool.frames("val") if not is_flat(named.frame)]
        return fit_drift(
            fit,
            held_out,
            token_names=tokens,
            peak_names=peaks,
            false_alarms=options.false_alarms,
            seed=options.seed,
            about={"data": pool.name, "weights_sha256": student.weights_sha256},
        )
    except CalibrationError as error:
        if options.drift:
            raise
        notes.append(f"no drift check fitted: {error}")
        return None


__all__ = [
    "AUTO",
    "FRAMES",
    "MAX_VALIDATION",
    "CalibrateOptions",
    "Calibrated",
    "Looked",
    "Track",
    "calibrate_student",
    "choose_frames",
    "fewer_frames",
]
