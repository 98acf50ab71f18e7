"""Sink: DICOM objects about a cine, in one new folder.

A segmentation and a report, and the images if need be.

* ``segmentation.dcm``: the masks, one binary frame for each frame that has one;
* ``report.dcm``: the ellipse of each frame and its numbers in mm, a structured report (TID 1500);
* ``image.dcm``: the frames as secondary capture, only where the source was no DICOM file; where it was,
  the other two refer to that file, frame by frame, and cropped frames are put back in their place.

In a loop of several models the second and third are written for each that has any, ``segmentation-NAME.dcm`` and
``report-NAME.dcm``, each naming its model.

What may not be shown or is not valid stands in none of them; an object that would be empty is not
written. No patient data is carried unless asked for (``carry_patient``); the source's UIDs are, since
a reference needs them. The objects themselves are made in dicom_objects.py.

Everything is written at the end, Ctrl-C, SIGTERM and errors included, so frames wait in memory, ``MAX_BYTES`` at most,
and a power cut loses them: put ``jsonl:`` or ``audit:`` beside it where the record must survive that. It knows no loop.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tinyusfm_runtime.errors import EdgeError, InputError, MissingExtra, OutputError
from tinyusfm_runtime.frame import Frame
from tinyusfm_runtime.images.quiet import quiet_pydicom
from tinyusfm_runtime.numerics.preprocess import to_grey
from tinyusfm_runtime.overlay import as_rgb
from tinyusfm_runtime.plugins import Availability
from tinyusfm_runtime.results import LiveResult, Prediction
from tinyusfm_runtime.sinks import FileSink, ModelFacts, PendingFolder, shown
from tinyusfm_runtime.sinks.dicom.objects import (
    FrameReading,
    Maker,
    measurement_report,
    multiframe_image,
    reference_of,
    segmentation,
)

MAX_BYTES = 1 << 30
"""Pixels and masks that may wait; 2600 frames of 640x480 fit."""
IMAGE, SEGMENTATION, REPORT = "image.dcm", "segmentation.dcm", "report.dcm"


def available() -> Availability:
    """Works where highdicom is installed."""
    try:
        import highdicom
        import pydicom
    except ImportError as error:
        return Availability(usable=False, reason=f"{error.name or 'highdicom'} is not installed", extra="dicom-objects")
    except Exception as error:  # a broken installation may raise anything
        return Availability(usable=False, reason=f"highdicom is broken: {type(error).__name__}", extra="dicom-objects")
    reason = f"highdicom {highdicom.__version__}, pydicom {pydicom.__version__}"
    return Availability(usable=True, reason=reason, extra="dicom-objects")


def open_sink(
    location: str,
    *,
    source_dicom: str | None = None,
    carry_patient: bool = False,
    burned_in: bool = True,
    rate_hz: float = 25.0,
    labels: Sequence[str] = (),
    model: str = "unnamed model",
    bundle_id: str | None = None,
) -> DicomSink:
    """Reserves the folder; its files are written at the end.

    Args:
        location: path of the folder, which must not exist.
        source_dicom: the DICOM file that the frames come from, their ``seq`` its frames from 0; None stores the frames.
        carry_patient: take patient and study of that file over; False leaves them empty.
        burned_in: whether stored frames may show names (BurnedInAnnotation); say False only where they do not.
        rate_hz: frames per second of stored frames.
        labels: of the model.
        model: its name.
        bundle_id: SHA-256 of the bundle's manifest, or None.

    Raises:
        InputError: the source file cannot be read, the rate is out of range, or there is nobody to carry.
        OutputError: something of that name is there, or the folder above is missing or not writable.
        MissingExtra: highdicom is not installed.
    """
    try:
        import highdicom  # noqa: F401
        import pydicom
    except ImportError as error:
        raise MissingExtra("writing DICOM objects", error.name or "highdicom", "dicom-objects") from error
    if not 0.1 <= rate_hz <= 1000:
        raise InputError(f"rate of stored frames {rate_hz}: give 0.1 to 1000 frames per second")
    if carry_patient and source_dicom is None:
        raise InputError("carry_patient needs a DICOM source: other sources name nobody")
    reference = None
    if source_dicom is not None:
        with _mapped("the DICOM source cannot be referred to", InputError):
            header = pydicom.dcmread(source_dicom, stop_before_pixels=True)
            reference = reference_of(header, carry_patient=carry_patient)
            int(reference.Rows), int(reference.Columns), reference.SOPInstanceUID, reference.StudyInstanceUID
    maker = Maker(model=model[:64], version=(bundle_id or "unknown")[:16], engine="")
    return DicomSink(location, reference, maker, tuple(labels), rate_hz, burned_in)


@dataclass(kw_only=True)
class _Findings:
    """What one model said, until the objects are written."""

    maker: Maker
    labels: tuple[str, ...]
    masks: dict[int, np.ndarray] = field(default_factory=dict)
    readings: list[FrameReading] = field(default_factory=list)


class DicomSink(FileSink):
    """Collects frames and answers.

    The folder gets its name at the end, with whole files in it.

    Attributes:
        written: names of the files, after closing.
    """

    def __init__(
        self,
        location: str,
        reference: Any,
        maker: Maker,
        labels: tuple[str, ...],
        rate_hz: float,
        burned_in: bool,
    ) -> None:
        self._pending = PendingFolder(location, "the DICOM objects", recover=True)
        self._reference = reference
        self._findings = {"": _Findings(maker=maker, labels=labels)}
        self._rate_hz, self._burned_in = rate_hz, burned_in
        self._pixels: list[np.ndarray] = []
        self._spacing: tuple[float, float] | None = None
        self._bytes, self._seen, self._open = 0, 0, True
        self.written: tuple[str, ...] = ()

    def on_models(self, models: Sequence[ModelFacts]) -> None:
        """Keeps what several models say apart."""
        makers = {model.name: Maker(model=model.name[:64], version=model.bundle_id[:16], engine="") for model in models}
        self._findings = {model.name: _Findings(maker=makers[model.name], labels=model.labels) for model in models}

    def write(self, frame: Frame, prediction: Prediction) -> None:
        """Keeps one frame and its answer.

        Raises:
            OutputError: the frames change their size, do not fit the source file, or are too many.
        """
        self._keep(frame, [("", prediction if prediction.valid else None, prediction.engine)])

    def write_live(self, result: LiveResult) -> None:
        """Keeps one frame of the live loop, and its answer if it may be shown.

        Raises:
            OutputError: the frames change their size, do not fit the source file, or are too many.
        """
        if result.models and set(self._findings) != {each.model for each in result.models}:
            self.on_models(
                [ModelFacts(name=each.model, labels=each.labels, bundle_id="unknown") for each in result.each]
            )
        self._keep(result.frame, [(each.model, shown(each), each.engine) for each in result.each])

    def close(self) -> None:
        """Writes the objects and publishes the folder; without a frame nothing is written.

        Raises:
            OutputError: no room, or the objects cannot be made.
        """
        if not self._open:
            return
        self._open = False
        if not self._seen:
            self._pending.discard()
            return
        try:
            with _mapped("the DICOM objects cannot be made", OutputError):
                self.written = tuple(self._write_all())
        except BaseException:
            self._pending.discard()
            raise
        self._pending.publish()

    def _keep(self, frame: Frame, said: Sequence[tuple[str, Prediction | None, str]]) -> None:
        own = self._reference is None
        place = self._seen if own else frame.seq
        corner = (0, 0) if own or frame.crop is None else frame.crop[:2]
        self._check_place(frame, place, corner)
        if not self._seen:
            self._spacing = frame.spacing_mm
            for model, _, engine in said:
                found = self._findings[model]
                found.maker = Maker(model=found.maker.model, version=found.maker.version, engine=engine[:64])
        self._seen += 1
        if own:
            grey = frame.pixels.ndim == 2
            pixels = to_grey(frame.pixels, frame.pixel_format, frame.video_range) if grey else as_rgb(frame)
            # the source may fill the same array again
            self._pixels.append(pixels.copy())
            self._bytes += pixels.nbytes
        for model, prediction, _ in said:
            if prediction is not None:
                self._keep_answer(self._findings[model], prediction, place, corner)
        if self._bytes > MAX_BYTES:
            raise OutputError(
                f"more than {MAX_BYTES >> 30} GiB of frames wait for the DICOM objects: take a shorter cine"
            )

    def _keep_answer(self, found: _Findings, prediction: Prediction, place: int, corner: tuple[int, int]) -> None:
        if prediction.mask_HW is not None:
            mask = self._full_size(prediction.mask_on_frame(), corner)
            if mask.any():
                found.masks[place] = mask
                self._bytes += mask.nbytes
        measured = prediction.measurement
        if measured is not None and measured.found and measured.has_ellipse:
            found.readings.append(FrameReading(number=place + 1, prediction=prediction, corner=corner))

    def _check_place(self, frame: Frame, place: int, corner: tuple[int, int]) -> None:
        if self._reference is None:
            if self._pixels and self._pixels[0].shape[:2] != frame.pixels.shape[:2]:
                raise OutputError("cannot write the DICOM objects: the frames change their size, a cine cannot")
            if self._pixels and (self._pixels[0].ndim == 2) != (frame.pixels.ndim == 2):
                raise OutputError("cannot write the DICOM objects: the frames change their colour, a cine cannot")
            return
        rows, cols = int(self._reference.Rows), int(self._reference.Columns)
        count = int(self._reference.get("NumberOfFrames") or 1)
        height, width = frame.pixels.shape[:2]
        whole = frame.crop is not None or (height, width) == (rows, cols)
        if not whole or corner[0] + height > rows or corner[1] + width > cols or not 0 <= place < count:
            raise OutputError("cannot write the DICOM objects: the frames are not those of the DICOM source")

    def _full_size(self, mask_HW: np.ndarray, corner: tuple[int, int]) -> np.ndarray:
        if self._reference is None:
            return mask_HW
        full = np.zeros((int(self._reference.Rows), int(self._reference.Columns)), np.uint8)
        full[corner[0] : corner[0] + mask_HW.shape[0], corner[1] : corner[1] + mask_HW.shape[1]] = mask_HW
        return full

    def _write_all(self) -> Iterator[str]:
        image = self._reference
        if image is None:
            pixels = np.stack(self._pixels)
            self._pixels = []
            image = multiframe_image(pixels, rate_hz=self._rate_hz, spacing_mm=self._spacing, burned_in=self._burned_in)
            yield self._save(image, IMAGE)
        for model, found in self._findings.items():
            maker = found.maker
            if found.masks:
                made = segmentation(image, found.masks, labels=found.labels, spacing_mm=self._spacing, maker=maker)
                yield self._save(made, _named(SEGMENTATION, model))
            if found.readings:
                yield self._save(measurement_report(image, found.readings, maker=maker), _named(REPORT, model))

    def _save(self, dataset: Any, name: str) -> str:
        dataset.save_as(self._pending.path / name, enforce_file_format=True)
        return name


def _named(file: str, model: str) -> str:
    """The file of one of several models."""
    return file.replace(".dcm", f"-{model}.dcm") if model else file


@contextmanager
def _mapped(what: str, kind: type[InputError] | type[OutputError]) -> Iterator[None]:
    """Maps the errors of pydicom and highdicom to ours.

    They raise almost anything, and quote element values in words and warnings.
    """
    try:
        with quiet_pydicom():
            yield
    except EdgeError:
        raise
    except OSError as error:
        raise kind(f"{what}: {error.strerror or type(error).__name__}") from error
    except Exception as error:
        raise kind(f"{what}: {type(error).__name__}") from error


__all__ = ["IMAGE", "MAX_BYTES", "REPORT", "SEGMENTATION", "DicomSink", "available", "open_sink"]
