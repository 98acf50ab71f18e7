"""Which student a command means.

A shipped one by name, a weights file, or the one behind a bundle.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tinyusfm_edge.cli import console
from tinyusfm_edge.data.folder import split_names
from tinyusfm_edge.students.choice import DEFAULT_STUDENT, ForeignOptions, choose_student
from tinyusfm_runtime.errors import InputError

if TYPE_CHECKING:
    from tinyusfm_edge.models.checkpoint import LoadedStudent

TaskOption = Annotated[str | None, typer.Option(help="Task, if the weights file does not state it.")]
LabelsOption = Annotated[str | None, typer.Option(help="Names of the model's outputs, with commas between.")]
ContainerOption = Annotated[
    str | None, typer.Option(help="Which model of a file that holds several, such as model_ema.")
]


def load(typed: str, options: ForeignOptions | None = None) -> tuple[LoadedStudent, bool]:
    """Loads the student that was named, and prints what a user should know of it.

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
    student, shipped = choose_student(typed, options, on_note=lambda line: console.note(f"note: {line}"))
    return student, bool(shipped)


def foreign(
    task: str | None, labels: str | None, container: str | None, num_classes: int | None = None
) -> ForeignOptions:
    """What the command line says of a weights file.

    Args:
        task: ``--task``.
        labels: ``--labels``, names with commas between.
        container: ``--container``.
        num_classes: ``--num-classes``, background counted in segmentation.
    """
    return ForeignOptions(task=task, num_classes=num_classes, labels=split_names(labels) or None, container=container)


def check_student(typed: str) -> None:
    """Refuses what is neither a shipped student nor a file, before torch is imported.

    Args:
        typed: as given.

    Raises:
        InputError: neither.
    """
    from tinyusfm_edge import students

    if typed not in students.names() and not Path(typed).is_file():
        there = ", ".join(students.names()) or "none"
        raise InputError(f"no student {typed!r}: give the path of a weights file or a shipped student ({there})")


def has_torch() -> bool:
    """Whether a student can be loaded here."""
    return all(importlib.util.find_spec(name) is not None for name in ("torch", "safetensors"))


def patients(name: str) -> list[Any]:
    """Gate results on patients from a shipped student's card, one row per artefact.

    Empty where there are none.
    """
    from tinyusfm_edge import students

    if name not in students.names():
        return []
    try:
        gates = students.card(name).get("gates")
    except (InputError, ValueError):
        return []
    return list(gates) if isinstance(gates, list) else []


__all__ = [
    "DEFAULT_STUDENT",
    "ContainerOption",
    "ForeignOptions",
    "LabelsOption",
    "TaskOption",
    "check_student",
    "foreign",
    "has_torch",
    "load",
    "patients",
]
