"""Verifying a bundle: the whole gate, on this machine.

Against the live PyTorch reference or the stored one.

With the student at hand the reference is computed again on the frames given. Without it (a device has no torch) the
gate runs against the reference's answers stored in ``golden/``; the report says so and never calls itself the live one.
An engine that gives the same bytes on every CPU must also repeat the artefact's own golden answers exactly; then what
the export judged holds here too, and without the student the bundle's golden frames are enough, however few.
Where an artefact was exported without its own engine (Core ML anywhere but on a Mac), this is what completes its gate:
under the limits of the export, the engine keeps the outcome on this device (gate_record.py), pass or fail, and sessions
here open the artefact after a pass. The bundle itself is never written.
numpy only unless a module is handed in. It does not know how students are found.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tinyusfm_export.verify.artefact import compare_outputs, is_exact
from tinyusfm_export.verify.engine_run import open_engine, preprocess_all, run_engine
from tinyusfm_export.verify.expected import Expected, expect, expect_golden, judged_spec, stored_expectation
from tinyusfm_export.verify.gate import Gate
from tinyusfm_export.verify.gate_frames import GateFrames
from tinyusfm_export.verify.parity import GateLine, ParityReport
from tinyusfm_export.verify.sector import masked_gate_frames, pruned_gate, pruned_reference
from tinyusfm_runtime.bundle.golden import spec_faults
from tinyusfm_runtime.bundle.manifest import GOLDEN_SECTOR, Artefact
from tinyusfm_runtime.bundle.reader import Bundle
from tinyusfm_runtime.device.machine import machine_card
from tinyusfm_runtime.engines import Engine
from tinyusfm_runtime.errors import InputError, MissingExtra, UnsupportedError
from tinyusfm_runtime.plugins import stem
from tinyusfm_runtime.spec import ExitPolicy, ModelSpec

if TYPE_CHECKING:
    from torch import nn

VERIFY_VERSION = 2
"""Version of the JSON that ``VerifyReport.to_json`` writes."""
STUDENT_FIELDS = (
    "task", "labels", "preprocess", "postprocess", "threshold", "licence", "origin", "intended_use", "second_pass",
    "min_area", "anatomy", "probe",
)  # fmt: skip
"""What a bundle must say as the student's own file does. Its name may be another, early exits are compared where they
act, and thresholds of readings may have been calibrated at export."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ArtefactCheck:
    """One artefact's outcome.

    Attributes:
        name: such as ``openvino-int8``.
        report: the judged comparison, or None if it could not be run here.
        skipped: why it could not be run here; empty if it was.
        notes: what a reader must know, such as that it was exported without a gate.
        completed: the device whose pending gate this was and on which its outcome is kept, one line; empty if none was.
    """

    name: str
    report: ParityReport | None
    skipped: str = ""
    notes: tuple[str, ...] = ()
    completed: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class VerifyReport:
    """What verifying found.

    True if at least one artefact was run and all that were hold the gate.

    Attributes:
        path: the bundle's folder.
        bundle_id: short name of exactly these bytes.
        live: True if the PyTorch reference was computed now; False if the stored one was used.
        machine: machine card, plain data.
        checks: one per artefact, in the fallback's order.
    """

    path: Path
    bundle_id: str
    live: bool
    machine: Mapping[str, Any]
    checks: tuple[ArtefactCheck, ...]

    def __bool__(self) -> bool:
        run = [check.report for check in self.checks if check.report is not None]
        return bool(run) and all(run)

    @property
    def headline(self) -> str:
        """What kind of check this was and how it ended, one line."""
        run = sum(check.report is not None for check in self.checks)
        skipped = len(self.checks) - run
        many = f"{run} artefact{'s' if run != 1 else ''}"
        left = f"; {skipped} could not run here" if skipped else ""
        word = "passed" if self else "FAILED"
        if self.live:
            return f"{word}: full gate against the live PyTorch reference, {many}{left}"
        return (
            f"{word}: quick check of {many} against the stored PyTorch outputs{left}; this is not the full gate, which "
            "needs torch and the student"
        )

    @property
    def failures(self) -> tuple[str, ...]:
        """What does not hold, artefact first."""
        missed = [f"{c.name}: {text}" for c in self.checks if c.report is not None for text in c.report.failures]
        return tuple(missed) if any(c.report is not None for c in self.checks) else ("no artefact could be run here",)

    def to_json(self) -> dict[str, Any]:
        """Plain data, ready for ``json.dumps``."""
        return {
            "version": VERIFY_VERSION,
            "passed": bool(self),
            "headline": self.headline,
            "bundle_id": self.bundle_id,
            "live": self.live,
            "machine": dict(self.machine),
            "artefacts": [
                {
                    "name": check.name,
                    "skipped": check.skipped,
                    "notes": list(check.notes),
                    "completed": check.completed,
                    "report": None if check.report is None else check.report.to_json(),
                }
                for check in self.checks
            ],
        }

    def table(self) -> list[tuple[str, str, str, str, str]]:
        """Rows (artefact, demand, measured, limit, verdict) for people."""
        rows: list[tuple[str, str, str, str, str]] = []
        for check in self.checks:
            if check.report is None:
                rows.append((check.name, "not run here", "", "", check.skipped))
            else:
                rows += [(check.name, *line) for line in check.report.table()]
        return rows


