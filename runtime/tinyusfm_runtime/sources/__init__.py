"""Where frames come from: one source per file.

And the one function that picks among them.

``open_source`` asks each plug-in whether it accepts a location (by scheme or suffix, without
importing any vendor library) and opens the first that does. ``NAME:LOCATION`` names the plug-in
outright. A crop is applied here, before a frame leaves the source, so that what lies outside it
(burnt-in names, rulers) is never stored, shown or measured.

It knows no file format and no model.

Shapes: HW = rows, columns; HWC = rows, columns, channels.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

from tinyusfm_runtime import plugins
from tinyusfm_runtime.errors import InputError, SourceError
from tinyusfm_runtime.frame import Frame, FrameSource, LiveSource
from tinyusfm_runtime.sources import _location
from tinyusfm_runtime.sources._crop import Box, cropped
from tinyusfm_runtime.sources._source import Counters


def open_source(location: str, *, crop: Box | str | None = None, **options: Any) -> FrameSource:
    """Opens whatever gives frames at a location.

    Args:
        location: a folder, a file or a scheme such as ``phantom:0-31`` or ``igtl://HOST:PORT``;
            ``dicom:PATH`` names the source outright.
        crop: (row, column, height, width) in frame pixels, or ``"region"`` for the region that the file itself
            marks as ultrasound (DICOM), or None.
        **options: handed to the source; one that it does not know is an error.

    Returns:
        A context manager that yields frames.

    Raises:
        InputError: no source accepts the location, or an option does not fit.
        SourceError: the source accepts the location but cannot open it.
        MissingExtra: a library is missing.
    """
    if not location.strip():
        raise InputError("the source is empty: give a folder of images, a file, or a probe")
    _location.refuse_network(location)
    location = _location.local_path(location, plugins.names("sources"))
    name, module = _choose(location)
    known = inspect.signature(module.open_source).parameters
    if crop == "region":
        options["region"] = True
    elif crop is not None and "crop" in known:
        # a source that others push into cuts before it keeps anything
        options["crop"], crop = crop, None
    unknown = [key for key in options if key not in known]
    if unknown:
        takes = ", ".join(key for key in known if key != "location") or "none"
        raise InputError(f"the {name} source has no option {unknown[0]!r}; its options: {takes}")
    source: FrameSource = module.open_source(location, **options)
    if crop is None or isinstance(crop, str):
        return source
    return CroppedLiveSource(source, crop) if isinstance(source, LiveSource) else CroppedSource(source, crop)


def path_of(location: str) -> Path:
    """The path that a location means, for comparing it with other paths.

    Meaningless for live sources.

    Args:
        location: as given to ``open_source``.
    """
    return _location.path_of(location, plugins.names("sources"))


def _choose(location: str) -> tuple[str, ModuleType]:
    names = plugins.names("sources")
    scheme = location.partition(":")[0]
    for name in [scheme] if scheme in names else names:
        module = plugins.load("sources", name)
        if scheme == name or module.accepts(location):
            return name, module
    reason = _location.why_not(location)
    because = f"{reason}; " if reason else ""
    raise InputError(
        f"{because}no source reads this location: give a folder of images, a DICOM, MetaImage or video "
        "file, phantom:SEED, or something live such as igtl://HOST:PORT, shm:NAME or camera:0 "
        f"(sources here: {', '.join(names)}; name one outright as in dicom:PATH)"
    )


class CroppedSource:
    """A source seen through a window; pixels outside never leave it."""

    def __init__(self, source: FrameSource, crop: Box) -> None:
        self.source, self.crop = source, crop

    @property
    def notes(self) -> tuple[str, ...]:
        """What the source obeyed or neglected so far."""
        return tuple(getattr(self.source, "notes", ()))

    @property
    def doubts(self) -> tuple[str, ...]:
        """What in the source is incomplete or contradicts itself so far."""
        return tuple(getattr(self.source, "doubts", ()))

    def __enter__(self) -> CroppedSource:
        self.source.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.source.__exit__(kind, error, trace)

    def __iter__(self) -> Iterator[Frame]:
        for frame in self.source:
            yield cropped(frame, self.crop)


class CroppedLiveSource(CroppedSource):
    """The same for a live source.

    A frame that the window does not fit is counted as ``crop`` and left out.
    """

    def __init__(self, source: LiveSource, crop: Box) -> None:
        super().__init__(source, crop)
        self._live, self._tally = source, Counters()

    def __iter__(self) -> Iterator[Frame]:
        for frame in self._live:
            try:
                window = cropped(frame, self.crop)
            except SourceError:
                self._tally.add("crop")
                continue
            yield window

    @property
    def last_contact_ns(self) -> int | None:
        """See LiveSource."""
        return self._live.last_contact_ns

    @property
    def status(self) -> str:
        """What the source's connection is at, or ""."""
        return str(getattr(self._live, "status", ""))

    @property
    def counters(self) -> Mapping[str, int]:
        """See LiveSource; ``crop`` beside the source's own."""
        return {**self._live.counters, **self._tally.snapshot()}

    def close(self) -> None:
        """See LiveSource."""
        self._live.close()


__all__ = ["Box", "CroppedLiveSource", "CroppedSource", "cropped", "open_source", "path_of"]
