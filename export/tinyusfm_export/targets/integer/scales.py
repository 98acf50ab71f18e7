"""Real numbers to the integer engine's parameters.

Multipliers, shifts, biases and tables.

Every function here works in float64 and rounds once. What comes out is checked against overflow when it is written, by
the same proofs that the engine makes when it reads the file. It does not know the graph.

Shapes: O outputs, I inputs of a layer; S heads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from tinyusfm_export.quantize.ptq import quantize_weight
from tinyusfm_runtime.engines.integer.arithmetic import EXPONENT_BITS, requantise, to_words
from tinyusfm_runtime.errors import UnsupportedError

CODE_BITS = 6
"""Bits of the last shift in front of 8-bit codes: fine enough, and saturation at 16 bits lies beyond all codes."""
CODE_BITS_LEFT = 6
"""Of 8 bits, where a layer's sums are coarser than the step that its range asks for."""
WORD_BITS_LEFT = 12
"""Of 16 bits, in the same case: a residual of 12 bits holds the gate, one of 8 misses it."""
LOG2_E = 1.0 / math.log(2.0)
"""Natural logarithm to binary."""
_LIMIT = 2**31 - 2**17
"""Of an accumulator, with room for the rounding terms."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """How integers stand for numbers: value = scale (integer - zero).

    Attributes:
        scale: of one step.
        zero: integer of the value 0.
        wide: 16 bits signed instead of uint8 codes.
    """

    scale: float
    zero: int = 0
    wide: bool = False

    @property
    def largest(self) -> int:
        """Widest magnitude that a product has to bear."""
        return 2**15 if self.wide else 255

    def at_least(self, scale: float) -> Step:
        """This step, or a coarser one with the same zero."""
        return self if self.scale >= scale else replace(self, scale=scale)


def fraction_bits(largest: float, *, reach: float = 32767.0, margin: float = 1.1) -> int:
    """Most fraction bits with which values up to a magnitude fit, 0 .. 30.

    Args:
        largest: magnitude seen in calibration.
        reach: integers up to this one.
        margin: how much further later frames may go.

    Raises:
        UnsupportedError: the values do not fit 16 bits even in whole numbers.
    """
    if not largest * margin <= reach:
        raise UnsupportedError(
            f"values reach {largest:.3g}, and words of 16 bits hold {reach / margin:.0f} at most: train with weight "
            "decay, or export for another target, such as openvino or onnx"
        )
    return max(0, min(30, math.floor(math.log2(reach / max(largest * margin, 1e-6)))))


def split_factor(ratio: float, bits: int) -> tuple[int, int]:
    """A ratio as shift and 15-bit multiplier.

    ratio = multiplier 2^-15 2^-shift 2^-bits

    Args:
        ratio: positive.
        bits: of the last shift.

    Raises:
        UnsupportedError: the ratio is so large that the shift would go left; ``coarser_step`` and ``word_bits`` choose
            steps with which it does not.
    """
    mantissa, exponent = math.frexp(ratio)
    shift, factor = -exponent - bits, round(mantissa * 2**15)
    if shift == -1 and factor == 2**14:  # the ratio is 2^-bits, for which the largest multiplier is near enough
        return 0, 2**15 - 1
    if shift < 0:
        raise UnsupportedError(f"a ratio of {ratio:.3g} would need a shift to the left, which no engine has")
    if shift > 31:
        shift, factor = 31, round(ratio * 2.0 ** (15 + 31 + bits))
    return shift, min(factor, 2**15 - 1)


def last_shift(ratios: np.ndarray, most: int) -> int:
    """Bits of the last shift: at most ``most``.

    So few that no first shift goes left.
    """
    return max(0, min(most, min(-math.frexp(float(ratio))[1] for ratio in ratios)))


def layer_units(weight_OI: np.ndarray, bias_O: np.ndarray, takes: Step, *, limit: int) -> np.ndarray:
    """What one unit of every output's sums is worth: float64 (O,).

    No step behind them can be finer. An output without weights has 0, since it fits any step.

    Args:
        weight_OI: float, output channels first, any further axes.
        bias_O: float.
        takes: its input.
        limit: largest weight code.
    """
    codes, scales = quantize_weight(np.asarray(weight_OI, np.float32), limit=limit)
    full_O = codes.reshape(len(codes), -1).any(1)
    unit_O = np.zeros(len(codes))
    wanted = np.asarray(weight_OI, np.float64)[full_O], np.asarray(bias_O, np.float64)[full_O]
    _, unit_O[full_O] = _make_room(codes[full_O], *wanted, takes, takes.scale * scales[full_O].astype(np.float64))
    return unit_O


def coarser_step(label: str, step: float, unit: float) -> float:
    """The step of 8-bit codes: no finer than the sums that fill it.

    Args:
        label: of the layer.
        step: that its range asks for.
        unit: largest of its sums' units.

    Raises:
        UnsupportedError: fewer than CODE_BITS_LEFT of the 8 bits would be left.
    """
    if unit > step * 2.0 ** (8 - CODE_BITS_LEFT):
        raise _too_coarse(label, unit / step, f"fewer than {CODE_BITS_LEFT} of 8 bits would be left")
    return max(step, unit)


def word_bits(label: str, bits: int, unit: float, *, largest: float | None = None) -> int:
    """Fraction bits of 16-bit words: no finer than the sums that fill them.

    Args:
        label: of the layer.
        bits: that the values' range allows.
        unit: largest of the sums' units.
        largest: magnitude of an answer's values, which have to be 128 steps or more; None for words within the
            network, which keep WORD_BITS_LEFT of 16 bits.

    Raises:
        UnsupportedError: fewer would be left.
    """
    if unit <= 2.0**-bits:
        return bits
    found = -math.ceil(math.log2(unit))
    if largest is None:
        few, what = bits - found > 16 - WORD_BITS_LEFT, f"fewer than {WORD_BITS_LEFT} of 16 bits would be left"
    else:
        few, what = largest * 2.0**found < 128.0, "the answer would have fewer than 8 bits"
    if few or found < 0:
        raise _too_coarse(label, unit * 2.0**bits, what)
    return found


def _too_coarse(label: str, times: float, what: str) -> UnsupportedError:
    return UnsupportedError(
        f"layer {label!r} is too coarse for integers: one unit of its sums is {times:.3g} steps of its result, and "
        f"with steps of that size {what}. Its largest weights or its input's range are too large beside what it gives: "
        "calibrate on frames without outliers, let qat learn weights and ranges, or export for another target, "
        "such as openvino or onnx"
    )


def scaled_layer(
    weight_OI: np.ndarray, bias_O: np.ndarray, takes: Step, step_O: np.ndarray, *, most: int, limit: int
) -> tuple[dict[str, np.ndarray], int]:
    """Parameters of a linear or a convolution.

    Args:
        weight_OI: float, output channels first, any further axes.
        bias_O: float.
        takes: its input.
        step_O: what one step of every output is worth.
        most: bits of the last shift at most.
        limit: largest weight code.

    Returns:
        ``weight``, ``bias``, ``shift`` and ``factor``, and the bits of the last shift.
    """
    codes, scales = quantize_weight(np.asarray(weight_OI, np.float32), limit=limit)
    step_O = np.broadcast_to(np.asarray(step_O, np.float64), (len(codes),))
    bias_O = np.asarray(bias_O, np.float64)
    unit_O = takes.scale * scales.astype(np.float64)
    empty_O = ~codes.reshape(len(codes), -1).any(1)
    unit_O[empty_O] = step_O[empty_O] * 2.0**-12
    codes, unit_O = _make_room(codes, np.asarray(weight_OI, np.float64), bias_O, takes, unit_O)
    sums_O = codes.reshape(len(codes), -1).astype(np.int64).sum(1)
    bits = last_shift(unit_O / step_O, most)
    pairs = [split_factor(float(ratio), bits) for ratio in unit_O / step_O]
    shift_O = np.array([shift for shift, _ in pairs], np.int64)
    whole_O = np.rint(bias_O / unit_O).astype(np.int64) - takes.zero * sums_O + (np.left_shift(1, shift_O) >> 1)
    return {
        "weight": codes,
        "bias": whole_O.astype("<i4"),
        "shift": shift_O.astype("i1"),
        "factor": np.array([factor for _, factor in pairs], "<i2"),
    }, bits


def of_zeros(tensors: Mapping[str, np.ndarray], bits: int) -> np.ndarray:
    """Words that a layer of words makes of a row of zeros: int32 (O,).

    Args:
        tensors: of ``scaled_layer``, for an input whose zero is 0.
        bits: of the last shift.
    """
    shift_O, factor_O = tensors["shift"].astype(np.int32), tensors["factor"].astype(np.int32)
    return to_words(requantise(tensors["bias"], shift_O, factor_O), bits)


def _make_room(
    codes: np.ndarray, weight: np.ndarray, bias_O: np.ndarray, takes: Step, unit_O: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Coarser weights in the rows whose accumulators could leave 32 bits."""
    codes, unit_O = codes.copy(), unit_O.copy()
    for row in range(len(codes)):
        while True:
            size = np.abs(codes[row].astype(np.int64)).sum() * takes.largest * (2 if takes.zero else 1)
            if size + abs(bias_O[row] / unit_O[row]) < _LIMIT:
                break
            unit_O[row] *= 2.0
            codes[row] = np.rint(weight[row] * takes.scale / unit_O[row])
    return codes, unit_O


