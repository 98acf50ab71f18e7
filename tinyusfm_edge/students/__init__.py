"""Shipped students: trained weights as package data, each folder one student.

A folder holds ``weights.safetensors`` (float16, its metadata says what it is), ``ranges.json`` (activation ranges of
the calibration set, so that INT8 needs no images), ``drift.npz`` (what the training frames look like to the student, so
that a runtime can tell when a stream does not), ``card.json`` (every number, with hashes) and ``CARD.md`` (the same
for people). ``names`` and ``find_by_hash`` need no torch; ``load`` does.

It does not know how students are trained or packaged (tinyusfm_edge/training).
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinyusfm_runtime.errors import BundleError, InputError

if TYPE_CHECKING:
    from tinyusfm_edge.models.checkpoint import LoadedStudent
    from tinyusfm_runtime.drift import DriftStatistic

WEIGHTS = "weights.safetensors"
RANGES = "ranges.json"
DRIFT = "drift.npz"
CARD = "card.json"
CARD_TEXT = "CARD.md"

_FOLDER = Path(__file__).parent


def names() -> list[str]:
    """Names of the shipped students, sorted."""
    return sorted(path.parent.name for path in _FOLDER.glob(f"*/{WEIGHTS}"))


def folder(name: str) -> Path:
    """Folder of a shipped student.

    Raises:
        InputError: no such student; the message names those there are.
    """
    if name not in names():
        raise InputError(f"no shipped student {name!r}: there are {', '.join(names()) or 'none'}")
    return _FOLDER / name


def load(name: str) -> LoadedStudent:
    """Loads a shipped student with its activation ranges.

    Args:
        name: one of ``names()``.

    Returns:
        The stored float16 weights widened to float32, so the reference is exactly what is stored.

    Raises:
        InputError: no such student.
        CheckpointError: its file is damaged.
        CalibrationError: its ranges are damaged or belong to other weights.
        MissingExtra: torch is not installed.
    """
    from tinyusfm_runtime.errors import MissingExtra

    place = folder(name)
    try:
        from tinyusfm_edge.models.checkpoint import load_student_file
    except ModuleNotFoundError as error:
        raise MissingExtra(f"loading student {name!r}", error.name or "torch", "torch") from error
    student = load_student_file(place / WEIGHTS)
    return _with_ranges(student, place / RANGES)


def _with_ranges(student: LoadedStudent, path: Path) -> LoadedStudent:
    from dataclasses import replace

    from tinyusfm_calibration.ranges import Ranges
    from tinyusfm_runtime.errors import CalibrationError

    if not path.is_file():
        return student
    try:
        ranges = Ranges.from_json(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise CalibrationError(f"{path.name} of student {student.name!r} is not JSON: {error}") from error
    if ranges.weights_sha256 != student.weights_sha256:
        raise CalibrationError(f"{path.name} of student {student.name!r} belongs to other weights: package it anew")
    return replace(student, ranges=ranges)


def drift(name: str) -> DriftStatistic | None:
    """Drift statistic of a shipped student.

    Args:
        name: one of ``names()``.

    Returns:
        The statistic, or None where the student has none.

    Raises:
        InputError: no such student.
        CalibrationError: the file is damaged or belongs to other weights.
    """
    from tinyusfm_runtime.drift import DriftStatistic
    from tinyusfm_runtime.errors import CalibrationError

    place = folder(name)
    if not (place / DRIFT).is_file():
        return None
    try:
        found = DriftStatistic.from_bytes((place / DRIFT).read_bytes())
    except BundleError as error:
        raise CalibrationError(f"{DRIFT} of student {name!r} is damaged: {error}") from error
    if found.about.get("weights_sha256") != hashlib.sha256((place / WEIGHTS).read_bytes()).hexdigest():
        raise CalibrationError(f"{DRIFT} of student {name!r} belongs to other weights: package it anew")
    return found


def card(name: str) -> dict[str, Any]:
    """Numbers of a shipped student's model card.

    Raises:
        InputError: no such student, or it has no card.
    """
    path = folder(name) / CARD
    if not path.is_file():
        raise InputError(f"student {name!r} has no {CARD}")
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def opt_in(name: str) -> str:
    """Why a shipped student must be asked for by name, from its card; empty where it need not.

    Raises:
        InputError: no such student.
    """
    path = folder(name) / CARD
    found = json.loads(path.read_text(encoding="utf-8")).get("opt_in", "") if path.is_file() else ""
    return str(found)


def find_by_hash(sha256: str) -> str | None:
    """Name of the shipped student whose weights file has this hash.

    Args:
        sha256: hex, either case.

    Returns:
        The name, or None.
    """
    for name in names():
        if hashlib.sha256((_FOLDER / name / WEIGHTS).read_bytes()).hexdigest() == sha256.lower():
            return name
    return None


__all__ = [
    "CARD",
    "CARD_TEXT",
    "DRIFT",
    "RANGES",
    "WEIGHTS",
    "card",
    "drift",
    "find_by_hash",
    "folder",
    "load",
    "names",
    "opt_in",
]
