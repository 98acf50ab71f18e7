"""A sink of one's own: the running median of the head circumference, in a text file that is always whole.

In code it is handed to the loop (``Live(bundle, source, sinks=[sink])``). An entry point makes it a sink that the
command line opens by name, ``--sink median:head.txt``; a distribution declares it with

    [project.entry-points."tinyusfm.sinks"]
    median = "own_sink"
"""

from __future__ import annotations

import statistics
import sys
from collections import deque
from pathlib import Path
from types import TracebackType

from tinyusfm_runtime import Availability, Frame, Live, LiveResult, Prediction, StateChange, open_source


def available() -> Availability:
    """Always works: standard library only."""
    return Availability(usable=True, reason="standard library only")


def open_sink(location: str) -> MedianSink:
    """Opens the sink for ``median:LOCATION``."""
    return MedianSink(Path(location))


class MedianSink:
    """Writes the median of the last 15 circumferences.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._last_mm: deque[float] = deque(maxlen=15)
        self._state = "live"

    def __enter__(self) -> MedianSink:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def write_live(self, result: LiveResult) -> None:
        """Every result of a loop; ``valid`` is False for what must not be shown."""
        if result.valid and result.prediction is not None:
            self.write(result.frame, result.prediction)

    def write(self, frame: Frame, prediction: Prediction) -> None:
        """A prediction outside a live loop."""
        head = prediction.measurement
        if head is not None and head.hc_mm is not None and not head.touches_border:
            self._last_mm.append(head.hc_mm)
            self._say()

    def on_state(self, change: StateChange) -> None:
        """A change of the stream's state; a sink without this method is not called."""
        self._state = change.after.value
        self._say()

    def close(self) -> None:
        """Nothing is kept open."""

    def _say(self) -> None:
        median = f"{statistics.median(self._last_mm):.1f} mm" if self._last_mm else "no head yet"
        beside = self.path.with_suffix(".part")
        beside.write_text(f"{median}, {self._state}\n", encoding="utf-8")
        beside.replace(self.path)


def main(bundle: str, location: str, out: str) -> None:
    """Runs a bundle on a source and keeps the median."""
    with open_sink(out) as sink, Live(bundle, open_source(location), sinks=[sink]) as live:
        for _ in live:
            pass
    print(sink.path.read_text(encoding="utf-8"), end="")


if __name__ == "__main__":
    main(*sys.argv[1:4])
