"""Video inside DICOM: the frames are those of the video file, millimetres and counts those of the tags."""

from __future__ import annotations

from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tinyusfm_runtime.errors import SourceError
from tinyusfm_runtime.frame import VideoRange
from tinyusfm_runtime.sources import open_source

av = pytest.importorskip("av", reason="install tinyusfm-edge[video]")
pydicom = pytest.importorskip("pydicom", reason="install tinyusfm-edge[dicom]")
UID = pydicom.uid
ROWS, COLS, COUNT = 64, 96, 6
KINDS = {"mpeg2": ("mpeg2video", "mpegts", UID.MPEG2MPML), "mpeg4": ("mpeg4", "mp4", UID.MPEG4HP41)}


def video(codec: str, container: str, count: int = COUNT) -> bytes:
    stream = BytesIO()
    with av.open(stream, "w", format=container) as out:
        track = out.add_stream(codec, rate=25)
        track.width, track.height, track.pix_fmt = COLS, ROWS, "yuv420p"
        for index in range(count):
            pixels = np.full((ROWS, COLS, 3), 40 + 20 * index, np.uint8)
            for packet in track.encode(av.VideoFrame.from_ndarray(pixels)):
                out.mux(packet)
        for packet in track.encode():
            out.mux(packet)
    return stream.getvalue()


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def writer(data: bytes, syntax: Any, pieces: int = 1, **tags: Any) -> Path:
        dataset = pydicom.Dataset()
        dataset.file_meta = pydicom.dataset.FileMetaDataset()
        dataset.file_meta.TransferSyntaxUID = syntax
        dataset.SOPClassUID, dataset.SOPInstanceUID = UID.VideoEndoscopicImageStorage, "1.2.3"
        dataset.NumberOfFrames, dataset.Rows, dataset.Columns = COUNT, ROWS, COLS
        dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 3, "YBR_PARTIAL_420"
        dataset.PlanarConfiguration, dataset.BitsAllocated, dataset.BitsStored = 0, 8, 8
        dataset.HighBit, dataset.PixelRepresentation, dataset.PixelSpacing = 7, 0, [0.2, 0.3]
        for key, value in tags.items():
            setattr(dataset, key, value)
        dataset.PixelData = pydicom.encaps.encapsulate([data], fragments_per_frame=pieces, has_bot=False)
        dataset["PixelData"].VR, dataset["PixelData"].is_undefined_length = "OB", True
        dataset.save_as(tmp_path / "v.dcm", enforce_file_format=True)
        return tmp_path / "v.dcm"

    return writer


@pytest.mark.parametrize("pieces", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_the_frames_are_those_of_the_video_file(
    write: Callable[..., Path], tmp_path: Path, kind: str, pieces: int
) -> None:
    codec, container, syntax = KINDS[kind]
    data = video(codec, container)
    plain = tmp_path / f"v.{'ts' if container == 'mpegts' else container}"
    plain.write_bytes(data)
    with open_source(str(plain)) as source:
        want = list(source)
    with open_source(str(write(data, syntax, pieces))) as source:
        found = list(source)
        assert not source.doubts  # type: ignore[attr-defined]
    assert len(found) == COUNT
    np.testing.assert_array_equal([f.pixels for f in found], [f.pixels for f in want])
    assert found[0].spacing_mm == (0.2, 0.3) and found[0].video_range is VideoRange.LIMITED
    assert [f.t_source_ns for f in found] == [f.t_source_ns for f in want]


def test_counts_and_sizes_are_held_against_the_tags(write: Callable[..., Path]) -> None:
    codec, container, syntax = KINDS["mpeg4"]
    data = video(codec, container)
    with open_source(str(write(data, syntax, NumberOfFrames=9))) as source:
        frames = iter(source)
        assert sum(1 for _ in zip(range(COUNT), frames, strict=False)) == COUNT
        with pytest.raises(SourceError, match="promises 9 frames and its video holds 6"):
            next(frames)
    with open_source(str(write(data, syntax, NumberOfFrames=4))) as source:
        assert len(list(source)) == COUNT and "all are read" in source.doubts[0]  # type: ignore[attr-defined]
    with open_source(str(write(data, syntax, Columns=100))) as source, pytest.raises(SourceError, match="64x96"):
        list(source)
    with open_source(str(write(data, syntax)), crop=(8, 8, 32, 32)) as source:
        assert next(iter(source)).pixels.shape == (32, 32)


def test_a_video_that_is_none_is_one_line(write: Callable[..., Path]) -> None:
    with open_source(str(write(bytes(5000), UID.MPEG4HP41))) as source, pytest.raises(SourceError, match="video"):
        list(source)
