"""Shipped students: trained weights as package data, each folder one student.

A folder holds ``weights.safetensors`` (float16, its metadata says what it is), ``ranges.json`` (activation ranges of
the calibration set, so that INT8 needs no images), ``drift.safetensors`` (what the training frames look like to the
student, so that a runtime can tell when a stream does not), ``reading.json`` (when its readings are good, with
rates), ``wide.json`` where layers must keep more than 8 bits in INT8 (which), ``card.json`` (every number, with hashes)
and ``CARD.md`` (the same for people). ``names`` and
``find_by_hash`` need no torch; ``load`` does. ``TINYUSFM_EDGE_STUDENTS`` names another folder of such folders: a
site's own students, as ``release.package`` writes them.

It does not know how students are trained or packaged (tinyusfm_edge/training).
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinyusfm_edge.data.marks import DEMO_MARK
from tinyusfm_runtime.errors import BundleError, InputError
from tinyusfm_runtime.strict_json import parse_json

if TYPE_CHECKING:
    from tinyusfm_edge.models.checkpoint import LoadedStudent
    from tinyusfm_runtime.drift import DriftStatistic

WEIGHTS = "weights.safetensors"
RANGES = "ranges.json"
DRIFT = "drift.safetensors"
READING = "reading.json"
WIDE = "wide.json"
CARD = "card.json"
CARD_TEXT = "CARD.md"

DEMO_USE = "demonstration of the tools alone; no reading of it is usable; not a medical device"
WIDE_VERSION = 1
"""Version of ``wide.json``."""
READING_VERSION = 1
"""Version of ``reading.json``."""
READING_FIELDS = ("second_pass", "min_area", "reading", "anatomy")
"""Fields of the spec that ``reading.json`` holds, so that they can be calibrated without touching the weights."""

STUDENTS_VARIABLE = "TINYUSFM_EDGE_STUDENTS"
"""Environment variable that names the folder of students offered by name, instead of the shipped ones."""


def home() -> Path:
    """Folder of the students that are offered by name.

    The one that the environment names, else the shipped ones'.
    """
    return Path(os.environ.get(STUDENTS_VARIABLE) or Path(__file__).parent)


def names() -> list[str]:
    """Names of the shipped students, sorted."""
    return sorted(path.parent.name for path in home().glob(f"*/{WEIGHTS}"))


def left_out() -> list[str]:
    """Names of students whose weights are not installed.

    Theirs stay in the source checkout.
    """
    return sorted({path.parent.name for path in home().glob(f"*/{CARD}")} - set(names()))


def find_left_out(sha256: str) -> str | None:
    """Name of the student that is not installed and has weights of this hash.

    By its card; None where there is none.
    """
    for name in left_out():
        if parse_json((home() / name / CARD).read_bytes()).get("weights", {}).get("sha256") == sha256.lower():
            return name
    return None


def folder(name: str) -> Path:
    """Folder of a shipped student.

    Raises:
        InputError: no such student, or its weights are not installed; the message names those there are.
    """
    if name in left_out():
        raise InputError(_where(name))
    if name not in names():
        raise InputError(f"no shipped student {name!r}: there are {', '.join(names()) or 'none'}")
    return home() / name


def _where(name: str) -> str:
    """Where the weights of a student are that is not installed."""
    from tinyusfm_runtime.installation import installed_from

    path = Path("tinyusfm_edge", "students", name, WEIGHTS)
    origin = installed_from()
    found = origin / path if origin is not None and (origin / path).is_file() else None
    why = _in_card(home() / name / CARD, "opt_in").partition(":")[0]
    place = f"give its file, {found}" if found else f"give its file, {path} of a checkout"
    return f"the weights of {name!r} are in the source checkout only ({why}): {place}"


def load(name: str, weights: Path | None = None) -> LoadedStudent:
    """Loads a shipped student with its activation ranges.

    Args:
        name: one of ``names()``, or of ``left_out()`` with its weights.
        weights: its weights file where that is not installed.

    Returns:
        The stored float16 weights widened to float32, so the reference is exactly what is stored.

    Raises:
        InputError: no such student.
        CheckpointError: its file is damaged.
        CalibrationError: its ranges are damaged or belong to other weights.
        MissingExtra: torch is not installed.
    """
    from tinyusfm_runtime.errors import MissingExtra

    place = folder(name) if weights is None else home() / name
    try:
        from tinyusfm_edge.models.checkpoint import load_student_file
    except ModuleNotFoundError as error:
        raise MissingExtra(f"loading student {name!r}", error.name or "torch", "torch") from error
    student = as_shipped(
        load_student_file(weights or place / WEIGHTS), place, demo=bool(_in_card(place / CARD, "demo_only"))
    )
    return _with_ranges(student, place / RANGES)


def as_shipped(student: LoadedStudent, place: Path, *, demo: bool) -> LoadedStudent:
    """A stored student with the spec that it is shipped with.

    That spec is what its card holds.

    Args:
        student: as its weights file says.
        place: its folder, whose ``reading.json``, if there is one, says how it is read.
        demo: it is for demonstrations alone, so that its labels say so.

    Raises:
        CalibrationError: ``reading.json`` is damaged or belongs to other weights.
    """
    student = _with_reading(student, place / READING)
    return _marked(student) if demo else student


def _with_reading(student: LoadedStudent, path: Path) -> LoadedStudent:
    """The student whose spec says how it is read.

    Second pass, least area, anatomy, thresholds with their rates.
    """
    from dataclasses import replace

    from tinyusfm_runtime.errors import CalibrationError, InputError
    from tinyusfm_runtime.spec import ModelSpec

    if not path.is_file():
        return student
    try:
        stored = parse_json(path.read_text(encoding="utf-8"))
        if stored.pop("version") != READING_VERSION or stored.pop("weights_sha256") != student.weights_sha256:
            raise CalibrationError(f"{path.name} of student {student.name!r} is of other weights: package it again")
        if set(stored) != set(READING_FIELDS):
            raise InputError(f"it must hold {', '.join(READING_FIELDS)}")
        spec = ModelSpec.from_json({**student.spec.to_json(), **stored})
    except (ValueError, KeyError, AttributeError, InputError) as error:
        raise CalibrationError(f"{path.name} of student {student.name!r} cannot be used: {error}") from error
    return replace(student, spec=spec)


def _marked(student: LoadedStudent) -> LoadedStudent:
    """A student for demonstrations, marked as such on every label.

    Every label that is read off it says so, in every bundle, sink and page.
    """
    from dataclasses import replace

    labels = tuple(label + DEMO_MARK for label in student.spec.labels)
    spec = replace(student.spec, labels=labels, intended_use=DEMO_USE)
    return replace(student, spec=spec)


def _with_ranges(student: LoadedStudent, path: Path) -> LoadedStudent:
    from dataclasses import replace

    from tinyusfm_calibration.ranges import Ranges
    from tinyusfm_runtime.errors import CalibrationError

    if not path.is_file():
        return student
    try:
        ranges = Ranges.from_json(parse_json(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise CalibrationError(f"{path.name} of student {student.name!r} is not JSON: {error}") from error
    if ranges.weights_sha256 != student.weights_sha256:
        raise CalibrationError(f"{path.name} of student {student.name!r} belongs to other weights: package it again")
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
        raise CalibrationError(f"{DRIFT} of student {name!r} belongs to other weights: package it again")
    return found


def wide_layers(name: str) -> tuple[str, ...]:
    """Layers of a shipped student that keep more than 8 bits in INT8.

    As ``release.wide`` chose them.

    Args:
        name: one of ``names()``.

    Raises:
        InputError: no such student.
        CalibrationError: the file is damaged or belongs to other weights.
    """
    from tinyusfm_runtime.errors import CalibrationError

    place = folder(name)
    if not (place / WIDE).is_file():
        return ()
    try:
        found = parse_json((place / WIDE).read_bytes())
        layers = tuple(str(layer) for layer in found["layers"])
        known = found["version"] == WIDE_VERSION
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CalibrationError(f"{WIDE} of student {name!r} is damaged: {error}") from error
    if not known or found.get("weights_sha256") != hashlib.sha256((place / WEIGHTS).read_bytes()).hexdigest():
        raise CalibrationError(f"{WIDE} of student {name!r} belongs to other weights: run release.wide again")
    return layers


def card(name: str) -> dict[str, Any]:
    """Numbers of a shipped student's model card.

    Raises:
        InputError: no such student, or it has no card.
    """
    path = folder(name) / CARD
    if not path.is_file():
        raise InputError(f"student {name!r} has no {CARD}")
    found: dict[str, Any] = parse_json(path.read_text(encoding="utf-8"))
    return found


def stages(name: str) -> dict[str, str]:
    """What a shipped student was made of: stage -> sha256 (hex), by its card.

    Raises:
        InputError: no such student, or it has no card.
    """
    start = ((card(name).get("recipe") or {}).get("init") or {}).get("sha256")
    return {"start": str(start)} if start else {}


def lost_stages(name: str) -> dict[str, str]:
    """What a shipped student's card says of stages that its file does not record.

    Stage -> one phrase. A training without a teacher had none; what was used and not hashed is lost, and said to be.

    Raises:
        InputError: no such student, or it has no card.
    """
    found = card(name)
    recipe, data = found.get("recipe") or {}, found.get("data") or {}
    before = "made before it was recorded"
    phrases = {"images": before, "coreset": before, "teacher": before}
    if data.get("name"):
        train = (data.get("splits") or {}).get("train") or {}
        counted = f", {train['frames']} frames of {train['groups']} patients" if train else ""
        phrases["images"] = f"{before}; by its card the training split of {data['name']}{counted}"
    if "teacher" in recipe and recipe["teacher"] is None:
        phrases["teacher"] = "none: by its card its last training had labels alone"
        phrases["coreset"] = "none: by its card nothing was distilled in its last training"
    return {stage: phrase for stage, phrase in phrases.items() if stage not in stages(name)}


def opt_in(name: str) -> str:
    """Why a shipped student must be asked for by name, from its card.

    Empty where it need not.

    Raises:
        InputError: no such student.
    """
    return _in_card(_home(name) / CARD, "opt_in")


def demo_only(name: str) -> str:
    """Why a shipped student is for demonstrations alone, from its card.

    Empty where it is not.

    Raises:
        InputError: no such student.
    """
    return _in_card(_home(name) / CARD, "demo_only")


def _home(name: str) -> Path:
    return home() / name if name in left_out() else folder(name)


def _in_card(card_path: Path, key: str) -> str:
    return str(parse_json(card_path.read_text(encoding="utf-8")).get(key, "")) if card_path.is_file() else ""


def find_by_hash(sha256: str) -> str | None:
    """Name of the shipped student whose weights file has this hash.

    Args:
        sha256: hex, either case.

    Returns:
        The name, or None.
    """
    for name in names():
        if hashlib.sha256((home() / name / WEIGHTS).read_bytes()).hexdigest() == sha256.lower():
            return name
    return None


__all__ = [
    "CARD",
    "CARD_TEXT",
    "DEMO_USE",
    "DRIFT",
    "RANGES",
    "READING",
    "READING_FIELDS",
    "READING_VERSION",
    "STUDENTS_VARIABLE",
    "WEIGHTS",
    "WIDE",
    "WIDE_VERSION",
    "as_shipped",
    "card",
    "demo_only",
    "drift",
    "find_by_hash",
    "find_left_out",
    "folder",
    "home",
    "left_out",
    "load",
    "lost_stages",
    "names",
    "opt_in",
    "stages",
    "wide_layers",
]
