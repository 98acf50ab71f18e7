"""A bare name means a shipped bundle, an existing path wins, and the log says which."""

from __future__ import annotations

import logging
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from tinyusfm_runtime import plugins
from tinyusfm_runtime.bundle import shipped
from tinyusfm_runtime.bundle.reader import Bundle
from tinyusfm_runtime.errors import InputError, TamperedError
from tinyusfm_runtime.plugins import Availability


@pytest.fixture
def shop(fake_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The package's folder of bundles with one in it; the working directory is another, empty one."""
    folder = (tmp_path / "package").resolve()
    shutil.copytree(fake_bundle, folder / "small-head.bundle")
    monkeypatch.setattr(shipped, "SHIPPED", folder)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return folder


def test_a_bare_name_opens_the_shipped_bundle(shop: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "tinyusfm_runtime"):
        opened = Bundle.open("small-head")
    assert opened.path == shop / "small-head.bundle" and opened.manifest == Bundle.open(opened.path).manifest
    assert "small-head: the bundle that ships with this package" in caplog.text
    assert Bundle.open(Path("small-head")).path == opened.path


def test_an_existing_path_wins(shop: Path, caplog: pytest.LogCaptureFixture) -> None:
    shutil.copytree(shop / "small-head.bundle", Path("small-head"))
    with caplog.at_level(logging.INFO, "tinyusfm_runtime"):
        assert Bundle.open("small-head").path == Path("small-head")
    assert "the folder of that name here, not the bundle that ships" in caplog.text
    shutil.rmtree("small-head")
    Path("small-head").symlink_to("nowhere")
    with pytest.raises(InputError, match="leads nowhere"):
        Bundle.open("small-head")


@pytest.mark.parametrize("typed", ["./small-head", "x/small-head", "small-head/", "small-head.bundle", "Small-Head"])
def test_what_is_no_bare_name_is_a_path(shop: Path, typed: str) -> None:
    with pytest.raises(InputError, match="there is no bundle at"):
        Bundle.open(typed)


def test_an_unknown_name_lists_those_there_are(shop: Path) -> None:
    with pytest.raises(InputError, match=r"none ships under that name \(shipped: small-head\)"):
        Bundle.open("small-heart")


def test_files_of_a_shipped_bundle_may_be_linked_by_an_installer(shop: Path, tmp_path: Path) -> None:
    os.link(shop / "small-head.bundle" / "manifest.json", tmp_path / "cache")
    Bundle.open("small-head")
    elsewhere = tmp_path / "elsewhere.bundle"
    shutil.copytree(shop / "small-head.bundle", elsewhere)
    os.link(elsewhere / "manifest.json", tmp_path / "other")
    with pytest.raises(TamperedError, match="hard link"):
        Bundle.open(elsewhere)


def test_a_shipped_bundle_is_trusted_byte_by_byte_too(shop: Path) -> None:
    (shop / "small-head.bundle" / "extra").write_bytes(b"x")
    with pytest.raises(TamperedError, match="does not list"):
        Bundle.open("small-head")


def test_of_a_shipped_bundle_the_first_engine_that_is_here_answers(
    shop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    opened = Bundle.open("small-head")
    (first,) = opened.manifest.artefacts
    second = replace(first, target="onnx", engine="ort")
    both = replace(opened.manifest, artefacts=(first, second))
    here, elsewhere = opened.path, tmp_path / "mine.bundle"

    def only_onnx(kind: str, name: str) -> Availability:
        return Availability(usable=name == "ort", reason="the fake is not installed", extra=None)

    monkeypatch.setattr(plugins, "available", only_onnx)
    with caplog.at_level(logging.INFO, "tinyusfm_runtime"):
        assert shipped.choose_here(both, here, None, None) == second
    assert "onnx-fp32 answers: fake-fp32 cannot (the fake is not installed)" in caplog.text
    assert shipped.choose_here(both, here, "fake", None) == first, "what was asked for is never exchanged"
    assert shipped.choose_here(both, elsewhere, None, None) == first, "another bundle never falls back by itself"
    monkeypatch.setattr(plugins, "available", lambda kind, name: Availability(usable=False, reason="no", extra=None))
    assert shipped.choose_here(both, here, None, None) == first, "its error then names what is missing"
