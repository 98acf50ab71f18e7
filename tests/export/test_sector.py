"""Pruning to a sector: equal to PyTorch without the same patches; refused frames, fallback, and a wrong gather."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.export.students import make_student
from tests.export.test_integer_target import calm, decided
from tests.phantoms import phantom
from tests.plugged import plug_in_module, plugged
from tinyusfm_calibration.sets import NamedFrame
from tinyusfm_edge.cli.main import main
from tinyusfm_export.graph.build import build_graph
from tinyusfm_export.onnx_files.writer import write_onnx
from tinyusfm_export.pipeline import ExportOptions, ExportResult, check_pruned, export_bundle
from tinyusfm_export.quantize.decision import float_decision
from tinyusfm_export.verify.artefact import Checks, build_checked
from tinyusfm_export.verify.bundle import verify_bundle
from tinyusfm_export.verify.expected import expect, expect_golden
from tinyusfm_export.verify.gate import Gate
from tinyusfm_export.verify.gate_frames import GateFrames
from tinyusfm_export.verify.reference import normalise
from tinyusfm_export.verify.sector import masked_frames, masked_gate_frames, pruned_reference
from tinyusfm_runtime.bundle.manifest import GOLDEN_SECTOR
from tinyusfm_runtime.bundle.reader import Bundle
from tinyusfm_runtime.errors import BundleError, GateError, InputError, SectorError, UnsupportedError
from tinyusfm_runtime.frame import Frame
from tinyusfm_runtime.live.fallback import Fallback
from tinyusfm_runtime.live.watchdog import CallLimits
from tinyusfm_runtime.overlay import encode_png
from tinyusfm_runtime.reading_rules import TokenSector
from tinyusfm_runtime.session import Session
from tinyusfm_runtime.spec import ModelSpec, PostProcess

KEPT = ("00111100", "01111110", "11111111", "11111111", "01111110", "00011000")
SECTOR = TokenSector(name="fan", kept=KEPT)
LENIENT = Gate(dice_mean=0.0, dice_worst=0.0, differing_pixels=1.0, min_coverage=0.0, min_frames=1)
LIBRARIES = {
    "onnx": ("onnx", "onnxruntime"),
    "openvino": ("onnx", "openvino"),
    "integer": (),
    "litert": ("tflite", "ai_edge_litert"),
    "coreml": ("coremltools",),
}
"""Target -> what its artefacts are written and run with."""
LIMITS = CallLimits(deadline_ms=60_000, give_up_ms=120_000, grace_ms=1000)


def student_of(task: str = "segment", **changes: Any) -> tuple[nn.Module, ModelSpec]:
    """A small student of a rectangle of 6x8 patches, with its sector."""
    student, spec = make_student(task, image_size=96, image_width=128, **changes)
    post = PostProcess.MASK if task == "segment" else PostProcess.NONE
    return student, replace(spec, sector=SECTOR, postprocess=post)


def codes_of(seed: int = 0) -> torch.Tensor:
    """A noisy input, bright outside the sector too."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (1, 1, 96, 128), generator=generator).float()


@pytest.mark.parametrize(
    ("task", "changes"),
    [
        ("segment", {}),
        ("segment", {"seg_head": "lite"}),
        ("classify", {"num_classes": 3}),
        ("features", {}),
    ],
)
def test_the_pruned_graph_is_the_student_without_these_patches(task: str, changes: dict[str, Any]) -> None:
    student, spec = student_of(task, **changes)
    pruned, whole = build_graph(student, spec, pruned=True), build_graph(student, spec)
    image = normalise(codes_of(), spec.preprocess)
    with torch.no_grad():
        want = pruned_reference(student, spec)(image)
        assert float((pruned.module(codes_of())[0] - want).abs().max()) < 1e-4
        assert float((whole.module(codes_of())[0] - student(image)).abs().max()) < 1e-4
        assert float((want - student(image)).abs().max()) > 1e-2, "or the patches would not matter"
    outside = codes_of()
    outside[0, 0][~torch.from_numpy(SECTOR.pixels_HW)] = 7.0
    with torch.no_grad():
        assert torch.equal(pruned.module(codes_of())[0], pruned.module(outside)[0]), "it looks at no other patch"


