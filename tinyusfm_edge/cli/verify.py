"""``tinyusfm-edge verify``: the whole gate again, on this machine.

The exit code is the verdict.

With torch and the student the reference is computed live; otherwise the one stored in the bundle is used, and said so.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from tinyusfm_edge.cli import console
from tinyusfm_edge.cli.data_options import reads_data
from tinyusfm_edge.cli.export import patient_line
from tinyusfm_edge.cli.output import SILENT, ReportOutput, reports
from tinyusfm_edge.cli.train.student import ContainerOption, has_torch, load, patients
from tinyusfm_edge.data.folder import read_data
from tinyusfm_edge.data.reading import AS_IT_IS, Reading
from tinyusfm_edge.extras import require
from tinyusfm_runtime.errors import GateError, InputError

if TYPE_CHECKING:
    from tinyusfm_edge.data.table import Sample
    from tinyusfm_export.verify.bundle import VerifyReport
    from tinyusfm_runtime.bundle.reader import Bundle


@reports("verify", page=True)
@reads_data
def verify(
    bundle: Annotated[Path, typer.Argument(help="The bundle's folder.")],
    data: Annotated[Path | None, typer.Option(help="Images, with a split.csv: its validation split is used.")] = None,
    student: Annotated[str | None, typer.Option(help="The student's weights file; shipped ones are found.")] = None,
    gate: Annotated[Path | None, typer.Option(help="Other thresholds, a .toml or .json file.")] = None,
    target: Annotated[str | None, typer.Option(help="Only artefacts of this target.")] = None,
    precision: Annotated[str | None, typer.Option(help="Only artefacts of this precision.")] = None,
    threads: Annotated[int, typer.Option(min=1, max=1024, help="Threads inside the engine.")] = 1,
    report_file: Annotated[
        Path | None,
        typer.Option("--report", help="Also look at truth, layers, repeats and flicker; write a page of it."),
    ] = None,
    split: Annotated[str, typer.Option(help="Labelled split of the data that is compared with the truth.")] = "val",
    margins: Annotated[
        str, typer.Option(help="How much worse than the reference is allowed, such as dice=0.01,hc_abs_error_mm=1.")
    ] = "",
    clip: Annotated[str | None, typer.Option(help="Source of consecutive frames, for flicker (with --report).")] = None,
    container: ContainerOption = None,
    reading: Reading = AS_IT_IS,
    output: ReportOutput = SILENT,
) -> None:
    """Check a bundle against the PyTorch reference."""
    from tinyusfm_edge.cli.trust.examined import Asked, examined, finding_lines
    from tinyusfm_edge.evaluation.noninferiority import parse_margins
    from tinyusfm_edge.report.results import verify_page
    from tinyusfm_export.verify.bundle import choose_artefacts, verify_bundle
    from tinyusfm_export.verify.gate import Gate
    from tinyusfm_runtime.bundle.reader import Bundle
    from tinyusfm_runtime.isolate.session import try_open

    allowed = parse_margins(margins) if margins else None
    if (margins or clip is not None) and report_file is None:
        raise InputError("--margins and --clip belong to what --report looks at: give --report FILE.html")
    thresholds = Gate.from_file(gate) if gate is not None else None
    opened = Bundle.open(bundle)
    # a hostile or broken artefact ends a process that can be stopped, not this one
    for artefact in choose_artefacts(opened, target, precision):
        try_open(bundle, target=artefact.target, precision=artefact.variant, progress=console.Opening())
    reference = _reference(opened, data, student, reading, container)
    report = verify_bundle(opened, gate=thresholds, target=target, precision=precision, threads=threads, **reference)
    findings = None
    if report_file is not None:
        asked = Asked(
            samples=_samples(opened, data, split, reading),
            clip=clip,
            margins=allowed,
            threads=threads,
            chosen=choose_artefacts(opened, target, precision),
        )
        findings = examined(opened, report, reference.get("module"), asked, report_file)
    output.result(report.to_json() | ({"beside_the_gate": findings.to_json()} if findings is not None else {}))
    if report_file is None or output.page_place is None or output.page_place.resolve() != report_file.resolve():
        output.page(lambda: verify_page(report))
    for line in finding_lines(findings) if findings is not None else ():
        console.say(line)
    _tell(report, _shipped_gates(opened))
    failures = (*(() if report else report.failures), *(findings.failures if findings is not None else ()))
    if failures:
        raise GateError("; ".join(failures), report)
    output.end("run", bundle, "phantom:0-9")


def _samples(bundle: Bundle, data: Path | None, split: str, reading: Reading) -> list[Sample]:
    """Labelled frames, or none.

    Where the table names no truth this is said.
    """
    from tinyusfm_edge.data.table import read_table
    from tinyusfm_runtime.spec import Task

    if data is None:
        return []
    need: Literal["mask", "label"] = "label" if bundle.manifest.spec.task is Task.CLASSIFY else "mask"
    try:
        return read_table(data, split, need=need, reading=reading)
    except InputError as error:
        console.note(f"note: nothing is compared with the truth: {error}")
        return []


def _tell(report: VerifyReport, shipped: list[Any]) -> None:
    """What was found, for people."""
    console.say(console.table(("artefact", "demand", "measured", "limit", "verdict"), report.table()))
    console.say()
    for check in report.checks:
        for line in (*check.notes, *([f"not run here: {check.skipped}"] if check.skipped else ())):
            console.say(f"note         {check.name}: {line}")
        if check.completed:
            outcome = "completed" if check.report else "FAILED"
            console.say(f"gate         {check.name}: {outcome} and kept for {check.completed}")
    frames = next((c.report.comparison.provenance for c in report.checks if c.report is not None), None)
    if frames is not None:
        console.say(f"judged on    {frames['count']} frames: {frames['about']}")
    for row in shipped:
        console.say(f"on patients  {patient_line(row)} (model card, not measured now)")
    console.say(report.headline)


def _reference(
    bundle: Bundle, data: Path | None, student: str | None, reading: Reading, container: str | None
) -> dict[str, Any]:
    """Student and frames for the live reference, or nothing for the stored one."""
    from tinyusfm_edge import students
    from tinyusfm_export.verify.gate_frames import choose_gate_frames

    if student is not None or data is not None:
        require("the live PyTorch reference (--student, --data)", ("torch", "safetensors"), "torch")
    known = students.find_by_hash(bundle.manifest.weights_sha256)
    if student is None and (known is None or not has_torch()):
        why = "torch is not installed" if known is not None else "its student is not a shipped one; --student names it"
        console.note(f"note: the reference stored in the bundle is used: {why}")
        return {}
    loaded, shipped, own = _load(student or str(known), bundle, container)
    folder = None if data is None else read_data(data, calibrate=False, reading=reading)
    for line in folder.notes if folder else ():
        console.note(f"note: {line}")
    frames = choose_gate_frames(
        data=folder.validation if folder else None,
        shipped=shipped,
        source=folder.name if folder else "",
        reading=reading.to_json(),
    )
    return {
        "module": loaded.module,
        "weights_sha256": loaded.weights_sha256,
        "exits": loaded.spec.exits,
        "spec": own,
        "frames": frames,
    }


def _load(typed: str, bundle: Bundle, container: str | None) -> tuple[Any, bool, Any]:
    """The student, whether it is a shipped one, and what its own file says of it.

    None where it does not say.
    """
    from tinyusfm_edge import students
    from tinyusfm_edge.models.checkpoint import describes_itself

    if typed in students.names() or describes_itself(Path(typed)):
        loaded, shipped = load(typed)
        return loaded, shipped, loaded.spec
    console.note("note: the weights file does not say what it is: labels and threshold are the bundle's word")
    loaded, shipped = load(typed, _as_in(bundle, container))
    return loaded, shipped, loaded.spec if shipped else None


def _as_in(bundle: Bundle, container: str | None) -> Any:
    """What the bundle knows about its student, for a weights file that does not say."""
    from tinyusfm_edge.cli.train.student import ForeignOptions

    spec = bundle.manifest.spec
    return ForeignOptions(task=spec.task.value, labels=spec.labels or None, container=container)


def _shipped_gates(bundle: Bundle) -> list[Any]:
    from tinyusfm_edge import students

    known = students.find_by_hash(bundle.manifest.weights_sha256)
    return patients(known) if known is not None else []
