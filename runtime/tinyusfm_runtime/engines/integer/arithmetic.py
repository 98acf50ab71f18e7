"""The integer engine's arithmetic in numpy.

The definition that every compiled implementation equals byte for byte.

docs/reference/integer.md says the same in words and cites where each idea comes from. Everything is an integer. Matrix
products are computed in float64 where that is exact: every partial sum is an integer below 2^53, which model.py proves
before the first run. It knows nothing of models, files or engines.

Shapes: N tokens or positions, I inputs, O outputs, C channels, D width, H rows and W columns of a map; S heads.
"""

from __future__ import annotations

import math

import numpy as np

I16_LOW, I16_HIGH = -(2**15), 2**15 - 1
"""Range of 16 bits."""
ROOT_BITS = 15
"""Bits of a LayerNorm's root and of its multiplier."""
EXPONENT_BITS = 10
"""Fraction bits of a softmax exponent."""
LAST_EXPONENT = 2 ** (EXPONENT_BITS + 4) - 1
"""Largest exponent: from 15 powers of two on a probability is 0 anyway."""
EXP2_A, EXP2_B, EXP2_C = 22657, 7555, 1282
"""2^-x = 1 - x (A - x (B - x C)) for 0 <= x < 1, in units of 2^-15; largest error 1.9e-4 of the result."""
ONE = I16_HIGH
"""The number 1 as a probability before the division."""
ZERO = 128
"""Code of zero in queries, keys and values."""


def saturate(values: np.ndarray) -> np.ndarray:
    """Clamps to 16 bits; the type stays."""
    return np.clip(values, I16_LOW, I16_HIGH)


def multiply(values: np.ndarray, factor: np.ndarray | int) -> np.ndarray:
    """Product with a factor in 2^-15, rounded half up: (v m + 2^14) >> 15.

    Args:
        values: integers of 16 bits, int32.
        factor: 0 .. 32767, int32.
    """
    return (values * factor + (1 << 14)) >> 15


def shift_round(values: np.ndarray, bits: np.ndarray | int) -> np.ndarray:
    """Division by 2^bits, rounded half up; bits >= 0, and 0 changes nothing."""
    half = np.left_shift(1, bits) >> 1
    return (values + half) >> bits


def requantise(sums: np.ndarray, shift: np.ndarray, factor: np.ndarray) -> np.ndarray:
    """Accumulators to 16 bits: shift, saturate, multiply.

    Args:
        sums: int32 ...O; the bias and half a unit of the shift are in it.
        shift: int32 (O,), 0 .. 31.
        factor: int32 (O,), 0 .. 32767.
    """
    return multiply(saturate(sums >> shift), factor)


def to_codes(values: np.ndarray, bits: int, zero: int) -> np.ndarray:
    """16-bit values to uint8 codes.

    (v + zero 2^bits + half) saturated to 16 bits, shifted, clamped to 0 .. 255.
    """
    offset = (zero << bits) + ((1 << bits) >> 1)
    return np.clip(saturate(values + offset) >> bits, 0, 255).astype(np.uint8)


def to_words(values: np.ndarray, bits: int) -> np.ndarray:
    """16-bit values divided by 2^bits, rounded half up: int32.

    The sum is saturated, so results are in the range of 16 bits.
    """
    return np.asarray(saturate(values + ((1 << bits) >> 1)) >> bits)


def product(values_NI: np.ndarray, weight_OI: np.ndarray, bias_O: np.ndarray) -> np.ndarray:
    """Exact affine map: int32 NO, values times weight plus bias."""
    exact_NO = values_NI.astype(np.float64) @ weight_OI.astype(np.float64).T
    return np.asarray(exact_NO.astype(np.int64) + bias_O, np.int32)


def windows(map_HWC: np.ndarray) -> np.ndarray:
    """Neighbourhoods of 3 x 3 with zeros beyond the border: (H W, 9, C), rows first."""
    rows, columns, channels = map_HWC.shape
    padded = np.pad(map_HWC, ((1, 1), (1, 1), (0, 0)))
    parts = [padded[y : y + rows, x : x + columns] for y in range(3) for x in range(3)]
    return np.stack(parts, 2).reshape(rows * columns, 9, channels)


def convolve(map_HWC: np.ndarray, weight_O9C: np.ndarray, bias_O: np.ndarray) -> np.ndarray:
    """3 x 3 convolution, codes with zero at 0: int32 (H W, O)."""
    found = windows(map_HWC)
    return product(found.reshape(len(found), -1), weight_O9C.reshape(len(weight_O9C), -1), bias_O)


def convolve_depthwise(map_HWC: np.ndarray, weight_C9: np.ndarray, bias_C: np.ndarray) -> np.ndarray:
    """3 x 3 convolution of every channel by itself: int32 (H W, C)."""
    found = windows(map_HWC).astype(np.int32)
    return np.asarray(np.einsum("nkc,ck->nc", found, weight_C9.astype(np.int32)) + bias_C, np.int32)


def layer_norm(values_ND: np.ndarray, epsilon: int, root: int) -> np.ndarray:
    """LayerNorm without scale and shift: int32 ND in 16 bits.

    Fraction bits as the root says.

    Args:
        values_ND: int16.
        epsilon: added to the sum of squares of D x - sum(x), at least 1.
        root: sqrt(D) 2^(15 + fraction bits), below 2^29.
    """
    width = values_ND.shape[1]
    wide_ND = values_ND.astype(np.int64)
    sums_N = wide_ND.sum(1)
    centred_ND = width * wide_ND - sums_N[:, None]
    squares_N = width * (width * (wide_ND * wide_ND).sum(1) - sums_N * sums_N) + epsilon
    out_ND = np.empty(values_ND.shape, np.int32)
    for row, (centred_D, square) in enumerate(zip(centred_ND, squares_N.tolist(), strict=True)):
        out_ND[row] = _normalise(centred_D, square, root)
    return out_ND


