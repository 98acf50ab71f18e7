"""An artefact in its own engine on frames, with truth where there is any.

Masks, readings and circumferences are those that a user sees (second pass included). Metrics carry intervals over whole
patients; two artefacts are compared on the same frames. It does not know gates or pages.

Shapes: HW masks, NK scores, B bins.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from tinyusfm_edge.data.marks import label_numbers
from tinyusfm_edge.data.table import Sample, resize_mask
from tinyusfm_edge.evaluation.bootstrap import Estimate, estimate_mean, estimate_statistic, paired_difference
from tinyusfm_edge.evaluation.metrics import CLASS_METRICS, hausdorff95, overlap
from tinyusfm_export.verify.engine_run import Inputs, open_engine, preprocess_all, run_engine
from tinyusfm_export.verify.expected import judged_spec
from tinyusfm_export.verify.parity import Output
from tinyusfm_runtime.bundle.manifest import Artefact
from tinyusfm_runtime.bundle.reader import Bundle
from tinyusfm_runtime.errors import InputError
from tinyusfm_runtime.frame import Frame
from tinyusfm_runtime.spec import ModelSpec, Task

HIGHER_IS_BETTER: Mapping[str, bool] = {
    "dice": True,
    "iou": True,
    "hd95_mm": False,
    "hc_abs_error_mm": False,
    "accuracy": True,
    "balanced_accuracy": True,
    "auc": True,
    "f1": True,
    "ece": False,
}
"""Metric -> whether more is better."""
ECE_BINS = 15
"""Bins of equal width of the calibration error of pixels (Guo et al., arXiv 1706.04599)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FrameResult:
    """What an artefact said about one frame.

    Attributes:
        id: name of the frame.
        group: patient.
        stratum: kind of frame, such as a label, site or probe; empty where the table names none.
        found: something is marked, or a class was named.
        reading: good, doubtful, none or unchecked.
        top: the class, or empty.
        hc_mm: circumference of the first label, or None.
        values: metric -> number, against the truth; empty without truth.
        scores: probability of each class; empty for masks.
        truth: index of the true class, or -1.
        bins: sums of (count, probability, truth) a bin over the pixels, 3B; empty for classes or without truth.
    """

    id: str
    group: str
    stratum: str
    found: bool
    reading: str
    top: str
    hc_mm: float | None
    values: Mapping[str, float] = field(default_factory=dict)
    scores: tuple[float, ...] = ()
    truth: int = -1
    bins: tuple[float, ...] = ()


def golden_samples(frames: Sequence[Frame]) -> list[Sample]:
    """A bundle's golden phantoms as frames without truth.

    Args:
        frames: golden frames.
    """
    return [
        Sample(
            id=f"phantom:{frame.seq}",
            group=f"phantom:{frame.seq}",
            frame=frame,
            mask_HW=np.zeros(frame.pixels.shape[:2], np.uint8),
            hc_mm=None,
            sha256="",
        )
        for frame in frames
    ]


def run_artefact(
    bundle: Bundle, artefact: Artefact, samples: Sequence[Sample], *, truth: bool = True, threads: int = 1
) -> tuple[FrameResult, ...]:
    """Runs an artefact on frames.

    Args:
        bundle: holds it.
        artefact: of that bundle.
        samples: frames.
        truth: compare with the samples' masks or labels.
        threads: inside the engine.

    Raises:
        InputError: truth is asked for of a model that answers with several masks or with features.
        EngineError: the engine failed.
        MissingExtra, UnsupportedError: the engine does not work here.
    """
    spec, inputs, outputs = run_outputs(bundle, artefact, samples, threads=threads)
    return results_of(spec, samples, outputs, inputs, truth=truth)


def run_outputs(
    bundle: Bundle, artefact: Artefact, samples: Sequence[Sample], *, threads: int = 1
) -> tuple[ModelSpec, Inputs, tuple[Output, ...]]:
    """Runs an artefact on frames.

    Args:
        bundle: holds it.
        artefact: of that bundle.
        samples: frames.
        threads: inside the engine.

    Returns:
        The model as it was judged, the inputs, and one output per frame.

    Raises:
        EngineError: the engine failed.
        MissingExtra, UnsupportedError: the engine does not work here.
    """
    spec = judged_spec(bundle)
    frames = [sample.frame for sample in samples]
    inputs = preprocess_all(frames, spec)
    files = bundle.artefact_files(artefact)
    with open_engine(artefact.engine, files, spec, threads=threads, rest_precision=artefact.rest_precision) as engine:
        return spec, inputs, tuple(run_engine(engine, spec, inputs, frames))


def results_of(
    spec: ModelSpec, samples: Sequence[Sample], outputs: Sequence[Output], inputs: Inputs, *, truth: bool = True
) -> tuple[FrameResult, ...]:
    """Answers as results, against the truth where it is asked for.

    Args:
        spec: the model.
        samples: frames.
        outputs: one per frame.
        inputs: one per frame.
        truth: compare with the samples' masks or labels.

    Raises:
        InputError: truth is asked for of a model that answers with several masks or with features.
    """
    if truth and not (spec.task is Task.CLASSIFY or (spec.task is Task.SEGMENT and len(spec.labels) == 1)):
        raise InputError(f"model {spec.name!r} answers with neither one mask nor classes: no truth to compare with")
    placed = [placement for _, placement in inputs]
    return tuple(
        _result(spec, sample, output, place.spacing_mm, truth)
        for sample, output, place in zip(samples, outputs, placed, strict=True)
    )


