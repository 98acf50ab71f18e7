"""A whole pre-training without labels.

Pool, teacher, bank, engine, and the student file that comes out.

It puts together what other files define: images.py reads, views.py crops and masks, teacher_bank.py asks or remembers
the teacher, distill.py, mae.py or dino.py says the loss, loop.py takes the steps. It does not know the command line.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tinyusfm_edge.data.fingerprint import rows_sha256
from tinyusfm_edge.data.images import ImagePool, Listing, read_pool
from tinyusfm_edge.models.checkpoint import LoadReport, load_start, save_student
from tinyusfm_edge.models.student import build_student
from tinyusfm_edge.models.teachers import load_teacher
from tinyusfm_edge.models.teachers.feature_bank import load as load_bank
from tinyusfm_edge.models.upstream import SHORT_RUN, joined
from tinyusfm_edge.training.pretrain.config import LEAST_STEPS, DistillConfig, to_json
from tinyusfm_edge.training.pretrain.crops import draw_multi_crop
from tinyusfm_edge.training.pretrain.dino import DinoObjective, collapsed
from tinyusfm_edge.training.pretrain.distill import DistillObjective, inactive_stages, no_better_than_mean
from tinyusfm_edge.training.pretrain.foreign_bank import ForeignBank, open_foreign
from tinyusfm_edge.training.pretrain.lock import one_writer
from tinyusfm_edge.training.pretrain.mae import MaeObjective
from tinyusfm_edge.training.pretrain.standard import Standard
from tinyusfm_edge.training.pretrain.teacher_bank import (
    FeatureBank,
    FeatureConfig,
    TeacherFeatures,
    draw_entries,
    pool_standards,
    write_bank,
)
from tinyusfm_edge.training.pretrain.views import draw_views
from tinyusfm_edge.training.trainer.loop import Draw, Outcome, ParameterGroup, fit, plain_groups, read_scalars
from tinyusfm_runtime.errors import InputError
from tinyusfm_runtime.spec import ModelSpec, PreprocessSpec, Task

STUDENT_FILE = "student.safetensors"
"""What a finished run leaves in its folder."""

Track = Callable[[Iterable[Any], str, int], Iterable[Any]]


@dataclass(frozen=True, kw_only=True, slots=True)
class DistillTeacher:
    """Which teacher.

    Attributes:
        name: one of ``teachers.names()``.
        weights: its file, or the folder of a feature bank.
    """

    name: str
    weights: Path


class PretrainTask:
    """The engine's task: views of pooled images.

    With cached teacher features where there is a bank.
    """

    def __init__(
        self,
        pool: ImagePool,
        config: DistillConfig,
        bank: FeatureBank | ForeignBank | None,
        teacher: TeacherFeatures | None,
        widths: tuple[int, ...],
        standards: Sequence[Standard] = (),
    ) -> None:
        torch.manual_seed(config.seed)
        self.pool, self.config, self.bank = pool, config, bank
        self._objective: MaeObjective | DistillObjective | DinoObjective
        steps = config.engine(len(pool)).steps
        if config.method == "mae":
            self._objective = MaeObjective(config)
        elif config.method == "dino":
            self._objective = DinoObjective(config, steps)
        else:
            self._objective = DistillObjective(config, widths, teacher, standards, steps)

    @property
    def objective(self) -> nn.Module:
        """Student and loss."""
        return self._objective

    @property
    def student(self) -> Any:
        """The student inside."""
        return self._objective.student

    @property
    def result(self) -> Any:
        """The student that the run leaves."""
        return self._objective.result if isinstance(self._objective, DinoObjective) else self.student

    def groups(self) -> list[ParameterGroup]:
        """No decay on biases, norms, positions and tokens."""
        return plain_groups(self._objective, self.config.weight_decay)

    def __len__(self) -> int:
        return len(self.pool)

    def batch(self, draws: Sequence[Draw]) -> dict[str, Any]:
        """Views of the drawn images; a fixed view of each where variants are set."""
        config = self.config
        if config.method == "dino":
            return draw_multi_crop(self.pool, draws, config)
        if config.variants:
            entries = [d.index * config.variants + d.seed % config.variants for d in draws]
            views = draw_entries(self.pool, entries, config.variants, config.view_seed, config.view)
        else:
            views = draw_views([self.pool.pixels_NSS[d.index] for d in draws], [d.seed for d in draws], config.view)
        if config.method == "mae":
            return {"image": views.image_B1HW, "order": self._orders(draws)}
        batch: dict[str, Any] = {"image": views.image_B1HW, "mask": views.mask_Bhw, "bands": views.bands_BK}
        if config.keep < 1:
            orders = self._orders(draws)
            batch["kept"] = orders[:, : max(1, round(config.keep * orders.shape[1]))].sort(1).values
        if self.bank is not None:
            batch["teacher"] = self.bank.read(entries)
        return batch

    def _orders(self, draws: Sequence[Draw]) -> torch.Tensor:
        """A random order of the patches for each sample, BP."""
        count = self.student.backbone.num_patches
        orders = [torch.randperm(count, generator=torch.Generator().manual_seed(d.seed)) for d in draws]
        return torch.stack(orders)


def pretrain(
    found: Listing,
    config: DistillConfig,
    out: Path,
    *,
    teacher: DistillTeacher | None = None,
    init: Path | None = None,
    short: bool = False,
    cache: Path | None = None,
    frame_stride: int = 8,
    allowed_failures: int = 0,
    device: str = "auto",
    say: Callable[[str], None] = lambda text: None,
    track: Track = lambda items, _label, _total: items,
    quiet: bool = False,
    stop_after_s: float = 0.0,
    container: str | None = None,
) -> Outcome:
    """Runs or resumes a pre-training and writes ``student.safetensors``.

    Args:
        found: images of the pool.
        config: settings.
        out: folder of the run.
        teacher: needed unless the method has none.
        init: weights the student starts from, or None for random ones.
        short: fewer than ``LEAST_STEPS`` steps are meant; the run and the student say so.
        cache: folder for decoded images and teacher banks; a folder in the run by default.
        frame_stride: every Nth frame of a cine is taken.
        allowed_failures: files that may fail to decode.
        device: ``auto``, ``cpu`` or ``cuda``.
        say: called with what is being done.
        track: wraps slow iterations for a progress bar.
        quiet: no progress of the training.
        stop_after_s: seconds after which the training writes a checkpoint and ends before its last step; 0 never.
        container: which model of a start that holds several, such as ``model_ema``.

    Returns:
        How it ended.

    Raises:
        InputError: settings, data or teacher that do not fit each other, or too few steps to teach anything.
        CheckpointError: unusable teacher or start weights, or a damaged checkpoint.
        MissingExtra: a library is missing.
        OutputError: no room or no permission.
    """
    if config.needs_teacher and teacher is None:
        raise InputError("this method learns from a teacher: give --teacher and --teacher-weights")
    if config.method == "dino" and teacher is not None:
        raise InputError("dino is its own teacher: leave out --teacher and --teacher-weights")
    if teacher is not None and not config.needs_teacher:
        say(f"note: these settings learn without a teacher: {teacher.name} is not used")
    if container is not None and init is None:
        raise InputError("a container is one of the models of a start: name the start (--init), or leave it out")
    if config.steps:
        check_steps(config.steps, short=short)
    if init is not None:
        # before images are read and a teacher is asked: both can take hours
        load_start(build_student(config.built_student), init, container=container)
    cache = cache or out / "cache"
    pool = open_pool(found, config, cache, frame_stride=frame_stride, allowed_failures=allowed_failures, track=track)
    say(describe_pool(pool))
    engine = config.engine(len(pool))
    is_short = check_steps(engine.steps, short=short)
    task, identity = _task(pool, config, cache, teacher if config.needs_teacher else None, say, track)
    start = None if init is None else load_start(task.student, init, container=container, say=say)
    say(f"{engine.steps} steps of {engine.batch}, {engine.precision}, learning rate {engine.learning_rate:.2g}")
    settings = {
        "kind": "pretrain",
        "config": {k: v for k, v in to_json(config).items() if k not in ("checkpoint_every", "log_every")},
        "pool": {"fingerprint": pool.fingerprint, "images": len(pool), "left_out": pool.left_out},
        "teacher": identity,
        "init": None if start is None else start.sha256,
        "short": is_short,
    }
    outcome = fit(task, engine, out, settings=settings, device=device, quiet=quiet, stop_after_s=stop_after_s)
    for line in inactive_stages(dict(outcome.scalars), config.inactive_below):
        say(f"warning: {line}")
    if outcome.steps < engine.steps or not is_first():
        return outcome
    if line := no_better_than_mean(_last_scalars(out, "kd")):
        say(f"warning: {line}")
    if fallen := collapsed(_last_scalars(out, "dino"), config.dino.collapsed_below):
        say(f"warning: {fallen}")
    taught = f"method {config.method}, teacher {identity['name'] if identity else 'none'}"
    marks = f"{'COLLAPSED, ' if fallen else ''}{f'{SHORT_RUN} of ' if is_short else ''}"
    length = f"{marks}{engine.steps} steps of {engine.batch}"
    size = config.view.image_size
    spec = ModelSpec(
        name=out.name or "student",
        task=Task.FEATURES,
        labels=(),
        preprocess=PreprocessSpec(height=size, width=size),
        origin=f"tinyusfm-edge distill, {taught}, {length}, from {'random weights' if start is None else start.name}",
    )
    stages = _made_of(found, identity, start)
    save_student(out / STUDENT_FILE, task.result.cpu(), spec, torch.float32, stages)
    return outcome


def _made_of(found: Listing, teacher: Mapping[str, str] | None, start: LoadReport | None) -> dict[str, str]:
    """Stages of a distillation, as hashes; a bank of features has no teacher."""
    own = {"images": rows_sha256(found.rows)}
    if found.coreset_sha256:
        own["coreset"] = found.coreset_sha256
    if teacher is not None and teacher.get("sha256"):
        own["teacher"] = teacher["sha256"]
    return joined(own, start.stages, start.sha256) if start is not None else own


def check_steps(steps: int, *, short: bool) -> bool:
    """Whether a run is a short one; an error where that was not asked for.

    Args:
        steps: optimiser steps.
        short: it was.

    Raises:
        InputError: fewer steps than ``LEAST_STEPS`` and ``short`` is not set.
    """
    if steps >= LEAST_STEPS:
        return False
    if not short:
        raise InputError(
            f"{steps} steps teach a student next to nothing (measured: 800 of 32): set steps=800, or say --short, "
            "which the run and its student will carry"
        )
    return True


def is_first() -> bool:
    """Whether this process writes results."""
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0


def _last_scalars(out: Path, having: str) -> dict[str, float]:
    """The last logged scalars of a run with this one among them.

    Also of one that was finished before.
    """
    every = [entry for entry in read_scalars(out) if having in entry]
    return every[-1] if every else {}


def _task(
    pool: ImagePool,
    config: DistillConfig,
    cache: Path,
    choice: DistillTeacher | None,
    say: Callable[[str], None],
    track: Track,
) -> tuple[PretrainTask, dict[str, str] | None]:
    """The task with whatever answers for the teacher.

    Nothing, a foreign bank, our bank, or the model itself.
    """
    if choice is None:
        return PretrainTask(pool, config, None, None, ()), None
    if choice.name == "feature_bank":
        foreign = open_foreign(
            load_bank("feature_bank", choice.weights),
            pool,
            config.view,
            views=config.teacher_views,
            variants=config.variants,
            seed=config.view_seed,
            stages=len(config.layers),
        )
        return PretrainTask(pool, config, foreign, None, foreign.widths, foreign.standards()), {"name": choice.name}
    features, identity = open_teacher(choice, config)
    widths = (features.width,) * len(config.layers)
    if not config.variants:
        standards = pool_standards(pool, config.view, features, config.view_seed)
        return PretrainTask(pool, config, None, features, widths, standards), identity
    bank = _bank(cache, pool, config, features, identity, say, track)
    return PretrainTask(pool, config, bank, None, widths, bank.standards()), identity


def open_pool(
    found: Listing,
    config: DistillConfig,
    cache: Path,
    *,
    frame_stride: int = 8,
    allowed_failures: int = 0,
    track: Track = lambda items, _label, _total: items,
) -> ImagePool:
    """Reads the images of a listing into a cache, at the size the views need.

    Args:
        found: what to read.
        config: settings.
        cache: folder for decoded images.
        frame_stride: every Nth frame of a cine is taken.
        allowed_failures: files that may fail to decode.
        track: wraps the files for a progress bar.

    Raises:
        InputError: more failures than allowed, or nothing left.
        MissingExtra: a library for a format is missing.
        OutputError: no room or no permission.
    """
    size, rows = config.view.stored_size, found.rows
    frame_stride = found.frame_stride or frame_stride
    name = hashlib.sha256("\n".join([str(size), str(frame_stride), *(row.id for row in rows)]).encode()).hexdigest()
    with one_writer(cache):
        return read_pool(
            rows,
            size,
            left_out=found.left_out,
            store=cache / f"images-{name[:12]}",
            frame_stride=frame_stride,
            allowed_failures=allowed_failures,
            only=found.only,
            reading=found.reading,
            track=lambda items: iter(track(items, "images", len(rows))),
        )


def describe_pool(pool: ImagePool) -> str:
    """Lines that say what a pool holds, what was left out and what failed."""
    text = f"{len(pool)} images of {len(set(pool.groups))} groups from {len(set(pool.sources))} folders"
    text += "".join(f", {count} left out as {flag}" for flag, count in pool.left_out.items() if count)
    text += "".join(f"\nnot decoded: {f.name} (hash of its id): {f.reason}" for f in pool.failures)
    return text


def open_teacher(choice: DistillTeacher, config: DistillConfig) -> tuple[TeacherFeatures, dict[str, str]]:
    """Loads one of our teachers for a student.

    Args:
        choice: name and weights.
        config: layers, grid and image size.

    Returns:
        The teacher on the student's grid, and its name and sha256.

    Raises:
        InputError: no such teacher, a size that is no multiple of its patch, or attention that cannot be compared.
        CheckpointError: unusable weights.
    """
    net = load_teacher(choice.name, choice.weights)
    digest = hashlib.sha256()
    with choice.weights.open("rb") as stream:
        while part := stream.read(1 << 20):
            digest.update(part)
    grid = config.view.image_size // 16
    wanted = FeatureConfig(
        layers=config.layers, student_depth=config.student.depth, teacher_size=config.teacher_size, grid=grid
    )
    features = TeacherFeatures(net, wanted)
    if config.lambda_relation:
        features.check_attention()
    return features, {"name": choice.name, "sha256": digest.hexdigest()}


def _bank(
    cache: Path,
    pool: ImagePool,
    config: DistillConfig,
    features: TeacherFeatures,
    identity: dict[str, str],
    say: Callable[[str], None],
    track: Track,
) -> FeatureBank:
    with one_writer(cache):
        bank = write_bank(
            cache,
            pool,
            config.view,
            features,
            views=config.teacher_views,
            variants=config.variants,
            seed=config.view_seed,
            teacher=identity,
            track=track,
        )
    say(f"teacher features: {bank.shape[0]} views, {bank.shape[1]} tokens of {bank.shape[2]}, {bank.folder.name}")
    return bank


__all__ = [
    "STUDENT_FILE",
    "DistillTeacher",
    "PretrainTask",
    "Track",
    "check_steps",
    "describe_pool",
    "is_first",
    "open_pool",
    "open_teacher",
    "pretrain",
]
