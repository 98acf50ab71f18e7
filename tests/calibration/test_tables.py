"""The table: rows, flags, spacing; splits and label shares that never part a patient, whatever the order of rows."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tables import write_raw
from tinyusfm_calibration.tables import Row, clean, label_share, read_table_rows, spacing_mm
from tinyusfm_runtime.errors import InputError


def write(folder: Path, text: str) -> Path:
    return write_raw(folder, text).parent


def rows_of(groups: list[int], labels: list[int]) -> list[Row]:
    return [
        Row(id=f"f/{n}", path=Path(f"{n}"), group=f"f/g{group}", label=f"l{label}", source="f")
        for n, (group, label) in enumerate(zip(groups, labels, strict=False))
    ]


ROWS = st.lists(st.tuples(st.integers(0, 12), st.integers(0, 2)), min_size=1, max_size=60).map(
    lambda pairs: rows_of([p[0] for p in pairs], [p[1] for p in pairs])
)


def test_rows_carry_their_columns_and_flags(tmp_path: Path) -> None:
    text = "file,label,mask,split,group,near_duplicate,label_conflict\na.png,x,m.png,train,p1,0,0\nb.png,y,,val,,1,0\n"
    folder = write(tmp_path / "set", text + "c.png,y,,val,,0,1\nd.png,,,train,p1,,\n")
    found = read_table_rows(folder)
    assert [row.id for row in found] == ["set/a.png", "set/b.png", "set/c.png", "set/d.png"]
    assert found[0].mask == folder / "m.png"
    assert found[1].mask is None
    assert [row.group for row in found] == ["set/p1", "set/b.png", "set/c.png", "set/p1"]
    kept, counts = clean(found)
    assert [row.id for row in kept] == ["set/a.png", "set/d.png"]
    assert counts == {"near_duplicate": 1, "label_conflict": 1}
    assert len(found[0].name) == 12
    assert "a.png" not in found[0].name


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("name,split\na,train\n", "lacks the columns file"),
        ("file,split\na.png\n", "line 2 has fewer cells"),
        ("file,split\na.png,train,more\n", "line 2 has more cells"),
        ("file,split\n../a.png,train\n", "outside its folder"),
        ("file,split\n,train\n", "names no file"),
        ("file,split\na.png,train\na.png,val\n", "line 3 names the file of line 2 again"),
        ("file,split,near_duplicate\na.png,train,maybe\n", "must be 0 or 1"),
    ],
)
def test_broken_tables_are_refused_by_line(tmp_path: Path, text: str, complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        read_table_rows(write(tmp_path / "set", text))


def test_a_missing_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no split.csv"):
        read_table_rows(tmp_path)


def test_spacing_has_one_formula_and_nonsense_is_an_error() -> None:
    row = {"pixel_size_mm": "0.1", "orig_h": "540", "orig_w": "800"}
    assert spacing_mm(row, 270, 200) == pytest.approx((0.2, 0.4))
    assert spacing_mm({"pixel_size_mm": "0.1"}, 270, 200) == pytest.approx((0.1, 0.1))
    assert spacing_mm({"pixel_size_mm": "0,1"}, 270, 200) == pytest.approx((0.1, 0.1)), "decimal comma"
    assert spacing_mm({"pixel_size_mm": "0.1 mm"}, 270, 200) == pytest.approx((0.1, 0.1))
    assert spacing_mm({}, 270, 200) is None
    for key, cell in (("orig_w", "wide"), ("pixel_size_mm", "1.234,5"), ("pixel_size_mm", "nan"), ("orig_h", "0")):
        with pytest.raises(InputError, match=key):
            spacing_mm({**row, key: cell}, 270, 200)


@given(ROWS, st.integers(0, 1000))
@settings(max_examples=50, deadline=None)
def test_label_shares_are_nested_whole_patients_and_keep_every_label(rows: list[Row], seed: int) -> None:
    small, middle, every = (label_share(rows, share, seed) for share in (0.1, 0.25, 1.0))
    assert every == rows
    assert {row.id for row in small} <= {row.id for row in middle}
    groups = {row.group for row in middle}
    assert [row for row in rows if row.group in groups] == middle
    owners = {row.group: min(r.label for r in rows if r.group == row.group) for row in rows}
    assert {owners[row.group] for row in small} == set(owners.values())


def test_a_share_outside_its_range_is_refused() -> None:
    for share in (0.0, 1.1):
        with pytest.raises(InputError, match=r"lies in \(0, 1\]"):
            label_share(rows_of([1], [1]), share, 0)


@pytest.mark.parametrize("word", ["nan", "NaN", "none", "-", ""])
def test_patients_without_a_name_are_not_one_patient(tmp_path: Path, word: str) -> None:
    (tmp_path / "split.csv").write_text(
        f"file,split,group,label\na.png,tr,{word},nan\nb.png,va,{word},x\nc.png,te,7,x\n"
    )
    rows = read_table_rows(tmp_path)
    assert len({row.group for row in rows}) == 3 and [row.split for row in rows] == ["train", "val", "test"]
    assert [row.label for row in rows] == ["", "x", "x"]
