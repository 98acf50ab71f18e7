"""What a step of distillation costs here: images per second against the matrix floor, where the time goes, and an H200.

``python benchmarks/training_cost.py --size 112 --batch 16`` times the parts of one optimiser step (views, teacher,
student forward, backward, optimiser) in one process, takes the floor of gemm_floor.py in the same run, and prints a
table and one JSON line. What 200K images x 100 epochs take on one H200 is **derived**, not measured: operations of
the step / (peak x share), with the share given (0.2 of 989 TFLOP/s dense BF16, by NVIDIA's data sheet, is about
methods.md's 200 effective).

It does not read images from a disk: decoding happens once, before training.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from gemm_floor import gemm_floor
from tinyusfm_edge.models.macs import count_macs
from tinyusfm_edge.models.student import StudentConfig, build_student
from tinyusfm_edge.models.teachers.dinov2 import VARIANTS, Dinov2
from tinyusfm_edge.training.pretrain.config import DistillConfig, read_config
from tinyusfm_edge.training.pretrain.distill import DistillObjective
from tinyusfm_edge.training.pretrain.teacher_bank import FeatureConfig, TeacherFeatures
from tinyusfm_edge.training.pretrain.views import draw_views, masked
from tinyusfm_edge.training.trainer.loop import plain_groups

H200_TFLOPS = 989.0
"""Dense BF16 of one H200 (data sheet; the 1979 there count sparsity)."""
IMAGES, EPOCHS = 200_000, 100
"""The published coreset, and methods.md's epochs."""


def encoder_macs(tokens: int, width: int, depth: int, patch: int) -> float:
    """Multiply-accumulates of a ViT encoder of MLP ratio 4: linears, both attention products, patch embedding."""
    block = 12 * tokens * width**2 + 2 * tokens**2 * width
    return depth * block + (tokens - 1) * 3 * patch**2 * width


def step_macs(config: DistillConfig, teacher: tuple[int, int, int] | None) -> dict[str, float]:
    """Multiply-accumulates for one image.

    Args:
        config: views and image size.
        teacher: width, depth and patch, or None where features are cached.

    Returns:
        ``student`` (forward and backward, three times the forward) and ``teacher``.
    """
    size, views = config.view.image_size, len(config.views)
    student = 3 * views * float(count_macs(build_student(config.built_student), size).total)
    if teacher is None:
        return {"student": student, "teacher": 0.0}
    width, depth, patch = teacher
    return {"student": student, "teacher": views * encoder_macs((size // patch) ** 2 + 1, width, depth, patch)}


def h200_hours(macs: float, share: float) -> float:
    """Derived hours of one H200 for the whole training, at a share of its peak."""
    return 2 * macs * IMAGES * EPOCHS / (H200_TFLOPS * 1e12 * share) / 3600


def time_step(config: DistillConfig, batch: int, rounds: int) -> dict[str, float]:
    """Best seconds of each part of a step; parts are timed in turn within each round.

    Args:
        config: settings.
        batch: images.
        rounds: repetitions.

    Returns:
        Part -> seconds.
    """
    torch.manual_seed(0)
    shape = VARIANTS["dinov2_vits14"]
    features = FeatureConfig(layers=config.layers, student_depth=12, teacher_size=0, grid=config.view.image_size // 16)
    teacher = TeacherFeatures(Dinov2(shape).eval().requires_grad_(False), features)
    objective = DistillObjective(config, (shape.width,) * len(config.layers))
    groups = plain_groups(objective, 0.05)
    optimiser = torch.optim.AdamW([{"params": g.parameters, "weight_decay": g.weight_decay} for g in groups], lr=1e-4)
    rng = np.random.default_rng(0)
    side = config.view.stored_size
    pixels = [rng.integers(0, 255, (side, side), np.uint8) for _ in range(batch)]
    held: dict[str, Any] = {}

    def views() -> None:
        held["views"] = draw_views(pixels, list(range(batch)), config.view)

    def ask() -> None:
        held["teacher"] = {kind: teacher(masked(held["views"], kind, config.view.mask)) for kind in config.views}

    def forward() -> None:
        drawn = held["views"]
        held["loss"], _ = objective(
            {"image": drawn.image_B1HW, "mask": drawn.mask_Bhw, "bands": drawn.bands_BK, "teacher": held["teacher"]}
        )

    def backward() -> None:
        held["loss"].backward()

    def update() -> None:
        torch.nn.utils.clip_grad_norm_(objective.parameters(), 3.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)

    parts: dict[str, Callable[[], None]] = {
        "views and masks": views,
        "teacher, both views": ask,
        "student forward and loss": forward,
        "backward": backward,
        "clip and AdamW": update,
    }
    best = dict.fromkeys(parts, float("inf"))
    for _ in range(rounds + 1):  # the first round warms up, and is never the best
        for name, part in parts.items():
            started = time.perf_counter()
            part()
            best[name] = min(best[name], time.perf_counter() - started)
    return best


def main() -> int:
    """Prints the table and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=224, help="rows and columns of the crop")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--share", type=float, default=0.2, help="of the H200's peak that is reached; assumed")
    options = parser.parse_args()
    config, _ = read_config("ours", None, [f"view.image_size={options.size}", "precision=fp32"])
    gops = max(speeds["best"] for speeds in gemm_floor(options.threads, "fp32").values())
    seconds = time_step(config, options.batch, options.rounds)
    shape = VARIANTS["dinov2_vits14"]
    macs = step_macs(config, (shape.width, shape.depth, shape.patch))
    whole = sum(seconds.values())
    cached = whole - seconds["teacher, both views"]
    print(f"{options.size} px, batch {options.batch}, {options.threads} thread(s), fp32; matrices {gops:.0f} GOP/s")
    for name, value in seconds.items():
        print(f"  {name:26} {1e3 * value / options.batch:8.2f} ms/image  {value / whole:5.1%}")
    floors = {"live teacher": 2e-9 * sum(macs.values()) / gops, "cached features": 2e-9 * macs["student"] / gops}
    rates = {"live teacher": options.batch / whole, "cached features": options.batch / cached}
    for name, rate in rates.items():
        print(f"  {name}: {rate:.1f} images/s, floor {1 / floors[name]:.1f} (x{1 / floors[name] / rate:.2f})")
    base = replace(config, view=replace(config.view, image_size=224), student=StudentConfig(task="features"))
    derived = {
        "USFM ViT-B/16": h200_hours(sum(step_macs(base, (768, 12, 16)).values()), options.share),
        "DINOv2 ViT-S/14": h200_hours(sum(step_macs(base, (384, 12, 14)).values()), options.share),
        "cached features": h200_hours(step_macs(base, None)["student"], options.share),
    }
    print(f"derived, not measured: {IMAGES} images x {EPOCHS} epochs at 224 px on one H200 at {options.share:.0%}:")
    for name, hours in derived.items():
        print(f"  teacher {name}: {hours:.1f} h")
    print(json.dumps({"seconds": seconds, "gops": gops, "rates": rates, "macs": macs, "derived_h200_hours": derived}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
