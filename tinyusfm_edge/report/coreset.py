"""The page of ``tinyusfm-edge coreset``: what was chosen, from which clusters, by which ranks.

Pictures are shown small and named by the hash of their id. It does not know how anything was computed.
Shapes: N pictures, SS rows and columns.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from tinyusfm_edge.report.charts import histogram
from tinyusfm_edge.report.page import Block, Chart, Facts, Page, Pictures, Table
from tinyusfm_runtime.overlay import encode_png
from tinyusfm_runtime.preprocess import resize

if TYPE_CHECKING:
    from tinyusfm_edge.training.coreset import Coreset

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
        Pictures(
            title="The chosen pictures",
            note=f"{len(shown)} of {count}, evenly over the order of choice (cluster by cluster, best first).",
            pictures=[("", montage(pool.pixels_NSS, shown))],
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
                note=f"{selection.num_clusters} clusters; the 40 largest are shown.",
                header=("cluster", "kind", "pictures", "chosen", "best by id hash", "s of the best"),
                rows=_clusters(coreset),
            )
        )
    ranks = {
        "r_d, distance": [v for v in selection.distance_rank_M.tolist() if not math.isnan(v)],
        "r_q, quality": [v for v in selection.quality_rank_M.tolist() if not math.isnan(v)],
        "s": [v for v in selection.score_M.tolist() if not math.isnan(v)],
    }
    if all(len(values) > 1 for values in (ranks["r_d, distance"], ranks["s"])):
        known = {name: values for name, values in ranks.items() if len(values) > 1}
        blocks.append(
            Chart(
                title="Ranks of the chosen",
                note="0 is the best of a cluster, 1 its last.",
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
                ("short of the budget", str(selection.num_missing)),
                *((f"left out as {flag}", str(number)) for flag, number in pool.left_out.items()),
                *((f"seconds, {stage}", f"{seconds:.1f}") for stage, seconds in coreset.seconds.items()),
            ],
        )
    )
    headline = f"{count} of {len(pool)} pictures by {selection.method}"
    lead = ["A re-implementation from the published abstract and figure; clusters, formulas and defaults are ours."]
    lead += [f"not decoded: {failure.name}: {failure.reason}" for failure in pool.failures]
    return Page(title="Coreset", passed=selection.num_missing == 0, headline=headline, lead=lead, blocks=blocks)


def montage(pixels_NSS: np.ndarray, rows: Sequence[int] | np.ndarray) -> bytes:
    """Thumbnails in one picture, PNG.

    Args:
        pixels_NSS: all pictures, uint8.
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
    for label in np.argsort(-sizes, kind="stable")[:40].tolist():
        best, score = "-", "-"
        if label in first:
            best = hashlib.sha256(selection.ids[first[label]].encode()).hexdigest()[:12]
            score = f"{selection.score_M[first[label]]:.3f}"
        found.append((str(label), clusters.strata[label] or "-", str(sizes[label]), str(chosen[label]), best, score))
    return found


__all__ = ["COLUMNS", "SHOWN", "THUMBNAIL", "coreset_page", "montage"]
