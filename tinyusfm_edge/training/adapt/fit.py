"""fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import nn

from tinyusfm_edge.training.adapt.config import AdaptConfig
from tinyusfm_edge.training.adapt.guide import Guide
from tinyusfm_edge.training.adapt.objective import AdaptObjective, AdaptTask
from tinyusfm_edge.training.adapt.task import TaskData, TaskLoss, load_task, score
from tinyusfm_edge.training.trainer.loop import Evaluation, Outcome, TrainerConfig, fit, natural_precision
from tinyusfm_runtime.spec import PreprocessSpec

BEST = "best.safetensors"
"""Best weights in a run folder; names carry the objective's ``model.``."""


def preprocess_spec(config: AdaptConfig) -> PreprocessSpec:
    """The input geometry of a config's student."""
    rows, cols = config.student.input_hw
    return PreprocessSpec(height=rows, width=cols)


def engine_config(config: AdaptConfig) -> TrainerConfig:
    """The loop's settings of an adaptation."""
    return TrainerConfig(
        steps=config.steps,
        batch=config.batch,
        learning_rate=config.learning_rate,
        final_learning_rate=0.01 * config.learning_rate,
        warmup=config.warmup,
        clip=config.clip,
        precision=natural_precision() if config.precision == "natural" else config.precision,
        seed=config.seed,
        checkpoint_every=config.evaluate_every,
        ema=config.ema,
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
    unlabelled: Sequence[Path] = (),
    quiet: bool = False,
    stop_after_s: float = 0.0,
) -> Outcome:
    """Trains a model that answers as a student does: a student, or the teacher.

    Args:
        model: normalised image -> logits.
        data: folder with ``split.csv``.
        run_folder: of the run; a run in it is resumed.
        config: settings.
        labels: names of the outputs.
        start: what is recorded about the start.
        guide: what an adapted teacher adds to the loss.
        negatives: folders of images that hold nothing to segment.
        unlabelled: folders whose training images join the transfer set.
        quiet: print nothing.
        stop_after_s: seconds after which it stops at a checkpoint; 0 never.

    Returns:
        How the run ended.

    Raises:
        InputError: unusable data, or the folder holds a run with other settings.
        MissingExtra: the training engine is not installed.
        OutputError: the folder cannot be written.
    """
    spec = preprocess_spec(config)
    task_data = load_task(data, spec, config, labels, negatives, unlabelled)
    objective = AdaptObjective(model, TaskLoss(config, task_data), spec, guide)
    settings = {"adapt": config.to_json(), "labels": list(labels), "data": task_data.counts(), **start}
    return fit(
        AdaptTask(config, task_data, objective),
        engine_config(config),
        run_folder,
        settings=settings,
        evaluation=evaluation_of(objective, task_data, spec, config),
        quiet=quiet,
        stop_after_s=stop_after_s,
    )


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
            # two empty masks agree, so this is the share of images in which nothing was found
            found["negatives_empty"] = score(objective.model, data.negatives_val, spec, segment=True)["dice"]
        return found

    return Evaluation(every=config.evaluate_every, measure=measure, best_by="val_rank")


__all__ = ["BEST", "engine_config", "evaluation_of", "preprocess_spec", "train_model"]
