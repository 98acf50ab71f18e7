"""A small classifier, trained on phantoms here, decides which frames the shipped fetal-head is asked about."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import tests.conftest as shared
from tests.conftest import SIDE, NumpyEngine, gate_spec, make_parts
from tinyusfm_runtime.bundle.shipped import SHIPPED
from tinyusfm_runtime.frame import Frame
from tinyusfm_runtime.live.loop import Live
from tinyusfm_runtime.numerics.preprocess import preprocess
from tinyusfm_runtime.phantom import make_phantom

RULES = """
[fetal-head]
after = "head-or-not"
needs_label = "head"
min_confidence = 0.6
"""


def in_air(frame: Frame) -> Frame:
    """The same probe in the air: near field, then nothing."""
    depth = np.arange(frame.pixels.shape[0])[:, None] / frame.pixels.shape[0]
    faded = frame.pixels * np.clip(1.2 - 4 * depth, 0.02, 1)
    return replace(frame, pixels=faded.astype(np.uint8))


def features(tensor: np.ndarray) -> np.ndarray:
    """Mean brightness of 8x8 blocks above or below the usual, and a one."""
    blocks = tensor[0, 0].astype(np.float64).reshape(SIDE // 8, 8, SIDE // 8, 8).mean(axis=(1, 3)).ravel() / 64
    return np.append(blocks - 0.7, 1.0)


def trained(seeds: range) -> np.ndarray:
    """Logistic regression on phantoms with a head, and on the same ones in the air."""
    spec = gate_spec().preprocess
    heads = [make_phantom(seed).frame for seed in seeds]
    rows = np.array([features(preprocess(frame, spec)[0]) for head in heads for frame in (head, in_air(head))])
    wanted = np.tile([1.0, 0.0], len(heads))
    weights = np.zeros(rows.shape[1])
    for _ in range(1500):
        weights -= 0.5 * rows.T @ (1 / (1 + np.exp(-rows @ weights)) - wanted) / len(wanted)
    return weights


class Stream:
    """A head, the probe in the air, a head."""

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def __iter__(self) -> Iterator[Frame]:
        for seq, seed in enumerate((103, 104, 105)):
            frame = make_phantom(seed).frame
            yield replace(in_air(frame) if seed == 104 else frame, seq=seq)


def test_the_shipped_model_is_asked_about_heads_alone(
    plug_in: type[NumpyEngine], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("tomllib")
    if not (SHIPPED / "fetal-head.bundle").is_dir():
        pytest.skip("the shipped bundle is not built: make bundle")
    weights = trained(range(24))

    def scores(tensor: np.ndarray) -> np.ndarray:
        margin = float(features(tensor) @ weights)
        return np.array([[-margin / 2, margin / 2]], np.float32)

    monkeypatch.setattr(shared, "tiny_scores", scores)
    gate = make_parts({"fake": {"model.onnx": weights.tobytes()}}, gate_spec(name="head-or-not"))
    bundle = gate.publish(tmp_path / "gate.bundle")
    (tmp_path / "rules.toml").write_text(RULES, encoding="utf-8")
    with Live([bundle, "fetal-head"], Stream(), rules=tmp_path / "rules.toml") as live:
        first, air, last = list(live)
    for result in (first, last):
        head = result.of("fetal-head")
        assert head.skipped is None and head.valid and head.prediction is not None
        assert head.prediction.measurement is not None and head.prediction.measurement.found
        assert result.of("head-or-not").prediction is not None
    left_out = air.of("fetal-head")
    assert left_out.prediction is None and left_out.skipped == "head-or-not says no head, not head"
    assert not left_out.degraded, "a rule is no fault"
