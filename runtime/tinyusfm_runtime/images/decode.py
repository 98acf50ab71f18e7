"""The one decoder of still image files, by Pillow.

Bytes in, upright 8-bit pages out.

* EXIF and TIFF orientation are obeyed: pages are upright, ``orientation`` says what was done.
* Palettes become their colours (grey where every entry is grey); the indices are kept, for masks.
* Codes of more than 8 bits, and floats, are refused unless a window says which codes are black and white.
* Pages of TIFF, and frames of GIF, PNG and WebP animations, are read one by one; reduced copies and transparency masks
  inside a TIFF are no pages.
* What is neglected (transparency, colour profile, gamma) is said in ``notes``.

Sizes are checked before anything is unpacked. Grey stays grey, colour becomes RGB; brightness is preprocessing's
matter. It does not know files, folders or spacing.

    image = read_image(path.read_bytes())
    frame = Frame(pixels=image.pixels, pixel_format=image.pixel_format)

Shapes: HW = rows, columns; HWC = rows, columns, channels.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np

from tinyusfm_runtime.errors import FrameError, MissingExtra
from tinyusfm_runtime.frame import PixelFormat
from tinyusfm_runtime.images import depth
from tinyusfm_runtime.images.kinds import OTHERS, SNIFF_BYTES, kind_of_bytes
from tinyusfm_runtime.images.limits import MAX_FRAMES, MAX_PIXELS, check_frames, check_image, check_unpacked
from tinyusfm_runtime.images.orientation import TURNS
from tinyusfm_runtime.images.whole import check_jpeg_kind, check_scans, check_whole, gif_is_whole, gif_pages, tiff_pages
from tinyusfm_runtime.images.window import Window, apply_window, needs_window

FORMATS = ("PNG", "JPEG", "TIFF", "GIF", "WEBP", "BMP", "DIB", "JPEG2000", "PPM")
"""Pillow's names of what is read."""
MAX_FILE_BYTES = 256 << 20
MAX_TIFF_PAGES = 10_000
"""Pillow looks for pages of a TIFF one after the other, 0.1 ms each."""
ORIENTATION_TAG, SUBFILE_TAG, DESCRIPTION_TAG = 274, 254, 270
"""TIFF tags (TIFF 6.0, section 8); EXIF uses the first too."""
GAMMA = 0.45455
"""Of sRGB, as a PNG writes it; another one makes viewers show other brightness."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodedImage:
    """One upright page.

    Attributes:
        pixels: uint8 HW (grey) or HWC (RGB, RGBA).
        pixel_format: meaning of the channels.
        index: page, from 0.
        orientation: 1..8 as the file says it (EXIF), already obeyed; 1 is as stored.
        indices: uint8 HW, palette indices of a palette image, upright too; None for others.
        codes: HW, codes of more than 8 bits as the file stores them, for masks; None for others.
        windowed: True if codes of more than 8 bits went through the window.
        aspect: column spacing divided by row spacing where the file tells it and it is not 1, else None.
        start_ms: time of an animation's frame, ms from its beginning, or None.
        notes: what was obeyed or neglected, one line each.
    """

    pixels: np.ndarray
    pixel_format: PixelFormat
    index: int = 0
    orientation: int = 1
    indices: np.ndarray | None = None
    codes: np.ndarray | None = None
    windowed: bool = False
    aspect: float | None = None
    start_ms: float | None = None
    notes: tuple[str, ...] = ()

    @property
    def stored_size(self) -> tuple[int, int]:
        """(rows, columns) as they stand in the file, before the orientation was obeyed."""
        rows, columns = self.pixels.shape[:2]
        return (columns, rows) if self.orientation >= 5 else (rows, columns)


def read_image(data: bytes, *, window: Window | None = None) -> DecodedImage:
    """Decodes a file of one image.

    Args:
        data: the whole file.
        window: (code that becomes 0, code that becomes 255) for codes of more than 8 bits, or None to refuse them.

    Returns:
        The image.

    Raises:
        FrameError: no image, broken off, too large, more than 8 bits without a window, or several pages.
        MissingExtra: Pillow is not installed.
    """
    with OpenImage(data, window=window) as opened:
        if opened.pages > 1:
            raise FrameError(f"holds {opened.pages} pages: write them as single images")
        if opened.broken:
            raise FrameError(opened.broken)
        return opened.page(0)


def read_pages(data: bytes, *, window: Window | None = None) -> Iterator[DecodedImage]:
    """Decodes a file page by page.

    Args:
        data: the whole file.
        window: as in ``read_image``.

    Yields:
        Its pages in order.

    Raises:
        FrameError: as in ``read_image``, save that there may be many pages; one that breaks off says so after its
            whole pages.
        MissingExtra: Pillow is not installed.
    """
    with OpenImage(data, window=window) as opened:
        for index in range(opened.pages):
            yield opened.page(index)
        if opened.broken:
            raise FrameError(opened.broken)


class OpenImage:
    """A decoded header: how many pages, and each of them on request.

    Args:
        data: the whole file.
        window: as in ``read_image``.

    Attributes:
        kind: Pillow's name of the format.
        pages: how many.
        broken: why the pages may not be all, or "".
    """

    def __init__(self, data: bytes, *, window: Window | None = None) -> None:
        try:
            from PIL import Image
        except ImportError as error:
            raise MissingExtra("reading images", "pillow", "images") from error
        if len(data) > MAX_FILE_BYTES:
            raise FrameError(f"the file is larger than {MAX_FILE_BYTES >> 20} MiB")
        check_whole(data)
        check_jpeg_kind(data)
        _check_kind(data)
        self._pillow, self._data, self._window = Image, data, window
        self._image: Any = self._quietly(lambda: Image.open(BytesIO(data), formats=FORMATS))
        self.kind = str(self._image.format)
        self.broken = ""
        self._check_size()
        self._notes: list[str] = []
        self._numbers = self._page_numbers()
        self.pages = len(self._numbers)
        self._clock_ms = 0.0

    def __enter__(self) -> OpenImage:
        return self

    def __exit__(self, *_: object) -> None:
        self._image.close()

    def page(self, index: int) -> DecodedImage:
        """Decodes one page.

        Those of animations are whole frames, whatever part of them the file stores.

        Args:
            index: page from 0; animations must be read in order.

        Raises:
            FrameError: it cannot be decoded or used.
        """
        image = self._image
        if self.pages > 1 or self._numbers[0]:
            self._quietly(lambda: image.seek(self._numbers[index]))
        self._check_size()
        notes = list(self._notes)
        orientation = self._orientation()
        stored = depth.stored_codes(image, self._data)
        self._quietly(image.load)
        upright = self._upright(image, orientation)
        pixels, pixel_format, indices = self._pixels(upright, stored, notes)
        if orientation != 1:
            notes.append(f"the orientation in the file is obeyed: {TURNS[orientation]}")
        notes += _neglected(image)
        start_ms, self._clock_ms = self._clock_ms, self._clock_ms + float(image.info.get("duration") or 0)
        return DecodedImage(
            pixels=pixels,
            pixel_format=pixel_format,
            index=index,
            orientation=orientation,
            indices=indices,
            codes=stored.codes_of(upright).copy() if stored.needs_window else None,
            windowed=stored.needs_window,
            aspect=_aspect(image.info, orientation),
            start_ms=start_ms if self._clock_ms else None,
            notes=tuple(notes),
        )

    def _quietly(self, work: Any) -> Any:
        """The one place where Pillow's errors become ours."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return work()
        except self._pillow.DecompressionBombError as error:
            raise FrameError(f"more than {MAX_PIXELS >> 20} million pixels: too large") from error
        except (EOFError, OSError, SyntaxError) as error:
            # an error that has a number is the machine's, the others are the file's
            broken = "truncated" in str(error) or isinstance(error, EOFError)
            raise FrameError("the image breaks off" if broken else "not an image that can be decoded") from error
        except FrameError:
            raise
        except Exception as error:  # Pillow's plug-ins raise almost anything on damaged files
            raise FrameError(f"not an image that can be decoded ({type(error).__name__})") from error

    def _check_size(self) -> None:
        columns, rows = self._image.size
        check_image(rows, columns)
        if self.kind in ("JPEG", "MPO"):
            check_scans(self._data, rows, columns)

    def _page_numbers(self) -> list[int]:
        image = self._image
        if self.kind == "TIFF" and tiff_pages(self._data, MAX_TIFF_PAGES) > MAX_TIFF_PAGES:
            raise FrameError(f"more than {MAX_TIFF_PAGES} pages are too many")
        if self.kind == "GIF" and gif_pages(self._data, MAX_FRAMES) > MAX_FRAMES:
            raise FrameError(f"more than {MAX_FRAMES} pages are too many: cut the animation into parts")
        count = int(self._quietly(lambda: getattr(image, "n_frames", 1)))
        if self.kind == "MPO":
            self._notes.append(f"the JPEG holds {count} images; the first is read")
            return [0]
        if count > 1:
            unpacked = count * image.size[0] * image.size[1]
            check_frames(count, unpacked, len(self._data))
            check_unpacked(unpacked, len(self._data))
        if self.kind == "GIF" and not gif_is_whole(self._data):
            self.broken = "the GIF breaks off"
        if self.kind != "TIFF":
            self.broken = self.broken or _behind(self._data, image)
            return list(range(count))
        return self._tiff_pages(count)

    def _tiff_pages(self, count: int) -> list[int]:
        image = self._image
        promised = depth.imagej_pages(image.tag_v2.get(DESCRIPTION_TAG))
        if promised > count:
            self.broken = f"the TIFF promises {promised} pages and lists {count}"
        if count == 1:
            return [0]
        kept = []
        for number in range(count):
            self._quietly(lambda number=number: image.seek(number))
            # bit 0: a reduced copy of another page; bit 2: a transparency mask
            if not int(image.tag_v2.get(SUBFILE_TAG) or 0) & 5:
                kept.append(number)
        if len(kept) < count:
            self._notes.append(f"{count - len(kept)} reduced copies or masks inside the TIFF are left out")
        self._quietly(lambda: image.seek(kept[0] if kept else 0))
        return kept or [0]

    def _orientation(self) -> int:
        image = self._image
        found = (
            image.tag_v2.get(ORIENTATION_TAG)
            if self.kind == "TIFF"
            else self._quietly(lambda: image.getexif().get(ORIENTATION_TAG))
        )
        return int(found) if found in TURNS else 1

    def _upright(self, image: Any, orientation: int) -> Any:
        if self.kind == "TIFF" or orientation == 1:
            return image  # Pillow turns a TIFF when it is loaded
        from PIL import ImageOps

        return self._quietly(lambda: ImageOps.exif_transpose(image))

    def _pixels(
        self, image: Any, stored: depth.StoredCodes, notes: list[str]
    ) -> tuple[np.ndarray, PixelFormat, np.ndarray | None]:
        if stored.needs_window:
            if self._window is None:
                raise needs_window(stored.name)
            return apply_window(stored.codes_of(image), self._window), PixelFormat.GREY, None
        if self._window is not None:
            notes.append("the image has 8 bits: the window is not applied")
        indices = np.asarray(image).copy() if image.mode == "P" else None
        mode = _target_mode(image)
        if image.mode == "CMYK":
            notes.append("CMYK is converted to RGB without a colour profile")
        pixels = np.array(self._quietly(lambda: image if image.mode == mode else image.convert(mode)))
        if mode == "RGBA" and not (pixels[..., 3] == 255).all():
            notes.append("the image is transparent in places; transparency is left out of account")
        return pixels, {"L": PixelFormat.GREY, "RGB": PixelFormat.RGB, "RGBA": PixelFormat.RGBA}[mode], indices


