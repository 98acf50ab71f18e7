"""Recipes: for one kind of device the targets, precisions, threads, gate and budget, under a name.

They are package data (``recipes/NAME.toml``), reviewed like code; a file of one's own works too. A recipe fills in what
the command line leaves open. A budget is what the device has per frame; one that nobody measured says so. It does not
know students or frames.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinyusfm_export.decision import PRECISIONS
from tinyusfm_export.gate import Gate
from tinyusfm_runtime.errors import InputError

if TYPE_CHECKING:
    from tinyusfm_export.verdict import Verdict

RECIPE_VERSION = 1
"""Version of the file form."""
FOLDER = Path(__file__).parent / "recipes"
"""Where the named ones are."""
_KEYS = {"version", "about", "targets", "precisions", "threads", "budget", "gate"}
_BUDGET_KEYS = {"frame_ms", "measured", "note"}
_MAX_BYTES = 1 << 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """One device's settings.

    Attributes:
        name: what people type.
        about: the device, one phrase.
        targets: public names, first choice first.
        precisions: such as ``int8``.
        threads: threads inside the engine; of no meaning on a GPU.
        budget_ms: milliseconds a frame may take in the engine.
        measured: whether a run of ours on such a device stands behind the budget.
        note: where the budget comes from.
        gate: thresholds.
    """

    name: str
    about: str
    targets: tuple[str, ...]
    precisions: tuple[str, ...]
    threads: int
    budget_ms: float
    measured: bool
    note: str
    gate: Gate = field(default_factory=Gate)

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            InputError: a value that cannot be used.
        """
        if not self.targets or not self.precisions or set(self.precisions) - set(PRECISIONS):
            raise InputError(f"recipe {self.name}: it needs targets, and precisions among {', '.join(PRECISIONS)}")
        if type(self.threads) is not int or self.threads < 1:
            raise InputError(f"recipe {self.name}: threads = {self.threads!r} is not a whole number from 1")
        if isinstance(self.budget_ms, bool) or not isinstance(self.budget_ms, (int, float)):
            raise InputError(f"recipe {self.name}: budget frame_ms = {self.budget_ms!r} is not a number")
        if not math.isfinite(self.budget_ms) or self.budget_ms <= 0 or type(self.measured) is not bool:
            raise InputError(f"recipe {self.name}: a budget is frame_ms above 0, and measured = true or false")

    def describe(self, verdicts: Sequence[Verdict] = ()) -> list[str]:
        """Lines for people: the recipe, its budget, and how this machine compares where it was timed.

        Args:
            verdicts: of the export.
        """
        source = "measured by us" if self.measured else "NOT measured: nobody ran it on such a device"
        lines = [f"recipe       {self.name}: {self.about}"]
        lines.append(f"budget       {self.budget_ms:g} ms a frame in the engine ({source}); {self.note}")
        for verdict in verdicts:
            for side in verdict.sides:
                if side.published:
                    p90_ms = side.percentile(90)
                    word = "within" if p90_ms <= self.budget_ms else "ABOVE"
                    here = f"{verdict.target} {side.precision} p90 {p90_ms:.2f} ms on this machine"
                    lines.append(f"             {here}, {word} the budget")
        return lines


def recipe_names() -> list[str]:
    """Names of the recipes that come with the toolkit."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def load_recipe(name: str) -> Recipe:
    """Reads a recipe.

    Args:
        name: a name, or the path of a ``.toml`` file.

    Raises:
        InputError: no such recipe, unknown keys, or values that cannot be used.
    """
    try:
        import tomllib
    except ImportError as error:  # Python 3.10
        raise InputError("recipes are .toml files, which need Python 3.11: give the options themselves") from error
    path = Path(name) if name.endswith(".toml") else FOLDER / f"{name}.toml"
    if not name.endswith(".toml") and name not in recipe_names():
        raise InputError(f"there is no recipe {name!r}; there is: {', '.join(recipe_names())}, or a .toml file")
    try:
        raw = path.read_bytes()
        if len(raw) > _MAX_BYTES:
            raise InputError(f"recipe {path.name} has {len(raw)} bytes: that is no recipe")
        data = tomllib.loads(raw.decode("utf-8"))
    except OSError as error:
        raise InputError(f"recipe {name} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"recipe {path.name} is not readable: {' '.join(str(error).split())[:200]}") from error
    return _recipe(path.stem, data)


def _recipe(name: str, data: Mapping[str, Any]) -> Recipe:
    budget = data.get("budget", {})
    tables = isinstance(budget, dict) and isinstance(data.get("gate", {}), dict)
    if set(data) - {"gate"} != _KEYS - {"gate"} or not tables or set(budget) != _BUDGET_KEYS:
        keys, more = ", ".join(sorted(_KEYS)), ", ".join(sorted(_BUDGET_KEYS))
        raise InputError(f"recipe {name} must have exactly {keys} (gate may be left out), and budget {more}")
    if data["version"] != RECIPE_VERSION:
        raise InputError(f"recipe {name} has version {data['version']!r}, this toolkit reads {RECIPE_VERSION}")
    words = [data["targets"], data["precisions"]]
    if not all(isinstance(part, list) and all(isinstance(word, str) for word in part) for part in words):
        raise InputError(f"recipe {name}: targets and precisions are lists of names")
    return Recipe(
        name=name,
        about=str(data["about"]),
        targets=tuple(data["targets"]),
        precisions=tuple(data["precisions"]),
        threads=data["threads"],
        budget_ms=budget["frame_ms"],
        measured=budget["measured"],
        note=str(budget["note"]),
        gate=Gate.from_json(data.get("gate", {})),
    )


__all__ = ["FOLDER", "RECIPE_VERSION", "Recipe", "load_recipe", "recipe_names"]
