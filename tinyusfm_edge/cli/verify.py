"""``tinyusfm-edge verify``: the whole gate again, on this machine; the exit code is the verdict.

With torch and the student the reference is computed live; otherwise the one stored in the bundle is used, and said so.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tinyusfm_edge.cli import console
from tinyusfm_edge.cli.data_folder import read_data
from tinyusfm_edge.cli.export import patient_line
from tinyusfm_edge.cli.student import has_torch, load, patients, require
from tinyusfm_runtime.errors import GateError

if TYPE_CHECKING:
    from tinyusfm_runtime.bundle import Bundle


def verify(
    bundle: Annotated[Path, typer.Argument(help="The bundle's folder.")],
    data: Annotated[Path | None, typer.Option(help="Pictures, with a split.csv: its validation split is used.")] = None,
    student: Annotated[str | None, typer.Option(help="The student's weights file; shipped ones are found.")] = None,
    gate: Annotated[Path | None, typer.Option(help="Other thresholds, a .toml or .json file.")] = None,
    target: Annotated[str | None, typer.Option(help="Only artefacts of this target.")] = None,
    precision: Annotated[str | None, typer.Option(help="Only artefacts of this precision.")] = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads inside the engine.")] = 1,
    json_file: Annotated[str | None, typer.Option("--json", help="Write the report; - is standard output.")] = None,
) -> None:
    """Check a bundle against the PyTorch reference."""
    from tinyusfm_export.gate import Gate
    from tinyusfm_export.verify import verify_bundle
    from tinyusfm_runtime.bundle import Bundle

    thresholds = Gate.from_file(gate) if gate is not None else Gate()
    opened = Bundle.open(bundle)
    reference = _reference(opened, data, student)
    report = verify_bundle(opened, gate=thresholds, target=target, precision=precision, threads=threads, **reference)
    if json_file is not None:
        console.write_json(json_file, report.to_json(), "the verification report")
    if json_file != "-":
        console.say(console.table(("artefact", "demand", "measured", "limit", "verdict"), report.table()))
        console.say()
        for check in report.checks:
            for line in check.notes:
                console.say(f"note         {check.name}: {line}")
            if check.completed:
                outcome = "completed" if check.report else "FAILED"
                console.say(f"gate         {check.name}: {outcome} and kept for {check.completed}")
        frames = next((c.report.comparison.provenance for c in report.checks if c.report is not None), None)
        if frames is not None:
            console.say(f"judged on    {frames['count']} frames: {frames['about']}")
        for row in _shipped_gates(opened):
            console.say(f"on patients  {patient_line(row)} (model card, not measured now)")
        console.say(report.headline)
    if not report:
        raise GateError("; ".join(report.failures), report)


def _reference(bundle: Bundle, data: Path | None, student: str | None) -> dict[str, Any]:
    """Student and frames for the live reference, or nothing for the stored one."""
    from tinyusfm_edge import students
    from tinyusfm_export.gate_frames import choose_gate_frames

    if student is not None or data is not None:
        require("the live PyTorch reference (--student, --data)", ("torch", "safetensors"), "torch")
    known = students.find_by_hash(bundle.manifest.weights_sha256)
    if student is None and (known is None or not has_torch()):
        why = "torch is not installed" if known is not None else "its student is not a shipped one; --student names it"
        console.note(f"note: the reference stored in the bundle is used: {why}")
        return {}
    loaded, shipped = load(student or str(known), _as_in(bundle))
    folder = None if data is None else read_data(data, calibrate=False)
    frames = choose_gate_frames(
        data=folder.validation if folder else None, shipped=shipped, source=folder.name if folder else ""
    )
    return {
        "module": loaded.module,
        "weights_sha256": loaded.weights_sha256,
        "exits": loaded.spec.exits,
        "frames": frames,
    }


def _as_in(bundle: Bundle) -> Any:
    """What the bundle knows about its student, for a weights file that does not say."""
    from tinyusfm_edge.cli.student import ForeignOptions

    spec = bundle.manifest.spec
    return ForeignOptions(task=spec.task.value, labels=spec.labels or None)


def _shipped_gates(bundle: Bundle) -> list[Any]:
    from tinyusfm_edge import students

    known = students.find_by_hash(bundle.manifest.weights_sha256)
    return patients(known) if known is not None else []
