"""Sinks of a loop of several models: every one shows what each model says, by its name, and why one was left out."""

from __future__ import annotations

import csv
import json
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import NumpyEngine, gate_spec, make_parts
from tests.runtime.live_driver import live_result, several
from tests.runtime.live_sources import images
from tinyusfm_runtime.errors import OutputError
from tinyusfm_runtime.frame import Frame
from tinyusfm_runtime.live.loop import Live
from tinyusfm_runtime.results import LiveResult
from tinyusfm_runtime.sinks import igtl, jsonl, open_sink, web
from tinyusfm_runtime.sinks.audit.chain import verify_file
from tinyusfm_runtime.sinks.callback import CallbackSink
from tinyusfm_runtime.sinks.csv import COLUMNS, OF_SEVERAL
from tinyusfm_runtime.sinks.web.feed import encode
from tinyusfm_runtime.sources import open_source

HEADS = images(3)
WHY = "gate says no head, not head"
RULES = {"tiny": {"after": "gate", "needs_label": "head"}}


class Clip:
    """A head, an empty frame, a head."""

    def __enter__(self) -> Clip:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def __iter__(self) -> Iterator[Frame]:
        empty = replace(HEADS[0], pixels=np.zeros_like(HEADS[0].pixels))
        for seq, frame in enumerate((HEADS[0], empty, HEADS[1])):
            yield replace(frame, seq=seq, spacing_mm=HEADS[0].spacing_mm)


def record(bundles: list[Path], *places: str) -> list[LiveResult]:
    """Runs two models over three frames into sinks."""
    sinks = [open_sink(place) for place in places]
    kept: list[LiveResult] = []
    try:
        with Live(bundles, Clip(), sinks=[*sinks, CallbackSink(kept.append)], rules=RULES) as live:
            list(live)
    finally:
        for sink in sinks:
            sink.close()
    return kept


@pytest.fixture
def bundles(plug_in: type[NumpyEngine], tmp_path: Path) -> list[Path]:
    gate = make_parts({"fake": {"model.onnx": b"gate"}}, gate_spec())
    mask = make_parts({"fake": {"model.onnx": b"mask"}})
    return [gate.publish(tmp_path / "gate.bundle"), mask.publish(tmp_path / "tiny.bundle")]


def test_records_name_both_models_and_what_was_left_out(bundles: list[Path], tmp_path: Path) -> None:
    names = ("out.jsonl", "out.csv", "masks", "audit.jsonl", "tape")
    lines, table, masks, audit, tape = (tmp_path / name for name in names)
    places = (f"jsonl:{lines}", f"csv:{table}", f"masks:{masks}", f"audit:{audit}", f"record:{tape}")
    called = record(bundles, *places)
    assert [one.of("tiny").skipped for one in called] == [None, WHY, None], "a callback gets both"

    found = [json.loads(line) for line in lines.read_text().splitlines()]
    results = [one for one in found if one["kind"] == "result"]
    assert [(one["seq"], one["model"]) for one in results] == [(s, m) for s in range(3) for m in ("gate", "tiny")]
    assert [one["skipped"] for one in results if one["model"] == "tiny"] == [None, WHY, None]
    assert results[0]["scores"] and results[1]["measurement"]["found"] and results[3]["measurement"] is None
    assert results[0]["age_ms"] == results[1]["age_ms"] and results[0]["live"]["index"] == results[1]["live"]["index"]

    rows = list(csv.DictReader(table.read_text().splitlines()))
    assert list(rows[0]) == [*COLUMNS, *OF_SEVERAL] and len(rows) == 6
    assert [row["label"] for row in rows if row["model"] == "gate"] == ["head", "no head", "head"]
    assert rows[3]["model"] == "tiny" and rows[3]["skipped"] == WHY and not rows[3]["hc_mm"] and rows[1]["hc_mm"]

    assert sorted(str(path.relative_to(masks)) for path in masks.rglob("*.png")) == [
        "tiny/000000.png", "tiny/000002.png",
    ]  # fmt: skip

    assert verify_file(audit) and verify_file(audit).closed
    bodies = [json.loads(line)["body"] for line in audit.read_text().splitlines()]
    models = next(body["models"] for body in bodies if body["event"] == "models")
    assert set(models) == {"gate", "tiny"} and len(set(models.values())) == 2
    told = [(body["model"], body["skipped"]) for body in bodies if body["event"] == "result"]
    assert told == [("gate", False), ("tiny", False), ("gate", False), ("tiny", True), ("gate", False), ("tiny", False)]
    assert "head" not in json.dumps(told), "no label of an answer stands in the audit log"

    kept = [json.loads(line) for line in (tape / "results.jsonl").read_text().splitlines()]
    assert [one["model"] for one in kept if one["kind"] == "result"] == ["gate", "tiny"] * 3
    with open_source(str(tape / "clip.mha")) as frames, Live(bundles, frames, rules=RULES) as again:
        replayed = list(again)
    assert [one.of("tiny").skipped for one in replayed] == [None, WHY, None], "the recording replays"
    for before, after in zip(called, replayed, strict=True):
        old, new = before.of("gate").prediction, after.of("gate").prediction
        assert old is not None and new is not None
        np.testing.assert_array_equal(old.scores, new.scores)


