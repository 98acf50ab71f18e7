"""Folder of images: order, kinds, pages and orientation are those of the files, and nothing is left out silently."""

from __future__ import annotations

import struct
import zlib
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tinyusfm_runtime.errors import FrameError, IncompleteError, SourceError
from tinyusfm_runtime.frame import Frame, PixelFormat
from tinyusfm_runtime.images.decode import read_pages
from tinyusfm_runtime.overlay import encode_png
from tinyusfm_runtime.sources import open_source

Image = pytest.importorskip("PIL.Image", reason="install tinyusfm-edge[images]")


def picture(shade: int, rows: int = 16, cols: int = 24) -> np.ndarray:
    """A ramp that differs from shade to shade."""
    return ((np.arange(rows * cols, dtype=np.int64).reshape(rows, cols) + shade) % 251).astype(np.uint8)


def put(path: Path, pixels: np.ndarray, **options: Any) -> Path:
    Image.fromarray(pixels).save(path, **options)
    return path


def read(location: str | Path, **options: Any) -> tuple[list[Frame], tuple[str, ...], tuple[str, ...]]:
    """Frames, notes and doubts."""
    with open_source(str(location), **options) as source:
        frames = list(source)
        return frames, source.notes, source.doubts


def read_until_error(location: str | Path, **options: Any) -> tuple[int, SourceError]:
    count = 0
    with open_source(str(location), **options) as source, pytest.raises(SourceError) as caught:
        for _ in source:
            count += 1
    return count, caught.value


def test_folder_hands_over_codes_as_they_are(tmp_path: Path) -> None:
    colour = np.stack([picture(3), picture(4), picture(5)], axis=2)
    put(tmp_path / "10.png", picture(1))
    put(tmp_path / "9.png", picture(2))
    put(tmp_path / "11.png", colour)
    put(tmp_path / "12.bmp", picture(6))
    put(tmp_path / "13.tif", picture(7))
    put(tmp_path / "14.png", np.dstack([colour, picture(8)]))
    (tmp_path / "notes.txt").write_text("not an image", encoding="utf-8")
    frames, _, doubts = read(tmp_path, spacing_mm=(0.2, 0.3))
    assert [frame.pixel_format for frame in frames] == [
        PixelFormat.GREY, PixelFormat.GREY, PixelFormat.RGB, PixelFormat.GREY, PixelFormat.GREY, PixelFormat.RGBA,
    ]  # fmt: skip
    for frame, shade in zip([frames[0], frames[1], frames[3], frames[4]], (2, 1, 6, 7), strict=True):
        np.testing.assert_array_equal(frame.pixels, picture(shade))
    np.testing.assert_array_equal(frames[2].pixels, colour)
    np.testing.assert_array_equal(frames[5].pixels[..., :3], colour)
    assert {frame.spacing_mm for frame in frames} == {(0.2, 0.3)}
    assert [frame.seq for frame in frames] == list(range(6))
    assert doubts == ()


def test_every_common_type_is_read_by_content(tmp_path: Path) -> None:
    rgb = np.stack([picture(1)] * 3, axis=2)
    put(tmp_path / "1.webp", rgb, lossless=True)
    put(tmp_path / "2.gif", picture(2))
    put(tmp_path / "3.jfif", picture(3), format="JPEG")
    put(tmp_path / "4.jp2", picture(4))
    put(tmp_path / "5.pgm", picture(5))
    put(tmp_path / "6.tif", picture(6))
    put(tmp_path / "7", picture(7), format="PNG")
    put(tmp_path / "8.dat", picture(8), format="PNG")
    frames, _, doubts = read(tmp_path)
    assert len(frames) == 8 and doubts == ()
    for frame, shade in zip(frames, (1, 2, 3, 4, 5, 6, 7, 8), strict=True):
        grey = frame.pixels if frame.pixels.ndim == 2 else frame.pixels[..., 0]
        assert np.abs(grey.astype(int) - picture(shade)).mean() < (30 if shade == 3 else 1e-9)


