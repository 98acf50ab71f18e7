"""One row of the experiment on real data: pre-train, adapt, score the test split, keep the result; then the table.

``make experiment ROW=hc18-10-ours SEED=0`` runs the commands a user would type, with their run folders, so a row that
was stopped goes on where it was; ``make experiment`` prints the tables. What is run stands in experiments.toml and, for
the method as it is today, in experiments_mended.toml. A row that has a result is not run again. It does not know
training: it only starts commands.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from experiment_table import RESULT_VERSION, Result, read_results, render
from tinyusfm_edge.release.make_student import run_command
from tinyusfm_runtime.atomic import write_file
from tinyusfm_runtime.errors import EdgeError, InputError

HERE = Path(__file__).parent
PLAN = HERE / "experiments.toml"
PLANS = (PLAN, HERE / "experiments_mended.toml")
"""Protocols, each with rows and a table of its own."""
RESULTS = HERE / "results" / "experiments"
STUDENT_FILE = "student.safetensors"
"""What a start leaves in its folder when it is done."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One row of the table.

    Attributes:
        name: GRID-LABELS-ARM.
        grid: name of its grid.
        arm: name of its arm.
        labels: share of the labels, such as ``10%``.
    """

    name: str
    grid: str
    arm: str
    labels: str


def read_plan(path: Path = PLAN) -> dict[str, Any]:
    """The declared protocol.

    Raises:
        InputError: it cannot be read or is of another version.
    """
    if sys.version_info < (3, 11):
        raise InputError("the experiment needs Python 3.11 for its TOML plan")
    import tomllib

    try:
        plan: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path.name} cannot be read: {error}") from error
    if plan.get("version") != 1:
        raise InputError(f"{path.name} is of version {plan.get('version')!r}; this program reads 1")
    return plan


def rows(plan: Mapping[str, Any]) -> list[Row]:
    """Every row of a plan, in the order of the table."""
    return [
        Row(name=f"{name}-{labels.rstrip('%')}-{arm}", grid=name, arm=arm, labels=labels)
        for name, grid in plan["grid"].items()
        for labels in grid["labels"]
        for arm in grid["arms"]
    ]


def expand(words: Sequence[str], lists: Mapping[str, Sequence[str]], values: Mapping[str, str]) -> list[str]:
    """Fills in placeholders; one that is a whole word and names a list becomes its words.

    Args:
        words: of a command.
        lists: by name.
        values: by name.

    Raises:
        InputError: a placeholder that has no value.
    """
    found: list[str] = []
    for word in words:
        name = word[1:-1] if word.startswith("{") and word.endswith("}") else ""
        if name in lists:
            found += expand(lists[name], lists, values)
            continue
        try:
            found.append(word.format_map(values))
        except KeyError as error:
            raise InputError(f"placeholder {error} of the plan has no value") from error
    return found


@dataclass(frozen=True, kw_only=True, slots=True)
class Commands:
    """What makes a row, in order.

    Attributes:
        start: commands of the start, none for random weights.
        start_folder: where it leaves its weights, or None.
        adapt: the adaptation.
        evaluate: scores of the test split.
        student: the student file.
        scores: file of the scores.
    """

    start: list[list[str]]
    start_folder: Path | None
    adapt: list[str]
    evaluate: list[str]
    student: Path
    scores: Path


def commands(plan: Mapping[str, Any], row: Row, seed: int, places: Mapping[str, str]) -> Commands:
    """The commands of a row, as a user would type them after ``tinyusfm-edge``.

    Args:
        plan: the protocol.
        row: which.
        seed: of start and adaptation.
        places: ``data``, ``teacher`` and ``work``.
    """
    arm, grid = plan["arm"][row.arm], plan["grid"][row.grid]
    work = Path(places["work"])
    start = arm.get("start")
    folder = work / f"start-{start}-seed{seed}" if start else None
    values = {**places, "seed": str(seed), "start": str(folder), "grid": row.grid}
    values["share"] = row.labels.rstrip("%")
    lists = plan["lists"]
    student = work / f"{row.name}-seed{seed}.safetensors"
    scores = work / f"{row.name}-seed{seed}.test.json"
    data = expand([grid["data"]], lists, values)
    adapt = ["adapt", "--task", grid["task"], "--data", *data, "--init", str(folder) if folder else "random"]
    adapt += ["--labels", row.labels, "--seed", str(seed), "--out", str(student)]
    adapt += expand([*plan["adapt"], *grid.get("adapt", ()), *arm.get("adapt", ())], lists, values)
    return Commands(
        start=[expand(words, lists, values) for words in plan["start"][start]["commands"]] if start else [],
        start_folder=folder,
        adapt=adapt,
        evaluate=["evaluate", str(student), "--data", *data, "--split", "test", "--json", str(scores)],
        student=student,
        scores=scores,
    )


def run_row(
    plan: Mapping[str, Any],
    row: Row,
    seed: int,
    places: Mapping[str, str],
    results: Path,
    *,
    command: Callable[[Sequence[str]], float] = run_command,
) -> Path:
    """Makes a row, or goes on with it, and writes its result.

    Args:
        plan: the protocol.
        row: which.
        seed: of start and adaptation.
        places: ``data``, ``teacher`` and ``work``.
        results: folder of the results.
        command: runs the words of a command, and says how many seconds it took.

    Returns:
        The result's file.

    Raises:
        InputError: a command failed; what it printed stands above.
        OutputError: the result cannot be written.
    """
    out = results / f"{row.name}-seed{seed}.json"
    if out.is_file():
        return out
    steps = commands(plan, row, seed, places)
    Path(places["work"]).mkdir(parents=True, exist_ok=True)
    has_start = steps.start_folder is None or (steps.start_folder / STUDENT_FILE).is_file()
    parts = {"start": [] if has_start else steps.start, "adapt": [steps.adapt], "evaluate": [steps.evaluate]}
    seconds, cpu_seconds = {}, {}
    for part, words_of in parts.items():
        before = cpu_time()
        seconds[part] = round(sum((command(words) for words in words_of if not _made(words)), 0.0), 1)
        cpu_seconds[part] = round(cpu_time() - before, 1)
    steps_run = [*steps.start, steps.adapt, steps.evaluate]
    shown = [[_anonymous(word, places) for word in words] for words in steps_run]
    grid = plan["grid"][row.grid]
    content = {
        "version": RESULT_VERSION,
        "row": row.name,
        "seed": seed,
        "task": grid["task"],
        "metric": grid["metric"],
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "commands": [" ".join(["tinyusfm-edge", *words]) for words in shown],
        **frame_scores(json.loads(steps.scores.read_text(encoding="utf-8"))),
    }
    results.mkdir(parents=True, exist_ok=True)
    write_file(out, (json.dumps(content, sort_keys=True) + "\n").encode())
    return out


def frame_scores(scores: Mapping[str, Any]) -> dict[str, Any]:
    """What the table needs of ``evaluate --json``: short hashes, scores, no names of patients."""
    report = scores["reports"][0]
    keep = ("dice", "hd95_px", "truth", "probabilities")
    images = [
        {
            "id": image["sha256"][:16],
            "group": sha256(image["group"].encode()).hexdigest()[:8],
            **{name: image[name] for name in keep if name in image},
        }
        for image in report["images"]
    ]
    return {"weights_sha256": scores["weights_sha256"], "split": report["split"], "images": images}


def cpu_time() -> float:
    """Seconds of processor time of this process and of its finished children, so other work beside it counts not."""
    return sum(os.times()[:4])


def _made(words: Sequence[str]) -> bool:
    """A coreset, or selected weights, that several rows share are made once."""
    return words[0] in ("coreset", "select") and Path(words[words.index("--out") + 1]).is_file()


def _anonymous(word: str, places: Mapping[str, str]) -> str:
    for name, place in sorted(places.items(), key=lambda item: -len(item[1])):
        word = word.replace(place, name.upper())
    return word


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description="one row of the experiment on real data, and the table of all")
    parser.add_argument("--row", default="", help="row to make, such as hc18-10-ours; none prints the table alone")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", default="../shared/data", help="folder of the data sets")
    parser.add_argument("--teacher", default="../shared/weights/vit_small_patch14_dinov2.fp16.safetensors")
    parser.add_argument("--work", default="runs/experiments", help="folder of all runs")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--dry", action="store_true", help="print the commands and run nothing")
    parser.add_argument("--list", action="store_true", help="print the names of the rows")
    options = parser.parse_args(arguments)
    places = {"data": options.data, "teacher": options.teacher, "work": options.work}
    try:
        plans = [read_plan(path) for path in PLANS]
        named = [{row.name: row for row in rows(plan)} for plan in plans]
        known = {name: (plan, row) for plan, own in zip(plans, named, strict=True) for name, row in own.items()}
        if options.list:
            print("\n".join(known))
            return 0
        if options.row:
            if options.row not in known:
                raise InputError(f"there is no row {options.row!r}: --list names them")
            if options.dry:
                steps = commands(*known[options.row], options.seed, places)
                for words in (*steps.start, steps.adapt, steps.evaluate):
                    print("tinyusfm-edge " + " ".join(words))
                return 0
            run_row(*known[options.row], options.seed, places, options.results)
        found: list[Result] = read_results(options.results)
        for plan, own in zip(plans, named, strict=True):
            print(render(plan, [(row.name, row.grid, row.labels, row.arm) for row in own.values()], found))
            print()
    except EdgeError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
