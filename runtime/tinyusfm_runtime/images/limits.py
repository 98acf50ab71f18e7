"""Limits of what one image may take, the same for every kind of file.

They hold before memory is taken. They are far above any ultrasound image and low enough that decoding the worst file
takes less than 1 GB and a few seconds. It opens nothing.
"""

from __future__ import annotations

from tinyusfm_runtime.errors import FrameError

MAX_PIXELS = 1 << 25
"""Pixels of one image, such as 8192 x 4096."""
MAX_IMAGE_BYTES = 1 << 28
"""Bytes of one image as its file stores it unpacked: 32 million pixels of 8 bytes."""
FREE_BYTES = 1 << 30
"""So much may any file unpack to in all."""
MOST_RATIO = 250
"""Above FREE_BYTES a file may unpack to so many times its own size; packed ultrasound has 2 to 50."""

MAX_FRAMES = 100_000
"""Frames of one file: 55 minutes at 30 per second."""
FREE_FRAMES = 10_000
"""More frames than these only in a file that packs as recordings do: at most MOST_RATIO."""


def check_image(rows: int, columns: int, pixel_bytes: int = 1) -> None:
    """Refuses an image that is too large, before it is unpacked.

    Args:
        rows: of the image.
        columns: of the image.
        pixel_bytes: bytes of a pixel, all channels together.

    Raises:
        FrameError: it is too large.
    """
    if rows * columns > MAX_PIXELS:
        raise FrameError(f"an image of {columns}x{rows} pixels is too large: {MAX_PIXELS >> 20} million at most")
    if rows * columns * pixel_bytes > MAX_IMAGE_BYTES:
        raise FrameError(
            f"an image of {columns}x{rows} pixels of {pixel_bytes} bytes is too large: {MAX_IMAGE_BYTES >> 20} MiB "
            "at most"
        )


def check_unpacked(unpacked_bytes: int, packed_bytes: int) -> None:
    """Refuses a file that unpacks to far more than its size, as no recording does.

    Args:
        unpacked_bytes: in all.
        packed_bytes: of the file.

    Raises:
        FrameError: it is such a file.
    """
    if unpacked_bytes > max(FREE_BYTES, MOST_RATIO * packed_bytes):
        raise FrameError(
            f"{packed_bytes} bytes that unpack to {unpacked_bytes >> 20} MiB are refused: no recording packs so well"
        )


def check_frames(frames: int, unpacked_bytes: int, packed_bytes: int) -> None:
    """Refuses a file of more frames than a recording has, or packed too well.

    Args:
        frames: that the file promises or lists.
        unpacked_bytes: of all of them.
        packed_bytes: of the file.

    Raises:
        FrameError: it is such a file.
    """
    if frames > MAX_FRAMES:
        raise FrameError(f"{frames} frames are too many: {MAX_FRAMES} at most. Cut the recording into parts")
    if frames > FREE_FRAMES and unpacked_bytes > MOST_RATIO * packed_bytes:
        raise FrameError(
            f"{frames} frames in {packed_bytes} bytes are refused: above {FREE_FRAMES} frames no recording packs so "
            "well"
        )


__all__ = [
    "FREE_BYTES",
    "FREE_FRAMES",
    "MAX_FRAMES",
    "MAX_IMAGE_BYTES",
    "MAX_PIXELS",
    "MOST_RATIO",
    "check_frames",
    "check_image",
    "check_unpacked",
]
