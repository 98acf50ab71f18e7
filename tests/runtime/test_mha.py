"""MetaImage sequences: real PLUS recordings, and files that promise what they do not hold."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.fakes.live_rigs import image
from tinyusfm_runtime.errors import IncompleteError, SourceError, UnsupportedError
from tinyusfm_runtime.frame import PixelFormat
from tinyusfm_runtime.sources import open_source

CLIPS = Path(__file__).parents[2].parent / "shared" / "data" / "clips"
CINE = np.stack([image(i, 16, 24) for i in range(4)])


def write(place: Path, data: bytes | None = None, extra: str = "", **changes: str) -> str:
    fields = {"ObjectType": "Image", "NDims": "3", "DimSize": "24 16 4", "ElementType": "MET_UCHAR"}
    fields.update(changes)
    lines = [f"{key} = {value}" for key, value in fields.items()]
    head = "\n".join([*lines, *extra.splitlines(), "ElementDataFile = LOCAL", ""])
    path = place / "clip.mha"
    path.write_bytes(head.encode() + (CINE.tobytes() if data is None else data))
    return str(path)


def read(location: str, **options: Any) -> list[Any]:
    with open_source(location, **options) as source:
        return list(source)


@pytest.mark.parametrize("compressed", [False, True])
def test_pixels_times_orientation_and_crop(tmp_path: Path, compressed: bool) -> None:
    extra = "UltrasoundImageOrientation = UFA\nElementSpacing = 0.3 0.2 1\n" + "\n".join(
        f"Seq_Frame{i:04}_Timestamp = {1.5 + i / 10}\nSeq_Frame{i:04}_ImageStatus = {'INVALID' if i == 2 else 'OK'}\n"
        f"Seq_Frame{i:04}_ImageToCroppedImageTransform = 1 0 0 -7 0 1 0 -5 0 0 1 0 0 0 0 1"
        for i in range(4)
    )
    data = zlib.compress(CINE.tobytes()) if compressed else None
    location = write(tmp_path, data, extra, CompressedData=str(compressed))
    with open_source(location) as source:
        frames = list(source)
        assert "1 of 4 images are marked invalid" in " ".join(source.notes)  # type: ignore[attr-defined]
        assert len(source) == 3  # type: ignore[arg-type]
    assert [frame.seq for frame in frames] == [0, 1, 3]
    for frame in frames:
        np.testing.assert_array_equal(frame.pixels, CINE[frame.seq])
        assert frame.t_source_ns == 1_500_000_000 + frame.seq * 100_000_000
        assert (frame.spacing_mm, frame.orientation, frame.crop) == ((0.2, 0.3), "UF", (5, 7, 16, 24))


def test_colour_and_a_single_image(tmp_path: Path) -> None:
    colour = np.stack([CINE[0], CINE[1], CINE[2]], axis=-1)
    frame = read(write(tmp_path, colour.tobytes(), "ElementNumberOfChannels = 3", DimSize="24 16", NDims="2"))[0]
    assert frame.pixel_format is PixelFormat.RGB
    np.testing.assert_array_equal(frame.pixels, colour)
    assert read(write(tmp_path, DimSize="24 16 1 4", NDims="4"))[3].seq == 3


def test_spacing_of_one_is_unknown_and_can_be_given(tmp_path: Path) -> None:
    location = write(tmp_path, extra="ElementSpacing = 1 1 1")
    with open_source(location) as source:
        assert "no spacing" in " ".join(source.notes)  # type: ignore[attr-defined]
        assert next(iter(source)).spacing_mm is None
    assert read(location, spacing_mm=(0.1, 0.2))[0].spacing_mm == (0.1, 0.2)


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.99])
def test_a_compressed_file_that_breaks_off_is_an_error_after_its_good_images(tmp_path: Path, keep: float) -> None:
    noise = np.random.default_rng(1).integers(0, 256, CINE.shape, dtype=np.uint8).tobytes()
    packed = zlib.compress(noise)
    location = write(tmp_path, packed[: int(len(packed) * keep)], CompressedData="True")
    count = 0
    with open_source(location) as source, pytest.raises(SourceError, match=r"break off|promises 4"):
        for frame in source:
            np.testing.assert_array_equal(frame.pixels.tobytes(), noise[count * 384 : (count + 1) * 384])
            count += 1
    assert count < 4 or keep == 0.99


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (zlib.compress(CINE[:3].tobytes()), "holds 3 whole ones"),
        (zlib.compress(CINE.tobytes() + b"x"), "holds more"),
        (b"\x78\x9crubbish" * 20, "damaged|break off"),
    ],
)
def test_compressed_images_are_counted(tmp_path: Path, data: bytes, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        read(write(tmp_path, data, CompressedData="True"))


def test_a_bomb_costs_one_image_of_memory(tmp_path: Path) -> None:
    bomb = zlib.compress(bytes(32 << 20))
    with pytest.raises(SourceError, match="holds more"):
        read(write(tmp_path, bomb, CompressedData="True"))


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"DimSize": "24 2000 5"}, SourceError),
        ({"BinaryData": "False"}, UnsupportedError),
        ({"HeaderSize": "512"}, UnsupportedError),
        ({"UltrasoundImageType": "RF_REAL"}, UnsupportedError),
        ({"ElementType": "MET_LONG_LONG"}, UnsupportedError),
        ({"DimSize": "24 16 -4"}, SourceError),
        ({"DimSize": "24 99999999 4"}, SourceError),
        ({"DimSize": "24 16 x"}, SourceError),
        ({"DimSize": "24"}, SourceError),
        ({"ElementType": "MET_USHORT"}, UnsupportedError),
        ({"ElementSpacing": "1000 1 1"}, SourceError),
        ({"ElementNumberOfChannels": "2"}, SourceError),
    ],
)
def test_headers_that_make_no_sense_are_refused(tmp_path: Path, changes: dict[str, str], kind: type[Exception]) -> None:
    with pytest.raises(kind):
        open_source(write(tmp_path, **changes))


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize(("promised", "text"), [(5, "promises 5 images but holds 4"), (3, "holds more")])
def test_images_are_counted_and_those_that_are_there_given(
    tmp_path: Path, compressed: bool, promised: int, text: str
) -> None:
    data = zlib.compress(CINE.tobytes()) if compressed else None
    path = write(tmp_path, data, DimSize=f"24 16 {promised}", CompressedData=str(compressed))
    count = 0
    with open_source(path) as source, pytest.raises(IncompleteError, match=text):
        for _ in source:
            count += 1
    assert count == min(promised, 4)


@pytest.mark.parametrize("letters", ["MF", "UF", "MN", "UN", "UNA"])
def test_the_transducer_comes_to_the_top(tmp_path: Path, letters: str) -> None:
    extra = f"UltrasoundImageOrientation = {letters}\nUltrasoundImageType = BRIGHTNESS"
    with open_source(write(tmp_path, extra=extra)) as source:
        frames, notes = list(source), " | ".join(source.notes)
    turned = letters[1] == "N"
    np.testing.assert_array_equal(frames[1].pixels, CINE[1][::-1] if turned else CINE[1])
    assert frames[1].orientation == letters[0] + "F" and ("turned" in notes) == turned


@pytest.mark.parametrize("kind", ["MET_USHORT", "MET_SHORT", "MET_FLOAT"])
@pytest.mark.parametrize("high_first", [False, True])
def test_deep_images_need_a_window(tmp_path: Path, kind: str, high_first: bool) -> None:
    order, name = (">" if high_first else "<"), {"MET_USHORT": "u2", "MET_SHORT": "i2", "MET_FLOAT": "f4"}[kind]
    data = (CINE.astype(np.int64) * 16).astype(order + name).tobytes()
    path = write(tmp_path, data, ElementType=kind, BinaryDataByteOrderMSB=str(high_first))
    with pytest.raises(UnsupportedError, match="--window LO,HI"):
        open_source(path)
    for frame, stored in zip(read(path, window=(0, 4080)), CINE, strict=True):
        np.testing.assert_array_equal(frame.pixels, stored)


def test_a_header_that_contradicts_itself_is_a_doubt(tmp_path: Path) -> None:
    extra = "\n".join(f"Seq_Frame{n:04}_Timestamp = {n}" for n in range(6))
    with open_source(write(tmp_path, extra=extra)) as source:
        assert "promises 4 images and describes 6" in source.doubts[0]
    packed = zlib.compress(CINE.tobytes())
    with open_source(write(tmp_path, packed, CompressedData="True", CompressedDataSize="7")) as source:
        assert "promises 7 compressed bytes" in source.doubts[0]
    with open_source(write(tmp_path, packed, CompressedData="True", CompressedDataSize=str(len(packed)))) as source:
        assert source.doubts == ()


def test_data_elsewhere_is_not_followed(tmp_path: Path) -> None:
    path = tmp_path / "a.mha"
    path.write_text("DimSize = 24 16 4\nElementType = MET_UCHAR\nElementDataFile = ../secret.raw\n", encoding="ascii")
    with pytest.raises(UnsupportedError, match="in another file"):
        open_source(str(path))


def test_damaged_files_give_typed_errors_only(tmp_path: Path) -> None:
    draw = np.random.default_rng(3)
    whole = Path(write(tmp_path, zlib.compress(CINE.tobytes()), "ElementSpacing = 0.3 0.2 1", CompressedData="True"))
    good = whole.read_bytes()
    refused = 0
    for _ in range(60):
        data = bytearray(good)
        for at in draw.integers(0, len(data), 2):
            data[at] = draw.integers(0, 256)
        whole.write_bytes(data)
        try:
            read(str(whole))
        except (SourceError, UnsupportedError) as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 15


@pytest.mark.needs_shared
@pytest.mark.parametrize(
    ("name", "count", "first_s", "crop"),
    [
        ("BoneUltrasound_L14.igs.mha", 21, 232.542071, None),
        ("NwirePhantomFreehandCropped.igs.mha", 20, 345.627957, (285, 335, 150, 200)),
        ("SegmentationTest_BKMedical_RandomStepperMotionData2_Trimmed.igs.mha", 6, None, None),
    ],
)
def test_recordings_of_plus(name: str, count: int, first_s: float | None, crop: Any) -> None:
    if not (CLIPS / name).is_file():
        pytest.skip("the data folder beside the checkout is not here")
    frames = read(str(CLIPS / name))
    assert len(frames) == count and {frame.orientation for frame in frames} == {"MF"}
    assert frames[0].crop == crop
    assert frames[0].t_source_ns == (None if first_s is None else round(first_s * 1e9))
    assert len({frame.pixels.tobytes() for frame in frames}) == count
