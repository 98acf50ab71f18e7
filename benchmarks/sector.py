"""What pruning to a sector saves.

Every pruned artefact of a bundle beside the whole one, frame by frame.

``python benchmarks/sector.py mine.bundle --frames folder:IMAGES --count 60 --out sector.json`` opens both in one
process. In every round each of them answers every frame, the two sides of a frame one after the other, the first by
lot. Frames are masked to the sector, so that both sides see the same. It judges no accuracy (the gate does).
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tinyusfm_runtime.atomic import write_file
from tinyusfm_runtime.bundle.reader import Bundle
from tinyusfm_runtime.device.machine import machine_card
from tinyusfm_runtime.errors import InputError
from tinyusfm_runtime.frame import Frame
from tinyusfm_runtime.numerics.order import wide
from tinyusfm_runtime.numerics.preprocess import preprocess
from tinyusfm_runtime.session import Session
from tinyusfm_runtime.sources import open_source

VERSION = 1
"""Of the JSON."""
PERCENTILES = (50, 90, 99)


def pairs_of(bundle: Bundle) -> list[tuple[str, str, str]]:
    """Target, pruned variant and whole variant of each artefact that has both.

    Args:
        bundle: an open bundle.

    Raises:
        InputError: there is none.
    """
    there = {(artefact.target, artefact.variant) for artefact in bundle.manifest.artefacts}
    found = [
        (artefact.target, artefact.variant, artefact.precision)
        for artefact in bundle.manifest.artefacts
        if artefact.sector and (artefact.target, artefact.precision) in there
    ]
    if not found:
        raise InputError("the bundle has no artefact both pruned and whole: export it with --sector")
    return found


def take(pruned: Session, whole: Session, frames: Sequence[Frame], rounds: int, seed: int = 0) -> dict[str, Any]:
    """Times both sides in turn.

    Args:
        pruned: looks at the sector.
        whole: looks at all patches.
        frames: any frames of that sector.
        rounds: how often each frame is answered by each side.
        seed: of the lots.

    Returns:
        Every sample in ms, percentiles, and the ratio of the medians (whole by pruned).
    """
    sector = pruned.spec.sector
    assert sector is not None
    tensors = [sector.masked(preprocess(frame, pruned.spec.preprocess)[0]) for frame in frames]
    samples: dict[str, list[float]] = {"pruned": [], "whole": []}
    sides, lots = {"pruned": pruned, "whole": whole}, random.Random(seed)
    for _ in range(rounds):
        for tensor in tensors:
            for side in lots.sample(list(sides), 2):
                begin = time.perf_counter_ns()
                sides[side].predict_tensor(tensor)
                samples[side].append((time.perf_counter_ns() - begin) / 1e6)
    centre = {side: float(np.median(wide(np.array(values)))) for side, values in samples.items()}
    return {
        "samples_ms": samples,
        "percentiles_ms": {
            side: {f"p{p}": float(np.percentile(wide(np.array(values)), p)) for p in PERCENTILES}
            for side, values in samples.items()
        },
        "times_as_fast": centre["whole"] / centre["pruned"],
        "patches": [len(sector.indices), sector.grid[0] * sector.grid[1]],
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Measures and writes the JSON; returns an exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--frames", default="phantom:0-31", help="any source")
    parser.add_argument("--count", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args(argv)
    with open_source(asked.frames) as source:
        frames = list(itertools.islice(source, asked.count))
    bundle, rows = Bundle.open(asked.bundle), []
    for target, pruned, whole in pairs_of(bundle):
        given: dict[str, Any] = {"target": target, "threads": asked.threads, "drift": False}
        with Session.open(bundle, precision=pruned, **given) as a, Session.open(bundle, precision=whole, **given) as b:
            found = take(a, b, frames, asked.rounds)
        rows.append({"target": target, "pruned": pruned, "whole": whole, **found})
        print(f"{target} {whole}: pruned is {found['times_as_fast']:.2f} times as fast, patches {found['patches']}")
    data = {"kind": "sector benchmark", "version": VERSION, "machine": machine_card().to_json(), "rows": rows}
    write_file(asked.out, (json.dumps(data, indent=1) + "\n").encode("ascii"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
