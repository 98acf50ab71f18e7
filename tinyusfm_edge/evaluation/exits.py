"""Early exits measured and calibrated.

How sure an exit must be so that accuracy falls by half a point at most.

Thresholds are chosen on validation, one per exit, together with patience, to run as few blocks as possible
(methods.md 7). It does not know how the student was trained.

Shapes: E exits (the classifier at the end last), N images, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import numpy as np
import torch

from tinyusfm_edge.data.table import Sample, class_indices
from tinyusfm_edge.models.early_exit import all_exits
from tinyusfm_edge.models.student import ClassificationStudent
from tinyusfm_export.verify.reference import normalise, reference_mode
from tinyusfm_runtime.early_exit import normalised_entropy
from tinyusfm_runtime.errors import InputError
from tinyusfm_runtime.numerics.preprocess import preprocess
from tinyusfm_runtime.spec import ExitPolicy, ModelSpec

MAX_DROP = 0.005
"""Largest loss of accuracy that calibration accepts: half a point."""
LEVELS = tuple(round(0.05 * level, 2) for level in range(21))
"""Entropies that calibration tries for each exit."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExitReport:
    """What stopping early does on a set of images.

    Attributes:
        accuracy: with the policy.
        full_accuracy: of the classifier at the end.
        share: of the images that stop at each exit, the end last.
        mean_blocks: blocks that run on average.
        depth: blocks of the network.
    """

    accuracy: float
    full_accuracy: float
    share: tuple[float, ...]
    mean_blocks: float
    depth: int

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    def table(self) -> list[tuple[str, str]]:
        """Rows of (what, value)."""
        stops = ", ".join(f"{value:.0%}" for value in self.share)
        return [
            ("accuracy with early exits", f"{self.accuracy:.4f}, without {self.full_accuracy:.4f}"),
            ("stop at each exit", stops),
            ("blocks on average", f"{self.mean_blocks:.2f} of {self.depth}"),
        ]


def exit_probabilities(student: ClassificationStudent, spec: ModelSpec, samples: Sequence[Sample]) -> np.ndarray:
    """Probabilities of every exit, ENK, one image at a time.

    Computed by the PyTorch float32 reference.

    Raises:
        InputError: no samples, or a student without exits.
    """
    if not samples or not student.config.exits:
        raise InputError("early exits need images and a student that has exits")
    found = []
    with reference_mode(student):
        for sample in samples:
            tensor = torch.from_numpy(preprocess(sample.frame, spec.preprocess)[0]).float()
            found.append(all_exits(student, normalise(tensor, spec.preprocess)).double().softmax(-1)[:, 0].numpy())
    return np.stack(found, 1)


def choose_exits(
    student: ClassificationStudent, spec: ModelSpec, samples: Sequence[Sample]
) -> tuple[ExitPolicy, ExitReport]:
    """Chooses a student's exit thresholds (``calibrate_exits``).

    On labelled validation images.

    Raises:
        InputError: no samples, a label that is not among the spec's, or a student without exits.
    """
    found = exit_probabilities(student, spec, samples)
    return calibrate_exits(found, class_indices(samples, spec.labels), student.config.exits, student.config.depth)


def measure_exits(policy: ExitPolicy, probabilities_ENK: np.ndarray, truth_N: np.ndarray, depth: int) -> ExitReport:
    """What a policy does.

    Args:
        policy: thresholds and patience.
        probabilities_ENK: of every exit.
        truth_N: true classes.
        depth: blocks of the network.
    """
    return _measure(policy, _entropies(probabilities_ENK), probabilities_ENK.argmax(-1), truth_N, depth)


def _entropies(probabilities_ENK: np.ndarray) -> np.ndarray:
    return np.array([[normalised_entropy(p) for p in row] for row in probabilities_ENK])


def _measure(
    policy: ExitPolicy, entropy_EN: np.ndarray, answer_EN: np.ndarray, truth_N: np.ndarray, depth: int
) -> ExitReport:
    num_exits, count = answer_EN.shape
    stop_N = np.full(count, num_exits - 1)
    for index in reversed(range(num_exits - 1)):
        stops = entropy_EN[index] < policy.entropy[index]
        first = index + 1 - policy.patience
        if policy.patience and first >= 0:
            stops |= (answer_EN[first : index + 1] == answer_EN[index]).all(0)
        stop_N[stops] = index
    blocks = np.array([*policy.blocks, depth])
    return ExitReport(
        accuracy=float(np.mean(answer_EN[stop_N, np.arange(count)] == truth_N)),
        full_accuracy=float(np.mean(answer_EN[-1] == truth_N)),
        share=tuple(float(np.mean(stop_N == index)) for index in range(num_exits)),
        mean_blocks=float(blocks[stop_N].mean()),
        depth=depth,
    )


def calibrate_exits(
    probabilities_ENK: np.ndarray,
    truth_N: np.ndarray,
    blocks: tuple[int, ...],
    depth: int,
    *,
    max_drop: float = MAX_DROP,
) -> tuple[ExitPolicy, ExitReport]:
    """Chooses thresholds and patience on validation.

    Args:
        probabilities_ENK: of every exit, on validation images.
        truth_N: true classes.
        blocks: of the exits.
        depth: blocks of the network.
        max_drop: largest loss of accuracy against the classifier at the end, 0..1.

    Returns:
        The policy that runs the fewest blocks (among equals the more accurate, then the stricter one), and what it
        does on these images. Never stopping early always qualifies.
    """
    entropy_EN, answer_EN = _entropies(probabilities_ENK), probabilities_ENK.argmax(-1)
    best: tuple[tuple[float, ...], ExitPolicy, ExitReport] | None = None
    for levels, patience in product(product(LEVELS, repeat=len(blocks)), (0, *range(2, len(blocks) + 1))):
        policy = ExitPolicy(blocks=blocks, entropy=levels, patience=patience)
        found = _measure(policy, entropy_EN, answer_EN, truth_N, depth)
        if found.accuracy >= found.full_accuracy - max_drop - 1e-12:
            rank = (found.mean_blocks, -found.accuracy, *levels, patience)
            if best is None or rank < best[0]:
                best = rank, policy, found
    assert best is not None, "levels of 0 without patience never stop early"
    return best[1], best[2]


__all__ = ["LEVELS", "MAX_DROP", "ExitReport", "calibrate_exits", "choose_exits", "exit_probabilities", "measure_exits"]
