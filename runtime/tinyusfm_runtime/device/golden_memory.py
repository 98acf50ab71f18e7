"""The record that an artefact passed its full golden check here.

The check need not be repeated on this machine at every start.

On another class of CPU than an artefact was verified on, all golden frames are compared with the reference. What that
found is kept with the gates of this machine (gate_record.py), under the bundle, the engine as it describes itself, the
CPU and the system, together with a hash of the engine's answers to the few frames of a usual start. At the next start
these few are run, and only where every bit of them is the same does the remembered pass count.
"""

from __future__ import annotations

import hashlib
import logging
import platform
from collections.abc import Mapping
from typing import Any

import numpy as np

from tinyusfm_runtime.device.gate_record import GateKey, keep_record, read_record
from tinyusfm_runtime.device.machine import MachineCard
from tinyusfm_runtime.errors import EdgeError

REMEMBERED = "a full check that this machine passed before"
"""What a start-up report was held against."""
_log = logging.getLogger(__name__)


class GoldenMemory:
    """What this machine remembers of one artefact in one engine.

    Args:
        bundle_sha256: hash of the bundle's manifest, which covers golden frames and answers too.
        artefact: its name.
        description: of the engine as loaded.
        machine: this machine; nothing is remembered of one that cannot be known.
    """

    def __init__(self, bundle_sha256: str, artefact: str, description: str, machine: MachineCard) -> None:
        self._bundle_id = bundle_sha256[:16]
        self._known = bool(machine.features)
        self._key = GateKey(
            content_sha256=bundle_sha256,
            device=f"{machine.cpu}, {machine.cpu_class}",
            system=f"{platform.system()} {platform.release()}",
            library=artefact,
            library_version=np.__version__,
            settings=description,
        )

    def digest(self) -> str | None:
        """Hash of the answers with which the full check was passed.

        None where there was none.
        """
        if not self._known:
            return None
        try:
            outcome = read_record(self._key)
        except EdgeError:
            return None
        if outcome is None or outcome.get("passed") is not True or outcome.get("bundle_id") != self._bundle_id:
            return None
        found = outcome.get("answers_sha256")
        return found if isinstance(found, str) else None

    def keep(self, digest: str, report: Mapping[str, Any]) -> None:
        """Remembers a pass.

        Where the cache cannot be written the check is repeated at the next start.
        """
        if not self._known:
            return
        outcome = {"passed": True, "bundle_id": self._bundle_id, "answers_sha256": digest, "report": dict(report)}
        try:
            keep_record(self._key, outcome)
        except EdgeError as error:
            _log.info("the full check is repeated at every start: %s", error)


def digest_of(answers: np.ndarray) -> str:
    """Hash of an engine's answers, every bit of them."""
    solid = np.ascontiguousarray(answers)
    return hashlib.sha256(f"{solid.dtype} {solid.shape}".encode() + solid.tobytes()).hexdigest()


__all__ = ["REMEMBERED", "GoldenMemory", "digest_of"]
