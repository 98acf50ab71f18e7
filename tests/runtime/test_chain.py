"""A chain of stages: it stops where the rule says and no stage runs for nothing; what is no chain is refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyusfm_runtime import plugins
from tinyusfm_runtime.early_exit import (
    EXIT_NAME,
    TOKENS_IN,
    TOKENS_OUT,
    ChainEngine,
    exit_names,
    is_chain,
    split_files,
    stage_file,
    stop_at,
)
from tinyusfm_runtime.engines import Engine, EngineConfig
from tinyusfm_runtime.errors import BundleError, EngineError, UnsupportedError
from tinyusfm_runtime.numerics.postprocess import probabilities
from tinyusfm_runtime.session import make_engine
from tinyusfm_runtime.spec import ExitPolicy, ModelSpec, PreprocessSpec, Task

POLICY = ExitPolicy(blocks=(6, 9), entropy=(0.5, 0.5))
SPEC = ModelSpec(
    name="c", task=Task.CLASSIFY, labels=("a", "b"), preprocess=PreprocessSpec(height=16, width=16), exits=POLICY
)
CONFIG = EngineConfig(threads=1, rest_precision="f32")
IMAGE = np.full((1, 1, 16, 16), 7, np.uint8)
FILES = {stage_file(stage, "m"): b"%d" % stage for stage in (1, 2, 3)}
SURE, UNSURE, OTHER = (4.0, -4.0), (0.1, 0.0), (0.0, 0.1)


class Stage:
    """An engine whose logits are told; its tokens count the stages behind them."""

    description = "told"

    def __init__(self, said: Sequence[tuple[float, float]]) -> None:
        self.said = said
        self.calls = 0
        self.closed = False
        self.takes: Any = None
        self.number = 0
        self.cancels: Any = None

    def load(self, files: Mapping[str, bytes], spec: ModelSpec, config: EngineConfig) -> None:
        assert set(files) == {"m"}
        self.number, self.takes = int(files["m"]), config.takes

    def run(self, tensor: np.ndarray) -> dict[str, np.ndarray]:
        self.calls += 1
        assert (tensor.shape, str(tensor.dtype)) == (self.takes.shape, self.takes.dtype)
        if self.number > 1:
            assert float(tensor[0, 0, 0]) == self.number - 1, "the tokens are those of the stage before"
        if self.cancels is not None:
            self.cancels()
        found = {"logits": np.array([self.said[self.number - 1]], np.float32)}
        if self.number < len(self.said):
            found[TOKENS_OUT] = np.full((1, 2, 3), self.number, np.float32)
        return found | ({"tokens_block2": np.ones((1, 3), np.float32)} if self.number == 1 else {})

    def cancel(self) -> None: ...

    def close(self) -> None:
        self.closed = True


def chain(*said: tuple[float, float], spec: ModelSpec = SPEC, full_depth: bool = False) -> ChainEngine:
    made = ChainEngine(lambda: Stage(said), full_depth=full_depth)
    made.load(FILES, spec, CONFIG)
    made.runs = [0] * len(made.runs)
    return made


@pytest.mark.parametrize(
    ("said", "stops", "runs"),
    [
        ((SURE, UNSURE, UNSURE), 0, [1, 0, 0]),
        ((UNSURE, SURE, UNSURE), 1, [1, 1, 0]),
        ((UNSURE, OTHER, UNSURE), 2, [1, 1, 1]),
    ],
)
def test_it_runs_no_further_than_the_rule_asks(said: Any, stops: int, runs: list[int]) -> None:
    engine = chain(*said)
    found = engine.run(IMAGE)
    assert list(found)[0] == "logits" and int(found[EXIT_NAME][0]) == stops
    assert tuple(found["logits"][0]) == pytest.approx(said[stops])
    assert engine.runs == runs
    assert TOKENS_OUT not in found and "tokens_block2" in found
    assert exit_names(POLICY)[stops] == ("block 6", "block 9", "end")[stops]


@given(st.lists(st.tuples(st.floats(-4, 4), st.floats(-4, 4)), min_size=3, max_size=3), st.sampled_from([0, 2]))
@settings(max_examples=50, deadline=None)
def test_the_chain_stops_where_the_rule_stops_with_all_answers_known(said: Any, patience: int) -> None:
    spec = replace(SPEC, exits=replace(POLICY, patience=patience))
    assert spec.exits is not None
    engine = chain(*said, spec=spec)
    everything, found = engine.run_checked(IMAGE)
    answers = np.stack([probabilities(row) for row in everything[0]])
    assert int(found[EXIT_NAME][0]) == stop_at(spec.exits, answers)
    assert engine.runs[0] == 2 and engine.runs[2] == 1 + (int(found[EXIT_NAME][0]) == 2)


def test_full_depth_never_stops_early() -> None:
    engine = chain(SURE, SURE, UNSURE, full_depth=True)
    found = engine.run_checked(IMAGE)[1]
    assert int(found[EXIT_NAME][0]) == 2 and "run to its end" in engine.description
    assert tuple(found["logits"][0]) == pytest.approx(UNSURE)


def test_what_is_not_finite_ends_the_chain_at_once() -> None:
    """Without this the entropy of NaN is 0, the surest answer there is; so it must not go on and be hidden either."""
    engine = chain((float("nan"), 0.0), SURE, SURE)
    found = engine.run(IMAGE)
    assert engine.runs == [1, 0, 0] and not np.isfinite(found["logits"]).all()


def test_a_chain_that_breaks_its_own_rule_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = chain(UNSURE, OTHER, UNSURE)
    stopping_at_once = {"logits": np.array([UNSURE], np.float32), EXIT_NAME: np.array([0], np.int64)}
    monkeypatch.setattr(engine, "run", lambda tensor: stopping_at_once)
    with pytest.raises(EngineError, match="stopped at exit 0"):
        engine.run_checked(IMAGE)


def test_cancelling_stops_between_stages() -> None:
    engine = chain(UNSURE, UNSURE, UNSURE)
    stages: Any = engine._stages
    stages[0].cancels = engine.cancel
    with pytest.raises(EngineError, match="cancelled"):
        engine.run(IMAGE)
    assert stages[2].calls == 0
    stages[0].cancels = None
    assert int(engine.run(IMAGE)[EXIT_NAME][0]) == 2, "the next run is not affected"
    engine.close()
    assert all(stage.closed for stage in stages)
    with pytest.raises(EngineError, match="not loaded"):
        engine.run(IMAGE)


def test_later_stages_are_told_what_the_one_before_gives() -> None:
    stages: Any = chain(UNSURE, UNSURE, UNSURE)._stages
    assert stages[0].takes == SPEC.input
    assert [(s.takes.name, s.takes.dtype, s.takes.shape) for s in stages[1:]] == [(TOKENS_IN, "float32", (1, 2, 3))] * 2


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"stage1.m": b"1", "stage2.m": b"2"}, "stages 1, 2"),
        ({**FILES, "stage4.m": b"4"}, "stages 1, 2, 3, 4"),
        ({**FILES, "m": b""}, "belongs to no stage"),
    ],
)
def test_files_that_are_no_chain_of_these_exits(files: dict[str, bytes], message: str) -> None:
    with pytest.raises(BundleError, match=message):
        split_files(files, 3)


def test_a_chain_needs_a_model_with_exits_and_tokens_between_stages() -> None:
    with pytest.raises(BundleError, match="no early exits"):
        chain(SURE, SURE, SURE, spec=replace(SPEC, exits=None))
    with pytest.raises(EngineError, match=TOKENS_OUT):
        chain(SURE)


def test_which_engines_run_chains() -> None:
    assert is_chain(FILES) and not is_chain(["model.onnx"])
    made: Engine = make_engine("ort", {"stage1.model.onnx": b""})
    assert isinstance(made, ChainEngine) and made.description == "chain, not loaded"
    assert not isinstance(make_engine("ort", {"model.onnx": b""}), ChainEngine)
    for name in plugins.names("engines"):
        if not getattr(plugins.load("engines", name), "CHAINS", False):
            with pytest.raises(UnsupportedError, match="openvino or litert"):
                make_engine(name, FILES)
