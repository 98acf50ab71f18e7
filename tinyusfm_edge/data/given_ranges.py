"""Activation ranges that a command quantizes with.

From a calibration file, from qat, from the student, or found on data.

The same order behind ``export``, ``sensitivity`` and ``qat``. It does not collect ranges itself.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinyusfm_runtime.errors import CalibrationError, InputError
from tinyusfm_runtime.strict_json import parse_json

if TYPE_CHECKING:
    from tinyusfm_calibration.ranges import Ranges
    from tinyusfm_edge.data.folder import DataFolder
    from tinyusfm_edge.models.checkpoint import LoadedStudent
    from tinyusfm_export.graph.build import ExportGraph
    from tinyusfm_export.quantize.calibration_file import CalibrationFile


@dataclass(frozen=True, kw_only=True, slots=True)
class GivenRanges:
    """What a command was given to quantize with.

    Attributes:
        student: the student, with the ranges that were named.
        stored: the calibration file, if one was named.
        declared: name of a declared calibration set to draw with ``--data``, if one was named.
    """

    student: Any
    stored: CalibrationFile | None = None
    declared: str | None = None

    @property
    def from_data(self) -> bool:
        """Whether frames of ``--data`` have to calibrate, for int8."""
        return self.stored is None and (self.declared is not None or self.student.ranges is None)


def given_ranges(student: LoadedStudent, calibration: str | None, ranges: Path | None) -> GivenRanges:
    """Settles where ranges come from.

    Args:
        student: as loaded.
        calibration: a file that ``calibrate`` wrote (``.json``), a declared set, or None.
        ranges: a file that ``qat`` wrote, or None.

    Raises:
        InputError: both, or a file that cannot be read.
        CalibrationError: an unusable calibration file.
    """
    if calibration is not None and ranges is not None:
        raise InputError("--calibration and --ranges both give ranges: leave one out")
    if ranges is not None:
        return GivenRanges(student=replace(student, ranges=read_ranges(ranges)))
    if calibration is None:
        return GivenRanges(student=student)
    if not calibration.endswith(".json"):
        return GivenRanges(student=student, declared=calibration)
    from tinyusfm_export.quantize.calibration_file import read_calibration_file

    stored = read_calibration_file(Path(calibration))
    return GivenRanges(student=replace(student, ranges=stored.ranges), stored=stored)


def read_ranges(path: Path) -> Ranges:
    """Ranges of a file that ``qat`` wrote.

    Raises:
        InputError: it cannot be read.
        CalibrationError: it holds no ranges.
    """
    from tinyusfm_calibration.ranges import Ranges

    try:
        return Ranges.from_json(parse_json(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"--ranges {path} cannot be read: tinyusfm-edge qat writes it") from error


def prepared_graph(graph: ExportGraph, given: GivenRanges, folder: DataFolder | None) -> tuple[ExportGraph, Ranges]:
    """The graph as it becomes int8, and its ranges.

    Args:
        graph: the float student's export graph.
        given: what was given.
        folder: the data, with frames that calibrate where ``given.from_data``.

    Raises:
        CalibrationError: there are no ranges and no frames to find them on, or they belong to another student.
    """
    from tinyusfm_export.pipeline import ExportOptions, find_ranges

    if given.from_data and (folder is None or not folder.calibration):
        raise CalibrationError(
            f"{given.student.name} carries no activation ranges: give --calibration SET.json (tinyusfm-edge calibrate "
            "writes it), --ranges FILE (qat writes it), or --data DIR, whose training split then calibrates"
        )
    options = ExportOptions()
    if folder is not None:
        options = replace(options, calibration_name=folder.calibration_name, test_sha256=folder.test_sha256)
    frames = folder.calibration if given.from_data and folder is not None else None
    stored = given.stored.preparation if given.stored is not None else None
    equalised = stored.equalised(graph) if stored is not None else graph
    return equalised, find_ranges(equalised, given.student.ranges, frames, options)


__all__ = ["GivenRanges", "given_ranges", "prepared_graph", "read_ranges"]
