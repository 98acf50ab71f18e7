"""Coverage: what a table says and what is measured, and choices in which no kind is lost."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.needs import needs
from tinyusfm_calibration.clusters import Clusters, cluster
from tinyusfm_calibration.coverage import Axis, choose_covering, coverage_report, describe_frame, find_axes
from tinyusfm_calibration.embeddings import unit_rows
from tinyusfm_runtime.errors import CalibrationError, InputError
from tinyusfm_runtime.frame import Frame, PixelFormat

needs("sklearn", reason="install tinyusfm-edge[calibration]")


def image(level: int = 120, *, sector: bool = False) -> np.ndarray:
    """A grey image, as a linear probe or with the black corners of a sector."""
    pixels = np.full((80, 80), level, np.uint8)
    if sector:
        rows, cols = np.mgrid[:80, :80]
        pixels[np.abs(cols - 40) > 6 + rows // 2] = 0
    return pixels


def test_what_a_table_says_stands_before_what_is_measured() -> None:
    measured = describe_frame(Frame(pixels=image(), spacing_mm=(0.5, 0.5)))
    assert measured == {
        "gain*": pytest.approx(120 / 255),
        "probe*": "no black corners",
        "colour*": "grey",
        "depth_mm*": 40.0,
    }
    said = describe_frame(Frame(pixels=image()), {"probe": "convex", "label": "head", "gain": " ", "file": "x"})
    assert said["probe"] == "convex" and said["label"] == "head" and "probe*" not in said and "gain*" in said
    assert "depth_mm*" not in said, "without spacing nobody knows the depth"


def test_proxies_tell_sectors_and_colour() -> None:
    assert describe_frame(Frame(pixels=image(sector=True)))["probe*"] == "sector with black corners"
    assert describe_frame(Frame(pixels=np.zeros((80, 80), np.uint8)))["probe*"] == "no black corners"
    doppler = np.repeat(image()[:, :, None], 3, 2)
    assert describe_frame(Frame(pixels=doppler, pixel_format=PixelFormat.RGB))["colour*"] == "grey"
    doppler[:20, :20] = (255, 0, 0)
    assert describe_frame(Frame(pixels=doppler, pixel_format=PixelFormat.RGB))["colour*"] == "coloured"


def test_axes_are_cut_at_terciles_and_those_that_never_differ_are_left_out() -> None:
    rows = [{"gain*": i / 10, "label": "a", "depth_mm": str(i) if i else "deep"} for i in range(9)]
    axes = {axis.name: axis for axis in find_axes(rows)}
    assert set(axes) == {"gain", "depth_mm"} and axes["gain"].measured and not axes["depth_mm"].measured
    assert sorted(axes["gain"].counts().values()) == [3, 3, 3]
    assert axes["depth_mm"].kinds[0] == "unknown"


def pool(seed: int, count: int = 200) -> tuple[np.ndarray, list[str], Clusters, list[Axis]]:
    """Embeddings, names, clusters and two axes with a rare kind each."""
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(count, 12))
    rare = tuple("rare" if i % 40 == 0 else "usual" for i in range(count))
    thirds = tuple(str(k) for k in rng.integers(0, 3, count))
    axes = [Axis(name="probe", measured=False, kinds=rare), Axis(name="gain", measured=True, kinds=thirds)]
    return rows, [f"f{i}" for i in range(count)], cluster(rows, seed=seed), axes


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 1000), st.integers(4, 120))
def test_the_budget_is_filled_and_no_two_are_near_duplicates(seed: int, budget: int) -> None:
    rows, names, clusters, axes = pool(seed)
    rows[1::2] = rows[::2] + 1e-4
    found = choose_covering(rows, names, clusters, axes, budget)
    unit = unit_rows(rows[found])
    assert len(set(found.tolist())) == len(found) == min(budget, 100)
    assert (unit @ unit.T - 2 * np.eye(len(unit))).max() <= 0.995 + 1e-6
    assert (choose_covering(rows, names, clusters, axes, budget) == found).all()


def test_rare_kinds_are_not_lost() -> None:
    rows, names, clusters, axes = pool(3)
    found = choose_covering(rows, names, clusters, axes, 24)
    blind = choose_covering(rows, names, clusters, [], 24)
    assert axes[0].counts(found)["rare"] >= 3 > axes[0].counts(blind)["rare"], "the control looks at no kinds"
    spread = list(axes[1].counts(found).values())
    assert max(spread) - min(spread) <= 4
    entries = coverage_report(axes, found)
    assert {(e["axis"], e["kind"]): e["chosen"] for e in entries}["probe", "rare"] == axes[0].counts(found)["rare"]
    assert sum(e["pool"] for e in entries if e["axis"] == "gain") == 200


def test_a_patient_gives_a_second_frame_only_where_nobody_else_is_left() -> None:
    rows, names, clusters, axes = pool(1)
    groups = [f"patient{i // 4}" for i in range(200)]
    found = choose_covering(rows, names, clusters, axes, 30, groups=groups)
    alone = choose_covering(rows, names, clusters, axes, 30)
    assert len({groups[i] for i in found}) >= 28 > len({groups[i] for i in alone})


def test_what_does_not_fit_is_refused() -> None:
    rows, names, clusters, axes = pool(0)
    with pytest.raises(InputError, match="cannot be chosen"):
        choose_covering(rows, names, clusters, axes, 201)
    with pytest.raises(CalibrationError, match="do not fit"):
        choose_covering(rows[:-1], names, clusters, axes, 10)
