"""Frames of a DICOM file as 8-bit grey or RGB.

Decoded by pydicom.pixels and its plug-ins.

* MONOCHROME2 is handed over as it is, MONOCHROME1 inverted (its 0 means white), PALETTE COLOR through its table, RGB as
  it is. YBR_* becomes RGB: that is part of decoding the file, as the standard defines it (PS3.3 C.7.6.3.1.2).
* More than 8 bits, signed and float samples go through the modality rescale and a window that the caller gives.
* Samples that the tags cannot be right about (codes above BitsStored, colours that are plainly of another space) are
  reported, not trusted.

It knows no file: a frame's bytes come in, pixels go out.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tinyusfm_runtime.errors import FrameError, MissingExtra, SourceError, UnsupportedError
from tinyusfm_runtime.images.window import Window, apply_window, needs_window
from tinyusfm_runtime.sources.dicom.header import DicomHeader
from tinyusfm_runtime.sources.dicom.layout import Layout, looks_like
from tinyusfm_runtime.sources.dicom.palette import palette_table

DECODERS = ("pillow", "pydicom", "pyjpegls", "pylibjpeg", "gdcm")
"""Preference, fixed because decoders differ by a few codes on the same JPEG."""
PACKAGES = {
    "1.2.840.10008.1.2.4.50": "pillow",
    "1.2.840.10008.1.2.4.51": "pillow (8 bits) or python-gdcm",
    "1.2.840.10008.1.2.4.57": "python-gdcm",
    "1.2.840.10008.1.2.4.70": "python-gdcm",
    "1.2.840.10008.1.2.4.80": "pyjpegls",
    "1.2.840.10008.1.2.4.81": "pyjpegls",
    "1.2.840.10008.1.2.4.90": "pillow",
    "1.2.840.10008.1.2.4.91": "pillow",
    "1.2.840.10008.1.2.4.201": "pylibjpeg-openjpeg",
    "1.2.840.10008.1.2.4.202": "pylibjpeg-openjpeg",
    "1.2.840.10008.1.2.4.203": "pylibjpeg-openjpeg",
    "1.2.840.10008.1.2.5": "pydicom",
}
"""Transfer syntax -> the package, of a permissive licence, that decodes it; the first of each is in extra ``dicom``."""
IN_EXTRA = ("pillow", "pyjpegls", "pydicom")


def choose_decoder(syntax: str, bits: int = 8) -> str:
    """Name of pydicom's plug-in for a transfer syntax, or "" for uncompressed data.

    Args:
        syntax: transfer syntax UID.
        bits: of a sample; Pillow reads JPEG of 8 bits only.

    Raises:
        MissingExtra: the package that decodes it belongs to the extra, and is not installed.
        UnsupportedError: it needs another package; the message names it.
        SourceError: nothing decodes it.
    """
    from pydicom.pixels import get_decoder
    from pydicom.uid import UID

    uid = UID(syntax)
    try:
        decoder = get_decoder(uid)
    except NotImplementedError as error:
        raise SourceError(
            f"DICOM in {uid.name} is not read: re-save it as JPEG, JPEG 2000, RLE or uncompressed, for instance with "
            "dcmconv or gdcmconv --raw"
        ) from error
    if decoder.is_native:
        return ""
    for name in DECODERS:
        if name in decoder.available_plugins and not (name == "pillow" and bits > 8 and syntax.endswith(".4.51")):
            return name
    package = PACKAGES.get(syntax, "")
    if package.split(" ")[0] in IN_EXTRA and bits <= 8:
        raise MissingExtra(f"DICOM in {uid.name}", package.split(" ")[0], "dicom")
    how = f": pip install {package.split(' ')[-1]}" if package else ""
    raise UnsupportedError(f"no decoder for DICOM in {uid.name} is installed{how}, or re-save it uncompressed")


class FrameDecoder:
    """Decodes the frames of one file.

    Args:
        header: what the tags promise.
        layout: how the data really lie.
        window: (code that becomes 0, code that becomes 255) for samples of more than 8 bits, or None to refuse them.

    Attributes:
        notes: what was obeyed or neglected, one line each; grows while frames are decoded.
        doubts: contradictions between tags and samples; likewise.

    Raises:
        FrameError: the samples need a window and there is none.
    """

    def __init__(self, header: DicomHeader, layout: Layout, window: Window | None) -> None:
        self.header, self.layout, self.window = header, layout, window
        self.notes: list[str] = []
        self.doubts: list[str] = []
        self.plugin = choose_decoder(layout.syntax, max(layout.stored, 1))
        self._slope, self._intercept = _rescale(header.dataset)
        self._table = palette_table(header, self.doubts) if layout.photometric == "PALETTE COLOR" else None
        self._deep = not layout.eight_bits and self._table is None
        if self._deep and window is None:
            raise needs_window(_name(header, layout))
        if not self._deep:
            self._note_neglected()

    def decode(self, data: bytes) -> np.ndarray:
        """One frame.

        Args:
            data: its bytes, as stored.

        Returns:
            uint8 HW (grey) or HWC (RGB).

        Raises:
            FrameError: the samples contradict the tags in a way that leaves no image.
        """
        pixels, space = self._samples(data)
        if pixels.shape[:2] != (self.header.rows, self.header.columns):
            raise FrameError(f"decodes to {pixels.shape[:2]} rows x columns, the header says otherwise")
        if self._table is not None:
            return self._coloured(pixels)
        pixels = self._windowed(pixels) if self._deep else self._bytes(pixels)
        if pixels.ndim == 3:
            pixels = self._as_rgb(pixels, space)
        if self.layout.photometric == "MONOCHROME1":
            pixels = 255 - pixels
        return np.ascontiguousarray(pixels)

    def _samples(self, data: bytes) -> tuple[np.ndarray, str]:
        """Samples as stored, and their colour space as pydicom understood the codestream."""
        from pydicom.encaps import encapsulate
        from pydicom.pixels import get_decoder
        from pydicom.uid import UID

        head, layout = self.header, self.layout
        options: dict[str, Any] = {
            "rows": head.rows,
            "columns": head.columns,
            "number_of_frames": 1,
            "samples_per_pixel": layout.samples,
            "photometric_interpretation": layout.photometric,
            "planar_configuration": int(layout.planar),
            "bits_allocated": layout.allocated,
            "bits_stored": layout.stored or layout.allocated,
            "pixel_representation": int(layout.signed),
            "pixel_keyword": head.keyword,
            "pixel_vr": head.vr,
        }
        source = encapsulate([data], has_bot=False) if layout.encapsulated else data
        if not layout.encapsulated:
            options["correct_unused_bits"] = False
            if layout.swapped:
                source = np.frombuffer(data, "<u2").byteswap().tobytes()
        decoder = get_decoder(UID(layout.syntax))
        try:
            pixels, facts = decoder.as_array(
                source, index=0, validate=True, raw=True, decoding_plugin=self.plugin, **options
            )
        except RuntimeError as error:  # what pydicom raises when its plug-in does, whatever that raised
            raise FrameError(f"{self.plugin or 'pydicom'} cannot decode it: damaged, or of a kind it lacks") from error
        pixels = self._byte_pairs(pixels)
        return pixels >> layout.shift if layout.shift else pixels, str(facts["photometric_interpretation"])

    def _byte_pairs(self, pixels: np.ndarray) -> np.ndarray:
        """Big-endian words of 8-bit samples, swapped where neighbours do not fit.

        Some writers do not swap them.
        """
        head = self.header
        if self.layout.encapsulated or head.syntax.is_little_endian or head.vr != "OW" or self.layout.allocated != 8:
            return pixels
        flat = np.ascontiguousarray(pixels).reshape(-1)
        even = flat[: len(flat) // 2 * 2]
        other = even.reshape(-1, 2)[:, ::-1].reshape(-1)
        row = head.columns * self.layout.samples
        lines = (each[: len(each) // row * row].reshape(-1, row).astype(np.int16) for each in (even, other))
        rough, smooth = (float(np.abs(np.diff(each[:, :: self.layout.samples])).mean()) for each in lines)
        if rough <= 1.3 * smooth:
            return pixels
        self._doubt("the bytes of each 16-bit word stand in the other order than the tags say")
        return np.concatenate([other, flat[len(even) :]]).reshape(pixels.shape)

    def _bytes(self, pixels: np.ndarray) -> np.ndarray:
        if pixels.dtype == np.uint8:
            return pixels
        top = int(pixels.max())
        if top > 255:
            raise FrameError(
                f"the tags say 8 bits and there are codes up to {top}: give --window LO,HI, such as 0,{top}"
            )
        return pixels.astype(np.uint8)

    def _windowed(self, pixels: np.ndarray) -> np.ndarray:
        assert self.window is not None
        stored, allocated = self.layout.stored, self.layout.allocated
        if 0 < stored < allocated and pixels.dtype.kind in "iu" and not self.layout.encapsulated:
            # bits above BitsStored are not part of the sample (PS3.5 8.1.1)
            pixels = pixels << (8 * pixels.dtype.itemsize - stored) >> (8 * pixels.dtype.itemsize - stored)
        if (self._slope, self._intercept) != (1.0, 0.0):
            pixels = pixels * self._slope + self._intercept
        return apply_window(pixels, self.window)

    def _coloured(self, pixels: np.ndarray) -> np.ndarray:
        assert self._table is not None
        first, table = self._table
        return np.ascontiguousarray(table[np.clip(pixels.astype(np.int64) - first, 0, len(table) - 1)])

    def _as_rgb(self, pixels: np.ndarray, space: str) -> np.ndarray:
        from pydicom.pixels import convert_color_space

        shown = looks_like(pixels)
        tagged = "YBR_FULL" if space.startswith("YBR_FULL") else "RGB"
        if shown is not None and shown != tagged:
            self._doubt(f"the tags say {space}, the colours are those of {shown}")
            tagged = shown
        return np.asarray(convert_color_space(pixels, "YBR_FULL", "RGB")) if tagged == "YBR_FULL" else pixels

    def _doubt(self, text: str) -> None:
        if text not in self.doubts:
            self.doubts.append(text)

    def _note_neglected(self) -> None:
        dataset = self.header.dataset
        if (self._slope, self._intercept) != (1.0, 0.0) or dataset.get("ModalityLUTSequence"):
            self.notes.append(
                "a rescale or modality table in the file is left out of account: codes are taken as stored"
            )
        if dataset.get("VOILUTSequence") or _narrow(dataset):
            self.notes.append("a display window in the file is left out of account: codes are taken as stored")
        shape = str(dataset.get("PresentationLUTShape") or "")
        if shape == "INVERSE" and self.layout.photometric == "MONOCHROME2":
            self.notes.append("the file asks to be shown inverted; it is taken as MONOCHROME2 says")
        if self.window is not None:
            self.notes.append("the DICOM file has 8 bits: the window is not applied")


def _name(header: DicomHeader, layout: Layout) -> str:
    if header.keyword != "PixelData":
        return "DICOM of floats"
    return f"{'signed ' if layout.signed else ''}{layout.stored}-bit DICOM"


def _rescale(dataset: Any) -> tuple[float, float]:
    try:
        slope = float(dataset.get("RescaleSlope", 1) or 1)
        return slope, float(dataset.get("RescaleIntercept", 0) or 0)
    except (TypeError, ValueError):
        return 1.0, 0.0


def _narrow(dataset: Any) -> bool:
    """True if the file's own window would change an 8-bit image.

    Such a window is one that is not 0..255.
    """
    centre, width = dataset.get("WindowCenter"), dataset.get("WindowWidth")
    try:
        centre, width = (float(value[0] if hasattr(value, "__getitem__") else value) for value in (centre, width))
    except (TypeError, ValueError, IndexError):
        return False
    return abs(width - 256) > 4 or abs(centre - 128) > 4


__all__ = ["DECODERS", "IN_EXTRA", "PACKAGES", "FrameDecoder", "choose_decoder"]
