"""Runs a bundle on a clip: every frame in order, one line per frame, and the median circumference.

python examples/run_clip.py fetal-head.bundle clip.dcm
python examples/run_clip.py fetal-head.bundle phantom:0-9
"""

from __future__ import annotations

import statistics
import sys

from tinyusfm_runtime import Session, open_source


def main(bundle: str, location: str) -> None:
    """Prints what the bundle says about each frame of a source."""
    found_mm: list[float] = []
    with Session.open(bundle) as session, open_source(location) as frames:
        print(session)
        for frame in frames:
            prediction = session.predict(frame)
            print(prediction)
            head = prediction.measurement
            if prediction.valid and head is not None and head.hc_mm is not None and not head.touches_border:
                found_mm.append(head.hc_mm)
    median = f"{statistics.median(found_mm):.1f} mm" if found_mm else "none"
    print(f"median circumference of {len(found_mm)} frames: {median}")


if __name__ == "__main__":
    main(*sys.argv[1:3])
