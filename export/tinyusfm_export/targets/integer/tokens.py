"""The transformer in integers, from the export graph by its labels.

Patch embedding, blocks and what reads the tokens.

Works on whole graphs and on the stages of a chain: what a graph has is known by its labels. It does not know the
decoder.

Shapes: N tokens with the class token first, D width, S heads.
"""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import numpy as np

from tinyusfm_export.graph.build import PATCH
from tinyusfm_export.onnx_files.writer import as_array
from tinyusfm_export.targets.integer.context import Context
from tinyusfm_export.targets.integer.scales import (
    CODE_BITS,
    Step,
    coarser_step,
    dropped_bits,
    fraction_bits,
    gelu_table,
    layer_units,
    plain_factors,
    scaled_layer,
    softmax_factors,
    split_factor,
    word_bits,
)
from tinyusfm_runtime.early_exit import TOKENS_IN
from tinyusfm_runtime.engines.integer.layout import ADD, CODES, F32, I16, I32, U8, WORDS
from tinyusfm_runtime.errors import UnsupportedError

_BLOCK = re.compile(r"blocks\.(\d+)\.norm1")


def block_indices(labels: dict[str, Any]) -> list[int]:
    """Blocks that a graph holds, in order."""
    return sorted(int(found[1]) for label in labels if (found := _BLOCK.fullmatch(label)))


def write_input(c: Context) -> None:
    """The input, as far as the tokens before the first block."""
    takes = c.graph.input
    if TOKENS_IN in c.labels:
        _, tokens, width = takes.shape
        c.writer.port(takes.name, F32, takes.shape)
        source = c.writer.buffer("input", F32, tokens, width)
        c.residual = c.writer.buffer("residual", I16, tokens, width)
        c.writer.add("tokens", source, c.residual, label=TOKENS_IN, bits=c.residual_bits)
        return
    _, channels, height, width = takes.shape
    if channels != 1:
        raise UnsupportedError("the integer target takes grey models only")
    c.writer.port(takes.name, U8, takes.shape)
    source = c.writer.buffer("input", U8, height, width)
    patches = height // PATCH * (width // PATCH)
    codes = c.writer.buffer("patches", U8, patches, PATCH * PATCH)
    c.writer.add("patches", source, codes, label="patches", size=PATCH)
    if "patches.kept" in c.labels:
        codes = write_gather(c, "patches.kept", codes, c.writer.buffer("patches.kept", U8, *_kept_shape(c)))
        patches = c.writer.shape(codes)[0]
    _embed(c, codes, patches)


def _kept_shape(c: Context) -> tuple[int, int]:
    _, rows, columns = c.size("patches.kept")
    return rows, columns


def write_gather(c: Context, label: str, source: int, target: int, blank: np.ndarray | None = None) -> int:
    """Rows as a node of the graph takes them by their numbers.

    Args:
        c: the graph under way.
        label: of the node.
        source: buffer.
        target: buffer.
        blank: what a row is that is not in the source; None where all are.

    Returns:
        The target.
    """
    rows = c.writer.shape(source)[0]
    index = np.array(c.labels[label].args[1], "<i4")
    tensors = {"index": np.where(index < rows, index, -1).astype("<i4")}
    if blank is not None:
        tensors["blank"] = blank.astype("<i4")
    c.writer.add("gather", source, target, label=label, tensors=tensors, blank=int(blank is not None))
    return target


def _embed(c: Context, codes: int, patches: int) -> None:
    layer = c.module.get_submodule("patch_embed")
    first, offsets = (as_array(getattr(c.module, name)) for name in ("cls_token", "patch_embed_offsets"))
    table_ND = np.concatenate([first[0], offsets[0]]) * 2.0**c.residual_bits
    table_ND = np.clip(np.rint(table_ND), -(2**15), 2**15 - 1).astype("<i2")
    c.residual = c.writer.buffer("residual", I16, *table_ND.shape)
    label = "patch_embed"
    c.writer.add("fill", c.residual, c.residual, label="tokens", tensors={"table": table_ND})
    add_to_residual(c, label, codes, as_array(layer.weight), np.zeros(len(table_ND[0])), Step(scale=1.0), first=1)
    assert c.writer.shape(c.residual)[0] == patches + 1


def write_block(c: Context, index: int) -> None:
    """One block."""
    hidden, step = _write_half_block(c, index)
    add_layer(c, f"blocks.{index}.mlp.fc2", hidden, step)


