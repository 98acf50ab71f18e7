"""What the demo leaves: overlay image, overlay video, JSON and HTML report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tinyusfm_edge.cli import console
from tinyusfm_edge.cli.train.student import patients
from tinyusfm_edge.report import charts
from tinyusfm_edge.report.page import Block, Chart, Facts, Images, Page, Table, render

if TYPE_CHECKING:
    from tinyusfm_edge.cli.start.demo_result import Demo, Replay
    from tinyusfm_export.verify.parity import FrameParity
    from tinyusfm_export.verify.verdict import Side
    from tinyusfm_runtime.frame import Frame
    from tinyusfm_runtime.numerics.measure import Measurement
    from tinyusfm_runtime.results import Prediction

SHOWN_PHANTOMS = 4
VIDEO_RATE_HZ = 30.0


def write_outputs(found: Demo, out: Path) -> dict[str, Path]:
    """Writes everything.

    Args:
        found: what the demo found.
        out: an existing folder.

    Returns:
        What was written -> where.

    Raises:
        OutputError: a file cannot be written.
    """
    from tinyusfm_runtime.overlay import encode_png

    places = {
        "bundle": found.exported.path,
        "image": out / "overlay.png",
        "video": out / "overlay.mp4",
        "numbers": out / "demo.json",
        "report": out / "report.html",
    }
    first = found.replays[0]
    console.write_file(places["image"], encode_png(contact_sheet(found, first)), "the overlay image")
    _write_video(places["video"], found, first)
    console.write_json(str(places["numbers"]), as_json(found), "the demo's numbers")
    console.write_file(places["report"], render(page(found)).encode(), "the report")
    return places


def contact_sheet(found: Demo, replay: Replay) -> np.ndarray:
    """Phantoms and a frame of the clip side by side, each with its overlay; uint8 HWC."""
    from tinyusfm_runtime.overlay import draw

    chosen = list(zip(found.known, replay.known, strict=True))[:2] + [(found.clip[0], replay.clip[0])]
    drawn = [draw(frame, prediction) for frame, prediction in chosen]
    height = max(image.shape[0] for image in drawn)
    padded = [np.pad(image, ((0, height - image.shape[0]), (0, 8), (0, 0))) for image in drawn]
    return np.concatenate(padded, axis=1)


def page(found: Demo) -> Page:
    """The report."""
    from tinyusfm_edge.cli.start.demo_result import HEADER, table_rows

    passed = bool(found.verified)
    agrees = "INT8 agrees with the PyTorch reference" if passed else "INT8 does not agree with the PyTorch reference"
    blocks: list[Block] = [
        Table(
            title="Targets",
            note="Agreement with PyTorch float32 on the gate's frames, on this machine; latency is frame to mask.",
            header=HEADER,
            rows=table_rows(found),
        ),
        Table(
            title="Was INT8 worth it here?",
            note=" ".join(f"{v.target}: {v.recommendation}" for v in found.exported.verdicts),
            header=("target", "precision", "computes in", "MB", "Dice mean", "worst", "HC p95 mm", "p50 ms", "gate"),
            rows=[_side(verdict.target, side) for verdict in found.exported.verdicts for side in verdict.sides],
        ),
        *_agreement(found),
        _latency(found),
        _patients(found),
        _known(found),
        _images(found),
        *_provenance(found),
    ]
    return Page(
        title=f"{found.name} on this machine",
        passed=passed,
        headline=f"{'Passed' if passed else 'Failed'}: {agrees} on this machine, for {_listed(found)}.",
        lead=(
            "Research software, not a medical device. Conversion on this machine and accuracy on patients are two "
            "different questions and stand in two different tables.",
        ),
        blocks=blocks,
    )


def _side(target: str, side: Side) -> tuple[str, ...]:
    numbers = side.report.comparison.statistics
    return (
        target,
        side.precision,
        side.computes_in,
        f"{side.size_bytes / 1e6:.1f}",
        *_agreement_cells(numbers),
        f"{side.percentile(50):.1f}",
        "passed" if side.report else "MISSED",
    )


def _agreement_cells(numbers: Mapping[str, float]) -> tuple[str, str, str]:
    """Mean Dice, worst Dice and HC p95 as text; a dash for what was not measured."""
    mean, worst = (f"{numbers[key]:.4f}" if key in numbers else "-" for key in ("dice_mean", "dice_worst"))
    return mean, worst, f"{numbers['hc_p95_mm']:.2f}" if "hc_p95_mm" in numbers else "-"


def _listed(found: Demo) -> str:
    return " and ".join(replay.artefact.target for replay in found.replays)


def _agreement(found: Demo) -> list[Block]:
    """Dice and circumference of every gate frame."""
    rows = {c.name: c.report.comparison.frames for c in found.verified.checks if c.report is not None}
    dice = {name: [_value(f, "dice") if f.counted else None for f in frames] for name, frames in rows.items()}
    circumference = {
        name: [_value(f, "hc_diff_mm") if f.counted else None for f in frames] for name, frames in rows.items()
    }
    limits = next((c.report.limits for c in found.verified.checks if c.report is not None), {})
    counted = "Frames whose reference mask covers at least 1 % of the image: phantoms first, then what the clip adds."
    return [
        Chart(
            title="Dice against the reference, frame by frame",
            note=counted,
            svg=charts.strip(dice, "Dice", limit=limits.get("dice_worst"), limit_label="limit for the worst frame"),
        ),
        Chart(
            title="Difference in head circumference, frame by frame",
            note="Artefact minus reference, absolute.",
            svg=charts.strip(
                circumference, "mm", limit=limits.get("hc_p95_mm"), limit_label="limit for the 95th percentile"
            ),
        ),
    ]


def _latency(found: Demo) -> Block:
    samples = {replay.artefact.name: replay.latency.samples_ms["total_ms"] for replay in found.replays}
    first = found.replays[0].latency
    note = (
        f"{first.n} predictions each on frames of the clip, {first.threads} thread(s), {first.machine['cpu']}; "
        "preprocessing, network and measurement together."
    )
    return Chart(title="Latency, frame to mask", note=note, svg=charts.histogram(samples, "ms"))


def _patients(found: Demo) -> Block:
    rows = []
    for row in patients(found.name):
        numbers = row["summary"]["statistics"]
        rows.append(
            (
                row["target"],
                row["precision"],
                *_agreement_cells(numbers),
                f"{numbers['frames']:.0f}",
                "passed" if row["summary"]["passed"] else "MISSED",
            )
        )
    note = "The same gate on the validation split of HC18, from the model card; it was not measured in this run."
    if not rows:
        note = "The model card holds no gate on patients for these weights yet."
    header = ("target", "precision", "Dice mean", "worst", "HC p95 mm", "frames", "gate")
    return Table(title="Accuracy on patients (model card)", note=note, header=header, rows=rows)


def _known(found: Demo) -> Block:
    header = ("phantom", "true HC mm", *(f"{replay.artefact.name} mm" for replay in found.replays))
    rows = []
    for i, truth in enumerate(found.truth_mm):
        measurements = [replay.known[i].measurement for replay in found.replays]
        rows.append((f"#{i + 1}", f"{truth:.1f}", *(_hc(measurement) for measurement in measurements)))
    return Table(
        title="Phantoms of known head circumference",
        note="The truth is the ellipse that was drawn. Phantoms test the chain; they are no evidence about patients.",
        header=header,
        rows=rows,
    )


def _images(found: Demo) -> Block:
    from tinyusfm_runtime.overlay import draw, encode_png

    first = found.replays[0]
    shown = [
        (f"Phantom {i + 1}, true circumference {truth:.1f} mm", frame, prediction)
        for i, (truth, frame, prediction) in enumerate(zip(found.truth_mm, found.known, first.known, strict=True))
    ][:SHOWN_PHANTOMS]
    caption = "Real cardiac clip: no fetal head is in it, anything marked is a false find"
    shown += [(caption, found.clip[0], first.clip[0])]
    images = [(caption, encode_png(draw(frame, prediction))) for caption, frame, prediction in shown]
    return Images(
        title="What it looks like",
        note=f"{first.description}. Cyan: edge of the mask; yellow: the ellipse that is measured.",
        images=images,
    )


def _provenance(found: Demo) -> list[Block]:
    from tinyusfm_runtime.bundle.reader import Bundle

    manifest = Bundle.open(found.exported.path).manifest
    frames = next((c.report.comparison.provenance for c in found.verified.checks if c.report is not None), {})
    machine = found.verified.machine
    facts = [
        ("student", manifest.spec.name),
        ("weights sha256", manifest.weights_sha256),
        ("licence of the weights", manifest.spec.licence),
        ("origin", manifest.spec.origin),
        ("bundle", manifest.manifest_sha256),
        ("made", manifest.created_utc),
        ("calibration set", manifest.calibration_id or "none"),
        ("machine", f"{machine['cpu']}, {machine['usable_cpus']} CPUs"),
        ("CPU features", " ".join(machine["features"])),
        *(
            (f"{artefact.name}", f"{artefact.form}; rest in {artefact.rest_precision}")
            for artefact in manifest.artefacts
        ),
        *(
            (f"sha256 {path.removeprefix('artefacts/')}", entry.sha256)
            for a in manifest.artefacts
            for path, entry in a.files.items()
        ),
        *(sorted(manifest.tools.items())),
    ]
    gate = [
        ("frames", f"{frames.get('count', 0)}: {frames.get('about', '')}"),
        ("source", str(frames.get("source", ""))),
        ("reference", next((c.report.comparison.reference for c in found.verified.checks if c.report is not None), "")),
        *zip(frames.get("ids", ()), frames.get("pixels_sha256", ()), strict=False),
    ]
    return [
        Facts(title="Provenance", facts=facts),
        Facts(title="Frames of the gate", note="Name and sha256 of the pixels.", facts=gate),
    ]


def as_json(found: Demo) -> dict[str, Any]:
    """The demo's numbers as plain data."""
    return {
        "schema": 1,
        "passed": bool(found.verified),
        "verify": found.verified.to_json(),
        "verdicts": [verdict.to_json() for verdict in found.exported.verdicts],
        "truth_mm": list(found.truth_mm),
        "replays": [
            {
                "artefact": replay.artefact.name,
                "engine": replay.description,
                "size_bytes": replay.size_bytes,
                "phantom_hc_mm": [None if p.measurement is None else p.measurement.hc_mm for p in replay.known],
                "latency": replay.latency.to_json(),
            }
            for replay in found.replays
        ],
    }


