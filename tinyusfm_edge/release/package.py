"""An adapted student -> package data of a shipped one.

Weights, activation ranges, card.

``python -m tinyusfm_edge.release.package --weights student.safetensors --data DIR --name fetal-head``
stores the weights as float16, reads them back, scores what was read on the validation split (on the test split only
with ``--final``, once for a package), observes activation ranges on training frames that are even over head sizes or
classes, and writes ``card.json`` and ``CARD.md``. ``--gates FILE`` only adds a patient gate's verdicts to a card,
``--drift FILE`` only the drift statistic of a calibration file.

It does not know training itself; what a run's ``config.json`` says goes into the card as it stands. What a student is
called, may be used for and was not tested on stands in student_texts.py.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from tinyusfm_calibration.ranges import SPAN, Ranges, collect_ranges
from tinyusfm_calibration.sets import (
    CalibrationSet,
    NamedFrame,
    describe_frames,
    draw,
    exclude_test_frames,
    load_declaration,
    pixels_sha256,
)
from tinyusfm_edge import students
from tinyusfm_edge.data.table import Sample, read_table, stack_frames, table_counts
from tinyusfm_edge.evaluation.classification import ClassificationReport, score_class_student
from tinyusfm_edge.evaluation.segmentation import SegmentationReport, parse_thresholds, score_student
from tinyusfm_edge.models.checkpoint import LoadedStudent, load_student_file, save_student
from tinyusfm_edge.models.macs import static_card
from tinyusfm_edge.models.student import StudentConfig
from tinyusfm_edge.release.card import CARD_VERSION, render_card
from tinyusfm_edge.release.texts import text_of
from tinyusfm_edge.training.adapt.task import predict
from tinyusfm_export.graph.build import build_graph
from tinyusfm_export.quantize.calibration_file import read_calibration_file
from tinyusfm_export.quantize.spans import calibration_taps
from tinyusfm_runtime.atomic import write_file
from tinyusfm_runtime.errors import CalibrationError, EdgeError, InputError, OutputError
from tinyusfm_runtime.numerics.order import wide
from tinyusfm_runtime.numerics.preprocess import preprocess
from tinyusfm_runtime.spec import Task
from tinyusfm_runtime.strict_json import parse_json

CALIBRATION_FRAMES = 64
"""Frames of a shipped student's calibration set."""
SIZE_STRATA = 4
"""Head-size classes, quartiles of the head's share of the image, from which they are drawn evenly."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PackagePlan:
    """What to package.

    Attributes:
        weights: student file, or state dict (safetensors or torch) with its architecture in the recipe.
        data: folder with ``split.csv``.
        name: name of the student.
        out: folder to write.
        threshold: probability cut of the mask.
        sweep: cuts to compare on the validation split.
        method: how ranges are found: minmax, percentile, entropy or mse.
        final: look at the test split.
        provisional: the card says that training is not finished.
        recipe: the run's ``config.json``, or None.
        start: where the start weights came from, one line; empty for random ones.
        successor: it replaces a student that was scored on the test split; the card tells of that look.
        negatives: folders with a ``split.csv`` of images that hold nothing to segment; their test splits are scored.
    """

    weights: Path
    data: Path
    name: str
    out: Path
    threshold: float = 0.5
    sweep: tuple[float, ...] = ()
    method: str = "percentile"
    final: bool = False
    provisional: bool = False
    recipe: Path | None = None
    start: str = ""
    successor: bool = False
    negatives: tuple[Path, ...] = ()


def package(plan: PackagePlan) -> dict[str, Any]:
    """Makes the folder of a shipped student.

    Args:
        plan: what to package.

    Returns:
        The card, as written to ``card.json``.

    Raises:
        InputError: unusable weights, data or plan, or the test split was already looked at.
        CalibrationError: the training frames cannot calibrate.
        OutputError: the folder cannot be written.
    """
    old = read_card(plan.out)
    recipe = _read_recipe(plan.recipe)
    data = stored_bytes(plan, recipe)
    with TemporaryDirectory() as temporary:
        path = Path(temporary) / students.WEIGHTS
        path.write_bytes(data)
        student = load_student_file(path)
    val = _score(student, _read(plan, "val"), "val", [plan.threshold, *plan.sweep])
    test = _test_metrics(plan, student, old)
    train = _read(plan, "train")
    frames = size_stratified(train) if text_of(plan.name).task == "segment" else label_stratified(train)
    test_frames = _read(plan, "test")
    # by file and by pixels, so that a copy stored another way is caught as well
    taken = {sample.sha256 for sample in test_frames} | {pixels_sha256(sample.frame) for sample in test_frames}
    exclude_test_frames(frames, frozenset(taken))
    ranges, calibration = observe_ranges(student, frames, plan.method)
    _drop_other(plan.out, student.weights_sha256)
    shipped = students.as_shipped(student, plan.out, demo=bool(text_of(plan.name).demo_only))
    card = {
        "version": CARD_VERSION,
        "name": plan.name,
        "provisional": plan.provisional,
        "opt_in": text_of(plan.name).opt_in,
        "demo_only": text_of(plan.name).demo_only,
        "weights": {"sha256": student.weights_sha256, "bytes": len(data), "dtype": "float16"},
        "spec": shipped.spec.to_json(),
        "architecture": static_card(student.module),
        "data": _data_source(plan),
        "recipe": recipe,
        "start": plan.start,
        "metrics": {
            "val": plain_metrics(val[0]),
            "test": test,
            "negatives": [empty_answers(student, folder) for folder in plan.negatives],
        },
        "earlier_looks": _earlier_looks(plan, student, old),
        "thresholds": [plain_metrics(report) for report in val[1:]],
        "ranges": {
            "set_id": calibration.id,
            "set_name": calibration.name,
            "method": ranges.method,
            "frames": len(calibration.ids),
            "strata": {name: calibration.strata.count(name) for name in sorted(set(calibration.strata))},
            "tensors": sum(not name.endswith(SPAN) for name in ranges.tensors),
        },
        "gates": _kept_gates(old, student.weights_sha256),
        "drift": _kept_drift(plan.out, old, student.weights_sha256),
        "wide": _stored_wide(plan.out),
    }
    write_package(plan.out, {students.WEIGHTS: data, students.RANGES: dump(ranges.to_json())}, card)
    return card


def stored_bytes(plan: PackagePlan, recipe: Mapping[str, Any] | None) -> bytes:
    """The float16 student file of a state dict.

    Args:
        plan: names the weights and the threshold.
        recipe: the run's configuration, whose ``student`` is the architecture of a bare state dict.

    Raises:
        InputError: unknown student name, a student of another task, or unusable weights.
    """
    text = text_of(plan.name)
    settings = (recipe.get("adapt") or recipe) if recipe else {}
    config = StudentConfig.from_json(dict(settings["student"])) if "student" in settings else None
    trained = load_student_file(
        plan.weights, task=text.task, name=plan.name, labels=text.labels, postprocess=text.postprocess, config=config
    )
    spec = replace(
        trained.spec,
        threshold=plan.threshold,
        licence=text.licence,
        origin=text.origin,
        intended_use=text.intended_use,
    )
    with TemporaryDirectory() as temporary:
        path = Path(temporary) / students.WEIGHTS
        save_student(path, trained.module, spec, torch.float16, trained.report.stages)
        return path.read_bytes()


def size_stratified(samples: Sequence[Sample]) -> list[NamedFrame]:
    """Names frames by head-size quartile, so that a set is drawn evenly over sizes.

    Args:
        samples: labelled frames of the training split.
    """
    shares = np.array([float(s.mask_HW.mean()) for s in samples])
    cuts = np.quantile(wide(shares), np.arange(1, SIZE_STRATA) / SIZE_STRATA)
    return [
        NamedFrame(
            id=s.id,
            frame=s.frame,
            sha256=s.sha256,
            group=s.group,
            stratum=f"size{int(np.searchsorted(cuts, share)) + 1}",
        )
        for s, share in zip(samples, shares, strict=True)
    ]


def label_stratified(samples: Sequence[Sample]) -> list[NamedFrame]:
    """Names frames by class, so that a set is drawn evenly over classes.

    Args:
        samples: labelled frames of the training split.
    """
    return [NamedFrame(id=s.id, frame=s.frame, sha256=s.sha256, group=s.group, stratum=s.label) for s in samples]


def observe_ranges(student: LoadedStudent, frames: Sequence[NamedFrame], method: str) -> tuple[Ranges, CalibrationSet]:
    """Activation ranges of a student's export graph.

    On a deterministic choice of frames.

    Args:
        student: the student as stored.
        frames: frames of the training split.
        method: minmax, percentile, entropy or mse.

    Returns:
        The ranges and the set they come from.

    Raises:
        CalibrationError: too few frames, or a tensor that is not finite or always zero.
    """
    segment = student.spec.task is Task.SEGMENT
    name = "hc18-by-size" if segment else f"{student.name}-by-class"
    declared = replace(load_declaration("hc18"), name=name, count=CALIBRATION_FRAMES)
    chosen = draw(declared, frames)
    calibration = describe_frames(declared.name, chosen)
    inputs = (preprocess(named.frame, student.spec.preprocess)[0] for named in chosen)
    ranges = collect_ranges(
        calibration_taps(build_graph(student.module, student.spec)),
        inputs,
        calibration,
        method=method,
        weights_sha256=student.weights_sha256,
    )
    return ranges, calibration


def add_gates(out: Path, gates: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Adds a patient gate's verdicts to a card and writes its text again.

    Args:
        out: folder of the student.
        gates: one mapping an artefact, with ``target``, ``precision`` and the parity report's ``summary``; it takes the
            place of an earlier one of that target and precision.

    Raises:
        InputError: no card, or an entry for other weights or without its names.
    """
    card = read_card(out)
    if card is None:
        raise InputError(f"{out} has no {students.CARD}: package the student first")
    kept = {(g["target"], g["precision"]): g for g in card["gates"]}
    for gate in gates:
        missing = {"target", "precision", "weights_sha256", "summary"} - set(gate)
        if missing:
            raise InputError(f"a gate entry lacks {', '.join(sorted(missing))}")
        if gate["weights_sha256"] != card["weights"]["sha256"]:
            raise InputError(
                f"the gate of {gate['target']} {gate['precision']} was run on other weights than the card's"
            )
        kept[gate["target"], gate["precision"]] = dict(gate)
    card["gates"] = [kept[key] for key in sorted(kept)]
    write_package(out, {}, card)
    return card


