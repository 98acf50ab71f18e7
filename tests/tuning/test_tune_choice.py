"""Which row is picked: properties that hold for any rows, and the sentences that say why."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyusfm_edge.tuning.advice import what_would
from tinyusfm_edge.tuning.candidates import TuneCandidate
from tinyusfm_edge.tuning.choice import BAND, TuneRow, decide
from tinyusfm_runtime.profiling.quantiles import quantile


def row(
    variant: str = "full", *, rank: int = 0, ms: float = 8.0, artefact: str = "onnx-int8", threads: int = 1,
    cpus: tuple[int, ...] = (), dice: float = 0.999, why_not: str = "", count: int = 60,
) -> TuneRow:  # fmt: skip
    """A row whose samples all take the same time."""
    samples = (ms,) * count
    target, precision = artefact.split("-")[:2]
    candidate = TuneCandidate(
        variant=variant, rank=rank, bundle=Path("b"), artefact=artefact, target=target, precision=precision,
        engine="ort", threads=threads, cpus=cpus,
    )  # fmt: skip
    p50, p90, p99 = (quantile(samples, percent) for percent in (50.0, 90.0, 99.0))
    return TuneRow(
        candidate=candidate, samples_ms=samples, p50=p50, p90=p90, p99=p99, accuracy={"dice_mean": dice},
        why_not=why_not,
    )  # fmt: skip


ROWS = st.lists(
    st.builds(
        lambda rank, ms, threads, pinned, dice, missed, artefact, count: row(
            f"v{rank}",
            rank=rank,
            ms=ms,
            threads=threads,
            cpus=tuple(range(threads)) if pinned else (),
            dice=dice,
            why_not="misses its gate" if missed else "",
            artefact=artefact,
            count=count,
        ),  # fmt: skip
        st.integers(0, 2),
        st.floats(0.5, 40.0),
        st.sampled_from([1, 2, 4]),
        st.booleans(),
        st.floats(0.9, 1.0),
        st.booleans(),
        st.sampled_from(["onnx-int8", "openvino-int8", "openvino-fp32"]),
        st.sampled_from([10, 60]),
    ),  # fmt: skip
    max_size=8,
    unique_by=lambda found: found.candidate.key,
)
BUDGETS = st.floats(0.5, 40.0)


@settings(deadline=None)
@given(ROWS, BUDGETS)
def test_a_pick_holds_its_gate_meets_the_budget_and_is_of_the_first_variant_that_can(
    rows: list[TuneRow], budget: float
) -> None:
    found = decide(rows, budget)
    able = [one for one in rows if not one.why_not and one.decides_ms <= budget]
    assert bool(found) == bool(able) and found.reason
    if found.pick is None:
        return
    assert found.pick in able
    first = min(one.candidate.rank for one in able)
    assert found.pick.candidate.rank == first
    fastest = min(one.median_ms for one in able if one.candidate.rank == first)
    assert found.pick.median_ms <= BAND * fastest * (1 + 1e-9)


@settings(deadline=None)
@given(ROWS, BUDGETS)
def test_without_a_pick_the_nearest_row_that_holds_its_gate_is_named(rows: list[TuneRow], budget: float) -> None:
    found = decide(rows, budget)
    holding = [one for one in rows if not one.why_not]
    if found or not holding:
        assert found.nearest is None
        return
    assert found.nearest in holding and found.ratio is not None
    assert found.ratio == min(one.samples_ms[0] for one in holding) / budget
    assert "nearest" in found.reason or "--rounds" in found.reason


@settings(deadline=None)
@given(ROWS, BUDGETS, st.integers(0, 1000))
def test_the_order_of_the_rows_does_not_matter(rows: list[TuneRow], budget: float, seed: int) -> None:
    shuffled = list(rows)
    random.Random(seed).shuffle(shuffled)
    assert decide(rows, budget).to_json() == decide(shuffled, budget).to_json()


@settings(deadline=None)
@given(ROWS, BUDGETS, st.floats(1.0, 3.0))
def test_a_larger_budget_never_loses_a_pick_nor_prefers_a_later_variant(
    rows: list[TuneRow], budget: float, factor: float
) -> None:
    before, after = decide(rows, budget), decide(rows, budget * factor)
    if before.pick is not None:
        assert after.pick is not None and after.pick.candidate.rank <= before.pick.candidate.rank


@settings(deadline=None)
@given(ROWS, BUDGETS)
def test_a_faster_row_that_misses_its_gate_changes_nothing(rows: list[TuneRow], budget: float) -> None:
    wrong = row("wrong", rank=0, ms=0.1, why_not="misses its gate", artefact="openvino-w4")
    before, after = decide(rows, budget), decide([*rows, wrong], budget)
    assert (before.pick, before.nearest, before.ratio) == (after.pick, after.nearest, after.ratio)


def test_the_full_student_is_taken_where_it_fits_and_the_twin_where_it_does_not() -> None:
    rows = [row("full", ms=9.0), row("twin", rank=1, ms=5.0)]
    assert decide(rows, 10.0).pick is rows[0] and decide(rows, None).pick is rows[0]
    found = decide(rows, 6.0)
    assert found.pick is rows[1] and "full came first" in found.reason


def test_the_reason_compares_medians_with_medians() -> None:
    uneven = replace(row(ms=5.0, artefact="litert-int8"), samples_ms=(5.0,) * 50 + (9.0,) * 10)
    uneven = replace(uneven, p90=quantile(uneven.samples_ms, 90.0))
    found = decide([uneven, row(ms=6.0, count=10)], 10.0)
    assert found.pick is uneven and "by medians 1.20 times as fast as onnx-int8" in found.reason


def test_equally_fast_rows_are_decided_by_threads_pinning_and_agreement() -> None:
    few, many = row(ms=8.0), row(ms=7.9, threads=4, artefact="openvino-int8")
    assert decide([many, few], 10.0).pick is few
    assert decide([row(ms=5.0, threads=4), few], 10.0).pick is not few, "a real difference decides"
    pinned = row(ms=7.9, cpus=(0,))
    assert decide([pinned, few], 10.0).pick is few
    closer = row(ms=8.1, artefact="openvino-int8", dice=0.9999)
    assert decide([few, closer], 10.0).pick is closer


def test_an_unmet_budget_says_what_would_meet_it_and_what_was_wrong_with_the_fast_ones() -> None:
    wrong = row("quick", rank=2, ms=3.0, why_not="never passed its gate")
    rows = [row(ms=15.004), wrong]
    found = decide(rows, 10.0)
    assert not found and found.ratio == pytest.approx(1.5004)
    assert "nearest is full onnx-int8" in found.reason and "1.50 times the budget" in found.reason
    would = what_would(found, rows, {"full/openvino-int8": "not installed"}, cores=4)
    assert would[0].startswith("a budget of 15.01 ms"), "rounded up: a budget of 15.00 ms would not be met"
    text = "; ".join(would)
    assert "quick onnx-int8" in text and "never passed its gate" in text
    assert "only onnx was tried" in text and "full/openvino-int8" in text and "--threads 4" in text
    assert "--sector" in text and "lighter student" not in text, "another variant was given"
    none = decide([wrong], 10.0)
    assert none.nearest is None and "held its gate" in none.reason and "never passed" in none.reason
    assert what_would(none, [wrong], {}, cores=1) == ()


def test_advice_leaves_out_what_was_tried() -> None:
    rows = [row(ms=15.0, threads=2), row(ms=16.0, artefact="openvino-int8-sector"), row("twin", rank=1, ms=14.0)]
    would = what_would(decide(rows, 10.0), rows, {}, cores=2)
    assert len(would) == 2, f"a budget and a device, and nothing that was tried: {would}"
    assert what_would(decide(rows, 20.0), rows, {}, cores=2) == ()


def test_too_few_samples_ask_for_more_and_pick_nothing() -> None:
    found = decide([row(ms=5.0, count=10)], 10.0)
    assert not found and "10 samples bound no 90th percentile (36 do)" in found.reason
    assert "--rounds 4 goes on" in found.reason, "ten in a round"
    assert decide([row(ms=5.0, count=36)], 10.0)
    noisy = row(ms=5.0)
    slow = (5.0,) * 50 + (30.0,) * 10
    noisy = replace(noisy, samples_ms=slow, p90=quantile(slow, 90.0))
    assert not decide([noisy], 10.0), "the interval's upper end is held against the budget, not the median"
