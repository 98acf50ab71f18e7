"""Golden checks: does this engine answer here as it did when verified?

On this machine, as it did when the artefact was verified.

Two comparisons, both pure functions over arrays that report numbers and not only a verdict:

* ``golden_check``: against the artefact's own stored outputs, within its small tolerance. It finds a
  wrong engine setting, a broken library or a damaged weight. For the class of CPU it was verified on.
* ``reference_check``: against the PyTorch float32 reference, within the limits of the gate. Where
  another CPU rounds differently the own outputs say little; whether the answer is still right says all.

Both compare what a user reads, and both would be blind to a manifest whose threshold, labels, spacing or
post-processing were changed, since both sides would be read by it. So golden answers carry the readings that were
made of them and the digest of the spec they were made with, and ``spec_faults`` reads the stored answers again: the
arithmetic is exact, so any difference is the manifest's.

It does not run engines and does not read bundles; session.py does.

Shapes: SKHW = frames, classes, rows, columns; SK = frames, classes; SEK = frames, exits, classes (a chain's).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from tinyusfm_runtime.bundle.arrays import pack_arrays
from tinyusfm_runtime.numerics.order import wide
from tinyusfm_runtime.numerics.postprocess import Answer, answer, probabilities
from tinyusfm_runtime.numerics.preprocess import Placement
from tinyusfm_runtime.spec import LOGITS_NAME, ModelSpec, Task

if TYPE_CHECKING:
    from tinyusfm_runtime.numerics.measure import Measurement

READINGS: Final = "readings"
"""Array of a golden file: what was read of its answers."""
SPEC_DIGEST: Final = "spec_sha256"
"""Text of a golden file: digest of the spec by which that was read."""
NUMBERS: Final = (
    "found", "touches_border", "cut_by_sector", "confidence", "area_px", "area_mm2", "box_row", "box_col", "box_height",
    "box_width", "centroid_row", "centroid_col", "hc_mm", "hc_px", "major_mm", "minor_mm", "major_px", "minor_px",
    "centre_row", "centre_col", "angle_deg", "agreement",
)  # fmt: skip
"""What is read of one label of a mask."""
Prepared = Sequence[tuple[np.ndarray, Placement]]
"""Preprocessed frames: uint8 NCHW tensor and where the frame lies in it."""
DEFAULT_LIMITS = {
    "dice_mean": 0.99,
    "dice_worst": 0.95,
    "hc_p95_mm": 1.0,
    "differing_pixels": 0.005,
    "min_coverage": 0.01,
    "top1": 0.99,
    "drift_mean": 0.02,
    "drift_worst": 0.10,
    "cosine_mean": 0.99,
    "cosine_worst": 0.97,
}
"""The default gate's thresholds: what ``reference_check`` uses where the artefact's own gate does not say."""
_AT_MOST = ("hc_p95_mm", "differing_pixels", "drift_mean", "drift_worst")  # the others are "at least"


@dataclass(frozen=True, kw_only=True, slots=True)
class GoldenReport:
    """What a golden comparison found. True if everything lies within its limit.

    Attributes:
        against: ``own outputs`` or ``reference``.
        frames: number of frames compared.
        numbers: statistic -> value.
        limits: statistic -> limit it was held against.
        reasons: what missed its limit, one phrase each; empty if nothing did.
    """

    against: str
    frames: int
    numbers: Mapping[str, float]
    limits: Mapping[str, float]
    reasons: tuple[str, ...]

    def __bool__(self) -> bool:
        return self.frames > 0 and not self.reasons

    def to_json(self) -> dict[str, Any]:
        """Plain data, ready for ``json.dumps``."""
        return {**asdict(self), "passed": bool(self), "reasons": list(self.reasons)}


def pack_golden(
    logits_SK: np.ndarray,
    spec: ModelSpec,
    prepared: Prepared,
    extra: Mapping[str, np.ndarray] | None = None,
) -> bytes:
    """A file of golden answers.

    Logits, the readings made of them, and the digest of the spec.

    Args:
        logits_SK: float16 or float32, SKHW, SK or SEK.
        spec: the model, as the manifest will hold it.
        prepared: input tensor (uint8 NCHW) and placement of each frame.
        extra: further arrays.
    """
    arrays = {"logits": logits_SK, READINGS: read_numbers(logits_SK, spec, prepared)}
    return pack_arrays({**arrays, **(extra or {})}, {SPEC_DIGEST: spec.digest})


def read_numbers(logits_SK: np.ndarray, spec: ModelSpec, prepared: Prepared) -> np.ndarray:
    """What a user would read of stored answers, as numbers.

    Args:
        logits_SK: float16 or float32, SKHW, SK or SEK.
        spec: the model.
        prepared: input tensor and placement of each frame.

    Returns:
        float64 (S, R): of a mask ``NUMBERS`` of each label in turn, NaN for None; of a classifier its probabilities; of
        features nothing. Of logits that are not finite NaN.
    """
    rows = [_numbers(logits, spec, *one) for logits, one in zip(logits_SK, prepared, strict=True)]
    most = max(map(len, rows), default=0)
    return np.array([[*row, *[math.nan] * (most - len(row))] for row in rows], np.float64).reshape(len(rows), most)


def spec_faults(
    arrays: Mapping[str, np.ndarray], digest: str | None, spec: ModelSpec, prepared: Prepared, chosen: Sequence[int]
) -> tuple[str, ...]:
    """Whether golden answers were read by this very spec.

    Args:
        arrays: of a golden file.
        digest: of the spec, as that file holds it.
        spec: of the manifest.
        prepared: input tensor and placement of the chosen frames.
        chosen: which frames these are.

    Returns:
        What does not fit, one phrase each; empty where all does.
    """
    faults = []
    if digest != spec.digest:
        faults.append("the manifest's model is not the one that the golden answers were read with")
    stored = arrays.get(READINGS)
    if stored is None or len(stored) != len(arrays["logits"]):
        return (*faults, "the golden answers hold no readings")
    now = read_numbers(arrays["logits"][list(chosen)], spec, prepared)
    then = stored[list(chosen)]
    if now.shape != then.shape or not np.array_equal(now, then, equal_nan=True):
        faults.append(
            "the manifest's threshold, labels, spacing or post-processing give other readings of the golden answers "
            "than those that were stored"
        )
    return tuple(faults)


def _numbers(logits: np.ndarray, spec: ModelSpec, tensor: np.ndarray, placement: Placement) -> list[float]:
    full = np.ascontiguousarray(logits, np.float32)
    if spec.task is Task.FEATURES or not np.isfinite(full).all():
        return []
    if spec.task is Task.CLASSIFY:
        rows = full.reshape(-1, full.shape[-1])
        return [float(share) for row in rows for share in probabilities(row)]
    answered = answer({LOGITS_NAME: full[None]}, spec, placement, codes_HW=tensor[0, 0])
    return [value for measured in answered.measurements for value in _measured_numbers(measured)]


def _measured_numbers(measured: Measurement) -> list[float]:
    missing = float("nan")
    axes_mm = measured.axes_mm or (missing, missing)
    values = (
        measured.found, measured.touches_border, measured.cut_by_sector, measured.confidence, measured.area_px,
        measured.area_mm2, *measured.box_px, *measured.centroid_px, measured.hc_mm, measured.hc_px, *axes_mm,
        *measured.axes_px, *measured.centre_px, measured.angle_deg, measured.agreement,
    )  # fmt: skip
    return [missing if value is None else float(value) for value in values]


def golden_check(
    got_SK: np.ndarray,
    want_SK: np.ndarray,
    spec: ModelSpec,
    placements: Sequence[Placement],
    tolerance: Mapping[str, float],
) -> GoldenReport:
    """Compares logits with the artefact's own ones.

    Args:
        got_SK: float32 logits computed now, SKHW, SK or SEK.
        want_SK: stored logits, float16 or float32, same shape.
        spec: the model.
        placements: where each frame lies in the input.
        tolerance: ``logit_abs``: largest absolute difference of a logit; ``differing_pixels``: largest
            fraction of a frame's mask pixels that differ; ``hc_mm``: largest difference of a circumference.
            What it does not name must be equal.

    Returns:
        ``logit_abs`` (maximum over everything), ``differing_pixels`` (worst frame) and ``hc_mm`` (worst frame).
    """
    if got_SK.shape != want_SK.shape or not len(got_SK):
        return _mismatch("own outputs", got_SK, want_SK)
    wide = want_SK.astype(np.float32)
    with np.errstate(invalid="ignore"):  # inf - inf is NaN, which misses every limit
        numbers = {"logit_abs": float(np.abs(got_SK.astype(np.float64) - wide).max())}
    if spec.task is Task.SEGMENT:
        pairs = [_answers(got, want, spec, place) for got, want, place in zip(got_SK, wide, placements, strict=True)]
        numbers["differing_pixels"] = max(_differing(got.mask_HW, want.mask_HW) for got, want in pairs)
        if any(want.measurement is not None for _, want in pairs):
            numbers["hc_mm"] = max(_hc_difference(got, want) for got, want in pairs)
    limits = {name: float(tolerance.get(name, 0.0)) for name in numbers}
    if spec.task is not Task.SEGMENT:  # where no mask decides, no tolerance is wider than half of what the answers span
        spread = float(wide.max()) - float(wide.min())
        limits["logit_abs"] = min(limits["logit_abs"], max(0.05, spread / 2))
    return _report("own outputs", len(got_SK), numbers, limits, at_most=tuple(numbers))


def reference_check(
    got_SK: np.ndarray,
    want_SK: np.ndarray,
    spec: ModelSpec,
    placements: Sequence[Placement],
    limits: Mapping[str, float] | None = None,
) -> GoldenReport:
    """Compares logits with those of the PyTorch float32 reference.

    Args:
        got_SK: float32 logits computed now, SKHW, SK or SEK.
        want_SK: the reference's logits, same shape.
        spec: the model.
        placements: where each frame lies in the input.
        limits: any of the keys of ``DEFAULT_LIMITS``; the rest keep their defaults.

    Returns:
        Statistics under the names of their limits. For a segmentation Dice and the 95th percentile (next larger sample)
        of the circumferences' differences over the frames whose reference mask covers ``min_coverage`` of the image,
        and the largest share of ``differing_pixels`` over the rest; for a classifier ``top1`` agreement and probability
        drift; for features the cosine.
    """
    if got_SK.shape != want_SK.shape or not len(got_SK):
        return _mismatch("reference", got_SK, want_SK)
    known = {**DEFAULT_LIMITS, **{name: float(value) for name, value in (limits or {}).items()}}
    if spec.task is Task.SEGMENT:
        numbers = _segment_numbers(got_SK, want_SK.astype(np.float32), spec, placements, known["min_coverage"])
    elif spec.task is Task.CLASSIFY:
        numbers = _classify_numbers(got_SK, want_SK)
    else:
        cosines = [_cosine(got, want) for got, want in zip(got_SK, want_SK, strict=True)]
        numbers = {"cosine_mean": float(np.mean(cosines)), "cosine_worst": float(np.min(cosines))}
    at_most = tuple(name for name in _AT_MOST if name in numbers)
    return _report("reference", len(got_SK), numbers, {name: known[name] for name in numbers}, at_most=at_most)


def _report(
    against: str, frames: int, numbers: dict[str, float], limits: dict[str, float], *, at_most: tuple[str, ...]
) -> GoldenReport:
    reasons = []
    for name, value in numbers.items():
        # written so that NaN misses
        if name in at_most and not value <= limits[name]:
            reasons.append(f"{name} {value:.4g} > {limits[name]:.4g}")
        if name not in at_most and not value >= limits[name]:
            reasons.append(f"{name} {value:.4g} < {limits[name]:.4g}")
    return GoldenReport(against=against, frames=frames, numbers=numbers, limits=limits, reasons=tuple(reasons))


def _mismatch(against: str, got: np.ndarray, want: np.ndarray) -> GoldenReport:
    reason = f"logits of shape {got.shape} against {want.shape}"
    return GoldenReport(against=against, frames=len(got), numbers={}, limits={}, reasons=(reason,))


def _answers(got: np.ndarray, want: np.ndarray, spec: ModelSpec, placement: Placement) -> tuple[Answer, Answer]:
    return answer({LOGITS_NAME: got[None]}, spec, placement), answer({LOGITS_NAME: want[None]}, spec, placement)


def _segment_numbers(
    got_SK: np.ndarray, want_SK: np.ndarray, spec: ModelSpec, placements: Sequence[Placement], min_coverage: float
) -> dict[str, float]:
    pairs = [_answers(got, want, spec, place) for got, want, place in zip(got_SK, want_SK, placements, strict=True)]
    counted = [pair for pair in pairs if _coverage(pair[1].mask_HW) >= min_coverage]
    small = [pair for pair in pairs if _coverage(pair[1].mask_HW) < min_coverage]
    numbers: dict[str, float] = {}
    if counted:
        dices = [_dice(got.mask_HW, want.mask_HW) for got, want in counted]
        numbers |= {"dice_mean": float(np.mean(dices)), "dice_worst": float(np.min(dices))}
        differences = [_hc_difference(got, want) for got, want in counted if want.measurement is not None]
        if differences:
            numbers["hc_p95_mm"] = float(np.percentile(wide(differences), 95, method="higher"))
    if small:
        numbers["differing_pixels"] = max(_differing(got.mask_HW, want.mask_HW) for got, want in small)
    return numbers


def _classify_numbers(got_SK: np.ndarray, want_SK: np.ndarray) -> dict[str, float]:
    if not np.isfinite(got_SK).all():
        return {"top1": 0.0, "drift_mean": float("nan"), "drift_worst": float("nan")}
    classes = got_SK.shape[-1]
    got = np.stack([probabilities(row) for row in got_SK.reshape(-1, classes)])
    want = np.stack([probabilities(row) for row in want_SK.reshape(-1, classes)])
    same = (got >= 0.5) == (want >= 0.5) if got.shape[1] == 1 else got.argmax(1) == want.argmax(1)
    drift = np.abs(got - want).max(axis=1)
    return {"top1": float(np.mean(same)), "drift_mean": float(drift.mean()), "drift_worst": float(drift.max())}


def _cosine(got: np.ndarray, want: np.ndarray) -> float:
    a, b = got.astype(np.float64).ravel(), want.astype(np.float64).ravel()
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return float("nan")
    size = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / size if size > 0 else float(not a.any() and not b.any())


def _differing(got_HW: np.ndarray | None, want_HW: np.ndarray | None) -> float:
    if got_HW is None or want_HW is None:
        return 0.0 if got_HW is want_HW else 1.0
    return float(np.mean(got_HW != want_HW))


def _dice(got_HW: np.ndarray | None, want_HW: np.ndarray | None) -> float:
    """Mean over the labels but the background of 2 |A and B| / (|A| + |B|).

    NaN where an answer is missing.
    """
    if got_HW is None or want_HW is None:
        return float("nan")
    from tinyusfm_runtime.numerics.measure import dice

    labels = sorted((set(np.unique(wide(got_HW))) | set(np.unique(wide(want_HW)))) - {0})
    return float(np.mean([dice(got_HW == label, want_HW == label) for label in labels])) if labels else 1.0


def _coverage(mask_HW: np.ndarray | None) -> float:
    return 0.0 if mask_HW is None else float(np.mean(mask_HW != 0))


def _hc_difference(got: Answer, want: Answer) -> float:
    """A head that one side does not find counts as 0 mm.

    So does one in a frame without a spacing.
    """
    got_mm, want_mm = ((side.measurement.hc_mm if side.measurement else None) or 0.0 for side in (got, want))
    return abs(got_mm - want_mm)


__all__ = [
    "DEFAULT_LIMITS",
    "NUMBERS",
    "READINGS",
    "SPEC_DIGEST",
    "GoldenReport",
    "Prepared",
    "golden_check",
    "pack_golden",
    "read_numbers",
    "reference_check",
    "spec_faults",
]
