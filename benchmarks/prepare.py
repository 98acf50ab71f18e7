"""Files of the benchmark: our bundle, the rivals' models and the frames; and the jobs that name them.

It does not measure anything.

Shapes: SNCHW uint8 inputs; SHWC frames.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rivals import write_nncf, write_stock_onnx
from tinyusfm_edge.models.checkpoint import LoadedStudent
from tinyusfm_export.pipeline import ExportOptions, export_bundle
from tinyusfm_export.verify.gate_frames import shipped_gate_frames
from tinyusfm_runtime.bundle.reader import Bundle
from tinyusfm_runtime.device.machine import machine_card
from tinyusfm_runtime.numerics.preprocess import preprocess
from tinyusfm_runtime.phantom import make_phantom
from workers import Job

FIRST_SEED = 200
"""Phantom seeds of the benchmark: neither golden (below 100), nor gate (100 to 147), nor training (from 1,000,000)."""
CALIBRATION_SEED = 10_000
"""First phantom seed of NNCF's calibration where no data is given."""
NUM_CALIBRATION = 300
"""NNCF's own default subset size."""
NUM_IMAGES = 4
"""Whole frames that take turns."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """Jobs of the workers.

    Attributes:
        tensors: worker name -> job, tensor in, logits out.
        frames: worker name -> job, whole frame in, mask out.
        gates: worker name -> whether the artefact held its gate when it was exported.
    """

    tensors: dict[str, Job]
    frames: dict[str, Job]
    gates: dict[str, bool]


def prepare(
    loaded: LoadedStudent,
    student_file: Path,
    bundles: Sequence[Path],
    work: Path,
    *,
    data: Path | None,
    num_frames: int,
    threads: int,
) -> Prepared:
    """Writes everything the workers read.

    Args:
        loaded: the student.
        student_file: where it was read from.
        bundles: further bundles to measure.
        work: folder for the files.
        data: labelled folder, or None for phantoms.
        num_frames: frames on which agreement is measured.
        threads: threads of every engine.
    """
    np.savez(work / "inputs.npz", codes_SNCHW=frames_of(loaded, data, "val", num_frames, FIRST_SEED))
    phantoms = [make_phantom(FIRST_SEED + i, height=1080, width=1920).frame.pixels for i in range(NUM_IMAGES)]
    np.savez(work / "images.npz", rgb_SHWC=np.stack([np.stack([p] * 3, axis=-1) for p in phantoms]))
    stock = write_stock_onnx(loaded.module, loaded.spec, work)
    calibration = frames_of(loaded, data, "train", NUM_CALIBRATION, CALIBRATION_SEED)
    nncf = write_nncf(stock, calibration, loaded.spec, work)
    rest = "bf16" if machine_card().has_bf16 else "f32"
    tensors: dict[str, Job] = {
        "eager": {"kind": "eager", "student": str(student_file)},
        "ort fp32": {"kind": "onnx", "model": str(stock)},
        "ov fp32": {"kind": "openvino", "model": str(stock), "rest_precision": "f32"},
        "ov nncf int8": {"kind": "openvino", "model": str(nncf), "rest_precision": rest},
    }
    gates: dict[str, bool] = {}
    frames: dict[str, Job] = {"typical": {"kind": "typical", "model": str(stock)}}
    for bundle in (*export_ours(loaded, work), *bundles):
        prefix = bundle.name.removesuffix(".bundle")
        for found in Bundle.open(bundle).manifest.artefacts:
            job = {"bundle": str(bundle), "artefact": found.name}
            name = f"{prefix} {found.name}"
            tensors[name] = {"kind": "artefact", **job}
            frames[name] = {"kind": "session", **job}
            gates[name] = bool(found.gate and found.gate["passed"])
    pre = loaded.spec.preprocess
    common: Job = {
        "threads": threads,
        "inputs": str(work / "inputs.npz"),
        "images": str(work / "images.npz"),
        "mean": pre.mean,
        "std": pre.std,
        "height": pre.height,
        "width": pre.width,
    }
    return Prepared(
        tensors={name: {**common, **job} for name, job in tensors.items()},
        frames={name: {**common, **job} for name, job in frames.items()},
        gates=gates,
    )


def export_ours(loaded: LoadedStudent, work: Path) -> tuple[Path, ...]:
    """Exports the student for OpenVINO and ONNX Runtime; the gate is judged on phantoms, reported and not enforced."""
    half = ("bf16",) if machine_card().has_bf16 else ()
    plan = {"openvino": ("int8", *half, "fp32"), "onnx": ("int8", "fp32")}
    gate_frames = shipped_gate_frames()
    paths = []
    for target, precisions in plan.items():
        (work / target).mkdir()
        result = export_bundle(
            loaded.module,
            loaded.spec,
            targets=(target,),
            precisions=precisions,
            out=work / target / "ours.bundle",
            gate_frames=gate_frames,
            ranges=loaded.ranges,
            gated=False,
            advanced=ExportOptions(compare=False, rounds=1, runs=1),
        )
        paths.append(result.path)
    return tuple(paths)


def frames_of(loaded: LoadedStudent, data: Path | None, split: str, count: int, seed: int) -> np.ndarray:
    """Inputs SNCHW: frames of a labelled table's split, or phantoms from a seed on.

    Args:
        loaded: the student, for its preprocessing.
        data: labelled folder, or None for phantoms.
        split: of the table.
        count: at most so many.
        seed: of the first phantom.
    """
    if data is None:
        frames = [make_phantom(seed + index).frame for index in range(count)]
    else:
        from tinyusfm_edge.data.table import read_table

        frames = [sample.frame for sample in read_table(data, split, limit=count)]
    return np.stack([preprocess(frame, loaded.spec.preprocess)[0] for frame in frames])


__all__ = [
    "CALIBRATION_SEED",
    "FIRST_SEED",
    "NUM_CALIBRATION",
    "NUM_IMAGES",
    "Prepared",
    "export_ours",
    "frames_of",
    "prepare",
]
