"""Pools: folders, tables, cines, videos become squares; flags are counted, failures named by hash, never skipped."""

from __future__ import annotations

import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest

from tests.tables import write_rows
from tinyusfm_edge.data.images import list_rows, read_pool
from tinyusfm_runtime.errors import InputError
from tinyusfm_runtime.frame import Frame
from tinyusfm_runtime.numerics.preprocess import preprocess
from tinyusfm_runtime.spec import PreprocessSpec


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three images in two folders, no table."""
    place = tmp_path / "pool"
    (place / "deep").mkdir(parents=True)
    for name, shade in (("b2.png", 90), ("b10.png", 120), ("deep/c.png", 200)):
        cv2.imwrite(str(place / name), np.full((40, 60), shade, np.uint8))
    (place / "notes.txt").write_text("not an image", encoding="utf-8")
    return place


def write_video(path: Path, frames: int = 20) -> None:
    av = pytest.importorskip("av", reason="PyAV is not installed")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(frames):
            image = av.VideoFrame.from_ndarray(np.full((48, 64), 10 * number, np.uint8), format="gray")
            container.mux(stream.encode(image.reformat(format="yuv420p")))
        container.mux(stream.encode())


def write_cine(path: Path, frames: int = 9) -> None:
    pydicom = pytest.importorskip("pydicom", reason="pydicom is not installed")
    from pydicom.dataset import FileDataset, FileMetaDataset

    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.3.1"
    meta.MediaStorageSOPInstanceUID = "1.2.3"
    meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    data = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    data.SOPClassUID, data.SOPInstanceUID, data.Modality = meta.MediaStorageSOPClassUID, "1.2.3", "US"
    data.Rows, data.Columns, data.NumberOfFrames, data.SamplesPerPixel = 32, 32, frames, 1
    data.PhotometricInterpretation, data.PixelRepresentation = "MONOCHROME2", 0
    data.BitsAllocated = data.BitsStored = 8
    data.HighBit = 7
    data.PixelData = np.repeat(np.arange(frames, dtype=np.uint8) * 20, 32 * 32).tobytes()
    data.save_as(path, enforce_file_format=True)


def test_a_folder_is_searched_in_natural_order(folder: Path) -> None:
    pool = read_pool(list_rows([folder]).rows, 32)
    assert pool.ids == ("pool/b2.png", "pool/b10.png", "pool/deep/c.png")
    assert pool.pixels_NSS.shape == (3, 32, 32)
    frame = Frame(pixels=np.full((40, 60), 120, np.uint8))
    assert np.array_equal(pool.pixels_NSS[1], preprocess(frame, PreprocessSpec(height=32, width=32))[0][0, 0])


def test_cines_and_videos_give_every_so_manieth_frame(folder: Path) -> None:
    write_video(folder / "clip.mp4")
    write_cine(folder / "cine.dcm")
    pool = read_pool(list_rows([folder]).rows, 32, frame_stride=8)
    assert {"pool/clip.mp4#0", "pool/clip.mp4#8", "pool/clip.mp4#16"} <= set(pool.ids)
    assert {"pool/cine.dcm#0", "pool/cine.dcm#8"} <= set(pool.ids)
    assert len(pool) == 3 + 3 + 2
    assert len(set(pool.groups)) == 5, "frames of one file are one group"
    levels = [float(pool.pixels_NSS[pool.ids.index(f"pool/cine.dcm#{n}")].mean()) for n in (0, 8)]
    assert levels == pytest.approx([0, 160], abs=2)


def test_a_file_that_cannot_be_decoded_stops_or_is_named(folder: Path) -> None:
    (folder / "patient_mueller.png").write_bytes(b"no image")
    rows = list_rows([folder]).rows
    with pytest.raises(InputError, match=r"1 of 4 files cannot be decoded, 0 allowed") as caught:
        read_pool(rows, 32)
    assert "mueller" not in str(caught.value)
    pool = read_pool(rows, 32, allowed_failures=1)
    assert len(pool) == 3
    broken = next(row for row in rows if "mueller" in row.id)
    assert [failure.name for failure in pool.failures] == [broken.name]
    assert "mueller" not in pool.failures[0].reason


def test_flags_are_honoured_and_counted(folder: Path) -> None:
    flags = {"b2.png": (0, 0), "b10.png": (1, 0), "deep/c.png": (0, 1)}
    write_rows(
        folder,
        [{"file": f, "split": "train", "near_duplicate": a, "label_conflict": b} for f, (a, b) in flags.items()],
    )
    found = list_rows([folder])
    assert [row.id for row in found.rows] == ["pool/b2.png"]
    assert found.left_out == {"near_duplicate": 1, "label_conflict": 1}
    with pytest.raises(InputError, match="no image in split val"):
        list_rows([folder], ("val",))


def test_a_stored_pool_is_mapped_again_until_a_file_changes(folder: Path, tmp_path: Path) -> None:
    rows = list_rows([folder]).rows
    first = read_pool(rows, 32, store=tmp_path / "store")
    assert isinstance(first.pixels_NSS, np.memmap)
    memory = read_pool(rows, 32)
    assert (memory.fingerprint, memory.ids) == (first.fingerprint, first.ids)
    assert np.array_equal(memory.pixels_NSS, first.pixels_NSS)

    def never(rows: object) -> object:
        raise AssertionError("decoded again")

    again = read_pool(rows, 32, store=tmp_path / "store", track=never)  # type: ignore[arg-type]
    assert again.fingerprint == first.fingerprint
    cv2.imwrite(str(folder / "b2.png"), np.full((41, 60), 91, np.uint8))
    assert read_pool(rows, 32, store=tmp_path / "store").fingerprint != first.fingerprint


def test_two_folders_of_one_name_are_refused_where_their_files_clash(folder: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(folder, tmp_path / "elsewhere" / "pool"))
    with pytest.raises(InputError, match="rename a folder"):
        list_rows([folder, other])
    with pytest.raises(InputError, match="nothing does not exist"):
        list_rows([tmp_path / "nothing"])


def test_a_coreset_that_no_longer_fits_its_folders_is_refused(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "coreset.json"
    text = '{"version": 1, "places": ["pool"], "splits": ["train"], "frame_stride": 4, "chosen": [{"id": "pool/%s"}]}'
    path.write_text(text % "b2.png", encoding="utf-8")
    found = list_rows([path])
    assert ([row.id for row in found.rows], found.frame_stride) == (["pool/b2.png"], 4)
    path.write_text(text % "gone.png", encoding="utf-8")
    with pytest.raises(InputError, match="no longer hold"):
        list_rows([path])
    path.write_text('{"version": 7}', encoding="utf-8")
    with pytest.raises(InputError, match="version 7"):
        list_rows([path])
