"""Calibration sets: identity, drawing, and what may not calibrate."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest

from tinyusfm_calibration.leakage import check_leakage
from tinyusfm_calibration.sets import (
    CalibrationSet,
    NamedFrame,
    SetDeclaration,
    declared_names,
    describe_frames,
    draw,
    exclude_test_frames,
    load_declaration,
    phantom_frames,
    pixels_sha256,
)
from tinyusfm_runtime.errors import CalibrationError, InputError
from tinyusfm_runtime.frame import Frame


def frames(count: int, *, strata: int = 2, per_group: int = 1) -> list[NamedFrame]:
    rng = np.random.default_rng(7)
    return [
        NamedFrame(
            id=f"images/{i:03}.jpg",
            frame=Frame(pixels=rng.integers(0, 255, (16, 12), dtype=np.uint8)),
            sha256=f"{i:064x}",
            stratum=f"s{i % strata}",
            group=f"g{i // per_group}",
        )
        for i in range(count)
    ]


def test_the_id_changes_with_order_pixels_names_and_strata() -> None:
    some = frames(16)
    base = describe_frames("a", some)
    other_pixels = NamedFrame(id=some[0].id, frame=some[1].frame, sha256=some[0].sha256, stratum=some[0].stratum)
    variants = [
        describe_frames("b", some),
        describe_frames("a", some[::-1]),
        describe_frames("a", frames(17)),
        describe_frames("a", [other_pixels, *frames(17)[1:]]),
    ]
    assert len({base.id, *(v.id for v in variants)}) == 5
    assert describe_frames("a", frames(16)).id == base.id


def test_a_set_survives_json_and_notices_an_edit() -> None:
    chosen = describe_frames("a", frames(16))
    text = json.dumps(chosen.to_json())
    assert CalibrationSet.from_json(json.loads(text)) == chosen
    with pytest.raises(CalibrationError, match="edited"):
        CalibrationSet.from_json(json.loads(text.replace("images/003", "images/903")))
    with pytest.raises(CalibrationError, match="unknown or missing"):
        CalibrationSet.from_json({**chosen.to_json(), "pixels": []})
    with pytest.raises(CalibrationError, match="version"):
        CalibrationSet.from_json({**chosen.to_json(), "version": 99})


def test_the_json_form_holds_no_pixels() -> None:
    one = frames(16)
    assert len(json.dumps(describe_frames("a", one).to_json())) < 16 * 400


def test_too_few_frames_are_refused_and_copies_do_not_count() -> None:
    with pytest.raises(CalibrationError, match="15 distinct frames: give at least 16"):
        describe_frames("a", frames(15))
    with pytest.raises(CalibrationError, match="15 distinct"):
        describe_frames("a", [*frames(15), frames(1)[0]])


def test_frames_of_one_colour_are_refused_by_name() -> None:
    black = NamedFrame(id="black.png", frame=Frame(pixels=np.zeros((16, 12), np.uint8)))
    with pytest.raises(CalibrationError, match="1 of 17 .*black.png"):
        describe_frames("a", [*frames(16), black])


def test_a_frames_hash_is_of_its_pixels_alone() -> None:
    pixels = np.arange(96, dtype=np.uint8).reshape(8, 12)
    base = pixels_sha256(Frame(pixels=pixels))
    assert pixels_sha256(Frame(pixels=pixels, spacing_mm=(0.1, 0.1), seq=5)) == base
    assert pixels_sha256(Frame(pixels=np.ascontiguousarray(pixels.reshape(12, 8)))) != base
    assert pixels_sha256(Frame(pixels=np.asfortranarray(pixels))) == base


def test_leakage_is_found_by_file_and_by_pixels() -> None:
    some = frames(16)
    check_leakage(["aa", "bb"], ["cc"])
    exclude_test_frames(some, ["ff" * 32])
    with pytest.raises(CalibrationError, match="1 calibration frame"):
        exclude_test_frames(some, [some[4].sha256])
    with pytest.raises(CalibrationError, match="2 calibration frame"):
        exclude_test_frames(some, [pixels_sha256(some[4].frame), pixels_sha256(some[5].frame).upper()])


def test_a_draw_takes_one_frame_of_a_group_and_does_not_depend_on_order() -> None:
    declaration = SetDeclaration(name="d", source="table", about="", count=20, seed=3)
    pool = frames(120, strata=3, per_group=4)
    drawn = draw(declaration, pool)
    assert len({named.group for named in drawn}) == 20
    assert {s: sum(n.stratum == s for n in drawn) for s in ("s0", "s1", "s2")}.keys() == {"s0", "s1", "s2"}
    random.Random(1).shuffle(pool)
    assert [named.id for named in draw(declaration, pool)] == [named.id for named in drawn]
    other = SetDeclaration(name="d", source="table", about="", count=20, seed=4)
    assert [named.id for named in draw(other, pool)] != [named.id for named in drawn]


def test_a_draw_balances_the_strata() -> None:
    rare = [NamedFrame(id=f"r{i}", frame=n.frame, stratum="rare") for i, n in enumerate(frames(8))]
    drawn = draw(SetDeclaration(name="d", source="table", about="", count=16), [*frames(200, strata=1), *rare])
    assert sum(named.stratum == "rare" for named in drawn) == 8


def test_a_draw_uses_more_of_a_group_only_when_groups_run_out() -> None:
    drawn = draw(SetDeclaration(name="d", source="table", about="", count=16), frames(40, per_group=4))
    assert len({named.group for named in drawn}) == 10
    assert len({named.id for named in drawn}) == 16


@pytest.mark.parametrize("name", declared_names())
def test_declared_sets_can_be_read_and_never_touch_the_test_split(name: str) -> None:
    declaration = load_declaration(name)
    assert declaration.split in ("train", "val")
    assert declaration.about
    if declaration.source == "phantom":
        assert declaration.seed + declaration.count < 1_000_000
        assert declaration.seed > 1000  # golden, gate and demo phantoms have seeds below


def test_the_declared_phantoms_calibrate() -> None:
    few = SetDeclaration(name="p", source="phantom", about="", count=16, seed=10_000)
    assert len(describe_frames("p", draw(few)).ids) == 16
    assert [named.id for named in phantom_frames([3, 5])] == ["phantom:3", "phantom:5"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('source = "table"\nabout = "x"\ncount = 32\nsplit = "test"', "test split"),
        ('source = "web"\nabout = "x"\ncount = 32', "table or phantom"),
        ('source = "table"\nabout = "x"\ncount = 3', "at least 16"),
        ('source = "table"\nabout = "x"\ncount = 32\ncolour = 1', "colour"),
        ("source = ", "bad.toml"),
    ],
)
def test_a_declaration_that_cannot_be_used_says_why(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(InputError, match=says):
        load_declaration(str(path))


def test_an_unknown_set_names_the_declared_ones() -> None:
    with pytest.raises(InputError, match="hc18, phantom"):
        load_declaration("hc19")
