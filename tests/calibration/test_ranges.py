"""Range methods and histograms: what they promise for any data, and what they refuse."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyusfm_calibration.methods import RANGE_METHODS, entropy, find_range, minmax, mse, percentile, quantization_error
from tinyusfm_calibration.observe import NUM_BINS, Histogram
from tinyusfm_calibration.ranges import Observer, Ranges, collect_ranges
from tinyusfm_calibration.sets import CalibrationSet, NamedFrame, describe_frames
from tinyusfm_runtime.errors import CalibrationError, InputError
from tinyusfm_runtime.frame import Frame

QUICK = settings(max_examples=25, deadline=None)


def observed(*batches: np.ndarray) -> Histogram:
    histogram = Histogram(name="t")
    for batch in batches:
        histogram.add(batch)
    return histogram


def heavy_tailed(seed: int, scale: float, count: int = 4000) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.standard_t(3, count) * scale + rng.normal(0, scale)).astype(np.float32)


def calibration_set(count: int = 16) -> CalibrationSet:
    rng = np.random.default_rng(0)
    frames = [
        NamedFrame(id=f"f{i}", frame=Frame(pixels=rng.integers(0, 255, (8, 9), dtype=np.uint8))) for i in range(count)
    ]
    return describe_frames("tiny", frames)


data = st.tuples(st.integers(0, 2**31), st.sampled_from([1e-30, 1e-6, 0.3, 1.0, 7.0, 1e6]))


@QUICK
@given(data)
def test_minmax_covers_every_value(drawn: tuple[int, float]) -> None:
    values = heavy_tailed(*drawn)
    low, high = minmax(observed(values))
    assert low <= values.min()
    assert high >= values.max()
    assert low <= 0.0 <= high


@QUICK
@given(data, st.sampled_from(sorted(RANGE_METHODS)))
def test_every_range_holds_zero_and_lies_within_minmax(drawn: tuple[int, float], method: str) -> None:
    histogram = observed(heavy_tailed(*drawn))
    floor, ceiling = minmax(histogram)
    low, high = find_range(histogram, method)
    assert floor <= low <= 0.0 <= high <= ceiling
    assert low < high


@QUICK
@given(data)
def test_percentile_keeps_the_share_it_names(drawn: tuple[int, float]) -> None:
    values = heavy_tailed(*drawn, 20000)
    low, high = percentile(observed(values), 99.0)
    inside = np.mean((values >= low) & (values <= high))
    assert inside >= 0.99 - 1e-9
    narrower = percentile(observed(values), 90.0)
    assert narrower[1] - narrower[0] <= high - low


@QUICK
@given(data)
def test_mse_never_quantizes_worse_than_minmax(drawn: tuple[int, float]) -> None:
    values = heavy_tailed(*drawn)
    histogram = observed(values)
    # the search sees bin centres: at least 32 bins a code bound what that can cost
    assert quantization_error(values, mse(histogram)) <= 1.02 * quantization_error(values, minmax(histogram))


def test_entropy_and_percentile_cut_a_lone_outlier_that_minmax_keeps() -> None:
    histogram = observed(np.append(np.random.default_rng(1).normal(0, 1, 50000), 200.0))
    assert minmax(histogram)[1] == 200.0
    assert entropy(histogram)[1] < 60.0
    assert percentile(histogram)[1] < 10.0


def test_mse_cuts_an_outlier_only_where_that_pays() -> None:
    # one value of 200 costs (200 - t)^2 if clipped at t; 4 million values gain 4e6 * (t / 255)^2 / 12
    normal = observed(np.random.default_rng(1).normal(0, 1, 4_000_000))
    normal.add(np.array([200.0]))
    assert mse(normal)[1] < 60.0
    few = observed(np.append(np.random.default_rng(1).normal(0, 1, 5000), 200.0))
    assert mse(few)[1] > 180.0


def test_entropy_keeps_a_uniform_spread_whole() -> None:
    values = np.random.default_rng(2).uniform(-4, 4, 200000)
    low, high = entropy(observed(values))
    assert high > 3.7
    assert low < -3.7


def test_entropy_ignores_the_spike_of_exact_zeros_a_relu_leaves() -> None:
    values = np.abs(np.random.default_rng(3).normal(0, 1, 50000))
    with_zeros = np.append(values, np.zeros(1_000_000))
    assert entropy(observed(with_zeros))[1] == pytest.approx(entropy(observed(values))[1], rel=0.15)


@settings(max_examples=6, deadline=None)
@given(st.integers(0, 2**31), st.permutations(range(6)))
def test_the_order_of_frames_makes_no_difference(seed: int, order: list[int]) -> None:
    batches = [heavy_tailed(seed + i, 10.0 ** (i - 3), 300) for i in range(6)]
    straight, shuffled = observed(*batches), observed(*(batches[i] for i in order))
    assert straight.exponent == shuffled.exponent
    assert np.array_equal(straight.counts_N, shuffled.counts_N)
    for method in RANGE_METHODS:
        assert find_range(straight, method) == find_range(shuffled, method)


@QUICK
@given(st.lists(st.floats(-1e300, 1e300, allow_nan=False), min_size=1, max_size=40))
def test_a_histogram_loses_no_value_whatever_its_size(values: list[float]) -> None:
    histogram = observed(*(np.array([v]) for v in values))
    assert histogram.total == len(values)
    used = np.flatnonzero(histogram.counts_N)
    # a value of 1e-64 beside one of 1e263 lies on the edge, which float64 puts on either side of it
    assert histogram.edges_N[used[0]] <= min(values) + 1e-9 * histogram.width
    assert max(values) < histogram.edges_N[used[-1]] + histogram.width
    assert histogram.counts_N.size == NUM_BINS


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_no_number_is_refused_with_the_tensor_named(bad: float) -> None:
    with pytest.raises(CalibrationError, match="'t'"):
        observed(np.array([0.0, bad, 1.0]))


def test_a_tensor_that_is_always_zero_cannot_be_quantized() -> None:
    with pytest.raises(CalibrationError, match="zero on every"):
        find_range(observed(np.zeros(10)), "minmax")


def test_a_tensor_that_was_never_seen_has_no_range() -> None:
    with pytest.raises(CalibrationError, match="never observed"):
        find_range(Histogram(name="t"), "mse")


def test_an_unknown_method_names_the_known_ones() -> None:
    with pytest.raises(InputError, match="minmax, percentile, entropy, mse"):
        find_range(observed(np.ones(3)), "average")


def test_collect_ranges_observes_every_frame_and_signs_the_result() -> None:
    chosen = calibration_set()
    inputs = [np.full((1, 1, 4, 4), i, np.uint8) for i in range(16)]
    found = collect_ranges(
        lambda x: {"a": x.astype(np.float32) - 3, "b": x / 255}, inputs, chosen, method="minmax", weights_sha256="w"
    )
    assert found.tensors["a"] == (-3.0, 12.0)
    assert found.set_id == chosen.id
    assert set(found.frame_sha256) == chosen.hashes
    assert Ranges.from_json(json.loads(json.dumps(found.to_json()))) == found


def test_collect_ranges_without_frames_is_an_error_and_no_fallback() -> None:
    with pytest.raises(CalibrationError, match="exhausted generator"):
        collect_ranges(lambda x: {"a": x}, iter(()), calibration_set())


def test_collect_ranges_notices_a_missing_frame() -> None:
    with pytest.raises(CalibrationError, match="15 inputs for the 16"):
        collect_ranges(lambda x: {"a": x + 1.0}, [np.zeros((1, 1, 4, 4), np.uint8)] * 15, calibration_set())


def test_an_observer_refuses_tensors_that_come_and_go() -> None:
    observer = Observer()
    observer.add({"a": np.ones(2)})
    with pytest.raises(CalibrationError, match="not the same ones"):
        observer.add({"b": np.ones(2)})
    with pytest.raises(CalibrationError):
        Observer().add({})


GOOD = {
    "version": 1,
    "method": "mse",
    "set_id": "s",
    "weights_sha256": "",
    "frame_sha256": ["aa"],
    "tensors": {"a": [-1.0, 2.0]},
}


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2},
        {"surprise": 1},
        {"tensors": {}},
        {"tensors": {"a": [1.0, 2.0]}},
        {"tensors": {"a": [0.0, 0.0]}},
        {"tensors": {"a": [-1.0, float("nan")]}},
        {"tensors": {"a": [-1.0]}},
        {"tensors": [1]},
        {"frame_sha256": []},
        {"set_id": ""},
        {"version": "x"},
    ],
)
def test_stored_ranges_that_cannot_be_trusted_are_refused(change: dict[str, object]) -> None:
    Ranges.from_json(dict(GOOD))
    with pytest.raises(CalibrationError):
        Ranges.from_json({**GOOD, **change})
