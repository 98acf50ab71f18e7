"""Several models on one frame: each answers, fails and is left out by itself, and says so."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import NumpyEngine, Parts, gate_spec, make_parts, tiny_spec
from tests.runtime.live_sources import HandSource, PacedSource, images, only, wait_until
from tinyusfm_runtime.errors import InputError
from tinyusfm_runtime.frame import Frame
from tinyusfm_runtime.live.fallback import Fallback, FallbackOptions
from tinyusfm_runtime.live.loop import Live
from tinyusfm_runtime.live.options import LiveOptions
from tinyusfm_runtime.live.swap import SwapOptions
from tinyusfm_runtime.numerics.shared_input import SharedInput, agreement
from tinyusfm_runtime.results import LiveEvent, LiveEventKind, LiveResult, LiveState
from tinyusfm_runtime.session import Session
from tinyusfm_runtime.spec import AspectPolicy, PreprocessSpec, Task

HEADS = images(6)
EMPTY = replace(HEADS[0], pixels=np.zeros_like(HEADS[0].pixels))
RULES: dict[str, Any] = {"tiny": {"after": "gate", "needs_label": "head", "min_confidence": 0.6}}


@pytest.fixture
def bundles(plug_in: type[NumpyEngine], tmp_path: Path) -> tuple[Path, Path]:
    """A classifier and a mask model, which agree on their input."""
    gate = make_parts({"fake": {"model.onnx": b"gate"}}, gate_spec())
    mask = make_parts({"fake": {"model.onnx": b"mask"}})
    return gate.publish(tmp_path / "gate.bundle"), mask.publish(tmp_path / "tiny.bundle")


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = threading.active_count()
    yield
    wait_until(lambda: threading.active_count() <= before)


class File:
    """Frames that wait."""

    def __init__(self, *frames: Frame) -> None:
        self.frames = [replace(frame, seq=seq) for seq, frame in enumerate(frames)]

    def __enter__(self) -> File:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def __iter__(self) -> Iterator[Frame]:
        yield from self.frames


def bent(monkeypatch: pytest.MonkeyPatch, how: Callable[[NumpyEngine], None]) -> None:
    """Lets every engine do something before it answers."""
    plain = NumpyEngine.run

    def run(self: NumpyEngine, tensor: np.ndarray) -> dict[str, np.ndarray]:
        how(self)
        return plain(self, tensor)

    monkeypatch.setattr(NumpyEngine, "run", run)


def test_both_models_answer_every_frame_as_they_would_alone(bundles: tuple[Path, Path]) -> None:
    with Live(list(bundles), File(*HEADS)) as live:
        assert live.states == {"gate": LiveState.LIVE, "tiny": LiveState.LIVE}
        assert "gate: " in live.description and "; tiny: " in live.description
        results = list(live)
    with Session.open(bundles[0]) as gate, Session.open(bundles[1]) as mask:
        for result, frame in zip(results, HEADS, strict=True):
            assert [one.model for one in result.models] == ["gate", "tiny"] == [one.model for one in result.each]
            said, drawn = result.of("gate").prediction, result.of("tiny").prediction
            assert said is not None and drawn is not None and result.prediction is said
            np.testing.assert_array_equal(said.scores, gate.predict(frame).scores)
            np.testing.assert_array_equal(drawn.mask_HW, mask.predict(frame).mask_HW)
            assert {one.age_ms for one in result.models} == {result.age_ms}, "one age"
            assert result.of("gate").labels == ("no head", "head") and "gate: " in repr(result)
            assert all(one.valid and one.skipped is None and not one.degraded for one in result.models)
    assert live.counters.balanced and live.counters.processed == len(HEADS)
    # one time of the engines per frame: that of both
    first = [one.prediction.timings.infer_ms for one in results[0].models if one.prediction is not None]
    assert live.latency().infer_ms[0] == pytest.approx(sum(first), rel=1e-4)


def test_a_loop_of_one_model_is_as_it_was(bundles: tuple[Path, Path]) -> None:
    for given in (bundles[1], [bundles[1]]):
        with Live(given, File(*HEADS)) as live:
            results = list(live)
            assert live.states == {"tiny": LiveState.LIVE} and live.fallback.level == 0
        assert all(one.models == () and one.model == "" and one.each == (one,) for one in results)
        with pytest.raises(InputError, match="a single one"):
            results[0].of("tiny")


def test_rules_leave_a_model_out_and_say_why(bundles: tuple[Path, Path]) -> None:
    quiet = FallbackOptions(recheck_s=None)
    with Fallback.open(bundles[0], advanced=quiet) as gate, Fallback.open(bundles[1], advanced=quiet) as mask:
        before = _runs()
        # the order of the list is that of results; that of the rules is that of asking
        with Live([mask, gate], File(HEADS[0], EMPTY, HEADS[1]), rules=RULES) as live:
            results = list(live)
        assert (_runs()["gate"] - before["gate"], _runs()["tiny"] - before["tiny"]) == (3, 2)
    assert [one.model for one in results[0].models] == ["tiny", "gate"]
    assert [one.of("tiny").skipped for one in results] == [None, "gate says no head, not head", None]
    left_out = results[1].of("tiny")
    assert left_out.prediction is None and left_out.error is None and not left_out.valid and not left_out.degraded
    assert left_out.state is LiveState.LIVE, "nothing is wrong with it"
    assert results[1].of("gate").valid and results[1].skipped == left_out.skipped and "not head" in repr(left_out)


def _runs() -> Mapping[str, int]:
    return {engine.spec.name: engine.runs for engine in NumpyEngine.made}


def test_rules_by_confidence_and_order_alone(bundles: tuple[Path, Path]) -> None:
    unsure = {"tiny": {"after": "gate", "min_confidence": 1.0}}
    weak = min(HEADS, key=lambda frame: int(frame.pixels.max()))
    with Live(list(bundles), File(replace(weak, pixels=weak.pixels // 3)), rules=unsure) as live:
        (result,) = list(live)
    assert "below 1" in (result.of("tiny").skipped or "")
    with Live(list(bundles), File(EMPTY), rules={"gate": {"after": "tiny"}}) as live:
        (result,) = list(live)
    assert all(one.skipped is None and one.valid for one in result.models), "after alone only orders"
    with Live(list(bundles), File(EMPTY, HEADS[0]), rules={"gate": {"after": "tiny", "needs_label": "head"}}) as live:
        empty, head = list(live)
    assert empty.of("gate").skipped == "tiny says no head, not head" and head.of("gate").skipped is None


@pytest.mark.parametrize(
    ("rules", "says"),
    [
        ({"liver": {"after": "gate"}}, "no model 'liver'; there is: gate, tiny"),
        ({"tiny": {"after": "plane"}}, "no model 'plane'"),
        ({"tiny": {"after": "gate"}, "gate": {"after": "tiny"}}, "wait for one another"),
        ({"tiny": {"after": "tiny"}}, "cannot wait for itself"),
        ({"tiny": {"after": "gate", "needs_label": "spine"}}, "no label 'spine'; it has: no head, head"),
        ({"tiny": {"after": "gate", "min_confidence": 1.5}}, "from 0 to 1, not 1.5"),
        ({"tiny": {"after": "gate", "min_confidence": True}}, "from 0 to 1"),
        ({"tiny": {"after": "gate", "min_confidence": float("nan")}}, "from 0 to 1"),
        ({"tiny": {"after": "gate", "unless": "x"}}, "no key 'unless'; there is: after, needs_label, min_confidence"),
        ({"tiny": {"needs_label": "head"}}, "after is missing"),
        ({"tiny": {"after": ["gate"]}}, "a name in quotation marks"),
        ({"after": "gate"}, "write a table"),
    ],
)
def test_bad_rules_are_refused_before_anything_starts(
    bundles: tuple[Path, Path], rules: dict[str, Any], says: str
) -> None:
    NumpyEngine.made.clear()
    source = HandSource()
    with pytest.raises(InputError, match=says), Live(list(bundles), source, rules=rules):
        raise AssertionError("it began")
    assert not NumpyEngine.made and not source.entered


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('[tiny]\nafter = "gate"\nmin_confidence = 2\n', "from 0 to 1, not 2"),
        ('[tiny]\nafter = "gate\n', "cannot be read"),
        ("[tiny]\nafter = nan\n", "not finite|cannot be read"),
        (None, "No such file"),
    ],
)
def test_bad_files_of_rules_are_one_line(
    bundles: tuple[Path, Path], tmp_path: Path, text: str | None, says: str
) -> None:
    pytest.importorskip("tomllib")
    path = tmp_path / "rules.toml"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=says) as caught:
        Live(list(bundles), File(), rules=path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("rules.toml", '[tiny]\nafter = "gate"\nneeds_label = "no head"\nmin_confidence = 0.5\n'),
        ("rules.json", '{"tiny": {"after": "gate", "needs_label": "no head", "min_confidence": 0.5}}'),
    ],
)
def test_rules_of_a_file_hold(bundles: tuple[Path, Path], tmp_path: Path, name: str, text: str) -> None:
    if name.endswith(".toml"):
        pytest.importorskip("tomllib")
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    with Live(list(bundles), File(EMPTY, HEADS[0]), rules=path) as live:
        results = list(live)
    assert [one.of("tiny").skipped for one in results] == [None, "gate says head, not no head"]


def test_two_of_one_name_need_names(bundles: tuple[Path, Path]) -> None:
    with pytest.raises(InputError, match=r"two bundles are named 'tiny'.*first=.*Live\(\{"):
        Live([bundles[1], bundles[1]], File()).__enter__()
    with Live({"left": bundles[1], "right": bundles[1]}, File(HEADS[0])) as live:
        (result,) = list(live)
    assert [one.model for one in result.models] == ["left", "right"]
    with pytest.raises(InputError, match="model name 'a/b'"):
        Live({"a/b": bundles[1]}, File())
    with pytest.raises(InputError, match="needs a model"):
        Live([], File())
    with pytest.raises(InputError, match="several models"):
        Live(bundles[1], File(), rules=RULES)


def _specs() -> Any:
    from hypothesis import strategies as st

    sides, crops = st.sampled_from([32, 48]), st.sampled_from([None, (0, 0, 64, 64), (8, 8, 64, 64)])
    return st.builds(
        PreprocessSpec, height=sides, width=sides, grey=st.booleans(), aspect=st.sampled_from(list(AspectPolicy)),
        crop=crops, mean=st.sampled_from([(0.5, 0.5, 0.5), (0.1, 0.2, 0.3)]),
    )  # fmt: skip


def test_an_input_is_shared_only_where_specs_agree() -> None:
    hypothesis = pytest.importorskip("hypothesis")
    pytest.importorskip("hypothesis.strategies")
    from tinyusfm_runtime.numerics.preprocess import preprocess

    @hypothesis.settings(max_examples=60, deadline=None)
    @hypothesis.given(hypothesis.strategies.lists(_specs(), min_size=3, max_size=3))
    def holds(specs: list[PreprocessSpec]) -> None:
        shared = SharedInput()
        made = [shared(HEADS[0], spec) for spec in specs]
        assert shared.made == len({agreement(spec) for spec in specs}) and shared.made + shared.shared == len(specs)
        for spec, (tensor, placement) in zip(specs, made, strict=True):
            want, where = preprocess(HEADS[0], spec)
            np.testing.assert_array_equal(tensor, want)
            assert placement == where, "whoever made it, each gets what it would have made itself"
        for one, first in zip(specs, made, strict=True):
            for other, second in zip(specs, made, strict=True):
                same = replace(one, mean=other.mean) == other
                assert (first[0] is second[0]) == same
        again, _ = shared(HEADS[1], specs[0])
        assert not np.shares_memory(again, made[0][0]), "a tensor in use is not filled again"

    holds()


def test_the_loop_makes_one_input_for_both_and_gives_the_sessions_back(
    bundles: tuple[Path, Path], fake_parts: Parts, tmp_path: Path
) -> None:
    other = make_parts({"fake": {"model.onnx": b"other"}}, tiny_spec(name="other", preprocess=PreprocessSpec(
        height=64, width=64, aspect=AspectPolicy.LETTERBOX)))  # fmt: skip
    with (
        Session.open(bundles[0]) as gate,
        Session.open(bundles[1]) as mask,
        Session.open(other.publish(tmp_path / "other.bundle")) as third,
    ):
        own = gate.prepare
        with Live([gate, mask, third], File(*HEADS)) as live:
            shared = mask.prepare
            assert isinstance(shared, SharedInput) and gate.prepare is shared
            results = list(live)
        assert (shared.made, shared.shared) == (2 * len(HEADS), len(HEADS)), "two of three agree"
        assert gate.prepare is own and mask.prepare is own and third.prepare is own
        for result in results:
            want = third.predict(result.frame)
            found = result.of("other").prediction
            assert found is not None
            np.testing.assert_array_equal(found.mask_HW, want.mask_HW)


def test_an_error_of_one_leaves_the_other_running(bundles: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    broken = threading.Event()

    def breaks(engine: NumpyEngine) -> None:
        if broken.is_set() and engine.spec.task is Task.SEGMENT:
            raise RuntimeError("no")

    bent(monkeypatch, breaks)
    events: list[LiveEvent] = []
    with Live(list(bundles), PacedSource(50, HEADS), budget_ms=60_000, on_event=only(LiveEvent, events)) as live:
        wait_until(lambda: next(live).of("tiny").valid)
        broken.set()
        result = wait_until(lambda: _first(live, lambda one: one.of("tiny").error is not None))
        assert result.of("gate").valid and not result.of("gate").degraded and result.degraded
        assert result.of("tiny").degraded and result.of("tiny").state is LiveState.DEGRADED
        assert result.of("gate").state is LiveState.LIVE and result.state is LiveState.DEGRADED
        assert live.states == {"gate": LiveState.LIVE, "tiny": LiveState.DEGRADED}
    failed = [event for event in events if event.kind is LiveEventKind.ENGINE_FAILED]
    assert failed[0].model == "tiny" and failed[0].reason.startswith("tiny: ") and live.counters.balanced


def _first(live: Live, holds: Callable[[LiveResult], bool]) -> LiveResult:
    return next(result for result in live if holds(result))


def test_a_gate_that_fails_leaves_the_gated_out_and_says_so(
    bundles: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    armed = threading.Event()

    def breaks(engine: NumpyEngine) -> None:
        if armed.is_set() and engine.spec.task is Task.CLASSIFY:
            raise RuntimeError("no")

    bent(monkeypatch, breaks)
    with Live(list(bundles), PacedSource(50, HEADS), budget_ms=60_000, rules=RULES) as live:
        armed.set()
        result = _first(live, lambda one: one.of("gate").error is not None)
    assert (result.of("tiny").skipped or "").startswith("gate gave no answer (")


def test_a_model_that_hangs_is_given_up_and_the_other_goes_on(
    bundles: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    hangs, free = threading.Event(), threading.Event()

    def waits(engine: NumpyEngine) -> None:
        if hangs.is_set() and engine.spec.task is Task.CLASSIFY:
            free.wait(30)

    bent(monkeypatch, waits)
    limits = LiveOptions(deadline_ms=400, give_up_ms=800, grace_ms=100)
    events: list[LiveEvent] = []
    listen = only(LiveEvent, events)
    quiet = FallbackOptions(recheck_s=None)
    opened = [Fallback.open(path, advanced=quiet) for path in bundles]
    try:
        with Live(opened, PacedSource(30, HEADS), budget_ms=60_000, on_event=listen, advanced=limits) as live:
            hangs.set()
            result = _first(live, lambda one: one.of("gate").error is not None)
            assert "abandoned" in (result.of("gate").error or "") and result.of("tiny").valid
            later = _first(live, lambda one: one.index > result.index + 2)
            assert later.of("tiny").valid and later.of("gate").degraded
            free.set()
    finally:
        free.set()
        for one in opened:
            one.close()
    missed = [event for event in events if event.kind is LiveEventKind.DEADLINE_MISSED]
    assert "gate" in {event.model for event in missed}


def test_each_model_has_its_own_fallback(
    bundles: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_files: Any
) -> None:
    content = {"model.onnx": b"mask"}
    parts = make_parts({"fake": content})
    second = replace(
        parts.artefacts[0], precision="fp16", rest_precision="f16", golden="golden/fake-fp16.safetensors",
        files={path.replace("fp32", "fp16"): entry for path, entry in parts.artefacts[0].files.items()},
    )  # fmt: skip
    files = dict(parts.files) | {second.golden: parts.files[parts.artefacts[0].golden]}
    files |= {path: b"mask" for path in second.files}
    both = replace(parts, artefacts=(*parts.artefacts, second), files=files).publish(tmp_path / "two.bundle")
    armed = threading.Event()

    def breaks(engine: NumpyEngine) -> None:
        if armed.is_set() and engine is first_of_mask:
            raise RuntimeError("no")

    bent(monkeypatch, breaks)
    NumpyEngine.made.clear()
    first_of_mask: NumpyEngine | None = None
    with Live([bundles[0], both], PacedSource(50, HEADS), budget_ms=60_000, fallback=True) as live:
        first_of_mask = next(engine for engine in NumpyEngine.made if engine.spec.task is Task.SEGMENT)
        armed.set()
        result = _first(live, lambda one: one.of("tiny").level == 1 and one.of("tiny").prediction is not None)
        assert result.of("tiny").degraded and result.of("gate").level == 0 and not result.of("gate").degraded
        assert live.fallback_of("tiny").level == 1 and live.fallback_of("gate").level == 0
        with pytest.raises(InputError, match="which model is meant"):
            _ = live.fallback


def test_one_model_is_swapped_and_the_other_is_not_disturbed(bundles: tuple[Path, Path], tmp_path: Path) -> None:
    other = make_parts({"fake": {"model.onnx": b"mask"}}).publish(
        tmp_path / "other.bundle", created_utc="2026-02-02T00:00:00Z"
    )
    options = SwapOptions(probation_frames=3, fallback=FallbackOptions(recheck_s=None))
    results: list[LiveResult] = []
    with Live(list(bundles), PacedSource(50, HEADS), budget_ms=60_000) as live:
        reader = threading.Thread(target=lambda: results.extend(live))
        reader.start()
        wait_until(lambda: live.counters.processed > 3)
        gate, before = live.fallback_of("gate"), live.fallback_of("tiny")
        with pytest.raises(InputError, match="which model is meant"):
            live.swap(other, advanced=options)
        report = live.swap(other, model="tiny", advanced=options)
        assert report, report.reason
        assert live.fallback_of("gate") is gate and live.fallback_of("tiny") is not before
        refused = live.swap(other, model="gate", advanced=options)
        assert not refused and "start another loop" in refused.reason and live.fallback_of("gate") is gate
        count = live.counters.processed
        wait_until(lambda: live.counters.processed > count + 2)
        live.close()
        reader.join()
    assert all(one.valid for result in results for one in result.models) and live.counters.balanced


def test_smoothing_and_the_overlay_are_each_models_own(bundles: tuple[Path, Path]) -> None:
    rules = {"gate": {"after": "tiny"}}
    with Live([bundles[0], bundles[1]], File(*HEADS), temporal=True, rules=rules) as live:
        results = list(live)
        shown = live.overlay()
    assert all(one.reading is not None for result in results for one in result.models)
    masks = [one.reading.mask_HW is not None for one in results[-1].models if one.reading is not None]
    assert masks == [False, True], "a classifier has no mask to smooth"
    assert shown is not None and shown.index == results[-1].index


def test_a_late_frame_is_late_for_both(bundles: tuple[Path, Path]) -> None:
    with Live(list(bundles), PacedSource(30, HEADS), budget_ms=0.001) as live:
        result = next(live)
    assert result.stale and all(one.stale and one.withheld and not one.valid for one in result.models)
    assert {one.state for one in result.models} == {LiveState.STALE}


def test_a_frame_that_no_model_can_use_is_counted_and_one_that_one_can_is_answered(
    bundles: tuple[Path, Path], tmp_path: Path
) -> None:
    crop = PreprocessSpec(height=64, width=64, crop=(0, 0, 96, 128))
    cropped = make_parts({"fake": {"model.onnx": b"c"}}, tiny_spec(name="cropped", preprocess=crop))
    path = cropped.publish(tmp_path / "cropped.bundle")
    small = replace(HEADS[0], pixels=HEADS[0].pixels[:64, :64].copy())
    with Live([bundles[0], path], File(small)) as live:
        (result,) = list(live)
    assert result.of("gate").valid and "crop" in (result.of("cropped").error or "")
    with Live({"a": path, "b": path}, File(small, HEADS[0])) as live:
        results = list(live)
    assert len(results) == 1 and live.counters.rejected == {"misplaced": 1} and live.counters.balanced


def test_a_sink_that_takes_no_live_result_is_refused(bundles: tuple[Path, Path]) -> None:
    class Plain:
        def write(self, frame: Frame, prediction: object) -> None:
            raise AssertionError("one model's answer would stand for both")

    with pytest.raises(InputError, match="write_live"):
        Live(list(bundles), File(), sinks=[Plain()])  # type: ignore[list-item]


def test_a_fallback_and_a_session_can_stand_side_by_side(bundles: tuple[Path, Path]) -> None:
    with Session.open(bundles[0]) as gate, Fallback.open(bundles[1]) as mask:
        with Live({"first": gate, "second": mask}, File(HEADS[0])) as live:
            (result,) = list(live)
        assert [one.valid for one in result.models] == [True, True]
        assert gate.predict(HEADS[0]).valid, "it is still its opener's"
