"""Recipes: named settings for one kind of device.

Targets, precisions, threads, gate and budget.

They are package data (``recipes/NAME.toml``), reviewed like code; a file of one's own works too, as TOML or, where
Python has no reader for TOML (3.10), as JSON. A recipe fills in what the command line leaves open. A budget is what the
device has per frame; one that nobody measured says so. ``tune`` writes one, with a table ``run`` that says which
variant it measured and on which CPUs. It does not know students or frames.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinyusfm_export.quantize.decision import PRECISIONS
from tinyusfm_export.verify.gate import Gate
from tinyusfm_runtime.errors import InputError
from tinyusfm_runtime.plugins import stem
from tinyusfm_runtime.strict_json import check_values, parse_json

if TYPE_CHECKING:
    from tinyusfm_export.verify.verdict import Verdict
    from tinyusfm_runtime.bundle.manifest import Artefact

RECIPE_VERSION = 1
"""Version of the file form."""
FOLDER = Path(__file__).parent / "recipes"
"""Where the named ones are."""
_KEYS = {"version", "about", "targets", "precisions", "threads", "budget"}
_OPTIONAL = {"gate", "run"}
_BUDGET_KEYS = {"frame_ms", "measured", "note"}
_RUN_KEYS = {"variant", "cpus", "sector"}
_MAX_BYTES = 1 << 16
_MOST_CPUS = 1 << 14


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
        variant: name of the student or bundle that it was measured with, or empty.
        cpus: CPUs that the engine's threads are pinned to (Linux); empty leaves them to the operating system.
        sector: ``run`` takes the artefact that was pruned to the probe's sector.
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
    variant: str = ""
    cpus: tuple[int, ...] = ()
    sector: bool = False

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
        if not all(type(cpu) is int and 0 <= cpu < _MOST_CPUS for cpu in self.cpus):
            raise InputError(f"recipe {self.name}: cpus = {list(self.cpus)} are not numbers of CPUs from 0")

    def artefact_of(self, artefacts: Sequence[Artefact]) -> Artefact:
        """The artefact of a bundle that this recipe asks for.

        By target, then by precision, first choice first. Of a pruned one and the whole one it is the one that was
        measured.

        Args:
            artefacts: of the bundle.

        Raises:
            InputError: the bundle holds none of them.
        """
        for target in self.targets:
            for precision in self.precisions:
                fitting = [one for one in artefacts if (stem(one.target), one.precision) == (stem(target), precision)]
                if pruned := [one for one in fitting if bool(one.sector) is self.sector]:
                    return pruned[0]
                if fitting and self.sector:
                    raise InputError(
                        f"recipe {self.name} was measured with an artefact that is pruned to a sector; the bundle "
                        "holds none: export it with --sector"
                    )
                if fitting:
                    return fitting[0]
        wanted = ", ".join(f"{target}-{precision}" for target in self.targets for precision in self.precisions)
        held = ", ".join(artefact.name for artefact in artefacts)
        raise InputError(
            f"recipe {self.name} asks for {wanted}; the bundle holds {held}: export it with --recipe {self.name}"
        )

    def describe(self, verdicts: Sequence[Verdict] = ()) -> list[str]:
        """Lines for people: the recipe and its budget.

        Also how this machine compares where the recipe was timed.

        Args:
            verdicts: of the export.
        """
        source = "measured by us" if self.measured else "NOT measured: nobody ran it on such a device"
        lines = [f"recipe       {self.name}: {self.about}"]
        lines.append(f"budget       {self.budget_ms:g} ms per frame in the engine ({source}); {self.note}")
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
        name: a name, or the path of a ``.toml`` or ``.json`` file.

    Raises:
        InputError: no such recipe, unknown keys, or values that cannot be used.
    """
    own = name.endswith((".toml", ".json"))
    path = Path(name) if own else FOLDER / f"{name}.toml"
    if not own and name not in recipe_names():
        raise InputError(f"there is no recipe {name!r}; there is: {', '.join(recipe_names())}, or a .toml file")
    try:
        raw = path.read_bytes()
        if len(raw) > _MAX_BYTES:
            raise InputError(f"recipe {path.name} has {len(raw)} bytes: that is no recipe")
        data = check_values(_parsed(raw, path.suffix))
    except OSError as error:
        raise InputError(f"recipe {name} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"recipe {path.name} is not readable: {' '.join(str(error).split())[:200]}") from error
    return _recipe(path.stem, data)


def _parsed(raw: bytes, suffix: str) -> Any:
    if suffix == ".json":
        return parse_json(raw)
    try:
        import tomllib
    except ImportError as error:  # Python 3.10
        raise InputError(
            "recipes in .toml need Python 3.11: give the recipe as .json, or the options themselves"
        ) from error
    return tomllib.loads(raw.decode("utf-8"))


def _recipe(name: str, data: Any) -> Recipe:
    found = data if isinstance(data, dict) else {}
    budget, run = found.get("budget", {}), found.get("run", {})
    tables = all(isinstance(table, dict) for table in (budget, run, found.get("gate", {})))
    if set(found) - _OPTIONAL != _KEYS or not tables or set(budget) != _BUDGET_KEYS or set(run) - _RUN_KEYS:
        keys, more = ", ".join(sorted(_KEYS)), ", ".join(sorted(_BUDGET_KEYS))
        raise InputError(
            f"recipe {name} must have exactly {keys}, and budget {more}; gate and run "
            f"({', '.join(sorted(_RUN_KEYS))}) may be left out"
        )
    if data["version"] != RECIPE_VERSION:
        raise InputError(f"recipe {name} has version {data['version']!r}, this toolkit reads {RECIPE_VERSION}")
    words = [data["targets"], data["precisions"]]
    if not all(isinstance(part, list) and all(isinstance(word, str) for word in part) for part in words):
        raise InputError(f"recipe {name}: targets and precisions are lists of names")
    if not isinstance(run.get("variant", ""), str) or not isinstance(run.get("cpus", []), list):
        raise InputError(f"recipe {name}: run has variant, a name, and cpus, a list of numbers")
    if not isinstance(run.get("sector", False), bool):
        raise InputError(f"recipe {name}: run has sector, true or false")
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
        variant=run.get("variant", ""),
        cpus=tuple(run.get("cpus", ())),
        sector=run.get("sector", False),
    )


def recipe_text(data: Mapping[str, Any], suffix: str = ".toml") -> str:
    """A recipe as the text of a file.

    Args:
        data: its keys, as ``load_recipe`` reads them.
        suffix: ``.toml`` or ``.json``.
    """
    if suffix == ".json":
        return json.dumps(data, indent=1) + "\n"
    flat = [f"{key} = {_toml(value)}" for key, value in data.items() if not isinstance(value, Mapping)]
    for name, table in data.items():
        if isinstance(table, Mapping):
            flat += ["", f"[{name}]", *(f"{key} = {_toml(value)}" for key, value in table.items())]
    return "\n".join(flat) + "\n"


def _toml(value: Any) -> str:
    """A value as TOML, which writes strings, numbers, truth values and lists as JSON."""
    return json.dumps(value, ensure_ascii=True).replace("\x7f", "\\u007f")


__all__ = ["FOLDER", "RECIPE_VERSION", "Recipe", "load_recipe", "recipe_names", "recipe_text"]
