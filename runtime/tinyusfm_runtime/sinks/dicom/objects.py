"""DICOM objects about a cine.

Its images as secondary capture, masks as a segmentation, readings as a report.

``multiframe_image`` and ``segmentation`` are written with pydicom (highdicom 0.28 has no multi-frame
secondary capture, and segments one frame only where there is no frame of reference); the segments'
descriptions and ``measurement_report`` are highdicom's. All three refer to each other by UID; a
segmentation lies on the pixels of the image it refers to, frame by frame, without a frame of reference.

Anonymous unless asked otherwise: of a source file only ``REFERENCE_TAGS`` are looked at, which name no person;
its UIDs are carried, since a reference needs them. New UIDs are random (2.25, PS3.5 B.2). Numbers in
the report are in mm; without spacing it holds the ellipses alone.

It knows no sink, no session and no file.

Shapes: FHW = frames, rows, columns; FHWC with RGB.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

import numpy as np

from tinyusfm_runtime.numerics.order import wide
from tinyusfm_runtime.overlay import ellipse_curve

if TYPE_CHECKING:
    from tinyusfm_runtime.numerics.measure import Measurement
    from tinyusfm_runtime.results import Prediction

REFERENCE_TAGS = (
    "SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "Modality", "Rows", "Columns",
    "NumberOfFrames",
)  # fmt: skip
"""All that is taken of a source file by default: what a reference needs."""
PATIENT_TAGS = (
    "PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyDate", "StudyTime", "StudyID",
    "AccessionNumber", "ReferringPhysicianName",
)  # fmt: skip
"""What ``carry_patient`` takes as well."""
MANUFACTURER = "tinyusfm-edge"
SC_GREY, SC_COLOUR = "1.2.840.10008.5.1.4.1.1.7.2", "1.2.840.10008.5.1.4.1.1.7.4"
"""Multi-frame Grayscale Byte and True Color Secondary Capture Image Storage (PS3.4 B.5)."""
CODING_SCHEME = "99TINYUSFM"
"""Private designator of our own codes (PS3.16 8.2: 99 and a name)."""
CALIBRATION_NOTE = "spacing as given by the source"


@dataclass(frozen=True, kw_only=True, slots=True)
class Maker:
    """What answered, as the objects state it.

    Attributes:
        model: name of the model.
        version: of the bundle, such as the first digits of its hash.
        engine: artefact and engine, one line.
    """

    model: str
    version: str
    engine: str


@dataclass(frozen=True, kw_only=True, slots=True)
class FrameReading:
    """The reading of one frame.

    Attributes:
        number: of the frame in the image, from 1.
        prediction: with a measurement that found something.
        corner: (row, column) of the frame's first pixel in the image.
    """

    number: int
    prediction: Prediction
    corner: tuple[int, int]


def new_uid() -> str:
    """A random UID under 2.25."""
    from pydicom.uid import generate_uid

    return str(generate_uid(prefix=None))


def reference_of(dataset: Any, *, carry_patient: bool) -> Any:
    """The part of a source file's header that our objects may know.

    Args:
        dataset: the header (pydicom).
        carry_patient: also take what names the patient and the study.

    Returns:
        A new dataset; whatever must be there and is not known is empty.
    """
    from pydicom import Dataset

    made = Dataset()
    for tag in (*PATIENT_TAGS, *REFERENCE_TAGS):
        if (tag in REFERENCE_TAGS or carry_patient) and tag in dataset:
            made[tag] = dataset[tag]
        elif tag in PATIENT_TAGS:
            setattr(made, tag, None)
    if not carry_patient:
        made.PatientIdentityRemoved = "YES"
        made.DeidentificationMethod = "only references carried by tinyusfm-edge"
    return made


def multiframe_image(
    pixels: np.ndarray, *, rate_hz: float, spacing_mm: tuple[float, float] | None, burned_in: bool
) -> Any:
    """A cine as multi-frame secondary capture, on its own in a new study.

    Args:
        pixels: uint8 FHW (grey) or FHWC (RGB, full range).
        rate_hz: frames per second.
        spacing_mm: (row, column), mm, or None.
        burned_in: whether names may be in the images; True unless somebody knows better.

    Returns:
        The dataset, ready to be saved.
    """
    from pydicom import Dataset
    from pydicom.tag import Tag

    grey = pixels.ndim == 3
    now = datetime.now()
    image = Dataset()
    for tag in PATIENT_TAGS:
        setattr(image, tag, None)
    image.PatientIdentityRemoved, image.DeidentificationMethod = "YES", "no patient data known to tinyusfm-edge"
    image.SOPClassUID = SC_GREY if grey else SC_COLOUR
    image.SOPInstanceUID, image.StudyInstanceUID, image.SeriesInstanceUID = new_uid(), new_uid(), new_uid()
    image.Modality, image.ConversionType = "US", "DI"
    image.SeriesNumber, image.InstanceNumber = 1, 1
    image.Manufacturer, image.SeriesDescription = MANUFACTURER, "frames as analysed"
    image.PatientOrientation, image.Laterality = None, None
    image.ContentDate, image.ContentTime = now.strftime("%Y%m%d"), now.strftime("%H%M%S")
    image.BurnedInAnnotation = "YES" if burned_in else "NO"
    image.NumberOfFrames, image.Rows, image.Columns = pixels.shape[:3]
    image.SamplesPerPixel, image.PhotometricInterpretation = (1, "MONOCHROME2") if grey else (3, "RGB")
    image.BitsAllocated, image.BitsStored, image.HighBit, image.PixelRepresentation = 8, 8, 7, 0
    if len(pixels) > 1:
        image.FrameIncrementPointer, image.FrameTime = Tag("FrameTime"), f"{1000.0 / rate_hz:.6g}"
    if grey:
        image.PresentationLUTShape = "IDENTITY"
        image.RescaleIntercept, image.RescaleSlope, image.RescaleType = "0", "1", "US"
    else:
        image.PlanarConfiguration = 0
    if spacing_mm is not None:
        image.PixelSpacing = [f"{side:.10g}" for side in spacing_mm]
        image.PixelSpacingCalibrationType, image.PixelSpacingCalibrationDescription = "GEOMETRY", CALIBRATION_NOTE
    raw = np.ascontiguousarray(pixels).tobytes()
    image.PixelData = raw + b"\0" * (len(raw) % 2)
    image["PixelData"].VR = "OB"
    _finish(image)
    return image


def segmentation(
    image: Any,
    masks: Mapping[int, np.ndarray],
    *,
    labels: Sequence[str],
    spacing_mm: tuple[float, float] | None,
    maker: Maker,
) -> Any:
    """Masks of a cine as a binary segmentation; empty masks are left out.

    Args:
        image: the image they lie on, or what ``reference_of`` took of it.
        masks: frame from 0 -> uint8 HW at the image's size, 0 is background; one of them at least is not empty.
        labels: names of the labels 1, 2, ...
        spacing_mm: (row, column), mm, or None.
        maker: what answered.

    Returns:
        The dataset, ready to be saved.
    """
    import highdicom as hd
    from pydicom.sr.codedict import codes

    found = {frame: np.unique(wide(mask)) for frame, mask in sorted(masks.items())}
    present = range(1, max(int(values[-1]) for values in found.values()) + 1)
    made_by = hd.AlgorithmIdentificationSequence(
        name=maker.model, family=codes.DCM.ArtificialIntelligence, version=maker.version, source=MANUFACTURER
    )
    segments = [
        hd.seg.SegmentDescription(
            segment_number=label,
            segment_label=(labels[label - 1] if label <= len(labels) else f"label {label}")[:64],
            segmented_property_category=codes.SCT.AnatomicalStructure,
            segmented_property_type=_structure(labels[label - 1] if label <= len(labels) else ""),
            algorithm_type=hd.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
            algorithm_identification=made_by,
        )
        for label in present
    ]
    # (segment, frame) in the order of the dimensions
    planes = [(label, frame) for label in present for frame, values in found.items() if label in values]
    made = _segmentation_frame(image, maker)
    made.SegmentSequence = segments
    made.NumberOfFrames, made.Rows, made.Columns = len(planes), *next(iter(masks.values())).shape
    made.SharedFunctionalGroupsSequence = [_shared_groups(spacing_mm)]
    made.PerFrameFunctionalGroupsSequence = [_frame_groups(image, label, frame) for label, frame in planes]
    # one bit a pixel, the first in the least significant place, frames without a gap (PS3.5 8.1.1, PS3.3 C.8.20.2)
    bits = np.packbits(np.stack([masks[frame] == label for label, frame in planes]).ravel(), bitorder="little")
    raw = bits.tobytes()
    made.PixelData = raw + b"\0" * (len(raw) % 2)
    made["PixelData"].VR = "OB"
    _finish(made)
    return made


def measurement_report(image: Any, readings: Sequence[FrameReading], *, maker: Maker) -> Any:
    """Readings of a cine as a structured report (TID 1500).

    An ellipse per frame, and its numbers in mm.

    Args:
        image: the image they were taken on, or what ``reference_of`` took of it.
        readings: of the frames in which something was found, at least one.
        maker: what answered.

    Returns:
        The dataset, ready to be saved.
    """
    import highdicom as hd
    from pydicom.sr.codedict import codes

    device = hd.sr.ObserverContext(
        observer_type=codes.DCM.Device,
        observer_identifying_attributes=hd.sr.DeviceObserverIdentifyingAttributes(
            uid=new_uid(), name=MANUFACTURER, manufacturer_name=MANUFACTURER, model_name=maker.model
        ),
    )
    tracking = hd.sr.TrackingIdentifier(uid=new_uid(), identifier="head")
    report = hd.sr.MeasurementReport(
        observation_context=hd.sr.ObservationContext(observer_device_context=device),
        procedure_reported=hd.sr.CodedConcept("16310003", "SCT", "Ultrasonography"),
        imaging_measurements=[_group(image, reading, tracking, maker) for reading in readings],
        title=codes.DCM.ImagingMeasurementReport,
    )
    made = hd.sr.ComprehensiveSR(
        evidence=[image],
        content=report[0],
        series_instance_uid=new_uid(),
        series_number=102,
        sop_instance_uid=new_uid(),
        instance_number=1,
        manufacturer=MANUFACTURER,
        is_complete=True,
        is_final=False,
        is_verified=False,
        series_description="readings",
    )
    _mark_anonymous(image, made)
    return made


def _segmentation_frame(image: Any, maker: Maker) -> Any:
    """Everything of a segmentation that does not depend on its masks."""
    from pydicom import Dataset
    from pydicom.tag import Tag

    now = datetime.now()
    made = Dataset()
    for tag in (*PATIENT_TAGS, "PatientIdentityRemoved", "DeidentificationMethod"):
        if tag in image:
            made[tag] = image[tag]
    made.SOPClassUID, made.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.66.4", new_uid()
    made.StudyInstanceUID, made.SeriesInstanceUID = image.StudyInstanceUID, new_uid()
    made.Modality, made.SeriesNumber, made.InstanceNumber, made.SeriesDescription = "SEG", 101, 1, "masks"
    made.Manufacturer, made.ManufacturerModelName = MANUFACTURER, maker.model
    made.DeviceSerialNumber, made.SoftwareVersions = "none", maker.version
    made.ContentDate, made.ContentTime = now.strftime("%Y%m%d"), now.strftime("%H%M%S")
    made.ContentLabel, made.ContentDescription, made.ContentCreatorName = "MASKS", "masks of a cine", None
    made.PatientOrientation = None
    made.ImageType, made.SegmentationType = ["DERIVED", "PRIMARY"], "BINARY"
    made.SegmentsOverlap = "NO"
    made.SamplesPerPixel, made.PhotometricInterpretation = 1, "MONOCHROME2"
    made.BitsAllocated, made.BitsStored, made.HighBit, made.PixelRepresentation = 1, 1, 0, 0
    made.LossyImageCompression = "00"
    dimensions = Dataset()
    dimensions.DimensionOrganizationUID = new_uid()
    made.DimensionOrganizationSequence = [dimensions]
    made.DimensionIndexSequence = []
    for group, pointer, label in (
        ("SegmentIdentificationSequence", "ReferencedSegmentNumber", "segment"),
        ("FrameContentSequence", "TemporalPositionIndex", "frame of the cine"),
    ):
        index = Dataset()
        index.DimensionOrganizationUID = dimensions.DimensionOrganizationUID
        index.DimensionIndexPointer, index.FunctionalGroupPointer = Tag(pointer), Tag(group)
        index.DimensionDescriptionLabel = label
        made.DimensionIndexSequence.append(index)
    instance, series = Dataset(), Dataset()
    instance.ReferencedSOPClassUID, instance.ReferencedSOPInstanceUID = image.SOPClassUID, image.SOPInstanceUID
    series.SeriesInstanceUID, series.ReferencedInstanceSequence = image.SeriesInstanceUID, [instance]
    made.ReferencedSeriesSequence = [series]
    return made


def _shared_groups(spacing_mm: tuple[float, float] | None) -> Any:
    from pydicom import Dataset

    shared = Dataset()
    if spacing_mm is not None:
        measures = Dataset()
        measures.PixelSpacing = [f"{side:.10g}" for side in spacing_mm]
        shared.PixelMeasuresSequence = [measures]
    return shared


def _frame_groups(image: Any, label: int, frame: int) -> Any:
    """Functional groups of one plane.

    Which segment, and which frame of the image it was made of.
    """
    from pydicom import Dataset
    from pydicom.sr.codedict import codes

    source = Dataset()
    source.ReferencedSOPClassUID, source.ReferencedSOPInstanceUID = image.SOPClassUID, image.SOPInstanceUID
    if "NumberOfFrames" in image:
        source.ReferencedFrameNumber = frame + 1
    source.SpatialLocationsPreserved = "YES"
    source.PurposeOfReferenceCodeSequence = [_code(codes.DCM.SourceImageForImageProcessingOperation)]
    derivation = Dataset()
    derivation.SourceImageSequence, derivation.DerivationCodeSequence = [source], [_code(codes.DCM.Segmentation)]
    content, segment, made = Dataset(), Dataset(), Dataset()
    content.DimensionIndexValues, content.TemporalPositionIndex = [label, frame + 1], frame + 1
    segment.ReferencedSegmentNumber = label
    made.FrameContentSequence, made.DerivationImageSequence = [content], [derivation]
    made.SegmentIdentificationSequence = [segment]
    return made


def _code(code: Any) -> Any:
    from pydicom import Dataset

    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = code.value, code.scheme_designator, code.meaning
    return item


def _group(image: Any, reading: FrameReading, tracking: Any, maker: Maker) -> Any:
    import highdicom as hd
    from pydicom.sr.codedict import codes

    measured = reading.prediction.measurement
    assert measured is not None
    region = hd.sr.ImageRegion(
        graphic_type=hd.sr.GraphicTypeValues.ELLIPSE,
        graphic_data=_ellipse(reading),
        source_image=hd.sr.SourceImageForRegion(
            referenced_sop_class_uid=image.SOPClassUID,
            referenced_sop_instance_uid=image.SOPInstanceUID,
            referenced_frame_numbers=[reading.number],
        ),
    )
    algorithm = hd.sr.AlgorithmIdentification(name=maker.model, version=maker.version, parameters=[maker.engine])
    named: dict[Any, float | None] = {
        codes.LN.HeadCircumference: measured.hc_mm,
        codes.SCT.LongAxis: None if measured.axes_mm is None else measured.axes_mm[0],
        codes.SCT.ShortAxis: None if measured.axes_mm is None else measured.axes_mm[1],
    }
    return hd.sr.PlanarROIMeasurementsAndQualitativeEvaluations(
        tracking_identifier=tracking,
        referenced_region=region,
        finding_type=codes.SCT.HeadStructure,
        algorithm_id=algorithm,
        measurements=[
            hd.sr.Measurement(name=name, value=round(value, 3), unit=codes.UCUM.Millimeter)
            for name, value in named.items()
            if value is not None
        ]
        + _shares(measured)
        or None,
        qualitative_evaluations=_evaluations(reading.prediction),
    )


def _shares(measured: Measurement) -> list[Any]:
    """Numbers that the thresholds are held against, 0..1."""
    import highdicom as hd
    from pydicom.sr.codedict import codes

    known = [("confidence", "Mean probability inside the mask", measured.confidence)]
    known += [("agreement", "Dice of mask and ellipse", measured.agreement)]
    return [
        hd.sr.Measurement(
            name=hd.sr.CodedConcept(name, CODING_SCHEME, meaning), value=round(value, 4), unit=codes.UCUM.NoUnits
        )
        for name, meaning, value in known
        if value is not None
    ]


def _evaluations(prediction: Prediction) -> list[Any]:
    """How far the reading may be trusted, as coded answers.

    Answers of this software (PS3.16 TID 1500).
    """
    import highdicom as hd

    coded = [("reading", "Reading", prediction.reading.value)]
    coded += [("reason", "Speaks against it", reason.value) for reason in prediction.reasons]
    coded += [("second-pass", "Second pass", prediction.second_pass.value)]
    coded += [("drift", "Compared with the calibration frames", prediction.drift_status.value)]
    return [
        hd.sr.QualitativeEvaluation(
            name=hd.sr.CodedConcept(name, CODING_SCHEME, meaning),
            value=hd.sr.CodedConcept(value.replace(" ", "-"), CODING_SCHEME, value),
        )
        for name, meaning, value in coded
    ]


def _ellipse(reading: FrameReading) -> np.ndarray:
    """Ends of the major, then of the minor axis, (column, row).

    DICOM puts pixel centres at halves (PS3.3 C.18.6.1).
    """
    measured = reading.prediction.measurement
    assert measured is not None
    rows, cols = ellipse_curve(measured, 4)
    row, col = reading.corner
    return np.stack([cols + col + 0.5, rows + row + 0.5], axis=1)[[0, 2, 1, 3]]


def _structure(label: str) -> Any:
    from pydicom.sr.codedict import codes

    return codes.SCT.Head if "head" in label.lower() else codes.SCT.Tissue


def _mark_anonymous(image: Any, made: Any) -> None:
    for tag in ("PatientIdentityRemoved", "DeidentificationMethod"):
        if tag in image:
            made[tag] = image[tag]


def _finish(dataset: Any) -> None:
    from pydicom.dataset import FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian

    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = dataset.SOPClassUID, dataset.SOPInstanceUID
    dataset.file_meta = meta


__all__ = [
    "CALIBRATION_NOTE",
    "CODING_SCHEME",
    "MANUFACTURER",
    "PATIENT_TAGS",
    "REFERENCE_TAGS",
    "SC_COLOUR",
    "SC_GREY",
    "FrameReading",
    "Maker",
    "measurement_report",
    "multiframe_image",
    "new_uid",
    "reference_of",
    "segmentation",
]
