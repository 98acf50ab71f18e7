"""Embeddings and clusters: exact projection, seeded, stratified, one chunk at a time."""

from __future__ import annotations

import hashlib
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from tests.needs import needs
from tinyusfm_calibration import embeddings as chunked
from tinyusfm_calibration.clusters import Clusters, cluster, cluster_count
from tinyusfm_calibration.embeddings import check_ids, fit_projection, gather, id_keys, unit_rows
from tinyusfm_runtime.errors import CalibrationError, InputError, MissingExtra

needs("sklearn", reason="install tinyusfm-edge[calibration]")
NO_FAISS = pytest.mark.skipif(find_spec("faiss") is None, reason="install tinyusfm-edge[faiss]")
ALGORITHMS = ["sklearn", pytest.param("faiss", marks=NO_FAISS)]


def blobs(num_blobs: int, each: int, *, dim: int = 48, noise: float = 0.1, seed: int = 0) -> np.ndarray:
    """Rows around unit directions, blob after blob."""
    rng = np.random.default_rng(seed)
    centres = unit_rows(rng.normal(size=(num_blobs, dim)))
    spread = noise * rng.normal(size=(num_blobs * each, dim)) / dim**0.5
    return (np.repeat(centres, each, 0) + spread).astype(np.float32)


def test_the_projection_is_the_svds_and_forgets_order_and_chunks() -> None:
    rows = blobs(6, 50, noise=0.5)
    found = fit_projection(rows, dim=10)
    centred = unit_rows(rows) - unit_rows(rows).mean(0)
    _, strengths, directions = np.linalg.svd(centred.astype(np.float64), full_matrices=False)
    assert np.abs(np.abs(np.sum(found.basis_DP.T * directions[:10], 1)) - 1.0).max() < 1e-4
    assert found.kept == pytest.approx((strengths[:10] ** 2).sum() / (strengths**2).sum(), abs=1e-5)
    again = fit_projection(rows[::-1], dim=10, chunk=7)
    assert np.allclose(again.basis_DP, found.basis_DP, atol=1e-4)


def test_the_number_of_clusters() -> None:
    assert [cluster_count(n) for n in (3, 20, 100, 10_000, 2_200_000)] == [3, 8, 10, 100, 1483]
    assert cluster_count(4_000_000) == 1500


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_blobs_are_found_and_distances_are_to_the_nearest_centre(algorithm: str) -> None:
    rows = blobs(10, 40)
    found = cluster(rows, count=10, algorithm=algorithm, seed=3)
    whole = sum(len(set(found.labels_N[blob * 40 : blob * 40 + 40])) == 1 for blob in range(10))
    assert whole >= (9 if algorithm == "sklearn" else 5), "FAISS starts at random rows, scikit-learn by k-means++"
    projected = found.projection.apply(rows)
    distances = np.linalg.norm(projected[:, None] - found.centres_KP[None], axis=2)
    assert np.allclose(found.distances_N, distances.min(1), atol=1e-5)
    assert (found.sizes_K > 0).all() and found.sizes_K.sum() == 400
    again = cluster(rows, count=10, algorithm=algorithm, seed=3)
    assert (again.labels_N == found.labels_N).all()


def test_a_cluster_never_mixes_kinds_and_every_kind_has_one() -> None:
    rows = blobs(4, 50)
    kinds = ["liver"] * 150 + ["heart"] * 49 + ["eye"]
    found = cluster(rows, count=8, strata=kinds)
    assert set(found.strata) == {"liver", "heart", "eye"}
    assert [found.strata[label] for label in found.labels_N] == kinds
    mixed = cluster(rows, count=8)
    pairs = set(zip(mixed.labels_N.tolist(), kinds, strict=True))
    assert len(pairs) > len(mixed.centres_KP), "the control: without kinds clusters cross them"


def test_a_mapped_matrix_is_read_in_chunks_and_gives_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = blobs(8, 500)
    np.save(tmp_path / "rows.npy", rows)
    mapped = np.load(tmp_path / "rows.npy", mmap_mode="r")
    largest = []
    original = chunked.unit_rows
    monkeypatch.setattr(chunked, "unit_rows", lambda block: (largest.append(len(block)), original(block))[1])
    found: Clusters = cluster(mapped, chunk=512)
    assert max(largest) <= 1024, "a chunk or a mini-batch, never the pool"
    assert (found.labels_N == cluster(rows).labels_N).all()


def test_identical_rows_end_in_one_cluster() -> None:
    found = cluster(np.ones((30, 8), np.float32))
    assert len(found.centres_KP) == 1 and found.distances_N.max() < 1e-5


def test_bad_rows_and_settings_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = blobs(2, 20)
    for value in (np.nan, np.inf, 0.0):
        broken = rows.copy()
        broken[7] = value
        with pytest.raises(CalibrationError, match="row 7"):
            cluster(broken)
    with pytest.raises(InputError, match="algorithm"):
        cluster(rows, algorithm="dbscan")
    with pytest.raises(InputError, match="0 clusters"):
        cluster(rows, count=0)
    with pytest.raises(CalibrationError, match="kinds"):
        cluster(rows, strata=["a"])
    with pytest.raises(CalibrationError, match="two"):
        cluster(rows[:1])
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(MissingExtra, match="faiss"):
        cluster(rows, algorithm="faiss")


def test_gathering_keeps_vectors_alone_and_checks_names() -> None:
    alive: list[int] = []

    class Image:
        def __init__(self, number: int) -> None:
            self.number = number
            alive.append(number)

        def __del__(self) -> None:
            alive.remove(self.number)

    most = 0

    def embed(batch: list[Image]) -> np.ndarray:
        nonlocal most
        most = max(most, len(alive))
        return np.array([[p.number, 1.0] for p in batch])

    names, rows = gather((Image(i) for i in range(50)), embed, lambda p: f"p{p.number}", batch=8)
    assert names == [f"p{i}" for i in range(50)] and (rows[:, 0] == np.arange(50)).all()
    assert most <= 17, "two batches at once at most"
    with pytest.raises(CalibrationError, match="no images"):
        gather(iter(()), lambda batch: np.zeros((0, 2)), str)
    with pytest.raises(CalibrationError, match="shape"):
        gather([1, 2], lambda batch: np.zeros((1, 2)), str)
    with pytest.raises(CalibrationError, match="share their name"):
        check_ids(["a", "a"])


def test_keys_are_the_names_own() -> None:
    keys = id_keys(["a", "b", "c"])
    assert keys.tolist() == id_keys(["c", "b", "a"])[::-1].tolist()
    assert keys.tolist() != id_keys(["a", "b", "c"], seed=1).tolist()
    assert keys[0] == int(hashlib.sha256(b"0:a").hexdigest()[:16], 16), "the same on every machine"
