"""What a bundle was made of, as far as it lies on this machine.

``tinyusfm_export.trace`` compares them with what the bundle recorded. Shipped students are found by their hash.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tinyusfm_edge import students
from tinyusfm_edge.data.reading import AS_IT_IS, Reading
from tinyusfm_runtime.errors import InputError


@dataclass(frozen=True, kw_only=True, slots=True)
class AtHand:
    """Files and folders that somebody named.

    Attributes:
        student: weights file, or None: a shipped one is found by its hash.
        images: folders whose training split trained it, as it was named then.
        coreset: ``coreset.json``.
        teacher: weights file of the teacher.
        start: weights file that the training started from.
        calibration: file that calibrating wrote.
        reading: how the folders' tables are read.
    """

    student: Path | None = None
    images: Sequence[Path] = ()
    coreset: Path | None = None
    teacher: Path | None = None
    start: Path | None = None
    calibration: Path | None = None
    reading: Reading = AS_IT_IS

    def stages(self, weights_sha256: str) -> dict[str, tuple[str, str]]:
        """Stage -> (sha256 (hex), what was hashed), for whatever is there.

        Args:
            weights_sha256: of the student's file, as the bundle names it.

        Raises:
            InputError: something that was named cannot be read.
            CalibrationError: the calibration file cannot be used.
        """
        named = {"student": self.student, "coreset": self.coreset, "teacher": self.teacher, "start": self.start}
        found = {stage: (_file_sha256(path), path.name) for stage, path in named.items() if path is not None}
        shipped = students.find_by_hash(weights_sha256)
        if "student" not in found and shipped is not None:
            found["student"] = (weights_sha256, f"shipped student {shipped}")
        if self.images:
            from tinyusfm_edge.data.fingerprint import images_sha256

            digest = images_sha256(self.images, ("train",), self.reading)
            found["images"] = (digest, "training split of " + ", ".join(place.name for place in self.images))
        if self.calibration is not None:
            from tinyusfm_export.quantize.calibration_file import read_calibration_file

            found["calibration"] = (read_calibration_file(self.calibration).frames.id, self.calibration.name)
        return found


def lost(weights_sha256: str) -> dict[str, str]:
    """What is known of stages that nobody recorded: stage -> one phrase.

    Empty for other than shipped students.

    Args:
        weights_sha256: of the student's file, as the bundle names it.
    """
    shipped = students.find_by_hash(weights_sha256)
    return students.lost_stages(shipped) if shipped is not None else {}


def _file_sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            digest = hashlib.sha256()
            while part := file.read(1 << 20):
                digest.update(part)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
    return digest.hexdigest()


__all__ = ["AtHand", "lost"]
