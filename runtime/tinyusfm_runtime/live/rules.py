"""Rules of several models on one frame.

Which is asked first, and which is left out.

A TOML file of plain keys, or JSON of the same (Python 3.10 reads that alone); one table for each model that waits for
another one:

    [fetal-head]
    after = "head-or-not"
    needs_label = "head"
    min_confidence = 0.6

``after`` names the model that is asked before this one. With ``needs_label`` this one is asked only where that one
answered this label: a classifier by its likeliest class, a mask model by having found it. With ``min_confidence`` only
where that answer's confidence is at least so high, 0 to 1. There are no expressions, and nothing else.

A rule that cannot hold is refused before anything starts. It knows no loop and no engine.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinyusfm_runtime.errors import InputError
from tinyusfm_runtime.results import Prediction
from tinyusfm_runtime.spec import ModelSpec, Task
from tinyusfm_runtime.strict_json import check_values, parse_json

KEYS = ("after", "needs_label", "min_confidence")
_MAX_BYTES = 1 << 16


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelRule:
    """When one model is asked.

    Attributes:
        after: the model that is asked before.
        needs_label: what that one must have answered, or None.
        min_confidence: how sure of it that one must be, 0 to 1, or None.
    """

    after: str
    needs_label: str | None = None
    min_confidence: float | None = None

    @property
    def skips(self) -> bool:
        """Whether it can leave a model out; else it only orders."""
        return self.needs_label is not None or self.min_confidence is not None


def read_rules(rules: str | Path | Mapping[str, Any]) -> dict[str, ModelRule]:
    """Reads rules and checks their form.

    Args:
        rules: path of a TOML or JSON file, or what it would hold: model -> its keys, or a ``ModelRule``.

    Returns:
        Model -> its rule.

    Raises:
        InputError: the file cannot be read, or a key or a value is none that a rule has.
    """
    data = rules if isinstance(rules, Mapping) else _from_file(Path(rules))
    found = {}
    for name, table in data.items():
        if isinstance(table, ModelRule):
            found[str(name)] = _checked(str(name), {key: getattr(table, key) for key in KEYS})
        elif isinstance(table, Mapping):
            found[str(name)] = _checked(str(name), table)
        else:
            raise InputError(f"rules: {name!r} stands alone: write a table [MODEL] with {', '.join(KEYS)}")
    return found


def ordered(rules: Mapping[str, ModelRule], specs: Mapping[str, ModelSpec]) -> tuple[str, ...]:
    """The order in which models are asked.

    Args:
        rules: as ``read_rules`` gave them.
        specs: every model of the loop by its name, in the order they were given, which holds where no rule says more.

    Returns:
        Names, each behind the one it waits for.

    Raises:
        InputError: a rule names a model or a label that is not there, or rules wait for one another.
    """
    there = ", ".join(specs)
    for name, rule in rules.items():
        for named in (name, rule.after):
            if named not in specs:
                raise InputError(f"rules: there is no model {named!r}; there is: {there}")
        _check_label(name, rule, specs[rule.after])
    order: list[str] = []
    while len(order) < len(specs):
        free = [name for name in specs if name not in order and (name not in rules or rules[name].after in order)]
        if not free:
            circle = ", ".join(name for name in specs if name not in order)
            raise InputError(f"rules: these models wait for one another, so none can be first: {circle}")
        order.append(free[0])
    return tuple(order)


def why_skipped(rule: ModelRule, before: Prediction | None, why_none: str | None, spec: ModelSpec) -> str | None:
    """Why a rule leaves a model out of a frame.

    Args:
        rule: of the model.
        before: what the model it waits for answered to this frame, or None.
        why_none: why there is no answer, or None.
        spec: of the model it waits for.

    Returns:
        One line without pixels, or None where the model is asked.
    """
    if not rule.skips:
        return None
    if before is None or not before.valid:
        return f"{rule.after} gave no answer{f' ({why_none})' if why_none else ''}"
    said, is_that, confidence = _answer(before, rule.needs_label, spec)
    if not is_that:
        return f"{rule.after} says {said}, not {rule.needs_label}"
    if rule.min_confidence is None:
        return None
    if confidence is None:
        return f"{rule.after} says {said} without a confidence"
    if not confidence >= rule.min_confidence:
        return f"{rule.after} says {said} with {confidence:.2f}, below {rule.min_confidence:g}"
    return None


def _answer(before: Prediction, wanted: str | None, spec: ModelSpec) -> tuple[str, bool, float | None]:
    """What a model said, whether it is what was wanted, and how sure it is of that."""
    if spec.task is Task.CLASSIFY and before.scores is not None:
        scores = before.scores.ravel()
        if len(scores) == 1:  # the probability of the one label, so its absence is an answer too
            share, label = float(scores[0]), spec.labels[0]
            if wanted is not None or share >= 0.5:
                return (label if share >= 0.5 else f"no {label}"), share >= 0.5, share
            return f"no {label}", True, 1.0 - share
        best = int(scores.argmax())
        return spec.labels[best], wanted in (None, spec.labels[best]), float(scores[best])
    label = wanted or spec.read_labels[0]
    for measured in before.measurements:
        if measured.label == label:
            return (label if measured.found else f"no {label}"), measured.found or wanted is None, measured.confidence
    return f"no {label}", wanted is None, None


def _check_label(name: str, rule: ModelRule, gate: ModelSpec) -> None:
    if rule.skips and gate.task is Task.FEATURES:
        raise InputError(f"rules of {name!r}: {rule.after!r} gives features, which have neither label nor confidence")
    known = gate.read_labels if gate.task is Task.SEGMENT else gate.labels
    if rule.needs_label is not None and rule.needs_label not in known:
        raise InputError(
            f"rules of {name!r}: {rule.after!r} has no label {rule.needs_label!r}; it has: {', '.join(known)}"
        )


def _from_file(path: Path) -> Mapping[str, Any]:
    parse: Callable[[str], Any] = parse_json
    if path.suffix != ".json":
        try:
            parse = importlib.import_module("tomllib").loads
        except ImportError as error:  # Python 3.10
            raise InputError(f"rules {path.name}: TOML needs Python 3.11: write them as .json") from error
    try:
        with path.open("rb") as file:
            raw = file.read(_MAX_BYTES + 1)
        if len(raw) > _MAX_BYTES:
            raise InputError(f"rules {path.name}: more than {_MAX_BYTES >> 10} KiB are no rules")
        data: Mapping[str, Any] = check_values(parse(raw.decode("utf-8")))
        return data
    except OSError as error:
        raise InputError(f"rules {path} cannot be read: {error.strerror or type(error).__name__}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"rules {path.name} cannot be read: {' '.join(str(error).split())[:200]}") from error


def _checked(name: str, table: Mapping[str, Any]) -> ModelRule:
    what = f"rules of {name!r}"
    if unknown := [key for key in table if key not in KEYS]:
        raise InputError(f"{what}: there is no key {unknown[0]!r}; there is: {', '.join(KEYS)}")
    given = {key: value for key, value in table.items() if value is not None}
    texts: Sequence[str] = [key for key in ("after", "needs_label") if key in given]
    for key in texts:
        if not isinstance(given[key], str) or not given[key]:
            raise InputError(f"{what}: {key} is a name in quotation marks, not {given[key]!r:.60}")
    if "after" not in given:
        raise InputError(f"{what}: after is missing: it names the model that is asked before")
    if given["after"] == name:
        raise InputError(f"{what}: a model cannot wait for itself")
    least = given.get("min_confidence")
    if least is not None and (isinstance(least, bool) or not isinstance(least, int | float) or not _is_share(least)):
        raise InputError(f"{what}: min_confidence is a number from 0 to 1, not {least!r:.60}")
    return ModelRule(
        after=given["after"],
        needs_label=given.get("needs_label"),
        min_confidence=None if least is None else float(least),
    )


def _is_share(value: float) -> bool:
    return math.isfinite(value) and 0 <= value <= 1


__all__ = ["KEYS", "ModelRule", "ordered", "read_rules", "why_skipped"]
