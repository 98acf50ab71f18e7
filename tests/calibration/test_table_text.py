"""Tables as people save them: the same cells whatever the encoding, the separator and the names of columns."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tables import write_raw
from tinyusfm_calibration.table_text import CODE_PAGES, number, read_text
from tinyusfm_runtime.errors import EdgeError, InputError

PLAIN = "file,label,split\nimages/a.png,fötal,train\nimages/ä b.png,head,val\n"


def write(folder: Path, content: bytes) -> Path:
    return write_raw(folder, content)


def cells(path: Path) -> list[dict[str, str]]:
    return [dict(row) for _, row in read_text(path).rows]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_encodings_separators_and_line_ends_give_the_same_cells(
    tmp_path: Path, encoding: str, separator: str, end: str
) -> None:
    text = PLAIN.replace(",", separator).replace("\n", end)
    found = read_text(write(tmp_path, text.encode(encoding)))
    assert found.columns == ("file", "label", "split")
    assert [dict(row) for _, row in found.rows] == [
        {"file": "images/a.png", "label": "fötal", "split": "train"},
        {"file": "images/ä b.png", "label": "head", "split": "val"},
    ]
    assert [line for line, _ in found.rows] == [2, 3]
    assert found.notes == ()


@pytest.mark.parametrize("encoding", ["cp1252", "cp1250", "mac_roman", "cp850"])
def test_a_code_page_is_told_by_the_files_that_exist(tmp_path: Path, encoding: str) -> None:
    path = write(tmp_path, PLAIN.encode(encoding))
    found = read_text(path, lambda name: name == "images/ä b.png")
    assert found.rows[1][1]["file"] == "images/ä b.png"
    assert len(found.notes) == 1 and "the named files exist so" in found.notes[0]


def test_a_code_page_of_another_alphabet_is_told_by_the_files_too(tmp_path: Path) -> None:
    for name, encoding in (("снимок.png", "cp1251"), ("图像.png", "gb18030"), ("画像.png", "shift_jis")):
        path = write(tmp_path, f"file,split\n{name},train\n".encode(encoding))
        assert read_text(path, lambda typed, name=name: typed == name).rows[0][1]["file"] == name


def test_a_code_page_that_nothing_tells_is_said_to_be_a_guess(tmp_path: Path) -> None:
    found = read_text(write(tmp_path, PLAIN.encode("cp1252")))
    assert found.encoding == CODE_PAGES[0]
    assert found.rows[0][1]["label"] == "fötal"
    assert "a guess: save it as UTF-8" in found.notes[0]


def test_what_spreadsheets_add_is_taken_off(tmp_path: Path) -> None:
    text = 'sep=;\n File ; LABEL;split;\n "a.png" ;head\u00a0; train ;\n;;;\n\nb.png;head;val;\n;;;\n'
    found = read_text(write(tmp_path, text.encode()))
    assert found.columns == ("file", "label", "split")
    assert [dict(row) for _, row in found.rows] == [
        {"file": "a.png", "label": "head", "split": "train"},
        {"file": "b.png", "label": "head", "split": "val"},
    ]
    assert [line for line, _ in found.rows] == [3, 6], "lines of the file, for messages"


def test_cells_may_hold_separators_and_line_ends_in_quotes(tmp_path: Path) -> None:
    found = cells(write(tmp_path, b'file,label,split\n"a,b.png","two\nlines",train\n'))
    assert found == [{"file": "a,b.png", "label": "two\nlines", "split": "train"}]


def test_columns_may_have_other_names(tmp_path: Path) -> None:
    path = write(tmp_path, b"Image Name,class,file\na.png,head,secret\n")
    found = read_text(path, columns={"file": "image name", "label": "CLASS"})
    assert dict(found.rows[0][1]) == {"file": "a.png", "label": "head", "file (own)": "secret"}
    with pytest.raises(InputError, match="no column 'image'; it has image_name, class"):
        read_text(path, columns={"file": "image"})


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "is empty"),
        (b"\n\n;;\n", "is empty"),
        (b"PK\x03\x04rest", "spreadsheet's own file: save it as CSV"),
        (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1rest", "spreadsheet's own file"),
        (b"\xff\xfe\x00", "begins as utf-16 and is not"),
        (b"file,split\na.png\n", r"line 2 has fewer cells \(1\) than the head \(2\)"),
        (b"file,split\n\na.png,train,more\n", r"line 3 has more cells \(3\)"),
        (b"file,,split\na.png,orphan,train\n", "line 2 has a cell under a column without a name"),
        (b"file,split,File\na.png,train,b.png\n", "names the column 'file' twice"),
    ],
)
def test_what_is_no_table_is_named(tmp_path: Path, content: bytes, complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        read_text(write(tmp_path, content))


@pytest.mark.parametrize(
    ("typed", "value"),
    [("0.1", 0.1), ("0,1", 0.1), ("1e-1", 0.1), (" 0.1 mm", 0.1), ("0,1mm", 0.1), ("540", 540.0), ("-1", -1.0)],
)
def test_numbers_are_read_as_they_are_written(typed: str, value: float) -> None:
    assert number(typed) == pytest.approx(value)


@pytest.mark.parametrize("typed", ["1.234,5", "1,234,5", "wide", "nan", "inf", "1_0", "0.1 cm", "", "1e400"])
def test_what_is_no_number_is_refused(typed: str) -> None:
    with pytest.raises(InputError):
        number(typed)


@given(st.binary(max_size=400))
@settings(max_examples=200, deadline=None)
def test_any_bytes_are_a_table_or_a_typed_error(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.csv"
    path.write_bytes(content)
    try:
        found = read_text(path)
    except EdgeError:
        return
    assert all(set(row) <= set(found.columns) for _, row in found.rows)


@pytest.mark.parametrize(
    "content",
    [
        b"# made by a script\nfile;split\na.png;train\n",
        b",file,split\n0,a.png,train\n",
        b"file,split\na.png\0,train\n",
        b"file,split,,\na.png,train,,\n",
    ],
    ids=["comment", "numbers of the rows", "a NUL", "empty columns"],
)
def test_what_programs_add_is_taken_off(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "split.csv").write_bytes(content)
    found = read_text(tmp_path / "split.csv")
    assert [dict(cells) for _, cells in found.rows] == [{"file": "a.png", "split": "train"}]


def test_a_cell_under_a_nameless_column_further_on_is_refused(tmp_path: Path) -> None:
    (tmp_path / "split.csv").write_text(",file,\n0,a.png,train\n")
    with pytest.raises(InputError, match="without a name"):
        read_text(tmp_path / "split.csv")