def verify_bundle(
    bundle: str | Path | Bundle,
    *,
    module: nn.Module | None = None,
    weights_sha256: str = "",
    exits: ExitPolicy | None = None,
    spec: ModelSpec | None = None,
    frames: GateFrames | None = None,
    gate: Gate | None = None,
    target: str | None = None,
    precision: str | None = None,
    threads: int = 1,
) -> VerifyReport:
    """Runs the gate on a bundle.

    Args:
        bundle: a bundle's folder, or an open bundle.
        module: the student, for the live reference; None uses the stored one.
        weights_sha256: hash of the student's file, compared with the bundle's where given.
        exits: the student's own rule for its early exits; None takes the bundle's word for it.
        spec: what the student's own file says of it; the bundle must say the same. None takes the bundle's word for it.
        frames: frames for the live reference; None takes the golden phantoms.
        gate: thresholds; None is the default gate, whatever gate the bundle was exported with.
        target: only artefacts of this target.
        precision: only artefacts of this precision.
        threads: threads inside the engine.

    Raises:
        InputError: no such bundle or artefact, another student, or frames without a student to run on them.
        BundleError: the bundle was tampered with or cannot be read.
        MissingExtra: the one artefact asked for needs a library that is not installed.
        EngineError: an engine refused its artefact or failed.
        OutputError: the outcome of a pending gate cannot be kept.
    """
    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    chosen = choose_artefacts(opened, target, precision)
    if module is None and frames is not None:
        raise InputError("frames were given but the student was not: the reference on them cannot be computed")
    if module is not None and weights_sha256 not in ("", opened.manifest.weights_sha256):
        raise InputError(
            f"the student given ({weights_sha256[:12]}) is not the one this bundle was made of "
            f"({opened.manifest.weights_sha256[:12]})"
        )
    judged = {
        path: stored_expectation(opened, path)
        if module is None
        else _live_expectation(opened, module, frames, exits, path)
        for path in dict.fromkeys(artefact.reference for artefact in chosen)
    }
    checks = []
    for artefact in chosen:
        limits, expected = gate or Gate(), judged[artefact.reference]
        if module is None and gate is None and is_exact(artefact.engine):
            limits = replace(limits, min_frames=min(limits.min_frames, len(expected.inputs)))
        try:
            # against the whole student pruning moves logits on purpose; stored answers are those without the patches
            asked = pruned_gate(limits) if artefact.sector and frames is not None else limits
            found = _check(opened, artefact, expected, asked, threads)
            spec_lines = _spec_lines(opened, artefact.reference, spec)
            checks.append(_with_lines(found, (*spec_lines, *_spec_lines(opened, artefact.golden, None))))
        except (MissingExtra, UnsupportedError) as error:
            if len(chosen) == 1:
                raise
            checks.append(ArtefactCheck(name=artefact.name, report=None, skipped=str(error)))
    return VerifyReport(
        path=opened.path,
        bundle_id=opened.manifest.bundle_id,
        live=module is not None,
        machine=machine_card().to_json(),
        checks=tuple(checks),
    )


def choose_artefacts(bundle: Bundle, target: str | None, precision: str | None) -> list[Artefact]:
    """Artefacts that fit, in the fallback's order.

    Raises:
        InputError: none fits; the message lists what there is.
    """
    fitting = [
        artefact
        for artefact in bundle.manifest.artefacts
        if (target is None or stem(target) in (stem(artefact.target), artefact.engine))
        and (precision is None or precision.strip().lower() in (artefact.precision, artefact.variant))
    ]
    if not fitting:
        there = ", ".join(artefact.name for artefact in bundle.manifest.artefacts)
        wanted = " ".join(part for part in (target, precision) if part)
        raise InputError(f"the bundle has no artefact {wanted!r}; it has: {there}")
    return fitting


