"""What ``verify --report`` looks at beside the gate, and how it says it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinyusfm_edge.cli import console
from tinyusfm_edge.data.table import Sample
from tinyusfm_edge.examine import Material, examine
from tinyusfm_edge.report.page import render
from tinyusfm_edge.report.verification import VerifyFindings, examined_page
from tinyusfm_export.verify.bundle import VerifyReport
from tinyusfm_runtime.bundle.manifest import Artefact
from tinyusfm_runtime.bundle.reader import Bundle
from tinyusfm_runtime.sources import open_source

MAX_CLIP = 64
"""Frames of a clip that are looked at for flicker."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What is looked at beside the gate, as typed.

    Attributes:
        samples: labelled frames, or none.
        clip: source of consecutive frames, or None.
        margins: metric -> how much worse is allowed, or None for the defaults.
        threads: inside the engines.
        chosen: artefacts to look at.
    """

    samples: Sequence[Sample]
    clip: str | None
    margins: dict[str, float] | None
    threads: int
    chosen: Sequence[Artefact]


def examined(bundle: Bundle, report: VerifyReport, module: Any, asked: Asked, place: Path) -> VerifyFindings:
    """Looks at everything beside the gate and writes the page.

    Args:
        bundle: an open bundle.
        report: of the gate.
        module: the student, or None.
        asked: what to look at.
        place: of the page.

    Raises:
        EdgeError: frames, engine or page cannot be used.
    """
    frames = []
    if asked.clip is not None:
        with open_source(asked.clip) as source:
            frames = list(itertools.islice(source, MAX_CLIP))
    material = Material(module=module, samples=asked.samples, clip=frames, margins=asked.margins, threads=asked.threads)
    findings, images = examine(bundle, asked.chosen, material)
    console.write_file(place, render(examined_page(report, findings, images)).encode("utf-8"), "the page")
    return findings


def finding_lines(findings: VerifyFindings) -> list[str]:
    """What was found, for people.

    Args:
        findings: beside the gate.
    """
    lines = []
    for found in findings.clinical:
        header = ("metric", "frames", "reference", "artefact", "difference")
        lines += [found.name, console.table(header, [row.row() for row in found.rows])]
        lines.append(f"readings     {found.flips} of {found.frames} frames are read otherwise than by the reference")
    tests = [test.row() for found in findings.clinical for test in found.margins]
    if tests:
        lines.append(console.table(("metric", "frames", "difference", "margin", "verdict"), tests))
    lines += [f"drift        {drift.sentence}" for drift in findings.drifts]
    lines += [f"repeats      {', '.join(row)}" for found in findings.repeats for row in found.rows()]
    for name, (frames, before, after) in findings.flicker.items():
        lines.append(f"flicker      {name}: {before:.4f} in the reference, {after:.4f} here, {frames} frames")
    return [*lines, *(f"not done     {note}" for note in findings.notes)]


__all__ = ["MAX_CLIP", "Asked", "examined", "finding_lines"]
