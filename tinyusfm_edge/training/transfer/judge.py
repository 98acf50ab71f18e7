"""Whether a made set may be used.

It must be like the held-out frames, and no copy of the training frames.

Three questions, all in a teacher's features. Is the set nearer to the validation frames than the warped one is
(Frechet distance, sets of equal size)? Is a sample nearer to a training frame than validation frames of other patients
are (it is refused then)? Are there too many such samples?

It knows features alone. Shapes: N samples, T training frames, V validation frames, D features.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from tinyusfm_edge.training.transfer.config import LEAST_SAMPLES, JudgeConfig
from tinyusfm_edge.training.transfer.distances import frechet_distance, nearest_distances
from tinyusfm_runtime.errors import InputError
from tinyusfm_runtime.numerics.order import wide


@dataclass(frozen=True, kw_only=True, slots=True)
class Neighbours:
    """Distances of frames to their nearest training frame.

    Attributes:
        least: of all.
        median: of all.
        copies: share of them below the limit, 0..1.
    """

    least: float
    median: float
    copies: float

    @classmethod
    def of(cls, distances_N: np.ndarray, limit: float) -> Neighbours:
        """Of some distances."""
        return cls(
            least=float(distances_N.min()),
            median=float(np.median(wide(distances_N))),
            copies=float((distances_N < limit).mean()),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Judgement:
    """What was found about a set.

    Attributes:
        method: of the set.
        drawn: samples that were made.
        refused: of them, too close to a training frame.
        kept: what is left.
        compared: frames of each set in a Frechet distance.
        limit: distance below which a sample is refused.
        frechet: distance of a set to the validation frames, by name: ``set``, ``warp``, ``training``.
        neighbours: of a set, by name: ``set``, ``warp``, ``validation``.
        reasons: why it must not be used; none where it may.
    """

    method: str
    drawn: int
    refused: int
    kept: int
    compared: int
    limit: float
    frechet: dict[str, float]
    neighbours: dict[str, Neighbours]
    reasons: tuple[str, ...]

    @property
    def accepted(self) -> bool:
        """Whether it may be used."""
        return not self.reasons

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {**asdict(self), "reasons": list(self.reasons), "accepted": self.accepted}

    def table(self) -> list[tuple[str, str, str, str, str]]:
        """Rows of ``JUDGEMENT_HEADER``."""
        words = {
            "set": f"this set ({self.method})",
            "warp": "warped training frames",
            "training": "training frames",
            "validation": "validation frames",
        }
        rows = []
        for name, label in words.items():
            near, distance = self.neighbours.get(name), self.frechet.get(name)
            if near is None and distance is None:
                continue
            rows.append(
                (
                    label,
                    "-" if distance is None else f"{distance:.1f}",
                    "-" if near is None else f"{near.least:.3f}",
                    "-" if near is None else f"{near.median:.3f}",
                    "-" if near is None else f"{near.copies:.1%}",
                )
            )
        return rows


JUDGEMENT_HEADER = (
    "frames",
    "Frechet distance to validation",
    "nearest training frame, least",
    "median",
    "too close",
)
"""Columns of ``Judgement.table``."""


def copy_limit(validation_VD: np.ndarray, training_TD: np.ndarray, near: float) -> float:
    """Distance below which a sample counts as a copy.

    Args:
        validation_VD: frames of other patients.
        training_TD: what the generator saw.
        near: quantile of their distances, (0, 1).
    """
    return float(np.quantile(wide(nearest_distances(validation_VD, training_TD)), near))


def judge_set(
    method: str,
    samples_ND: np.ndarray,
    warped_MD: np.ndarray,
    training_TD: np.ndarray,
    validation_VD: np.ndarray,
    config: JudgeConfig,
    *,
    wanted: int,
) -> tuple[Judgement, np.ndarray]:
    """Judges a set.

    Args:
        method: of the set.
        samples_ND: features of every sample that was made, standardised.
        warped_MD: of warped training frames.
        training_TD: of the training frames.
        validation_VD: of the validation frames, of other patients.
        config: limits.
        wanted: samples that were asked for.

    Returns:
        The judgement, and which samples are kept (bool N).

    Raises:
        InputError: too few samples or validation frames for a judgement.
    """
    if min(len(samples_ND), len(warped_MD), len(training_TD), len(validation_VD)) < LEAST_SAMPLES:
        raise InputError(f"a judgement needs {LEAST_SAMPLES} frames or more of each set")
    limit = copy_limit(validation_VD, training_TD, config.near)
    own = nearest_distances(samples_ND, training_TD)
    keep = own >= limit
    kept = samples_ND[keep][:wanted]
    reasons = []
    share = 1 - float(keep.mean())
    if share > config.most_near:
        reasons.append(
            f"{int((~keep).sum())} of {len(keep)} samples are nearer to a training frame than {1 - config.near:.0%} of "
            f"the validation frames: they are copies (at most {config.most_near:.0%} may be)"
        )
    if len(kept) < wanted:
        reasons.append(f"{len(kept)} samples are left, {wanted} were asked for")
    compared = min(len(kept), len(warped_MD), len(training_TD))
    frechet: dict[str, float] = {}
    if compared >= LEAST_SAMPLES:
        sets = {"set": kept, "warp": warped_MD, "training": training_TD}
        frechet = {name: frechet_distance(_spread(part, compared), validation_VD) for name, part in sets.items()}
        if method != "warp" and not frechet["set"] < frechet["warp"]:
            reasons.append(
                f"its Frechet distance to the validation frames, {frechet['set']:.1f}, is not below that of warped "
                f"training frames, {frechet['warp']:.1f}"
            )
    else:
        reasons.append(f"too few samples are left for a Frechet distance: {compared}, at least {LEAST_SAMPLES}")
    distances = {
        "set": own,
        "warp": nearest_distances(warped_MD, training_TD),
        "validation": nearest_distances(validation_VD, training_TD),
    }
    if method == "warp":
        del distances["warp"]
        frechet.pop("warp", None)
    found = Judgement(
        method=method,
        drawn=len(samples_ND),
        refused=int((~keep).sum()),
        kept=len(kept),
        compared=compared,
        limit=limit,
        frechet=frechet,
        neighbours={name: Neighbours.of(part, limit) for name, part in distances.items()},
        reasons=tuple(reasons),
    )
    return found, keep


def _spread(features_ND: np.ndarray, count: int) -> np.ndarray:
    """Evenly spaced ones of a set."""
    return features_ND[np.linspace(0, len(features_ND) - 1, count).round().astype(int)]


__all__ = ["JUDGEMENT_HEADER", "Judgement", "Neighbours", "copy_limit", "judge_set"]
