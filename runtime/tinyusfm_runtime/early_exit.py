"""When a classifier with early exits stops: an answer that is sure enough, or enough answers in a row that agree.

After EPEE (arXiv 2503.02053): entropy below a threshold, or patience. Entropy is divided by log K, so that a threshold
means the same for any number of classes. It does not know nets or engines: probabilities in, a decision out.

Shapes: K classes, E exits with the classifier at the end last.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tinyusfm_runtime.errors import InputError
from tinyusfm_runtime.spec import ExitPolicy


def normalised_entropy(probabilities_K: np.ndarray) -> float:
    """Entropy divided by log K: 0 for a certain answer, 1 for an even one.

    Args:
        probabilities_K: summing to 1, at least two.

    Raises:
        InputError: fewer than two classes.
    """
    p = np.asarray(probabilities_K, np.float64)
    if p.size < 2:
        raise InputError("entropy needs at least two classes")
    positive = p[p > 0]
    return max(0.0, float(-(positive * np.log(positive)).sum() / np.log(p.size)))


def may_stop(policy: ExitPolicy, answers: Sequence[np.ndarray]) -> bool:
    """Whether the last of the answers so far can be taken.

    Args:
        policy: of the model.
        answers: probabilities K of the exits reached so far, in order, at least one.

    Raises:
        InputError: no answer yet.
    """
    if not answers:
        raise InputError("there is no answer yet to stop at")
    if len(answers) > len(policy.blocks):
        return True
    if normalised_entropy(answers[-1]) < policy.entropy[len(answers) - 1]:
        return True
    recent = [int(np.argmax(answer)) for answer in answers[-policy.patience :]] if policy.patience else []
    return bool(recent) and len(recent) == policy.patience and len(set(recent)) == 1


def exit_names(policy: ExitPolicy | None) -> tuple[str, ...]:
    """What people call the exits, in order: ``block 6``, ``block 9``, ``end``; nothing where there are none."""
    if policy is None:
        return ()
    return (*(f"block {block}" for block in policy.blocks), "end")


def stop_at(policy: ExitPolicy, answers_EK: np.ndarray) -> int:
    """Index of the exit whose answer is taken, where all are known.

    Args:
        policy: of the model.
        answers_EK: probabilities of every exit and of the classifier at the end.
    """
    return next(i for i in range(len(answers_EK)) if may_stop(policy, list(answers_EK[: i + 1])))


__all__ = ["exit_names", "may_stop", "normalised_entropy", "stop_at"]
