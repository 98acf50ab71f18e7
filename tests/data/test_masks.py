"""Masks as people store them: the foreground that was meant, or one line that names the option which says it."""

from __future__ import annotations

import io

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tinyusfm_edge.data.mask_values import MaskOptions, MaskPlane, find_foreground, read_classes, read_values
from tinyusfm_edge.data.masks import read_classes_map, read_mask
from tinyusfm_runtime.errors import EdgeError, InputError

ROWS, COLS = np.mgrid[0:120, 0:160]
TRUTH = (((ROWS - 60) / 30) ** 2 + ((COLS - 80) / 40) ** 2 <= 1).astype(np.uint8)
"""The mask that every file below stores."""
SECOND = TRUTH.copy()
SECOND[10:30, 10:30] = 2
"""Class ids: the mask is class 1."""
AS_IT_IS = MaskOptions()


def png(pixels: np.ndarray, suffix: str = ".png", *options: int) -> bytes:
    return bytes(cv2.imencode(suffix, pixels, list(options))[1])


def pillow(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def palette(codes: np.ndarray, *colours: tuple[int, int, int]) -> Image.Image:
    image = Image.fromarray(codes).convert("L")
    image = Image.frombytes("P", image.size, image.tobytes())
    image.putpalette([channel for colour in colours for channel in colour])
    return image


def coloured(colour: tuple[int, int, int]) -> np.ndarray:
    """Colour on black, blue first."""
    return TRUTH[..., None] * np.array(colour, np.uint8)


def with_alpha(colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    return np.dstack([colour, alpha])


UNASKED = {
    "0 and 255": png(TRUTH * 255),
    "0 and 1": png(TRUTH),
    "1 and 2": png(TRUTH + 1),
    "16 bits, 0 and 1": png(TRUTH.astype(np.uint16)),
    "16 bits, 0 and 65535": png(TRUTH.astype(np.uint16) * 65535),
    "TIFF": png(TRUTH * 255, ".tif"),
    "TIFF of 16 bits": png(TRUTH.astype(np.uint16) * 1000, ".tif"),
    "TIFF of floats": png(TRUTH.astype(np.float32), ".tiff"),
    "BMP": png(TRUTH * 255, ".bmp"),
    "one bit": pillow(Image.fromarray(TRUTH * 255).convert("1")),
    "GIF": pillow(Image.fromarray(TRUTH * 255), "GIF"),
    "palette of black and white": pillow(palette(TRUTH, (0, 0, 0), (255, 255, 255))),
    "grey as colour": png(np.dstack([TRUTH * 255] * 3)),
    "red on black": png(coloured((0, 0, 255))),
    "red on black, opaque": png(with_alpha(coloured((0, 0, 255)), np.full_like(TRUTH, 255))),
    "red on black, transparent outside": png(with_alpha(coloured((0, 0, 255)), TRUTH * 255)),
    "alpha of white": png(with_alpha(np.full((120, 160, 3), 255, np.uint8), TRUTH * 255)),
    "alpha of black": png(with_alpha(np.zeros((120, 160, 3), np.uint8), TRUTH * 255)),
    "grey and alpha": pillow(Image.merge("LA", (Image.new("L", (160, 120), 255), Image.fromarray(TRUTH * 255)))),
    "lossless WebP": png(np.dstack([TRUTH * 255] * 3), ".webp", cv2.IMWRITE_WEBP_QUALITY, 101),
}


@pytest.mark.parametrize("stored", UNASKED.values(), ids=UNASKED)
def test_masks_of_two_values_are_read_unasked(stored: bytes) -> None:
    assert np.array_equal(read_mask(stored, AS_IT_IS).mask_HW, TRUTH)


@pytest.mark.parametrize("quality", [30, 75, 95])
@pytest.mark.parametrize("colour", [(255, 255, 255), (0, 0, 255)])
def test_edges_that_jpeg_made_soft_are_cut_at_half(quality: int, colour: tuple[int, int, int]) -> None:
    found = read_mask(png(coloured(colour), ".jpg", cv2.IMWRITE_JPEG_QUALITY, quality), AS_IT_IS)
    assert found.soft and found.value is None
    differing = np.count_nonzero(found.mask_HW != TRUTH)
    assert differing <= 40, "of about 220 pixels at the edge"


@pytest.mark.parametrize("method", [cv2.INTER_LINEAR, cv2.INTER_CUBIC, cv2.INTER_LANCZOS4, cv2.INTER_AREA])
@pytest.mark.parametrize("factor", [0.5, 1.7, 4.0])
def test_edges_that_resizing_made_soft_are_cut_at_half(method: int, factor: float) -> None:
    resized = cv2.resize(TRUTH * 255, None, fx=factor, fy=factor, interpolation=method)
    assert np.array_equal(read_mask(png(resized), AS_IT_IS).mask_HW, (resized > 127).astype(np.uint8))


def test_empty_masks_are_empty_and_soft_masks_may_touch_the_border() -> None:
    assert not read_mask(png(TRUTH * 0), AS_IT_IS).mask_HW.any()
    cut = (TRUTH * 255)[:, 70:]
    assert np.array_equal(read_mask(png(cut), AS_IT_IS).mask_HW, TRUTH[:, 70:])


REFUSED = {
    "class ids": (png(SECOND), r"holds 3 values \(0, 1, 2\).*--mask-value 1.*--classes"),
    "class ids of 16 bits": (png(SECOND.astype(np.uint16) * 1000), r"\(0, 1000, 2000\).*--mask-value 1000"),
    "instances": (
        png((TRUTH * (1 + COLS // 40)).astype(np.uint8) * 40),
        "holds 4 values.*--mask-value",
    ),
    "a third value beside the object": (png(TRUTH * 255 + (SECOND == 2).astype(np.uint8) * 128), "holds 3 values"),
    "unknown border in between": (
        png(np.maximum(TRUTH * 255, cv2.dilate(TRUTH, np.ones((15, 15), np.uint8)) * 128)),
        r"\(0, 128, 255\).*--mask-value",
    ),
    "two colours": (png(coloured((0, 0, 255)) + (SECOND == 2)[..., None] * np.uint8([0, 255, 0])), "3 colours"),
    "colour on colour": (png(coloured((0, 0, 255)) + np.uint8([40, 0, 0])), "2 colours.*--mask-value '#"),
    "palette of colours": (pillow(palette(TRUTH, (0, 0, 0), (128, 0, 0))), r"1 \(#800000\).*--mask-value 1"),
    "palette of class ids": (
        pillow(palette(SECOND, (0, 0, 0), (128, 0, 0), (0, 128, 0))),
        r"palette.*2 \(#008000\).*--classes",
    ),
    "GIF of colours": (pillow(palette(TRUTH, (0, 0, 0), (128, 0, 0)), "GIF"), "palette"),
    "inverted": (png((1 - TRUTH) * 255), "most of the border.*--mask-value 0"),
    "inverted, 0 and 1": (png(1 - TRUTH), "most of the border.*--mask-value 0"),
    "inverted and soft": (png(255 - cv2.GaussianBlur(TRUTH * 255, (3, 3), 0)), "most of the border"),
    "full": (png(TRUTH * 0 + 255), "holds 255 everywhere.*--mask-value 255 says full"),
    "an image": (
        png(np.clip(60 + 40 * np.sin(ROWS / 9) * np.cos(COLS / 7) + ROWS, 0, 255).astype(np.uint8)),
        "class ids or an image",
    ),
    "noise": (png(np.random.default_rng(0).integers(0, 256, (120, 160), dtype=np.uint8)), "holds 256 values"),
    "probabilities": (png((np.exp(-((ROWS - 60) ** 2 + (COLS - 80) ** 2) / 900) * 255).astype(np.uint8)), "--mask-val"),
    "floats that are not finite": (png(np.where(TRUTH, np.nan, 0).astype(np.float32), ".tiff"), "no numbers"),
    "no image": (b"not an image", "not an image that can be decoded"),
    "half a file": (png(TRUTH * 255)[:-40], "breaks off"),
    "pages": (
        pillow(Image.fromarray(TRUTH * 255), "TIFF", save_all=True, append_images=[Image.fromarray(TRUTH)]),
        "holds 2 pages",
    ),
}


@pytest.mark.parametrize(("stored", "complaint"), REFUSED.values(), ids=REFUSED)
def test_masks_that_do_not_explain_themselves_are_refused(stored: bytes, complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        read_mask(stored, AS_IT_IS)


@pytest.mark.parametrize(
    ("stored", "asked"),
    [
        (png(SECOND), "1"),
        (png(SECOND.astype(np.uint16) * 1000), "1000"),
        (png(1 - TRUTH), "0"),
        (png((1 - TRUTH) * 255), "0"),
        (pillow(palette(SECOND, (0, 0, 0), (128, 0, 0), (0, 128, 0))), "1"),
        (pillow(palette(SECOND, (0, 0, 0), (128, 0, 0), (0, 128, 0))), "#800000"),
        (pillow(palette(SECOND + 4, *[(i, 0, 0) for i in range(7)]), "GIF"), "#050000"),
        (png(coloured((0, 0, 255)) + (SECOND == 2)[..., None] * np.uint8([0, 255, 0])), "#ff0000"),
        (png(TRUTH * 200 + (SECOND == 2).astype(np.uint8) * 50), "100-255"),
        (png((TRUTH * 0.7 + 0.1).astype(np.float32), ".tiff"), "0.5-1"),
        (png((1 + COLS // 40).astype(np.uint8) * TRUTH), "1,2,3,4"),
        (png(TRUTH * 255), "#ffffff"),
    ],
)
def test_a_named_value_is_the_foreground(stored: bytes, asked: str) -> None:
    assert np.array_equal(read_mask(stored, MaskOptions(values=read_values(asked))).mask_HW, TRUTH)


def test_named_classes_are_foreground_together_and_others_an_error() -> None:
    options = MaskOptions(classes=read_classes("head=1, cord=2"))
    assert np.array_equal(read_mask(png(SECOND), options).mask_HW, (SECOND > 0).astype(np.uint8))
    assert np.array_equal(read_classes_map(png(SECOND), options.classes), SECOND)
    assert read_classes("1=head,2=cord") == options.classes
    with pytest.raises(InputError, match="does not name: 2"):
        read_mask(png(SECOND), MaskOptions(classes=read_classes("head=1")))
    with pytest.raises(InputError, match=r"it is in colour.*#ff0000"):
        read_mask(png(coloured((0, 0, 255))), MaskOptions(values=read_values("255")))


@pytest.mark.parametrize("typed", ["x", "1-", "3-1", "#12", "#gggggg", "-4", "1;2"])
def test_values_that_are_none_are_refused(typed: str) -> None:
    with pytest.raises(InputError, match="--mask-value"):
        read_values(typed)


@pytest.mark.parametrize("typed", ["head", "head=", "=1", "head=1,head=2", "head=1,cord=1", "head=x"])
def test_classes_that_are_none_are_refused(typed: str) -> None:
    with pytest.raises(InputError, match="--classes"):
        read_classes(typed)


def test_an_orientation_of_a_mask_is_obeyed() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = np.rot90(TRUTH, 1)
    assert np.array_equal(
        read_mask(pillow(Image.fromarray(np.ascontiguousarray(turned) * 255), exif=exif), AS_IT_IS).mask_HW, TRUTH
    )
    stored = pillow(palette(np.ascontiguousarray(turned), (0, 0, 0), (128, 0, 0)), exif=exif)
    assert np.array_equal(read_mask(stored, MaskOptions(values=read_values("1"))).mask_HW, TRUTH)


@given(st.integers(1, 254), st.integers(1, 255), st.integers(0, 10_000))
@settings(max_examples=60, deadline=None)
def test_any_two_grey_values_are_background_and_foreground(low: int, step: int, seed: int) -> None:
    high = min(255, low + step)
    rng = np.random.default_rng(seed)
    mask = np.zeros((40, 50), np.uint8)
    row, col, height, width = rng.integers(1, 18, 4)
    mask[row : row + height, col : col + width] = 1
    plane = MaskPlane(codes_HW=np.where(mask, high, low).astype(np.uint8))
    if high == low:
        return
    assert np.array_equal(find_foreground(plane, AS_IT_IS).mask_HW, mask)


@given(st.binary(max_size=300))
@settings(max_examples=150, deadline=None)
def test_any_bytes_are_a_mask_or_a_typed_error(content: bytes) -> None:
    for start in (b"", png(TRUTH[:16, :16])[:40], b"GIF89a", b"BM", b"II*\0"):
        try:
            found = read_mask(start + content, AS_IT_IS)
            assert found.mask_HW.max() <= 1
        except EdgeError as error:
            assert "\n" not in str(error)
