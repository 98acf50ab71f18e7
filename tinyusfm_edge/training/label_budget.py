"""Which labelled pictures a reduced budget keeps: whole patients, the same order for every share, so shares are nested.

Patients are ordered by a hash of seed and name, within each class, so that 10 % of the labels hold every class about as
often as all do and lie inside 25 % of the same seed. It does not know pictures or training.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence

from tinyusfm_edge.training.data import Sample
from tinyusfm_runtime.errors import InputError


def choose_labels(samples: Sequence[Sample], share: float, seed: int) -> list[Sample]:
    """Keeps a share of the samples by whole groups.

    Args:
        samples: of the training split.
        share: 0..1, 0 excluded; of a class, groups are taken until at least this share of its samples is reached.
        seed: of the order of groups.

    Returns:
        The samples kept, in their order; all of them for 1.

    Raises:
        InputError: a share outside (0, 1].
    """
    if not 0.0 < share <= 1.0:
        raise InputError(f"a share of labels of {share:g} is not possible: give more than 0 and at most 100 %")
    if share == 1.0:
        return list(samples)
    groups: dict[str, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(sample.group, []).append(sample)
    strata: dict[str, list[str]] = {}
    for name, members in groups.items():
        strata.setdefault(_main_label(members), []).append(name)
    kept: set[str] = set()
    for names in strata.values():
        wanted = share * sum(len(groups[name]) for name in names)
        taken = 0
        for name in sorted(names, key=lambda name: hashlib.sha256(f"{seed}:{name}".encode()).digest()):
            if taken >= wanted:
                break
            kept.add(name)
            taken += len(groups[name])
    return [sample for sample in samples if sample.group in kept]


def _main_label(members: Sequence[Sample]) -> str:
    counts = Counter(sample.label for sample in members)
    return min(counts, key=lambda label: (-counts[label], label))


def parse_share(text: str) -> float:
    """``10%`` or ``0.1`` as a fraction.

    Raises:
        InputError: neither, or outside (0, 1].
    """
    try:
        value = float(text.rstrip("%")) / (100.0 if text.endswith("%") else 1.0)
    except ValueError as error:
        raise InputError(f"share {text!r}: give a percentage such as 10% or a fraction such as 0.1") from error
    if not 0.0 < value <= 1.0:
        raise InputError(f"share {text!r} must be more than 0 and at most 100 %")
    return value


__all__ = ["choose_labels", "parse_share"]
