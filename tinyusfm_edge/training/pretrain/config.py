"""Settings of a distillation, and the named ablations of them.

They are read from JSON and ``key=value``.

A re-implementation: not the authors' code; hyper-parameters ours. What the published figure shows and what is our
choice stands in methods.md 1.10 and 1.11; every choice is a field here. It does not know networks or data.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tinyusfm_edge.models.student import StudentConfig
from tinyusfm_edge.settings import build, merge, parse_change, read_settings, to_json
from tinyusfm_edge.training.pretrain.views import VIEWS, ViewConfig
from tinyusfm_edge.training.trainer.loop import Precision, TrainerConfig, natural_precision
from tinyusfm_runtime.errors import InputError

BASE_BATCH = 32
"""Images per step of the measured runs."""
LEAST_STEPS = 500
"""Fewer optimiser steps teach a student next to nothing: such a run must be asked for."""

Method = Literal["distill", "mae", "dino"]


@dataclass(frozen=True, kw_only=True, slots=True)
class MaeConfig:
    """The plain MAE baseline (MAE-Lite's recipe, methods.md 1.9).

    Attributes:
        ratio: share of patches the encoder never sees.
        width: of the decoder.
        depth: blocks of the decoder.
        heads: of the decoder.
        norm_pixels: targets are normalised patch by patch.
    """

    ratio: float = 0.75
    width: int = 96
    depth: int = 1
    heads: int = 3
    norm_pixels: bool = True

    def __post_init__(self) -> None:
        """Checks the sizes.

        Raises:
            InputError: a ratio outside (0, 1), or a width that heads do not divide.
        """
        if not 0 < self.ratio < 1 or self.width % self.heads or self.width % 4 or self.depth < 1:
            raise InputError("mae: ratio in (0, 1), width a multiple of 4 and of heads, depth at least 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class DinoConfig:
    """The self-distillation baseline.

    DINO (Caron et al. 2021, arXiv 2104.14294, section 3). Outputs, crops and the length of the schedules are ours:
    smaller than published, for pools of thousands of images.

    Attributes:
        local_crops: small crops an image beside the two global ones; the student alone sees them.
        local_size: side of a small crop, a multiple of 16 from 32 on; 0 is three sevenths of the image's side.
        global_area: smallest and largest share of the image's area in a global crop.
        local_area: the same of a small crop.
        hidden: width of the projection head.
        bottleneck: width before its last layer.
        outputs: of the head, over which the softmax is taken.
        student_temperature: of the student's softmax.
        teacher_temperature: of the teacher's softmax at the first step; lower is sharper.
        last_teacher_temperature: after ``temperature_warmup``.
        temperature_warmup: share of the steps over which it rises in a line.
        momentum: of the teacher's moving average at the first step; it rises to 1 along half a cosine.
        centre_momentum: of the moving mean that is taken off the teacher's outputs; 1 leaves it at 0.
        freeze_last: share of the steps at the start in which the head's last layer stands still.
        saved: whose backbone the student file holds.
        collapsed_below: information between image and output, as a share of what a batch could tell, below which the
            run is said to have collapsed.
    """

    local_crops: int = 4
    local_size: int = 0
    global_area: tuple[float, float] = (0.4, 1.0)
    local_area: tuple[float, float] = (0.05, 0.4)
    hidden: int = 2048
    bottleneck: int = 256
    outputs: int = 4096
    student_temperature: float = 0.1
    teacher_temperature: float = 0.04
    last_teacher_temperature: float = 0.07
    temperature_warmup: float = 0.3
    momentum: float = 0.996
    centre_momentum: float = 0.9
    freeze_last: float = 0.01
    saved: Literal["teacher", "student"] = "teacher"
    collapsed_below: float = 0.05

    def __post_init__(self) -> None:
        """Checks the ranges.

        Raises:
            InputError: naming the fields.
        """
        for low, high in (self.global_area, self.local_area):
            if not 0 < low <= high <= 1:
                raise InputError("dino: global_area and local_area rise within (0, 1]")
        if not 0 <= self.local_crops <= 16 or self.local_size % 16 or 0 < self.local_size < 32:
            raise InputError("dino: local_crops from 0 to 16, local_size a multiple of 16 from 32 on, or 0")
        if min(self.hidden, self.bottleneck) < 1 or self.outputs < 2:
            raise InputError("dino: hidden and bottleneck are at least 1, outputs at least 2")
        if min(self.student_temperature, self.teacher_temperature, self.last_teacher_temperature) <= 0:
            raise InputError("dino: temperatures are above 0")
        shares = (self.temperature_warmup, self.momentum, self.centre_momentum, self.freeze_last, self.collapsed_below)
        if min(shares) < 0 or max(shares) > 1:
            raise InputError(
                "dino: temperature_warmup, momentum, centre_momentum, freeze_last and collapsed_below lie in [0, 1]"
            )
        if self.saved not in ("teacher", "student"):
            raise InputError("dino: saved is teacher or student")

    def local_side(self, image_size: int) -> int:
        """Side of a small crop of images of this side.

        As published, 96 of 224 pixels.
        """
        return self.local_size or max(32, 16 * round(3 * image_size / (7 * 16)))


@dataclass(frozen=True, kw_only=True, slots=True)
class DistillConfig:
    """Settings of one run; the defaults are methods.md 1.11.

    Attributes:
        method: ``distill``, or ``mae`` or ``dino`` for the plain baselines without a teacher.
        views: what the student sees: ``clean``, ``spatial``, ``frequency``. A student that never sees the clean crop is
            behind one that does, by as many steps (docs/log.md).
        targets: what the student's tokens are compared with: the teacher's answer to the ``clean`` crop, or to the same
            masked ``view`` as the student's (a teacher that never saw holes answers those badly).
        standardise: targets have mean 0 and standard deviation 1 in every channel over the pool.
        layers: blocks of the student that learn, from 1; a deeper teacher gives the same share of its depth.
        weights: ``consistency`` weighs each token by the teacher's agreement between its two views; or ``uniform``.
        weight_place: ``visible`` compares visible tokens among each other and gives the hidden ones their image's
            mean weight; ``all`` compares every token, and then the weight mostly tells which tokens were hidden.
        weight_floor: smallest weight of a token, 0..1.
        dynamic_scale: multiply a stage's loss by its mean weight, so that inconsistent images count less.
        reconstruct: masked reconstruction in each masked view's own domain.
        balance: ``gradient`` makes each loss pull as hard as the feature loss at the tokens before the lambdas weigh
            them, ``running`` makes it as large, ``fixed`` takes losses as they are. A single loss is never changed.
        keep: share of the tokens that the student sees, chosen at random; 1 is all (Unmasked Teacher sees few).
        masks: ``random``, or ``adaptive``: patches that are salient to the teacher or hard for the student are hidden
            more often (OpenUS); with targets of the clean crop alone, since masks then depend on the student.
        lambda_relation: weight of the attention distillation of the last block; it needs the teacher itself
            (variants=0) on the student's grid.
        lambda_kd: weight of the feature loss; 0 needs no teacher.
        beta: where the smooth L1 turns from square to line, in units of normalised features.
        lambda_spatial: weight of the spatial reconstruction; 0.3 of the feature loss's pull was measured to serve it.
        lambda_frequency: weight of the frequency reconstruction.
        teacher_size: side of the teacher's image, 0 for the student's (see teacher_bank.py).
        variants: fixed views an image, whose teacher features are cached; 0 draws new views all the time.
        inactive_below: a spread of the weights below this is reported as "mechanism inactive".
        view: crops and masks.
        student: width, depth and heads; task and size follow.
        mae: of the masked autoencoder.
        dino: of the self-distillation.
        epochs: passes over the pool, at least ``least_steps`` in all; ``steps`` goes before it.
        least_steps: optimiser steps at least, where ``steps`` does not say it: those of the runs that were measured.
        steps: optimiser steps, or 0.
        batch: images per step.
        base_learning_rate: at a batch of 32, as measured; the rate grows with the root of the batch.
        learning_rate: the rate itself, or 0.
        final_learning_rate: at the end of the cosine.
        warmup: share of the steps.
        weight_decay: on matrices only.
        betas: of AdamW.
        clip: largest norm of the gradient.
        accumulate: parts of a step.
        precision: ``fp32``, ``bf16``, or ``natural``: what the machine computes in.
        seed: of everything but the fixed views.
        view_seed: of the fixed views, so that runs of several seeds share one bank.
        checkpoint_every: steps between checkpoints.
        log_every: steps between scalars.
    """

    method: Method = "distill"
    views: tuple[str, ...] = ("clean", "spatial", "frequency")
    targets: Literal["clean", "view"] = "clean"
    standardise: bool = True
    layers: tuple[int, ...] = (4, 8, 12)
    weights: Literal["consistency", "uniform"] = "consistency"
    weight_place: Literal["visible", "all"] = "visible"
    weight_floor: float = 0.0
    dynamic_scale: bool = False
    reconstruct: bool = True
    balance: Literal["gradient", "running", "fixed"] = "gradient"
    keep: float = 1.0
    masks: Literal["random", "adaptive"] = "random"
    lambda_relation: float = 0.0
    lambda_kd: float = 1.0
    beta: float = 2.0
    lambda_spatial: float = 0.3
    lambda_frequency: float = 0.3
    teacher_size: int = 0
    variants: int = 0
    inactive_below: float = 0.01
    view: ViewConfig = field(default_factory=ViewConfig)
    student: StudentConfig = field(default_factory=lambda: StudentConfig(task="features", drop_path=0.0))
    mae: MaeConfig = field(default_factory=MaeConfig)
    dino: DinoConfig = field(default_factory=DinoConfig)
    epochs: float = 20.0
    least_steps: int = 800
    steps: int = 0
    batch: int = 32
    base_learning_rate: float = 1e-3
    learning_rate: float = 0.0
    final_learning_rate: float = 1e-6
    warmup: float = 0.05
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 3.0
    accumulate: int = 1
    precision: Literal["fp32", "bf16", "natural"] = "natural"
    seed: int = 42
    view_seed: int = 0
    checkpoint_every: int = 100
    log_every: int = 10

    def __post_init__(self) -> None:
        """Checks what contradicts itself.

        Raises:
            InputError: naming the fields.
        """
        if self.method not in ("distill", "mae", "dino") or self.weights not in ("consistency", "uniform"):
            raise InputError("method is distill, mae or dino, weights is consistency or uniform")
        if self.method != "distill" and (self.keep < 1 or self.lambda_relation or self.masks == "adaptive"):
            raise InputError(
                f"{self.method} has no teacher's tokens to drop, relate or mask by: leave keep at 1, "
                "lambda_relation at 0 and masks at random"
            )
        if self.method == "distill" and not self.lambda_kd and (self.lambda_relation or self.masks == "adaptive"):
            raise InputError("lambda_relation and adaptive masks need the teacher's features: set lambda_kd above 0")
        if not self.views or set(self.views) - set(VIEWS) or len(set(self.views)) != len(self.views):
            raise InputError(f"views are some of {', '.join(VIEWS)}, each once")
        if not self.layers or sorted(set(self.layers)) != list(self.layers) or self.layers[0] < 1:
            raise InputError("layers count from 1 and rise")
        if self.layers[-1] > self.student.depth:
            raise InputError(f"layer {self.layers[-1]} is beyond the student's {self.student.depth} blocks")
        if self.method == "distill" and self.lambda_kd and self.weights == "consistency" and not self.is_paired:
            raise InputError("consistency needs the views spatial and frequency: choose weights=uniform")
        if self.method == "distill" and not self.lambda_kd and not self.reconstruct:
            raise InputError("nothing is left to learn: lambda_kd is 0 and reconstruct is off")
        if self.method == "distill" and self.reconstruct and not {"spatial", "frequency"} & set(self.views):
            raise InputError("a clean view has nothing to reconstruct: choose reconstruct=false")
        if min(self.lambda_kd, self.lambda_spatial, self.lambda_frequency) < 0 or self.beta <= 0:
            raise InputError("lambdas are not negative and beta is above 0")
        if not 0 <= self.warmup < 1 or not 0 <= self.weight_floor <= 1 or self.variants < 0 or self.variants > 64:
            raise InputError("warmup in [0, 1), weight_floor in [0, 1], variants from 0 to 64")
        if min(self.weight_decay, self.seed, self.view_seed) < 0:
            raise InputError("weight_decay, seed and view_seed are not negative")
        if self.masks == "adaptive" and (self.targets != "clean" or self.keep < 1 or "spatial" not in self.views):
            raise InputError("adaptive masks need targets=clean, keep=1 and the spatial view")
        if self.lambda_relation < 0 or (self.lambda_relation and (self.variants or self.keep < 1)):
            raise InputError("lambda_relation is not negative, and needs the teacher itself: variants=0 and keep=1")
        if not 0 < self.keep <= 1 or (self.keep < 1 and self.reconstruct and self.method == "distill"):
            raise InputError("keep lies in (0, 1]; dropped tokens cannot be rebuilt: choose reconstruct=false with it")
        if self.least_steps < 0 or self.steps < 0 or (self.steps == 0 and self.epochs <= 0) or self.batch < 1:
            raise InputError("steps or epochs must be above 0, batch at least 1")

    @property
    def is_paired(self) -> bool:
        """Both masked views are there."""
        return {"spatial", "frequency"} <= set(self.views)

    @property
    def needs_teacher(self) -> bool:
        """Whether teacher features enter the loss."""
        return self.method == "distill" and self.lambda_kd > 0

    @property
    def teacher_views(self) -> tuple[str, ...]:
        """The views that the teacher must answer to.

        For the targets, and for the weights where they need a pair.
        """
        if self.targets == "view":
            return self.views
        paired = ("spatial", "frequency") if self.weights == "consistency" else ()
        return (*paired, "clean")

    @property
    def built_student(self) -> StudentConfig:
        """The student's architecture with task and image size settled."""
        return dataclasses.replace(self.student, task="features", image_size=self.view.image_size)

    def engine(self, num_images: int) -> TrainerConfig:
        """Settings of the loop for a pool of so many images.

        Raises:
            InputError: impossible values.
        """
        steps = self.steps or max(self.least_steps, 1, round(self.epochs * num_images / self.batch))
        rate = self.learning_rate or self.base_learning_rate * (self.batch / BASE_BATCH) ** 0.5
        precision: Precision = natural_precision() if self.precision == "natural" else self.precision
        return TrainerConfig(
            steps=steps,
            batch=self.batch,
            learning_rate=rate,
            final_learning_rate=min(self.final_learning_rate, rate),
            warmup=round(self.warmup * steps),
            betas=self.betas,
            clip=self.clip,
            accumulate=self.accumulate,
            precision=precision,
            seed=self.seed,
            checkpoint_every=self.checkpoint_every,
            log_every=self.log_every,
        )


ABLATIONS: dict[str, dict[str, Any]] = {
    "ours": {},
    "uniform": {"weights": "uniform"},
    "spatial": {"views": ["spatial"], "weights": "uniform"},
    "frequency": {"views": ["frequency"], "weights": "uniform"},
    "no-reconstruction": {"reconstruct": False},
    "last-layer": {"layers": [12]},
    "mae": {"method": "mae", "lambda_kd": 0.0},
    "dino": {"method": "dino", "lambda_kd": 0.0, "base_learning_rate": 6.25e-5},
    "feature-kd": {"views": ["clean"], "weights": "uniform", "reconstruct": False},
    "dynamic-scale": {"dynamic_scale": True},
    "unmasked": {"views": ["clean"], "weights": "uniform", "reconstruct": False, "keep": 0.4},
    "masked-views": {"views": ["spatial", "frequency"]},
    "masked-targets": {"targets": "view", "views": ["spatial", "frequency"]},
    "raw-targets": {"standardise": False},
    "weights-everywhere": {"weight_place": "all"},
    "adaptive-masks": {"masks": "adaptive", "weights": "uniform"},
}
"""Name -> what it changes. One view has no partner to agree with, so ``spatial`` and ``frequency`` are uniform.

``dino`` has the published rate, 5e-4 at a batch of 256: at eight times that it collapsed on real frames.
``unmasked`` is Unmasked Teacher's way (Li et al., ICCV 2023): the student sees a few of the tokens, the teacher all.
"""


def read_config(
    ablation: str = "ours", config: Path | None = None, changes: Sequence[str] = ()
) -> tuple[DistillConfig, dict[str, Any]]:
    """Puts settings together.

    The ablation, then a JSON file, then ``key=value`` changes.

    Args:
        ablation: a name in ``ABLATIONS``.
        config: JSON of settings, nested as ``to_json`` writes them, or None.
        changes: ``key=value``; a dot goes into a part, as in ``view.image_size=112``; values are JSON, or bare words.

    Returns:
        The settings, and the same as plain data.

    Raises:
        InputError: an unknown name, or a value that does not fit.
    """
    if ablation not in ABLATIONS:
        raise InputError(f"there is no ablation {ablation!r}; there is: {', '.join(ABLATIONS)}")
    data = to_json(DistillConfig())
    merge(data, ABLATIONS[ablation], "")
    if config is not None:
        merge(data, read_settings(config), "")
    for change in changes:
        merge(data, parse_change(change), "")
    built: DistillConfig = build(DistillConfig, data)
    return built, to_json(built)


__all__ = [
    "ABLATIONS",
    "BASE_BATCH",
    "LEAST_STEPS",
    "DinoConfig",
    "DistillConfig",
    "MaeConfig",
    "Method",
    "build",
    "merge",
    "parse_change",
    "read_config",
    "to_json",
]
