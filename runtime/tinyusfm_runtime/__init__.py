"""The thin runtime: a verified bundle, an engine, ``predict(frame)``.

numpy and the standard library, nothing else.

    from tinyusfm_runtime import Session

    with Session.open("fetal-head.bundle") as session:
        prediction = session.predict(grey_HW, spacing_mm=(0.31, 0.31))

The names below are the face of the package: documents and programs import from here, and the rest of the error tree
from ``tinyusfm_runtime.errors``. Importing this package imports none of its modules: each name is fetched when it is
first used, and inference libraries only when a session is opened.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    __version__: str
    from tinyusfm_runtime.bundle.reader import Bundle as Bundle
    from tinyusfm_runtime.errors import BundleError as BundleError
    from tinyusfm_runtime.errors import EdgeError as EdgeError
    from tinyusfm_runtime.errors import EngineError as EngineError
    from tinyusfm_runtime.errors import FrameError as FrameError
    from tinyusfm_runtime.errors import SourceError as SourceError
    from tinyusfm_runtime.frame import Frame as Frame
    from tinyusfm_runtime.frame import PixelFormat as PixelFormat
    from tinyusfm_runtime.frame import VideoRange as VideoRange
    from tinyusfm_runtime.latency import LatencyReport as LatencyReport
    from tinyusfm_runtime.latency import profile as profile
    from tinyusfm_runtime.live.fallback import Fallback as Fallback
    from tinyusfm_runtime.live.fallback import FallbackOptions as FallbackOptions
    from tinyusfm_runtime.live.loop import Live as Live
    from tinyusfm_runtime.live.options import LiveOptions as LiveOptions
    from tinyusfm_runtime.live.swap import SwapOptions as SwapOptions
    from tinyusfm_runtime.phantom import make_phantom as make_phantom
    from tinyusfm_runtime.plugins import Availability as Availability
    from tinyusfm_runtime.results import DropPolicy as DropPolicy
    from tinyusfm_runtime.results import LiveEvent as LiveEvent
    from tinyusfm_runtime.results import LiveResult as LiveResult
    from tinyusfm_runtime.results import LiveState as LiveState
    from tinyusfm_runtime.results import Prediction as Prediction
    from tinyusfm_runtime.results import StateChange as StateChange
    from tinyusfm_runtime.session import Session as Session
    from tinyusfm_runtime.sinks import open_sink as open_sink
    from tinyusfm_runtime.sources import open_source as open_source
    from tinyusfm_runtime.spec import ModelSpec as ModelSpec
    from tinyusfm_runtime.spec import Task as Task

_HOMES = {
    "bundle.reader": ("Bundle",),
    "errors": ("BundleError", "EdgeError", "EngineError", "FrameError", "SourceError"),
    "frame": ("Frame", "PixelFormat", "VideoRange"),
    "latency": ("LatencyReport", "profile"),
    "live.fallback": ("Fallback", "FallbackOptions"),
    "live.loop": ("Live",),
    "live.options": ("LiveOptions",),
    "live.swap": ("SwapOptions",),
    "phantom": ("make_phantom",),
    "plugins": ("Availability",),
    "results": ("DropPolicy", "LiveEvent", "LiveResult", "LiveState", "Prediction", "StateChange"),
    "session": ("Session",),
    "sinks": ("open_sink",),
    "sources": ("open_source",),
    "spec": ("ModelSpec", "Task"),
}
if not TYPE_CHECKING:  # a type checker that saw __getattr__ would take any name for one of the face
    from tinyusfm_runtime.face import lazy_names as _lazy_names

    __getattr__, __dir__ = _lazy_names(__name__, _HOMES)

__all__ = [
    "Availability",
    "Bundle",
    "BundleError",
    "DropPolicy",
    "EdgeError",
    "EngineError",
    "Fallback",
    "FallbackOptions",
    "Frame",
    "FrameError",
    "LatencyReport",
    "Live",
    "LiveEvent",
    "LiveOptions",
    "LiveResult",
    "LiveState",
    "ModelSpec",
    "PixelFormat",
    "Prediction",
    "Session",
    "SourceError",
    "StateChange",
    "SwapOptions",
    "Task",
    "VideoRange",
    "make_phantom",
    "open_sink",
    "open_source",
    "profile",
]
