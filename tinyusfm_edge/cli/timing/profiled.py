"""What ``profile`` measures beside the stages.

Card, quantiles, open loop, operators, energy, a second bundle.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tinyusfm_edge.cli import console
from tinyusfm_edge.cli.timing.turns import in_turns
from tinyusfm_edge.report.comparison import ratio_interval
from tinyusfm_runtime.bundle.reader import Bundle
from tinyusfm_runtime.errors import MissingExtra, UnsupportedError
from tinyusfm_runtime.frame import Frame
from tinyusfm_runtime.latency import STAGES, LatencyReport
from tinyusfm_runtime.numerics.order import wide
from tinyusfm_runtime.numerics.preprocess import preprocess
from tinyusfm_runtime.profiling import energy
from tinyusfm_runtime.profiling.card import make_card
from tinyusfm_runtime.profiling.energy import EnergyMeter
from tinyusfm_runtime.profiling.open_loop import run_open_loop
from tinyusfm_runtime.profiling.operators import operator_table
from tinyusfm_runtime.profiling.quantiles import quantiles
from tinyusfm_runtime.profiling.tegra import tegra_state
from tinyusfm_runtime.profiling.watch import UNKNOWN, look
from tinyusfm_runtime.session import Session

MAX_ROWS = 15
"""Kinds of operators that are printed; the JSON holds all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Wanted:
    """What is measured beside the stages.

    Attributes:
        fps: frames per second of an open loop, or None.
        duration_s: of the open loop.
        operators: time by operator.
        other: a second bundle, measured in turns, or None.
        rounds: of the turns.
    """

    fps: float | None
    duration_s: float
    operators: bool
    other: Path | None
    rounds: int


class Beside:
    """Measures beside the stages and keeps the lines for people."""

    def __init__(self, bundle: Bundle, session: Session, frames: Sequence[Frame], wanted: Wanted) -> None:
        self._bundle, self._session, self._frames, self._wanted = bundle, session, frames, wanted
        self._before, self._tegra = look(), tegra_state(energy.SYSTEM)
        self.card = make_card(bundle, session.artefact)
        self.lines = [console.table(("before it runs", ""), self.card.rows())]
        self._meter = EnergyMeter()
        self._meter.start()

    def finish(self, report: LatencyReport) -> dict[str, Any]:
        """Measures the rest.

        Args:
            report: of the stages, measured since this object was made.

        Returns:
            Plain data for the report.
        """
        spent = self._meter.stop()
        data: dict[str, Any] = {
            "card": self.card.to_json(),
            "quantiles_ms": {
                stage: [found.to_json() for found in quantiles(report.samples_ms[stage])] for stage in STAGES
            },
            "energy": spent.to_json(report.n + report.warmup),
            "golden_checked": bool(self._session.startup.get("golden")),
        }
        rows = [(f"p{found.percent:g}", found.text()) for found in quantiles(report.samples_ms["total_ms"])]
        if self.card.floor_ms:
            median = float(np.median(wide(report.samples_ms["infer_ms"])))
            data["ratio_to_floor"] = median / self.card.floor_ms
            rows.append(("inference to floor", f"{data['ratio_to_floor']:.2f} times"))
        rows.append(("energy", _energy_text(data["energy"])))
        self.lines.append(console.table(("total", "ms, 95 % interval"), rows))
        data |= self._loop() | self._operators() | self._beside()
        after = look()
        data["conditions"] = {"before": self._before.to_json(), "after": after.to_json()}
        rows = after.rows()
        if self._tegra is not None:
            states = {"before": self._tegra, "after": tegra_state(energy.SYSTEM)}
            data["tegra"] = states
            rows += _tegra_rows(states)
        self.lines.append(console.table(("machine, after", ""), rows))
        return data

    def _loop(self) -> dict[str, Any]:
        if self._wanted.fps is None:
            return {}
        meter = EnergyMeter()
        meter.start()
        found = run_open_loop(
            self._session.predict, self._frames, fps=self._wanted.fps, duration_s=self._wanted.duration_s
        )
        spent = meter.stop().to_json(len(found.ages_ms))
        self.lines.append(console.table(("open loop", ""), [*found.rows(), ("energy", _energy_text(spent))]))
        return {"open_loop": {**found.to_json(), "energy": spent}}

    def _operators(self) -> dict[str, Any]:
        if not self._wanted.operators:
            return {}
        tensor = preprocess(self._frames[0], self._session.spec.preprocess)[0]
        try:
            found = operator_table(self._bundle, self._session.artefact, tensor, threads=self._session.threads)
        except (MissingExtra, UnsupportedError) as error:
            self.lines.append(f"operators    {error}")
            return {"operators": None}
        header = ("operator", "computes in", "count", "us a frame", "share")
        self.lines.append(console.table(header, [row.row() for row in found[:MAX_ROWS]]))
        return {"operators": [row.to_json() for row in found]}

    def _beside(self) -> dict[str, Any]:
        if self._wanted.other is None:
            return {}
        artefact = self._session.artefact
        with Session.open(
            self._wanted.other,
            target=artefact.target,
            precision=artefact.variant,
            threads=self._session.threads,
            allow_unverified=not artefact.trusted,
        ) as other:
            took_RF2 = in_turns(other, self._session, self._frames, self._wanted.rounds)
        sides = [took_RF2[:, :, side].ravel() for side in (0, 1)]
        theirs, ours = (float(np.median(wide(side))) for side in sides)
        low, high = ratio_interval(sides[0].tolist(), sides[1].tolist())
        named = self._wanted.other.name
        ends = f"this one takes {ours / theirs:.3f} ({low:.3f} to {high:.3f}) of its time"
        self.lines.append(f"beside       {named} {theirs:.2f} ms, this {ours:.2f} ms: {ends}")
        found = [quantiles(side.tolist()) for side in sides]
        rows = [(f"p{one.percent:g}", one.text(), two.text()) for one, two in zip(*found, strict=True)]
        self.lines.append(console.table(("total", f"{named}, ms, 95 % interval", "this, ms, 95 % interval"), rows))
        return {
            "beside": {
                "bundle": named, "other_ms": theirs, "this_ms": ours, "ratio": ours / theirs, "low": low, "high": high,
                "samples_ms": [side.tolist() for side in sides],
                "quantiles_ms": {
                    name: [one.to_json() for one in side] for name, side in zip(("other", "this"), found, strict=True)
                },
            }
        }  # fmt: skip


def _energy_text(spent: dict[str, Any]) -> str:
    if not spent["joules"]:
        return f"{spent['source']}: {spent['why']}"
    per = ", ".join(f"{rail} {value * 1e3:.1f} mJ" for rail, value in spent["joules_per_frame"].items())
    return f"{per} a frame ({spent['source']}; the whole machine)"


def _tegra_rows(states: dict[str, Any]) -> list[tuple[str, str]]:
    """A Jetson's power mode and clocks, before and after where they differ."""
    rows = []
    for what, key in (("power mode", "power_mode"), ("clocks held", "clocks_held")):
        shown = []
        for state in states.values():
            value = state[key]
            if isinstance(value, dict):
                value = f"{sum(value.values())} of {len(value)}" if value else None
            shown.append(UNKNOWN if value is None else value)
        rows.append((what, " -> ".join(dict.fromkeys(shown))))
    return rows


__all__ = ["MAX_ROWS", "Beside", "Wanted"]
