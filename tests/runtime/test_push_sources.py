"""Sources that are pushed into: the vendor's callback, Clarius' signature, and the camera's thread."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest

from tests.fakes.live_rigs import FakeCapture, camera_rig, image, until
from tinyusfm_runtime.errors import FrameError, SourceError
from tinyusfm_runtime.frame import PixelFormat, VideoRange
from tinyusfm_runtime.sources import open_source
from tinyusfm_runtime.sources.camera import brightness
from tinyusfm_runtime.sources.clarius import ClariusSource
from tinyusfm_runtime.sources.push import PushSource
from tinyusfm_runtime.transport import v4l2


def newest(source: Any) -> Any:
    return next(iter(source))


def test_what_a_callback_says_is_kept() -> None:
    with PushSource(spacing_mm=(0.2, 0.3), orientation="MF", video_range=VideoRange.LIMITED) as source:
        assert source.push(image(1), 123, 45)
        frame = newest(source)
        assert (frame.t_source_ns, frame.seq, frame.spacing_mm, frame.orientation) == (123, 45, (0.2, 0.3), "MF")
        assert frame.video_range is VideoRange.LIMITED and frame.pixel_format is PixelFormat.GREY
        assert source.push(image(2), spacing_mm=(1.0, 1.0)) and newest(source).seq == 46
        colour = np.stack([image(1)] * 3, axis=-1)
        assert source.push(colour, pixel_format="bgr") and newest(source).pixel_format is PixelFormat.BGR
        assert source.push(colour) and newest(source).pixel_format is PixelFormat.RGB
        assert source.push(np.dstack([colour, image(1)])) and newest(source).pixel_format is PixelFormat.RGBA


def test_the_vendor_may_reuse_its_buffer_and_what_lies_outside_the_crop_is_not_kept() -> None:
    with PushSource(crop=(4, 8, 16, 24)) as source:
        buffer = image(1)
        source.push(buffer)
        buffer[:] = 0
        frame = newest(source)
    np.testing.assert_array_equal(frame.pixels, image(1)[4:20, 8:32])
    assert frame.crop == (4, 8, 16, 24) and frame.pixels.base is None, "no view into the whole image"


@pytest.mark.parametrize(
    ("pixels", "reason"),
    [
        (np.zeros((32, 48), np.float32), "frame"),
        (np.zeros((32, 48, 2), np.uint8), "frame"),
        (np.zeros((4, 4), np.uint8), "frame"),
        (np.zeros((8, 8), np.uint8), "crop"),
        (None, "frame"),
        ("pixels", "frame"),
    ],
)
def test_nothing_raises_inside_a_callback(pixels: Any, reason: str) -> None:
    with PushSource(crop=(0, 0, 32, 48)) as source:
        assert source.push(pixels) is False
        assert source.counters == {reason: 1}
        assert source.push(image(1), "yesterday") is False  # type: ignore[arg-type]
        assert source.counters["argument"] == 1
    assert source.push(image(1)) is False, "closed"


def test_pushing_from_many_threads_loses_nothing_unseen() -> None:
    with PushSource() as source:
        taken: list[int] = []
        reader = threading.Thread(target=lambda: taken.extend(frame.seq for frame in source))
        reader.start()
        threads = [
            threading.Thread(target=lambda k=k: [source.push(image(k), seq=100 * k + i) for i in range(100)])  # type: ignore[misc]
            for k in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert until(lambda: len(taken) + source.counters.get("overtaken", 0) == 400)
        source.close()
        reader.join()


def test_clarius_grey_and_colour_with_its_microns() -> None:
    source: Any = open_source("clarius:")
    assert isinstance(source, ClariusSource) and "never tested on hardware" in source.notes[0]
    with source:
        source.newProcessedImage(image(3).tobytes(), 48, 32, 48 * 32, 123.4, 99, 0.0, [])
        frame = newest(source)
        np.testing.assert_array_equal(frame.pixels, image(3))
        assert frame.spacing_mm == pytest.approx((0.1234, 0.1234)) and frame.t_source_ns == 99
        rgba = np.stack([image(i) for i in range(4)], axis=-1)
        source.newProcessedImage(bytearray(rgba.tobytes()), 48, 32, rgba.size, 200.0, 100, 0.0, [])
        frame = newest(source)
        np.testing.assert_array_equal(frame.pixels, rgba)
        assert frame.pixel_format is PixelFormat.RGBA


@pytest.mark.parametrize(
    ("image", "size", "reason"),
    [(b"\xff\xd8\xff", 3, "size"), (b"short", 48 * 32, "size"), (None, 48 * 32, "argument")],
)
def test_clarius_refuses_what_it_cannot_read(image: Any, size: int, reason: str) -> None:
    with ClariusSource() as source:
        source.newProcessedImage(image, 48, 32, size, 100.0, 1, 0.0, [])
        assert source.counters == {reason: 1}


@pytest.mark.parametrize("bits", [False, True], ids=["bytes of the image", "bits of a pixel"])
@pytest.mark.parametrize("tail", [([],), (0.0, []), (), (0.0, [], "more")], ids=["imu", "angle, imu", "none", "more"])
@pytest.mark.parametrize("channels", [1, 4])
def test_clarius_takes_every_published_signature(bits: bool, tail: tuple[Any, ...], channels: int) -> None:
    pixels = image(3) if channels == 1 else np.stack([image(i) for i in range(4)], axis=-1)
    size = 8 * channels if bits else pixels.size
    with ClariusSource() as source:
        source.newProcessedImage(pixels.tobytes(), 48, 32, size, 200.0, 77, *tail)
        frame = newest(source)
        np.testing.assert_array_equal(frame.pixels, pixels)
        assert frame.spacing_mm == (0.2, 0.2) and frame.t_source_ns == 77 and source.counters == {}
        named = {"image": pixels.tobytes(), "width": 48, "height": 32, "micronsPerPixel": 200.0, "timestamp": 78}
        source.newProcessedImage(**named, **({"bpp": size} if bits else {"sz": size}), imu=[])
        assert newest(source).t_source_ns == 78


HOSTILE: list[tuple[Any, ...]] = [
    (), (None,) * 8, (b"", "a", "b", "c", "d", "e", "f", "g"), (b"x",) * 3, (object(),) * 12,
    (b"x" * 1536, 48, 32, 1536, None, 1, []), (b"x" * 1536, 48.0, 32.0, 1536.0, "200", "now", []),
    (b"x" * 1536, -48, -32, 1536, 200.0, 1, []), (b"x" * 1536, 10**40, 32, 1536, 200.0, 1, []),
    (b"x" * 1536, 48, 32, 1536, float("nan"), float("nan"), []), (np.zeros(9), np.zeros(9), 3, 4, 5, 6, 7),
]  # fmt: skip


@pytest.mark.parametrize("arguments", HOSTILE, ids=range(len(HOSTILE)))
def test_no_callback_raises_into_the_vendor(arguments: tuple[Any, ...]) -> None:
    with ClariusSource() as source:
        for name in ("newProcessedImage", "newRawImage", "newSpectrumImage", "newImuData", "freeze", "buttons"):
            getattr(source, name)(*arguments)
            getattr(source, name)(*arguments, unheard_of=1)
    with PushSource() as source:
        source.push(*arguments)
        source.push(*arguments, unheard_of=1)
        assert source.counters.get("signature", 0) >= 1
        assert any(note.startswith("refused: ") for note in source.notes), "the first of each kind is told"


@pytest.mark.parametrize("number", [10**400, 1 << 63, -(1 << 63) - 1])
def test_a_number_or_time_that_no_sink_can_write_is_refused_and_the_count_goes_on(number: int) -> None:
    pixels = np.zeros((20, 30), np.uint8)
    with PushSource() as source:
        assert not source.push(pixels, seq=number) and not source.push(pixels, t_source_ns=number)
        assert "64 bits" in " ".join(source.notes) and source.counters["frame"] == 2
        assert source.push(pixels) and next(iter(source)).seq == 0


def test_push_of_deep_frames_needs_a_window() -> None:
    deep = image(3).astype(np.uint16) * 16
    with PushSource() as source:
        assert not source.push(deep) and "--window" in " ".join(source.notes)
    with PushSource(window=(0, 4080)) as source:
        assert source.push(deep)
        np.testing.assert_array_equal(newest(source).pixels, image(3))
        assert source.push(deep.astype(np.float32))


def test_a_given_spacing_holds_for_one_size() -> None:
    with PushSource(spacing_mm=(0.2, 0.2)) as source:
        source.push(image(1))
        assert newest(source).spacing_mm == (0.2, 0.2)
        source.push(np.repeat(image(1), 2, axis=0))
        assert newest(source).spacing_mm is None and "frame size changes" in source.doubts[0]
        source.push(np.repeat(image(1), 2, axis=0), spacing_mm=(0.1, 0.2))
        assert newest(source).spacing_mm == (0.1, 0.2), "a frame's own spacing is its own"


def test_clarius_without_spacing_gives_none_and_counts_it() -> None:
    with ClariusSource() as source:
        source.newProcessedImage(image(1).tobytes(), 48, 32, 48 * 32, 0.0, 1, 0.0, [])
        assert newest(source).spacing_mm is None and source.counters == {"no_spacing": 1}
        source.newRawImage(1, 2)
        source.newSpectrumImage()
        source.freeze(True)
        source.newImuData()
        source.buttons(0, 1)
        assert source.frozen and source.counters["freezes"] == 1 and source.counters["raw"] == 1


# camera


def test_camera_takes_the_brightness_as_it_is_coded(monkeypatch: pytest.MonkeyPatch) -> None:
    with camera_rig(monkeypatch) as rig, rig.source:
        rig.send(0, image(5))
        frame = newest(rig.source)
    np.testing.assert_array_equal(frame.pixels, image(5))
    assert frame.video_range is VideoRange.LIMITED and frame.t_source_ns is not None


def test_camera_colour_is_what_opencv_converts(monkeypatch: pytest.MonkeyPatch) -> None:
    with camera_rig(monkeypatch, colour=True) as rig, rig.source:
        rig.send(0, np.stack([image(1)] * 3, axis=-1))
        frame = newest(rig.source)
    assert frame.pixel_format is PixelFormat.BGR and frame.video_range is VideoRange.FULL


def test_an_unplugged_camera_is_opened_again(monkeypatch: pytest.MonkeyPatch) -> None:
    with camera_rig(monkeypatch) as rig, rig.source:
        rig.send(0, image(1))
        newest(rig.source)
        rig.send(1, None)  # type: ignore[arg-type]
        assert until(lambda: rig.source.counters.get("reconnects"))
        rig.send(2, image(2))
        np.testing.assert_array_equal(newest(rig.source).pixels, image(2))
        assert rig.source.counters["lost"] >= 1


def test_a_camera_that_is_not_there_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    cv2 = pytest.importorskip("cv2", reason="install tinyusfm-edge[opencv]")

    class Absent(FakeCapture):
        plugged = False

    monkeypatch.setattr(cv2, "VideoCapture", Absent)
    with pytest.raises(SourceError, match="cannot be opened"):
        open_source("camera:3")
    for bad in ("camera:x", "camera:/etc/passwd", "camera:/dev/video1/../sda"):
        with pytest.raises(SourceError, match="written camera"):
            open_source(bad)


@pytest.mark.parametrize(
    ("coding", "shape", "want"),
    [
        ("GREY", (32, 48), (32, 48)),
        ("YUYV", (32, 48, 2), (32, 48)),
        ("UYVY", (32, 48, 2), (32, 48)),
        ("NV12", (48, 48), (32, 48)),
        ("MJPG", (32, 48, 3), (32, 48, 3)),
    ],
)
def test_brightness_planes(coding: str, shape: tuple[int, ...], want: tuple[int, ...]) -> None:
    array = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    pixels, _, _ = brightness(array, coding, 32)
    assert pixels.shape == want
    expected = {"UYVY": array[..., -1], "YUYV": array[..., 0], "NV12": array[:32]}.get(coding, array)
    np.testing.assert_array_equal(pixels, expected)


def test_an_image_of_another_shape_than_its_coding_is_refused() -> None:
    with pytest.raises(FrameError, match="said NV12"):
        brightness(np.zeros((32, 48), np.uint8), "NV12", 32)


def test_devices_are_listed_without_raising() -> None:
    for node in v4l2.nodes():
        assert node.path.startswith("/dev/video") and isinstance(node.capture, bool)
    assert v4l2.ask("/dev/null") is None and v4l2.ask("/dev/video999") is None
