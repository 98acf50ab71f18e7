"""A message names what can be installed: the checkout or wheel of this installation, never a bare unpublished name."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from tinyusfm_runtime import installation
from tinyusfm_runtime.errors import MissingExtra
from tinyusfm_runtime.installation import installed_from, pip_line


@pytest.fixture(autouse=True)
def asked_again() -> Iterator[None]:
    """What is remembered of this installation is forgotten before and after."""
    installed_from.cache_clear()
    yield
    installed_from.cache_clear()


def told(monkeypatch: pytest.MonkeyPatch, direct_url: Any) -> None:
    """The installed metadata say this."""

    class Told:
        def read_text(self, name: str) -> str | None:
            assert name == "direct_url.json"
            return direct_url if direct_url is None or isinstance(direct_url, str) else json.dumps(direct_url)

    monkeypatch.setattr(metadata, "distribution", lambda name: Told())


def checkout(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "pyproject.toml").touch()
    return folder


def test_the_checkout_that_was_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = checkout(tmp_path / "my check\u00f6ut")
    told(monkeypatch, {"url": place.as_uri(), "dir_info": {"editable": True}})
    assert pip_line("dicom") == f"pip install '{place}[dicom]'"
    assert str(MissingExtra("reading", "pydicom", "dicom")).endswith(f"pip install '{place}[dicom]'")


def test_a_path_with_a_quote_can_still_be_pasted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shlex

    place = checkout(tmp_path / "it's")
    told(monkeypatch, {"url": place.as_uri()})
    assert shlex.split(pip_line("dicom,video")) == ["pip", "install", f"{place}[dicom,video]"]


def test_a_wheel_is_named_while_it_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = tmp_path / "tinyusfm_edge-0.1.0-py3-none-any.whl"
    wheel.touch()
    told(monkeypatch, {"url": wheel.as_uri(), "archive_info": {}})
    assert pip_line("dicom") == f"pip install '{wheel}[dicom]'"


@pytest.mark.parametrize(
    "direct_url", [None, "not JSON", {}, {"url": "https://example.org/x.whl"}, {"url": "file:///gone"}]
)
def test_without_a_place_the_sources_are_named_and_else_no_bare_name(
    direct_url: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    told(monkeypatch, direct_url)
    root = Path(__file__).resolve().parents[2]
    assert pip_line("dicom") == f"pip install '{root}[dicom]'", "these sources lie in a checkout"
    installed_from.cache_clear()
    monkeypatch.setattr(installation, "__file__", "/usr/lib/python3/site-packages/tinyusfm_runtime/installation.py")
    assert pip_line("dicom") == "pip install '.[dicom]' in a checkout of tinyusfm-edge"
