"""Teacher format USFM: a BEiT-style ViT-B/16.

Its only positions are one shared table of relative position biases.

``rel_pos_bias.relative_position_bias_table`` has (2 * 14 - 1)^2 + 3 = 732 rows, one column per head; q and v have
biases, k has none; LayerScale under BEiT's names (methods.md 2.2 and 2.4). Loaded into a plain ViT such a file
silently loses 27 tensors with all position information, so nothing may be missing here. Fine-tuned files (SimMIM's
code) hold a table in every block, and ``fc_norm`` in the place of ``norm``; both are read. Images of other sizes get an
interpolated table.

It does not know training. Shapes: N tokens, H heads, g patches per side.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinyusfm_edge.models.encoder import EncoderBlock, EncoderPatches, EncoderShape
from tinyusfm_edge.models.teachers.dinov2 import bare_tensors, fill
from tinyusfm_edge.models.weights_file import read_weights_file
from tinyusfm_runtime.errors import CheckpointError, InputError

VARIANTS = {"usfm_vitb16": EncoderShape(width=768, depth=12, heads=12, patch=16, grid=14, scale="beit", bias="qv")}
"""Name -> shape."""
_SPARE = ("mask_token", "head.", "decode_head.", "neck.", "fpn", "rel_pos_bias.relative_position_index")
_TABLE = "relative_position_bias_table"


def relative_index(grid: int) -> Tensor:
    """Which row of the table serves each pair of tokens (Bao et al. 2021, BEiT).

    Args:
        grid: patches per side.

    Returns:
        int64, (g*g+1) x (g*g+1). Rows of the table: displacements (dy, dx) from (-(g-1), -(g-1)) on, then class to
        patch, patch to class, class to class.
    """
    axis = torch.arange(grid)
    rows, cols = axis.repeat_interleave(grid), axis.repeat(grid)
    side = 2 * grid - 1
    dy = rows[:, None] - rows[None] + grid - 1
    dx = cols[:, None] - cols[None] + grid - 1
    index = torch.zeros(grid * grid + 1, grid * grid + 1, dtype=torch.int64)
    index[1:, 1:] = dy * side + dx
    index[0, :], index[:, 0], index[0, 0] = side * side, side * side + 1, side * side + 2
    return index


class RelativeBias(nn.Module):
    """The shared table."""

    def __init__(self, grid: int, heads: int) -> None:
        super().__init__()
        self.grid = grid
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * grid - 1) ** 2 + 3, heads))

    def forward(self, grid: int) -> Tensor:
        """Bias HNN for so many patches per side."""
        table: Tensor = self.relative_position_bias_table
        if grid != self.grid:
            side, wanted = 2 * self.grid - 1, 2 * grid - 1
            square = table[: side * side].transpose(0, 1).reshape(1, -1, side, side)
            square = F.interpolate(square, size=(wanted, wanted), mode="bicubic", align_corners=False)
            table = torch.cat([square[0].flatten(1).transpose(0, 1), table[side * side :]])
        return table[relative_index(grid).to(table.device)].permute(2, 0, 1)


class UsfmBeit(nn.Module):
    """The frozen USFM encoder: 85,665,360 parameters, as its file has them."""

    def __init__(self, shape: EncoderShape) -> None:
        super().__init__()
        self.width, self.depth, self.patch = shape.width, shape.depth, shape.patch
        self.patch_embed = EncoderPatches(shape)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, shape.width))
        self.rel_pos_bias = RelativeBias(shape.grid, shape.heads)
        self.own_biases: nn.ModuleList | None = None
        self.blocks = nn.ModuleList(EncoderBlock(shape) for _ in range(shape.depth))
        self.norm = nn.LayerNorm(shape.width, eps=shape.eps)

    def sequence(self, image_NCHW: Tensor, layers: tuple[int, ...]) -> list[Tensor]:
        """All tokens after the named blocks (from 1), class token first.

        Raises:
            InputError: the image is not a square of whole patches.
        """
        if image_NCHW.shape[-1] % self.patch or image_NCHW.shape[-2] != image_NCHW.shape[-1]:
            raise InputError(f"the teacher takes squares of whole {self.patch}-pixel patches")
        x = self.patch_embed(image_NCHW)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)
        grid = image_NCHW.shape[-1] // self.patch
        shared = None if self.own_biases is not None else self.rel_pos_bias(grid)
        found = []
        for number, block in enumerate(self.blocks, 1):
            x = block(x, shared if self.own_biases is None else self.own_biases[number - 1](grid))
            if number in layers:
                found.append(x)
            if number == max(layers):
                break
        return found

    @torch.no_grad()
    def tokens(self, image_NCHW: Tensor, layers: tuple[int, ...]) -> list[Tensor]:
        """Patch tokens NPD after the named blocks, counted from 1."""
        return [x[:, 1:] for x in self.sequence(image_NCHW, layers)]


def load(variant: str, weights: Path) -> UsfmBeit:
    """Loads the USFM encoder.

    Args:
        variant: a name in ``VARIANTS``.
        weights: flat BEiT-style state dict, alone or under ``model`` or ``state_dict``.

    Returns:
        The frozen encoder in float32.

    Raises:
        CheckpointError: unusable, or a tensor is missing (a shared position table above all), of another shape, or
            left over.
    """
    file = read_weights_file(weights)
    named = bare_tensors(file)
    for kind in ("weight", "bias"):
        pooled = named.pop(f"fc_norm.{kind}", None)
        if pooled is not None and f"norm.{kind}" not in named:
            named[f"norm.{kind}"] = pooled
    net = UsfmBeit(VARIANTS[variant])
    _split_tables(net, named, VARIANTS[variant])
    kept = {k: v for k, v in named.items() if not k.startswith(_SPARE) and not k.endswith("relative_position_index")}
    fill(net, kept, f"{weights} as {variant}")
    return net


def _split_tables(net: UsfmBeit, named: dict[str, Tensor], shape: EncoderShape) -> None:
    """One shared table where tables of single blocks are equal, else one each.

    Names are changed in place.

    Raises:
        CheckpointError: some blocks have one and others not.
    """
    own = [named.pop(f"blocks.{i}.attn.{_TABLE}", None) for i in range(shape.depth)]
    tables = [table for table in own if table is not None]
    if not tables:
        return
    if len(tables) != shape.depth:
        raise CheckpointError(
            f"{len(tables)} of {shape.depth} blocks have a position table of their own: save all or one"
        )
    if all(torch.equal(table, tables[0]) for table in tables):
        named[f"rel_pos_bias.{_TABLE}"] = tables[0]
        return
    net.own_biases = nn.ModuleList(RelativeBias(shape.grid, shape.heads) for _ in tables)
    del net.rel_pos_bias
    named.pop(f"rel_pos_bias.{_TABLE}", None)
    named |= {f"own_biases.{i}.{_TABLE}": table for i, table in enumerate(tables)}


__all__ = ["VARIANTS", "RelativeBias", "UsfmBeit", "load", "relative_index"]
