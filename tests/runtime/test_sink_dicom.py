"""The DICOM sink: objects that a validator accepts, that hold the very masks, and that name nobody unless asked."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.needs import needs
from tests.runtime.live_driver import driver, live_result, phantoms
from tests.runtime.test_sinks import leftovers, predicted
from tinyusfm_runtime.errors import InputError, MissingExtra, OutputError
from tinyusfm_runtime.frame import Frame, PixelFormat
from tinyusfm_runtime.overlay import as_rgb
from tinyusfm_runtime.sinks import RunFacts, dicom, open_sink
from tinyusfm_runtime.sources import open_source

pydicom = pytest.importorskip("pydicom", reason="install tinyusfm-edge[dicom-objects]")
needs("highdicom", reason="install tinyusfm-edge[dicom-objects]")

NAME, PATIENT = "Doe^Jane", "MRN-4711"


def faults(path: Path) -> list[str]:
    """Errors of the validator."""
    if shutil.which("dciodvfy") is None:
        pytest.skip("dicom3tools is not installed")
    done = subprocess.run(["dciodvfy", str(path)], capture_output=True, text=True, timeout=900, check=False)
    assert "Segmentation" in done.stderr or "SR" in done.stderr or "SC" in done.stderr, done.stderr[:500]
    return [line for line in (done.stderr + done.stdout).splitlines() if line.startswith("Error")]


def read(folder: Path, name: str) -> Any:
    return pydicom.dcmread(folder / name)


def masks_of(segmentation: Any) -> dict[int, np.ndarray]:
    """Frame of the source, from 1 -> mask, as any reader of the object sees it."""
    planes = segmentation.pixel_array.reshape(-1, segmentation.Rows, segmentation.Columns)
    groups = segmentation.PerFrameFunctionalGroupsSequence
    numbers = [group.DerivationImageSequence[0].SourceImageSequence[0].ReferencedFrameNumber for group in groups]
    return dict(zip(numbers, planes, strict=True))


SHARES = ("confidence", "agreement")
"""Codes of numbers without a unit."""


def numbers_of(report: Any) -> list[dict[str, float]]:
    """The measurements of each group, by the code's value."""
    found = []

    def walk(item: Any) -> None:
        if item.get("ValueType") == "CONTAINER" and item.ConceptNameCodeSequence[0].CodeValue == "125007":
            values = [child for child in item.ContentSequence if child.ValueType == "NUM"]
            measured = {c.ConceptNameCodeSequence[0].CodeValue: c.MeasuredValueSequence[0] for c in values}
            units = {code: value.MeasurementUnitsCodeSequence[0].CodeValue for code, value in measured.items()}
            assert all(unit == ("1" if code in SHARES else "mm") for code, unit in units.items())
            found.append({code: float(value.NumericValue) for code, value in measured.items()})
        for child in item.get("ContentSequence", ()):
            walk(child)

    walk(report)
    return found


@pytest.fixture
def cine(tmp_path: Path) -> Path:
    """A DICOM cine of phantoms with a patient in it."""
    frames = phantoms(4)
    made = pydicom.Dataset()
    made.file_meta = pydicom.dataset.FileMetaDataset()
    made.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    made.SOPClassUID, made.SOPInstanceUID = pydicom.uid.UltrasoundMultiFrameImageStorage, "1.2.3.4"
    made.StudyInstanceUID, made.SeriesInstanceUID, made.Modality = "1.2.3", "1.2.3.1", "US"
    made.PatientName, made.PatientID, made.StudyDate, made.AccessionNumber = NAME, PATIENT, "20240102", "ACC-9"
    made.PatientBirthDate, made.PatientSex, made.StudyTime, made.StudyID = "19900203", "F", "101112", "S7"
    made.InstitutionName, made.OperatorsName = "St Elsewhere", "Op^Erator"
    made.NumberOfFrames, (made.Rows, made.Columns) = len(frames), frames[0].pixels.shape
    made.SamplesPerPixel, made.PhotometricInterpretation = 1, "MONOCHROME2"
    made.BitsAllocated = made.BitsStored = 8
    made.HighBit, made.PixelRepresentation, made.FrameTime = 7, 0, "40"
    made.PixelSpacing = ["0.3", "0.3"]
    made.PixelData = np.stack([frame.pixels for frame in frames]).tobytes()
    made.save_as(tmp_path / "cine.dcm", enforce_file_format=True)
    return tmp_path / "cine.dcm"


