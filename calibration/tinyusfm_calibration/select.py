"""Choosing images, behind one call.

Random, k-centre, distance only, gradient only or dual rank.

Clusters give their quota of the best-ranked images; an image whose cosine to a chosen one is above 0.995 is
skipped, since those nearest to a centre are often neighbours in one clip. The cosine is taken around the pool's mean:
mean tokens of one organ all point the same way (on HC18 the median cosine of two patients is 0.99, and 99 % of the
frames would count as someone's near-duplicate; around the mean it is 0.00 and 0.6 %). The gradients' course is handed
in: who computes it is not known here, nor what the images show. Equal ranks are ordered by the hash of the
image's name.

Shapes: N images, D numbers of an embedding, E epochs, M chosen, B candidates of a block, K clusters.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final

import numpy as np

from tinyusfm_calibration.clusters import Clusters, cluster
from tinyusfm_calibration.embeddings import PCA_DIM, check_ids, chunks, id_keys, unit_rows
from tinyusfm_calibration.quotas import cluster_quotas, share_out
from tinyusfm_calibration.ranking import distance_rank, dual_rank, quality, quality_rank
from tinyusfm_runtime.errors import CalibrationError, InputError
from tinyusfm_runtime.numerics.order import wide

SELECTION_VERSION: Final = 1
"""Version of the JSON that ``Selection.to_json`` writes."""

SELECTION_METHODS: Final = ("dual", "distance", "gradient", "kcentre", "random")
"""Ways to choose; the last two are baselines and look at no rank, the last at no embedding either."""

_BLOCK = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class SelectConfig:
    """Our choices where the publication is silent.

    Attributes:
        alpha: share of the distance in the dual rank.
        gamma: 1 keeps the pool's proportions between clusters, 0.5 favours small ones.
        oscillation_weight: lambda of the quality.
        duplicate_cosine: an image this similar to a chosen one is skipped; None skips none.
        centred: take that cosine around the pool's mean; False takes it as the embeddings come.
        clusters: how many, or None for round(sqrt(N)) within 8..1500.
        dim: directions kept for clustering.
        algorithm: sklearn or faiss.
        seed: of clusters and ties.
    """

    alpha: float = 0.5
    gamma: float = 1.0
    oscillation_weight: float = 1.0
    duplicate_cosine: float | None = 0.995
    centred: bool = True
    clusters: int | None = None
    dim: int = PCA_DIM
    algorithm: str = "sklearn"
    seed: int = 0

    def __post_init__(self) -> None:
        """Checks the cosine; the others are checked where they are used.

        Raises:
            InputError: a cosine outside -1..1.
        """
        if self.duplicate_cosine is not None and not -1.0 <= self.duplicate_cosine <= 1.0:
            raise InputError(f"a near-duplicate's cosine of {self.duplicate_cosine} must lie in -1..1")

    @property
    def sha256(self) -> str:
        """Hash of every choice, hex."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True, slots=True)
class Selection:
    """What was chosen and why, best first within a cluster.

    Attributes:
        method: one of METHODS.
        config: the choices behind it.
        ids: names of the chosen images.
        rows_M: their rows in the pool, int64.
        labels_M: their clusters, or -1 where nothing was clustered.
        distance_rank_M: r_d in its cluster, or NaN.
        quality_rank_M: r_q in its cluster, or NaN.
        score_M: what they were ordered by, low is good, or NaN.
        num_pool: images there were.
        num_clusters: clusters there were.
        num_duplicates: images that were skipped as near-duplicates.
        num_missing: images short of the budget because only near-duplicates were left.
        version: of the JSON form.
    """

    method: str
    config: SelectConfig
    ids: tuple[str, ...]
    rows_M: np.ndarray
    labels_M: np.ndarray
    distance_rank_M: np.ndarray
    quality_rank_M: np.ndarray
    score_M: np.ndarray
    num_pool: int
    num_clusters: int
    num_duplicates: int
    num_missing: int
    version: int = SELECTION_VERSION

    def to_json(self) -> dict[str, Any]:
        """Plain data, ready for ``json.dumps``; one entry per chosen image."""
        columns = (self.labels_M, self.distance_rank_M, self.quality_rank_M, self.score_M)
        chosen = [
            {"id": name, "cluster": int(label), "r_d": _number(r_d), "r_q": _number(r_q), "s": _number(score)}
            for name, label, r_d, r_q, score in zip(self.ids, *columns, strict=True)
        ]
        return {
            "version": self.version,
            "method": self.method,
            "config": asdict(self.config),
            "config_sha256": self.config.sha256,
            "num_pool": self.num_pool,
            "num_clusters": self.num_clusters,
            "num_duplicates": self.num_duplicates,
            "num_missing": self.num_missing,
            "chosen": chosen,
        }


