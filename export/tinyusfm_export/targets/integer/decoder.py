"""The segmentation decoder in integers.

Laterals, pyramid, 3 x 3 per level, classifiers, enlargement.

Laterals and levels are 16 bits with one step, so that sums need no rescaling; bilinear steps are exact fixed point.

Shapes: HWC maps, one row per position.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tinyusfm_export.onnx_files.writer import as_array
from tinyusfm_export.targets.integer.context import Context
from tinyusfm_export.targets.integer.scales import (
    CODE_BITS,
    Step,
    coarser_step,
    fraction_bits,
    half_pixel_axis,
    layer_units,
    of_zeros,
    plain_factors,
    scaled_layer,
    spread,
    word_bits,
)
from tinyusfm_export.targets.integer.tokens import write_gather
from tinyusfm_runtime.engines.integer.layout import ADDED, CODES, EXACT, I16, I32, RELU, U8, WORDS


def write_laterals(c: Context, index: int) -> None:
    """The laterals that read the patch tokens behind a block."""
    for level in range(_levels(c)):
        label = f"head.lateral.{level}"
        if c.source_label(label) not in (f"blocks.{index}.patches", f"blocks.{index}.out"):
            continue
        layer, map_bits = c.module.get_submodule(label), _map_bits(c)
        takes = Step(scale=2.0**-c.residual_bits, wide=True)
        tensors, bits = scaled_layer(
            as_array(layer.weight), as_array(layer.bias), takes, np.array(2.0**-map_bits), most=0, limit=c.limit
        )
        rows, scattered = c.size(label)[1], f"{label}.scattered" in c.labels
        role = f"lateral.{level}.kept" if scattered else f"lateral.{level}"
        target = c.writer.buffer(role, I16, rows, len(layer.weight))
        c.writer.add(
            "linear",
            c.residual,
            target,
            label=label,
            tensors=tensors,
            scales={"takes": takes.scale, "gives": 2.0**-map_bits},
            row=c.all_rows - rows,
            target_row=0,
            rows=rows,
            mode=WORDS,
            bits=bits,
            zero=0,
            table=0,
        )
        if scattered:
            everywhere = c.writer.buffer(f"lateral.{level}", I16, c.size(f"{label}.scattered")[1], len(layer.weight))
            write_gather(c, f"{label}.scattered", target, everywhere, of_zeros(tensors, bits))


def write_decoder(c: Context) -> None:
    """Everything behind the laterals."""
    levels = [_level(c, level) for level in range(_levels(c))]
    for level in range(len(levels) - 1, 0, -1):
        upper, lower = levels[level], levels[level - 1]
        _resize(c, f"head.sum.{level - 1}", upper, lower, flags=ADDED)
    steps = [_level_steps(c, level) for level in range(_levels(c))]
    logit_bits = _logit_bits(c, steps)
    total = None
    for level, each in enumerate(levels):
        found = _classified(c, level, each, steps[level], logit_bits)
        if total is None:
            total = found
        else:
            _resize(c, f"head.up.{level}", found, total, flags=ADDED)
    assert total is not None
    _, classes, height, width = c.size("logits")
    target = c.writer.buffer("logits", I32, height * width, classes)
    bits = _resize(c, "logits", total, (target, height, width), flags=EXACT)
    c.answers["logits"] = (target, 2.0 ** -(logit_bits + 2 * bits), classes > 1)


def _levels(c: Context) -> int:
    return sum(f"head.lateral.{level}" in c.labels for level in range(16))


def _map_bits(c: Context) -> int:
    """Fraction bits of laterals and levels.

    As many as their range allows and every lateral's sums can fill.
    """
    names = [f"head.lateral.{level}" for level in range(_levels(c))]
    bits = fraction_bits(max(max(map(abs, c.span(name))) for name in [*names, *_sums(c)]))
    takes = Step(scale=2.0**-c.residual_bits, wide=True)
    units = {name: _largest_unit(c, name, takes) for name in names}
    label = max(units, key=units.__getitem__)
    return word_bits(label, bits, units[label])


def _sums(c: Context) -> list[str]:
    return [f"head.sum.{level}" for level in range(_levels(c) - 1)]


def _largest_unit(c: Context, label: str, takes: Step) -> float:
    layer = c.module.get_submodule(label)
    return float(layer_units(as_array(layer.weight), as_array(layer.bias), takes, limit=c.limit).max())


@dataclass(frozen=True, kw_only=True, slots=True)
class LevelSteps:
    """The steps of a level's maps.

    Attributes:
        takes: in front of its first convolution.
        middle: between a depthwise convolution and the pointwise one behind it; None where there is one convolution.
        gives: in front of its classifier.
    """

    takes: Step
    middle: Step | None
    gives: Step


def _level_steps(c: Context, level: int) -> LevelSteps:
    """The steps that the ranges ask for.

    Coarser where they are finer than the sums or words that fill them.
    """
    path = f"head.smooth.{level}"
    depthwise = f"{path}.depthwise" in c.labels
    takes = _level_step(c, level) if depthwise else _unsigned(c.input_step(f"{path}.input"))
    takes = takes.at_least(2.0 ** -_map_bits(c))
    gives = _unsigned(c.input_step(f"head.classifier.{level}.input"))
    if not depthwise:
        return LevelSteps(takes=takes, middle=None, gives=_filled(c, path, takes, gives))
    middle = _filled(c, f"{path}.depthwise", takes, c.input_step(f"{path}.pointwise.input"))
    return LevelSteps(takes=takes, middle=middle, gives=_filled(c, f"{path}.pointwise", middle, gives))


def _filled(c: Context, label: str, takes: Step, gives: Step) -> Step:
    return gives.at_least(coarser_step(label, gives.scale, _largest_unit(c, label, takes)))


def _logit_bits(c: Context, steps: list[LevelSteps]) -> int:
    """Fraction bits of the classifiers' sums.

    At most 10, and no finer than the sums are.
    """
    names = [f"head.classifier.{level}" for level in range(_levels(c))]
    totals = [f"head.total.{level}" for level in range(1, _levels(c))]
    largest = max(max(map(abs, c.span(name))) for name in names + totals)
    units = {name: _largest_unit(c, name, each.gives) for name, each in zip(names, steps, strict=True)}
    label = max(units, key=units.__getitem__)
    return word_bits(label, min(10, fraction_bits(largest, margin=2.0)), units[label], largest=largest)


Map = tuple[int, int, int]
"""Buffer, rows and columns of a map."""


def _level(c: Context, level: int) -> Map:
    """A lateral at its level's size, without its negative values."""
    label = f"head.lateral.{level}.map"
    _, channels, rows, columns = c.size(label)
    _, _, height, width = c.size(f"head.lateral.{level}.relu")
    source = c.writer.buffer(f"lateral.{level}", I16, rows * columns, channels)
    target = c.writer.buffer(f"level.{level}", I16, height * width, channels)
    if f"head.scale.{level}" in c.labels and c.labels[f"head.scale.{level}"].op == "call_module":
        c.writer.add("halve", source, target, label=f"head.scale.{level}", height=rows, width=columns, flags=RELU)
    else:
        _resize(c, f"head.scale.{level}", (source, rows, columns), (target, height, width), flags=RELU)
    return target, height, width


