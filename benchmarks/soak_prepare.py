"""What a soak needs: a bundle of the shipped student, frames, and what PyTorch says about exactly these frames.

``python benchmarks/soak_prepare.py --out FOLDER`` runs it; soak.py starts it as a process of its own, so that torch
never enters the process whose memory is watched.

Shapes: SHW frames; SHW masks at the input's size; S numbers a frame.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tinyusfm_calibration.sets import phantom_frames
from tinyusfm_edge import students
from tinyusfm_export.pipeline import ExportOptions, export_bundle
from tinyusfm_export.verify.gate_frames import GateFrames
from tinyusfm_export.verify.reference import reference_outputs
from tinyusfm_runtime.bundle.arrays import pack_arrays
from tinyusfm_runtime.phantom import make_phantom

STUDENT = "fetal-head"
BUNDLE, FRAMES = "student.bundle", "frames.npz"
"""Names inside the folder."""
NUM_FRAMES, FIRST_SEED = 16, 300
"""Frames that are shown in turn, and the first one's seed: none of the golden, gate or training phantoms."""
GATE_SEEDS = range(100, 134)
"""A short gate: the bundle is made on the machine that runs it, and the soak compares with PyTorch once more."""


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for bundle and frames")
    parser.add_argument("--targets", default="onnx,openvino", help="targets in the order of the fallback order")
    parser.add_argument("--no-bundle", action="store_true", help="frames only, for a bundle that is there already")
    options = parser.parse_args(argv)
    prepare(options.out, () if options.no_bundle else options.targets.split(","))


def prepare(out: Path, targets: Sequence[str]) -> None:
    """Writes bundle and frames.

    Args:
        out: folder, made if it is not there.
        targets: of the bundle, float32 all of them; none makes no bundle.
    """
    out.mkdir(parents=True, exist_ok=True)
    loaded = students.load(STUDENT)
    if targets:
        frames = GateFrames(kind="phantom", frames=tuple(phantom_frames(GATE_SEEDS)), source="phantoms of the soak")
        export_bundle(
            loaded.module, loaded.spec, targets=targets, precisions=["fp32"], out=out / BUNDLE, gate_frames=frames,
            advanced=ExportOptions(rounds=1, runs=1, compare=False),
        )  # fmt: skip
    images = [make_phantom(FIRST_SEED + i, height=480, width=640).frame for i in range(NUM_FRAMES)]
    answers = [output.answer for output in reference_outputs(loaded.module, loaded.spec, images)]
    readings = [0.0 if a.measurement is None else a.measurement.hc_mm or 0.0 for a in answers]
    arrays = {
        "pixels": np.stack([image.pixels for image in images]),
        "spacing_mm": np.array([image.spacing_mm for image in images]),
        "masks": np.stack([answer.mask_HW for answer in answers if answer.mask_HW is not None]),
        "hc_mm": np.array(readings),
    }
    (out / FRAMES).write_bytes(pack_arrays(arrays))


if __name__ == "__main__":
    main()
