"""The gate on patients.

Every target and precision of a shipped student, judged on a validation split.

``python -m tinyusfm_edge.release.patient_gate --name fetal-head --data DIR`` exports each artefact into a temporary
folder with the very pipeline users run, judged on the validation split of ``DIR`` against the PyTorch float32
reference, and writes the verdicts into the student's model card. Where the export's own gate (phantoms) shows that a
conversion is right on this machine, this one says what it costs on patients. Nothing but numbers and hashes is kept.

It does not know training and never reads the test split's images.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from tinyusfm_calibration.sets import NamedFrame
from tinyusfm_edge import students
from tinyusfm_edge.data.table import read_table
from tinyusfm_edge.models.checkpoint import LoadedStudent
from tinyusfm_edge.release.package import add_gates
from tinyusfm_edge.students.policies import int8_policies
from tinyusfm_export.pipeline import ExportOptions, export_bundle
from tinyusfm_export.verify.artefact import load_target
from tinyusfm_export.verify.gate_frames import GateFrames, choose_gate_frames
from tinyusfm_runtime import plugins
from tinyusfm_runtime.device.machine import machine_card
from tinyusfm_runtime.errors import EdgeError, GateError, MissingExtra, UnsupportedError
from tinyusfm_runtime.spec import Task

TARGETS = ("integer", "openvino", "onnx")
"""Targets whose engines run on a CPU."""


def patient_frames(data: Path, need: Literal["mask", "label"] = "mask") -> GateFrames:
    """The validation split as gate frames.

    Args:
        data: folder with ``split.csv``.
        need: what a row must have to count, as in training.

    Raises:
        InputError: no table, or nothing in the split.
    """
    samples = read_table(data, "val", need=need)
    named = [NamedFrame(id=s.id, frame=s.frame, sha256=s.sha256, stratum="", group=s.group) for s in samples]
    return choose_gate_frames(data=named, source=data.name)


def judge_on_patients(
    student: LoadedStudent,
    frames: GateFrames,
    target: str,
    precisions: Sequence[str],
    *,
    shipped: str = "",
    test_sha256: frozenset[str] = frozenset(),
) -> list[dict[str, Any]]:
    """Exports the artefacts of one target and judges each.

    The PyTorch reference runs once for all of them.

    Args:
        student: a LoadedStudent with ranges.
        frames: patients.
        target: public name.
        precisions: any of fp32, fp16, bf16 and int8.
        shipped: its name, where it is a shipped one (see int8_policies).
        test_sha256: hashes that calibration must not hold.

    Returns:
        Entries for the card's ``gates``, one per precision: target, precision, weights_sha256, machine, notes, and the
        summary, which holds the frames' hashes. A missed gate is an entry like any other.

    Raises:
        EdgeError: anything else that keeps an artefact from being built.
    """
    advanced = ExportOptions(
        compare=False, rounds=1, runs=1, test_sha256=test_sha256, policies=int8_policies(student.spec, shipped)
    )
    with TemporaryDirectory() as folder:
        try:
            result = export_bundle(
                student.module,
                student.spec,
                targets=[target],
                precisions=precisions,
                out=Path(folder) / "patients.bundle",
                gate_frames=frames,
                ranges=student.ranges,
                advanced=advanced,
            )
            reports, notes = result.reports, list(result.notes)
        except GateError as error:
            reports, notes = getattr(error.report, "reports", {}), [str(error)]
    return [
        {
            "target": target,
            "precision": precision,
            "weights_sha256": student.weights_sha256,
            "machine": machine_card().cpu_class,
            "notes": notes,
            "summary": report.summary(),
        }
        for precision, report in zip(precisions, reports.values(), strict=True)
    ]


def offered(target: str) -> list[str]:
    """Precisions of a target that this machine can run, best known first."""
    names: Sequence[str] = load_target(target).precisions
    return [name for name in names if name != "bf16" or machine_card().has_bf16]


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code: 1 if an artefact missed the gate."""
    parser = argparse.ArgumentParser(description="judge every artefact of a shipped student on patients")
    parser.add_argument("--name", default="fetal-head")
    parser.add_argument("--data", type=Path, required=True, help="folder with split.csv; its val split is for the gate")
    parser.add_argument("--dry-run", action="store_true", help="print, do not write the card")
    options = parser.parse_args(arguments)
    entries: list[dict[str, Any]] = []
    try:
        student = students.load(options.name)
        need: Literal["mask", "label"] = "label" if student.spec.task is Task.CLASSIFY else "mask"
        frames = patient_frames(options.data, need)
        test = frozenset(sample.sha256 for sample in read_table(options.data, "test", need=need))
        for target in TARGETS:
            try:
                judged = judge_on_patients(
                    student, frames, target, offered(target), shipped=options.name, test_sha256=test
                )
            except (MissingExtra, UnsupportedError) as error:
                print(f"{target}: not run, {error}")
                continue
            entries += judged
            for entry in judged:
                head = {"target": plugins.public_name(target), "precision": entry["precision"]}
                print(json.dumps(head | entry["summary"]["statistics"]), flush=True)
        if not options.dry_run:
            add_gates(students.folder(options.name), entries)
    except EdgeError as error:
        print(f"error: {error}")
        return error.exit_code
    return 0 if all(entry["summary"]["passed"] for entry in entries) else 1


if __name__ == "__main__":
    raise SystemExit(main())


__all__ = ["TARGETS", "judge_on_patients", "offered", "patient_frames"]