def _number(value: float) -> float | None:
    return None if math.isnan(value) else float(value)


def parse_budget(text: str, num_pool: int) -> int:
    """Reads a budget.

    Args:
        text: a whole number, or a share such as ``10%``.
        num_pool: images there are.

    Returns:
        Images, 1 to ``num_pool``; a share is rounded to the nearest.

    Raises:
        InputError: no number, or one that the pool does not allow.
    """
    try:
        wanted = round(num_pool * float(text[:-1]) / 100.0) if text.endswith("%") else int(text)
    except (ValueError, OverflowError):
        raise InputError(f"budget {text!r} is neither a number of images nor a share such as 10%") from None
    if not 1 <= wanted <= num_pool:
        raise InputError(f"budget {text!r} means {wanted} of {num_pool} images: take at least 1 and at most all")
    return wanted


def select(
    embeddings_ND: np.ndarray,
    ids: Sequence[str],
    budget: int,
    *,
    method: str = "dual",
    gradients_NE: np.ndarray | None = None,
    strata: Sequence[str] | None = None,
    config: SelectConfig | None = None,
    clusters: Clusters | None = None,
) -> Selection:
    """Chooses images.

    Args:
        embeddings_ND: one vector per image, in memory or mapped; never copied as a whole.
        ids: names of the images.
        budget: images wanted.
        method: one of METHODS.
        gradients_NE: gradient norms over the epochs, for ``gradient`` and ``dual``.
        strata: kind of each image, or None.
        config: what is rarely changed.
        clusters: clusters of the same images if they were made before; None makes them.

    Returns:
        The same images whatever the order of ``ids`` among equals; fewer than wanted where only near-duplicates
        are left, which ``num_missing`` says.

    Raises:
        InputError: an unknown method, or a budget or choice that cannot be used.
        CalibrationError: columns that do not fit, names twice, NaN, or no gradients where they are needed.
        MissingExtra: the clustering library is not installed.
    """
    config = config or SelectConfig()
    if method not in SELECTION_METHODS:
        raise InputError(f"no selection method {method!r}: there are {', '.join(SELECTION_METHODS)}")
    check_ids(ids)
    if len(ids) != len(embeddings_ND):
        raise CalibrationError(f"{len(ids)} names for {len(embeddings_ND)} embeddings")
    if not 1 <= budget <= len(ids):
        raise InputError(f"a budget of {budget} images cannot be taken from {len(ids)}")
    ties_N = id_keys(ids, config.seed)
    if method == "random":
        return _plain(method, config, ids, np.argsort(wide(ties_N))[:budget])
    if method == "kcentre":
        return _plain(method, config, ids, k_centre(embeddings_ND, budget, ties_N))
    if clusters is None:
        clusters = cluster(
            embeddings_ND,
            count=config.clusters,
            strata=strata,
            seed=config.seed,
            algorithm=config.algorithm,
            dim=config.dim,
        )
    elif len(clusters.labels_N) != len(ids):
        raise CalibrationError(f"clusters of {len(clusters.labels_N)} images do not fit {len(ids)} names")
    return _ranked(embeddings_ND, ids, budget, method, gradients_NE, ties_N, config, clusters)


def _plain(method: str, config: SelectConfig, ids: Sequence[str], rows_M: np.ndarray) -> Selection:
    nothing_M = np.full(len(rows_M), np.nan)
    return Selection(
        method=method,
        config=config,
        ids=tuple(ids[row] for row in rows_M),
        rows_M=rows_M.astype(np.int64),
        labels_M=np.full(len(rows_M), -1),
        distance_rank_M=nothing_M,
        quality_rank_M=nothing_M,
        score_M=nothing_M,
        num_pool=len(ids),
        num_clusters=0,
        num_duplicates=0,
        num_missing=0,
    )