def add_drift(out: Path, calibration: Path) -> dict[str, Any]:
    """Adds the drift statistic of a calibration file to a student.

    The card is written again.

    Args:
        out: folder of the student.
        calibration: what ``tinyusfm-edge calibrate`` wrote for these weights.

    Returns:
        The card.

    Raises:
        InputError: no card, or a file that cannot be read.
        CalibrationError: the file has no statistic, or belongs to other weights.
        OutputError: the folder cannot be written.
    """
    card = read_card(out)
    if card is None:
        raise InputError(f"{out} has no {students.CARD}: package the student first")
    statistic = read_calibration_file(calibration).drift
    if statistic is None or statistic.about.get("weights_sha256") != card["weights"]["sha256"]:
        raise CalibrationError("the calibration file has no drift statistic of these weights: calibrate this student")
    raw = statistic.to_bytes()
    card["drift"] = {
        **statistic.about,
        "auxiliary": list(statistic.auxiliary),
        "false_alarms": statistic.false_alarms,
        "sha256": hashlib.sha256(raw).hexdigest(),
        "version": statistic.version,
    }
    write_package(out, {students.DRIFT: raw}, card)
    return card


def _kept_drift(out: Path, old: Mapping[str, Any] | None, weights_sha256: str) -> dict[str, Any] | None:
    """The card's entry for the same weights.

    A statistic of other weights is taken away.
    """
    found: dict[str, Any] | None = old.get("drift") if old is not None else None
    if found is not None and found["weights_sha256"] == weights_sha256:
        return found
    (out / students.DRIFT).unlink(missing_ok=True)
    return None