def _write_video(place: Path, found: Demo, replay: Replay) -> None:
    from tinyusfm_runtime.sinks.video import open_sink

    with open_sink(str(place), rate_hz=VIDEO_RATE_HZ) as sink:
        for frame, prediction in _one_size(found, replay):
            sink.write(frame, prediction)


def _one_size(found: Demo, replay: Replay) -> list[tuple[Frame, Prediction]]:
    """Phantoms and the clip on one canvas, since a video cannot change its size.

    Each phantom is held for half a second.
    """
    pairs: list[tuple[Frame, Prediction]] = []
    for frame, prediction in zip(found.known, replay.known, strict=True):
        pairs += [(frame, prediction)] * int(VIDEO_RATE_HZ / 2)
    pairs += list(zip(found.clip, replay.clip, strict=True))
    height = max(frame.pixels.shape[0] for frame, _ in pairs)
    width = max(frame.pixels.shape[1] for frame, _ in pairs)
    return [_on_canvas(frame, prediction, height, width) for frame, prediction in pairs]


def _on_canvas(frame: Frame, prediction: Prediction, height: int, width: int) -> tuple[Frame, Prediction]:
    rows, cols = frame.pixels.shape[:2]
    pad: Sequence[tuple[int, int]] = ((0, height - rows), (0, width - cols), (0, 0))[: frame.pixels.ndim]
    placement = replace(prediction.placement, frame_size=(height, width))
    return replace(frame, pixels=np.pad(frame.pixels, pad)), replace(prediction, placement=placement)


def _hc(measurement: Measurement | None) -> str:
    return "-" if measurement is None or measurement.hc_mm is None else f"{measurement.hc_mm:.1f}"


def _value(frame: FrameParity, key: str) -> float | None:
    value = frame.values.get(key)
    return None if value is None else float(value)
