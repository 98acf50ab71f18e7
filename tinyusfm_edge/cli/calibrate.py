"""``tinyusfm-edge calibrate``: chooses frames that cover a pool, measures how to set ranges, and writes both down.

One line of every result goes to standard output, the whole to an HTML report beside the file.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer

from tinyusfm_edge.cli import console
from tinyusfm_edge.cli.calibration_pool import Pool, is_flat, open_pool
from tinyusfm_edge.cli.data_folder import outline, split_names
from tinyusfm_edge.cli.student import ForeignOptions, load, require
from tinyusfm_runtime.errors import CalibrationError, InputError, MissingExtra

if TYPE_CHECKING:
    from tinyusfm_calibration.drift_fit import DriftSample
    from tinyusfm_calibration.sets import NamedFrame
    from tinyusfm_export.calibration_file import CalibrationFile
    from tinyusfm_export.range_choice import RangeChoice
    from tinyusfm_runtime.drift import DriftStatistic

FRAMES = 128
"""Frames of a set."""
JUDGES = 24
"""Validation frames that compare range methods, one a patient."""
AUTO = "auto"


def calibrate(
    student: Annotated[str, typer.Argument(help="Shipped student or weights file.")],
    data: Annotated[Path, typer.Argument(help="Folder with a split.csv, folder of pictures, clip or DICOM file.")],
    out: Annotated[Path, typer.Option(help="File to write; export --calibration takes it.")] = Path("set.json"),
    count: Annotated[int, typer.Option(min=1, help="Frames wanted.")] = FRAMES,
    method: Annotated[str, typer.Option(help="minmax, percentile, entropy, mse, or auto: measured.")] = AUTO,
    crop: Annotated[
        str | None,
        typer.Option(help="ROW,COL,HEIGHT,WIDTH, region (default for DICOM) or whole, before anything else."),
    ] = None,
    drift: Annotated[
        bool | None, typer.Option(help="Fit the drift statistic. Default: where there are enough patients.")
    ] = None,
    false_alarms: Annotated[float, typer.Option(help="Rate of windows that may alarm without drift.")] = 0.05,
    report: Annotated[Path | None, typer.Option(help="HTML report. Default: beside the file.")] = None,
    seed: Annotated[int, typer.Option(help="Of clusters and ties.")] = 0,
    task: Annotated[str | None, typer.Option(help="Of a weights file that does not say.")] = None,
    labels: Annotated[str | None, typer.Option(help="Names of its outputs, with commas between.")] = None,
    num_classes: Annotated[int | None, typer.Option(min=1, help="Number of its classes.")] = None,
) -> None:
    """Choose calibration frames and ranges."""
    from tinyusfm_calibration.methods import METHODS
    from tinyusfm_calibration.sets import MIN_FRAMES

    if method != AUTO and method not in METHODS:
        raise InputError(f"--method {method}: choose {AUTO} or one of {', '.join(METHODS)}")
    if count < MIN_FRAMES:
        raise CalibrationError(f"--count {count}: at least {MIN_FRAMES} frames calibrate")
    if not 0.0 < false_alarms < 1.0:
        raise InputError(f"--false-alarms {false_alarms} must lie between 0 and 1")
    require("calibrate", ("torch", "safetensors"), "torch")
    if importlib.util.find_spec("sklearn") is None:
        raise MissingExtra("calibrate", "scikit-learn", "calibration")
    console.check_writable(out, "the calibration file")
    page = report or out.with_suffix(".html")
    console.check_writable(page, "the calibration report")
    if page.resolve() == out.resolve():
        raise InputError("the report and the calibration file must be different files")
    pool = open_pool(data, crop)
    console.note(f"note: {pool.note}")
    loaded, _ = load(student, ForeignOptions(task=task, num_classes=num_classes, labels=split_names(labels) or None))
    with console.progress() as told:
        found = run(
            pool,
            loaded,
            count=count,
            methods=tuple(METHODS) if method == AUTO else (method,),
            drift=drift,
            false_alarms=false_alarms,
            seed=seed,
            told=told,
        )
    from tinyusfm_edge.report.calibration import calibration_page
    from tinyusfm_edge.report.page import render

    html = render(calibration_page(found.file, found.choice, found.chosen, found.notes, loaded.spec))
    console.write_file(page, html.encode(), "the calibration report")
    console.write_json(str(out), found.file.to_json(), "the calibration file")
    for line in describe(found):
        console.say(line)
    console.say(f"report       {page}")
    console.say(f"set          {out}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibrated:
    """What calibrating gave.

    Attributes:
        file: to be written.
        choice: everything that was measured.
        chosen: the frames, for the report's pictures.
        notes: what was left out and why.
    """

    file: CalibrationFile
    choice: RangeChoice
    chosen: Sequence[NamedFrame]
    notes: Sequence[str]


def run(
    pool: Pool,
    loaded: Any,
    *,
    count: int,
    methods: Sequence[str],
    drift: bool | None,
    false_alarms: float,
    seed: int,
    told: Callable[[str, float], None],
) -> Calibrated:
    """Chooses frames, ranges and the drift statistic.

    Args:
        pool: where frames come from.
        loaded: the student.
        count: frames wanted.
        methods: range methods to compare.
        drift: fit the drift statistic; None where it can be fitted.
        false_alarms: rate of windows that may alarm without drift.
        seed: of clusters and ties.
        told: called with what is being done and the share done.

    Raises:
        CalibrationError: too few frames, frames of the test split, or frames that cannot calibrate.
    """
    from tinyusfm_calibration.coverage import coverage_report
    from tinyusfm_calibration.sets import describe_frames, exclude_test_frames
    from tinyusfm_export.calibration_file import CalibrationFile, trial_rows
    from tinyusfm_export.drift_outputs import sampler
    from tinyusfm_export.graph import build_graph
    from tinyusfm_export.range_choice import choose_ranges
    from tinyusfm_runtime.preprocess import preprocess

    sample = sampler(loaded.module, loaded.spec)
    notes: list[str] = []
    told("looking at the pool", 0.0)
    looked = _look(pool, sample, notes)
    told("choosing frames", 0.45)
    rows, axes, selection = choose_frames(looked, count, seed)
    names = [looked.ids[row] for row in rows]
    by_name = {named.id: named for named, _ in pool.frames("train", set(names))}
    # the stratum of a set's frame is its kind along every axis
    chosen = [_with_stratum(by_name[looked.ids[row]], [axis.kinds[row] for axis in axes]) for row in rows]
    exclude_test_frames(chosen, pool.test_hashes())
    described = describe_frames(f"{pool.name}-calibrate", chosen)
    if len(rows) < count:
        notes.append(f"{count - len(rows)} frames fewer than asked for: only near-duplicates were left")
    told("comparing range methods", 0.5)
    judged = _judges(pool, set(looked.ids), seed)
    inputs, judges = (
        [preprocess(named.frame, loaded.spec.preprocess)[0] for named in frames] for frames in (chosen, judged)
    )
    choice = choose_ranges(build_graph(loaded.module, loaded.spec), inputs, judges, described, methods=methods)
    notes += choice.notes
    told("fitting the drift statistic", 0.85)
    statistic = None
    if drift is not False:
        statistic = _fit(pool, sample, looked.samples, loaded, drift is True, false_alarms, seed, notes)
    file = CalibrationFile(
        frames=described,
        ranges=choice.ranges,
        preparation=choice.preparation,
        summary=choice.summary,
        trials=trial_rows(choice.trials),
        coverage=coverage_report(axes, rows),
        selection={**selection, "pool": len(looked.ids), "judges": len(judges)},
        drift=statistic,
    )
    told("done", 1.0)
    return Calibrated(file=file, choice=choice, chosen=chosen, notes=notes)


@dataclass(frozen=True, kw_only=True, slots=True)
class Looked:
    """What is kept of a pool after looking at every frame once: no pixels."""

    ids: list[str]
    groups: list[str]
    samples: list[DriftSample]
    kinds: list[Mapping[str, str | float]]


def _look(pool: Pool, sample: Callable[[NamedFrame], DriftSample], notes: list[str]) -> Looked:
    from tinyusfm_calibration.coverage import describe_frame

    looked = Looked(ids=[], groups=[], samples=[], kinds=[])
    flat = 0
    for named, row in console.track(pool.frames("train"), "looking at the pool"):
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


def choose_frames(looked: Looked, count: int, seed: int) -> tuple[np.ndarray, list[Any], dict[str, Any]]:
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
    from tinyusfm_export.drift_outputs import tokens_of

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
    from dataclasses import replace

    return replace(named, stratum=" | ".join(kinds))


def _judges(pool: Pool, taken: set[str], seed: int) -> list[NamedFrame]:
    """Validation frames that compare methods: one a patient, drawn by hash, at most JUDGES."""
    from tinyusfm_calibration.sets import SetDeclaration, draw

    if pool.rows is not None:
        outlines = [outline(row) for row in pool.rows if row["split"] == "val"]
        declared = SetDeclaration(name="judges", source="table", about="", count=JUDGES, split="val", seed=seed)
        wanted: set[str] | None = {named.id for named in draw(declared, outlines)}
    else:
        wanted = None
    found = [named for named, _ in _first(pool.frames("val", wanted), JUDGES) if not is_flat(named.frame)]
    if not found:
        raise CalibrationError(f"{pool.name} has no validation frame to compare range methods on: give a val split")
    return found


def _first(frames: Iterator[Any], most: int) -> Iterator[Any]:
    for number, frame in enumerate(frames):
        if number == most:
            return
        yield frame


def _fit(
    pool: Pool,
    sample: Callable[[NamedFrame], DriftSample],
    fit: Sequence[DriftSample],
    loaded: Any,
    demanded: bool,
    false_alarms: float,
    seed: int,
    notes: list[str],
) -> DriftStatistic | None:
    from tinyusfm_calibration.drift_fit import fit_drift
    from tinyusfm_export.drift_outputs import drift_outputs

    tokens, peaks = drift_outputs(len(loaded.module.backbone.blocks))
    try:
        if pool.rows is None:
            raise CalibrationError("without a table nobody knows which frames are of the same patient")
        held_out = [sample(named) for named, _ in pool.frames("val") if not is_flat(named.frame)]
        return fit_drift(
            fit,
            held_out,
            token_names=tokens,
            peak_names=peaks,
            false_alarms=false_alarms,
            seed=seed,
            about={"data": pool.name, "weights_sha256": loaded.weights_sha256},
        )
    except CalibrationError as error:
        if demanded:
            raise
        notes.append(f"no drift statistic: {error}")
        return None


def describe(found: Calibrated) -> list[str]:
    """Lines that tell what was chosen."""
    file = found.file
    rows = [
        (trial["name"], f"{trial['error']:.2%}", *_dice(trial), "chosen" if trial["chosen"] else "")
        for trial in file.trials
    ]
    lines = [console.table(("ranges by", "logit error", "Dice", "worst Dice", ""), rows), ""]
    lines.append(
        f"frames       {len(file.frames.ids)} of {file.selection['pool']}, {file.selection['patients']} patients"
    )
    lines += [f"{axis:<13}{said}" for axis, said in coverage_lines(file.coverage)]
    if file.drift is not None:
        kept = file.drift.about["held_out"]
        lines.append(
            f"drift        at most {file.drift.false_alarms:.0%} false alarms a window, set on {kept} patients"
        )
    return lines + [f"note         {note}" for note in found.notes]


def _dice(trial: Mapping[str, Any]) -> tuple[str, str]:
    if trial["dice_mean"] is None:
        return "-", "-"
    return f"{trial['dice_mean']:.4f}", f"{trial['dice_worst']:.4f}"


def coverage_lines(coverage: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Axis and what of it is covered, in words."""
    found: dict[str, list[str]] = {}
    for entry in coverage:
        star = "*" if entry["measured"] else ""
        found.setdefault(f"{entry['axis']}{star}", []).append(f"{entry['kind']}: {entry['chosen']} of {entry['pool']}")
    return [(axis, "; ".join(kinds)) for axis, kinds in found.items()]
