"""Files that a table names: every spelling of one file is that file, and none of another folder."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyusfm_calibration.table_paths import FileFinder
from tinyusfm_runtime.errors import EdgeError, InputError

NFC, NFD = (unicodedata.normalize(form, "bilder/Müller.png") for form in ("NFC", "NFD"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "set"
    for name in ("images/a.png", "images/B.PNG", "images/x#1.png", "clip.mp4"):
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(b"x")
    (tmp_path / "outside.png").write_bytes(b"x")
    return place


@pytest.mark.parametrize(
    ("typed", "inside", "frame"),
    [
        ("images/a.png", "images/a.png", None),
        ("./images/a.png", "images/a.png", None),
        ("images//a.png", "images/a.png", None),
        ("images/../images/a.png", "images/a.png", None),
        ("images\\a.png", "images/a.png", None),
        (".\\images\\a.png", "images/a.png", None),
        ("Images/A.png", "images/a.png", None),
        ("images/b.png", "images/B.PNG", None),
        ("images/x#1.png", "images/x#1.png", None),
        ("clip.mp4#12", "clip.mp4#12", 12),
        ("images/gone.png", "images/gone.png", None),
    ],
)
def test_spellings_of_a_file(folder: Path, typed: str, inside: str, frame: int | None) -> None:
    found = FileFinder(folder).find(typed, "line 2")
    assert (found.inside, found.frame) == (inside, frame)
    assert found.path == folder / inside.removesuffix("#12")


def test_an_absolute_path_into_the_folder_is_understood(folder: Path) -> None:
    assert FileFinder(folder).find(str(folder / "images" / "a.png"), "line 2").inside == "images/a.png"


@pytest.mark.parametrize(("stored", "typed"), [(NFC, NFD), (NFD, NFC)])
def test_composed_and_decomposed_letters_are_one_name(folder: Path, stored: str, typed: str) -> None:
    (folder / "bilder").mkdir()
    (folder / stored).write_bytes(b"x")
    found = FileFinder(folder).find(typed, "line 2")
    assert found.path == folder / stored and found.path.is_file() and found.respelt


def test_a_spelling_that_fits_two_files_fits_none(folder: Path) -> None:
    for name in ("images/C.png", "images/c.PNG"):
        (folder / name).write_bytes(b"x")
    assert not FileFinder(folder).exists("images/c.png")
    assert FileFinder(folder).exists("images/C.png")


@pytest.mark.parametrize(
    ("typed", "complaint"),
    [
        ("../outside.png", "outside its folder"),
        ("images/../../outside.png", "outside its folder"),
        ("images\\..\\..\\outside.png", "outside its folder"),
        ("/etc/passwd", "absolute path"),
        ("C:\\data\\a.png", "absolute path"),
        ("C:a.png", "absolute path"),
        ("\\\\server\\share\\a.png", "absolute path"),
        ("a\0.png", "names no file"),
        ("https://example.org/a.png", "names no file"),
        ("file:///etc/passwd", "names no file"),
    ],
)
def test_paths_out_of_the_folder_are_refused(folder: Path, typed: str, complaint: str) -> None:
    for finder in (FileFinder(folder), FileFinder(folder, follow_links=True)):
        with pytest.raises(InputError, match=f"line 2 .*{complaint}"):
            finder.find(typed, "line 2")


def test_links_out_of_the_folder_need_to_be_asked_for(folder: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    store.mkdir()
    (store / "far.png").write_bytes(b"x")
    (folder / "linked").symlink_to(store)
    (folder / "near.png").symlink_to(folder / "images" / "a.png")
    (folder / "loop.png").symlink_to(folder / "loop.png")
    assert FileFinder(folder).find("near.png", "line 2").path.is_file(), "a link inside the folder"
    for typed in ("linked/far.png", "loop.png"):
        with pytest.raises(InputError, match="--follow-links"):
            FileFinder(folder).find(typed, "line 2")
    assert FileFinder(folder, follow_links=True).find("linked/far.png", "line 2").path.is_file()


@given(st.text(min_size=1, max_size=60))
@settings(max_examples=300, deadline=None)
def test_no_cell_leads_out_of_the_folder(tmp_path_factory: pytest.TempPathFactory, typed: str) -> None:
    place = tmp_path_factory.getbasetemp() / "fuzz"
    place.mkdir(exist_ok=True)
    try:
        found = FileFinder(place).find(typed, "line 2")
    except EdgeError:
        return
    assert found.path.resolve().is_relative_to(place.resolve())
