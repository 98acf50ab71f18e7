"""A recording: every frame byte by byte, results and states beside it, replayable, also after a kill."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from tests.runtime.live_driver import live_result
from tinyusfm_runtime.frame import Frame, PixelFormat, VideoRange
from tinyusfm_runtime.results import LiveState, StateChange
from tinyusfm_runtime.sinks import announce, deliver, open_sink
from tinyusfm_runtime.sinks.record import stored_pixels
from tinyusfm_runtime.sources import open_source

CHANGE = StateChange(before=LiveState.LIVE, after=LiveState.STALE, t_ns=1, reason="late")


def lines(path: Path) -> list[dict[str, Any]]:
    """Records of a JSON lines file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def frames_of(path: Path) -> list[Frame]:
    """Frames of a clip, as any command reads them."""
    with open_source(str(path)) as source:
        return list(source)


def test_frames_come_back_byte_by_byte_with_results_and_states(tmp_path: Path) -> None:
    results = [live_result(seed) for seed in range(1, 4)]
    with open_sink(f"record:{tmp_path / 'r'}") as sink:
        for result in results:
            deliver(sink, result)
        announce(sink, CHANGE)
    stored = lines(tmp_path / "r" / "frames.jsonl")
    assert [row["seq"] for row in stored] == [result.frame.seq for result in results]
    for row, result in zip(stored, results, strict=True):
        # phantoms differ in their spacing: each one is a clip of its own
        played = frames_of(tmp_path / "r" / row["clip"])[row["image"]]
        assert np.array_equal(played.pixels, result.frame.pixels) and played.spacing_mm == result.frame.spacing_mm
    kinds = [record["kind"] for record in lines(tmp_path / "r" / "results.jsonl")]
    assert kinds == ["result"] * len(results) + ["state"]


def test_one_clip_of_equal_frames_is_replayed_whole(tmp_path: Path) -> None:
    first = live_result(1)
    images = [np.roll(first.frame.pixels, shift, axis=1) for shift in range(30)]
    with open_sink(f"record:{tmp_path / 'r'}") as sink:
        for seq, pixels in enumerate(images):
            deliver(sink, replace(first, frame=replace(first.frame, seq=seq, pixels=pixels)))
        announce(sink, CHANGE)
        # a killed run: what lies there now can be played too
        (pending,) = [path for path in tmp_path.iterdir() if path.name != "r"]
        killed = frames_of(pending / "clip.mha")
        assert len(killed) == len(images) and np.array_equal(killed[0].pixels, images[0])
    played = frames_of(tmp_path / "r" / "clip.mha")
    assert len(played) == len(images)
    assert all(np.array_equal(frame.pixels, pixels) for frame, pixels in zip(played, images, strict=True))
    assert played[0].spacing_mm == first.frame.spacing_mm
    records = lines(tmp_path / "r" / "results.jsonl")
    assert [record["kind"] for record in records] == ["result"] * len(images) + ["state"]


def test_another_size_or_colour_goes_on_in_another_clip(tmp_path: Path) -> None:
    first = live_result(1)
    small = replace(first.frame, seq=2, pixels=np.ascontiguousarray(first.frame.pixels[:100]))
    colour = Frame(seq=3, pixels=np.full((20, 30, 3), (1, 2, 3), np.uint8), pixel_format="bgr")
    with open_sink(f"record:{tmp_path / 'r'}") as sink:
        for frame in (first.frame, small, colour):
            deliver(sink, replace(first, frame=frame))
    assert [row["clip"] for row in lines(tmp_path / "r" / "frames.jsonl")] == ["clip.mha", "clip-2.mha", "clip-3.mha"]
    assert frames_of(tmp_path / "r" / "clip-2.mha")[0].pixels.shape[0] == 100
    assert frames_of(tmp_path / "r" / "clip-3.mha")[0].pixels[0, 0].tolist() == [3, 2, 1], "stored as RGB"


def test_codes_are_stored_as_the_model_sees_them() -> None:
    limited = Frame(seq=0, pixels=np.full((16, 16), 235, np.uint8), video_range=VideoRange.LIMITED)
    assert int(stored_pixels(limited).max()) == 255
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    assert stored_pixels(Frame(seq=0, pixels=grey, pixel_format=PixelFormat.GREY)) is not None
    assert np.array_equal(stored_pixels(Frame(seq=0, pixels=grey)), grey)
