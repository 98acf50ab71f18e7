"""Sources: folder, DICOM, video and phantom give what the file holds, and say when it holds less than it promises."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tinyusfm_runtime.errors import InputError, MissingExtra, SourceError, UnsupportedError
from tinyusfm_runtime.frame import Frame, PixelFormat, VideoRange
from tinyusfm_runtime.overlay import encode_png
from tinyusfm_runtime.phantom import make_phantom
from tinyusfm_runtime.sources import cropped, open_source


def picture(shade: int, rows: int = 16, cols: int = 24) -> np.ndarray:
    """A ramp that differs from shade to shade."""
    return ((np.arange(rows * cols, dtype=np.int64).reshape(rows, cols) + shade) % 251).astype(np.uint8)


def read(location: str | Path, **options: Any) -> list[Frame]:
    with open_source(str(location), **options) as source:
        return list(source)


def read_until_error(location: str | Path, **options: Any) -> tuple[int, str]:
    """Number of good frames and the error that ended them."""
    count = 0
    with open_source(str(location), **options) as source, pytest.raises(SourceError) as caught:
        for _ in source:
            count += 1
    return count, str(caught.value)


# choosing a source


def test_unknown_location_lists_what_exists() -> None:
    with pytest.raises(InputError, match="dicom, folder, igtl, mha, phantom, push, shm, video"):
        open_source("nothing.xyz")


def test_unknown_option_names_those_there_are() -> None:
    with pytest.raises(InputError, match="phantom source has no option 'spacing_mm'; its options: height, width"):
        open_source("phantom:1", spacing_mm=(1.0, 1.0))


def test_region_crop_needs_a_source_that_marks_one() -> None:
    with pytest.raises(InputError, match="no option 'region'"):
        open_source("phantom:1", crop="region")


def test_crop_keeps_what_lies_outside_from_leaving() -> None:
    whole, window = read("phantom:3")[0], read("phantom:3", crop=(10, 20, 64, 80))[0]
    np.testing.assert_array_equal(window.pixels, whole.pixels[10:74, 20:100])
    assert window.spacing_mm == whole.spacing_mm


@pytest.mark.parametrize("crop", [(-1, 0, 20, 20), (0, 0, 4, 20), (0, 390, 20, 20), (260, 0, 20, 20)])
def test_crop_outside_the_frame_is_refused(crop: tuple[int, int, int, int]) -> None:
    with pytest.raises(SourceError, match="does not lie inside"):
        cropped(make_phantom(0).frame, crop)


# phantom


def test_phantom_range_is_the_same_phantoms_again() -> None:
    frames = read("phantom:4-6")
    assert [frame.seq for frame in frames] == [0, 1, 2]
    np.testing.assert_array_equal(frames[1].pixels, make_phantom(5).frame.pixels)
    assert frames[1].spacing_mm == make_phantom(5).frame.spacing_mm
    times = [frame.t_recv_ns for frame in frames]
    assert None not in times and times == sorted(times)


@pytest.mark.parametrize("text", ["phantom:", "phantom:a", "phantom:5-2", "phantom:0-999999999", "phantom:-1"])
def test_phantom_range_that_makes_no_sense_is_refused(text: str) -> None:
    with pytest.raises(SourceError, match="phantom"):
        open_source(text)


@pytest.fixture
def cv2() -> Any:
    return pytest.importorskip("cv2", reason="install tinyusfm-edge[opencv]")


# DICOM


@pytest.fixture
def pydicom() -> Any:
    return pytest.importorskip("pydicom", reason="install tinyusfm-edge[dicom]")


@pytest.fixture
def write_dicom(tmp_path: Path, pydicom: Any) -> Callable[..., Path]:
    """Writes an uncompressed ultrasound cine; keywords become data elements."""

    def write(
        frames: np.ndarray, photometric: str = "MONOCHROME2", region: dict[str, Any] | None = None, **more: Any
    ) -> Path:
        dataset = pydicom.Dataset()
        dataset.file_meta = pydicom.dataset.FileMetaDataset()
        dataset.file_meta.TransferSyntaxUID = more.pop("syntax", pydicom.uid.ExplicitVRLittleEndian)
        dataset.SOPClassUID = pydicom.uid.UltrasoundMultiFrameImageStorage
        dataset.SOPInstanceUID = "1.2.3"
        dataset.PatientName = "Doe^Jane"
        dataset.NumberOfFrames, dataset.Rows, dataset.Columns = frames.shape[:3]
        dataset.SamplesPerPixel = 1 if frames.ndim == 3 else 3
        if frames.ndim == 4:
            dataset.PlanarConfiguration = 0
        dataset.PhotometricInterpretation = photometric
        dataset.BitsAllocated = dataset.BitsStored = 8
        dataset.HighBit, dataset.PixelRepresentation = 7, 0
        dataset.PixelData = frames.tobytes()
        if region is not None:
            item = pydicom.Dataset()
            rows, cols = frames.shape[1:3]
            values = {
                "RegionSpatialFormat": 1, "RegionDataType": 1, "RegionLocationMinX0": 2, "RegionLocationMinY0": 1,
                "RegionLocationMaxX1": cols - 3, "RegionLocationMaxY1": rows - 1, "PhysicalUnitsXDirection": 3,
                "PhysicalUnitsYDirection": 3, "PhysicalDeltaX": 0.03, "PhysicalDeltaY": 0.02, **region,
            }  # fmt: skip
            for key, value in values.items():
                setattr(item, key, value)
            dataset.SequenceOfUltrasoundRegions = [item]
        for key, value in more.items():
            setattr(dataset, key, value)
        path = tmp_path / "cine.dcm"
        dataset.save_as(path, enforce_file_format=True)
        return path

    return write


CINE = np.stack([picture(shade) for shade in range(5)])


def test_dicom_grey_cine_with_region_spacing_and_time(write_dicom: Callable[..., Path]) -> None:
    frames = read(write_dicom(CINE, region={}, FrameTime="40"))
    np.testing.assert_array_equal(np.stack([frame.pixels for frame in frames]), CINE)
    assert {frame.pixel_format for frame in frames} == {PixelFormat.GREY}
    # centimetres a column and a row become (row, column) millimetres
    assert frames[0].spacing_mm == pytest.approx((0.2, 0.3))
    assert [frame.t_source_ns for frame in frames] == [i * 40_000_000 for i in range(5)]


def test_dicom_region_crop(write_dicom: Callable[..., Path]) -> None:
    frames = read(write_dicom(CINE, region={}), crop="region")
    np.testing.assert_array_equal(frames[0].pixels, CINE[0, 1:16, 2:22])
    assert frames[0].crop == (1, 2, 15, 20)
    with pytest.raises(SourceError, match="marks no ultrasound region"):
        open_source(str(write_dicom(CINE)), crop="region")


def test_dicom_minimum_is_white_is_inverted(write_dicom: Callable[..., Path]) -> None:
    np.testing.assert_array_equal(read(write_dicom(CINE, "MONOCHROME1"))[2].pixels, 255 - CINE[2])


def test_dicom_colour(write_dicom: Callable[..., Path], pydicom: Any) -> None:
    colour = np.stack([CINE, CINE[:, ::-1], CINE[:, :, ::-1]], axis=-1)
    frame = read(write_dicom(colour, "RGB"))[1]
    assert frame.pixel_format is PixelFormat.RGB
    np.testing.assert_array_equal(frame.pixels, colour[1])
    frame = read(write_dicom(colour, "YBR_FULL"))[1]
    from pydicom.pixels import convert_color_space

    np.testing.assert_array_equal(frame.pixels, convert_color_space(colour[1], "YBR_FULL", "RGB"))


def test_dicom_palette_becomes_its_colours(write_dicom: Callable[..., Path]) -> None:
    ramp = np.arange(256, dtype="<u2") * 257
    tables = {}
    for name, values in (("Red", ramp), ("Green", ramp[::-1]), ("Blue", ramp // 2)):
        tables[f"{name}PaletteColorLookupTableDescriptor"] = [256, 0, 16]
        tables[f"{name}PaletteColorLookupTableData"] = values.tobytes()
    frame = read(write_dicom(CINE, "PALETTE COLOR", **tables))[3]
    assert frame.pixel_format is PixelFormat.RGB
    np.testing.assert_array_equal(frame.pixels, np.stack([CINE[3], 255 - CINE[3], CINE[3] // 2], axis=-1))


@pytest.mark.parametrize(
    ("region", "more", "spacing", "note"),
    [
        (None, {"PixelSpacing": ["0.5", "0.25"]}, (0.5, 0.25), ""),
        (None, {}, None, "gives no spacing"),
        ({"PhysicalUnitsXDirection": 4}, {}, None, "no spacing in cm"),
        ({"RegionLocationMaxX1": 400}, {}, None, "resized or cut"),
        ({"RegionLocationMaxX1": 24, "RegionLocationMaxY1": 16}, {}, (0.2, 0.3), ""),
        ({"RegionSpatialFormat": 3}, {"PixelSpacing": ["0.5", "0.5"]}, (0.5, 0.5), ""),
    ],
    ids=["pixel spacing", "none", "seconds", "resized file", "one pixel over", "spectrum only"],
)
def test_dicom_spacing_rules(
    write_dicom: Callable[..., Path], region: dict[str, Any] | None, more: dict[str, Any], spacing: Any, note: str
) -> None:
    with open_source(str(write_dicom(CINE, region=region, **more))) as source:
        frame = next(iter(source))
        assert frame.spacing_mm == (None if spacing is None else pytest.approx(spacing))
        assert note in " ".join(source.notes) and bool(note) == bool(source.notes)


def test_dicom_millimetres_that_contradict_each_other_are_a_doubt(write_dicom: Callable[..., Path]) -> None:
    with open_source(str(write_dicom(CINE, region={}, PixelSpacing=[0.1, 0.1]))) as source:
        assert next(iter(source)).spacing_mm == pytest.approx((0.2, 0.3))
        assert "the region counts" in source.doubts[0]  # type: ignore[attr-defined]
    with open_source(str(write_dicom(CINE, region={}, PixelSpacing=[0.2, 0.3]))) as source:
        assert source.doubts == ()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("tags", "want_ms", "words"),
    [
        ({"FrameTimeVector": [0, 40, 80, 120, 160]}, [0, 40, 80, 120, 160], "times and not the steps"),
        ({"FrameTimeVector": [0, 40, 42, 40, 41]}, [0, 40, 82, 122, 163], ""),
        ({"FrameTime": "40000", "CineRate": 25}, [0, 40, 80, 120, 160], "cannot be"),
        ({"FrameTime": "40000"}, None, "cannot be"),
    ],
    ids=["times", "steps", "another tag", "no other tag"],
)
def test_dicom_times_that_cannot_be_are_a_doubt(
    write_dicom: Callable[..., Path], tags: dict[str, Any], want_ms: list[int] | None, words: str
) -> None:
    with open_source(str(write_dicom(CINE, **tags))) as source:
        found = [frame.t_source_ns for frame in source]
        doubts = " ".join(source.doubts)  # type: ignore[attr-defined]
    assert found == ([None] * 5 if want_ms is None else [ms * 1_000_000 for ms in want_ms])
    assert words in doubts and bool(doubts) == bool(words)


def test_dicom_spacing_can_be_overruled(write_dicom: Callable[..., Path]) -> None:
    assert read(write_dicom(CINE, region={}), spacing_mm=(0.4, 0.5))[0].spacing_mm == (0.4, 0.5)


@pytest.mark.parametrize("keep", [0.35, 0.6, 0.95])
def test_dicom_that_breaks_off_gives_the_good_frames_then_an_error(
    write_dicom: Callable[..., Path], keep: float
) -> None:
    path = write_dicom(CINE)
    data = path.read_bytes()
    header = len(data) - CINE.size
    path.write_bytes(data[: header + int(CINE.size * keep)])
    count, message = read_until_error(path)
    assert count == int(5 * keep)
    assert f"promises 5 frames but holds {count} whole ones" in message


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"NumberOfFrames": 2_000_000_000}, "too many"),
        ({"Rows": 0}, "each side must be"),
        ({"Rows": 65535}, "each side must be"),
        ({"BitsStored": 12, "BitsAllocated": 12, "HighBit": 11}, "12 of 12 bits"),
        ({"PhotometricInterpretation": "CMYK"}, "colour space CMYK"),
        ({"SamplesPerPixel": 4}, "4 samples per pixel"),
    ],
)
def test_dicom_that_promises_the_impossible_is_refused(
    write_dicom: Callable[..., Path], more: dict[str, Any], reason: str
) -> None:
    with pytest.raises(SourceError, match=reason):
        open_source(str(write_dicom(CINE, **more)))


def deflate(path: Path, pydicom: Any, body: bytes) -> None:
    """Puts another deflated data set behind the head of a file."""
    with path.open("rb") as file:
        pydicom.filereader.read_preamble(file, False)
        pydicom.filereader._read_file_meta_info(file)
        head = path.read_bytes()[: file.tell()]
    stream = zlib.compressobj(9, zlib.DEFLATED, -15)
    path.write_bytes(head + stream.compress(body) + stream.flush())


def test_deflated_dicom_gives_the_same_frames(write_dicom: Callable[..., Path], pydicom: Any) -> None:
    want = read(str(write_dicom(CINE, region={}, FrameTime="40")))
    path = write_dicom(CINE, region={}, FrameTime="40", syntax=pydicom.uid.DeflatedExplicitVRLittleEndian)
    found = read(str(path))
    assert len(found) == len(CINE) and found[1].spacing_mm == want[1].spacing_mm
    assert [frame.t_source_ns for frame in found] == [frame.t_source_ns for frame in want]
    np.testing.assert_array_equal([frame.pixels for frame in found], CINE)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    with pytest.raises(SourceError, match="promises"), open_source(str(path)) as cut:
        list(cut)


def test_a_deflated_bomb_is_refused_in_time(write_dicom: Callable[..., Path], pydicom: Any) -> None:
    path = write_dicom(CINE, syntax=pydicom.uid.DeflatedExplicitVRLittleEndian)
    # a private element of a gigabyte in front of the image
    deflate(path, pydicom, b"\x09\0\x10\x10OB\0\0" + (1 << 30).to_bytes(4, "little") + bytes(300 << 20))
    assert path.stat().st_size < 1 << 20
    with pytest.raises(SourceError, match="unpacks to more than 256 MiB.*dcmconv"):
        open_source(str(path))
    path.write_bytes(path.read_bytes()[:-1000] + b"\xff" * 1000)
    with pytest.raises(SourceError):
        open_source(str(path))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "file is empty"),
        (b"x" * 50, "DICM is missing at byte 128"),
        (b"\0" * 128 + b"DICM" + b"\xff" * 300, "no DICOM transfer syntax"),
    ],
    ids=["empty", "text", "rubbish behind the mark"],
)
def test_what_is_no_dicom_is_refused_in_one_quiet_line(
    tmp_path: Path, pydicom: Any, capfd: pytest.CaptureFixture[str], content: bytes, reason: str
) -> None:
    (tmp_path / "a.dcm").write_bytes(content)
    with pytest.raises(SourceError, match=reason) as caught:
        open_source(str(tmp_path / "a.dcm"))
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def clip(pydicom: Any) -> Path:
    """The 30-frame JPEG cine inside the pydicom wheel."""
    path = Path(pydicom.__file__).parent / "data" / "test_files" / "examples_ybr_color.dcm"
    if not path.is_file():
        pytest.skip("this pydicom came without its test files")
    return path


@pytest.fixture
def jpeg_clip(pydicom: Any) -> Path:
    try:
        open_source(str(clip(pydicom)))
    except (MissingExtra, UnsupportedError):
        pytest.skip("no JPEG decoder: install tinyusfm-edge[dicom]")
    return clip(pydicom)


def test_the_clip_in_the_wheel_is_read_whole(jpeg_clip: Path) -> None:
    with open_source(str(jpeg_clip)) as source:
        frames = list(source)
        assert "no spacing" in " ".join(source.notes), "its region belongs to a larger picture"
    assert len(frames) == 30
    assert {frame.pixels.shape for frame in frames} == {(240, 320, 3)}
    assert {frame.spacing_mm for frame in frames} == {None}
    assert frames[29].t_source_ns == pytest.approx(29 * 33.333e6, abs=1e3)
    assert len({frame.pixels.tobytes() for frame in frames}) >= 28, "two of its pictures stand still"


@pytest.mark.parametrize("keep", [0.3, 0.9, 0.999])
def test_jpeg_dicom_that_breaks_off_does_not_end_silently(jpeg_clip: Path, tmp_path: Path, keep: float) -> None:
    data = jpeg_clip.read_bytes()
    path = tmp_path / "cut.dcm"
    path.write_bytes(data[: int(len(data) * keep)])
    count, message = read_until_error(path)
    assert 0 < count < 30
    assert f"promises 30 frames but holds {count}" in message
    whole = read(jpeg_clip)
    with open_source(str(path)) as source:
        for good, frame in zip(whole[:count], source, strict=False):
            np.testing.assert_array_equal(good.pixels, frame.pixels)


def test_jpeg_dicom_of_another_size_inside_is_refused(jpeg_clip: Path, tmp_path: Path) -> None:
    data = jpeg_clip.read_bytes()
    start = data.index(b"\xff\xc0\x00\x11")
    bomb = data[: start + 5] + struct.pack(">HH", 60000, 60000) + data[start + 9 :]
    (tmp_path / "bomb.dcm").write_bytes(bomb)
    with pytest.raises(SourceError, match="the JPEG says 60000x60000"):
        open_source(str(tmp_path / "bomb.dcm"))


def test_dicom_without_a_suffix_is_recognised(jpeg_clip: Path, tmp_path: Path) -> None:
    (tmp_path / "IM0001").write_bytes(jpeg_clip.read_bytes())
    assert len(read(tmp_path / "IM0001")) == 30


# video


@pytest.fixture
def av() -> Any:
    return pytest.importorskip("av", reason="install tinyusfm-edge[video]")


def write_video(av: Any, path: Path, codec: str, pix_fmt: str, count: int = 20, color_range: int = 0) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, pix_fmt
        if color_range:
            stream.codec_context.color_range = color_range
        for i in range(count):
            rgb = np.full((48, 64, 3), 40 + 8 * (i % 26), np.uint8)
            picture_av = av.VideoFrame.from_ndarray(rgb, format="rgb24").reformat(format=pix_fmt)
            for packet in stream.encode(picture_av):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return path


def test_lossless_grey_video_comes_back_code_by_code(av: Any, tmp_path: Path) -> None:
    frames = read(write_video(av, tmp_path / "a.mkv", "ffv1", "gray"))
    assert [int(frame.pixels[0, 0]) for frame in frames] == [40 + 8 * i for i in range(20)]
    assert {(frame.pixel_format, frame.video_range) for frame in frames} == {(PixelFormat.GREY, VideoRange.FULL)}
    times = [frame.t_source_ns for frame in frames]
    assert times[0] == 0 and times[1] == pytest.approx(40e6)


def test_yuv_video_is_its_brightness_plane_in_limited_range(av: Any, tmp_path: Path) -> None:
    frames = read(write_video(av, tmp_path / "a.mkv", "ffv1", "yuv420p"))
    assert {(frame.pixel_format, frame.video_range) for frame in frames} == {(PixelFormat.GREY, VideoRange.LIMITED)}
    # grey code v of the full range is 16 + 219 v / 255 of the limited one
    for i, frame in enumerate(frames):
        assert abs(int(frame.pixels[10, 10]) - (16 + 219 * (40 + 8 * i) / 255)) <= 1


def test_full_range_yuv_is_said_to_be_full(av: Any, tmp_path: Path) -> None:
    frames = read(write_video(av, tmp_path / "a.avi", "mjpeg", "yuvj420p"))
    assert {frame.video_range for frame in frames} == {VideoRange.FULL}


def test_colour_on_request_and_for_rgb_streams(av: Any, tmp_path: Path) -> None:
    path = write_video(av, tmp_path / "a.mkv", "ffv1", "yuv420p")
    frame = read(path, colour=True)[5]
    assert frame.pixel_format is PixelFormat.RGB and frame.video_range is VideoRange.FULL
    assert abs(int(frame.pixels[10, 10, 0]) - 80) <= 2
    assert read(write_video(av, tmp_path / "b.mkv", "ffv1", "bgr0"))[0].pixel_format is PixelFormat.RGB


@pytest.mark.parametrize(
    ("name", "codec", "pix_fmt"),
    [("a.mkv", "ffv1", "gray"), ("a.mp4", "mpeg4", "yuv420p"), ("a.avi", "mjpeg", "yuvj420p")],
)
def test_video_that_breaks_off_is_an_error(av: Any, tmp_path: Path, name: str, codec: str, pix_fmt: str) -> None:
    path = write_video(av, tmp_path / name, codec, pix_fmt, count=50)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    count, message = read_until_error(path)
    assert count < 50
    assert "promises" in message or "breaks off" in message or "cannot be read" in message


def test_what_is_no_video_is_an_error(av: Any, tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"not a video" * 100)
    assert read_until_error(tmp_path / "a.mp4")[0] == 0
    with pytest.raises(SourceError, match="does not exist"):
        open_source(str(tmp_path / "gone.mp4"))
    with pytest.raises(InputError, match="av, opencv"):
        open_source(str(tmp_path / "a.mp4"), reader="vlc")


def test_opencv_reader_says_so(av: Any, cv2: Any, tmp_path: Path) -> None:
    path = write_video(av, tmp_path / "a.mkv", "ffv1", "gray")
    with open_source(str(path), reader="opencv") as source:
        frames = list(source)
        assert source.reader == "opencv" and "OpenCV" in " ".join(source.notes)
    assert len(frames) == 20 and frames[0].pixel_format is PixelFormat.BGR
    assert [int(frame.pixels[0, 0, 0]) for frame in frames] == [40 + 8 * i for i in range(20)]


def test_a_missing_library_names_its_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encode_png(picture(1)))
    (tmp_path / "a.mp4").write_bytes(b"")
    (tmp_path / "a.dcm").write_bytes(b"")
    for name in ("cv2", "PIL", "av", "pydicom"):
        monkeypatch.setitem(__import__("sys").modules, name, None)
    for location, extra in (("a.png", "images"), ("a.mp4", "video"), ("a.dcm", "dicom")):
        with pytest.raises(MissingExtra, match=rf"pip install '.+\[{extra}\]'"):
            open_source(str(tmp_path / location))


def test_damaged_dicom_gives_typed_errors_only(
    jpeg_clip: Path, write_dicom: Callable[..., Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(11)
    plain = write_dicom(CINE, region={}).read_bytes()
    refused = 0
    for whole, span in ((plain, 1500), (jpeg_clip.read_bytes(), 3000)):
        for _ in range(25):
            data = bytearray(whole)
            for at in rng.integers(128, span, 3):
                data[at] = rng.integers(0, 256)
            (tmp_path / "damaged.dcm").write_bytes(data)
            try:
                read(tmp_path / "damaged.dcm")
            except (SourceError, MissingExtra, UnsupportedError) as error:
                refused += 1
                assert "\n" not in str(error) and "Doe" not in str(error)
    assert refused > 5, "some of the damage was seen"
    captured = capfd.readouterr()
    assert captured.out == "" and "Doe" not in captured.err
