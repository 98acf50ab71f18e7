"""The training engine: one loop for distillation and adaptation.

On one CPU, one GPU, or many by ``torchrun``.

Built on Lightning Fabric, not accelerate: Fabric leaves the loop in our hands (what is drawn, when weights are written,
which scalars go out), reads torchrun's environment itself, and its checkpoints are ours to define; accelerate pickles
its random states and keeps its own sampler, and both would stand in the way of bit-exact resumption with
``weights_only=True``. Fabric brings neither torchvision nor torchmetrics.

What makes a run repeat: the samples of a step follow from (seed, step) alone, never from the number of processes;
each sample gets a seed of its own; torch is seeded again before every step. So a run that was killed goes on from its
last checkpoint to the same bits (for one number of processes), and two processes see what one with the whole batch
sees: with losses that are means over samples, the curve is the same up to the order of sums.

It does not know any model, loss or data set: a ``TrainingTask`` brings those.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from tinyusfm_edge.training.trainer.checkpoints import RunFolder, TrainerState, read_scalars
from tinyusfm_edge.training.trainer.lock import one_run
from tinyusfm_edge.training.trainer.progress import Progress, in_plain_words
from tinyusfm_runtime.errors import InputError, MissingExtra
from tinyusfm_runtime.stop_signal import StopSignal

Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainerConfig:
    """Settings of the loop.

    Attributes:
        steps: optimiser steps.
        batch: samples per step, over all processes and accumulated parts.
        learning_rate: peak learning rate; a group's ``scale`` multiplies it.
        final_learning_rate: at the last step.
        warmup: steps of linear warm-up, then cosine.
        betas: of AdamW.
        clip: largest norm of the gradient; 0 is off.
        accumulate: parts a step is computed in, each ``batch / processes / accumulate`` samples.
        precision: ``fp32`` or ``bf16`` (autocast); see ``natural_precision``.
        seed: of everything.
        checkpoint_every: steps between checkpoints.
        log_every: steps between scalars, which are means over those steps.
        ema: decay of the weights' moving average, by which is evaluated; 0 is off.
    """

    steps: int
    batch: int
    learning_rate: float
    final_learning_rate: float = 1e-6
    warmup: int = 0
    betas: tuple[float, float] = (0.9, 0.999)
    clip: float = 0.0
    accumulate: int = 1
    precision: Precision = "fp32"
    seed: int = 42
    checkpoint_every: int = 100
    log_every: int = 10
    ema: float = 0.0

    def __post_init__(self) -> None:
        """Checks what would otherwise fail late.

        Raises:
            InputError: a count below 1, a rate that is not positive, a negative seed, or an unknown precision.
        """
        counts = (self.steps, self.batch, self.accumulate, self.checkpoint_every, self.log_every)
        if min(counts) < 1 or self.warmup < 0:
            raise InputError("steps, batch, accumulate, checkpoint_every and log_every must be at least 1, warmup 0")
        if not self.learning_rate > 0 or self.final_learning_rate < 0 or self.clip < 0 or not 0 <= self.ema < 1:
            raise InputError("learning_rate must be above 0, final_learning_rate and clip not below 0, ema in [0, 1)")
        if self.seed < 0:
            raise InputError(f"seed {self.seed} is negative: use 0 or more")
        if self.precision not in ("fp32", "bf16"):
            raise InputError(f"precision {self.precision!r} is unknown: use fp32 or bf16")


@dataclass(frozen=True, kw_only=True, slots=True)
class Draw:
    """One sample to be made.

    Attributes:
        index: which item, 0..len-1; every item comes once an epoch.
        seed: of this sample's randomness (masks, crops), a function of the run's seed and the sample's position.
        position: running number of the sample in the run.
    """

    index: int
    seed: int
    position: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ParameterGroup:
    """Parameters that share a learning rate and a weight decay.

    Attributes:
        name: for logs.
        parameters: trainable ones.
        weight_decay: of AdamW.
        scale: multiplies the learning rate at every step.
    """

    name: str
    parameters: list[nn.Parameter]
    weight_decay: float
    scale: float = 1.0


class TrainingTask(Protocol):
    """What the engine trains: four members."""

    @property
    def objective(self) -> nn.Module:
        """A module whose ``forward(batch)`` gives the loss and scalars by name.

        The loss is a mean over samples; the scalars are logged.
        """
        ...

    def groups(self) -> list[ParameterGroup]:
        """Every trainable parameter of the objective, once."""
        ...

    def __len__(self) -> int:
        """Items to draw from."""
        ...

    def batch(self, draws: Sequence[Draw]) -> Any:
        """Tensors (in tuples or mappings) of these samples, on the CPU.

        Called from another thread, ahead of time.
        """
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """A measurement that is taken now and then, in evaluation mode.

    On the moving average where there is one.

    Attributes:
        every: steps between measurements; the last step is always measured.
        measure: gives scalars by name; runs in the first process only.
        best_by: the scalar by which the best weights are kept, higher is better, or empty.
    """

    every: int
    measure: Callable[[], Mapping[str, float]]
    best_by: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """How a run ended.

    Attributes:
        steps: optimiser steps taken since the beginning.
        best: best value of ``best_by``, or None.
        best_step: when that was.
        images_per_s: of this process's part of the run, start-up left out; 0 if nothing was left to do.
        scalars: the last ones.
    """

    steps: int
    best: float | None
    best_step: int
    images_per_s: float
    scalars: Mapping[str, float] = field(default_factory=dict)


def natural_precision() -> Precision:
    """bf16 where the hardware computes in it, fp32 elsewhere.

    CUDA from Ampere, CPUs with AMX or AVX512-BF16.

    On other CPUs bfloat16 is emulated: measured 10 times slower than fp32 on AVX2.
    """
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    from tinyusfm_runtime.device.machine import machine_card

    return "bf16" if {"amx_bf16", "avx512_bf16"} & set(machine_card().features) else "fp32"


def plain_groups(
    module: nn.Module, weight_decay: float, scale_of: Callable[[str], float] | None = None
) -> list[ParameterGroup]:
    """Groups of parameters by decay and learning-rate scale.

    No decay on biases, norms, positions and tokens.

    Args:
        module: its trainable parameters are grouped.
        weight_decay: of matrices and kernels.
        scale_of: parameter name -> scale of the learning rate, 1 for all by default.

    Returns:
        Groups in a fixed order; every trainable parameter is in exactly one.
    """
    found: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            bare = parameter.ndim < 2 or name.rpartition(".")[2] in ("pos_embed", "cls_token", "mask_token")
            scale = 1.0 if scale_of is None else scale_of(name)
            found.setdefault((scale, 0.0 if bare else weight_decay), []).append(parameter)
    return [
        ParameterGroup(name=f"x{scale:g} decay {decay:g}", parameters=parameters, weight_decay=decay, scale=scale)
        for (scale, decay), parameters in sorted(found.items(), key=lambda item: item[0])
    ]


def learning_rate(config: TrainerConfig, step: int) -> float:
    """Learning rate of a step (from 0): linear warm-up, then cosine.

    The warm-up reaches the peak at its end, the cosine falls to the final rate.
    """
    if step < config.warmup:
        return config.learning_rate * (step + 1) / config.warmup
    progress = (step - config.warmup) / max(1, config.steps - 1 - config.warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return config.final_learning_rate + (config.learning_rate - config.final_learning_rate) * cosine


def stable_seed(*parts: object) -> int:
    """A seed in 0..2^63-1 from any parts, equal on every machine."""
    text = ":".join(map(str, parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def draws_of_step(num_items: int, batch: int, seed: int, step: int) -> list[Draw]:
    """The samples of a step: whole epochs in seeded orders, one after another.

    The same ones, whatever the number of processes.

    Args:
        num_items: items to draw from.
        batch: samples per step.
        seed: of the run.
        step: from 0.

    Returns:
        ``batch`` draws.
    """
    found = []
    orders: dict[int, np.ndarray] = {}
    for position in range(step * batch, (step + 1) * batch):
        epoch, place = divmod(position, num_items)
        if epoch not in orders:
            orders[epoch] = np.random.default_rng([seed, epoch]).permutation(num_items)
        found.append(
            Draw(index=int(orders[epoch][place]), seed=stable_seed("sample", seed, position), position=position)
        )
    return found


def fit(
    task: TrainingTask,
    config: TrainerConfig,
    out: Path,
    *,
    settings: Mapping[str, Any],
    evaluation: Evaluation | None = None,
    device: str = "auto",
    quiet: bool = False,
    stop_after_s: float = 0.0,
) -> Outcome:
    """Runs or resumes a training.

    Args:
        task: what is trained.
        config: settings of the loop.
        out: folder of the run; a run in it with the same settings is resumed from its last checkpoint.
        settings: everything else that defines the run, as plain data; a folder with other settings is refused.
        evaluation: a measurement, or None.
        device: ``auto``, ``cpu`` or ``cuda``.
        quiet: print nothing.
        stop_after_s: seconds after which a checkpoint is written and the run ends before its last step; 0 never. One
            process only.

    Returns:
        How it ended; ``steps`` says how far it came.

    Raises:
        InputError: settings that do not fit each other, the processes or the run in the folder, or a folder in which
            another run is.
        KeyboardInterrupt: Ctrl-C or SIGTERM; a checkpoint was written first, which the message says.
        MissingExtra: Lightning Fabric is not installed.
        OutputError: the folder cannot be written.
    """
    if len(task) < 1:
        raise InputError("there is nothing to train on")
    loop = _Loop(task, config, out, evaluation, device, quiet)
    loop.stop_after_s = stop_after_s
    return loop.run({"engine": _engine_settings(config), **settings})


def _engine_settings(config: TrainerConfig) -> dict[str, Any]:
    from dataclasses import asdict

    values = asdict(config)
    # how often is written does not change what is computed
    for name in ("checkpoint_every", "log_every"):
        values.pop(name)
    return {**values, "betas": list(config.betas)}


class _Loop:
    """The moving parts of one run."""

    def __init__(
        self,
        task: TrainingTask,
        config: TrainerConfig,
        out: Path,
        evaluation: Evaluation | None,
        device: str,
        quiet: bool,
    ) -> None:
        self.task, self.config, self.evaluation, self.quiet = task, config, evaluation, quiet
        self.fabric = _fabric(config, device)
        self.folder = RunFolder(out, writes=self.fabric.is_global_zero)
        self.state = TrainerState()
        world = self.fabric.world_size
        if config.batch % (world * config.accumulate):
            raise InputError(
                f"batch {config.batch} does not divide into {world} processes x {config.accumulate} accumulated parts"
            )
        self.part = config.batch // (world * config.accumulate)
        groups = task.groups()
        self._check_groups(groups)
        self.scales = [group.scale for group in groups]
        self.optimiser: Any = torch.optim.AdamW(
            [{"params": g.parameters, "weight_decay": g.weight_decay} for g in groups],
            lr=config.learning_rate,
            betas=config.betas,
        )
        self.objective: Any = None
        self.average: dict[str, Tensor] = {}
        self.stop_after_s = 0.0

    def _check_groups(self, groups: list[ParameterGroup]) -> None:
        grouped = [id(p) for group in groups for p in group.parameters]
        wanted = [id(p) for p in self.task.objective.parameters() if p.requires_grad]
        if sorted(grouped) != sorted(wanted):
            raise InputError("every trainable parameter must stand in exactly one group")

    def run(self, settings: Mapping[str, Any]) -> Outcome:
        """Settles the folder and trains; the folder is this run's alone meanwhile."""
        fabric = self.fabric
        with one_run(self.folder.path) if fabric.is_global_zero else contextlib.nullcontext():
            self.folder.settle(settings)
            fabric.barrier()
            return self._train()

    def _train(self) -> Outcome:
        """Takes up a checkpoint and trains to the end, or to a signal.

        A signal is answered with a checkpoint.
        """
        fabric, config = self.fabric, self.config
        self.objective, self.optimiser = fabric.setup(self.task.objective, self.optimiser)
        self._resume()
        if config.ema and not self.average:
            self.average = {name: value.clone() for name, value in self._saved().items()}
        begun = started = time.monotonic()
        first = self.state.step
        latest: dict[str, float] = {}
        with (
            self.folder.scalars(self.state.step) as write,
            Progress(config.steps, self.state.step, config.batch, quiet=self.quiet or not fabric.is_global_zero) as bar,
            contextlib.closing(self._batches()) as batches,
            StopSignal(bar.say) as stop,
        ):
            sums: dict[str, Tensor] = {}
            for parts in batches:
                latest_parts = self._step(parts)
                for name, value in latest_parts.items():
                    sums[name] = sums.get(name, torch.zeros((), device=value.device)) + value
                self.state.step += 1
                if self.state.step % config.log_every == 0 or self.state.step == config.steps:
                    latest = self._mean(sums, (self.state.step - 1) % config.log_every + 1)
                    sums = {}
                    latest["learning_rate"] = learning_rate(config, self.state.step - 1)
                    latest["images_per_s"] = bar.rate
                    self._check_finite(latest)
                    write(self.state.step, latest)
                bar.advance(latest)
                self._now_and_then(write, bar)
                if self.state.step == first + 1:
                    started = time.monotonic()  # the first step warms everything up
                if 0 < self.stop_after_s < time.monotonic() - begun and self.state.step < config.steps:
                    self._save()
                    break
                if stop.heard and self.state.step < config.steps:
                    self._save()
                    stop.leave(
                        f"stopped at step {self.state.step} of {config.steps}; saved. Run the same command to go on"
                    )
        done = self.state.step - first - 1
        rate = done * config.batch / (time.monotonic() - started) if done > 0 else 0.0
        best = self.state.best if self.state.best_step else None
        return Outcome(
            steps=self.state.step, best=best, best_step=self.state.best_step, images_per_s=rate, scalars=latest
        )

    def _save(self) -> None:
        if self.fabric.is_global_zero:
            self.folder.save(self._saved(), self.average, self.optimiser.state_dict(), self.state)

    def _check_finite(self, latest: Mapping[str, float]) -> None:
        if not math.isfinite(latest["loss"]):
            raise InputError(
                f"the loss is {latest['loss']} at step {self.state.step}: lower the learning rate, or set clip"
            )

    def _now_and_then(self, write: Callable[[int, Mapping[str, float]], None], bar: Progress) -> None:
        step, last = self.state.step, self.state.step == self.config.steps
        evaluation = self.evaluation
        if evaluation is not None and (step % evaluation.every == 0 or last):
            if self.fabric.is_global_zero:
                with self._averaged():
                    found = dict(evaluation.measure())
                    write(step, found)
                    better = bool(evaluation.best_by) and found[evaluation.best_by] > self.state.best
                    bar.say(f"step {step}/{self.config.steps}: {in_plain_words(found)}{' (best)' if better else ''}")
                    if better:
                        self.state.best, self.state.best_step = found[evaluation.best_by], step
                        self.folder.write_weights("best.safetensors", self._saved())
            self.fabric.barrier()
        if step % self.config.checkpoint_every == 0 or last:
            self._save()
            self.fabric.barrier()

    def _batches(self) -> Generator[list[Any], None, None]:
        """The parts of every remaining step, one step ahead of its use."""
        with ThreadPoolExecutor(1, thread_name_prefix="batches") as pool:
            ahead = pool.submit(self._make, self.state.step)
            for step in range(self.state.step, self.config.steps):
                parts = ahead.result()
                if step + 1 < self.config.steps:
                    ahead = pool.submit(self._make, step + 1)
                yield parts

    def _make(self, step: int) -> list[Any]:
        draws = draws_of_step(len(self.task), self.config.batch, self.config.seed, step)
        # samples are assigned in rows: part by part, and in a part process by process
        starts = [
            (index * self.fabric.world_size + self.fabric.global_rank) * self.part
            for index in range(self.config.accumulate)
        ]
        return [self.task.batch(draws[start : start + self.part]) for start in starts]

    def _step(self, parts: list[Any]) -> dict[str, Tensor]:
        config, fabric, step = self.config, self.fabric, self.state.step
        rate = learning_rate(config, step)
        for group, scale in zip(self.optimiser.param_groups, self.scales, strict=True):
            group["lr"] = rate * scale
        self.objective.train()
        sums: dict[str, Tensor] = {}
        for index, part in enumerate(parts):
            torch.manual_seed(stable_seed("step", config.seed, step, index, fabric.global_rank))
            with fabric.no_backward_sync(self.objective, enabled=index < len(parts) - 1):
                loss, scalars = self.objective(fabric.to_device(part))
                fabric.backward(loss / len(parts))
            for name, value in {"loss": loss, **scalars}.items():
                sums[name] = sums.get(name, torch.zeros((), device=value.device)) + value.detach() / len(parts)
        if config.clip:
            sums["gradient_norm"] = fabric.clip_gradients(
                self.objective, self.optimiser, max_norm=config.clip, error_if_nonfinite=False
            ).detach()
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self._follow()
        return sums

    @torch.no_grad()
    def _follow(self) -> None:
        if self.config.ema:
            # a young average follows faster (the rule of tf.train.ExponentialMovingAverage)
            decay = min(self.config.ema, (1 + self.state.step) / (10 + self.state.step))
            for name, value in self._saved().items():
                mean = self.average[name]
                mean.lerp_(value, 1 - decay) if mean.is_floating_point() else mean.copy_(value)

    def _mean(self, sums: dict[str, Tensor], count: int) -> dict[str, float]:
        """Means over steps and processes, in one exchange."""
        names = sorted(sums)
        values = torch.stack([sums[name].float() for name in names]) / count
        means = self.fabric.all_reduce(values, reduce_op="mean")
        return dict(zip(names, torch.as_tensor(means).tolist(), strict=True))

    def _saved(self) -> dict[str, Tensor]:
        """Trained parameters and buffers; what is frozen never changes and is not stored."""
        frozen = {name for name, p in self.task.objective.named_parameters() if not p.requires_grad}
        return {name: v.detach() for name, v in self.task.objective.state_dict().items() if name not in frozen}

    @contextlib.contextmanager
    def _averaged(self) -> Iterator[None]:
        """Evaluation mode, with the averaged weights in place."""
        objective = self.task.objective
        kept = {name: value.clone() for name, value in self._saved().items()} if self.average else {}
        try:
            objective.eval()
            if self.average:
                objective.load_state_dict(self.average, strict=False)
            yield
        finally:
            if kept:
                objective.load_state_dict(kept, strict=False)
            objective.train()

    def _resume(self) -> None:
        found = self.folder.load(str(self.fabric.device))
        if found is None:
            return
        weights, average, optimiser, self.state = found
        wanted = set(self._saved())
        if set(weights) != wanted:
            raise InputError(
                f"the checkpoint in {self.folder.path} is of another model: {len(wanted ^ set(weights))} names differ"
            )
        self.task.objective.load_state_dict(weights, strict=False)
        self.average = average
        self.optimiser.load_state_dict(optimiser)
        if not self.quiet and self.fabric.is_global_zero:
            print(f"resumed at step {self.state.step} of {self.config.steps}", flush=True)


