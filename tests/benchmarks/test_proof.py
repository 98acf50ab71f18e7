"""The README's proof table is the one that its figures give; nothing is timed here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from proof import BEGIN, END, PROOF, README, read_bundle, table, with_table

ROW = {
    "target": "openvino",
    "precision": "int8",
    "p50_ms": 10.0,
    "dice_mean": 0.999,
    "dice_worst": 0.99,
    "hc_p95_mm": 0.3,
    "gate_passed": True,
}


def test_a_readme_shows_the_table_of_its_proof_and_no_other() -> None:
    proof = {"rows": [ROW], "frames": "frames", "cpu": "CPU", "threads": 1, "commit": "abc", "date": "2026-01-01"}
    readme = with_table(f"before\n{BEGIN}\nstale\n{END}\nbehind\n", proof)
    assert table(proof) in readme and "stale" not in readme and readme.endswith("behind\n")
    assert with_table(readme, proof) == readme
    other = {**proof, "rows": [{**ROW, "dice_mean": 0.5}]}
    assert table(other) not in readme


def test_the_readmes_table_is_that_of_the_committed_figures() -> None:
    proof = json.loads(PROOF.read_text(encoding="utf-8"))
    readme = README.read_text(encoding="utf-8")
    assert readme.count(BEGIN) == readme.count(END) == 1
    assert with_table(readme, proof) == readme, "run benchmarks/proof.py, or take README's table from docs/proof.json"
    assert {row["precision"] for row in proof["rows"]} >= {"fp32", "int8"}
    assert all(proof[fact] for fact in ("machine", "cpu", "commit", "date", "load", "frames"))


def test_a_busy_machine_is_said() -> None:
    proof = {"rows": [ROW], "frames": "frames", "cpu": "CPU", "threads": 1, "commit": "abc", "date": "2026-01-01"}
    quiet = {**proof, "load": {"cpus": 2, "before": 0.3, "after": 1.6}}
    busy = {**proof, "load": {"cpus": 2, "before": 0.3, "after": 9.4}}
    assert "busy" not in table(quiet) and "busy machine (load 9 on 2 CPUs)" in table(busy)


def test_a_precision_that_this_cpu_lacks_is_not_run() -> None:
    text = table({"rows": [ROW], "frames": "frames", "cpu": "CPU", "threads": 1, "commit": "abc", "date": "2026-01-01"})
    assert (
        "| openvino | bf16 | *not run*" in text
        and "| openvino | int8 | 10.0 | 0.9990 / 0.9900 | 0.30 mm | holds |" in text
    )


def test_a_bundle_without_a_comparison_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no verdict"):
        read_bundle(tmp_path)
