"""Sinks: a file is there whole or not at all; the overlay shows what the prediction says; no picture leaks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tinyusfm_runtime.errors import InputError, MissingExtra, OutputError
from tinyusfm_runtime.frame import Frame, PixelFormat, VideoRange
from tinyusfm_runtime.measure import HeadMeasurement, measure_head
from tinyusfm_runtime.overlay import (
    ELLIPSE_RGB,
    OUTLINE_RGB,
    WARNING_RGB,
    as_rgb,
    captions,
    draw,
    ellipse_points,
    encode_png,
    outline,
)
from tinyusfm_runtime.phantom import make_phantom
from tinyusfm_runtime.preprocess import Placement, preprocess, resize
from tinyusfm_runtime.session import Prediction, Timings
from tinyusfm_runtime.sinks import PendingFile, jsonl, video
from tinyusfm_runtime.spec import AspectPolicy, PreprocessSpec


def predicted(seed: int = 3, spec: PreprocessSpec | None = None, **changes: Any) -> tuple[Frame, Prediction]:
    """A phantom and the prediction that a perfect model would make of it."""
    phantom = make_phantom(seed)
    spec = spec or PreprocessSpec(height=96, width=128)
    mask_frame = Frame(pixels=phantom.mask_HW * 255)
    _, placement = preprocess(phantom.frame, spec)
    tensor, _ = preprocess(mask_frame, spec)
    mask = (tensor[0, 0] > 127).astype(np.uint8)
    values: dict[str, Any] = {
        "seq": seed, "mask_HW": mask, "placement": placement, "scores": None,
        "measurement": measure_head(mask, placement.spacing_mm), "engine": "numpy", "target": "openvino",
        "precision": "int8", "verified": True, "valid": True, "t_recv_ns": None, "age_ms": None, "auxiliary": {},
        "timings": Timings(preprocess_ms=1.0, infer_ms=2.0, postprocess_ms=0.5, total_ms=3.6),
    }  # fmt: skip
    return phantom.frame, Prediction(**{**values, **changes})


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# JSON lines


def test_jsonl_line_holds_the_answer_and_no_picture(tmp_path: Path) -> None:
    frame, prediction = predicted(age_ms=float("nan"), scores=np.array([0.25, 0.75], np.float32))
    with jsonl.open_sink(str(tmp_path / "out.jsonl")) as sink:
        sink.write(frame, prediction)
        sink.write(frame, replace(prediction, seq=4, mask_HW=None, measurement=None, valid=False, verified=False))
        assert not (tmp_path / "out.jsonl").exists(), "not before it is whole"
    first, second = (json.loads(line) for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines())
    assert first["schema"] == jsonl.SCHEMA and first["seq"] == 3
    assert first["measurement"]["hc_mm"] == pytest.approx(make_phantom(3).hc_mm, rel=0.01)
    assert first["scores"] == [0.25, 0.75]
    assert first["age_ms"] is None, "JSON has no NaN"
    assert first["timings_ms"] == {"preprocess": 1.0, "infer": 2.0, "postprocess": 0.5, "total": 3.6}
    assert (second["valid"], second["verified"], second["measurement"]) == (False, False, None)
    keys = "schema kind seq valid verified degraded target precision engine age_ms timings_ms measurement scores live"
    assert sorted(first) == sorted([*keys.split(), "smoothed"])
    assert len(json.dumps(first)) < 1000
    assert leftovers(tmp_path) == ["out.jsonl"]


def test_jsonl_to_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    frame, prediction = predicted()
    with jsonl.open_sink("-") as sink:
        sink.write(frame, prediction)
    assert json.loads(capsys.readouterr().out)["seq"] == 3


def open_sinks(folder: Path) -> list[Any]:
    pytest.importorskip("av", reason="install tinyusfm-edge[video]")
    return [jsonl.open_sink(str(folder / "out.jsonl")), video.open_sink(str(folder / "out.mp4"))]


def test_an_error_on_the_way_leaves_nothing_and_keeps_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "out.jsonl").write_text("old", encoding="utf-8")
    frame, prediction = predicted()
    for sink in open_sinks(tmp_path):
        with pytest.raises(ValueError, match="the source broke"), sink:
            sink.write(frame, prediction)
            raise ValueError("the source broke")
    assert leftovers(tmp_path) == ["out.jsonl"]
    assert (tmp_path / "out.jsonl").read_text(encoding="utf-8") == "old"


def test_ctrl_c_keeps_the_results_so_far(tmp_path: Path) -> None:
    frame, prediction = predicted()
    for sink in open_sinks(tmp_path):
        with pytest.raises(KeyboardInterrupt), sink:
            sink.write(frame, prediction)
            raise KeyboardInterrupt
    assert leftovers(tmp_path) == ["out.jsonl", "out.mp4"]


@pytest.mark.parametrize("place", ["missing/out.jsonl", "file/out.jsonl", "folder.jsonl"])
def test_place_that_cannot_be_written(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(OutputError, match="cannot write the JSON lines file"):
        jsonl.open_sink(str(tmp_path / place))
    assert leftovers(tmp_path) == ["file", "folder.jsonl"]


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
import numpy as np
from tinyusfm_runtime.errors import OutputError
from tinyusfm_runtime.sinks import PendingFile, jsonl
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (2048, 2048))
sink = jsonl.open_sink(sys.argv[1])
sink._file.write("x" * 100)
try:
    with sink:
        for _ in range(100):
            sink._file.write("x" * 1000)
            sink._file.flush()
except OSError as error:
    print("raw", error.errno)
sink = jsonl.open_sink(sys.argv[1])
sink._file.write("x" * 5000)
try:
    sink.close()
except OutputError as error:
    print("mapped", error)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs RLIMIT_FSIZE")
def test_full_disk_leaves_nothing(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path / "out.jsonl")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60, check=False)
    assert "mapped cannot write the JSON lines file" in done.stdout, done.stderr
    assert leftovers(tmp_path) == []


def test_what_a_killed_run_left_is_swept_and_a_living_one_is_not(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (tmp_path / f".out.jsonl.tmp-{dead.pid}-0123abcd").write_text("half", encoding="utf-8")
    living = f".out.jsonl.tmp-{os.getpid()}-0123abcd"
    (tmp_path / living).write_text("half", encoding="utf-8")
    with jsonl.open_sink(str(tmp_path / "out.jsonl")):
        pass
    assert leftovers(tmp_path) == sorted([living, "out.jsonl"])


def test_publishing_over_a_vanished_temporary_is_an_output_error(tmp_path: Path) -> None:
    pending = PendingFile(tmp_path / "a", "the thing")
    pending.path.unlink()
    with pytest.raises(OutputError, match="cannot write the thing"):
        pending.publish()


# video


@pytest.fixture
def av() -> Any:
    return pytest.importorskip("av", reason="install tinyusfm-edge[video]")


def test_overlay_video_plays_and_shows_the_ellipse(av: Any, tmp_path: Path) -> None:
    place = str(tmp_path / "out.mp4")
    with video.open_sink(place, rate_hz=30) as sink:
        for seed in range(3, 6):
            sink.write(*predicted(seed))
    with av.open(place) as container:
        stream = container.streams.video[0]
        assert float(stream.average_rate) == pytest.approx(30)
        pictures = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
        # no file name, no date: only what the container itself needs
        assert set(container.metadata) <= {"major_brand", "minor_version", "compatible_brands", "encoder"}
    assert len(pictures) == 3
    frame, prediction = predicted(3)
    drawn = draw(frame, prediction)
    assert pictures[0].shape == drawn.shape
    assert np.abs(pictures[0].astype(int) - drawn).mean() < 4
    assert np.abs(pictures[0].astype(int) - as_rgb(frame)).mean() > np.abs(pictures[0].astype(int) - drawn).mean()
    assert leftovers(tmp_path) == ["out.mp4"]


def test_overlay_video_of_odd_sides_is_padded(av: Any, tmp_path: Path) -> None:
    frame, prediction = predicted()
    small = replace(frame, pixels=frame.pixels[:-1, :-1])
    placement = replace(prediction.placement, frame_size=small.pixels.shape, crop=(0, 0, *small.pixels.shape))
    with video.open_sink(str(tmp_path / "out.mp4")) as sink:
        sink.write(small, replace(prediction, placement=placement))
    with av.open(str(tmp_path / "out.mp4")) as container:
        assert next(container.decode(video=0)).to_ndarray(format="rgb24").shape == (270, 400, 3)


def test_video_of_changing_size_without_frames_and_of_other_names(av: Any, tmp_path: Path) -> None:
    frame, prediction = predicted()
    small = replace(frame, pixels=frame.pixels[:200])
    placement = replace(prediction.placement, frame_size=small.pixels.shape, crop=(0, 0, *small.pixels.shape))
    with pytest.raises(OutputError, match="change their size"), video.open_sink(str(tmp_path / "out.mp4")) as sink:
        sink.write(frame, prediction)
        sink.write(small, replace(prediction, placement=placement))
    with video.open_sink(str(tmp_path / "out.mp4")):
        pass
    assert leftovers(tmp_path) == []
    with pytest.raises(InputError, match=r"\.mp4"):
        video.open_sink(str(tmp_path / "out.avi"))
    with pytest.raises(InputError, match="rate"):
        video.open_sink(str(tmp_path / "out.mp4"), rate_hz=0)


def test_video_without_pyav_names_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(MissingExtra, match=r"tinyusfm-edge\[video\]"):
        video.open_sink(str(tmp_path / "out.mp4"))
    assert not video.probe().works
    assert leftovers(tmp_path) == []


# overlay


@pytest.mark.parametrize("aspect", list(AspectPolicy))
def test_outline_and_ellipse_lie_on_the_head(aspect: AspectPolicy) -> None:
    frame, prediction = predicted(spec=PreprocessSpec(height=160, width=160, aspect=aspect))
    truth = make_phantom(3).mask_HW
    edge = outline(truth)
    rows, cols = ellipse_points(prediction.measurement, prediction.placement)
    distance = [np.hypot(*(np.argwhere(edge) - point).T).min() for point in np.stack([rows, cols], 1)[::20]]
    assert max(distance) < 3.5, "the ellipse follows the head's edge on the frame, within 2 input pixels"
    picture = draw(frame, prediction, text=False)
    drawn = (picture == ELLIPSE_RGB).all(-1) | (picture == OUTLINE_RGB).all(-1)
    assert drawn.sum() > 0.5 * edge.sum()
    # everything else is untouched
    np.testing.assert_array_equal(picture[~drawn], as_rgb(frame)[~drawn])


def test_a_shifted_ellipse_would_be_seen() -> None:
    _, prediction = predicted()
    moved = replace(prediction.measurement, centre_px=(10.0, 10.0))
    edge = np.argwhere(outline(make_phantom(3).mask_HW))
    rows, cols = ellipse_points(moved, prediction.placement)
    distance = [np.hypot(*(edge - point).T).min() for point in np.stack([rows, cols], 1)[::20]]
    assert max(distance) > 20


def test_an_invalid_prediction_shows_no_mask_and_says_so() -> None:
    frame, prediction = predicted(mask_HW=None, measurement=None, valid=False, verified=False, degraded=True)
    assert [words for words, _ in captions(prediction)] == ["INVALID", "UNVERIFIED", "DEGRADED"]
    assert {colour for _, colour in captions(prediction)} == {WARNING_RGB}
    picture = draw(frame, prediction)
    assert not (picture == OUTLINE_RGB).all(-1).any() and not (picture == ELLIPSE_RGB).all(-1).any()
    assert (picture == WARNING_RGB).all(-1).sum() > 100


@pytest.mark.parametrize(
    ("measurement", "words"),
    [
        (HeadMeasurement(found=False), ["NO HEAD"]),
        (HeadMeasurement(found=True, hc_mm=175.26, hc_px=300.0), ["HC 175.3 mm"]),
        (HeadMeasurement(found=True, hc_px=300.4, touches_border=True), ["HC 300 px", "AT BORDER"]),
    ],
)
def test_reading(measurement: HeadMeasurement, words: list[str]) -> None:
    assert [text for text, _ in captions(predicted(measurement=measurement)[1])] == words


def test_as_rgb_reads_format_and_range() -> None:
    bgr = np.zeros((8, 8, 3), np.uint8)
    bgr[..., 0] = 200
    assert as_rgb(Frame(pixels=bgr, pixel_format=PixelFormat.BGR))[0, 0].tolist() == [0, 0, 200]
    limited = Frame(pixels=np.full((8, 8), 235, np.uint8), video_range=VideoRange.LIMITED)
    assert as_rgb(limited)[0, 0].tolist() == [255, 255, 255]
    rgba = np.dstack([bgr, np.full((8, 8), 7, np.uint8)])
    assert as_rgb(Frame(pixels=rgba, pixel_format=PixelFormat.RGBA)).shape == (8, 8, 3)


def test_drawing_does_not_touch_the_frame() -> None:
    frame, prediction = predicted()
    before = frame.pixels.copy()
    draw(frame, prediction)
    np.testing.assert_array_equal(frame.pixels, before)


@pytest.mark.parametrize("shape", [(8, 9), (8, 9, 3), (1, 1)])
def test_png_is_what_other_decoders_read(shape: tuple[int, ...]) -> None:
    image = pytest.importorskip("PIL.Image", reason="install tinyusfm-edge[test]")
    import io

    pixels = np.random.default_rng(1).integers(0, 256, shape, dtype=np.uint8)
    packed = encode_png(pixels)
    np.testing.assert_array_equal(np.asarray(image.open(io.BytesIO(packed))), pixels)
    assert zlib.crc32(packed[12:29]) == int.from_bytes(packed[29:33], "big")


def test_small_masks_at_the_edge_draw_without_trouble() -> None:
    placement = Placement(crop=(0, 0, 32, 32), box=(0, 0, 32, 32), spacing_mm=None, frame_size=(32, 32))
    mask = np.zeros((32, 32), np.uint8)
    mask[0, 0] = 1
    frame = Frame(pixels=resize(np.zeros((32, 32), np.uint8), 32, 32))
    prediction = replace(predicted()[1], placement=placement, mask_HW=mask, measurement=measure_head(mask, None))
    assert draw(frame, prediction).shape == (32, 32, 3)
