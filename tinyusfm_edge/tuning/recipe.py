"""The pick as a recipe that ``export --recipe`` and ``run --recipe`` take."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tinyusfm_edge.tuning.choice import TuneRow

_LEAST_BUDGET_MS = 0.001


def recipe_of(row: TuneRow, budget_ms: float | None, machine: Mapping[str, Any], date: str) -> dict[str, Any]:
    """Keys of a recipe.

    Args:
        row: that was picked.
        budget_ms: that it met; None takes what it was measured at.
        machine: card of the machine that measured it.
        date: of the measurement.

    Returns:
        What ``tinyusfm_export.recipe.recipe_text`` writes.
    """
    one = row.candidate
    measured = row.decides_ms if row.p90.high is not None else max(row.samples_ms)
    words = row.p90.text() if row.p90.value is not None else f"at most {measured:.2f} in {len(row.samples_ms)} frames"
    run: dict[str, Any] = {"variant": one.variant}
    if one.cpus:
        run["cpus"] = list(one.cpus)
    if one.pruned:
        run["sector"] = True
    return {
        "version": 1,
        "about": f"{machine.get('cpu', 'this machine')}: {row.name}",
        "targets": [one.target],
        "precisions": [one.precision],
        "threads": one.threads,
        "budget": {
            "frame_ms": float(budget_ms if budget_ms is not None else max(measured, _LEAST_BUDGET_MS)),
            "measured": True,
            "note": f"frame to answer, p90 {words} ms, measured by tinyusfm-edge tune on {date}",
        },
        "run": run,
    }


__all__ = ["recipe_of"]
