"""CRC-64 as OpenIGTLink uses it.

ECMA-182 polynomial, most significant bit first, start 0, no final inversion.

The compiled kernel takes it where it is built; otherwise numpy runs many stretches of the data side by side and joins
their remainders by linearity. Same number either way. It does not know messages.

A start of 0 means that zeros in front change nothing: a length must be guarded by other means.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from tinyusfm_runtime.numerics import native

POLYNOMIAL = 0x42F0E1EBA9EA3693
"""x^64 + ... + 1 without its first term (ECMA-182; OpenIGTLink protocol, header page)."""
_MASK = (1 << 64) - 1
_SHORT = 1024
"""Below this many bytes a plain loop is as quick as numpy."""


def _make_table() -> list[int]:
    table = []
    for byte in range(256):
        value = byte << 56
        for _ in range(8):
            value = ((value << 1) ^ (POLYNOMIAL if value >> 63 else 0)) & _MASK
        table.append(value)
    return table


_TABLE = _make_table()
_TABLE_NP = np.array(_TABLE, np.uint64)


def crc64(data: bytes | bytearray | memoryview) -> int:
    """Remainder of some bytes.

    Args:
        data: any contiguous buffer.

    Returns:
        0 .. 2^64 - 1; 0 for no bytes.
    """
    octets = np.frombuffer(data, np.uint8) if len(data) else np.empty(0, np.uint8)
    if native.available():
        return native.crc64(octets)
    return crc64_numpy(octets)


def crc64_numpy(octets: np.ndarray) -> int:
    """The same without the kernel.

    Args:
        octets: uint8 (N,).

    Returns:
        0 .. 2^64 - 1.
    """
    if octets.size < _SHORT:
        short = 0
        for octet in octets.tobytes():
            short = _TABLE[(short >> 56) ^ octet] ^ (short << 8) & _MASK
        return short
    # lanes a power of two, so many that both loops below are short
    lanes = 1 << (int(octets.size).bit_length() + 1) // 2
    steps = -(-octets.size // lanes)
    padded = np.zeros(lanes * steps, np.uint8)
    padded[padded.size - octets.size :] = octets  # zeros in front change nothing
    columns = np.ascontiguousarray(padded.reshape(lanes, steps).T)
    crc = np.zeros(lanes, np.uint64)
    for column in columns:
        crc = _TABLE_NP[(crc >> np.uint64(56)).astype(np.uint8) ^ column] ^ (crc << np.uint64(8))
    while crc.size > 1:
        crc = _append_zeros(crc[0::2], steps) ^ crc[1::2]
        steps *= 2
    return int(crc[0])


def _append_zeros(crc: np.ndarray, num_bytes: int) -> np.ndarray:
    """What remainders become when so many zero bytes follow."""
    tables = _zero_tables(num_bytes)
    out = tables[0][(crc & np.uint64(255)).astype(np.uint8)]
    for octet in range(1, 8):
        out ^= tables[octet][(crc >> np.uint64(8 * octet)).astype(np.uint8)]
    return out


@lru_cache(maxsize=256)
def _zero_tables(num_bytes: int) -> np.ndarray:
    """Tables of what bytes of a remainder become after so many zero bytes.

    (8, 256): entry [i, v] is for byte i of the remainder, of value v.
    """
    values = np.arange(256, dtype=np.uint64)
    tables = np.stack([values << np.uint64(8 * octet) for octet in range(8)])
    if num_bytes == 1:
        return _TABLE_NP[(tables >> np.uint64(56)).astype(np.uint8)] ^ (tables << np.uint64(8))
    half = _append_zeros(tables, num_bytes // 2)
    both = _append_zeros(half, num_bytes // 2)
    return _append_zeros(both, 1) if num_bytes % 2 else both


__all__ = ["POLYNOMIAL", "crc64", "crc64_numpy"]
