"""The token probe on real heads: which start or loss is worth adapting, in seconds.

``python benchmarks/token_probe.py --data DATA/hc18 start.safetensors runs/a/student.safetensors``. Fits on part of the
training split and scores on validation; the test split is not read.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from tinyusfm_edge.data.table import read_table, soft_masks, stack_frames
from tinyusfm_edge.evaluation.probe import probe
from tinyusfm_edge.models.checkpoint import load_start, load_student_file
from tinyusfm_edge.models.student import StudentConfig, build_student
from tinyusfm_export.verify.reference import normalise
from tinyusfm_runtime.errors import EdgeError
from tinyusfm_runtime.spec import PreprocessSpec


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description="how much of a mask frozen tokens tell")
    parser.add_argument("students", nargs="+", help="student files, or random")
    parser.add_argument("--data", type=Path, required=True, help="folder with split.csv")
    parser.add_argument("--size", type=int, default=112, help="side of the images")
    parser.add_argument("--frames", type=int, default=200, help="training frames to fit on")
    parser.add_argument("--blocks", default="4,8,12")
    options = parser.parse_args(arguments)
    blocks = [int(part) for part in options.blocks.split(",")]
    spec = PreprocessSpec(height=options.size, width=options.size)
    try:
        sets = []
        for split, limit in (("train", options.frames), ("val", None)):
            samples = read_table(options.data, split, limit=limit)
            images = torch.from_numpy(stack_frames([sample.frame for sample in samples], spec))[:, None].float()
            drawn = all(sample.ellipse is not None for sample in samples)
            masks = torch.from_numpy(soft_masks(samples, spec, from_ellipse=drawn)).float() / 255
            sets.append((normalise(images, spec), masks))
        for name in options.students:
            torch.manual_seed(0)
            heads = 12 if name == "random" else load_student_file(name).module.config.heads
            student = build_student(StudentConfig(task="features", image_size=options.size, heads=heads))
            if name != "random":
                load_start(student, name)
            scores = probe(student, sets[0], sets[1], blocks)
            print(f"{Path(name).stem:24s}" + "  ".join(f"block {s.block}: {s.r2:.3f}" for s in scores), flush=True)
    except EdgeError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
