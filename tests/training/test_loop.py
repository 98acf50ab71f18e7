"""The engine: draws that no number of processes changes, the schedule, groups, bit-exact resumption, clear refusals."""

from __future__ import annotations

import json
import os
import signal
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn

from tinyusfm_edge.training.trainer import loop
from tinyusfm_edge.training.trainer.lock import LOCK, one_run
from tinyusfm_edge.training.trainer.loop import (
    Draw,
    Evaluation,
    ParameterGroup,
    TrainerConfig,
    draws_of_step,
    fit,
    learning_rate,
    plain_groups,
    read_scalars,
    stable_seed,
)
from tinyusfm_runtime.errors import CheckpointError, InputError
from tinyusfm_runtime.stop_signal import StopSignal

CONFIG = TrainerConfig(steps=9, batch=4, learning_rate=0.05, clip=1.0, ema=0.9, checkpoint_every=3, log_every=1)


class Toy(nn.Module):
    """Learns the identity through dropout, with a batch norm whose buffers move."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)

    def forward(self, batch: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        found = self.inner(nn.functional.dropout(self.norm(batch), 0.2))
        loss = (found - batch).square().mean()
        return loss, {"twice": 2 * loss.detach()}


class ToyTask:
    """Thirteen items that are seeds."""

    def __init__(self, fail_at: int | None = None) -> None:
        torch.manual_seed(3)
        self.objective = Toy()
        self.fail_at = fail_at

    def groups(self) -> list[ParameterGroup]:
        return plain_groups(self.objective, 0.1)

    def __len__(self) -> int:
        return 13

    def batch(self, draws: Sequence[Draw]) -> Tensor:
        if self.fail_at is not None and draws[0].position >= self.fail_at:
            raise RuntimeError("stopped")
        return torch.stack([torch.randn(4, generator=torch.Generator().manual_seed(d.seed)) for d in draws])


def run(out: Path, config: TrainerConfig = CONFIG, task: ToyTask | None = None, **options: Any) -> dict[str, Tensor]:
    task = task or ToyTask()
    fit(task, config, out, settings={"toy": 1}, device="cpu", quiet=True, **options)
    return dict(task.objective.state_dict())


@given(st.integers(1, 40), st.integers(1, 16), st.integers(0, 2**31), st.integers(0, 50))
@settings(max_examples=40, deadline=None)
def test_every_item_comes_once_an_epoch(items: int, batch: int, seed: int, first: int) -> None:
    steps = -(-items // batch) + 1
    draws = [d for step in range(first, first + steps) for d in draws_of_step(items, batch, seed, step)]
    assert [d.position for d in draws] == list(range(first * batch, (first + steps) * batch))
    start = -(-first * batch // items) * items
    epoch = Counter(d.index for d in draws if start <= d.position < start + items)
    assert set(epoch.values()) == {1}
    assert len({d.seed for d in draws}) == len(draws)


def test_orders_differ_between_epochs_and_seeds() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        return [d.index for d in draws_of_step(20, 20, seed, epoch)]

    assert order(1, 0) != order(1, 1) != order(2, 1)
    assert stable_seed("a", 1) != stable_seed("a", 2)
    assert stable_seed("a", 1) == 1555466263100575535, "seeds must never change between releases"


def test_schedule_rises_to_the_peak_and_ends_at_the_final_rate() -> None:
    config = TrainerConfig(steps=100, batch=1, learning_rate=1.0, final_learning_rate=0.01, warmup=10)
    rates = [learning_rate(config, step) for step in range(100)]
    assert rates[9] == 1.0
    assert rates[0] == pytest.approx(0.1)
    assert rates[-1] == pytest.approx(0.01)
    assert rates[:10] == sorted(rates[:10])
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_groups_hold_every_trainable_parameter_once_and_scales_reach_the_optimiser(tmp_path: Path) -> None:
    task = ToyTask()
    groups = plain_groups(task.objective, 0.1, lambda name: 0.0 if name.startswith("inner") else 1.0)
    decayed = {id(p) for g in groups if g.weight_decay for p in g.parameters}
    assert decayed == {id(task.objective.inner.weight)}
    before = task.objective.inner.weight.clone()
    task.groups = lambda: groups  # type: ignore[method-assign]
    after = run(tmp_path, task=task)
    assert torch.equal(before, after["inner.weight"]), "a scale of 0 must keep a group where it is"
    assert not torch.equal(ToyTask().objective.norm.weight, after["norm.weight"])


def test_a_forgotten_parameter_is_refused(tmp_path: Path) -> None:
    task = ToyTask()
    task.groups = lambda: plain_groups(task.objective.inner, 0.0)  # type: ignore[method-assign]
    with pytest.raises(InputError, match="exactly one group"):
        run(tmp_path, task=task)


@pytest.mark.parametrize("stop", [5 * 4, 7 * 4])
def test_a_stopped_run_goes_on_to_the_same_bits(tmp_path: Path, stop: int) -> None:
    whole = run(tmp_path / "whole")
    with pytest.raises(RuntimeError, match="stopped"):
        run(tmp_path / "broken", task=ToyTask(fail_at=stop))
    resumed = run(tmp_path / "broken")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    average = [load_file(tmp_path / n / "step-00000009" / "average.safetensors") for n in ("whole", "broken")]
    assert all(torch.equal(average[0][name], average[1][name]) for name in average[0])
    curves = [[(e["step"], e["loss"]) for e in read_scalars(tmp_path / n)] for n in ("whole", "broken")]
    assert curves[0] == curves[1], "scalars beyond the checkpoint are cut off and written again"
    assert [p.name for p in (tmp_path / "broken").glob("step-*")] == ["step-00000009"]


def test_without_restoring_the_optimiser_the_bits_would_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(tmp_path / "whole")
    with pytest.raises(RuntimeError, match="stopped"):
        run(tmp_path / "broken", task=ToyTask(fail_at=20))
    real = loop.RunFolder.load

    def forgetful(folder: Any, device: str) -> Any:
        found = real(folder, device)
        if found is None:
            return None
        return found[0], found[1], {**found[2], "state": {}}, found[3]

    monkeypatch.setattr(loop.RunFolder, "load", forgetful)
    resumed = run(tmp_path / "broken")
    assert not torch.equal(whole["inner.weight"], resumed["inner.weight"])


def test_accumulated_parts_make_the_same_step(tmp_path: Path) -> None:
    class Plain(ToyTask):
        def __init__(self) -> None:
            super().__init__()
            self.objective.norm = nn.Identity()  # type: ignore[assignment]
            self.objective.forward = lambda x: ((self.objective.inner(x) - x).square().mean(), {})  # type: ignore[method-assign]

    config = replace(CONFIG, ema=0.0)
    one = run(tmp_path / "one", config, Plain())
    two = run(tmp_path / "two", replace(config, accumulate=2), Plain())
    torch.testing.assert_close(one["inner.weight"], two["inner.weight"], atol=1e-6, rtol=1e-5)


def test_measurements_see_the_average_in_evaluation_mode_and_the_best_is_kept(tmp_path: Path) -> None:
    task = ToyTask()
    seen: list[tuple[bool, Tensor]] = []

    def measure() -> dict[str, float]:
        seen.append((task.objective.training, task.objective.inner.weight.detach().clone()))
        return {"score": [1.0, 3.0, 2.0][len(seen) - 1]}

    evaluation = Evaluation(every=3, measure=measure, best_by="score")
    outcome = fit(task, CONFIG, tmp_path, settings={}, evaluation=evaluation, device="cpu", quiet=True)
    assert [training for training, _ in seen] == [False] * 3
    assert (outcome.best, outcome.best_step, outcome.steps) == (3.0, 6, 9)
    average = load_file(tmp_path / "step-00000009" / "average.safetensors")
    assert torch.equal(seen[-1][1], average["inner.weight"])
    assert not torch.equal(task.objective.inner.weight, seen[-1][1]), "training goes on from the weights themselves"
    assert [e["score"] for e in read_scalars(tmp_path) if "score" in e] == [1.0, 3.0, 2.0]


def test_frozen_parameters_are_not_stored_and_buffers_are(tmp_path: Path) -> None:
    run(tmp_path)
    stored = load_file(tmp_path / "step-00000009" / "weights.safetensors")
    assert "frozen.weight" not in stored
    assert "norm.running_mean" in stored
    assert any((tmp_path / "tensorboard").iterdir())


def test_other_settings_a_damaged_checkpoint_and_a_bad_batch_are_refused(tmp_path: Path) -> None:
    run(tmp_path / "a")
    with pytest.raises(InputError, match=r"other settings \(engine.learning_rate\)"):
        run(tmp_path / "a", replace(CONFIG, learning_rate=0.1))
    (tmp_path / "a" / "step-00000009" / "trainer.pt").write_bytes(b"no checkpoint")
    with pytest.raises(CheckpointError, match="damaged"):
        run(tmp_path / "a")
    with pytest.raises(InputError, match="does not divide"):
        run(tmp_path / "b", replace(CONFIG, accumulate=3))
    for wrong in ({"steps": 0}, {"learning_rate": 0.0}, {"ema": 1.0}, {"precision": "fp8"}):
        with pytest.raises(InputError):
            replace(CONFIG, **wrong)  # type: ignore[arg-type]


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    task = ToyTask()
    task.batch = lambda draws: torch.full((len(draws), 4), float("nan"))  # type: ignore[method-assign]
    with pytest.raises(InputError, match="the loss is nan"):
        run(tmp_path, task=task)


def interrupting(at: int) -> ToyTask:
    """A task in whose step ``at`` (from 1) somebody presses Ctrl-C, in the middle of the work."""
    task = ToyTask()
    forward, calls = task.objective.forward, iter(range(1, 1000))

    def press(batch: Tensor) -> object:
        if next(calls) == at:
            signal.raise_signal(signal.SIGINT)
        return forward(batch)

    task.objective.forward = press  # type: ignore[method-assign]
    return task


def test_ctrl_c_saves_and_the_same_command_goes_on_to_the_same_end(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt, match=r"stopped at step 4 of 9; saved\. Run the same command to go on"):
        run(tmp_path / "stopped", replace(CONFIG, checkpoint_every=100), interrupting(4))
    assert (tmp_path / "stopped" / "step-00000004").is_dir(), "the step was finished and saved"
    again = run(tmp_path / "stopped")
    assert torch.equal(whole["inner.weight"], again["inner.weight"])


def test_a_second_ctrl_c_does_not_wait(tmp_path: Path) -> None:
    with StopSignal() as stop, pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
        assert stop.heard
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("the second one ends the work")
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)  # handlers are as before


def test_two_runs_in_one_folder_are_refused_and_a_killed_one_leaves_no_lock(tmp_path: Path) -> None:
    with one_run(tmp_path / "a"), pytest.raises(InputError, match=rf"in use by process {os.getpid()}"):
        run(tmp_path / "a")
    run(tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / LOCK).write_text("99999999", encoding="ascii")
    run(tmp_path / "b")
    assert not list(tmp_path.rglob(LOCK))


def test_a_run_can_be_made_longer_but_not_shorter_than_it_is(tmp_path: Path) -> None:
    run(tmp_path / "a")
    longer = run(tmp_path / "a", replace(CONFIG, steps=12))
    assert (tmp_path / "a" / "step-00000012").is_dir() and longer
    assert json.loads((tmp_path / "a" / "config.json").read_text(encoding="utf-8"))["engine"]["steps"] == 12
    with pytest.raises(InputError, match="has taken 12 steps already, 10 are asked for"):
        run(tmp_path / "a", replace(CONFIG, steps=10))
