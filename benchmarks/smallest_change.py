"""The smallest change of a weight that moves the circumference by more than 1 mm, and who catches it.

    python benchmarks/smallest_change.py fetal-head-onnx-int8.bundle --data hc18/ --frames 48 --tensors 6

For each of some float tensors of an ONNX artefact the least factor is found, by bisection of its logarithm, at which
the circumference of labelled validation frames moves by more than 1 mm on average. The bundle with that tensor, its
manifest hashed again, then meets the start (golden check) and ``verify`` on the same frames. Exit code 1 where
``verify`` passes it.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from tinyusfm_calibration.sets import NamedFrame
from tinyusfm_edge import students
from tinyusfm_edge.data.folder import read_data
from tinyusfm_export.verify.bundle import verify_bundle
from tinyusfm_export.verify.engine_run import open_engine, preprocess_all, run_engine
from tinyusfm_export.verify.gate_frames import GateFrames
from tinyusfm_runtime.bundle.manifest import Artefact, file_entry
from tinyusfm_runtime.bundle.reader import Bundle
from tinyusfm_runtime.errors import EdgeError
from tinyusfm_runtime.session import Session
from tinyusfm_runtime.spec import ModelSpec

LIMIT_MM = 1.0
LARGEST = 4.0
"""Factor up to which is looked."""


def least_factor(moved_mm: Callable[[float], float], steps: int, limit_mm: float = LIMIT_MM) -> float | None:
    """Least factor above 1 that moves the circumference by more than the limit, or None up to ``LARGEST``.

    Args:
        moved_mm: factor -> mean absolute change.
        steps: of the bisection.
        limit_mm: of the change.
    """
    if moved_mm(LARGEST) <= limit_mm:
        return None
    low, high = 0.0, math.log(LARGEST)
    for _ in range(steps):
        middle = (low + high) / 2
        low, high = (low, middle) if moved_mm(math.exp(middle)) > limit_mm else (middle, high)
    return math.exp(high)


def scaled(model: bytes, name: str, factor: float) -> bytes:
    """An ONNX model with one float tensor times a factor."""
    import onnx

    made = onnx.load_from_string(model)
    for tensor in made.graph.initializer:
        if tensor.name == name:
            values = onnx.numpy_helper.to_array(tensor) * np.float32(factor)
            tensor.CopyFrom(onnx.numpy_helper.from_array(values.astype(np.float32), name))
    return bytes(made.SerializeToString())


def float_names(model: bytes, count: int) -> list[str]:
    """Float tensors of more than one number, evenly over the file."""
    import onnx

    found = [
        tensor.name
        for tensor in onnx.load_from_string(model).graph.initializer
        if tensor.data_type == onnx.TensorProto.FLOAT and math.prod(tensor.dims) > 1
    ]
    return [found[i] for i in np.linspace(0, len(found) - 1, min(count, len(found))).astype(int)]


def hashed_again(bundle: Bundle, path: str, content: bytes) -> Bundle:
    """The bundle with other bytes in one file, its manifest hashed again, in memory."""
    files = {name: bundle.read(name) for name in bundle.manifest.files} | {path: content}
    entries = {name: file_entry(raw) for name, raw in files.items()}
    artefacts = tuple(
        replace(artefact, files={name: entries[name] for name in artefact.files})
        for artefact in bundle.manifest.artefacts
    )
    return Bundle(bundle.path, replace(bundle.manifest, files=entries, artefacts=artefacts).sealed(), files)


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What is changed and judged.

    Attributes:
        bundle: open.
        artefact: of ONNX Runtime.
        path: of its one file.
        frames: named validation frames.
        module: the student.
        spec: as the student's own file says.
    """

    bundle: Bundle
    artefact: Artefact
    path: str
    frames: Sequence[NamedFrame]
    module: Any
    spec: ModelSpec

    def circumferences(self, model: bytes) -> np.ndarray:
        """mm on every frame; 0 where nothing was found."""
        spec, images = self.bundle.manifest.spec, [named.frame for named in self.frames]
        rest = self.artefact.rest_precision
        with open_engine("ort", {"model.onnx": model}, spec, threads=1, rest_precision=rest) as engine:
            outputs = run_engine(engine, spec, preprocess_all(images, spec), images)
        heads = [output.answer.measurement for output in outputs]
        return np.array([0.0 if head is None or head.hc_mm is None else head.hc_mm for head in heads])

    def judged(self, content: bytes) -> dict[str, str]:
        """What the start and ``verify`` say of other bytes."""
        changed = hashed_again(self.bundle, self.path, content)
        precision = self.artefact.precision
        try:
            Session.open(changed, target="onnx", precision=precision).close()
            at_open = "passes"
        except EdgeError as error:
            at_open = f"refused: {str(error)[-80:]}"
        frames = GateFrames(kind="data", frames=tuple(self.frames), source="validation")
        report = verify_bundle(
            changed, module=self.module, spec=self.spec, frames=frames, target="onnx", precision=precision
        )
        return {"at_open": at_open, "verify": "passes" if report else f"refused: {report.failures[0][:80]}"}


def search(subject: Subject, name: str, before: np.ndarray, steps: int) -> dict[str, Any]:
    """The least factor of one tensor, and who catches it.

    Args:
        subject: what is changed.
        name: of the tensor.
        before: circumferences of the artefact as it is.
        steps: of the bisection.
    """
    model = subject.bundle.read(subject.path)

    def moved_mm(factor: float) -> float:
        return float(np.abs(subject.circumferences(scaled(model, name, factor)) - before).mean())

    factor = least_factor(moved_mm, steps)
    if factor is None:
        return {"tensor": name, "factor": None}
    judged = subject.judged(scaled(model, name, factor))
    return {"tensor": name, "factor": factor, "mean_mm": moved_mm(factor), **judged}


def open_subject(place: Path, data: Path, frames: int) -> Subject:
    """A bundle of a shipped student and validation frames.

    Args:
        place: of the bundle.
        data: folder with a ``split.csv``.
        frames: how many.
    """
    bundle = Bundle.open(place)
    artefact = next(artefact for artefact in bundle.manifest.artefacts if artefact.engine == "ort")
    (path,) = artefact.files
    known = students.find_by_hash(bundle.manifest.weights_sha256)
    if known is None:
        raise SystemExit("the bundle must be of a shipped student")
    student, named = students.load(known), read_data(data, calibrate=False).validation[:frames]
    return Subject(bundle=bundle, artefact=artefact, path=path, frames=named, module=student.module, spec=student.spec)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description="the smallest change that moves the circumference by more than 1 mm")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--frames", type=int, default=48)
    parser.add_argument("--tensors", type=int, default=6)
    parser.add_argument("--steps", type=int, default=6)
    asked = parser.parse_args(argv)
    subject = open_subject(asked.bundle, asked.data, asked.frames)
    model = subject.bundle.read(subject.path)
    before, missed = subject.circumferences(model), False
    for name in float_names(model, asked.tensors):
        row = search(subject, name, before, asked.steps)
        missed |= row.get("verify") == "passes"
        print(json.dumps(row), flush=True)
    return int(missed)


if __name__ == "__main__":
    raise SystemExit(main())
