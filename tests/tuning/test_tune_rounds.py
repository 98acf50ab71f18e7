"""Candidates in turns, what is kept of a killed run, and what a student becomes; no engine is timed here."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import NumpyEngine, Parts
from tinyusfm_edge.export import ExportRequest
from tinyusfm_edge.tuning.candidates import TuneCandidate, TuneVariant, list_candidates, thread_counts
from tinyusfm_edge.tuning.rounds import TuneState, kept, measure_rounds
from tinyusfm_edge.tuning.run import TuneRequest, measure_here
from tinyusfm_edge.tuning.variants import MISSED_NAME, combinations, export_variant, ready_bundles
from tinyusfm_edge.tuning.visit import VisitPlan, measure
from tinyusfm_runtime.device.machine import card_from_cpuinfo
from tinyusfm_runtime.errors import GateError, InputError, MissingExtra
from tinyusfm_runtime.session import Session
from tinyusfm_runtime.sources import open_source

ABOUT = {"machine": {"cpu": "a", "usable_cpus": 4}, "bundles": {"full": ["1"]}}


def answer(ms: float, *, passed: bool = True, verified: bool = True, count: int = 40) -> dict[str, Any]:
    """What a visit gives."""
    samples = {stage: [ms] * count for stage in ("preprocess_ms", "infer_ms", "postprocess_ms", "total_ms")}
    golden = {"passed": passed, "reasons": [] if passed else ["dice_mean 0.8 < 0.99"], "against": "reference",
              "numbers": {"dice_mean": 0.999}, "frames": 8}  # fmt: skip
    return {"samples_ms": samples, "golden": golden, "verified": verified, "invalid": 0, "description": "fake",
            "startup_ms": {"load": 1.0}, "conditions": {"load": 0.5, "peak_rss_mb": 80.0}}  # fmt: skip


def candidate(name: str, *, variant: str = "full", rank: int = 0) -> TuneCandidate:
    return TuneCandidate(
        variant=variant, rank=rank, bundle=Path("b"), artefact=name, target="onnx", precision="int8", engine="ort",
        threads=1,
    )  # fmt: skip


TIMES = {"a": 5.0, "b": 6.0, "c": 20.0, "wrong": 1.0, "broken": 2.0}


def visited(one: TuneCandidate) -> Mapping[str, Any]:
    if one.artefact == "broken":
        return {"error": "it crashed"}
    return answer(TIMES[one.artefact], passed=one.artefact != "wrong")


def test_later_rounds_go_to_what_is_fast_and_right_in_each_variant() -> None:
    candidates = [candidate(name) for name in TIMES] + [candidate("c", variant="other", rank=1)]
    state, seen = TuneState(place=None, about=ABOUT), Counter[str]()

    def visit(one: TuneCandidate) -> Mapping[str, Any]:
        seen[one.key] += 1
        return visited(one)

    shares: list[float] = []
    measure_rounds(candidates, state, visit, rounds=4, progress=lambda what, share: shares.append(share))
    assert seen == {
        "full/a/1/free": 4, "full/b/1/free": 4, "full/c/1/free": 1, "full/wrong/1/free": 1, "full/broken/1/free": 1,
        "other/c/1/free": 4,
    }  # fmt: skip
    assert shares[0] == 0.0 and shares[-1] == 1.0 and all(0 <= share <= 1 for share in shares)
    orders = {tuple(one["key"] for one in state.visits if one["round"] == number) for number in (1, 2, 3)}
    assert len(orders) > 1, "the order changes from round to round"
    assert [one.artefact for one in kept(candidates, state, 2)] == ["a", "b", "c"]


def test_a_killed_run_goes_on_and_measures_nothing_twice(tmp_path: Path) -> None:
    candidates = [candidate(name) for name in ("a", "b", "c")]
    place, seen = tmp_path / "state.json", []

    def visit(one: TuneCandidate) -> Mapping[str, Any]:
        if len(seen) == 4:
            raise KeyboardInterrupt
        seen.append(one.key)
        return visited(one)

    with pytest.raises(KeyboardInterrupt):
        measure_rounds(candidates, TuneState.open(place, ABOUT), visit, rounds=3)
    again = TuneState.open(place, ABOUT)
    assert len(again.visits) == 4
    more: list[str] = []
    measure_rounds(candidates, again, lambda one: more.append(one.key) or visited(one), rounds=3)  # type: ignore[func-returns-value]
    whole = TuneState(place=None, about=ABOUT)
    measure_rounds(candidates, whole, visited, rounds=3)
    assert [v["key"] for v in again.visits] == [v["key"] for v in whole.visits], "as if it had never been killed"
    assert len(more) == len(whole.visits) - 4
    measure_rounds(candidates, TuneState.open(place, ABOUT), lambda one: pytest.fail(one.key), rounds=3)


def test_a_state_of_something_else_and_a_damaged_one_are_refused(tmp_path: Path) -> None:
    place = tmp_path / "state.json"
    TuneState.open(place, ABOUT).add(0, "k", answer(1.0))
    with pytest.raises(InputError, match=r"something else \(bundles\): give --fresh"):
        TuneState.open(place, {**ABOUT, "bundles": {"full": ["2"]}})
    for text in ("{", "[]", json.dumps({"version": 1, "about": ABOUT, "visits": [{}]})):
        place.write_text(text, encoding="utf-8")
        with pytest.raises(InputError, match="cannot be read"):
            TuneState.open(place, ABOUT)
    place.write_text(json.dumps({"version": 2, "about": ABOUT, "visits": []}), encoding="utf-8")
    with pytest.raises(InputError, match="another version"):
        TuneState.open(place, ABOUT)


def test_candidates_are_artefacts_by_threads_and_pinning(
    engine_parts: Callable[[str], Parts], fake_parts: Parts, plug_in: type[NumpyEngine], tmp_path: Path
) -> None:
    full = TuneVariant.of(fake_parts.publish(tmp_path / "full.bundle"))
    found, left_out = list_candidates([[full]], (1, 2), (4, 5))
    assert [one.key for one in found] == [
        "full/fake-fp32/1/free", "full/fake-fp32/1/cpus 4", "full/fake-fp32/2/free",
    ]  # fmt: skip
    assert not left_out and {one.rank for one in found} == {0}
    found, _ = list_candidates([[full], [TuneVariant.of(full.bundle, "again")]], (1,), ())
    assert [(one.variant, one.rank) for one in found] == [("full", 0), ("again", 1)]
    with pytest.raises(InputError, match="two variants are named full"):
        list_candidates([[full], [full]], (1,), ())
    with pytest.raises(InputError, match="stands in two bundles"):
        list_candidates([[full, full]], (1,), ())


def test_an_engine_that_is_not_here_is_left_out_with_the_reason(fake_bundle: Path) -> None:
    with pytest.raises(InputError, match="nothing can be tried here: tiny/fake-fp32: "):
        list_candidates([[TuneVariant.of(fake_bundle)]], (1,), ())


@pytest.mark.parametrize(("cores", "wanted"), [(1, (1,)), (2, (1, 2)), (6, (1, 2, 4, 6)), (8, (1, 2, 4, 8))])
def test_threads_are_powers_of_two_and_all_cores(
    cores: int, wanted: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tinyusfm_runtime.device.machine._usable_cpus", lambda: cores)
    text = "\n\n".join(f"processor : {i}\nphysical id : 0\ncore id : {i}\nflags : avx2" for i in range(cores))
    assert thread_counts(card_from_cpuinfo(text, "x86_64")) == wanted


def test_a_visit_checks_the_golden_frames_and_keeps_every_sample(
    fake_bundle: Path, plug_in: type[NumpyEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_source("phantom:0-1") as source:
        frames = list(source)
    with Session.open(fake_bundle) as session:
        found = measure(session, frames, VisitPlan(runs=12, seconds=100.0))
        assert found["golden"]["passed"] and found["golden"]["against"] == "reference" and found["verified"]
        assert {len(values) for values in found["samples_ms"].values()} == {12} and not found["invalid"]
        short = measure(session, frames, VisitPlan(runs=500, seconds=0.0))
        assert len(short["samples_ms"]["total_ms"]) == 8, "so many are made however slow it is"
        monkeypatch.setattr(plug_in, "bend", staticmethod(lambda outputs: {"logits": -outputs["logits"]}))
        assert not measure(session, frames, VisitPlan(runs=1))["golden"]["passed"], "a wrong answer misses the gate"


def test_a_row_that_misses_the_gate_on_this_machine_is_never_picked(
    fake_parts: Parts, plug_in: type[NumpyEngine], tmp_path: Path
) -> None:
    bundles = [fake_parts.publish(tmp_path / f"{name}.bundle") for name in ("full", "twin")]
    request = TuneRequest(words=tuple(map(str, bundles)), budget_ms=10.0, out=tmp_path, threads=(1,), rounds=2)
    found = [variant for word in request.words if (variant := ready_bundles(word)) is not None]

    def visit(one: TuneCandidate) -> Mapping[str, Any]:
        return answer(2.0 if one.variant == "full" else 4.0, passed=one.variant == "twin")

    report = measure_here(request, found, timed=visit)
    assert report.choice.pick is not None and report.choice.pick.candidate.variant == "twin"
    missed = next(row for row in report.rows if row.candidate.variant == "full")
    assert "misses the gate on the golden frames here: dice_mean" in missed.why_not
    assert 'targets = ["fake"]' in report.recipe or '"fake"' in report.recipe


def test_words_are_bundles_folders_of_them_or_students(
    fake_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = ready_bundles(str(fake_bundle))
    assert one is not None and one.name == "tiny" and one.bundles == (fake_bundle,)
    folder = ready_bundles(str(fake_bundle.parent))
    assert folder is not None and folder.bundles == (fake_bundle,) and folder.name == fake_bundle.parent.name
    monkeypatch.setattr("tinyusfm_edge.tuning.variants.find_spec", lambda name: object())
    assert ready_bundles("fetal-head") is None, "where torch is, a bare name is a student"
    monkeypatch.setattr("tinyusfm_edge.tuning.variants.find_spec", lambda name: None)
    shipped = ready_bundles("fetal-head")
    assert shipped is not None and shipped.name == "fetal-head", "where it is not, the bundle that ships"
    with pytest.raises(InputError, match="a folder without a bundle"):
        ready_bundles(str(tmp_path))


def test_targets_and_precisions_come_from_the_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime", reason="install tinyusfm-edge[onnxruntime]")
    monkeypatch.setattr("tinyusfm_runtime.plugins.names", lambda kind: ["integer", "ort"])
    assert combinations(("onnx",), ()) == [("onnx", "int8"), ("onnx", "fp32")]
    assert ("onnx", "int8") in combinations((), ("int8",))
    assert combinations(("onnxruntime",), ("fp16", "w4")) == [("onnx", "fp16")]
    with pytest.raises(InputError, match="nothing|no target"):
        combinations(("onnx",), ("w4",))
    with pytest.raises(InputError, match="no target named"):
        combinations(("none_such",), ())


def test_a_student_is_exported_once_and_what_missed_is_remembered(fake_parts: Parts, tmp_path: Path) -> None:
    seen: list[tuple[str, ...]] = []

    def export(request: ExportRequest, progress: object) -> None:
        seen.append((*request.targets, *request.precisions))
        if request.precisions == ("int8",):
            raise GateError("dice_mean 0.8 < 0.99", None)
        assert request.out is not None
        fake_parts.publish(request.out)

    pairs = [("onnx", "int8"), ("onnx", "fp32")]
    for _ in range(2):
        found = export_variant("mine.safetensors", tmp_path, pairs, export, ExportRequest())
        assert found.name == "mine" and [path.name for path in found.bundles] == ["mine-onnx-fp32.bundle"]
        assert found.missed == {"onnx-int8": "dice_mean 0.8 < 0.99"}
    assert seen == [("onnx", "int8"), ("onnx", "fp32")] and (tmp_path / MISSED_NAME).is_file()
    with pytest.raises(InputError, match="nothing of it passed its gate"):
        export_variant("mine.safetensors", tmp_path, pairs[:1], export, ExportRequest())


def test_bundles_of_another_student_or_other_data_are_not_taken(fake_parts: Parts, tmp_path: Path) -> None:
    def export(request: ExportRequest, progress: object) -> None:
        assert request.out is not None
        fake_parts.publish(request.out)

    student, folder = tmp_path / "mine.safetensors", tmp_path / "variants"
    student.write_bytes(b"first")
    folder.mkdir()
    pairs = [("onnx", "int8")]
    export_variant(str(student), folder, pairs, export, ExportRequest())
    export_variant(str(student), folder, pairs, export, ExportRequest())
    with pytest.raises(InputError, match=r"something else \(data\): give --fresh"):
        export_variant(str(student), folder, pairs, export, ExportRequest(data=tmp_path))
    student.write_bytes(b"second")
    with pytest.raises(InputError, match=r"something else \(student\)"):
        export_variant(str(student), folder, pairs, export, ExportRequest())


def test_what_was_not_installed_is_tried_again(fake_parts: Parts, tmp_path: Path) -> None:
    installed = False

    def export(request: ExportRequest, progress: object) -> None:
        if request.precisions == ("int8",) and not installed:
            raise MissingExtra("this export", "onnxruntime", "onnxruntime")
        assert request.out is not None
        fake_parts.publish(request.out)

    pairs = [("onnx", "int8"), ("onnx", "fp32")]
    found = export_variant("mine.safetensors", tmp_path, pairs, export, ExportRequest())
    assert "onnxruntime" in found.missed["onnx-int8"] and len(found.bundles) == 1
    installed = True
    found = export_variant("mine.safetensors", tmp_path, pairs, export, ExportRequest())
    assert not found.missed and len(found.bundles) == 2
