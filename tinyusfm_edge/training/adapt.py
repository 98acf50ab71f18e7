"""Task adaptation: a student with a head for masks or classes, trained on a labelled table, the best weights kept.

``tinyusfm-edge adapt`` runs it. A run folder holds ``config.json``, ``log.jsonl``, ``checkpoint.pt`` at every
evaluation, and the best weights by validation (moving average of the weights); a run in it is resumed to the same
weights as an uninterrupted one. The student file beside it is what ``evaluate`` and ``export`` read.

The recipe leaves out the defects of the official one (methods.md 1.7): layer-wise decay acts, there is one warm-up,
validation never trains, and the test split is not read at all. It does not know export or packaging.

Recipe (our choice): AdamW 0.9/0.999, weight decay on matrices only, linear warm-up and cosine decay to 1 %, BCE + soft
Dice or class-weighted cross-entropy, EMA of the weights.

Shapes: B batch, 1HW pictures and masks.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tinyusfm_edge.models.checkpoint import load_weights, save_student, write_atomically
from tinyusfm_edge.models.student import Student, build_student
from tinyusfm_edge.training.adapt_config import RUN_VERSION, AdaptConfig
from tinyusfm_edge.training.augment import augment
from tinyusfm_edge.training.layer_decay import parameter_groups, set_learning_rate, warmup_cosine
from tinyusfm_edge.training.task import Pool, TaskData, TaskLoss, load_task, normalise, score
from tinyusfm_runtime.errors import InputError
from tinyusfm_runtime.spec import ModelSpec, PostProcess, PreprocessSpec, Task

Report = Callable[[str], None]
"""Takes one line about how a run goes on."""


def preprocess_spec(config: AdaptConfig) -> PreprocessSpec:
    """The input geometry of a config's student."""
    return PreprocessSpec(height=config.student.image_size, width=config.student.image_size)


def adapt(
    data: Path, run_folder: Path, config: AdaptConfig, labels: tuple[str, ...], *, init: Path | None, report: Report
) -> dict[str, Any]:
    """Runs or resumes an adaptation.

    Args:
        data: folder with ``split.csv``.
        run_folder: of the run; a checkpoint in it is resumed.
        config: settings; must equal the run's when resuming.
        labels: names of the outputs.
        init: weights to start from, or None for random ones.
        report: told how the run goes on.

    Returns:
        ``best`` (validation scores of the best weights), ``step`` they are of, ``images_per_s`` of training.

    Raises:
        InputError: unusable data, or the folder holds a run with other settings.
        CheckpointError: unusable start weights.
    """
    torch.manual_seed(config.seed)
    model = build_student(config.student)
    start = None
    if init is not None:
        found = load_weights(model, init, resize_positions=True)
        start = {"sha256": found.sha256, "missing": len(found.missing_heads)}
    settle(run_folder, config, labels, start)
    spec = preprocess_spec(config)
    task = load_task(data, spec, config, labels)
    report(f"{len(task.train)} labelled pictures of {task.num_groups} patients, {len(task.val)} of validation")
    run = Run(config, model, task, spec)
    checkpoint = run_folder / "checkpoint.pt"
    if checkpoint.is_file():
        run.load(torch.load(checkpoint, weights_only=True))
        report(f"resumed at step {run.step}")
    while run.step < config.steps:
        run.advance_to_evaluation()
        run.evaluate(run_folder, report)
    return {"best": run.best, "step": run.best_step, "images_per_s": run.images_per_s()}


def settle(run_folder: Path, config: AdaptConfig, labels: tuple[str, ...], start: dict[str, object] | None) -> None:
    """Writes the run's settings, or checks that the run in the folder has the same.

    Raises:
        InputError: it has others.
    """
    content = config.to_json() | {"init": start, "labels_of_classes": list(labels)}
    text = json.dumps(content, indent=1)
    path = run_folder / "config.json"
    if path.is_file() and path.read_text(encoding="utf-8") != text:
        raise InputError(
            f"{run_folder} holds a run with other settings: resume it with the same ones or name another folder"
        )
    run_folder.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text.encode())


