"""``tinyusfm-edge demo``: the main job end to end in one go, on the shipped student.

Export to INT8 for every engine that is installed, verify against PyTorch, replay the ultrasound clip inside the pydicom
wheel and phantoms of known head circumference, print one table, and leave a picture, a video and a report. The report
itself is put together in demo_report.py.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tinyusfm_edge.cli import console
from tinyusfm_edge.cli.student import DEFAULT_STUDENT, load, require
from tinyusfm_runtime.errors import GateError, MissingExtra, OutputError

if TYPE_CHECKING:
    from tinyusfm_export.pipeline import ExportResult
    from tinyusfm_export.verify import VerifyReport
    from tinyusfm_runtime.frame import Frame
    from tinyusfm_runtime.latency import LatencyReport
    from tinyusfm_runtime.manifest import Artefact
    from tinyusfm_runtime.session import Prediction

ENGINES = (("openvino", "openvino"), ("onnx", "onnxruntime"))
"""Targets of the demo, first choice first, and the extra that brings each."""
KNOWN_SEEDS = range(200, 208)
"""Phantoms whose true circumference is shown; they are neither golden, gate nor training phantoms."""
LATENCY_FRAMES = 10
LATENCY_ROUNDS = 10


@dataclass(frozen=True, kw_only=True, slots=True)
class Replay:
    """What one artefact said in the demo.

    Attributes:
        artefact: the manifest's entry.
        description: artefact and engine really used.
        clip: a prediction for every frame of the clip.
        known: a prediction for every phantom of known circumference.
        latency: frame to mask, warm.
        size_bytes: all files of the artefact.
    """

    artefact: Artefact
    description: str
    clip: tuple[Prediction, ...]
    known: tuple[Prediction, ...]
    latency: LatencyReport
    size_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Demo:
    """Everything the demo found.

    Attributes:
        name: of the student.
        exported: the bundle and its reports.
        verified: the live check of what was published.
        replays: one an artefact, the first choice first.
        clip: frames of the clip.
        known: phantom frames.
        truth_mm: their circumferences, mm.
    """

    name: str
    exported: ExportResult
    verified: VerifyReport
    replays: tuple[Replay, ...]
    clip: tuple[Frame, ...]
    known: tuple[Frame, ...]
    truth_mm: tuple[float, ...]


def demo(
    out: Annotated[Path, typer.Option(help="Folder for what the demo leaves.")] = Path("demo-out"),
) -> None:
    """Export, verify and replay the shipped student; leaves a picture, a video and a report."""
    require("the demo", ("torch", "safetensors", "onnx"), "demo")
    require("the demo", ("pydicom", "av"), "demo")
    targets = _targets_here()
    with _output_folder(out):
        _tell(_run(targets, out), out)


def _tell(found: Demo, out: Path) -> None:
    from tinyusfm_edge.cli.demo_report import write_outputs

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


HEADER = ("target", "precision", "MB", "Dice mean", "worst", "HC p95 mm", "p50 ms", "p90", "p99", "verdict")
"""Columns of the demo's table: agreement with the PyTorch reference on the gate's frames, and frame to mask in ms."""


def table_rows(found: Demo) -> list[tuple[str, ...]]:
    """The demo's one table."""
    rows = []
    for replay in found.replays:
        check = next(c for c in found.verified.checks if c.name == replay.artefact.name)
        numbers = check.report.comparison.statistics if check.report is not None else {}
        rows.append(
            (
                replay.artefact.target,
                replay.artefact.precision,
                f"{replay.size_bytes / 1e6:.1f}",
                *(f"{numbers[key]:.4f}" if key in numbers else "-" for key in ("dice_mean", "dice_worst")),
                f"{numbers['hc_p95_mm']:.2f}" if "hc_p95_mm" in numbers else "-",
                *(f"{replay.latency.percentile('total_ms', percent):.1f}" for percent in (50, 90, 99)),
                "passed" if check.report else "MISSED",
            )
        )
    return rows


def known_lines(found: Demo) -> list[str]:
    """How near each artefact came to the circumferences that are known."""
    lines = []
    for replay in found.replays:
        errors = [
            abs(p.measurement.hc_mm - truth)
            for p, truth in zip(replay.known, found.truth_mm, strict=True)
            if p.measurement is not None and p.measurement.hc_mm is not None
        ]
        worst = (
            f"mean error {sum(errors) / len(errors):.2f} mm, largest {max(errors):.2f} mm"
            if errors
            else "no head found"
        )
        lines.append(
            f"phantoms   {replay.artefact.target}: known circumference of {len(found.truth_mm)} phantoms, {worst}"
        )
    return lines


def _targets_here() -> list[str]:
    from tinyusfm_runtime import plugins

    working = []
    for target, extra in ENGINES:
        probe = plugins.probe("engines", target)
        if probe.works:
            working.append(target)
        else:
            console.say(f"left out   {target}: {probe.reason}; pip install 'tinyusfm-edge[{extra}]'")
    if not working:
        raise MissingExtra("the demo", "an inference engine", "demo")
    return working


@contextmanager
def _output_folder(out: Path) -> Iterator[None]:
    """Makes the folder before anything slow starts, and takes it away again if nothing came of it."""
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
    from tinyusfm_export.gate_frames import clip_path, shipped_gate_frames
    from tinyusfm_export.pipeline import export_bundle
    from tinyusfm_export.verify import verify_bundle
    from tinyusfm_runtime.phantom import make_phantom
    from tinyusfm_runtime.sources import open_source

    student, _ = load(DEFAULT_STUDENT)
    bundle = out / f"{student.name}-int8.bundle"
    console.say(f"student    {student.name}, {student.weights_sha256[:12]}: {student.spec.intended_use}")
    frames = shipped_gate_frames()
    console.say(f"export     {', '.join(targets)} in INT8, judged on {len(frames.frames)} frames: {frames.source}")
    with console.progress() as told:
        exported = export_bundle(
            student.module,
            student.spec,
            targets=targets,
            precisions=["int8"],
            out=bundle,
            gate_frames=frames,
            ranges=student.ranges,
            progress=told,
        )
    console.say("verify     against the live PyTorch reference")
    verified = verify_bundle(bundle, module=student.module, weights_sha256=student.weights_sha256, frames=frames)
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

    with Session.open(bundle, target=artefact.target, precision=artefact.precision) as session:
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
