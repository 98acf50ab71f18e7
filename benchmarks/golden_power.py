"""What the golden check catches, by the number of golden frames.

    python benchmarks/golden_power.py BUNDLE --data hc18/

Each edit changes one thing of the artefact, as an attacker would who also writes a new hash: a weight tensor scaled,
a branch dropped, two channels swapped, the last bias moved. BUNDLE holds as many golden frames as there are to compare;
for each count its first ones are taken, with the tolerance that an export of that many frames would have stored. *At
open* compares four of them with the artefact's own answers, *all* compares every one. What passes at open is measured
on labelled frames: the mean and the largest change of the circumference.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tinyusfm_edge.data.folder import read_data
from tinyusfm_export.verify.golden import find_tolerance
from tinyusfm_export.verify.parity import Output
from tinyusfm_runtime.bundle.golden import golden_check
from tinyusfm_runtime.bundle.reader import Bundle
from tinyusfm_runtime.engines import EngineConfig
from tinyusfm_runtime.numerics.postprocess import answer
from tinyusfm_runtime.numerics.preprocess import Placement, preprocess
from tinyusfm_runtime.session import GOLDEN_FRAMES_AT_START, make_engine
from tinyusfm_runtime.spec import LOGITS_NAME, ModelSpec

COUNTS = (32, 16, 12, 8, 6, 4)
SCALES = (0.9, 0.97, 1.03, 1.1)
BIASES = (-1.0, -0.6, -0.3, -0.1, 0.1, 0.3, 0.6, 1.0)
ONE_SCALE = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", ".norm")
Inputs = list[tuple[np.ndarray, Placement]]


@dataclass(frozen=True)
class Edit:
    """One change: which initialisers are multiplied, shifted or swapped."""

    name: str
    kind: str
    tensors: tuple[str, ...]
    factor: float = 1.0
    shift: float = 0.0
    swap: tuple[int, int] | None = None


def edits(names: Sequence[str]) -> Iterator[Edit]:
    """The edits of an artefact with these initialisers."""
    weights = [name for name in names if name.endswith((".weight_scale", ".weight", ".offsets", ".scale", "cls_token"))]
    for name in weights:
        inner = any(part in name for part in ONE_SCALE)
        for factor in SCALES[:1] if inner else SCALES:
            yield Edit(f"{name} x{factor}", "scaled weight", (name,), factor=factor)
    blocks = sorted({name.split(".")[1] for name in names if name.startswith("blocks.")}, key=int)
    for block in blocks:
        for branch in ("attn.proj", "mlp.fc2"):
            path = f"blocks.{block}.{branch}"
            yield Edit(f"{path} dropped", "dropped branch", (f"{path}.weight_scale", f"{path}.bias"), factor=0.0)
        scale = f"blocks.{block}.mlp.fc1.weight_scale"
        yield Edit(f"blocks.{block}.mlp.fc1 channels swapped", "swapped channels", (scale,), swap=(3, 77))
    for bias in (name for name in names if "classifier" in name and name.endswith("bias")):
        for shift in BIASES:
            yield Edit(f"{bias} {shift:+}", "moved bias", (bias,), shift=shift)
    for stage in range(4):
        name = f"head.smooth.{stage}.weight_scale"
        yield Edit(f"head.smooth.{stage} channels swapped", "swapped channels", (name,), swap=(3, 77))


def apply(raw: bytes, edit: Edit) -> bytes:
    """The artefact with an edit."""
    import onnx
    from onnx import numpy_helper

    model = onnx.load_from_string(raw)
    for tensor in model.graph.initializer:
        if tensor.name in edit.tensors:
            value = numpy_helper.to_array(tensor).copy()
            if edit.swap is not None:
                first, second = edit.swap
                value[[first, second]] = value[[second, first]]
            value = (value * np.float32(edit.factor) + np.float32(edit.shift)).astype(value.dtype)
            tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
    return model.SerializeToString()


def logits_of(raw: bytes, spec: ModelSpec, inputs: Inputs) -> np.ndarray:
    """float32 logits of an artefact for some inputs."""
    files = {"model.onnx": raw}
    engine = make_engine("ort", files)
    engine.load(files, spec, EngineConfig(threads=1, rest_precision="f32", reuse_outputs=False))
    try:
        return np.stack([np.asarray(engine.run(tensor)[LOGITS_NAME])[0].copy() for tensor, _ in inputs])
    finally:
        engine.close()


def circumferences(logits: np.ndarray, spec: ModelSpec, inputs: Inputs) -> np.ndarray:
    """mm, 0 where no head is found."""
    found = []
    for one, (_, placement) in zip(logits, inputs, strict=True):
        said = answer({LOGITS_NAME: one[None]}, spec, placement)
        found.append((said.measurement.hc_mm if said.measurement is not None else None) or 0.0)
    return np.array(found)


def outputs(logits: np.ndarray, spec: ModelSpec, inputs: Inputs) -> list[Output]:
    """Answers as an export keeps them."""
    made = []
    for one, (_, place) in zip(logits, inputs, strict=True):
        said = answer({LOGITS_NAME: one[None]}, spec, place)
        made.append(Output(logits=one[None], answer=said, mask_HW=said.mask_HW))
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Edits, runs, counts."""
    parser = argparse.ArgumentParser(description="what the golden check catches, by the number of golden frames")
    parser.add_argument("bundle", type=Path, help="a bundle with an onnx-int8 artefact and all golden frames")
    parser.add_argument("--data", type=Path, required=True, help="labelled frames with a split.csv")
    parser.add_argument("--frames", type=int, default=25, help="validation frames on which shifts are measured")
    parser.add_argument("--json", type=Path, help="write every edit's outcome")
    options = parser.parse_args(argv)
    bundle = Bundle.open(options.bundle)
    spec = bundle.manifest.spec
    artefact = next(one for one in bundle.manifest.artefacts if one.name == "onnx-int8")
    raw = bundle.artefact_files(artefact)["model.onnx"]
    golden = [preprocess(frame, spec.preprocess) for frame in bundle.golden_frames()]
    validation = read_data(options.data, calibrate=False).validation
    named = validation[:: max(1, len(validation) // options.frames)][: options.frames]
    patients = [preprocess(one.frame, spec.preprocess) for one in named]
    own, reference = logits_of(raw, spec, golden), bundle.golden_reference()["logits"]
    right_mm = circumferences(logits_of(raw, spec, patients), spec, patients)
    checks = {count: _check(own, reference, spec, golden, count) for count in COUNTS if count <= len(golden)}
    rows = []
    import onnx

    names = [tensor.name for tensor in onnx.load_from_string(raw).graph.initializer]
    for edit in edits(names):
        edited = apply(raw, edit)
        got = logits_of(edited, spec, golden)
        row: dict[str, Any] = {"edit": edit.name, "kind": edit.kind, "at_open": {}, "all": {}}
        for count, check in checks.items():
            chosen = [i * count // GOLDEN_FRAMES_AT_START for i in range(min(GOLDEN_FRAMES_AT_START, count))]
            row["at_open"][count] = check(got, chosen)
            row["all"][count] = check(got, list(range(count)))
        if any(row["at_open"].values()):
            moved = np.abs(circumferences(logits_of(edited, spec, patients), spec, patients) - right_mm)
            row |= {"mean_mm": float(moved.mean()), "max_mm": float(moved.max())}
        rows.append(row)
        print(json.dumps(row), file=sys.stderr, flush=True)
    for count in checks:
        passed = [row for row in rows if row["at_open"][count]]
        full = [row for row in rows if row["all"][count]]
        worst, worst_all = (max((row["mean_mm"] for row in some), default=0.0) for some in (passed, full))
        print(
            f"{count:>2} golden frames: {len(rows)} edits, {len(rows) - len(passed)} refused at open, "
            f"{len(rows) - len(full)} by all; "
            f"worst mean shift that passes {worst:.2f} mm at open, {worst_all:.2f} mm all"
        )
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return 0


def _check(own: np.ndarray, reference: np.ndarray, spec: ModelSpec, golden: Inputs, count: int) -> Any:
    """The golden check of a bundle that holds the first ``count`` frames."""
    places = [place for _, place in golden[:count]]
    made = outputs(own[:count], spec, golden[:count])
    wanted = outputs(reference[:count].astype(np.float32), spec, golden[:count])
    tolerance = find_tolerance(made, [made], wanted, spec, places)
    largest = float(np.finfo(np.float16).max)
    stored = np.clip(own, -largest, largest).astype(np.float16)

    def passes(got: np.ndarray, chosen: list[int]) -> bool:
        return bool(golden_check(got[chosen], stored[chosen], spec, [golden[i][1] for i in chosen], tolerance))

    return passes


if __name__ == "__main__":
    sys.exit(main())
