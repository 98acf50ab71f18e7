"""What runs inside the guest of scripts/vivid.py: the camera source and the camera outlet on real V4L2 devices."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from typing import Any

import numpy as np

from tinyusfm_runtime import plugins, v4l2
from tinyusfm_runtime.errors import OutputError
from tinyusfm_runtime.frame import Frame
from tinyusfm_runtime.replay.outlets import CameraOutlet
from tinyusfm_runtime.sources import open_source


def control(text: str) -> None:
    """Sets a control of the driver."""
    environment = {**os.environ, "LD_LIBRARY_PATH": os.environ["V4L2_LIBRARIES"]}
    subprocess.run([os.environ["V4L2_CTL"], "-d", "/dev/video0", "-c", text], check=True, env=environment)


def take(source: Any, count: int) -> list[Frame]:
    guard = threading.Timer(60, source.close)
    guard.start()
    frames = [frame for _, frame in zip(range(count), source, strict=False)]
    guard.cancel()
    return frames


def capture() -> None:
    probe = plugins.probe("sources", "camera")
    print("probe", probe)
    assert probe.works and "vivid" in probe.reason
    with open_source("camera:0", spacing_mm=(0.2, 0.2), width=320, height=180, fourcc="YUYV") as source:
        frames = take(source, 8)
        print("frames", len(frames), frames[0].pixels.shape, frames[0].pixel_format, frames[0].video_range)
        assert len(frames) == 8 and frames[0].pixels.shape == (180, 320)
        times = [frame.t_source_ns for frame in frames]
        assert None not in times and times == sorted(set(times)), times
        assert len({frame.pixels.tobytes() for frame in frames}) > 1, "the counter in the test picture moves"
        control("disconnect=1")
        end = time.monotonic() + 30
        reader = threading.Thread(target=lambda: take(source, 10_000))
        reader.start()
        live: Any = source
        while not live.counters.get("lost") and time.monotonic() < end:
            time.sleep(0.05)
        print("after unplugging", dict(live.counters))
        assert live.counters["lost"] >= 1
        contact = live.last_contact_ns
        control("disconnect=0")
        while not (live.counters.get("reconnects") and live.last_contact_ns > contact) and time.monotonic() < end:
            time.sleep(0.05)
        print("after plugging in", dict(live.counters))
        assert live.counters["reconnects"] >= 1 and live.last_contact_ns > contact
        live.close()
        reader.join()


def show() -> None:
    """The outlet negotiates a format with a real output device; vivid refuses write(), which must be a typed error."""
    outputs = [node for node in v4l2.nodes() if node.output]
    print("outputs", outputs)
    outlet = CameraOutlet(outputs[0].path)
    try:
        outlet.send(Frame(pixels=np.zeros((180, 320), np.uint8)), seq=0, t_unix_ns=0, damage=None)
    except OutputError as error:
        print("output:", error)
    assert outlet._fourcc == "GREY", "the device agreed to a format"
    outlet.close()


if __name__ == "__main__":
    capture()
    show()
    print("VIVID OK")
