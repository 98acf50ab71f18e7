"""Rounds: everybody is asked once a round, noise is recognised, and ratios are taken between neighbours in time."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from rounds import QUIET, interleave, quiet_rounds, slowdowns, statistics
from tables import floor_of, floors_ms, frontier

HERE = Path(__file__).resolve().parents[2] / "benchmarks"


def drifting(rounds: int, *, slow: tuple[int, ...] = ()) -> dict[str, list[list[float]]]:
    """Two workers, one twice as fast, on a machine that is 1.4 times slower in some rounds."""
    factors = [1.4 if index in slow else 1.0 for index in range(rounds)]
    return {name: [[base * f] * 5 for f in factors] for name, base in (("ours", 5.0), ("rival", 10.0))}


def test_every_worker_is_asked_once_a_round_in_changing_order() -> None:
    asked: list[str] = []

    def block(name: str) -> list[float]:
        asked.append(name)
        return [1.0]

    samples = interleave({n: (lambda n=n: block(n)) for n in "abc"}, rounds=8, seed=1)
    turns = [asked[i : i + 3] for i in range(0, 24, 3)]
    assert all(sorted(turn) == ["a", "b", "c"] for turn in turns)
    assert len({tuple(turn) for turn in turns}) > 1
    assert {name: len(blocks) for name, blocks in samples.items()} == {"a": 8, "b": 8, "c": 8}


def test_slow_rounds_are_left_out_and_ratios_survive_them() -> None:
    samples = drifting(8, slow=(2, 5))
    assert [round(value, 2) for value in slowdowns(samples)] == [1, 1, 1.4, 1, 1, 1.4, 1, 1]
    assert quiet_rounds(samples) == [0, 1, 3, 4, 6, 7]
    figures = statistics(samples, ("rival",))
    assert figures["ours"].quiet_p50_ms == 5.0
    assert figures["ours"].p99_ms == 7.0
    assert figures["ours"].ratios["rival"] == pytest.approx((2.0, 2.0, 2.0))


def test_one_slow_worker_does_not_make_a_round_slow() -> None:
    samples = {name: [[1.0]] * 6 for name in "abcde"} | {"f": [[9.0 if i == 3 else 1.0] for i in range(6)]}
    assert max(slowdowns(samples)) <= QUIET
    assert quiet_rounds(samples) == list(range(6))


def test_without_quiet_rounds_all_count() -> None:
    samples = {"a": [[1.0], [1.5], [1.6], [1.7], [1.8]]}
    assert quiet_rounds(samples) == [0, 1, 2, 3, 4]


def test_a_ratio_of_medians_over_time_would_be_wrong_here() -> None:
    # the rival was measured while the machine was slow: only a ratio inside each round is fair
    rng = np.random.default_rng(0)
    factors = rng.uniform(1, 3, 12)
    samples = {"ours": [[5 * f] for f in factors], "rival": [[10 * f] for f in factors]}
    assert statistics(samples, ("rival",))["ours"].ratios["rival"][0] == pytest.approx(2.0)


def test_frontier_keeps_what_no_faster_worker_equals() -> None:
    samples = {"fast": [[1.0]] * 3, "middle": [[2.0]] * 3, "useless": [[3.0]] * 3, "exact": [[4.0]] * 3}
    worst = {"fast": 0.9, "middle": 0.98, "useless": 0.97, "exact": 1.0}
    agreement = {name: {"dice_worst": value} for name, value in worst.items()}
    assert frontier(statistics(samples, ()), agreement) == ["fast", "middle", "exact"]


def test_floor_is_all_operations_at_the_peak() -> None:
    gops = {name: {"best": speed} for name, speed in (("fp32", 200.0), ("bf16", 400.0), ("int8", 800.0))}
    floors = floors_ms({"macs": 1_000_000_000}, gops)
    assert floors == pytest.approx({"fp32": 10.0, "bf16": 5.0, "int8": 2.5})
    assert floor_of("ours openvino-int8", floors) == floors["int8"]
    assert floor_of("ort fp32", floors) == floors["fp32"]


def test_worker_speaks_json_whatever_libraries_print(tmp_path: Path) -> None:
    code = (
        "import engine_worker as w, numpy as np\n"
        "def call(value):\n    print('noise')\n    return value * 2\n"
        "w.serve(w.TensorCase(call, [np.ones((1, 1, 2, 2), np.float32)] * 3, 'doubler'), 1.0)\n"
    )
    requests = [{"do": "card"}, {"do": "time", "warm": 1, "runs": 4}, {"do": "answers", "out": str(tmp_path / "a.npz")}]
    done = subprocess.run(
        [sys.executable, "-c", code],
        input="".join(json.dumps(request) + "\n" for request in requests),
        capture_output=True,
        text=True,
        cwd=HERE,
        timeout=900,
    )
    card, times, answers = map(json.loads, done.stdout.splitlines())
    assert card["description"] == "doubler"
    assert card["torch"] is False
    assert len(times["infer"]) == 4
    assert answers["shape"] == [3, 1, 2, 2]
    with np.load(tmp_path / "a.npz", allow_pickle=False) as arrays:
        assert (arrays["logits"] == 2).all()
