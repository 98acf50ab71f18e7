"""``tinyusfm-edge demo``: the main job end to end on the shipped student.

Export to INT8 for every engine that is installed, verify against PyTorch, replay the ultrasound clip inside the pydicom
wheel and phantoms of known head circumference, print one table, and leave an image, a video and a report. The report
itself is put together in demo_report.py.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tinyusfm_edge.cli import console
from tinyusfm_edge.cli.output import SILENT, ReportOutput, reports
from tinyusfm_edge.cli.start.demo_result import HEADER, Demo, Replay, known_lines, table_rows
from tinyusfm_edge.cli.train.student import DEFAULT_STUDENT, load
from tinyusfm_edge.extras import require
from tinyusfm_runtime.errors import GateError, MissingExtra, OutputError

if TYPE_CHECKING:
    from tinyusfm_runtime.bundle.manifest import Artefact
    from tinyusfm_runtime.frame import Frame

ENGINES = (("openvino", "openvino"), ("onnx", "onnxruntime"))
"""Targets of the demo, first choice first, and the extra that brings each."""
KNOWN_SEEDS = (200, 202, 206, 207, 209, 210, 211, 212)
"""Phantoms whose true circumference is shown: those from 200 on whose head lies inside the field of view.

They are neither golden, gate nor training phantoms.
"""
LATENCY_FRAMES = 10
LATENCY_ROUNDS = 10


@reports("demo")
def demo(
    out: Annotated[Path, typer.Option(help="Folder for what the demo leaves.")] = Path("demo-out"),
    output: ReportOutput = SILENT,
) -> None:
    """Export, verify and replay the shipped student.

    Leaves an image, a video and a report.
    """
    require("the demo", ("torch", "safetensors", "onnx"), "demo")
    require("the demo", ("pydicom", "av"), "demo")
    targets = _targets_here()
    with _output_folder(out):
        found = _run(targets, out)
        _print_result(found, out)
    output.result({**found.exported.to_json(), "verified": found.verified.to_json()})
    output.end("run", found.exported.path, "phantom:0-29", "--overlay", "phantom.mp4")


def _print_result(found: Demo, out: Path) -> None:
    from tinyusfm_edge.cli.start.demo_report import write_outputs

    console.say()
    console.say(console.table(HEADER, table_rows(found)))
    console.say()
    for verdict in found.exported.verdicts:
        console.say(f"verdict    {verdict.target}: {verdict.recommendation}")
    for line in known_lines(found):
        console.say(line)
    for what, place in write_outputs(found, out).items():
        console.say(f"{what:<10} {place}")
    console.say(f"{'checked':<10} {found.verified.headline}")
    if not found.verified:
        raise GateError("; ".join(found.verified.failures), found.verified)


def _targets_here() -> list[str]:
    from tinyusfm_runtime import plugins
    from tinyusfm_runtime.installation import pip_line

    working = []
    for target, extra in ENGINES:
        probe = plugins.available("engines", target)
        if probe.usable:
            working.append(target)
        else:
            console.say(f"left out   {target}: {probe.reason}; {pip_line(extra)}")
    if not working:
        raise MissingExtra("the demo", "an inference engine", "demo")
    return working


@contextmanager
def _output_folder(out: Path) -> Iterator[None]:
    """Makes the folder before anything slow starts.

    It is removed again if nothing came of it.
    """
    made = not out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{out} cannot be made: {error.strerror}") from error
    try:
        yield
    except BaseException:
        if made:
            with suppress(OSError):
                out.rmdir()
        raise


def _run(targets: list[str], out: Path) -> Demo:
    from tinyusfm_edge import students
    from tinyusfm_export.pipeline import ExportOptions, export_bundle
    from tinyusfm_export.verify.bundle import verify_bundle
    from tinyusfm_export.verify.gate_frames import clip_path, shipped_gate_frames
    from tinyusfm_runtime.phantom import make_phantom
    from tinyusfm_runtime.sources import open_source

    student, _ = load(DEFAULT_STUDENT)
    bundle = out / f"{student.name}-int8.bundle"
    console.say(f"student    {student.name}, {student.weights_sha256[:12]}: {student.spec.intended_use}")
    frames = shipped_gate_frames()
    console.say(f"export     {', '.join(targets)} in INT8, judged on {len(frames.frames)} frames: {frames.source}")
    with console.progress() as progress:
        exported = export_bundle(
            student.module,
            student.spec,
            targets=targets,
            precisions=["int8"],
            out=bundle,
            gate_frames=frames,
            ranges=student.ranges,
            progress=progress,
            advanced=ExportOptions(drift=students.drift(student.name)),
        )
    console.say("verify     against the live PyTorch reference")
    verified = verify_bundle(
        bundle, module=student.module, weights_sha256=student.weights_sha256, spec=student.spec, frames=frames
    )
    with open_source(str(clip_path())) as source:
        clip = tuple(source)
    phantoms = [make_phantom(seed) for seed in KNOWN_SEEDS]
    known = tuple(phantom.frame for phantom in phantoms)
    console.say(f"replay     {len(clip)} frames of a real ultrasound clip, {len(known)} phantoms")
    replays = tuple(_replay(bundle, artefact, clip, known) for artefact in exported.artefacts)
    return Demo(
        name=student.name,
        exported=exported,
        verified=verified,
        replays=replays,
        clip=clip,
        known=known,
        truth_mm=tuple(phantom.hc_mm for phantom in phantoms),
    )


def _replay(bundle: Path, artefact: Artefact, clip: Sequence[Frame], known: Sequence[Frame]) -> Replay:
    from tinyusfm_runtime import latency
    from tinyusfm_runtime.session import Session

    with Session.open(
        bundle, target=artefact.target, precision=artefact.variant, progress=console.Opening()
    ) as session:
        on_clip = tuple(session.predict(frame) for frame in clip)
        on_known = tuple(session.predict(frame) for frame in known)
        timed = list(itertools.islice(clip, LATENCY_FRAMES))
        report = latency.profile(session, timed, rounds=LATENCY_ROUNDS)
        return Replay(
            artefact=artefact,
            description=session.description,
            clip=on_clip,
            known=on_known,
            latency=report,
            size_bytes=sum(entry.size_bytes for entry in artefact.files.values()),
        )
