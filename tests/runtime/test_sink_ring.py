"""The ring of readings as a sink: what is read back is what the record of the same result says."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.runtime.live_driver import live_result
from tests.runtime.test_sinks import predicted
from tinyusfm_runtime import plugins
from tinyusfm_runtime.errors import InputError
from tinyusfm_runtime.results import LiveState
from tinyusfm_runtime.sinks import deliver, open_sink
from tinyusfm_runtime.transport.owned_ring import FOLDER
from tinyusfm_runtime.transport.shm_result import ResultReader

pytestmark = pytest.mark.skipif(not plugins.available("sinks", "shm-out").usable, reason="needs POSIX shared memory")


@pytest.fixture
def name() -> Iterator[str]:
    """A name of a ring that nobody has; what is left of it afterwards is a fault."""
    found = f"sink-{os.getpid()}"
    yield found
    assert not list(FOLDER.glob(f"{found}*")), "the sink takes its rings away"


def test_a_reading_is_what_the_record_says(name: str, tmp_path: Path) -> None:
    reader = ResultReader(name)
    with open_sink(f"shm-out:{name}") as ring, open_sink(f"jsonl:{tmp_path}/lines") as lines:
        assert reader.newest() is None
        for seed in range(3, 6):
            result = live_result(seed, dropped_since_last=seed, degraded=seed == 4, level=int(seed == 4))
            deliver(ring, result)
            deliver(lines, result)
            found = reader.newest()
            assert found is not None and result.prediction is not None and found.mask_HW is not None
            record = json.loads((tmp_path / "lines").read_text(encoding="utf-8").splitlines()[-1])
            measured = record["measurement"]
            assert (found.seq, found.valid, found.degraded) == (record["seq"], record["valid"], seed == 4)
            assert (found.hc_mm, found.angle_deg) == (measured["hc_mm"], measured["angle_deg"])
            assert [found.centre_row, found.centre_column] == measured["centre_px"]
            assert (found.dropped, found.level, found.state) == (seed, int(seed == 4), "live")
            assert (found.trust, found.second_pass) == (record["reading"], record["second_pass"])
            assert np.array_equal(found.mask_HW, result.prediction.mask_HW) and found.answered and found.measured
    assert reader.newest() is None


def test_what_may_not_be_shown_and_what_is_missing(name: str) -> None:
    reader = ResultReader(name)
    with open_sink(f"shm-out:{name}") as ring:
        deliver(ring, live_result(1, stale=True, withheld=True, valid=False, state=LiveState.STALE))
        held = reader.newest()
        assert held is not None and held.withheld and held.stale and held.state == "stale" and held.answered
        assert held.mask_HW is None and np.isnan(held.hc_mm) and not held.found
        deliver(ring, live_result(2, prediction=None, valid=False, degraded=True, error="the engine failed"))
        failed = reader.newest()
        assert failed is not None and not failed.answered and failed.degraded and failed.seq == 2
        frame, prediction = predicted(4, mask_HW=None, measurements=(), scores=np.array([0.25, 0.75], np.float32))
        ring.write(frame, prediction)
        scored = reader.newest()
        assert scored is not None and scored.scores == (0.25, 0.75) and scored.found and not scored.measured


def test_several_models_have_rings_of_their_own_and_a_larger_mask_a_larger_one(name: str) -> None:
    head, plane = ResultReader(f"{name}-head"), ResultReader(f"{name}-my_plane")
    with open_sink(f"shm-out:{name}") as ring:
        one = live_result(1, model="head")
        frame, prediction = predicted(2, mask_HW=None, measurements=(), scores=np.array([1.0], np.float32))
        two = live_result(2, model="my plane", frame=frame, prediction=prediction)
        deliver(ring, replace(one, models=(one, two)))
        first, second = head.newest(), plane.newest()
        assert first is not None and second is not None and first.hc_mm > 0 and second.scores == (1.0,)
        assert one.prediction is not None and one.prediction.mask_HW is not None
        large = np.ones((512, 512), np.uint8)
        deliver(ring, replace(one, prediction=replace(one.prediction, mask_HW=large)))
        found, end = None, time.monotonic() + 30
        while found is None and time.monotonic() < end:
            found = head.newest()
            time.sleep(0.01)
        assert found is not None and found.mask_HW is not None and found.mask_HW.shape == (512, 512)


def test_a_name_that_is_no_ring_is_refused() -> None:
    for wrong in ("shm-out:", "shm-out:../x", "shm-out:a/b"):
        with pytest.raises(InputError, match="letters, digits"):
            open_sink(wrong)
    with pytest.raises(InputError, match="shm-out"):
        open_sink("nothing:x")
