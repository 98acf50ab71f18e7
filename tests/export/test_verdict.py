"""Verdict: what is recommended for which measurements, and that the measuring is fair."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tinyusfm_export.verify.gate import Gate, judge
from tinyusfm_export.verify.parity import Comparison, ParityReport
from tinyusfm_export.verify.verdict import Side, Verdict, measure_interleaved, ratio
from tinyusfm_runtime.spec import PostProcess, Task


def report(dice: float = 0.995) -> ParityReport:
    numbers = {"frames": 48, "counted": 48, "broken": 0, "dice_mean": dice, "dice_worst": dice, "hc_p95_mm": 0.4}
    return judge(
        Comparison(
            task=Task.SEGMENT,
            post=PostProcess.ELLIPSE_HC,
            engine="e",
            reference="r",
            frames=(),
            statistics=numbers,
            provenance={},
        ),
        Gate(),
    )


def side(precision: str, ms: float, megabytes: float, *, dice: float = 0.995, rest: str = "f32") -> Side:
    return Side(
        precision=precision,
        rest_precision=rest,
        form="f",
        size_bytes=int(megabytes * 1e6),
        report=report(dice),
        published=True,
        samples_ms=((ms, ms * 1.1), (ms, ms * 1.2)),
    )


def verdict(*sides: Side) -> Verdict:
    return Verdict(target="openvino", threads=1, machine={"cpu": "x"}, sides=sides)


def test_a_clear_gain_is_worth_it_and_told_with_numbers() -> None:
    found = verdict(side("fp32", 18, 24), side("bf16", 11, 24, rest="bf16"), side("int8", 8, 7, rest="bf16"))
    assert found
    assert "worth it here" in found.recommendation and "not worth" not in found.recommendation
    assert "2.25x as fast as FP32" in found.recommendation
    assert "1.38x as fast as BF16" in found.recommendation
    assert "3.4x smaller than FP32 (7.0 against 24.0 MB)" in found.recommendation
    assert "0.9950" in found.recommendation


def test_the_baseline_is_fp32_whichever_float_side_is_faster_that_minute() -> None:
    for fp16_ms in (17, 19):
        found = verdict(side("fp32", 18, 24), side("fp16", fp16_ms, 12), side("int8", 8, 7))
        assert "2.25x as fast as FP32" in found.recommendation and "3.4x smaller than FP32" in found.recommendation


def test_a_gain_within_the_machines_own_phases_is_not_worth_it() -> None:
    found = verdict(side("fp32", 18, 24), side("bf16", 8.5, 24), side("int8", 8, 7))
    assert not found
    assert "not worth it" in found.recommendation
    assert "take BF16" in found.recommendation


def test_int8_that_misses_its_gate_is_never_recommended_however_fast() -> None:
    found = verdict(side("fp32", 18, 24), side("int8", 2, 7, dice=0.9))
    assert not found
    assert "misses the gate" in found.recommendation
    assert "take FP32" in found.recommendation


def test_a_float_side_that_missed_its_gate_is_no_rival() -> None:
    found = verdict(side("fp32", 18, 24), side("bf16", 1, 24, dice=0.9), side("int8", 8, 7))
    assert found
    assert "as fast as FP32" in found.recommendation


def test_fp16_on_a_cpu_is_called_storage() -> None:
    found = verdict(side("fp32", 18, 24), side("fp16", 18, 12))
    assert "storage only" in found.side("fp16").computes_in  # type: ignore[union-attr]
    assert "FP16 saves space, not time" in found.recommendation
    assert not found


def test_one_side_alone_and_no_side_at_all_have_a_sentence() -> None:
    alone = verdict(side("int8", 8, 7))
    assert alone.recommendation == "Only INT8 was measured; speed and size were not compared."
    assert not alone, "what was not compared is not worth it"
    others_missed = verdict(side("fp32", 8, 24, dice=0.5), side("int8", 8, 7))
    assert others_missed and "only precision that passed" in others_missed.recommendation
    assert "No precision passed" in verdict(side("fp32", 8, 7, dice=0.5)).recommendation


def test_the_ratio_is_a_median_over_rounds_and_survives_a_slow_phase() -> None:
    quiet = Side(**{**_fields(side("fp32", 20, 1)), "samples_ms": ((20.0,), (20.0,), (60.0,))})
    other = Side(**{**_fields(side("int8", 10, 1)), "samples_ms": ((10.0,), (10.0,), (10.0,))})
    assert ratio(quiet, other) == 2.0


def _fields(found: Side) -> dict[str, object]:
    return {name: getattr(found, name) for name in Side.__dataclass_fields__}


def test_the_verdict_is_plain_json_with_raw_samples_and_rows() -> None:
    found = verdict(side("fp32", 18, 24), side("int8", 8, 7))
    data = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert data["worth_it"] is True
    assert data["sides"][1]["samples_ms"] == [[8, 8.8], [8, 9.6]]
    assert data["sides"][0]["p50_ms"] == pytest.approx(18.9)
    assert [len(row) for row in found.table()] == [9, 9]


def test_every_engine_has_its_turn_in_every_round_and_none_is_always_first() -> None:
    turns: list[str] = []
    inputs = [np.zeros((1, 1, 4, 4), np.uint8)]
    runners = {name: (lambda x, name=name: turns.append(name)) for name in ("a", "b", "c")}
    samples = measure_interleaved(runners, inputs, rounds=12, runs=3, warm_up=1)
    assert {name: [len(part) for part in found] for name, found in samples.items()} == {n: [3] * 12 for n in "abc"}
    rounds = [turns[i : i + 12] for i in range(0, len(turns), 12)]
    assert all(sorted(set(part)) == ["a", "b", "c"] for part in rounds)
    assert len({part[0] for part in rounds}) == 3
    assert all(ms >= 0 for found in samples.values() for part in found for ms in part)
