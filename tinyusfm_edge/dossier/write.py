"""Writes the papers of one bundle into a folder."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from tinyusfm_edge.dossier.bom import check_bom, make_bom
from tinyusfm_edge.dossier.c_runtime import c_libraries
from tinyusfm_edge.dossier.facts import gather
from tinyusfm_edge.dossier.pages import make_pages
from tinyusfm_edge.dossier.soup import soup_csv
from tinyusfm_edge.release.at_hand import AtHand, lost
from tinyusfm_export.trace import Trace, trace_bundle
from tinyusfm_runtime.atomic import write_file
from tinyusfm_runtime.bundle.reader import Bundle
from tinyusfm_runtime.errors import MissingExtra, OutputError


@dataclass(frozen=True, kw_only=True, slots=True)
class Written:
    """What was written.

    Attributes:
        files: of the folder.
        trace: chain of the bundle.
        checked: how the bill of materials was checked, one phrase.
        notes: what a reader must know.
    """

    files: tuple[Path, ...]
    trace: Trace
    checked: str
    notes: tuple[str, ...]


def write_dossier(
    bundle: Bundle, out: Path, *, scores: Path | None = None, in_c: bool = False, c_build: Path | None = None
) -> Written:
    """Writes the papers of a bundle.

    Args:
        bundle: an open bundle.
        out: folder, made where it is missing; files of the same names are replaced.
        scores: file that ``evaluate --json`` wrote for these weights, or None.
        in_c: the device's program is written in C.
        c_build: build folder of the C runtime, or None where its versions are not known.

    Raises:
        InputError: the build folder or the scores cannot be used.
        BundleError: a file of the bundle cannot be read.
        OutputError: the folder cannot be written.
    """
    facts = gather(bundle, scores, c_libraries(bundle, c_build) if in_c else None)
    weights = bundle.manifest.weights_sha256
    trace = trace_bundle(bundle, AtHand().stages(weights), lost(weights))
    bom = make_bom(facts)
    try:
        check_bom(bom)
        checked = "follows CycloneDX 1.6, checked with the schemas of cyclonedx-python-lib"
    except MissingExtra as error:
        checked = f"not checked here: {error}"
    contents = {
        **{name: page.encode("utf-8") for name, page in make_pages(facts, trace, checked).items()},
        "bom.cdx.json": (json.dumps(bom, indent=1, sort_keys=True) + "\n").encode("utf-8"),
        "soup.csv": soup_csv(facts),
        "trace.json": (json.dumps(trace.to_json(), indent=1, sort_keys=True) + "\n").encode("utf-8"),
    }
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{out} cannot be made: {error.strerror or error}") from error
    for name, content in contents.items():
        write_file(out / name, content, "the dossier")
    return Written(files=tuple(out / name for name in contents), trace=trace, checked=checked, notes=facts.notes)


__all__ = ["Written", "write_dossier"]