@pytest.mark.parametrize("colour", [False, True])
def test_frames_of_no_dicom_source_become_a_self_contained_set(tmp_path: Path, colour: bool) -> None:
    results = [live_result(seed) for seed in range(3)]
    if colour:
        frames = [replace(r.frame, pixels=as_rgb(r.frame), pixel_format=PixelFormat.RGB) for r in results]
        results = [replace(result, frame=frame) for result, frame in zip(results, frames, strict=True)]
    results.append(live_result(7, frame=results[0].frame, withheld=True, stale=True, valid=False))
    with open_sink(f"dicom:{tmp_path / 'out'}", facts=RunFacts(labels=("head",), model="tiny", rate_hz=30.0)) as sink:
        for result in results:
            sink.write_live(result)  # type: ignore[attr-defined]
    folder = tmp_path / "out"
    assert leftovers(tmp_path) == ["out"]
    assert leftovers(folder) == ["image.dcm", "report.dcm", "segmentation.dcm"]
    image, made, report = (read(folder, name) for name in (dicom.IMAGE, dicom.SEGMENTATION, dicom.REPORT))
    np.testing.assert_array_equal(image.pixel_array, np.stack([result.frame.pixels for result in results]))
    assert image.BurnedInAnnotation == "YES" and float(image.FrameTime) == pytest.approx(1000 / 30, rel=1e-5)
    masks = masks_of(made)
    assert sorted(masks) == [1, 2, 3], "what was withheld has no mask"
    for number, result in enumerate(results[:3], 1):
        assert result.prediction is not None
        np.testing.assert_array_equal(masks[number], result.prediction.mask_on_frame())
    spacing = made.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].PixelSpacing
    assert [float(side) for side in spacing] == pytest.approx(results[0].frame.spacing_mm, rel=1e-6)
    assert made.ReferencedSeriesSequence[0].SeriesInstanceUID == image.SeriesInstanceUID
    assert made.StudyInstanceUID == report.StudyInstanceUID == image.StudyInstanceUID
    found = numbers_of(report)
    wanted = [r.prediction.measurement.hc_mm for r in results[:3] if r.prediction and r.prediction.measurement]
    assert [group["11984-2"] for group in found] == pytest.approx(wanted, abs=1e-3)
    agreements = [r.prediction.measurement.agreement for r in results[:3] if r.prediction and r.prediction.measurement]
    assert [group["agreement"] for group in found] == pytest.approx(agreements, abs=1e-4)


def test_the_validator_finds_no_error(tmp_path: Path, cine: Path) -> None:
    for name, options in (("own", {}), ("referred", {"source_dicom": str(cine)}), ("patient", {"source_dicom": str(cine), "carry_patient": True})):  # noqa: E501  # fmt: skip
        with dicom.open_sink(str(tmp_path / name), labels=("head",), model="tiny", **options) as sink:  # type: ignore[arg-type]
            for seed in range(3):
                sink.write_live(live_result(seed))
        assert sink.written
        for file in sink.written:
            assert faults(tmp_path / name / file) == [], file


def test_the_validator_would_find_an_error(tmp_path: Path) -> None:
    """The control: a segmentation without its segments is not accepted."""
    with dicom.open_sink(str(tmp_path / "own")) as sink:
        sink.write_live(live_result(1))
    spoilt = read(tmp_path / "own", dicom.SEGMENTATION)
    del spoilt.SegmentSequence
    spoilt.save_as(tmp_path / "spoilt.dcm")
    assert faults(tmp_path / "spoilt.dcm")


def test_a_dicom_source_is_referred_to_frame_by_frame(
    fake_bundle: Path, plug_in: object, tmp_path: Path, cine: Path
) -> None:
    with (
        driver(fake_bundle, drop=frozenset({1}), broken=frozenset({2})) as live,
        open_source(str(cine)) as source,
        dicom.open_sink(str(tmp_path / "out"), source_dicom=str(cine), labels=("head",)) as sink,
    ):
        results = live.run(source, [sink])
    assert sink.written == (dicom.SEGMENTATION, dicom.REPORT), "the frames are there already"
    made, report = read(tmp_path / "out", dicom.SEGMENTATION), read(tmp_path / "out", dicom.REPORT)
    masks = masks_of(made)
    assert sorted(masks) == [1, 4]
    for result in (results[0], results[-1]):
        assert result.prediction is not None
        np.testing.assert_array_equal(masks[result.frame.seq + 1], result.prediction.mask_on_frame())
    source_item = made.PerFrameFunctionalGroupsSequence[0].DerivationImageSequence[0].SourceImageSequence[0]
    assert source_item.ReferencedSOPInstanceUID == "1.2.3.4" and made.StudyInstanceUID == "1.2.3"
    assert report.CurrentRequestedProcedureEvidenceSequence[0].StudyInstanceUID == "1.2.3"
    assert len(numbers_of(report)) == 2


