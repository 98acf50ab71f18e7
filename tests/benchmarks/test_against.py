"""The page of rivals shows the table that its figures give; nothing is timed here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.needs import needs

needs("torch", "install tinyusfm-edge[export]")

from against import BEGIN, END, FIGURES, PAGE, REFERENCE, judged, one_line, parse, table, wanted, with_table  # noqa: E402
from rivals import write_ort_dynamic, write_ort_static  # noqa: E402
from tests.conftest import SIDE, tiny_logits, tiny_spec  # noqa: E402
from tinyusfm_runtime.numerics.preprocess import preprocess  # noqa: E402
from tinyusfm_runtime.phantom import make_phantom  # noqa: E402


def figures(**changes: Any) -> dict[str, Any]:
    row = {
        "name": "ours onnx-int8", "ours": True, "engine": "e", "p50_ms": 10.0, "p90_ms": 11.0, "p99_ms": 12.0,
        "ratios": {REFERENCE: [3.0, 2.9, 3.1]}, "to_floor": 2.5, "load_ms": 80.0, "peak_rss_mb": 90.0,
        "statistics": {"dice_mean": 0.999, "dice_worst": 0.98}, "gate_passed": True, "failures": [],
    }  # fmt: skip
    rival = {**row, "name": REFERENCE, "ours": False, "ratios": {}, "gate_passed": False}
    found = {
        "student": "s", "frames": "36 phantoms", "threads": 1, "rounds": 2, "machine": {"cpu": "CPU"},
        "load": {"before": 0.2, "after": 1.0, "cpus": 2}, "commit": "abc", "date": "2026-01-01", "rows": [row, rival],
        "skipped": {"ncnn fp32": "no ncnn"},
    }  # fmt: skip
    return {**found, **changes}


def test_a_page_shows_the_table_of_its_figures_and_no_other() -> None:
    page = with_table(f"before\n{BEGIN}\nstale\n{END}\nbehind\n", figures())
    assert table(figures()) in page and "stale" not in page and page.endswith("behind\n")
    assert with_table(page, figures()) == page
    assert table(figures(rows=[])) not in page


def test_rows_say_whose_they_are_and_what_the_gate_says() -> None:
    text = table(figures())
    assert "| **ours onnx-int8** | 10.0 | 3.00 | 0.9990 / 0.9800 | holds | 2.50 | 80 | 90 |" in text
    assert f"| {REFERENCE} | 10.0 | - | 0.9990 / 0.9800 | missed |" in text
    assert "- ncnn fp32: *not run*, no ncnn" in text and "busy" not in text
    assert "36 phantoms;" in text
    assert "12 phantoms (a short run: the gate wants 32);" in table(figures(frames="12 phantoms"))
    assert "busy machine (load 9 on 2 CPUs)" in table(figures(load={"before": 9.1, "after": 1.0, "cpus": 2}))


def test_the_committed_page_is_that_of_the_committed_figures() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert page.count(BEGIN) == page.count(END) == 1
    if not FIGURES.is_file():
        assert f"{BEGIN}\nNot measured yet.\n{END}" in page, "a table without its figures"
        return
    told = json.loads(FIGURES.read_text(encoding="utf-8"))
    assert with_table(page, told) == page, "run benchmarks/against.py --page"
    names = {row["name"] for row in told["rows"]}
    assert REFERENCE in names and any(row["ours"] for row in told["rows"])
    assert all(row["ratios"] or row["name"] == REFERENCE for row in told["rows"])


def test_rivals_are_judged_by_the_gate_that_judges_ours() -> None:
    class Student:
        spec = tiny_spec()

    frames = [make_phantom(seed, height=96, width=128).frame for seed in range(200, 234)]
    logits = np.concatenate([tiny_logits(preprocess(frame, Student.spec.preprocess)[0]) for frame in frames])
    found = judged(Student(), {REFERENCE: logits, "good": logits + 1e-4, "wrong": -logits}, "phantoms")  # type: ignore[arg-type]
    assert found["good"]["gate_passed"] and not found["good"]["failures"]
    assert not found["wrong"]["gate_passed"] and found["wrong"]["failures"]
    assert found["wrong"]["statistics"]["dice_mean"] < 0.9 < found["good"]["statistics"]["dice_mean"]


def test_an_error_is_one_line_without_places_of_this_machine() -> None:
    assert one_line(RuntimeError("cannot read /somewhere/else/b.onnx:\n it is gone")) == (
        "cannot read b.onnx: it is gone"
    )
    assert one_line(RuntimeError()) == "RuntimeError"
    assert wanted(REFERENCE, "ncnn") and wanted("ncnn fp32", "ncnn") and not wanted("OpenVINO fp32", "ncnn")
    assert parse(["--page"]).page and parse([]).rounds == 14


def test_the_stock_quantizers_write_models_that_run(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx", reason="install tinyusfm-edge[export]")
    ort = pytest.importorskip("onnxruntime", reason="install tinyusfm-edge[onnxruntime]")
    helper = onnx.helper
    weights = onnx.numpy_helper.from_array(np.random.default_rng(1).normal(size=(4, 3, 3, 3)).astype(np.float32), "w")
    shapes = {"image": [1, 3, SIDE, SIDE], "logits": [1, 4, SIDE, SIDE]}
    one, two = (helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, shape) for n, shape in shapes.items())
    graph = helper.make_graph(
        [helper.make_node("Conv", ["image", "w"], ["logits"], pads=[1] * 4)], "stock", [one], [two], [weights]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    (tmp_path / "stock.onnx").write_bytes(model.SerializeToString())
    codes = np.random.default_rng(2).integers(0, 256, (4, 1, 1, SIDE, SIDE), np.uint8)
    made = [
        write_ort_dynamic(tmp_path / "stock.onnx", tmp_path),
        write_ort_static(tmp_path / "stock.onnx", codes, tiny_spec(), tmp_path),
    ]
    for path in made:
        session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        assert session.run(None, {"image": np.zeros((1, 3, SIDE, SIDE), np.float32)})[0].shape == (1, 4, SIDE, SIDE)
        kinds = {node.op_type for node in onnx.load(str(path)).graph.node}
        assert kinds & {"ConvInteger", "QLinearConv", "QuantizeLinear", "DynamicQuantizeLinear"}
