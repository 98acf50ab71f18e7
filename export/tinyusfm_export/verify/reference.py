"""The reference: the student itself in PyTorch, float32.

Every artefact is measured against it.

Frames go through the runtime's preprocessing; codes become three equal channels, are divided by 255 and normalised with
the spec's mean and std, as in training. The export's rewrites are not used here: what they change is part of what is
measured. torch is imported inside functions. It does not know artefacts or gates.

Shapes: NCHW input; NKHW or NK logits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from tinyusfm_export.graph.inference import repeatable_inference
from tinyusfm_export.verify.parity import Output, read_exits, read_output
from tinyusfm_runtime.errors import InputError, MissingExtra
from tinyusfm_runtime.frame import Frame
from tinyusfm_runtime.numerics.preprocess import preprocess
from tinyusfm_runtime.spec import LOGITS_NAME, ModelSpec, PreprocessSpec

if TYPE_CHECKING:
    from torch import Tensor, nn


def reference_outputs(
    module: nn.Module, spec: ModelSpec, frames: Sequence[Frame], *, second_pass: bool = True
) -> list[Output]:
    """Runs the student on frames, one at a time on one thread.

    The same machine then gives the same bits.

    Args:
        module: takes a normalised image 1x3xHxW and returns logits; parameters float32.
        spec: its preprocessing, task and post-processing.
        frames: any frames.
        second_pass: False leaves the second pass out, whatever the spec says.

    Returns:
        One output a frame, in order.

    Raises:
        MissingExtra: torch is not installed.
        InputError: the module is not float32, or its output is not finite or not the spec's.
    """
    return list(stream_outputs(module, spec, frames, second_pass=second_pass))


def stream_outputs(
    module: nn.Module, spec: ModelSpec, frames: Sequence[Frame], *, second_pass: bool = True
) -> Iterator[Output]:
    """As ``reference_outputs``, one at a time."""

    def run(tensor: np.ndarray) -> dict[str, np.ndarray]:
        return {LOGITS_NAME: run_reference(module, spec, tensor)}

    with reference_mode(module):
        for frame in frames:
            tensor, placement = preprocess(frame, spec.preprocess)
            if spec.exits is not None:
                output = read_exits(run_exits(module, spec, tensor), spec, placement)
            else:
                again = frame if second_pass else None
                output = read_output(run(tensor), spec, placement, tensor=tensor, frame=again, run=run)
            if not output.answer.valid:
                raise InputError(f"student {spec.name!r} gives NaN or infinity in float32: it cannot be a reference")
            yield output


def run_reference(module: nn.Module, spec: ModelSpec, tensor: np.ndarray) -> np.ndarray:
    """Runs the student on one preprocessed input.

    Args:
        module: see ``reference_outputs``; call inside ``reference_mode``.
        spec: gives mean and std.
        tensor: uint8 NCHW, one channel or three equal ones.

    Returns:
        float32 logits.
    """
    import torch

    codes = torch.from_numpy(np.ascontiguousarray(tensor)).to(torch.float32)
    logits = module(normalise(codes, spec.preprocess))
    if isinstance(logits, (tuple, list)):
        logits = logits[0]
    array: np.ndarray = logits.detach().to(torch.float32).numpy()
    return np.ascontiguousarray(array)


def run_exits(module: nn.Module, spec: ModelSpec, tensor: np.ndarray) -> np.ndarray:
    """Runs a student with early exits to its end and asks every exit's own head.

    Args:
        module: see ``reference_outputs``; call inside ``reference_mode``.
        spec: gives mean, std and the exits.
        tensor: uint8 NCHW, one channel or three equal ones.

    Returns:
        float32 logits 1EK, the classifier at the end last.

    Raises:
        InputError: the student lacks an exit that the spec names.
    """
    assert spec.exits is not None
    student: Any = module
    found: dict[int, Tensor] = {}
    try:
        pairs = [(student.backbone.blocks[block - 1], student.exits[str(block)]) for block in spec.exits.blocks]
    except (AttributeError, IndexError, KeyError) as error:
        raise InputError(f"the student lacks an early exit that its spec names: {spec.exits.blocks}") from error
    handles = [
        block.register_forward_hook(lambda _, __, tokens, index=index, head=head: found.update({index: head(tokens)}))
        for index, (block, head) in enumerate(pairs)
    ]
    try:
        last = run_reference(module, spec, tensor)
    finally:
        for handle in handles:
            handle.remove()
    early = [found[index].numpy().astype(np.float32) for index in range(len(pairs))]
    return np.ascontiguousarray(np.stack([*early, last], 1))


def normalise(codes_NCHW: Tensor, spec: PreprocessSpec) -> Tensor:
    """Codes 0..255 to the normalised three-channel image that students take.

    Args:
        codes_NCHW: float32, one channel or three.
        spec: gives mean and std on a 0..1 scale.
    """
    import torch

    mean, std = (
        torch.tensor(values, dtype=torch.float32, device=codes_NCHW.device).view(1, 3, 1, 1)
        for values in (spec.mean, spec.std)
    )
    return (codes_NCHW.expand(-1, 3, -1, -1) / 255.0 - mean) / std


@contextmanager
def reference_mode(module: nn.Module) -> Iterator[None]:
    """Evaluation mode, no gradients, no autocast, one thread.

    Everything is put back afterwards.

    Raises:
        MissingExtra: torch is not installed.
        InputError: a parameter or buffer of the module is of another floating type than float32.
    """
    try:
        import torch  # noqa: F401
    except ImportError as error:
        raise MissingExtra("the PyTorch reference", "torch", "torch") from error
    others = {str(t.dtype) for t in (*module.parameters(), *module.buffers()) if t.is_floating_point()}
    if others - {"torch.float32"}:
        raise InputError(f"the reference is computed in float32; this student holds {', '.join(sorted(others))}")
    training = module.training
    module.eval()
    try:
        with repeatable_inference():
            yield
    finally:
        module.train(training)


def reference_name() -> str:
    """What the live reference is called in reports.

    Raises:
        MissingExtra: torch is not installed.
    """
    try:
        import torch
    except ImportError as error:
        raise MissingExtra("the PyTorch reference", "torch", "torch") from error
    return f"PyTorch {torch.__version__} float32, live"


__all__ = [
    "normalise",
    "reference_mode",
    "reference_name",
    "reference_outputs",
    "run_exits",
    "run_reference",
    "stream_outputs",
]
