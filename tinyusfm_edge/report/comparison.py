"""Two reports of one kind side by side.

What changed, and whether that is a regression.

    found = compare_reports(before, after)      # what ``--json`` wrote: profile, verify, evaluate, export
    found.demand()                              # GateError (1) or IncomparableError (5)

Reports are compared only where what they rest on is the same: machine, power mode, tools, frames. A time counts as
slower only beyond the noise of its own samples (a bootstrap of the ratio of medians; for p90 and p99 the intervals of
both sides, and no judgement where a sample is too small for one) and beyond its limit. It measures nothing and does not
know the command line.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tinyusfm_runtime.errors import GateError, IncomparableError, InputError
from tinyusfm_runtime.numerics.order import wide
from tinyusfm_runtime.profiling.quantiles import quantile

COMPARISON_VERSION = 1
"""Version of the JSON that ``ReportComparison.to_json`` writes."""
KINDS = ("profile", "verify", "evaluate", "verdict")
RESAMPLES = 1000
"""Bootstrap resamples of a ratio of medians; its 2.5 % ends rest on 25 each."""
MOST_SAMPLES = 2000
"""Samples of each side that are resampled, evenly spaced."""
SEED = 42
LIMITS: dict[str, tuple[str, float, bool]] = {
    "p50": ("lower", 0.05, True),
    "p90": ("lower", 0.10, True),
    "p99": ("lower", 0.25, True),
    "cold load": ("lower", 0.25, True),
    "size": ("lower", 0.02, True),
    "dice_mean": ("higher", 0.002, False),
    "dice_worst": ("higher", 0.01, False),
    "hc_p95_mm": ("lower", 0.1, False),
    "hc_p95_share": ("lower", 0.002, False),
    "top1": ("higher", 0.002, False),
    "cosine_mean": ("higher", 0.001, False),
    "same_reading": ("higher", 0.01, False),
    "dice": ("higher", 0.005, False),
    "ellipse_dice": ("higher", 0.005, False),
    "iou": ("higher", 0.005, False),
    "hc_mae_mm": ("lower", 0.1, False),
    "hd95_mm": ("lower", 0.1, False),
    "accuracy": ("higher", 0.005, False),
    "balanced_accuracy": ("higher", 0.005, False),
    "auc": ("higher", 0.005, False),
    "f1": ("higher", 0.005, False),
}
"""Measure -> which way is better, how far it may move the other way, and whether that is a share of it."""
_FAIL_IF = re.compile(r"([\w ]+?)\s*([<>])\s*([+-]?\d+(?:\.\d+)?)\s*(%?)")


@dataclass(frozen=True, kw_only=True, slots=True)
class MetricChange:
    """One measure of both reports.

    Attributes:
        name: such as ``openvino-int8 dice_mean``.
        before: value of the first report.
        after: value of the second one.
        worse: it moved the wrong way, beyond its limit and beyond its noise.
        limit: in words, such as ``at most +5 %``.
        noise: 95 % interval of after / before, or None where there are no samples.
        refused: why it is not judged, or empty.
    """

    name: str
    before: float
    after: float
    worse: bool
    limit: str
    noise: tuple[float, float] | None = None
    refused: str = ""

    @property
    def change(self) -> str:
        """How much it moved, as a share where the value before is not 0."""
        if self.before == 0:
            return f"{self.after - self.before:+.4g}"
        return f"{(self.after - self.before) / abs(self.before):+.1%}"

    def row(self) -> tuple[str, ...]:
        """Cells of the table for people."""
        noise = "" if self.noise is None else f"{self.noise[0]:.3f} to {self.noise[1]:.3f}"
        verdict = f"not judged: {self.refused}" if self.refused else "WORSE" if self.worse else "holds"
        return (self.name, f"{self.before:.4g}", f"{self.after:.4g}", self.change, noise, self.limit, verdict)


HEADER = ("measure", "before", "after", "change", "ratio, 95 %", "limit", "verdict")


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportComparison:
    """Both reports side by side.

    True if they can be compared and nothing became worse.

    Attributes:
        kind: one of ``KINDS``.
        differences: (what, before, after) of what both must share and do not.
        changes: one entry per measure.
        notes: what a reader must know, such as measures that only one report has.
    """

    kind: str
    differences: tuple[tuple[str, str, str], ...]
    changes: tuple[MetricChange, ...]
    notes: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return not self.differences and not self.regressions

    @property
    def regressions(self) -> tuple[MetricChange, ...]:
        """What became worse."""
        return tuple(change for change in self.changes if change.worse)

    @property
    def headline(self) -> str:
        """The verdict, one sentence."""
        if self.differences:
            names = ", ".join(name for name, _, _ in self.differences)
            return f"These reports cannot be compared: {names} differ."
        if self.regressions:
            return f"Worse: {', '.join(f'{c.name} {c.change}' for c in self.regressions)}."
        judged = sum(not change.refused for change in self.changes)
        rest = f"; {len(self.changes) - judged} not judged" if judged < len(self.changes) else ""
        return f"No regression in {judged} measures{rest}."

    def demand(self) -> None:
        """Ends a command that must not go on.

        Raises:
            IncomparableError: the reports do not rest on the same things.
            GateError: something became worse.
        """
        if self.differences:
            shown = "; ".join(f"{name}: {before} and {after}" for name, before, after in self.differences)
            raise IncomparableError(f"the reports cannot be compared: {shown}")
        if self.regressions:
            raise GateError(self.headline, self)

    def to_json(self) -> dict[str, Any]:
        """Plain data, ready for ``json.dumps``."""
        return {
            "kind": "tinyusfm-edge compare",
            "version": COMPARISON_VERSION,
            "of": self.kind,
            "passed": bool(self),
            "headline": self.headline,
            "differences": [list(difference) for difference in self.differences],
            "changes": [
                {
                    "name": change.name,
                    "before": change.before,
                    "after": change.after,
                    "worse": change.worse,
                    "limit": change.limit,
                    "noise": change.noise,
                    "refused": change.refused,
                }
                for change in self.changes
            ],
            "notes": list(self.notes),
        }


def compare_reports(
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    *,
    fail_if: Sequence[str] = (),
    across: bool = False,
) -> ReportComparison:
    """Compares two reports of one kind.

    Args:
        before: the report that is compared with, as a command's ``--json`` wrote it.
        after: the new one.
        fail_if: other limits, such as ``p50>+10%`` or ``dice_mean<-0.01``.
        across: compare also what was measured on another machine or with other tools.

    Returns:
        What changed.

    Raises:
        InputError: no such reports, two kinds, nothing in common, or a limit that cannot be read.
    """
    kind, other = kind_of(before), kind_of(after)
    if kind != other:
        raise InputError(f"these are two kinds of reports: {kind} and {other}")
    limits = {**LIMITS, **dict(read_limit(text) for text in fail_if)}
    left, right = dict(_measures(kind, before)), dict(_measures(kind, after))
    shared = [name for name in left if name in right]
    if not shared:
        raise InputError(f"the two {kind} reports have no measure in common: they are of other artefacts or tasks")
    missing = sorted(set(left) ^ set(right))
    changes = [_change(name, left[name], right[name], limits) for name in shared]
    notes = [f"in one report only: {', '.join(missing)}"] if missing else []
    found = tuple(_differences(kind, before, after))
    if across and found:
        shown = ", ".join(name for name, _, _ in found)
        notes.append(f"compared all the same (--across), although these differ: {shown}")
        found = ()
    return ReportComparison(kind=kind, differences=found, changes=tuple(changes), notes=tuple(notes))


def kind_of(report: Mapping[str, Any]) -> str:
    """Which of ``KINDS`` a report is.

    Raises:
        InputError: none of them.
    """
    name = str(report.get("kind", "")).removeprefix("tinyusfm-edge ")
    found = "verdict" if name == "export" or "sides" in report else name
    if found not in KINDS:
        raise InputError(
            f"a report of kind {name or 'unknown'!r} cannot be compared: give what profile, verify, evaluate or export "
            "wrote with --json"
        )
    return found


def read_limit(text: str) -> tuple[str, tuple[str, float, bool]]:
    """``p50>+10%`` as a limit.

    The measure, which way is better, by how much, and whether that is a share.

    Raises:
        InputError: it cannot be read, or names no measure.
    """
    match = _FAIL_IF.fullmatch(text.strip())
    if match is None or match.group(1) not in LIMITS:
        raise InputError(f"--fail-if {text}: give MEASURE>+10% or MEASURE<-0.01, with one of {', '.join(LIMITS)}")
    name, sign, number, percent = match.groups()
    size = abs(float(number)) / (100 if percent else 1)
    return name, ("lower" if sign == ">" else "higher", size, bool(percent))


Value = tuple[float, tuple[float, ...]]
"""A number, and the samples that it is the median of, where it is one."""


def _measures(kind: str, report: Mapping[str, Any]) -> Iterator[tuple[str, Value]]:
    if kind == "profile":
        yield from _profile_measures(report)
    elif kind == "verify":
        for artefact in report.get("artefacts", ()):
            statistics = (artefact.get("report") or {}).get("statistics", {})
            yield from _listed(artefact["name"], statistics)
    elif kind == "evaluate":
        for scored in report.get("reports", ()):
            at = f" at {scored['threshold']:g}" if len(report["reports"]) > 1 and "threshold" in scored else ""
            values = {**scored, **(scored.get("metrics") or {})}
            for key in LIMITS:
                found = values.get(key)
                if isinstance(found, Mapping) and found.get("mean") is not None:
                    yield f"{key}{at}", (float(found["mean"]), ())
    else:
        for verdict in report.get("verdicts", [report] if "sides" in report else ()):
            for side in verdict["sides"]:
                name = f"{verdict['target']}-{side['precision']}"
                samples = tuple(sample for part in side["samples_ms"] for sample in part)
                yield f"{name} p50", (float(side["p50_ms"]), samples)
                yield f"{name} size", (float(side["size_bytes"]), ())
                statistics = side.get("statistics", {})
                yield from _listed(name, statistics)


def _listed(name: str, statistics: Mapping[str, Any]) -> Iterator[tuple[str, Value]]:
    return ((f"{name} {key}", (float(statistics[key]), ())) for key in LIMITS if key in statistics)


def _profile_measures(report: Mapping[str, Any]) -> Iterator[tuple[str, Value]]:
    samples = report.get("samples_ms", {})
    for stage, values in report.get("stages", {}).items():
        for key in ("p50", "p90", "p99"):
            # a stage's tail is noise of a few samples: the whole prediction's is what counts
            if key == "p50" or stage == "total_ms":
                yield f"{stage.removesuffix('_ms')} {key}", (float(values[key]), tuple(samples.get(stage, ())))
    cold = report.get("cold")
    if cold:
        yield "cold load", (float(cold["cold_load_ms"]), ())


def _change(name: str, before: Value, after: Value, limits: Mapping[str, tuple[str, float, bool]]) -> MetricChange:
    better, size, share = next(limits[key] for key in sorted(limits, key=len, reverse=True) if _named(name, key))
    sign = 1.0 if better == "lower" else -1.0
    moved = sign * (after[0] - before[0])
    beyond = moved > size * (abs(before[0]) if share else 1.0)
    noise, refused = _noise(name, before[1], after[1])
    if noise is not None:
        beyond = beyond and (noise[0] > 1.0 if better == "lower" else noise[1] < 1.0)
    beyond = beyond and not refused
    amount = f"{size:.4g}" if not share else f"{size:.0%}"
    words = f"{'+' if better == 'lower' else '-'}{amount}"
    return MetricChange(
        name=name,
        before=before[0],
        after=after[0],
        worse=beyond,
        limit=f"at most {words}",
        noise=noise,
        refused=refused,
    )


def _noise(name: str, before: Sequence[float], after: Sequence[float]) -> tuple[tuple[float, float] | None, str]:
    """Interval of the ratio of a measure's two values.

    And why there is none where there must be one.

    A median's is a bootstrap's; that of a percentile in the tail spans the distribution-free intervals of both sides,
    and a sample that is too small for one is not judged by it.
    """
    tail = next((float(key[1:]) for key in ("p90", "p99") if _named(name, key)), None)
    if tail is None:
        return (ratio_interval(before, after) if before and after else None), ""
    left, right = quantile(before, tail), quantile(after, tail)
    if left.low is None or left.high is None or right.low is None or right.high is None:
        fewest = min(len(before), len(after))
        return None, f"it needs {left.needed} samples, there are {fewest}"
    return (right.low / max(left.high, 1e-12), right.high / max(left.low, 1e-12)), ""


def _named(name: str, key: str) -> bool:
    return name == key or name.endswith(f" {key}") or f" {key} at " in f" {name}"


def ratio_interval(before: Sequence[float], after: Sequence[float]) -> tuple[float, float]:
    """95 % interval of the ratio of medians, after over before, by a seeded bootstrap.

    Args:
        before: samples.
        after: samples.
    """
    rng = np.random.default_rng(SEED)
    medians = []
    for samples in (before, after):
        values = wide(samples)
        values = values[np.linspace(0, len(values) - 1, min(len(values), MOST_SAMPLES)).astype(int)]
        medians.append(np.median(wide(values[rng.integers(0, len(values), (RESAMPLES, len(values)))]), axis=1))
    low, high = np.percentile(wide(medians[1] / np.maximum(medians[0], 1e-12)), (2.5, 97.5))
    return float(low), float(high)


def _differences(kind: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """What both must share and do not."""
    left, right = _ground(kind, before), _ground(kind, after)
    for name in left:
        if left[name] != right[name]:
            yield name, _short(left[name]), _short(right[name])


def _ground(kind: str, report: Mapping[str, Any]) -> dict[str, Any]:
    """What a report rests on, by name."""
    machine = report.get("machine", {})
    if kind == "profile":
        setup, subject = report.get("setup", {}), report.get("subject", {})
        jetson = dict((report.get("tegra") or {}).get("before") or {})
        tools = {name: setup.get(name) for name in ("system", "python", "numpy", "governor", "power_mode")}
        return {
            **{name: machine.get(name) for name in ("cpu", "cpu_class", "cores", "usable_cpus")},
            **{name.replace("_", " "): value for name, value in tools.items()},
            "Jetson's power mode": jetson.get("power_mode"),
            "Jetson's clocks": jetson.get("clocks_held"),
            "engine": subject.get("engine"),
            "threads": report.get("threads"),
            "frames": report.get("frames"),
        }
    if kind == "verify":
        frames = {
            artefact["name"]: ((artefact.get("report") or {}).get("frames") or {}).get("pixels_sha256")
            for artefact in report.get("artefacts", ())
        }
        return {
            "CPU class": machine.get("cpu_class"),
            "reference": "live" if report.get("live") else "stored",
            "frames": next((found for found in frames.values() if found), None),
        }
    if kind == "evaluate":
        return {name: report.get(name) for name in ("frames_sha256", "split", "reading")}
    verdicts = report.get("verdicts", [report])
    first = verdicts[0] if verdicts else {}
    return {"cpu": first.get("machine", {}).get("cpu"), "threads": first.get("threads")}


def _short(value: Any) -> str:
    text = f"{len(value)} hashes" if isinstance(value, list) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


__all__ = [
    "COMPARISON_VERSION",
    "HEADER",
    "KINDS",
    "LIMITS",
    "MOST_SAMPLES",
    "RESAMPLES",
    "SEED",
    "MetricChange",
    "ReportComparison",
    "Value",
    "compare_reports",
    "kind_of",
    "ratio_interval",
    "read_limit",
]
