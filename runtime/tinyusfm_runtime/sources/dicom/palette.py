"""Palette of a DICOM file as 8-bit colours.

Whatever width its entries are stored in.

The descriptor says how many bits an entry has and is not believed: the length of the table says whether entries are
bytes or 16-bit words, and their values say whether 255 or 65535 is white. Segmented tables are expanded by pydicom.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tinyusfm_runtime.errors import SourceError
from tinyusfm_runtime.sources.dicom.header import DicomHeader

COLOURS = ("Red", "Green", "Blue")


def palette_table(header: DicomHeader, doubts: list[str]) -> tuple[int, np.ndarray]:
    """The colours of a palette.

    Args:
        header: of a file in PALETTE COLOR.
        doubts: called where descriptor and table contradict each other.

    Returns:
        The code of the first entry, and uint8 (entries, 3).

    Raises:
        SourceError: there is no table, or a length that fits no width.
    """
    dataset = header.dataset
    descriptor = dataset.get("RedPaletteColorLookupTableDescriptor")
    if descriptor is None or len(descriptor) != 3:
        raise SourceError("the DICOM file is in PALETTE COLOR and brings no palette")
    entries, first, bits = int(descriptor[0]) or 1 << 16, int(descriptor[1]), int(descriptor[2])
    if dataset.get("RedPaletteColorLookupTableData"):
        little = header.syntax.is_little_endian
        channels = [_plain(dataset.get(f"{name}PaletteColorLookupTableData"), entries, little) for name in COLOURS]
    else:
        channels = _segmented(dataset, entries, first)
    table = np.stack(channels, axis=-1)
    top = int(table.max(initial=0))
    if (top > 255) != (bits > 8):
        doubts.append(
            f"the palette says {bits} bits and its entries go up to {top}: read as {16 if top > 255 else 8} bits"
        )
    return first, (table >> 8 if top > 255 else table).astype(np.uint8)


def _plain(data: Any, entries: int, little: bool) -> np.ndarray:
    data = bytes(data or b"")
    if len(data) >= 2 * entries:
        return np.frombuffer(data, "<u2" if little else ">u2", entries).astype(np.uint16)
    if len(data) >= entries:
        return np.frombuffer(data, np.uint8, entries).astype(np.uint16)
    raise SourceError(f"the palette promises {entries} entries and holds {len(data)} bytes")


def _segmented(dataset: Any, entries: int, first: int) -> list[np.ndarray]:
    from pydicom.pixels import apply_color_lut

    codes = np.arange(first, first + entries, dtype=np.int64).reshape(1, -1)
    colours = apply_color_lut(codes.astype(np.uint16), dataset)[0]
    return [colours[:, channel].astype(np.uint16) for channel in range(3)]


__all__ = ["COLOURS", "palette_table"]
