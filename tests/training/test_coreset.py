"""Coresets end to end on a small pool: every method behind one call, a file that distillation takes, a page."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from tests.training.small_runs import random_teacher
from tinyusfm_calibration.select import SELECTION_METHODS
from tinyusfm_edge.cli.main import main
from tinyusfm_edge.data.images import list_rows
from tinyusfm_edge.training.coreset import choose as module
from tinyusfm_edge.training.coreset.choose import Embedder, choose
from tinyusfm_edge.training.coreset.proxy import ProxyConfig

SMALL = ProxyConfig(image_size=64, epochs=2, batch=8, width=32, depth=2, heads=2)


@pytest.mark.parametrize("method", SELECTION_METHODS)
def test_every_method_fills_the_budget_from_the_same_pool(table: Path, tmp_path: Path, method: str) -> None:
    found = choose(list_rows([table]), "25%", tmp_path, method=method, proxy=SMALL, device="cpu")
    chosen = found.selection
    assert len(chosen.ids) + chosen.num_missing == 6
    assert set(chosen.ids) <= set(found.pool.ids)
    assert len(set(chosen.ids)) == len(chosen.ids)
    assert (found.gradients_NE is not None) == (method in module.NEEDS_GRADIENTS)
    assert ("gradients" in found.seconds) == (method != "random")
    again = choose(list_rows([table]), "25%", tmp_path, method=method, proxy=SMALL, device="cpu")
    assert again.selection.ids == chosen.ids


def test_a_teacher_embeds_without_a_proxy_where_no_gradient_is_needed(table: Path, tmp_path: Path) -> None:
    embedder = Embedder(kind="teacher", weights=random_teacher(tmp_path), teacher="dinov2_vits14")
    found = choose(list_rows([table]), "4", tmp_path, method="distance", embedder=embedder, proxy=SMALL, device="cpu")
    assert "gradients" not in found.seconds
    assert found.settings["embedder"]["sha256"]
    assert found.settings["proxy"] is None


def test_the_command_writes_a_file_that_names_its_images_and_a_page(table: Path, tmp_path: Path) -> None:
    out = tmp_path / "coreset.json"
    line = ["coreset", str(table), "--budget", "6", "--out", str(out), "--image-size", "32", "--epochs", "1"]
    line += ["--method", "dual"]
    assert main([*line, "--device", "cpu"]) == 0
    data = json.loads(out.read_text(encoding="utf-8"))
    assert (data["version"], data["method"], len(data["chosen"])) == (1, "dual", 6 - data["num_missing"])
    assert {"id", "cluster", "r_d", "r_q", "s"} <= set(data["chosen"][0])
    listing = list_rows([out])
    assert {row.id for row in listing.rows} == {item["id"] for item in data["chosen"]}
    page = (tmp_path / "coreset.html").read_text(encoding="utf-8")
    assert "The chosen images" in page
    assert "best image (hash of its name)" in page and "by distance" in page
    assert "r_d" not in page and "<th>s " not in page, "columns have names that say what they are"
    assert "501.png" not in page, "no file name gets into the page"


def test_near_duplicates_are_skipped(tmp_path: Path) -> None:
    folder = tmp_path / "pool"
    folder.mkdir()
    rng = np.random.default_rng(1)
    for number in range(12):
        image = cv2.resize(rng.integers(0, 255, (4, 4), np.uint8), (64, 64))
        for copy in range(3):
            cv2.imwrite(str(folder / f"{number}_{copy}.png"), image)
    found = choose(list_rows([folder]), "12", tmp_path / "work", method="distance", proxy=SMALL, device="cpu")
    numbers = [Path(identity).stem.split("_")[0] for identity in found.selection.ids]
    assert len(set(numbers)) == len(numbers), "one copy of each at most"
    assert found.selection.num_duplicates > 0


def test_bad_requests_end_in_one_line(table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for wrong in (["--budget", "0"], ["--method", "best"], ["--teacher", "dinov2_vits14"]):
        assert main(["coreset", str(table), "--out", str(tmp_path / "c.json"), "--image-size", "32", *wrong]) == 2
    assert capsys.readouterr().err.count("error: ") == 3
    assert not (tmp_path / "c.json").exists()
