"""Which frames a gate is judged on, named and hashed.

A report then says what was looked at.

In this order: the frames handed in with ``--data`` (its validation split), the calibration set's frames where they are
at hand, and for a shipped student the phantoms and the ultrasound clip inside the pydicom wheel. A foreign student
without any is an error. The clip is read from the installed package's folder; pydicom's downloader is never called. It
does not know models or thresholds.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tinyusfm_calibration.sets import NamedFrame, phantom_frames, pixels_sha256
from tinyusfm_export.verify.confidence import Truth
from tinyusfm_runtime.errors import InputError, MissingExtra

PHANTOM_SEEDS = range(100, 148)
"""48 phantoms: 32 must count, and a few may be hard. Golden seeds lie below 100, training seeds from 1,000,000."""

CLIP = Path("data", "test_files", "examples_ybr_color.dcm")
"""30 frames of a colour ultrasound clip, inside pydicom's package folder (public test data of pydicom, MIT)."""

KINDS = {
    "data": "validation split of the data given",
    "calibration": "frames of the calibration set",
    "phantom": "synthetic phantoms and one DICOM clip: this checks the conversion, not accuracy on patients",
    "golden": "phantom frames stored in the bundle",
}
"""Where gate frames come from, in words."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GateFrames:
    """The frames of one gate.

    Attributes:
        kind: a key of KINDS.
        frames: named frames, in order.
        source: the data set, in the user's words; no paths.
        truths: what is right on each frame, at the model's input size (see confidence.py), or nothing.
        reading: how the files were read, where something was asked for: such as window or mask_value.
    """

    kind: str
    frames: tuple[NamedFrame, ...]
    source: str = ""
    truths: tuple[Truth, ...] = ()
    reading: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Checks the kind and that there are frames.

        Raises:
            InputError: another kind, or no frames.
        """
        if self.kind not in KINDS:
            raise InputError(f"gate frames of kind {self.kind!r}: use one of {', '.join(KINDS)}")
        if not self.frames:
            raise InputError("the gate has no frames to look at")
        if self.truths and len(self.truths) != len(self.frames):
            raise InputError(f"{len(self.truths)} truths for {len(self.frames)} gate frames")

    def provenance(self) -> dict[str, Any]:
        """Which frames these are: kind, words, count, names, and hashes of their pixels.

        No pixels.
        """
        return {
            **({"reading": dict(self.reading)} if self.reading else {}),
            "kind": self.kind,
            "about": KINDS[self.kind],
            "source": self.source,
            "count": len(self.frames),
            "ids": [named.id for named in self.frames],
            "pixels_sha256": [pixels_sha256(named.frame) for named in self.frames],
        }


def choose_gate_frames(
    *,
    data: Sequence[NamedFrame] | None = None,
    calibration: Sequence[NamedFrame] | None = None,
    shipped: bool = False,
    source: str = "",
    truths: Sequence[Truth] = (),
    reading: Mapping[str, Any] | None = None,
) -> GateFrames:
    """Chooses the frames by the rule in the module's docstring.

    Args:
        data: frames of the validation split given with ``--data``, or None.
        calibration: frames of the calibration set at hand, or None.
        shipped: whether the student is one of the package's own.
        source: the data set, in the user's words.
        truths: what is right on each frame of ``data``, or nothing.
        reading: how the files of ``data`` were read, where something was asked for.

    Raises:
        InputError: a foreign student without any frames.
        MissingExtra: pydicom, which carries the clip, is not installed.
    """
    if data:
        asked = dict(reading or {})
        return GateFrames(kind="data", frames=tuple(data), source=source, truths=tuple(truths), reading=asked)
    if calibration:
        return GateFrames(kind="calibration", frames=tuple(calibration), source=source, reading=dict(reading or {}))
    if not shipped:
        raise InputError("no frames to check this student on: give --data DIR (its validation split is used)")
    return shipped_gate_frames()


def shipped_gate_frames(seeds: Sequence[int] | range = PHANTOM_SEEDS) -> GateFrames:
    """Phantoms and the clip.

    Args:
        seeds: of the phantoms.

    Raises:
        MissingExtra: pydicom or its JPEG decoder is not installed.
    """
    frames = (*phantom_frames(seeds), *clip_frames())
    return GateFrames(kind="phantom", frames=frames, source=f"phantom seeds {min(seeds)}..{max(seeds)}, {CLIP.name}")


def clip_path() -> Path:
    """Path of the clip inside the installed pydicom.

    Raises:
        MissingExtra: pydicom is not installed.
        InputError: this pydicom came without its test files.
    """
    spec = importlib.util.find_spec("pydicom")
    if spec is None or not spec.submodule_search_locations:
        raise MissingExtra("the ultrasound clip of the gate", "pydicom", "dicom")
    path = Path(next(iter(spec.submodule_search_locations))) / CLIP
    if not path.is_file():
        raise InputError(f"the installed pydicom lacks {CLIP}: install pydicom from its wheel")
    return path


def clip_frames() -> list[NamedFrame]:
    """The clip's frames, read by the runtime's own DICOM source.

    Raises:
        MissingExtra: pydicom or its JPEG decoder is not installed.
    """
    from tinyusfm_runtime.sources import open_source

    with open_source(f"dicom:{clip_path()}") as source:
        frames = [replace(frame, pixels=frame.pixels.copy()) for frame in source]
    return [NamedFrame(id=f"{CLIP.name}#{i}", frame=frame, stratum="clip") for i, frame in enumerate(frames)]


__all__ = [
    "CLIP",
    "KINDS",
    "PHANTOM_SEEDS",
    "GateFrames",
    "choose_gate_frames",
    "clip_frames",
    "clip_path",
    "shipped_gate_frames",
]