def test_one_model_leaves_the_records_it_always_left(bundles: list[Path], tmp_path: Path) -> None:
    lines, table = tmp_path / "out.jsonl", tmp_path / "out.csv"
    with (
        open_sink(f"jsonl:{lines}") as first,
        open_sink(f"csv:{table}") as second,
        Live(bundles[1], Clip(), sinks=[first, second]) as live,
    ):
        list(live)
    record_of_one = json.loads(lines.read_text().splitlines()[0])
    assert not {"model", "skipped", "models"} & set(record_of_one)
    assert table.read_text().splitlines()[0] == ",".join(COLUMNS)
    with pytest.raises(OutputError, match="single model"):
        record(bundles, f"csv:{table}")


def test_dicom_objects_are_each_models_own(tmp_path: Path) -> None:
    pydicom = pytest.importorskip("pydicom")
    pytest.importorskip("highdicom")
    place = tmp_path / "objects"
    with open_sink(f"dicom:{place}") as sink:
        result = several(live_result(3))
        other = replace(result.models[1], model="other")
        both = replace(result, models=(*result.models, other))
        sink.write_live(both)  # type: ignore[attr-defined]
    assert sorted(path.name for path in place.iterdir()) == [
        "image.dcm", "report-head.dcm", "report-other.dcm", "segmentation-head.dcm", "segmentation-other.dcm",
    ]  # fmt: skip
    for name in ("head", "other"):
        segments = pydicom.dcmread(place / f"segmentation-{name}.dcm")
        assert segments.ManufacturerModelName == name


def test_viewers_get_a_mask_and_a_reading_of_each_model() -> None:
    assert igtl.device_names([""]) == [("Mask", "Reading")]
    assert igtl.device_names(["gate", "head"])[1] == ("Mask-head", "Reading-head")
    long = igtl.device_names(["a" * 30, "b" * 30])
    assert long == [("Mask-1", "Reading-1"), ("Mask-2", "Reading-2")]
    with igtl.open_sink("//:0") as sink, socket.create_connection((sink.host, sink.port), timeout=20) as client:
        received = b""
        while b"Reading-head" not in received:
            sink.write_live(several(live_result(3), skipped=WHY))
            received += client.recv(1 << 20)
    assert b"Mask-gate" in received and b"Mask-head" in received
    reading = igtl.as_reading(several(live_result(3), skipped=WHY).models[1])
    assert reading["model"] == "head" and reading["skipped"] == WHY and not reading["valid"]
    assert "model" not in igtl.as_reading(live_result(3))


def test_the_page_is_sent_what_each_model_says() -> None:
    image = encode(several(live_result(3)), 0, ())
    gate, head = image.header["models"]
    assert (gate["model"], gate["value"], gate["name"]) == ("gate", 97.0, "head") and head["unit"] == "mm"
    assert gate["mask_bytes"] == 0 and head["mask_bytes"] == len(image.mask) > 0
    left_out = encode(several(live_result(3), skipped=WHY), 0, ()).header["models"][1]
    assert left_out["skipped"] == WHY and left_out["value"] is None
    assert "models" not in encode(live_result(3), 0, ("head",)).header, "of one model nothing is added"
    assert web.FILES


def test_the_video_writes_both_names() -> None:
    from tinyusfm_runtime.sinks.video import draw_live

    two, left_out = several(live_result(3)), several(live_result(3), skipped=WHY)
    image, other = draw_live(two), draw_live(left_out)
    assert image.shape == other.shape and (image != other).any() and (image != draw_live(live_result(3))).any()
    pink = (image == (255, 140, 220)).all(axis=2)
    assert pink.sum() > 50 and (other == (255, 140, 220)).all(axis=2).sum() < pink.sum(), "the second's own colour"


def test_jsonl_of_a_skipped_model_has_every_key() -> None:
    both = several(live_result(3), skipped=WHY)
    first, second = (jsonl.live_record(one) for one in both.each)
    assert set(second) <= set(first) and second["skipped"] == WHY and second["live"]["error"] is None