def _check_kind(data: bytes) -> None:
    """Names what a file is that is no image which is read here.

    Raises:
        FrameError: it is such a file; the message says what to do.
    """
    start = data[:SNIFF_BYTES]
    strays = {
        b"version https://git-lfs": "a pointer of Git LFS, not the file itself: run git lfs pull",
        b"\x1f\x8b": "compressed by gzip: unpack it first",
        b"PK\x03\x04": "an archive or a document: unpack it first",
        b"\x93NUMPY": "a NumPy array: write it as PNG",
        b"NRRD": "NRRD: write it as PNG or .mha",
        b"<svg": "a drawing (SVG): write it as PNG",
        b"<?xml": "XML (a drawing, or annotations): write the image or the mask as PNG",
        b"{": "JSON (annotations?): write the mask as PNG",
        b"[": "JSON (annotations?): write the mask as PNG",
        b"%PDF": "a PDF: export the images in it",
        b"<!doctype html": "a web page, not the image: fetch it again",
        b"<html": "a web page, not the image: fetch it again",
    }
    what = next((text for magic, text in strays.items() if start.lower().startswith(magic.lower())), "")
    if not data:
        raise FrameError("not an image that can be decoded: the file is empty")
    if what:
        raise FrameError(f"not an image that can be decoded: it is {what}")
    if (kind := kind_of_bytes(start)) in OTHERS:
        raise FrameError(
            f"not an image that can be decoded here: it is {kind}, whatever its name says; convert it to PNG"
        )