def _resize(c: Context, label: str, source: Map, target: Map, *, flags: int) -> int:
    """A bilinear resize; returns the fraction bits of a share."""
    rows, columns = (half_pixel_axis(a, b) for a, b in zip(source[1:], target[1:], strict=True))
    bits = max(rows[2], columns[2])
    tensors = {}
    for axis, found in (("rows", rows), ("columns", columns)):
        tensors[f"{axis}_first"], tensors[f"{axis}_share"] = spread(bits, found)
    c.writer.add(
        "resize",
        source[0],
        target[0],
        label=label,
        tensors=tensors,
        from_height=source[1],
        from_width=source[2],
        height=target[1],
        width=target[2],
        share_bits=bits,
        flags=flags,
    )
    return bits


def _classified(c: Context, level: int, source: Map, steps: LevelSteps, logit_bits: int) -> Map:
    """The convolution of a level and its classifier: 16-bit sums.

    The convolution is 3 x 3, or depthwise and pointwise.
    """
    path, (buffer, height, width) = f"head.smooth.{level}", source
    area, channels = c.writer.shape(buffer)
    codes = c.writer.buffer(f"level.{level}.codes", U8, area, channels)
    factors, bits = plain_factors(np.array([1.0 / steps.takes.scale]), _map_bits(c))
    c.writer.add("codes", buffer, codes, label=f"{path}.input", factor=int(factors[0]), bits=bits, zero=0)
    if steps.middle is not None:
        codes = _window(c, "depthwise", f"{path}.depthwise", codes, steps.takes, steps.middle, height, width)
        found = _pointwise(c, f"{path}.pointwise", codes, steps.middle, steps.gives)
    else:
        found = _window(c, "convolution", path, codes, steps.takes, steps.gives, height, width)
    return _classifier(c, level, found, steps.gives, logit_bits), height, width


