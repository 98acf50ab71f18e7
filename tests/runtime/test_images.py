"""Still images: the one decoder gives what a viewer shows, or says why it does not."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from io import BytesIO
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyusfm_runtime.errors import FrameError, InputError
from tinyusfm_runtime.frame import PixelFormat
from tinyusfm_runtime.images.decode import DecodedImage, OpenImage, read_image, read_pages
from tinyusfm_runtime.images.kinds import READABLE, kind_of_bytes
from tinyusfm_runtime.images.window import apply_window

Image = pytest.importorskip("PIL.Image", reason="install tinyusfm-edge[images]")

GREY = ((np.arange(16 * 24).reshape(16, 24) * 7) % 251).astype(np.uint8)
COLOUR = np.stack([GREY, GREY[::-1], 255 - GREY], axis=-1)
DEEP = (GREY.astype(np.uint16) * 16 + 5).astype(np.uint16)
"""12-bit codes in 16 bits."""
UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
    8: lambda a: np.rot90(a, 1),
}
"""Stored -> shown, by EXIF 2.32, 4.6.4: where row 0 and column 0 of the stored image lie."""


def saved(image: Any, kind: str, **options: Any) -> bytes:
    stream = BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def picture(pixels: np.ndarray, kind: str = "PNG", **options: Any) -> bytes:
    return saved(Image.fromarray(pixels), kind, **options)


def png(pixels: np.ndarray, bits: int, colour_type: int, more: bytes = b"") -> bytes:
    """A PNG by its specification, for kinds that Pillow does not write."""
    rows = pixels.shape[0]
    raw = pixels.astype(">u2").tobytes() if bits == 16 else pixels.astype(np.uint8).tobytes()
    width = len(raw) // rows
    body = zlib.compress(b"".join(b"\0" + raw[row * width : (row + 1) * width] for row in range(rows)))
    header = struct.pack(">IIBBBBB", pixels.shape[1], rows, bits, colour_type, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", body), (b"IEND", b""))
    packed = (struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def exif(orientation: int) -> Any:
    tags = Image.Exif()
    tags[274] = orientation
    return tags


# every kind


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "GIF", "WEBP", "BMP", "JPEG2000", "PPM"])
def test_grey_comes_back_code_by_code(kind: str) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    pixels = GREY if kind != "WEBP" else np.stack([GREY] * 3, axis=-1)
    found = read_image(picture(pixels, kind, **options))
    shown = found.pixels if found.pixels.ndim == 2 else found.pixels[..., 0]
    np.testing.assert_array_equal(shown, GREY)
    assert kind_of_bytes(picture(pixels, kind, **options)[:132]) in READABLE


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP", "BMP", "JPEG2000", "PPM"])
def test_colour_comes_back_as_rgb(kind: str) -> None:
    found = read_image(picture(COLOUR, kind, **({"lossless": True} if kind == "WEBP" else {})))
    assert found.pixel_format is PixelFormat.RGB
    np.testing.assert_array_equal(found.pixels, COLOUR)


def test_jpeg_equals_pillow_and_comes_near_its_source() -> None:
    smooth = np.add.outer(np.arange(32), np.arange(48) * 3).astype(np.uint8)
    found = read_image(picture(smooth, "JPEG", quality=95))
    assert found.pixel_format is PixelFormat.GREY
    assert np.abs(found.pixels.astype(int) - smooth).max() <= 4


# orientation


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP"])
def test_orientation_is_obeyed_and_noted(kind: str, orientation: int) -> None:
    stored = np.repeat(np.repeat(np.array([[10, 90, 170], [50, 130, 250]], np.uint8), 16, 0), 16, 1)
    source = Image.fromarray(stored)
    if kind == "TIFF":
        data = saved(source, kind, tiffinfo={274: orientation})
    else:
        data = saved(source.convert("RGB") if kind == "WEBP" else source, kind, exif=exif(orientation))
    found = read_image(data)
    shown = found.pixels if found.pixels.ndim == 2 else found.pixels[..., 0]
    want = UPRIGHT[orientation](stored)
    assert shown.shape == want.shape
    np.testing.assert_allclose(shown[8::16, 8::16].astype(int), want[8::16, 8::16].astype(int), atol=6)
    assert found.orientation == orientation and found.stored_size == stored.shape
    assert any("orientation" in note for note in found.notes) == (orientation != 1)


def test_an_orientation_that_does_not_exist_changes_nothing() -> None:
    found = read_image(saved(Image.fromarray(GREY), "PNG", exif=exif(99)))
    np.testing.assert_array_equal(found.pixels, GREY)
    assert found.orientation == 1


# palette, transparency, polarity


@pytest.mark.parametrize("kind", ["PNG", "GIF", "TIFF", "BMP"])
def test_palette_becomes_its_colours_and_keeps_its_indices(kind: str) -> None:
    indices = (GREY % 4).astype(np.uint8)
    colours = np.array([[0, 0, 0], [255, 0, 0], [0, 200, 0], [0, 0, 90]], np.uint8)
    source = Image.fromarray(indices)
    source.putpalette(colours.tobytes())
    found = read_image(saved(source, kind))
    assert found.pixel_format is PixelFormat.RGB
    np.testing.assert_array_equal(found.pixels, colours[indices])
    if kind != "GIF":  # a GIF is written with its palette sorted
        assert found.indices is not None
        np.testing.assert_array_equal(found.indices, indices)


def test_a_palette_of_greys_is_grey() -> None:
    indices = (GREY % 4).astype(np.uint8)
    levels = np.array([0, 80, 160, 240], np.uint8)
    source = Image.fromarray(indices)
    source.putpalette(np.repeat(levels, 3).tobytes())
    found = read_image(saved(source, "PNG"))
    assert found.pixel_format is PixelFormat.GREY
    np.testing.assert_array_equal(found.pixels, levels[indices])


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_transparency_is_carried_and_its_neglect_noted(kind: str) -> None:
    rgba = np.dstack([COLOUR, np.where(GREY > 100, 255, 7).astype(np.uint8)])
    found = read_image(picture(rgba, kind, **({"lossless": True, "exact": True} if kind == "WEBP" else {})))
    assert found.pixel_format is PixelFormat.RGBA
    np.testing.assert_array_equal(found.pixels, rgba)
    assert any("transparen" in note for note in found.notes)
    opaque = read_image(
        picture(np.dstack([COLOUR, np.full_like(GREY, 255)]), kind, **({"lossless": True} if kind == "WEBP" else {}))
    )
    assert not any("transparen" in note for note in opaque.notes)


def test_grey_with_transparency_and_one_bit_images() -> None:
    la = saved(Image.merge("LA", [Image.fromarray(GREY), Image.fromarray(255 - GREY)]), "PNG")
    np.testing.assert_array_equal(read_image(la).pixels, np.dstack([GREY, GREY, GREY, 255 - GREY]))
    bits = GREY > 120
    for kind in ("PNG", "TIFF", "BMP", "PPM"):
        found = read_image(saved(Image.fromarray(GREY).point(lambda v: 255 * (v > 120)).convert("1", dither=0), kind))
        np.testing.assert_array_equal(found.pixels, bits * np.uint8(255))


def test_tiff_whose_zero_is_white_is_shown_so() -> None:
    data = bytearray(picture(GREY, "TIFF"))
    at = data.index(struct.pack("<HHI", 262, 3, 1))
    data[at + 8] = 0  # PhotometricInterpretation: WhiteIsZero
    np.testing.assert_array_equal(read_image(bytes(data)).pixels, 255 - GREY)


def test_cmyk_is_converted_and_said() -> None:
    found = read_image(saved(Image.fromarray(COLOUR).convert("CMYK"), "TIFF"))
    assert found.pixel_format is PixelFormat.RGB and any("CMYK" in note for note in found.notes)


def test_profile_and_gamma_are_left_out_of_account_and_said() -> None:
    assert any("profile" in n for n in read_image(picture(GREY, "PNG", icc_profile=b"x" * 200)).notes)
    plain = picture(GREY)
    chunk = b"gAMA" + struct.pack(">I", 100000)
    gamma = plain[:33] + struct.pack(">I", 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) + plain[33:]
    assert any("gamma" in n for n in read_image(gamma).notes)
    assert read_image(plain).notes == ()


# more than 8 bits


def deep_files() -> dict[str, bytes]:
    deep_png = png(DEEP, 16, 0)
    return {
        "PNG": deep_png,
        "TIFF": picture(DEEP, "TIFF"),
        "TIFF MSB": saved(Image.frombytes("I;16B", (24, 16), DEEP.astype(">u2").tobytes()), "TIFF"),
        "TIFF 32": picture(DEEP.astype(np.int32), "TIFF"),
        "TIFF float": picture(DEEP.astype(np.float32), "TIFF"),
        "JP2": picture(DEEP, "JPEG2000"),
        "PGM 65535": b"P5\n24 16\n65535\n" + DEEP.astype(">u2").tobytes(),
        "PGM 4095": b"P5\n# a comment\n24 16\n4095\n" + DEEP.astype(">u2").tobytes(),
    }


@pytest.mark.parametrize("kind", sorted(deep_files()))
def test_deep_images_are_refused_without_a_window_and_exact_with_one(kind: str) -> None:
    data = deep_files()[kind]
    with pytest.raises(FrameError, match=r"bit.*--window LO,HI"):
        read_image(data)
    found = read_image(data, window=(0, 4095))
    assert found.windowed and found.pixel_format is PixelFormat.GREY
    np.testing.assert_array_equal(found.pixels, np.floor(DEEP * 255.0 / 4095 + 0.5).astype(np.uint8))


@pytest.mark.parametrize(
    "data",
    [
        png(np.stack([DEEP] * 3, axis=-1), 16, 2),
        png(np.stack([DEEP] * 2, axis=-1), 16, 4),
        png(np.stack([DEEP] * 4, axis=-1), 16, 6),
        b"P6\n24 16\n65535\n" + np.stack([DEEP] * 3, axis=-1).astype(">u2").tobytes(),
    ],
    ids=["PNG RGB", "PNG grey alpha", "PNG RGBA", "PPM"],
)
def test_deep_colour_is_never_cut_to_its_high_bytes(data: bytes) -> None:
    with pytest.raises(FrameError, match="--window"):
        read_image(data)
    with pytest.raises(FrameError, match="several channels"):
        read_image(data, window=(0, 4095))


def test_signed_codes_need_a_window_too() -> None:
    stream = BytesIO()
    Image.fromarray(GREY).save(stream, "TIFF", tiffinfo={339: 2})
    with pytest.raises(FrameError, match="signed"):
        read_image(stream.getvalue())
    want = apply_window(GREY.view(np.int8), (-128, 127))
    np.testing.assert_array_equal(read_image(stream.getvalue(), window=(-128, 127)).pixels, want)


def test_a_window_leaves_eight_bits_alone_and_says_so() -> None:
    found = read_image(picture(GREY), window=(0, 4095))
    np.testing.assert_array_equal(found.pixels, GREY)
    assert not found.windowed and any("window is not applied" in note for note in found.notes)


@given(
    st.lists(st.integers(-40000, 70000), min_size=1, max_size=40),
    st.integers(-30000, 60000),
    st.integers(1, 60000),
)
@settings(max_examples=60, deadline=None)
def test_window_is_its_formula_and_rises(codes: list[int], low: int, width: int) -> None:
    array = np.sort(np.array(codes, np.int64))
    found = apply_window(array, (low, low + width))
    exact = np.floor((np.clip(array, low, low + width) - low) * 255 / width + 0.5)
    assert np.abs(found.astype(int) - exact).max() <= 1 and (np.diff(found.astype(int)) >= 0).all()
    assert found.dtype == np.uint8


@pytest.mark.parametrize("window", [(5, 5), (9, 2), (float("nan"), 1), (0, float("inf"))])
def test_a_window_without_two_ends_is_refused(window: tuple[float, float]) -> None:
    with pytest.raises(InputError, match="window"):
        apply_window(DEEP, window)
    with pytest.raises(FrameError, match="NaN"):
        apply_window(np.array([1.0, np.nan]), (0, 1))


# pages


def frames_of(data: bytes) -> list[DecodedImage]:
    return list(read_pages(data))


def stack(kind: str, count: int = 3, **options: Any) -> bytes:
    pages = [Image.fromarray(GREY + np.uint8(shade)) for shade in range(count)]
    if kind == "WEBP":
        pages, options = [page.convert("RGB") for page in pages], {"lossless": True, **options}
    return saved(pages[0], kind, save_all=True, append_images=pages[1:], **options)


@pytest.mark.parametrize("kind", ["TIFF", "GIF", "PNG", "WEBP"])
def test_pages_come_in_order_and_are_whole(kind: str) -> None:
    found = frames_of(stack(kind, **({} if kind == "TIFF" else {"duration": 40})))
    assert [page.index for page in found] == [0, 1, 2]
    for shade, page in enumerate(found):
        shown = page.pixels if page.pixels.ndim == 2 else page.pixels[..., 0]
        np.testing.assert_array_equal(shown, GREY + np.uint8(shade))
    assert [page.start_ms for page in found] == ([None] * 3 if kind == "TIFF" else [0, 40, 80])
    with pytest.raises(FrameError, match="3 pages"):
        read_image(stack(kind))


def test_reduced_copies_in_a_tiff_are_no_pages() -> None:
    small = Image.fromarray(GREY[:8, :12])
    small.encoderinfo = {"tiffinfo": {254: 1}}
    data = saved(Image.fromarray(GREY), "TIFF", save_all=True, append_images=[small])
    with OpenImage(data) as opened:
        assert opened.pages == 1
        np.testing.assert_array_equal(opened.page(0).pixels, GREY)
    assert any("reduced" in note for note in read_image(data).notes)


def test_the_first_of_a_jpeg_of_several_is_read_and_said() -> None:
    data = stack("MPO", quality=95)
    found = read_image(data)
    assert np.abs(found.pixels.astype(int) - GREY).mean() < 30 and any("holds 3 images" in n for n in found.notes)


# files that end early, or lie


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP", "BMP", "JPEG2000", "PPM", "GIF"])
@pytest.mark.parametrize("keep", [0.0, 0.1, 0.5, 0.9, -2])
def test_a_file_that_ends_early_is_never_an_image(kind: str, keep: float) -> None:
    noise = np.random.default_rng(3).integers(0, 256, (64, 64), np.uint8)
    data = saved(Image.fromarray(noise).convert("RGB" if kind == "WEBP" else "L"), kind)
    cut = data[: keep if isinstance(keep, int) else int(len(data) * keep)]
    with pytest.raises(FrameError):
        for _ in read_pages(cut):
            pass


def test_a_preview_inside_a_jpeg_is_not_its_end() -> None:
    preview = picture(GREY, "JPEG")
    data = picture(np.random.default_rng(3).integers(0, 256, (64, 64), np.uint8), "JPEG")
    app1 = b"\xff\xe5" + struct.pack(">H", len(preview) + 2) + preview
    whole = data[:2] + app1 + data[2:]
    assert read_image(whole).pixels.shape == (64, 64)
    with pytest.raises(FrameError, match="breaks off"):
        read_image(whole[: len(whole) - 200])


def test_padding_behind_the_end_is_no_damage() -> None:
    for kind in ("PNG", "JPEG", "GIF"):
        np.testing.assert_array_equal(
            read_image(picture(GREY, kind) + bytes(64)).pixels, read_image(picture(GREY, kind)).pixels
        )


def test_a_gif_that_breaks_off_gives_its_whole_frames_first() -> None:
    data = stack("GIF", 4)
    pages = read_pages(data[:-1])
    assert len([next(pages) for _ in range(4)]) == 4
    with pytest.raises(FrameError, match="GIF breaks off"):
        next(pages)


def test_an_imagej_stack_with_one_page_entry_is_not_taken_for_whole() -> None:
    data = saved(Image.fromarray(GREY), "TIFF", tiffinfo={270: "ImageJ=1.53\nimages=20\nslices=20\n"})
    pages = read_pages(data)
    next(pages)
    with pytest.raises(FrameError, match="promises 20 pages and lists 1"):
        next(pages)


@pytest.mark.parametrize("side", [16384, 32000, 65000])
def test_a_small_file_of_a_huge_image_is_refused_before_it_is_unpacked(side: int) -> None:
    header = struct.pack(">IIBBBBB", side, side, 8, 6, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b""))
    packed = (struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks)
    with pytest.raises(FrameError, match="too large|too many|million"):
        read_image(b"\x89PNG\r\n\x1a\n" + b"".join(packed))


@given(
    st.binary(max_size=300), st.sampled_from([b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"II*\0", b"GIF89a", b"P5\n"])
)
@settings(max_examples=150, deadline=None)
def test_any_bytes_give_an_image_or_a_typed_refusal(rest: bytes, start: bytes) -> None:
    try:
        for page in read_pages(start + rest):
            assert page.pixels.dtype == np.uint8
    except FrameError as error:
        assert "\n" not in str(error)


def test_pixels_that_are_not_square_are_told() -> None:
    assert read_image(saved(Image.fromarray(GREY), "JPEG", dpi=(100, 200))).aspect == pytest.approx(2.0)
    assert read_image(saved(Image.fromarray(GREY), "PNG", dpi=(200, 100))).aspect == pytest.approx(0.5, rel=0.01)
    turned = saved(Image.fromarray(GREY), "JPEG", dpi=(100, 200), exif=exif(6))
    assert read_image(turned).aspect == pytest.approx(0.5)
    assert read_image(saved(Image.fromarray(GREY), "TIFF", dpi=(96, 96))).aspect is None


# files that are something else, or hold more than one image


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "the file is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 12\n", "git lfs pull"),
        (b"<!DOCTYPE html><title>404</title>", "web page"),
        (b"\x1f\x8b\x08\0" + bytes(40), "gzip"),
        (b"PK\x03\x04" + bytes(40), "archive"),
        (b"%PDF-1.7\n", "PDF"),
        (b"\x93NUMPY\x01\0" + bytes(40), "NumPy"),
        (b'{"shapes": []}', "JSON"),
        (b"<?xml version='1.0'?><annotation/>", "XML"),
        (b"\0\0\0\x18ftypheic" + bytes(200), "HEIC"),
        (b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(40), "JPEG XL"),
        (bytes(128) + b"DICM" + bytes(40), "DICOM"),
        (b"P7\nWIDTH 8\nHEIGHT 8\nDEPTH 1\nMAXVAL 255\nENDHDR\n" + bytes(64), "PAM"),
    ],
)
def test_what_is_no_image_says_what_it_is(content: bytes, words: str) -> None:
    with pytest.raises(FrameError, match=words):
        read_image(content)


@pytest.mark.parametrize(("kind", "mend"), [("12-bit", "djpeg"), ("lossless", "djpeg"), ("JPEG-LS", "PNG")])
def test_kinds_of_jpeg_that_nothing_here_decodes_are_named(kind: str, mend: str) -> None:
    data = bytearray(jpeg_of(np.full((16, 16), 90, np.uint8)))
    at = data.find(b"\xff\xc0")
    data[at + 1], data[at + 4] = {"12-bit": (0xC1, 12), "lossless": (0xC3, 8), "JPEG-LS": (0xF7, 8)}[kind]
    with pytest.raises(FrameError, match=f"{kind}.*{mend}"):
        read_image(bytes(data))


def jpeg_of(pixels: np.ndarray) -> bytes:
    stream = BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG")
    return stream.getvalue()


@pytest.mark.parametrize("kind", ["JPEG", "PNM", "deep PNM"])
def test_images_one_behind_the_other_are_not_taken_for_one(kind: str) -> None:
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    one = {
        "JPEG": jpeg_of(grey),
        "PNM": b"P5\n16 16\n255\n" + grey.tobytes(),
        "deep PNM": b"P5\n16 16\n1023\n" + grey.astype(">u2").tobytes(),
    }[kind]
    assert read_image(one, window=(0, 255)).pixels.shape == (16, 16)
    assert read_image(one + b"\n", window=(0, 255)).pixels.shape == (16, 16)
    pages = read_pages(one * 3, window=(0, 255))
    assert next(pages).pixels.shape == (16, 16), "the first one comes"
    with pytest.raises(FrameError, match="one behind the other"):
        next(pages)
    with pytest.raises(FrameError, match="one behind the other"):
        read_image(one * 3, window=(0, 255))


def test_a_float_map_needs_a_window_and_is_exact() -> None:
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    data = b"Pf\n16 16\n-1.0\n" + grey[::-1].astype("<f4").tobytes()
    with pytest.raises(FrameError, match="--window"):
        read_image(data)
    np.testing.assert_array_equal(read_image(data, window=(0, 255)).pixels, grey)
