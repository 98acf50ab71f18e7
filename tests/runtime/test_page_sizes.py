"""The live page on screens of many sizes: nothing overlaps or sticks out, buttons can be pressed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.browser import Browser, chromium
from tests.runtime.live_driver import live_result, several
from tinyusfm_runtime.sinks import web

if not web.available().usable:
    pytest.skip(web.available().reason, allow_module_level=True)

pytestmark = pytest.mark.slow
SIZES = [(400, 860), (820, 1180), (768, 1024), (1180, 820), (1280, 800)]
BOXES = "header, #stage, #toggle-mask, #toggle-ellipse, #fullscreen, #frame-facts, .card, footer"
FAULTS = f"""
const shown = [...document.querySelectorAll("{BOXES}")].filter((box) => box.getClientRects().length && box.textContent);
const stage = document.getElementById("stage");
const boxes = [...new Set([...shown, stage])].map((box) => [box.id || box.className || box.tagName, box]);
const faults = [];
const over = (a, b) => Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1
  && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 1;
for (const [i, [name, box]] of boxes.entries()) {{
  const mine = box.getBoundingClientRect();
  if (mine.left < -1 || mine.right > innerWidth + 1) faults.push(name + " sticks out");
  if (mine.width < 20 || mine.height < 8) faults.push(name + " has no size");
  for (const [other, rest] of boxes.slice(i + 1)) {{
    if (!box.contains(rest) && !rest.contains(box) && over(mine, rest.getBoundingClientRect())) {{
      faults.push(name + " and " + other + " overlap");
    }}
  }}
}}
if (document.documentElement.scrollWidth > innerWidth) faults.push("the page is wider than the screen");
for (const button of document.querySelectorAll("button:not([hidden])")) {{
  button.scrollIntoView({{ block: "center" }});
  const at = button.getBoundingClientRect();
  const hit = document.elementFromPoint((at.left + at.right) / 2, (at.top + at.bottom) / 2);
  if (hit !== button) faults.push(button.id + " cannot be pressed");
}}
scrollTo(0, 0);
return faults;
"""


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Browser, Any]]:
    """A browser that looks at a page with a result of a head."""
    folder = tmp_path_factory.mktemp("page")
    with (
        web.open_sink("//:0", title="fetal-head", budget_ms=60_000.0, overlay_ms=60_000.0) as sink,
        chromium(folder) as tab,
    ):
        tab.open(sink.url)
        tab.wait("window.livePage && livePage.messages > 0", 60)
        for seq in range(1, 4):
            sink.write_live(live_result(seq))
        tab.wait("window.livePage.frames > 0", 60)
        yield tab, sink


@pytest.mark.parametrize("size", SIZES, ids=[f"{w}x{h}" for w, h in SIZES])
def test_nothing_overlaps_or_sticks_out(shown: tuple[Browser, Any], size: tuple[int, int]) -> None:
    tab, _ = shown
    tab.resize(*size)
    tab.wait(f"innerWidth === {size[0]}")
    assert tab.run(FAULTS) == []
    if folder := os.environ.get("TINYUSFM_SCREENSHOTS"):
        Path(folder, f"live-{size[0]}x{size[1]}.png").write_bytes(tab.screenshot())


def test_a_page_whose_rows_shrink_below_their_content_is_caught(shown: tuple[Browser, Any]) -> None:
    tab, _ = shown
    tab.resize(400, 860)
    tab.wait("innerWidth === 400")
    tab.run("document.querySelector('main').style.cssText = 'flex:1;height:300px;overflow:visible'")
    try:
        found = tab.run(FAULTS)
    finally:
        tab.run("document.querySelector('main').style.cssText = ''")
    assert any("overlap" in fault for fault in found)
    assert tab.run(FAULTS) == []


@pytest.fixture(scope="module")
def shown_two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Browser, Any]]:
    """A browser that looks at a page with results of two models."""
    with (
        web.open_sink("//:0", title="gate + head", budget_ms=60_000.0, overlay_ms=60_000.0) as sink,
        chromium(tmp_path_factory.mktemp("two")) as tab,
    ):
        tab.open(sink.url)
        tab.wait("window.livePage && livePage.messages > 0", 60)
        sink.write_live(several(live_result(1)))
        tab.wait("window.livePage.frames === 1", 60)
        yield tab, sink


@pytest.mark.parametrize("size", SIZES, ids=[f"{w}x{h}" for w, h in SIZES])
def test_both_models_stand_on_the_page(shown_two: tuple[Browser, Any], size: tuple[int, int]) -> None:
    tab, sink = shown_two
    tab.resize(*size)
    tab.wait(f"innerWidth === {size[0]}")
    before = tab.run("return livePage.frames")
    sink.write_live(several(live_result(2)))
    tab.wait(f"window.livePage.frames > {before}", 60)
    assert tab.run(FAULTS) == []
    gate, head = tab.run(CARDS)
    assert gate[0] == "gate" and "97.0 %" in gate[1] and "LIVE" in gate[1]
    assert head[0] == "head" and "mm" in head[1] and "LIVE" in head[1]
    if folder := os.environ.get("TINYUSFM_SCREENSHOTS"):
        Path(folder, f"two-{size[0]}x{size[1]}.png").write_bytes(tab.screenshot())
    sink.write_live(several(live_result(3), skipped="gate says no head, not head"))
    tab.wait(f"window.livePage.frames > {before + 1}", 60)
    assert tab.run(FAULTS) == []
    gate, head = tab.run(CARDS)
    assert "90.0 %" in gate[1], "the other one goes on"
    assert "SKIPPED" in head[1] and "gate says no head, not head" in head[1] and "mm" not in head[1]
    if folder := os.environ.get("TINYUSFM_SCREENSHOTS"):
        Path(folder, f"two-skipped-{size[0]}x{size[1]}.png").write_bytes(tab.screenshot())


CARDS = "return [...document.querySelectorAll('.model')].map((card) => [card.dataset.model, card.innerText])"


def test_buttons_are_those_of_what_the_model_gives(tmp_path: Path) -> None:
    head = live_result(1)
    assert head.prediction is not None
    classes = replace(head, prediction=replace(head.prediction, mask_HW=None, measurements=()))
    hidden = "return ['toggle-mask', 'toggle-ellipse'].map((id) => document.getElementById(id).hidden)"
    with (
        web.open_sink("//:0", title="tiny", budget_ms=60_000.0, overlay_ms=60_000.0) as sink,
        chromium(tmp_path) as tab,
    ):
        tab.open(sink.url)
        tab.wait("window.livePage && livePage.messages > 0", 60)
        sink.write_live(classes)
        tab.wait("window.livePage.frames === 1", 60)
        assert tab.run(hidden) == [True, True]
        sink.write_live(replace(head, frame=replace(head.frame, seq=2)))
        tab.wait("window.livePage.frames === 2", 60)
        assert tab.run(hidden) == [False, False]
        sink.close()
        tab.wait("livePage.state === 'offline'", 60)
        why = tab.run("return document.getElementById('state-why').textContent")
        assert "start it again" in why, "what to do is said"
