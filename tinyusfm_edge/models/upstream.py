"""What a student was made of, as hashes that its file carries.

    {"version": 1, "stages": {"images": "<sha256>", "teacher": "<sha256>", "start": "<sha256>", "start.images": ...}}

The text stands in the safetensors metadata under ``tinyusfm_trace``, so the hash of the file covers it. ``start.`` goes
before the stages of the student that a training started from. A bundle takes the stages over into its manifest.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

from tinyusfm_runtime.errors import InputError
from tinyusfm_runtime.strict_json import parse_json

TRACE_KEY = "tinyusfm_trace"
"""Key of the text in a student file's metadata."""
TRACE_VERSION = 1
SHORT_RUN = "SHORT RUN"
"""Stands in the origin of a student, and of what is made of it, whose pre-training was too short to teach much."""
MAX_STAGES = 256
STUDENT_STAGES = ("images", "negatives", "unlabelled", "coreset", "teacher", "start")
"""Stages that a training may name; each may also stand behind one or more ``start.``."""

_STAGE = re.compile(rf"(start\.)*({'|'.join(STUDENT_STAGES)})")
_SHA256 = re.compile(r"[0-9a-f]{64}")


def write_stages(stages: Mapping[str, str]) -> str:
    """The text for a file's metadata.

    Args:
        stages: name -> sha256, hex.

    Raises:
        InputError: a name or a hash that no training gives.
    """
    return json.dumps({"version": TRACE_VERSION, "stages": _checked(stages)}, sort_keys=True)


def read_stages(metadata: Mapping[str, str]) -> dict[str, str]:
    """The stages of a file; empty where it names none.

    Args:
        metadata: of a safetensors file.

    Raises:
        InputError: the text is damaged or of another version.
    """
    text = metadata.get(TRACE_KEY)
    if text is None:
        return {}
    try:
        data = parse_json(text)
        if set(data) != {"version", "stages"} or data["version"] != TRACE_VERSION:
            raise ValueError("another version")
        return _checked(data["stages"])
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"the student's trace cannot be read: {error}") from error


def joined(own: Mapping[str, str], start: Mapping[str, str], start_sha256: str = "") -> dict[str, str]:
    """Stages of a training and of what it started from.

    Args:
        own: of the training.
        start: of the start's own file.
        start_sha256: hash of the start's file, or nothing where it started from random weights.
    """
    before = {f"start.{stage}": digest for stage, digest in start.items()}
    return _checked({**own, **({"start": start_sha256} if start_sha256 else {}), **before})


def _checked(stages: Mapping[str, str]) -> dict[str, str]:
    for stage, digest in stages.items():
        if not _STAGE.fullmatch(stage) or len(stage) > 120 or not _SHA256.fullmatch(str(digest)):
            raise InputError(f"{stage!r} -> {str(digest)[:70]!r} is not a stage of a training with a sha256")
    if len(stages) > MAX_STAGES:
        raise InputError(f"a trace has at most {MAX_STAGES} stages, not {len(stages)}")
    return dict(stages)


__all__ = [
    "MAX_STAGES",
    "SHORT_RUN",
    "STUDENT_STAGES",
    "TRACE_KEY",
    "TRACE_VERSION",
    "joined",
    "read_stages",
    "write_stages",
]
