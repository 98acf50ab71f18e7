"""What a profile page shows beside the stages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tinyusfm_edge.report.charts import bars, strip
from tinyusfm_edge.report.page import Block, Chart, Facts, Table
from tinyusfm_runtime.profiling.operators import ProfiledOperator


def profile_blocks(data: Mapping[str, Any]) -> list[Block]:
    """Blocks of a profile's JSON.

    Args:
        data: as ``profile --json`` writes it.
    """
    blocks: list[Block] = []
    if card := data.get("card"):
        facts = [(key.replace("_", " "), str(value)) for key, value in card.items()]
        if "ratio_to_floor" in data:
            facts.append(("inference to floor", f"{data['ratio_to_floor']:.2f} times"))
        blocks.append(Facts(title="Before it runs", facts=facts))
    if stages := data.get("stages"):
        medians = [(name.removesuffix("_ms"), float(stage["p50"])) for name, stage in stages.items()]
        blocks.append(Chart(title="Stages", note="Median time of each.", svg=bars(medians, "ms")))
    if found := data.get("quantiles_ms"):
        rows = [row for stage, values in found.items() for row in _quantile_rows(stage.removesuffix("_ms"), values)]
        note = "Distribution-free 95 % intervals; a percentile that the sample cannot support is refused."
        blocks.append(
            Table(title="Percentiles", note=note, header=("stage", "percentile", "ms", "low", "high"), rows=rows)
        )
    if loop := data.get("open_loop"):
        blocks += _loop(loop)
    if operators := data.get("operators"):
        rows = [ProfiledOperator(**row).row() for row in operators]
        header = ("operator", "computes in", "count", "us a frame", "share")
        blocks.append(Table(title="Operators", note="As the engine reports them.", header=header, rows=rows))
    if beside := data.get("beside"):
        facts = [(key, str(value)) for key, value in beside.items() if key != "samples_ms"]
        blocks.append(Facts(title="Beside another bundle, in turns", facts=facts))
    if energy := data.get("energy"):
        facts = [(key.replace("_", " "), str(value)) for key, value in energy.items() if value not in ("", {})]
        blocks.append(Facts(title="Energy of the whole machine", facts=facts))
    for moment, conditions in (data.get("conditions") or {}).items():
        facts = [(key.replace("_", " "), "not known here" if value in (None, [], ()) else str(value))
                 for key, value in conditions.items()]  # fmt: skip
        blocks.append(Facts(title=f"Machine, {moment}", facts=facts))
    return blocks


def _quantile_rows(name: str, values: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for found in values:
        if found["value"] is None:
            rows.append((name, f"p{found['percent']:g}", f"needs {found['needed']} samples", "", ""))
        else:
            rows.append((name, f"p{found['percent']:g}", *(f"{found[key]:.2f}" for key in ("value", "low", "high"))))
    return rows


def _loop(loop: Mapping[str, Any]) -> list[Block]:
    facts = [(key.replace("_", " "), str(loop[key])) for key in ("fps", "arrived", "answered", "dropped", "misses")]
    facts.append(("most misses in a row", str(loop["longest_streak"])))
    rows = _quantile_rows("age", loop["age_quantiles_ms"])
    header = ("what", "percentile", "ms", "low", "high")
    return [
        Facts(title="Open loop: frames come at a rate", facts=facts),
        Chart(
            title="Age over time",
            note="In the order of the answers; the line is the time between two frames.",
            svg=strip(
                {"age": list(loop["ages_ms"])}, "ms", limit=1e3 / loop["fps"], limit_label="one frame", axis="answer"
            ),
        ),
        Table(title="Age of an answer", note="From the arrival of its frame.", header=header, rows=rows),
    ]


__all__ = ["profile_blocks"]
