"""Sinks: a file is there whole or not at all; the overlay shows what the prediction says; no image leaks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zlib
from csv import DictReader
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.phantoms import phantom
from tinyusfm_runtime.atomic import PendingFile
from tinyusfm_runtime.errors import InputError, MissingExtra, OutputError
from tinyusfm_runtime.frame import Frame, PixelFormat, VideoRange
from tinyusfm_runtime.numerics.measure import Measurement, measure_head
from tinyusfm_runtime.numerics.order import wide
from tinyusfm_runtime.numerics.preprocess import Placement, preprocess, resize
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
from tinyusfm_runtime.reading import DriftStatus, Judged, ReadingState, SecondPassState
from tinyusfm_runtime.results import LiveResult, Prediction, Timings
from tinyusfm_runtime.sinks import RunFacts, csv, igtl, jsonl, open_sink, video
from tinyusfm_runtime.spec import AspectPolicy, PreprocessSpec


@lru_cache(maxsize=64)
def perfect(seed: int, spec: PreprocessSpec) -> tuple[Frame, np.ndarray, Placement, Measurement]:
    """A phantom, its mask in the input's pixels, where that lies, and what a perfect model would measure."""
    drawn = phantom(seed)
    _, placement = preprocess(drawn.frame, spec)
    tensor, _ = preprocess(Frame(pixels=drawn.mask_HW * 255), spec)
    measurement = replace(measure_head(drawn.mask_HW, drawn.frame.spacing_mm), label="head")
    mask = (tensor[0, 0] > 127).astype(np.uint8)
    mask.flags.writeable = False
    return drawn.frame, mask, placement, measurement


def predicted(seed: int = 3, spec: PreprocessSpec | None = None, **changes: Any) -> tuple[Frame, Prediction]:
    """A phantom and the prediction that a perfect model would make of it."""
    frame, mask, placement, measurement = perfect(seed, spec or PreprocessSpec(height=96, width=128))
    values: dict[str, Any] = {
        "seq": seed, "mask_HW": mask, "placement": placement, "scores": None, "measurements":
        (measurement,), "engine": "numpy",
        "target": "openvino", "precision": "int8", "verified": True, "valid": True, "t_recv_ns": None, "age_ms": None,
        "auxiliary": {}, "timings": Timings(preprocess_ms=1.0, infer_ms=2.0, postprocess_ms=0.5, total_ms=3.6),
    }  # fmt: skip
    return frame, Prediction(**{**values, **changes})


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# JSON lines


def test_jsonl_line_holds_the_answer_and_no_image(tmp_path: Path) -> None:
    frame, prediction = predicted(age_ms=float("nan"), scores=np.array([0.25, 0.75], np.float32))
    with jsonl.open_sink(str(tmp_path / "out.jsonl")) as sink:
        sink.write(frame, prediction)
        sink.write(frame, replace(prediction, seq=4, mask_HW=None, measurements=(), valid=False, verified=False))
        assert (tmp_path / "out.jsonl").read_text(encoding="utf-8").count("\n") == 2, "each line is there at once"
    first, second = (json.loads(line) for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines())
    assert first["schema"] == jsonl.SCHEMA and first["seq"] == 3
    assert first["measurement"]["hc_mm"] == pytest.approx(make_phantom(3).hc_mm, rel=0.01)
    assert first["scores"] == [0.25, 0.75]
    assert first["age_ms"] is None, "JSON has no NaN"
    times = {"preprocess": 1.0, "infer": 2.0, "postprocess": 0.5, "total": 3.6, "second_pass": 0.0, "drift": 0.0}
    assert first["timings_ms"] == times
    assert (first["found"], first["reading"], first["reasons"], first["measurements"]) == (True, "unchecked", [], None)
    assert (first["second_pass"], first["drift_status"]) == ("never", "not checked")
    assert second["found"] is False
    assert (second["valid"], second["verified"], second["measurement"]) == (False, False, None)
    keys = "schema kind seq valid verified degraded target precision engine age_ms timings_ms measurement scores live"
    keys += " smoothed found confidence reading reasons second_pass drift_status measurements"
    assert sorted(first) == sorted(keys.split())
    assert len(json.dumps(first)) < 1500
    assert leftovers(tmp_path) == ["out.jsonl"]


def test_jsonl_to_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    frame, prediction = predicted()
    with jsonl.open_sink("-") as sink:
        sink.write(frame, prediction)
    assert json.loads(capsys.readouterr().out)["seq"] == 3


