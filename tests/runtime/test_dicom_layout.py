"""DICOM whose tags are wrong: where the data can be measured they win, and the contradiction is told."""

from __future__ import annotations

import gzip
import struct
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tinyusfm_runtime.errors import IncompleteError, SourceError, UnsupportedError
from tinyusfm_runtime.frame import Frame
from tinyusfm_runtime.images.window import apply_window
from tinyusfm_runtime.sources import open_source

pydicom = pytest.importorskip("pydicom", reason="install tinyusfm-edge[dicom]")
Image = pytest.importorskip("PIL.Image", reason="install tinyusfm-edge[dicom]")

from pydicom.encaps import encapsulate  # noqa: E402
from pydicom.pixels import convert_color_space  # noqa: E402

UID = pydicom.uid
ROWS, COLS = 48, 64


def speckle(shade: int = 0) -> np.ndarray:
    """A grey image that looks like tissue: smooth, with noise, on black."""
    rng = np.random.default_rng(shade)
    ramp = np.add.outer(np.linspace(20, 120, ROWS), np.linspace(0, 90, COLS))
    image = np.clip(ramp + rng.normal(0, 6, (ROWS, COLS)), 0, 255)
    image[:, : COLS // 4] = 0
    return image.astype(np.uint8)


CINE = np.stack([speckle(shade) for shade in range(4)])
GREY_RGB = np.stack([CINE] * 3, axis=-1)
GREY_RGB[:, 2:6, 20:30] = (200, 40, 40)  # a little colour, as Doppler and captions have
YBR = np.stack([convert_color_space(frame, "RGB", "YBR_FULL") for frame in GREY_RGB])


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Writes a DICOM file with any pixel data and any tags; None takes a tag away."""

    def writer(
        data: bytes, *, frames: int | None = 4, samples: int = 1, syntax: Any = UID.ExplicitVRLittleEndian, **tags: Any
    ) -> Path:
        dataset = pydicom.Dataset()
        dataset.file_meta = pydicom.dataset.FileMetaDataset()
        dataset.file_meta.TransferSyntaxUID = syntax
        dataset.SOPClassUID, dataset.SOPInstanceUID = UID.UltrasoundMultiFrameImageStorage, "1.2.3"
        dataset.NumberOfFrames, dataset.Rows, dataset.Columns = frames, ROWS, COLS
        dataset.SamplesPerPixel = samples
        dataset.PhotometricInterpretation = "MONOCHROME2" if samples == 1 else "RGB"
        if samples == 3:
            dataset.PlanarConfiguration = 0
        dataset.BitsAllocated = dataset.BitsStored = 8
        dataset.HighBit, dataset.PixelRepresentation = 7, 0
        for key, value in tags.items():
            setattr(dataset, key, value)
        for key in [*(k for k, v in tags.items() if v is None), *(["NumberOfFrames"] if frames is None else [])]:
            delattr(dataset, key)
        dataset.PixelData = data
        if syntax.is_encapsulated:
            dataset["PixelData"].VR = "OB"
            dataset["PixelData"].is_undefined_length = True
        path = tmp_path / "x.dcm"
        dataset.save_as(path, enforce_file_format=True)
        return path

    return writer


def read(path: Path, **options: Any) -> tuple[list[Frame], str, str]:
    """Frames, doubts and the text that ended them."""
    frames, end = [], ""
    with open_source(str(path), **options) as source:
        try:
            for frame in source:
                frames.append(frame)
        except SourceError as error:
            end = f"{type(error).__name__}: {error}"
        return frames, " | ".join(source.doubts), end


def pixels_of(path: Path, **options: Any) -> np.ndarray:
    frames, _, end = read(path, **options)
    assert end == ""
    return np.stack([frame.pixels for frame in frames])


def jpeg(image: np.ndarray, **options: Any) -> bytes:
    stream = BytesIO()
    Image.fromarray(image).save(stream, "JPEG", quality=95, **options)
    return stream.getvalue()


def decoded(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(BytesIO(data)))


# uncompressed: layout


def test_right_tags_leave_nothing_to_tell(write: Callable[..., Path]) -> None:
    frames, doubts, end = read(write(CINE.tobytes()))
    assert (len(frames), doubts, end) == (4, "", "")
    np.testing.assert_array_equal(pixels_of(write(GREY_RGB.tobytes(), samples=3)), GREY_RGB)
    assert read(write(GREY_RGB.tobytes(), samples=3))[1] == ""
    planes = np.ascontiguousarray(GREY_RGB.transpose(0, 3, 1, 2))
    np.testing.assert_array_equal(pixels_of(write(planes.tobytes(), samples=3, PlanarConfiguration=1)), GREY_RGB)


@pytest.mark.parametrize("frames", [1, 4])
@pytest.mark.parametrize("space", ["RGB", "YBR_FULL"])
def test_422_with_three_bytes_a_pixel(write: Callable[..., Path], frames: int, space: str) -> None:
    stored = (GREY_RGB if space == "RGB" else YBR)[:frames]
    path = write(stored.tobytes(), frames=frames, samples=3, PhotometricInterpretation="YBR_FULL_422")
    found, doubts, _ = read(path)
    assert "YBR_FULL_422" in doubts and space in doubts
    want = stored if space == "RGB" else np.stack([convert_color_space(f, "YBR_FULL", "RGB") for f in stored])
    np.testing.assert_array_equal(np.stack([frame.pixels for frame in found]), want)


def subsampled(frame: np.ndarray) -> bytes:
    """YBR_FULL_422 as it is stored: Y Y Cb Cr (PS3.3 C.7.6.3.1.2)."""
    luma, chroma = frame[..., 0], frame[:, ::2, 1:]
    packed = np.stack([luma[:, ::2], luma[:, 1::2], chroma[..., 0], chroma[..., 1]], axis=-1)
    return packed.tobytes()


@pytest.mark.parametrize("frames", [1, 3])
def test_full_that_is_subsampled(write: Callable[..., Path], frames: int) -> None:
    data = b"".join(subsampled(frame) for frame in YBR[:frames])
    right = pixels_of(write(data, frames=frames, samples=3, PhotometricInterpretation="YBR_FULL_422"))
    found, doubts, _ = read(write(data, frames=frames, samples=3, PhotometricInterpretation="YBR_FULL"))
    assert "2: read as YBR_FULL_422" in doubts
    np.testing.assert_array_equal(np.stack([frame.pixels for frame in found]), right)
    assert np.abs(right.astype(int) - GREY_RGB[:frames]).mean() < 2


@pytest.mark.parametrize(
    ("tagged", "stored", "want"),
    [("RGB", YBR, GREY_RGB), ("YBR_FULL", GREY_RGB, GREY_RGB)],
    ids=["YBR tagged RGB", "RGB tagged YBR"],
)
def test_colours_of_another_space(
    write: Callable[..., Path], tagged: str, stored: np.ndarray, want: np.ndarray
) -> None:
    found, doubts, _ = read(write(stored.tobytes(), samples=3, PhotometricInterpretation=tagged))
    assert "the colours are those of" in doubts
    assert np.abs(np.stack([frame.pixels for frame in found]).astype(int) - want).max() <= 3


@pytest.mark.parametrize("planar", [0, 1])
def test_planes_that_are_tagged_the_other_way(write: Callable[..., Path], planar: int) -> None:
    stored = GREY_RGB if planar else np.ascontiguousarray(GREY_RGB.transpose(0, 3, 1, 2))
    found, doubts, _ = read(write(stored.tobytes(), samples=3, PlanarConfiguration=planar))
    assert "by pixel" in doubts and "by plane" in doubts
    np.testing.assert_array_equal(np.stack([frame.pixels for frame in found]), GREY_RGB)


@pytest.mark.parametrize(
    ("data", "samples", "photometric", "frames", "want"),
    [
        (CINE[:1], 3, "RGB", 1, CINE[:1]),
        (GREY_RGB[:1], 1, "MONOCHROME2", 1, GREY_RGB[:1]),
        (GREY_RGB[:1], 1, "MONOCHROME2", None, GREY_RGB[:1]),
        (CINE, 1, "RGB", 4, CINE),
        (GREY_RGB, 3, "MONOCHROME2", 4, GREY_RGB),
    ],
    ids=["grey tagged colour", "colour tagged grey", "no count", "one sample tagged RGB", "three tagged grey"],
)
def test_other_channels_than_the_tags_say(
    write: Callable[..., Path], data: np.ndarray, samples: int, photometric: str, frames: int | None, want: np.ndarray
) -> None:
    found, doubts, _ = read(
        write(data.tobytes(), frames=frames, samples=samples, PhotometricInterpretation=photometric)
    )
    assert "samples" in doubts
    np.testing.assert_array_equal(np.stack([frame.pixels for frame in found]), want)


def test_colour_and_count_both_missing(write: Callable[..., Path]) -> None:
    found, doubts, _ = read(write(GREY_RGB.tobytes(), frames=None))
    assert "samples" in doubts and len(found) == 4
    np.testing.assert_array_equal(np.stack([frame.pixels for frame in found]), GREY_RGB)
    smooth = np.stack([np.add.outer(np.arange(ROWS), np.arange(COLS) // 9).astype(np.uint8)] * 3)
    found, _, _ = read(write(smooth.tobytes(), frames=None))
    np.testing.assert_array_equal(np.stack([frame.pixels for frame in found]), smooth)


def test_no_photometric_interpretation(write: Callable[..., Path]) -> None:
    found, doubts, _ = read(write(CINE.tobytes(), PhotometricInterpretation=None))
    assert "what its samples mean" in doubts
    np.testing.assert_array_equal(np.stack([frame.pixels for frame in found]), CINE)


# uncompressed: depth and byte order


def test_eight_bits_in_sixteen_are_read(write: Callable[..., Path]) -> None:
    path = write(CINE.astype("<u2").tobytes(), BitsAllocated=16)
    found, doubts, end = read(path)
    assert (doubts, end) == ("", "")
    np.testing.assert_array_equal(np.stack([frame.pixels for frame in found]), CINE)
    assert found[0].pixels.dtype == np.uint8


def test_eight_bits_in_the_upper_half(write: Callable[..., Path]) -> None:
    path = write((CINE.astype("<u2") << 8).tobytes(), BitsAllocated=16, HighBit=15)
    np.testing.assert_array_equal(pixels_of(path), CINE)


def test_codes_above_bits_stored_are_not_cut(write: Callable[..., Path]) -> None:
    _, _, end = read(write((CINE.astype("<u2") * 16).tobytes(), BitsAllocated=16))
    assert "codes up to" in end and "--window" in end


@pytest.mark.parametrize("frames", [1, 4, None])
def test_sixteen_tagged_eight_and_eight_tagged_sixteen(write: Callable[..., Path], frames: int | None) -> None:
    count = frames or 1
    found, doubts, _ = read(write(CINE[:count].tobytes(), frames=frames, BitsAllocated=16))
    assert "the data have 8" in doubts
    np.testing.assert_array_equal(np.stack([frame.pixels for frame in found]), CINE[:count])
    if count == 1:
        found, doubts, _ = read(write(CINE[:1].astype("<u2").tobytes(), frames=frames))
        assert "the data have 16" in doubts
        np.testing.assert_array_equal(found[0].pixels, CINE[0])


def test_deep_samples_need_a_window(write: Callable[..., Path]) -> None:
    deep = CINE.astype("<u2") * 16
    path = write(deep.tobytes(), BitsAllocated=16, BitsStored=12, HighBit=11)
    with pytest.raises(SourceError, match=r"12-bit DICOM: give --window LO,HI"):
        open_source(str(path))
    np.testing.assert_array_equal(pixels_of(path, window=(0, 4080)), CINE)
    rescaled = write(
        deep.tobytes(), BitsAllocated=16, BitsStored=12, HighBit=11, RescaleSlope="0.5", RescaleIntercept="-10"
    )
    np.testing.assert_array_equal(pixels_of(rescaled, window=(-10, 2030)), CINE)


def test_minimum_is_white_is_inverted_after_the_window(write: Callable[..., Path]) -> None:
    deep = write(
        (CINE.astype("<u2") * 16).tobytes(), BitsAllocated=16, BitsStored=12, PhotometricInterpretation="MONOCHROME1"
    )
    np.testing.assert_array_equal(pixels_of(deep, window=(0, 4080)), 255 - CINE)


def test_signed_and_float_samples(write: Callable[..., Path], tmp_path: Path) -> None:
    signed = CINE.astype("<i2") - 128
    path = write(signed.tobytes(), BitsAllocated=16, BitsStored=16, PixelRepresentation=1)
    with pytest.raises(SourceError, match="signed 16-bit"):
        open_source(str(path))
    np.testing.assert_array_equal(pixels_of(path, window=(-128, 127)), CINE)
    path = write(b"\0\0")
    dataset = pydicom.dcmread(path)
    del dataset.PixelData
    dataset.FloatPixelData = CINE.astype("<f4").tobytes()
    dataset.BitsAllocated = 32
    dataset.save_as(tmp_path / "f.dcm")
    with pytest.raises(SourceError, match="floats.*--window"):
        open_source(str(tmp_path / "f.dcm"))
    np.testing.assert_array_equal(pixels_of(tmp_path / "f.dcm", window=(0, 255)), CINE)


def test_words_in_the_other_byte_order(write: Callable[..., Path]) -> None:
    deep = CINE.astype(">u2") * 16
    found, doubts, _ = read(write(deep.astype(">u2").tobytes(), BitsAllocated=16, BitsStored=12), window=(0, 4080))
    assert "other order" in doubts
    np.testing.assert_array_equal(np.stack([frame.pixels for frame in found]), CINE)


@pytest.mark.parametrize("swapped", [True, False])
def test_big_endian_words_of_bytes(write: Callable[..., Path], swapped: bool) -> None:
    smooth = np.stack([np.add.outer(np.arange(ROWS), np.arange(COLS) * 2).astype(np.uint8)] * 4)
    data = smooth.view("<u2").byteswap().tobytes() if swapped else smooth.tobytes()
    path = write(smooth.tobytes(), syntax=UID.ExplicitVRBigEndian)
    raw = path.read_bytes()
    at = raw.rindex(b"\x7f\xe0\x00\x10")
    path.write_bytes(raw[: at + 4] + b"OW\0\0" + struct.pack(">I", len(data)) + data)
    found, doubts, _ = read(path)
    np.testing.assert_array_equal(np.stack([frame.pixels for frame in found]), smooth)
    assert bool(doubts) != swapped, "the standard swaps them; who does not is told"


@pytest.mark.parametrize("syntax", [UID.ImplicitVRLittleEndian, UID.ExplicitVRLittleEndian, UID.ExplicitVRBigEndian])
@pytest.mark.parametrize("samples", [1, 3])
def test_element_heads_of_every_uncompressed_syntax(write: Callable[..., Path], syntax: Any, samples: int) -> None:
    want = CINE if samples == 1 else GREY_RGB
    np.testing.assert_array_equal(pixels_of(write(want.tobytes(), samples=samples, syntax=syntax)), want)


# uncompressed: counts


@pytest.mark.parametrize("frames", [None, 1, 3])
def test_more_frames_than_promised_are_all_read(write: Callable[..., Path], frames: int | None) -> None:
    found, doubts, end = read(write(CINE.tobytes(), frames=frames))
    assert (len(found), end) == (4, "") and "4" in doubts
    np.testing.assert_array_equal(np.stack([frame.pixels for frame in found]), CINE)


def test_fewer_frames_than_promised_are_told_after_them(write: Callable[..., Path]) -> None:
    found, _, end = read(write(CINE.tobytes(), frames=6))
    assert len(found) == 4 and end.startswith("IncompleteError") and "promises 6 frames but holds 4" in end


def test_lengths_that_fit_nothing_are_refused(write: Callable[..., Path]) -> None:
    with pytest.raises(SourceError, match="Rows, Columns"):
        open_source(str(write(CINE.tobytes(), Rows=ROWS + 5)))
    with pytest.raises(SourceError, match="promises 3072 bytes per frame and holds 1536"):
        open_source(str(write(CINE[0, : ROWS // 2].tobytes(), frames=1)))


def test_padding_behind_the_last_frame(write: Callable[..., Path]) -> None:
    found, doubts, end = read(write(CINE.tobytes() + bytes(128)))
    assert (len(found), end) == (4, "") and "128 bytes more" in doubts


# palettes


@pytest.mark.parametrize(
    ("bits", "tables"),
    [
        (8, lambda ramp: ramp.astype(np.uint8).tobytes()),
        (8, lambda ramp: ramp.astype("<u2").tobytes()),
        (8, lambda ramp: (ramp.astype("<u2") * 257).tobytes()),
        (16, lambda ramp: (ramp.astype("<u2") * 257).tobytes()),
        (16, lambda ramp: (ramp.astype("<u2") << 8).tobytes()),
        (16, lambda ramp: ramp.astype("<u2").tobytes()),
        (16, lambda ramp: ramp.astype(np.uint8).tobytes()),
    ],
    ids=["8 in bytes", "8 in words", "8, words of 16", "16", "16, high byte", "16, codes of 8", "16 in bytes"],
)
def test_palettes_of_every_width(write: Callable[..., Path], bits: int, tables: Callable[[np.ndarray], bytes]) -> None:
    ramp = np.arange(256)
    colours = np.stack([ramp, ramp[::-1], ramp // 2], axis=-1).astype(np.uint8)
    tags: dict[str, Any] = {}
    for channel, name in enumerate(("Red", "Green", "Blue")):
        tags[f"{name}PaletteColorLookupTableDescriptor"] = [256, 0, bits]
        tags[f"{name}PaletteColorLookupTableData"] = tables(colours[:, channel].astype(np.int64))
    path = write(CINE.tobytes(), PhotometricInterpretation="PALETTE COLOR", **tags)
    np.testing.assert_array_equal(pixels_of(path), colours[CINE])


def test_a_palette_with_an_offset_clamps_at_its_ends(write: Callable[..., Path]) -> None:
    tags: dict[str, Any] = {}
    for name in ("Red", "Green", "Blue"):
        tags[f"{name}PaletteColorLookupTableDescriptor"] = [100, 50, 8]
        tags[f"{name}PaletteColorLookupTableData"] = np.arange(100, 200, dtype=np.uint8).tobytes()
    found = pixels_of(write(CINE.tobytes(), PhotometricInterpretation="PALETTE COLOR", **tags))
    np.testing.assert_array_equal(found[..., 0], np.clip(CINE.astype(int) - 50, 0, 99) + 100)


def test_a_palette_that_is_missing_or_short_is_named(write: Callable[..., Path]) -> None:
    with pytest.raises(SourceError, match="brings no palette"):
        open_source(str(write(CINE.tobytes(), PhotometricInterpretation="PALETTE COLOR")))
    tags: dict[str, Any] = {}
    for name in ("Red", "Green", "Blue"):
        tags[f"{name}PaletteColorLookupTableDescriptor"] = [256, 0, 8]
        tags[f"{name}PaletteColorLookupTableData"] = bytes(100)
    with pytest.raises(SourceError, match="promises 256 entries and holds 100"):
        open_source(str(write(CINE.tobytes(), PhotometricInterpretation="PALETTE COLOR", **tags)))


# compressed


@pytest.mark.parametrize("frames", [None, 1, 2])
@pytest.mark.parametrize("has_bot", [True, False])
def test_every_fragment_that_is_an_image_is_a_frame(
    write: Callable[..., Path], frames: int | None, has_bot: bool
) -> None:
    images = [jpeg(frame) for frame in CINE]
    found, doubts, end = read(write(encapsulate(images, has_bot=has_bot), frames=frames, syntax=UID.JPEGBaseline8Bit))
    assert (len(found), end) == (4, "") and "4" in doubts
    for frame, image in zip(found, images, strict=True):
        np.testing.assert_array_equal(frame.pixels, decoded(image))


@pytest.mark.parametrize("has_bot", [True, False])
@pytest.mark.parametrize("pieces", [1, 3])
def test_fewer_images_than_promised_are_told_after_them(write: Callable[..., Path], has_bot: bool, pieces: int) -> None:
    data = encapsulate([jpeg(frame) for frame in CINE], has_bot=has_bot, fragments_per_frame=pieces)
    found, _, end = read(write(data, frames=6, syntax=UID.JPEGBaseline8Bit))
    assert len(found) == 4 and end.startswith("IncompleteError") and "promises 6 frames but holds 4" in end


@pytest.mark.parametrize("has_bot", [True, False])
def test_frames_of_several_fragments(write: Callable[..., Path], has_bot: bool) -> None:
    images = [jpeg(frame) for frame in CINE]
    data = encapsulate(images, has_bot=has_bot, fragments_per_frame=3)
    for frames in (4, None):
        found, _, end = read(write(data, frames=frames, syntax=UID.JPEGBaseline8Bit))
        assert (len(found), end) == (4, "")
        np.testing.assert_array_equal(found[3].pixels, decoded(images[3]))


def test_an_offset_table_that_is_wrong_is_not_followed(write: Callable[..., Path]) -> None:
    images = [jpeg(frame) for frame in CINE]
    data = bytearray(encapsulate(images, fragments_per_frame=2))
    data[12:16] = struct.pack("<I", 77)
    found, _, end = read(write(bytes(data), syntax=UID.JPEGBaseline8Bit))
    assert (len(found), end) == (4, "")
    np.testing.assert_array_equal(found[1].pixels, decoded(images[1]))


@pytest.mark.parametrize("padding", [bytes(2), bytes(40), bytes(4000), b"\xff" * 41, b"vendor trailer " * 10])
def test_padding_behind_the_end_of_an_image(write: Callable[..., Path], padding: bytes) -> None:
    images = [jpeg(frame) for frame in CINE]
    found, _, end = read(write(encapsulate([image + padding for image in images]), syntax=UID.JPEGBaseline8Bit))
    assert (len(found), end) == (4, "")
    np.testing.assert_array_equal(found[2].pixels, decoded(images[2]))


def test_an_image_that_breaks_off_inside_is_told_after_the_good_ones(write: Callable[..., Path]) -> None:
    images = [jpeg(frame) for frame in CINE]
    images[2] = images[2][: len(images[2]) // 2]
    found, _, end = read(write(encapsulate(images), syntax=UID.JPEGBaseline8Bit))
    assert len(found) == 2 and end.startswith("IncompleteError") and "frame 2 of 4" in end and "breaks off" in end


@pytest.mark.parametrize("samples", [1, 3])
def test_an_image_of_other_channels_than_the_tags_say(write: Callable[..., Path], samples: int) -> None:
    images = [jpeg(frame) for frame in (GREY_RGB if samples == 1 else CINE)]
    found, doubts, _ = read(write(encapsulate(images), samples=samples, syntax=UID.JPEGBaseline8Bit))
    assert "samples" in doubts
    assert np.abs(found[0].pixels.astype(int) - decoded(images[0])).max() <= 3


@pytest.mark.parametrize("tagged", ["RGB", "YBR_FULL_422", "YBR_FULL"])
@pytest.mark.parametrize("kind", ["JFIF", "bare", "Adobe RGB"])
def test_colours_of_a_jpeg_whatever_the_tag_says(write: Callable[..., Path], tagged: str, kind: str) -> None:
    if kind == "Adobe RGB":
        image = jpeg(GREY_RGB[0], keep_rgb=True, subsampling=0)
    else:
        image = jpeg(GREY_RGB[0], subsampling=0)
        if kind == "bare":
            length = struct.unpack(">H", image[4:6])[0]
            image = image[:2] + image[4 + length :]
    found = pixels_of(
        write(encapsulate([image]), frames=1, samples=3, syntax=UID.JPEGBaseline8Bit, PhotometricInterpretation=tagged)
    )
    assert np.abs(found[0].astype(int) - GREY_RGB[0]).mean() < 3


def test_another_codec_than_the_file_names(write: Callable[..., Path]) -> None:
    stream = BytesIO()
    Image.fromarray(CINE[0]).save(stream, "JPEG2000")
    codestream = stream.getvalue()[stream.getvalue().index(b"\xff\x4f\xff\x51") :]
    for data, syntax in ((codestream, UID.JPEGBaseline8Bit), (jpeg(CINE[0]), UID.JPEG2000Lossless)):
        found, doubts, _ = read(write(encapsulate([data]), frames=1, syntax=syntax))
        assert "another codec" in doubts
        np.testing.assert_array_equal(found[0].pixels, decoded(data))


def test_uncompressed_pixels_under_a_compressed_name(write: Callable[..., Path]) -> None:
    path = write(CINE.tobytes())
    raw = path.read_bytes()
    old, new = b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.5\0"
    assert raw.count(old) == 1
    path.write_bytes(raw.replace(old, new))
    found, doubts, _ = read(path)
    assert "compressed, and they are not" in doubts
    np.testing.assert_array_equal(np.stack([frame.pixels for frame in found]), CINE)


def encoded(array: np.ndarray, syntax: Any, samples: int) -> bytes:
    """Frames encoded by pydicom's own encoders."""
    dataset = pydicom.Dataset()
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = UID.ExplicitVRLittleEndian
    dataset.Rows, dataset.Columns, dataset.NumberOfFrames = array.shape[1], array.shape[2], array.shape[0]
    dataset.SamplesPerPixel = samples
    dataset.PhotometricInterpretation = "RGB" if samples == 3 else "MONOCHROME2"
    if samples == 3:
        dataset.PlanarConfiguration = 0
    dataset.BitsAllocated = dataset.BitsStored = 8
    dataset.HighBit, dataset.PixelRepresentation = 7, 0
    dataset.PixelData = array.tobytes()
    dataset.SOPClassUID, dataset.SOPInstanceUID = UID.UltrasoundMultiFrameImageStorage, "1.2.3"
    dataset.compress(syntax, generate_instance_uid=False)
    return bytes(dataset.PixelData)


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("syntax", [UID.RLELossless, UID.JPEGLSLossless])
def test_lossless_codecs_give_back_every_code(write: Callable[..., Path], syntax: Any, samples: int) -> None:
    if syntax == UID.JPEGLSLossless:
        pytest.importorskip("jpeg_ls", reason="install tinyusfm-edge[dicom]")
    want = CINE if samples == 1 else GREY_RGB
    data = encoded(want, syntax, samples)
    for frames in (4, None, 2):
        found, _, end = read(write(data, frames=frames, samples=samples, syntax=syntax))
        assert end == ""
        np.testing.assert_array_equal(np.stack([frame.pixels for frame in found]), want)


def test_rle_of_other_channels_than_the_tags_say(write: Callable[..., Path]) -> None:
    found, doubts, _ = read(write(encoded(GREY_RGB, UID.RLELossless, 3), syntax=UID.RLELossless))
    assert "samples" in doubts
    np.testing.assert_array_equal(np.stack([frame.pixels for frame in found]), GREY_RGB)


# every transfer syntax is decoded or named


@pytest.mark.parametrize(
    "syntax", [uid for uid in UID.AllTransferSyntaxes if uid.is_encapsulated], ids=lambda u: u.name
)
def test_what_cannot_be_decoded_names_codec_and_mend(write: Callable[..., Path], syntax: Any) -> None:
    path = write(encapsulate([b"\0" * 64] * 4), syntax=syntax)
    known = syntax in (
        UID.RLELossless, UID.JPEGBaseline8Bit, UID.JPEGExtended12Bit, UID.JPEGLSLossless, UID.JPEGLSNearLossless,
        UID.JPEG2000, UID.JPEG2000Lossless,
    )  # fmt: skip
    try:
        with open_source(str(path)) as source:
            list(source)
        pytest.fail("four frames of zeros were taken for images")
    except UnsupportedError as error:
        assert syntax.name in str(error) and "pip install " in str(error)
        assert "pylibjpeg-libjpeg" not in str(error), "its licence is not permissive"
    except SourceError as error:
        assert known or (syntax.name in str(error) and "re-save" in str(error))


def test_a_file_that_breaks_off_gives_its_whole_frames(write: Callable[..., Path]) -> None:
    images = [jpeg(frame) for frame in CINE]
    raw = write(encapsulate(images), syntax=UID.JPEGBaseline8Bit).read_bytes()
    path = write(encapsulate(images), syntax=UID.JPEGBaseline8Bit)
    path.write_bytes(raw[: -len(images[3]) // 2])
    found, _, end = read(path)
    assert len(found) == 3 and "promises 4 frames but holds 3" in end
    with open_source(str(path)) as source, pytest.raises(IncompleteError):
        list(source)


def test_the_window_of_a_dicom_is_that_of_other_images() -> None:
    codes = np.array([[0, 100, 4095]])
    np.testing.assert_array_equal(apply_window(codes, (0, 4095)), [[0, 6, 255]])


@pytest.mark.parametrize(
    ("bits", "high", "told"),
    [(8, 15, "no room"), (16, 11, "begin at the lowest bit"), (16, 15, "")],
    ids=["no room", "contradicted", "right"],
)
def test_a_high_bit_is_measured(write: Callable[..., Path], bits: int, high: int, told: str) -> None:
    data = CINE if bits == 8 else CINE.astype("<u2") << (8 if high == 15 else 0)
    found, doubts, _ = read(write(data.tobytes(), BitsAllocated=bits, BitsStored=8, HighBit=high))
    np.testing.assert_array_equal(np.stack([frame.pixels for frame in found]), CINE)
    assert (told in doubts) if told else doubts == ""


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("bits", [8, 16])
def test_rows_and_columns_that_are_exchanged(write: Callable[..., Path], samples: int, bits: int) -> None:
    data = CINE if samples == 1 else GREY_RGB
    tags = {"Rows": COLS, "Columns": ROWS, "BitsAllocated": bits}
    if bits == 16:
        data = data.astype("<u2") << 4
        tags |= {"BitsStored": 12, "HighBit": 11}
    path = write(data.tobytes(), samples=samples, **tags)
    found, doubts, _ = read(path, **({"window": (0, 255 * 16)} if bits == 16 else {}))
    assert "Rows and Columns are exchanged" in doubts
    np.testing.assert_array_equal(np.stack([frame.pixels for frame in found]), CINE if samples == 1 else GREY_RGB)
    noise = np.random.default_rng(0).integers(0, 255, (4, ROWS, COLS), np.uint8)
    assert read(write(noise.tobytes()))[1] == "", "what shows no lines is read as tagged"


@pytest.mark.parametrize(("number", "name"), [(b"110", "JPEG XL"), (b"999", "unknown codec")])
def test_a_transfer_syntax_that_nobody_knows_is_named(write: Callable[..., Path], number: bytes, name: str) -> None:
    path = write(encapsulate([b"\0" * 64] * 4), syntax=UID.HTJ2KLossless)
    path.write_bytes(path.read_bytes().replace(b"1.2.4.201", b"1.2.4." + number))
    with pytest.raises(
        SourceError, match=f"1.2.840.10008.1.2.4.{number.decode()} .{'an ' if number == b'999' else ''}{name}.*dcmconv"
    ):
        open_source(str(path))


def test_a_file_packed_by_gzip_is_named(write: Callable[..., Path]) -> None:
    path = write(CINE.tobytes())
    path.write_bytes(gzip.compress(path.read_bytes()))
    with pytest.raises(SourceError, match="gunzip"):
        open_source(str(path))