def add_wide(out: Path, found: Mapping[str, Any] | None) -> dict[str, Any]:
    """Writes which layers keep more than 8 bits in INT8, and says so in the card.

    Args:
        out: folder of the student.
        found: content of ``wide.json``, or None where no layer needs it: the file is then taken away.

    Returns:
        The card.

    Raises:
        InputError: no card, or layers of other weights.
        OutputError: the folder cannot be written.
    """
    card = read_card(out)
    if card is None:
        raise InputError(f"{out} has no {students.CARD}: package the student first")
    if found is not None and found["weights_sha256"] != card["weights"]["sha256"]:
        raise InputError("the layers above 8 bits were chosen for other weights than the card's")
    if found is None:
        (out / students.WIDE).unlink(missing_ok=True)
    card["wide"] = dict(found) if found is not None else None
    write_package(out, {students.WIDE: dump(found)} if found is not None else {}, card)
    return card


def _stored_wide(out: Path) -> dict[str, Any] | None:
    path = out / students.WIDE
    found: dict[str, Any] | None = parse_json(path.read_text(encoding="utf-8")) if path.is_file() else None
    return found


def _drop_other(out: Path, weights_sha256: str) -> None:
    """Removes how other weights' masks are read, and their layers above 8 bits.

    Thresholds, rates and layers hold for the weights they were found with.
    """
    for path in (out / students.READING, out / students.WIDE):
        if path.is_file() and parse_json(path.read_text(encoding="utf-8")).get("weights_sha256") != weights_sha256:
            path.unlink()