def open_sinks(folder: Path) -> list[Any]:
    pytest.importorskip("av", reason="install tinyusfm-edge[video]")
    return [jsonl.open_sink(str(folder / "out.jsonl")), video.open_sink(str(folder / "out.mp4"))]


def test_a_line_of_a_classifier_names_its_class_with_its_mark(tmp_path: Path) -> None:
    frame, prediction = predicted(mask_HW=None, measurements=(), scores=np.array([0.25, 0.75], np.float32))
    facts = RunFacts(labels=("benign (demo only)", "malignant (demo only)"))
    with open_sink(f"jsonl:{tmp_path / 'a'}", facts=facts) as named, open_sink(f"jsonl:{tmp_path / 'b'}") as bare:
        for sink in (named, bare):
            sink.write(frame, prediction)
    first, second = (json.loads((tmp_path / name).read_text(encoding="ascii")) for name in "ab")
    assert first["label"] == "malignant (demo only)" and "label" not in second
    said = igtl.as_reading(LiveResult.outside_loop(frame, prediction, 0), facts.labels or ())
    assert said["label"] == first["label"]


def test_an_error_on_the_way_keeps_what_was_recorded_and_what_was_there(tmp_path: Path) -> None:
    frame, prediction = predicted()
    for _ in range(2):
        for sink in open_sinks(tmp_path):
            with pytest.raises(ValueError, match="the source broke"), sink:
                sink.write(frame, prediction)
                raise ValueError("the source broke")
    assert leftovers(tmp_path) == ["out.jsonl", "out.mp4"]
    assert len((tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()) == 2


@pytest.mark.parametrize(
    "content", [b"old", b"old\n", b'{"a": 1}\n', b"[]\n", b'{"schema": "x"}\n', b"\x00" * 3_000_000]
)
def test_a_file_with_other_things_in_it_is_left_alone(content: bytes, tmp_path: Path) -> None:
    for name, sink in (("out.jsonl", jsonl), ("out.csv", csv)):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(OutputError, match="other things in it"):
            sink.open_sink(str(tmp_path / name))
        assert (tmp_path / name).read_bytes() == content


def test_half_a_line_of_a_killed_run_is_cut_and_the_rest_stays(tmp_path: Path) -> None:
    frame, prediction = predicted()
    for name, sink in (("out.jsonl", jsonl), ("out.csv", csv)):
        place = tmp_path / name
        for _ in range(2):
            with sink.open_sink(str(place)) as opened:
                opened.write(frame, prediction)
            with place.open("ab") as file:
                file.write(b'{"schema": 3, "ki')
        lines = place.read_text(encoding="utf-8").splitlines()
        assert lines.pop() == '{"schema": 3, "ki', "the second run's own half line, that nobody has cut yet"
        assert len(lines) == 2 + (name == "out.csv")


def test_one_run_at_a_time_writes_a_record(tmp_path: Path) -> None:
    for name, sink in (("out.jsonl", jsonl), ("out.csv", csv)):
        with sink.open_sink(str(tmp_path / name)), pytest.raises(OutputError, match="another run is writing it"):
            sink.open_sink(str(tmp_path / name))


def test_a_pipe_is_written_through_and_one_without_a_reader_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OutputError, match="nobody reads the pipe"):
        jsonl.open_sink(str(tmp_path / "pipe"))
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    with jsonl.open_sink(str(tmp_path / "pipe")) as sink:
        sink.write(*predicted())
    assert json.loads(os.read(reader, 1 << 16))["seq"] == 3
    os.close(reader)


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
from tests.runtime.test_sinks import predicted
from tinyusfm_runtime.errors import OutputError
from tinyusfm_runtime.sinks import csv, jsonl, video
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), int(sys.argv[3])))
pairs = [predicted(seed) for seed in range(5)]
try:
    with {"csv": csv, "jsonl": jsonl, "video": video}[sys.argv[2]].open_sink(sys.argv[1]) as sink:
        for number in range(400):
            sink.write(*pairs[number % 5])
except OutputError as error:
    print(number, error)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs RLIMIT_FSIZE")