def _live_expectation(
    bundle: Bundle, module: nn.Module, frames: GateFrames | None, exits: ExitPolicy | None, path: str
) -> Expected:
    """The student's answers to given frames, or to golden ones.

    To golden ones without the patches that the artefact does not look at.
    """
    spec = judged_spec(bundle)
    if spec.exits is not None and exits is not None:
        spec = replace(spec, exits=exits)
    if frames:
        return expect(module, spec, masked_gate_frames(frames, spec))
    asked = pruned_reference(module, spec) if path == GOLDEN_SECTOR else module
    return expect_golden(asked, spec, bundle.golden_frames())


def _check(bundle: Bundle, artefact: Artefact, expected: Expected, gate: Gate, threads: int) -> ArtefactCheck:
    spec, files, completed = judged_spec(bundle), bundle.artefact_files(artefact), ""
    with open_engine(artefact.engine, files, spec, threads=threads, rest_precision=artefact.rest_precision) as engine:
        found = run_engine(engine, spec, expected.inputs, expected.frames)
        report = compare_outputs(spec, expected, found, gate, engine.description, precision=artefact.precision)
        keep = getattr(engine, "keep_gate", None)
        if keep is not None and artefact.pending and _same_limits(artefact, gate):
            outcome = {"passed": bool(report), "bundle_id": bundle.manifest.bundle_id, "report": report.summary()}
            completed = str(keep(outcome))
        if is_exact(artefact.engine) and not artefact.pending:
            report = replace(report, lines=(*report.lines, _identity(bundle, artefact, engine)))
    return ArtefactCheck(name=artefact.name, report=report, notes=_notes(artefact, gate), completed=completed)


def _identity(bundle: Bundle, artefact: Artefact, engine: Engine) -> GateLine:
    """Whether an exact engine repeats the artefact's golden answers to the bit."""
    spec, wanted = judged_spec(bundle), bundle.golden_outputs(artefact)["logits"]
    answers = run_engine(engine, spec, preprocess_all(bundle.golden_frames(), spec))
    pairs = zip(answers, wanted, strict=True)
    equal = sum(np.array_equal(found.logits[0].astype(want.dtype), want) for found, want in pairs)
    text = f"{equal} of {len(wanted)} golden answers are bit-identical to those of the export"
    return GateLine(name="bit_identical", text=text, value=equal / len(wanted), limit=1.0, passed=equal == len(wanted))


def _spec_lines(bundle: Bundle, golden: str, student: ModelSpec | None) -> tuple[GateLine, ...]:
    """Whether the manifest's model is the golden answers' and the student's.

    The one that golden answers were read with, and the one of the student's file.
    """
    spec = bundle.manifest.spec
    prepared = preprocess_all(bundle.golden_frames(), spec)
    arrays = bundle.golden_artefact(golden)
    faults = list(spec_faults(arrays, bundle.golden_digest(golden), spec, prepared, range(len(prepared))))
    if student is not None:
        mine, own = spec.to_json(), student.to_json()
        # an export to a sector says these itself
        changed = ("second_pass", "probe") if spec.sector is not None else ()
        differing = [name for name in STUDENT_FIELDS if name not in changed and mine[name] != own[name]]
        faults += [f"the manifest says another {', '.join(differing)} than the student's own file"] if differing else []
    text = "; ".join(faults) or "the manifest's model is the one that was read and exported: 1 is yes, 0 is no"
    return (GateLine(name="spec", text=text, value=float(not faults), limit=1.0, passed=not faults),)


def _with_lines(check: ArtefactCheck, lines: tuple[GateLine, ...]) -> ArtefactCheck:
    """One line on the spec in front of the report's own.

    The first that does not hold, else the first.
    """
    if check.report is None:
        return check
    line = next((line for line in lines if not line.passed), lines[0])
    return replace(check, report=replace(check.report, lines=(line, *check.report.lines)))


def _same_limits(artefact: Artefact, gate: Gate) -> bool:
    """Whether a gate demands what the export demanded.

    What the export did not know yet is no other limit.
    """
    limits, now = (artefact.gate or {}).get("limits"), gate.to_json()
    return isinstance(limits, Mapping) and all(now.get(name) == value for name, value in limits.items())


def _notes(artefact: Artefact, gate: Gate) -> tuple[str, ...]:
    notes = []
    if not artefact.gated:
        notes.append("exported with its gate switched off")
    elif artefact.pending:
        notes.append(f"at export: {artefact.pending}")
    elif not artefact.trusted:
        notes.append("never passed its gate")
    if isinstance((artefact.gate or {}).get("limits"), Mapping) and not _same_limits(artefact, gate):
        notes.append("exported with other limits than those used here")
    return tuple(notes)


__all__ = [
    "STUDENT_FIELDS",
    "VERIFY_VERSION",
    "ArtefactCheck",
    "VerifyReport",
    "choose_artefacts",
    "verify_bundle",
]