def _result(
    spec: ModelSpec, sample: Sample, output: Output, spacing_mm: tuple[float, float] | None, truth: bool
) -> FrameResult:
    head = output.answer.measurement
    scores: tuple[float, ...] = ()
    top, label = "", -1
    if spec.task is Task.CLASSIFY and output.answer.scores is not None:
        scores = tuple(float(score) for score in output.answer.scores)
        top = spec.labels[int(np.argmax(scores))] if scores else ""
        label = label_numbers(spec.labels).get(sample.label, -1) if truth else -1
    hc_mm = None if head is None else head.hc_mm
    found = bool(top) or (output.mask_HW is not None and bool(output.mask_HW.any()))
    values: dict[str, float] = {}
    bins: tuple[float, ...] = ()
    if truth and spec.task is Task.SEGMENT:
        values, bins = _mask_values(spec, sample, output, spacing_mm)
        if hc_mm is not None and sample.hc_mm is not None:
            values["hc_abs_error_mm"] = abs(hc_mm - sample.hc_mm)
    if label >= 0:
        values["accuracy"] = float(top == spec.labels[label])
    return FrameResult(
        id=sample.id, group=sample.group, stratum=sample.label, found=found, reading=output.reading.value, top=top,
        hc_mm=hc_mm, values=values, scores=scores, truth=label, bins=bins,
    )  # fmt: skip


def _mask_values(
    spec: ModelSpec, sample: Sample, output: Output, spacing_mm: tuple[float, float] | None
) -> tuple[dict[str, float], tuple[float, ...]]:
    right_HW = resize_mask(sample.mask_HW, sample.frame, spec.preprocess)
    mask_HW = np.zeros_like(right_HW) if output.mask_HW is None else (output.mask_HW > 0).astype(np.uint8)
    dice, iou = overlap(mask_HW, right_HW)
    values = {"dice": dice, "iou": iou}
    if spacing_mm is not None and (distance := hausdorff95(mask_HW, right_HW, spacing_mm)) is not None:
        values["hd95_mm"] = distance
    logits = np.asarray(output.logits, np.float64)
    if not np.isfinite(logits).all():
        return values, ()
    chance_HW = 1.0 / (1.0 + np.exp(-np.clip(logits.reshape(right_HW.shape), -60, 60)))
    return values, _binned(chance_HW, right_HW)


def _binned(chance_HW: np.ndarray, right_HW: np.ndarray) -> tuple[float, ...]:
    index = np.minimum((chance_HW.ravel() * ECE_BINS).astype(int), ECE_BINS - 1)
    parts = [np.bincount(index, weights=weights, minlength=ECE_BINS) for weights in _weights(chance_HW, right_HW)]
    return tuple(float(value) for part in parts for value in part)


def _weights(chance_HW: np.ndarray, right_HW: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return np.ones(chance_HW.size), chance_HW.ravel(), right_HW.ravel().astype(np.float64)


def metric_names(results: Sequence[FrameResult]) -> tuple[str, ...]:
    """Metrics that these frames can say something about.

    Args:
        results: of one artefact.
    """
    known = {name for result in results for name in result.values}
    if any(result.bins for result in results):
        known.add("ece")
    if any(result.truth >= 0 for result in results):
        known |= {"balanced_accuracy", "auc", "f1", "ece"}
    return tuple(name for name in HIGHER_IS_BETTER if name in known)


def estimate(results: Sequence[FrameResult], metric: str) -> Estimate | None:
    """One metric with its interval over patients.

    Args:
        results: of one artefact.
        metric: a key of ``HIGHER_IS_BETTER``.

    Returns:
        None where nothing can be said.
    """
    if statistic := _statistic(results, metric):
        return estimate_statistic(statistic, [result.group for result in results])
    known = [(result.values[metric], result.group) for result in results if metric in result.values]
    return estimate_mean([value for value, _ in known], [group for _, group in known])


def difference(before: Sequence[FrameResult], after: Sequence[FrameResult], metric: str) -> Estimate | None:
    """One metric, after minus before, on the same frames, with its interval.

    Args:
        before: of one artefact.
        after: of the other one, the same frames in the same order.
        metric: a key of ``HIGHER_IS_BETTER``.

    Raises:
        InputError: the frames are not the same.
    """
    if [result.id for result in before] != [result.id for result in after]:
        raise InputError("the two were not run on the same frames in the same order")
    first, second = _statistic(after, metric), _statistic(before, metric)
    groups = [result.group for result in before]
    if first is not None and second is not None:
        return estimate_statistic(lambda index: first(index) - second(index), groups)
    pairs = [
        (new.values[metric], old.values[metric], new.group)
        for old, new in zip(before, after, strict=True)
        if metric in old.values and metric in new.values
    ]
    return paired_difference([a for a, _, _ in pairs], [b for _, b, _ in pairs], [group for _, _, group in pairs])


def _statistic(results: Sequence[FrameResult], metric: str) -> Callable[[np.ndarray], float] | None:
    """A metric of all frames together, or None where it is a mean over frames."""
    if metric in CLASS_METRICS and metric != "accuracy" and all(result.truth >= 0 for result in results):
        measure = CLASS_METRICS[metric]
        scores_NK = np.array([result.scores for result in results])
        truth_N = np.array([result.truth for result in results])
        return lambda index: measure(scores_NK[index], truth_N[index])
    if metric == "ece" and all(result.bins for result in results):
        bins_N3B = np.array([result.bins for result in results]).reshape(len(results), 3, ECE_BINS)
        return lambda index: _calibration_error(bins_N3B[index].sum(0))
    return None


def _calibration_error(bins_3B: np.ndarray) -> float:
    counts, chance, right = bins_3B
    total = counts.sum()
    return float(np.abs(chance - right).sum() / total) if total else math.nan


__all__ = [
    "ECE_BINS",
    "HIGHER_IS_BETTER",
    "FrameResult",
    "difference",
    "estimate",
    "golden_samples",
    "metric_names",
    "results_of",
    "run_artefact",
    "run_outputs",
]
