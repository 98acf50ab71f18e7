"""Quantization-aware training of a student through its own int8 graph.

It learns to answer there as it does in float.

The student's parameters run through the same rewrites and the same grids as the export (graph.live_weights,
fake_quant.py), so what is trained is what is exported, to one step of a grid. The frozen float student is the teacher;
labels are not needed, any frames of the kind will do, and both see them mirrored and brightened at random. Activation
ranges start as the decision's and are learned beside the weights, one factor a tensor (LSQ, Esser et al., ICLR 2020).
BatchNorm keeps its statistics.

Loss (our choice): segmentation, binary cross-entropy (or cross-entropy over classes) against the teacher's
probabilities; classification, KL divergence; both plus the mean squared error of the logits over the teacher's
variance; features, 1 - cosine; with early exits the mean over all answers, each against the teacher's at its place.
AdamW, cosine decay, gradient norm clipped at 1.

A run with the same frames, settings and torch gives the same student; a stopped run goes on from its checkpoint to the
same end. It does not know files of students, tables or the command line.

Shapes: B batch; 1HW codes 0..255; BKHW or BK logits.
Shapes: B frames of a step; codes B 1 H W; logits B K H W (masks) or B K (classes).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from tinyusfm_calibration.ranges import Ranges
from tinyusfm_export.graph.build import build_graph, live_weights
from tinyusfm_export.quantize.decision import QuantDecision, float_decision
from tinyusfm_export.quantize.fake_quant import FakeQuant
from tinyusfm_runtime.atomic import write_file
from tinyusfm_runtime.errors import CalibrationError, InputError
from tinyusfm_runtime.spec import ModelSpec, Task
from tinyusfm_runtime.stop_signal import StopSignal

if TYPE_CHECKING:
    from torch import Tensor, nn

CHECKPOINT_VERSION = 3
"""Version of a checkpoint's content."""
LARGEST_GAIN = 1.25
"""Frames are made up to this much brighter, or darker."""


