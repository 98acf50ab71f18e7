"""Frames and references of a model with a sector.

Gate frames and golden frames are masked alike for every artefact of the bundle: black where the model's sector leaves
patches out. They are judged against the student itself, looking at all patches of the masked frames, so the gate says
what pruning costs. The golden answers of a pruned artefact are those of the student without these patches
(``PrunedReference``), which the artefact must equal up to rounding.

Frames become frames of the input's size, so that a mask has one meaning, whatever the size of the original.

Shapes: NCHW images; B batch, N tokens, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from tinyusfm_export.verify.gate import Gate
from tinyusfm_export.verify.gate_frames import GateFrames
from tinyusfm_runtime.errors import InputError
from tinyusfm_runtime.frame import Frame, PixelFormat, VideoRange
from tinyusfm_runtime.numerics.preprocess import preprocess
from tinyusfm_runtime.spec import ModelSpec, Task

if TYPE_CHECKING:
    from torch import nn


def masked_frames(frames: Sequence[Frame], spec: ModelSpec) -> list[Frame]:
    """Frames of the input's size, black outside the sector.

    As they are where the model has none.

    Args:
        frames: any frames that the preprocessing can place.
        spec: the model.

    Raises:
        InputError: the model crops frames.
        FrameError: a frame that the preprocessing cannot place.
    """
    if spec.sector is None:
        return list(frames)
    if spec.preprocess.crop is not None:
        raise InputError("a sector goes with frames that are not cropped by the model: crop them where they are read")
    found = []
    for frame in frames:
        tensor, placement = preprocess(frame, spec.preprocess)
        pixels = spec.sector.masked(tensor)[0, 0]
        found.append(
            replace(
                frame,
                pixels=pixels,
                spacing_mm=placement.spacing_mm,
                pixel_format=PixelFormat.GREY,
                video_range=VideoRange.FULL,
            )
        )
    return found


def masked_gate_frames(frames: GateFrames, spec: ModelSpec) -> GateFrames:
    """The gate's frames, masked alike, see ``masked_frames``."""
    if spec.sector is None:
        return frames
    masked = masked_frames([named.frame for named in frames.frames], spec)
    pairs = zip(frames.frames, masked, strict=True)
    return replace(
        frames,
        frames=tuple(replace(named, frame=frame) for named, frame in pairs),
        source=f"{frames.source}, masked to sector {spec.sector.name}",
    )


def pruned_gate(gate: Gate) -> Gate:
    """The gate of a pruned artefact against the student that looks at all patches.

    Without the demand on the logits of float artefacts, which finds spoilt weights: pruning moves logits on purpose.
    That demand is held against ``pruned_reference`` instead.

    Args:
        gate: thresholds of the export.
    """
    return replace(gate, float_logits=1.0)


def pruned_reference(module: nn.Module, spec: ModelSpec) -> nn.Module:
    """The student without the patches outside the spec's sector, in PyTorch.

    Args:
        module: the student; only read.
        spec: its spec.

    Returns:
        A module that takes the same image and gives the same kind of logits.

    Raises:
        InputError: the spec has no sector, or the student cannot leave patches out.
    """
    import torch
    from torch import nn

    if spec.sector is None:
        raise InputError(f"model {spec.name!r} has no sector")
    student: Any = module
    if not hasattr(student, "backbone") or not hasattr(student.backbone, "taps"):
        raise InputError("this student cannot leave patches out: it has no backbone with taps")
    indices = torch.tensor([spec.sector.indices])

    class PrunedReference(nn.Module):
        """A student that looks at some patches."""

        def __init__(self) -> None:
            super().__init__()
            self.student = student

        def forward(self, image_NCHW: Any) -> Any:
            """Normalised image -> logits."""
            backbone = student.backbone
            if spec.task is Task.SEGMENT:
                return student.decode(student.scattered(backbone.taps(image_NCHW, kept_BV=indices), indices))
            (tokens,) = backbone.taps(image_NCHW, (len(backbone.blocks) - 1,), kept_BV=indices)
            if spec.task is Task.CLASSIFY:
                return student.classify(tokens)
            normed = backbone.norm(tokens[:, 1:])
            rows, cols = backbone.grid_hw
            places = indices[..., None].expand(-1, -1, normed.shape[-1])
            full = normed.new_zeros(1, rows * cols, normed.shape[-1]).scatter(1, places, normed)
            return full.transpose(1, 2).reshape(1, -1, rows, cols)

    return PrunedReference().eval()


__all__ = ["masked_frames", "masked_gate_frames", "pruned_gate", "pruned_reference"]
