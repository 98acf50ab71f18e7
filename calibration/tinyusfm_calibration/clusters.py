"""Clusters of embeddings, behind one call.

Mini-batch k-means by scikit-learn, or k-means by FAISS.

PCA to 128 directions, K = clip(round(sqrt(N)), 8, 1500) clusters, seeded, and where kinds of images are known (organ,
source, probe) each kind is clustered by itself. Every figure here is our choice: what TinyUSFM used is not published.
Training sees mini-batches and one pass assigns, so that beside the embeddings only labels and distances are held.
It does not know images, ranks or budgets.

Shapes: N images, D numbers of an embedding, P after the projection, K clusters, B rows of a chunk.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from tinyusfm_calibration.embeddings import CHUNK_ROWS, PCA_DIM, Projection, chunks, fit_projection
from tinyusfm_calibration.quotas import share_out
from tinyusfm_runtime.errors import CalibrationError, InputError, MissingExtra
from tinyusfm_runtime.numerics.order import wide

MIN_CLUSTERS: Final = 8
MAX_CLUSTERS: Final = 1500
ALGORITHMS: Final = ("sklearn", "faiss")

_STEPS = 100
"""Mini-batches at least; a large pool is passed over once."""
_POINTS_PER_CENTRE = 256
"""Rows per centre that FAISS trains on; it samples as many by itself and would copy the rest for nothing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Clusters:
    """Who belongs together.

    Attributes:
        labels_N: int32 cluster of each image, 0..K-1.
        distances_N: float32 distance to its centre in the projected space.
        centres_KP: float32 centres.
        projection: how embeddings become rows of that space.
        strata: kind each cluster belongs to; empty strings without kinds.
        algorithm: sklearn or faiss.
        seed: of the draw.
    """

    labels_N: np.ndarray
    distances_N: np.ndarray
    centres_KP: np.ndarray
    projection: Projection
    strata: tuple[str, ...]
    algorithm: str
    seed: int

    @property
    def sizes_K(self) -> np.ndarray:
        """int64 images in each cluster."""
        return np.bincount(self.labels_N, minlength=len(self.centres_KP))


def cluster_count(num_images: int) -> int:
    """How many clusters: round(sqrt(N)) within 8..1500, and never more than images."""
    return min(num_images, max(MIN_CLUSTERS, min(MAX_CLUSTERS, round(math.sqrt(num_images)))))


def cluster(
    embeddings_ND: np.ndarray,
    *,
    count: int | None = None,
    strata: Sequence[str] | None = None,
    seed: int = 0,
    algorithm: str = "sklearn",
    dim: int = PCA_DIM,
    chunk: int = CHUNK_ROWS,
) -> Clusters:
    """Clusters images.

    Args:
        embeddings_ND: raw embeddings, in memory or mapped; never copied as a whole.
        count: clusters wanted, or None for ``cluster_count``.
        strata: kind of each image, or None; a cluster never mixes kinds, each kind gets at least one.
        seed: of the draw.
        algorithm: sklearn or faiss; the other one is never taken instead.
        dim: directions kept by the projection.
        chunk: rows handled at once; it bounds the memory and changes no result.

    Returns:
        Clusters without empty ones, so that there may be fewer than wanted.

    Raises:
        InputError: no such algorithm, or a count below one.
        CalibrationError: no vectors, NaN among them, or another number of kinds than vectors.
        MissingExtra: the library is not installed.
    """
    if algorithm not in ALGORITHMS:
        raise InputError(f"no cluster algorithm {algorithm!r}: there are {', '.join(ALGORITHMS)}")
    if count is not None and count < 1:
        raise InputError(f"{count} clusters cannot be made: at least 1")
    total = len(embeddings_ND)
    if strata is not None and len(strata) != total:
        raise CalibrationError(f"{len(strata)} kinds for {total} images")
    projection = fit_projection(embeddings_ND, dim=dim, chunk=chunk)
    kinds, kind_N = np.unique(wide(np.asarray(strata if strata is not None else [""] * total)), return_inverse=True)
    sizes = np.bincount(kind_N, minlength=len(kinds))
    wanted = max(count or cluster_count(total), len(kinds))
    counts = 1 + share_out(wanted - len(kinds), sizes, limits=sizes - 1)
    labels_N, distances_N = np.zeros(total, np.int32), np.zeros(total, np.float32)
    centres: list[np.ndarray] = []
    names: list[str] = []
    for kind, number in enumerate(counts):
        rows_N = np.flatnonzero(kind_N == kind)
        pool = _Pool(embeddings_ND, rows_N, projection)
        found_KP = _SOLVERS[algorithm](pool, int(number), seed)
        local_N, distances_N[rows_N] = _assign(pool, found_KP, chunk)
        used, local_N = np.unique(wide(local_N), return_inverse=True)
        labels_N[rows_N] = local_N + len(names)
        centres.append(found_KP[used])
        names += [str(kinds[kind])] * len(used)
    return Clusters(
        labels_N=labels_N,
        distances_N=distances_N,
        centres_KP=np.concatenate(centres),
        projection=projection,
        strata=tuple(names),
        algorithm=algorithm,
        seed=seed,
    )