def test_cropped_frames_are_put_back_in_their_place(tmp_path: Path, cine: Path) -> None:
    frame, prediction = predicted(3)
    box = (20, 30, 200, 300)
    cropped = replace(frame, seq=2, crop=box, pixels=np.ascontiguousarray(frame.pixels[20:220, 30:330]))
    placed = replace(prediction, placement=replace(prediction.placement, crop=(0, 0, 200, 300), frame_size=(200, 300)))
    with dicom.open_sink(str(tmp_path / "out"), source_dicom=str(cine)) as sink:
        sink.write(cropped, placed)
    (mask,) = masks_of(read(tmp_path / "out", dicom.SEGMENTATION)).values()
    want = np.zeros((270, 400), np.uint8)
    want[20:220, 30:330] = placed.mask_on_frame()
    np.testing.assert_array_equal(mask, want)


def test_nobody_is_named_unless_asked(tmp_path: Path, cine: Path) -> None:
    secrets = [NAME, PATIENT, "ACC-9", "19900203", "20240102", "St Elsewhere", "Op^Erator", "cine.dcm"]
    for carry in (False, True):
        folder = tmp_path / f"carry-{carry}"
        with dicom.open_sink(str(folder), source_dicom=str(cine), carry_patient=carry) as sink:
            sink.write_live(live_result(1))
        for name in sink.written:
            content = (folder / name).read_bytes()
            told = [secret for secret in secrets if secret.encode() in content]
            assert told == ([NAME, PATIENT, "ACC-9", "19900203", "20240102"] if carry else []), name
            assert read(folder, name).get("PatientIdentityRemoved") == (None if carry else "YES")
    with pytest.raises(InputError, match="carry_patient"):
        dicom.open_sink(str(tmp_path / "x"), carry_patient=True)


def test_frames_without_spacing_have_no_numbers(tmp_path: Path) -> None:
    frame, prediction = predicted(3)
    assert prediction.measurement is not None
    bare = replace(prediction, measurements=(replace(prediction.measurement, hc_mm=None, axes_mm=None),))
    with dicom.open_sink(str(tmp_path / "out")) as sink:
        sink.write(replace(frame, spacing_mm=None), bare)
    assert numbers_of(read(tmp_path / "out", dicom.REPORT))[0].keys() <= set(SHARES), "nothing in mm"
    assert "PixelMeasuresSequence" not in read(tmp_path / "out", dicom.SEGMENTATION).SharedFunctionalGroupsSequence[0]
    for name in sink.written:
        assert faults(tmp_path / "out" / name) == []


def test_what_cannot_be_told_as_one_cine(tmp_path: Path, cine: Path) -> None:
    small = Frame(pixels=np.zeros((32, 48), np.uint8))
    for name, options in (("plain", {}), ("referring", {"source_dicom": str(cine)})):
        with pytest.raises(OutputError, match="cannot write the DICOM objects"):  # noqa: SIM117
            with dicom.open_sink(str(tmp_path / name), **options) as sink:  # type: ignore[arg-type]
                if name == "plain":
                    sink.write_live(live_result(1))
                sink.write_live(live_result(2, frame=small, prediction=None))
    with dicom.open_sink(str(tmp_path / "out")):
        pass
    assert leftovers(tmp_path) == ["cine.dcm", "plain"], "nothing is left of a cine without frames"
    assert "image.dcm" in leftovers(tmp_path / "plain"), "what came before the frame that did not fit is kept"
    (tmp_path / "taken").mkdir()
    with pytest.raises(OutputError, match="there already"):
        dicom.open_sink(str(tmp_path / "taken"))
    (tmp_path / "none.dcm").write_bytes(b"nothing")
    for wrong in ("none.dcm", "missing.dcm"):
        with pytest.raises(InputError, match="cannot be referred to"):
            dicom.open_sink(str(tmp_path / "out"), source_dicom=str(tmp_path / wrong))


def test_too_long_a_cine_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dicom, "MAX_BYTES", 300_000)
    with pytest.raises(OutputError, match="shorter cine"), dicom.open_sink(str(tmp_path / "out")) as sink:
        for seed in range(4):
            sink.write_live(live_result(seed))
    assert leftovers(tmp_path) == ["out"], "what was taken is kept"


def test_without_highdicom_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "highdicom", None)
    with pytest.raises(MissingExtra, match=r"pip install .+\[dicom-objects\]"):
        dicom.open_sink(str(tmp_path / "out"))
    assert not dicom.available().usable
