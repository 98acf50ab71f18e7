"""What runs inside the guest of scripts/vivid.py: the camera source and the camera outlet on real V4L2 devices."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from typing import Any

import numpy as np

from tinyusfm_runtime import plugins
from tinyusfm_runtime.frame import Frame
from tinyusfm_runtime.replay.outlets import CameraOutlet
from tinyusfm_runtime.sources import open_source
from tinyusfm_runtime.transport import v4l2


def control(words: str) -> None:
    """Tells the driver something by v4l2-ctl."""
    environment = {**os.environ, "LD_LIBRARY_PATH": os.environ["V4L2_LIBRARIES"]}
    subprocess.run([os.environ["V4L2_CTL"], "-d", "/dev/video0", *words.split()], check=True, env=environment)


def take(source: Any, count: int) -> list[Frame]:
    guard = threading.Timer(60, source.close)
    guard.start()
    frames = [frame for _, frame in zip(range(count), source, strict=False)]
    guard.cancel()
    return frames


def capture() -> None:
    probe = plugins.available("sources", "camera")
    print("probe", probe)
    assert probe.usable and "vivid" in probe.reason
    with open_source("camera:0", spacing_mm=(0.2, 0.2), width=320, height=180, fourcc="YUYV") as source:
        frames = take(source, 8)
        print("frames", len(frames), frames[0].pixels.shape, frames[0].pixel_format, frames[0].video_range)
        assert len(frames) == 8 and frames[0].pixels.shape == (180, 320)
        times = [frame.t_source_ns for frame in frames]
        assert None not in times and times == sorted(set(times)), times
        assert len({frame.pixels.tobytes() for frame in frames}) > 1, "the counter in the test image moves"
        control("-c disconnect=1")
        end = time.monotonic() + 30
        reader = threading.Thread(target=lambda: take(source, 10_000))
        reader.start()
        live: Any = source
        while not live.counters.get("lost") and time.monotonic() < end:
            time.sleep(0.05)
        print("after unplugging", dict(live.counters))
        assert live.counters["lost"] >= 1
        contact = live.last_contact_ns
        control("-c disconnect=0")
        while not (live.counters.get("reconnects") and live.last_contact_ns > contact) and time.monotonic() < end:
            time.sleep(0.05)
        print("after plugging in", dict(live.counters))
        assert live.counters["reconnects"] >= 1 and live.last_contact_ns > contact
        live.close()
        reader.join()


def show() -> None:
    """Images go out of a real output device, around vivid's loop and in again by the camera source, unchanged."""
    outputs = [node for node in v4l2.nodes() if node.output]
    print("outputs", outputs)
    for change in ("-i 1", "-c loop_video=1", "-c osd_text_mode=2", "-v width=640,height=360,pixelformat=GREY"):
        control(change)
    rng = np.random.default_rng(3)
    clip = [np.kron(rng.integers(0, 256, (36, 64), np.uint8), np.ones((10, 10), np.uint8)) for _ in range(4)]
    outlet, stop, shown = CameraOutlet(outputs[0].path), threading.Event(), []

    def play() -> None:
        while not stop.wait(0.1):
            frame = Frame(pixels=clip[len(shown) % 4], seq=len(shown))
            outlet.send(frame, seq=frame.seq, t_unix_ns=0, damage=None)
            shown.append(frame.seq)

    player = threading.Thread(target=play)
    player.start()
    try:
        with open_source("camera:0", width=640, height=360, fourcc="GREY") as source:
            seen = [frame.pixels for frame in take(source, 30)]
    finally:
        stop.set()
        player.join()
        outlet.close()
    equal = [next((i for i, sent in enumerate(clip) if np.array_equal(sent, got)), None) for got in seen]
    print("shown", len(shown), "by", outlet.way, "seen", len(seen), "equal", equal)
    assert outlet.way == "buffers", "vivid of this kernel refuses write()"
    assert len(seen) == 30 and set(equal) >= {0, 1, 2, 3}, "every image of the clip arrives, byte for byte"


if __name__ == "__main__":
    capture()
    show()
    print("VIVID OK")
