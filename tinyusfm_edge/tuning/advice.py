"""What would meet a budget that nothing met.

It speaks of what was tried and of what was not, and promises nothing: a student with fewer heads, patches or blocks
has to be measured as well.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from tinyusfm_edge.tuning.choice import TuneChoice, TuneRow

FAST_ENOUGH = "would be fast enough, but"


def what_would(choice: TuneChoice, rows: Sequence[TuneRow], left_out: Mapping[str, str], cores: int) -> tuple[str, ...]:
    """Lines of advice; none where a row was picked, or the samples were too few.

    Args:
        choice: what was decided.
        rows: everything that was tried.
        left_out: artefact or target -> why it was not tried.
        cores: of the machine that measured.
    """
    near, budget = choice.nearest, choice.budget_ms
    if choice or near is None or budget is None or choice.ratio is None or choice.ratio <= 1.0:
        return ()
    found = [f"a budget of {up(near.bound_ms)} ms, which {near.name} meets"]
    found.append(f"a device {choice.ratio:.2f} times as fast")
    wrong = [row for row in rows if row.why_not and row.decides_ms <= budget]
    found += [f"{row.name} {FAST_ENOUGH} {row.why_not}" for row in sorted(wrong, key=lambda row: row.median_ms)[:1]]
    if len({row.candidate.target for row in rows}) == 1:
        found.append(f"perhaps another engine: only {near.candidate.target} was tried; give the student in place of "
                     "the bundle and every target that works here is")  # fmt: skip
    if left_out:
        found.append(f"perhaps what was not tried: {', '.join(sorted(left_out))}")
    if max(row.candidate.threads for row in rows) < cores:
        found.append(f"perhaps more threads: this machine has {cores} cores (--threads {cores})")
    if not any(row.candidate.pruned for row in rows):
        found.append("perhaps pruning to the probe's sector, where the frames have black corners (export --sector)")
    if len({row.candidate.variant for row in rows}) == 1:
        found.append("perhaps a lighter student, given after this one: fewer heads (distill --heads 3) or a smaller "
                     "input (adapt --image-size)")  # fmt: skip
    return tuple(found)


def up(ms: float) -> str:
    """Milliseconds rounded up, so that a budget of them is met.

    Args:
        ms: above 0.
    """
    return f"{math.ceil(ms * 100 - 1e-6) / 100:.2f}"


__all__ = ["FAST_ENOUGH", "up", "what_would"]
