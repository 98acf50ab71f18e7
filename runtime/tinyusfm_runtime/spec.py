"""What goes into a model and what comes out: TensorSpec, PreprocessSpec, ModelSpec.

These are data, written into every bundle and every student file, with licence and origin. They
do not know any engine. Spacing is not here: it belongs to the frame, since depth changes it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from enum import Enum
from typing import Any

from tinyusfm_runtime.errors import InputError

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
    """Mask, largest component, ellipse by second-order moments, head circumference in mm."""


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
        if any(not 0 < s < 10 for s in self.std):
            raise InputError(f"std {self.std} must lie in (0, 10)")


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
        architecture: constructor arguments of the student, for the workshop.
        licence: licence of the weights.
        origin: where the weights come from, one line.
        intended_use: what it may be used for, one line.
        weights_sha256: hash of the float weights file it came from, hex.
        exits: when a classifier with early exits may stop, or None.
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

    def __post_init__(self) -> None:
        if not self.name or not all(c.isalnum() or c in ".-_" for c in self.name) or self.name[0] in ".-":
            raise InputError(f"model name {self.name!r}: use letters, digits, '.', '-' and '_'")
        if not 0.0 < self.threshold < 1.0:
            raise InputError(f"threshold {self.threshold} must lie between 0 and 1")
        if self.exits is not None and self.task is not Task.CLASSIFY:
            raise InputError("early exits are for classifiers")

    @property
    def input(self) -> TensorSpec:
        """The graph's input: uint8 brightness codes 0..255, NCHW."""
        channels = 1 if self.preprocess.grey else 3
        shape = (1, channels, self.preprocess.height, self.preprocess.width)
        return TensorSpec(name="image", dtype="uint8", axes="NCHW", shape=shape, low=0, high=255)

    def to_json(self) -> dict[str, Any]:
        """Plain data, ready for ``json.dumps``; ``exits`` only where there are any."""
        data: dict[str, Any] = _plain(asdict(self))
        if self.exits is None:
            del data["exits"]
        return data

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
            values = dict(data)
            values["task"] = Task(values["task"])
            values["labels"] = tuple(str(label) for label in values["labels"])
            values["postprocess"] = PostProcess(values.get("postprocess", "none"))
            values["preprocess"] = _preprocess_from_json(values.get("preprocess", {}))
            values["exits"] = _exits_from_json(values.get("exits"))
            return cls(**values)
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"model spec is not usable: {error}") from error


def _exits_from_json(data: dict[str, Any] | None) -> ExitPolicy | None:
    if data is None:
        return None
    if set(data) != {"blocks", "entropy", "patience"}:
        raise InputError("early exits are described by blocks, entropy and patience, nothing else")
    entropy = tuple(float(value) for value in data["entropy"])
    return ExitPolicy(blocks=tuple(data["blocks"]), entropy=entropy, patience=data["patience"])


def _preprocess_from_json(data: dict[str, Any]) -> PreprocessSpec:
    unknown = set(data) - {f.name for f in fields(PreprocessSpec)}
    if unknown:
        raise InputError(f"preprocess spec has unknown keys {sorted(unknown)}")
    values = dict(data)
    for key in ("crop", "mean", "std"):
        if values.get(key) is not None:
            values[key] = tuple(values[key])
    if "aspect" in values:
        values["aspect"] = AspectPolicy(values["aspect"])
    return PreprocessSpec(**values)


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
    "AspectPolicy",
    "ExitPolicy",
    "ModelSpec",
    "PostProcess",
    "PreprocessSpec",
    "Task",
    "TensorSpec",
]
