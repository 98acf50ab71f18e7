"""What can be said of an artefact before it runs.

Parameters, multiplications, bytes, and the floor of this machine.

Multiplications are those of matrix products and convolutions, counted by the shapes in the file itself. The floor is
the larger of two times: all multiplications at the speed of the fastest float32 matrix product that numpy does here, on
the threads numpy takes, and all bytes of the artefact read once at the speed of a copy. An INT8 product may lie below
that floor; the ratio then says by how much.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from tinyusfm_runtime.bundle.manifest import Artefact
from tinyusfm_runtime.bundle.reader import Bundle
from tinyusfm_runtime.errors import EngineError
from tinyusfm_runtime.graphs.budget import Budget
from tinyusfm_runtime.spec import ModelSpec

SHAPES = ((197, 192, 768), (784, 1152, 128), (512, 512, 512))
"""Rows, inner, columns: a linear of a small ViT, a 3x3 convolution as a product, and one that suits any library."""
SECONDS = 0.1
"""Time spent on one ceiling."""
COPY_BYTES = 64 << 20
"""Larger than a cache."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StaticCard:
    """One artefact on one machine.

    Attributes:
        artefact: its name.
        bytes_on_disk: of its files.
        parameters: by the architecture, or None where the manifest does not say.
        macs: multiplications of one frame, or None where its file has no shapes.
        gemm_gops: ceiling of float32 matrix products, billions of operations a second (2 a multiplication).
        copy_gbs: ceiling of memory, GB a second.
        floor_ms: the larger of both times, or None.
    """

    artefact: str
    bytes_on_disk: int
    parameters: int | None
    macs: int | None
    gemm_gops: float
    copy_gbs: float
    floor_ms: float | None

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    def rows(self) -> list[tuple[str, str]]:
        """(what, value) for people."""
        return [
            ("artefact", f"{self.artefact}, {self.bytes_on_disk / 1e6:.1f} MB"),
            ("multiplications", "not known" if self.macs is None else f"{self.macs / 1e9:.3f} G a frame"),
            ("matrix product here", f"{self.gemm_gops:.1f} GOP/s in float32 (numpy)"),
            ("memory here", f"{self.copy_gbs:.1f} GB/s"),
            ("floor", "not known" if self.floor_ms is None else f"{self.floor_ms:.2f} ms"),
        ]


def make_card(bundle: Bundle, artefact: Artefact, seconds: float = SECONDS) -> StaticCard:
    """The card of one artefact, with the ceilings of this machine measured now.

    Args:
        bundle: holds it.
        artefact: of that bundle.
        seconds: spent on each ceiling.
    """
    files = bundle.artefact_files(artefact)
    macs = count_macs(artefact.engine, files, bundle.manifest.spec)
    size = sum(len(content) for content in files.values())
    gops, gbs = gemm_ceiling(seconds), copy_ceiling(seconds)
    floor = None if macs is None else 1e3 * max(2.0 * macs / (gops * 1e9), size / (gbs * 1e9))
    parameters = bundle.manifest.spec.architecture.get("parameters")
    return StaticCard(
        artefact=artefact.name,
        bytes_on_disk=size,
        parameters=parameters if isinstance(parameters, int) else None,
        macs=macs,
        gemm_gops=gops,
        copy_gbs=gbs,
        floor_ms=floor,
    )


def count_macs(engine: str, files: Mapping[str, bytes], spec: ModelSpec) -> int | None:
    """Multiplications of one frame, or None where the files cannot be read here.

    Args:
        engine: that runs them.
        files: file name -> content.
        spec: the model.
    """
    budget = Budget(spec, sum(len(content) for content in files.values()))
    try:
        if set(files) == {"model.onnx"} and engine in ("ort", "trt"):
            from tinyusfm_runtime.graphs import onnx

            onnx.check(files["model.onnx"], spec.input, spec, budget)
        elif set(files) == {"model.xml", "model.bin"}:
            from tinyusfm_runtime.graphs import ir

            ir.check(files["model.xml"], files["model.bin"], spec.input, spec, budget)
        elif set(files) == {"model.tflite"}:
            from tinyusfm_runtime.graphs import tflite

            tflite.check(files["model.tflite"], spec.input, spec, budget)
        else:
            return None
    except EngineError:
        return None
    return budget.used_macs


def gemm_ceiling(seconds: float = SECONDS) -> float:
    """Fastest float32 matrix product of numpy, billions of operations a second.

    Args:
        seconds: spent.
    """
    best = 0.0
    for rows, inner, columns in SHAPES:
        left, right = np.ones((rows, inner), np.float32), np.ones((inner, columns), np.float32)
        best = max(best, 2.0 * rows * inner * columns / _fastest(lambda a=left, b=right: a @ b, seconds / 3) / 1e9)
    return best


def copy_ceiling(seconds: float = SECONDS) -> float:
    """Speed of a copy, GB a second, read and written bytes both counted.

    Args:
        seconds: spent.
    """
    source = np.ones(COPY_BYTES, np.uint8)
    target = np.empty_like(source)
    return 2.0 * COPY_BYTES / _fastest(lambda: np.copyto(target, source), seconds) / 1e9


def _fastest(call: Any, seconds: float) -> float:
    call()
    best, stop = float("inf"), time.perf_counter() + seconds
    while True:
        start = time.perf_counter()
        call()
        now = time.perf_counter()
        best = min(best, max(now - start, 1e-9))
        if now > stop:
            return best


__all__ = ["COPY_BYTES", "SECONDS", "SHAPES", "StaticCard", "copy_ceiling", "count_macs", "gemm_ceiling", "make_card"]
