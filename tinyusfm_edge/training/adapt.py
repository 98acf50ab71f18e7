"""Task adaptation: a student with a head for masks or classes, trained on a labelled table, the best weights kept.

``tinyusfm-edge adapt`` runs it on the engine of loop.py: its run folder resumes, and holds settings, scalars and the
best weights by validation (moving average of the weights). The student file beside it is what ``evaluate`` and
``export`` read.

The recipe leaves out the defects of the official one (methods.md 1.7): layer-wise decay acts, there is one warm-up,
validation never trains, and the test split is not read at all. It does not know export or packaging.

Recipe (our choice): AdamW 0.9/0.999, weight decay on matrices only, linear warm-up and cosine decay to 1 %, BCE + soft
Dice or class-weighted cross-entropy, EMA of the weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from tinyusfm_edge.evaluation.exits import ExitReport, choose_exits
from tinyusfm_edge.models.checkpoint import load_weights, save_student
from tinyusfm_edge.models.student import ClassificationStudent, SegmentationStudent, Student, build_student
from tinyusfm_edge.training.adapt_config import AdaptConfig
from tinyusfm_edge.training.data import read_table
from tinyusfm_edge.training.guide import Guide
from tinyusfm_edge.training.loop import EngineConfig, Evaluation, Outcome, fit
from tinyusfm_edge.training.objective import AdaptObjective, AdaptTask
from tinyusfm_edge.training.task import TaskData, TaskLoss, load_task, score
from tinyusfm_edge.training.teach import TeacherChoice, adapted_teacher
from tinyusfm_runtime.errors import InputError
from tinyusfm_runtime.spec import ModelSpec, PostProcess, PreprocessSpec, Task

BEST = "best.safetensors"
"""Best weights in a run folder; names carry the objective's ``model.``."""


def preprocess_spec(config: AdaptConfig) -> PreprocessSpec:
    """The input geometry of a config's student."""
    return PreprocessSpec(height=config.student.image_size, width=config.student.image_size)


def engine_config(config: AdaptConfig) -> EngineConfig:
    """The loop's settings of an adaptation."""
    return EngineConfig(
        steps=config.steps,
        batch=config.batch,
        learning_rate=config.learning_rate,
        final_learning_rate=0.01 * config.learning_rate,
        warmup=config.warmup,
        clip=config.clip,
        precision=config.precision,
        seed=config.seed,
        checkpoint_every=config.evaluate_every,
        ema=config.ema,
    )


def adapt(
    data: Path,
    run_folder: Path,
    config: AdaptConfig,
    labels: tuple[str, ...],
    *,
    init: Path | None = None,
    teacher: TeacherChoice | None = None,
    negatives: Sequence[Path] = (),
    quiet: bool = False,
) -> Outcome:
    """Runs or resumes an adaptation; with a teacher that one is adapted first.

    Args:
        data: folder with ``split.csv``.
        run_folder: of the run; a run in it is resumed.
        config: settings; must equal the run's when resuming.
        labels: names of the outputs.
        init: weights to start from, or None for random ones.
        teacher: what is distilled from, where the config asks for distillation.
        negatives: folders with a ``split.csv`` of pictures that hold nothing to segment.
        quiet: print nothing.

    Returns:
        How the run ended; ``best`` is the validation rank of the weights kept.

    Raises:
        InputError: unusable data, a teacher without distillation or the reverse, or a run with other settings.
        CheckpointError: unusable start weights or teacher.
        MissingExtra: the training engine is not installed.
        OutputError: the folder cannot be written.
    """
    if (teacher is None) != (not config.kd):
        raise InputError("distillation and a teacher belong together: name both, or neither")
    guide, about = None, None
    if teacher is not None:
        place = teacher.run or run_folder / "teacher"
        net, about = adapted_teacher(data, place, config, labels, teacher, quiet=quiet)
        torch.manual_seed(config.seed)
        guide = Guide(net, config)
    model, start = start_student(config, init)
    known: dict[str, object] = {"init": start, "teacher": about, "negatives": [folder.name for folder in negatives]}
    return train_model(
        model, data, run_folder, config, labels, start=known, guide=guide, negatives=negatives, quiet=quiet
    )


def train_model(
    model: nn.Module,
    data: Path,
    run_folder: Path,
    config: AdaptConfig,
    labels: tuple[str, ...],
    *,
    start: Mapping[str, object],
    guide: Guide | None = None,
    negatives: Sequence[Path] = (),
    quiet: bool = False,
) -> Outcome:
    """Trains any net that answers as a student does: a student, or the teacher itself.

    Args:
        model: normalised picture -> logits.
        data: folder with ``split.csv``.
        run_folder: of the run; a run in it is resumed.
        config: settings.
        labels: names of the outputs.
        start: what is recorded about the start.
        guide: what an adapted teacher adds to the loss.
        negatives: folders of pictures that hold nothing to segment.
        quiet: print nothing.

    Returns:
        How the run ended.

    Raises:
        InputError: unusable data, or the folder holds a run with other settings.
        MissingExtra: the training engine is not installed.
        OutputError: the folder cannot be written.
    """
    spec = preprocess_spec(config)
    task_data = load_task(data, spec, config, labels, negatives)
    objective = AdaptObjective(model, TaskLoss(config, task_data), spec, guide)
    settings = {"adapt": config.to_json(), "labels": list(labels), "data": task_data.counts(), **start}
    return fit(
        AdaptTask(config, task_data, objective),
        engine_config(config),
        run_folder,
        settings=settings,
        evaluation=evaluation_of(objective, task_data, spec, config),
        quiet=quiet,
    )


