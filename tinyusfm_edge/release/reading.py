"""How a shipped student is read.

Thresholds with their rates, second pass, least area, anatomy.

``python -m tinyusfm_edge.release.reading --name fetal-head --data DIR --second-pass small --min-area 0.005`` runs the
PyTorch reference over the validation split, calibrates the thresholds as an export does, and writes ``reading.json``
and the card. A mask model with a second pass is also scored as it is read: on the validation split, and on the test
split where the card holds a look at it with these weights. With ``--measure`` it scores the validation split in one
pass and in two, prints both, and writes nothing.

It does not know training, and nothing is chosen by the test split.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tinyusfm_calibration.sets import NamedFrame
from tinyusfm_edge import students
from tinyusfm_edge.data.marks import label_numbers
from tinyusfm_edge.data.table import Sample, read_table, resize_mask, table_counts
from tinyusfm_edge.evaluation.segmentation import score_student
from tinyusfm_edge.models.checkpoint import LoadedStudent, load_student_file
from tinyusfm_edge.release.package import dump, plain_metrics, read_card, write_package
from tinyusfm_export.verify.confidence import Truth
from tinyusfm_export.verify.expected import expect
from tinyusfm_export.verify.gate_frames import choose_gate_frames
from tinyusfm_export.verify.thresholds import calibrate_reading
from tinyusfm_runtime.errors import CalibrationError, EdgeError, InputError
from tinyusfm_runtime.reading_rules import Anatomy
from tinyusfm_runtime.spec import ModelSpec, SecondPass, Task


@dataclass(frozen=True, kw_only=True, slots=True)
class ReadingPlan:
    """What is decided before anything is calibrated.

    Attributes:
        second_pass: when a frame is looked at again on a crop around the first mask.
        min_area: share of the input, 0..1, that the largest part must cover to count as found.
        anatomy: sizes that the anatomy can have, or None.
    """

    second_pass: SecondPass = SecondPass.NEVER
    min_area: float = 0.0
    anatomy: Anatomy | None = None


def add_reading(out: Path, data: Path, plan: ReadingPlan) -> dict[str, Any]:
    """Calibrates how a packaged student is read, on the validation split.

    Args:
        out: folder of the student.
        data: folder with ``split.csv`` and masks or labels.
        plan: what is decided beforehand.

    Returns:
        The card, as written.

    Raises:
        InputError: no card, no table, or a plan that the spec refuses.
        CalibrationError: no thresholds hold on these frames; the reason is named and nothing is written.
        OutputError: the folder cannot be written.
    """
    card = read_card(out)
    if card is None:
        raise InputError(f"{out} has no {students.CARD}: package the student first")
    student = planned(load_student_file(out / students.WEIGHTS), plan)
    spec = student.spec
    samples = validation_samples(student, data)
    frames = [NamedFrame(id=s.id, frame=s.frame, sha256=s.sha256, stratum="", group=s.group) for s in samples]
    gate_frames = choose_gate_frames(data=frames, source=data.name, truths=_truths(samples, spec))
    rules, why = calibrate_reading(spec, expect(student.module, spec, gate_frames), [s.group for s in samples])
    if rules is None:
        raise CalibrationError(f"{why}: use other weights or other frames")
    spec = replace(spec, reading=rules)
    stated = spec.to_json()
    told = {name: stated[name] for name in students.READING_FIELDS}
    told |= {"version": students.READING_VERSION, "weights_sha256": student.weights_sha256}
    card["spec"] = {**card["spec"], **{name: stated[name] for name in students.READING_FIELDS}}
    card["metrics"]["as_read"] = _as_read(replace(student, spec=spec), samples, data, card)
    write_package(out, {students.READING: dump(told)}, card)
    return card


def _as_read(student: LoadedStudent, val: list[Sample], data: Path, card: Mapping[str, Any]) -> dict[str, Any] | None:
    """Scores with the second pass; None where there is none."""
    if student.spec.second_pass is SecondPass.NEVER:
        return None
    has_test = card["metrics"]["test"] is not None and "test" in table_counts(data)
    splits = {"val": val, "test": read_table(data, "test", need="mask") if has_test else None}
    return {
        name: None if samples is None else plain_metrics(score_student(student, samples, name)[0])
        for name, samples in splits.items()
    }


def planned(student: LoadedStudent, plan: ReadingPlan) -> LoadedStudent:
    """The student whose spec says what the plan decided; its thresholds are gone.

    Raises:
        InputError: the spec refuses the plan, such as a second pass of a classifier.
    """
    spec = replace(
        student.spec, second_pass=plan.second_pass, min_area=plan.min_area, anatomy=plan.anatomy, reading=None
    )
    return replace(student, spec=spec)


def validation_samples(student: LoadedStudent, data: Path) -> list[Sample]:
    """The validation split, masks or labels as the task needs them.

    Raises:
        InputError: no table, or nothing in the split.
    """
    return read_table(data, "val", need="label" if student.spec.task is Task.CLASSIFY else "mask")


def compare_passes(out: Path, data: Path, plan: ReadingPlan) -> dict[str, dict[str, Any]]:
    """Scores of the validation split in one pass, as planned, and in two.

    Two passes everywhere, whatever the plan says.

    Args:
        out: folder of a packaged segmentation student with an ellipse reading.
        data: folder with ``split.csv``.
        plan: the plan; its second pass is the middle row.

    Returns:
        Name of the second pass -> Dice of the reported ellipse, errors of the circumference in mm, each with interval.

    Raises:
        InputError: not such a student, or no samples.
    """
    stored = load_student_file(out / students.WEIGHTS)
    samples = validation_samples(stored, data)
    rows = {}
    for when in dict.fromkeys((SecondPass.NEVER, plan.second_pass, SecondPass.ALWAYS)):
        student = planned(stored, replace(plan, second_pass=when))
        (report,) = score_student(student, samples, "val")
        found = report.to_json()
        names = ("dice", "ellipse_dice", "hc_mae_mm", "hc_bias_mm", "hc_p95_mm", "not_found")
        rows[when.value] = {name: found[name] for name in names}
    return rows


def _truths(samples: Sequence[Sample], spec: ModelSpec) -> list[Truth]:
    if spec.task is Task.CLASSIFY:
        known = label_numbers(spec.labels)
        return [known.get(sample.label) for sample in samples]
    return [resize_mask(sample.mask_HW, sample.frame, spec.preprocess) for sample in samples]


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description="calibrate how a shipped student is read")
    parser.add_argument("--name", required=True)
    parser.add_argument("--data", type=Path, required=True, help="folder with split.csv; its val split is used")
    parser.add_argument("--out", type=Path, default=None, help="folder of the student; the package's own by default")
    parser.add_argument("--second-pass", default="never", choices=[when.value for when in SecondPass])
    parser.add_argument("--min-area", type=float, default=0.0, help="share of the input that counts as found, 0 to 1")
    parser.add_argument("--anatomy", default="", help="name,LO,HI: plausible sizes in mm, such as 'fetal head,20,450'")
    parser.add_argument("--measure", action="store_true", help="score one pass and two, print, write nothing")
    options = parser.parse_args(arguments)
    out = options.out or students.folder(options.name)
    try:
        plan = ReadingPlan(
            second_pass=SecondPass(options.second_pass),
            min_area=options.min_area,
            anatomy=_anatomy(options.anatomy),
        )
        if options.measure:
            print(json.dumps(compare_passes(out, options.data, plan), indent=1))
        else:
            print(json.dumps(add_reading(out, options.data, plan)["spec"]["reading"], indent=1))
    except EdgeError as error:
        print(f"error: {error}")
        return error.exit_code
    return 0


def _anatomy(text: str) -> Anatomy | None:
    if not text:
        return None
    try:
        name, low, high = text.split(",")
        return Anatomy(name=name, size_mm=(float(low), float(high)))
    except ValueError as error:
        raise InputError(f"--anatomy {text!r} is not name,LO,HI: write such as 'fetal head,20,450'") from error


if __name__ == "__main__":
    raise SystemExit(main())


__all__ = ["ReadingPlan", "add_reading", "compare_passes", "planned", "validation_samples"]
