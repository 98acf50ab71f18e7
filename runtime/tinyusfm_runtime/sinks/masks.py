"""Sink: the mask of each frame as a PNG file, in one new folder.

A file has the frame's own size, 8 bits, no colours: 0 and 255 where the model has one label, else 0 for the background
and the number of the label. It is named after the frame's ``seq`` (``000012.png``), or, where names were asked for
(``run --names``), after the file the frame came from (``a.png`` for ``a.png``, ``b.jpg.png`` for ``b.jpg``,
``c.tif#3.png`` for its fourth page). A frame whose name was taken already gets the next free number behind it. An empty
mask is a file without foreground; a frame without an answer, or whose answer may not be shown, has no file. Masks are
those of each frame alone, not smoothed over time. In a loop of several models each has a folder of its own in it, named
after the model.

The folder takes its name when it is closed, whole; what a killed run leaves is kept under another name by the next one
(atomic.PendingFolder). It carries no pixels of frames.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tinyusfm_runtime.frame import Frame
from tinyusfm_runtime.overlay import encode_png
from tinyusfm_runtime.plugins import Availability
from tinyusfm_runtime.results import LiveResult, Prediction
from tinyusfm_runtime.sinks import FileSink, PendingFolder, shown


def available() -> Availability:
    """Always works: standard library and numpy."""
    return Availability(usable=True, reason="standard library only", extra=None)


def open_sink(location: str) -> MaskSink:
    """Reserves the folder.

    Args:
        location: path of the folder, which must not exist.

    Raises:
        OutputError: something of that name is there, or the folder above is missing or not writable.
    """
    return MaskSink(location)


class MaskSink(FileSink):
    """Writes one PNG for each answered frame; the folder gets its name at the end.

    Attributes:
        written: files so far.
    """

    def __init__(self, location: str) -> None:
        self._pending = PendingFolder(location, "the masks", recover=True)
        self._names: set[tuple[str, str]] = set()
        self._open, self._seen = True, False
        self.written = 0

    def write(self, frame: Frame, prediction: Prediction) -> None:
        """Writes the mask of one frame, if it has one.

        Raises:
            OutputError: no room.
        """
        self._write(frame, prediction, "")

    def _write(self, frame: Frame, prediction: Prediction, model: str) -> None:
        self._seen = True
        if not self._open or not prediction.valid or prediction.mask_HW is None:
            return
        mask_HW = prediction.mask_on_frame()
        if len(prediction.measurements) <= 1:
            mask_HW = (mask_HW > 0).astype(np.uint8) * np.uint8(255)
        try:
            folder = self._pending.path / model
            folder.mkdir(exist_ok=True)
            (folder / self._free_name(frame, model)).write_bytes(encode_png(mask_HW))
        except OSError as error:
            self._open = False
            raise self._pending.failed(error) from error
        self.written += 1

    def write_live(self, result: LiveResult) -> None:
        """Writes the mask of one live result, if it may be shown.

        Raises:
            OutputError: no room.
        """
        self._seen = True
        for each in result.each:
            prediction = shown(each)
            if prediction is not None:
                self._write(each.frame, prediction, each.model)

    def close(self) -> None:
        """Publishes the folder; without a frame none is written.

        Raises:
            OutputError: the disk fails, or something took the name meanwhile.
        """
        if not self._open:
            return
        self._open = False
        if self._seen:
            self._pending.publish()
        else:
            self._pending.discard()

    def _free_name(self, frame: Frame, model: str) -> str:
        own = Path(frame.name or "").name  # whoever made the frame, its mask stays in this folder
        base = own.removesuffix(".png") if own else f"{frame.seq:06d}"
        name, number = f"{base}.png", 2
        while (model, name) in self._names:
            name, number = f"{base}-{number}.png", number + 1
        self._names.add((model, name))
        return name


__all__ = ["MaskSink", "available", "open_sink"]
