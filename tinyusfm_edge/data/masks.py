"""Masks as people store them, read from a file's bytes.

Label maps, palettes, colours, alpha, outlines.

Files are decoded as frames are (images/decode.py); their values are kept until mask_values.py has decided which are
foreground. Palettes are read as indices, alpha counts only where the colour is constant, an orientation is obeyed. It
does not know tables.

Shapes: HW rows, columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from tinyusfm_edge.data.mask_values import Foreground, MaskOptions, MaskPlane, ValueSpan, class_map, find_foreground
from tinyusfm_edge.data.outlines import fill_outlines, is_outline
from tinyusfm_runtime.errors import FrameError, InputError
from tinyusfm_runtime.images.decode import read_image


def read_mask(data: bytes, options: MaskOptions) -> Foreground:
    """Reads a mask.

    Args:
        data: content of the file.
        options: what is foreground, and what happens to outlines.

    Raises:
        InputError: not an image, or a mask that does not explain itself; begins with ``its``, ``it`` or a verb, for a
            name in front.
        MissingExtra: a library is missing.
    """
    found = find_foreground(read_plane(data), options)
    if options.fill_outline is False or not is_outline(found.mask_HW):
        return found
    if options.fill_outline is None:
        raise InputError(
            "it is an outline, not a filled mask: give --fill-outline, or --no-fill-outline for a shape that is thin"
        )
    return replace(found, mask_HW=fill_outlines(found.mask_HW))


def read_classes_map(data: bytes, classes: Mapping[str, ValueSpan]) -> np.ndarray:
    """A mask's classes, uint8 HW: 0 background, 1 the first class, and so on.

    Raises:
        InputError: not an image, or a value that no class has.
        MissingExtra: a library is missing.
    """
    return class_map(read_plane(data), classes)


def read_plane(data: bytes) -> MaskPlane:
    """A mask's values as the file holds them.

    Raises:
        InputError: not an image, damaged, or of several pages.
        MissingExtra: a library is missing.
    """
    try:
        # the window only asks for the codes of deep images, which are taken as they are stored
        image = read_image(data, window=(0.0, 1.0))
    except FrameError as error:
        raise InputError(f"it cannot be read: {error}") from error
    if image.codes is not None:
        return MaskPlane(codes_HW=_bare(image.codes))
    if image.indices is not None:
        return _with_palette(image.indices, image.pixels)
    return _split_channels(image.pixels)


def _with_palette(indices_HW: np.ndarray, pixels: np.ndarray) -> MaskPlane:
    """Indices, and the colours that the image shows for them."""
    colours = np.zeros(256, np.int64)
    shown = pixels.astype(np.int64)
    shown = shown * 0x010101 if pixels.ndim == 2 else shown[..., 0] << 16 | shown[..., 1] << 8 | shown[..., 2]
    colours[indices_HW] = shown
    return MaskPlane(codes_HW=indices_HW, kind="palette", palette=tuple(int(colour) for colour in colours))


def _split_channels(pixels: np.ndarray) -> MaskPlane:
    """The channels of a mask image, split into what they mean.

    Grey values where all channels are equal or there is one, alpha where the colour is constant, else
    colours.
    """
    if pixels.ndim == 2:
        return MaskPlane(codes_HW=_bare(pixels))
    if pixels.shape[2] == 4:
        colour, alpha = pixels[..., :-1], pixels[..., -1]
        constant = bool((colour == colour[0, 0]).all())
        if constant and not bool((alpha == alpha[0, 0]).all()):
            return MaskPlane(codes_HW=alpha)
        pixels = colour
    if bool((pixels == pixels[..., :1]).all()):
        return MaskPlane(codes_HW=_bare(pixels[..., 0]))
    codes = pixels.astype(np.int64)
    return MaskPlane(codes_HW=codes[..., 0] << 16 | codes[..., 1] << 8 | codes[..., 2], kind="colour")


def _bare(pixels: np.ndarray) -> np.ndarray:
    """Values that can be compared: no truth values, no NaN."""
    if pixels.dtype.kind == "f" and not bool(np.isfinite(pixels).all()):
        raise InputError("it holds values that are not finite")
    return np.ascontiguousarray(pixels)


__all__ = ["read_classes_map", "read_mask", "read_plane"]
