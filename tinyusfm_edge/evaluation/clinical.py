"""An artefact against truth and reference on labelled frames, in clinical units.

Metrics carry 95 % intervals over patients; non-inferiority is tested against stated margins; both for every kind of
frame that the table names. The worst frames are kept for a look.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from tinyusfm_edge.data.table import Sample
from tinyusfm_edge.evaluation.artefact_scores import (
    FrameResult,
    difference,
    estimate,
    metric_names,
    results_of,
    run_outputs,
)
from tinyusfm_edge.evaluation.bootstrap import Estimate
from tinyusfm_edge.evaluation.noninferiority import NonInferiority, judge_margins
from tinyusfm_export.verify.parity import Output
from tinyusfm_runtime.bundle.manifest import Artefact
from tinyusfm_runtime.bundle.reader import Bundle
from tinyusfm_runtime.spec import ModelSpec

if TYPE_CHECKING:
    from torch import nn

DEFAULT_MARGINS = {"dice": 0.01, "hc_abs_error_mm": 1.0, "accuracy": 0.02}
"""How much worse than the reference an artefact may be, where nobody says (our choice); metrics of the task alone."""
WORST = 6
"""Frames that are shown."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ClinicalRow:
    """One metric on one kind of frame.

    Attributes:
        metric: a key of ``HIGHER_IS_BETTER``.
        stratum: kind of frame, or empty for all.
        reference: against the truth.
        artefact: against the truth.
        difference: artefact minus reference on the same frames.
    """

    metric: str
    stratum: str
    reference: Estimate
    artefact: Estimate
    difference: Estimate

    def row(self) -> tuple[str, str, str, str, str]:
        """(metric, kind of frame, reference, artefact, difference) for people."""
        shown = self.reference.text(4), self.artefact.text(4), self.difference.text(4, sign=True)
        return (self.metric, self.stratum or "all", *shown)


@dataclass(frozen=True, kw_only=True, slots=True)
class Worst:
    """A frame on which artefact and reference differ most.

    Attributes:
        index: of the frame.
        id: its name, the first letters of its hash where it came from a file.
        badness: circumference difference in mm, else 1 - overlap of the masks, else the largest change of a
            probability.
        unit: of that number.
    """

    index: int
    id: str
    badness: float
    unit: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Clinical:
    """One artefact on labelled frames. True where every margin holds.

    Attributes:
        name: of the artefact.
        rows: metrics.
        margins: tests of non-inferiority.
        flips: frames on which the reading or the class is another one.
        frames: number of frames.
        worst: frames that differ most.
    """

    name: str
    rows: tuple[ClinicalRow, ...]
    margins: tuple[NonInferiority, ...]
    flips: int
    frames: int
    worst: tuple[Worst, ...]

    def __bool__(self) -> bool:
        return all(test.passed for test in self.margins)

    @property
    def failures(self) -> tuple[str, ...]:
        """Margins that do not hold, one phrase each."""
        return tuple(
            f"{self.name}: {test.metric} on {test.stratum or 'all'} frames is {test.row()[2]}, margin {test.margin:g}"
            for test in self.margins
            if not test.passed
        )

    def to_json(self) -> dict[str, Any]:
        """Plain data, ready for ``json.dumps``."""
        return {**asdict(self), "passed": bool(self)}


@dataclass(frozen=True, kw_only=True, slots=True)
class ClinicalAnswers:
    """One side's answers to the labelled frames.

    Attributes:
        outputs: one per frame.
        results: the same, scored.
    """

    outputs: tuple[Output, ...]
    results: tuple[FrameResult, ...]


def reference_answers(module: nn.Module, spec: ModelSpec, samples: Sequence[Sample]) -> ClinicalAnswers:
    """The PyTorch float32 reference on labelled frames.

    Args:
        module: the student.
        spec: as the bundle is judged by.
        samples: labelled frames.

    Raises:
        MissingExtra: torch is not installed.
        InputError: the module cannot be a reference.
    """
    from tinyusfm_export.verify.engine_run import preprocess_all
    from tinyusfm_export.verify.reference import reference_outputs

    frames = [sample.frame for sample in samples]
    outputs = tuple(reference_outputs(module, spec, frames, second_pass=True))
    return ClinicalAnswers(outputs=outputs, results=results_of(spec, samples, outputs, preprocess_all(frames, spec)))


