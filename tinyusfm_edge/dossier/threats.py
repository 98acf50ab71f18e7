"""The threat model of a bundle on a device.

Assets, borders, threats with their answers, what is out of scope.

The page docs/trust/threat-model.md says the same; a test holds the two together.
"""

from __future__ import annotations

from dataclasses import dataclass

ASSETS = (
    ("the reading", "a mask, a class, a circumference: what a person acts on"),
    ("frames", "images of patients, in memory and in what a sink writes"),
    ("the bundle", "weights, thresholds, labels, golden answers"),
    ("the record", "results, audit log, reports"),
    ("availability", "the scanner's own program goes on, whatever happens here"),
    ("the signing key", "on the workstation, in a file or a token; never on a device"),
)
"""(what, why it matters)."""

BORDERS = (
    ("files", "bundles, weights, tables, images and videos come from elsewhere and are not trusted"),
    ("network", "OpenIGTLink and the live page, on addresses that the operator chose; nothing else opens a socket"),
    ("shared memory", "a ring that another process of the same machine writes"),
    ("inference libraries", "native code of others; it sees a graph that was checked, in a process that can be killed"),
    ("the operating system", "its users, files and clock; the policy file belongs to the administrator"),
)
"""(where, what crosses it)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Threat:
    """One way to do harm.

    Attributes:
        name: of the threat.
        answer: what stands against it.
        shown_by: test or target that shows it.
        left: what is left, or empty.
    """

    name: str
    answer: str
    shown_by: str
    left: str = ""


THREATS = (
    Threat(
        name="a bundle is damaged",
        answer="every byte is hashed before an engine sees it",
        shown_by="tests/runtime/test_bundle.py",
    ),
    Threat(
        name="a bundle is rewritten, its manifest hashed again",
        answer="a signature is demanded: --require-signed, or the machine's policy file",
        shown_by="tests/runtime/test_trust.py",
        left="without that demand a rewritten bundle opens",
    ),
    Threat(
        name="an older, signed bundle is put back",
        answer="the security version stands in the signed statement; the device keeps a floor",
        shown_by="tests/runtime/test_trust.py",
        left="the floor is a file of the user; a TPM counter is safer (docs/trust/signing.md)",
    ),
    Threat(
        name="a bundle for another device is installed",
        answer="the device class stands in the signed statement",
        shown_by="tests/runtime/test_trust.py",
    ),
    Threat(
        name="threshold, labels or intended use are changed",
        answer="golden readings are read again at every start; verify compares with the student's file",
        shown_by="tests/runtime/test_selfcheck.py",
    ),
    Threat(
        name="weights are changed a little, so that readings shift",
        answer="golden answers at start, the gate in verify; the signature",
        shown_by="tests/runtime/test_selfcheck.py",
        left="golden checks alone let small shifts pass (docs/trust/guarantees.md)",
    ),
    Threat(
        name="a model file makes its engine read files, run code or never end",
        answer="the graph is read and bounded before an engine sees it; a hostile one is tried in a process first",
        shown_by="tests/runtime/test_graphs.py",
    ),
    Threat(
        name="a weights file runs code when it is loaded",
        answer="tensors only, sizes checked first, no unpickling of objects",
        shown_by="tests/models/test_weights_file.py",
    ),
    Threat(
        name="a damaged image, clip or message stops the program",
        answer="typed errors, bounded sizes; the live loop drops the frame and goes on",
        shown_by="tests/runtime/test_live_fuzz.py",
    ),
    Threat(
        name="someone on the network watches or floods the live page",
        answer="a key in the address, checked origin and host, limits on connections",
        shown_by="tests/runtime/test_web_attacks.py",
        left="the page speaks plain HTTP: put a proxy with TLS in front where others share the network",
    ),
    Threat(
        name="results are altered afterwards",
        answer="the audit log is a chain of hashes; its head can be kept elsewhere",
        shown_by="tests/runtime/test_audit.py",
        left="without the head a cut end is not seen",
    ),
    Threat(
        name="data leave the machine",
        answer="no telemetry, no network but what was asked for",
        shown_by="tests/house/test_network.py",
    ),
)
"""What was thought of; the tests are run with every change."""

OUT_OF_SCOPE = (
    "an attacker who is administrator of the device, or who can write into the process",
    "secrecy of weights: a bundle is not encrypted",
    "side channels, faults by radiation or voltage, and what inference libraries do inside",
    "examples made to mislead the network (adversarial frames) by someone who controls the probe",
    "whether the reading is clinically right: the gate compares with the reference, not with patients",
)
"""What nothing here protects against."""


def page_markdown() -> str:
    """The threat model as the Markdown page of the documents."""
    lines = [
        "# Threat model",
        "",
        "What is protected, where the borders are, what was thought of, and what is out of scope. `bundle dossier`",
        "puts it into a bundle's papers.",
        "",
        "## Assets",
        "",
        *_table(("asset", "why it matters"), ASSETS),
        "",
        "## Borders",
        "",
        *_table(("border", "what crosses it"), BORDERS),
        "",
        "## Threats",
        "",
        *_table(
            ("threat", "answer", "shown by", "what is left"),
            [(t.name, t.answer, f"`{t.shown_by}`", t.left or "-") for t in THREATS],
        ),
        "",
        "## Out of scope",
        "",
        *[f"- {line}" for line in OUT_OF_SCOPE],
    ]
    return "\n".join(lines) + "\n"


def _table(header: tuple[str, ...], rows: object) -> list[str]:
    found = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for row in rows:  # type: ignore[attr-defined]
        found.append("| " + " | ".join(row) + " |")
    return found


__all__ = ["ASSETS", "BORDERS", "OUT_OF_SCOPE", "THREATS", "Threat", "page_markdown"]
