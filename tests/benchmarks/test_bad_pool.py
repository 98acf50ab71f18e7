"""The bad pool: its kinds are what they say, junk is counted as junk, and a method that takes junk is seen to."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.needs import needs

needs("cv2", "install tinyusfm-edge[train]")
needs("sklearn", "install tinyusfm-edge[calibration]")
needs("lightning_fabric", "install tinyusfm-edge[train]")

from bad_pool import BUDGETS, KINDS, BadPool, junk_rows, make_bad_pool, measure  # noqa: E402
from tinyusfm_edge.data.images import list_rows, read_pool  # noqa: E402
from tinyusfm_runtime.phantom import make_phantom  # noqa: E402


@pytest.fixture(scope="module")
def bad() -> BadPool:
    return make_bad_pool(np.stack([make_phantom(seed, height=64, width=64).frame.pixels for seed in range(40)]), 3.0, 0)


def test_three_quarters_are_junk_of_five_kinds(bad: BadPool) -> None:
    assert len(bad.pool) == 160 and {bad.kinds.count(kind) for kind in KINDS} == {24}
    good = bad.pool.pixels_NSS[bad.origin_N].astype(int)
    apart = np.abs(bad.pool.pixels_NSS.astype(int) - good).mean((1, 2))
    by_kind = {kind: [apart[i] for i, own in enumerate(bad.kinds) if own == kind] for kind in ("good", *KINDS)}
    assert max(by_kind["good"]) == 0
    assert max(by_kind["neighbour"]) < min(by_kind["overlay"]) and min(by_kind["jpeg"]) > 1
    row = bad.kinds.index("inverted")
    assert np.array_equal(bad.pool.pixels_NSS[row], 255 - bad.pool.pixels_NSS[bad.origin_N[row]])
    again = make_bad_pool(bad.pool.pixels_NSS[:40], 3.0, 0)
    assert again.pool.fingerprint == bad.pool.fingerprint


def test_a_neighbour_is_junk_only_beside_its_own_cine(bad: BadPool) -> None:
    row = bad.kinds.index("neighbour")
    origin = int(bad.origin_N[row])
    others = [i for i in range(40) if i != origin][:3]
    assert junk_rows(bad, np.array([row, *others]))["neighbour"] == 0
    assert junk_rows(bad, np.array([row, origin]))["neighbour"] == 1
    twin = next(i for i in range(40, 160) if bad.kinds[i] == "neighbour" and i != row)
    same = BadPool(pool=bad.pool, kinds=bad.kinds, origin_N=np.where(np.arange(160) == twin, origin, bad.origin_N))
    assert junk_rows(same, np.array([row, twin]))["neighbour"] == 1, "the second of one cine"
    assert junk_rows(bad, np.array([bad.kinds.index(kind) for kind in KINDS[1:]])) == dict.fromkeys(KINDS, 1) | {
        "neighbour": 0
    }


def test_a_method_that_likes_junk_is_seen_to(bad: BadPool, tmp_path: Path) -> None:
    """A broken control: gradients that are high and flat for inverted frames make the gradient rank choose them."""
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((160, 8)).astype(np.float32)
    likes = np.array([10.0 if kind == "inverted" else 1.0 for kind in bad.kinds])
    gradients = likes[:, None] * (1 + 0.01 * rng.standard_normal((160, 6)))
    found = {
        (row["method"], row["budget"]): row for row in measure(bad, vectors, gradients.astype(np.float32), 0, tmp_path)
    }
    assert found["gradient", BUDGETS[-1]]["inverted"] > 0.8
    assert found["distance", BUDGETS[-1]]["inverted"] < 0.5
    for row in found.values():
        assert row["share"] == pytest.approx(sum(row[kind] for kind in KINDS))
    written = read_pool(list_rows([tmp_path / "gradient"]).rows, 64)
    assert len(written) == found["gradient", BUDGETS[-1]]["chosen"]
    inverted = {bad.pool.pixels_NSS[row].tobytes() for row, kind in enumerate(bad.kinds) if kind == "inverted"}
    assert sum(pixels.tobytes() in inverted for pixels in written.pixels_NSS) > 0.8 * len(written)
