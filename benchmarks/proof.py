"""The README's proof table: speed and agreement of one exported bundle.

    python benchmarks/proof.py proof.bundle --data hc18/

exports the shipped fetal-head to OpenVINO and to integers in INT8, OpenVINO beside its float siblings, where the bundle
is not there yet, and takes the figures from the verdicts that the export measured. It writes ``docs/proof.json``
(machine and its load, commit, date and figures) and the table between the README's markers. The README is only ever
written from that file, so a test can compare the two.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PROOF = ROOT / "docs" / "proof.json"
README = ROOT / "README.md"
BEGIN, END = "<!-- proof: written by benchmarks/proof.py -->", "<!-- end of proof -->"
PRECISIONS = ("fp32", "bf16", "int8")


def read_bundle(bundle: Path) -> dict[str, Any]:
    """Figures of a bundle's verdicts, without the raw samples.

    Args:
        bundle: an exported bundle whose export compared precisions.

    Raises:
        SystemExit: it holds no verdict.
    """
    verdicts = [json.loads(path.read_text("utf-8")) for path in sorted(bundle.glob("reports/verdict-*.json"))]
    if not verdicts:
        raise SystemExit(f"proof: {bundle} holds no verdict: export it without --no-compare")
    rows = [
        {
            "target": verdict["target"],
            "precision": side["precision"],
            "p50_ms": side["p50_ms"],
            "p90_ms": side["p90_ms"],
            "size_bytes": side["size_bytes"],
            "gate_passed": side["gate_passed"],
            **{key: side["statistics"].get(key) for key in ("dice_mean", "dice_worst", "hc_p95_mm", "hc_frames")},
        }
        for verdict in verdicts
        for side in verdict["sides"]
    ]
    machine = verdicts[0]["machine"]
    return {"version": 1, "threads": verdicts[0]["threads"], "machine": machine, "rows": rows}


def table(proof: dict[str, Any]) -> str:
    """The README's lines for a proof: one row per target and precision, and what they were measured on.

    Args:
        proof: the content of ``docs/proof.json``.
    """
    lines = [
        "| target | precision | ms, p50 | Dice against PyTorch, mean / worst | head circumference, p95 | gate |",
        "|---|---|---|---|---|---|",
    ]
    for target in dict.fromkeys(row["target"] for row in proof["rows"]):
        mine = {row["precision"]: row for row in proof["rows"] if row["target"] == target}
        wanted = PRECISIONS if target == "openvino" else tuple(mine)
        for precision in wanted:
            row = mine.get(precision)
            if row is None:
                lines.append(f"| {target} | {precision} | *not run*: this CPU has no bfloat16 units | | | |")
                continue
            lines.append(
                f"| {target} | {precision} | {row['p50_ms']:.1f} | {row['dice_mean']:.4f} / {row['dice_worst']:.4f} "
                f"| {row['hc_p95_mm']:.2f} mm | {'holds' if row['gate_passed'] else 'missed'} |"
            )
    lines.append("")
    lines.append(
        f"{proof['frames']}; {proof['cpu']}, {proof['threads']} thread(s), one interleaved run{_busy(proof)}; commit "
        f"{proof['commit']}, {proof['date']} ([figures](docs/proof.json))."
    )
    return "\n".join(lines)


def _busy(proof: dict[str, Any]) -> str:
    """What must be known of the times where other work ran beside them."""
    load = proof.get("load")
    if not load or max(load["before"], load["after"]) <= load["cpus"]:
        return ""
    most = max(load["before"], load["after"])
    return f" on a busy machine (load {most:.0f} on {load['cpus']} CPUs), so times compare only here"


def export(bundle: Path, data: Path | None) -> dict[str, Any]:
    """Exports the bundle that the figures are of.

    Args:
        bundle: its folder to be.
        data: labelled frames that judge, or None: phantoms and a clip.

    Returns:
        ``load``: CPUs, and the load average of a minute before and after.
    """
    from tinyusfm_edge.export import ExportRequest, export_student

    before = os.getloadavg()[0]
    export_student(ExportRequest(targets=("openvino", "integer"), precisions=("int8",), data=data, out=bundle))
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"load": {"cpus": cpus, "before": round(before, 2), "after": round(os.getloadavg()[0], 2)}}


def with_table(readme: str, proof: dict[str, Any]) -> str:
    """A README with the table of a proof between its markers."""
    block = f"{BEGIN}\n{table(proof)}\n{END}"
    return re.sub(re.escape(BEGIN) + r".*?" + re.escape(END), lambda _: block, readme, flags=re.DOTALL)


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the proof and the README's table."""
    parser = argparse.ArgumentParser(description="write docs/proof.json and the README's table from a bundle")
    parser.add_argument("bundle", type=Path, help="a bundle that was exported with a comparison, or where to")
    parser.add_argument("--frames", default="HC18 validation frames", help="what the gate looked at, in words")
    parser.add_argument("--data", type=Path, help="labelled frames that judge, where the bundle has to be exported")
    options = parser.parse_args(argv)
    load = {} if options.bundle.exists() else export(options.bundle, options.data)
    git = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    proof = read_bundle(options.bundle) | load
    cpu = str(proof["machine"].get("cpu_model") or proof["machine"].get("cpu") or "unnamed CPU")
    proof |= {"frames": options.frames, "cpu": cpu, "commit": commit, "date": date.today().isoformat()}
    PROOF.write_text(json.dumps(proof, indent=1) + "\n", encoding="utf-8")
    README.write_text(with_table(README.read_text("utf-8"), proof), encoding="utf-8")
    print(table(proof))
    return 0


if __name__ == "__main__":
    sys.exit(main())