def gelu_table(source: Step, target: Step) -> np.ndarray:
    """Codes in front of a GELU to codes behind it: uint8 (256,)."""
    values = source.scale * (np.arange(256) - source.zero)
    gelu = np.array([0.5 * value * (1.0 + math.erf(value / math.sqrt(2.0))) for value in values])
    return np.clip(np.rint(gelu / target.scale) + target.zero, 0, 255).astype(np.uint8)


def softmax_factors(scale_S: np.ndarray) -> dict[str, np.ndarray]:
    """Factors that turn a score's distance from the largest into an exponent.

    The exponent is binary, with ten fraction bits.

    Args:
        scale_S: what one step of a head's scores is worth, in natural units.
    """
    found = [math.frexp(float(scale) * LOG2_E * 2**EXPONENT_BITS) for scale in scale_S]
    return {
        "left": np.array([max(exponent, 0) for _, exponent in found], "i1"),
        "right": np.array([min(max(-exponent, 0), 20) for _, exponent in found], "i1"),
        "factor": np.array([min(round(m * 2**15), 2**15 - 1) for m, _ in found], "<i2"),
    }


def plain_factors(ratios: np.ndarray, fixed: int) -> tuple[np.ndarray, int]:
    """Multipliers without a first shift: ratio = factor 2^-15 2^-bits 2^fixed.

    Args:
        ratios: positive, at most 2^fixed.
        fixed: fraction bits that the values already have.

    Returns:
        int16 multipliers, and the bits of the last shift: as many as fit, at most CODE_BITS.

    Raises:
        UnsupportedError: a ratio is larger, so that no multiplier fits.
    """
    if (most := float(ratios.max())) > 2.0**fixed * (1.0 + 2.0**-40):
        raise UnsupportedError(f"a ratio of {most:.3g} to values of {fixed} fraction bits fits no multiplier")
    bits = CODE_BITS
    while bits > 0 and float(ratios.max()) * 2.0 ** (15 + bits - fixed) > 32767.0:
        bits -= 1
    factors = np.rint(ratios * 2.0 ** (15 + bits - fixed))
    return np.clip(factors, 0, 2**15 - 1).astype("<i2"), bits


