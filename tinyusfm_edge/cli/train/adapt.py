"""``tinyusfm-edge adapt``: a student learns masks or classes from a table.

The student is pre-trained or random; the table is labelled.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tinyusfm_edge.cli import console
from tinyusfm_edge.cli.data_options import print_table_notes, reads_data
from tinyusfm_edge.cli.output import SILENT, ReportOutput, reports
from tinyusfm_edge.cli.train.keys import ADAPT_KEYS, check_keys
from tinyusfm_edge.cli.train.settings import Changes, Config, ShowConfig, check_choice, show
from tinyusfm_edge.data.folder import split_names
from tinyusfm_edge.data.reading import AS_IT_IS, Reading
from tinyusfm_edge.extras import require
from tinyusfm_edge.settings import parse_change, read_settings
from tinyusfm_runtime.errors import InputError

if TYPE_CHECKING:
    from tinyusfm_edge.training.adapt.config import AdaptConfig
    from tinyusfm_edge.training.adapt.teacher import AdaptTeacher

RANDOM = "random"
DEFAULT_NEGATIVE_SHARE = 0.1
"""Part of a batch that holds nothing to segment, where images of other things are given."""
TEACHER_DONE = "teacher.json"
"""What a finished teacher leaves in its run folder, where it was adapted alone."""
START_FILES = ("student.safetensors", "best.safetensors", "last.safetensors")
"""What is looked for in a run folder given as a start, first hit first."""


@reports("adapt")
@reads_data
def adapt(
    task: Annotated[str, typer.Option(help="segment or classify.")],
    data: Annotated[Path, typer.Option(help="Folder with split.csv (file,label,mask,split,group,...).")],
    out: Annotated[Path, typer.Option(help="Student file to write; NAME.run beside it holds the run, and resumes.")],
    init: Annotated[
        str, typer.Option(help="Start: a run folder, a weights file, a shipped student, or random.")
    ] = RANDOM,
    container: Annotated[
        str | None, typer.Option(help="Which model of a start that holds several, such as model_ema.")
    ] = None,
    labels: Annotated[
        str | None,
        typer.Option(metavar="SHARE", help="Share of the labelled images, by whole patients. Default: 100%."),
    ] = None,
    labels_seed: Annotated[int | None, typer.Option(help="Random seed of that share. Default: 0.")] = None,
    image_size: Annotated[str, typer.Option(help="Side of a square input, or ROWSxCOLUMNS such as 224x320.")] = "224",
    steps: Annotated[int | None, typer.Option(min=1, max=console.MOST, help="Optimiser steps. Default: 300.")] = None,
    batch: Annotated[int | None, typer.Option(min=1, max=console.MOST, help="Images per step. Default: 16.")] = None,
    seed: Annotated[int | None, typer.Option(help="Random seed. Default: 42.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    layer_decay: Annotated[
        float | None, typer.Option(help="Factor a layer on the learning rate. Default: 0.8, and 1 from random.")
    ] = None,
    precision: Annotated[
        str | None, typer.Option(help="fp32, bf16 or natural: bf16 where the machine computes it. Default: fp32.")
    ] = None,
    evaluate_every: Annotated[
        int | None,
        typer.Option(min=1, max=console.MOST, help="Steps between evaluations and checkpoints. Default: 50."),
    ] = None,
    postprocess: Annotated[str | None, typer.Option(help="none, mask or ellipse_hc.")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the student. Default: the file's.")] = None,
    kd: Annotated[
        str,
        typer.Option(help="Distil from a teacher: logits, features, csf, patches, glmixer, assistant."),
    ] = "",
    lora: Annotated[
        bool, typer.Option("--lora", help="Adapt the teacher's q and v by LoRA, not its head alone.")
    ] = False,
    lora_rank: Annotated[int, typer.Option(min=1, max=console.MOST, help="Rank of the adapters.")] = 4,
    teacher: Annotated[
        str | None, typer.Option(help="Teacher, such as dinov2_vits14, or student for a student file.")
    ] = None,
    teacher_weights: Annotated[Path | None, typer.Option(help="Weights of the teacher.")] = None,
    against: Annotated[
        Path | None, typer.Option(help="Student file, of labels alone, that the teacher must be better than.")
    ] = None,
    teacher_only: Annotated[
        bool, typer.Option("--teacher-only", help="Adapt the teacher in its run folder and stop.")
    ] = False,
    teacher_run: Annotated[
        Path | None, typer.Option(help="Folder of the teacher's own run, to share it. Default: inside NAME.run.")
    ] = None,
    transfer_share: Annotated[
        float | None,
        typer.Option(help="Part of a batch without labels: rest of the split, and synthetic."),
    ] = None,
    negatives: Annotated[
        str, typer.Option(help="Folders of images that hold nothing to segment, with commas between.")
    ] = "",
    negative_share: Annotated[
        float | None, typer.Option(help="Part of a batch drawn from them. Default: 0.1 where there are any.")
    ] = None,
    unlabelled: Annotated[
        str, typer.Option(help="Folders whose training images join the transfer set, with commas between.")
    ] = "",
    masks: Annotated[
        str | None, typer.Option(help="file, or ellipse: drawn from ellipses.csv beside the table.")
    ] = None,
    minutes: Annotated[
        float, typer.Option(min=0, help="Stop at a checkpoint after so long; the same command goes on. 0: never.")
    ] = 0,
    exits: Annotated[str, typer.Option(help="Early exits of a classifier after these blocks, such as 6,9.")] = "",
    config: Config = None,
    change: Changes = None,
    show_config: ShowConfig = False,
    reading: Reading = AS_IT_IS,
    output: ReportOutput = SILENT,
) -> None:
    """Fine-tune a student for a task.

    The best weights by validation become a student file.
    """
    request = AdaptRequest(
        task=task,
        data=data,
        out=out,
        init=init,
        container=container,
        labels=labels,
        labels_seed=labels_seed,
        image_size=image_size,
        steps=steps,
        batch=batch,
        seed=seed,
        learning_rate=learning_rate,
        layer_decay=layer_decay,
        precision=precision,
        evaluate_every=evaluate_every,
        postprocess=postprocess,
        name=name,
        kd=kd,
        lora=lora,
        lora_rank=lora_rank,
        teacher=teacher,
        teacher_weights=teacher_weights,
        against=against,
        teacher_only=teacher_only,
        teacher_run=teacher_run,
        transfer_share=transfer_share,
        negatives=negatives,
        negative_share=negative_share,
        unlabelled=unlabelled,
        masks=masks,
        minutes=minutes,
        exits=exits,
        config=config,
        change=tuple(change or ()),
        show_config=show_config,
        reading=reading,
    )
    _adapt(request, output)


@dataclass(frozen=True, kw_only=True, slots=True)
class AdaptRequest:
    """What was typed: one field per option of ``adapt``.

    The option's help says what it means.
    """

    task: str
    data: Path
    out: Path
    init: str
    container: str | None
    labels: str | None
    labels_seed: int | None
    image_size: str
    steps: int | None
    batch: int | None
    seed: int | None
    learning_rate: float | None
    layer_decay: float | None
    precision: str | None
    evaluate_every: int | None
    postprocess: str | None
    name: str | None
    kd: str
    lora: bool
    lora_rank: int
    teacher: str | None
    teacher_weights: Path | None
    against: Path | None
    teacher_only: bool
    teacher_run: Path | None
    transfer_share: float | None
    negatives: str
    negative_share: float | None
    unlabelled: str
    masks: str | None
    minutes: float
    exits: str
    config: Path | None
    change: tuple[str, ...]
    show_config: bool
    reading: Reading


def _adapt(request: AdaptRequest, output: ReportOutput) -> None:
    """Adapts as the options say."""
    check_choice("--task", request.task, ("segment", "classify"))
    check_keys(ADAPT_KEYS, request.config, request.change)
    settings = read_settings(request.config)
    for change in request.change:
        lay_over(settings, parse_change(change))
    size, exits, start = read_size(request.image_size), read_exits(request.exits), find_start(request.init)
    if request.labels is not None:
        parse_share(request.labels)
    console.check_writable(request.out, "the student file")
    print_table_notes(request.data, "mask" if request.task == "segment" else "label", request.reading)
    require("adapting a student", ("torch", "safetensors", "cv2", "lightning_fabric"), "train")
    from tinyusfm_edge.training.adapt import run as recipe
    from tinyusfm_edge.training.adapt.task import class_names

    names = class_names(request.data, request.reading) if request.task == "classify" else ("foreground",)
    plan = settle_config(settings, _given(request, settings), request.task, size, len(names), exits)
    if request.show_config:
        show(plan.to_json())
        return
    choice = choose_teacher(plan, request.teacher, request.teacher_weights, request.teacher_run)
    run_folder = request.out.with_suffix(".run")
    if request.teacher_only:
        _teach(request.data, run_folder, plan, names, choice, 60 * request.minutes)
        return
    unlabelled, negatives = _folders(request.unlabelled), _folders(request.negatives)
    found = recipe.adapt(
        request.data,
        run_folder,
        plan,
        names,
        init=start,
        teacher=choice,
        against=request.against,
        unlabelled=unlabelled,
        negatives=negatives,
        stop_after_s=60 * request.minutes,
        container=request.container,
        say=console.note,
    )
    if not recipe.is_first_process():
        return
    if found.steps < plan.steps:
        console.note(f"stopped at step {found.steps} of {plan.steps}: the same command goes on")
        return
    origin = recipe.origin_of(run_folder, request.init)
    name = request.name or request.out.stem
    spec = recipe.student_spec(plan, names, name=name, postprocess=request.postprocess, origin=origin)
    sha256, stops = recipe.write_student(
        run_folder, request.out, plan, spec, data=request.data, negatives=negatives, unlabelled=unlabelled
    )
    console.say(f"{request.out}  {sha256[:12]}  step {found.best_step}: {best_scores(run_folder, found.best_step)}")
    for what, value in stops.table() if stops is not None else ():
        console.say(f"  {what:34s}{value}")
    scores = {"best": found.best, "best_step": found.best_step, "steps": found.steps}
    output.result({"student": str(request.out), "sha256": sha256, **scores, "run": str(run_folder)})
    output.end("evaluate", request.out, "--data", request.data, "--split", "val")


def _folders(names: str) -> list[Path]:
    return [Path(folder) for folder in split_names(names)]


def _given(request: AdaptRequest, settings: dict[str, object]) -> dict[str, object]:
    """Settings that the options name; None leaves the file's or the default."""
    plain = ("steps", "batch", "seed", "evaluate_every", "precision", "labels_seed", "learning_rate", "layer_decay")
    given = {name: getattr(request, name) for name in (*plain, "transfer_share", "masks", "negative_share")}
    if request.layer_decay is None and request.init == RANDOM and "layer_decay" not in settings:
        given["layer_decay"] = 1.0
    if request.negatives and request.negative_share is None and "negative_share" not in settings:
        given["negative_share"] = DEFAULT_NEGATIVE_SHARE
    if request.lora and not request.kd:
        raise InputError("--lora adapts a teacher: say what is distilled from it, such as --kd logits,features")
    if request.kd:
        given["lora_rank"] = request.lora_rank if request.lora else 0
    given["reading"] = request.reading.to_json() or None
    share = None if request.labels is None else parse_share(request.labels)
    return given | {"labels": share, "kd": split_names(request.kd) or None}


