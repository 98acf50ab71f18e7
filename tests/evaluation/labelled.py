"""A labelled folder of phantoms, two frames a patient and two sites, and bundles of the tiny model in ONNX Runtime."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import Parts, make_parts, tiny_onnx, tiny_spec
from tests.tables import write_rows
from tinyusfm_runtime.overlay import encode_png
from tinyusfm_runtime.phantom import make_phantom

FRAMES = 24
"""Labelled phantoms of the folder."""


def write_labelled(folder: Path, *, frames: int = FRAMES, split: str = "test") -> Path:
    """Phantoms with masks, circumference, patient and site (as the label)."""
    rows = []
    for number in range(frames):
        phantom = make_phantom(700 + number, height=120, width=160)
        (folder / f"{number}.png").write_bytes(encode_png(phantom.frame.pixels))
        (folder / f"{number}_mask.png").write_bytes(encode_png(phantom.mask_HW * np.uint8(255)))
        assert phantom.frame.spacing_mm is not None
        rows.append(
            {"file": f"{number}.png", "mask": f"{number}_mask.png", "split": split, "group": f"p{number // 2}",
             "label": "AB"[number // 2 % 2], "pixel_size_mm": phantom.frame.spacing_mm[0],
             "head_circumference_mm": phantom.hc_mm}
        )  # fmt: skip
    return write_rows(folder, rows)


def bright_parts(level: float = 0.3, **spec: Any) -> Parts:
    """The tiny model with another level of brightness, that is, other weights."""
    onnx = pytest.importorskip("onnx", reason="install tinyusfm-edge[export]")
    pytest.importorskip("onnxruntime", reason="install tinyusfm-edge[onnxruntime]")
    model = onnx.load_from_string(tiny_onnx())
    for tensor in model.graph.initializer:
        if tensor.name == "level":
            tensor.CopyFrom(onnx.numpy_helper.from_array(np.float32(level), "level"))
    parts = make_parts({"ort": {"model.onnx": bytes(model.SerializeToString())}}, tiny_spec(**spec))
    return dataclasses.replace(parts)
