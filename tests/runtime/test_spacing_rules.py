"""Millimetres belong to a frame: a spacing that stopped being true, or cannot be, is never handed on silently."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tinyusfm_runtime.errors import FrameError
from tinyusfm_runtime.sources import open_source
from tinyusfm_runtime.sources._findings import Findings
from tinyusfm_runtime.sources._spacing import SpacingRule, plausible, with_aspect

SIZE = (48, 64)


# the rule


def test_a_given_spacing_holds_for_the_first_size_only() -> None:
    findings = Findings()
    rule = SpacingRule((0.2, 0.3), findings)
    assert rule.of((100, 200)) == (0.2, 0.3) and findings.doubts == ()
    assert rule.of((50, 100)) is None and "100x200" not in findings.doubts[0] and "200x100 pixels" in findings.doubts[0]
    assert rule.of((100, 200)) == (0.2, 0.3), "the first size again"


def test_without_a_given_one_each_frame_has_its_own() -> None:
    findings = Findings()
    rule = SpacingRule(None, findings)
    assert [rule.of(size, own) for size, own in (((9, 9), (0.1, 0.1)), ((5, 5), (0.2, 0.2)), ((5, 5), None))] == [
        (0.1, 0.1), (0.2, 0.2), None,
    ]  # fmt: skip
    assert findings.doubts == ()


def test_a_change_of_depth_below_a_given_spacing_is_a_doubt() -> None:
    findings = Findings()
    rule = SpacingRule((0.2, 0.2), findings)
    assert rule.of(SIZE, (0.3, 0.3)) == (0.2, 0.2) and "overrules" in findings.notes[0]
    assert rule.of(SIZE, (0.3, 0.3)) == (0.2, 0.2)
    assert rule.of(SIZE, (0.45, 0.45)) is None and "spacing changes" in findings.doubts[0]


@pytest.mark.parametrize("spacing", [(0.001, 0.001), (0.2, 2.5), (5.0, 5.0), (0.009, 0.2), (1.01, 1.01)])
def test_a_spacing_that_cannot_be_is_never_handed_on(spacing: tuple[float, float]) -> None:
    findings = Findings()
    assert plausible(spacing, findings) is None and "outside 0.01 to 1 mm" in findings.doubts[0]
    assert SpacingRule(spacing, findings).of(SIZE) is None
    assert SpacingRule(None, findings).of(SIZE, spacing) is None


@pytest.mark.parametrize("spacing", [(0.01, 0.01), (1.0, 1.0), (0.05, 0.4)])
def test_a_spacing_that_can_be_is(spacing: tuple[float, float]) -> None:
    findings = Findings()
    assert plausible(spacing, findings) == spacing and findings.doubts == ()


def test_shapes_of_pixels() -> None:
    findings = Findings()
    assert with_aspect((0.2, 0.2), 1.5, findings) == pytest.approx((0.2, 0.3))
    assert with_aspect((0.2, 0.3), 1.5, findings) == (0.2, 0.3)
    assert with_aspect(None, 1.5, findings) is None and with_aspect((0.2, 0.3), None, findings) == (0.2, 0.3)
    with pytest.raises(FrameError, match=r"1.5 times"):
        with_aspect((0.3, 0.2), 1.5, findings)


# files


def test_a_folder_of_two_sizes(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image", reason="install tinyusfm-edge[images]")
    for name, size in (("1.png", (64, 96)), ("2.png", (128, 192)), ("3.png", (64, 96))):
        image.fromarray(np.zeros(size, np.uint8)).save(tmp_path / name)
    with open_source(str(tmp_path), spacing_mm=(0.2, 0.2)) as source:
        assert [frame.spacing_mm for frame in source] == [(0.2, 0.2), None, (0.2, 0.2)]
        assert "frame size changes" in source.doubts[0]


def test_a_folder_under_a_crop_of_one_size(tmp_path: Path) -> None:
    """The crop hides that the images behind it have two sizes; the spacing must not."""
    image = pytest.importorskip("PIL.Image", reason="install tinyusfm-edge[images]")
    for name, size in (("1.png", (64, 96)), ("2.png", (128, 192))):
        image.fromarray(np.zeros(size, np.uint8)).save(tmp_path / name)
    with open_source(str(tmp_path), spacing_mm=(0.2, 0.2), crop=(0, 0, 40, 40)) as source:
        assert [frame.spacing_mm for frame in source] == [(0.2, 0.2), None]
        assert source.doubts


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    pydicom = pytest.importorskip("pydicom", reason="install tinyusfm-edge[dicom]")

    def sequence(*items: dict[str, Any]) -> list[Any]:
        made = []
        for item in items:
            dataset = pydicom.Dataset()
            for key, value in item.items():
                setattr(
                    dataset, key, sequence(*value) if isinstance(value, list) and isinstance(value[0], dict) else value
                )
            made.append(dataset)
        return made

    def writer(frames: int = 2, **tags: Any) -> Path:
        dataset = pydicom.Dataset()
        dataset.file_meta = pydicom.dataset.FileMetaDataset()
        dataset.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
        dataset.SOPClassUID, dataset.SOPInstanceUID = pydicom.uid.UltrasoundMultiFrameImageStorage, "1.2.3"
        dataset.NumberOfFrames, dataset.Rows, dataset.Columns = frames, *SIZE
        dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
        dataset.BitsAllocated = dataset.BitsStored = 8
        dataset.HighBit, dataset.PixelRepresentation = 7, 0
        for key, value in tags.items():
            nested = isinstance(value, list) and value and isinstance(value[0], dict)
            setattr(dataset, key, sequence(*value) if nested else value)
        dataset.PixelData = bytes(frames * SIZE[0] * SIZE[1])
        dataset.save_as(tmp_path / "x.dcm", enforce_file_format=True)
        return tmp_path / "x.dcm"

    return writer


def region(x0: int, x1: int, delta_cm: float, **more: Any) -> dict[str, Any]:
    return {
        "RegionSpatialFormat": 1, "RegionDataType": 1, "RegionLocationMinX0": x0, "RegionLocationMinY0": 0,
        "RegionLocationMaxX1": x1, "RegionLocationMaxY1": SIZE[0] - 1, "PhysicalUnitsXDirection": 3,
        "PhysicalUnitsYDirection": 3, "PhysicalDeltaX": delta_cm, "PhysicalDeltaY": delta_cm, **more,
    }  # fmt: skip


DUAL = [region(0, 30, 0.02), region(32, 63, 0.04)]


def spacing_of(path: Path, **options: Any) -> tuple[Any, str, str]:
    with open_source(str(path), **options) as source:
        frames = list(source)
        return frames[0].spacing_mm, " | ".join(source.notes), " | ".join(source.doubts)


@pytest.mark.parametrize(
    ("crop", "want", "words"),
    [
        ((0, 0, 40, 30), (0.2, 0.2), ""),
        ((4, 33, 40, 30), (0.4, 0.4), ""),
        ((0, 34, 20, 25), (0.4, 0.4), ""),
        ((0, 10, 40, 40), None, "for the crop"),
        (None, None, "crop to one of them"),
        ("region", (0.4, 0.4), ""),
    ],
    ids=["left", "right", "inside right", "across both", "whole", "largest"],
)
def test_a_crop_on_a_dual_view_has_its_own_regions_spacing(
    write: Callable[..., Path], crop: Any, want: Any, words: str
) -> None:
    spacing, notes, _ = spacing_of(write(SequenceOfUltrasoundRegions=DUAL), crop=crop)
    assert spacing == (None if want is None else pytest.approx(want)) and words in notes and bool(words) == bool(notes)


def test_a_crop_outside_every_region_has_no_spacing(write: Callable[..., Path]) -> None:
    path = write(SequenceOfUltrasoundRegions=[region(0, 20, 0.02)])
    spacing, notes, _ = spacing_of(path, crop=(0, 40, 40, 20))
    assert spacing is None and "outside the ultrasound regions" in notes


def test_regions_of_one_depth_share_it(write: Callable[..., Path]) -> None:
    path = write(SequenceOfUltrasoundRegions=[region(0, 30, 0.02), region(32, 63, 0.02)])
    assert spacing_of(path)[0] == pytest.approx((0.2, 0.2))


BESIDE = {
    "M-mode": (region(32, 63, 0.02, RegionSpatialFormat=2, PhysicalUnitsXDirection=4), "an M-mode region"),
    "spectrum": (region(32, 63, 0.02, RegionSpatialFormat=3, PhysicalUnitsXDirection=4), "a spectral Doppler region"),
    "colour bar": (region(60, 63, 0.02, RegionSpatialFormat=5, RegionDataType=10), "a graphics region"),
    "2D without cm": (region(34, 60, 0.02, PhysicalUnitsXDirection=4), "a 2D region"),
}


@pytest.mark.parametrize("kind", BESIDE)
def test_another_region_beside_the_2d_one_is_named_with_the_crop_that_leaves_it_out(
    write: Callable[..., Path], kind: str
) -> None:
    other, words = BESIDE[kind]
    path = write(SequenceOfUltrasoundRegions=[region(0, 30, 0.02), other])
    spacing, notes, doubts = spacing_of(path)
    assert spacing == pytest.approx((0.2, 0.2)) and not doubts
    assert words in notes and "--crop 0,0,48,31" in notes
    for crop in ("region", (0, 0, 48, 31), (4, 4, 20, 20)):
        assert spacing_of(path, crop=crop)[1:] == ("", "")
    if kind != "colour bar":
        assert "--crop 0,0,48,31" in spacing_of(path, crop=(0, 10, 40, 40))[1]
    assert "--crop" not in spacing_of(path, spacing_mm=(0.3, 0.3))[1], "who gives a spacing knows"


@pytest.mark.parametrize("delta_cm", [0.3, 20.0, 0.0001])
def test_a_delta_that_does_not_fit_its_unit_is_a_doubt(write: Callable[..., Path], delta_cm: float) -> None:
    spacing, notes, doubts = spacing_of(write(SequenceOfUltrasoundRegions=[region(0, 63, delta_cm)]))
    assert spacing is None and (doubts or notes)
    if delta_cm == 0.3:
        assert "3,3 mm lies outside" in doubts


def test_pixel_measures_of_enhanced_objects(write: Callable[..., Path]) -> None:
    shared = [{"PixelMeasuresSequence": [{"PixelSpacing": ["0.25", "0.5"]}]}]
    assert spacing_of(write(SharedFunctionalGroupsSequence=shared))[0] == (0.25, 0.5)
    each = [{"PixelMeasuresSequence": [{"PixelSpacing": [value, value]}]} for value in ("0.25", "0.5")]
    path = write(PerFrameFunctionalGroupsSequence=each)
    with open_source(str(path)) as source:
        assert [frame.spacing_mm for frame in source] == [(0.25, 0.25), (0.5, 0.5)]
    with open_source(str(path), spacing_mm=(0.25, 0.25)) as source:
        assert [frame.spacing_mm for frame in source] == [(0.25, 0.25), None]
        assert "spacing changes" in source.doubts[0]


def test_pixel_aspect_ratio_stretches_a_square_spacing(write: Callable[..., Path]) -> None:
    path = write(PixelAspectRatio=["1", "2"])
    spacing, notes, _ = spacing_of(path, spacing_mm=(0.2, 0.2))
    assert spacing == pytest.approx((0.2, 0.4)) and "not square" in notes


# times


@pytest.mark.parametrize(
    ("tags", "times_ms", "words"),
    [
        ({"FrameTime": "40"}, [0, 40, 80], ""),
        ({"FrameTimeVector": ["0", "10", "30"]}, [0, 10, 40], ""),
        ({"CineRate": "20"}, [0, 50, 100], "CineRate (20 Hz)"),
        ({"RecommendedDisplayFrameRate": "10"}, [0, 100, 200], "RecommendedDisplayFrameRate (10 Hz)"),
        ({"FrameTime": "0", "CineRate": "20"}, [0, 50, 100], "CineRate"),
        ({"FrameTimeVector": ["0", "10"], "FrameTime": "40"}, [0, 40, 80], "2 entries for 3 frames"),
        ({}, None, ""),
    ],
    ids=["FrameTime", "vector", "cine rate", "display rate", "zero", "short vector", "none"],
)
def test_times_of_a_cine(
    write: Callable[..., Path], tags: dict[str, Any], times_ms: list[int] | None, words: str
) -> None:
    with open_source(str(write(3, **tags))) as source:
        times = [frame.t_source_ns for frame in source]
        notes = " | ".join(source.notes)
    assert times == ([None] * 3 if times_ms is None else [t * 1_000_000 for t in times_ms])
    assert words in notes and ("Frame" in notes or "Rate" in notes) == bool(words)
