"""Making a shipped student from nothing but data and a teacher.

The stages of a recipe, one after another, resumable.

``make student NAME=fetal-head STATE=DIR`` reads ``recipes/NAME.toml`` and runs its stages, which are commands that a
user would type; a stage whose result is there is not run again, and a training that was stopped goes on from its last
checkpoint. Each finished stage leaves its student as float16 in ``kept/``, and a line in ``stages.jsonl``. A stage is
cut into pieces of at most 40 minutes. It does not know training: it only starts commands.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinyusfm_runtime.atomic import write_file
from tinyusfm_runtime.errors import EdgeError, InputError, OutputError

RECIPES = Path(__file__).parent / "recipes"
PIECE_MINUTES = 40.0
"""A training process ends at a checkpoint after so long, and is started again."""
TOOL = "tinyusfm_edge"
"""Module of the command line tool."""
KEPT, LOG, CHOSEN = "kept", "stages.jsonl", "chosen.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """One stage of a recipe.

    Attributes:
        name: unique.
        about: what it is for, one line.
        command: after ``tinyusfm-edge``, or after ``python -m MODULE``; empty for a choice.
        makes: the file it leaves when it is done.
        in_pieces: a training that takes ``--minutes``.
        among: stages between whose scores is chosen; the better student is what it makes.
        measure: path of the score in ``evaluate --json``'s first report, such as ``ellipse_dice.mean``.
        module: what runs the command.
    """

    name: str
    about: str
    command: tuple[str, ...]
    makes: Path
    in_pieces: bool
    among: tuple[str, ...]
    measure: str
    module: str = TOOL


def recipe_names() -> list[str]:
    """Recipes there are, sorted."""
    return sorted(path.stem for path in RECIPES.glob("*.toml"))


def read_recipe(name: str, places: Mapping[str, str]) -> list[Stage]:
    """The stages of a recipe, in order.

    Args:
        name: one of ``recipe_names()``.
        places: ``data``, ``teacher`` and ``state``.

    Raises:
        InputError: no such recipe, or one that is not usable.
    """
    if sys.version_info < (3, 11):
        raise InputError("making a student needs Python 3.11 for its TOML recipe")
    import tomllib

    if name not in recipe_names():
        raise InputError(f"there is no recipe {name!r}: there is {', '.join(recipe_names())}")
    try:
        data = tomllib.loads((RECIPES / f"{name}.toml").read_text(encoding="utf-8"))
        values = {**data.get("values", {}), **places, "recipes": str(RECIPES)}
        values = {key: str(value).format_map(values) for key, value in values.items()}
        stages = [_stage(entry, data.get("lists", {}), values) for entry in data["stage"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"recipe {name} is not usable: {error}") from error
    if len({stage.name for stage in stages}) != len(stages):
        raise InputError(f"recipe {name} names a stage twice")
    return stages


def _stage(entry: Mapping[str, Any], lists: Mapping[str, Sequence[str]], values: Mapping[str, str]) -> Stage:
    words: list[str] = []
    for word in entry.get("command", ()):
        words += lists[word[1:]] if word.startswith("@") else [word]
    return Stage(
        name=entry["name"],
        about=entry["about"],
        command=tuple(word.format_map(values) for word in words),
        makes=Path(entry["makes"].format_map(values)),
        in_pieces=bool(entry.get("in_pieces", False)),
        among=tuple(entry.get("among", ())),
        measure=entry.get("measure", ""),
        module=entry.get("module", TOOL),
    )


@contextlib.contextmanager
def held(lock: Path | None) -> Iterator[None]:
    """Holds a lock file while something runs.

    Two long trainings then do not share a machine.

    Raises:
        InputError: another process holds it.
    """
    if lock is None:
        yield
        return
    with lock.open("a") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise InputError(f"{lock} is held by another training: wait for it, or leave --lock out") from error
        yield


def run_command(words: Sequence[str], module: str = TOOL) -> float:
    """Runs ``tinyusfm-edge``, or another module, in a process of its own.

    On one thread unless OMP_NUM_THREADS says otherwise.

    Args:
        words: the command and its options.
        module: what runs it.

    Returns:
        Seconds it took.

    Raises:
        InputError: it failed; what it printed stands above.
    """
    tool = "tinyusfm-edge" if module == TOOL else f"python -m {module}"
    print(" ".join([tool, *words]), file=sys.stderr, flush=True)
    started = time.monotonic()
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    done = subprocess.run([sys.executable, "-m", module, *words], env=environment)
    if done.returncode:
        raise InputError(f"{words[0]} ended with exit code {done.returncode}: see above; the same command goes on")
    return time.monotonic() - started


def run_stage(
    stage: Stage,
    stages: Sequence[Stage],
    state: Path,
    minutes: float,
    *,
    command: Callable[[Sequence[str], str], object] = run_command,
) -> bool:
    """Runs a stage, or goes on with it.

    Args:
        stage: which.
        stages: of the recipe, for a choice.
        state: folder of everything.
        minutes: time there is.
        command: runs the words of a command in a module.

    Returns:
        Whether it is finished.

    Raises:
        InputError: its command failed.
        OutputError: its student cannot be kept.
    """
    started = time.monotonic()
    end = started + 60 * minutes
    while not stage.makes.is_file():
        left = (end - time.monotonic()) / 60
        if left <= 0:
            return False
        if stage.among:
            choose(stage, stages, state)
        else:
            piece = ["--minutes", f"{min(PIECE_MINUTES, left):.1f}"] if stage.in_pieces else []
            command([*stage.command, *piece], stage.module)
            if not stage.in_pieces and not stage.makes.is_file():
                raise InputError(f"stage {stage.name} ended without {stage.makes.name}")
    note(state, stage, time.monotonic() - started)
    return True


def choose(stage: Stage, stages: Sequence[Stage], state: Path) -> None:
    """Takes the student with the best validation score of some stages.

    Writes down which and why.

    Raises:
        InputError: a stage that is not there, or one without scores.
        OutputError: the student cannot be written.
    """
    by_name = {one.name: one for one in stages}
    scores: dict[str, float] = {}
    for name in stage.among:
        if name not in by_name:
            raise InputError(f"stage {stage.name} chooses among {name!r}, which the recipe has not")
        scores[name] = read_score(by_name[name].makes.with_suffix(".val.json"), stage.measure)
    best = max(scores, key=lambda name: scores[name])
    write_file(state / CHOSEN, json.dumps({"chosen": best, "measure": stage.measure, "scores": scores}).encode())
    stage.makes.parent.mkdir(parents=True, exist_ok=True)
    write_file(stage.makes, by_name[best].makes.read_bytes())


def read_score(path: Path, measure: str) -> float:
    """A number of the first report of ``evaluate --json``.

    Raises:
        InputError: no such file or number.
    """
    try:
        value: Any = json.loads(path.read_text(encoding="utf-8"))["reports"][0]
        for part in measure.split("."):
            value = value[part]
        return float(value)
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise InputError(f"{path.name} has no score {measure!r}: {error}") from error


def note(state: Path, stage: Stage, seconds: float) -> None:
    """Keeps a finished stage's student as float16 and writes a line about it, once.

    Raises:
        OutputError: no room or no permission.
    """
    log = state / LOG
    known = [json.loads(line)["stage"] for line in log.read_text().splitlines()] if log.is_file() else []
    if stage.name in known:
        return
    entry: dict[str, Any] = {"stage": stage.name, "about": stage.about, "seconds": round(seconds, 1)}
    if stage.makes.suffix == ".safetensors" and stage.command[:1] != ("evaluate",):
        import torch

        from tinyusfm_edge.models.checkpoint import load_student_file, save_student

        student = load_student_file(stage.makes)
        (state / KEPT).mkdir(parents=True, exist_ok=True)
        kept = state / KEPT / f"{stage.name}.safetensors"
        entry["sha256"] = save_student(kept, student.module, student.spec, torch.float16, student.report.stages)
    try:
        with log.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(entry) + "\n")
    except OSError as error:
        raise OutputError(f"cannot write {log}: {error.strerror}") from error


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code: 0 also where time ran out, which is said."""
    parser = argparse.ArgumentParser(description="make a shipped student, stage by stage")
    parser.add_argument("--name", default="fetal-head", help="recipe")
    parser.add_argument("--state", type=Path, default=Path("runs/students"), help="folder of all stages")
    parser.add_argument("--data", default="../shared/data", help="folder of the data sets")
    parser.add_argument("--teacher", default="../shared/weights/vit_small_patch14_dinov2.fp16.safetensors")
    parser.add_argument("--minutes", type=float, default=1e6, help="time there is; the same command goes on")
    parser.add_argument("--stage", default="", help="one stage alone, and what it needs must be there")
    parser.add_argument("--lock", type=Path, default=None, help="lock file held meanwhile")
    parser.add_argument("--list", action="store_true", help="print the stages and what is done, and run nothing")
    options = parser.parse_args(arguments)
    state = options.state / options.name
    try:
        places = {"data": options.data, "teacher": options.teacher, "state": str(state)}
        stages = read_recipe(options.name, places)
        if options.list:
            for stage in stages:
                print(f"{'done' if stage.makes.is_file() else 'open'}  {stage.name:26s}{stage.about}")
            return 0
        if options.stage and options.stage not in {stage.name for stage in stages}:
            raise InputError(f"there is no stage {options.stage!r}: --list names them")
        state.mkdir(parents=True, exist_ok=True)
        with held(options.lock):
            end = time.monotonic() + 60 * options.minutes
            for stage in stages:
                if options.stage in ("", stage.name):
                    print(f"stage {stage.name}: {stage.about}", file=sys.stderr, flush=True)
                    if not run_stage(stage, stages, state, (end - time.monotonic()) / 60):
                        print(f"time is up in stage {stage.name}: the same command goes on", file=sys.stderr)
                        return 0
    except (EdgeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code if isinstance(error, EdgeError) else 3
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

__all__ = [
    "CHOSEN",
    "KEPT",
    "LOG",
    "PIECE_MINUTES",
    "RECIPES",
    "TOOL",
    "Stage",
    "choose",
    "held",
    "note",
    "read_recipe",
    "read_score",
    "recipe_names",
    "run_command",
    "run_stage",
]
