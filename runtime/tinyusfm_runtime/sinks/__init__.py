"""Where results go: one sink a file, and the protocol they keep.

``open_sink`` picks the plug-in by the word before the first colon (``jsonl:out.jsonl``,
``igtl://:18945``); ``deliver`` hands a live result to a sink in the way that it can take.

A record (JSON lines, CSV, audit log) is appended to its file as it comes; a video or a folder of
objects is written beside its goal and takes the goal's name when it is closed (atomic.py). What was
recorded before an error, Ctrl-C or SIGTERM is kept. A sink knows no engine; it is handed frames and
predictions, and live results by those that tell a late answer from a good one. A result of a loop of several models
holds one for each (``LiveResult.each``), with its name; every sink here keeps them apart by it.
"""

from __future__ import annotations

import inspect
import logging
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from types import TracebackType
from typing import Any, Protocol, TypeVar, cast, runtime_checkable

from tinyusfm_runtime import plugins
from tinyusfm_runtime.atomic import PendingFile, PendingFolder, RecordFile  # for sinks of other distributions too
from tinyusfm_runtime.errors import EdgeError, InputError
from tinyusfm_runtime.frame import Frame
from tinyusfm_runtime.reading import Judged
from tinyusfm_runtime.results import LiveEvent, LiveResult, Prediction, StateChange


@runtime_checkable
class Sink(Protocol):
    """A context manager that takes results in order.

    Leaving the context, through an error too, keeps what was written until then.
    """

    def __enter__(self) -> Sink: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def write(self, frame: Frame, prediction: Prediction) -> None: ...

    def close(self) -> None: ...


_Made = TypeVar("_Made", bound="FileSink")
_log = logging.getLogger(__name__)


