"""Coverage: what kinds of frames there are, and a choice that covers them.

Along depth, gain, probe, class and colour.

What a table says about a frame is taken as it stands; where it says nothing a proxy is measured on the image: depth
is rows times spacing, gain the mean of what is not black, a convex or phased probe shows by the black corners of its
sector. The choice walks the clusters of clusters.py by their quotas, nearest to the centre first, and prefers frames
of kinds that are still short. It does not know models or where frames lie.

Shapes: N images of the pool, D numbers of an embedding.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from tinyusfm_calibration.clusters import Clusters
from tinyusfm_calibration.embeddings import id_keys, unit_rows
from tinyusfm_calibration.quotas import cluster_quotas, share_out
from tinyusfm_calibration.ranking import distance_rank
from tinyusfm_runtime.errors import CalibrationError, InputError
from tinyusfm_runtime.frame import Frame, PixelFormat
from tinyusfm_runtime.numerics.order import wide

NUMERIC_AXES: Final = ("depth_mm", "gain")
"""Axes that are cut at their terciles."""
METADATA_AXES: Final = ("label", "probe", "device", "organ", "source", "depth_mm", "gain")
"""Columns of a table that are taken as they stand, where they hold anything."""
FLOOR_SHARE: Final = 0.25
"""A kind is wanted with at least this share of an even split, so that rare kinds are not lost (our choice)."""

_BLACK = 8
_CORNER = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Axis:
    """One way to tell frames apart.

    Attributes:
        name: such as ``gain``.
        measured: False if a table said it, True if it was measured on the images.
        kinds: kind of each image of the pool, N.
    """

    name: str
    measured: bool
    kinds: tuple[str, ...]

    def counts(self, rows: Sequence[int] | np.ndarray | None = None) -> dict[str, int]:
        """How many frames of each kind, of some rows or of all."""
        chosen = self.kinds if rows is None else [self.kinds[row] for row in rows]
        found = Counter(chosen)
        return {kind: found.get(kind, 0) for kind in sorted(set(self.kinds))}


def describe_frame(frame: Frame, metadata: Mapping[str, str] | None = None) -> dict[str, str | float]:
    """What is known about a frame along every axis.

    Measured values carry their axis' name with a star.

    Args:
        frame: the frame, cropped.
        metadata: a table's row, or None.

    Returns:
        Axis -> value; ``gain*`` was measured where ``gain`` was not said.
    """
    stated: dict[str, str | float] = {
        name: str((metadata or {})[name]).strip()
        for name in METADATA_AXES
        if str((metadata or {}).get(name) or "").strip()
    }
    grey_HW = frame.pixels if frame.pixel_format is PixelFormat.GREY else frame.pixels[:, :, :3].mean(2)
    bright = grey_HW[grey_HW >= _BLACK]
    measured: dict[str, str | float] = {
        "gain*": float(bright.mean()) / 255.0 if bright.size else 0.0,
        "probe*": _sector(np.asarray(grey_HW)),
        "colour*": _colour(frame),
    }
    if frame.spacing_mm is not None:
        measured["depth_mm*"] = frame.spacing_mm[0] * frame.pixels.shape[0]
    return stated | {name: value for name, value in measured.items() if name.rstrip("*") not in stated}


def find_axes(described: Sequence[Mapping[str, str | float]]) -> list[Axis]:
    """Axes along which a pool differs.

    Args:
        described: see ``describe_frame``, one per image.

    Returns:
        Axes with at least two kinds, by name; numbers are cut at their terciles; ``unknown`` where nothing is said.
    """
    axes = []
    for name in sorted({key for row in described for key in row}):
        values = [row.get(name) for row in described]
        numbers = [_as_number(value) for value in values]
        is_numeric = name.rstrip("*") in NUMERIC_AXES and any(number is not None for number in numbers)
        kinds = _terciles(numbers) if is_numeric else tuple("unknown" if v is None else str(v) for v in values)
        if len(set(kinds)) > 1:
            axes.append(Axis(name=name.rstrip("*"), measured=name.endswith("*"), kinds=kinds))
    return axes


def _as_number(value: str | float | None) -> float | None:
    try:
        number = float(value) if value is not None else None
    except ValueError:
        return None
    return number if number is None or np.isfinite(number) else None


def _terciles(numbers: Sequence[float | None]) -> tuple[str, ...]:
    known = np.array([number for number in numbers if number is not None])
    low, high = np.quantile(wide(known), (1 / 3, 2 / 3))
    names = (f"low, to {low:.3g}", f"middle, {low:.3g} to {high:.3g}", f"upper, from {high:.3g}")
    return tuple("unknown" if number is None else names[int(number > low) + int(number > high)] for number in numbers)


def _sector(grey_HW: np.ndarray) -> str:
    """Whether the two upper corners are black triangles.

    As left of and right of a convex or phased probe's sector.
    """
    side = max(2, min(grey_HW.shape) // _CORNER)
    corners = (grey_HW[:side, :side], grey_HW[:side, -side:])
    black = [float((corner < 2 * _BLACK).mean()) for corner in corners]
    middle = grey_HW[:side, grey_HW.shape[1] // 2 - side // 2 :][:, :side]
    is_sector = min(black) > 0.9 and float((middle < 2 * _BLACK).mean()) < 0.9
    return "sector with black corners" if is_sector else "no black corners"


def _colour(frame: Frame) -> str:
    if frame.pixel_format is PixelFormat.GREY:
        return "grey"
    spread = np.ptp(frame.pixels[:, :, :3].astype(np.int16), axis=2)
    return "coloured" if float((spread > 24).mean()) > 0.002 else "grey"


def choose_covering(
    embeddings_ND: np.ndarray,
    ids: Sequence[str],
    clusters: Clusters,
    axes: Sequence[Axis],
    budget: int,
    *,
    groups: Sequence[str] | None = None,
    duplicate_cosine: float | None = 0.995,
    seed: int = 0,
) -> np.ndarray:
    """Chooses frames that cover clusters and kinds, none of them near-duplicates.

    Kinds that are too rare to come by themselves are taken first, up to FLOOR_SHARE of an even split. Then each cluster
    fills its quota. Inside, a frame's cost is the mean of its distance rank and of how full its kinds are;
    a patient gives a second frame only where no other patient is left in the cluster.

    Args:
        embeddings_ND: one vector per image.
        ids: names of the images.
        clusters: clusters of the same images.
        axes: kinds of the same images.
        budget: frames wanted.
        groups: patient of each image, or None.
        duplicate_cosine: frames this similar to a chosen one are skipped; None skips none.
        seed: of the ties.

    Returns:
        int64 rows in order of choice; fewer than wanted where only near-duplicates are left.

    Raises:
        InputError: a budget outside the pool.
        CalibrationError: columns of different length.
    """
    total = len(ids)
    if not 1 <= budget <= total:
        raise InputError(f"{budget} frames cannot be chosen from {total}")
    if any(len(axis.kinds) != total for axis in axes) or not len(embeddings_ND) == len(clusters.labels_N) == total:
        raise CalibrationError("embeddings, clusters and kinds of another number of images do not fit")
    ties_N = id_keys(ids, seed)
    ranks_N = distance_rank(clusters.distances_N, clusters.labels_N, ties_N)
    search = _Search(
        unit_ND=unit_rows(embeddings_ND),
        ranks_N=ranks_N,
        ties_N=ties_N,
        axes=axes,
        groups=tuple(groups) if groups is not None else tuple(ids),
        cosine=2.0 if duplicate_cosine is None else duplicate_cosine,
        budget=budget,
    )
    for codes, target, count in search.columns():
        shares = np.bincount(codes, minlength=len(target)) / total
        for kind in np.flatnonzero(target > budget * shares):
            while count[kind] < round(target[kind]) and len(search.chosen) < budget and search.take(codes == kind):
                pass
    taken_K = np.bincount(clusters.labels_N[search.chosen], minlength=len(clusters.sizes_K))
    wanted_K = np.maximum(cluster_quotas(budget, clusters.sizes_K) - taken_K, 0)
    quotas_K = share_out(budget - len(search.chosen), wanted_K, limits=clusters.sizes_K) if wanted_K.any() else wanted_K
    members = [np.flatnonzero(clusters.labels_N == label) for label in range(len(quotas_K))]
    while quotas_K.any():
        # turn by turn, so that early clusters do not use up the kinds
        for label in [label for turn in range(int(quotas_K.max())) for label in np.flatnonzero(quotas_K > turn)]:
            search.take(members[label])
        left_K = np.array([int(search.open_N[rows].sum()) for rows in members])
        quotas_K = share_out(budget - len(search.chosen), np.where(left_K > 0, clusters.sizes_K, 0), limits=left_K)
    return np.array(search.chosen, np.int64)


class _Search:
    """What has been chosen so far, and what is still open."""

    def __init__(
        self,
        *,
        unit_ND: np.ndarray,
        ranks_N: np.ndarray,
        ties_N: np.ndarray,
        axes: Sequence[Axis],
        groups: Sequence[str],
        cosine: float,
        budget: int,
    ) -> None:
        self.unit_ND, self.ranks_N, self.ties_N, self.cosine = unit_ND, ranks_N, ties_N, cosine
        self.chosen: list[int] = []
        self.open_N = np.ones(len(ranks_N), bool)
        self.groups, self.used_groups = np.unique(wide(np.asarray(groups)), return_inverse=True)[1], set[int]()
        self.codes: list[np.ndarray] = []
        self.targets: list[np.ndarray] = []
        self.counts: list[np.ndarray] = []
        for axis in axes:
            kinds, codes_N = np.unique(wide(np.asarray(axis.kinds)), return_inverse=True)
            shares = np.bincount(codes_N) / len(codes_N)
            self.codes.append(codes_N)
            self.targets.append(budget * np.maximum(shares, FLOOR_SHARE / len(kinds)))
            self.counts.append(np.zeros(len(kinds)))

    def take(self, rows: np.ndarray) -> bool:
        """Takes the cheapest open frame of some rows and closes its near-duplicates.

        The rows are given as places or as a mask.

        Returns:
            False if none of them is open.
        """
        rows = np.flatnonzero(rows) if rows.dtype == bool else rows
        rows = rows[self.open_N[rows]]
        if not len(rows):
            return False
        fullness = [count[codes[rows]] / target[codes[rows]] for codes, target, count in self.columns()]
        cost = self.ranks_N[rows] + (np.minimum(np.mean(fullness, 0), 1.0) if fullness else 0.0)
        seen = np.array([int(group) in self.used_groups for group in self.groups[rows]])
        best = int(rows[np.lexsort((wide(self.ties_N[rows]), wide(cost), wide(seen)))[0]])
        self.chosen.append(best)
        self.used_groups.add(int(self.groups[best]))
        for codes, _, count in self.columns():
            count[codes[best]] += 1
        self.open_N &= self.unit_ND @ self.unit_ND[best] <= self.cosine
        self.open_N[best] = False
        return True

    def columns(self) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Per axis: kinds of the images, frames wanted and chosen of each kind.

        In this order: kind of each image, frames wanted of each kind, frames chosen of each kind.
        """
        return list(zip(self.codes, self.targets, self.counts, strict=True))


def coverage_report(axes: Sequence[Axis], chosen: Sequence[int] | np.ndarray) -> list[dict[str, Any]]:
    """What a choice covers, kind by kind.

    Args:
        axes: kinds of the pool.
        chosen: rows of the choice.

    Returns:
        One entry a kind: axis, measured, kind, pool and chosen counts.
    """
    found = []
    for axis in axes:
        pool, mine = axis.counts(), axis.counts(chosen)
        found += [
            {"axis": axis.name, "measured": axis.measured, "kind": kind, "pool": pool[kind], "chosen": mine[kind]}
            for kind in pool
        ]
    return found


__all__ = [
    "FLOOR_SHARE",
    "METADATA_AXES",
    "NUMERIC_AXES",
    "Axis",
    "choose_covering",
    "coverage_report",
    "describe_frame",
    "find_axes",
]
