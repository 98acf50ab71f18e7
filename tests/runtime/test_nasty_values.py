"""Readers of files that somebody else wrote: whatever stands in them, what comes out is usable or one clear error."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.conftest import Parts, tiny_spec
from tinyusfm_runtime.bundle.golden import golden_check
from tinyusfm_runtime.bundle.manifest import Manifest, _self_hash, read_manifest
from tinyusfm_runtime.bundle.reader import Bundle
from tinyusfm_runtime.errors import BundleError, EdgeError, InputError
from tinyusfm_runtime.sinks.audit.chain import verify_file
from tinyusfm_runtime.spec import ModelSpec, PostProcess, PreprocessSpec, Task
from tinyusfm_runtime.strict_json import MAX_DEPTH, check_values, parse_json

NASTY: list[Any] = [
    10**400, -(10**400), 1 << 63, -1, 0, 1e308, -0.0, True, None, "", "abcd", "\x00", "../..", [], {}, [[[]]],
    [None] * 3, {"a": []}, [10**400], ["x"] * 5, 2.5, "nan",
]  # fmt: skip


def spoilt(data: st.DataObject, document: Any) -> Any:
    """A document with one value, somewhere, replaced by a nasty one, or one key taken away."""
    made = copy.deepcopy(document)
    place = made
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = data.draw(st.sampled_from(keys))
        if isinstance(place[key], dict | list) and place[key] and data.draw(st.booleans()):
            place = place[key]
            continue
        if isinstance(place, dict) and data.draw(st.integers(0, 9)) == 0:
            del place[key]
        else:
            place[key] = data.draw(st.sampled_from(NASTY))
        return made


def outcome(work: Callable[[], Any]) -> None:
    """Either it works, or the error is one of ours, in one line."""
    try:
        work()
    except EdgeError as error:
        assert "\n" not in str(error) and len(str(error)) < 2000


def given_nasty(test: Callable[..., None]) -> Callable[..., None]:
    quick = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    return quick(given(st.data())(test))


@given_nasty
def test_a_model_spec(data: st.DataObject) -> None:
    document = json.loads(json.dumps(tiny_spec(preprocess=PreprocessSpec(crop=(0, 0, 32, 32))).to_json()))
    outcome(lambda: ModelSpec.from_json(spoilt(data, document)))


@given_nasty
def test_a_manifest_with_correct_hashes(fake_parts: Parts, fake_bundle: Path, data: st.DataObject) -> None:
    document = spoilt(data, json.loads((fake_bundle / "manifest.json").read_text(encoding="utf-8")))
    try:
        document["manifest_sha256"] = _self_hash(document)
        raw = (json.dumps(document, sort_keys=True, indent=1) + "\n").encode()
    except (TypeError, ValueError, AttributeError):
        return
    outcome(lambda: read_manifest(raw))
    outcome(lambda: Manifest.from_json(document))


@given_nasty
def test_gates_recipes_ranges_sets_and_calibration_files(tmp_path: Path, data: st.DataObject) -> None:
    pytest.importorskip("torch")
    from tinyusfm_calibration.ranges import Ranges
    from tinyusfm_calibration.sets import CalibrationSet
    from tinyusfm_export.quantize.calibration_file import CalibrationFile
    from tinyusfm_export.quantize.range_choice import Preparation
    from tinyusfm_export.quantize.sensitivity import Sensitivity
    from tinyusfm_export.verify.gate import Gate

    documents: list[tuple[Callable[[Any], Any], Any]] = [
        (Gate.from_json, Gate().to_json()),
        (Ranges.from_json, RANGES),
        (CalibrationSet.from_json, {"version": 1, "frames": [{"id": "a", "sha256": "b"}], "id": "x"}),
        (CalibrationFile.from_json, {"kind": "tinyusfm-edge calibration", "version": 1, "ranges": RANGES}),
        (Preparation.from_json, Preparation(divisors={"a": np.ones(2, np.float32)}, means={}).to_json()),
        (Sensitivity.from_json, {"version": 1, "weights_sha256": "x", "rows": [{"layer": "a", "cost": 1.0}]}),
    ]
    read, document = data.draw(st.sampled_from(documents))
    made = data.draw(st.sampled_from(NASTY)) if data.draw(st.integers(0, 5)) == 0 else spoilt(data, document)
    outcome(lambda: read(made))
    path = tmp_path / "gate.json"
    path.write_text(json.dumps(made), encoding="utf-8")
    outcome(lambda: Gate.from_file(path))


RANGES = {
    "version": 1,
    "weights_sha256": "ab" * 32,
    "tensors": {"a": [-1.0, 1.0]},
    "method": "percentile",
    "set_id": "x",
    "frame_sha256": ["cd" * 32],
}


@pytest.mark.parametrize(
    "text", ["[" * 100_000, "1" + "0" * 400, "NaN", "1e999", '{"a": 1, "a": 2}', '"\\u0000"', "", "\ufeff{}", "{"]
)
def test_surprises_are_value_errors(text: str) -> None:
    with pytest.raises(ValueError):
        parse_json(text)
    with pytest.raises(ValueError):
        parse_json(text.encode())


def test_what_is_plain_passes_and_depth_is_bounded() -> None:
    plain = {"a": [1, 2.5, None, True, "x"], "b": {"c": -(1 << 63)}}
    assert parse_json(json.dumps(plain)) == plain
    deep: Any = 1
    for _ in range(MAX_DEPTH + 1):
        deep = [deep]
    with pytest.raises(ValueError, match="deeper"):
        check_values(deep)


def test_an_audit_log_of_brackets_is_a_fault_and_not_a_traceback(tmp_path: Path) -> None:
    (tmp_path / "log").write_bytes(b"[" * 60_000 + b"\n")
    assert not verify_file(tmp_path / "log")
    (tmp_path / "log").write_bytes(b'{"n": 1' + b"0" * 400 + b"}\n")
    assert not verify_file(tmp_path / "log")


@pytest.mark.parametrize("tolerance", [{"logit_abs": 1e308}, {"logit_abs": 10**400}, {"hc_mm": 6}, {"else": 1}])
def test_no_manifest_switches_the_start_up_check_off(fake_parts: Parts, tolerance: dict[str, Any]) -> None:
    with pytest.raises(BundleError, match="tolerance"):
        replace(fake_parts.artefacts[0], tolerance=tolerance)


def test_a_wide_tolerance_is_held_against_the_spread_of_the_answers() -> None:
    want = np.linspace(-3, 3, 64, dtype=np.float32).reshape(1, 64)
    features = tiny_spec(task=Task.FEATURES, postprocess=PostProcess.NONE)
    assert golden_check(want + 2.9, want, features, [], {"logit_abs": 900.0})
    assert not golden_check(want + 3.1, want, features, [], {"logit_abs": 900.0})


def test_golden_answers_without_axes_are_a_broken_bundle(fake_parts: Parts, tmp_path: Path) -> None:
    from tinyusfm_runtime.bundle.arrays import pack_arrays

    golden = fake_parts.artefacts[0].golden
    parts = replace(fake_parts, files={**fake_parts.files, golden: pack_arrays({"logits": np.float32(1.0)})})
    with pytest.raises((BundleError, InputError), match="logits"):
        bundle = Bundle.open(parts.publish(tmp_path / "b"))
        bundle.golden_outputs(bundle.manifest.artefacts[0])


COREPARTS = {"version": 1, "places": ["."], "splits": ["train"], "chosen": [{"id": "a"}], "frame_stride": 1}


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000, '{"a":' * 50_000, "9" * 5000, "null", "[]", '{"version": NaN}', "",
        *(json.dumps({**COREPARTS, key: value}) for key, value in [
            ("places", [3]), ("places", ["\0"]), ("places", None), ("splits", 3), ("splits", None),
            ("chosen", {"a": 1}), ("chosen", None), ("frame_stride", 1e300),
            ("frame_stride", None), ("reading", 3), ("reading", {"x": 1}), ("version", True),
        ]),
        json.dumps({key: value for key, value in COREPARTS.items() if key != "splits"}),
    ],
    ids=range(20),
)  # fmt: skip
def test_a_coreset_of_nonsense_is_one_line(text: str, tmp_path: Path) -> None:
    from tinyusfm_edge.data.images import list_rows

    (tmp_path / "coreset.json").write_text(text)
    with pytest.raises(EdgeError) as caught:
        list_rows([tmp_path / "coreset.json"])
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    "text", ["a = " + "[" * 5000, "a = inf", "a = 9" + "9" * 5000, "[gate]\nx = nan", "\0", "x = ["]
)
def test_a_declared_set_of_nonsense_is_one_line(text: str, tmp_path: Path) -> None:
    pytest.importorskip("tomllib")
    from tinyusfm_calibration.sets import load_declaration

    (tmp_path / "x.toml").write_text(text)
    with pytest.raises(InputError, match=r"calibration set x.toml"):
        load_declaration(str(tmp_path / "x.toml"))