def _behind(data: bytes, image: Any) -> str:
    """Why a file that Pillow gives one image of holds more of them, or ""."""
    if image.format == "JPEG" and (more := data.count(b"\xff\xd9\xff\xd8\xff")):
        return f"the file holds {more + 1} JPEG images one behind the other: name it .mjpeg, which is read as a video"
    if image.format == "PPM" and data[1:2] in b"456" and image.tile:
        offset = int(image.tile[0][2])
        columns, rows = image.size
        bits = {"1": 1, "L": 8, "RGB": 24, "I": 16}.get(image.mode if data[1:2] != b"4" else "1", 0)
        wide = 2 if depth.pnm_maximum(data) > 255 else 1
        size = rows * (-(-columns * bits // 8) if bits < 16 or image.mode == "RGB" else columns)
        size = size * wide if bits else 0
        rest = data[offset + size :].strip() if size else b""
        if rest[:1] == b"P" and rest[1:2] in b"456":
            return "the PNM holds several images one behind the other: write them as single files"
    return ""


def _target_mode(image: Any) -> str:
    """Pillow's mode that holds everything an 8-bit image shows.

    Raises:
        FrameError: a colour space that is not read.
    """
    if image.mode in ("1", "L"):
        return "RGBA" if "transparency" in image.info and image.mode == "L" else "L"
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa"):
        return "RGBA"
    if image.mode == "P":
        if "transparency" in image.info:
            return "RGBA"
        palette = np.array(image.getpalette("RGB") or [], np.uint8).reshape(-1, 3)
        return "L" if (palette == palette[:, :1]).all() else "RGB"
    if image.mode in ("RGB", "RGBX", "CMYK", "YCbCr"):
        return "RGB"
    raise FrameError(f"colour space {image.mode} is not read: convert it to RGB or grey")


def _neglected(image: Any) -> list[str]:
    notes = []
    profile = image.info.get("icc_profile")
    if profile and b"sRGB" not in profile and b"s\0R\0G\0B" not in profile:
        notes.append("a colour profile in the file is left out of account: codes are taken as stored")
    gamma = image.info.get("gamma")
    if gamma and abs(gamma - GAMMA) > 0.01:
        notes.append(f"a gamma of {gamma:g} in the file is left out of account: codes are taken as stored")
    return notes


def _aspect(info: dict[Any, Any], orientation: int) -> float | None:
    """Column spacing over row spacing, from densities across and down.

    Densities are pixels per length.
    """
    density = info.get("aspect") or info.get("jfif_density") or info.get("dpi") or info.get("resolution")
    try:
        across, down = density  # type: ignore[misc]  # anything else is no density
        ratio = float(down) / float(across)
    except (TypeError, ValueError, ZeroDivisionError):
        return None
    if not 0.1 < ratio < 10 or abs(ratio - 1) < 0.01:
        return None
    return 1 / ratio if orientation >= 5 else ratio


__all__ = [
    "DESCRIPTION_TAG",
    "FORMATS",
    "GAMMA",
    "MAX_FILE_BYTES",
    "MAX_TIFF_PAGES",
    "ORIENTATION_TAG",
    "SUBFILE_TAG",
    "DecodedImage",
    "OpenImage",
    "read_image",
    "read_pages",
]
