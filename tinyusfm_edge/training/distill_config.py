"""Settings of a distillation, the named ablations of them, and how they are read from JSON and ``key=value``.

A re-implementation: not the authors' code; hyper-parameters ours. What the published figure shows and what is our
choice stands in methods.md 1.10 and 1.11; every choice is a field here. It does not know nets or data.
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

from tinyusfm_edge.models.student import StudentConfig
from tinyusfm_edge.training.loop import EngineConfig, Precision, natural_precision
from tinyusfm_edge.training.views import VIEWS, ViewConfig
from tinyusfm_runtime.errors import InputError

Method = Literal["distill", "mae"]


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
class DistillConfig:
    """Settings of one run; the defaults are methods.md 1.11.

    Attributes:
        method: ``distill``, or ``mae`` for the plain baseline without a teacher.
        views: what student and teacher see: ``spatial``, ``frequency``, ``clean``.
        layers: blocks of the student that learn, from 1; a deeper teacher gives the same share of its depth.
        weights: ``consistency`` weighs each token by the teacher's agreement between its two views; or ``uniform``.
        weight_floor: smallest weight of a token, 0..1.
        dynamic_scale: multiply a stage's loss by its mean weight, so that inconsistent pictures count less.
        reconstruct: masked reconstruction in each masked view's own domain.
        lambda_kd: weight of the feature loss; 0 needs no teacher.
        beta: where the smooth L1 turns from square to line, in units of normalised features.
        lambda_spatial: weight of the spatial reconstruction.
        lambda_frequency: weight of the frequency reconstruction.
        teacher_size: side of the teacher's picture, 0 for the student's (see teacher_bank.py).
        variants: fixed views a picture, whose teacher features are cached; 0 draws new views all the time.
        inactive_below: a spread of the weights below this is reported as "mechanism inactive".
        view: crops and masks.
        student: width, depth and heads; task and size follow.
        mae: of the baseline.
        epochs: passes over the pool; ``steps`` goes before it.
        steps: optimiser steps, or 0.
        batch: pictures a step.
        base_learning_rate: at a batch of 256; the rate is proportional to the batch.
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
    views: tuple[str, ...] = ("spatial", "frequency")
    layers: tuple[int, ...] = (4, 8, 12)
    weights: Literal["consistency", "uniform"] = "consistency"
    weight_floor: float = 0.0
    dynamic_scale: bool = False
    reconstruct: bool = True
    lambda_kd: float = 1.0
    beta: float = 2.0
    lambda_spatial: float = 1.0
    lambda_frequency: float = 1.0
    teacher_size: int = 0
    variants: int = 0
    inactive_below: float = 0.01
    view: ViewConfig = field(default_factory=ViewConfig)
    student: StudentConfig = field(default_factory=lambda: StudentConfig(task="features", drop_path=0.0))
    mae: MaeConfig = field(default_factory=MaeConfig)
    epochs: float = 100.0
    steps: int = 0
    batch: int = 256
    base_learning_rate: float = 1.5e-4
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
        if self.method not in ("distill", "mae") or self.weights not in ("consistency", "uniform"):
            raise InputError("method is distill or mae, weights is consistency or uniform")
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
        if self.steps < 0 or (self.steps == 0 and self.epochs <= 0) or self.batch < 1:
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
    def built_student(self) -> StudentConfig:
        """The student's architecture with task and picture size settled."""
        return dataclasses.replace(self.student, task="features", image_size=self.view.image_size)

    def engine(self, num_pictures: int) -> EngineConfig:
        """Settings of the loop for a pool of so many pictures.

        Raises:
            InputError: impossible values.
        """
        steps = self.steps or max(1, round(self.epochs * num_pictures / self.batch))
        rate = self.learning_rate or self.base_learning_rate * self.batch / 256
        precision: Precision = natural_precision() if self.precision == "natural" else self.precision
        return EngineConfig(
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
    "feature-kd": {"views": ["clean"], "weights": "uniform", "reconstruct": False},
    "dynamic-scale": {"dynamic_scale": True},
}
"""Name -> what it changes. One view has no partner to agree with, so ``spatial`` and ``frequency`` are uniform."""


def read_config(
    ablation: str = "ours", config: Path | None = None, changes: Sequence[str] = ()
) -> tuple[DistillConfig, dict[str, Any]]:
    """Puts settings together: the ablation, then a JSON file, then ``key=value`` changes.

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
        try:
            read = json.loads(config.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"settings {config} cannot be read: {error}") from error
        merge(data, read, "")
    for change in changes:
        merge(data, parse_change(change), "")
    built: DistillConfig = build(DistillConfig, data)
    return built, to_json(built)


def parse_change(text: str) -> dict[str, Any]:
    """``a.b=value`` as nested data.

    Raises:
        InputError: no equals sign.
    """
    key, sign, value = text.partition("=")
    if not sign or not key:
        raise InputError(f"{text!r} is no key=value")
    try:
        parsed: Any = json.loads(value)
    except ValueError:
        parsed = value
    for part in reversed(key.strip().split(".")):
        parsed = {part: parsed}
    return parsed


def merge(data: dict[str, Any], changes: Any, where: str) -> None:
    """Lays changes over settings, in place.

    Raises:
        InputError: an unknown key, or a part where a value belongs.
    """
    if not isinstance(changes, Mapping):
        raise InputError(f"settings {where or 'at the top'} must be a table")
    for key, value in changes.items():
        if key not in data:
            raise InputError(f"there is no setting {where}{key}; there is: {', '.join(data)}")
        if isinstance(data[key], dict):
            merge(data[key], value, f"{where}{key}.")
        else:
            data[key] = value


def to_json(config: Any) -> dict[str, Any]:
    """Settings as plain data."""
    return json.loads(json.dumps(asdict(config)))


def build(kind: Any, data: Mapping[str, Any]) -> Any:
    """Makes a dataclass of plain data, checking every value's type.

    Args:
        kind: the dataclass.
        data: a value for every field.

    Raises:
        InputError: a value of the wrong type, or one the class refuses.
    """
    hints = typing.get_type_hints(kind)
    values = {f.name: _value(hints[f.name], data[f.name], f.name) for f in fields(kind)}
    return kind(**values)


def _value(hint: Any, value: Any, name: str) -> Any:
    if is_dataclass(hint):
        return build(hint, value)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        if value not in arguments:
            raise InputError(f"{name} is one of {', '.join(map(str, arguments))}, not {value!r}")
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise InputError(f"{name} must be a list, not {value!r}")
        inner = [arguments[0]] * len(value) if len(arguments) == 2 and arguments[1] is ... else list(arguments)
        if len(inner) != len(value):
            raise InputError(f"{name} must be a list of {len(inner)}, not {value!r}")
        return tuple(_value(kind, item, name) for kind, item in zip(inner, value, strict=True))
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        return _value(next(a for a in arguments if a is not type(None)), value, name)
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        raise InputError(f"{name} must be of kind {hint.__name__}, not {value!r}")
    return value


__all__ = [
    "ABLATIONS",
    "DistillConfig",
    "MaeConfig",
    "Method",
    "build",
    "merge",
    "parse_change",
    "read_config",
    "to_json",
]
