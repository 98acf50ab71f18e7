"""What verify found, as a page.

The gate, clinical metrics, worst frames, the first tensor that drifts, repeats.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from tinyusfm_edge.data.table import Sample, resize_mask
from tinyusfm_edge.evaluation.clinical import Clinical, ClinicalAnswers
from tinyusfm_edge.report.page import Block, Facts, Images, Page, Table
from tinyusfm_export.verify.bundle import VerifyReport
from tinyusfm_export.verify.determinism import Determinism
from tinyusfm_export.verify.first_drift import Drift
from tinyusfm_runtime.numerics.preprocess import preprocess
from tinyusfm_runtime.overlay import encode_png, outline
from tinyusfm_runtime.spec import ModelSpec

TRUTH, REFERENCE, ARTEFACT = (40, 170, 70), (60, 120, 230), (220, 50, 50)
"""Colours of the outlines: green, blue, red."""
SHOWN_TENSORS = 20
"""Tensors of a table, those with the largest distance; the JSON holds all."""
ZOOM = 2
"""Pixels of the image on the page for one of the model's input."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VerifyFindings:
    """What was found beside the gate.

    Attributes:
        clinical: one per artefact, or none without labelled frames.
        drifts: one per artefact that could be looked into.
        repeats: one per artefact.
        flicker: artefact -> (frames, reference, artefact): mean of 1 - Dice of neighbouring masks.
        notes: what could not be done, and why.
    """

    clinical: tuple[Clinical, ...] = ()
    drifts: tuple[Drift, ...] = ()
    repeats: tuple[Determinism, ...] = ()
    flicker: Mapping[str, tuple[int, float, float]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def failures(self) -> tuple[str, ...]:
        """Margins that do not hold."""
        return tuple(text for found in self.clinical for text in found.failures)

    def to_json(self) -> dict[str, object]:
        """Plain data, ready for ``json.dumps``."""
        return {
            "clinical": [found.to_json() for found in self.clinical],
            "first_drift": [found.to_json() for found in self.drifts],
            "determinism": [found.to_json() for found in self.repeats],
            "flicker": {
                name: {"frames": frames, "reference": before, "artefact": after}
                for name, (frames, before, after) in self.flicker.items()
            },
            "notes": list(self.notes),
        }


def worst_images(
    spec: ModelSpec, samples: Sequence[Sample], found: Clinical, reference: ClinicalAnswers, artefact: ClinicalAnswers
) -> list[tuple[str, bytes]]:
    """The worst frames with their outlines: truth green, reference blue, artefact red.

    Args:
        spec: the model.
        samples: the labelled frames.
        found: names the worst ones.
        reference: answers.
        artefact: answers.

    Returns:
        (caption, PNG).
    """
    images = []
    for worst in found.worst:
        sample = samples[worst.index]
        codes_HW = preprocess(sample.frame, spec.preprocess)[0][0, 0]
        image_HWC = np.repeat(np.kron(codes_HW, np.ones((ZOOM, ZOOM), np.uint8))[:, :, None], 3, axis=2)
        right_HW = resize_mask(sample.mask_HW, sample.frame, spec.preprocess)
        masks = ((right_HW, TRUTH), (reference.outputs[worst.index].mask_HW, REFERENCE))
        for mask_HW, colour in (*masks, (artefact.outputs[worst.index].mask_HW, ARTEFACT)):
            if mask_HW is not None and mask_HW.any():
                large = np.kron((mask_HW > 0).astype(np.uint8), np.ones((ZOOM, ZOOM), np.uint8))
                image_HWC[outline(large)] = colour
        images.append((f"{worst.id[:16]}: {worst.badness:.2f} {worst.unit}", encode_png(image_HWC)))
    return images


def examined_page(
    report: VerifyReport, findings: VerifyFindings, images: Mapping[str, Sequence[tuple[str, bytes]]]
) -> Page:
    """The page.

    Args:
        report: of the gate.
        findings: beside it.
        images: artefact -> worst frames.
    """
    gate = Table(
        title="Gate against the reference",
        note=report.headline,
        header=("artefact", "demand", "measured", "limit", "verdict"),
        rows=report.table(),
    )
    blocks: list[Block] = [gate]
    for found in findings.clinical:
        note = (
            f"{found.frames} labelled frames; {found.flips} readings or classes are others than the reference's. "
            "Mean and 95 % interval over patients."
        )
        header = ("metric", "frames", "reference", "artefact", "difference")
        rows = [row.row() for row in found.rows]
        blocks.append(Table(title=f"{found.name} against the truth", note=note, header=header, rows=rows))
        tests = [test.row() for test in found.margins]
        title = f"{found.name}: not worse than the reference by more than the margin"
        blocks.append(Table(title=title, header=("metric", "frames", "difference", "margin", "verdict"), rows=tests))
        if images.get(found.name):
            note = "Outlines: truth green, reference blue, artefact red. Frames of patients: keep this page with them."
            blocks.append(Images(title=f"{found.name}: worst frames", note=note, images=images[found.name]))
    for drift in findings.drifts:
        note = f"{drift.sentence}. {len(drift.shares)} tensors were looked at together, suspects alone."
        known = dict(drift.alone)
        largest = sorted(drift.shares, key=lambda pair: -pair[1])[:SHOWN_TENSORS]
        shown = [pair for pair in drift.shares if pair in largest or pair[0] in known]
        probed = [(name, f"{share:.2%}", f"{known[name]:.2%}" if name in known else "-") for name, share in shown]
        blocks.append(
            Table(title="First tensor that drifts", note=note, header=("tensor", "distance", "alone"), rows=probed)
        )
    repeated = [row for found in findings.repeats for row in found.rows()]
    if repeated:
        note = "Logits of the same frames, bit by bit."
        columns = ("artefact", "what was repeated", "outcome")
        blocks.append(Table(title="Determinism", note=note, header=columns, rows=repeated))
    if findings.flicker:
        steps = [
            (name, str(frames), f"{before:.4f}", f"{after:.4f}")
            for name, (frames, before, after) in findings.flicker.items()
        ]
        note = "Mean of 1 - Dice of neighbouring masks of a clip."
        blocks.append(Table(title="Flicker", note=note, header=("artefact", "frames", "reference", "here"), rows=steps))
    if findings.notes:
        blocks.append(Table(title="Not done", header=("what and why",), rows=[(note,) for note in findings.notes]))
    blocks.append(Facts(title="Machine", facts=[(key, str(value)) for key, value in sorted(report.machine.items())]))
    passed = bool(report) and not findings.failures
    headline = report.headline if not findings.failures else f"FAILED: {'; '.join(findings.failures)}"
    return Page(title="Verification", passed=passed, headline=headline, blocks=blocks)


__all__ = ["ARTEFACT", "REFERENCE", "SHOWN_TENSORS", "TRUTH", "ZOOM", "VerifyFindings", "examined_page", "worst_images"]
