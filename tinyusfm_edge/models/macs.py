"""Multiply-accumulates and parameters of a student, and its static card.

Counted over forward hooks.

Counted are linears, convolutions and the two attention products (queries by keys, weights by values), one MAC a
multiplication; biases, norms, softmax, GELU and interpolation are not. The published 2.16 GFLOPs of TinyUSFM are twice
the same count without the attention products (methods.md 1.4).

It does not know latency: a card says what the architecture implies, not what an engine makes of it.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tinyusfm_edge.models.student import Attention, Student


@dataclass(frozen=True, kw_only=True, slots=True)
class MacCount:
    """MACs of one forward pass.

    Attributes:
        linear: of all ``nn.Linear``.
        convolution: of all ``nn.Conv2d``, the patch embedding included.
        attention: of the two matrix products in every attention.
        by_part: MACs of each direct child of the model (``backbone``, ``neck``, ``head``, ...).
    """

    linear: int
    convolution: int
    attention: int
    by_part: dict[str, int]

    @property
    def total(self) -> int:
        """All MACs of the pass."""
        return self.linear + self.convolution + self.attention


def count_macs(module: nn.Module, image_size: int | tuple[int, int], *, batch: int = 1) -> MacCount:
    """Counts the MACs of one forward pass.

    Args:
        module: a student or its backbone on the CPU; left as it is.
        image_size: side of a square input, or its rows and columns.
        batch: images in the pass.

    Returns:
        The count.
    """
    found: dict[tuple[str, str], int] = defaultdict(int)
    handles = []
    for name, part in module.named_modules():
        kind = _kind(part)
        if kind is not None:
            handles.append(part.register_forward_hook(_counter(found, kind, name.split(".")[0])))
    rows, cols = (image_size, image_size) if isinstance(image_size, int) else image_size
    training = module.training
    try:
        with torch.inference_mode():
            module.eval()(torch.zeros(batch, 3, rows, cols))
    finally:
        module.train(training)
        for handle in handles:
            handle.remove()
    by_kind: dict[str, int] = defaultdict(int)
    by_part: dict[str, int] = defaultdict(int)
    for (kind, part_name), macs in found.items():
        by_kind[kind] += macs
        by_part[part_name] += macs
    return MacCount(
        linear=by_kind["linear"],
        convolution=by_kind["convolution"],
        attention=by_kind["attention"],
        by_part=dict(by_part),
    )


def _kind(part: nn.Module) -> str | None:
    kinds = ((nn.Linear, "linear"), (nn.Conv2d, "convolution"), (Attention, "attention"))
    return next((kind for cls, kind in kinds if isinstance(part, cls)), None)


def _counter(found: dict[tuple[str, str], int], kind: str, part_name: str) -> Any:
    def hook(part: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        found[kind, part_name] += _macs_of(part, inputs[0], output)

    return hook


def _macs_of(part: nn.Module, x: Tensor, output: Tensor) -> int:
    if isinstance(part, nn.Linear):
        return output.numel() * part.in_features
    if isinstance(part, nn.Conv2d):
        rows, cols = part.kernel_size
        return output.numel() * (part.in_channels // part.groups) * rows * cols
    batch, tokens, width = x.shape
    return 2 * batch * tokens * tokens * width


def count_parameters(module: nn.Module) -> int:
    """Trainable numbers of a module (buffers such as running means are not counted)."""
    return sum(p.numel() for p in module.parameters())


def static_card(student: Student) -> dict[str, Any]:
    """What the architecture alone implies, for the head of a benchmark.

    Args:
        student: any student.

    Returns:
        Plain data: parameters, MACs by kind and by part, weight bytes at each precision, and the size of one block's
        attention maps (what 12 heads of 16 cost over 3 of 64).
    """
    config = student.config
    macs = count_macs(student, config.input_hw)
    parameters = count_parameters(student)
    tokens = config.grid_hw[0] * config.grid_hw[1] + 1
    return {
        "task": config.task,
        "image_size": config.image_size,
        "heads": f"{config.heads}x{config.width // config.heads}",
        "parameters": parameters,
        "macs": macs.total,
        "macs_linear": macs.linear,
        "macs_convolution": macs.convolution,
        "macs_attention": macs.attention,
        "macs_by_part": macs.by_part,
        "gflops": round(2e-9 * macs.total, 3),
        "gflops_without_attention": round(2e-9 * (macs.total - macs.attention), 3),
        "weight_bytes": {"fp32": 4 * parameters, "fp16": 2 * parameters, "int8": parameters},
        "attention_map_elements": config.heads * tokens * tokens,
    }


__all__ = ["MacCount", "count_macs", "count_parameters", "static_card"]
