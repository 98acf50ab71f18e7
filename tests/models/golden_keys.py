"""Names and shapes of tensors in official files, written out from the official repositories' own modules.

``model/tinyusfm.py`` and ``model/tinyusfm_seg.py`` of MacDunno/TinyUSFM, and the files that its train_cls.py and
train_seg.py save. ``{0-11}`` stands for each number. Nothing here is derived from our own networks.
"""

from __future__ import annotations

import re

import torch

BLOCKS = """
cls_token 1,1,192
pos_embed 1,197,192
patch_embed.proj.weight 192,3,16,16
patch_embed.proj.bias 192
blocks.{0-11}.norm1.weight 192
blocks.{0-11}.norm1.bias 192
blocks.{0-11}.attn.qkv.weight 576,192
blocks.{0-11}.attn.qkv.bias 576
blocks.{0-11}.attn.proj.weight 192,192
blocks.{0-11}.attn.proj.bias 192
blocks.{0-11}.norm2.weight 192
blocks.{0-11}.norm2.bias 192
blocks.{0-11}.mlp.fc1.weight 768,192
blocks.{0-11}.mlp.fc1.bias 768
blocks.{0-11}.mlp.fc2.weight 192,768
blocks.{0-11}.mlp.fc2.bias 192
"""
NORM = "norm.weight 192\nnorm.bias 192\n"
FC_NORM = "fc_norm.weight 192\nfc_norm.bias 192\n"
SEGMENTATION = """
neck.projections.{0-3}.weight 48,192,1,1
neck.projections.{0-3}.bias 48
decode_head.lateral_convs.{0-3}.0.weight 128,48,1,1
decode_head.lateral_convs.{0-3}.0.bias 128
decode_head.lateral_convs.{0-3}.1.weight 128
decode_head.lateral_convs.{0-3}.1.bias 128
decode_head.lateral_convs.{0-3}.1.running_mean 128
decode_head.lateral_convs.{0-3}.1.running_var 128
decode_head.lateral_convs.{0-3}.1.num_batches_tracked
decode_head.fpn_convs.{0-3}.0.weight 128,128,3,3
decode_head.fpn_convs.{0-3}.0.bias 128
decode_head.fpn_convs.{0-3}.1.weight 128
decode_head.fpn_convs.{0-3}.1.bias 128
decode_head.fpn_convs.{0-3}.1.running_mean 128
decode_head.fpn_convs.{0-3}.1.running_var 128
decode_head.fpn_convs.{0-3}.1.num_batches_tracked
decode_head.conv_seg.weight {K},128,1,1
decode_head.conv_seg.bias {K}
"""


def _with(prefix: str, text: str) -> str:
    return "".join(f"{prefix}{line}\n" for line in text.split("\n") if line)


FORMATS = {
    "TinyUSFM.pth, pre-trained with norm": _with("model.", BLOCKS + NORM),
    "TinyUSFM.pth, pre-trained with fc_norm": _with("model.", BLOCKS + FC_NORM),
    "train_cls.py, 5 classes": _with("model.", BLOCKS + FC_NORM + "head.weight 5,192\nhead.bias 5\n"),
    "train_cls.py, 5 classes, parallel": _with("module.model.", BLOCKS + FC_NORM + "head.weight 5,192\nhead.bias 5\n"),
    "train_seg.py, binary": _with("backbone.", BLOCKS + NORM) + SEGMENTATION.replace("{K}", "1"),
    "train_seg.py, 4 classes": _with("backbone.", BLOCKS + NORM) + SEGMENTATION.replace("{K}", "4"),
}
"""Format -> lines of name and shape."""


def golden_state(name: str, seed: int = 0) -> dict[str, torch.Tensor]:
    """A state dict of a format with seeded random numbers."""
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, torch.Tensor] = {}
    for line in FORMATS[name].split("\n"):
        if not line:
            continue
        key, _, shape = line.partition(" ")
        sizes = [int(part) for part in shape.split(",")] if shape else []
        for full in _numbered(key):
            if full.endswith("num_batches_tracked"):
                found[full] = torch.tensor(7)
            else:
                values = torch.randn(sizes, generator=generator) * 0.02
                found[full] = values.abs() + 0.5 if full.endswith("running_var") else values
    return found


def _numbered(key: str) -> list[str]:
    match = re.search(r"\{(\d+)-(\d+)\}", key)
    if match is None:
        return [key]
    low, high = int(match.group(1)), int(match.group(2))
    return [key.replace(match.group(0), str(number)) for number in range(low, high + 1)]
