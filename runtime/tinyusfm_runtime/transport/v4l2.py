"""Video4Linux devices: which there are and what they can.

And how one that shows images is given its format.

Only the ioctls that OpenCV does not offer: VIDIOC_QUERYCAP and, for output devices, VIDIOC_S_FMT (linux/videodev2.h).
It does not capture.
"""

from __future__ import annotations

import os
import re
import struct
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tinyusfm_runtime.errors import UnsupportedError

QUERYCAP, SET_FORMAT = 0x80685600, 0xC0D05605
CAPTURE, OUTPUT, READWRITE, STREAMING, DEVICE_CAPS = 0x1, 0x2, 0x01000000, 0x04000000, 0x80000000
"""V4L2_CAP_VIDEO_CAPTURE, _VIDEO_OUTPUT, _READWRITE, _STREAMING, _DEVICE_CAPS."""
CAPABILITY = struct.Struct("<16s32s32sIII12x")
OUTPUT_TYPE, FIELD_NONE, COLORSPACE_SRGB = 2, 1, 8
FORMAT = struct.Struct("<I4xIIIIIIII168x")
"""struct v4l2_format of a 64-bit kernel, as far as v4l2_pix_format.colorspace."""
Ioctl = Callable[[int, bytearray], object]
"""Asks one open device: request, argument that takes the answer; raises OSError."""
PATH = re.compile(r"/dev/(video\d{1,3}|v4l/by-(id|path)/[\w.:+-]{1,120})")


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoNode:
    """One device file.

    Attributes:
        path: such as /dev/video0.
        card: what the driver calls it.
        capture: it gives images.
        output: it takes images.
    """

    path: str
    card: str
    capture: bool
    output: bool


def nodes() -> list[VideoNode]:
    """Every device file that answers, by number; empty where there is no Video4Linux."""
    if sys.platform != "linux":
        return []
    paths = [path for path in Path("/dev").glob("video*") if path.name[5:].isdecimal()]
    found = (ask(str(path)) for path in sorted(paths, key=lambda path: int(path.name[5:])))
    return [node for node in found if node is not None]


def ask(path: str) -> VideoNode | None:
    """What one device file says about itself, or None if it cannot be asked."""
    import fcntl

    try:
        file = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        card, caps = _answer(lambda request, argument: fcntl.ioctl(file, request, argument))
    except OSError:
        return None
    finally:
        os.close(file)
    return VideoNode(path=path, card=card, capture=bool(caps & CAPTURE), output=bool(caps & OUTPUT))


def capabilities(ioctl: Ioctl) -> int:
    """What this device file can, as bits.

    Raises:
        OSError: it is no Video4Linux device.
    """
    return _answer(ioctl)[1]


def _answer(ioctl: Ioctl) -> tuple[str, int]:
    """Card and capabilities."""
    answer = bytearray(CAPABILITY.size)
    ioctl(QUERYCAP, answer)
    _, card, _, _, all_caps, device_caps = CAPABILITY.unpack(answer)
    caps = device_caps if all_caps & DEVICE_CAPS else all_caps
    return card.split(b"\0")[0].decode("ascii", "replace"), caps


def set_output_format(ioctl: Ioctl, *, width: int, height: int, fourcc: str, row_bytes: int) -> None:
    """Tells an open output device what will be written to it.

    Args:
        ioctl: asks the open device.
        width: columns.
        height: rows.
        fourcc: such as ``GREY`` or ``YUYV``.
        row_bytes: from row to row.

    Raises:
        UnsupportedError: the device refuses, or would take another size or format.
    """
    code = int.from_bytes(fourcc.encode("ascii"), "little")
    size = row_bytes * height
    asked = FORMAT.pack(OUTPUT_TYPE, width, height, code, FIELD_NONE, row_bytes, size, COLORSPACE_SRGB, 0)
    answer = bytearray(asked)
    try:
        ioctl(SET_FORMAT, answer)
    except OSError as error:
        raise UnsupportedError(f"the video output device takes no {fourcc}: {error.strerror}") from error
    taken = FORMAT.unpack(answer)[1:7]
    if taken[:3] != (width, height, code) or taken[4:6] != (row_bytes, size):
        raise UnsupportedError(f"the video output device takes no {fourcc} of {width}x{height}")


__all__ = [
    "CAPABILITY",
    "CAPTURE",
    "COLORSPACE_SRGB",
    "DEVICE_CAPS",
    "FIELD_NONE",
    "FORMAT",
    "OUTPUT",
    "OUTPUT_TYPE",
    "PATH",
    "QUERYCAP",
    "READWRITE",
    "SET_FORMAT",
    "STREAMING",
    "Ioctl",
    "VideoNode",
    "ask",
    "capabilities",
    "nodes",
    "set_output_format",
]
