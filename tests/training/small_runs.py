"""A pre-training small enough for a test: a two-block student at 32 pixels, a random ViT-S/14 as its teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tinyusfm_edge.models.teachers.dinov2 import VARIANTS, Dinov2
from tinyusfm_edge.training.pretrain.config import DistillConfig, read_config

SMALL = (
    "view.image_size=32",
    "student.width=32",
    "student.heads=2",
    "student.depth=2",
    "layers=[1,2]",
    "teacher_size=28",
    "variants=2",
    "steps=6",
    "batch=8",
    "learning_rate=0.003",
    "precision=fp32",
    "log_every=1",
    "checkpoint_every=1",
)


def small_config(ablation: str = "ours", *changes: str) -> DistillConfig:
    """Settings of the small run."""
    layers = ("layers=[2]",) if ablation == "last-layer" else ()
    return read_config(ablation, None, [*SMALL, *layers, *changes])[0]


def random_teacher(folder: Path) -> Path:
    """Writes a ViT-S/14 with seeded random weights under timm's names, float16."""
    torch.manual_seed(1)
    net = Dinov2(VARIANTS["dinov2_vits14"])
    state: dict[str, Any] = {k: torch.randn_like(v) * 0.05 for k, v in net.state_dict().items()}
    state |= {k: torch.ones_like(v) for k, v in state.items() if "norm" in k and k.endswith("weight") or "gamma" in k}
    path = folder / "teacher.safetensors"
    save_file({k: v.half() for k, v in state.items()}, path)
    return path
