"""What ``--sink NAME:WHERE`` means.

The sinks of a run, what is passed to them, and what they report at its end.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from tinyusfm_runtime.errors import InputError

if TYPE_CHECKING:
    from tinyusfm_runtime.frame import FrameSource
    from tinyusfm_runtime.live.fallback import Fallback
    from tinyusfm_runtime.session import Session
    from tinyusfm_runtime.sinks import RunFacts, Sink

FILES = ("jsonl", "csv", "video", "dicom", "audit", "masks", "record")
"""Sinks whose place is a file or a folder."""


def facts_of(answering: Session | Fallback, source: FrameSource, *, budget_ms: float | None) -> RunFacts:
    """What sinks may know about a run.

    ``source_dicom`` only where the frames are those of a DICOM file.

    Args:
        answering: the open session or fallback.
        source: where frames come from.
        budget_ms: age above which a result is stale, or None.
    """
    from tinyusfm_runtime.sinks import RunFacts
    from tinyusfm_runtime.sources.dicom import DicomSource

    # a crop is a source around a source; the frames say where they lie
    inner = getattr(source, "source", source)
    return RunFacts(
        bundle_id=answering.manifest.manifest_sha256,
        title=answering.spec.name,
        model=answering.spec.name,
        labels=tuple(answering.spec.labels),
        budget_ms=budget_ms,
        source_dicom=str(inner.path) if isinstance(inner, DicomSource) else None,
    )


def facts_of_several(
    answering: Mapping[str, Session | Fallback], source: FrameSource, *, budget_ms: float | None
) -> RunFacts:
    """What sinks may know about a run of several models.

    The loop itself names the bundle of each (sinks.introduce).

    Args:
        answering: the open sessions or fallbacks by name.
        source: where frames come from.
        budget_ms: age above which a result is stale, or None.
    """
    first = next(iter(answering.values()))
    title = " + ".join(answering)
    return replace(facts_of(first, source, budget_ms=budget_ms), bundle_id=None, title=title, model=title)


def refuse_overwriting(source: str, locations: Iterable[str]) -> None:
    """Checks that no sink writes over the source or over another sink.

    Raises:
        InputError: two of them are the same file.
    """
    from tinyusfm_runtime.sources import path_of

    outputs = [
        where for name, _, where in (item.partition(":") for item in locations) if name in FILES and where != "-"
    ]
    places = [path_of(source).resolve(), *(Path(where).resolve() for where in outputs)]
    if len(set(places)) != len(places):
        raise InputError("source and outputs must be different files")


def open_sinks(stack: ExitStack, locations: Iterable[str], facts: RunFacts) -> list[Sink]:
    """Opens sinks in order; the stack closes them.

    Raises:
        InputError: no sink of that name.
        OutputError: one cannot be opened.
        MissingExtra: a library is missing.
    """
    from tinyusfm_runtime.sinks import open_sink

    return [stack.enter_context(open_sink(location, facts=facts)) for location in locations]


def closing_lines(locations: Sequence[str], sinks: Sequence[Sink]) -> list[str]:
    """Where things are, and the head of an audit log, for people.

    Asked after the sinks were closed.
    """
    lines = []
    for location, sink in zip(locations, sinks, strict=False):
        name, _, where = location.partition(":")
        if name in FILES and where != "-":
            lines.append(f"{name:<14}{where}")
        if name == "masks":
            lines[-1] += f" ({getattr(sink, 'written', 0)} PNG)"
        if name == "audit":
            lines.append(f"{'audit head':<14}{getattr(sink, 'head', '')} ({getattr(sink, 'records', 0)} records)")
    return lines