def _normalise(centred_D: np.ndarray, square: int, root: int) -> np.ndarray:
    bits = square.bit_length()
    shift = (bits - 2 * ROOT_BITS + 1) // 2  # leaves 29 or 30 bits, so that the root has 15
    length = math.isqrt(square >> (2 * shift) if shift >= 0 else square << (-2 * shift))
    scaled_D = shift_round(centred_D, shift) if shift >= 0 else centred_D << -shift
    return multiply(saturate(scaled_D).astype(np.int32), root // length)


def exp2(exponents: np.ndarray, drop: int) -> np.ndarray:
    """2^-(exponent / 1024) in units of 2^-15: int32, 0 .. 32767.

    Shifted right by ``drop``.

    Args:
        exponents: int32, 0 .. LAST_EXPONENT.
        drop: bits that are dropped so that sums over many tokens fit.
    """
    fraction = (exponents & ((1 << EXPONENT_BITS) - 1)) << (15 - EXPONENT_BITS)
    inner = EXP2_A - multiply(fraction, EXP2_B - multiply(fraction, EXP2_C))
    return (ONE - multiply(fraction, inner)) >> ((exponents >> EXPONENT_BITS) + drop)


def attend(
    query_ND: np.ndarray, key_ND: np.ndarray, value_ND: np.ndarray, *, left: int, right: int, factor: int, drop: int
) -> np.ndarray:
    """One head: softmax(q k') v with the division last.

    int32 ND in units of 2^-7 of a value's step.

    Args:
        query_ND: codes less 128, any number of rows.
        key_ND: the same, one row per token.
        value_ND: the same.
        left: bits by which the distance from a row's largest score is shifted left, or 0.
        right: bits by which it is shifted right, rounded; one of the two is 0.
        factor: of the shifted distance, to an exponent of base 2 with ten fraction bits.
        drop: see ``exp2``.
    """
    nothing = np.zeros(1, np.int32)
    scores_NN = product(query_ND, key_ND, nothing)
    distance_NN = scores_NN.max(1, keepdims=True) - scores_NN
    short_NN = np.minimum(shift_round(distance_NN << left, right), I16_HIGH)
    weights_NN = exp2(np.minimum(multiply(short_NN, factor), LAST_EXPONENT), drop)
    mixed_ND = product(weights_NN, value_ND.T, nothing)
    sums_N = weights_NN.sum(1)
    shift_N = np.array([int(total).bit_length() - 8 for total in sums_N], np.int32)
    inverse_N = np.minimum((np.int64(1) << (shift_N.astype(np.int64) + 22)) // sums_N, I16_HIGH).astype(np.int32)
    return multiply(saturate(shift_round(mixed_ND, shift_N[:, None])), inverse_N[:, None])


def resize(
    map_HWC: np.ndarray, rows: tuple[np.ndarray, np.ndarray], columns: tuple[np.ndarray, np.ndarray], bits: int
) -> np.ndarray:
    """Bilinear resize without rounding: int32 HWC.

    In units of 2^-(2 bits) of the source's step.

    Args:
        map_HWC: int16.
        rows: first source row of every row, and the share of the one below it in 2^-bits.
        columns: the same for columns.
        bits: fraction bits of a share, at most 7.
    """
    halfway = _lerp(map_HWC.astype(np.int32), *rows, bits)
    return _lerp(halfway.swapaxes(0, 1), *columns, bits).swapaxes(0, 1)


def _lerp(values: np.ndarray, first: np.ndarray, share: np.ndarray, bits: int) -> np.ndarray:
    second = np.minimum(first + 1, len(values) - 1)
    part = share.reshape(-1, 1, 1)
    return ((1 << bits) - part) * values[first] + part * values[second]


def halve(map_HWC: np.ndarray) -> np.ndarray:
    """Mean of 2 x 2 positions, rounded half up: int32 HWC.

    An odd last row or column is dropped.
    """
    rows, columns, channels = map_HWC.shape
    even = map_HWC[: rows // 2 * 2, : columns // 2 * 2].astype(np.int32)
    return shift_round(even.reshape(rows // 2, 2, columns // 2, 2, channels).sum((1, 3)), 2)


def patches(image_HW: np.ndarray, size: int) -> np.ndarray:
    """Square patches in reading order, each row by row: (N, size size)."""
    rows, columns = image_HW.shape[0] // size, image_HW.shape[1] // size
    split = image_HW.reshape(rows, size, columns, size)
    return split.transpose(0, 2, 1, 3).reshape(rows * columns, size * size)


def gather(values_NC: np.ndarray, index: np.ndarray, blank_C: np.ndarray | None) -> np.ndarray:
    """Rows by their numbers: one row for each number, of the values' type.

    Args:
        values_NC: codes, words or sums.
        index: of the row that is wanted, from 0; -1 is the blank row.
        blank_C: int32 within the values' type; None where no number is -1.
    """
    if blank_C is None:
        return values_NC[index]
    return np.concatenate([values_NC, blank_C.astype(values_NC.dtype)[None]])[index]


__all__ = [
    "EXP2_A",
    "EXP2_B",
    "EXP2_C",
    "EXPONENT_BITS",
    "I16_HIGH",
    "I16_LOW",
    "LAST_EXPONENT",
    "ONE",
    "ROOT_BITS",
    "ZERO",
    "attend",
    "convolve",
    "convolve_depthwise",
    "exp2",
    "gather",
    "halve",
    "layer_norm",
    "multiply",
    "patches",
    "product",
    "requantise",
    "resize",
    "saturate",
    "shift_round",
    "to_codes",
    "to_words",
    "windows",
]
