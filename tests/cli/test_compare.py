"""``tinyusfm-edge compare``: regressions end with 1, what cannot be compared with 5, noise with 0."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tinyusfm_edge.cli.main import main
from tinyusfm_edge.report.comparison import compare_reports, ratio_interval
from tinyusfm_runtime.errors import InputError
from tinyusfm_runtime.numerics.order import wide

MACHINE = {"cpu": "A", "cpu_class": "x86_64:avx2", "cores": 2, "usable_cpus": 2}
SETUP = {"system": "Linux", "python": "3.11", "numpy": "2", "governor": "performance", "power_mode": "unknown"}


def latency(scale: float, seed: int = 0) -> dict[str, Any]:
    """A profile's report whose times are spread by 5 %."""
    samples = (10.0 * scale * np.random.default_rng(seed).normal(1.0, 0.05, 200)).tolist()
    points = {f"p{p}": float(np.percentile(wide(samples), p)) for p in (50, 90, 99)}
    return {
        "kind": "tinyusfm-edge profile", "machine": dict(MACHINE), "setup": dict(SETUP), "threads": 1, "frames": 4,
        "subject": {"engine": "X 1.0"}, "stages": {"total_ms": points}, "samples_ms": {"total_ms": samples},
        "cold": None,
    }  # fmt: skip


def verified(dice: float) -> dict[str, Any]:
    """A verification's report of one artefact."""
    report = {"statistics": {"dice_mean": dice, "hc_p95_mm": 0.4}, "frames": {"pixels_sha256": ["a", "b"]}}
    artefacts = [{"name": "onnx-int8", "report": report}]
    return {"kind": "tinyusfm-edge verify", "live": True, "machine": dict(MACHINE), "artefacts": artefacts}


def scored(dice: float) -> dict[str, Any]:
    """An evaluation's report."""
    reports = [{"threshold": 0.5, "dice": {"mean": dice, "low": 0.8, "high": 0.95}}]
    return {"kind": "tinyusfm-edge evaluate", "frames_sha256": "ab", "split": "val", "reading": {}, "reports": reports}


def judged(p50: float, size: int) -> dict[str, Any]:
    """An export's report with one verdict."""
    side = {
        "precision": "int8", "p50_ms": p50, "size_bytes": size, "samples_ms": [[p50] * 9], "statistics": {},
    }  # fmt: skip
    return {"kind": "tinyusfm-edge export", "verdicts": [{"target": "onnx", "machine": MACHINE, "sides": [side]}]}


def code_of(tmp_path: Path, before: dict[str, Any], after: dict[str, Any], *options: str) -> int:
    """Exit code of the command on two reports."""
    for name, report in (("before", before), ("after", after)):
        (tmp_path / f"{name}.json").write_text(json.dumps(report), encoding="utf-8")
    return main(["compare", str(tmp_path / "before.json"), str(tmp_path / "after.json"), *options])


@pytest.mark.parametrize(
    ("before", "after", "code"),
    [
        (latency(1.0), latency(1.0, 1), 0),
        (latency(1.0), latency(1.3, 1), 1),
        (latency(1.3), latency(1.0, 1), 0),
        (verified(0.995), verified(0.9949), 0),
        (verified(0.995), verified(0.97), 1),
        (scored(0.96), scored(0.961), 0),
        (scored(0.96), scored(0.94), 1),
        (judged(5.0, 1000), judged(5.0, 1000), 0),
        (judged(5.0, 1000), judged(5.0, 1500), 1),
        (judged(5.0, 1000), judged(7.0, 1000), 1),
    ],
)
def test_every_kind_ends_with_its_verdict(
    before: dict[str, Any], after: dict[str, Any], code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page, data = tmp_path / "c.html", tmp_path / "c.json"
    assert code_of(tmp_path, before, after, "--page", str(page), "--json", str(data)) == code
    out = capsys.readouterr().out
    assert ("WORSE" in out) == (code == 1) and "verdict" in out and f"written      {data}, {page}" in out
    assert ("next         tinyusfm-edge " in out) == (code == 0)
    found = json.loads(data.read_text(encoding="utf-8"))
    assert found["passed"] == (code == 0) and ("WORSE" in page.read_text(encoding="utf-8")) == (code == 1)


def test_a_change_within_the_noise_of_its_samples_is_no_regression() -> None:
    rng = np.random.default_rng(3)
    noisy = [10.0 * float(value) for value in rng.normal(1.0, 0.6, 12)]
    low, high = ratio_interval(noisy, [1.08 * value for value in reversed(noisy)])
    assert low < 1.0 < high
    before, after = latency(1.0), latency(1.0)
    before["samples_ms"]["total_ms"], after["samples_ms"]["total_ms"] = noisy, [1.08 * value for value in noisy]
    before["stages"]["total_ms"]["p50"], after["stages"]["total_ms"]["p50"] = 10.0, 10.8
    assert not [change for change in compare_reports(before, after).regressions if change.name == "total p50"]


def test_a_percentile_in_the_tail_is_judged_by_intervals_or_not_at_all() -> None:
    before, after = latency(1.0), latency(1.3, 1)
    found = {change.name: change for change in compare_reports(before, after).changes}
    assert found["total p90"].worse and found["total p90"].noise is not None and found["total p90"].noise[0] > 1
    assert not found["total p99"].worse and "368 samples, there are 200" in found["total p99"].refused
    assert found["total p99"].row()[-1].startswith("not judged")
    assert "1 not judged" in compare_reports(before, latency(1.0, 1)).headline
    for report in (before, after):
        report["samples_ms"]["total_ms"] = report["samples_ms"]["total_ms"] * 3
    found = {change.name: change for change in compare_reports(before, after).changes}
    assert found["total p99"].worse and found["total p99"].noise is not None


@pytest.mark.parametrize("field", ["cpu", "governor", "power_mode", "engine", "threads"])
def test_another_machine_power_mode_or_tool_ends_with_5_and_names_it(
    field: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, after = latency(1.0), copy.deepcopy(latency(1.0))
    place = next(part for part in (after["machine"], after["setup"], after["subject"], after) if field in part)
    place[field] = "another"
    assert code_of(tmp_path, before, after) == 5
    printed = capsys.readouterr()
    assert field.replace("_", " ") in printed.err and "another" in printed.err
    assert code_of(tmp_path, before, after, "--across") == 0
    assert "--across" in capsys.readouterr().out


def test_limits_can_be_given_and_nonsense_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert code_of(tmp_path, latency(1.0), latency(1.3, 1), "--fail-if", "p50>+50%", "--fail-if", "p90>+50%",
                   "--fail-if", "p99>+90%") == 0  # fmt: skip
    assert code_of(tmp_path, latency(1.0), latency(1.0), "--fail-if", "speed>1") == 2
    assert "--fail-if speed>1" in capsys.readouterr().err
    assert code_of(tmp_path, latency(1.0), verified(0.9)) == 2
    assert "two kinds" in capsys.readouterr().err
    with pytest.raises(InputError, match="cannot be compared"):
        compare_reports({"kind": "x"}, {"kind": "x"})
