"""What goes into a model and what comes out.

TensorSpec, PreprocessSpec, ModelSpec.

These are data, written into every bundle and every student file, with licence and origin. They
do not know any engine. Spacing is not here: it belongs to the frame, since depth changes it. What a
reading is held against (thresholds, limits of the anatomy) is in reading_rules.py.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, fields
from enum import Enum
from typing import Any

from tinyusfm_runtime.errors import InputError
from tinyusfm_runtime.reading_rules import PATCH, Anatomy, ProbeGeometry, ReadingRules, TokenSector

INPUT_NAME = "image"
"""Name of the one graph input, uint8 NCHW, in every artefact but for the later stages of a chain (chain.py)."""


LOGITS_NAME = "logits"
"""Name of the first graph output, float32, in every artefact."""


REST_PRECISIONS = ("f32", "f16", "bf16")
"""Precisions in which everything that is not INT8 may be computed; float16 on GPUs only."""


IMAGENET_MEAN = (0.485, 0.456, 0.406)
"""Per-channel mean of ImageNet on a 0..1 scale; TinyUSFM's and USFM's recipes use it."""
IMAGENET_STD = (0.229, 0.224, 0.225)
"""Per-channel standard deviation of ImageNet on a 0..1 scale."""


class Task(str, Enum):
    """What a model answers."""

    SEGMENT = "segment"
    """A mask: logits 1xKxHxW, K = 1 (sigmoid) or one channel per label (softmax)."""
    CLASSIFY = "classify"
    """Scores: logits 1xK."""
    FEATURES = "features"
    """A feature vector or map, compared by cosine."""


class AspectPolicy(str, Enum):
    """How a frame of any shape becomes a model's input."""

    STRETCH = "stretch"
    """Rows and columns are scaled apart; spacing follows."""
    LETTERBOX = "letterbox"
    """Scaled by one factor, centred, the rest filled with black."""


class PostProcess(str, Enum):
    """What is made of the logits."""

    NONE = "none"
    """Scores or features as they are."""
    MASK = "mask"
    """Threshold (K = 1) or argmax."""
    ELLIPSE_HC = "ellipse_hc"
    """Mask, largest component without holes, the ellipse that its logits say, head circumference in mm."""


