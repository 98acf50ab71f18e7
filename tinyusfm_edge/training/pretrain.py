"""A whole pre-training without labels: pool, teacher, bank, engine, and the student file that comes out.

It puts together what other files define: pictures.py reads, views.py crops and masks, teacher_bank.py asks or remembers
the teacher, distill.py or mae.py says the loss, loop.py takes the steps. It does not know the command line.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tinyusfm_edge.models.checkpoint import save_student
from tinyusfm_edge.models.teachers import load_teacher
from tinyusfm_edge.models.teachers.feature_bank import load as load_bank
from tinyusfm_edge.training.distill import DistillObjective, inactive_stages
from tinyusfm_edge.training.distill_config import DistillConfig, to_json
from tinyusfm_edge.training.foreign_bank import ForeignBank, open_foreign
from tinyusfm_edge.training.lock import one_writer
from tinyusfm_edge.training.loop import Draw, Outcome, ParameterGroup, fit, plain_groups
from tinyusfm_edge.training.mae import MaeObjective
from tinyusfm_edge.training.pictures import Listing, Pool, read_pool
from tinyusfm_edge.training.teacher_bank import (
    FeatureBank,
    FeatureConfig,
    TeacherFeatures,
    draw_entries,
    write_bank,
)
from tinyusfm_edge.training.views import draw_views
from tinyusfm_runtime.errors import InputError
from tinyusfm_runtime.spec import ModelSpec, PreprocessSpec, Task

STUDENT_FILE = "student.safetensors"
"""What a finished run leaves in its folder."""

Track = Callable[[Iterable[Any], str, int], Iterable[Any]]


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherChoice:
    """Which teacher.

    Attributes:
        name: one of ``teachers.names()``.
        weights: its file, or the folder of a feature bank.
    """

    name: str
    weights: Path


class PretrainTask:
    """The engine's task: views of pooled pictures, with cached teacher features where there is a bank."""

    def __init__(
        self,
        pool: Pool,
        config: DistillConfig,
        bank: FeatureBank | ForeignBank | None,
        teacher: TeacherFeatures | None,
        widths: tuple[int, ...],
    ) -> None:
        torch.manual_seed(config.seed)
        self.pool, self.config, self.bank = pool, config, bank
        self._objective: MaeObjective | DistillObjective = (
            MaeObjective(config) if config.method == "mae" else DistillObjective(config, widths, teacher)
        )

    @property
    def objective(self) -> nn.Module:
        """Student and loss."""
        return self._objective

    @property
    def student(self) -> Any:
        """The student inside."""
        return self._objective.student

    def groups(self) -> list[ParameterGroup]:
        """No decay on biases, norms, positions and tokens."""
        return plain_groups(self._objective, self.config.weight_decay)

    def __len__(self) -> int:
        return len(self.pool)

    def batch(self, draws: Sequence[Draw]) -> dict[str, Any]:
        """Views of the drawn pictures; a fixed view of each where variants are set."""
        config = self.config
        if config.variants:
            entries = [d.index * config.variants + d.seed % config.variants for d in draws]
            views = draw_entries(self.pool, entries, config.variants, config.view_seed, config.view)
        else:
            views = draw_views([self.pool.pixels_NSS[d.index] for d in draws], [d.seed for d in draws], config.view)
        if config.method == "mae":
            count = self.student.backbone.grid**2
            order = [torch.randperm(count, generator=torch.Generator().manual_seed(d.seed)) for d in draws]
            return {"image": views.image_B1HW, "order": torch.stack(order)}
        batch: dict[str, Any] = {"image": views.image_B1HW, "mask": views.mask_Bhw, "bands": views.bands_BK}
        if self.bank is not None:
            batch["teacher"] = self.bank.read(entries)
        return batch


