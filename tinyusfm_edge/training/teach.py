"""Adapting the teacher first: LoRA and head trained on the same labelled table, by the same recipe and engine.

The teacher's run lies in a folder of its own, so that several students and seeds share one. What comes back is merged
and frozen. It does not know how students learn from it (guide.py).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file

from tinyusfm_edge.models.teachers import load_teacher
from tinyusfm_edge.models.teachers.dinov2 import Dinov2
from tinyusfm_edge.models.weights_file import read_weights_file
from tinyusfm_edge.training.adapt_config import AdaptConfig
from tinyusfm_edge.training.lora import TaskTeacher, merge_adapters
from tinyusfm_runtime.errors import CheckpointError, InputError


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherChoice:
    """Which encoder becomes the teacher.

    Attributes:
        name: one of ``teachers.names()``, of a DINOv2 kind.
        weights: its file.
        run: folder of the teacher's own run, or None for ``teacher`` inside the student's.
    """

    name: str
    weights: Path
    run: Path | None = None


def teacher_config(config: AdaptConfig) -> AdaptConfig:
    """The recipe for a teacher: its own steps and rate, no distillation, one learning rate for all layers.

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
        polish_from=None,
        seed=0,
    )


def build_task_teacher(config: AdaptConfig, choice: TeacherChoice) -> TaskTeacher:
    """An encoder with fresh adapters and head.

    Raises:
        InputError: an encoder whose attentions cannot be adapted.
        CheckpointError: unusable weights.
        MissingExtra: peft is not installed.
    """
    encoder = load_teacher(choice.name, choice.weights)
    if not isinstance(encoder, Dinov2):
        raise InputError(f"teacher {choice.name!r} cannot be adapted: use one of the DINOv2 kind")
    torch.manual_seed(config.seed)
    student = config.student
    return TaskTeacher(
        encoder, task=student.task, outputs=student.outputs, image_size=student.image_size, rank=config.lora_rank
    )


def adapted_teacher(
    data: Path,
    run_folder: Path,
    config: AdaptConfig,
    labels: tuple[str, ...],
    choice: TeacherChoice,
    *,
    quiet: bool = False,
) -> tuple[TaskTeacher, dict[str, object]]:
    """Adapts a teacher, or takes it from its finished run.

    Args:
        data: folder with ``split.csv``.
        run_folder: of the teacher's run.
        config: of the student's run; the teacher's follows from it.
        labels: names of the outputs.
        choice: which encoder.
        quiet: print nothing.

    Returns:
        The merged, frozen teacher, and what is recorded about it.

    Raises:
        InputError: unusable data or teacher, or a run with other settings.
        CheckpointError: unusable weights.
        MissingExtra: peft or the training engine is not installed.
        OutputError: the folder cannot be written.
    """
    from tinyusfm_edge.training.adapt import BEST, train_model

    plan = teacher_config(config)
    about: dict[str, object] = {"name": choice.name, "sha256": read_weights_file(choice.weights).sha256}
    teacher = build_task_teacher(plan, choice)
    train_model(teacher, data, run_folder, plan, labels, start={"teacher": about}, quiet=quiet)
    fill_task_teacher(teacher, run_folder / BEST)
    teacher.encoder = merge_adapters(teacher.encoder)  # type: ignore[assignment]
    return teacher.requires_grad_(False).eval(), about


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


__all__ = ["TeacherChoice", "adapted_teacher", "build_task_teacher", "fill_task_teacher", "teacher_config"]