class Run:
    """Everything that moves during an adaptation, so that it can be saved and resumed."""

    def __init__(self, config: AdaptConfig, model: Student, task: TaskData, spec: PreprocessSpec) -> None:
        self.config, self.task, self.spec = config, task, spec
        self.step, self.best_step, self.seconds = 0, 0, 0.0
        self.best: dict[str, float] = {}
        self.model = model
        self.average = copy.deepcopy(self.model).eval()
        self.loss = TaskLoss(config, task)
        groups = parameter_groups(
            self.model.named_parameters(),
            depth=config.student.depth,
            layer_decay=config.layer_decay,
            weight_decay=config.weight_decay,
        )
        self.optimiser = torch.optim.AdamW(groups, lr=config.learning_rate)
        self.generator = torch.Generator().manual_seed(config.seed)
        self.losses: list[float] = []

    def advance_to_evaluation(self) -> None:
        """Steps up to the next evaluation or the end."""
        started = time.monotonic()
        self.losses.clear()
        while True:
            self.losses.append(self.advance())
            if self.step % self.config.evaluate_every == 0 or self.step >= self.config.steps:
                break
        self.seconds += time.monotonic() - started

    def advance(self) -> float:
        """One optimiser step; returns the loss."""
        config = self.config
        image, target = self._batch()
        rate = warmup_cosine(self.step, steps=config.steps, warmup=config.warmup, peak=config.learning_rate)
        set_learning_rate(self.optimiser, rate)
        self.model.train()
        with torch.autocast("cpu", torch.bfloat16, enabled=config.precision == "bf16"):
            logits = self.model(normalise(image * 255.0, self.spec))
        loss = self.loss(logits, target)
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), config.clip)
        self.optimiser.step()
        self.step += 1
        self._follow()
        return float(loss.detach())

    def _batch(self) -> tuple[Tensor, Tensor]:
        config = self.config
        num_phantoms = round(config.batch * config.phantom_share) if self.task.phantoms else 0
        parts = [self._draw(self.task.train, config.batch - num_phantoms)]
        if self.task.phantoms is not None and num_phantoms:
            parts.append(self._draw(self.task.phantoms, num_phantoms))
        image = torch.cat([part[0] for part in parts])[:, None].float() / 255.0
        target = torch.cat([part[1] for part in parts])
        segment = config.student.task == "segment"
        mask = target[:, None].float() if segment else torch.zeros_like(image)
        polish = config.polish_from is not None and self.step >= config.polish_from
        image, mask = augment(image, mask, config.augment.halved() if polish else config.augment, self.generator)
        return image, mask if segment else target

    def _draw(self, pool: Pool, count: int) -> tuple[Tensor, Tensor]:
        index = torch.randint(len(pool), (count,), generator=self.generator)
        return pool.images_SHW[index], pool.targets[index]

    @torch.no_grad()
    def _follow(self) -> None:
        decay = min(self.config.ema, (1 + self.step) / (10 + self.step))
        for mean, value in zip(self.average.state_dict().values(), self.model.state_dict().values(), strict=True):
            if mean.dtype.is_floating_point:
                mean.lerp_(value, 1 - decay)
            else:
                mean.copy_(value)

    def evaluate(self, run_folder: Path, report: Report) -> None:
        """Scores the averaged weights on validation, keeps them if they are the best so far, writes a checkpoint."""
        segment = self.config.student.task == "segment"
        found = score(self.average, self.task.val, self.spec, segment=segment)
        line: dict[str, Any] = {"step": self.step, "loss": sum(self.losses) / len(self.losses), "val": found}
        if self.task.held is not None:
            line["phantoms"] = score(self.average, self.task.held, self.spec, segment=True)
        if _rank(found) > _rank(self.best):
            self.best, self.best_step = found, self.step
            temporary = run_folder / "best.tmp"
            save_file(plain_state(self.average), temporary)
            temporary.replace(run_folder / "best.safetensors")
        with (run_folder / "log.jsonl").open("a", encoding="utf-8") as log:
            log.write(json.dumps(line) + "\n")
        torch.save(self.state(), run_folder / "checkpoint.tmp")
        (run_folder / "checkpoint.tmp").replace(run_folder / "checkpoint.pt")
        scores = ", ".join(f"{name} {value:.4f}" for name, value in found.items())
        report(f"step {self.step}  loss {line['loss']:.4f}  val {scores}  {self.images_per_s():.1f} images/s")

    def images_per_s(self) -> float:
        """Training pictures a second since the run began, evaluations not counted."""
        return self.step * self.config.batch / self.seconds if self.seconds else 0.0

    def state(self) -> dict[str, Any]:
        """Everything needed to go on."""
        return {
            "version": RUN_VERSION,
            "step": self.step,
            "best": self.best,
            "best_step": self.best_step,
            "seconds": self.seconds,
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "generator": self.generator.get_state(),
            "torch": torch.get_rng_state(),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Takes up a saved state.

        Raises:
            InputError: a checkpoint of another version.
        """
        if state.get("version") != RUN_VERSION:
            raise InputError(f"checkpoint version {state.get('version')!r} is not {RUN_VERSION}: start a new run")
        self.step, self.best_step, self.seconds = int(state["step"]), int(state["best_step"]), float(state["seconds"])
        self.best = {str(name): float(value) for name, value in state["best"].items()}
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.generator.set_state(state["generator"])
        torch.set_rng_state(state["torch"])


def _rank(scores: dict[str, float]) -> tuple[float, float]:
    """Greater is better: Dice, or balanced accuracy and, among equals, the likelihood."""
    if not scores:
        return (-1.0, 0.0)
    return scores.get("dice", scores.get("balanced_accuracy", 0.0)), -scores.get("nll", 0.0)


def plain_state(model: nn.Module) -> dict[str, Tensor]:
    """A module's tensors as a weights file holds them."""
    return {k: v.contiguous() for k, v in model.state_dict().items() if not k.endswith("num_batches_tracked")}


def write_student(run_folder: Path, out: Path, config: AdaptConfig, labels: tuple[str, ...], spec: ModelSpec) -> str:
    """Writes the best weights of a run as a student file (float32).

    Args:
        run_folder: of a finished run.
        out: file to write.
        config: of the run.
        labels: names of the outputs.
        spec: what goes in and out.

    Returns:
        sha256 of the file, hex.

    Raises:
        OutputError: it cannot be written.
    """
    model = build_student(config.student)
    model.load_state_dict(load_file(run_folder / "best.safetensors"), strict=False)
    return save_student(out, model.eval(), spec, torch.float32)


def student_spec(
    config: AdaptConfig,
    labels: tuple[str, ...],
    *,
    name: str,
    postprocess: str | None = None,
    licence: str = "unknown",
    origin: str = "unknown",
) -> ModelSpec:
    """The spec of an adapted student.

    Args:
        config: of the run.
        labels: names of the outputs.
        name: short name.
        postprocess: what is made of the logits; a mask or nothing by default.
        licence: of the weights.
        origin: where they come from, one line.

    Raises:
        InputError: an unknown post-processing.
    """
    task = Task(config.student.task)
    default = PostProcess.MASK if task is Task.SEGMENT else PostProcess.NONE
    known = [p.value for p in PostProcess]
    if postprocess is not None and postprocess not in known:
        raise InputError(f"post-processing {postprocess!r} is unknown: use {', '.join(known)}")
    return ModelSpec(
        name=name,
        task=task,
        labels=labels,
        preprocess=preprocess_spec(config),
        postprocess=default if postprocess is None else PostProcess(postprocess),
        licence=licence,
        origin=origin,
    )


__all__ = ["Report", "Run", "adapt", "plain_state", "preprocess_spec", "settle", "student_spec", "write_student"]
