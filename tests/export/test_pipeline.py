"""The export story: what is published, in which order, and that nothing is when anything is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.export.fake_world import SPEC, STAGES, Bright, World, calibration_phantoms, gate_phantoms, install
from tinyusfm_calibration.ranges import Ranges
from tinyusfm_calibration.sets import NamedFrame, pixels_sha256
from tinyusfm_export.artefacts import plan_levels
from tinyusfm_export.pipeline import ExportOptions, ExportResult, export_bundle, module_sha256
from tinyusfm_export.verify import side_by_side
from tinyusfm_export.verify.gate import Gate
from tinyusfm_export.verify.gate_frames import GateFrames
from tinyusfm_runtime import plugins
from tinyusfm_runtime.bundle.reader import ArtefactState, Bundle
from tinyusfm_runtime.errors import (
    CalibrationError,
    EngineError,
    GateError,
    InputError,
    MissingExtra,
    OutputError,
    UnverifiedError,
)
from tinyusfm_runtime.frame import Frame
from tinyusfm_runtime.session import Session

Export = Callable[..., ExportResult]
QUICK = ExportOptions(rounds=2, runs=2)


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    """Fake targets ``fake`` and ``other``."""
    return install(monkeypatch)


@pytest.fixture
def export(world: World, tmp_path: Path) -> Export:
    """``export_bundle`` with everything that a test does not care about."""

    def run(**changes: Any) -> ExportResult:
        values: dict[str, Any] = {
            "targets": ["fake"],
            "precisions": ["fp32"],
            "out": tmp_path / "a.bundle",
            "gate_frames": gate_phantoms(),
            "advanced": QUICK,
        }
        values.update(changes)
        values["advanced"] = replace(values["advanced"], stages=STAGES)
        # brightness is no head: its ragged mask has several ellipses of nearly the same sum
        values.setdefault("gate", Gate(hc_p95_mm=30.0))
        return export_bundle(values.pop("module", Bright()), values.pop("spec", SPEC), **values)

    return run


def left_over(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_published_bundle_opens_and_answers_like_the_reference(export: Export) -> None:
    result = export()
    manifest = Bundle.open(result.path).manifest
    assert [artefact.name for artefact in manifest.artefacts] == ["fake-fp32"]
    assert manifest.artefacts[0].state is ArtefactState.VERIFIED
    assert manifest.weights_sha256 == module_sha256(Bright())
    assert manifest.calibration_id is None
    with Session.open(result.path) as session:
        prediction = session.predict(gate_phantoms().frames[0].frame)
    assert prediction.verified and prediction.valid


def test_the_manifest_says_which_frames_the_gate_saw(export: Export) -> None:
    gate = Bundle.open(export().path).manifest.artefacts[0].gate
    assert gate is not None
    assert gate["frames"]["kind"] == "phantom"
    assert gate["frames"]["count"] == 36
    assert gate["frames"]["pixels_sha256"][0] == pixels_sha256(gate_phantoms().frames[0].frame)
    assert gate["passed"] is True
    assert "PyTorch" in gate["reference"]


def test_two_targets_and_two_precisions_make_a_fallback_precision_first(export: Export) -> None:
    result = export(targets=["fake", "other"], precisions=["int8", "fp32"], calibration=calibration_phantoms())
    names = [artefact.name for artefact in Bundle.open(result.path).manifest.artefacts]
    assert names == ["fake-int8", "other-int8", "fake-fp32", "other-fp32"]
    assert plan_levels(["openvino", "ov"], ["int8", "int8"]) == [("ov", "int8")]


def test_int8_carries_one_decision_its_ranges_and_the_calibration_id(export: Export) -> None:
    result = export(targets=["fake", "other"], precisions=["int8"], calibration=calibration_phantoms())
    bundle = Bundle.open(result.path)
    quant = json.loads(bundle.read("quant.json"))
    assert quant["decision"]["tensors"].keys() == {"blur.input", "head.input"}
    assert quant["notes"] == []
    ranges = Ranges.from_json(quant["ranges"])
    assert bundle.manifest.calibration_id == ranges.set_id
    assert set(ranges.frame_sha256) == {pixels_sha256(named.frame) for named in calibration_phantoms()}


def test_decoder_layers_stay_float_on_all_targets_where_int8_there_misses_the_gate(
    export: Export, world: World
) -> None:
    world.decoder_off = 2.0
    result = export(targets=["fake", "other"], precisions=["int8"], calibration=calibration_phantoms())
    quant = json.loads(Bundle.open(result.path).read("quant.json"))
    assert quant["decision"]["tensors"].keys() == {"blur.input"}
    assert "1 layers are kept float" in quant["notes"][0] and "mean Dice" in quant["notes"][0]
    assert result.notes[:-1] == tuple(quant["notes"]) and "unchecked" in result.notes[-1]
    assert all(result.reports.values())


def test_without_a_gate_no_other_policy_is_tried(export: Export, world: World) -> None:
    world.decoder_off = 2.0
    result = export(precisions=["int8"], calibration=calibration_phantoms(), gated=False)
    assert not result.reports["fake-int8"]
    assert world.builds.count(("fake", "int8")) == 1


def test_stored_ranges_serve_without_frames(export: Export) -> None:
    first = export(precisions=["int8"], calibration=calibration_phantoms()).ranges
    assert first is not None
    again = export(precisions=["int8"], ranges=first)
    assert again.ranges == first


def test_int8_is_set_against_fp32_and_fp16_that_are_not_published(export: Export, world: World) -> None:
    result = export(precisions=["int8"], calibration=calibration_phantoms())
    (verdict,) = result.verdicts
    assert [(side.precision, side.published) for side in verdict.sides][0] == ("fp32", False)
    assert verdict.sides[-1].precision == "int8" and verdict.sides[-1].published
    bundle = Bundle.open(result.path)
    assert [artefact.name for artefact in bundle.manifest.artefacts] == ["fake-int8"]
    assert json.loads(bundle.read("reports/verdict-fake.json"))["recommendation"] == verdict.recommendation
    assert ("fake", "fp32") in world.builds


def test_an_artefact_that_misses_the_gate_is_not_published(export: Export, world: World, tmp_path: Path) -> None:
    world.off["fp32"] = 2.0
    with pytest.raises(GateError, match="fake-fp32: mean Dice") as caught:
        export()
    assert caught.value.exit_code == 1
    assert json.loads(json.dumps(caught.value.report.to_json()))["fake-fp32"]["passed"] is False  # type: ignore[attr-defined]
    assert left_over(tmp_path) == []


def test_one_bad_level_keeps_the_whole_fallback_back(export: Export, world: World, tmp_path: Path) -> None:
    world.off["int8"] = 2.0
    with pytest.raises(GateError, match="fake-int8"):
        export(precisions=["fp32", "int8"], calibration=calibration_phantoms())
    assert left_over(tmp_path) == []


def test_a_missed_gate_leaves_the_older_bundle_as_it_was(export: Export, world: World) -> None:
    before = Bundle.open(export().path).manifest.bundle_id
    world.off["fp32"] = 2.0
    with pytest.raises(GateError):
        export()
    assert Bundle.open(export(gated=False).path).manifest.bundle_id != before


def test_without_a_gate_the_bundle_says_so_and_opens_only_on_request(export: Export, world: World) -> None:
    world.off["fp32"] = 2.0
    path = export(gated=False).path
    artefact = Bundle.open(path).manifest.artefacts[0]
    assert not artefact.gated
    assert artefact.state is ArtefactState.UNVERIFIED
    assert artefact.gate is not None and artefact.gate["passed"] is False
    with pytest.raises(UnverifiedError):
        Session.open(path)
    with Session.open(path, allow_unverified=True) as session:
        assert not session.predict(gate_phantoms().frames[0].frame).verified


def test_a_good_artefact_without_a_gate_is_unverified_all_the_same(export: Export) -> None:
    artefact = Bundle.open(export(gated=False).path).manifest.artefacts[0]
    assert not artefact.trusted


@pytest.mark.parametrize("gated", [True, False])
def test_nan_is_never_published(export: Export, world: World, tmp_path: Path, gated: bool) -> None:
    world.poison.add("fp32")
    with pytest.raises((GateError, EngineError), match="finite"):
        export(gated=gated)
    assert left_over(tmp_path) == []


def test_an_artefact_that_answers_differently_every_time_is_never_published(
    export: Export, world: World, tmp_path: Path
) -> None:
    world.wobble.add("fp32")
    with pytest.raises((EngineError, GateError)):
        export(gated=False)
    assert left_over(tmp_path) == []


def test_a_gate_of_ones_own_decides(export: Export, world: World) -> None:
    world.off["fp32"] = 0.1
    strict = Gate(dice_mean=0.9999, dice_worst=0.9999)
    with pytest.raises(GateError):
        export(gate=strict)
    loose = Gate(dice_mean=0.5, dice_worst=0.1, hc_p95_mm=500.0, differing_pixels=0.5, min_frames=1, float_logits=1)
    assert Bundle.open(export(gate=loose).path).manifest.artefacts[0].gate["limits"]["dice_mean"] == 0.5  # type: ignore[index]


def test_too_few_frames_are_refused_before_anything_is_built(export: Export, world: World, tmp_path: Path) -> None:
    few = GateFrames(kind="phantom", frames=gate_phantoms().frames[:20], source="mine")
    with pytest.raises(GateError, match=r"needs 32 validation frames, mine has 20; .*min_frames = 20"):
        export(gate_frames=few)
    blank = replace(few.frames[0].frame, pixels=np.zeros_like(few.frames[0].frame.pixels))
    frames = (*few.frames, *(NamedFrame(id=f"blank{i}", frame=blank) for i in range(20)))
    with pytest.raises(GateError, match=r"needs 32 .* with a mask of the student .*has \d+ of 40; .*min_frames = \d+"):
        export(gate_frames=GateFrames(kind="phantom", frames=frames))
    assert left_over(tmp_path) == []


def test_int8_without_frames_or_ranges_is_an_error_and_no_fallback(export: Export, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="--data"):
        export(precisions=["int8"])
    assert left_over(tmp_path) == []


def test_calibration_frames_of_the_test_split_are_refused(export: Export) -> None:
    leaked = frozenset({pixels_sha256(calibration_phantoms()[3].frame)})
    with pytest.raises(CalibrationError, match="1 calibration frame"):
        export(
            precisions=["int8"],
            calibration=calibration_phantoms(),
            advanced=ExportOptions(test_sha256=leaked, rounds=1, runs=1),
        )


def test_stored_ranges_of_the_test_split_or_of_another_student_are_refused(export: Export) -> None:
    ranges = export(precisions=["int8"], calibration=calibration_phantoms()).ranges
    assert ranges is not None
    with pytest.raises(CalibrationError, match="test split"):
        export(
            precisions=["int8"], ranges=ranges, advanced=ExportOptions(test_sha256=frozenset(ranges.frame_sha256[:1]))
        )
    other = Ranges.from_json({**ranges.to_json(), "weights_sha256": "ab" * 32})
    with pytest.raises(CalibrationError, match="another student"):
        export(precisions=["int8"], ranges=other)
    lacking = Ranges.from_json({**ranges.to_json(), "tensors": {"elsewhere": [-1, 1]}})
    with pytest.raises(CalibrationError, match="lack 1 tensors"):
        export(precisions=["int8"], ranges=lacking)


@pytest.mark.parametrize("bad", ["flat", "few"])
def test_frames_that_cannot_calibrate_are_refused(export: Export, bad: str) -> None:
    frames = list(calibration_phantoms())
    if bad == "flat":
        frames.append(NamedFrame(id="black", frame=Frame(pixels=np.zeros((64, 64), np.uint8))))
    else:
        frames = frames[:8]
    with pytest.raises(CalibrationError, match="one colour|distinct"):
        export(precisions=["int8"], calibration=frames)


def test_names_of_data_files_do_not_enter_the_bundle(export: Export) -> None:
    private = tuple(
        NamedFrame(id=f"DOE_JANE_{i}.png", frame=named.frame) for i, named in enumerate(gate_phantoms().frames)
    )
    path = export(
        gate_frames=GateFrames(kind="data", frames=private, source="clinic A"),
        precisions=["int8"],
        calibration=[NamedFrame(id=f"DOE_JOHN_{i}", frame=n.frame) for i, n in enumerate(calibration_phantoms())],
    ).path
    assert not [file for file in path.rglob("*") if file.is_file() and b"DOE_J" in file.read_bytes()]


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"targets": ["nonsense"]}, InputError, "nonsense"),
        ({"precisions": ["int4"]}, InputError, "int4"),
        ({"targets": []}, InputError, "nothing to export"),
        ({"precisions": []}, InputError, "nothing to export"),
        ({"module": Bright().half()}, InputError, "float32"),
    ],
)
def test_what_cannot_be_exported_says_why_and_leaves_nothing(
    export: Export, tmp_path: Path, changes: dict[str, Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        export(**changes)
    assert left_over(tmp_path) == []


def test_a_missing_engine_names_its_extra(export: Export, world: World, tmp_path: Path) -> None:
    world.missing.add("fake")
    with pytest.raises(MissingExtra, match=r"pip install .+\[fakelib\]"):
        export()
    assert left_over(tmp_path) == []


def test_a_student_that_gives_nan_cannot_be_a_reference(export: Export) -> None:
    broken = Bright()
    with torch.no_grad():
        broken.blur.weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(InputError, match="cannot be a reference"):
        export(module=broken)


def test_an_output_that_cannot_be_written_is_named(export: Export, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError):
        export(out=tmp_path / "file" / "a.bundle")


def test_progress_runs_from_nought_to_one_and_names_each_artefact(export: Export) -> None:
    told: list[tuple[str, float]] = []
    export(targets=["fake", "other"], progress=lambda what, share: told.append((what, share)))
    shares = [share for _, share in told]
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    assert any("other fp32" in what for what, _ in told)


def test_the_student_is_left_as_it_was(export: Export) -> None:
    student = Bright().train()
    threads = torch.get_num_threads()
    export(module=student)
    assert student.training
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize(("times_ms", "first"), [((1.2, 1.0), "other"), ((1.0, 1.2), "fake"), ((1.1, 1.0), "fake")])
def test_an_exact_artefact_comes_first_where_it_is_clearly_the_fastest(
    world: World, export: Export, monkeypatch: pytest.MonkeyPatch, times_ms: tuple[float, float], first: str
) -> None:
    def measured(runners: dict[str, Any], inputs: Any, **rounds: int) -> dict[str, Any]:
        took = dict(zip(("fake-fp32", "other-fp32"), times_ms, strict=True))
        return {name: ((took.get(name, 1.0),),) * 2 for name in runners}

    engine = plugins.load("engines", "other")
    monkeypatch.setattr(engine, "EXACT", True, raising=False)
    monkeypatch.setattr(engine, "make_definition", engine.Engine, raising=False)
    monkeypatch.setattr(side_by_side, "measure_interleaved", measured)
    result = export(targets=["fake", "other"])
    assert Bundle.open(result.path).manifest.artefacts[0].target == first
    told = [note for note in result.notes if note.startswith("other-fp32 comes first: 1.20 times as fast as fake-fp32")]
    assert len(told) == (first == "other")
