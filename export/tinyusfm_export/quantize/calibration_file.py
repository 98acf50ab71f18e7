"""The calibration file: ``calibrate`` writes it, ``export`` reads it.

``tinyusfm-edge calibrate`` and ``export --calibration FILE.json``.

It holds names and hashes of the frames, their coverage, the ranges with everything that was measured on the way, how
the graph is prepared, and the drift statistic; never pixels. Its id is the hash of the set, so a bundle made with it
says which frames calibrated. It does not know how frames were chosen.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from tinyusfm_calibration.ranges import Ranges
from tinyusfm_calibration.sets import CalibrationSet
from tinyusfm_export.quantize.range_choice import Preparation
from tinyusfm_runtime.drift import DriftStatistic
from tinyusfm_runtime.errors import BundleError, CalibrationError, InputError
from tinyusfm_runtime.strict_json import parse_json, refusing

FILE_VERSION: Final = 1
"""Version of the file."""
FILE_KIND: Final = "tinyusfm-edge calibration"
MAX_FILE_BYTES: Final = 64 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class CalibrationFile:
    """What calibrating gave.

    Attributes:
        frames: names and hashes of the frames.
        ranges: activation ranges of the prepared graph.
        preparation: how the graph is changed before it is quantized.
        summary: why these ranges, in a sentence.
        trials: everything that was measured, one mapping a candidate.
        coverage: one mapping a kind of frame, see ``coverage.coverage_report``.
        selection: how the frames were chosen, plain data.
        drift: the drift statistic, or None.
    """

    frames: CalibrationSet
    ranges: Ranges
    preparation: Preparation = field(default_factory=Preparation)
    summary: str = ""
    trials: Sequence[Mapping[str, Any]] = ()
    coverage: Sequence[Mapping[str, Any]] = ()
    selection: Mapping[str, Any] = field(default_factory=dict)
    drift: DriftStatistic | None = None

    def __post_init__(self) -> None:
        """Checks that ranges and set belong together.

        Raises:
            CalibrationError: they do not.
        """
        if self.ranges.set_id != self.frames.id or set(self.ranges.frame_sha256) != set(self.frames.hashes):
            raise CalibrationError(
                "the calibration file's ranges belong to other frames than it names: calibrate again"
            )

    def to_json(self) -> dict[str, Any]:
        """Plain data, ready for ``json.dumps``."""
        return {
            "kind": FILE_KIND,
            "version": FILE_VERSION,
            "set": self.frames.to_json(),
            "ranges": self.ranges.to_json(),
            "preparation": self.preparation.to_json(),
            "summary": self.summary,
            "trials": [dict(trial) for trial in self.trials],
            "coverage": [dict(kind) for kind in self.coverage],
            "selection": dict(self.selection),
            "drift": None if self.drift is None else base64.b64encode(self.drift.to_bytes()).decode("ascii"),
        }

    @classmethod
    @refusing("the calibration file", CalibrationError)
    def from_json(cls, data: Any) -> CalibrationFile:
        """Reads what ``to_json`` wrote.

        Raises:
            CalibrationError: not such data, another version, or edited by hand.
        """
        keys = {
            "kind",
            "version",
            "set",
            "ranges",
            "preparation",
            "summary",
            "trials",
            "coverage",
            "selection",
            "drift",
        }
        if not isinstance(data, dict) or data.get("kind") != FILE_KIND:
            raise CalibrationError("this is no calibration file: write one with tinyusfm-edge calibrate")
        if data.get("version") != FILE_VERSION:
            raise CalibrationError(
                f"calibration file version {data.get('version')} is not {FILE_VERSION}: write it again"
            )
        if set(data) != keys:
            raise CalibrationError(f"the calibration file has unknown or missing keys {sorted(set(data) ^ keys)}")
        try:
            raw = None if data["drift"] is None else base64.b64decode(str(data["drift"]), validate=True)
            drift = None if raw is None else DriftStatistic.from_bytes(raw)
        except (binascii.Error, BundleError) as error:
            raise CalibrationError(f"the calibration file's drift statistic is not usable: {error}") from error
        return cls(
            frames=CalibrationSet.from_json(data["set"]),
            ranges=Ranges.from_json(data["ranges"]),
            preparation=Preparation.from_json(data["preparation"]),
            summary=str(data["summary"]),
            trials=tuple(data["trials"]),
            coverage=tuple(data["coverage"]),
            selection=dict(data["selection"]),
            drift=drift,
        )


def read_calibration_file(path: Path) -> CalibrationFile:
    """Reads a file.

    Args:
        path: where it lies.

    Raises:
        InputError: it cannot be read, or is no JSON.
        CalibrationError: it is no calibration file, of another version, or edited by hand.
    """
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise InputError(f"calibration file {path.name} is larger than {MAX_FILE_BYTES} bytes")
        data = parse_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"calibration file {path.name} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"calibration file {path.name} is not JSON: {' '.join(str(error).split())[:120]}") from error
    return CalibrationFile.from_json(data)


def trial_rows(trials: Sequence[Any]) -> list[dict[str, Any]]:
    """Trials of ``range_choice`` as plain data."""
    return [{**asdict(trial), "name": trial.name} for trial in trials]


__all__ = ["FILE_KIND", "FILE_VERSION", "MAX_FILE_BYTES", "CalibrationFile", "read_calibration_file", "trial_rows"]
