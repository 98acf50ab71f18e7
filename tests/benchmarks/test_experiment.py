"""The experiment's plan and table: every row has its commands, nothing is claimed that was not run three times."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import experiment
from experiment import PLANS, commands, expand, frame_scores, read_plan, rows, run_row
from experiment_table import compare, read_results, render
from tinyusfm_runtime.errors import InputError

pytestmark = pytest.mark.skipif(sys.version_info < (3, 11), reason="the plan is TOML, read from Python 3.11 on")

PLACES = {"data": "DATA", "teacher": "T.safetensors", "work": "W"}


@pytest.fixture(scope="module")
def plan() -> dict[str, Any]:
    return read_plan()


@pytest.fixture(scope="module")
def plans() -> list[dict[str, Any]]:
    return [read_plan(path) for path in PLANS]


def result(row: str, seed: int, dice: np.ndarray) -> dict[str, Any]:
    images = [{"id": f"{i:016x}", "group": f"g{i // 2}", "dice": float(value)} for i, value in enumerate(dice)]
    return {"version": 1, "row": row, "seed": seed, "metric": "dice", "images": images}


def write(folder: Path, *results: dict[str, Any]) -> None:
    for found in results:
        (folder / f"{found['row']}-seed{found['seed']}.json").write_text(json.dumps(found), encoding="utf-8")


def table(plan: dict[str, Any], folder: Path) -> dict[str, str]:
    named = [(row.name, row.grid, row.labels, row.arm) for row in rows(plan)]
    lines = render(plan, named, read_results(folder)).splitlines()
    found: dict[str, str] = {}
    for line in lines:
        if line.startswith("| hc18-10-"):
            found.setdefault(line.split("|")[1].strip(), line)  # comparisons of two arms come further down
    return found


def test_every_row_has_commands_of_the_command_line(plans: list[dict[str, Any]]) -> None:
    from typer.main import get_command

    from tinyusfm_edge.cli.main import app

    known: Any = get_command(app)
    planned = [(plan, row) for plan in plans for row in rows(plan)]
    names = [row.name for _, row in planned]
    assert {"hc18-10-scratch", "hc18-100-ours", "busi-25-tskd", "head-10-unmasked", "long-10-tskd-600"} <= set(names)
    assert len(set(names)) == len(names), "results of both plans lie in one folder"
    for plan, row in planned:
        found = commands(plan, row, 1, PLACES)
        for words in (*found.start, found.adapt, found.evaluate):
            options = {name for parameter in known.commands[words[0]].params for name in parameter.opts}
            unknown = {word for word in words if word.startswith("--")} - options
            assert not unknown, f"{row.name}: {words[0]} has no {unknown}"
        assert "{" not in " ".join(found.adapt)


def test_arms_of_a_grid_have_the_same_steps(plans: list[dict[str, Any]]) -> None:
    wanted = {"hc18": "300", "busi": "300", "head": "100", "head300": "300", "breast300": "300", "badpool": "300"}
    wanted |= {"head1200": "1200", "long": "1200"}
    for plan in plans:
        for row in rows(plan):
            steps = commands(plan, row, 0, PLACES)
            assert _last(steps.adapt, "--steps") == wanted[row.grid], "the last one counts"


def test_starts_of_a_grid_have_the_same_steps(plans: list[dict[str, Any]]) -> None:
    wanted = {"hc18": "800", "busi": "800", "head": "150"}
    for plan, row in ((each, row) for each in plans for row in rows(each)):
        for words in commands(plan, row, 0, PLACES).start:
            steps = [word for word in words if word.startswith("steps=")]
            own = "1000" if row.arm == "unmasked-1000" else wanted.get(row.grid, "600")
            assert words[0] != "distill" or steps == [f"steps={own}"], "that arm has the time of plain distillation"
            assert ("--short" in words) == (steps == ["steps=150"])


def test_arms_of_todays_method_differ_in_what_they_say(plans: list[dict[str, Any]]) -> None:
    from tinyusfm_edge.training.pretrain.config import read_config

    plan = plans[1]
    configs = {}
    for arm in ("kd", "selected-kd", "unmasked", "clean", "standardised", "three-views"):
        row = next(row for row in rows(plan) if row.arm == f"{arm}-600")
        words = commands(plan, row, 0, PLACES).start[-1]
        changes = [value for option, value in zip(words, words[1:], strict=False) if option == "--set"]
        configs[arm], _ = read_config(_last(words, "--ablation"), None, changes)
        assert ("--init" in words) == (arm != "kd"), "all but kd start from selected weights"
        assert configs[arm].targets == "clean" and configs[arm].weight_place == "visible"
    assert [name for name, config in configs.items() if not config.standardise] == ["clean"]
    assert [name for name, config in configs.items() if config.keep < 1] == ["unmasked"]
    assert [name for name, config in configs.items() if config.reconstruct] == ["clean", "standardised", "three-views"]
    assert len(configs["standardised"].views) == 2 and len(configs["three-views"].views) == 3
    assert configs["kd"] == configs["selected-kd"]


def _last(words: Sequence[str], option: str) -> str:
    return [value for name, value in zip(words, words[1:], strict=False) if name == option][-1]


def test_placeholders() -> None:
    assert expand(["a", "{pool}", "x={n}"], {"pool": ["--data", "{n}"]}, {"n": "7"}) == ["a", "--data", "7", "x=7"]
    with pytest.raises(InputError, match="placeholder"):
        expand(["{nothing}"], {}, {})


def test_a_row_without_results_says_so(plan: dict[str, Any], tmp_path: Path) -> None:
    lines = table(plan, tmp_path)
    assert lines and all("not run" in line for line in lines.values())


def test_two_seeds_are_no_claim_and_three_are_one(plan: dict[str, Any], tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    base = rng.uniform(0.7, 0.9, 40)
    for seed in range(2):
        write(tmp_path, result("hc18-10-scratch", seed, base), result("hc18-10-ours", seed, base + 0.05))
    lines = table(plan, tmp_path)
    assert "2 seeds: no claim" in lines["hc18-10-ours"] and "ahead" not in lines["hc18-10-ours"]
    write(tmp_path, result("hc18-10-scratch", 2, base), result("hc18-10-ours", 2, base + 0.05))
    lines = table(plan, tmp_path)
    assert "ahead" in lines["hc18-10-ours"] and "+0.0500" in lines["hc18-10-ours"]
    assert "+- " in lines["hc18-10-ours"]


def test_noise_and_a_single_contrary_seed_are_no_claim(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    base = rng.uniform(0.7, 0.9, 40)
    for seed in range(3):
        noise = rng.normal(scale=0.05, size=40)
        shift = -0.02 if seed == 2 else 0.1
        write(
            tmp_path,
            result("a", seed, base),
            result("noise", seed, base + noise - noise.mean() * (seed > 0)),
            result("mixed", seed, base + shift),
        )
    found = read_results(tmp_path)
    by_row = {name: [r for r in found if r.row == name] for name in ("a", "noise", "mixed")}
    assert compare(by_row["noise"], by_row["a"])[1] == "no difference shown"
    difference, verdict = compare(by_row["mixed"], by_row["a"])
    assert difference is not None and difference.low > 0
    assert verdict == "no difference shown", "one seed of three went the other way"
    assert compare(by_row["a"], by_row["mixed"])[1] == "no difference shown"


def test_results_of_other_frames_or_versions_are_refused(tmp_path: Path) -> None:
    write(tmp_path, result("a", 0, np.ones(4)), result("b", 0, np.ones(6)))
    found = read_results(tmp_path)
    with pytest.raises(InputError, match="different frames"):
        compare(found[:1], found[1:])
    write(tmp_path, {**result("a", 0, np.ones(4)), "version": 2})
    with pytest.raises(InputError, match="version"):
        read_results(tmp_path)


def test_a_finished_row_is_not_run_again_and_a_start_is_shared(plan: dict[str, Any], tmp_path: Path) -> None:
    called: list[str] = []
    places = {**PLACES, "work": str(tmp_path / "work")}

    def call(words: Sequence[str]) -> float:
        called.append(words[0])
        if words[0] == "distill":
            folder = Path(words[words.index("--out") + 1])
            folder.mkdir(parents=True)
            (folder / experiment.STUDENT_FILE).write_bytes(b"")
        if words[0] == "evaluate":
            images = [{"sha256": "ab" * 32, "group": "patient", "dice": 0.5, "hd95_px": None}]
            text = json.dumps({"weights_sha256": "c", "reports": [{"split": "test", "images": images}]})
            Path(words[words.index("--json") + 1]).write_text(text, encoding="utf-8")
        return 1.0

    by_name = {row.name: row for row in rows(plan)}
    out = run_row(plan, by_name["hc18-10-kd"], 0, places, tmp_path / "results", command=call)
    assert called == ["distill", "adapt", "evaluate"]
    run_row(plan, by_name["hc18-10-kd"], 0, places, tmp_path / "results", command=call)
    assert called == ["distill", "adapt", "evaluate"], "a result is there"
    run_row(plan, by_name["hc18-25-kd"], 0, places, tmp_path / "results", command=call)
    assert called[3:] == ["adapt", "evaluate"], "the start serves every share of the labels"
    text = out.read_text(encoding="utf-8")
    assert str(tmp_path) not in text and "patient" not in text, "no machine path, no patient"
    assert read_results(tmp_path / "results")[0].value() == 0.5
    assert set(json.loads(text)["cpu_seconds"]) == {"start", "adapt", "evaluate"}


def test_selected_weights_are_made_once(plans: list[dict[str, Any]], tmp_path: Path) -> None:
    called: list[str] = []
    places = {**PLACES, "work": str(tmp_path / "work")}

    def call(words: Sequence[str]) -> float:
        called.append(words[0])
        out = Path(words[words.index("--out") + 1]) if "--out" in words else tmp_path / "none"
        if words[0] == "distill":
            out.mkdir(parents=True)
            (out / experiment.STUDENT_FILE).write_bytes(b"")
        if words[0] == "select":
            out.write_bytes(b"")
        if words[0] == "evaluate":
            text = json.dumps({"weights_sha256": "c", "reports": [{"split": "test", "images": []}]})
            Path(words[words.index("--json") + 1]).write_text(text, encoding="utf-8")
        return 1.0

    by_name = {row.name: row for row in rows(plans[1])}
    run_row(plans[1], by_name["head-10-unmasked"], 0, places, tmp_path / "results", command=call)
    run_row(plans[1], by_name["head-10-standardised"], 0, places, tmp_path / "results", command=call)
    assert called == ["select", "distill", "adapt", "evaluate", "distill", "adapt", "evaluate"]


def test_scores_of_classes_keep_truth_and_probabilities() -> None:
    image = {"sha256": "ab" * 32, "group": "p", "truth": 1, "probabilities": [0.2, 0.8]}
    kept = frame_scores({"weights_sha256": "w", "reports": [{"split": "test", "images": [image]}]})["images"][0]
    assert kept == {"id": "ab" * 8, "group": kept["group"], "truth": 1, "probabilities": [0.2, 0.8]}
    assert kept["group"] != "p"
