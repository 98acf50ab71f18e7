"""TinyUSFM: the compact ultrasound backbone.

And its heads for segmentation, classification and features.

The backbone is the published model (MacDunno/TinyUSFM, model/tinyusfm.py, timm 0.5.4 style; its MAE-Lite
ancestor models_vit.py): pre-norm ViT, width 192, 12 blocks, 12 heads of 16, patch 16, one class token,
learned positions, LayerNorm eps 1e-6, GELU (erf). Parameter names are the official file's. The segmentation model
is MAE-Lite's semantic-FPN recipe as in model/tinyusfm_seg.py. Re-implemented from the description; no code copied.

The head count is configuration and never read off a weight: 12x16 and 3x64 heads have the same shapes. The
official file's 2.16 GFLOPs leave the attention products out; models/macs.py counts all of them.

It does not know training, checkpoints on disk or export.

Shapes: B batch, N tokens, D width, H heads, K outputs; NCHW images.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinyusfm_runtime.errors import InputError
from tinyusfm_runtime.strict_json import refusing

TAPS = (3, 5, 7, 11)
"""Blocks whose outputs feed the segmentation neck (out_indices of the published seg model)."""

_LIMITS = {
    "num_classes": (1, 4096),
    "image_size": (32, 1024),
    "width": (16, 2048),
    "depth": (1, 48),
    "heads": (1, 64),
}
"""Smallest and largest value of each size: a config from a file cannot ask for more memory than a large ViT."""
_KINDS = ("segment", "classify", "features")


@dataclass(frozen=True, kw_only=True, slots=True)
class StudentConfig:
    """Architecture of a student; the defaults are the published model.

    Attributes:
        task: which head.
        num_classes: outputs of the head; 2 classes in segmentation are one logit channel.
        image_size: rows of the input, a multiple of 16, and columns too unless ``image_width`` says otherwise.
        image_width: columns of the input, a multiple of 16; 0 is a square.
        width: embedding width.
        depth: blocks.
        heads: attention heads; 12 is published, 3 (head size 64) suits NPUs. Not interchangeable.
        seg_head: ``fpn`` is the published head, ``lite`` uses depthwise-separable 3x3 convolutions (our choice).
        drop_path: stochastic depth in training, 0..1.
        exits: blocks, counted from 1, after which a classifier may stop early; the head at the end is not named.
    """

    task: Literal["segment", "classify", "features"] = "segment"
    num_classes: int = 2
    image_size: int = 224
    width: int = 192
    depth: int = 12
    heads: int = 12
    seg_head: Literal["fpn", "lite"] = "fpn"
    drop_path: float = 0.1
    exits: tuple[int, ...] = ()
    image_width: int = 0

    def __post_init__(self) -> None:
        """Checks every value before anything is built, since configs also come from files.

        Raises:
            InputError: a value of the wrong kind or out of range.
        """
        if self.task not in _KINDS:
            raise InputError(f"task {self.task!r} is unknown: use {', '.join(_KINDS)}")
        if self.seg_head not in ("fpn", "lite"):
            raise InputError(f"segmentation head {self.seg_head!r} is unknown: use fpn or lite")
        for name, (low, high) in _LIMITS.items():
            value = getattr(self, name)
            if type(value) is not int or not low <= value <= high:
                raise InputError(f"{name} must be a whole number from {low} to {high}, not {value!r}")
        if isinstance(self.drop_path, bool) or not isinstance(self.drop_path, (int, float)):
            raise InputError(f"drop_path must be a number, not {self.drop_path!r}")
        if not 0.0 <= self.drop_path < 1.0:
            raise InputError(f"drop_path {self.drop_path} must lie in [0, 1)")
        if self.width % self.heads or self.width % 4:
            raise InputError(f"width {self.width} must be a multiple of 4 and of {self.heads} heads")
        low, high = _LIMITS["image_size"]
        if type(self.image_width) is not int or (self.image_width and not low <= self.image_width <= high):
            raise InputError(f"image_width must be 0 or a whole number from {low} to {high}, not {self.image_width!r}")
        if self.image_size % 16 or self.image_width % 16:
            raise InputError(f"image size {self.image_size} must be a multiple of 16, and the width likewise")
        if self.task == "segment" and self.depth != 12:
            raise InputError("the segmentation head taps blocks 4, 6, 8 and 12: depth must be 12")
        if self.task == "segment" and self.num_classes < 2:
            raise InputError("segmentation has at least 2 classes, background counted")
        self._check_exits()

    def _check_exits(self) -> None:
        if not isinstance(self.exits, tuple) or any(type(block) is not int for block in self.exits):
            raise InputError(f"exits must be whole numbers, not {self.exits!r}")
        if self.exits and self.task != "classify":
            raise InputError("early exits are for classifiers: a mask needs blocks 4, 6, 8 and 12")
        if list(self.exits) != sorted(set(self.exits)) or any(not 1 <= block < self.depth for block in self.exits):
            raise InputError(f"exits {self.exits} must rise and lie between 1 and {self.depth - 1}")

    @property
    def input_hw(self) -> tuple[int, int]:
        """Rows and columns of the input."""
        return self.image_size, self.image_width or self.image_size

    @property
    def grid_hw(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.input_hw[0] // 16, self.input_hw[1] // 16

    @property
    def outputs(self) -> int:
        """Channels of the answer.

        One for a binary mask, the width for features, else one per class.
        """
        if self.task == "features":
            return self.width
        return 1 if self.task == "segment" and self.num_classes == 2 else self.num_classes

    def to_json(self) -> dict[str, Any]:
        """Plain data.

        ``exits`` and ``image_width`` only where they are set, so that other files stay as they were.
        """
        data = asdict(self)
        exits = data.pop("exits")
        if not data["image_width"]:
            del data["image_width"]
        return data | {"exits": list(exits)} if exits else data

    @classmethod
    @refusing("the student's description", InputError)
    def from_json(cls, data: dict[str, Any]) -> StudentConfig:
        """Reads what ``to_json`` wrote.

        Raises:
            InputError: not a table, unknown keys or impossible values.
        """
        if not isinstance(data, dict):
            raise InputError(f"student config must be a table of names and values, not {type(data).__name__}")
        unknown = set(data) - {f.name for f in fields(cls)}
        if unknown:
            raise InputError(f"student config has unknown keys {sorted(unknown)}")
        exits = data.get("exits", ())
        return cls(**{**data, "exits": tuple(exits) if isinstance(exits, list) else exits})


class PatchEmbed(nn.Module):
    """Cuts an image into 16x16 patches and embeds each."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, 16, 16)

    def forward(self, image_NCHW: Tensor) -> Tensor:
        """Image NCHW -> patch tokens BND, row by row."""
        return self.proj(image_NCHW).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """Multi-head self-attention with one packed qkv projection."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x_BND: Tensor) -> Tensor:
        """Tokens BND -> attended tokens BND."""
        b, n, d = x_BND.shape
        qkv = self.qkv(x_BND).reshape(b, n, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        return self.proj(self._attend(qkv[0], qkv[1], qkv[2]).transpose(1, 2).reshape(b, n, d))

    def _attend(self, q_BHND: Tensor, k_BHND: Tensor, v_BHND: Tensor) -> Tensor:
        if self.training and q_BHND.device.type == "cpu":
            # torch 2.13's fused CPU attention spends 49 ms in bfloat16 backward at 16x12x197x16, this 10 ms
            scale = q_BHND.shape[-1] ** -0.5
            return ((q_BHND * scale) @ k_BHND.transpose(-1, -2)).softmax(-1) @ v_BHND
        return F.scaled_dot_product_attention(q_BHND, k_BHND, v_BHND)


class Mlp(nn.Module):
    """Two linears with GELU (erf) between."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x_BND: Tensor) -> Tensor:
        """Tokens BND -> tokens BND."""
        return self.fc2(F.gelu(self.fc1(x_BND)))