def _fabric(config: TrainerConfig, device: str) -> Any:
    """A Fabric that has joined its processes, if torchrun started any."""
    try:
        from lightning_fabric import Fabric
        from lightning_fabric.strategies import DDPStrategy
    except ImportError as error:
        raise MissingExtra("training", "lightning-fabric", "train") from error
    world, local = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    precision = {"fp32": "32-true", "bf16": "bf16-mixed"}[config.precision]
    accelerator = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    if accelerator == "cuda" and not torch.cuda.is_available():
        raise InputError("device cuda was asked for and there is none: leave the device out or give cpu")
    if accelerator == "cuda":
        torch.use_deterministic_algorithms(True, warn_only=True)
    strategy: Any = "auto"
    if world > 1:
        strategy = DDPStrategy(process_group_backend="nccl" if accelerator == "cuda" else "gloo")
    fabric = Fabric(
        accelerator=accelerator,
        devices=local if world > 1 else 1,
        num_nodes=max(1, world // local),
        strategy=strategy,
        precision=precision,  # type: ignore[arg-type]
    )
    fabric.launch()
    return fabric


__all__ = [
    "Draw",
    "Evaluation",
    "Outcome",
    "ParameterGroup",
    "Precision",
    "TrainerConfig",
    "TrainingTask",
    "draws_of_step",
    "fit",
    "learning_rate",
    "natural_precision",
    "plain_groups",
    "read_scalars",
    "stable_seed",
]
