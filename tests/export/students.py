"""Small random students with awkward weights, for the tests of the export graph.

Width 48, 3 heads, 80x80 pixels: a grid of 5x5 patches, which is odd, so that the coarsest level (2x2) loses a row.
LayerNorm affines, BatchNorm statistics and biases are far from their initial values, so that a forgotten fold shows.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tests.phantoms import phantom
from tinyusfm_calibration.ranges import Observer, Ranges
from tinyusfm_edge.models.student import StudentConfig, build_student
from tinyusfm_export.graph.build import ExportGraph, build_graph
from tinyusfm_export.quantize.spans import calibration_taps
from tinyusfm_runtime.numerics.preprocess import preprocess
from tinyusfm_runtime.spec import ModelSpec, PreprocessSpec, Task

torch.set_num_threads(1)
"""Nets this small only make threads wait for each other."""

SMALL: dict[str, Any] = {"width": 48, "heads": 3, "image_size": 80}


def awkward(module: nn.Module, seed: int = 0) -> nn.Module:
    """Gives every norm and bias non-trivial values; the module is returned in evaluation mode."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(tensor: Tensor, low: float, high: float) -> None:
        tensor.data.uniform_(low, high, generator=generator)

    for layer in module.modules():
        if isinstance(layer, nn.LayerNorm | nn.BatchNorm2d):
            uniform(layer.weight, 0.5, 1.5)
            uniform(layer.bias, -0.5, 0.5)
        if isinstance(layer, nn.BatchNorm2d):
            assert layer.running_mean is not None and layer.running_var is not None
            uniform(layer.running_mean, -0.5, 0.5)
            uniform(layer.running_var, 0.3, 2.0)
        if isinstance(layer, nn.Linear | nn.Conv2d) and layer.bias is not None:
            uniform(layer.bias, -0.2, 0.2)
        if isinstance(layer, nn.Linear):
            layer.weight.data *= 4.0  # attention far from uniform
    return module.eval()


def make_student(task: str = "segment", **changes: Any) -> tuple[nn.Module, ModelSpec]:
    """A small random student and its spec."""
    config = StudentConfig(**{"task": task, **SMALL, **changes})  # type: ignore[arg-type]
    torch.manual_seed(3)
    student = awkward(build_student(config))
    spec = ModelSpec(
        name=f"small-{task}",
        task=Task(task),
        labels=("head",),
        preprocess=PreprocessSpec(height=config.input_hw[0], width=config.input_hw[1]),
        architecture=config.to_json(),
    )
    return student, spec


def phantom_inputs(spec: ModelSpec, count: int = 3) -> list[np.ndarray]:
    """uint8 NCHW inputs made of phantoms."""
    return [preprocess(phantom(seed).frame, spec.preprocess)[0] for seed in range(count)]


def normalised(tensor: np.ndarray, spec: ModelSpec) -> Tensor:
    """The student's own input: three equal channels, ImageNet mean and std."""
    mean = torch.tensor(spec.preprocess.mean)[None, :, None, None]
    std = torch.tensor(spec.preprocess.std)[None, :, None, None]
    return ((torch.from_numpy(tensor).float() / 255).expand(1, 3, -1, -1) - mean) / std


def small_graph(task: str = "segment", **changes: Any) -> ExportGraph:
    """The export graph of a small student."""
    return build_graph(*make_student(task, **changes))


def observed(graph: ExportGraph, method: str = "minmax") -> Ranges:
    """Ranges of a graph on a few phantoms."""
    observer, taps = Observer(), calibration_taps(graph)
    for tensor in phantom_inputs(graph.spec):
        observer.add(taps(tensor))
    return Ranges(tensors=observer.tensors(method), method=method, set_id="test", frame_sha256=("0" * 64,))