def test_a_graph_that_is_not_pruned_is_what_it_was() -> None:
    student, spec = student_of()
    plain = build_graph(student, replace(spec, sector=None))
    assert write_onnx(build_graph(student, spec)) == write_onnx(plain)
    with pytest.raises(InputError, match="no sector"):
        build_graph(student, replace(spec, sector=None), pruned=True)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("target", ["onnx", "openvino", "litert", "coreml"])
def test_artefacts_equal_pytorch_and_a_wrong_gather_is_caught(target: str) -> None:
    for library in LIBRARIES[target]:
        pytest.importorskip(library, reason=f"needs {library}")
    student, spec = student_of()
    frames = masked_frames(phantoms(), spec)
    named = tuple(NamedFrame(id=str(i), frame=frame) for i, frame in enumerate(frames))
    checks = Checks(
        gate=Gate(min_frames=1),
        frames=expect(student, spec, GateFrames(kind="data", frames=named)),
        golden=expect_golden(pruned_reference(student, spec), spec, frames),
        threads=1,
    )
    right = build_checked(target, build_graph(student, spec, pruned=True), float_decision("fp32"), checks)
    for got, want in zip(right.golden, checks.golden.outputs, strict=True):
        np.testing.assert_allclose(got.logits, want.logits, atol=2e-3)
    assert right.name == f"{target}-fp32-sector" and right.requirements["sector"] == "fan"
    check_pruned([right], checks, Gate(), spec)
    turned = replace(SECTOR, kept=tuple(row[::-1] for row in KEPT[::-1]))
    wrong = build_graph(student, replace(spec, sector=turned), pruned=True)
    made = build_checked(target, wrong, float_decision("fp32"), checks)
    with pytest.raises(GateError, match="without the patches"):
        check_pruned([made], checks, Gate(), spec)


def phantoms() -> list[Frame]:
    """Phantoms of the input's shape."""
    return [phantom(seed).frame for seed in range(4)]