class FileSink(ABC):
    """The context of a sink that leaves a file or a folder.

    What was recorded stays, whatever ended the run.
    """

    def __enter__(self: _Made) -> _Made:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except EdgeError as failed:
            if error is None:
                raise
            _log.warning("%s", failed)  # the error that ended the run goes on, this one would hide it

    @abstractmethod
    def close(self) -> None:
        """Finishes and publishes what was written; idempotent."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunFacts:
    """What a run knows and its sinks may want; None where it does not know.

    Attributes:
        bundle_id: sha256 of the bundle's manifest.
        title: headline for people.
        model: name of the model.
        labels: of the model, in order.
        budget_ms: age above which a result is stale.
        rate_hz: frames per second.
        source_dicom: path of the DICOM file whose frames are read.
    """

    bundle_id: str | None = None
    title: str | None = None
    model: str | None = None
    labels: tuple[str, ...] | None = None
    budget_ms: float | None = None
    rate_hz: float | None = None
    source_dicom: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelFacts:
    """What sinks may know of one of several models.

    Attributes:
        name: in the loop.
        labels: of the model, in order.
        bundle_id: sha256 of the bundle's manifest.
    """

    name: str
    labels: tuple[str, ...]
    bundle_id: str


def open_sink(location: str, *, facts: RunFacts | None = None, **options: Any) -> Sink:
    """Opens a place for results.

    Args:
        location: ``NAME:WHERE``, such as ``jsonl:out.jsonl``, ``csv:out.csv``, ``video:out.mp4``, ``igtl://:18945``,
            ``dicom:folder``, ``audit:log.jsonl``, ``shm-out:readings``.
        facts: what the caller knows; a sink takes those it has an option for.
        **options: handed to the sink; one that it does not know is an error.

    Returns:
        The sink, a context manager.

    Raises:
        InputError: no sink of that name, or an option does not fit.
        OutputError: it cannot be opened for writing.
        MissingExtra: a library is missing.
    """
    name, colon, rest = location.partition(":")
    existing = plugins.names("sinks")
    if not colon or not {name, plugins.stem(name)} & set(existing):
        known = ", ".join(map(plugins.public_name, existing))
        raise InputError(f"a sink is NAME:WHERE, such as jsonl:results.jsonl; the names here: {known}")
    opener: Callable[..., Sink] = plugins.load("sinks", name).open_sink
    known_options = inspect.signature(opener).parameters
    unknown = [key for key in options if key not in known_options]
    if unknown:
        takes = ", ".join(key for key in known_options if key != "location") or "none"
        raise InputError(f"the {name} sink has no option {unknown[0]!r}; its options: {takes}")
    stated = {each.name: getattr(facts, each.name) for each in fields(RunFacts)} if facts is not None else {}
    offered = {key: value for key, value in stated.items() if key in known_options and value is not None}
    return opener(rest, **{**offered, **options})


def deliver(sink: Sink, result: LiveResult) -> None:
    """Hands over one live result.

    A sink with ``write_live`` gets all of it. Another one gets frame and prediction, unless there is none or it is
    not to be shown.

    Args:
        sink: any sink.
        result: what the loop made.

    Raises:
        OutputError: the sink cannot write.
    """
    write_live = getattr(sink, "write_live", None)
    if write_live is not None:
        cast("Callable[[LiveResult], None]", write_live)(result)
    elif result.prediction is not None and not result.withheld:
        sink.write(result.frame, result.prediction)


def introduce(sink: Sink, models: Sequence[ModelFacts]) -> None:
    """Tells a sink which models a loop of several has, before the first result.

    It listens by ``on_models``.

    Args:
        sink: any sink.
        models: in the order of their results.

    Raises:
        OutputError: the sink cannot write.
    """
    listener = getattr(sink, "on_models", None)
    if listener is not None:
        cast("Callable[[Sequence[ModelFacts]], None]", listener)(models)


def announce(sink: Sink, event: StateChange | LiveEvent) -> None:
    """Reports a change of state or an event to a sink, if it listens.

    It listens by ``on_state`` or ``on_event``.

    Args:
        sink: any sink.
        event: what happened, and why.

    Raises:
        OutputError: the sink cannot write.
    """
    listener = getattr(sink, "on_state" if isinstance(event, StateChange) else "on_event", None)
    if listener is not None:
        cast("Callable[[StateChange | LiveEvent], None]", listener)(event)


def shown(result: LiveResult) -> Prediction | None:
    """The prediction that may be shown to people, else None.

    There is one, it is valid and not withheld.
    """
    prediction = result.prediction
    return prediction if prediction is not None and prediction.valid and not result.withheld else None


def reading_of(prediction: Prediction) -> dict[str, Any]:
    """How far an answer may be trusted, for records.

    Args:
        prediction: any answer.

    Returns:
        ``found``, ``confidence`` (0..1 or None), ``reading`` (good, doubtful, none, unchecked), ``reasons`` (what
        speaks against it), ``second_pass`` (never, not needed, done, off) and ``drift_status`` (checked, not checked,
        not applied).
    """
    return {
        "found": prediction.found,
        "confidence": prediction.confidence,
        "reading": prediction.reading.value,
        "reasons": [reason.value for reason in prediction.reasons],
        "second_pass": prediction.second_pass.value,
        "drift_status": prediction.drift_status.value,
    }


def labels_of(prediction: Prediction) -> list[dict[str, Any]]:
    """Each label's measurements and trust, for records; empty without a mask.

    What is measured of each label of a mask and how far it may be trusted.

    Args:
        prediction: any answer.

    Returns:
        One object per label: what a Measurement holds, ``reading`` and ``reasons``.
    """
    found = []
    for index, measured in enumerate(prediction.measurements):
        judged = prediction.judged[index] if index < len(prediction.judged) else Judged()
        trust = {"reading": judged.state.value, "reasons": [reason.value for reason in judged.reasons]}
        found.append({**asdict(measured), **trust})
    return found


def likeliest(prediction: Prediction | None, labels: Sequence[str]) -> dict[str, str]:
    """The likeliest class of a classifier's answer, for records.

    Args:
        prediction: any answer, or None.
        labels: of the model.

    Returns:
        ``label``, with whatever mark its student gave it; nothing where there is none.
    """
    scores = None if prediction is None else prediction.scores
    if scores is None or scores.ndim != 1 or not len(labels) or len(labels) != len(scores):
        return {}
    return {"label": labels[int(scores.argmax())]}


def smoothed(result: LiveResult) -> dict[str, Any] | None:
    """What smoothing over time says beside the raw answer, for records.

    None where it was not asked for.

    Args:
        result: what the loop made.

    Returns:
        ``hc_mm`` (median of the last measurements, mm, or None), ``held`` (it stands in for one that is missing) with
        ``held_ms`` (age of the newest measurement in it), ``flicker`` and ``flicker_smoothed`` (1 - Dice with the mask
        before, without and with smoothing, or None). A withheld result keeps the flicker alone.
    """
    smooth = result.reading
    if smooth is None:
        return None
    tells = not result.withheld
    return {
        "hc_mm": smooth.hc_mm if tells else None,
        "held": smooth.held and tells,
        "held_ms": smooth.held_ms if tells and smooth.hc_mm is not None else None,
        "flicker": smooth.flicker,
        "flicker_smoothed": smooth.flicker_smoothed,
    }


def listen_address(location: str, default_port: int) -> tuple[str, int]:
    """Reads where a sink that serves shall listen.

    Args:
        location: ``//HOST:PORT``, ``HOST:PORT`` or ``:PORT``; an IPv6 address stands in brackets. An empty host is
            this machine alone (127.0.0.1), port 0 any that is free.
        default_port: where no port is given.

    Returns:
        Host and port.

    Raises:
        InputError: it cannot be read so.
    """
    match = re.fullmatch(r"(?://)?(\[[0-9a-fA-F:.]+\]|[^\s:/\[\]]*)(?::(\d{1,5}))?/?", location)
    port = default_port if match is None or match[2] is None else int(match[2])
    if match is None or port > 65535:
        raise InputError("where to listen is //HOST:PORT, such as //127.0.0.1:8765 or //:18945 for this machine alone")
    return match[1].strip("[]") or "127.0.0.1", port


__all__ = [
    "FileSink",
    "ModelFacts",
    "PendingFile",
    "PendingFolder",
    "RecordFile",
    "RunFacts",
    "Sink",
    "announce",
    "deliver",
    "introduce",
    "labels_of",
    "likeliest",
    "listen_address",
    "open_sink",
    "reading_of",
    "shown",
    "smoothed",
]