def write_package(out: Path, files: Mapping[str, bytes], card: Mapping[str, Any]) -> None:
    """Writes a student's files, each whole or not at all, the card last.

    Raises:
        OutputError: no permission or no room.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot make {out}: {error.strerror or error}") from error
    for name, data in files.items():
        write_file(out / name, data)
    write_file(out / students.CARD_TEXT, render_card(card).encode())
    write_file(out / students.CARD, dump(card))


def dump(data: Any) -> bytes:
    """JSON of a student's file: indented, keys in order, one newline at the end."""
    return (json.dumps(data, indent=1, sort_keys=True) + "\n").encode()


def read_card(out: Path) -> dict[str, Any] | None:
    """The card of a packaged student, or None where there is none."""
    path = out / students.CARD
    if not path.is_file():
        return None
    found: dict[str, Any] = parse_json(path.read_text(encoding="utf-8"))
    return found


def _read_recipe(path: Path | None) -> dict[str, Any] | None:
    if path is None:
        return None
    try:
        found: dict[str, Any] = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"recipe {path} cannot be read: {error}") from error
    return found


def _kept_gates(old: Mapping[str, Any] | None, weights_sha256: str) -> list[Any]:
    same = old is not None and old["weights"]["sha256"] == weights_sha256
    return list(old["gates"]) if old is not None and same else []


