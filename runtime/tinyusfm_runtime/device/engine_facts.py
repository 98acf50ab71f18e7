"""What a loaded engine says about itself, held against the manifest.

Its library's version, a gate that it passed on this very device, and in how many layers it really computes in 8 bits.
It loads no engine.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from tinyusfm_runtime.errors import InputError

NEEDS = ("all", "some", "none")
"""How many layers of an int8 artefact must run in 8 bits: all that did where it was verified, some, or none."""
_log = logging.getLogger(__name__)


def same_library(requirements: Mapping[str, Any]) -> bool:
    """Whether the engine's library is of the version the artefact was verified with."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(str(requirements.get("library"))) == str(requirements.get("library_version")).partition("-")[0]
    except (PackageNotFoundError, ValueError):
        return False


def passed_here(engine: object, bundle_id: str) -> bool:
    """Whether the engine carries a passed gate of this bundle on this device.

    As engines/trt and engines/coreml.py do.
    """
    gate = getattr(engine, "device_gate", None)
    if not isinstance(gate, Mapping):
        return False
    return gate.get("passed") is True and gate.get("bundle_id") == bundle_id


def needed_int8(precision: str, requirements: Mapping[str, Any], need: str) -> int:
    """Least number of layers that must run in 8 bits; 0 takes any.

    Args:
        precision: of the artefact that is about to be loaded.
        requirements: of the same.
        need: one of ``NEEDS``.

    Raises:
        InputError: another word.
    """
    if need not in NEEDS:
        raise InputError(f"need_int8 is one of {', '.join(NEEDS)}, not {need!r}")
    verified = requirements.get("int8_layers")
    if precision != "int8" or need == "none":
        return 0
    return verified if need == "all" and isinstance(verified, int) else 1


def executed_in(engine: object, name: str, requirements: Mapping[str, Any]) -> str:
    """What a loaded engine computes in, as far as it says.

    Fewer layers in 8 bits than where the artefact was verified are logged.

    Args:
        engine: loaded.
        name: artefact and engine, for the log.
        requirements: of the artefact that it runs.
    """
    ran, verified = getattr(engine, "int8_layers", None), requirements.get("int8_layers")
    if isinstance(ran, int) and isinstance(verified, int) and ran < verified:
        _log.warning("%s: %d layers run in int8 here, %d did where it was verified", name, ran, verified)
    return str(getattr(engine, "executed", ""))


def with_place(words: str, bundle: object) -> str:
    """Words about what to type next, with the bundle's path where they say BUNDLE.

    Args:
        words: such as "run `tinyusfm-edge build BUNDLE` there".
        bundle: path of the bundle.
    """
    return words.replace(" BUNDLE`", f" {bundle}`")


__all__ = ["NEEDS", "executed_in", "needed_int8", "passed_here", "same_library", "with_place"]
