"""Which student is meant: a shipped one or a weights file of one's own.

A shipped one is given by name or by a copy of its file.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from tinyusfm_edge import students
from tinyusfm_edge.extras import require
from tinyusfm_edge.models.upstream import SHORT_RUN
from tinyusfm_runtime.errors import InputError

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
        container: which model of a checkpoint that holds several, such as ``model_ema``.
    """

    task: str | None = None
    num_classes: int | None = None
    labels: Sequence[str] | None = None
    name: str | None = None
    postprocess: str | None = None
    container: str | None = None


def load_student(
    student: str | Path = DEFAULT_STUDENT,
    *,
    task: str | None = None,
    num_classes: int | None = None,
    labels: Sequence[str] | None = None,
    name: str | None = None,
    postprocess: str | None = None,
    container: str | None = None,
) -> LoadedStudent:
    """Loads a student.

        load_student("fetal-head")                                              # a shipped one
        load_student("mine.safetensors")                                        # a file that says what it is
        load_student("tinyusfm.pth", task="classify", labels=("benign", "malignant"))

    Args:
        student: name of a shipped student, or path of a weights file.
        task: of a weights file that does not say: ``segment``, ``classify`` or ``features``.
        num_classes: its classes, background counted in segmentation.
        labels: names of its outputs.
        name: short name of the model.
        postprocess: ``none``, ``mask`` or ``ellipse_hc``.
        container: which model of a checkpoint that holds several, such as ``model_ema``.

    Returns:
        Module, spec and, where it carries them, activation ranges. What a user should know (renamed weights, an opt-in
        student) is a UserWarning.

    Raises:
        InputError: neither a name nor a file, or the file does not say what it is.
        CheckpointError: the file cannot be used.
        MissingExtra: torch is not installed.
    """
    options = ForeignOptions(
        task=task,
        num_classes=num_classes,
        labels=labels,
        name=name,
        postprocess=postprocess,
        container=container,
    )
    return choose_student(student, options)[0]


def choose_student(
    typed: str | Path, options: ForeignOptions | None = None, *, on_note: Callable[[str], None] | None = None
) -> tuple[LoadedStudent, str]:
    """Loads the student that was named, and says whether it is a shipped one.

    Args:
        typed: name of a shipped student, or path of a weights file.
        options: for a weights file.
        on_note: called with each line that a user should know, instead of a UserWarning.

    Returns:
        The student, and the name of the shipped student it is (a copy of a shipped file counts), or nothing.

    Raises:
        InputError: neither a name nor a file, or the file does not say what it is.
        CheckpointError: the file cannot be used.
        MissingExtra: torch is not installed.
    """
    if on_note is not None:
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always", UserWarning)
            found = choose_student(typed, options)
        for warning in heard:
            on_note(str(warning.message))
        return found
    given = options or ForeignOptions()
    if typed in students.left_out() and not Path(typed).is_file():
        students.folder(str(typed))  # says where its weights are
    if typed not in students.names() and not Path(typed).is_file():
        there = ", ".join(students.names()) or "none"
        raise InputError(f"no student {str(typed)!r}: give the path of a weights file or a shipped student ({there})")
    require("loading a student", ("torch", "safetensors"), "torch")
    digest = "" if typed in students.names() else _sha256(Path(typed))
    shipped = str(typed) if not digest else students.find_by_hash(digest) or students.find_left_out(digest) or ""
    weights = Path(typed) if shipped in students.left_out() else None
    student = students.load(shipped, weights) if shipped else _from_file(Path(typed), given)
    if shipped and (given.container is not None or given.task not in (None, student.spec.task.value)):
        raise InputError(f"{shipped} is a shipped student for {student.spec.task.value}: leave out task and container")
    if shipped and (reason := students.opt_in(shipped)):
        warnings.warn(f"student {shipped!r} is opt-in: {reason}", stacklevel=2)
    if shipped and (reason := students.demo_only(shipped)):
        warnings.warn(f"student {shipped!r} is for demonstrations alone: {reason}", stacklevel=2)
    if SHORT_RUN in student.spec.origin:
        warnings.warn(
            f"student {student.name!r} comes of a run too short to teach much: {student.spec.origin}", stacklevel=2
        )
    if given.name is not None and student.spec.name != given.name:
        student = replace(student, spec=replace(student.spec, name=given.name), name=given.name)
    return student, shipped


def _from_file(path: Path, given: ForeignOptions) -> LoadedStudent:
    from tinyusfm_edge.models.checkpoint import load_student_file

    return load_student_file(
        path,
        task=given.task,
        num_classes=given.num_classes,
        labels=given.labels,
        name=given.name,
        postprocess=given.postprocess,
        container=given.container,
    )


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            digest = hashlib.sha256()
            while part := file.read(1 << 20):
                digest.update(part)
            return digest.hexdigest()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error


__all__ = ["DEFAULT_STUDENT", "ForeignOptions", "choose_student", "load_student"]
