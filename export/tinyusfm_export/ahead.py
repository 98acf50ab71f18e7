"""Engines and timing caches beside a TensorRT artefact's own files.

Engines are built ahead of time for the devices that can take them as they are. A timing cache is what TensorRT measured
on a device when it built an engine there: in the bundle it is hashed and signed with the rest, and a device of that
kind that builds with it picks the same kernels.

Only TensorRT for RTX builds without the GPU at hand. The engines have not run anywhere when they are published: the
device completes the gate. It does not know how they are built (targets/trt.py) or found (device_engine.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from tinyusfm_export.artefacts import ArtefactSet

_TARGET = "trt"


def with_engines(
    fallback: ArtefactSet,
    capabilities: Sequence[str],
    progress: Callable[[str, float], None],
    timing_caches: Sequence[Path] = (),
) -> ArtefactSet:
    """Adds engines and timing caches to every TensorRT artefact of a fallback.

    Args:
        fallback: checked artefacts.
        capabilities: compute capabilities, such as ``8.6``.
        progress: called with what is done and the share done.
        timing_caches: files of devices' engine caches; with one a device builds the same engine again.

    Raises:
        InputError: a timing cache cannot be used.
        UnsupportedError: the edition installed builds for the GPU at hand only.
        EngineError: the builder failed.
    """
    from tinyusfm_export.targets.trt import build_ahead, timing_files

    timing = timing_files(timing_caches)
    artefacts = []
    for artefact in fallback.artefacts:
        if artefact.target == _TARGET:
            files = {**artefact.files, **timing}
            if capabilities:
                files |= build_ahead(artefact.files, artefact.decision.precision, capabilities, progress)
            artefact = replace(artefact, files=files)
        artefacts.append(artefact)
    return replace(fallback, artefacts=tuple(artefacts))


def check_ahead(capabilities: Sequence[str]) -> None:
    """Checks compute capabilities before anything slow starts.

    Raises:
        MissingExtra: TensorRT is not installed.
        UnsupportedError: the edition installed builds for the GPU at hand only.
        InputError: a compute capability that it does not know.
    """
    from tinyusfm_export.targets import trt

    trt.check_ahead(capabilities)


def check_timing(caches: Sequence[Path]) -> None:
    """Checks timing caches before anything slow starts.

    Raises:
        InputError: one cannot be read or is not as a device wrote it.
    """
    from tinyusfm_export.targets.trt import timing_files

    timing_files(caches)


__all__ = ["check_ahead", "check_timing", "with_engines"]
