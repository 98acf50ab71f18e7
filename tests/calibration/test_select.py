"""Choosing images: five methods behind one call, near-duplicates, order and budgets."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.needs import needs
from tinyusfm_calibration.clusters import cluster
from tinyusfm_calibration.embeddings import id_keys, unit_rows
from tinyusfm_calibration.select import SELECTION_METHODS, SelectConfig, Selection, k_centre, parse_budget, select
from tinyusfm_runtime.errors import CalibrationError, InputError
from tinyusfm_runtime.numerics.order import wide

needs("sklearn", reason="install tinyusfm-edge[calibration]")


def pool(count: int = 300, *, dim: int = 32, seed: int = 0) -> tuple[np.ndarray, list[str], np.ndarray]:
    """Embeddings around 12 directions, names, gradient courses."""
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(12, dim))[rng.integers(0, 12, count)] + 0.6 * rng.normal(size=(count, dim))
    return rows.astype(np.float32), [f"frame-{i}" for i in range(count)], rng.uniform(0.2, 2.0, (count, 6))


def chosen(method: str, *, budget: int = 40, config: SelectConfig | None = None) -> Selection:
    rows, names, gradients = pool()
    return select(rows, names, budget, method=method, gradients_NE=gradients, config=config)


@pytest.mark.parametrize("method", SELECTION_METHODS)
def test_every_method_fills_the_budget_with_distinct_images_and_repeats_itself(method: str) -> None:
    found = chosen(method)
    assert len(set(found.ids)) == 40 and found.num_missing == 0
    assert found.ids == chosen(method).ids
    assert [f"frame-{row}" for row in found.rows_M] == list(found.ids)
    other = chosen(method, config=SelectConfig(seed=1))
    assert other.ids != found.ids and other.config.sha256 != found.config.sha256


def test_the_methods_differ_and_each_has_its_meaning() -> None:
    rows, names, gradients = pool()
    clusters = cluster(rows)
    found = {
        method: select(rows, names, 40, method=method, gradients_NE=gradients, clusters=clusters)
        for method in SELECTION_METHODS
    }
    assert len({frozenset(s.ids) for s in found.values()}) == len(SELECTION_METHODS)
    distance = {m: clusters.distances_N[s.rows_M].mean() for m, s in found.items()}
    assert min(distance, key=distance.get) == "distance"  # type: ignore[arg-type]
    rank = {m: np.nanmean(found[m].quality_rank_M) for m in ("dual", "distance", "gradient")}
    assert rank["gradient"] < rank["dual"] < rank["distance"]
    unit = unit_rows(rows)
    cover = {m: (unit @ unit[s.rows_M].T).max(1).min() for m, s in found.items()}
    assert max(cover, key=cover.get) == "kcentre", "no image is far from all chosen"  # type: ignore[arg-type]


def test_quotas_follow_the_clusters_and_ranks_decide_inside() -> None:
    rows, names, gradients = pool()
    config = SelectConfig(duplicate_cosine=None)
    clusters = cluster(rows)
    found = select(rows, names, 60, method="dual", gradients_NE=gradients, clusters=clusters, config=config)
    shares = np.bincount(found.labels_M, minlength=len(clusters.centres_KP))
    assert (np.abs(shares - 60 * clusters.sizes_K / 300) < 1.0).all()
    every = select(rows, names, 300, method="dual", gradients_NE=gradients, clusters=clusters, config=config)
    for label in range(len(clusters.centres_KP)):
        left_out = (every.labels_M == label) & ~np.isin(wide(every.rows_M), wide(found.rows_M))
        worst = found.score_M[found.labels_M == label].max(initial=-1.0)
        assert (every.score_M[left_out] >= worst).all()


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 60), st.sampled_from(["distance", "dual", "gradient"]), st.booleans())
def test_no_two_chosen_are_near_duplicates_not_even_across_clusters(
    seed: int, budget: int, method: str, centred: bool
) -> None:
    rng = np.random.default_rng(seed)
    clips = rng.normal(size=(20, 8))
    rows = np.repeat(clips, 5, 0) + rng.choice([1e-3, 0.08, 0.3], (100, 1)) * rng.normal(size=(100, 8))
    names = [f"f{i}" for i in rng.permutation(100)]
    config = SelectConfig(centred=centred)
    found = select(rows, names, budget, method=method, gradients_NE=rng.uniform(1, 2, (100, 3)), config=config)
    every = unit_rows(rows)
    every = unit_rows(every - every.mean(0)) if centred else every
    unit = every[found.rows_M].astype(np.float64)
    cosines = unit @ unit.T - 2.0 * np.eye(len(unit))
    assert cosines.max() <= 0.995 + 1e-6
    assert len(found.ids) + found.num_missing == budget
    if found.num_missing:
        # nothing that could still be taken was left
        rest = np.delete(every, found.rows_M, 0) @ unit.T
        assert (rest.max(1) > 0.995 - 1e-5).all()


def test_images_that_all_point_the_same_way_are_told_apart_around_their_mean() -> None:
    rng = np.random.default_rng(0)
    rows = 10.0 * np.ones(16) + rng.normal(size=(60, 16)) * 0.3
    names = [f"f{i}" for i in range(60)]
    assert select(rows, names, 30, method="distance").num_missing == 0
    as_they_come = select(rows, names, 30, method="distance", config=SelectConfig(centred=False))
    assert as_they_come.num_missing > 20, "the control: taken as they come, nearly all are near-duplicates"


def test_without_the_skip_near_duplicates_are_chosen() -> None:
    rng = np.random.default_rng(0)
    rows = np.repeat(rng.normal(size=(10, 8)), 10, 0) + 1e-4 * rng.normal(size=(100, 8))
    names = [f"f{i}" for i in range(100)]
    kept = select(rows, names, 50, method="distance")
    assert len(kept.ids) == 10 and kept.num_missing == 40 and kept.num_duplicates == 90
    loose = select(rows, names, 50, method="distance", config=SelectConfig(duplicate_cosine=None))
    assert len(loose.ids) == 50 and loose.num_duplicates == 0


def test_the_pools_order_does_not_matter_among_equal_clusters() -> None:
    rows, names, gradients = pool()
    clusters = cluster(rows)
    found = select(rows, names, 40, gradients_NE=gradients, clusters=clusters)
    perm = np.random.default_rng(5).permutation(300)
    moved = dataclasses.replace(clusters, labels_N=clusters.labels_N[perm], distances_N=clusters.distances_N[perm])
    again = select(rows[perm], [names[i] for i in perm], 40, gradients_NE=gradients[perm], clusters=moved)
    assert set(again.ids) == set(found.ids)


def test_k_centre_takes_the_farthest_next() -> None:
    rows = np.array([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [-1.0, 0.0]], np.float32)
    assert k_centre(rows, 3, np.arange(4)).tolist() == [0, 3, 2]


def test_json_says_why_each_was_chosen() -> None:
    found = chosen("dual")
    data = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert data["version"] == 1 and data["config_sha256"] == found.config.sha256 and len(data["chosen"]) == 40
    assert set(data["chosen"][0]) == {"id", "cluster", "r_d", "r_q", "s"}
    first = data["chosen"][0]
    assert first["s"] == pytest.approx(0.5 * first["r_d"] + 0.5 * first["r_q"])
    assert json.loads(json.dumps(chosen("random").to_json(), allow_nan=False))["chosen"][0]["s"] is None


def test_budgets() -> None:
    assert parse_budget("10%", 2000) == 200 and parse_budget("37", 2000) == 37 and parse_budget("100%", 7) == 7
    for text in ("0", "0%", "8", "200%", "ten", "nan%", "1e9", "inf%", ""):
        with pytest.raises(InputError, match="budget"):
            parse_budget(text, 7)


def test_what_does_not_fit_is_refused() -> None:
    rows, names, gradients = pool(30)
    with pytest.raises(InputError, match="method"):
        select(rows, names, 3, method="best")
    with pytest.raises(CalibrationError, match="given none"):
        select(rows, names, 3)
    with pytest.raises(CalibrationError, match="names for"):
        select(rows, names[:-1], 3)
    with pytest.raises(CalibrationError, match="do not fit"):
        select(rows, names, 3, gradients_NE=gradients[:-1])
    with pytest.raises(CalibrationError, match="do not fit"):
        select(rows, names, 3, method="distance", clusters=cluster(rows[:20]))
    with pytest.raises(InputError, match="budget"):
        select(rows, names, 31, method="random")
    with pytest.raises(InputError, match="cosine"):
        SelectConfig(duplicate_cosine=1.5)
    with pytest.raises(InputError, match="alpha"):
        select(rows, names, 3, gradients_NE=gradients, config=SelectConfig(alpha=2.0))
    assert id_keys(names).dtype == np.uint64