@dataclass(frozen=True, slots=True)
class _Pool:
    """The rows of one kind, projected when they are asked for."""

    embeddings_ND: np.ndarray
    rows_N: np.ndarray
    projection: Projection

    def take(self, places: np.ndarray | slice) -> np.ndarray:
        return self.projection.apply(self.embeddings_ND[self.rows_N[places]])


def _sklearn_centres(pool: _Pool, count: int, seed: int) -> np.ndarray:
    try:
        from sklearn.cluster import MiniBatchKMeans
    except ImportError as error:
        raise MissingExtra("clustering", "scikit-learn", "calibration") from error
    size = len(pool.rows_N)
    # scikit-learn advises batches well above the number of centres
    batch = min(size, max(1024, 4 * count))
    rng = np.random.default_rng(seed)
    model = MiniBatchKMeans(n_clusters=count, batch_size=batch, random_state=seed, n_init=3)
    for _ in range(max(_STEPS, math.ceil(size / batch)) if size > count else 1):
        # sorted rows keep a mapped matrix to one forward pass a batch
        places = np.sort(wide(rng.choice(size, batch, replace=False)))
        with warnings.catch_warnings():
            # duplicates leave fewer distinct points than centres; empty clusters are dropped after assignment
            warnings.filterwarnings("ignore", message="Number of distinct clusters")
            model.partial_fit(pool.take(places))
    centres_KP: np.ndarray = np.asarray(model.cluster_centers_, np.float32)
    return centres_KP


def _faiss_centres(pool: _Pool, count: int, seed: int) -> np.ndarray:
    try:
        import faiss
    except ImportError as error:
        raise MissingExtra("clustering with --algorithm faiss", "faiss", "faiss") from error
    size = len(pool.rows_N)
    rng = np.random.default_rng(seed)
    sample = np.sort(wide(rng.choice(size, min(size, _POINTS_PER_CENTRE * count), replace=False)))
    rows_BP = np.ascontiguousarray(pool.take(sample))
    settings: dict[str, Any] = {"niter": 25, "seed": seed, "min_points_per_centroid": 1, "verbose": False}
    model = faiss.Kmeans(rows_BP.shape[1], count, **settings)
    model.train(rows_BP)
    centres_KP: np.ndarray = np.asarray(model.centroids, np.float32)
    return centres_KP


_SOLVERS = {"sklearn": _sklearn_centres, "faiss": _faiss_centres}


def _assign(pool: _Pool, centres_KP: np.ndarray, chunk: int) -> tuple[np.ndarray, np.ndarray]:
    """Nearest centre of every row of a pool and the distance to it."""
    total = len(pool.rows_N)
    labels_N, distances_N = np.zeros(total, np.int64), np.zeros(total, np.float32)
    squares_K = np.square(centres_KP, dtype=np.float64).sum(1)
    for part in chunks(total, chunk):
        rows_BP = pool.take(part)
        near_B = (squares_K - 2.0 * (rows_BP @ centres_KP.T)).argmin(1)
        labels_N[part] = near_B
        # the difference itself, not the expanded square, which cancels for rows at their centre
        distances_N[part] = np.linalg.norm(rows_BP - centres_KP[near_B], axis=1)
    return labels_N, distances_N


__all__ = ["ALGORITHMS", "MAX_CLUSTERS", "MIN_CLUSTERS", "Clusters", "cluster", "cluster_count"]
