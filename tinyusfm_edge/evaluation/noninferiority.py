"""Whether something new is at most a stated margin worse than something old.

Non-inferiority holds where the 95 % interval of the difference, over whole patients, lies on the good side of the
margin: a one-sided test at 2.5 % (ICH E9, 3.3.2). It does not know what is compared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tinyusfm_edge.evaluation.artefact_scores import HIGHER_IS_BETTER, FrameResult, difference
from tinyusfm_edge.evaluation.bootstrap import Estimate
from tinyusfm_runtime.errors import InputError

MIN_GROUPS = 2
"""Fewer patients have no interval."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NonInferiority:
    """One test.

    Attributes:
        metric: what was compared.
        margin: how much worse is allowed, above 0.
        difference: new minus old with its interval, or None where nothing could be compared.
        passed: True where the interval lies on the good side of the margin.
        stratum: kind of frame, or empty for all.
    """

    metric: str
    margin: float
    difference: Estimate | None
    passed: bool
    stratum: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    def row(self) -> tuple[str, str, str, str, str]:
        """(metric, kind of frame, difference, margin, verdict) for people."""
        shown = "nothing to compare" if self.difference is None else self.difference.text(4, sign=True)
        allowed = f"{'-' if HIGHER_IS_BETTER[self.metric] else '+'}{self.margin:g}"
        return (self.metric, self.stratum or "all", shown, allowed, "holds" if self.passed else "MISSED")


def parse_margins(text: str) -> dict[str, float]:
    """Margins as they are typed.

    Args:
        text: ``METRIC=NUMBER`` with commas between, such as ``dice=0.01,hc_abs_error_mm=1``.

    Raises:
        InputError: an unknown metric, or no number above 0.
    """
    found: dict[str, float] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, number = part.partition("=")
        try:
            found[name.strip()] = float(number)
        except ValueError as error:
            raise InputError(f"margin {part!r}: write METRIC=NUMBER, such as dice=0.01") from error
    check_margins(found)
    return found


def check_margins(margins: Mapping[str, float]) -> None:
    """Refuses margins that cannot be used.

    Raises:
        InputError: an unknown metric, or a number that is not above 0.
    """
    for name, margin in margins.items():
        if name not in HIGHER_IS_BETTER:
            raise InputError(f"margin of {name!r}: known metrics are {', '.join(HIGHER_IS_BETTER)}")
        if not 0.0 < margin < float("inf"):
            raise InputError(f"margin of {name} is {margin}: give a number above 0")


def judge_margins(
    before: Sequence[FrameResult],
    after: Sequence[FrameResult],
    margins: Mapping[str, float],
    *,
    strata: bool = False,
) -> list[NonInferiority]:
    """Tests every margin, on all frames and, if asked for, on each kind of frame.

    Args:
        before: what is compared with.
        after: what is tested, on the same frames.
        margins: metric -> how much worse is allowed.
        strata: also test each kind of frame by itself.

    Raises:
        InputError: the frames are not the same.
    """
    kinds = ["", *(sorted({result.stratum for result in before} - {""}) if strata else [])]
    found = []
    for metric, margin in margins.items():
        for kind in kinds:
            chosen = [i for i, result in enumerate(before) if kind in ("", result.stratum)]
            between = difference([before[i] for i in chosen], [after[i] for i in chosen], metric)
            found.append(_judge(metric, margin, between, kind))
    return found


def _judge(metric: str, margin: float, between: Estimate | None, stratum: str) -> NonInferiority:
    passed = False
    if between is not None and between.num_groups >= MIN_GROUPS:
        passed = between.low > -margin if HIGHER_IS_BETTER[metric] else between.high < margin
    return NonInferiority(metric=metric, margin=margin, difference=between, passed=passed, stratum=stratum)


__all__ = ["MIN_GROUPS", "NonInferiority", "check_margins", "judge_margins", "parse_margins"]
