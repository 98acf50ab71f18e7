"""Every sink keeps the contract: honest probe, a whole file or none, one clear error, no pixels where none belong.

A new file in ``sinks/`` is picked up by itself.
"""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest

from tests.runtime.test_sinks import leftovers, predicted
from tinyusfm_runtime import plugins
from tinyusfm_runtime.errors import InputError, OutputError
from tinyusfm_runtime.sinks import Sink

NAMES = plugins.names("sinks")
SUFFIXES = {"jsonl": ".jsonl", "video": ".mp4"}
"""Suffix a location needs; a sink that is not named here takes any."""


def opened(name: str, folder: Path) -> Sink:
    """A sink into a fresh file, or a skip with the probe's reason."""
    probe = plugins.probe("sinks", name)
    if not probe.works:
        pytest.skip(probe.reason)
    return plugins.load("sinks", name).open_sink(str(folder / f"out{SUFFIXES.get(name, '')}"))


def test_there_are_sinks() -> None:
    assert {"jsonl", "video"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_probe_says_how_or_why_not(name: str) -> None:
    probe = plugins.probe("sinks", name)
    assert probe.reason
    assert probe.works or probe.extra


@pytest.mark.parametrize("name", NAMES)
def test_shape_of_the_plug_in(name: str) -> None:
    parameters = inspect.signature(plugins.load("sinks", name).open_sink).parameters
    assert next(iter(parameters)) == "location"


@pytest.mark.parametrize("name", NAMES)
def test_a_closed_sink_leaves_one_whole_file(name: str, tmp_path: Path) -> None:
    with opened(name, tmp_path) as sink:
        assert isinstance(sink, Sink)
        for seed in range(3):
            sink.write(*predicted(seed))
        assert not (tmp_path / f"out{SUFFIXES.get(name, '')}").exists(), "the name is taken before the file is whole"
    (only,) = leftovers(tmp_path)
    assert (tmp_path / only).stat().st_size > 0
    sink.close()


@pytest.mark.parametrize("name", NAMES)
def test_an_error_leaves_no_file(name: str, tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), opened(name, tmp_path) as sink:
        sink.write(*predicted(1))
        raise ZeroDivisionError
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_folder_is_one_line(name: str, tmp_path: Path) -> None:
    with pytest.raises((OutputError, InputError)) as caught, opened(name, tmp_path / "nowhere") as sink:
        sink.write(*predicted(1))
    assert "\n" not in str(caught.value)
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("name", NAMES)
def test_an_answer_that_is_not_valid_is_written_as_such(name: str, tmp_path: Path) -> None:
    with opened(name, tmp_path) as sink:
        sink.write(*predicted(1, valid=False, mask_HW=None, measurement=None))
    assert len(leftovers(tmp_path)) == 1
