"""Writes a tiny bundle of today's format, as tests/data/bundles keeps one for every version:

    python -m tests.capi.stored tests/data/bundles/schema2

Its artefact runs in the integer engine, which both runtimes hold, and answers with the same bytes on every machine.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from tests.conftest import Parts
from tinyusfm_export.targets.integer.writer import ModelWriter
from tinyusfm_runtime.bundle.arrays import pack_arrays
from tinyusfm_runtime.bundle.golden import pack_golden
from tinyusfm_runtime.bundle.manifest import GOLDEN_FRAMES, GOLDEN_REFERENCE, Artefact, ArtefactState, file_entry
from tinyusfm_runtime.engines import EngineConfig
from tinyusfm_runtime.engines.integer import LIBRARY_VERSION, MODEL_FILE, Engine
from tinyusfm_runtime.engines.integer.layout import F32, I16, U8, WORDS
from tinyusfm_runtime.frame import Frame
from tinyusfm_runtime.numerics.preprocess import preprocess
from tinyusfm_runtime.spec import ModelSpec, PostProcess, PreprocessSpec, Task

SIDE, FRAMES = 16, 4


def tiny_model() -> bytes:
    """Logits that grow with the brightness of each pixel."""
    writer = ModelWriter()
    writer.port("image", U8, (1, 1, SIDE, SIDE))
    source = writer.buffer("input", U8, SIDE, SIDE)
    words = writer.buffer("words", I16, SIDE, SIDE)
    identity = {
        "weight": np.eye(SIDE, dtype=np.int8), "bias": np.full(SIDE, -100, "<i4"), "shift": np.zeros(SIDE, "i1"),
        "factor": np.full(SIDE, 32767, "<i2"),
    }  # fmt: skip
    fields = {"row": 0, "target_row": 0, "rows": SIDE, "mode": WORDS, "bits": 0, "zero": 0, "table": 0}
    writer.add("linear", source, words, label="", tensors=identity, **fields)
    port = writer.port("logits", F32, (1, 1, SIDE, SIDE))
    scale = int(np.array([0.0625], np.float32).view(np.int32)[0])
    writer.add("output", words, words, label="", port=port, scale=scale, transposed=0)
    return pack_arrays(writer.all_tensors())


def stored_parts() -> Parts:
    """Everything of the bundle."""
    spec = ModelSpec(
        name="stored", task=Task.SEGMENT, labels=("head",), postprocess=PostProcess.ELLIPSE_HC,
        preprocess=PreprocessSpec(height=SIDE, width=SIDE), licence="Apache-2.0", origin="drawn for the tests",
    )  # fmt: skip
    y, x = np.mgrid[:SIDE, :SIDE]
    pixels = np.stack([np.where((y - 8) ** 2 + (x - 7 - k) ** 2 < 20 + k, 220, 20) for k in range(FRAMES)])
    arrays = {
        "pixels": pixels.astype(np.uint8), "spacing_mm": np.full((FRAMES, 2), 0.5),
        "seeds": np.arange(FRAMES, dtype=np.int64),
    }  # fmt: skip
    frames = [Frame(pixels=image, spacing_mm=(0.5, 0.5)) for image in arrays["pixels"]]
    prepared = [preprocess(frame, spec.preprocess) for frame in frames]
    model, engine = tiny_model(), Engine()
    engine.load({MODEL_FILE: model}, spec, EngineConfig(threads=1, rest_precision="f32"))
    logits = np.concatenate([engine.run(tensor)["logits"].copy() for tensor, _ in prepared])
    engine.close()
    path, golden = f"artefacts/integer-int8/{MODEL_FILE}", "golden/integer-int8.safetensors"
    artefact = Artefact(
        target="integer", engine="integer", precision="int8", rest_precision="f32", form="words", gated=True,
        files={path: file_entry(model)}, state=ArtefactState.VERIFIED, golden=golden, tolerance={},
        requirements={"cpu_features": [], "library": "tinyusfm-edge", "library_version": LIBRARY_VERSION},
        gate={"passed": True, "gate": {"dice_mean": 0.99}},
    )  # fmt: skip
    files = {
        path: model, GOLDEN_FRAMES: pack_arrays(arrays), GOLDEN_REFERENCE: pack_golden(logits, spec, prepared),
        golden: pack_golden(logits, spec, prepared),
    }  # fmt: skip
    return Parts(spec=spec, artefacts=(artefact,), files=files, tools={"tinyusfm-edge": "stored"})


if __name__ == "__main__":
    stored_parts().publish(Path(sys.argv[1]))
