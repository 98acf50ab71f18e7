"""The page of ``tinyusfm-edge coreset``.

What was chosen, from which clusters, by which ranks.

Images are shown small and named by the hash of their id. It does not know how anything was computed.
Shapes: N images, SS rows and columns.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from tinyusfm_edge.report.charts import histogram
from tinyusfm_edge.report.page import Block, Chart, Facts, Images, Page, Table
from tinyusfm_runtime.numerics.order import wide
from tinyusfm_runtime.numerics.preprocess import resize
from tinyusfm_runtime.overlay import encode_png

if TYPE_CHECKING:
    from tinyusfm_edge.training.coreset.choose import Coreset

CLUSTER_HEADER = ("cluster", "kind", "images", "chosen", "best image (hash of its name)", "its rank")
CLUSTERS_SHOWN = 40
"""Rows of the clusters' table at most."""
THUMBNAIL, COLUMNS, SHOWN = 64, 20, 400
"""Side of a thumbnail, thumbnails a row, and thumbnails at most."""


def coreset_page(coreset: Coreset) -> Page:
    """Puts the page together.

    Args:
        coreset: what was chosen.
    """
    selection, pool = coreset.selection, coreset.pool
    count = len(selection.ids)
    shown = selection.rows_M[:: max(1, math.ceil(count / SHOWN))]
    blocks: list[Block] = [
        Images(
            title="The chosen images",
            note=f"{len(shown)} of {count}, evenly over the order of choice (cluster by cluster, best first).",
            images=[("", montage(pool.pixels_NSS, shown))],
        ),
        Table(
            title="Where they come from",
            header=("folder", "pool", "chosen", "share"),
            rows=_sources(pool.sources, selection.rows_M),
        ),
    ]
    if coreset.clusters is not None:
        blocks.append(
            Table(
                title="Clusters",
                note=_cluster_note(selection.num_clusters),
                header=CLUSTER_HEADER if any(coreset.clusters.strata) else (CLUSTER_HEADER[0], *CLUSTER_HEADER[2:]),
                rows=_clusters(coreset),
            )
        )
    ranks = {
        "by distance": [v for v in selection.distance_rank_M.tolist() if not math.isnan(v)],
        "by quality": [v for v in selection.quality_rank_M.tolist() if not math.isnan(v)],
        "both together": [v for v in selection.score_M.tolist() if not math.isnan(v)],
    }
    if all(len(values) > 1 for values in (ranks["by distance"], ranks["both together"])):
        known = {name: values for name, values in ranks.items() if len(values) > 1}
        blocks.append(
            Chart(
                title="Ranks of the chosen",
                note="0 is the best of its cluster, 1 the last. Images are chosen by both ranks together.",
                svg=histogram(known, "rank"),
            )
        )
    blocks.append(
        Facts(
            title="Identity",
            facts=[
                ("method", selection.method),
                ("settings", selection.config.sha256),
                ("pool", pool.fingerprint),
                ("near-duplicates skipped", str(selection.num_duplicates)),
                ("fewer than asked for", str(selection.num_missing)),
                *((f"left out as {flag}", str(number)) for flag, number in pool.left_out.items()),
                *((f"seconds, {stage}", f"{seconds:.1f}") for stage, seconds in coreset.seconds.items()),
            ],
        )
    )
    headline = f"{count} of {len(pool)} images by {selection.method}"
    lead = ["A re-implementation from the published abstract and figure; clusters, formulas and defaults are ours."]
    lead += [f"not decoded: {failure.name}: {failure.reason}" for failure in pool.failures]
    return Page(title="Coreset", passed=selection.num_missing == 0, headline=headline, lead=lead, blocks=blocks)


def montage(pixels_NSS: np.ndarray, rows: Sequence[int] | np.ndarray) -> bytes:
    """Thumbnails in one image, PNG.

    Args:
        pixels_NSS: all images, uint8.
        rows: which, in order.
    """
    columns = min(COLUMNS, len(rows))
    lines = math.ceil(len(rows) / columns)
    step = THUMBNAIL + 2
    sheet = np.full((lines * step - 2, columns * step - 2), 255, np.uint8)
    for number, row in enumerate(rows):
        top, left = (number // columns) * step, (number % columns) * step
        small = resize(np.ascontiguousarray(pixels_NSS[row]), THUMBNAIL, THUMBNAIL)
        sheet[top : top + THUMBNAIL, left : left + THUMBNAIL] = small
    return encode_png(np.ascontiguousarray(np.repeat(sheet[:, :, None], 3, 2)))


def _sources(sources: Sequence[str], rows_M: np.ndarray) -> list[tuple[str, ...]]:
    pool, chosen = Counter(sources), Counter(sources[row] for row in rows_M)
    return [(name, str(total), str(chosen[name]), f"{chosen[name] / total:.1%}") for name, total in pool.most_common()]


def _cluster_note(count: int) -> str:
    shown = (
        f"{count} clusters" if count <= CLUSTERS_SHOWN else f"{count} clusters; the {CLUSTERS_SHOWN} largest are shown"
    )
    return f"{shown}. Images are named by a hash, since file names may name patients; the JSON file lists them."


def _clusters(coreset: Coreset) -> list[tuple[str, ...]]:
    clusters, selection = coreset.clusters, coreset.selection
    assert clusters is not None
    sizes = clusters.sizes_K
    chosen = np.bincount(selection.labels_M, minlength=len(sizes))
    first: dict[int, int] = {}
    for place, label in enumerate(selection.labels_M.tolist()):
        if label not in first or selection.score_M[place] < selection.score_M[first[label]]:
            first[label] = place
    found: list[tuple[str, ...]] = []
    for label in np.argsort(wide(-sizes), kind="stable")[:CLUSTERS_SHOWN].tolist():
        best, score = "-", "-"
        if label in first:
            best = hashlib.sha256(selection.ids[first[label]].encode()).hexdigest()[:12]
            score = f"{selection.score_M[first[label]]:.3f}"
        kind = (clusters.strata[label] or "-",) if any(clusters.strata) else ()
        found.append((str(label), *kind, str(sizes[label]), str(chosen[label]), best, score))
    return found


__all__ = ["CLUSTERS_SHOWN", "CLUSTER_HEADER", "COLUMNS", "SHOWN", "THUMBNAIL", "coreset_page", "montage"]
