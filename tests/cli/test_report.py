"""The report page: one file, no request to anywhere, no script, everything escaped, charts that draw what they get."""

from __future__ import annotations

import base64
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from tinyusfm_edge.report import charts
from tinyusfm_edge.report.page import Chart, Facts, Images, Page, Table, render
from tinyusfm_runtime.overlay import encode_png

EVIL = '<script>alert("x")</script> & co'
IMAGE = encode_png(np.zeros((8, 8, 3), np.uint8))


def page(passed: bool = True) -> Page:
    return Page(
        title=EVIL,
        passed=passed,
        headline=EVIL,
        lead=(EVIL,),
        blocks=(
            Table(title=EVIL, note=EVIL, header=("a", EVIL), rows=[("1.5", "passed"), (EVIL, "MISSED")]),
            Chart(title="dice", svg=charts.strip({EVIL: [0.99, None, 0.98]}, "Dice", limit=0.95, limit_label=EVIL)),
            Chart(title="latency", svg=charts.histogram({EVIL: [1.0, 2.0, 3.0]}, "ms")),
            Images(title="images", images=[(EVIL, IMAGE)]),
            Facts(title="facts", facts=[(EVIL, EVIL)]),
        ),
    )


class Reader(HTMLParser):
    """Collects tags, and every attribute that could fetch something."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.fetches: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.fetches += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]


def test_page_is_self_contained_and_escaped() -> None:
    text = render(page())
    reader = Reader()
    reader.feed(text)
    assert not {"script", "link", "iframe", "object", "form"} & set(reader.tags)
    assert all(address.startswith("data:image/png;base64,") for address in reader.fetches)
    assert "@import" not in text and not re.search(r"url\(", text)
    assert EVIL not in text and text.count("&lt;script&gt;") >= 8
    found = re.search(r'src="data:image/png;base64,([^"]+)"', text)
    assert found is not None and base64.b64decode(found[1]) == IMAGE
    assert text.startswith("<!doctype html>") and 'name="viewport"' in text


def test_banner_and_cells_show_the_verdict() -> None:
    assert 'class="banner good"' in render(page()) and 'class="banner bad"' in render(page(passed=False))
    text = render(page())
    assert '<td class="good">passed</td>' in text and '<td class="bad">MISSED</td>' in text
    assert "<td>1.5</td>" in text, "words stand in the same column"
    numbers = render(replace(page(), blocks=[Table(title="t", header=("what", "ms"), rows=[("a", "1.5"), ("b", "-")])]))
    assert '<th class="number">ms</th>' in numbers and '<td class="number">1.5</td>' in numbers


def elements(svg: str, tag: str) -> list[ElementTree.Element]:
    return ElementTree.fromstring(svg).findall(f".//{{http://www.w3.org/2000/svg}}{tag}")


def test_strip_has_one_dot_a_value_and_the_limit() -> None:
    svg = charts.strip(
        {"a": [0.99, None, 0.98], "b": [0.97, 0.96, float("nan")]}, "Dice", limit=0.95, limit_label="low"
    )
    dots = elements(svg, "circle")
    assert len(dots) == 4
    heights = {float(dot.get("cy", "nan")) for dot in dots}
    limit = next(line for line in elements(svg, "line") if line.get("class") == "limit")
    assert max(heights) < float(limit.get("y1", "nan")), "dots above the limit are drawn above it"
    assert all(charts.TOP <= height <= charts.HEIGHT - charts.BOTTOM for height in heights)


def test_histogram_areas_are_shares_of_their_own_series() -> None:
    svg = charts.histogram({"few": [5.0] * 3, "many": [5.0] * 300}, "ms")
    tops = []
    for polygon in elements(svg, "polygon"):
        points = [tuple(map(float, point.split(","))) for point in (polygon.get("points") or "").split()]
        tops.append(min(y for _, y in points))
    assert tops[0] == pytest.approx(tops[1]) == pytest.approx(charts.TOP)


@pytest.mark.parametrize("values", [[], [0.0], [1e-9, 2e-9], [5.0, 5.0], [1e6, 3e6], [-1.0, 1.0]])
def test_charts_take_odd_values(values: list[float]) -> None:
    for svg in (charts.strip({"a": values}, "x"), charts.histogram({"a": [abs(v) for v in values]}, "ms")):
        assert "nan" not in svg and "inf" not in svg
        ElementTree.fromstring(svg)


def test_points_of_one_name_share_a_colour_and_a_line_of_the_legend() -> None:
    many = [(f"artefact number {index // 2} of them", 5.0 + index, 0.9988 + index * 1e-5, True) for index in range(16)]
    svg = charts.scatter(many, "ms", "Dice", limit_x=4.0, most_y=1.0)
    words = [text.text for text in elements(svg, "text")]
    assert [words.count(name) for name, *_ in many] == [1] * 16
    looks = {(mark.get("stroke"), mark.get("rx")) for mark in elements(svg, "rect")}
    assert len(looks) == 8, "eight names look like eight"
    ticks = [text.text for text in elements(svg, "text") if text.get("text-anchor") == "end"]
    assert len(set(ticks)) == len(ticks) and all(float(tick or "nan") <= 1.0 for tick in ticks)
    height = float((ElementTree.fromstring(svg).get("viewBox") or "").split()[3])
    assert all(float(text.get("y", "nan")) < height for text in elements(svg, "text"))
    long = charts.histogram({name: [1.0] for name, *_ in many[::4]}, "ms")
    right = max(float(text.get("x", "nan")) + charts.LETTER * len(text.text or "") for text in elements(long, "text"))
    assert right <= charts.WIDTH + charts.LETTER * len("ms"), "a legend that is too long goes below"


def test_wide_tables_name_each_cell_for_narrow_screens() -> None:
    header = [f"column {index}" for index in range(9)]
    wide = Table(title="t", header=header, rows=[["1"] * 9])
    text = render(Page(title="p", passed=None, headline="h", blocks=[wide]))
    assert text.count('data-of="column ') == 9 and '<table class="many">' in text
    assert "data-of=" not in render(page()).partition("</style>")[2]


def test_page_is_written_as_one_file(tmp_path: Path) -> None:
    from tinyusfm_edge.cli.console import write_file

    write_file(tmp_path / "report.html", render(page()).encode(), "the report")
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
