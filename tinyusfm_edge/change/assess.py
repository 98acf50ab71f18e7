"""A change between two bundles, judged against what was declared beforehand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tinyusfm_edge.change.impact import Impact, Sides
from tinyusfm_edge.change.kinds import KINDS, Modification
from tinyusfm_edge.change.protocol import Protocol
from tinyusfm_edge.evaluation.noninferiority import NonInferiority, judge_margins

CHANGE_VERSION = 1
"""Version of the JSON that ``Change.to_json`` writes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """What changed, what was declared, what it does.

    True where nothing speaks against it.

    Attributes:
        old: bundle id of the one in use.
        new: bundle id of the one that shall replace it.
        model: its name.
        modifications: by kind.
        protocol: what was declared, or None: then nothing is judged.
        undeclared: kinds that the protocol does not allow.
        data_sha256: hash of the data that was used, or empty.
        impact: what it does, or None where it was refused before anything ran.
        margins: tests of the protocol's margins.
        missed: criteria that do not hold, one phrase each.
    """

    old: str
    new: str
    model: str
    modifications: tuple[Modification, ...]
    protocol: Protocol | None
    undeclared: tuple[str, ...]
    data_sha256: str
    impact: Impact | None
    margins: tuple[NonInferiority, ...] = ()
    missed: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return not self.undeclared and not self.missed

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of modification, in the order of ``KINDS``."""
        there = {modification.kind for modification in self.modifications}
        return tuple(kind for kind in KINDS if kind in there)

    @property
    def headline(self) -> str:
        """How it ended, one line."""
        if self.undeclared:
            return f"REFUSED: the protocol does not declare {', '.join(self.undeclared)}"
        if self.missed:
            return f"REFUSED: {'; '.join(self.missed)}"
        if self.protocol is None:
            return f"not judged, no protocol: {', '.join(self.kinds) or 'nothing'} changed"
        return f"accepted: {', '.join(self.kinds) or 'nothing'} changed, as declared, within every criterion"

    def to_json(self) -> dict[str, Any]:
        """Plain data, ready for ``json.dumps``."""
        plain = asdict(self)
        if self.protocol is not None:
            plain["protocol"]["allowed"] = sorted(self.protocol.allowed)
        return {"version": CHANGE_VERSION, "accepted": bool(self), "headline": self.headline, **plain}


def undeclared_kinds(found: Sequence[Modification], protocol: Protocol | None) -> tuple[str, ...]:
    """Kinds of modification that a protocol does not allow.

    Args:
        found: what changed.
        protocol: what was declared; without one nothing is undeclared.
    """
    if protocol is None:
        return ()
    there = {modification.kind for modification in found}
    return tuple(kind for kind in KINDS if kind in there - protocol.allowed)


def judge(sides: Sides, protocol: Protocol) -> tuple[tuple[NonInferiority, ...], tuple[str, ...]]:
    """Tests a protocol's criteria.

    Args:
        sides: both bundles on the declared data.
        protocol: what was declared.

    Returns:
        The tests of the margins, and what does not hold.
    """
    tests = tuple(judge_margins(sides.old, sides.new, protocol.margins, strata=protocol.strata))
    missed = [f"{test.metric} on {test.stratum or 'all'} frames: {test.row()[2]}, margin {test.margin:g}"
              for test in tests if not test.passed]  # fmt: skip
    impact = sides.impact
    flips = protocol.limits.get("flips")
    if flips is not None and impact.flip_share > flips:
        missed.append(f"{impact.flip_share:.1%} of the answers change, {flips:.1%} allowed")
    ratio = protocol.limits.get("latency_ratio")
    if ratio is not None and impact.latency is None:
        missed.append("latency was not measured: leave --rounds at 1 or more")
    elif ratio is not None and impact.latency is not None and impact.latency.low > ratio:
        missed.append(f"latency is {impact.latency.ratio:.2f} times the old one, {ratio:g} allowed")
    return tests, tuple(missed)


__all__ = ["CHANGE_VERSION", "Change", "judge", "undeclared_kinds"]