def dropped_bits(tokens: int) -> int:
    """Bits that a softmax drops so that sums over all tokens fit 32 bits."""
    return next(drop for drop in range(7) if tokens * (32767 >> drop) * 128 + 2**20 < 2**31)


def half_pixel_axis(size: int, out: int) -> tuple[np.ndarray, np.ndarray, int]:
    """One axis of a bilinear resize with half-pixel centres and clamped edges.

    Args:
        size: samples along the axis.
        out: samples wanted.

    Returns:
        First source sample of every output, the share of the one behind it in 2^-bits, and the bits: as many as make it
        exact, 7 where no number does.
    """
    numerator = np.clip((2 * np.arange(out) + 1) * size - out, 0, 2 * out * (size - 1))
    first = np.minimum(numerator // (2 * out), max(size - 2, 0))
    rest = numerator - first * 2 * out
    bits = next((b for b in range(8) if not ((rest << b) % (2 * out)).any()), 7)
    return first.astype("<i4"), np.rint((rest << bits) / (2 * out)).astype("<i2"), bits


def spread(bits: int, axis: tuple[np.ndarray, np.ndarray, int]) -> tuple[np.ndarray, np.ndarray]:
    """An axis with its shares in finer units."""
    first, share, own = axis
    return first, (share << (bits - own)).astype("<i2")


Lookup = Callable[[str], tuple[float, float]]
"""Label of a graph's tensor -> smallest and largest value."""
Spans = Mapping[str, tuple[float, float]]
"""Name -> smallest and largest value."""


__all__ = [
    "CODE_BITS",
    "CODE_BITS_LEFT",
    "LOG2_E",
    "WORD_BITS_LEFT",
    "Lookup",
    "Spans",
    "Step",
    "coarser_step",
    "dropped_bits",
    "fraction_bits",
    "gelu_table",
    "half_pixel_axis",
    "last_shift",
    "layer_units",
    "of_zeros",
    "plain_factors",
    "scaled_layer",
    "softmax_factors",
    "split_factor",
    "spread",
    "word_bits",
]
