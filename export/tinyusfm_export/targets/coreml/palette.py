"""Weights as indices into a small table.

A palette of 16 or 64 values that all entries of one weight share.

Rows (output channels) are brought to one root mean square first, so that one table suits them all; the row's own scale
multiplies the layer's output. The table is the fixed point of Lloyd's iteration on the sorted entries (S. P. Lloyd,
Least squares quantization in PCM, IEEE Trans. Inf. Theory 28, 1982), started at equal steps of density^(1/3), which is
where the best table of many entries lies (Panter and Dite, Proc. IRE 39, 1951). No random start: equal weights give
equal tables. It does not know graphs, files or Core ML.

Shapes: O output channels, outermost; E entries of a weight; T values of a table.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tinyusfm_runtime.numerics.order import wide

ROUNDS = 60
"""Most iterations; fewer where the table stands still."""
_BINS = 512


@dataclass(frozen=True, kw_only=True, slots=True)
class Palette:
    """A weight by indices.

    Attributes:
        indices: uint8, of the weight's shape, below 2^bits.
        table: float16 (T,), rising.
        scales: float16 (O,), what each output channel is multiplied with.
        bits: of an index.
    """

    indices: np.ndarray
    table: np.ndarray
    scales: np.ndarray
    bits: int

    def packed(self) -> np.ndarray:
        """The indices without gaps, lowest bit first: uint8.

        As ``constexpr_lut_to_dense`` reads them.
        """
        bits = np.unpackbits(self.indices.reshape(-1, 1), axis=1, count=self.bits, bitorder="little")
        return np.packbits(bits.reshape(-1), bitorder="little")


def make_palette(weight: np.ndarray, bits: int) -> Palette:
    """Finds the table of a weight.

    Args:
        weight: float32, output channels first.
        bits: of an index, 1 to 8.
    """
    rows = weight.reshape(weight.shape[0], -1).astype(np.float64)
    size = np.sqrt(np.mean(rows**2, axis=1))
    scales = np.where(size > 0.0, size, 1.0).astype(np.float16)
    scales = np.maximum(scales, np.float16(2.0**-14))  # the smallest normal float16
    entries = rows / scales.astype(np.float64)[:, None]
    table = find_table(entries.reshape(-1), 1 << bits)
    middles = (table[1:].astype(np.float64) + table[:-1].astype(np.float64)) / 2.0
    indices = np.searchsorted(middles, entries).astype(np.uint8).reshape(weight.shape)
    return Palette(indices=indices, table=table, scales=scales, bits=bits)


def find_table(entries_E: np.ndarray, count: int) -> np.ndarray:
    """Table with the least squared error that Lloyd's iteration finds.

    Args:
        entries_E: any real numbers.
        count: values wanted.

    Returns:
        float16 (count,), rising.
    """
    ordered = np.sort(np.asarray(entries_E, np.float64))
    sums = np.concatenate([[0.0], np.cumsum(ordered)])
    table = _start(ordered, count)
    for _ in range(ROUNDS):
        cuts = np.searchsorted(ordered, (table[1:] + table[:-1]) / 2.0)
        edges = np.concatenate([[0], cuts, [len(ordered)]])
        held = np.diff(edges)
        means = np.where(held > 0, np.diff(sums[edges]) / np.maximum(held, 1), table)
        if np.array_equal(means, table):
            break
        table = means
    return np.sort(wide(table)).astype(np.float16)


def _start(ordered_E: np.ndarray, count: int) -> np.ndarray:
    """Quantiles of density^(1/3)."""
    low, high = float(ordered_E[0]), float(ordered_E[-1])
    if low == high:
        return np.full(count, low)
    numbers, edges = np.histogram(wide(ordered_E), bins=_BINS, range=(low, high))
    mass = np.concatenate([[0.0], np.cumsum(np.cbrt(numbers))])
    return np.interp((np.arange(count) + 0.5) / count * mass[-1], mass, edges)


__all__ = ["ROUNDS", "Palette", "find_table", "make_palette"]
