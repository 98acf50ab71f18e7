"""The early-exit benchmark: both sides answer every frame every round, and the saved work is counted rightly."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from early_exit import SIDES, products_of, summarise, take
from tinyusfm_runtime.errors import InputError
from tinyusfm_runtime.frame import Frame
from tinyusfm_runtime.spec import ExitPolicy, ModelSpec, PreprocessSpec, Task

FRAMES = [Frame(pixels=np.full((16, 16), seq, np.uint8), seq=seq) for seq in range(4)]
STOPS = (0, 1, 2, 2)


def side(full: bool, asked: list[tuple[str, int]]) -> Any:
    def predict(frame: Frame) -> Any:
        asked.append(("full" if full else "early", frame.seq))
        index = 2 if full else STOPS[frame.seq]
        return SimpleNamespace(exit_index=index, timings=SimpleNamespace(total_ms=(2.0, 3.0, 4.0)[index]))

    return predict


def test_both_sides_answer_every_frame_next_to_each_other() -> None:
    asked: list[tuple[str, int]] = []
    samples = take({name: side(name == "full", asked) for name in SIDES}, FRAMES, rounds=6)
    pairs = [asked[i : i + 2] for i in range(0, len(asked), 2)]
    assert all({name for name, _ in pair} == set(SIDES) and pair[0][1] == pair[1][1] for pair in pairs)
    assert {pair[0][0] for pair in pairs} == set(SIDES), "neither side always goes first"
    assert len(samples) == 2 * 6 * len(FRAMES)


def test_work_and_time_by_hand() -> None:
    samples = take({name: side(name == "full", []) for name in SIDES}, FRAMES, rounds=3)
    report = summarise(samples, [60, 30, 10])
    assert report["exits"] == [1, 1, 2]
    assert report["work_share"] == pytest.approx((60 + 90 + 100 + 100) / 400)
    assert report["saved_wall_ms"] == pytest.approx(1 - (2 + 3 + 4 + 4) / 16)
    assert report["ratio_wall_ms"] == pytest.approx([0.5, 0.75, 1.0])
    assert report["full_wall_ms"]["p50"] == 4.0


def test_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(InputError, match="at least one"):
        take({}, [], rounds=1)
    plain = {name: lambda frame: SimpleNamespace(exit_index=None) for name in SIDES}
    with pytest.raises(InputError, match="no chain"):
        take(plain, FRAMES, rounds=1)  # type: ignore[arg-type]


def test_products_come_from_the_architecture() -> None:
    from tinyusfm_edge.models.student import StudentConfig

    config = StudentConfig(task="classify", num_classes=2, image_size=32, width=24, heads=3, depth=4, exits=(1, 3))
    spec = ModelSpec(
        name="c", task=Task.CLASSIFY, labels=("a", "b"), preprocess=PreprocessSpec(height=32, width=32),
        architecture=config.to_json(), exits=ExitPolicy(blocks=(1, 3), entropy=(0.1, 0.1)),
    )  # fmt: skip
    first, second, third = products_of(spec)
    assert second > first - 4 * 256 * 24 > third > 0, "two blocks, then one with the patches, then the short last one"