def _ranked(
    embeddings_ND: np.ndarray,
    ids: Sequence[str],
    budget: int,
    method: str,
    gradients_NE: np.ndarray | None,
    ties_N: np.ndarray,
    config: SelectConfig,
    clusters: Clusters,
) -> Selection:
    near_N = distance_rank(clusters.distances_N, clusters.labels_N, ties_N)
    good_N = np.full(len(ids), np.nan)
    if gradients_NE is not None:
        if len(gradients_NE) != len(ids):
            raise CalibrationError(f"gradients of {len(gradients_NE)} images do not fit {len(ids)} names")
        quality_N = quality(gradients_NE, weight=config.oscillation_weight)
        good_N = quality_rank(quality_N, clusters.labels_N, ties_N)
    elif method != "distance":
        raise CalibrationError(f"method {method!r} ranks gradients and was given none: record them, or use distance")
    scores = {"distance": near_N, "gradient": good_N, "dual": dual_rank(near_N, good_N, alpha=config.alpha)}
    walk = _Walk(
        embeddings_ND, clusters, np.lexsort((wide(ties_N), wide(scores[method]), wide(clusters.labels_N))), config
    )
    rows_M = walk.choose(budget)
    return Selection(
        method=method,
        config=config,
        ids=tuple(ids[row] for row in rows_M),
        rows_M=rows_M,
        labels_M=clusters.labels_N[rows_M],
        distance_rank_M=near_N[rows_M],
        quality_rank_M=good_N[rows_M],
        score_M=scores[method][rows_M],
        num_pool=len(ids),
        num_clusters=len(clusters.centres_KP),
        num_duplicates=walk.num_duplicates,
        num_missing=budget - len(rows_M),
    )


