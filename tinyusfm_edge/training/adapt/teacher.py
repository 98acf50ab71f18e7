"""Adapting the teacher first: LoRA and head on the same labelled table.

By the same recipe and engine as the student.

The teacher's run lies in a folder of its own, so that several students and seeds share one. What comes back is merged
and frozen. It does not know how students learn from it (guide.py).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file

from tinyusfm_edge.models.checkpoint import load_student_file
from tinyusfm_edge.models.teachers import load_teacher
from tinyusfm_edge.models.weights_file import read_weights_file
from tinyusfm_edge.training.adapt.config import AdaptConfig
from tinyusfm_edge.training.adapt.fit import BEST, train_model
from tinyusfm_edge.training.adapt.lora import Encoder, TaskTeacher, merge_adapters
from tinyusfm_edge.training.adapt.sister import SisterTeacher
from tinyusfm_runtime.errors import CheckpointError, InputError

SISTER = "student"
"""Name of a teacher that is a student file."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AdaptTeacher:
    """Which encoder becomes the teacher.

    Attributes:
        name: one of ``teachers.names()`` but a feature bank, or ``student`` for a trained student.
        weights: its file.
        run: folder of the teacher's own run, or None for ``teacher`` inside the student's.
    """

    name: str
    weights: Path
    run: Path | None = None


def teacher_config(config: AdaptConfig) -> AdaptConfig:
    """The recipe for a teacher.

    Its own steps and rate, no distillation, one learning rate for all layers.

    The seed is fixed, so that students of several seeds have the same teacher.
    """
    student = replace(config.student, exits=())
    steps = config.teacher_steps
    return replace(
        config,
        student=student,
        steps=steps,
        warmup=min(config.warmup, max(1, steps // 10)),
        learning_rate=config.teacher_learning_rate,
        layer_decay=1.0,
        kd=(),
        transfer_share=0.0,
        negative_share=0.0,
        deep=0.0,
        drop_tokens=0.0,
        polish_from=None,
        seed=0,
    )


def build_task_teacher(config: AdaptConfig, choice: AdaptTeacher) -> TaskTeacher:
    """An encoder with fresh adapters and head.

    Raises:
        InputError: an encoder whose attentions cannot be adapted.
        CheckpointError: unusable weights.
        MissingExtra: peft is not installed.
    """
    encoder = load_teacher(choice.name, choice.weights)
    if not isinstance(encoder, Encoder):
        raise InputError(f"teacher {choice.name!r} cannot be adapted: use a DINOv2, a plain ViT or USFM")
    torch.manual_seed(config.seed)
    student = config.student
    return TaskTeacher(
        encoder, task=student.task, outputs=student.outputs, image_hw=student.input_hw, rank=config.lora_rank
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class AdaptedTeacher:
    """A teacher that can be learnt from, or how far its own training came.

    Attributes:
        net: merged and frozen.
        about: what is recorded of it.
        rank: on the validation split: Dice, or balanced accuracy; None where it was not trained here.
        done: its training is finished.
    """

    net: TaskTeacher | SisterTeacher
    about: dict[str, object]
    rank: float | None
    done: bool


def adapted_teacher(
    data: Path,
    run_folder: Path,
    config: AdaptConfig,
    labels: tuple[str, ...],
    choice: AdaptTeacher,
    *,
    quiet: bool = False,
    stop_after_s: float = 0.0,
) -> AdaptedTeacher:
    """Adapts a teacher, or takes it from its finished run.

    A student as a teacher is taken as it is.

    Args:
        data: folder with ``split.csv``.
        run_folder: of the teacher's run.
        config: of the student's run; the teacher's follows from it.
        labels: names of the outputs.
        choice: which encoder.
        quiet: print nothing.
        stop_after_s: seconds after which its training stops at a checkpoint; 0 never.

    Raises:
        InputError: unusable data or teacher, or a run with other settings.
        CheckpointError: unusable weights.
        MissingExtra: peft or the training engine is not installed.
        OutputError: the folder cannot be written.
    """
    if choice.name == SISTER:
        loaded = load_student_file(choice.weights)
        sister = SisterTeacher(loaded.module, config.student.input_hw).requires_grad_(False).eval()
        known: dict[str, object] = {"name": SISTER, "sha256": loaded.weights_sha256}
        return AdaptedTeacher(net=sister, about=known, rank=None, done=True)
    plan = teacher_config(config)
    about: dict[str, object] = {"name": choice.name, "sha256": read_weights_file(choice.weights).sha256}
    teacher = build_task_teacher(plan, choice)
    outcome = train_model(
        teacher, data, run_folder, plan, labels, start={"teacher": about}, quiet=quiet, stop_after_s=stop_after_s
    )
    if outcome.steps < plan.steps:
        return AdaptedTeacher(net=teacher, about=about, rank=None, done=False)
    fill_task_teacher(teacher, run_folder / BEST)
    teacher.encoder = merge_adapters(teacher.encoder)  # type: ignore[assignment]
    return AdaptedTeacher(net=teacher.requires_grad_(False).eval(), about=about, rank=outcome.best, done=True)


def fill_task_teacher(teacher: TaskTeacher, path: Path) -> None:
    """Fills adapters and head from a run's best weights.

    Raises:
        CheckpointError: the file lacks one of them or is of another shape.
    """
    tensors = {name.removeprefix("model."): value for name, value in load_file(path).items()}
    frozen = {name for name, parameter in teacher.named_parameters() if not parameter.requires_grad}
    wanted = {name: value for name, value in teacher.state_dict().items() if name not in frozen}
    wrong = [name for name, value in wanted.items() if name not in tensors or tensors[name].shape != value.shape]
    if wrong:
        raise CheckpointError(f"{path} is of another teacher: {len(wrong)} tensors do not fit, first {wrong[0]}")
    teacher.load_state_dict({name: tensors[name] for name in wanted}, strict=False)


def check_margin(teacher: float, student: float, margin: float, what: str) -> None:
    """Refuses a teacher that is not better than a label-only student.

    Such a student learns from the labels alone.

    Args:
        teacher: its score on the validation split.
        student: that of the student it is compared with.
        margin: by how much it must be better.
        what: which student that is, for the message.

    Raises:
        InputError: it is not.
    """
    if teacher < student + margin:
        raise InputError(
            f"the teacher scores {teacher:.4f} on validation, {what} {student:.4f}: a teacher must be better by "
            f"{margin:g}; train it longer or at a larger size, or set teacher_margin"
        )


__all__ = [
    "SISTER",
    "AdaptTeacher",
    "AdaptedTeacher",
    "adapted_teacher",
    "build_task_teacher",
    "check_margin",
    "fill_task_teacher",
    "teacher_config",
]
