"""Every source keeps the contract: light to import, honest probe, frames in order, one clear error, nothing left open.

A new file in ``sources/`` is picked up by itself; it needs a sample here, so that it cannot stay untested.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.fakes.live_rigs import RIGS
from tinyusfm_runtime import plugins
from tinyusfm_runtime.errors import EdgeError, InputError, SourceError
from tinyusfm_runtime.frame import Frame, FrameSource
from tinyusfm_runtime.overlay import encode_png
from tinyusfm_runtime.sources import open_source

NAMES = plugins.names("sources")
FILES = [name for name in NAMES if name not in RIGS]
"""Sources whose frames wait; live ones are in test_live_sources.py."""
NUM_FRAMES = 4


def shades() -> list[np.ndarray]:
    return [np.full((32, 48), 50 * (i + 1), np.uint8) for i in range(NUM_FRAMES)]


def make_folder(place: Path) -> str:
    pytest.importorskip("cv2", reason="install tinyusfm-edge[opencv]")
    for i, pixels in enumerate(shades()):
        (place / f"{i}.png").write_bytes(encode_png(pixels))
    return str(place)


def make_dicom(place: Path) -> str:
    pydicom = pytest.importorskip("pydicom", reason="install tinyusfm-edge[dicom]")
    dataset = pydicom.Dataset()
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    dataset.SOPClassUID, dataset.SOPInstanceUID = pydicom.uid.UltrasoundMultiFrameImageStorage, "1.2.3"
    dataset.NumberOfFrames, dataset.Rows, dataset.Columns = NUM_FRAMES, 32, 48
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated = dataset.BitsStored = 8
    dataset.HighBit, dataset.PixelRepresentation = 7, 0
    dataset.PixelData = np.stack(shades()).tobytes()
    dataset.save_as(place / "cine.dcm", enforce_file_format=True)
    return str(place / "cine.dcm")


def make_video(place: Path) -> str:
    av = pytest.importorskip("av", reason="install tinyusfm-edge[video]")
    with av.open(str(place / "clip.mkv"), "w") as container:
        stream = container.add_stream("ffv1", rate=25)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "gray"
        for pixels in shades():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="gray")))
        container.mux(stream.encode())
    return str(place / "clip.mkv")


def make_mha(place: Path) -> str:
    head = f"NDims = 3\nDimSize = 48 32 {NUM_FRAMES}\nElementType = MET_UCHAR\nElementDataFile = LOCAL\n"
    (place / "clip.mha").write_bytes(head.encode() + np.stack(shades()).tobytes())
    return str(place / "clip.mha")


SAMPLES: dict[str, Callable[[Path], str]] = {
    "dicom": make_dicom,
    "folder": make_folder,
    "mha": make_mha,
    "phantom": lambda place: f"phantom:0-{NUM_FRAMES - 1}",
    "video": make_video,
}
"""Source -> makes a sample of NUM_FRAMES frames in an empty folder and returns its location."""
BROKEN = {
    "dicom": "broken.dcm", "folder": "broken.png", "mha": "broken.mha", "phantom": "phantom:x", "video": "broken.mp4",
    "camera": "camera:250", "clarius": "clarius:a b", "igtl": "igtl://:x", "push": "push:a b", "shm": "shm:.a",
}  # fmt: skip
"""Source -> a location that it accepts and cannot read (files of that name are written by the test)."""


@pytest.fixture
def sample(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return SAMPLES[request.param](tmp_path)


every_source = pytest.mark.parametrize(
    ("name", "sample"), [(name, name) for name in FILES], indirect=["sample"], ids=FILES
)


def test_every_source_has_a_sample() -> None:
    assert set(NAMES) == set(BROKEN) == set(SAMPLES) | set(RIGS) and not set(SAMPLES) & set(RIGS), (
        "give a new source a sample (or a rig in tests/fakes) and a broken sample"
    )


@pytest.mark.parametrize("name", NAMES)
def test_module_has_the_four_faces(name: str) -> None:
    module = plugins.load("sources", name)
    assert isinstance(module.available(), plugins.Availability)
    assert list(inspect.signature(module.accepts).parameters) == ["location"]
    first, *options = inspect.signature(module.open_source).parameters.values()
    assert first.name == "location" and all(option.kind is option.KEYWORD_ONLY for option in options)


@every_source
def test_frames_come_in_order_with_their_times(name: str, sample: str) -> None:
    before = time.monotonic_ns()
    with open_source(sample) as source:
        assert isinstance(source, FrameSource)
        frames = list(source)
    assert len(frames) == NUM_FRAMES and all(isinstance(frame, Frame) for frame in frames)
    assert [frame.seq for frame in frames] == list(range(NUM_FRAMES))
    received = [frame.t_recv_ns for frame in frames]
    assert received == sorted(received) and received[0] >= before
    own = [frame.t_source_ns for frame in frames]
    assert set(own) == {None} or own == sorted(set(own))
    assert len({frame.pixels.tobytes() for frame in frames}) == NUM_FRAMES


@every_source
def test_frames_own_their_pixels(name: str, sample: str) -> None:
    with open_source(sample) as source:
        copies = [(frame, frame.pixels.copy()) for frame in source]
    assert len(copies) == NUM_FRAMES
    for frame, copy in copies:
        np.testing.assert_array_equal(frame.pixels, copy)


@every_source
def test_a_source_can_be_read_again_and_left_early(name: str, sample: str) -> None:
    for count in (1, NUM_FRAMES, 2):
        with open_source(f"{name}:{sample.removeprefix(f'{name}:')}") as source:
            frames = [frame for _, frame in zip(range(count), source, strict=False)]
        assert len(frames) == count


@every_source
def test_the_source_is_chosen_by_its_own_word(name: str, sample: str) -> None:
    accepting = [other for other in NAMES if plugins.load("sources", other).accepts(sample)]
    assert accepting == [name]


@pytest.mark.parametrize("name", NAMES)
def test_a_broken_location_is_one_clear_line(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    if not plugins.available("sources", name).usable and name not in RIGS:
        pytest.skip(plugins.available("sources", name).reason)
    location = BROKEN[name]
    if ":" not in location:
        (tmp_path / location).write_bytes(b"\0" * 128 + b"DICM" + b"rubbish" * 40)
        location = str(tmp_path / location)
    with pytest.raises(SourceError) as caught, open_source(location) as source:
        list(source)
    message = str(caught.value)
    assert message and "\n" not in message and len(message) < 250
    assert "broken" not in message, "a file name may hold a patient's name"
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize("name", NAMES)
def test_accepting_is_cheap_and_never_fails(name: str) -> None:
    accepts = plugins.load("sources", name).accepts
    for odd in ("", ":", "a:b:c", "\0", "x" * 5000, "/dev/null", "http://host/clip.mp4x", "..."):
        assert accepts(odd) in (True, False)


@pytest.mark.parametrize("name", NAMES)
def test_an_option_it_does_not_know_is_an_error(name: str) -> None:
    options: dict[str, Any] = {"no_such_option": 1}
    with pytest.raises(InputError, match="no_such_option"):
        open_source(f"{name}:whatever", **options)


@pytest.mark.parametrize("name", NAMES)
def test_what_does_not_exist_is_a_typed_error(name: str) -> None:
    with pytest.raises(EdgeError):
        open_source(f"{name}:no/such/thing")
