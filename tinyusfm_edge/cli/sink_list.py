"""What ``--sink NAME:WHERE`` means: the sinks of a run, what they are told of it, and what they say at its end."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinyusfm_runtime.errors import InputError

if TYPE_CHECKING:
    from tinyusfm_runtime.ladder import Ladder
    from tinyusfm_runtime.session import Session
    from tinyusfm_runtime.sinks import Sink

FILES = ("jsonl", "csv", "video", "dicom", "audit")
"""Sinks whose place is a file or a folder."""


def facts_of(answering: Session | Ladder, source: Any, *, budget_ms: float | None) -> dict[str, Any]:
    """What sinks may be told about a run; ``source_dicom`` only where the frames are those of a DICOM file.

    Args:
        answering: the open session or ladder.
        source: where frames come from.
        budget_ms: age above which a result is stale, or None.
    """
    from tinyusfm_runtime.sources.dicom import DicomSource

    # a crop is a source around a source; the frames say where they lie
    inner = getattr(source, "source", source)
    return {
        "bundle_id": answering.manifest.manifest_sha256,
        "title": answering.spec.name,
        "model": answering.spec.name,
        "labels": tuple(answering.spec.labels),
        "budget_ms": budget_ms,
        "source_dicom": str(inner.path) if isinstance(inner, DicomSource) else None,
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
    for location, sink in zip(locations, sinks, strict=False):
        name, _, where = location.partition(":")
        if name in FILES and where != "-":
            lines.append(f"{name:<14}{where}")
        if name == "audit":
            lines.append(f"{'audit head':<14}{getattr(sink, 'head', '')} ({getattr(sink, 'records', 0)} records)")
    return lines