def write_pooled_block(c: Context, index: int) -> int:
    """A classifier's last block; returns the mean token.

    The mean over tokens comes before the second linear.
    """
    path, unit = f"blocks.{index}", Step(scale=2.0**-c.residual_bits, wide=True)
    hidden, step = _write_half_block(c, index)
    pooled = write_mean(c, f"{path}.mean", c.residual, unit, unit.scale, row=c.first_row)
    # 13 bits, so that the sums over a row of fc2 fit; no finer than a sum of codes is
    gives = max(max(map(abs, c.span(f"{path}.mlp.mean"))) * 1.1 / 2.0**13, step.scale / c.rows * 1.01)
    mean = write_mean(c, f"{path}.mlp.mean", hidden, step, gives, row=0)
    layer, takes = c.module.get_submodule(f"{path}.mlp.fc2"), Step(scale=gives, wide=True)
    weight, bias = as_array(layer.weight), as_array(layer.bias)
    add_to_residual(c, f"{path}.mlp.fc2", mean, weight, bias, takes, first=0, target=pooled)
    return pooled


def _write_half_block(c: Context, index: int) -> tuple[int, Step]:
    """Attention and the hidden layer.

    Behind the last block's attention the class token is left out.
    """
    path = f"blocks.{index}"
    scales_3S = _head_scales(c, path)
    packed, takes = _normed(c, f"{path}.norm1", f"{path}.attn.qkv", _by_channel(c, scales_3S))
    scales_3S = _write_qkv(c, path, packed, takes, scales_3S)
    if f"{path}.attn.query_patches" in c.labels:
        c.first_row = 1
    context, step = _attend(c, path, scales_3S)
    add_layer(c, f"{path}.attn.proj", context, step)
    return write_hidden(c, index)


def write_hidden(c: Context, index: int) -> tuple[int, Step]:
    """GELU(fc1(norm2(x))): a buffer of codes and their step.

    Notes the peak where one is wanted.
    """
    path = f"blocks.{index}"
    label = f"{path}.mlp.fc1"
    low, high = c.span(label)
    low = max(low, -4.0)  # GELU is -0.0001 there
    scale = (max(high, 0.1) - low) / 255.0
    before = Step(scale=scale, zero=round(-low / scale))
    normed, takes = _normed(c, f"{path}.norm2", label, np.array([scale]))
    layer = c.module.get_submodule(label)
    step = c.hidden_step(f"{path}.mlp.fc2.input", high)
    hidden = c.writer.buffer("hidden", U8, c.rows, len(layer.weight))
    weight, bias = as_array(layer.weight) * c.norm_scale(f"{path}.norm2", takes), as_array(layer.bias)
    unit = float(layer_units(weight, bias, takes, limit=c.limit).max())
    before = before.at_least(coarser_step(label, before.scale, unit))
    tensors, bits = scaled_layer(weight, bias, takes, np.array(before.scale), most=CODE_BITS, limit=c.limit)
    c.writer.add(
        "linear",
        normed,
        hidden,
        label=label,
        tensors={**tensors, "table": gelu_table(before, step)},
        scales={"takes": takes.scale, "gives": step.scale},
        row=0,
        target_row=0,
        rows=c.rows,
        mode=CODES,
        bits=bits,
        zero=before.zero,
        table=1,
    )
    c.note_peak(index, hidden, step)
    return hidden, step


def _normed(c: Context, norm: str, reader: str, step_O: np.ndarray) -> tuple[int, Step]:
    """A LayerNorm in front of a linear: the buffer that it writes and its step.

    16 bits where the decision says so, and where with 8 the linear's sums would be coarser than the steps that its
    outputs ask for: ``step_O``, or one for all.
    """
    wide = c.is_wide(reader)
    step = Step(scale=2.0**-c.norm_bits, wide=True)
    if not wide:
        layer, largest = c.module.get_submodule(reader), float(_norm_weight(c, norm).max())
        codes = c.input_step(f"{reader}.input").at_least(largest * 2.0**-c.norm_bits)
        unit_O = layer_units(as_array(layer.weight), as_array(layer.bias), codes, limit=c.limit)
        wide = bool((unit_O > step_O).any())
        step = step if wide else codes
    kind, words = (I16, WORDS) if wide else (U8, CODES)
    target = c.writer.buffer("normed", kind, c.all_rows if norm.endswith("norm1") else c.rows, c.width)
    row = 0 if norm.endswith("norm1") else c.first_row
    write_norm(c, norm, c.residual, target, step, row=row, mode=words)
    return target, step


def _norm_weight(c: Context, label: str) -> np.ndarray:
    layer = c.module.get_submodule(label)
    return np.ones(c.width) if layer.weight is None else as_array(layer.weight).astype(np.float64)


