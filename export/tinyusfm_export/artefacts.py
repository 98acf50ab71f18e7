"""The levels of a bundle: every target and precision asked for, built and checked.

int8 under one decision for all.

Int8 starts with all layers that the policy allows. Where that misses the gate on any target, the next policy is tried
on all of them (by default: decoder convolutions stay float), so that the decision stays one. It does not know bundles
or the PyTorch reference.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from tinyusfm_calibration.ranges import Ranges
from tinyusfm_export.quantize.decision import PRECISIONS, QuantDecision
from tinyusfm_export.quantize.ptq import PtqPolicy, decide
from tinyusfm_export.quantize.range_choice import Preparation
from tinyusfm_export.verify.artefact import CheckedArtefact, Checks, build_checked
from tinyusfm_export.verify.parity import ParityReport
from tinyusfm_runtime import plugins
from tinyusfm_runtime.errors import EngineError, GateError, InputError
from tinyusfm_runtime.spec import Task

if TYPE_CHECKING:
    from tinyusfm_export.graph.build import ExportGraph


class Decide(Protocol):
    """Decides which tensors are 8-bit, see quantize/ptq.py."""

    def __call__(
        self, graph: ExportGraph, precision: str, ranges: Ranges | None, *, policy: PtqPolicy
    ) -> QuantDecision: ...


TargetPrecision = tuple[str, str]
"""(canonical target, precision)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ArtefactSet:
    """Checked artefacts in the order of the fallback order.

    Attributes:
        artefacts: one per level.
        decisions: precision -> the decision all targets share.
        notes: what a reader must know, such as layers that were kept float for the gate's sake.
    """

    artefacts: tuple[CheckedArtefact, ...]
    decisions: Mapping[str, QuantDecision]
    notes: tuple[str, ...] = ()

    @property
    def pending(self) -> dict[str, str]:
        """Artefact name -> what has still to complete its gate."""
        return {artefact.name: artefact.pending for artefact in self.artefacts if artefact.pending}

    @property
    def reports(self) -> dict[str, ParityReport]:
        """Artefact name -> parity report."""
        return {artefact.name: artefact.report for artefact in self.artefacts}


@dataclass(frozen=True, kw_only=True, slots=True)
class MissedGates:
    """What a GateError carries: every report of the export.

    Attributes:
        reports: artefact name -> parity report.
    """

    reports: Mapping[str, ParityReport] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain data, ready for ``json.dumps``."""
        return {name: report.to_json() for name, report in self.reports.items()}


def plan_levels(targets: Sequence[str], precisions: Sequence[str]) -> list[TargetPrecision]:
    """Order of the artefacts.

    The first precision on every target, then the next precision.

    Args:
        targets: names or aliases.
        precisions: names.

    Returns:
        Pairs of target and precision, none twice.

    Raises:
        InputError: nothing asked for, or an unknown name.
    """
    if not targets or not precisions:
        raise InputError("nothing to export: name a target and a precision")
    unknown = [precision for precision in precisions if precision not in PRECISIONS]
    if unknown:
        raise InputError(f"precision {unknown[0]!r} is not one of {', '.join(PRECISIONS)}")
    stems = [plugins.canonical("targets", target) for target in targets]
    return list(dict.fromkeys((stem, precision) for precision in precisions for stem in stems))


def default_policies(task: Task) -> tuple[PtqPolicy, ...]:
    """Policies to try in turn: decoder convolutions in int8, then in float.

    Other tasks have no decoder.
    """
    whole = PtqPolicy()
    return (whole, PtqPolicy(decoder=False)) if task is Task.SEGMENT else (whole,)


def build_fallback(
    graph: ExportGraph,
    levels: Sequence[TargetPrecision],
    ranges: Ranges | None,
    checks: Checks,
    *,
    policies: Sequence[PtqPolicy],
    gated: bool,
    progress: Callable[[str, float], None],
    preparation: Preparation | None = None,
    notes: Sequence[str] = (),
    decide: Decide = decide,
) -> ArtefactSet:
    """Builds and checks every level.

    Args:
        graph: the export graph.
        levels: what to build, in order.
        ranges: activation ranges, for int8.
        checks: what every artefact is put through.
        policies: int8 policies to try in turn until all targets hold the gate.
        gated: False takes the first policy whatever comes out.
        progress: called with what is being done and the share of the levels done, 0..1.
        preparation: how the graph is changed before it becomes int8; the ranges are those of the changed graph.
        notes: what a reader must know about the ranges; comes first.
        decide: makes the decision of a precision under a policy.

    Raises:
        GateError: a level misses the gate under every policy.
        CalibrationError: int8 without ranges.
        MissingExtra, UnsupportedError, EngineError: a target or engine does not work here, or gives NaN.
    """
    prepared = preparation or Preparation()
    equalised = prepared.equalised(graph)
    built: dict[TargetPrecision, CheckedArtefact] = {}
    lines = list(notes)
    decisions: dict[str, QuantDecision] = {}
    for precision in dict.fromkeys(precision for _, precision in levels):
        mine = [level for level in levels if level[1] == precision]
        tries = list(policies) if precision == "int8" and gated else list(policies)[:1]
        for number, policy in enumerate(tries):
            decisions[precision] = decide(graph, precision, ranges, policy=policy)
            for level in mine:
                progress(f"building and checking {plugins.public_name(level[0])} {precision}", len(built) / len(levels))
                written = getattr(plugins.load("targets", level[0]), "written_weight", None)
                quantized = precision == "int8"
                source = prepared.corrected(equalised, decisions[precision], written) if quantized else graph
                built[level] = build_checked(level[0], source, decisions[precision], checks)
            missed = _missed([built[level] for level in mine])
            if not missed:
                break
            if number + 1 < len(tries):
                kept = _newly_float(decisions[precision], decide(graph, precision, ranges, policy=tries[number + 1]))
                lines.append(f"{kept} layers are kept float: in int8 the gate was missed by {missed}")
    artefacts = tuple(built[level] for level in levels)
    if gated and (missed := _missed(artefacts)):
        reports = {artefact.name: artefact.report for artefact in artefacts}
        raise GateError(f"nothing was published, the gate was missed by {missed}", MissedGates(reports=reports))
    if broken := [artefact.name for artefact in artefacts if artefact.broken]:
        raise EngineError(f"{', '.join(broken)}: outputs are not finite; that is not published even without a gate")
    return ArtefactSet(artefacts=artefacts, decisions=decisions, notes=tuple(lines))


def joined(sets: Sequence[ArtefactSet]) -> ArtefactSet:
    """Several sets as one, in order; the decisions are those of the last.

    Args:
        sets: at least one.
    """
    notes = dict.fromkeys(note for one in sets for note in one.notes)
    return ArtefactSet(
        artefacts=tuple(artefact for one in sets for artefact in one.artefacts),
        decisions=sets[-1].decisions,
        notes=tuple(notes),
    )


def _missed(artefacts: Sequence[CheckedArtefact]) -> str:
    return " | ".join(f"{a.name}: {'; '.join(a.report.failures)}" for a in artefacts if not a.report)


def _newly_float(before: QuantDecision, after: QuantDecision) -> int:
    return len(set(before.quantized()) - set(after.quantized()))


__all__ = [
    "ArtefactSet",
    "Decide",
    "MissedGates",
    "TargetPrecision",
    "build_fallback",
    "default_policies",
    "joined",
    "plan_levels",
]