@pytest.mark.parametrize(
    ("name", "suffix", "room"), [("csv", "", 2048), ("jsonl", "", 4096), ("video", ".mp4", 2_000_000)]
)
def test_full_disk_keeps_whole_lines_and_whole_images(name: str, suffix: str, room: int, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    place = tmp_path / f"out{suffix}"
    command = [sys.executable, "-c", FULL_DISK, str(place), name, str(room)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900, check=False)
    number, _, said = done.stdout.partition(" ")
    assert said.startswith("cannot write the"), done.stderr
    assert leftovers(tmp_path) == [place.name]
    if name == "video":
        av = pytest.importorskip("av")
        with av.open(str(place)) as container:
            assert sum(1 for _ in container.decode(video=0)) > int(number) - 75, "up to the last second"
    else:
        assert place.read_bytes().endswith(b"\n") and place.read_bytes().count(b"\n") == int(number) + (name == "csv")


def test_what_a_killed_run_left_is_kept_and_that_of_a_living_one_is_left_alone(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for name, sink in (("out.jsonl", jsonl), ("out.mp4", video)):
        (tmp_path / f".{name}.tmp-{dead.pid}-0123abcd").write_text("half", encoding="utf-8")
        (tmp_path / f".{name}.tmp-{dead.pid}-0123abce").write_text("", encoding="utf-8")
        (tmp_path / f".{name}.tmp-{os.getpid()}-0123abcd").write_text("half", encoding="utf-8")
        with sink.open_sink(str(tmp_path / name)):
            pass
    living = [f".{name}.tmp-{os.getpid()}-0123abcd" for name in ("out.jsonl", "out.mp4")]
    assert leftovers(tmp_path) == sorted([*living, "out.jsonl", "out.recovered-1.jsonl", "out.recovered-1.mp4"])
    assert (tmp_path / "out.recovered-1.mp4").read_text(encoding="utf-8") == "half"


KILLED = """
import os, sys
from tests.runtime.test_sinks import predicted
from tinyusfm_runtime.sinks import open_sink
pair = predicted()
sink = open_sink(sys.argv[1])
for _ in range(int(sys.argv[2])):
    sink.write(*pair)
os.kill(os.getpid(), 9)
"""


@pytest.mark.parametrize(("name", "count"), [("jsonl", 12), ("csv", 12), ("audit", 12), ("video", 150)])
def test_a_killed_run_loses_nothing_and_the_next_one_keeps_it(name: str, count: int, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    place = tmp_path / "out.mp4"
    command = [sys.executable, "-c", KILLED, f"{name}:{place}", str(count)]
    assert subprocess.run(command, env=environment, timeout=900, check=False).returncode == -9
    with open_sink(f"{name}:{place}") as sink:
        sink.write(*predicted())
    if name == "video":
        av = pytest.importorskip("av")
        with av.open(str(tmp_path / "out.recovered-1.mp4")) as container:
            assert sum(1 for _ in container.decode(video=0)) >= count - 60, "up to the last fragment"
        return
    wanted = {"csv": 1, "jsonl": 0, "audit": 3}[name] + count + 1  # header; two openings and a close
    assert len(place.read_text(encoding="utf-8").splitlines()) == wanted


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
        images = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
        # no file name, no date: only what the container itself needs
        assert set(container.metadata) <= {"major_brand", "minor_version", "compatible_brands", "encoder"}
    assert len(images) == 3
    frame, prediction = predicted(3)
    drawn = draw(frame, prediction)
    assert images[0].shape == drawn.shape
    assert np.abs(images[0].astype(int) - drawn).mean() < 4
    assert np.abs(images[0].astype(int) - as_rgb(frame)).mean() > np.abs(images[0].astype(int) - drawn).mean()
    assert leftovers(tmp_path) == ["out.mp4"]


@pytest.mark.parametrize(
    ("times_ms", "want_ms"),
    [
        ([0, 40, 80, 280, 320, 720], [0, 40, 80, 280, 320, 720]),
        ([5000, 5033, 5066, 5100], [0, 33, 66, 100]),
        ([None, None, None], [0, 40, 80]),
        ([0, 40, 40, 20, 60], [0, 40, 80, 120, 160]),
        ([0, 40, 90_000_000, 90_000_040], [0, 40, 80, 120]),
    ],
    ids=["variable", "begins late", "none", "stands still and goes back", "jumps"],
)
def test_overlay_video_keeps_the_sources_times(
    av: Any, tmp_path: Path, times_ms: list[Any], want_ms: list[int]
) -> None:
    frame, prediction = predicted()
    with video.open_sink(str(tmp_path / "out.mp4"), rate_hz=25) as sink:
        for number, time_ms in enumerate(times_ms):
            t_ns = None if time_ms is None else time_ms * 1_000_000
            sink.write(replace(frame, seq=number, t_source_ns=t_ns), prediction)
    with av.open(str(tmp_path / "out.mp4")) as container:
        found = [round(image.time * 1000) for image in container.decode(video=0)]
    # the first image of an H.264 stream in fragments stands later than 0 by what its encoder looks ahead
    assert [time_ms - found[0] for time_ms in found] == pytest.approx(want_ms, abs=1)


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
    with video.open_sink(str(tmp_path / "other.mp4")):
        pass
    assert leftovers(tmp_path) == ["out.mp4"], "what was encoded is kept; a video without an image is not written"
    with pytest.raises(InputError, match=r"\.mp4"):
        video.open_sink(str(tmp_path / "out.avi"))
    with pytest.raises(InputError, match="rate"):
        video.open_sink(str(tmp_path / "out.mp4"), rate_hz=0)


def test_video_without_pyav_names_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(MissingExtra, match=r"pip install .+\[video\]"):
        video.open_sink(str(tmp_path / "out.mp4"))
    assert not video.available().usable
    assert leftovers(tmp_path) == []


# overlay


@pytest.mark.parametrize("aspect", list(AspectPolicy))
def test_outline_and_ellipse_lie_on_the_head(aspect: AspectPolicy) -> None:
    frame, prediction = predicted(spec=PreprocessSpec(height=160, width=160, aspect=aspect))
    truth = make_phantom(3).mask_HW
    edge = outline(truth)
    rows, cols = ellipse_points(prediction.measurement)
    distance = [np.hypot(*(np.argwhere(edge) - point).T).min() for point in np.stack([rows, cols], 1)[::20]]
    assert max(distance) < 3.5, "the ellipse follows the head's edge on the frame, within 2 input pixels"
    image = draw(frame, prediction, text=False)
    drawn = (image == ELLIPSE_RGB).all(-1) | (image == OUTLINE_RGB).all(-1)
    assert drawn.sum() > 0.5 * edge.sum()
    # everything else is untouched
    np.testing.assert_array_equal(image[~drawn], as_rgb(frame)[~drawn])


def test_a_shifted_ellipse_would_be_seen() -> None:
    _, prediction = predicted()
    moved = replace(prediction.measurement, centre_px=(10.0, 10.0))
    edge = np.argwhere(outline(make_phantom(3).mask_HW))
    rows, cols = ellipse_points(moved)
    distance = [np.hypot(*(edge - point).T).min() for point in np.stack([rows, cols], 1)[::20]]
    assert max(distance) > 20


def test_an_invalid_prediction_shows_no_mask_and_says_so() -> None:
    frame, prediction = predicted(mask_HW=None, measurements=(), valid=False, verified=False, degraded=True)
    assert [words for words, _ in captions(prediction)] == ["INVALID", "UNVERIFIED", "DEGRADED"]
    assert {colour for _, colour in captions(prediction)} == {WARNING_RGB}
    image = draw(frame, prediction)
    assert not (image == OUTLINE_RGB).all(-1).any() and not (image == ELLIPSE_RGB).all(-1).any()
    assert (image == WARNING_RGB).all(-1).sum() > 100


@pytest.mark.parametrize(
    ("measurement", "words"),
    [
        (Measurement(found=False, label="head"), ["NO HEAD"]),
        (Measurement(found=True, has_ellipse=True, hc_mm=175.26, hc_px=300.0), ["HC 175.3 mm"]),
        (Measurement(found=True, has_ellipse=True, hc_px=300.4, touches_border=True), ["HC 300 px", "AT BORDER"]),
        (Measurement(found=True, label="cyst", area_px=812.4), ["cyst 812 px"]),
        (Measurement(found=True, label="cyst", area_px=812.4, area_mm2=81.2), ["cyst 81 mm2"]),
        (Measurement(found=False, label="cyst"), ["NO CYST"]),
    ],
)
def test_reading(measurement: Measurement, words: list[str]) -> None:
    assert [text for text, _ in captions(predicted(measurements=(measurement,))[1])] == words


def test_an_image_says_what_nobody_looked_at() -> None:
    bare = predicted(judged=(Judged(),), second_pass=SecondPassState.OFF)[1]
    assert [words for words, _ in captions(bare)][1:] == ["UNCHECKED", "DRIFT NOT CHECKED", "SECOND PASS OFF"]
    good = predicted(judged=(Judged(ReadingState.GOOD),), drift_status=DriftStatus.NOT_APPLIED)[1]
    assert [words for words, _ in captions(good)][1:] == ["DRIFT NOT APPLIED"]
    checked = replace(good, drift_status=DriftStatus.CHECKED)
    assert len(captions(checked)) == 1, "a good reading stands alone"


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
    prediction = replace(predicted()[1], placement=placement, mask_HW=mask, measurements=(measure_head(mask, None),))
    assert draw(frame, prediction).shape == (32, 32, 3)


def test_probabilities_are_written_where_the_names_of_the_classes_are_known() -> None:
    scores = np.array([0.08, 0.9, 0.015, 0.005], np.float32)
    _, prediction = predicted(mask_HW=None, measurements=(), scores=scores)
    names = ("benign", "malignant", "normal", "other")
    assert [words for words, _ in captions(prediction, names)] == ["malignant 90 %", "benign 8 %", "normal 1 %"]
    assert captions(prediction) == captions(prediction, names[:2]) == [], "scores of a feature model are no shares"


# masks as images


def pixels_of(path: Path) -> np.ndarray:
    """An image file's pixels, read by another decoder than ours."""
    found: np.ndarray = np.asarray(pytest.importorskip("PIL.Image", reason="install tinyusfm-edge[images]").open(path))
    return found


def test_masks_are_the_frames_own_size_and_named_by_their_number(tmp_path: Path) -> None:
    frame, prediction = predicted()
    with open_sink(f"masks:{tmp_path / 'out'}") as sink:
        sink.write(frame, prediction)
        sink.write(frame, replace(prediction, seq=4))
        sink.write(replace(frame, seq=7), replace(prediction, valid=False, mask_HW=None, measurements=()))
        empty = np.zeros_like(prediction.mask_HW)
        sink.write(replace(frame, seq=8), replace(prediction, mask_HW=empty))
        assert not (tmp_path / "out").exists(), "it is whole or not there"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["000003-2.png", "000003.png", "000008.png"]
    mask = pixels_of(tmp_path / "out" / "000003.png")
    assert mask.dtype == np.uint8 and set(np.unique(wide(mask))) == {0, 255}
    assert np.array_equal(mask > 0, prediction.mask_on_frame() > 0)
    assert not pixels_of(tmp_path / "out" / "000008.png").any()


def test_masks_of_several_labels_hold_their_numbers_and_names_are_those_of_the_files(tmp_path: Path) -> None:
    frame, prediction = predicted()
    several = (prediction.mask_HW > 0).astype(np.uint8) * np.uint8(2)
    two = replace(prediction, mask_HW=several, measurements=prediction.measurements * 2)
    with open_sink(f"masks:{tmp_path / 'out'}") as sink:
        for name in ("a.png", "a.jpg", "a.tif#3", "../b.png", "a.png"):
            sink.write(replace(frame, name=name), two)
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["a-2.png", "a.jpg.png", "a.png", "a.tif#3.png", "b.png"]
    assert set(np.unique(wide(pixels_of(tmp_path / "out" / "a.png")))) == {0, 2}
    assert leftovers(tmp_path) == ["out"]


def test_names_stand_in_records_only_where_a_frame_has_one(tmp_path: Path) -> None:
    frame, prediction = predicted()
    outline_px = ((6.5, 136.25), (6.5, 146.75), (80.125, 30.0))
    measured = replace(prediction.measurement, contour_px=outline_px, box_px=(6.0, 30.0, 75.0, 117.0))  # type: ignore[type-var]
    prediction = replace(prediction, measurements=(measured,))
    for name in ("jsonl", "csv"):
        with open_sink(f"{name}:{tmp_path / name}") as sink:
            sink.write(frame, prediction)
            sink.write(replace(frame, name="my file.png"), prediction)
    first, second = (json.loads(line) for line in (tmp_path / "jsonl").read_text(encoding="utf-8").splitlines())
    assert "name" not in first and second["name"] == "my file.png"
    with (tmp_path / "csv").open(encoding="utf-8", newline="") as file:
        rows = list(DictReader(file))
    assert [row["name"] for row in rows] == ["", "my file.png"]
    assert tuple(tuple(map(float, point.split(":"))) for point in rows[0]["contour"].split()) == outline_px
    assert [first["measurement"]["contour_px"][2], rows[0]["box_width"]] == [[80.125, 30.0], "117"]
    assert rows[0]["touches_border"] == "0" and rows[0]["found"] == "1"
