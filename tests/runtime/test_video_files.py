"""Video files: both readers give the same frames for every file, obey what it says, and say when it is not whole."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tinyusfm_runtime.errors import IncompleteError, SourceError, UnsupportedError
from tinyusfm_runtime.frame import Frame
from tinyusfm_runtime.images.orientation import upright
from tinyusfm_runtime.numerics.preprocess import to_grey
from tinyusfm_runtime.sources import open_source
from tinyusfm_runtime.sources.video.containers import orientation_of, promised_bytes

av = pytest.importorskip("av", reason="install tinyusfm-edge[video]")
READERS = ("av", "opencv")
ROWS, COLS = 48, 64
MATRICES = {
    1: (1, 0, 0, 1), 2: (-1, 0, 0, 1), 3: (-1, 0, 0, -1), 4: (1, 0, 0, -1),
    5: (0, 1, 1, 0), 6: (0, 1, -1, 0), 7: (0, -1, -1, 0), 8: (0, -1, 1, 0),
}  # fmt: skip
"""Orientation -> a, b, c, d of the display matrix of an MP4."""


@pytest.fixture(params=READERS)
def reader(request: pytest.FixtureRequest) -> str:
    if request.param == "opencv":
        pytest.importorskip("cv2", reason="install tinyusfm-edge[opencv]")
    return str(request.param)


def image(index: int) -> np.ndarray:
    """A corner is bright, so that every turn shows; brightness tells the index."""
    pixels = np.full((ROWS, COLS, 3), 60 + index, np.uint8)
    pixels[: ROWS // 2, : COLS // 2] += 120
    return pixels


def write(
    path: Path, codec: str = "mpeg4", pix_fmt: str = "yuv420p", count: int = 20, times: list[int] | None = None,
    aspect: Fraction | None = None, cover: bool = False,
) -> Path:  # fmt: skip
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = COLS, ROWS, pix_fmt
        if aspect is not None:
            stream.codec_context.sample_aspect_ratio = aspect
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        art = None
        if cover:
            art = container.add_stream("png", rate=1)
            art.width, art.height, art.pix_fmt, art.disposition = 32, 32, "rgb24", 0x400
            for packet in [*art.encode(av.VideoFrame.from_ndarray(np.full((32, 32, 3), 9, np.uint8))), *art.encode()]:
                container.mux(packet)
        for index in range(count):
            frame = av.VideoFrame.from_ndarray(image(index), format="rgb24").reformat(format=pix_fmt)
            if times is not None:
                frame.pts, frame.time_base = times[index], Fraction(1, 1000)
            for packet in stream.encode(frame):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return path


def read(path: Path, reader: str, **options: Any) -> tuple[list[Frame], str, str, str]:
    """Frames, notes, doubts and the text that ended them."""
    frames: list[Frame] = []
    end = ""
    with open_source(str(path), reader=reader, **options) as source:
        try:
            for frame in source:
                frames.append(frame)
        except SourceError as error:
            end = f"{type(error).__name__}: {error}"
        return frames, " | ".join(source.notes), " | ".join(source.doubts), end


def grey(frame: Frame) -> np.ndarray:
    return to_grey(frame.pixels, frame.pixel_format, frame.video_range).astype(int)


def boxes(data: bytes, at: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    while at + 8 <= end:
        size = int.from_bytes(data[at : at + 4], "big")
        yield data[at + 4 : at + 8], at, size
        at += size


def with_matrix(path: Path, matrix: tuple[int, int, int, int]) -> Path:
    """The MP4 with another display matrix in its track header."""
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 44
    a, b, c, d = (value << 16 for value in matrix)
    data[at : at + 36] = b"".join(struct.pack(">i", v) for v in (a, b, 0, c, d, 0, 0, 0, 1 << 30))
    path.write_bytes(data)
    return path


def cover_first(path: Path) -> Path:
    """The MP4 with its cover in front of its tracks; the media before it do not move."""
    data = path.read_bytes()
    ((_, at, size),) = [box for box in boxes(data, 0, len(data)) if box[0] == b"moov"]
    parts = {kind: data[a : a + n] for kind, a, n in boxes(data, at + 8, at + size)}
    order = [b"mvhd", b"udta", *(kind for kind in parts if kind not in (b"mvhd", b"udta"))]
    path.write_bytes(data[: at + 8] + b"".join(parts[kind] for kind in order) + data[at + size :])
    return path


def avi(path: Path, drop: int | None = None, header: int = 0) -> Path:
    """An AVI, rebuilt with one coded image of no bytes, or with another count in its headers."""
    data = write(path, "mjpeg", "yuvj420p").read_bytes()
    at = data.index(b"movi")
    end = at + int.from_bytes(data[at - 4 : at], "little")
    body, index, place, number = b"movi", b"", at + 4, 0
    while place + 8 <= end:
        name, size = data[place : place + 4], int.from_bytes(data[place + 4 : place + 8], "little")
        chunk = b"" if number == drop else data[place + 8 : place + 8 + size]
        index += name + struct.pack("<III", 16, len(body), len(chunk))
        body += name + struct.pack("<I", len(chunk)) + chunk + b"\0" * (len(chunk) % 2)
        place, number = place + 8 + size + size % 2, number + 1
    start = bytearray(data[12 : at - 8])
    for tag, offset in ((b"avih", 8 + 16), (b"strh", 8 + 32)):
        where = start.index(tag) + offset
        count = int.from_bytes(start[where : where + 4], "little")
        assert count == 20
        start[where : where + 4] = struct.pack("<I", count + header)
    rest = b"LIST" + struct.pack("<I", len(body)) + body + b"idx1" + struct.pack("<I", len(index)) + index
    payload = b"AVI " + bytes(start) + rest
    path.write_bytes(b"RIFF" + struct.pack("<I", len(payload)) + payload)
    return path


# what the file says about its image


@pytest.mark.parametrize("orientation", range(1, 9))
def test_display_matrix_is_obeyed(tmp_path: Path, reader: str, orientation: int) -> None:
    plain = read(write(tmp_path / "a.mp4"), reader)[0]
    frames, notes, doubts, end = read(with_matrix(tmp_path / "a.mp4", MATRICES[orientation]), reader)
    assert (len(frames), doubts, end) == (20, "", "")
    for stored, frame in zip(plain, frames, strict=True):
        np.testing.assert_array_equal(frame.pixels, upright(stored.pixels, orientation))
    assert ("orientation" in notes) == (orientation != 1)
    bright = grey(frames[0])
    corners = {name: bright[r, c] > 120 for name, r, c in (("TL", 4, 4), ("TR", 4, -5), ("BL", -5, 4), ("BR", -5, -5))}
    where = {1: "TL", 2: "TR", 3: "BR", 4: "BL", 5: "TL", 6: "TR", 7: "BR", 8: "BL"}[orientation]
    assert [name for name, lit in corners.items() if lit] == [where]


def test_a_turn_by_another_angle_is_refused(tmp_path: Path, reader: str) -> None:
    data = bytearray(write(tmp_path / "a.mp4").read_bytes())
    at = data.index(b"tkhd") + 44
    slanted = (46341, 46341, 0, -46341, 46341, 0, 0, 0, 1 << 30)
    data[at : at + 36] = b"".join(struct.pack(">i", v) for v in slanted)
    (tmp_path / "a.mp4").write_bytes(data)
    assert "multiple of 90 degrees" in read(tmp_path / "a.mp4", reader)[3]
    assert orientation_of(0.7, 0.7, -0.7, 0.7) is None and orientation_of(0, 2, -1, 0) == 6


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.mov"])
def test_pixels_that_are_not_square_stretch_a_square_spacing(tmp_path: Path, reader: str, name: str) -> None:
    path = write(tmp_path / name, aspect=Fraction(2, 1))
    frames, notes, *_ = read(path, reader, spacing_mm=(0.2, 0.2))
    assert {frame.spacing_mm for frame in frames} == {(0.2, 0.4)} and "not square" in notes
    assert read(path, reader, spacing_mm=(0.2, 0.4))[0][0].spacing_mm == (0.2, 0.4)
    assert "not square" in read(path, reader)[1]
    assert "columns are 0.5 times" in read(path, reader, spacing_mm=(0.2, 0.1))[3]
    if name == "a.mp4":
        turned = read(with_matrix(path, MATRICES[6]), reader, spacing_mm=(0.2, 0.2))[0]
        assert turned[0].spacing_mm == (0.2, 0.1)


def test_a_cover_is_not_the_video(tmp_path: Path, reader: str) -> None:
    frames, _, doubts, end = read(write(tmp_path / "a.mp4", cover=True), reader)
    assert (len(frames), doubts, end) == (20, "", "") and frames[0].pixels.shape[:2] == (ROWS, COLS)


def test_a_cover_in_front_is_not_the_video(tmp_path: Path) -> None:
    path = cover_first(write(tmp_path / "a.mp4", cover=True))
    frames, notes, doubts, end = read(path, "av")
    assert (len(frames), doubts, end) == (20, "", "") and "cover" in notes
    assert frames[0].pixels.shape == (ROWS, COLS)
    pytest.importorskip("cv2", reason="install tinyusfm-edge[opencv]")
    with open_source(str(path), reader="opencv") as source, pytest.raises(UnsupportedError, match="cover.*pip install"):
        list(source)


def test_two_videos_in_one_file_are_told(tmp_path: Path, reader: str) -> None:
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        streams = [container.add_stream("mpeg4", rate=25) for _ in range(2)]
        for stream in streams:
            stream.width, stream.height, stream.pix_fmt = COLS, ROWS, "yuv420p"
        for index in range(5):
            for stream in streams:
                for packet in stream.encode(av.VideoFrame.from_ndarray(image(index), format="rgb24")):
                    container.mux(packet)
        for stream in streams:
            for packet in stream.encode():
                container.mux(packet)
    frames, _, doubts, _ = read(path, reader)
    assert len(frames) == 5 and "2 videos" in doubts


# both readers


@pytest.mark.parametrize(
    ("name", "codec", "pix_fmt"),
    [
        ("a.mp4", "mpeg4", "yuv420p"), ("a.mov", "mpeg4", "yuv420p"), ("a.mkv", "ffv1", "gray"),
        ("a.mkv", "ffv1", "yuv444p"), ("a.avi", "mjpeg", "yuvj420p"), ("a.mkv", "ffv1", "bgr0"),
        ("a.mpg", "mpeg2video", "yuv420p"), ("a.ts", "mpeg2video", "yuv420p"), ("a.flv", "flv", "yuv420p"),
        ("a.wmv", "wmv2", "yuv420p"), ("a.webm", "libvpx-vp9", "yuv420p"), ("a.avi", "rawvideo", "bgr24"),
    ],
)  # fmt: skip
def test_both_readers_agree(tmp_path: Path, name: str, codec: str, pix_fmt: str) -> None:
    pytest.importorskip("cv2", reason="install tinyusfm-edge[opencv]")
    try:
        path = write(tmp_path / name, codec, pix_fmt)
    except Exception as error:
        pytest.skip(f"this PyAV cannot write it: {type(error).__name__}")
    agree(path)


def agree(path: Path) -> None:
    """Both readers give as many frames, of one size, the same to a few codes, at the same times."""
    (one, _, doubts, end), (two, _, other_doubts, other_end) = (read(path, reader) for reader in READERS)
    assert len(one) == len(two) > 0
    assert bool(doubts) == bool(other_doubts) and bool(end) == bool(other_end)
    for a, b in zip(one, two, strict=True):
        assert a.pixels.shape[:2] == b.pixels.shape[:2]
        assert np.abs(grey(a) - grey(b)).mean() < 3
        assert a.t_source_ns is not None and b.t_source_ns is not None
    starts = one[0].t_source_ns or 0, two[0].t_source_ns or 0
    for a, b in zip(one, two, strict=True):
        assert abs(((a.t_source_ns or 0) - starts[0]) - ((b.t_source_ns or 0) - starts[1])) < 45e6


@pytest.mark.slow
@pytest.mark.needs_shared
def test_both_readers_agree_on_real_clips(shared_folder: Path) -> None:
    pytest.importorskip("cv2", reason="install tinyusfm-edge[opencv]")
    clips = sorted(p for p in (shared_folder / "data" / "clips").iterdir() if p.suffix in (".mp4", ".mov"))
    assert len(clips) >= 10
    for path in clips:
        agree(path)


def test_a_variable_rate_is_kept(tmp_path: Path, reader: str) -> None:
    times = [0, 40, 80, 280, 320, 720]
    frames, *_ = read(write(tmp_path / "a.mkv", count=6, times=times), reader)
    assert [round((frame.t_source_ns or 0) / 1e6) for frame in frames] == times


# whole or not


def test_an_image_dropped_by_the_recorder_is_a_doubt(tmp_path: Path, reader: str) -> None:
    frames, _, doubts, end = read(avi(tmp_path / "a.avi", drop=5), reader)
    assert (len(frames), end) == (19, "") and "promises 20 images and holds 19 to its end" in doubts


@pytest.mark.parametrize("off", [1, -1])
def test_a_count_that_is_off_by_one_is_a_doubt(tmp_path: Path, reader: str, off: int) -> None:
    frames, _, doubts, end = read(avi(tmp_path / "a.avi", header=off), reader)
    assert (len(frames), end) == (20, "") and f"promises {20 + off} images and holds 20" in doubts
    assert read(avi(tmp_path / "a.avi"), reader)[2] == ""


@pytest.mark.parametrize("keep", [0.5, 0.9, 0.98])
@pytest.mark.parametrize(
    ("name", "codec", "pix_fmt"),
    [("a.mkv", "mjpeg", "yuvj420p"), ("a.avi", "mjpeg", "yuvj420p"), ("a.webm", "libvpx-vp9", "yuv420p")],
)
def test_a_file_that_is_cut_off_is_never_whole(
    tmp_path: Path, reader: str, name: str, codec: str, pix_fmt: str, keep: float
) -> None:
    path = write(tmp_path / name, codec, pix_fmt, count=60)
    whole = len(read(path, reader)[0])
    assert read(path, reader)[3] == "" and whole == 60
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    frames, _, _, end = read(path, reader)
    assert len(frames) <= whole and end.startswith("IncompleteError" if frames else "SourceError")


@pytest.mark.parametrize(
    ("name", "codec", "pix_fmt"),
    [
        ("a.wmv", "wmv2", "yuv420p"), ("a.y4m", "rawvideo", "yuv420p"), ("a.y4m", "rawvideo", "yuv444p"),
        ("a.ts", "mpeg2video", "yuv420p"), ("a.mjpeg", "mjpeg", "yuvj420p"), ("a.flv", "flv1", "yuv420p"),
    ],
)  # fmt: skip
def test_streams_without_an_index_that_are_cut_off(
    tmp_path: Path, reader: str, name: str, codec: str, pix_fmt: str
) -> None:
    path = write(tmp_path / name, codec, pix_fmt, count=30)
    frames, _, _, end = read(path, reader)
    assert (len(frames), end) == (30, "")
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 9 // 10 // 188 * 188 + 77])
    frames, _, _, end = read(path, reader)
    assert 0 < len(frames) <= 30 and end.startswith("IncompleteError")


@pytest.mark.parametrize("pix_fmt", ["yuv420p10le", "gray16le", "gray10le"])
def test_video_of_more_than_8_bits_is_refused_with_its_mend(tmp_path: Path, reader: str, pix_fmt: str) -> None:
    path = write(tmp_path / "a.mkv", "ffv1", pix_fmt, count=3)
    frames, _, _, end = read(path, reader)
    assert not frames and "-bit video" in end and "ffmpeg -pix_fmt yuv420p" in end


def test_a_motion_jpeg_is_a_video_and_not_its_first_image(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mjpeg", "mjpeg", "yuvj420p", count=5)
    assert len(read(path, "av")[0]) == 5
    still = tmp_path / "a.jpg"
    still.write_bytes(path.read_bytes())
    with open_source(str(still)) as source, pytest.raises(IncompleteError, match="5 JPEG images one behind the other"):
        list(source)


def test_a_file_whose_index_is_in_front_and_that_is_cut_off(tmp_path: Path, reader: str) -> None:
    path = write(tmp_path / "a.mp4", "mjpeg", "yuvj420p", count=60)
    front = tmp_path / "front.mp4"
    with av.open(str(path)) as source, av.open(str(front), "w", options={"movflags": "+faststart"}) as goal:
        stream = goal.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(source.streams.video[0]):
            if packet.dts is not None:
                packet.stream = stream
                goal.mux(packet)
    assert read(front, reader)[3] == ""
    data = front.read_bytes()
    front.write_bytes(data[: int(len(data) * 0.7)])
    frames, _, _, end = read(front, reader)
    assert 20 < len(frames) < 60 and end.startswith("IncompleteError")


def test_promised_bytes_of_each_container(tmp_path: Path) -> None:
    for name, codec in (("a.mkv", "mpeg4"), ("a.avi", "mpeg4"), ("a.mp4", "mpeg4")):
        path = write(tmp_path / name, codec)
        assert promised_bytes(path) == path.stat().st_size
    (tmp_path / "b.mp4").write_bytes(b"")
    assert promised_bytes(tmp_path / "b.mp4") is None


def test_what_came_before_damage_is_given(tmp_path: Path, reader: str) -> None:
    path = write(tmp_path / "a.mkv", "ffv1", "gray", count=30)
    data = bytearray(path.read_bytes())
    data[len(data) // 2 :] = bytes(len(data) - len(data) // 2)
    path.write_bytes(data)
    frames, _, _, end = read(path, reader)
    assert len(frames) < 30 and end
    if frames:
        with open_source(str(path), reader=reader) as source, pytest.raises(IncompleteError):
            list(source)


# names


@pytest.mark.parametrize(
    "name", ["10:30:00.mp4", "http:clip.mp4", "a%03d.mp4", "concat:x.mp4", "a b#c?d.mp4", "-i.mp4", "pipe:0.mp4"]
)
def test_a_name_that_looks_like_an_address_is_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reader: str, name: str
) -> None:
    write(tmp_path / "plain.mp4").rename(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    assert len(read(Path(name), reader)[0]) == 20


@pytest.fixture
def listing(tmp_path: Path) -> Callable[[str], Path]:
    target = write(tmp_path / "secret.mp4")

    def make(kind: str) -> Path:
        text = {
            "hls": f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{target}\n#EXT-X-ENDLIST\n",
            "concat": f"ffconcat version 1.0\nfile {target}\n",
        }[kind]
        (tmp_path / "a.mp4").write_text(text)
        return tmp_path / "a.mp4"

    return make


@pytest.mark.parametrize("kind", ["hls", "concat"])
def test_a_file_that_names_other_files_is_not_followed(listing: Callable[[str], Path], reader: str, kind: str) -> None:
    frames, _, _, end = read(listing(kind), reader)
    assert not frames and end.startswith("SourceError")