class Block(nn.Module):
    """Pre-norm transformer block with stochastic depth per sample."""

    def __init__(self, width: int, heads: int, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width)
        self.drop_path = drop_path

    def forward(self, x_BND: Tensor) -> Tensor:
        """Tokens BND -> tokens BND."""
        x_BND = x_BND + self._drop(self.attn(self.norm1(x_BND)))
        return x_BND + self._drop(self.mlp(self.norm2(x_BND)))

    def _drop(self, branch: Tensor) -> Tensor:
        if not self.training or self.drop_path == 0.0:
            return branch
        keep = 1.0 - self.drop_path
        mask = torch.rand(branch.shape[0], 1, 1, device=branch.device) < keep
        return branch * mask.to(branch.dtype) / keep


class Backbone(nn.Module):
    """The published TinyUSFM encoder: 5,524,416 parameters by default.

    Final norm included, no head.
    """

    def __init__(self, config: StudentConfig) -> None:
        super().__init__()
        self.grid_hw = config.grid_hw
        self.patch_embed = PatchEmbed(config.width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.width))
        self.pos_embed = nn.Parameter(torch.zeros(1, self.num_patches + 1, config.width))
        rates = [config.drop_path * index / max(1, config.depth - 1) for index in range(config.depth)]
        self.blocks = nn.ModuleList(Block(config.width, config.heads, rate) for rate in rates)
        self.norm = nn.LayerNorm(config.width, eps=1e-6)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        self.apply(_init_linear)

    @property
    def num_patches(self) -> int:
        """Patches of an image."""
        return self.grid_hw[0] * self.grid_hw[1]

    def embed(self, image_NCHW: Tensor) -> Tensor:
        """Tokens before the first block, BND with the class token first."""
        x = self.patch_embed(image_NCHW)
        return torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], 1) + self.pos_embed

    def taps(
        self, image_NCHW: Tensor, indices: tuple[int, ...] = TAPS, *, kept_BV: Tensor | None = None
    ) -> list[Tensor]:
        """Outputs of the named blocks, in order.

        BND, class token included, no final norm.

        Args:
            image_NCHW: normalised image.
            indices: blocks, from 0.
            kept_BV: patches that are looked at, each with its own position; None is all of them, row by row.
        """
        x = self.embed(image_NCHW)
        if kept_BV is not None:
            x = torch.cat([x[:, :1], x[:, 1:].gather(1, kept_BV[..., None].expand(-1, -1, x.shape[-1]))], 1)
        out = []
        for index, block in enumerate(self.blocks):
            x = block(x)
            if index in indices:
                out.append(x)
        return out

    def forward(self, image_NCHW: Tensor) -> Tensor:
        """Tokens after the last block and no norm, BND."""
        return self.taps(image_NCHW, (len(self.blocks) - 1,))[0]


