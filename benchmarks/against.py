"""Each of our artefacts against every stock engine on the same weights.

    python benchmarks/against.py --data hc18/

Ours are every target that works here in every precision that it writes (the registry's, so a new target joins by
itself); the rivals are ONNX Runtime fp32, dynamic and static, OpenVINO fp32, bf16 and NNCF's default INT8, LiteRT
dynamic, ncnn, PyTorch eager and compiled. A rival whose package is missing, or that fails, is a line with the reason.
Beside each stand agreement with PyTorch, the gate's verdict by the gate's own comparison, the ratio to the floor (all
multiplications at the speed of this machine's matrix products), memory and load time. It writes ``docs/against.json``
(with every sample in ``--samples FILE``) and the table in docs/reference/against.md; ``--page`` writes the table alone.
``--figures FILE.json`` keeps the figures of a short run elsewhere and leaves the page as it is.

Shapes: SKHW logits.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from bench_engines import load, measured_floor
from prepare import CALIBRATION_SEED, FIRST_SEED, frames_of
from rivals import write_nncf, write_ort_dynamic, write_ort_static, write_stock_onnx
from tables import floor_of, floors_ms
from tinyusfm_edge.models.checkpoint import LoadedStudent
from tinyusfm_edge.models.macs import static_card
from tinyusfm_edge.tuning.variants import combinations
from tinyusfm_export.pipeline import ExportOptions, export_bundle
from tinyusfm_export.verify.gate import Gate, judge
from tinyusfm_export.verify.gate_frames import shipped_gate_frames
from tinyusfm_export.verify.parity import compare_frame, read_output, summarise
from tinyusfm_runtime.bundle.reader import Bundle
from tinyusfm_runtime.device.machine import machine_card
from tinyusfm_runtime.numerics.preprocess import Placement
from workers import Job, Measured, Worker, collect_logits, measure

ROOT = Path(__file__).resolve().parent.parent
FIGURES, PAGE = ROOT / "docs" / "against.json", ROOT / "docs" / "reference" / "against.md"
BEGIN, END = "<!-- against: written by benchmarks/against.py -->", "<!-- end of against -->"
REFERENCE = "PyTorch eager fp32"
COMPARED = ("ONNX Runtime fp32", REFERENCE)
"""Workers that the table gives ratios to, where they ran."""
SHOWN = ("dice_mean", "dice_worst", "hc_p95_mm", "top1")


def rival_jobs(
    loaded: LoadedStudent, student: Path, codes: np.ndarray, work: Path, options: argparse.Namespace
) -> tuple[dict[str, Job], dict[str, str]]:
    """Jobs of the stock engines, and rival -> why it has none.

    Args:
        loaded: the student.
        student: its weights file.
        codes: uint8 calibration inputs SNCHW.
        work: folder for their files.
        options: of the command line.
    """
    stock = write_stock_onnx(loaded.module, loaded.spec, work)
    spec = loaded.spec
    made: dict[str, Callable[[], Job]] = {
        REFERENCE: lambda: {"kind": "eager", "student": str(student)},
        "PyTorch compile fp32": lambda: {"kind": "compiled", "student": str(student)},
        "ONNX Runtime fp32": lambda: {"kind": "onnx", "model": str(stock)},
        "ONNX Runtime dynamic int8": lambda: {"kind": "onnx", "model": str(write_ort_dynamic(stock, work))},
        "ONNX Runtime static int8": lambda: {"kind": "onnx", "model": str(write_ort_static(stock, codes, spec, work))},
        "OpenVINO fp32": lambda: {"kind": "openvino", "model": str(stock), "rest_precision": "f32"},
        "OpenVINO bf16": lambda: _bf16({"kind": "openvino", "model": str(stock), "rest_precision": "bf16"}),
        "OpenVINO NNCF int8": lambda: {
            "kind": "openvino", "model": str(write_nncf(stock, codes, spec, work)), "rest_precision": "f32",
        },
        "LiteRT dynamic int8": lambda: {"kind": "litert", "model": _given(options.tflite, "--tflite FILE")},
        "ncnn fp32": lambda: {"kind": "ncnn", "model": _given(options.ncnn, "--ncnn FILE.param")},
    }  # fmt: skip
    jobs: dict[str, Job] = {}
    skipped: dict[str, str] = {}
    for name, make in made.items():
        if not wanted(name, options.only):
            continue
        try:
            jobs[name] = make()
        except Exception as error:  # a rival may fail in any way, which is a result too
            skipped[name] = one_line(error)
    return jobs, skipped


def wanted(name: str, words: str) -> bool:
    """Whether an engine is measured: the reference always, the others where a word is in their name.

    Args:
        name: of the engine.
        words: with commas between; none wants all.
    """
    found = [word for word in words.split(",") if word]
    return name == REFERENCE or not found or any(word in name for word in found)


def _bf16(job: Job) -> Job:
    if not machine_card().has_bf16:
        raise RuntimeError("this CPU has no bfloat16 units")
    return job


def _given(place: Path | None, option: str) -> str:
    if place is None:
        raise RuntimeError(f"give a model that its own tools made, {option}: they need an environment of their own")
    return str(place.resolve())


def our_jobs(loaded: LoadedStudent, work: Path, targets: Sequence[str]) -> tuple[dict[str, Job], dict[str, str]]:
    """Jobs of our artefacts, and target -> why it gives none.

    Args:
        loaded: the student.
        work: folder for the bundles.
        targets: to export for; empty is every one that works here.
    """
    jobs: dict[str, Job] = {}
    skipped: dict[str, str] = {}
    pairs = combinations(tuple(targets), ())
    for target in dict.fromkeys(target for target, _ in pairs):
        folder = work / target
        folder.mkdir()
        try:
            result = export_bundle(
                loaded.module,
                loaded.spec,
                targets=(target,),
                precisions=tuple(precision for mine, precision in pairs if mine == target),
                out=folder / "ours.bundle",
                gate_frames=shipped_gate_frames(),
                ranges=loaded.ranges,
                gated=False,  # the judged frames of this run decide, for ours and the rivals alike
                advanced=ExportOptions(compare=False, rounds=1, runs=1),
            )
        except Exception as error:
            skipped[f"ours {target}"] = one_line(error)
            continue
        for found in Bundle.open(result.path).manifest.artefacts:
            jobs[f"ours {found.name}"] = {"kind": "artefact", "bundle": str(result.path), "artefact": found.name}
    return jobs, skipped


def start(jobs: Mapping[str, Job], stack: ExitStack) -> tuple[dict[str, Worker], dict[str, str]]:
    """Starts a worker for each job; one that cannot start is skipped with the reason.

    Args:
        jobs: worker name -> job.
        stack: closes the workers.
    """
    workers: dict[str, Worker] = {}
    skipped: dict[str, str] = {}
    for name, job in jobs.items():
        print(f"starting {name}", file=sys.stderr, flush=True)
        try:
            workers[name] = Worker(name, job)
            stack.callback(workers[name].close)
        except SystemExit:
            skipped[name] = "its process ended before the first answer; its own message stands above"
    return workers, skipped


def judged(loaded: LoadedStudent, logits: Mapping[str, np.ndarray], about: str) -> dict[str, dict[str, Any]]:
    """Worker -> its verdict by the gate's own comparison with eager.

    A verdict is ``statistics``, ``gate_passed`` and ``failures``.

    Args:
        loaded: the student.
        logits: worker -> SKHW.
        about: the frames in words.
    """
    spec, size = loaded.spec, (loaded.spec.preprocess.height, loaded.spec.preprocess.width)
    whole = Placement(crop=(0, 0, *size), box=(0, 0, *size), spacing_mm=None, frame_size=size)
    outputs = {name: [read_output({"logits": row[None]}, spec, whole) for row in rows] for name, rows in logits.items()}
    found = {}
    for name, mine in outputs.items():
        pairs = zip(outputs[REFERENCE], mine, strict=True)
        rows = [compare_frame(str(index), before, after, spec) for index, (before, after) in enumerate(pairs)]
        comparison = summarise(
            rows, spec, engine=name, reference=REFERENCE, provenance={"count": len(rows), "about": about}
        )
        # the table says where fewer frames judged than a gate wants; that alone is no miss
        report = judge(comparison, replace(Gate(), min_frames=1))
        statistics = {key: float(value) for key, value in comparison.statistics.items() if key in SHOWN}
        found[name] = {"statistics": statistics, "gate_passed": bool(report), "failures": list(report.failures)}
    return found


def rows_of(
    measured: Measured, verdicts: Mapping[str, Mapping[str, Any]], floors: Mapping[str, float]
) -> list[dict[str, Any]]:
    """One row for each worker, fastest first.

    Args:
        measured: the rounds.
        verdicts: of ``judged``.
        floors: precision -> time of all multiplications at the measured peak, ms.
    """
    found = []
    for name, row in sorted(measured.statistics.items(), key=lambda item: item[1].quiet_p50_ms):
        card = measured.cards[name]
        found.append(
            {
                "name": name,
                "ours": name.startswith("ours "),
                "engine": card["description"],
                "p50_ms": row.quiet_p50_ms,
                "p90_ms": row.p90_ms,
                "p99_ms": row.p99_ms,
                "ratios": {rival: list(ratio) for rival, ratio in row.ratios.items()},
                "to_floor": row.quiet_p50_ms / floor_of(name, floors),
                "load_ms": card["load_ms"],
                "peak_rss_mb": card["peak_rss_mb"],
                **verdicts[name],
            }
        )
    return found


def one_line(error: object) -> str:
    """An error in one short line, without places of this machine."""
    text = " ".join(str(error).split()) or type(error).__name__
    return re.sub(r"(/[\w.+-]+){2,}/", "", text)[:160]


def table(figures: Mapping[str, Any]) -> str:
    """The page's lines for the figures.

    Args:
        figures: the content of ``docs/against.json``.
    """
    named = [name for name in COMPARED if any(name in row["ratios"] for row in figures["rows"])]
    head = ["engine", "ms, p50", *(f"times as fast as {name}" for name in named), "agreement, mean / worst", "gate"]
    head += ["times the floor", "load, ms", "memory, MB"]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for row in figures["rows"]:
        numbers = row["statistics"]
        close = f"{numbers['dice_mean']:.4f} / {numbers['dice_worst']:.4f}" if "dice_mean" in numbers else "-"
        close = f"{numbers['top1']:.3f}" if "top1" in numbers else close
        ratios = [f"{row['ratios'][name][0]:.2f}" if name in row["ratios"] else "-" for name in named]
        shown = f"**{row['name']}**" if row["ours"] else row["name"]
        gate = "holds" if row["gate_passed"] else "missed"
        cells = [shown, f"{row['p50_ms']:.1f}", *ratios, close, gate, f"{row['to_floor']:.2f}"]
        cells += [f"{row['load_ms']:.0f}", f"{row['peak_rss_mb']:.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", *(f"- {name}: *not run*, {why}" for name, why in sorted(figures["skipped"].items()))]
    lines += [""] if figures["skipped"] else []
    few = int(figures["frames"].split()[0]) < Gate().min_frames
    short = f" (a short run: the gate wants {Gate().min_frames})" if few else ""
    lines.append(
        f"{figures['student']}, {figures['frames']}{short}; {figures['machine']['cpu']}, "
        f"{figures['threads']} thread(s), {figures['rounds']} rounds in turns{_busy(figures['load'])}; "
        f"commit {figures['commit']}, {figures['date']}."
    )
    return "\n".join(lines)


def _busy(load: Mapping[str, float]) -> str:
    """What must be known of the times where other programs ran beside them."""
    if load["before"] <= load["cpus"]:
        return ""
    return f" on a busy machine (load {load['before']:.0f} on {load['cpus']} CPUs), so times compare only here"


def with_table(page: str, figures: Mapping[str, Any]) -> str:
    """A page with the table of the figures between its markers."""
    block = f"{BEGIN}\n{table(figures)}\n{END}"
    return re.sub(re.escape(BEGIN) + r".*?" + re.escape(END), lambda _: block, page, flags=re.DOTALL)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description="our artefacts against every stock engine on the same weights")
    parser.add_argument("--student", default="fetal-head", help="shipped student or student file")
    parser.add_argument("--data", type=Path, default=None, help="labelled folder instead of phantoms")
    parser.add_argument("--frames", type=int, default=48, help="frames that judge")
    parser.add_argument("--calibration", type=int, default=300, help="frames that rivals calibrate on")
    parser.add_argument("--rounds", type=int, default=14)
    parser.add_argument("--runs", type=int, default=20, help="timed runs of an engine in a round")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--target", default="", help="only these targets of ours, with commas between")
    parser.add_argument("--only", default="", help="only engines with one of these words in their name")
    parser.add_argument("--tflite", type=Path, default=None, help="stock LiteRT model of the same weights")
    parser.add_argument("--ncnn", type=Path, default=None, help="stock ncnn model of the same weights, FILE.param")
    parser.add_argument("--samples", type=Path, default=None, help="file for every raw sample")
    parser.add_argument(
        "--figures", type=Path, default=FIGURES, help="file of the figures; the page shows the default's"
    )
    parser.add_argument("--page", action="store_true", help="write the table of the figures that are there, no more")
    return parser.parse_args(argv)


def measured_figures(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Prepares, measures and judges everything.

    Args:
        options: of the command line.
        work: folder for files that nobody needs afterwards.
    """
    loaded, student = load(options.student)
    before = os.getloadavg()[0]
    inputs = work / "inputs.npz"
    np.savez(inputs, codes_SNCHW=frames_of(loaded, options.data, "val", options.frames, FIRST_SEED))
    calibration = frames_of(loaded, options.data, "train", options.calibration, CALIBRATION_SEED)
    rivals, skipped = rival_jobs(loaded, student, calibration, work, options)
    ours, more = our_jobs(loaded, work, [name for name in options.target.split(",") if name])
    skipped |= more
    pre = loaded.spec.preprocess
    common = {"threads": options.threads, "inputs": str(inputs), "mean": pre.mean, "std": pre.std}
    chosen = {name: {**common, **job} for name, job in {**rivals, **ours}.items() if wanted(name, options.only)}
    floors = floors_ms(static_card(loaded.module), measured_floor(options.threads))
    with ExitStack() as stack:
        workers, broken = start(chosen, stack)
        skipped |= broken
        measured = measure(workers, COMPARED, rounds=options.rounds, runs=options.runs, seed=0)
        verdicts = judged(loaded, collect_logits(workers, work), "against.py")
    if options.samples is not None:
        options.samples.write_text(json.dumps(measured.to_json(samples=True)), encoding="utf-8")
    git = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {
        "version": 1,
        "student": loaded.spec.name,
        "frames": f"{options.frames} {'phantoms' if options.data is None else 'validation frames'}",
        "threads": options.threads,
        "rounds": options.rounds,
        "machine": machine_card().to_json(),
        "load": {"before": round(before, 2), "after": round(os.getloadavg()[0], 2), "cpus": cpus},
        "floors_ms": floors,
        "commit": subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip(),
        "date": date.today().isoformat(),
        "rows": rows_of(measured, verdicts, floors),
        "skipped": skipped,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, and writes the figures and the page."""
    options = parse(argv)
    if not options.page:
        with tempfile.TemporaryDirectory(prefix="tinyusfm-against-") as name:
            figures = measured_figures(options, Path(name))
        options.figures.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    figures = json.loads(options.figures.read_text(encoding="utf-8"))
    if options.figures == FIGURES:
        PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8"), figures), encoding="utf-8")
    print(table(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
