"""``tune`` on tiny bundles in real processes: table, page, recipe there and back, a killed run, a device over SSH."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.browser import Browser, chromium
from tests.conftest import Parts, child_environment
from tests.needs import needs
from tinyusfm_edge.cli.main import main
from tinyusfm_edge.export import make_plan
from tinyusfm_edge.tuning.visit import VisitPlan, visit

needs("onnxruntime", "install tinyusfm-edge[onnxruntime]")

WIDTHS = [(400, 860), (768, 1024), (1280, 800)]
QUICK = [
    "--threads",
    "1",
    "--no-pin",
    "--rounds",
    "1",
    "--runs",
    "40",
    "--seconds",
    "20",
    "--source",
    "phantom:200-201",
]


@pytest.fixture(scope="module")
def full(engine_parts: Callable[[str], Parts], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model in ONNX Runtime."""
    return engine_parts("ort").publish(tmp_path_factory.mktemp("tune") / "full.bundle")


@pytest.fixture(scope="module")
def twin(full: Path, engine_parts: Callable[[str], Parts]) -> Path:
    """Another bundle of it, one that was never gated."""
    parts = engine_parts("ort").with_artefact(gated=False)
    return parts.publish(full.parent / "twin.bundle")


@pytest.fixture(scope="module")
def tuned(full: Path, twin: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what a whole run wrote."""
    out = tmp_path_factory.mktemp("tuned")
    assert main(["tune", str(full), str(twin), "--budget-ms", "5000", "--out", str(out), *QUICK]) == 0
    return out


def report_in(out: Path) -> dict[str, Any]:
    found = json.loads((out / "tune.json").read_text(encoding="utf-8"))
    assert isinstance(found, dict)
    return found


def test_a_run_leaves_rows_with_samples_intervals_and_accuracy(tuned: Path) -> None:
    told = report_in(tuned)
    assert told["kind"] == "tinyusfm-edge tune" and told["choice"]["pick"] == "full/onnx-fp32/1/free"
    rows = {row["key"]: row for row in told["rows"]}
    mine = rows["full/onnx-fp32/1/free"]
    assert len(mine["samples_ms"]) == 40 and mine["accuracy"]["dice_mean"] == 1.0 and mine["rss_mb"] > 20
    median, ninety, most = mine["quantiles_ms"]
    assert median["low"] <= median["value"] <= median["high"] <= ninety["high"] and most["needed"] == 368
    assert "onnx" in mine["description"].lower() and mine["judged"] == "8 golden frames, here"
    assert rows["twin/onnx-fp32/1/free"]["why_not"] == "never passed its gate"
    assert told["state"]["about"]["machine"]["cpu"] and "busy" in told


def test_the_recipe_goes_to_export_and_to_run(
    tuned: Path, full: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    recipe = next(tuned.glob("recipe.*"))
    plan = make_plan(str(recipe), None, (), None, None)
    assert (plan.targets, plan.precisions, plan.threads) == (["onnx"], ["fp32"], 1)
    assert plan.recipe is not None and plan.recipe.budget_ms == 5000.0 and plan.recipe.variant == "full"
    assert main(["run", str(full), "phantom:0-1", "--recipe", str(recipe)]) == 0
    assert "onnx-fp32 on ONNX Runtime" in capsys.readouterr().out
    wanted = {"targets": ["openvino"], "precisions": ["int8"]}
    text = json.dumps({**json.loads(json.dumps(plan_keys(plan.recipe))), **wanted})
    (tmp_path / "other.json").write_text(text, encoding="utf-8")
    assert main(["run", str(full), "phantom:0", "--recipe", str(tmp_path / "other.json")]) == 2
    assert "asks for openvino-int8; the bundle holds onnx-fp32" in capsys.readouterr().err
    again = ["run", str(full), "phantom:0", "--recipe", str(tmp_path / "other.json"), "--target", "onnx"]
    assert main(again) == 0, "options on the line win"


def plan_keys(recipe: Any) -> dict[str, Any]:
    return {
        "version": 1, "about": recipe.about, "targets": list(recipe.targets), "precisions": list(recipe.precisions),
        "threads": recipe.threads, "run": {"variant": recipe.variant, "cpus": list(recipe.cpus)},
        "budget": {"frame_ms": recipe.budget_ms, "measured": recipe.measured, "note": recipe.note},
    }  # fmt: skip


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="threads are pinned on Linux")
@pytest.mark.parametrize("words", [[], ["--budget-ms", "10000"]], ids=["file", "live"])
def test_a_recipe_with_cpus_pins_the_engine_and_nothing_else(
    tuned: Path, full: Path, tmp_path: Path, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from tinyusfm_export.recipe import load_recipe
    from tinyusfm_runtime.session import Session

    before = os.sched_getaffinity(0)
    cpu, seen = min(before), []
    keys = plan_keys(load_recipe(str(next(tuned.glob("recipe.*")))))
    place = tmp_path / "pinned.json"
    place.write_text(json.dumps({**keys, "run": {"variant": "full", "cpus": [cpu]}}), encoding="utf-8")
    real = Session.predict

    def predict(self: Session, *given: Any, **options: Any) -> Any:
        seen.append(os.sched_getaffinity(0))
        return real(self, *given, **options)

    monkeypatch.setattr(Session, "predict", predict)
    assert main(["run", str(full), "phantom:0-1", "--recipe", str(place), *words]) == 0
    assert {cpu} in seen and os.sched_getaffinity(0) == before


def test_a_budget_that_nothing_meets_ends_with_1_and_says_what_would(
    tuned: Path, full: Path, twin: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = (tuned / "state.json").read_bytes()
    assert main(["tune", str(full), str(twin), "--budget-ms", "0.001", "--out", str(tuned), *QUICK]) == 1
    told = report_in(tuned)
    assert told["choice"]["pick"] is None and told["choice"]["ratio"] > 1
    assert told["choice"]["nearest"] == "full/onnx-fp32/1/free" and not list(tuned.glob("recipe.*"))
    said = capsys.readouterr()
    assert "times the budget" in said.err and "would do     a budget of" in said.out
    assert told["choice"]["would"][0] in (tuned / "tune.html").read_text(encoding="utf-8")
    assert (tuned / "state.json").read_bytes() == state, "nothing is measured again for another budget"
    assert main(["tune", str(full), str(twin), "--budget-ms", "5000", "--out", str(tuned), *QUICK]) == 0


@pytest.mark.parametrize("size", WIDTHS, ids=[f"{w}x{h}" for w, h in WIDTHS])
def test_the_page_fits_the_screen_and_fetches_nothing(tuned: Path, size: tuple[int, int], tab: Browser) -> None:
    text = (tuned / "tune.html").read_text(encoding="utf-8")
    assert "<script" not in text and "http" not in text.replace("http://www.w3.org/2000/svg", "")
    tab.open((tuned / "tune.html").as_uri())
    tab.resize(*size)
    tab.wait(f"innerWidth === {size[0]}")
    assert tab.run("return document.documentElement.scrollWidth <= innerWidth")
    titles = tab.run("return [...document.querySelectorAll('h2')].map((title) => title.textContent)")
    assert titles[:2] == ["What was tried", "Accuracy against latency"]
    letters = tab.run(
        "return [...document.querySelectorAll('svg')].map((svg) => svg.getBoundingClientRect().width / 720"
        " * parseFloat(getComputedStyle(svg.querySelector('text')).fontSize))"
    )
    assert letters and all(height >= 9 for height in letters), "words of charts can be read"
    cut = "[...document.querySelectorAll('table')].filter((table) => table.scrollWidth > table.parentNode.clientWidth)"
    assert not tab.run(f"return {cut}.length"), "no column is hidden beside the screen"
    assert "never passed its gate" in tab.run("return document.body.innerText")


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """A browser."""
    with chromium(tmp_path_factory.mktemp("browser")) as browser:
        yield browser


def test_a_killed_command_goes_on_where_it_was(full: Path, tmp_path: Path) -> None:
    words = ["tune", str(full), "--out", str(tmp_path / "o"), "--threads", "1,2", "--no-pin", "--rounds", "3"]
    words += ["--runs", "8", "--source", "phantom:200-201"]
    command = [sys.executable, "-m", "tinyusfm_edge", *words]
    process = subprocess.Popen(
        command, env=child_environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    place, stop = tmp_path / "o" / "state.json", time.monotonic() + 900
    while not place.is_file():
        assert process.poll() is None and time.monotonic() < stop
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before = json.loads(place.read_text(encoding="utf-8"))["visits"]
    assert main([*words, "--rounds", "1"]) == 0
    after = report_in(tmp_path / "o")["state"]["visits"]
    assert after[: len(before)] == before and len(after) == max(2, len(before))
    assert main([*words, "--rounds", "1", "--runs", "9"]) == 2, "a state of other settings is not mixed in"
    assert main([*words, "--rounds", "1", "--runs", "9", "--fresh"]) == 0


def test_wrong_words_are_one_line(full: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--out", str(tmp_path)]
    assert main(["tune", str(full), *out, "--threads", "two"]) == 2
    assert "whole numbers from 1 to 1024" in capsys.readouterr().err
    assert main(["tune", str(full), str(full), *out]) == 2
    assert "two variants are named full" in capsys.readouterr().err
    assert main(["tune", str(tmp_path), *out]) == 2
    assert "a folder without a bundle" in capsys.readouterr().err


def test_a_visit_that_fails_is_an_answer_and_no_error(full: Path, tmp_path: Path) -> None:
    from tinyusfm_edge.tuning.candidates import TuneVariant, list_candidates

    one = list_candidates([[TuneVariant.of(full)]], (1,), ())[0][0]
    assert "does not exist" in visit(one, VisitPlan(source=str(tmp_path / "gone.png")))["error"]


def fake_ssh(folder: Path) -> str:
    """A program that takes ssh's words and runs the command on this machine."""
    script = folder / "ssh"
    script.write_text('#!/bin/sh\nfor word; do last=$word; done\nexec sh -c "$last"\n', encoding="utf-8")
    script.chmod(0o755)
    return str(script)


def test_a_device_measures_round_by_round_and_the_state_comes_back(
    full: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", child_environment()["PYTHONPATH"])
    words = ["tune", str(full), "--out", str(tmp_path / "o"), *QUICK, "--rounds", "2", "--host", "user@board"]
    words += ["--ssh", fake_ssh(tmp_path), "--remote-python", sys.executable, "--budget-ms", "5000"]
    assert main(words) == 0, capsys.readouterr().err
    told = report_in(tmp_path / "o")
    assert told["host"] == "board" and told["choice"]["pick"] == "full/onnx-fp32/1/free"
    assert [one["round"] for one in told["state"]["visits"]] == [0, 1]
    assert json.loads((tmp_path / "o" / "state-board.json").read_text()) == told["state"]
    assert "measured on  board" in capsys.readouterr().out
    assert "What runs best on board" in (tmp_path / "o" / "tune.html").read_text(encoding="utf-8")
