"""Small files that ask for much memory or time: each is refused in one line before either is taken."""

from __future__ import annotations

import struct
import tracemalloc
import zlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tinyusfm_runtime.errors import EdgeError, FrameError, SourceError
from tinyusfm_runtime.images import limits
from tinyusfm_runtime.images.decode import read_image, read_pages
from tinyusfm_runtime.images.whole import gif_pages
from tinyusfm_runtime.images.window import apply_window
from tinyusfm_runtime.sources import open_source

Image = pytest.importorskip("PIL.Image", reason="install tinyusfm-edge[images]")


def png(rows: int, columns: int, *, kind: int = 0, depth: int = 8) -> bytes:
    head = struct.pack(">IIBBBBB", columns, rows, depth, kind, 0, 0, 0)
    chunks = ((b"IHDR", head), (b"IDAT", zlib.compress(bytes(4096))), (b"IEND", b""))
    packed = (struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def with_text(length: int) -> bytes:
    """A good image with a text that unpacks to so many bytes."""
    text = b"a\0\0" + zlib.compress(bytes(length), 9)
    good = BytesIO()
    Image.new("L", (64, 64)).save(good, "PNG")
    chunk = struct.pack(">I", len(text)) + b"zTXt" + text + struct.pack(">I", zlib.crc32(b"zTXt" + text))
    return good.getvalue()[:33] + chunk + good.getvalue()[33:]


def tiff(pages: int) -> bytes:
    """A chain of page entries that share their pixels."""
    entries = [(256, 64), (257, 64), (258, 8), (259, 1), (262, 1), (273, 8), (277, 1), (278, 64), (279, 4096)]
    page = struct.pack("<H", 9) + b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries)
    size = len(page) + 4
    links = (8 + (number + 1) * size if number + 1 < pages else 0 for number in range(pages))
    return b"II*\0" + struct.pack("<I", 8) + b"".join(page + struct.pack("<I", link) for link in links) + bytes(4096)


def scans(count: int) -> bytes:
    """A progressive JPEG whose last scan stands there so many times."""
    stream = BytesIO()
    Image.new("L", (1024, 1024)).save(stream, "JPEG", progressive=True)
    data = stream.getvalue()
    last, end = data.rfind(b"\xff\xda"), data.rfind(b"\xff\xd9")
    return data[:last] + data[last:end] * count + data[end:]


def jpeg2000(side: int) -> bytes:
    stream = BytesIO()
    Image.new("L", (64, 64)).save(stream, "JPEG2000")
    data = bytearray(stream.getvalue())
    at = data.find(b"\xff\x4f\xff\x51")
    data[at + 8 : at + 16] = struct.pack(">II", side, side)
    return bytes(data)


def gif(side: int) -> bytes:
    return b"GIF89a" + struct.pack("<HHBBB", side, side, 0x80, 0, 0) + bytes(6) + (
        b"," + struct.pack("<HHHHB", 0, 0, 1, 1, 0) + b"\2\2D\1\0;"
    )  # fmt: skip


@pytest.mark.parametrize(
    "make",
    [
        lambda: png(8192, 8192), lambda: png(6000, 6000, kind=6), lambda: png(60_000, 600, kind=0, depth=16),
        lambda: with_text(64 << 20), lambda: tiff(10_001), lambda: scans(2_000), lambda: jpeg2000(60_000),
        lambda: gif(8192), lambda: b"P5 60000 60000 255\n" + bytes(100),
    ],
    ids=["grey", "rgba", "16 bits", "text", "pages", "scans", "jpeg 2000", "gif", "pnm"],
)  # fmt: skip
def test_images(make: Callable[[], bytes]) -> None:
    data = make()
    tracemalloc.start()
    try:
        with pytest.raises(FrameError) as caught:
            read_image(data, window=(0, 255))
        assert tracemalloc.get_traced_memory()[1] < 32 << 20
    finally:
        tracemalloc.stop()
    assert "\n" not in str(caught.value)


def test_what_people_have_is_far_below_the_limits() -> None:
    assert read_image(with_text(1 << 16)).pixels.shape == (64, 64)
    assert read_image(scans(20)).pixels.shape == (1024, 1024)
    limits.check_image(1536, 2048, 4)
    limits.check_unpacked(900 << 20, 1 << 20)  # a minute of an empty screen
    with pytest.raises(FrameError, match="no recording packs so well"):
        limits.check_unpacked(2 << 30, 4 << 20)


def test_a_window_maps_block_by_block_what_it_maps_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    codes = np.random.default_rng(0).integers(0, 4096, (37, 50), np.uint16)
    whole = apply_window(codes, (100, 3000))
    monkeypatch.setattr("tinyusfm_runtime.images.window.BLOCK_CODES", 60)
    np.testing.assert_array_equal(apply_window(codes, (100, 3000)), whole)
    assert apply_window(codes[:0], (0, 1)).shape == (0, 50)


