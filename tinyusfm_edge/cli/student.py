"""Which student a command means: a shipped one by name, a weights file, or the one behind a bundle."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinyusfm_edge.cli import console
from tinyusfm_runtime.errors import InputError, MissingExtra

if TYPE_CHECKING:
    from tinyusfm_edge.models.checkpoint import LoadedStudent

DEFAULT_STUDENT = "fetal-head"


@dataclass(frozen=True, kw_only=True, slots=True)
class ForeignOptions:
    """What a weights file cannot say itself; see ``load_student_file``.

    Attributes:
        task: ``segment``, ``classify`` or ``features``.
        num_classes: classes, background counted in segmentation.
        labels: names of the outputs.
        name: short name of the model.
        postprocess: ``none``, ``mask`` or ``ellipse_hc``.
    """

    task: str | None = None
    num_classes: int | None = None
    labels: Sequence[str] | None = None
    name: str | None = None
    postprocess: str | None = None


def load(typed: str, options: ForeignOptions | None = None) -> tuple[LoadedStudent, bool]:
    """Loads the student that was named.

    Args:
        typed: name of a shipped student, or path of a weights file.
        options: for a weights file.

    Returns:
        The student, and whether it is a shipped one (a copy of a shipped file counts).

    Raises:
        InputError: neither a name nor a file, or the file does not say what it is.
        CheckpointError: the file cannot be used.
        MissingExtra: torch is not installed.
    """
    from tinyusfm_edge import students

    given = options or ForeignOptions()
    if typed not in students.names() and not Path(typed).is_file():
        shipped = ", ".join(students.names()) or "none"
        raise InputError(f"no student {typed!r}: give the path of a weights file or a shipped student ({shipped})")
    require("loading a student", ("torch", "safetensors"), "torch")
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always", UserWarning)
        student, shipped_name = _load(typed, given)
    for warning in heard:
        console.note(f"note: {warning.message}")
    if shipped_name is not None and (reason := students.opt_in(shipped_name)):
        console.note(f"note: student {shipped_name!r} is opt-in: {reason}")
    if given.name is not None and student.spec.name != given.name:
        student = replace(student, spec=replace(student.spec, name=given.name), name=given.name)
    return student, shipped_name is not None


def _load(typed: str, given: ForeignOptions) -> tuple[LoadedStudent, str | None]:
    from tinyusfm_edge import students

    if typed in students.names():
        return students.load(typed), typed
    from tinyusfm_edge.models.checkpoint import load_student_file

    path = Path(typed)
    known = students.find_by_hash(_sha256(path))
    if known is not None:
        return students.load(known), known
    student = load_student_file(
        path,
        task=given.task,
        num_classes=given.num_classes,
        labels=given.labels,
        name=given.name,
        postprocess=given.postprocess,
    )
    return student, None


def require(feature: str, modules: Sequence[str], extra: str) -> None:
    """Checks that libraries are there before any work is done.

    Args:
        feature: what was wanted, in the user's words.
        modules: import names, which are their distributions' names as well.
        extra: the extra that brings them.

    Raises:
        MissingExtra: one is not installed.
    """
    for name in modules:
        if importlib.util.find_spec(name) is None:
            raise MissingExtra(feature, name, extra)


def has_torch() -> bool:
    """Whether a student can be loaded here."""
    return all(importlib.util.find_spec(name) is not None for name in ("torch", "safetensors"))


def patients(name: str) -> list[Any]:
    """Gate results on patients from a shipped student's card, one row an artefact; empty where there are none."""
    from tinyusfm_edge import students

    if name not in students.names():
        return []
    try:
        gates = students.card(name).get("gates")
    except (InputError, ValueError):
        return []
    return list(gates) if isinstance(gates, list) else []


def _sha256(path: Path) -> str:
    import hashlib

    try:
        with path.open("rb") as file:
            digest = hashlib.sha256()
            while part := file.read(1 << 20):
                digest.update(part)
            return digest.hexdigest()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