@dataclass(frozen=True, kw_only=True, slots=True)
class QatConfig:
    """Settings of one run.

    Attributes:
        steps: optimiser steps.
        batch: frames per step.
        learning_rate: peak learning rate.
        range_rate: peak learning rate of the logarithm of the ranges' factors; 0 keeps the decision's ranges.
        weight_decay: on tensors of two or more axes.
        warmup: steps of linear warm-up.
        logit_weight: weight of the logits' squared error.
        seed: of the order of the frames.
        checkpoint_every: steps between checkpoints.
        form: whose grids the activations are rounded to: ``qdq``, symmetric ones as most targets have, or ``static``,
            those of an integer artefact.
    """

    steps: int = 200
    batch: int = 4
    learning_rate: float = 1e-5
    range_rate: float = 2e-3
    weight_decay: float = 0.0
    warmup: int = 10
    logit_weight: float = 0.5
    seed: int = 42
    checkpoint_every: int = 25
    form: Literal["qdq", "static"] = "qdq"

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            InputError: no steps or no batch, or a rate that is not positive.
        """
        if min(self.steps, self.batch, self.checkpoint_every) < 1 or not self.learning_rate > 0:
            raise InputError("QAT needs steps, batch and checkpoint_every of at least 1 and a positive learning rate")
        if self.form not in ("qdq", "static"):
            raise InputError(f"QAT's form is qdq or static, not {self.form!r}")
        if not self.range_rate >= 0:
            raise InputError(f"the ranges' learning rate must not be negative, it is {self.range_rate}")


@dataclass(frozen=True, kw_only=True, slots=True)
class QatResult:
    """A trained student.

    Attributes:
        student: the module, float32, evaluation mode.
        factors: on each activation's range, by tensor name.
        losses: loss of every step of this call.
        best_step: step whose weights these are.
        first_loss: of the untrained student on the first batches, the PTQ loss.
        last_loss: mean of the last tenth of the steps.
    """

    student: nn.Module
    factors: dict[str, float]
    losses: tuple[float, ...]
    best_step: int
    first_loss: float
    last_loss: float

    def learned(self, ranges: Ranges) -> Ranges:
        """The ranges of the trained student, from those that it started with."""
        return learned_ranges(ranges, self.factors)


def learned_ranges(ranges: Ranges, factors: Mapping[str, float]) -> Ranges:
    """Ranges multiplied by what was learned.

    Args:
        ranges: those that training started with.
        factors: on each activation's range, by tensor name; an empty table changes nothing.
    """
    if not factors:
        return ranges
    scaled = {
        name: (low * factors.get(name, 1.0), high * factors.get(name, 1.0))
        for name, (low, high) in ranges.tensors.items()
    }
    return replace(ranges, tensors=scaled, method=f"{ranges.method}, learned")


def finetune(
    student: nn.Module,
    spec: ModelSpec,
    decision: QuantDecision,
    frames_1HW: Sequence[np.ndarray],
    config: QatConfig,
    *,
    checkpoint: Path | None = None,
    progress: Callable[[str, float], None] | None = None,
    cost: Callable[[nn.Module, Mapping[str, float]], float] | None = None,
) -> QatResult:
    """Trains a copy of a student through its int8 graph.

    Args:
        student: the float student; it is only read, and teaches.
        spec: its spec.
        decision: an int8 decision with static ranges.
        frames_1HW: preprocessed frames, uint8 1xHxW of the model's input size.
        config: settings.
        checkpoint: file to resume from and to write to, or None.
        progress: called with the step and the share done.
        cost: of a student and its ranges' factors on frames that do not teach, lower is better; the weights of the best
            checkpoint are kept then, else the last ones.

    Returns:
        The trained student and its losses.

    Raises:
        KeyboardInterrupt: Ctrl-C or SIGTERM; with a checkpoint file the run was saved first, which the message says.
        CalibrationError: no frames.
        InputError: the checkpoint belongs to another run, or student and spec do not fit.
        UnsupportedError: the decision has dynamic tensors.
    """
    import torch

    if not frames_1HW:
        raise CalibrationError("QAT needs frames: give --data DIR with frames of the training split")
    progress = progress or (lambda what, share: None)
    teacher = copy.deepcopy(student).eval().requires_grad_(False)
    run = _Run(copy.deepcopy(student).eval(), teacher, spec, decision, config)
    if checkpoint is not None and checkpoint.is_file():
        run.resume(checkpoint)
    losses: list[float] = []
    with torch.random.fork_rng(devices=[]), StopSignal() as stop:
        while run.step < config.steps:
            losses.append(run.advance(frames_1HW))
            progress("quantization-aware training", run.step / config.steps)
            due = run.step % config.checkpoint_every == 0 or run.step == config.steps
            if due and cost is not None:
                run.keep_best(cost)
            if checkpoint is not None and (due or stop.heard):
                run.save(checkpoint)
            if stop.heard and run.step < config.steps:
                saved = "; saved. Run the same command to go on" if checkpoint is not None else ", nothing was saved"
                stop.leave(f"stopped at step {run.step} of {config.steps}{saved}")
    run.take_best()
    history = [*run.history]
    tail = history[-max(1, len(history) // 10) :]
    return QatResult(
        student=run.student.requires_grad_(False),
        factors=run.factors,
        losses=tuple(losses),
        best_step=run.best_step or run.step,
        first_loss=float(np.mean(history[: max(1, len(history) // 20)])),
        last_loss=float(np.mean(tail)),
    )


class _Run:
    """Everything that moves, so that it can be saved."""

    def __init__(
        self, student: nn.Module, teacher: nn.Module, spec: ModelSpec, decision: QuantDecision, config: QatConfig
    ) -> None:
        import torch

        self.student, self.spec, self.config = student.requires_grad_(True), spec, config
        # the float graph of the untouched student: the teacher that the int8 graph should agree with
        self.teacher = FakeQuant(build_graph(teacher, spec), float_decision("fp32"))
        self.fake = FakeQuant(build_graph(student, spec), decision, form=config.form)
        static = decision.quantized() if config.range_rate else {}
        # a logarithm keeps a range's factor positive; 0 leaves the decision's range
        self.log_factors = {name: torch.zeros((), requires_grad=True) for name in static}
        # biases, norms and tokens: one axis, never decayed
        plain = [p for p in student.parameters() if p.ndim < 2]
        matrices = [p for p in student.parameters() if p.ndim >= 2]
        groups = [
            {"params": matrices, "weight_decay": config.weight_decay},
            {"params": plain, "weight_decay": 0.0},
            {"params": [*self.log_factors.values()], "weight_decay": 0.0},
        ]
        self.optimiser = torch.optim.AdamW(groups, lr=config.learning_rate)
        self.step = 0
        self.history: list[float] = []
        self.best_cost, self.best_step = float("inf"), 0
        self.best: dict[str, dict[str, Any]] = {}
        self.identity = {"decision": decision.to_json(), "config": asdict(config), "weights": spec.weights_sha256}

    def advance(self, frames_1HW: Sequence[np.ndarray]) -> float:
        """One optimiser step; returns the loss."""
        import torch
        from torch import nn

        # (B, 1, H, W) uint8
        chosen = np.stack([frames_1HW[i] for i in self._batch(len(frames_1HW))])
        codes = torch.from_numpy(vary(chosen, np.random.default_rng((self.config.seed, 1, self.step))))
        with torch.no_grad():
            # one tensor per answer: each early exit's logits, the end's last
            wanted = self.teacher.answers(codes)
        # three groups: matrices, plain tensors, factors of the ranges
        peaks = (self.config.learning_rate, self.config.learning_rate, self.config.range_rate)
        for group, peak in zip(self.optimiser.param_groups, peaks, strict=True):
            group["lr"] = peak * self._share()
        factors = {name: value.exp() for name, value in self.log_factors.items()}
        # folded again at every step, so gradients reach the student through the rewrites
        found = self.fake.answers(codes, live_weights(self.student, self.spec), factors)
        loss = torch.stack(
            [distance(a, b, self.spec.task, self.config.logit_weight) for a, b in zip(found, wanted, strict=True)]
        ).mean()
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        # the factors are left out: a single scalar each, at a rate of its own
        nn.utils.clip_grad_norm_(self.student.parameters(), 1.0)
        self.optimiser.step()
        self.step += 1
        self.history.append(float(loss.detach()))
        return self.history[-1]

    @property
    def factors(self) -> dict[str, float]:
        """On each activation's range, by tensor name."""
        return {name: math.exp(float(value.detach())) for name, value in self.log_factors.items()}

    def keep_best(self, cost: Callable[[nn.Module, Mapping[str, float]], float]) -> None:
        """Keeps these weights if they cost less than all before."""
        import torch

        with torch.no_grad():
            found = cost(self.student, self.factors)
        if found < self.best_cost:
            self.best_cost, self.best_step = found, self.step
            self.best = {
                "student": {name: value.detach().clone() for name, value in self.student.state_dict().items()},
                "log_factors": {name: value.detach().clone() for name, value in self.log_factors.items()},
            }

    def take_best(self) -> None:
        """Puts the best weights back, where some were kept."""
        if self.best:
            self._put(self.best)

    def _put(self, state: Mapping[str, Any]) -> None:
        import torch

        self.student.load_state_dict(state["student"])
        with torch.no_grad():
            for name, value in self.log_factors.items():
                value.copy_(state["log_factors"][name])

    def _batch(self, count: int) -> list[int]:
        """Frames of this step: a new seeded order every pass, whatever was run before."""
        wanted = range(self.step * self.config.batch, (self.step + 1) * self.config.batch)
        # a batch may span two passes, each with an order of its own seed
        orders = {n // count: None for n in wanted}
        shuffled = {turn: np.random.default_rng((self.config.seed, turn)).permutation(count) for turn in orders}
        return [int(shuffled[n // count][n % count]) for n in wanted]

    def _share(self) -> float:
        """Of the peak learning rate, at this step."""
        c = self.config
        warm = min(1.0, (self.step + 1) / max(1, c.warmup))
        # cosine from 1 to 0.05 of the peak
        return warm * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * self.step / c.steps)))

    def save(self, path: Path) -> None:
        """Writes the checkpoint, whole or not at all.

        Raises:
            OutputError: no room or no permission; the checkpoint before still stands.
        """
        import io

        import torch

        state = {
            "version": CHECKPOINT_VERSION,
            "identity": self.identity,
            "step": self.step,
            "history": self.history,
            "student": self.student.state_dict(),
            "log_factors": {name: value.detach() for name, value in self.log_factors.items()},
            "optimiser": self.optimiser.state_dict(),
            "best": {"cost": self.best_cost, "step": self.best_step, **self.best},
        }
        packed = io.BytesIO()
        torch.save(state, packed)
        write_file(path, packed.getvalue(), "the QAT checkpoint")

    def resume(self, path: Path) -> None:
        """Takes up a checkpoint.

        Raises:
            InputError: it cannot be read, belongs to another run, or is longer than this one.
        """
        import torch

        try:
            state: dict[str, Any] = torch.load(path, weights_only=True)
        except Exception as error:  # torch raises many things for damaged files
            raise InputError(f"the QAT checkpoint cannot be read ({type(error).__name__}): remove it") from error
        if state.get("version") != CHECKPOINT_VERSION or _lasting(state.get("identity")) != _lasting(self.identity):
            raise InputError("the QAT checkpoint belongs to another run: remove it, or use the same settings")
        if state["step"] > self.config.steps:
            raise InputError(
                f"{state['step']} steps were taken already, {self.config.steps} are asked for: give more, or remove "
                "the QAT checkpoint"
            )
        self.step, self.history = int(state["step"]), list(state["history"])
        self._put(state)
        self.optimiser.load_state_dict(state["optimiser"])
        best = state["best"]
        self.best_cost, self.best_step = float(best["cost"]), int(best["step"])
        self.best = {key: best[key] for key in ("student", "log_factors") if key in best}


def _lasting(identity: Any) -> Any:
    """What a run must share with its checkpoint.

    Everything but its length and how often it is saved.
    """
    if not isinstance(identity, dict) or not isinstance(identity.get("config"), dict):
        return None
    config = {name: v for name, v in identity["config"].items() if name not in ("steps", "checkpoint_every")}
    return {**identity, "config": config}


def vary(codes_B1HW: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Mirrors each frame and changes its brightness at random.

    Along rows and along columns with probability 1/2 each; the brightness is multiplied by a factor.

    Args:
        codes_B1HW: uint8.
        rng: the source of chance.

    Returns:
        Whole codes 0..255 as float32 B1HW; the factor is 0.8 to 1.25, even on a logarithmic scale.
    """
    varied = []
    for codes in codes_B1HW:
        # (1, H, W), each of the two axes mirrored or not
        flipped = codes[:, :: -1 if rng.random() < 0.5 else 1, :: -1 if rng.random() < 0.5 else 1]
        factor = math.exp(rng.uniform(-1, 1) * math.log(LARGEST_GAIN))
        varied.append(np.rint(np.clip(flipped * np.float32(factor), 0, 255)).astype(np.float32))
    return np.stack(varied)


def distance(found: Tensor, wanted: Tensor, task: Task, logit_weight: float) -> Tensor:
    """How far an answer lies from the teacher's, the loss of the module's docstring.

    Args:
        found: logits BKHW or BK.
        wanted: the teacher's, without gradient.
        task: what they answer.
        logit_weight: weight of the squared error.
    """
    import torch
    import torch.nn.functional as F

    if task is Task.FEATURES:
        return (1 - F.cosine_similarity(found.flatten(1), wanted.flatten(1))).mean()
    # relative to the teacher's own spread, so one weight suits every student
    squared = F.mse_loss(found, wanted) / wanted.var().clamp_min(1e-6)
    # one channel: a probability per pixel
    if found.shape[1] == 1:
        soft = torch.sigmoid(wanted)
        # without the teacher's own entropy, so that 0 is the best there is
        floor = F.binary_cross_entropy_with_logits(wanted, soft)
        return F.binary_cross_entropy_with_logits(found, soft) - floor + logit_weight * squared
    # K channels: over the classes at each position
    kl = F.kl_div(found.log_softmax(1), wanted.log_softmax(1), log_target=True, reduction="none").sum(1).mean()
    return kl + logit_weight * squared


__all__ = [
    "CHECKPOINT_VERSION",
    "LARGEST_GAIN",
    "QatConfig",
    "QatResult",
    "distance",
    "finetune",
    "learned_ranges",
    "vary",
]