def mha(data: bytes, size: str, kind: str = "MET_UCHAR", more: str = "") -> bytes:
    head = f"ObjectType = Image\nNDims = 3\nBinaryData = True\nCompressedData = True\nDimSize = {size}\n{more}"
    return f"{head}ElementType = {kind}\nElementDataFile = LOCAL\n".encode() + data


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (mha(zlib.compress(bytes(1 << 20)), "16384 16384 1"), "million"),
        (mha(zlib.compress(bytes(1 << 20)), "4096 4096 1", "MET_DOUBLE", "ElementNumberOfChannels = 4\n"), "256 MiB"),
        (mha(zlib.compress(bytes(1 << 20)), "5000 5000 1"), "cannot be an image"),
        (mha(zlib.compress(bytes(32 << 20), 9), "4096 4096 100"), "no recording"),
        (mha(zlib.compress(bytes(64 << 20), 9), "8 8 1000000"), "at most 100000"),
        (mha(zlib.compress(bytes(6 << 20), 9), "8 8 98304"), "98304 frames in .* bytes are refused"),
        (mha(b"", "64 64 1", more="".join(f"K{i} = 1\n" for i in range(5000))), "4096 fields"),
    ],
    ids=["side", "bytes", "not there", "ratio", "a million frames", "many in few bytes", "fields"],
)
def test_metaimages(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.mha").write_bytes(content)
    with pytest.raises(EdgeError, match=message):
        open_source(str(tmp_path / "a.mha"), window=(0, 1))


def test_frames_of_one_file_have_a_ceiling() -> None:
    limits.check_frames(100_000, 1 << 40, 1 << 33)
    limits.check_frames(10_000, 10_000 * 4096, 400)
    for frames, packed in ((100_001, 1 << 40), (10_001, 400)):
        with pytest.raises(FrameError, match="too many|refused"):
            limits.check_frames(frames, frames * 4096, packed)


def test_a_recording_of_many_frames_is_read(tmp_path: Path) -> None:
    """Above FREE_FRAMES, with noise that does not pack."""
    noise = np.random.default_rng(0).integers(0, 256, 10_500 * 64, np.uint8).tobytes()
    (tmp_path / "a.mha").write_bytes(mha(zlib.compress(noise, 1), "8 8 10500"))
    with open_source(str(tmp_path / "a.mha")) as source:
        assert sum(1 for _ in source) == 10_500


@pytest.mark.parametrize(
    ("side", "pages", "message"),
    [
        (8, 100_100, "more than 100000 pages"),
        (64, 20_000, "20000 frames in"),
        (4096, 200, "no recording packs so well"),
    ],
    ids=["pages", "in few bytes", "canvas"],
)
def test_animations(side: int, pages: int, message: str) -> None:
    one = gif(side)
    data = one[:19] + one[19:-1] * pages + b";"
    with pytest.raises(FrameError, match=message):
        next(read_pages(data))
    assert gif_pages(data, 1000) == min(pages, 1001) and gif_pages(one, 1000) == 1


def test_pages_of_an_animation_are_counted_as_pillow_counts_them() -> None:
    stream = BytesIO()
    colours = [Image.new("RGB", (40, 30), (9 * number, 5, 7)) for number in range(12)]
    colours[0].save(stream, "GIF", save_all=True, append_images=colours[1:], comment=b"x" * 700, loop=0)
    assert gif_pages(stream.getvalue(), 1000) == Image.open(stream).n_frames == 12


def test_a_deflated_dicom_of_many_tiny_frames(tmp_path: Path) -> None:
    pydicom: Any = pytest.importorskip("pydicom", reason="install tinyusfm-edge[dicom]")
    dataset = pydicom.Dataset()
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.DeflatedExplicitVRLittleEndian
    dataset.SOPClassUID, dataset.SOPInstanceUID = pydicom.uid.UltrasoundMultiFrameImageStorage, "1.2.3"
    dataset.NumberOfFrames, dataset.Rows, dataset.Columns = 90_000, 8, 8
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated = dataset.BitsStored = 8
    dataset.HighBit, dataset.PixelRepresentation = 7, 0
    dataset.PixelData = bytes(90_000 * 64)
    dataset.save_as(tmp_path / "a.dcm", enforce_file_format=True)
    with pytest.raises(SourceError, match="90000 frames in"):
        open_source(str(tmp_path / "a.dcm"))


@pytest.mark.parametrize("kind", ["side", "scans"])
def test_dicom(tmp_path: Path, kind: str) -> None:
    pydicom: Any = pytest.importorskip("pydicom", reason="install tinyusfm-edge[dicom]")
    dataset = pydicom.Dataset()
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    syntax = pydicom.uid.RLELossless if kind == "side" else pydicom.uid.JPEGBaseline8Bit
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.SOPClassUID, dataset.SOPInstanceUID = pydicom.uid.UltrasoundImageStorage, "1.2.3"
    dataset.Rows = dataset.Columns = 16_000 if kind == "side" else 1024
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated = dataset.BitsStored = 8
    dataset.HighBit, dataset.PixelRepresentation = 7, 0
    dataset.PixelData = pydicom.encaps.encapsulate([bytes(100) if kind == "side" else scans(2_000)])
    dataset["PixelData"].VR = "OB"
    dataset.save_as(tmp_path / "a.dcm", enforce_file_format=True)
    with (
        pytest.raises(EdgeError, match="million" if kind == "side" else "scans"),
        open_source(str(tmp_path / "a.dcm")) as source,
    ):
        list(source)


@pytest.mark.parametrize("reader", ["av", "opencv"])
def test_video(tmp_path: Path, reader: str, monkeypatch: pytest.MonkeyPatch) -> None:
    av = pytest.importorskip("av", reason="install tinyusfm-edge[video]")
    if reader == "opencv":
        pytest.importorskip("cv2", reason="install tinyusfm-edge[opencv]")
    with av.open(str(tmp_path / "a.avi"), "w") as container:
        stream = container.add_stream("png", rate=25)
        stream.width, stream.height, stream.pix_fmt = 640, 480, "gray"
        image = av.VideoFrame.from_ndarray(np.zeros((480, 640), np.uint8), "gray")
        for packet in [*stream.encode(image), *stream.encode()]:
            container.mux(packet)
    # the limit comes down instead of a video of 100 MB going up
    monkeypatch.setattr(limits, "MAX_PIXELS", 1000)
    with (
        pytest.raises(EdgeError, match="640x480 pixels is too large"),
        open_source(str(tmp_path / "a.avi"), reader=reader) as source,
    ):
        list(source)
