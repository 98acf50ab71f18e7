"""The whole way with a real student's graph in a real engine, and one perturbed weight as the control."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import Parts
from tests.export.fake_world import gate_phantoms
from tinyusfm_calibration.sets import phantom_frames
from tinyusfm_edge.models.student import StudentConfig, build_student
from tinyusfm_export.pipeline import ExportOptions, export_bundle
from tinyusfm_export.quantize.decision import QuantDecision
from tinyusfm_export.verify.bundle import verify_bundle
from tinyusfm_export.verify.gate import Gate
from tinyusfm_runtime.bundle.manifest import file_entry
from tinyusfm_runtime.bundle.reader import Bundle
from tinyusfm_runtime.errors import EngineError
from tinyusfm_runtime.session import Session
from tinyusfm_runtime.spec import ModelSpec, PostProcess, PreprocessSpec, Task

SIDE = 64
CONFIG = StudentConfig(width=48, heads=3, image_size=SIDE)
SPEC = ModelSpec(
    name="random",
    task=Task.SEGMENT,
    labels=("head",),
    preprocess=PreprocessSpec(height=SIDE, width=SIDE),
    postprocess=PostProcess.ELLIPSE_HC,
    architecture=CONFIG.to_json(),
)
QUICK = ExportOptions(rounds=1, runs=1)
LOOSE = Gate(dice_mean=0.8, dice_worst=0.3, hc_p95_mm=1000.0, differing_pixels=0.5)
"""A network that was never trained has no margin between head and background, so int8 cannot hold the real gate."""


@pytest.fixture(scope="module")
def student() -> torch.nn.Module:
    """A random student whose mask is about half of the image."""
    torch.manual_seed(3)
    made = build_student(CONFIG).eval()
    probe = torch.randn(1, 3, SIDE, SIDE)
    with torch.inference_mode():
        middle = made(probe).median()
    with torch.no_grad():
        made.head.classifier.bias -= middle  # type: ignore[union-attr, operator]
        made.head.classifier.weight *= 30.0  # type: ignore[union-attr, operator]
        made.head.classifier.bias *= 30.0  # type: ignore[union-attr, operator]
    return made


@pytest.fixture(scope="module")
def bundle(student: torch.nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ONNX fp32 under the real gate."""
    pytest.importorskip("onnx", reason="onnx is not installed: pip install 'tinyusfm-edge[export]'")
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    return export_bundle(
        student,
        SPEC,
        targets=["onnx"],
        precisions=["fp32"],
        out=tmp_path_factory.mktemp("real") / "r.bundle",
        gate_frames=gate_phantoms(),
        advanced=QUICK,
    ).path


def perturbed(path: Path, out: Path) -> Path:
    """The same bundle with one single weight changed and every hash made right again."""
    import onnx

    opened = Bundle.open(path)
    artefact = opened.manifest.artefacts[0]
    (name,) = artefact.files
    model = onnx.load_model_from_string(opened.read(name))
    weights = next(w for w in model.graph.initializer if "classifier.0" in w.name and len(w.dims) == 4)
    values = onnx.numpy_helper.to_array(weights).copy()
    values.flat[int(np.abs(values).argmax())] *= -30.0
    weights.CopyFrom(onnx.numpy_helper.from_array(values, weights.name))
    files = {file: opened.read(file) for file in opened.manifest.files}
    files[name] = model.SerializeToString()
    parts = Parts(
        spec=opened.manifest.spec, artefacts=(replace(artefact, files={name: file_entry(files[name])}),), files=files
    )
    return parts.publish(out, weights_sha256=opened.manifest.weights_sha256)


def test_the_default_gate_holds_in_float32(bundle: Path, student: torch.nn.Module) -> None:
    live = verify_bundle(bundle, module=student, frames=gate_phantoms())
    assert live, live.failures
    golden = verify_bundle(bundle)
    assert golden, golden.failures
    assert live.live and not golden.live


def test_golden_holds_32_frames_and_the_artefacts_own_answers(bundle: Path) -> None:
    opened = Bundle.open(bundle)
    assert len(opened.golden_frames()) >= 32
    assert opened.golden_reference()["logits"].shape == (32, 1, SIDE, SIDE)
    own = opened.golden_outputs(opened.manifest.artefacts[0])["logits"]
    assert np.abs(own.astype(np.float32) - opened.golden_reference()["logits"]).max() < 0.05


def test_one_perturbed_weight_fails_the_full_gate_the_golden_gate_and_the_session(
    bundle: Path, student: torch.nn.Module, tmp_path: Path
) -> None:
    other = perturbed(bundle, tmp_path / "p.bundle")
    assert not verify_bundle(other, module=student, frames=gate_phantoms())
    assert not verify_bundle(other)
    with pytest.raises(EngineError, match="does not answer"):
        Session.open(other)


def test_int8_goes_the_whole_way_on_calibration_phantoms(student: torch.nn.Module, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    result = export_bundle(
        student,
        SPEC,
        targets=["onnx"],
        precisions=["int8"],
        out=tmp_path / "i.bundle",
        gate_frames=gate_phantoms(),
        calibration=phantom_frames(range(200, 216)),
        gate=LOOSE,
        advanced=QUICK,
    )
    opened = Bundle.open(result.path)
    quant = json.loads(opened.read("quant.json"))
    decision = QuantDecision.from_json(quant["decision"])
    assert decision.set_id == opened.manifest.calibration_id == quant["ranges"]["set_id"]
    assert len(decision.quantized()) >= 48
    (verdict,) = result.verdicts
    assert {side.precision for side in verdict.sides} == {"fp32", "fp16", "int8"}
    sizes = {side.precision: side.size_bytes for side in verdict.sides}
    assert sizes["int8"] < 0.4 * sizes["fp32"]
    with Session.open(result.path) as session:
        assert session.predict(gate_phantoms().frames[0].frame).valid
