"""Order of files by their names: by value where names are numbers, else natural, and ties are told."""

from __future__ import annotations

import random
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyusfm_runtime.images.order import in_order, natural_key


def ordered(*names: str) -> list[str]:
    """Names in order, whatever order they are given in."""
    shuffled = list(names)
    random.Random(5).shuffle(shuffled)
    return [path.name for path in in_order(Path(name) for name in shuffled).paths]


@pytest.mark.parametrize(
    "names",
    [
        ("a.png", "img1.png", "img2.png", "IMG3.png", "img10.png"),
        ("1700000000.25.png", "1700000000.2534.png", "1700000000.3.png", "1700000001.png"),
        ("0.05.png", "0.1.png", "0.25.png", "1.png"),
        ("0,05.png", "0,1.png", "0,25.png"),
        ("-10.png", "-2.png", "-1.5.png", "0.png", "3.png"),
        ("1e-05.png", "0.001.png", "0.5.png"),
        ("t0.05.png", "t0.1.png", "t0.25.png"),
        ("t0,05.png", "t0,1.png", "t0,25.png"),
        ("frame_1700000000.2534.png", "frame_1700000000.3.png"),
        ("depth_-10.png", "depth_-5.png", "depth_3.png"),
        ("img-1.png", "img-2.png", "img-10.png"),
        ("v1.2.png", "v1.9.png", "v1.10.png"),
        ("1.2.840.9.7.png", "1.2.840.10.5.png"),
        ("IM0001", "IM0002", "IM0010"),
        ("scan.1", "scan.2", "scan.10"),
        ("frame.png", "frame (2).png", "frame (10).png"),
        ("0x9.png", "0xA.png", "0x10.png"),
        ("\u0663.png", "\u0664.png", "\u0661\u0660.png"),
        ("\uff19.png", "\uff11\uff10.png"),
        ("12:00:01.250.png", "12:00:01.9.png", "12:00:02.png"),
        ("2024-01-09_3.png", "2024-01-10_2.png", "2024-02-01_1.png"),
    ],
    ids=lambda names: names[0],
)
def test_order(names: tuple[str, ...]) -> None:
    assert ordered(*names) == list(names)


def test_ties_are_told() -> None:
    found = in_order(Path(name) for name in ("1.png", "01.png", "1.jpg", "2.png"))
    assert found.ties == 2 and any("same place" in note for note in found.notes)
    assert in_order([Path("1.png"), Path("2.png")]).notes == ()


def test_a_reading_as_decimals_that_matters_is_told() -> None:
    assert any("decimal" in note for note in in_order([Path("0.1.png"), Path("0.05.png")]).notes)
    assert in_order([Path("0.1.png"), Path("0.2.png")]).notes == ()
    assert any("counters" in note for note in in_order([Path("v1.9.png"), Path("v1.10.png")]).notes)


@given(st.lists(st.decimals(-(10**9), 10**9, places=4), min_size=2, max_size=20, unique=True))
def test_names_that_are_numbers_come_by_value(numbers: list[Decimal]) -> None:
    found = in_order(Path(f"{number.normalize():f}.png") for number in numbers)
    assert found.numeric
    assert [Decimal(path.stem) for path in found.paths] == sorted(numbers)


@given(st.lists(st.text("ab01.-_ ", min_size=1, max_size=8), min_size=1, max_size=12, unique=True))
def test_the_order_does_not_depend_on_how_files_are_listed(stems: list[str]) -> None:
    paths = [Path(f"x{stem}.png") for stem in stems]
    assert in_order(paths).paths == in_order(reversed(paths)).paths


def test_one_name_has_a_key_of_its_own() -> None:
    names = ["img10.png", "img2.png", "img1.png", "IMG3.png", "a.png"]
    assert sorted((Path(name) for name in names), key=natural_key)[0] == Path("a.png")


def test_exponents_without_a_sign_are_text_and_that_is_told() -> None:
    found = in_order([Path("1e3.png"), Path("3e2.png")])
    assert [path.name for path in found.paths] == ["1e3.png", "3e2.png"] and "1e+3" in found.notes[0]
    assert not in_order([Path("2e3.png"), Path("3e3.png")]).notes
