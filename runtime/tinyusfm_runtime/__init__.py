"""The thin runtime: a verified bundle, an engine, ``predict(frame)``. numpy and the standard library, nothing else.

    from tinyusfm_runtime import Frame, Session

    with Session.open("fetal-head.bundle") as session:
        prediction = session.predict(Frame(pixels=grey_HW, spacing_mm=(0.31, 0.31)))

Importing this package imports none of its modules: each name below is fetched when it is first
used, and inference libraries only when a session is opened.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tinyusfm_runtime.bundle import Bundle
    from tinyusfm_runtime.engine import Engine, EngineConfig
    from tinyusfm_runtime.errors import (
        BundleError,
        CalibrationError,
        CheckpointError,
        EdgeError,
        EngineError,
        FrameError,
        GateError,
        InputError,
        MissingExtra,
        OutputError,
        SourceError,
        TamperedError,
        UnsupportedError,
        UnverifiedError,
    )
    from tinyusfm_runtime.frame import Frame, FrameSource, PixelFormat, VideoRange
    from tinyusfm_runtime.ladder import Ladder, LadderOptions
    from tinyusfm_runtime.latency import ColdStart, LatencyReport, cold_start, profile
    from tinyusfm_runtime.live import Live
    from tinyusfm_runtime.live_options import LiveOptions
    from tinyusfm_runtime.live_result import DropPolicy, LiveResult, LiveState
    from tinyusfm_runtime.machine import MachineCard, machine_card
    from tinyusfm_runtime.manifest import Artefact, ArtefactState, FileEntry, Manifest
    from tinyusfm_runtime.measure import HeadMeasurement
    from tinyusfm_runtime.phantom import Phantom, make_phantom
    from tinyusfm_runtime.plugins import Probe
    from tinyusfm_runtime.preprocess import Placement
    from tinyusfm_runtime.publish import write_bundle
    from tinyusfm_runtime.selfcheck import GoldenReport
    from tinyusfm_runtime.session import Prediction, Session, Timings
    from tinyusfm_runtime.spec import AspectPolicy, ModelSpec, PostProcess, PreprocessSpec, Task, TensorSpec

_HOMES = {
    "bundle": ("Bundle",),
    "engine": ("Engine", "EngineConfig"),
    "errors": (
        "BundleError", "CalibrationError", "CheckpointError", "EdgeError", "EngineError", "FrameError", "GateError",
        "InputError", "MissingExtra", "OutputError", "SourceError", "TamperedError", "UnsupportedError",
        "UnverifiedError",
    ),
    "frame": ("Frame", "FrameSource", "PixelFormat", "VideoRange"),
    "ladder": ("Ladder", "LadderOptions"),
    "latency": ("ColdStart", "LatencyReport", "cold_start", "profile"),
    "live": ("Live",),
    "live_options": ("LiveOptions",),
    "live_result": ("DropPolicy", "LiveResult", "LiveState"),
    "machine": ("MachineCard", "machine_card"),
    "manifest": ("Artefact", "ArtefactState", "FileEntry", "Manifest"),
    "measure": ("HeadMeasurement",),
    "phantom": ("Phantom", "make_phantom"),
    "plugins": ("Probe",),
    "preprocess": ("Placement",),
    "publish": ("write_bundle",),
    "selfcheck": ("GoldenReport",),
    "session": ("Prediction", "Session", "Timings"),
    "spec": ("AspectPolicy", "ModelSpec", "PostProcess", "PreprocessSpec", "Task", "TensorSpec"),
}  # fmt: skip
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


__all__ = [
    "Artefact",
    "ArtefactState",
    "AspectPolicy",
    "Bundle",
    "BundleError",
    "CalibrationError",
    "CheckpointError",
    "ColdStart",
    "DropPolicy",
    "EdgeError",
    "Engine",
    "EngineConfig",
    "EngineError",
    "FileEntry",
    "Frame",
    "FrameError",
    "FrameSource",
    "GateError",
    "GoldenReport",
    "HeadMeasurement",
    "InputError",
    "Ladder",
    "LadderOptions",
    "LatencyReport",
    "Live",
    "LiveOptions",
    "LiveResult",
    "LiveState",
    "MachineCard",
    "Manifest",
    "MissingExtra",
    "ModelSpec",
    "OutputError",
    "Phantom",
    "PixelFormat",
    "Placement",
    "PostProcess",
    "Prediction",
    "PreprocessSpec",
    "Probe",
    "Session",
    "SourceError",
    "TamperedError",
    "Task",
    "TensorSpec",
    "Timings",
    "UnsupportedError",
    "UnverifiedError",
    "VideoRange",
    "cold_start",
    "machine_card",
    "make_phantom",
    "profile",
    "write_bundle",
]
