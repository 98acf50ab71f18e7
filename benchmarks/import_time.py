"""What ``import tinyusfm_runtime`` costs beside ``import numpy``, each in fresh interpreters, interleaved.

``python benchmarks/import_time.py`` prints a table and one JSON line. The aim is 150 ms or less for all modules of the
runtime together; ``import tinyusfm_runtime`` alone is shown as well. It measures warm file caches, not cold disks.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CASES = {
    "nothing": "",
    "numpy": "import numpy",
    "tinyusfm_runtime": "import numpy, tinyusfm_runtime",
    "tinyusfm_runtime.session": "import numpy, tinyusfm_runtime.session",
}
"""Name -> statement that is timed inside the interpreter."""
TIMED = "import time; t = time.perf_counter(); {statement}\nprint(1e3 * (time.perf_counter() - t))"


def import_ms(statement: str) -> float:
    """Milliseconds that a statement takes in a fresh interpreter."""
    roots = [str(ROOT / folder) for folder in (".", "export", "runtime", "calibration")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(roots)}
    command = [sys.executable, "-c", TIMED.format(statement=statement)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=True)
    return float(done.stdout)


def main() -> None:
    """Command line of the measurement."""
    parser = argparse.ArgumentParser(description="import times of the runtime")
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    samples: dict[str, list[float]] = {name: [] for name in CASES}
    order, rng = list(CASES), random.Random(0)
    for _ in range(rounds + 1):
        rng.shuffle(order)
        for name in order:
            samples[name].append(import_ms(CASES[name]))
    medians = {name: statistics.median(values[1:]) for name, values in samples.items()}
    print(f"{'statement':28} {'median ms':>9} {'beside numpy':>12}")
    for name, median in medians.items():
        print(f"{name:28} {median:9.1f} {median - medians['numpy']:12.1f}")
    print(json.dumps({"rounds": rounds, "median_ms": medians, "samples_ms": samples}))


if __name__ == "__main__":
    main()