def _teach(
    data: Path,
    run_folder: Path,
    plan: AdaptConfig,
    names: tuple[str, ...],
    choice: AdaptTeacher | None,
    seconds: float,
) -> None:
    """Adapts a teacher alone."""
    from tinyusfm_edge.training.adapt.teacher import adapted_teacher

    if choice is None:
        raise InputError("--teacher-only needs a teacher: give --kd, --teacher and --teacher-weights")
    place = choice.run or run_folder / "teacher"
    found = adapted_teacher(data, place, plan, names, choice, stop_after_s=seconds)
    if not found.done:
        console.note(f"the teacher in {place} is not finished: the same command goes on")
        return
    about = {"version": 1, "teacher": found.about, "validation": found.rank}
    console.write_json(str(place / TEACHER_DONE), about, "the teacher's score")
    console.say(f"{place}: teacher adapted" + (f", validation {found.rank:.4f}" if found.rank is not None else ""))


def read_size(text: str) -> tuple[int, int]:
    """``224`` or ``224x320`` as rows and columns.

    Raises:
        InputError: neither.
    """
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(part.isdigit() for part in parts):
        raise InputError(f"--image-size {text}: give a side such as 224, or ROWSxCOLUMNS such as 224x320")
    return int(parts[0]), int(parts[-1])


