"""Every sink keeps the contract: honest probe, a whole file or none, one clear error, no pixels where none belong.

A new file in ``sinks/`` is picked up by itself.
"""

from __future__ import annotations

import inspect
import os
import socket
import stat
import threading
from pathlib import Path

import pytest

from tests.runtime.live_driver import live_result
from tests.runtime.test_sinks import leftovers, predicted
from tinyusfm_runtime import plugins
from tinyusfm_runtime.errors import InputError, OutputError
from tinyusfm_runtime.frame import Frame
from tinyusfm_runtime.results import LiveState, Prediction, StateChange
from tinyusfm_runtime.sinks import RunFacts, Sink, announce, deliver, open_sink

NAMES = plugins.names("sinks")
SUFFIXES = {"jsonl": ".jsonl", "video": ".mp4"}
"""Suffix a location needs; a sink that is not named here takes any."""
PLACES = {
    "callback": "tests.contracts.test_sinks:taken",
    "igtl": "//:0",
    "web": "//:0",
    "shm_out": f"contract-{os.getpid()}",
}
"""Sinks that write no file -> where they are opened."""
FILE_NAMES = [name for name in NAMES if name not in PLACES]
RECORDS = ("audit", "csv", "jsonl")
"""Sinks that append to their file as results come; the others take the file's name at the end."""


def taken(*values: object) -> None:
    """A callback."""


FAKE_CHANGE = StateChange(before=LiveState.LIVE, after=LiveState.STALE, t_ns=1, reason="late")


def opened(name: str, folder: Path) -> Sink:
    """A sink into a fresh file, or a skip with the probe's reason."""
    probe = plugins.available("sinks", name)
    if not probe.usable:
        pytest.skip(probe.reason)
    place = PLACES.get(name, str(folder / f"out{SUFFIXES.get(name, '')}"))
    sink: Sink = plugins.load("sinks", name).open_sink(place)
    return sink


def test_there_are_sinks() -> None:
    assert {"audit", "callback", "csv", "dicom", "igtl", "jsonl", "masks", "record", "shm_out", "video", "web"} <= set(
        NAMES
    )


@pytest.mark.parametrize("name", NAMES)
def test_probe_says_how_or_why_not(name: str) -> None:
    probe = plugins.available("sinks", name)
    assert probe.reason
    assert probe.usable or probe.extra or "Linux" in probe.reason


@pytest.mark.parametrize("name", NAMES)
def test_shape_of_the_plug_in(name: str) -> None:
    parameters = inspect.signature(plugins.load("sinks", name).open_sink).parameters
    assert next(iter(parameters)) == "location"


@pytest.mark.parametrize("name", FILE_NAMES)
def test_a_closed_sink_leaves_one_whole_file(name: str, tmp_path: Path) -> None:
    with opened(name, tmp_path) as sink:
        assert isinstance(sink, Sink)
        for seed in range(3):
            sink.write(*predicted(seed))
        there = (tmp_path / f"out{SUFFIXES.get(name, '')}").exists()
        assert there is (name in RECORDS), "a record is where it belongs at once, the rest when it is whole"
    (only,) = leftovers(tmp_path)
    assert (tmp_path / only).stat().st_size > 0
    sink.close()


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("name", FILE_NAMES)
def test_an_error_keeps_what_was_recorded(name: str, error: type[BaseException], tmp_path: Path) -> None:
    with pytest.raises(error), opened(name, tmp_path) as sink:
        sink.write(*predicted(1))
        raise error
    (only,) = leftovers(tmp_path)
    assert (tmp_path / only).stat().st_size > 0


@pytest.mark.parametrize("kind", ["folder", "pipe", "device", "socket", "dangling"])
@pytest.mark.parametrize("name", FILE_NAMES)
def test_only_a_regular_file_is_ever_replaced(name: str, kind: str, tmp_path: Path) -> None:
    place = tmp_path / f"out{SUFFIXES.get(name, '')}"
    made = _irregular(place, kind)
    before = place.lstat()
    try:
        with opened(name, tmp_path) as sink:
            sink.write(*predicted(1))
    except (OutputError, InputError) as error:
        assert "\n" not in str(error)
    after = place.lstat()
    assert (before.st_ino, before.st_mode) == (after.st_ino, after.st_mode), "it is still what it was"
    if isinstance(made, socket.socket):
        made.close()


