"""The papers as pages: index, cards, evidence, SOUP list, threat model.

Every page is self-contained and prints; nothing is fetched.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tinyusfm_edge.dossier.bom import limits
from tinyusfm_edge.dossier.facts import MANUFACTURER, BundleFacts, estimates
from tinyusfm_edge.dossier.soup import HEADER, soup_rows
from tinyusfm_edge.dossier.threats import ASSETS, BORDERS, OUT_OF_SCOPE, THREATS
from tinyusfm_edge.report.page import Block, Facts, Links, Page, Table, render
from tinyusfm_export.trace import Trace

FILES = (
    ("model-card.html", "Model card", "what the model is, its accuracy with intervals, its limits"),
    ("data-statement.html", "Data statement", "what it was trained, calibrated and judged on"),
    ("test-evidence.html", "Test evidence", "every artefact's gate: demand, measured, limit, verdict"),
    ("soup.html", "SOUP list", "libraries on the device, as IEC 62304 asks for them"),
    ("threat-model.html", "Threat model", "assets, borders, threats and answers, out of scope"),
    ("bom.cdx.json", "Bill of materials", "CycloneDX 1.6 JSON with the model card"),
    ("soup.csv", "SOUP list as a table", "the same rows for a spreadsheet"),
    ("trace.json", "Trace", "images to reports as hashes"),
)
"""(file, title, what it holds)."""

LEFT = (
    ("intended use of the device, users, indications", "ISO 14971, MDR annex I, 21 CFR 820"),
    ("risk class of every SOUP item, consequence of a fault, risk control", "IEC 62304 7.1.2"),
    ("clinical evaluation on the device's own population", "MDR article 61, FDA guidance on AI-enabled functions"),
    ("usability of how readings are shown", "IEC 62366-1"),
    ("monitoring after release, and who receives complaints", "MDR article 83, 21 CFR 820.198"),
    ("who holds the signing key, and how it is replaced", "IEC 81001-5-1"),
)
"""(what only the manufacturer can fill in, where it is asked for)."""


def make_pages(facts: BundleFacts, trace: Trace, checked: str) -> dict[str, str]:
    """Every page of the papers.

    Args:
        facts: what is known.
        trace: chain of the bundle.
        checked: how the bill of materials was checked, one phrase.

    Returns:
        File name -> HTML.
    """
    return {
        "index.html": _index(facts, trace, checked),
        "model-card.html": _model_card(facts),
        "data-statement.html": _data(facts),
        "test-evidence.html": _evidence(facts, trace),
        "soup.html": _soup(facts),
        "threat-model.html": _threats(facts),
    }


def _page(facts: BundleFacts, title: str, headline: str, blocks: list[Block], *, passed: bool = True) -> str:
    manifest = facts.bundle.manifest
    lead = [f"{manifest.spec.name}, bundle {manifest.bundle_id}, made {manifest.created_utc}"]
    return render(Page(title=title, passed=passed, headline=headline, lead=lead, blocks=blocks))


def _index(facts: BundleFacts, trace: Trace, checked: str) -> str:
    manifest = facts.bundle.manifest
    verified = sum(artefact.trusted for artefact in manifest.artefacts)
    about = [
        ("model", manifest.spec.name),
        ("intended use", manifest.spec.intended_use or MANUFACTURER),
        ("licence of the weights", manifest.spec.licence or "not stated"),
        ("weights sha256", manifest.weights_sha256),
        ("manifest sha256", manifest.manifest_sha256),
        ("device class", manifest.device_class or "any"),
        ("security version", "none" if manifest.security_version is None else str(manifest.security_version)),
        ("artefacts", ", ".join(artefact.name for artefact in manifest.artefacts)),
        ("bill of materials", checked),
    ]
    blocks: list[Block] = [
        Links(title="The papers", links=[(name, f"{title}: {what}") for name, title, what in FILES]),
        Facts(title="The bundle", facts=about),
        Table(
            title="For the manufacturer",
            note="These parts are empty on purpose: they depend on the device and its use.",
            header=("what", "asked for in"),
            rows=LEFT,
        ),
    ]
    if facts.notes:
        blocks.append(Table(title="What is not known here", header=("note",), rows=[(note,) for note in facts.notes]))
    total = len(manifest.artefacts)
    headline = f"{verified} of {total} artefacts passed their gate; the trace {'holds' if trace else 'is broken'}"
    return _page(facts, f"Dossier of {manifest.spec.name}", headline, blocks, passed=bool(trace) and verified == total)


def _model_card(facts: BundleFacts) -> str:
    spec = facts.bundle.manifest.spec
    pre = spec.preprocess
    about = [
        ("task", spec.task.value),
        ("labels", ", ".join(spec.labels) or "none"),
        ("input", f"grey, {pre.height}x{pre.width}, {pre.aspect.value}"),
        ("post-processing", f"{spec.postprocess.value}, probability above {spec.threshold}"),
        ("architecture", ", ".join(f"{key} {value}" for key, value in sorted(spec.architecture.items())) or "-"),
        ("origin", spec.origin or "not stated"),
        ("intended use", spec.intended_use or MANUFACTURER),
        ("users", MANUFACTURER),
        ("licence", spec.licence or "not stated"),
    ]
    rows = [row for report in facts.scores for row in _score_rows(report)]
    note = "Mean and 95 % interval, bootstrap over patients." if rows else "No labelled frames: give --scores."
    blocks: list[Block] = [
        Facts(title="The model", facts=about),
        Table(
            title="Accuracy of the PyTorch float32 reference",
            note=note,
            header=("split", "measure", "value", "low", "high", "frames", "patients"),
            rows=rows,
        ),
        Table(title="Artefacts against the reference", header=("artefact", "measure", "value"), rows=_gate_rows(facts)),
        Table(title="Limits", header=("limit",), rows=[(line,) for line in limits(facts)]),
    ]
    return _page(facts, f"Model card of {spec.name}", spec.intended_use or MANUFACTURER, blocks)


def _score_rows(report: Mapping[str, Any]) -> list[tuple[str, ...]]:
    split = str(report.get("split", ""))
    return [
        (split, name, f"{value:.4f}", _number(low), _number(high), str(frames or "-"), str(patients or "-"))
        for name, value, low, high, frames, patients in estimates(report)
    ]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _gate_rows(facts: BundleFacts) -> list[tuple[str, str, str]]:
    return [
        (artefact.name, name, f"{value:.4f}")
        for artefact in facts.bundle.manifest.artefacts
        for name, value in sorted(((artefact.gate or {}).get("statistics") or {}).items())
        if isinstance(value, (int, float))
    ]


def _data(facts: BundleFacts) -> str:
    data = facts.card.get("data") or {}
    about = [(key, str(data[key])) for key in ("name", "title", "licence", "citation", "doi", "others") if key in data]
    splits = [
        (name, str(counts["frames"]), str(counts["groups"]))
        for name, counts in sorted((data.get("splits") or {}).items())
    ]
    calibrated = facts.card.get("ranges") or {}
    used = [
        ("calibration set", facts.bundle.manifest.calibration_id or "none: nothing is quantized"),
        ("its name", str(calibrated.get("set_name", "not known here"))),
        ("its frames", str(calibrated.get("frames", "not known here"))),
    ]
    judged = [
        (name, str(frames.get("count", "")), str(frames.get("about", "")))
        for name, frames in ((a.name, (a.gate or {}).get("frames") or {}) for a in facts.bundle.manifest.artefacts)
    ]
    missing = [
        ("age, sex, weight of the patients", "not in the data that the student was trained on, or not stated there"),
        ("scanners and probes", "not stated frame by frame"),
        ("sites and countries", "as the citation says"),
        ("consent and approval", "as the owners of the data state; the manufacturer has to check"),
        ("fit to the device's population", MANUFACTURER),
    ]
    blocks: list[Block] = [
        Facts(title="Training data", note="" if about else "Not a shipped student: " + MANUFACTURER, facts=about),
        Table(title="Splits", header=("split", "frames", "patients"), rows=splits),
        Facts(title="Calibration", facts=used),
        Table(title="Frames that judged", header=("artefact", "frames", "what they are"), rows=judged),
        Table(title="What is not known", header=("question", "answer"), rows=missing),
    ]
    return _page(facts, "Data statement", str(data.get("title") or MANUFACTURER), blocks)


def _evidence(facts: BundleFacts, trace: Trace) -> str:
    blocks: list[Block] = []
    for artefact in facts.bundle.manifest.artefacts:
        report = facts.reports.get(artefact.name) or artefact.gate or {}
        statistics, bounds = report.get("statistics") or {}, report.get("limits") or {}
        rows = [
            (name, f"{value:.4f}" if isinstance(value, float) else str(value), str(bounds.get(name, "-")))
            for name, value in sorted(statistics.items())
        ]
        failures = ", ".join(map(str, report.get("failures") or ())) or "none"
        passed = "passed" if artefact.trusted else artefact.pending or "not verified"
        note = f"{passed}; {report.get('engine', 'engine not known')}; misses: {failures}"
        blocks.append(Table(title=artefact.name, note=note, header=("measure", "measured", "limit"), rows=rows))
    blocks.append(Table(title="Trace", header=("stage", "recorded", "match", "what was compared"), rows=trace.table()))
    verified = all(artefact.trusted for artefact in facts.bundle.manifest.artefacts)
    headline = "every artefact passed its gate" if verified else "an artefact has not passed its gate"
    return _page(facts, "Test evidence", headline, blocks, passed=verified and bool(trace))


def _soup(facts: BundleFacts) -> str:
    note = "SOUP: software of unknown provenance. Hazard columns are the manufacturer's, in every row."
    blocks: list[Block] = [Table(title="Libraries on the device", note=note, header=HEADER, rows=soup_rows(facts))]
    return _page(facts, "SOUP list", f"{len(facts.libraries)} libraries; IEC 62304 5.3.3, 5.3.4, 7.1.3, 8.1.2", blocks)


def _threats(facts: BundleFacts) -> str:
    rows = [(threat.name, threat.answer, threat.shown_by, threat.left or "-") for threat in THREATS]
    blocks: list[Block] = [
        Table(title="Assets", header=("asset", "why it matters"), rows=ASSETS),
        Table(title="Borders", header=("border", "what crosses it"), rows=BORDERS),
        Table(title="Threats", header=("threat", "answer", "shown by", "what is left"), rows=rows),
        Table(title="Out of scope", header=("not protected against",), rows=[(line,) for line in OUT_OF_SCOPE]),
        Table(
            title="For the manufacturer",
            header=("what",),
            rows=[("threats that come with the device: its network, its users, its updates",)],
        ),
    ]
    return _page(facts, "Threat model", "threats to a bundle on a device, and what stands against them", blocks)


__all__ = ["FILES", "LEFT", "make_pages"]
