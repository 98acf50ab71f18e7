"""What two models on one frame take, against the sum of their own times.

``python benchmarks/several_models.py FIRST.bundle SECOND.bundle [--frames 300] [--rate 10] [--threads 1]`` runs both on
phantoms that come at a rate that neither misses, in one loop, and prints median and p99 of the age at result and of the
models' own times of the same frames, and the ratio of the two p99, whose target is at most 1.1. It ends with 1 where
that is missed. Each model looks once. It judges no accuracy.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import ExitStack

import numpy as np

from paced import PacedSource
from tinyusfm_runtime.live.loop import Live
from tinyusfm_runtime.live.options import LiveOptions
from tinyusfm_runtime.numerics.order import wide
from tinyusfm_runtime.phantom import make_phantom
from tinyusfm_runtime.session import Session

TARGET = 1.1
"""Most that p99 of both may be, as a multiple of the p99 of the sum of the models' times."""
WARM_UP = 10
"""First results that are left out."""


def ratio_of(ages_ms: Sequence[float], own_ms: Sequence[float]) -> float:
    """p99 of the ages over p99 of the models' summed times, both ms, of the same frames."""
    return float(np.percentile(wide(ages_ms), 99) / np.percentile(wide(own_ms), 99))


def measure(first: str, second: str, *, frames: int, rate_hz: float, threads: int) -> dict[str, float]:
    """Runs both models on paced phantoms.

    Args:
        first: folder of a bundle.
        second: folder of the other one.
        frames: results that are kept.
        rate_hz: frames per second.
        threads: inside each engine.

    Returns:
        Median and p99 of age and own times in ms, and the ratio of the p99.
    """
    images = [make_phantom(seed).frame for seed in range(16)]
    ages: list[float] = []
    own: list[float] = []
    with ExitStack() as stack:
        models = {
            name: stack.enter_context(Session.open(place, threads=threads, second_pass=False))
            for name, place in (("first", first), ("second", second))
        }
        if pruned := [name for name, model in models.items() if model.spec.sector is not None]:
            raise SystemExit(f"the {pruned[0]} bundle's first artefact is pruned to a sector: phantoms show another")
        source = PacedSource(rate_hz, images)
        options = LiveOptions(period_ms=1e3 / rate_hz)
        live = stack.enter_context(Live(models, source, budget_ms=60_000.0, advanced=options))
        for number, result in enumerate(live):
            if number == frames + WARM_UP:
                break
            said = [one.prediction for one in result.models]
            if number < WARM_UP or any(one is None for one in said):
                continue
            # age at the last answer, before anybody waited for the result
            ages.append(max(one.age_ms or 0.0 for one in said if one is not None))
            own.append(sum(one.timings.infer_ms for one in said if one is not None))
    found = {"age_p50_ms": 50, "age_p99_ms": 99}
    return {
        "frames": float(len(ages)),
        **{name: float(np.percentile(wide(ages), at)) for name, at in found.items()},
        **{name.replace("age", "own"): float(np.percentile(wide(own), at)) for name, at in found.items()},
        "ratio_p99": ratio_of(ages, own),
    }


def main() -> int:
    """Measures and prints one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("first")
    parser.add_argument("second")
    parser.add_argument("--frames", type=int, default=300)
    parser.add_argument("--rate", type=float, default=10.0)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    found = measure(given.first, given.second, frames=given.frames, rate_hz=given.rate, threads=given.threads)
    print(json.dumps({**found, "target": TARGET}))
    return 0 if found["ratio_p99"] <= TARGET else 1


if __name__ == "__main__":
    sys.exit(main())
