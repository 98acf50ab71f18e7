"""What a Python user meets first: pixels in, a mask on the frame out, one live loop that opens its bundle itself."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tinyusfm_runtime
from tests.conftest import NumpyEngine, Parts
from tests.runtime.live_sources import HandSource, images, only
from tinyusfm_runtime import Bundle, Frame, FrameError, Live, LiveEvent, Session, StateChange
from tinyusfm_runtime.errors import InputError, OutputError
from tinyusfm_runtime.frame import PixelFormat
from tinyusfm_runtime.live.loop import DEFAULT_BUDGET_MS
from tinyusfm_runtime.results import LiveResult, LiveState

GREY = images(1)[0].pixels


@pytest.fixture
def bundle(plug_in: type[NumpyEngine], fake_parts: Parts, tmp_path: Path) -> Path:
    return fake_parts.publish(tmp_path / "tiny.bundle")


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Frame(GREY), "named arguments"),
        (lambda: Frame(pixel=GREY), "did you mean 'pixels'"),
        (lambda: Frame(pixels=GREY, zebra=1), "no argument 'zebra': there are pixels"),
        (lambda: Frame(spacing_mm=(1, 1)), "needs pixels"),
        (lambda: Frame(pixels=[[1, 2], [3, 4]]), "uint8 array, not list: give np.asarray(pixels"),
        (lambda: Frame(pixels=GREY[:, :, None]), "give pixels"),
        (lambda: Frame(pixels=GREY.astype(float)), "scale to 0..255"),
        (lambda: Frame(pixels=np.stack([GREY] * 3, -1)), "pixel_format='rgb'"),
        (lambda: Frame(pixels=GREY, pixel_format="gray"), "one of grey, rgb, bgr, rgba, not 'gray'"),
        (lambda: Frame(pixels=GREY, video_range=3), "one of full, limited, not 3"),
        (lambda: Frame(pixels=GREY, spacing_mm=0.1), "spacing 0.1 is not usable"),
        (lambda: Frame(pixels=GREY, spacing_mm="0.1,0.1"), "not usable"),
        (lambda: Frame(pixels=GREY, spacing_mm=(0.1, 0.1, 0.1)), "not usable"),
        (lambda: Frame(pixels=GREY, spacing_mm=(0.1, float("nan"))), "not plausible"),
        (lambda: Frame(pixels=GREY, seq="first"), "seq is a whole number"),
        (lambda: Frame(pixels=GREY, t_recv_ns=1.5), "t_recv_ns is a whole number"),
        (lambda: Frame(pixels=GREY, orientation=3), "PLUS letters"),
        (lambda: Frame(pixels=GREY, crop=(0, 0, 5)), "crop is"),
        (lambda: Frame(pixels=GREY, crop=(0, -1, 5, 5)), "outside"),
        (lambda: replace(images(1)[0], spacing=(1, 1)), "did you mean 'spacing_mm'"),
    ],
)
def test_a_frame_refuses_wrong_arguments_and_says_how_to_mend_them(make: Callable[[], Any], says: str) -> None:
    with pytest.raises(FrameError, match=says.replace("(", r"\(")):
        make()


def test_the_version_is_that_of_what_is_installed() -> None:
    assert tinyusfm_runtime.__version__[0].isdigit()


def test_a_frame_takes_the_words_of_its_formats_and_shows_no_pixels() -> None:
    frame = Frame(pixels=np.stack([GREY] * 3, -1), pixel_format="rgb", spacing_mm=[0.1, 0.2], seq=7)  # type: ignore[arg-type]
    assert frame.pixel_format is PixelFormat.RGB and frame.spacing_mm == (0.1, 0.2)
    height, width = GREY.shape
    assert repr(frame) == f"Frame({width}x{height} rgb, 0.1 x 0.2 mm, seq=7)"


def test_pixels_are_answered_like_the_frame_around_them(bundle: Path) -> None:
    with Session.open(bundle) as session:
        bare = session.predict(GREY, spacing_mm=(0.3, 0.3))
        framed = session.predict(Frame(pixels=GREY, spacing_mm=(0.3, 0.3)))
        assert bare.measurement == framed.measurement and bare.measurement is not None
        assert bare.mask is not None and bare.mask.shape == GREY.shape
        np.testing.assert_array_equal(bare.mask, framed.mask_on_frame())
        colour = session.predict(np.stack([GREY] * 3, -1), pixel_format="bgr")
        assert colour.valid and "arr" not in repr(colour) and "mask" in repr(colour)
        with pytest.raises(FrameError, match="carries its own"):
            session.predict(Frame(pixels=GREY), spacing_mm=(1, 1))
        with pytest.raises(FrameError, match="not str"):
            session.predict("frame.png")  # type: ignore[arg-type]
        assert replace(bare, mask_HW=None).mask is None


def test_a_session_says_what_it_is_and_what_else_the_bundle_has(bundle: Path) -> None:
    with Session.open(bundle) as session:
        assert [artefact.name for artefact in session.artefacts] == ["fake-fp32"]
        assert repr(Bundle.open(bundle)) == f"Bundle(tiny.bundle: {session.spec.name}; fake-fp32)"
        assert "tiny.bundle" in repr(session) and "fake-fp32" in repr(session) and "closed" not in repr(session)
    assert "closed" in repr(session)


@pytest.mark.parametrize("fallback", [False, True])
def test_a_loop_opens_and_closes_its_bundle_itself(bundle: Path, fallback: bool) -> None:
    frames = images(4)
    live = Live(bundle, Clip(frames), fallback=fallback, temporal=True)
    assert repr(live) == "Live(not entered yet)" and live.budget_ms is None
    with live:
        results = list(live)
        assert "4 of 4 answered" in repr(live)
    assert [result.frame.seq for result in results] == [frame.seq for frame in frames]
    assert all(result.valid and result.reading is not None for result in results)
    assert "arr" not in repr(results[0]) and "live" in repr(results[0])
    assert NumpyEngine.made and all(engine.closed for engine in NumpyEngine.made), "what the loop opened it closes"


def test_a_bundle_that_cannot_be_opened_and_a_source_that_cannot_leave_nothing_behind(
    bundle: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError), Live(tmp_path / "none.bundle", HandSource()):
        pass

    class Broken(HandSource):
        def __enter__(self) -> Broken:
            raise InputError("no such probe")

    with pytest.raises(InputError, match="no such probe"), Live(bundle, Broken()):
        pass
    assert NumpyEngine.made and all(engine.closed for engine in NumpyEngine.made)


def test_words_that_contradict_each_other_are_refused(bundle: Path) -> None:
    with Session.open(bundle) as session:
        with pytest.raises(InputError, match="need the bundle itself"):
            Live(session, HandSource(), fallback=True)
        with pytest.raises(InputError, match="one session"):
            Live(bundle, HandSource(), isolate=True, drift=True)
        live = Live(bundle, HandSource(), drift=True)
        with pytest.raises(InputError, match="no drift statistic"):
            live.__enter__()
        assert Live(session, HandSource()).budget_ms == DEFAULT_BUDGET_MS
        assert Live(session, HandSource(), budget_ms=float("inf")).budget_ms is None


def test_sinks_and_the_callback_are_told_of_states_and_events(bundle: Path) -> None:
    class Listener:
        def __init__(self) -> None:
            self.states: list[StateChange] = []
            self.events: list[LiveEvent] = []

        def write_live(self, result: LiveResult) -> None: ...

        def on_state(self, change: StateChange) -> None:
            self.states.append(change)

        def on_event(self, event: LiveEvent) -> None:
            self.events.append(event)

    listener, states = Listener(), list[StateChange]()
    source = HandSource()
    with Live(bundle, source, budget_ms=1e-3, sinks=[listener], on_event=only(StateChange, states)) as live:  # type: ignore[list-item]
        source.push(*images(1))
        assert next(live).stale
        assert live.state is LiveState.STALE
    assert listener.states == states and states


def test_a_sink_that_fails_when_it_is_told_of_a_state_ends_the_loop(bundle: Path) -> None:
    class Full:
        def write_live(self, result: LiveResult) -> None: ...

        def on_state(self, change: StateChange) -> None:
            raise OutputError("the disk is full")

    source = HandSource()
    with pytest.raises(OutputError, match="full"), Live(bundle, source, sinks=[Full()]) as live:  # type: ignore[list-item]
        source.push(*images(1))
        for _ in live:
            pass


def test_every_name_of_the_face_is_there_under_the_faces_own_name() -> None:
    for name in tinyusfm_runtime.__all__:
        assert getattr(tinyusfm_runtime, name).__module__ == "tinyusfm_runtime"
    assert set(tinyusfm_runtime.__all__) <= set(dir(tinyusfm_runtime))
    with pytest.raises(AttributeError, match="Sesion"):
        tinyusfm_runtime.Sesion  # type: ignore[attr-defined]  # noqa: B018


def test_importing_a_face_loads_none_of_its_modules() -> None:
    code = (
        "import sys, tinyusfm_runtime, tinyusfm_export, tinyusfm_edge\n"
        "assert set(tinyusfm_export.__all__) <= set(dir(tinyusfm_export))\n"
        "mine = [name for name in sys.modules if name.startswith('tinyusfm_') and name.count('.')]\n"
        "assert mine == ['tinyusfm_runtime.face'], mine\n"
        "assert 'numpy' not in sys.modules and 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


class Clip:
    """A file of some frames."""

    def __init__(self, frames: list[Frame]) -> None:
        self.frames = frames

    def __enter__(self) -> Clip:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def __iter__(self) -> Any:
        return iter(self.frames)
