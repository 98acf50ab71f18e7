"""Sensitivity: which tensor costs how much.

Also the fewest layers that must stay float for the gate to hold.

Each layer that the policy quantizes is quantized alone, in fake quantization (fake_quant.py: torch, the arithmetic of
the exported Q/DQ graph), and its answers are compared with the float graph's on the same frames. A layer's *cost* is
the loss of mean Dice (segmentation), the mean change of probability (classification) or 1 - mean cosine (features);
equal costs are distinguished by the mean absolute change of the logits. ``all`` is the cost of everything at once.

``mixed_policies`` turns the order into policies that keep the 0, 1, 2, ... most expensive layers float; the fallback
takes the first that holds the gate on every target, measured on the artefact. A measurement is deterministic and can
be taken up where it stopped.

It does not know engines, files' places or the PyTorch student.

Shapes: S frames; NCHW codes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from tinyusfm_export.graph.inference import repeatable_inference
from tinyusfm_export.quantize.decision import QuantDecision, float_decision
from tinyusfm_export.quantize.fake_quant import FakeQuant
from tinyusfm_export.quantize.ptq import PtqPolicy
from tinyusfm_runtime.errors import CalibrationError, InputError
from tinyusfm_runtime.spec import ModelSpec, Task
from tinyusfm_runtime.strict_json import refusing

if TYPE_CHECKING:
    from tinyusfm_export.graph.build import ExportGraph

SENSITIVITY_VERSION = 1
"""Version of the JSON that ``Sensitivity.to_json`` writes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerCost:
    """What one layer costs in int8.

    Attributes:
        layer: path in the export graph.
        tensor: the activation it reads.
        cost: loss in the task's own measure, see the module's docstring.
        logit_abs: mean absolute change of the logits.
    """

    layer: str
    tensor: str
    cost: float
    logit_abs: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Sensitivity:
    """Costs of all layers of one student under one decision.

    Attributes:
        measure: what ``cost`` is, in words.
        layers: most expensive first.
        whole: the cost of all of them together.
        frames: number of frames it was measured on.
        frames_sha256: which frames.
        decision: what was taken apart.
        weights_sha256: the student.
    """

    measure: str
    layers: tuple[LayerCost, ...]
    whole: LayerCost
    frames: int
    frames_sha256: str
    decision: QuantDecision
    weights_sha256: str

    def to_json(self) -> dict[str, Any]:
        """Plain data, ready for ``json.dumps``."""
        return {
            "version": SENSITIVITY_VERSION,
            "measure": self.measure,
            "layers": [_row(layer) for layer in self.layers],
            "whole": _row(self.whole),
            "frames": self.frames,
            "frames_sha256": self.frames_sha256,
            "decision": self.decision.to_json(),
            "weights_sha256": self.weights_sha256,
        }

    @classmethod
    @refusing("the sensitivity file", InputError)
    def from_json(cls, data: Any) -> Sensitivity:
        """Reads what ``to_json`` wrote.

        Raises:
            InputError: another version, or not a sensitivity file.
        """
        if not isinstance(data, dict) or data.get("version") != SENSITIVITY_VERSION:
            raise InputError("this is no sensitivity file of a version that can be read: measure it again")
        try:
            return cls(
                measure=str(data["measure"]),
                layers=tuple(LayerCost(**row) for row in data["layers"]),
                whole=LayerCost(**data["whole"]),
                frames=int(data["frames"]),
                frames_sha256=str(data["frames_sha256"]),
                decision=QuantDecision.from_json(data["decision"]),
                weights_sha256=str(data["weights_sha256"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"the sensitivity file is not usable: {error}") from error

    def table(self, most: int | None = None) -> list[tuple[str, str, str]]:
        """Rows (layer, cost, mean change of the logits) for people, most expensive first."""
        rows = [*self.layers[:most], self.whole]
        return [(row.layer, f"{row.cost:.6f}", f"{row.logit_abs:.5f}") for row in rows]


def measure_sensitivity(
    graph: ExportGraph,
    decision: QuantDecision,
    inputs_NCHW: Sequence[np.ndarray],
    *,
    frames_sha256: str = "",
    known: Mapping[str, Mapping[str, float]] | None = None,
    keep: Callable[[dict[str, dict[str, float]]], None] | None = None,
    progress: Callable[[str, float], None] | None = None,
) -> Sensitivity:
    """Quantizes each layer alone and all of them together.

    Args:
        graph: the export graph.
        decision: an int8 decision with static ranges.
        inputs_NCHW: preprocessed frames, uint8.
        frames_sha256: which frames, for the record.
        known: costs found by an earlier, stopped run: layer -> cost and logit_abs.
        keep: called with all costs so far after each layer, to be stored.
        progress: called with the step and the share done.

    Returns:
        The costs.

    Raises:
        CalibrationError: no frames, or nothing is quantized.
        UnsupportedError: dynamic tensors.
    """
    quantized = decision.quantized()
    if not inputs_NCHW or not quantized:
        raise CalibrationError("sensitivity needs frames and a decision that quantizes something")
    progress = progress or (lambda what, share: None)
    # float logits of every frame, computed once: BKHW or BK each
    wanted = answers(FakeQuant(graph, float_decision("fp32")), inputs_NCHW)
    found = {name: dict(costs) for name, costs in (known or {}).items()}
    # one job per layer alone, and one with all of them
    jobs = {graph.linear_inputs[name]: {name: quant} for name, quant in quantized.items()} | {"all": quantized}
    for number, (layer, tensors) in enumerate(jobs.items()):
        if layer not in found:
            # the same grids, but every other tensor stays float
            alone = replace(decision, tensors=dict(tensors))
            found[layer] = answer_cost(answers(FakeQuant(graph, alone), inputs_NCHW), wanted, graph.spec)
            if keep is not None:
                keep(found)
        progress(f"quantizing {layer} alone" if layer != "all" else "quantizing all layers", (number + 1) / len(jobs))
    tensor_of = {graph.linear_inputs[name]: name for name in quantized}
    rows = [LayerCost(layer=layer, tensor=tensor_of[layer], **found[layer]) for layer in tensor_of]
    rows.sort(key=lambda row: (-row.cost, -row.logit_abs, row.layer))
    return Sensitivity(
        measure=MEASURES[graph.spec.task],
        layers=tuple(rows),
        whole=LayerCost(layer="all", tensor="", **found["all"]),
        frames=len(inputs_NCHW),
        frames_sha256=frames_sha256,
        decision=decision,
        weights_sha256=graph.spec.weights_sha256,
    )


MEASURES = {
    Task.SEGMENT: "1 - mean Dice against the float graph",
    Task.CLASSIFY: "mean largest change of a probability",
    Task.FEATURES: "1 - mean cosine against the float graph",
}
"""What a cost is, by task."""


def mixed_policies(sensitivity: Sensitivity, start: PtqPolicy | None = None) -> tuple[PtqPolicy, ...]:
    """Policies that keep ever more of the most expensive layers float.

    0, 1, 2, ..., all but one.

    The fallback takes the first that holds the gate, so the fewest layers are given up.

    Args:
        sensitivity: costs of the student's layers.
        start: the policy to begin with.
    """
    first = start or PtqPolicy()
    return tuple(keep_most_expensive(sensitivity, count, first) for count in range(len(sensitivity.layers)))


def keep_most_expensive(sensitivity: Sensitivity, count: int, start: PtqPolicy | None = None) -> PtqPolicy:
    """The policy that keeps the ``count`` most expensive layers float."""
    first = start or PtqPolicy()
    return replace(first, keep_float=first.keep_float + tuple(row.layer for row in sensitivity.layers[:count]))


def answers(model: FakeQuant, inputs_NCHW: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Logits of every frame, float32."""
    import torch

    with repeatable_inference():
        return [model(torch.from_numpy(np.ascontiguousarray(codes)).float()).numpy() for codes in inputs_NCHW]


def frame_costs(
    graph: ExportGraph, sides: Mapping[str, tuple[ExportGraph, QuantDecision]], inputs_NCHW: Sequence[np.ndarray]
) -> dict[str, list[dict[str, float]]]:
    """What each side costs on every frame against a float graph.

    Args:
        graph: the float graph.
        sides: by name, a graph and the int8 decision it computes under.
        inputs_NCHW: preprocessed frames, uint8.

    Returns:
        Name -> ``cost`` and ``logit_abs`` of each frame.
    """
    wanted = answers(FakeQuant(graph, float_decision("fp32")), inputs_NCHW)
    found = {name: answers(FakeQuant(*side), inputs_NCHW) for name, side in sides.items()}
    return {
        name: [answer_cost([a], [b], graph.spec) for a, b in zip(got, wanted, strict=True)]
        for name, got in found.items()
    }


def answer_cost(found: Sequence[np.ndarray], wanted: Sequence[np.ndarray], spec: ModelSpec) -> dict[str, float]:
    """``cost`` and ``logit_abs`` of answers against the wanted ones.

    See the module's docstring.
    """
    pairs = list(zip(found, wanted, strict=True))
    change = float(np.mean([np.abs(a.astype(np.float64) - b).mean() for a, b in pairs]))
    return {"cost": float(np.mean([_distance(a, b, spec) for a, b in pairs])), "logit_abs": change}


def _distance(found: np.ndarray, wanted: np.ndarray, spec: ModelSpec) -> float:
    if spec.task is Task.FEATURES:
        a, b = found.ravel().astype(np.float64), wanted.ravel().astype(np.float64)
        return 1.0 - float(a @ b / max(float(np.linalg.norm(a) * np.linalg.norm(b)), 1e-12))
    if spec.task is Task.CLASSIFY:
        return float(np.abs(_softmax(found) - _softmax(wanted)).max())
    # the threshold as a logit, so that no sigmoid is needed
    cut = float(np.log(spec.threshold / (1 - spec.threshold)))
    if found.shape[1] == 1:
        return 1.0 - _dice(found > cut, wanted > cut)
    # (1, H, W) labels; Dice of each label but the background
    a, b = found.argmax(1), wanted.argmax(1)
    return 1.0 - float(np.mean([_dice(a == k, b == k) for k in range(1, found.shape[1])]))


def _dice(a: np.ndarray, b: np.ndarray) -> float:
    total = int(a.sum()) + int(b.sum())
    return 1.0 if total == 0 else 2.0 * int((a & b).sum()) / total


def _softmax(logits: np.ndarray) -> np.ndarray:
    shifted = np.exp(logits.astype(np.float64) - logits.max(1, keepdims=True))
    return np.asarray(shifted / shifted.sum(1, keepdims=True))


def _row(layer: LayerCost) -> dict[str, Any]:
    return {"layer": layer.layer, "tensor": layer.tensor, "cost": layer.cost, "logit_abs": layer.logit_abs}


__all__ = [
    "MEASURES",
    "SENSITIVITY_VERSION",
    "LayerCost",
    "Sensitivity",
    "answer_cost",
    "answers",
    "frame_costs",
    "keep_most_expensive",
    "measure_sensitivity",
    "mixed_policies",
]
