"""One decoder for one image: every command reads a file as ``run`` does, to the byte, or refuses it alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from tests.tables import write_rows
from tinyusfm_calibration.sets import NamedFrame
from tinyusfm_edge.data.calibration_pool import open_pool
from tinyusfm_edge.data.folder import read_data
from tinyusfm_edge.data.images import list_rows, read_pool
from tinyusfm_edge.data.reading import AS_IT_IS, Reading, make_reading
from tinyusfm_edge.data.table import read_table, stack_frames
from tinyusfm_runtime.errors import EdgeError, InputError
from tinyusfm_runtime.numerics.preprocess import preprocess
from tinyusfm_runtime.phantom import make_phantom
from tinyusfm_runtime.sources import open_source
from tinyusfm_runtime.spec import PreprocessSpec

SPEC = PreprocessSpec(height=48, width=48)
GREY = make_phantom(5, height=96, width=128).frame.pixels
COLOUR = np.dstack([GREY, GREY[::-1], 255 - GREY])
WINDOWED = make_reading(window="0,4095")


def exif(orientation: int) -> Image.Exif:
    found = Image.Exif()
    found[0x0112] = orientation
    return found


def palette(path: Path) -> None:
    Image.fromarray(COLOUR).quantize(32).save(path)


def dicom(path: Path, frames: int) -> None:
    pydicom = pytest.importorskip("pydicom", reason="install tinyusfm-edge[dicom]")
    from pydicom.dataset import FileDataset, FileMetaDataset

    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.6.1" if frames == 1 else "1.2.840.10008.5.1.4.1.1.3.1"
    meta.MediaStorageSOPInstanceUID = "1.2.3"
    meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    data = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    data.SOPClassUID, data.SOPInstanceUID, data.Modality = meta.MediaStorageSOPClassUID, "1.2.3", "US"
    data.Rows, data.Columns = GREY.shape
    data.SamplesPerPixel, data.PhotometricInterpretation, data.PixelRepresentation = 1, "MONOCHROME2", 0
    data.BitsAllocated = data.BitsStored = 8
    data.HighBit = 7
    if frames > 1:
        data.NumberOfFrames = frames
    data.PixelData = np.stack([np.roll(GREY, 9 * number, 1) for number in range(frames)]).tobytes()
    data.save_as(path, enforce_file_format=True)


def video(path: Path) -> None:
    av = pytest.importorskip("av", reason="install tinyusfm-edge[video]")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 128, 96, "yuv420p"
        for number in range(4):
            image = av.VideoFrame.from_ndarray(np.roll(GREY, 9 * number, 1), format="gray")
            container.mux(stream.encode(image.reformat(format="yuv420p")))
        container.mux(stream.encode())


WRITERS: dict[str, Callable[[Path], object]] = {
    "grey.png": lambda path: cv2.imwrite(str(path), GREY),
    "colour.png": lambda path: cv2.imwrite(str(path), COLOUR),
    "colour.jpg": lambda path: cv2.imwrite(str(path), COLOUR),
    "grey.jpg": lambda path: cv2.imwrite(str(path), GREY),
    "turned.jpg": lambda path: Image.fromarray(COLOUR).save(path, exif=exif(6)),
    "mirrored.png": lambda path: Image.fromarray(GREY).save(path, exif=exif(2)),
    "alpha.png": lambda path: cv2.imwrite(str(path), np.dstack([COLOUR, GREY])),
    "palette.png": palette,
    "one bit.png": lambda path: Image.fromarray(GREY).convert("1").save(path),
    "deep.png": lambda path: cv2.imwrite(str(path), GREY.astype(np.uint16) * 16),
    "deep.tif": lambda path: cv2.imwrite(str(path), GREY.astype(np.uint16) * 16),
    "floats.tiff": lambda path: cv2.imwrite(str(path), GREY.astype(np.float32) * 16),
    "plain.tif": lambda path: cv2.imwrite(str(path), GREY),
    "pages.tif": lambda path: cv2.imwritemulti(str(path), [GREY, GREY[::-1].copy()]),
    "moving.gif": lambda path: Image.fromarray(GREY).save(
        path, save_all=True, append_images=[Image.fromarray(GREY[::-1].copy())], duration=40
    ),
    "still.gif": lambda path: Image.fromarray(GREY).save(path),
    "lossless.webp": lambda path: Image.fromarray(COLOUR).save(path, lossless=True),
    "map.bmp": lambda path: cv2.imwrite(str(path), COLOUR),
    "grey.pgm": lambda path: cv2.imwrite(str(path), GREY),
    "one.dcm": lambda path: dicom(path, 1),
    "IM_0001": lambda path: dicom(path, 1),
    "cine.dcm": lambda path: dicom(path, 3),
    "clip.mp4": video,
    "broken.png": lambda path: path.write_bytes(cv2.imencode(".png", GREY)[1].tobytes()[:900]),
    "text.png": lambda path: path.write_text("not an image", encoding="utf-8"),
}
REFUSED = {
    "deep.png",
    "deep.tif",
    "floats.tiff",
    "pages.tif",
    "moving.gif",
    "cine.dcm",
    "clip.mp4",
    "broken.png",
    "text.png",
}
"""Files that no command reads as one image unasked."""
NAMED = {"pages.tif": "#1", "moving.gif": "#1", "cine.dcm": "#2", "clip.mp4": "#3"}
"""Files of several frames, and one of them."""


def table(folder: Path, named: str) -> Path:
    """A folder whose table names a file in every split, beside images that anybody reads."""
    for number in range(2):
        cv2.imwrite(str(folder / f"other{number}.png"), np.full((40, 50), 30 + number, np.uint8))
    rows = [(named, "train"), ("other0.png", "val"), ("other1.png", "val")]
    return write_rows(folder, [{"file": file, "split": split, "label": "head"} for file, split in rows])


def as_run(path: Path, number: int, reading: Reading) -> bytes:
    options = {"window": reading.window} if reading.window and path.suffix in (".png", ".tif", ".tiff") else {}
    with open_source(str(path), **options) as source:
        frames = [preprocess(frame, SPEC)[0].tobytes() for frame in source]
    if number < 0 and len(frames) > 1:
        raise InputError("several frames")
    return frames[max(number, 0)]


def as_training(folder: Path, reading: Reading) -> bytes:
    (sample,) = read_table(folder, "train", need="label", reading=reading)
    return stack_frames([sample.frame], SPEC).tobytes()


def as_distilling(folder: Path, reading: Reading) -> bytes:
    rows = list_rows([folder], ("train",), reading).rows
    pool = read_pool(rows, 48, reading=reading, frame_stride=1)
    if len(pool) > 1:
        raise InputError("several frames")
    return pool.pixels_NSS.tobytes()


def one(frames: list[NamedFrame]) -> bytes:
    return preprocess(frames[0].frame, SPEC)[0].tobytes()


def as_calibrating(folder: Path, reading: Reading) -> bytes:
    return one([named for named, _ in open_pool(folder, None, reading).frames("train")])


def as_exporting(folder: Path, reading: Reading) -> bytes:
    return one(list(read_data(folder, calibrate=False, teach=True, reading=reading).training))


COMMANDS = {
    "adapt, evaluate": as_training,
    "distill, coreset": as_distilling,
    "calibrate": as_calibrating,
    "export, verify, qat": as_exporting,
}


def answers(folder: Path, name: str, number: int, reading: Reading) -> dict[str, bytes | None]:
    """Command -> what it makes of the file, None where it refuses."""
    found: dict[str, bytes | None] = {}
    where = table(folder, name if number < 0 else f"{name}#{number}")
    for command, read in {"run": lambda _, asked: as_run(folder / name, number, asked), **COMMANDS}.items():
        try:
            found[command] = read(where, reading)
        except EdgeError as error:
            assert str(error), "a refusal says why"
            found[command] = None
    return found


@pytest.mark.parametrize("name", WRITERS)
def test_every_command_gives_the_same_bytes_or_refuses(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / name)
    found = answers(tmp_path, name, -1, AS_IT_IS)
    assert len(set(found.values())) == 1, {command: data is not None for command, data in found.items()}
    assert (found["run"] is None) == (name in REFUSED)


@pytest.mark.parametrize("name", ["deep.png", "deep.tif", "floats.tiff"])
def test_a_window_reads_deep_images_alike(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / name)
    found = answers(tmp_path, name, -1, WINDOWED)
    assert len(set(found.values())) == 1 and found["run"] is not None
    wanted = np.floor(np.clip(GREY.astype(float) * 16, 0, 4095) * 255 / 4095 + 0.5).astype(np.uint8)
    assert found["run"] == stack_frames([replace(make_phantom(5).frame, pixels=wanted)], SPEC).tobytes()


@pytest.mark.parametrize("name", NAMED)
def test_one_frame_of_many_is_named_by_its_number(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / name)
    number = int(NAMED[name][1:])
    found = answers(tmp_path, name, number, AS_IT_IS)
    assert len(set(found.values())) == 1 and found["run"] is not None
    assert found["run"] != answers(tmp_path, name, 0, AS_IT_IS)["run"], "another frame gives other bytes"
    with pytest.raises(InputError, match="no frame 99"):
        read_table(table(tmp_path, f"{name}#99"), "train", need="label")


def test_a_plain_folder_gives_calibrate_and_export_the_same_frames(tmp_path: Path) -> None:
    folder = tmp_path / "plain"
    (folder / "inside").mkdir(parents=True)
    for number in (10, 2, 1):
        cv2.imwrite(str(folder / f"a{number}.png"), np.roll(GREY, number, 1))
    dicom(folder / "inside" / "cine.dcm", 3)
    data = read_data(folder, calibrate=False, teach=True)
    pool = open_pool(folder, None)
    for mine, theirs in ((data.training, "train"), (data.validation, "val")):
        other = [named for named, _ in pool.frames(theirs)]
        assert [named.id for named in mine] == [named.id for named in other]
        assert all(np.array_equal(a.frame.pixels, b.frame.pixels) for a, b in zip(mine, other, strict=True))
    assert [named.id for named in data.training] == ["plain#0", "plain#2", "plain#4"]
    assert np.array_equal(data.training[0].frame.pixels, np.roll(GREY, 1, 1)), "a1 before a2 before a10"