def _level_step(c: Context, level: int) -> Step:
    """The step of a level whose reader has no range of its own."""
    label = f"head.sum.{level}" if f"head.sum.{level}" in c.labels else f"head.lateral.{level}"
    return Step(scale=max(c.span(label)[1], 1e-6) / 255.0)


def _unsigned(step: Step) -> Step:
    """The step of values that are never negative, with the code of zero at 0.

    A convolution's padding lies at that code.
    """
    return Step(scale=step.scale * (255 - step.zero) / 255.0) if step.zero else step


def _window(c: Context, kind: str, path: str, source: int, takes: Step, gives: Step, height: int, width: int) -> int:
    layer = c.module.get_submodule(path)
    weight = as_array(layer.weight)
    # OIHW to O, nine neighbours, channels
    weight = weight.transpose(0, 2, 3, 1).reshape(len(weight), 9, -1)
    tensors, bits = scaled_layer(
        weight, as_array(layer.bias), takes, np.array(gives.scale), most=CODE_BITS, limit=c.limit
    )
    if kind == "depthwise":
        tensors["weight"] = tensors["weight"].reshape(len(weight), 9)
    target = c.writer.buffer(path, U8, height * width, len(weight))
    c.writer.add(
        kind,
        source,
        target,
        label=path,
        tensors=tensors,
        scales={"takes": takes.scale, "gives": gives.scale},
        height=height,
        width=width,
        bits=bits,
        zero=gives.zero,
    )
    return target


def _pointwise(c: Context, path: str, source: int, takes: Step, gives: Step) -> int:
    layer = c.module.get_submodule(path)
    weight = as_array(layer.weight)[:, :, 0, 0]
    tensors, bits = scaled_layer(
        weight, as_array(layer.bias), takes, np.array(gives.scale), most=CODE_BITS, limit=c.limit
    )
    area = c.writer.shape(source)[0]
    target = c.writer.buffer(path, U8, area, len(weight))
    _linear(c, path, source, target, tensors, (takes, gives), mode=CODES, bits=bits)
    return target


def _classifier(c: Context, level: int, source: int, takes: Step, logit_bits: int) -> int:
    path = f"head.classifier.{level}"
    layer = c.module.get_submodule(path)
    weight = as_array(layer.weight)[:, :, 0, 0]
    gives = Step(scale=2.0**-logit_bits, wide=True)
    tensors, bits = scaled_layer(weight, as_array(layer.bias), takes, np.array(gives.scale), most=0, limit=c.limit)
    target = c.writer.buffer(path, I16, c.writer.shape(source)[0], len(weight))
    _linear(c, path, source, target, tensors, (takes, gives), mode=WORDS, bits=bits)
    return target


def _linear(
    c: Context,
    label: str,
    source: int,
    target: int,
    tensors: dict[str, np.ndarray],
    steps: tuple[Step, Step],
    *,
    mode: int,
    bits: int,
) -> None:
    c.writer.add(
        "linear",
        source,
        target,
        label=label,
        tensors=tensors,
        scales={"takes": steps[0].scale, "gives": steps[1].scale},
        row=0,
        target_row=0,
        rows=c.writer.shape(source)[0],
        mode=mode,
        bits=bits,
        zero=steps[1].zero if mode == CODES else 0,
        table=0,
    )


__all__ = [
    "LevelSteps",
    "Map",
    "write_decoder",
    "write_laterals",
]
