"""Live frames over OpenIGTLink (PLUS, 3D Slicer), with a callback for what happens beside the results.

    tinyusfm-edge replay phantom:0-29 --as igtl --loop            # a transducer without a transducer
    python examples/live_igtl.py fetal-head.bundle igtl://127.0.0.1:18944

The bundle's other artefacts stand by: when one fails, the next one answers, flagged ``degraded``.
"""

from __future__ import annotations

import itertools
import sys

from tinyusfm_runtime import Live, LiveEvent, StateChange, open_source


def on_event(event: LiveEvent | StateChange) -> None:
    """Called in the loop's own threads: print, set a flag, send a message; never wait here."""
    if isinstance(event, StateChange):
        print(f"state {event.before.value} -> {event.after.value}: {event.reason}", flush=True)
    else:
        print(f"{event.kind.value}: {event.reason}", flush=True)


def main(bundle: str, address: str, results: int | None = None) -> None:
    """Shows results of a link until it is closed, or until so many."""
    with Live(bundle, open_source(address), budget_ms=100, fallback=True, on_event=on_event) as live:
        for result in itertools.islice(live, results):
            # result.valid is the one flag to show a mask by: finite, checked, and in time
            head = result.prediction.measurement if result.valid and result.prediction is not None else None
            shown = "-" if head is None or head.hc_mm is None else f"{head.hc_mm:.1f} mm"
            print(f"frame {result.frame.seq}: {shown}, {result.age_ms:.0f} ms old", flush=True)
        print(live.counters)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]) if len(sys.argv) > 3 else None)