@pytest.fixture(scope="module", params=["onnx", "integer", "litert"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ExportResult:
    """A bundle with a pruned artefact and the whole one behind it."""
    return export(tmp_path_factory.mktemp("sector") / "a.bundle", request.param)


def export(out: Path, target: str = "onnx", gate: Gate = LENIENT, **changes: Any) -> ExportResult:
    """Exports a small student with its sector."""
    for library in LIBRARIES[target]:
        pytest.importorskip(library, reason=f"needs {library}")
    student, spec = student_of()
    options = ExportOptions(rounds=1, runs=1, compare=False, sector=SECTOR, **changes)
    named = tuple(NamedFrame(id=str(i), frame=frame) for i, frame in enumerate(phantoms()))
    calibration = [NamedFrame(id=f"c{i}", frame=phantom(i).frame) for i in range(8, 24)]
    return export_bundle(
        student,
        replace(spec, sector=None),
        targets=[target],
        precisions=["int8" if target == "integer" else "fp32"],
        calibration=calibration if target == "integer" else None,
        out=out,
        gate_frames=GateFrames(kind="data", frames=named, source="phantoms"),
        gate=gate,
        advanced=options,
    )


def inside_and_outside() -> tuple[Frame, Frame]:
    """A frame that lies in the sector, and one that fills the whole input."""
    noise = np.random.default_rng(2).integers(20, 250, (96, 128)).astype(np.uint8)
    return Frame(pixels=np.where(SECTOR.pixels_HW, noise, 0).astype(np.uint8)), Frame(pixels=noise, seq=7)


def test_a_bundle_has_both_and_each_is_found_by_its_name(exported: ExportResult) -> None:
    whole_name, precision = exported.artefacts[1].name, exported.artefacts[1].precision
    assert exported.artefacts[0].name == f"{whole_name}-sector" and len(exported.artefacts) == 2
    target = exported.verdicts[1].target
    assert [verdict.target for verdict in exported.verdicts] == [f"{target}-sector", target]
    bundle = Bundle.open(exported.path)
    assert bundle.manifest.spec.sector == SECTOR and GOLDEN_SECTOR in bundle.manifest.files
    fits, differs = inside_and_outside()
    with (
        Session.open(bundle, precision=precision) as whole,
        Session.open(bundle, precision=f"{precision}-sector") as pruned,
    ):
        assert not whole.artefact.sector and pruned.artefact.sector == "fan"
        assert whole.predict(differs).valid and pruned.predict(fits).valid
        assert pruned.run_golden(full=True)
        with pytest.raises(SectorError, match=f"open {whole_name}, or run with --fallback"):
            pruned.predict(differs)
    with Session.open(bundle) as first:
        assert first.artefact.sector, "the first one is the fast one"


def test_a_frame_of_another_sector_is_answered_by_the_whole_artefact_and_that_is_flagged(
    exported: ExportResult,
) -> None:
    fits, differs = inside_and_outside()
    events: list[Any] = []
    with Fallback.open(exported.path) as levels:
        assert levels.answer(fits, LIMITS, events.append).level == 0 and not events
        answered = levels.answer(differs, LIMITS, events.append)
        assert answered.level == 1 and answered.prediction is not None and answered.prediction.valid
        assert "another sector" in events[-1].reason and events[-1].seq == 7
        assert levels.answer(fits, LIMITS, events.append).level == 1, "it never switches back by itself"
        levels.request(0)
        levels.between_frames(LIMITS, events.append)
        assert levels.answer(fits, LIMITS, events.append).level == 0


def test_run_says_what_to_do_with_frames_of_another_sector(
    exported: ExportResult, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.png").write_bytes(encode_png(inside_and_outside()[1].pixels))
    assert main(["run", str(exported.path), str(tmp_path / "a.png")]) == 0
    said = capsys.readouterr()
    target, precision = exported.artefacts[1].name.split("-")
    assert "misplaced 1" in said.out
    assert f"with --fallback, or with --target {target} --precision {precision}" in said.err


def test_tune_times_the_pruned_artefact_and_its_recipe_opens_it(
    exported: ExportResult, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["tune", str(exported.path), "--out", str(tmp_path / "o"), "--threads", "1", "--no-pin", "--rounds", "1"]
    assert main([*words, "--runs", "40", "--budget-ms", "60000", "--source", "phantom:0-1"]) == 0
    rows = {row["artefact"]: row for row in json.loads((tmp_path / "o" / "tune.json").read_text())["rows"]}
    assert not any(row["why_not"] for row in rows.values()), rows
    pruned, whole = (artefact.name for artefact in exported.artefacts)
    assert {name: row["description"].split(" on ")[0] for name, row in rows.items()} == {pruned: pruned, whole: whole}
    (tmp_path / "a.png").write_bytes(encode_png(inside_and_outside()[0].pixels))
    recipe = json.loads((tmp_path / "o" / "tune.json").read_text())["recipe"]
    for sector, engine in ((True, f"{pruned} on "), (False, f"{whole} on ")):
        text = recipe.replace("sector = true\n", "") + ("sector = true\n" if sector else "")
        (tmp_path / "recipe.toml").write_text(text, encoding="utf-8")
        assert (
            main(["run", str(exported.path), str(tmp_path / "a.png"), "--recipe", str(tmp_path / "recipe.toml")]) == 0
        )
        assert engine in capsys.readouterr().out


def test_without_a_whole_artefact_it_is_an_error(tmp_path: Path) -> None:
    alone = export(tmp_path / "b.bundle", sector_only=True)
    assert [artefact.name for artefact in alone.artefacts] == ["onnx-fp32-sector"]
    with Fallback.open(alone.path) as levels, pytest.raises(SectorError, match="no artefact that looks at all"):
        levels.answer(inside_and_outside()[1], LIMITS, lambda event: None)


def test_the_error_of_a_student_that_does_not_cope_says_how_to_train_it(tmp_path: Path) -> None:
    strict = replace(LENIENT, dice_mean=0.9999)
    with pytest.raises(GateError, match="missed by onnx-fp32-sector: mean Dice .*drop_tokens=0.6.*leave --sector out"):
        export(tmp_path / "b.bundle", gate=strict)
    assert not list(tmp_path.iterdir())


def test_verify_masks_frames_alike_and_holds_both_against_their_references(exported: ExportResult) -> None:
    student, spec = student_of()
    named = tuple(NamedFrame(id=str(i), frame=frame) for i, frame in enumerate(phantoms()))
    frames = GateFrames(kind="data", frames=named, source="phantoms")
    quick = verify_bundle(exported.path, gate=LENIENT)
    live = verify_bundle(exported.path, module=student, spec=replace(spec, sector=None), frames=frames, gate=LENIENT)
    assert quick and live, (quick.failures, live.failures)
    reports = [check.report for check in live.checks]
    assert reports[0] is not None and "masked to sector fan" in reports[0].comparison.provenance["source"]
    dices = [report.comparison.statistics["dice_mean"] for report in reports if report is not None]
    assert dices[0] < dices[1], "what pruning costs is in the gate of the pruned artefact"


def test_a_sector_of_another_place_is_caught_in_integers_too() -> None:
    student, spec = make_student()
    rows = ("01110", "11111", "11111", "01110", "00000")
    spec = replace(spec, sector=replace(SECTOR, kept=rows), postprocess=PostProcess.MASK)
    frames = masked_frames(phantoms(), spec)
    named = tuple(NamedFrame(id=str(i), frame=frame) for i, frame in enumerate(frames))
    loose = Gate(dice_mean=0.95, dice_worst=0.9, hc_p95_mm=1000.0, differing_pixels=0.1, min_coverage=0.0, min_frames=1)
    decision = decided(build_graph(calm(student), spec))
    checks = Checks(
        gate=loose,
        frames=expect(student, spec, GateFrames(kind="data", frames=named)),
        golden=expect_golden(pruned_reference(student, spec), spec, frames),
        threads=1,
    )
    right = build_checked("integer", build_graph(student, spec, pruned=True), decision, checks)
    assert right.name == "integer-int8-sector" and right.requirements["sector"] == "fan" and not right.tolerance
    check_pruned([right], checks, loose, spec)
    turned = replace(SECTOR, kept=rows[::-1])
    wrong = build_graph(student, replace(spec, sector=turned), pruned=True)
    with pytest.raises(GateError, match="without the patches"):
        check_pruned([build_checked("integer", wrong, decision, checks)], checks, loose, spec)


def test_targets_that_cannot_prune_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Whole:
        """A target that writes whole graphs alone."""

        name, suffix, precisions = "whole", ".whole", ("int8",)

    plugged(monkeypatch, "targets", whole=plug_in_module("whole", Target=Whole))
    student, spec = student_of()
    named = tuple(NamedFrame(id=str(i), frame=frame) for i, frame in enumerate(phantoms()))
    with pytest.raises(UnsupportedError, match="whole does not write graphs that are pruned"):
        export_bundle(
            student,
            replace(spec, sector=None),
            targets=["whole"],
            precisions=["int8"],
            out=tmp_path / "c.bundle",
            gate_frames=GateFrames(kind="data", frames=named),
            advanced=ExportOptions(sector=SECTOR),
        )


def test_masked_frames_are_black_outside_and_of_the_inputs_size() -> None:
    _, spec = student_of()
    (first, *_) = masked_frames(phantoms(), spec)
    assert first.pixels.shape == (96, 128) and not first.pixels[~SECTOR.pixels_HW].any() and first.pixels.any()
    with pytest.raises(InputError, match="not cropped"):
        masked_frames(phantoms(), replace(spec, preprocess=replace(spec.preprocess, crop=(0, 0, 32, 32))))
    plain = replace(spec, sector=None)
    given = GateFrames(kind="data", frames=(NamedFrame(id="0", frame=phantoms()[0]),))
    assert masked_gate_frames(given, plain) is given


def test_the_spec_holds_a_sector_strictly_and_says_nothing_without_one() -> None:
    _, spec = student_of()
    assert ModelSpec.from_json(spec.to_json()) == spec
    assert "sector" not in replace(spec, sector=None).to_json()
    for wrong in (None, {"name": "fan"}, {"name": "fan", "kept": ["10"]}):
        with pytest.raises(InputError):
            ModelSpec.from_json({**spec.to_json(), "sector": wrong})


@pytest.mark.parametrize("change", [{"sector": 3}, {"sector": ""}, {"sector": "other"}])
def test_an_artefact_of_another_sector_is_refused(exported: ExportResult, change: dict[str, Any]) -> None:
    artefact = exported.artefacts[0]
    manifest = Bundle.open(exported.path).manifest
    with pytest.raises(BundleError, match="sector"):
        changed = replace(artefact, requirements={**artefact.requirements, **change})
        replace(manifest, artefacts=(changed, *exported.artefacts[1:]))


def test_the_manifest_on_disk_names_the_patches(exported: ExportResult) -> None:
    written: dict[str, Any] = json.loads((exported.path / "manifest.json").read_text(encoding="ascii"))
    kept: Sequence[str] = written["spec"]["sector"]["kept"]
    assert list(kept) == list(KEPT)