def test_names_by_time_come_by_value(tmp_path: Path) -> None:
    for shade, name in ((2, "1700000000.3"), (1, "1700000000.2534"), (3, "1700000001.0")):
        put(tmp_path / f"{name}.png", picture(shade))
    frames, notes, _ = read(tmp_path)
    assert [int(frame.pixels[0, 0]) for frame in frames] == [1, 2, 3]
    assert any("decimal" in note for note in notes)


def test_ties_are_a_doubt(tmp_path: Path) -> None:
    for name in ("1.png", "01.png", "2.png"):
        put(tmp_path / name, picture(1))
    _, notes, doubts = read(tmp_path)
    assert any("same place" in note for note in notes) and any("order" in doubt for doubt in doubts)


def test_pages_of_tiff_and_gif_are_frames(tmp_path: Path) -> None:
    pages = [Image.fromarray(picture(shade)) for shade in range(4)]
    for name in ("a.tif", "b.gif"):
        pages[0].save(tmp_path / name, save_all=True, append_images=pages[1:])
        frames, _, doubts = read(tmp_path / name)
        assert [frame.seq for frame in frames] == [0, 1, 2, 3] and doubts == ()
    frames, *_ = read(tmp_path)
    assert [frame.seq for frame in frames] == list(range(8))


def test_orientation_is_obeyed_and_noted(tmp_path: Path) -> None:
    tags = Image.Exif()
    tags[274] = 6
    Image.fromarray(picture(1)).save(tmp_path / "a.png", exif=tags)
    frames, notes, doubts = read(tmp_path)
    np.testing.assert_array_equal(frames[0].pixels, np.rot90(picture(1), -1))
    assert any("orientation" in note for note in notes) and doubts == ()


def test_pixels_that_are_not_square_stretch_a_square_spacing(tmp_path: Path) -> None:
    put(tmp_path / "a.jpg", picture(1), dpi=(100, 200))
    frames, notes, _ = read(tmp_path, spacing_mm=(0.2, 0.2))
    assert frames[0].spacing_mm == pytest.approx((0.2, 0.4)) and any("not square" in note for note in notes)
    assert read(tmp_path, spacing_mm=(0.2, 0.4))[0][0].spacing_mm == (0.2, 0.4)
    assert "not square" in " ".join(read(tmp_path)[1])
    count, error = read_until_error(tmp_path, spacing_mm=(0.2, 0.1))
    assert count == 0 and "columns are 0.5 times" in str(error)


# what is left out is told


def test_images_of_other_kinds_are_counted_and_named(tmp_path: Path) -> None:
    put(tmp_path / "preview.png", picture(1))
    for name in "abc":
        (tmp_path / f"{name}.dcm").write_bytes(bytes(128) + b"DICM" + bytes(100))
    (tmp_path / "IM1").write_bytes(bytes(128) + b"DICM" + bytes(100))
    (tmp_path / "x.heic").write_bytes(bytes(4) + b"ftypheic" + bytes(40))
    (tmp_path / "clip.mp4").write_bytes(b"")
    put(tmp_path / ".hidden.png", picture(1))
    (tmp_path / "._a.png").write_bytes(b"\0\x05\x16\x07" + bytes(60))
    (tmp_path / "list.csv").write_text("a,b", encoding="utf-8")
    (tmp_path / "inside").mkdir()
    put(tmp_path / "inside" / "z.png", picture(1))
    frames, _, doubts = read(tmp_path)
    assert len(frames) == 1
    told = " | ".join(doubts)
    assert "4 DICOM" in told and "1 HEIC" in told and "1 video" in told and "hidden PNG" in told
    assert "1 image files in folders inside" in told
    assert "preview" not in told and "clip" not in told, "file names may hold a patient's name"


