"""What choosing a coreset costs as the pool grows: seconds and memory at 1k, 10k and 100k synthetic embeddings.

``python benchmarks/coreset_cost.py`` writes clustered random vectors and gradient courses to memory-mapped files, lets
each size be clustered and ranked in a process of its own, and prints seconds, peak memory beyond the start, and what
the last size says of 2.2 million if the cost grows as images x clusters (marked as extrapolated). The budget is 10 %.

Reading images, the proxy and the embedder are not in it: they cost one pass, and proxy epochs, per image.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from tinyusfm_calibration.clusters import cluster, cluster_count
from tinyusfm_calibration.select import SelectConfig, select

WIDTH, EPOCHS = 192, 10
"""The student's width and the proxy's epochs."""
WHOLE = 2_200_000
"""The published pool."""


def write_pool(folder: Path, count: int) -> None:
    """Writes vectors and gradients for one size, in blocks."""
    rng = np.random.default_rng(count)
    centres = rng.standard_normal((max(8, round(math.sqrt(count)) // 2), WIDTH)).astype(np.float32)
    vectors = np.memmap(folder / "vectors.f32", np.float32, "w+", shape=(count, WIDTH))
    gradients = np.memmap(folder / "gradients.f32", np.float32, "w+", shape=(count, EPOCHS))
    for start in range(0, count, 8192):
        rows = min(8192, count - start)
        near = centres[rng.integers(len(centres), size=rows)]
        vectors[start : start + rows] = near + 0.5 * rng.standard_normal((rows, WIDTH))
        gradients[start : start + rows] = rng.gamma(4.0, 0.25, (rows, 1)) * rng.gamma(20.0, 0.05, (rows, EPOCHS))
    vectors.flush()
    gradients.flush()


def one_size(folder: Path, count: int, algorithm: str) -> dict[str, float]:
    """Chooses from one size; seconds and peak memory beyond the start, MB."""
    vectors = np.memmap(folder / "vectors.f32", np.float32, "r", shape=(count, WIDTH))
    gradients = np.memmap(folder / "gradients.f32", np.float32, "r", shape=(count, EPOCHS))
    ids = [f"pool/{number}" for number in range(count)]
    cluster(np.array(vectors[:200]), algorithm=algorithm)  # imports and first calls are not the pool's cost
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    chosen = select(vectors, ids, count // 10, gradients_NE=gradients, config=SelectConfig(algorithm=algorithm))
    seconds = time.perf_counter() - started
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return {"count": count, "seconds": seconds, "peak_mb": peak, "clusters": chosen.num_clusters}


def main() -> int:
    """Prints the table and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="1000,10000,100000", help="with commas between them")
    parser.add_argument("--algorithm", default="sklearn", help="sklearn or faiss")
    parser.add_argument("--one", nargs=2, metavar=("FOLDER", "COUNT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(one_size(Path(options.one[0]), int(options.one[1]), options.algorithm)))
        return 0
    found = []
    for count in (int(part) for part in options.sizes.split(",")):
        with tempfile.TemporaryDirectory() as name:
            write_pool(Path(name), count)
            line = [sys.executable, __file__, "--algorithm", options.algorithm, "--one", name, str(count)]
            done = subprocess.run(line, capture_output=True, text=True, check=True)
        found.append(json.loads(done.stdout.splitlines()[-1]))
        embedded = 4 * WIDTH * count / 2**20
        print(
            f"{count:>9} images: {found[-1]['seconds']:9.2f} s, {found[-1]['clusters']} clusters, "
            f"{found[-1]['peak_mb']:.0f} MB beyond the start (the vectors themselves: {embedded:.0f} MB, mapped)",
            flush=True,
        )
    last = found[-1]
    growth = WHOLE * cluster_count(WHOLE) / (last["count"] * cluster_count(int(last["count"])))
    hours = last["seconds"] * growth / 3600
    print(f"extrapolated, not measured: x{growth:.0f} as images x clusters grow, so {WHOLE} take about {hours:.1f} h")
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