def start_student(config: AdaptConfig, init: Path | None) -> tuple[Student, dict[str, object] | None]:
    """A student as a run starts with it, and what is recorded about its start.

    Raises:
        CheckpointError: unusable start weights.
    """
    torch.manual_seed(config.seed)
    model = build_student(config.student)
    if isinstance(model, SegmentationStudent):
        # the published mask head never uses the final norm: processes would wait for its gradient
        model.backbone.norm.requires_grad_(False)
    if init is None:
        return model, None
    found = load_weights(model, init, resize_positions=True)
    return model, {"sha256": found.sha256, "missing": len(found.missing_heads)}


def evaluation_of(objective: AdaptObjective, data: TaskData, spec: PreprocessSpec, config: AdaptConfig) -> Evaluation:
    """The measurement that picks the best weights."""
    segment = config.student.task == "segment"

    def measure() -> dict[str, float]:
        found = {
            f"val_{name}": value for name, value in score(objective.model, data.val, spec, segment=segment).items()
        }
        if data.held is not None:
            found["phantom_dice"] = score(objective.model, data.held, spec, segment=True)["dice"]
        if data.negatives_val is not None:
            # two empty masks agree, so this is the share of pictures in which nothing was found
            found["negatives_empty"] = score(objective.model, data.negatives_val, spec, segment=True)["dice"]
        return found

    return Evaluation(every=config.evaluate_every, measure=measure, best_by="val_rank")


def is_first_process() -> bool:
    """Whether this process writes results: the only one, or the first of those that torchrun started."""
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0


def best_student(run_folder: Path, config: AdaptConfig) -> Student:
    """The student with the best weights of a finished run, in evaluation mode.

    Raises:
        InputError: the folder holds none, or those of another net.
    """
    path = run_folder / BEST
    if not path.is_file():
        raise InputError(f"{run_folder} holds no {BEST}: the run has not been evaluated yet")
    tensors = load_file(path)
    state = {name.removeprefix("model."): value for name, value in tensors.items() if name.startswith("model.")}
    model = build_student(config.student)
    wrong = set(model.state_dict()) ^ set(state)
    if isinstance(model, SegmentationStudent):
        wrong -= {"backbone.norm.weight", "backbone.norm.bias"}
    if wrong:
        raise InputError(f"{path} is of another net: {len(wrong)} names differ, first {sorted(wrong)[0]}")
    model.load_state_dict(state, strict=False)
    return model.eval()


def write_student(
    run_folder: Path, out: Path, config: AdaptConfig, spec: ModelSpec, *, data: Path
) -> tuple[str, ExitReport | None]:
    """Writes the best weights of a run as a student file (float32).

    Early exits are calibrated on the validation split, and the file carries the policy.

    Args:
        run_folder: of a finished run.
        out: file to write.
        config: of the run.
        spec: what goes in and out.
        data: folder with ``split.csv``.

    Returns:
        sha256 of the file, hex, and what the exits do on validation.

    Raises:
        InputError: the folder holds no weights of that net.
        OutputError: it cannot be written.
    """
    model, report = best_student(run_folder, config), None
    if isinstance(model, ClassificationStudent) and config.student.exits:
        policy, report = choose_exits(model, spec, read_table(data, "val", need="label"))
        spec = replace(spec, exits=policy)
    return save_student(out, model, spec, torch.float32), report


def student_spec(
    config: AdaptConfig, labels: tuple[str, ...], *, name: str, postprocess: str | None = None, **about: Any
) -> ModelSpec:
    """The spec of an adapted student.

    Args:
        config: of the run.
        labels: names of the outputs.
        name: short name.
        postprocess: what is made of the logits; a mask or nothing by default.
        about: further fields of the spec, such as ``licence``.

    Raises:
        InputError: an unknown post-processing.
    """
    task = Task(config.student.task)
    default = PostProcess.MASK if task is Task.SEGMENT else PostProcess.NONE
    known = [p.value for p in PostProcess]
    if postprocess is not None and postprocess not in known:
        raise InputError(f"post-processing {postprocess!r} is unknown: use {', '.join(known)}")
    chosen = default if postprocess is None else PostProcess(postprocess)
    return ModelSpec(
        name=name, task=task, labels=labels, preprocess=preprocess_spec(config), postprocess=chosen, **about
    )


__all__ = [
    "BEST",
    "adapt",
    "best_student",
    "engine_config",
    "evaluation_of",
    "is_first_process",
    "preprocess_spec",
    "start_student",
    "student_spec",
    "train_model",
    "write_student",
]