@dataclass(slots=True)
class _Walk:
    """Walks down every cluster's ranking.

    Keeps what is not near to anything kept before.
    """

    embeddings_ND: np.ndarray
    clusters: Clusters
    order_N: np.ndarray
    config: SelectConfig
    num_duplicates: int = 0
    rows: list[int] = field(default_factory=list)
    kept: list[list[np.ndarray]] = field(default_factory=list)
    """Unit vectors that were kept, in blocks, per cluster."""
    reach: np.ndarray = field(default_factory=lambda: np.zeros(0))
    """Largest distance of a kept image to its centre, per cluster; negative where none is kept."""

    def choose(self, budget: int) -> np.ndarray:
        sizes_K = self.clusters.sizes_K
        ends_K = np.cumsum(sizes_K)
        next_K = ends_K - sizes_K
        self.kept = [[] for _ in sizes_K]
        self.reach = np.full(len(sizes_K), -1.0)
        quotas_K = cluster_quotas(budget, sizes_K, gamma=self.config.gamma)
        while quotas_K.any():
            for label in np.flatnonzero(quotas_K):
                next_K[label] = self._walk(int(label), int(next_K[label]), int(ends_K[label]), int(quotas_K[label]))
            # what near-duplicates left open goes to clusters that still have images
            left_K = ends_K - next_K
            weights_K = np.where(left_K > 0, sizes_K.astype(np.float64) ** self.config.gamma, 0.0)
            quotas_K = share_out(budget - len(self.rows), weights_K, limits=left_K)
        return np.array(self.rows, np.int64)

    def _walk(self, label: int, start: int, end: int, quota: int) -> int:
        """Takes up to ``quota`` images of one cluster.

        Returns the place where it stopped.
        """
        place = start
        while quota and place < end:
            rows_B = self.order_N[place : min(place + _BLOCK, end)]
            if self.config.duplicate_cosine is None:
                keep, used = list(range(min(quota, len(rows_B)))), min(quota, len(rows_B))
            else:
                keep, used = self._distinct(label, rows_B, quota, self.config.duplicate_cosine)
            self.rows += [int(rows_B[i]) for i in keep]
            self.num_duplicates += used - len(keep)
            quota -= len(keep)
            place += used
        return place

    def _distinct(self, label: int, rows_B: np.ndarray, quota: int, cosine: float) -> tuple[list[int], int]:
        """Places of a block that are kept, and how many of the block were looked at."""
        # a mapped matrix is read forwards
        forwards = np.argsort(wide(rows_B))
        raw_BD = np.empty((len(rows_B), self.embeddings_ND.shape[1]), np.float32)
        raw_BD[forwards] = self.embeddings_ND[rows_B[forwards]]
        unit_BD = unit_rows(raw_BD)
        if self.config.centred:
            # an image at the mean has no direction and is nobody's near-duplicate
            unit_BD = unit_BD - self.clusters.projection.mean_D
            unit_BD /= np.maximum(np.linalg.norm(unit_BD, axis=1, keepdims=True), 1e-12)
        near_B = self._near(raw_BD, unit_BD, cosine)
        near_BB = unit_BD @ unit_BD.T > cosine
        keep: list[int] = []
        used = 0
        for i in range(len(rows_B)):
            if len(keep) == quota:
                break
            used = i + 1
            if not near_B[i] and not near_BB[i, keep].any():
                keep.append(i)
        if keep:
            self.kept[label].append(unit_BD[keep])
            self.reach[label] = max(self.reach[label], float(self.clusters.distances_N[rows_B[keep]].max()))
        return keep, used

    def _near(self, raw_BD: np.ndarray, unit_BD: np.ndarray, cosine: float) -> np.ndarray:
        """Which candidates are near to an image that was kept before, in any cluster."""
        close_K = self.reach >= 0.0
        if not self.config.centred:
            close_K &= self._within_reach(raw_BD, cosine)
        near_B = np.zeros(len(unit_BD), bool)
        for label in np.flatnonzero(close_K):
            for kept_MD in self.kept[label]:
                near_B |= (unit_BD @ kept_MD.T > cosine).any(1)
        return near_B

    def _within_reach(self, raw_BD: np.ndarray, cosine: float) -> np.ndarray:
        """Clusters that may hold a near-duplicate.

        Around the mean lengths differ and none could be ruled out.
        """
        # the projection shortens distances, so a near-duplicate of a candidate lies within this much of it, and
        # its centre within that centre's reach more: all other clusters are passed over
        gap = math.sqrt(2.0 * (1.0 - cosine)) + 1e-4
        projected_BP = self.clusters.projection.apply(raw_BD)
        centres_KP = self.clusters.centres_KP
        squares_BK = (
            np.square(projected_BP).sum(1)[:, None] - 2.0 * projected_BP @ centres_KP.T + np.square(centres_KP).sum(1)
        )
        within_K: np.ndarray = np.sqrt(np.clip(squares_BK, 0.0, None)).min(0) <= gap + self.reach + 1e-3
        return within_K


def k_centre(embeddings_ND: np.ndarray, budget: int, ties_N: np.ndarray) -> np.ndarray:
    """Greedy k-centre (Gonzalez 1985).

    Each next image is the one farthest from all chosen, by cosine.

    Takes one pass over the pool an image; a baseline for pools of thousands, not of millions.

    Args:
        embeddings_ND: one vector per image.
        budget: images wanted.
        ties_N: the smallest is taken first.

    Returns:
        int64 rows, in the order of choice.

    Raises:
        CalibrationError: a vector that holds NaN, infinity or only zeros.
    """
    nearest_N = np.full(len(embeddings_ND), -np.inf)
    first_last = np.argsort(wide(ties_N))
    chosen = [int(first_last[0])]
    while True:
        centre_D = unit_rows(embeddings_ND[chosen[-1:]])[0]
        for part in chunks(len(embeddings_ND)):
            nearest_N[part] = np.maximum(nearest_N[part], unit_rows(embeddings_ND[part]) @ centre_D)
        nearest_N[chosen[-1]] = np.inf
        if len(chosen) == budget:
            return np.array(chosen, np.int64)
        chosen.append(int(first_last[nearest_N[first_last].argmin()]))


__all__ = ["SELECTION_METHODS", "SELECTION_VERSION", "SelectConfig", "Selection", "k_centre", "parse_budget", "select"]
