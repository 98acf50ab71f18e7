"""Live results in file sinks and callbacks: what is withheld leaves its line and loses its numbers and its mask."""

from __future__ import annotations

import csv as tables
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.runtime.live_driver import driver, live_result, phantoms
from tests.runtime.test_sinks import predicted
from tinyusfm_runtime.errors import InputError, OutputError
from tinyusfm_runtime.overlay import ELLIPSE_RGB, OUTLINE_RGB, WARNING_RGB
from tinyusfm_runtime.results import LiveResult, LiveState, SmoothedReading, StateChange
from tinyusfm_runtime.sinks import callback, csv, igtl, jsonl
from tinyusfm_runtime.sinks.video import draw_live


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(tables.DictReader(file))


def test_json_lines_and_table_of_one_run_agree(fake_bundle: Path, plug_in: object, tmp_path: Path) -> None:
    with (
        driver(fake_bundle, late=frozenset({3}), broken=frozenset({2}), drop=frozenset({1})) as live,
        jsonl.open_sink(str(tmp_path / "a")) as lines,
        csv.open_sink(str(tmp_path / "b")) as table,
    ):
        live.run(phantoms(5), [lines, table])
    records = lines_of(tmp_path / "a")
    results = [record for record in records if record["kind"] == "result"]
    states = [(record["before"], record["after"]) for record in records if record["kind"] == "state"]
    assert states == [("lost", "live"), ("live", "degraded"), ("degraded", "stale"), ("stale", "live")]
    assert [record["seq"] for record in results] == [0, 2, 3, 4]
    assert [record["live"]["dropped_since_last"] for record in results] == [0, 1, 0, 0]
    assert [record["live"]["withheld"] for record in results] == [False, False, True, False]
    assert [record["measurement"] is None for record in results] == [False, True, True, False]
    assert results[1]["live"]["error"] == "the engine missed its deadline" and results[1]["target"] is None
    assert len({tuple(sorted(record)) for record in results}) == 1, "the same keys, whatever happened"
    rows = rows_of(tmp_path / "b")
    assert tuple(rows[0]) == csv.COLUMNS and {row["schema"] for row in rows} == {str(csv.SCHEMA)}
    for row, record in zip(rows, results, strict=True):
        assert (int(row["seq"]), row["state"]) == (record["seq"], record["live"]["state"])
        assert bool(int(row["withheld"])) is record["live"]["withheld"]
        wanted = None if record["measurement"] is None else record["measurement"]["hc_mm"]
        assert (float(row["hc_mm"]) if row["hc_mm"] else None) == (None if wanted is None else pytest.approx(wanted))


def test_what_smoothing_says_stands_beside_the_raw_answer_and_is_flagged(tmp_path: Path) -> None:
    fresh = SmoothedReading(mask_HW=None, hc_mm=171.5, held=False, held_ms=0.0, flicker=0.04, flicker_smoothed=0.01)
    held = replace(fresh, held=True, held_ms=120.0, flicker=None, flicker_smoothed=None)
    results = [
        live_result(0, reading=fresh),
        live_result(1, reading=held, prediction=None, valid=False, error="it gave an output that is not finite"),
        live_result(2, reading=held, stale=True, withheld=True, valid=False),
        live_result(3),
    ]
    with jsonl.open_sink(str(tmp_path / "a")) as lines, csv.open_sink(str(tmp_path / "b")) as table:
        for result in results:
            lines.write_live(result)
            table.write_live(result)
    records, rows = lines_of(tmp_path / "a"), rows_of(tmp_path / "b")
    told = {"hc_mm": 171.5, "held": False, "held_ms": 0.0, "flicker": 0.04, "flicker_smoothed": 0.01}
    kept = {"hc_mm": 171.5, "held": True, "held_ms": 120.0, "flicker": None, "flicker_smoothed": None}
    assert [record["smoothed"] for record in records[:2]] == [told, kept]
    assert records[2]["smoothed"]["hc_mm"] is None and not records[2]["smoothed"]["held"], "withheld is withheld"
    assert records[3]["smoothed"] is None
    raw = results[0].prediction
    assert raw is not None and raw.measurement is not None and raw.measurement.hc_mm != 171.5
    assert records[0]["measurement"]["hc_mm"] == raw.measurement.hc_mm and records[1]["measurement"] is None
    columns = ("smoothed_hc_mm", "held", "held_ms", "flicker", "flicker_smoothed")
    assert [rows[0][name] for name in columns] == ["171.5", "0", "0", "0.04", "0.01"]
    assert [rows[1][name] for name in columns] == ["171.5", "1", "120", "", ""] and rows[1]["hc_mm"] == ""
    assert [rows[2]["smoothed_hc_mm"], rows[3]["smoothed_hc_mm"], rows[3]["held"]] == ["", "", ""]
    assert igtl.as_reading(results[0])["smoothed"] == told and "smoothed" not in igtl.as_reading(results[3])


def test_a_table_names_the_likeliest_class(tmp_path: Path) -> None:
    frame, prediction = predicted(scores=np.array([0.25, 0.75], np.float32), measurements=())
    for labels, want in ((("a", "b"), "b"), ((), "1"), (("only",), "")):
        with csv.open_sink(str(tmp_path / "out"), labels=labels) as sink:
            sink.write(frame, prediction)
        assert rows_of(tmp_path / "out")[-1]["label"] == want


@pytest.mark.parametrize(
    ("changes", "has_overlay", "warns"),
    [
        ({}, True, False),
        ({"stale": True}, True, True),
        ({"degraded": True}, True, True),
        ({"stale": True, "withheld": True, "valid": False}, False, True),
        ({"prediction": None, "valid": False}, False, True),
    ],
)
def test_the_video_shows_only_what_may_be_shown(changes: dict[str, Any], has_overlay: bool, warns: bool) -> None:
    image_HWC = draw_live(live_result(3, **changes))
    drawn = (image_HWC == ELLIPSE_RGB).all(-1) | (image_HWC == OUTLINE_RGB).all(-1)
    assert bool(drawn.any()) is has_overlay
    assert bool((image_HWC == WARNING_RGB).all(-1).any()) is warns


def test_a_callback_gets_results_and_states() -> None:
    results: list[LiveResult] = []
    states: list[StateChange] = []
    change = StateChange(before=LiveState.LIVE, after=LiveState.LOST, t_ns=1, reason="gone")
    with callback.CallbackSink(results.append, on_state=states.append) as sink:
        result = live_result(1)
        sink.write_live(result)
        sink.on_state(change)
    assert results == [result] and states == [change]


def test_what_a_callback_raises_is_told_by_its_type_alone() -> None:
    def broken(result: LiveResult) -> None:
        raise ValueError("Doe^Jane")

    with callback.CallbackSink(broken) as sink, pytest.raises(OutputError, match="ValueError") as caught:
        sink.write_live(live_result(1))
    assert "Doe" not in str(caught.value)


@pytest.mark.parametrize("place", ["", "json", "json:", "json:nothing", "no_such_module:f", "json:decoder", ":dumps"])
def test_a_callback_that_is_not_there(place: str) -> None:
    with pytest.raises(InputError, match="callback"):
        callback.open_sink(place)
