"""Software of unknown provenance on the device, as IEC 62304 asks for it.

Identification (8.1.2), requirement on it (5.3.3), what it needs (5.3.4), where its anomalies are listed (7.1.3), and
the gate or golden test that exercises it. What follows from a fault (7.1.2) depends on the device: those columns are
the manufacturer's.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from tinyusfm_edge.dossier.facts import MANUFACTURER, BundleFacts, InstalledLibrary

HEADER = (
    "id", "name", "version", "supplier", "licence", "purpose", "requirement", "needs", "exercised by", "anomaly list",
    "risk class", "consequence of a fault", "risk control",
)  # fmt: skip
"""Columns; the last three are the manufacturer's."""
OURS = 10
"""Columns that are filled in here."""


def soup_rows(facts: BundleFacts) -> list[tuple[str, ...]]:
    """One row a library of the device.

    Args:
        facts: what is known.

    Returns:
        Cells in the order of ``HEADER``.
    """
    return [
        (
            f"SOUP-{number:02d}",
            library.name,
            library.version,
            library.supplier or "not stated",
            library.licence or "not stated",
            library.purpose,
            _requirement(facts, library),
            _needs(facts, library),
            _exercised(facts, library),
            library.anomalies or "none stated by the supplier",
            *[MANUFACTURER] * (len(HEADER) - OURS),
        )
        for number, library in enumerate(facts.libraries, start=1)
    ]


def soup_csv(facts: BundleFacts) -> bytes:
    """The rows as CSV with a header, UTF-8.

    Args:
        facts: what is known.
    """
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(HEADER)
    writer.writerows([_plain(cell) for cell in row] for row in soup_rows(facts))
    return text.getvalue().encode("utf-8")


def _plain(cell: str) -> str:
    """A cell that no spreadsheet takes for a formula."""
    return f"'{cell}" if cell[:1] in ("=", "+", "-", "@") else cell


def _engines(facts: BundleFacts, library: InstalledLibrary) -> list[str]:
    return [a.name for a in facts.bundle.manifest.artefacts if a.requirements.get("library") == library.name]


def _requirement(facts: BundleFacts, library: InstalledLibrary) -> str:
    if names := _engines(facts, library):
        return f"answers like the PyTorch reference within the gate's limits: {', '.join(_limits(facts, names[0]))}"
    if library.name == facts.libraries[0].name:
        return "refuses what it was not published with; the same bytes in give the same reading"
    if library.name == "numpy":
        return "golden answers are read again to the last digit at every start"
    return f"lets {library.needed_by} work"


def _limits(facts: BundleFacts, name: str) -> list[str]:
    artefact = next(a for a in facts.bundle.manifest.artefacts if a.name == name)
    limits = (artefact.gate or {}).get("limits") or {}
    shown = ("dice_mean", "dice_worst", "hc_p95_mm", "top1", "probability_drift", "float_logits")
    return [f"{key} {limits[key]}" for key in shown if key in limits] or ["none recorded"]


def _needs(facts: BundleFacts, library: InstalledLibrary) -> str:
    names = _engines(facts, library)
    if not names and library.purl:
        return "the C library of the device's system"
    if not names:
        return f"Python {facts.bundle.manifest.tools.get('python', '')}".strip()
    artefact = next(a for a in facts.bundle.manifest.artefacts if a.name == names[0])
    features = artefact.requirements.get("cpu_features") or []
    return "CPU with " + " ".join(map(str, features)) if features else "the device class of the manifest"


def _exercised(facts: BundleFacts, library: InstalledLibrary) -> str:
    if names := _engines(facts, library):
        tests: Sequence[str] = [f"reports/{name}.json and golden/{name}.safetensors" for name in names]
        return "; ".join(tests) + ", at every start"
    if library.name in _behind_readings(facts):
        return "golden check at every start"
    return "tests/cli of tinyusfm-edge; no reading depends on it"


def _behind_readings(facts: BundleFacts) -> set[str]:
    """Libraries that a golden answer goes through."""
    needs = {library.name: library.requires for library in facts.libraries}
    waiting = [
        facts.libraries[0].name,
        "numpy",
        *(str(a.requirements.get("library")) for a in facts.bundle.manifest.artefacts),
    ]
    found: set[str] = set()
    while waiting:
        name = waiting.pop()
        if name in needs and name not in found:
            found.add(name)
            waiting += needs[name]
    return found


__all__ = ["HEADER", "OURS", "soup_csv", "soup_rows"]