def _irregular(place: Path, kind: str) -> object:
    """Something at a place that is no regular file; what is returned keeps it alive."""
    if kind == "folder":
        place.mkdir()
    elif kind == "pipe":
        os.mkfifo(place)
    elif kind == "device":
        try:
            os.mknod(place, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
        except OSError:
            pytest.skip("device nodes cannot be made here")
    elif kind == "socket":
        made = socket.socket(socket.AF_UNIX)
        made.bind(str(place))
        return made
    else:
        place.symlink_to(place.parent / "elsewhere" / "nothing")
    return None


@pytest.mark.parametrize("name", [name for name in FILE_NAMES if name not in ("dicom", "masks", "record")])
def test_a_link_stays_and_its_file_is_written(name: str, tmp_path: Path) -> None:
    suffix = SUFFIXES.get(name, "")
    (tmp_path / "real").mkdir()
    (tmp_path / f"out{suffix}").symlink_to(tmp_path / "real" / f"file{suffix}")
    with opened(name, tmp_path) as sink:
        sink.write(*predicted(1))
    assert (tmp_path / f"out{suffix}").is_symlink()
    assert leftovers(tmp_path / "real") == [f"file{suffix}"]


@pytest.mark.parametrize("name", FILE_NAMES)
def test_a_missing_folder_is_one_line(name: str, tmp_path: Path) -> None:
    with pytest.raises((OutputError, InputError)) as caught, opened(name, tmp_path / "nowhere") as sink:
        sink.write(*predicted(1))
    assert "\n" not in str(caught.value)
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("name", NAMES)
def test_an_answer_that_is_not_valid_is_written_as_such(name: str, tmp_path: Path) -> None:
    with opened(name, tmp_path) as sink:
        sink.write(*predicted(1, valid=False, mask_HW=None, measurements=()))
    assert len(leftovers(tmp_path)) == (name in FILE_NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_live_results_and_states_are_taken_whatever_they_say(name: str, tmp_path: Path) -> None:
    with opened(name, tmp_path) as sink:
        deliver(sink, live_result(1))
        deliver(sink, live_result(2, stale=True, withheld=True, valid=False, state=LiveState.STALE))
        announce(sink, FAKE_CHANGE)
        deliver(sink, live_result(3, prediction=None, valid=False, degraded=True, error="the engine failed"))
        frame, prediction = predicted(4, valid=False, mask_HW=None, measurements=())
        deliver(sink, live_result(4, frame=frame, prediction=prediction, valid=False))
    announce(sink, FAKE_CHANGE)
    sink.close()
    assert len(leftovers(tmp_path)) == (name in FILE_NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_no_thread_is_left(name: str, tmp_path: Path) -> None:
    before = threading.active_count()
    with opened(name, tmp_path) as sink:
        deliver(sink, live_result(1))
    assert threading.active_count() == before


@pytest.mark.parametrize("name", NAMES)
def test_it_is_opened_by_its_name_and_refuses_options_that_it_does_not_know(name: str, tmp_path: Path) -> None:
    if not plugins.available("sinks", name).usable:
        pytest.skip(plugins.available("sinks", name).reason)
    place = PLACES.get(name, str(tmp_path / f"out{SUFFIXES.get(name, '')}"))
    with open_sink(f"{name}:{place}", facts=RunFacts(title="a run", model="tiny", rate_hz=30.0)) as sink:
        assert isinstance(sink, Sink)
    with pytest.raises(InputError, match="no option 'nobody_knows_this'"):
        open_sink(f"{name}:{place}", nobody_knows_this=1)


@pytest.mark.parametrize("location", ["out.jsonl", "nothing:out", ":out", ""])
def test_a_location_without_a_sinks_name_is_refused(location: str) -> None:
    with pytest.raises(InputError, match="NAME:WHERE"):
        open_sink(location)


class PlainSink:
    """A sink of another distribution, without a live face."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def __enter__(self) -> PlainSink:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def write(self, frame: Frame, prediction: Prediction) -> None:
        self.seen.append(frame.seq)

    def close(self) -> None:
        return None


def test_a_plain_sink_gets_only_what_may_be_shown() -> None:
    sink = PlainSink()
    assert isinstance(sink, Sink)
    deliver(sink, live_result(1))
    deliver(sink, live_result(2, withheld=True, stale=True))
    deliver(sink, live_result(3, prediction=None))
    announce(sink, FAKE_CHANGE)
    assert sink.seen == [1]
