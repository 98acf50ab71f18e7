"""The LiteRT artefact of the shipped student on heads of patients; a wrong weight as the control."""

from __future__ import annotations

import copy
import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.export.students import observed
from tests.needs import needs
from tinyusfm_edge.students import load
from tinyusfm_export.graph.build import ExportGraph, build_graph
from tinyusfm_export.graph.inference import repeatable_inference
from tinyusfm_export.quantize.decision import float_decision
from tinyusfm_export.quantize.ptq import decide
from tinyusfm_export.targets.litert.writer import write_model
from tinyusfm_runtime.engines import EngineConfig
from tinyusfm_runtime.engines.litert import Engine
from tinyusfm_runtime.frame import Frame
from tinyusfm_runtime.images.decode import read_image
from tinyusfm_runtime.numerics.preprocess import preprocess

needs("ai_edge_litert", "ai-edge-litert is not installed: pip install 'tinyusfm-edge[litert]'")
needs("tflite", "tflite is not installed: pip install 'tinyusfm-edge[litert]'")
HEADS = 24
"""Frames that are compared."""


@pytest.fixture(scope="module")
def frames(shared_folder: Path) -> list[Frame]:
    """Heads of the validation split, evenly spread."""
    folder = shared_folder / "data" / "hc18"
    if not folder.is_dir():
        pytest.skip("the HC18 frames are not there")
    with (folder / "split.csv").open(newline="", encoding="utf-8") as table:
        rows = [row for row in csv.DictReader(table) if row["split"] == "val"]
    found = []
    for row in rows[:: len(rows) // HEADS][:HEADS]:
        pixels = read_image((folder / row["file"]).read_bytes()).pixels
        grey = np.ascontiguousarray(pixels if pixels.ndim == 2 else pixels[:, :, 0])
        found.append(Frame(pixels=grey, spacing_mm=(float(row["pixel_size_mm"]),) * 2))
    return found


def dices(graph: ExportGraph, frames: list[Frame], content: bytes) -> list[float]:
    """Dice of an artefact's mask and PyTorch's, frame by frame."""
    engine = Engine()
    engine.load({"model.tflite": content}, graph.spec, EngineConfig(threads=1, rest_precision="f32"))
    found = []
    for frame in frames:
        tensor, _ = preprocess(frame, graph.spec.preprocess)
        with repeatable_inference():
            wanted = graph.module(torch.from_numpy(tensor))[0].numpy() > 0
        mask = engine.run(tensor)["logits"] > 0
        found.append(2.0 * float((mask & wanted).sum()) / float(mask.sum() + wanted.sum()))
    engine.close()
    return found


def test_int8_agrees_on_heads_of_patients_and_a_wrong_weight_does_not(frames: list[Frame]) -> None:
    student = load("fetal-head")
    graph = build_graph(student.module, student.spec)
    content = write_model(graph, decide(graph, "int8", observed(graph)))
    found = dices(graph, frames, content)
    assert np.mean(found) > 0.995 and min(found) > 0.96, f"mean {np.mean(found):.4f}, worst {min(found):.4f}"
    wrong = copy.deepcopy(graph.module)
    wrong.get_submodule("patch_embed").weight.data.neg_()
    control = dices(graph, frames[:4], write_model(replace(graph, module=wrong), float_decision("fp32")))
    assert min(control) < 0.96, "the frames tell a broken network from a good one"
