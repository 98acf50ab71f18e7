"""Hot swap: the new bundle takes over between two frames, the old one stays or comes back when something is wrong."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import NumpyEngine, Parts, make_parts, tiny_spec
from tests.runtime.live_sources import HandSource, PacedSource, images, only, wait_until
from tinyusfm_runtime.errors import InputError
from tinyusfm_runtime.frame import Frame
from tinyusfm_runtime.live.fallback import Fallback, FallbackOptions
from tinyusfm_runtime.live.loop import Live
from tinyusfm_runtime.live.swap import SwapOptions, SwapReport
from tinyusfm_runtime.results import LiveEvent, LiveEventKind, LiveResult
from tinyusfm_runtime.session import Session

FRAMES = images(8)


class Bend:
    """Spoils the answers of engines that were loaded after the first one."""

    def __init__(self) -> None:
        self.how = ""
        self.after = 0

    def __call__(self, engine: NumpyEngine, outputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        if not self.how or engine is NumpyEngine.made[0]:
            return outputs
        self.after -= 1
        if self.after >= 0:
            return outputs
        if self.how == "raises":
            raise RuntimeError("no")
        return {"logits": -outputs["logits"]}


@pytest.fixture
def bend(plug_in: type[NumpyEngine], monkeypatch: pytest.MonkeyPatch) -> Bend:
    made, plain = Bend(), NumpyEngine.run
    monkeypatch.setattr(NumpyEngine, "run", lambda self, tensor: made(self, plain(self, tensor)))
    return made


@pytest.fixture
def session(bend: Bend, fake_bundle: Path) -> Iterator[Session]:
    with Session.open(fake_bundle) as opened:
        yield opened


@pytest.fixture
def other(fake_parts: Parts, tmp_path: Path) -> Path:
    """Another bundle of the same model."""
    return fake_parts.publish(tmp_path / "other.bundle", created_utc="2026-02-02T00:00:00Z")


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = threading.active_count()
    yield
    wait_until(lambda: threading.active_count() <= before)


QUIET = FallbackOptions(recheck_s=None)


def swapped(
    session: Session, other: Path, options: SwapOptions, rate_hz: float = 100
) -> tuple[SwapReport, list[LiveResult], Live, list[LiveEvent]]:
    """Runs a loop, swaps in it, and lets it go on for some results."""
    results, events = list[LiveResult](), list[LiveEvent]()
    source = PacedSource(rate_hz, FRAMES)
    live = Live(session, source, budget_ms=60_000, on_event=only(LiveEvent, events))
    with live:

        def read() -> None:
            results.extend(live)

        reader = threading.Thread(target=read)
        reader.start()
        wait_until(lambda: len(results) > 10)
        report = live.swap(other, advanced=options)
        count = len(results)
        wait_until(lambda: len(results) > count + 5)
        assert live.counters.balanced
    reader.join()
    return report, results, live, events


def test_another_bundle_takes_over_between_two_frames(session: Session, other: Path) -> None:
    report, results, live, events = swapped(session, other, SwapOptions(shadow_frames=5, fallback=QUIET))
    assert report and report.outcome == "switched" and report.bundle_id != session.manifest.bundle_id
    assert report.shadow == {"frames": 5.0, "dice_mean": 1.0, "dice_worst": 1.0, "hc_max_mm": 0.0}
    assert report.load_ms > 0 and report.age_p99_during_ms is not None and report.results >= 10
    assert live.fallback.manifest.bundle_id == report.bundle_id
    assert all(result.valid for result in results), "not one result was lost or spoilt"
    assert [event.kind for event in events].count(LiveEventKind.BUNDLE_CHANGED) == 1
    assert set(report.dropped) <= {"overtaken"}
    assert report.to_json()["version"] == 1
    assert session.predict(FRAMES[0]).valid, "the session is still its opener's"
    assert NumpyEngine.made[1].closed, "the loop closed what it had opened"


def test_a_file_loses_no_frame_in_a_swap(session: Session, other: Path) -> None:
    class Clip:
        def __enter__(self) -> Clip:
            return self

        def __exit__(self, *_: object) -> None:
            return None

        def __iter__(self) -> Iterator[Frame]:
            for seq in range(600):
                yield replace(FRAMES[seq % 8], seq=seq)

    results: list[LiveResult] = []
    with Live(session, Clip(), budget_ms=None) as live:
        threading.Thread(target=lambda: results.extend(live)).start()
        report = live.swap(other, advanced=SwapOptions(probation_frames=3, fallback=QUIET))
        wait_until(lambda: len(results) == 600)
    assert report and not any(report.dropped.values())
    assert [result.frame.seq for result in results] == list(range(600)) and all(result.valid for result in results)


def test_a_bundle_that_fails_its_golden_frames_is_refused(session: Session, other: Path, bend: Bend) -> None:
    bend.how = "nonsense"
    report, results, live, events = swapped(session, other, SwapOptions(fallback=QUIET))
    assert not report and report.outcome == "refused" and "does not answer as the artefact should" in report.reason
    assert live.fallback.manifest.bundle_id == session.manifest.bundle_id and all(result.valid for result in results)
    assert LiveEventKind.BUNDLE_REFUSED in [event.kind for event in events]


def test_a_bundle_that_differs_in_the_shadow_run_is_refused(session: Session, other: Path, bend: Bend) -> None:
    bend.how, bend.after = "nonsense", 1 + 4 + 5 + 4  # sound while it is opened
    report, results, _, _ = swapped(session, other, SwapOptions(shadow_frames=6, fallback=QUIET))
    assert report.outcome == "refused" and "differs" in report.reason and report.shadow["dice_mean"] < 0.8
    assert all(result.valid for result in results)


@pytest.mark.parametrize("shadow", [0, 4])
def test_a_bundle_that_fails_after_the_switch_is_taken_back(
    session: Session, other: Path, bend: Bend, shadow: int
) -> None:
    bend.how, bend.after = "raises", 1 + 4 + 5 + 4 + shadow + 3
    options = SwapOptions(shadow_frames=shadow, probation_frames=20, fallback=QUIET)
    report, results, live, events = swapped(session, other, options)
    assert report.outcome == "rolled_back" and "RuntimeError" in report.reason
    assert live.fallback.manifest.bundle_id == session.manifest.bundle_id
    assert results[-1].valid and results[-1].level == 0
    assert [event.kind for event in events].count(LiveEventKind.BUNDLE_REFUSED) == 1
    assert NumpyEngine.made[1].closed and not NumpyEngine.made[0].closed


def test_another_task_or_no_bundle_is_refused(session: Session, fake_parts: Parts, tmp_path: Path) -> None:
    spec = tiny_spec(labels=("skull",))
    content = {path.rsplit("/", 1)[-1]: fake_parts.files[path] for path in fake_parts.artefacts[0].files}
    skull = make_parts({"fake": content}, spec).publish(tmp_path / "skull.bundle")
    report, *_ = swapped(session, skull, SwapOptions(fallback=QUIET))
    assert report.outcome == "refused" and "start another loop" in report.reason
    report, *_ = swapped(session, tmp_path / "none.bundle", SwapOptions(fallback=QUIET))
    assert report.outcome == "refused" and "no bundle" in report.reason and report.bundle_id == ""


def test_a_source_that_stands_still_decides_nothing(session: Session, other: Path) -> None:
    source = HandSource()
    with Live(session, source, budget_ms=60_000) as live:
        source.push(replace(FRAMES[0], seq=1))
        assert next(live).valid
        shadow = live.swap(other, advanced=SwapOptions(shadow_frames=3, patience_s=0.2, fallback=QUIET))
        assert shadow.outcome == "refused" and "0 of 3" in shadow.reason
        probation = live.swap(other, advanced=SwapOptions(patience_s=0.2, fallback=QUIET))
        assert probation.outcome == "rolled_back" and "after the switch" in probation.reason
        source.push(replace(FRAMES[0], seq=2))
        assert next(live).valid and live.fallback.manifest.bundle_id == session.manifest.bundle_id


def test_a_fallback_can_be_swapped_twice_and_stays_its_openers(bend: Bend, fake_bundle: Path, other: Path) -> None:
    with Fallback.open(fake_bundle, advanced=QUIET) as fallback:
        with Live(fallback, PacedSource(100, FRAMES), budget_ms=60_000) as live:
            assert live.swap(other, advanced=SwapOptions(fallback=QUIET))
            assert live.swap(fake_bundle, advanced=SwapOptions(fallback=QUIET))
        assert [engine.closed for engine in NumpyEngine.made] == [False, True, True]
    assert NumpyEngine.made[0].closed


def test_only_a_running_loop_is_swapped_and_not_by_itself(session: Session, other: Path) -> None:
    said: list[str] = []

    def from_inside(_: object) -> None:
        try:
            live.swap(other)
        except InputError as error:
            said.append(str(error))

    source = HandSource()
    live = Live(session, source, budget_ms=60_000, on_event=from_inside)
    with pytest.raises(InputError, match="while the loop runs"):
        live.swap(other)
    with live:
        source.push(replace(FRAMES[0], seq=1))
        assert next(live).valid
        wait_until(lambda: said)
    with pytest.raises(InputError, match="while the loop runs"):
        live.swap(other)
    with pytest.raises(InputError, match="swap options"):
        SwapOptions(min_dice=2)
