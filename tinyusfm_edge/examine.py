"""Everything that verify looks at beside the gate.

Truth, margins, worst frames, the first tensor that drifts, repeats to the bit, flicker.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tinyusfm_edge.data.table import Sample
from tinyusfm_edge.evaluation.artefact_scores import golden_samples, run_outputs
from tinyusfm_edge.evaluation.clinical import (
    Clinical,
    ClinicalAnswers,
    artefact_answers,
    judge_clinically,
    reference_answers,
)
from tinyusfm_edge.report.verification import VerifyFindings, worst_images
from tinyusfm_export.verify.confidence import flicker
from tinyusfm_export.verify.determinism import Determinism, repeat
from tinyusfm_export.verify.engine_run import preprocess_all
from tinyusfm_export.verify.expected import judged_spec
from tinyusfm_export.verify.first_drift import Drift, find_first_drift
from tinyusfm_runtime.bundle.manifest import Artefact
from tinyusfm_runtime.bundle.reader import Bundle
from tinyusfm_runtime.errors import MissingExtra, UnsupportedError
from tinyusfm_runtime.frame import Frame

if TYPE_CHECKING:
    from torch import nn

DRIFT_FRAMES = 2
"""Golden frames whose tensors are compared."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Material:
    """What there is to look at.

    Attributes:
        module: the student, or None: then nothing is compared with the reference.
        samples: labelled frames, or none.
        clip: consecutive frames, or none.
        margins: metric -> how much worse is allowed, or None for the defaults.
        threads: inside the engines.
    """

    module: nn.Module | None = None
    samples: Sequence[Sample] = ()
    clip: Sequence[Frame] = ()
    margins: Mapping[str, float] | None = None
    threads: int = 1


@dataclass(kw_only=True, slots=True)
class _Found:
    clinical: list[Clinical] = field(default_factory=list)
    drifts: list[Drift] = field(default_factory=list)
    repeats: list[Determinism] = field(default_factory=list)
    flicker: dict[str, tuple[int, float, float]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    images: dict[str, list[tuple[str, bytes]]] = field(default_factory=dict)


def examine(
    bundle: Bundle, artefacts: Sequence[Artefact], material: Material
) -> tuple[VerifyFindings, dict[str, list[tuple[str, bytes]]]]:
    """Looks at artefacts beside the gate.

    Args:
        bundle: an open bundle.
        artefacts: of that bundle.
        material: what there is.

    Returns:
        The findings, and for each artefact the worst frames as (caption, PNG).

    Raises:
        InputError: the labelled frames cannot be compared with this model.
        EngineError: an engine failed.
    """
    found = _Found()
    reference = _reference(bundle, material, found)
    for artefact in artefacts:
        try:
            _one(bundle, artefact, material, reference, found)
        except (MissingExtra, UnsupportedError) as error:
            found.notes.append(f"{artefact.name}: {error}")
    findings = VerifyFindings(
        clinical=tuple(found.clinical),
        drifts=tuple(found.drifts),
        repeats=tuple(found.repeats),
        flicker=found.flicker,
        notes=tuple(found.notes),
    )
    return findings, found.images


def _reference(
    bundle: Bundle, material: Material, found: _Found
) -> tuple[ClinicalAnswers | None, ClinicalAnswers | None]:
    """Reference on the labelled frames and on the clip."""
    if material.module is None:
        found.notes.append("no student at hand: nothing was compared with the reference, and no tensor inside")
        return None, None
    if not material.samples:
        found.notes.append("no labelled frames: nothing was compared with the truth (--data, --split)")
    spec = judged_spec(bundle)
    labelled = reference_answers(material.module, spec, material.samples) if material.samples else None
    clip = None
    if material.clip:
        from tinyusfm_export.verify.reference import reference_outputs

        outputs = tuple(reference_outputs(material.module, spec, material.clip, second_pass=True))
        clip = ClinicalAnswers(outputs=outputs, results=())
    return labelled, clip


def _one(
    bundle: Bundle,
    artefact: Artefact,
    material: Material,
    reference: tuple[ClinicalAnswers | None, ClinicalAnswers | None],
    found: _Found,
) -> None:
    spec = judged_spec(bundle)
    tensors = [tensor for tensor, _ in preprocess_all(bundle.golden_frames(), spec)]
    found.repeats.append(repeat(bundle, artefact, tensors))
    labelled, clip = reference
    if labelled is not None:
        answers = artefact_answers(bundle, artefact, material.samples, threads=material.threads)
        margins = None if material.margins is None else dict(material.margins)
        judged = judge_clinically(artefact.name, labelled, answers, margins)
        found.clinical.append(judged)
        found.images[artefact.name] = worst_images(spec, material.samples, judged, labelled, answers)
    if clip is not None:
        frames = golden_samples(material.clip)
        moved = run_outputs(bundle, artefact, frames, threads=material.threads)[2]
        found.flicker[artefact.name] = (len(frames), flicker(clip.outputs, spec), flicker(moved, spec))
    if material.module is not None:
        from tinyusfm_export.graph.build import build_graph

        graph = build_graph(material.module, spec)
        first = find_first_drift(bundle, artefact, graph, tensors[:DRIFT_FRAMES], threads=material.threads)
        found.drifts.append(first)


__all__ = ["DRIFT_FRAMES", "Material", "examine"]