class SecondPass(str, Enum):
    """When a frame is looked at again (second_pass.py).

    On a crop around the first mask.
    """

    NEVER = "never"
    """One pass."""
    SMALL = "small"
    """Where the first mask covers less than a fifth of the image."""
    ALWAYS = "always"
    """Wherever there is a first mask."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorSpec:
    """One tensor at the engine's border.

    Attributes:
        name: tensor name in every artefact.
        dtype: numpy name of the element type.
        axes: meaning of each axis, such as ``NCHW``.
        shape: static shape.
        low: smallest admissible value, or None.
        high: largest admissible value, or None.
    """

    name: str
    dtype: str
    axes: str
    shape: tuple[int, ...]
    low: float | None = None
    high: float | None = None

    def __post_init__(self) -> None:
        if len(self.axes) != len(self.shape) or any(s < 1 for s in self.shape):
            raise InputError(f"tensor {self.name!r}: axes {self.axes!r} do not fit shape {self.shape}")


@dataclass(frozen=True, kw_only=True, slots=True)
class PreprocessSpec:
    """Frame to tensor, the one definition (see preprocess.py).

    Attributes:
        height: rows of the input.
        width: columns of the input.
        grey: True if the model takes one brightness channel; False is three equal ones.
        aspect: how the frame's shape is fitted.
        crop: region of interest (row, column, height, width) in frame pixels before anything else, or None.
        mean: per-channel mean on a 0..1 scale, applied inside the graph.
        std: per-channel standard deviation on a 0..1 scale, applied inside the graph.
    """

    height: int = 224
    width: int = 224
    grey: bool = True
    aspect: AspectPolicy = AspectPolicy.STRETCH
    crop: tuple[int, int, int, int] | None = None
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    def __post_init__(self) -> None:
        if self.height < 16 or self.width < 16 or self.height > 4096 or self.width > 4096:
            raise InputError(f"input size {self.height}x{self.width}: each side must be 16 to 4096")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != 3 or any(type(value) not in (int, float) for value in values):
                raise InputError(f"{name} {values!r:.60} must be three numbers")
        if any(not 0 < s < 10 for s in self.std) or any(not -10 < m < 10 for m in self.mean):
            raise InputError(f"mean {self.mean} must lie in (-10, 10), std {self.std} in (0, 10)")
        if self.crop is not None and (
            len(self.crop) != 4 or any(type(side) is not int or not 0 <= side <= 1 << 16 for side in self.crop)
        ):
            raise InputError(f"crop {self.crop!r:.60} must be row, column, height and width in whole pixels")


@dataclass(frozen=True, kw_only=True, slots=True)
class ExitPolicy:
    """When a classifier with early exits may stop (early_exit.py decides by it).

    Attributes:
        blocks: after which a classifier stands, counted from 1; the one at the end is not named.
        entropy: for each of them, the normalised entropy 0..1 below which its answer is taken; 0 never.
        patience: how many classifiers in a row must agree for the answer to be taken; 0 switches that off.
    """

    blocks: tuple[int, ...]
    entropy: tuple[float, ...]
    patience: int = 0

    def __post_init__(self) -> None:
        if not self.blocks or list(self.blocks) != sorted(set(self.blocks)) or self.blocks[0] < 1:
            raise InputError(f"exits {self.blocks} must rise and count from 1")
        if len(self.entropy) != len(self.blocks) or any(not 0.0 <= value <= 1.0 for value in self.entropy):
            raise InputError(f"exits {self.blocks} need as many entropies between 0 and 1, not {self.entropy}")
        if type(self.patience) is not int or self.patience < 0 or self.patience == 1:
            raise InputError(f"patience {self.patience!r} must be 0 or at least 2: one classifier always agrees")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSpec:
    """All that a runtime must know about a model.

    Attributes:
        name: short name, letters, digits, dot and dash.
        task: what it answers.
        labels: names of the outputs, background first for multi-class segmentation.
        preprocess: frame to tensor.
        postprocess: logits to answer.
        threshold: probability above which a pixel of a one-channel mask counts, 0..1.
        architecture: constructor arguments of the student, for training.
        licence: licence of the weights.
        origin: where the weights come from, one line.
        intended_use: what it may be used for, one line.
        weights_sha256: hash of the float weights file it came from, hex.
        exits: when a classifier with early exits may stop, or None.
        second_pass: when a mask model looks again at a crop around its first mask.
        min_area: least share of the image (0..1) that a label's largest component covers to count as found.
        reading: what makes a reading good or doubtful, with the rates it was calibrated with, or None (``unchecked``).
        anatomy: plausible sizes and spacings, or None.
        probe: the field of view of the one probe the model is meant for, or None.
        sector: the patches that artefacts look at which were pruned to a sector, or None where none was.
    """

    name: str
    task: Task
    labels: tuple[str, ...]
    preprocess: PreprocessSpec = field(default_factory=PreprocessSpec)
    postprocess: PostProcess = PostProcess.NONE
    threshold: float = 0.5
    architecture: dict[str, Any] = field(default_factory=dict)
    licence: str = "unknown"
    origin: str = "unknown"
    intended_use: str = "research; not a medical device"
    weights_sha256: str = ""
    exits: ExitPolicy | None = None
    second_pass: SecondPass = SecondPass.NEVER
    min_area: float = 0.0
    reading: ReadingRules | None = None
    anatomy: Anatomy | None = None
    probe: ProbeGeometry | None = None
    sector: TokenSector | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise InputError(f"a model's name is a text, not {type(self.name).__name__}")
        letters = all((c.isascii() and c.isalnum()) or c in ".-_" for c in self.name)
        if not self.name or not letters or self.name[0] in ".-":
            raise InputError(f"model name {self.name!r}: use letters, digits, '.', '-' and '_'")
        if not 0.0 < self.threshold < 1.0:
            raise InputError(f"threshold {self.threshold} must lie between 0 and 1")
        if self.exits is not None and self.task is not Task.CLASSIFY:
            raise InputError("early exits are for classifiers")
        if self.second_pass is not SecondPass.NEVER and self.task is not Task.SEGMENT:
            raise InputError("a second pass is for models that give a mask")
        if not 0.0 <= self.min_area < 1.0:
            raise InputError(f"min_area {self.min_area} must be a share of the image from 0 to below 1")
        if self.reading is not None:
            self._check_reading(self.reading)
        if self.sector is not None:
            self._check_sector(self.sector)

    def _check_sector(self, sector: TokenSector) -> None:
        size = (self.preprocess.height, self.preprocess.width)
        if (sector.grid[0] * PATCH, sector.grid[1] * PATCH) != size:
            rows, cols = sector.grid
            raise InputError(f"a sector of {rows}x{cols} patches of {PATCH}x{PATCH} does not fit an input of {size}")
        if self.second_pass is not SecondPass.NEVER:
            raise InputError("a second pass looks at a crop, where a sector lies elsewhere: a model has one of the two")

    def _check_reading(self, rules: ReadingRules) -> None:
        if self.task is Task.FEATURES:
            raise InputError("a feature model gives no reading that could be good or doubtful")
        known = self.read_labels if self.task is Task.SEGMENT else self.labels
        if unknown := [rule.label for rule in rules.thresholds if rule.label not in known]:
            raise InputError(f"reading thresholds for {unknown[0]!r}, which is none of the labels {', '.join(known)}")

    @property
    def read_labels(self) -> tuple[str, ...]:
        """Labels of a mask model that get a reading each.

        The one of a single channel, else all but the background.
        """
        if self.task is not Task.SEGMENT:
            return ()
        return self.labels if len(self.labels) == 1 else self.labels[1:]

    @property
    def input(self) -> TensorSpec:
        """The graph's input: uint8 brightness codes 0..255, NCHW."""
        channels = 1 if self.preprocess.grey else 3
        shape = (1, channels, self.preprocess.height, self.preprocess.width)
        return TensorSpec(name="image", dtype="uint8", axes="NCHW", shape=shape, low=0, high=255)

    def to_json(self) -> dict[str, Any]:
        """Plain data, ready for ``json.dumps``; every key but ``sector`` is always there."""
        data: dict[str, Any] = _plain(asdict(self))
        if data["sector"] is None:
            del data["sector"]
        return data

    @property
    def digest(self) -> str:
        """SHA-256 over every field, hex: what golden answers and signatures are bound to."""
        text = json.dumps(self.to_json(), sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(text.encode("ascii")).hexdigest()

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> ModelSpec:
        """Reads what ``to_json`` wrote.

        Raises:
            InputError: unknown or missing keys, or values out of range.
        """
        try:
            known = {f.name for f in fields(cls)}
            unknown = set(data) - known
            if unknown:
                raise InputError(f"model spec has unknown keys {sorted(unknown)}")
            values = _checked_kinds(data, _KINDS, "the model spec")
            values["task"] = Task(values["task"])
            values["labels"] = tuple(_each(values["labels"], str, None, "labels"))
            values["postprocess"] = PostProcess(values.get("postprocess", "none"))
            values["preprocess"] = _preprocess_from_json(values.get("preprocess", {}))
            values["exits"] = _exits_from_json(values.get("exits"))
            values["second_pass"] = SecondPass(values.get("second_pass", "never"))
            for key, kind in (("reading", ReadingRules), ("anatomy", Anatomy), ("probe", ProbeGeometry)):
                values[key] = None if values.get(key) is None else kind.from_json(values[key])
            if "sector" in values:  # never written as null
                values["sector"] = TokenSector.from_json(values["sector"])
            return cls(**values)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise InputError(f"model spec is not usable: {error}") from error


def _exits_from_json(data: dict[str, Any] | None) -> ExitPolicy | None:
    if data is None:
        return None
    if set(data) != {"blocks", "entropy", "patience"}:
        raise InputError("early exits are described by blocks, entropy and patience, nothing else")
    entropy = tuple(float(value) for value in _each(data["entropy"], float, None, "entropy"))
    blocks = tuple(_each(data["blocks"], int, None, "blocks"))
    return ExitPolicy(blocks=blocks, entropy=entropy, patience=data["patience"])


def _preprocess_from_json(data: dict[str, Any]) -> PreprocessSpec:
    unknown = set(data) - {f.name for f in fields(PreprocessSpec)}
    if unknown:
        raise InputError(f"preprocess spec has unknown keys {sorted(unknown)}")
    values = _checked_kinds(data, _PREPROCESS_KINDS, "the preprocess spec")
    for key, kind, count in (("crop", int, 4), ("mean", float, 3), ("std", float, 3)):
        if values.get(key) is not None:
            values[key] = tuple(_each(values[key], kind, count, key))
    if "aspect" in values:
        values["aspect"] = AspectPolicy(values["aspect"])
    return PreprocessSpec(**values)


_KINDS: dict[str, tuple[type, ...]] = {
    "name": (str,), "task": (str,), "labels": (list, tuple), "preprocess": (dict,), "postprocess": (str,),
    "threshold": (float, int), "architecture": (dict,), "licence": (str,), "origin": (str,), "intended_use": (str,),
    "weights_sha256": (str,), "exits": (dict, type(None)), "second_pass": (str,), "min_area": (float, int),
}  # fmt: skip
_PREPROCESS_KINDS: dict[str, tuple[type, ...]] = {
    "height": (int,), "width": (int,), "grey": (bool,), "aspect": (str,), "crop": (list, tuple, type(None)),
    "mean": (list, tuple), "std": (list, tuple),
}  # fmt: skip


def _checked_kinds(data: dict[str, Any], kinds: dict[str, tuple[type, ...]], what: str) -> dict[str, Any]:
    """A copy of plain data whose values are of their kinds.

    A truth value is no number.
    """
    for key, value in data.items():
        allowed = kinds.get(key, (object,))
        if not isinstance(value, allowed) or (
            isinstance(value, bool) and bool not in allowed and object not in allowed
        ):
            raise InputError(f"{what}: {key} is written as {type(value).__name__}")
    return dict(data)


def _each(values: Any, kind: type, count: int | None, what: str) -> Any:
    """The values of a list, each of one kind, and as many as there must be.

    A whole number passes for a float.
    """
    allowed = (float, int) if kind is float else (kind,)
    good = all(isinstance(value, allowed) and not isinstance(value, bool) for value in values)
    if not good or (count is not None and len(values) != count):
        raise InputError(f"{what} must hold {'' if count is None else f'{count} '}values of kind {kind.__name__}")
    return values


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value


__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "INPUT_NAME",
    "LOGITS_NAME",
    "REST_PRECISIONS",
    "AspectPolicy",
    "ExitPolicy",
    "ModelSpec",
    "PostProcess",
    "PreprocessSpec",
    "SecondPass",
    "Task",
    "TensorSpec",
]