def _test_metrics(plan: PackagePlan, student: LoadedStudent, old: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Looks at the test split once.

    An earlier look is kept for the same weights and forbids a look for others.
    """
    earlier = old["metrics"]["test"] if old is not None else None
    if earlier is not None and old is not None and old["weights"]["sha256"] == student.weights_sha256:
        found: dict[str, Any] = earlier
        return found
    if earlier is not None and not plan.successor:
        raise InputError(
            f"{plan.out} was already scored on the test split with other weights: it is looked at once. A student that "
            "replaces it is packaged with --successor, and its card tells of the earlier look"
        )
    if not plan.final:
        return None
    return plain_metrics(_score(student, _read(plan, "test"), "test", ())[0])


def _earlier_looks(plan: PackagePlan, student: LoadedStudent, old: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """What was seen of the test split with predecessors' weights, oldest first."""
    if old is None:
        return []
    looks: list[dict[str, Any]] = list(old.get("earlier_looks", []))
    replaced = old["weights"]["sha256"]
    if plan.successor and old["metrics"]["test"] is not None and replaced != student.weights_sha256:
        scores = {
            name: old["metrics"]["test"][name] for name in ("dice", "hc_mae_mm") if name in old["metrics"]["test"]
        }
        looks.append({"weights_sha256": replaced, "scores": scores})
    return looks


def empty_answers(student: LoadedStudent, folder: Path, split: str = "test") -> dict[str, Any]:
    """In how many images without anything to segment a student marks nothing.

    Args:
        student: a segmentation student.
        folder: holds ``split.csv``.
        split: which of its images.

    Returns:
        ``name``, ``frames``, ``groups``, ``empty`` (frames without a marked pixel) and ``largest``, the largest marked
        share of an image, 0..1.

    Raises:
        InputError: unusable data.
    """
    spec, samples = student.spec, read_table(folder, split, need="label")
    images = torch.from_numpy(stack_frames([sample.frame for sample in samples], spec.preprocess))
    marked = torch.sigmoid(predict(student.module, images, spec.preprocess)) > spec.threshold
    shares = marked.flatten(1).float().mean(1)
    return {
        "name": folder.name,
        "frames": len(samples),
        "groups": len({sample.group for sample in samples}),
        "empty": int((shares == 0).sum()),
        "largest": float(shares.max()),
    }


def _read(plan: PackagePlan, split: str) -> list[Sample]:
    return read_table(plan.data, split, need="mask" if text_of(plan.name).task == "segment" else "label")


def _score(
    student: LoadedStudent, samples: list[Sample], split: str, thresholds: Sequence[float]
) -> list[SegmentationReport | ClassificationReport]:
    if student.spec.task is Task.CLASSIFY:
        return [score_class_student(student, samples, split)]
    return list(score_student(student, samples, split, thresholds))


def plain_metrics(report: SegmentationReport | ClassificationReport) -> dict[str, Any]:
    """What a card keeps of a report: all but the single frames."""
    plain = report.to_json()
    del plain["images"]
    return plain


def _data_source(plan: PackagePlan) -> dict[str, Any]:
    return {**text_of(plan.name).data, "splits": table_counts(plan.data)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description="package a trained student")
    parser.add_argument("--name", required=True)
    parser.add_argument("--weights", type=Path, help="student file of adapt, its run beside it")
    parser.add_argument("--data", type=Path, help="folder with split.csv")
    parser.add_argument("--out", type=Path, default=None, help="folder to write; the package's own by default")
    parser.add_argument("--threshold", type=float, default=0.5, help="probability cut of the mask")
    parser.add_argument("--sweep", default="", help="cuts to compare on the validation split, such as 0.45,0.55")
    parser.add_argument("--range-method", default="percentile", choices=("minmax", "percentile", "entropy", "mse"))
    parser.add_argument("--start", default="", help="where the start weights came from, one line for the card")
    parser.add_argument("--final", action="store_true", help="score the test split, once")
    parser.add_argument(
        "--successor", action="store_true", help="it replaces a student whose test score stands in the card"
    )
    parser.add_argument("--negatives", default="", help="folders of images that hold nothing to segment")
    parser.add_argument("--provisional", action="store_true", help="say in the card that training is not finished")
    parser.add_argument(
        "--gates", type=Path, default=None, help="JSON list of patient gate verdicts to add to the card"
    )
    parser.add_argument(
        "--drift", type=Path, default=None, help="file of the calibrate command whose drift statistic is added"
    )
    options = parser.parse_args(arguments)
    out = options.out or Path(students.__file__).parent / options.name
    try:
        if options.gates is not None:
            card = add_gates(out, parse_json(options.gates.read_text(encoding="utf-8")))
        elif options.drift is not None:
            card = add_drift(out, options.drift)
        elif options.weights is None or options.data is None:
            raise InputError("give --weights and --data, or --gates, or --drift")
        else:
            beside = (options.weights.with_suffix(".run") / "config.json", options.weights.with_name("config.json"))
            recipe = next((path for path in beside if path.is_file()), None)
            card = package(
                PackagePlan(
                    weights=options.weights,
                    data=options.data,
                    name=options.name,
                    out=out,
                    threshold=options.threshold,
                    sweep=tuple(parse_thresholds(options.sweep)),
                    method=options.range_method,
                    final=options.final,
                    provisional=options.provisional,
                    start=options.start,
                    recipe=recipe,
                    successor=options.successor,
                    negatives=tuple(Path(name) for name in options.negatives.split(",") if name),
                )
            )
        print(render_card(card))
    except (EdgeError, OSError, ValueError) as error:
        print(f"error: {error}")
        return error.exit_code if isinstance(error, EdgeError) else 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

__all__ = [
    "CALIBRATION_FRAMES",
    "SIZE_STRATA",
    "PackagePlan",
    "add_drift",
    "add_gates",
    "add_wide",
    "dump",
    "empty_answers",
    "label_stratified",
    "observe_ranges",
    "package",
    "plain_metrics",
    "read_card",
    "size_stratified",
    "stored_bytes",
    "write_package",
]