def test_a_folder_without_an_image_says_what_it_holds(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="holds no image"):
        open_source(str(tmp_path))
    (tmp_path / "a.nii.gz").write_bytes(b"x")
    with pytest.raises(SourceError, match="1 NIfTI.*convert"):
        open_source(str(tmp_path))
    (tmp_path / "a.nii.gz").unlink()
    (tmp_path / "inside").mkdir()
    put(tmp_path / "inside" / "z.png", picture(1))
    with pytest.raises(SourceError, match="folders inside hold 1"):
        open_source(str(tmp_path))
    with pytest.raises(SourceError, match="does not exist"):
        open_source(str(tmp_path / "gone.png"))


# files that cannot be read


def png_with_a_wrong_byte() -> bytes:
    data = bytearray(encode_png(picture(1)))
    data[60] ^= 0x10
    return bytes(data)


def sixteen_bit_png() -> bytes:
    body = zlib.compress(b"".join(b"\0" + bytes(2 * 24) for _ in range(16)))
    chunks = ((b"IHDR", struct.pack(">IIBBBBB", 24, 16, 16, 0, 0, 0, 0)), (b"IDAT", body), (b"IEND", b""))
    packed = (struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "can be decoded"),
        (b"this is no image", "can be decoded"),
        (encode_png(picture(1))[:-20], "breaks off"),
        (png_with_a_wrong_byte(), "damaged"),
        (sixteen_bit_png(), "16-bit image: give --window LO,HI"),
        (encode_png(picture(1, 4, 4)), "sides must be 8"),
    ],
    ids=["empty", "text", "truncated", "flipped", "16 bit", "tiny"],
)
def test_bad_image_is_named_by_its_index_after_the_good_ones(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "a1.png").write_bytes(encode_png(picture(1)))
    (tmp_path / "a2.png").write_bytes(content)
    count, error = read_until_error(tmp_path)
    assert count == 1 and isinstance(error, IncompleteError)
    assert "file 1 of 2" in str(error) and reason in str(error)
    assert "a2" not in str(error), "file names may hold a patient's name"
    assert "\n" not in str(error)
    (tmp_path / "a1.png").unlink()
    count, error = read_until_error(tmp_path)
    assert count == 0 and not isinstance(error, IncompleteError), "nothing good came before"


def test_deep_images_are_read_through_a_window(tmp_path: Path) -> None:
    put(tmp_path / "a.png", picture(1).astype(np.uint16) * 16)
    frames, *_ = read(tmp_path, window=(0, 4080))
    np.testing.assert_array_equal(frames[0].pixels, picture(1))


def test_a_folder_and_the_decoder_give_the_same_bytes(tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    for index, kind in enumerate(("PNG", "JPEG", "TIFF", "BMP", "PPM")):
        pixels = rng.integers(0, 256, (20, 30, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{index}.x", kind)
        (frame,) = read(f"folder:{tmp_path / f'{index}.x'}")[0]
        (page,) = read_pages((tmp_path / f"{index}.x").read_bytes())
        assert frame.pixels.tobytes() == page.pixels.tobytes()


def test_an_archive_is_no_image() -> None:
    stream = BytesIO(b"PK\3\4" + bytes(100))
    with pytest.raises(FrameError, match="not an image"):
        list(read_pages(stream.getvalue()))


def test_frames_carry_their_file_names_only_where_asked_for(tmp_path: Path) -> None:
    put(tmp_path / "b.png", picture(1))
    put(tmp_path / "a.png", picture(2))
    pages = [Image.fromarray(picture(shade)) for shade in (3, 4)]
    pages[0].save(tmp_path / "c.tif", save_all=True, append_images=pages[1:])
    plain, _, _ = read(tmp_path)
    named, _, _ = read(tmp_path, names=True)
    assert [frame.name for frame in plain] == [None] * 4
    assert [frame.name for frame in named] == ["a.png", "b.png", "c.tif#0", "c.tif#1"]
    assert all(
        np.array_equal(one.pixels, two.pixels) and one.seq == two.seq for one, two in zip(plain, named, strict=True)
    )
    assert "c.tif" not in repr(named[2])