def write_norm(c: Context, label: str, source: int, target: int, step: Step, *, row: int, mode: int) -> None:
    """A LayerNorm.

    Its scale, where equalisation gave it one, goes into the multipliers or is left to the reader.
    """
    layer = c.module.get_submodule(label)
    if layer.bias is not None and as_array(layer.bias).any():
        raise UnsupportedError(f"LayerNorm {label!r} has a shift of its own: fold it into what reads it")
    width = c.width
    root = round(np.sqrt(width) * 2.0 ** (15 + c.norm_bits))
    epsilon = max(1, round(layer.eps * float(width) ** 3 * 4.0**c.residual_bits))
    tensors, bits = {"constants": np.array([epsilon, root], "<i8")}, 0
    if mode == CODES:
        tensors["factor"], bits = plain_factors(_norm_weight(c, label) / step.scale, c.norm_bits)
    c.writer.add(
        "norm",
        source,
        target,
        label=label,
        tensors=tensors,
        scales={"gives": step.scale},
        row=row,
        rows=c.writer.shape(target)[0],
        mode=mode,
        bits=bits,
        zero=step.zero,
    )


def _head_scales(c: Context, path: str) -> np.ndarray:
    """The scales that queries, keys and values of every head ask for: (3, S)."""
    scales_3S = np.array(
        [[max(map(abs, c.span(f"{path}.attn.{part}.{s}"))) / 127.0 for s in range(c.heads)] for part in "qkv"]
    )
    return np.maximum(scales_3S, 1e-6)