def best_scores(run_folder: Path, step: int) -> str:
    """Validation scores of a step, as they were logged."""
    from tinyusfm_edge.training.trainer.loop import read_scalars

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


def lay_over(settings: dict[str, object], changes: dict[str, object]) -> None:
    """Lays nested changes over settings, in place.

    Which keys there are was checked before.

    Args:
        settings: of a file.
        changes: of ``--set``.
    """
    for key, value in changes.items():
        inner = settings.get(key)
        if isinstance(inner, dict) and isinstance(value, dict):
            lay_over(inner, value)
        else:
            settings[key] = value


def settle_config(
    settings: dict[str, object],
    given: dict[str, object],
    task: str,
    size: tuple[int, int],
    num_names: int,
    exits: tuple[int, ...] = (),
) -> AdaptConfig:
    """Puts a file's settings and the options together.

    Args:
        settings: of a file.
        given: options by field; None leaves the file's or the default.
        task: segment or classify.
        size: rows and columns of the input.
        num_names: classes of a classifier.
        exits: blocks with an early exit.

    Raises:
        InputError: unknown or impossible settings.
    """
    from tinyusfm_edge.training.adapt.config import AdaptConfig

    plan = AdaptConfig.from_json({**settings, **{key: value for key, value in given.items() if value is not None}})
    classes = num_names if task == "classify" else 2
    student = replace(
        plan.student,
        task=task,  # type: ignore[arg-type]
        num_classes=classes,
        image_size=size[0],
        image_width=0 if size[0] == size[1] else size[1],
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


def choose_teacher(plan: AdaptConfig, name: str | None, weights: Path | None, run: Path | None) -> AdaptTeacher | None:
    """The teacher of a plan that distils.

    Raises:
        InputError: distillation without a teacher, or a teacher without distillation.
    """
    from tinyusfm_edge.training.adapt.teacher import AdaptTeacher

    if not plan.kd:
        if name or weights or run:
            raise InputError("a teacher is named and nothing is distilled: add --kd logits,features")
        return None
    if name is None or weights is None:
        raise InputError("--kd needs a teacher: give --teacher dinov2_vits14 --teacher-weights FILE")
    return AdaptTeacher(name=name, weights=weights, run=run)


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
