"""What ``--sink NAME:WHERE`` means: the sinks of a run, what they are told of it, and what they say at its end."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinyusfm_runtime.errors import InputError

if TYPE_CHECKING:
    from tinyusfm_runtime.manifest import Manifest
    from tinyusfm_runtime.sinks import Sink

FILES = ("jsonl", "csv", "video", "dicom", "audit")
"""Sinks whose place is a file or a folder."""


def facts_of(
    manifest: Manifest, source: Any, location: str, *, rate_hz: float, budget_ms: float | None
) -> dict[str, Any]:
    """What sinks may be told about a run.

    Args:
        manifest: of the bundle that answers.
        source: the open source.
        location: the source as it was typed; only the DICOM sink gets it, to refer to that file.
        rate_hz: frames a second, for videos.
        budget_ms: age above which a result is stale, or None.
    """
    from tinyusfm_runtime.sources.dicom import DicomSource

    of_dicom = isinstance(source, DicomSource)
    return {
        "bundle_id": manifest.manifest_sha256,
        "title": manifest.spec.name,
        "model": manifest.spec.name,
        "labels": tuple(manifest.spec.labels),
        "rate_hz": rate_hz,
        "budget_ms": budget_ms,
        "source_dicom": location.removeprefix("dicom:") if of_dicom else None,
    }


def refuse_overwriting(source: str, locations: Iterable[str]) -> None:
    """Checks that no sink writes over the source or over another sink.

    Raises:
        InputError: two of them are the same file.
    """
    outputs = [
        where for name, _, where in (item.partition(":") for item in locations) if name in FILES and where != "-"
    ]
    places = [Path(source.split(":", 1)[-1]).resolve(), *(Path(where).resolve() for where in outputs)]
    if len(set(places)) != len(places):
        raise InputError("source and outputs must be different files")


def open_sinks(stack: ExitStack, locations: Iterable[str], facts: dict[str, Any]) -> list[Sink]:
    """Opens sinks in order; the stack closes them.

    Raises:
        InputError: no sink of that name.
        OutputError: one cannot be opened.
        MissingExtra: a library is missing.
    """
    from tinyusfm_runtime.sinks import open_sink

    return [stack.enter_context(open_sink(location, facts=facts)) for location in locations]


def closing_lines(locations: Sequence[str], sinks: Sequence[Sink]) -> list[str]:
    """Where things are, and the head of an audit log, for people. Asked after the sinks were closed."""
    lines = []
    for location, sink in zip(locations, sinks, strict=True):
        name, _, where = location.partition(":")
        if name in FILES and where != "-":
            lines.append(f"{name:<14}{where}")
        if name == "audit":
            lines.append(f"{'audit head':<14}{getattr(sink, 'head', '')} ({getattr(sink, 'records', 0)} records)")
    return lines
