"""The bundle that ships with the runtime: integers alone, the same answers on every CPU, small.

    make bundle ARGS="--data hc18/"

writes ``runtime/tinyusfm_runtime/bundles/NAME.bundle``. It differs from what ``export`` makes on the same machine in
two things. It holds the integer artefact alone, which needs no inference library, so that ``pip install`` brings all
that runs it. And it carries ``GOLDEN_FRAMES`` golden frames instead of 32 (``benchmarks/golden_power.py`` has what that
costs). The gate is the default one.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from tinyusfm_edge.export import ExportRequest, StudentExport, prepare_export
from tinyusfm_edge.students import names
from tinyusfm_runtime.bundle.shipped import SHIPPED

if TYPE_CHECKING:
    from tinyusfm_runtime.frame import Frame

TARGETS = ("integer",)
GOLDEN_FRAMES = 8
"""Golden frames: the first phantoms of those that every bundle takes its own from."""


def golden() -> list[Frame]:
    """The golden frames, phantoms."""
    from tinyusfm_export.verify.golden import GOLDEN_SEEDS, golden_frames

    return golden_frames(GOLDEN_SEEDS[:GOLDEN_FRAMES])


def make_ready_bundle(name: str, data: Path | None, out: Path | None = None, *, threads: int = 1) -> StudentExport:
    """Exports a shipped student as the bundle that ships.

    Args:
        name: of the student.
        data: labelled frames that the gate is judged on and thresholds are calibrated on, or None: phantoms and a clip
            judge, and the student's own thresholds stay.
        out: the bundle's folder; None is its place in the package.
        threads: of the engine while it is checked.

    Raises:
        GateError: an artefact misses the gate; nothing is published.
        EdgeError: whatever else cannot be read, used, run or written.
    """
    from tinyusfm_export.pipeline import Stages

    place = out or SHIPPED / f"{name}.bundle"
    request = ExportRequest(student=name, targets=TARGETS, out=place, data=data, threads=threads, compare=False)
    prepared = prepare_export(request, on_note=lambda line: print(f"note: {line}", file=sys.stderr))
    # the decision that is recorded is the same on every CPU, too
    policies = tuple(replace(policy, rest_precision="f32") for policy in prepared.options.policies)
    options = replace(prepared.options, policies=policies, stages=Stages(golden=golden))
    return replace(prepared, options=options).publish()


def main(argv: Sequence[str] | None = None) -> int:
    """Makes the bundle and says what it holds."""
    parser = argparse.ArgumentParser(description="make the bundle that ships with the runtime")
    parser.add_argument("--name", default="fetal-head", choices=names(), help="shipped student")
    parser.add_argument("--data", type=Path, help="labelled frames with a split.csv that judge")
    parser.add_argument("--out", type=Path, help="NAME.bundle; default: its place in the package")
    options = parser.parse_args(argv)
    exported = make_ready_bundle(options.name, options.data, options.out)
    place = exported.result.path
    total = sum(path.stat().st_size for path in place.rglob("*") if path.is_file())
    for artefact, report in exported.result.reports.items():
        print(f"{artefact}: {report.summary()['statistics']}")
    print(f"{place}: {total / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