def _by_channel(c: Context, scales_3S: np.ndarray) -> np.ndarray:
    return np.repeat(scales_3S.reshape(-1), c.width // c.heads)


def _write_qkv(c: Context, path: str, normed: int, takes: Step, scales_3S: np.ndarray) -> np.ndarray:
    """Queries, keys and values with a scale per head; returns the scales, (3, S).

    Those that were asked for, coarser where a head's sums are.
    """
    label = f"{path}.attn.qkv"
    layer = c.module.get_submodule(label)
    weight, bias = as_array(layer.weight) * c.norm_scale(f"{path}.norm1", takes), as_array(layer.bias)
    units_3S = layer_units(weight, bias, takes, limit=c.limit).reshape(3, c.heads, -1).max(2)
    scales_3S = np.vectorize(partial(coarser_step, label))(scales_3S, units_3S)
    step_O = _by_channel(c, scales_3S)
    tensors, bits = scaled_layer(weight, bias, takes, step_O, most=CODE_BITS, limit=c.limit)
    target = c.writer.buffer("qkv", U8, c.all_rows, 3 * c.width)
    c.writer.add(
        "linear",
        normed,
        target,
        label=label,
        tensors=tensors,
        scales={"takes": takes.scale},
        row=0,
        target_row=0,
        rows=c.all_rows,
        mode=CODES,
        bits=bits,
        zero=128,
        table=0,
    )
    return scales_3S


def _attend(c: Context, path: str, scales_3S: np.ndarray) -> tuple[int, Step]:
    """Attention: a buffer of codes and their step."""
    tensors = softmax_factors(scales_3S[0] * scales_3S[1])
    # a mix of values has seven fraction bits, of which it keeps as many as the last shift drops
    step = c.input_step(f"{path}.attn.proj.input").at_least(float(scales_3S[2].max()) / 2.0**7)
    tensors["out"], bits = plain_factors(scales_3S[2] / step.scale, 7)
    target = c.writer.buffer("context", U8, c.rows, c.width)
    c.writer.add(
        "attention",
        c.writer.buffer("qkv", U8, c.all_rows, 3 * c.width),
        target,
        label=f"{path}.attn",
        tensors=tensors,
        scales={"gives": step.scale},
        heads=c.heads,
        row=c.first_row,
        bits=bits,
        zero=step.zero,
        drop=dropped_bits(c.all_rows),
    )
    return target, step


def add_layer(c: Context, label: str, source: int, takes: Step) -> None:
    """A linear whose outputs are added to the residual."""
    layer = c.module.get_submodule(label)
    add_to_residual(c, label, source, as_array(layer.weight), as_array(layer.bias), takes, first=c.first_row)


def add_to_residual(
    c: Context,
    label: str,
    source: int,
    weight: np.ndarray,
    bias: np.ndarray,
    takes: Step,
    *,
    first: int,
    target: int | None = None,
) -> None:
    """Writes the linear of ``add_layer``.

    With steps of its own in a draft, where the residual's are finer than its sums (see ``write_model``).
    """
    c.units[label] = float(layer_units(weight, bias, takes, limit=c.limit).max())
    unit = max(2.0**-c.residual_bits, c.units[label])
    reach = max(map(abs, c.span(label))) * 1.5 / unit
    most = max(0, min(CODE_BITS, int(np.floor(np.log2(16384.0 / max(reach, 1.0))))))
    tensors, bits = scaled_layer(weight, bias, takes, np.array(unit), most=most, limit=c.limit)
    c.writer.add(
        "linear",
        source,
        c.residual if target is None else target,
        label=label,
        tensors=tensors,
        scales={"takes": takes.scale, "gives": unit},
        row=0,
        target_row=first,
        rows=c.writer.shape(source)[0],
        mode=ADD,
        bits=bits,
        zero=0,
        table=0,
    )


def write_mean(c: Context, label: str, source: int, takes: Step, gives: float, *, row: int) -> int:
    """Mean of a buffer's rows from ``row`` on, as 16-bit words; returns the buffer."""
    rows, columns = c.writer.shape(source)
    rows -= row
    bits = 0
    shift, factor = split_factor(takes.scale / rows / gives, bits)
    target = c.writer.buffer(label, I16, 1, columns)
    c.writer.add(
        "mean",
        source,
        target,
        label=label,
        scales={"gives": gives},
        row=row,
        rows=rows,
        bias=(1 << shift >> 1) - takes.zero * rows,
        shift=shift,
        factor=factor,
        bits=bits,
    )
    return target


def write_head(c: Context, *, norm: str, linear: str, source: int) -> tuple[int, float]:
    """LayerNorm and linear on one token: a buffer of words and their step.

    The step is a power of two.
    """
    normed = c.writer.buffer(f"{norm}.words", I16, 1, c.width)
    takes = Step(scale=2.0**-c.norm_bits, wide=True)
    write_norm(c, norm, source, normed, takes, row=0, mode=WORDS)
    layer = c.module.get_submodule(linear)
    largest = max(map(abs, c.span(linear)))
    weight, bias = as_array(layer.weight) * c.norm_scale(norm, takes), as_array(layer.bias)
    unit = float(layer_units(weight, bias, takes, limit=c.limit).max())
    bits_out = word_bits(linear, min(12, fraction_bits(largest, margin=2.0)), unit, largest=largest)
    tensors, bits = scaled_layer(weight, bias, takes, np.array(2.0**-bits_out), most=0, limit=c.limit)
    target = c.writer.buffer(linear, I16, 1, len(weight))
    c.writer.add(
        "linear",
        normed,
        target,
        label=linear,
        tensors=tensors,
        scales={"gives": 2.0**-bits_out},
        row=0,
        target_row=0,
        rows=1,
        mode=WORDS,
        bits=bits,
        zero=0,
        table=0,
    )
    return target, 2.0**-bits_out


def write_features(c: Context) -> None:
    """The final LayerNorm with its scale and shift on the patch tokens, as a map."""
    layer, rows = c.module.get_submodule("norm"), c.rows
    words = c.writer.buffer("features.words", I16, rows, c.width)
    root = round(np.sqrt(c.width) * 2.0 ** (15 + c.norm_bits))
    epsilon = max(1, round(layer.eps * float(c.width) ** 3 * 4.0**c.residual_bits))
    constants = np.array([epsilon, root], "<i8")
    c.writer.add(
        "norm",
        c.residual,
        words,
        label="norm",
        tensors={"constants": constants},
        row=c.first_row,
        rows=rows,
        mode=WORDS,
        bits=0,
        zero=0,
    )
    scale_D, shift_D = as_array(layer.weight).astype(np.float64), as_array(layer.bias).astype(np.float64)
    more = fraction_bits(max(float(np.abs(scale_D).max()), float(np.abs(shift_D).max()) / 32.0), reach=2.0**14)
    more = min(more, 12)
    tensors = {"factor": np.rint(scale_D * 2.0**more).astype("<i4")}
    tensors["bias"] = np.rint(shift_D * 2.0 ** (more + c.norm_bits)).astype("<i4")
    found = c.writer.buffer("features", I32, rows, c.width)
    c.writer.add("affine", words, found, label="norm", tensors=tensors)
    if "norm.scattered" in c.labels:
        everywhere = c.writer.buffer("features.scattered", I32, c.size("norm.scattered")[1], c.width)
        found = write_gather(c, "norm.scattered", found, everywhere, np.zeros(c.width))
    c.answers["logits"] = (found, 2.0 ** -(more + c.norm_bits), True)


__all__ = [
    "add_layer",
    "add_to_residual",
    "block_indices",
    "write_block",
    "write_features",
    "write_gather",
    "write_head",
    "write_hidden",
    "write_input",
    "write_mean",
    "write_norm",
    "write_pooled_block",
]
