"""Latency of the C runtime, of the Python runtime and of benchmark_app, interleaved.

    tinyusfm-edge export fetal-head --target openvino --int8 --out fetal-head.bundle
    make capi
    python -m benchmarks.capi_latency fetal-head.bundle --library build/capi/libtinyusfm.so \\
        --ring build/capi --out result.json        # about 6 minutes on a quiet machine

A frame of 1080 rows goes from pixels to reading in C and in Python (one pass: the second one is timed beside it), and
benchmark_app runs the network alone, synchronously, with the same threads, in the same rounds. It reports the medians
of each round, and the ratio of frame to reading over the network's own time in each: aim <= 1.2 for one pass.

With ``--ring`` frames also go through a ring of shared memory and ``tinyusfm-run`` into a ring of readings, in turns
with a control: ``ring_latency.py`` says what is counted, and measures that alone, with any bundle.

Run it on a quiet machine; on a shared one take the lock of whoever shares it and claim nothing.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tests.capi.binding import Library
from tests.capi.binding import Session as CSession
from tests.capi.conftest import engine_folders
from tinyusfm_runtime.bundle.reader import Bundle
from tinyusfm_runtime.device.machine import machine_card
from tinyusfm_runtime.frame import Frame
from tinyusfm_runtime.numerics.order import wide
from tinyusfm_runtime.phantom import make_phantom
from tinyusfm_runtime.session import Session

ROWS, COLUMNS = 1080, 1920
TARGET = "openvino"


def percentiles(samples: list[float]) -> dict[str, float]:
    """Median and tail, ms."""
    return {f"p{percent}": float(np.percentile(wide(samples), percent)) for percent in (50, 90, 99)}


def in_c(session: CSession, pixels: np.ndarray, frames: int) -> dict[str, Any]:
    """Frame to reading in C, by the library's own clock."""
    given = session.library.frame(pixels, spacing_row_mm=0.1, spacing_column_mm=0.1, phantom=1)
    readings = [session.predict(given) for _ in range(frames)]
    return {
        "total": percentiles([r.total_ms for r in readings]),
        "infer": percentiles([r.infer_ms for r in readings]),
        "around": percentiles([r.total_ms - r.infer_ms for r in readings]),
    }


def in_python(session: Session, pixels: np.ndarray, frames: int) -> dict[str, Any]:
    """The same in Python."""
    frame = Frame(pixels=pixels, spacing_mm=(0.1, 0.1), phantom=True)
    times = [session.predict(frame).timings for _ in range(frames)]
    return {"total": percentiles([t.total_ms for t in times]), "infer": percentiles([t.infer_ms for t in times])}


def net_alone(folder: Path, threads: int, seconds: int, precision: str) -> dict[str, Any]:
    """What OpenVINO's benchmark_app says of the artefact's files."""
    program = Path(sys.executable).with_name("benchmark_app")
    command = [
        program, "-m", folder / "model.xml", "-d", "CPU", "-api", "sync", "-hint", "none", "-nstreams", "1",
        "-nthreads", str(threads), "-infer_precision", precision, "-t", str(seconds),
    ]  # fmt: skip
    words = [str(word) for word in command]
    said = subprocess.run(words, capture_output=True, text=True, check=True, timeout=600).stdout
    found = {name: float(value) for name, value in re.findall(r"(Median|Average|Min|Max):\s+([\d.]+) ms", said)}
    return {"total": {"p50": found["Median"]}, "said": found}


def through_rings(build: Path, bundle: Path, words: list[str], frames: int) -> dict[str, Any]:
    """The report of ``ring_latency.py``."""
    with tempfile.TemporaryDirectory() as place:
        out = Path(place) / "ring.json"
        script = Path(__file__).with_name("ring_latency.py")
        command = [
            sys.executable,
            script,
            bundle,
            "--build",
            build,
            "--frames",
            str(frames),
            "--out",
            out,
            "--",
            *words,
        ]
        subprocess.run([str(word) for word in command], check=True)
        found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    return found


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """All rounds."""
    opened = Bundle.open(arguments.bundle)
    artefact = next((a for a in opened.manifest.artefacts if a.target == TARGET), None)
    if artefact is None:
        raise SystemExit(
            f"the bundle has no {TARGET} artefact: tinyusfm-edge export fetal-head --target {TARGET} --int8"
        )
    folders, threads = engine_folders(), arguments.threads
    pixels = np.ascontiguousarray(make_phantom(3, height=ROWS, width=COLUMNS).frame.pixels)
    library, options = Library(arguments.library), {"threads": threads, "engine_folder": str(folders["ov"])}
    wanted: dict[str, Any] = {"target": TARGET, "precision": artefact.precision}
    rounds: list[dict[str, Any]] = []
    with (
        tempfile.TemporaryDirectory() as place,
        CSession(library, arguments.bundle, no_second_pass=1, **wanted, **options) as one,
        CSession(library, arguments.bundle, **wanted, **options) as twice,
        Session.open(arguments.bundle, threads=threads, second_pass=False, **wanted) as there,
    ):
        for name, content in opened.artefact_files(artefact).items():
            (Path(place) / name).write_bytes(content)
        asked: dict[str, Callable[[], dict[str, Any]]] = {
            "c": lambda: in_c(one, pixels, arguments.frames),
            "c_second_pass": lambda: in_c(twice, pixels, arguments.frames),
            "python": lambda: in_python(there, pixels, arguments.frames),
            "benchmark_app": lambda: net_alone(Path(place), threads, arguments.seconds, artefact.rest_precision),
        }
        order = list(asked)
        for number in range(arguments.rounds):
            np.random.default_rng(number).shuffle(order)
            rounds.append({name: asked[name]() for name in order})
            print(json.dumps({name: round(found["total"]["p50"], 3) for name, found in rounds[-1].items()}), flush=True)
        report: dict[str, Any] = {"engine": one.info().engine.decode(), "executed": one.info().executed.decode()}
    ratios = [r["c"]["total"]["p50"] / r["benchmark_app"]["total"]["p50"] for r in rounds]
    report |= {
        "version": 1, "machine": machine_card().to_json(), "frame": [ROWS, COLUMNS], "threads": threads,
        "bundle_id": opened.manifest.bundle_id, "rounds": rounds, "c_over_net": percentiles(ratios),
        "c_over_python": percentiles([r["c"]["total"]["p50"] / r["python"]["total"]["p50"] for r in rounds]),
    }  # fmt: skip
    if arguments.ring:
        words = ["--target", TARGET, "--precision", artefact.precision, "--threads", str(threads), "--no-second-pass"]
        words += ["--engines", str(folders["ov"])]
        report["ring"] = through_rings(arguments.ring, arguments.bundle, words, arguments.frames)
    return report


def main() -> None:
    """Measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--library", type=Path, required=True, help="libtinyusfm.so")
    parser.add_argument("--ring", type=Path, help="folder of tinyusfm-run: also measure through rings of shared memory")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--frames", type=int, default=200)
    parser.add_argument("--seconds", type=int, default=5, help="of benchmark_app in each round")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    report = measure(arguments)
    print(json.dumps({name: report[name] for name in ("engine", "c_over_net", "c_over_python")}, indent=1))
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