class Neck(nn.Module):
    """1x1 convolutions to a quarter of the width and bilinear scaling by 4, 2, 1, 1/2."""

    scales = (4.0, 2.0, 1.0, 0.5)

    def __init__(self, width: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(width, width // 4, 1) for _ in self.scales)

    def forward(self, taps_NCHW: list[Tensor]) -> list[Tensor]:
        """Four maps at 1/16 -> four maps at 1/4, 1/8, 1/16 and 1/32 of the image."""
        return [
            x if s == 1.0 else F.interpolate(x, scale_factor=s, mode="bilinear", align_corners=False)
            for s, x in zip(self.scales, (c(t) for c, t in zip(self.convs, taps_NCHW, strict=True)), strict=True)
        ]


def _conv_bn(c_in: int, c_out: int, kernel: int, *, separable: bool = False) -> nn.Sequential:
    if separable:
        return nn.Sequential(
            nn.Conv2d(c_in, c_in, kernel, padding=kernel // 2, groups=c_in),
            nn.Conv2d(c_in, c_out, 1),
            nn.BatchNorm2d(c_out),
            nn.ReLU(),
        )
    return nn.Sequential(nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2), nn.BatchNorm2d(c_out), nn.ReLU())


class FpnHead(nn.Module):
    """Semantic FPN.

    Lateral 1x1, top-down sum, 3x3 per level, sum at 1/4 resolution, 1x1 classifier.
    """

    channels = 128

    def __init__(self, width: int, outputs: int, *, lite: bool = False) -> None:
        super().__init__()
        c = self.channels
        self.lateral = nn.ModuleList(_conv_bn(width // 4, c, 1) for _ in TAPS)
        self.smooth = nn.ModuleList(_conv_bn(c, c, 3, separable=lite) for _ in TAPS)
        self.dropout = nn.Dropout2d(0.1)
        self.classifier = nn.Conv2d(c, outputs, 1)

    def forward(self, levels_NCHW: list[Tensor]) -> Tensor:
        """Four levels, finest first -> logits at a quarter of the image's size."""
        return self.fuse(self.smoothed(levels_NCHW))

    def smoothed(self, levels_NCHW: list[Tensor]) -> list[Tensor]:
        """Four levels, finest first -> the same sizes with context from the coarser ones."""
        x = [conv(level) for conv, level in zip(self.lateral, levels_NCHW, strict=True)]
        for i in range(len(x) - 1, 0, -1):
            x[i - 1] = x[i - 1] + F.interpolate(x[i], size=x[i - 1].shape[-2:], mode="bilinear", align_corners=False)
        return [conv(level) for conv, level in zip(self.smooth, x, strict=True)]

    def fuse(self, x: list[Tensor]) -> Tensor:
        """Smoothed levels -> logits at a quarter of the image's size."""
        size = x[0].shape[-2:]
        fused = x[0]
        for level in x[1:]:
            fused = fused + F.interpolate(level, size=size, mode="bilinear", align_corners=False)
        return self.classifier(self.dropout(fused))


class SegmentationStudent(nn.Module):
    """TinyUSFM with the published segmentation head.

    6,179,073 parameters for a binary mask.
    """

    def __init__(self, config: StudentConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = Backbone(config)
        self.neck = Neck(config.width)
        self.head = FpnHead(config.width, config.outputs, lite=config.seg_head == "lite")

    def forward(self, image_NCHW: Tensor) -> Tensor:
        """Normalised image NCHW -> logits NKHW at the input's size."""
        return self.decode(self.backbone.taps(image_NCHW))

    def scattered(self, taps_BVD: list[Tensor], kept_BV: Tensor) -> list[Tensor]:
        """Tokens of some patches -> tokens of all, 0 for the patches that were left out.

        Args:
            taps_BVD: class token first, then the kept patches.
            kept_BV: which patches those are.
        """
        full = []
        for tap in taps_BVD:
            index = kept_BV[..., None].expand(-1, -1, tap.shape[-1])
            patches = tap.new_zeros(len(tap), self.backbone.num_patches, tap.shape[-1]).scatter(1, index, tap[:, 1:])
            full.append(torch.cat([tap[:, :1], patches], 1))
        return full

    def decode(self, taps_BND: list[Tensor]) -> Tensor:
        """Tokens after the tapped blocks -> logits NKHW at the input's size.

        Class token included.
        """
        return self.enlarge(self.head(self.levels(taps_BND)))

    def levels(self, taps_BND: list[Tensor]) -> list[Tensor]:
        """Tokens after the tapped blocks -> the head's four maps, finest first."""
        maps = [t[:, 1:].transpose(1, 2).unflatten(2, self.backbone.grid_hw) for t in taps_BND]
        found: list[Tensor] = self.neck(maps)
        return found

    def enlarge(self, logits_NKhw: Tensor) -> Tensor:
        """Logits at the input's size, bilinear."""
        return F.interpolate(logits_NKhw, size=self.config.input_hw, mode="bilinear", align_corners=False)


class ExitHead(nn.Module):
    """An early answer: mean of the patch tokens, LayerNorm, linear.

    Our choice (methods.md 7).
    """

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, outputs)
        _init_linear(self.head)

    def forward(self, tokens_BND: Tensor) -> Tensor:
        """Tokens after a block, class token included -> logits NK."""
        return self.head(self.norm(tokens_BND[:, 1:].mean(1)))


class ClassificationStudent(nn.Module):
    """TinyUSFM with mean pooling, ``fc_norm`` and a linear head.

    The mean is over the patch tokens; early exits if asked for.

    ``exits`` holds a head per block by its number; ``forward`` does not look at them (models/early_exit.py does).
    """

    def __init__(self, config: StudentConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = Backbone(config)
        self.backbone.norm = nn.Identity()  # type: ignore[assignment]
        self.fc_norm = nn.LayerNorm(config.width, eps=1e-6)
        self.head = nn.Linear(config.width, config.num_classes)
        _init_linear(self.head)
        self.exits = nn.ModuleDict({str(block): ExitHead(config.width, config.num_classes) for block in config.exits})

    def forward(self, image_NCHW: Tensor) -> Tensor:
        """Normalised image NCHW -> logits NK."""
        return self.classify(self.backbone(image_NCHW))

    def classify(self, tokens_BND: Tensor) -> Tensor:
        """Tokens after the last block, class token included -> logits NK."""
        return self.head(self.fc_norm(tokens_BND[:, 1:].mean(1)))


class FeatureStudent(nn.Module):
    """TinyUSFM as a dense feature extractor: final norm, no head."""

    def __init__(self, config: StudentConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = Backbone(config)

    def forward(self, image_NCHW: Tensor) -> Tensor:
        """Normalised image NCHW -> patch features NDhw on the 1/16 grid."""
        tokens = self.backbone.norm(self.backbone(image_NCHW))
        return tokens[:, 1:].transpose(1, 2).unflatten(2, self.backbone.grid_hw)


Student = SegmentationStudent | ClassificationStudent | FeatureStudent


def build_student(config: StudentConfig) -> Student:
    """Builds the network of a config, randomly initialised."""
    kinds: dict[str, Callable[[StudentConfig], Student]] = {
        "segment": SegmentationStudent,
        "classify": ClassificationStudent,
        "features": FeatureStudent,
    }
    return kinds[config.task](config)


def _init_linear(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


__all__ = [
    "TAPS",
    "Attention",
    "Backbone",
    "Block",
    "ClassificationStudent",
    "ExitHead",
    "FeatureStudent",
    "FpnHead",
    "Mlp",
    "Neck",
    "PatchEmbed",
    "SegmentationStudent",
    "Student",
    "StudentConfig",
    "build_student",
]
