"""Engines built ahead of time beside an artefact's own files, for the devices that can take them as they are.

Only TensorRT for RTX builds without the GPU at hand. The engines have not run anywhere when they are published: the
device completes the gate. It does not know how they are built (targets/trt.py) or found (device_engine.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from tinyusfm_export.ladder import Ladder

_TARGET = "trt"


def with_engines(ladder: Ladder, capabilities: Sequence[str], told: Callable[[str, float], None]) -> Ladder:
    """Adds engines to every TensorRT artefact of a ladder.

    Args:
        ladder: checked artefacts.
        capabilities: compute capabilities, such as ``8.6``.
        told: progress.

    Raises:
        UnsupportedError: the edition installed builds for the GPU at hand only.
        EngineError: the builder failed.
    """
    from tinyusfm_export.targets.trt import build_ahead

    artefacts = tuple(
        replace(
            artefact,
            files={**artefact.files, **build_ahead(artefact.files, artefact.decision.precision, capabilities, told)},
        )
        if artefact.target == _TARGET
        else artefact
        for artefact in ladder.artefacts
    )
    return replace(ladder, artefacts=artefacts)


def check_ahead(capabilities: Sequence[str]) -> None:
    """Checks compute capabilities before anything slow starts.

    Raises:
        MissingExtra: TensorRT is not installed.
        UnsupportedError: the edition installed builds for the GPU at hand only.
        InputError: a compute capability that it does not know.
    """
    from tinyusfm_export.targets import trt

    trt.check_ahead(capabilities)


__all__ = ["check_ahead", "with_engines"]
