"""``tinyusfm-edge adapt``: a pre-trained or random student learns masks or classes from a labelled table."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tinyusfm_edge.cli import console
from tinyusfm_edge.cli.data_folder import split_names
from tinyusfm_edge.cli.student import require
from tinyusfm_runtime.errors import InputError

if TYPE_CHECKING:
    from tinyusfm_edge.training.adapt_config import AdaptConfig
    from tinyusfm_edge.training.teach import TeacherChoice

RANDOM = "random"
DEFAULT_NEGATIVE_SHARE = 0.1
"""Part of a batch that holds nothing to segment, where pictures of other things are given."""
START_FILES = ("student.safetensors", "best.safetensors", "last.safetensors")
"""What is looked for in a run folder given as a start, first hit first."""


def adapt(
    task: Annotated[str, typer.Option(help="segment or classify.")],
    data: Annotated[Path, typer.Option(help="Folder with split.csv (file,label,mask,split,group,...).")],
    out: Annotated[Path, typer.Option(help="Student file to write; NAME.run beside it holds the run, and resumes.")],
    init: Annotated[
        str, typer.Option(help="Start: a run folder, a weights file, a shipped student, or random.")
    ] = RANDOM,
    labels: Annotated[str, typer.Option(help="Share of the labelled training pictures, by whole patients.")] = "100%",
    labels_seed: Annotated[int, typer.Option(help="Which patients enter that share first.")] = 0,
    image_size: Annotated[int, typer.Option(help="Rows and columns of the input.")] = 224,
    steps: Annotated[int, typer.Option(help="Optimiser steps.")] = 300,
    batch: Annotated[int, typer.Option(help="Pictures a step.")] = 16,
    seed: Annotated[int, typer.Option(help="Of weights, order and augmentation.")] = 42,
    learning_rate: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    layer_decay: Annotated[
        float | None, typer.Option(help="Factor a layer on the learning rate. Default: 0.8, and 1 from random.")
    ] = None,
    precision: Annotated[str, typer.Option(help="fp32, or bf16 where the machine computes it.")] = "fp32",
    evaluate_every: Annotated[int, typer.Option(help="Steps between evaluations and checkpoints.")] = 50,
    postprocess: Annotated[str | None, typer.Option(help="none, mask or ellipse_hc.")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the student. Default: the file's.")] = None,
    kd: Annotated[
        str, typer.Option(help="Distil from a teacher: logits, features, csf, patches, with commas between.")
    ] = "",
    lora: Annotated[
        bool, typer.Option("--lora", help="Adapt the teacher's q and v by LoRA, not its head alone.")
    ] = False,
    lora_rank: Annotated[int, typer.Option(min=1, help="Rank of the adapters.")] = 4,
    teacher: Annotated[str | None, typer.Option(help="Teacher, such as dinov2_vits14.")] = None,
    teacher_weights: Annotated[Path | None, typer.Option(help="Its weights file.")] = None,
    teacher_run: Annotated[
        Path | None, typer.Option(help="Folder of the teacher's own run, to share it. Default: inside NAME.run.")
    ] = None,
    transfer_share: Annotated[
        float | None,
        typer.Option(help="Part of a batch without labels: rest of the split, and synthetic."),
    ] = None,
    negatives: Annotated[
        str, typer.Option(help="Folders of pictures that hold nothing to segment, with commas between.")
    ] = "",
    negative_share: Annotated[
        float | None, typer.Option(help="Part of a batch drawn from them. Default: 0.1 where there are any.")
    ] = None,
    exits: Annotated[str, typer.Option(help="Early exits of a classifier after these blocks, such as 6,9.")] = "",
    config: Annotated[Path | None, typer.Option(help="JSON of further settings; options here go before it.")] = None,
) -> None:
    """Fine-tune a student for a task; the best weights by validation become a student file."""
    require("adapting a student", ("torch", "safetensors", "cv2", "lightning_fabric"), "train")
    from tinyusfm_edge.training import adapt as recipe
    from tinyusfm_edge.training.task import class_names

    if task not in ("segment", "classify"):
        raise InputError(f"--task {task}: use segment or classify")
    console.check_writable(out, "the student file")
    names = class_names(data) if task == "classify" else ("foreground",)
    settings = read_settings(config)
    given = {
        "steps": steps,
        "batch": batch,
        "seed": seed,
        "evaluate_every": evaluate_every,
        "precision": precision,
        "labels": parse_share(labels),
        "labels_seed": labels_seed,
        "learning_rate": learning_rate,
        "layer_decay": 1.0 if layer_decay is None and init == RANDOM and "layer_decay" not in settings else layer_decay,
    }
    given |= {"kd": split_names(kd) or None, "transfer_share": transfer_share}
    others = [Path(name) for name in split_names(negatives)]
    if others and negative_share is None and "negative_share" not in settings:
        negative_share = DEFAULT_NEGATIVE_SHARE
    given["negative_share"] = negative_share
    if lora and not kd:
        raise InputError("--lora adapts a teacher: say what is distilled from it, such as --kd logits,features")
    if kd:
        given["lora_rank"] = lora_rank if lora else 0
    plan = settle_config(settings, given, task, image_size, len(names), read_exits(exits))
    choice = choose_teacher(plan, teacher, teacher_weights, teacher_run)
    run_folder = out.with_suffix(".run")
    spec = recipe.student_spec(plan, names, name=name or out.stem, postprocess=postprocess)
    found = recipe.adapt(data, run_folder, plan, names, init=find_start(init), teacher=choice, negatives=others)
    if not recipe.is_first_process():
        return
    sha256, stops = recipe.write_student(run_folder, out, plan, spec, data=data)
    console.say(f"{out}  {sha256[:12]}  step {found.best_step}: {best_scores(run_folder, found.best_step)}")
    for what, value in stops.table() if stops is not None else ():
        console.say(f"  {what:34s}{value}")


def best_scores(run_folder: Path, step: int) -> str:
    """Validation scores of a step, as they were logged."""
    from tinyusfm_edge.training.loop import read_scalars

    entries = [entry for entry in read_scalars(run_folder) if entry["step"] == step and "val_rank" in entry]
    names = {"val_dice": "validation Dice", "val_balanced_accuracy": "validation balanced accuracy", "val_nll": "NLL"}
    return ", ".join(f"{names[key]} {value:.4f}" for key, value in entries[-1].items() if key in names)


def parse_share(text: str) -> float:
    """``10%`` or ``0.1`` as a fraction.

    Raises:
        InputError: neither, or outside (0, 1].
    """
    try:
        value = float(text.rstrip("%")) / (100.0 if text.endswith("%") else 1.0)
    except ValueError as error:
        raise InputError(f"share {text!r}: give a percentage such as 10% or a fraction such as 0.1") from error
    if not 0.0 < value <= 1.0:
        raise InputError(f"share {text!r} must be more than 0 and at most 100 %")
    return value


def read_settings(path: Path | None) -> dict[str, object]:
    """A JSON table of settings, or an empty one.

    Raises:
        InputError: it cannot be read or is no table.
    """
    import json

    if path is None:
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"settings {path} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise InputError(f"settings {path} hold no table")
    return found


def settle_config(
    settings: dict[str, object],
    given: dict[str, object],
    task: str,
    image_size: int,
    num_names: int,
    exits: tuple[int, ...] = (),
) -> AdaptConfig:
    """Puts a file's settings and the options together.

    Args:
        settings: of a file.
        given: options by field; None leaves the file's or the default.
        task: segment or classify.
        image_size: rows and columns.
        num_names: classes of a classifier.
        exits: blocks with an early exit.

    Raises:
        InputError: unknown or impossible settings.
    """
    from tinyusfm_edge.training.adapt_config import AdaptConfig

    plan = AdaptConfig.from_json({**settings, **{key: value for key, value in given.items() if value is not None}})
    classes = num_names if task == "classify" else 2
    student = replace(
        plan.student,
        task=task,  # type: ignore[arg-type]
        num_classes=classes,
        image_size=image_size,
        exits=exits or plan.student.exits,
    )
    return replace(plan, student=student)


def read_exits(text: str) -> tuple[int, ...]:
    """``6,9`` as numbers.

    Raises:
        InputError: no whole numbers.
    """
    try:
        return tuple(int(part) for part in text.split(",") if part)
    except ValueError as error:
        raise InputError(f"--exits {text}: give blocks with commas between, such as 6,9") from error


def choose_teacher(plan: AdaptConfig, name: str | None, weights: Path | None, run: Path | None) -> TeacherChoice | None:
    """The teacher of a plan that distils.

    Raises:
        InputError: distillation without a teacher, or a teacher without distillation.
    """
    from tinyusfm_edge.training.teach import TeacherChoice

    if not plan.kd:
        if name or weights or run:
            raise InputError("a teacher is named and nothing is distilled: add --kd logits,features")
        return None
    if name is None or weights is None:
        raise InputError("--kd needs a teacher: give --teacher dinov2_vits14 --teacher-weights FILE")
    return TeacherChoice(name=name, weights=weights, run=run)


def find_start(typed: str) -> Path | None:
    """The weights file that ``--init`` means; None for random weights.

    Raises:
        InputError: no such file, run or shipped student.
    """
    from tinyusfm_edge import students

    if typed == RANDOM:
        return None
    if typed in students.names():
        return students.folder(typed) / students.WEIGHTS
    place = Path(typed)
    if place.is_dir():
        found = next((place / name for name in START_FILES if (place / name).is_file()), None)
        if found is None:
            raise InputError(f"--init {typed}: the folder holds none of {', '.join(START_FILES)}")
        return found
    if not place.is_file():
        shipped = ", ".join(students.names())
        raise InputError(f"--init {typed}: no run folder, weights file or shipped student ({shipped})")
    return place
