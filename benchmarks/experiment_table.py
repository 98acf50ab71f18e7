"""Results of the experiment as a table: mean and spread over seeds, and paired differences over patients.

A row without a result says "not run"; fewer than three seeds are no claim. A difference is paired twice: the same seeds
of both arms, and the same frames; the mean over seeds is taken first, then whole patients are drawn. "ahead" or
"behind" needs three common seeds, an interval without zero, and every single seed on the same side. It does not run
anything.

Shapes: S seeds, N frames, K classes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tinyusfm_edge.evaluation.bootstrap import Estimate, estimate_statistic
from tinyusfm_edge.evaluation.metrics import CLASS_METRICS
from tinyusfm_runtime.errors import InputError

RESULT_VERSION = 1
"""Version of a result's JSON."""
CLAIM_SEEDS = 3
"""Fewer seeds than this are no claim."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """Scores of one row and seed.

    Attributes:
        row: name of the row.
        seed: which.
        metric: ``dice`` or one of ``CLASS_METRICS``.
        ids: of the frames.
        groups: of the frames.
        dice_N: per frame, or None for classes.
        scores_NK: probabilities, or None for masks.
        truth_N: true classes, or None for masks.
    """

    row: str
    seed: int
    metric: str
    ids: tuple[str, ...]
    groups: tuple[str, ...]
    dice_N: np.ndarray | None
    scores_NK: np.ndarray | None
    truth_N: np.ndarray | None

    def value(self, index: np.ndarray | None = None) -> float:
        """The metric over some frames (all by default)."""
        chosen = np.arange(len(self.ids)) if index is None else index
        if self.dice_N is not None:
            return float(self.dice_N[chosen].mean())
        if self.scores_NK is None or self.truth_N is None:
            raise InputError(f"result {self.row} seed {self.seed} holds neither masks' nor classes' scores")
        return CLASS_METRICS[self.metric](self.scores_NK[chosen], self.truth_N[chosen])


def read_results(folder: Path) -> list[Result]:
    """Every result in a folder, by name.

    Raises:
        InputError: one is damaged or of another version.
    """
    return [_read(path) for path in sorted(folder.glob("*.json"))]


def _read(path: Path) -> Result:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["version"] != RESULT_VERSION:
            raise InputError(f"{path.name} is of version {data['version']!r}; this program reads {RESULT_VERSION}")
        images = data["images"]
        masks = data["metric"] == "dice"
        return Result(
            row=data["row"],
            seed=data["seed"],
            metric=data["metric"],
            ids=tuple(image["id"] for image in images),
            groups=tuple(image["group"] for image in images),
            dice_N=np.array([image["dice"] for image in images]) if masks else None,
            scores_NK=None if masks else np.array([image["probabilities"] for image in images]),
            truth_N=None if masks else np.array([image["truth"] for image in images]),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"result {path.name} cannot be read: {error}") from error


def compare(first: Sequence[Result], second: Sequence[Result]) -> tuple[Estimate | None, str]:
    """First minus second over their common seeds and frames.

    Args:
        first: results of a row.
        second: results of the row it is compared with.

    Returns:
        The difference with its interval over patients (None without a common seed), and a verdict: ``ahead``,
        ``behind``, ``no difference shown``, or why there is no claim.

    Raises:
        InputError: the two were scored on different frames.
    """
    pairs = [(a, b) for a in first for b in second if a.seed == b.seed]
    if not pairs:
        return None, "no common seed"
    if any(pair.ids != pairs[0][0].ids for both in pairs for pair in both):
        raise InputError(f"{first[0].row} and {second[0].row} were scored on different frames")

    def difference(index: np.ndarray) -> float:
        return float(np.mean([a.value(index) - b.value(index) for a, b in pairs]))

    found = estimate_statistic(difference, pairs[0][0].groups)
    if found is None or len(pairs) < CLAIM_SEEDS:
        return found, f"{len(pairs)} seed{'s' if len(pairs) > 1 else ''}: no claim"
    each = [a.value() - b.value() for a, b in pairs]
    if found.low > 0 and min(each) > 0:
        return found, "ahead"
    if found.high < 0 and max(each) < 0:
        return found, "behind"
    return found, "no difference shown"


def render(plan: Mapping[str, Any], named: Sequence[tuple[str, str, str, str]], results: Sequence[Result]) -> str:
    """The table as Markdown.

    Args:
        plan: the protocol.
        named: (row, grid, labels, arm) of every row, in order.
        results: what there is.
    """
    reference = plan["reference"]
    by_row: dict[str, list[Result]] = {}
    for result in results:
        by_row.setdefault(result.row, []).append(result)
    lines: list[str] = []
    for grid in dict.fromkeys(grid for _, grid, _, _ in named):
        about = plan["grid"][grid]
        metric = f"test {about['metric'].replace('_', ' ')}"
        lines += [
            "",
            f"**{about['title']}**",
            "",
            *_head("row", "arm", "seeds", metric, f"minus {reference}", "verdict"),
        ]
        for name, own, labels, arm in named:
            if own == grid:
                base = _name(grid, labels, reference)
                cells = _cells(by_row.get(name, []), by_row.get(base, []) if name != base else None)
                lines.append(_line(name, plan["arm"][arm]["about"], *cells))
        lines += ["", *_head("row", "against", "seeds", "difference", "verdict")]
        for first, second in plan["comparisons"]:
            for labels in about["labels"]:
                names = _name(grid, labels, first), _name(grid, labels, second)
                lines.append(_line(*names, *_difference(*(by_row.get(name, []) for name in names))))
    return "\n".join(lines[1:])


def _name(grid: str, labels: str, arm: str) -> str:
    return f"{grid}-{labels.rstrip('%')}-{arm}"


def _line(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def _head(*cells: str) -> list[str]:
    return [_line(*cells), "|" + "---|" * len(cells)]


def _difference(first: Sequence[Result], second: Sequence[Result]) -> tuple[str, str, str]:
    if not first or not second:
        return "0", "not run", ""
    difference, verdict = compare(first, second)
    common = len({result.seed for result in first} & {result.seed for result in second})
    return str(common), "" if difference is None else difference.text(4, sign=True), verdict


def _cells(found: Sequence[Result], base: Sequence[Result] | None) -> tuple[str, str, str, str]:
    if not found:
        return "0", "not run", "", ""
    values = [result.value() for result in found]
    spread = f" +- {np.std(values, ddof=1):.4f}" if len(values) > 1 else ""
    text = f"{np.mean(values):.4f}{spread}"
    if base is None:
        verdict = "" if len(values) >= CLAIM_SEEDS else f"{len(values)} seed{'s' * (len(values) > 1)}: no claim"
        return str(len(values)), text, "", verdict
    difference, verdict = compare(found, base)
    return str(len(values)), text, "" if difference is None else difference.text(4, sign=True), verdict


__all__ = ["CLAIM_SEEDS", "RESULT_VERSION", "Result", "compare", "read_results", "render"]
