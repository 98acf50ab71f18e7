"""``bundle diff``: kinds are told apart, an undeclared one is refused, a worse one is caught, a good one accepted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.evaluation.labelled import bright_parts, write_labelled
from tinyusfm_edge.change.impact import latency_ratio
from tinyusfm_edge.change.kinds import modifications
from tinyusfm_edge.change.protocol import read_protocol
from tinyusfm_edge.cli.main import main
from tinyusfm_edge.data.fingerprint import images_sha256
from tinyusfm_runtime.bundle.reader import Bundle
from tinyusfm_runtime.errors import InputError

QUICK = ["--rounds", "2"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Labelled data, a bundle in use, one with nearly the same weights, one with far worse ones."""
    folder = tmp_path_factory.mktemp("change")
    (folder / "data").mkdir()
    write_labelled(folder / "data")
    for name, level, digest in (("old", 0.3, "1"), ("near", 0.301, "2"), ("worse", 0.45, "3")):
        bright_parts(level).publish(folder / f"{name}.bundle", weights_sha256=digest * 64)
    return folder


def protocol(world: Path, path: Path, **changes: Any) -> Path:
    values: dict[str, Any] = {
        "version": 1,
        "model": "tiny",
        "description": {"allowed": ["weights", "graph", "golden"], "rationale": "trained again"},
        "protocol": {
            "data_sha256": images_sha256([world / "data"], ("test",)),
            "split": "test",
            "strata": True,
            "margins": {"dice": 0.02, "hc_abs_error_mm": 2.0},
            "limits": {"flips": 0.1, "latency_ratio": 50.0},
        },
        "impact": {"benefit": "closer to the new site", "risk": "worse on the old one"},
    }
    for key, value in changes.items():
        values[key] = {**values[key], **value} if isinstance(value, dict) else value
    path.write_text(json.dumps(values), encoding="utf-8")
    return path


def diff(world: Path, new: str, *words: str) -> int:
    return main(["bundle", "diff", str(world / "old.bundle"), str(world / f"{new}.bundle"), *QUICK, *words])


def test_a_declared_change_within_its_criteria_is_accepted(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    declared = str(protocol(world, tmp_path / "pccp.json"))
    out = ["--json", str(tmp_path / "d.json"), "--page", str(tmp_path / "d.html")]
    assert diff(world, "near", "--protocol", declared, "--data", str(world / "data"), *out) == 0
    assert "accepted: weights" in capsys.readouterr().out
    told = json.loads((tmp_path / "d.json").read_text())
    assert told["accepted"] and told["impact"]["frames"] == 24
    tested = {(test["metric"], test["stratum"]) for test in told["margins"]}
    assert tested == {(metric, kind) for metric in ("dice", "hc_abs_error_mm") for kind in ("", "A", "B")}
    assert {metric["name"] for metric in told["impact"]["metrics"]} >= {
        "dice",
        "iou",
        "hd95_mm",
        "hc_abs_error_mm",
        "ece",
    }
    page = (tmp_path / "d.html").read_text(encoding="utf-8")
    headings = ["Description of modifications", "Modification protocol", "Impact assessment"]
    assert [page.index(heading) for heading in headings] == sorted(page.index(heading) for heading in headings)


def test_a_worse_bundle_is_refused(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    declared = str(protocol(world, tmp_path / "pccp.json"))
    assert diff(world, "worse", "--protocol", declared, "--data", str(world / "data")) == 1
    assert "dice on all frames" in capsys.readouterr().err


def test_an_undeclared_kind_is_refused_before_anything_runs(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    declared = str(protocol(world, tmp_path / "pccp.json", description={"allowed": ["calibration"]}))
    out = ["--json", str(tmp_path / "d.json")]
    assert diff(world, "near", "--protocol", declared, "--data", str(world / "data"), *out) == 1
    assert "does not declare weights" in capsys.readouterr().err
    assert json.loads((tmp_path / "d.json").read_text())["impact"] is None


def test_other_data_than_declared_are_refused(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    declared = str(protocol(world, tmp_path / "pccp.json", protocol={"data_sha256": "0" * 64}))
    assert diff(world, "near", "--protocol", declared, "--data", str(world / "data")) == 1
    assert "the protocol declares 0000" in capsys.readouterr().err
    assert diff(world, "near", "--protocol", declared) == 2, "without data nothing is judged"


def test_without_a_protocol_golden_frames_show_what_moves(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert diff(world, "worse") == 0
    said = capsys.readouterr().out
    assert "not judged, no protocol: weights" in said and "hc moves" in said


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        ({"threshold": 0.6}, "thresholds"),
        ({"labels": ("abdomen",)}, "labels"),
        ({"intended_use": "diagnosis"}, "intended-use"),
        ({"min_area": 0.1}, "postprocessing"),
    ],
)
def test_each_field_of_the_model_has_its_kind(world: Path, tmp_path: Path, change: dict[str, Any], kind: str) -> None:
    path = bright_parts(0.3, **change).publish(tmp_path / "b.bundle", weights_sha256="1" * 64)
    found = {item.kind for item in modifications(Bundle.open(world / "old.bundle"), Bundle.open(path))}
    assert kind in found and "weights" not in found


def test_other_parts_have_their_kinds(world: Path, tmp_path: Path) -> None:
    old = Bundle.open(world / "old.bundle")
    assert not modifications(old, old)
    parts = bright_parts(0.3)
    path = parts.publish(tmp_path / "b.bundle", weights_sha256="1" * 64, tools={"onnx": "9"}, device_class="cart")
    assert {item.kind for item in modifications(old, Bundle.open(path))} == {"tools", "device"}
    path = bright_parts(0.31).publish(tmp_path / "c.bundle", weights_sha256="1" * 64)
    assert {item.kind for item in modifications(old, Bundle.open(path))} == {"graph"}, "the same weights, they say"
    path = parts.publish(tmp_path / "d.bundle", weights_sha256="1" * 64, calibration_id="4" * 64)
    assert {item.kind for item in modifications(old, Bundle.open(path))} == {"calibration"}
    needs = {**parts.artefacts[0].requirements, "library_version": "0.1"}
    path = parts.with_artefact(requirements=needs).publish(tmp_path / "e.bundle", weights_sha256="1" * 64)
    assert {item.kind for item in modifications(old, Bundle.open(path))} == {"engine"}


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"description": {"allowed": ["everything"]}}, "kinds are"),
        ({"description": {"allowed": []}}, "no kind"),
        ({"protocol": {"margins": {}}}, "no margin"),
        ({"protocol": {"margins": {"dice": -0.1}}}, "above 0"),
        ({"protocol": {"margins": {"beauty": 0.1}}}, "known metrics"),
        ({"protocol": {"data_sha256": "abc"}}, "no sha256"),
        ({"protocol": {"limits": {"flips": float("nan")}}}, "cannot be read|limit"),
        ({"protocol": {"limit": {"flips": 0.1}}}, "unknown keys: limit"),
        ({"impact": {"benefit": 3}}, "misuses"),
        ({"version": 2}, "version 2"),
    ],
)
def test_a_protocol_that_says_nothing_usable_is_refused(
    world: Path, tmp_path: Path, change: dict[str, Any], why: str
) -> None:
    with pytest.raises(InputError, match=why):
        read_protocol(protocol(world, tmp_path / "pccp.json", **change))


def test_the_ratio_of_latencies_has_an_interval_that_holds_it() -> None:
    took = np.random.default_rng(1).normal([10.0, 15.0], 0.5, (40, 2))
    found = latency_ratio(took)
    assert found.low < found.ratio < found.high
    assert found.low < 1.5 < found.high and found.low > 1.3
