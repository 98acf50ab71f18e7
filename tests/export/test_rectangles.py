"""Rectangular inputs, whole and pruned to a sector, against PyTorch.

Targets integer, litert and coreml on phantoms; what ONNX and OpenVINO make of them is in test_sector.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.export.students import make_student, normalised, phantom_inputs
from tests.export.test_integer_target import calm, decided, distance
from tinyusfm_export.graph.build import build_graph
from tinyusfm_export.quantize.decision import QuantDecision, float_decision
from tinyusfm_export.verify.artefact import load_target
from tinyusfm_export.verify.engine_run import open_checker
from tinyusfm_export.verify.sector import pruned_reference
from tinyusfm_runtime.reading_rules import TokenSector
from tinyusfm_runtime.spec import ModelSpec

pytestmark = pytest.mark.filterwarnings("ignore")
FAN = ("00111100", "01111110", "11111111", "11111111", "01111110", "00011000")
LIBRARIES = {"integer": (), "litert": ("tflite", "ai_edge_litert"), "coreml": ("coremltools",)}
LIMITS = {"fp32": 1e-4, "fp16": 0.02, "int8": 0.2}
"""Root mean square error of the logits, as a share of theirs."""
CASES = [("integer", "int8"), ("litert", "fp32"), ("litert", "int8"), ("coreml", "fp16"), ("coreml", "int8")]


@dataclass(frozen=True, kw_only=True)
class Rectangle:
    """A student, its spec, and the int8 decision."""

    module: Any
    spec: ModelSpec
    decision: QuantDecision


@lru_cache(maxsize=4)
def rectangle(task: str, rows: int, columns: int) -> Rectangle:
    """A small student of so many rows and columns of patches."""
    module, spec = make_student(task, image_size=16 * rows, image_width=16 * columns)
    return Rectangle(module=calm(module), spec=spec, decision=decided(build_graph(module, spec)))


def answer(target: str, precision: str, made: Rectangle, spec: ModelSpec, tensor: np.ndarray, out: Path) -> np.ndarray:
    """What an artefact answers in its engine, or in its target's stand-in."""
    for library in LIBRARIES[target]:
        pytest.importorskip(library, reason=f"needs {library}")
    graph = build_graph(made.module, spec, pruned=spec.sector is not None)
    decision = made.decision if precision == "int8" else float_decision(precision)
    built = load_target(target).build(graph, decision, out)
    files = {path.name: path.read_bytes() for path in built.files}
    with open_checker(target, files, spec, threads=1, rest_precision=built.rest_precision) as engine:
        return np.array(engine.run(tensor)["logits"])


@pytest.mark.parametrize("kept", [None, FAN], ids=["whole", "pruned"])
@pytest.mark.parametrize("task", ["segment", "classify"])
@pytest.mark.parametrize(("target", "precision"), CASES)
def test_a_rectangle_is_the_student(
    target: str, precision: str, task: str, kept: tuple[str, ...] | None, tmp_path: Path
) -> None:
    made = rectangle(task, 6, 8)
    spec = made.spec if kept is None else replace(made.spec, sector=TokenSector(name="fan", kept=kept))
    reference = made.module if kept is None else pruned_reference(made.module, spec)
    tensor = phantom_inputs(spec, 5)[4]
    with torch.inference_mode():
        wanted = reference(normalised(tensor, spec)).numpy()
    found = answer(target, precision, made, spec, tensor, tmp_path)
    assert found.shape == wanted.shape and distance(found, wanted) < LIMITS[precision]


@pytest.mark.parametrize(("target", "precision"), CASES)
def test_fourteen_by_twenty_one_patches(target: str, precision: str, tmp_path: Path) -> None:
    made = rectangle("segment", 14, 21)
    tensor = phantom_inputs(made.spec, 1)[0]
    assert tensor.shape == (1, 1, 224, 336)
    with torch.inference_mode():
        wanted = made.module(normalised(tensor, made.spec)).numpy()
    found = answer(target, precision, made, made.spec, tensor, tmp_path)
    assert found.shape == wanted.shape and distance(found, wanted) < LIMITS[precision]
    assert distance(found[..., ::-1], wanted) > 2 * LIMITS["fp16"], "or a turned map would not show"