def pretrain(
    found: Listing,
    config: DistillConfig,
    out: Path,
    *,
    teacher: TeacherChoice | None = None,
    cache: Path | None = None,
    frame_stride: int = 8,
    allowed_failures: int = 0,
    device: str = "auto",
    say: Callable[[str], None] = lambda text: None,
    track: Track = lambda items, _label, _total: items,
    quiet: bool = False,
) -> Outcome:
    """Runs or resumes a pre-training and writes ``student.safetensors``.

    Args:
        found: pictures of the pool.
        config: settings.
        out: folder of the run.
        teacher: needed unless the method has none.
        cache: folder for decoded pictures and teacher banks; a folder in the run by default.
        frame_stride: every how manieth frame of a cine is taken.
        allowed_failures: files that may fail to decode.
        device: ``auto``, ``cpu`` or ``cuda``.
        say: told what is being done.
        track: wraps slow iterations for a progress bar.
        quiet: no progress of the training.

    Returns:
        How it ended.

    Raises:
        InputError: settings, data or teacher that do not fit each other.
        CheckpointError: unusable teacher weights, or a damaged checkpoint.
        MissingExtra: a library is missing.
        OutputError: no room or no permission.
    """
    if config.needs_teacher and teacher is None:
        raise InputError("this method learns from a teacher: give --teacher and --teacher-weights")
    cache = cache or out / "cache"
    pool = open_pool(found, config, cache, frame_stride=frame_stride, allowed_failures=allowed_failures, track=track)
    say(describe_pool(pool))
    task, identity = _task(pool, config, cache, teacher if config.needs_teacher else None, say, track)
    engine = config.engine(len(pool))
    say(f"{engine.steps} steps of {engine.batch}, {engine.precision}, learning rate {engine.learning_rate:.2g}")
    settings = {
        "kind": "pretrain",
        "config": {k: v for k, v in to_json(config).items() if k not in ("checkpoint_every", "log_every")},
        "pool": {"fingerprint": pool.fingerprint, "pictures": len(pool), "left_out": pool.left_out},
        "teacher": identity,
    }
    outcome = fit(task, engine, out, settings=settings, device=device, quiet=quiet)
    for line in inactive_stages(dict(outcome.scalars), config.inactive_below):
        say(f"warning: {line}")
    if torch.distributed.is_initialized() and torch.distributed.get_rank() != 0:
        return outcome
    size = config.view.image_size
    spec = ModelSpec(
        name=out.name or "student",
        task=Task.FEATURES,
        labels=(),
        preprocess=PreprocessSpec(height=size, width=size),
        origin=f"tinyusfm-edge distill, method {config.method}, teacher {identity['name'] if identity else 'none'}",
    )
    save_student(out / STUDENT_FILE, task.student.cpu(), spec, torch.float32)
    return outcome


def _task(
    pool: Pool,
    config: DistillConfig,
    cache: Path,
    choice: TeacherChoice | None,
    say: Callable[[str], None],
    track: Track,
) -> tuple[PretrainTask, dict[str, str] | None]:
    """The task with whatever answers for the teacher: nothing, a foreign bank, our bank, or the net itself."""
    if choice is None:
        return PretrainTask(pool, config, None, None, ()), None
    if choice.name == "feature_bank":
        foreign = open_foreign(
            load_bank("feature_bank", choice.weights),
            pool,
            config.view,
            views=config.views,
            variants=config.variants,
            seed=config.view_seed,
            stages=len(config.layers),
        )
        return PretrainTask(pool, config, foreign, None, foreign.widths), {"name": choice.name}
    features, identity = open_teacher(choice, config)
    widths = (features.width,) * len(config.layers)
    if not config.variants:
        return PretrainTask(pool, config, None, features, widths), identity
    bank = _bank(cache, pool, config, features, identity, say, track)
    return PretrainTask(pool, config, bank, None, widths), identity


def open_pool(
    found: Listing,
    config: DistillConfig,
    cache: Path,
    *,
    frame_stride: int = 8,
    allowed_failures: int = 0,
    track: Track = lambda items, _label, _total: items,
) -> Pool:
    """Reads the pictures of a listing into a cache, at the size the views need.

    Args:
        found: what to read.
        config: settings.
        cache: folder for decoded pictures.
        frame_stride: every how manieth frame of a cine is taken.
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
            store=cache / f"pictures-{name[:12]}",
            frame_stride=frame_stride,
            allowed_failures=allowed_failures,
            only=found.only,
            track=lambda items: iter(track(items, "pictures", len(rows))),
        )


def describe_pool(pool: Pool) -> str:
    """Lines that say what a pool holds, what was left out and what failed."""
    text = f"{len(pool)} pictures of {len(set(pool.groups))} groups from {len(set(pool.sources))} folders"
    text += "".join(f", {count} left out as {flag}" for flag, count in pool.left_out.items() if count)
    text += "".join(f"\nnot decoded: {f.name} (hash of its id): {f.reason}" for f in pool.failures)
    return text


def open_teacher(choice: TeacherChoice, config: DistillConfig) -> tuple[TeacherFeatures, dict[str, str]]:
    """Loads one of our teachers for a student.

    Args:
        choice: name and weights.
        config: layers, grid and picture size.

    Returns:
        The teacher on the student's grid, and its name and sha256.

    Raises:
        InputError: no such teacher, or a size that is no multiple of its patch.
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
    return TeacherFeatures(net, wanted), {"name": choice.name, "sha256": digest.hexdigest()}


def _bank(
    cache: Path,
    pool: Pool,
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
            views=config.views,
            variants=config.variants,
            seed=config.view_seed,
            teacher=identity,
            track=track,
        )
    say(f"teacher features: {bank.shape[0]} views, {bank.shape[1]} tokens of {bank.shape[2]}, {bank.folder.name}")
    return bank


__all__ = [
    "STUDENT_FILE",
    "PretrainTask",
    "TeacherChoice",
    "Track",
    "describe_pool",
    "open_pool",
    "open_teacher",
    "pretrain",
]
