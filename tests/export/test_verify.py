"""Verifying: the full gate with the student, the golden gate without, and that a spoilt artefact is caught by both."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.conftest import Parts, child_environment
from tests.export.fake_world import SPEC, Bright, World, gate_phantoms, install, options
from tinyusfm_export.pipeline import export_bundle
from tinyusfm_export.verify.bundle import VerifyReport, verify_bundle
from tinyusfm_export.verify.engine_run import preprocess_all
from tinyusfm_export.verify.gate import Gate
from tinyusfm_runtime.bundle.arrays import unpack_arrays
from tinyusfm_runtime.bundle.golden import pack_golden
from tinyusfm_runtime.bundle.manifest import file_entry
from tinyusfm_runtime.bundle.reader import Bundle
from tinyusfm_runtime.errors import BundleError, EngineError, InputError, MissingExtra, TamperedError
from tinyusfm_runtime.session import Session

GOLDEN_GATE = Gate(min_frames=8)


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    """Fake targets ``fake`` and ``other``."""
    return install(monkeypatch)


@pytest.fixture
def bundle(world: World, tmp_path: Path) -> Path:
    """A published bundle with two levels."""
    return export_bundle(
        Bright(),
        SPEC,
        targets=["fake", "other"],
        precisions=["fp32"],
        out=tmp_path / "a.bundle",
        gate_frames=gate_phantoms(),
        advanced=options(rounds=1, runs=1),
    ).path


def spoilt(path: Path, out: Path, **recipe: object) -> Path:
    """The same bundle with the first artefact's weights changed and all hashes made right again."""
    bundle = Bundle.open(path)
    manifest = bundle.manifest
    files = {name: bundle.read(name) for name in manifest.files}
    first = manifest.artefacts[0]
    (name,) = first.files
    files[name] = json.dumps({**json.loads(files[name]), **recipe}).encode("ascii")
    artefact = replace(first, files={name: file_entry(files[name])})
    parts = Parts(spec=manifest.spec, artefacts=(artefact, *manifest.artefacts[1:]), files=files)
    return parts.publish(out, weights_sha256=manifest.weights_sha256)


def test_with_the_student_the_full_gate_runs_live(bundle: Path) -> None:
    report = verify_bundle(bundle, module=Bright(), frames=gate_phantoms())
    assert report
    assert report.live
    assert "full gate against the live PyTorch reference" in report.headline
    assert [check.name for check in report.checks] == ["fake-fp32", "other-fp32"]
    assert report.checks[0].report is not None
    assert report.checks[0].report.comparison.provenance["kind"] == "phantom"


def test_without_the_student_the_stored_reference_serves_and_is_never_called_full(bundle: Path) -> None:
    report = verify_bundle(bundle, gate=GOLDEN_GATE)
    assert report
    assert not report.live
    assert "not the full gate" in report.headline
    assert "quick check" in report.headline
    assert report.checks[0].report is not None
    assert "not recomputed" in report.checks[0].report.comparison.reference


def test_a_spoilt_weight_is_caught_live_and_golden(bundle: Path, tmp_path: Path) -> None:
    other = spoilt(bundle, tmp_path / "spoilt.bundle", shift=2.0)
    for report in (
        verify_bundle(other, module=Bright(), frames=gate_phantoms()),
        verify_bundle(other, gate=GOLDEN_GATE),
    ):
        assert not report
        assert "FAILED" in report.headline
        assert report.failures[0].startswith("fake-fp32: mean Dice")
        assert not any(text.startswith("other") for text in report.failures)


LIES: dict[str, dict[str, object]] = {
    "threshold": {"threshold": 0.95},
    "labels": {"labels": ("fetal_abdomen",)},
    "intended use": {"intended_use": "diagnosis"},
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES.keys())
def test_a_manifest_that_says_another_model_is_refused(bundle: Path, tmp_path: Path, lie: dict[str, object]) -> None:
    opened = Bundle.open(bundle)
    spec = opened.manifest.spec
    files = {name: opened.read(name) for name in opened.manifest.files}
    told = Parts(spec=replace(spec, **lie), artefacts=opened.manifest.artefacts, files=files)  # type: ignore[arg-type]
    lying = told.publish(tmp_path / "lying.bundle")
    assert verify_bundle(bundle, gate=GOLDEN_GATE) and verify_bundle(
        bundle, module=Bright(), spec=spec, gate=GOLDEN_GATE
    )
    for student in ({}, {"module": Bright()}, {"module": Bright(), "spec": spec}):
        report = verify_bundle(lying, gate=GOLDEN_GATE, **student)  # type: ignore[arg-type]
        assert not report and any("manifest" in failure for failure in report.failures)
    with pytest.raises(EngineError, match="manifest"):
        Session.open(lying)
    # whoever forges the golden answers as well is still caught by the student's own file
    prepared = preprocess_all(opened.golden_frames(), told.spec)
    for name in ("golden/reference.safetensors", *(artefact.golden for artefact in opened.manifest.artefacts)):
        files[name] = pack_golden(unpack_arrays(files[name], name)["logits"], told.spec, prepared)
    forged = replace(told, files=files).publish(tmp_path / "forged.bundle")
    report = verify_bundle(forged, module=Bright(), spec=spec, gate=GOLDEN_GATE)
    assert not report and any("student's own file" in failure for failure in report.failures)


