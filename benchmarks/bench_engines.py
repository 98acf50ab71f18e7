"""This runtime against PyTorch eager, plain ONNX Runtime, stock OpenVINO and NNCF's default INT8, on the same weights.

``python benchmarks/bench_engines.py`` (or ``make bench``) prints what the architecture implies (operations, bytes, the
measured GEMM floor), then a table of latency, ratios and agreement with the reference, then whole 1080p frames with
every stage, then one JSON line; everything with all raw samples goes to ``--out``. One process per engine, all alive at
once, asked in shuffled rounds, so that a ratio compares neighbours in time (rounds.py). Batch 1.

Rivals get their normalised float input for nothing; our engines take the grey codes a frame's preprocessing gives.
``--data DIR`` measures agreement on, and calibrates NNCF with, that folder's frames instead of phantoms.

It knows no engine's library: workers do (engine_worker.py).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from prepare import prepare
from tables import floors_ms, frontier, print_aims, print_card, print_engines, print_frames, print_noise
from tinyusfm_edge import students
from tinyusfm_edge.models.checkpoint import LoadedStudent, load_student_file
from tinyusfm_edge.models.macs import static_card
from tinyusfm_export.verify.parity import compare_frame, read_output, summarise
from tinyusfm_runtime.device.machine import machine_card
from tinyusfm_runtime.numerics.preprocess import Placement
from workers import Job, Measured, collect_logits, measure, started

RIVALS = ("eager", "ort fp32")
"""Workers that the table compares everything with."""


def main(argv: Sequence[str] | None = None) -> None:
    """Command line of the benchmark."""
    options = parse(argv)
    loaded, student_file = load(options.student)
    gops = measured_floor(options.threads)
    card = static_card(loaded.module)
    print_card(card, gops, options.threads)
    floors = floors_ms(card, gops)
    with tempfile.TemporaryDirectory(prefix="tinyusfm-bench-") as folder:
        work = Path(folder)
        prepared = prepare(
            loaded,
            student_file,
            options.bundle,
            work,
            data=options.data,
            num_frames=options.frames,
            threads=options.threads,
        )
        chosen = choose(prepared.tensors, options.only)
        times = {"rounds": options.rounds, "runs": options.runs, "seed": options.seed}
        with started(chosen) as workers:
            tensors = measure(workers, RIVALS, **times)
            agreement = agreements(loaded, collect_logits(workers, work))
        print_noise(tensors, options.runs)
        print_engines(tensors, agreement, floors, prepared.gates)
        best = frontier(tensors.statistics, agreement)
        print(f"frontier of latency and worst Dice against the reference: {', '.join(best)}")
        with started({name: job for name, job in prepared.frames.items() if name in {"typical", *chosen}}) as workers:
            frames = measure(workers, ("typical",), **times)
        print_noise(frames, options.runs)
        print_frames(frames)
        print_aims(tensors, frames, prepared.gates)
    result: dict[str, object] = {
        "machine": machine_card().to_json(),
        "options": {name: plain(value) for name, value in vars(options).items()},
        "weights_sha256": loaded.weights_sha256,
        "card": card,
        "floor_gops": gops,
        "floor_ms": floors,
        "agreement": agreement,
        "gates": prepared.gates,
        "frontier": best,
        "stage_medians_ms": frames.stage_medians(),
    }
    write(result, tensors, frames, options.out)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description="latency of our artefacts and their rivals on the same weights")
    parser.add_argument("--rounds", type=int, default=14, help="interleaved rounds")
    parser.add_argument("--runs", type=int, default=20, help="timed runs a round and engine")
    parser.add_argument("--threads", type=int, default=1, help="threads of every engine")
    parser.add_argument("--frames", type=int, default=48, help="frames for the agreement columns")
    parser.add_argument("--student", default="fetal-head", help="shipped student or student file")
    parser.add_argument("--bundle", type=Path, action="append", default=[], help="another bundle, repeatable")
    parser.add_argument("--data", type=Path, default=None, help="labelled folder instead of phantoms")
    parser.add_argument("--only", default="", help="comma-separated words: measure the rivals and what matches")
    parser.add_argument("--seed", type=int, default=0, help="of the order inside the rounds")
    parser.add_argument("--out", type=Path, default=None, help="JSON file for everything, raw samples included")
    return parser.parse_args(argv)


def load(student: str) -> tuple[LoadedStudent, Path]:
    """A shipped student or a student file, and where its weights are."""
    if student in students.names():
        return students.load(student), students.folder(student) / students.WEIGHTS
    return load_student_file(student), Path(student)


def measured_floor(threads: int) -> dict[str, dict[str, float]]:
    """GEMM speeds (gemm_floor.py), measured in a process of their own."""
    script = Path(__file__).resolve().parent / "gemm_floor.py"
    command = [sys.executable, str(script), "--threads", str(threads)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, dict[str, float]] = json.loads(done.stdout.splitlines()[-1])["gops"]
    return found


def choose(jobs: Mapping[str, Job], words: str) -> dict[str, Job]:
    """The jobs whose names hold one of the words, and the rivals; all of them without words."""
    wanted = [word for word in words.split(",") if word]
    return {name: job for name, job in jobs.items() if name in RIVALS or not wanted or any(w in name for w in wanted)}


def agreements(loaded: LoadedStudent, logits: Mapping[str, np.ndarray]) -> dict[str, dict[str, float]]:
    """Each worker's logits and masks against eager's, by the gate's own comparison (parity.py)."""
    spec, size = loaded.spec, (loaded.spec.preprocess.height, loaded.spec.preprocess.width)
    whole = Placement(crop=(0, 0, *size), box=(0, 0, *size), spacing_mm=None, frame_size=size)
    outputs = {name: [read_output({"logits": row[None]}, spec, whole) for row in rows] for name, rows in logits.items()}
    found = {}
    for name, mine in outputs.items():
        pairs = zip(outputs["eager"], mine, strict=True)
        rows = [compare_frame(str(index), before, after, spec) for index, (before, after) in enumerate(pairs)]
        found[name] = dict(summarise(rows, spec, engine=name, reference="eager", provenance={}).statistics)
    return found


def plain(value: object) -> object:
    """An option as data; of a path the last part only, since results are published."""
    if isinstance(value, list):
        return [plain(item) for item in value]
    return value.name if isinstance(value, Path) else value


def write(result: dict[str, object], tensors: Measured, frames: Measured, out: Path | None) -> None:
    """Writes everything to a file, and all but the raw samples as one line."""
    for target, samples in ((out, True), (None, False)):
        measured = {"tensors": tensors.to_json(samples=samples), "frames": frames.to_json(samples=samples)}
        text = json.dumps({**result, **measured})
        if target is not None:
            target.write_text(text, encoding="utf-8")
        elif not samples:
            print(text)


if __name__ == "__main__":
    main()
