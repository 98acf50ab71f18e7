"""A target and an engine without a library, and a student of one convolution: a whole export in a second.

The student asks where an image is bright (tests/conftest.py computes the same in numpy). The target writes how far the
artefact shall be off into its file, and the engine obeys: ``shift`` is added to the logits, ``poison`` puts a NaN in.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.conftest import REACH, tiny_kernel, tiny_logits, tiny_spec
from tests.plugged import plug_in_module, plugged
from tinyusfm_calibration.sets import NamedFrame, phantom_frames
from tinyusfm_export.pipeline import ExportOptions, Stages
from tinyusfm_export.quantize.decision import QuantDecision, TensorQuant, float_decision
from tinyusfm_export.quantize.ptq import PtqPolicy
from tinyusfm_export.targets import BuiltArtefact, Requirements
from tinyusfm_export.verify.gate_frames import GateFrames
from tinyusfm_runtime.device.machine import machine_card
from tinyusfm_runtime.engines import EngineConfig
from tinyusfm_runtime.frame import Frame
from tinyusfm_runtime.plugins import Availability
from tinyusfm_runtime.spec import IMAGENET_MEAN, IMAGENET_STD

NAMES = ("fake", "other")
"""Two targets, so that a fallback has two levels."""
SPEC = tiny_spec(preprocess=tiny_spec().preprocess)
GOLDEN = 8
"""Golden frames of a test bundle; a real one has 32."""
OFF = {"fp32": 0.0, "fp16": 0.001, "int8": 0.02}
"""Shift of the logits by precision; the student's logits lie between -6 and 14."""


class Bright(nn.Module):
    """Normalised image N3HW -> logits N1HW, as ``tiny_logits`` has them."""

    def __init__(self) -> None:
        super().__init__()
        self.blur = nn.Conv2d(1, 1, 2 * REACH + 1, padding=REACH, bias=False)
        self.blur.weight.data = torch.from_numpy(tiny_kernel())

    def forward(self, image_NCHW: Tensor) -> Tensor:
        grey = image_NCHW[:, :1] * IMAGENET_STD[0] + IMAGENET_MEAN[0]
        return (self.blur(grey) - 0.3) * 20.0


@dataclass
class World:
    """What a test may bend.

    Attributes:
        off: precision -> shift of the logits.
        decoder_off: further shift where the decoder is int8 too.
        poison: precisions whose engine gives a NaN.
        wobble: precisions whose engine answers a little differently on every run.
        missing: engines whose library is not installed.
        builds: (target, precision) of every build.
    """

    off: dict[str, float] = field(default_factory=lambda: dict(OFF))
    decoder_off: float = 0.0
    poison: set[str] = field(default_factory=set)
    wobble: set[str] = field(default_factory=set)
    missing: set[str] = field(default_factory=set)
    builds: list[tuple[str, str]] = field(default_factory=list)


def install(monkeypatch: pytest.MonkeyPatch) -> World:
    """Registers the fake targets and engines; ``options`` makes exports take the student's own graph."""
    world = World()
    for kind, attribute, make in (("engines", "Engine", _engine), ("targets", "Target", _target)):
        made = {}
        for name in NAMES:
            contents = {attribute: make(world, name), "available": _available(world, name, attribute)}
            made[name] = plug_in_module(name, **contents)
        plugged(monkeypatch, kind, **made)
    return world


@dataclass(frozen=True)
class Graph:
    """What the pipeline needs of a graph."""

    spec: Any
    linear_inputs: Mapping[str, str] = field(default_factory=lambda: {"blur.input": "blur"})
    sector: str = ""


def options(**changes: Any) -> ExportOptions:
    """Options of an export of the student, by its own stages."""
    return ExportOptions(stages=STAGES, **changes)


@lru_cache(maxsize=1)
def gate_phantoms() -> GateFrames:
    """36 phantoms to judge on."""
    return GateFrames(kind="phantom", frames=tuple(phantom_frames(range(100, 136))), source="test phantoms")


@lru_cache(maxsize=1)
def calibration_phantoms() -> list[NamedFrame]:
    """16 phantoms to calibrate on."""
    return phantom_frames(range(200, 216))


@lru_cache(maxsize=1)
def _golden() -> tuple[Frame, ...]:
    from tinyusfm_export.verify.golden import golden_frames

    return tuple(golden_frames(range(GOLDEN)))


def _decide(graph: Any, precision: str, ranges: Any, *, policy: PtqPolicy) -> QuantDecision:
    if precision != "int8":
        return float_decision(precision)
    tensors = {
        name: TensorQuant(mode="static", low=low, high=high) for name, (low, high) in sorted(ranges.tensors.items())
    }
    if policy.decoder:
        tensors["head.input"] = TensorQuant(mode="static", low=-1.0, high=1.0)
    return QuantDecision(
        precision="int8", rest_precision="f32", tensors=tensors, set_id=ranges.set_id, method=ranges.method
    )


STAGES = Stages(
    build_graph=lambda module, spec, auxiliary: Graph(spec=spec),  # type: ignore[arg-type,return-value]
    decide=_decide,
    taps=lambda graph: lambda tensor: {"blur.input": tensor / np.float32(255)},
    golden=lambda: list(_golden()),
)
"""The parts of an export that know this student."""


def _available(world: World, name: str, attribute: str) -> Any:
    def available() -> Availability:
        if attribute == "Engine" and name in world.missing:
            return Availability(usable=False, reason="fakelib is not installed", extra="fakelib")
        return Availability(usable=True, reason="numpy")

    return available


def _target(world: World, target_name: str) -> type:
    class Target:
        name = target_name
        suffix = ".json"
        precisions = ("fp32", "fp16", "int8")

        def build(self, graph: Graph, decision: QuantDecision, out: Path) -> BuiltArtefact:
            world.builds.append((target_name, decision.precision))
            path = out / "model.json"
            shift = world.off[decision.precision]
            if "head.input" in decision.quantized():
                shift += world.decoder_off
            recipe = {
                "shift": shift,
                "poison": decision.precision in world.poison,
                "wobble": decision.precision in world.wobble,
                "size": "x" * (1000 if decision.precision == "fp32" else 300),
            }
            path.write_text(json.dumps(recipe), encoding="ascii")
            needs = Requirements(cpu_features=machine_card().features, library="numpy", library_version=np.__version__)
            return BuiltArtefact(files=(path,), form="json", rest_precision="f32", requirements=needs)

    return Target


def _engine(world: World, name: str) -> type:
    class Engine:
        def __init__(self) -> None:
            self.recipe: dict[str, Any] = {}
            self.runs = 0

        @property
        def description(self) -> str:
            return f"{name} engine f32"

        def load(self, files: Mapping[str, bytes], spec: Any, config: EngineConfig) -> None:
            self.recipe = json.loads(files["model.json"])

        def run(self, tensor: np.ndarray) -> dict[str, np.ndarray]:
            self.runs += 1
            logits = tiny_logits(tensor) + np.float32(self.recipe["shift"])
            if self.recipe["wobble"]:
                logits += np.float32(np.random.default_rng().normal(0, 3))
            if self.recipe["poison"]:
                logits[0, 0, 0, 0] = np.nan
            return {"logits": logits}

        def cancel(self) -> None:
            pass

        def close(self) -> None:
            self.recipe = {}

    return Engine