def artefact_answers(
    bundle: Bundle, artefact: Artefact, samples: Sequence[Sample], *, threads: int = 1
) -> ClinicalAnswers:
    """An artefact in its own engine on labelled frames.

    Args:
        bundle: holds it.
        artefact: of that bundle.
        samples: labelled frames.
        threads: inside the engine.

    Raises:
        EngineError: the engine failed.
        MissingExtra, UnsupportedError: it does not work here.
    """
    spec, inputs, outputs = run_outputs(bundle, artefact, samples, threads=threads)
    return ClinicalAnswers(outputs=outputs, results=results_of(spec, samples, outputs, inputs))


def judge_clinically(
    name: str, reference: ClinicalAnswers, artefact: ClinicalAnswers, margins: dict[str, float] | None = None
) -> Clinical:
    """Compares two sides.

    Args:
        name: of the artefact.
        reference: on the labelled frames.
        artefact: on the same ones.
        margins: metric -> how much worse is allowed; None takes those of ``DEFAULT_MARGINS`` that can be measured.

    Raises:
        InputError: the frames are not the same.
    """
    before, after = reference.results, artefact.results
    known = metric_names(before)
    asked = {m: v for m, v in DEFAULT_MARGINS.items() if m in known} if margins is None else margins
    strata = sorted({result.stratum for result in before} - {""})
    tests = judge_margins(before, after, asked, strata=len(strata) > 1)
    said = [
        (old.found, old.reading, old.top) != (new.found, new.reading, new.top)
        for old, new in zip(before, after, strict=True)
    ]
    return Clinical(
        name=name,
        rows=tuple(_rows(before, after, ["", *strata] if len(strata) > 1 else [""])),
        margins=tuple(tests),
        flips=sum(said),
        frames=len(before),
        worst=tuple(_worst(reference, artefact)),
    )


def _rows(before: Sequence[FrameResult], after: Sequence[FrameResult], kinds: Sequence[str]) -> list[ClinicalRow]:
    found = []
    for kind in kinds:
        index = [i for i, result in enumerate(before) if kind in ("", result.stratum)]
        left, right = [before[i] for i in index], [after[i] for i in index]
        for metric in metric_names(left):
            sides = estimate(left, metric), estimate(right, metric), difference(left, right, metric)
            if sides[0] is not None and sides[1] is not None and sides[2] is not None:
                found.append(
                    ClinicalRow(metric=metric, stratum=kind, reference=sides[0], artefact=sides[1], difference=sides[2])
                )
    return found


def _worst(reference: ClinicalAnswers, artefact: ClinicalAnswers) -> list[Worst]:
    found = []
    sides = zip(reference.results, artefact.results, reference.outputs, artefact.outputs, strict=True)
    for index, (old, new, left, right) in enumerate(sides):
        if old.hc_mm is not None or new.hc_mm is not None:
            bad, unit = abs((new.hc_mm or 0.0) - (old.hc_mm or 0.0)), "mm"
        elif left.mask_HW is not None and right.mask_HW is not None:
            both = int(((left.mask_HW > 0) & (right.mask_HW > 0)).sum())
            total = int((left.mask_HW > 0).sum()) + int((right.mask_HW > 0).sum())
            bad, unit = (1.0 - 2.0 * both / total if total else 0.0), "1 - Dice"
        else:
            bad = max((abs(a - b) for a, b in zip(old.scores, new.scores, strict=True)), default=0.0)
            unit = "probability"
        found.append(Worst(index=index, id=old.id, badness=bad, unit=unit))
    found.sort(key=lambda worst: -worst.badness)
    return found[:WORST]


__all__ = [
    "DEFAULT_MARGINS",
    "WORST",
    "Clinical",
    "ClinicalAnswers",
    "ClinicalRow",
    "Worst",
    "artefact_answers",
    "judge_clinically",
    "reference_answers",
]
