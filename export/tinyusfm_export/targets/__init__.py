"""What a target is: it writes files that one engine reads.

It writes the export graph and a decision.

A target is one file in ``targets/``; its stem is the name people type (see plugins.py in the runtime). The file has
``available()``, which tells whether it can build here, and a class ``Target``. Where the engine itself runs on other
machines only, the file also has a class ``StandIn``, an engine that runs the artefact's own files here, and its
requirements say what is ``pending``. It does not know gates, bundles or frames.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    from tinyusfm_export.graph.build import ExportGraph
    from tinyusfm_export.quantize.decision import QuantDecision


@dataclass(frozen=True, kw_only=True, slots=True)
class Requirements:
    """What the machine that runs an artefact must have.

    Attributes:
        cpu_features: CPU flags (names as Linux prints them) that decide which arithmetic the engine uses. The artefact
            was built, and is to be verified, on a machine with exactly these of ``WATCHED_FEATURES``.
        library: distribution of the engine.
        library_version: version it was built and verified with.
        pending: what has still to complete the gate, one phrase, where the engine cannot run at export; else empty.
    """

    cpu_features: tuple[str, ...]
    library: str
    library_version: str
    pending: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain data for the manifest; ``pending`` is left out where nothing is."""
        plain = {**asdict(self), "cpu_features": list(self.cpu_features)}
        return plain if self.pending else {name: value for name, value in plain.items() if name != "pending"}


@dataclass(frozen=True, kw_only=True, slots=True)
class BuiltArtefact:
    """Files of one artefact and what must be known about them.

    Attributes:
        files: what was written, the one the engine is pointed at first.
        form: how the decision was written, one phrase for people.
        rest_precision: arithmetic of everything that is not int8, ``f32``, ``f16`` or ``bf16``.
        requirements: what the machine must have.
    """

    files: tuple[Path, ...]
    form: str
    rest_precision: str
    requirements: Requirements


@runtime_checkable
class Target(Protocol):
    """Writes artefacts for one engine."""

    name: str
    """Public name, the one stored in a manifest: ``onnx``, ``openvino``."""
    suffix: str
    """Suffix of the file the engine is pointed at: ``.onnx``, ``.xml``."""
    precisions: tuple[str, ...]
    """Precisions it can write on some machine."""

    def build(self, graph: ExportGraph, decision: QuantDecision, out: Path) -> BuiltArtefact:
        """Writes the artefact into the existing folder ``out``.

        The same arguments give the same bytes.

        Raises:
            UnsupportedError: the target, or this machine, cannot express the decision.
            MissingExtra: its library is not installed.
            OutputError: a file cannot be written.
        """
        ...


__all__ = ["BuiltArtefact", "Requirements", "Target"]