def test_nan_is_caught(bundle: Path, tmp_path: Path) -> None:
    other = spoilt(bundle, tmp_path / "spoilt.bundle", poison=True)
    assert any("finite" in text for text in verify_bundle(other, gate=GOLDEN_GATE).failures)


def test_another_student_is_refused(bundle: Path) -> None:
    with pytest.raises(InputError, match="not the one this bundle was made of"):
        verify_bundle(bundle, module=Bright(), weights_sha256="ab" * 32, frames=gate_phantoms())


def test_frames_without_a_student_are_an_error_and_not_ignored(bundle: Path) -> None:
    with pytest.raises(InputError, match="student was not"):
        verify_bundle(bundle, frames=gate_phantoms())


def test_a_student_without_frames_is_run_on_the_golden_phantoms(bundle: Path) -> None:
    report = verify_bundle(bundle, module=Bright(), gate=GOLDEN_GATE)
    assert report and report.live
    assert report.checks[0].report is not None
    assert report.checks[0].report.comparison.provenance["kind"] == "golden"


def test_an_artefact_whose_engine_is_missing_is_told_apart_and_never_counts_as_passed(
    bundle: Path, world: World
) -> None:
    world.missing.add("fake")
    report = verify_bundle(bundle, gate=GOLDEN_GATE)
    assert report
    assert "1 could not run here" in report.headline
    assert "[fakelib]'" in report.checks[0].skipped
    world.missing.add("other")
    nothing = verify_bundle(bundle, gate=GOLDEN_GATE)
    assert not nothing
    assert nothing.failures == ("no artefact could be run here",)
    with pytest.raises(MissingExtra):
        verify_bundle(bundle, target="fake", gate=GOLDEN_GATE)


def test_one_artefact_can_be_chosen_and_an_unknown_one_lists_what_there_is(bundle: Path) -> None:
    assert [c.name for c in verify_bundle(bundle, target="other", gate=GOLDEN_GATE).checks] == ["other-fp32"]
    with pytest.raises(InputError, match="fake-fp32, other-fp32"):
        verify_bundle(bundle, precision="int8")


def test_too_few_golden_frames_fail_the_default_gate(bundle: Path) -> None:
    assert not verify_bundle(bundle)


def test_a_bundle_exported_without_a_gate_is_told_so(world: World, tmp_path: Path) -> None:
    path = export_bundle(
        Bright(),
        SPEC,
        targets=["fake"],
        precisions=["fp32"],
        out=tmp_path / "b.bundle",
        gate_frames=gate_phantoms(),
        gated=False,
        advanced=options(rounds=1, runs=1),
    ).path
    notes = verify_bundle(path, gate=GOLDEN_GATE).checks[0].notes
    assert "exported with its gate switched off" in notes
    assert "exported with other limits than those used here" in notes


def test_a_flipped_byte_is_refused_before_anything_runs(bundle: Path) -> None:
    file = bundle / "golden" / "reference.safetensors"
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.chmod(0o644)
    file.write_bytes(raw)
    with pytest.raises(TamperedError, match="reference.safetensors"):
        verify_bundle(bundle)


def test_golden_answers_that_do_not_belong_to_the_frames_are_refused(bundle: Path, tmp_path: Path) -> None:
    from tinyusfm_runtime.bundle.arrays import pack_arrays, unpack_arrays

    opened = Bundle.open(bundle)
    arrays = unpack_arrays(opened.read("golden/reference.safetensors"), "r")
    files = {name: opened.read(name) for name in opened.manifest.files}
    files["golden/reference.safetensors"] = pack_arrays({**arrays, "logits": arrays["logits"][:3]})
    parts = Parts(spec=opened.manifest.spec, artefacts=opened.manifest.artefacts, files=files)
    with pytest.raises(BundleError, match="each of its frames"):
        verify_bundle(parts.publish(tmp_path / "c.bundle"))


def test_the_report_is_plain_json_and_a_table(bundle: Path) -> None:
    report: VerifyReport = verify_bundle(bundle, gate=GOLDEN_GATE)
    data = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert data["passed"] is True
    assert data["live"] is False
    assert data["bundle_id"] == Bundle.open(bundle).manifest.bundle_id
    assert {row[0] for row in report.table()} == {"fake-fp32", "other-fp32"}


def test_verifying_without_a_student_imports_no_torch_and_no_onnx() -> None:
    code = (
        "import sys, tinyusfm_export.verify.bundle\n"
        "print(sorted(set(sys.modules) & {'torch', 'onnx', 'onnxruntime', 'openvino', 'typer', 'cv2', 'tomllib'}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=child_environment(), check=True
    )
    assert done.stdout.strip() == "[]"
