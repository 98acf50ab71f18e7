"""Task adaptation: a student with a head for masks or classes.

Trained on a labelled table; the best weights are kept.

``tinyusfm-edge adapt`` runs it on the engine of loop.py: its run folder resumes, and holds settings, scalars and the
best weights by validation (moving average of the weights). The student file beside it is what ``evaluate`` and
``export`` read.

The recipe leaves out the defects of the official one (methods.md 1.7): layer-wise decay acts, there is one warm-up,
validation never trains, and the test split is not read at all. It does not know export or packaging.

Recipe (our choice): AdamW 0.9/0.999, weight decay on matrices only, linear warm-up and cosine decay to 1 %, BCE + soft
Dice or class-weighted cross-entropy, EMA of the weights.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from tinyusfm_edge.data.fingerprint import images_sha256
from tinyusfm_edge.data.reading import make_reading
from tinyusfm_edge.data.table import read_table
from tinyusfm_edge.evaluation.exits import ExitReport, choose_exits
from tinyusfm_edge.models.checkpoint import load_start, load_student_file, save_student
from tinyusfm_edge.models.student import ClassificationStudent, SegmentationStudent, Student, build_student
from tinyusfm_edge.models.upstream import joined
from tinyusfm_edge.training.adapt.config import AdaptConfig
from tinyusfm_edge.training.adapt.fit import BEST, preprocess_spec, train_model
from tinyusfm_edge.training.adapt.guide import Guide
from tinyusfm_edge.training.adapt.lora import TaskTeacher
from tinyusfm_edge.training.adapt.sister import SisterTeacher
from tinyusfm_edge.training.adapt.task import load_split, score
from tinyusfm_edge.training.adapt.teacher import AdaptedTeacher, AdaptTeacher, adapted_teacher, check_margin
from tinyusfm_edge.training.trainer.loop import Outcome
from tinyusfm_export.verify.reference import normalise
from tinyusfm_runtime.errors import InputError
from tinyusfm_runtime.spec import ModelSpec, PostProcess, Task

STANDARD_IMAGES = 64
"""Training images on which a teacher's channels are measured."""


def adapt(
    data: Path,
    run_folder: Path,
    config: AdaptConfig,
    labels: tuple[str, ...],
    *,
    init: Path | None = None,
    teacher: AdaptTeacher | None = None,
    against: Path | None = None,
    unlabelled: Sequence[Path] = (),
    negatives: Sequence[Path] = (),
    quiet: bool = False,
    stop_after_s: float = 0.0,
    container: str | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Outcome:
    """Runs or resumes an adaptation; with a teacher that one is adapted first.

    Args:
        data: folder with ``split.csv``.
        run_folder: of the run; a run in it is resumed.
        config: settings; must equal the run's when resuming.
        labels: names of the outputs.
        init: weights to start from, or None for random ones.
        teacher: what is distilled from, where the config asks for distillation.
        against: a student file, of labels alone, that the teacher must be better than; without one a start that has a
            trained head is that student.
        unlabelled: folders with a ``split.csv`` whose training images join the transfer set.
        negatives: folders with a ``split.csv`` of images that hold nothing to segment.
        quiet: print nothing.
        stop_after_s: seconds after which the training in progress stops at a checkpoint; 0 never.
        container: which model of a start that holds several, such as ``model_ema``.
        say: called with what was done with the start, and that a head stays random.

    Returns:
        How the run ended; ``best`` is the validation rank of the weights kept. ``steps`` below the config's means that
        it was stopped, 0 that its teacher's training was.

    Raises:
        InputError: unusable data, a teacher without distillation or the reverse, a teacher that is not better by the
            config's margin, or a run with other settings.
        CheckpointError: unusable start weights or teacher.
        MissingExtra: the training engine is not installed.
        OutputError: the folder cannot be written.
    """
    if (teacher is None) != (not config.kd):
        raise InputError("distillation and a teacher belong together: name both, or neither")
    model, start = start_student(config, init, container=container, say=say)
    known: dict[str, object] = {
        "init": start,
        "negatives": [folder.name for folder in negatives],
        "unlabelled": [folder.name for folder in unlabelled],
        "teacher": None,
    }
    guide = None
    if teacher is not None:
        place = teacher.run or run_folder / "teacher"
        found = adapted_teacher(data, place, config, labels, teacher, quiet=quiet, stop_after_s=stop_after_s)
        if not found.done:
            return Outcome(steps=0, best=None, best_step=0, images_per_s=0.0)
        known["teacher"] = {
            **found.about,
            **compare_teacher(found, data, config, labels, model=model, start=start, against=against),
        }
        guide = make_guide(found.net, data, config, labels)
    return train_model(
        model,
        data,
        run_folder,
        config,
        labels,
        start=known,
        guide=guide,
        negatives=negatives,
        unlabelled=unlabelled,
        quiet=quiet,
        stop_after_s=stop_after_s,
    )


def make_guide(net: TaskTeacher | SisterTeacher, data: Path, config: AdaptConfig, labels: tuple[str, ...]) -> Guide:
    """The distillation terms of a teacher.

    Its channels are measured on some of the training images.
    """
    torch.manual_seed(config.seed)
    guide, spec = Guide(net, config), preprocess_spec(config)
    images = load_split(data, "train", spec, config, labels, limit=STANDARD_IMAGES).images_SHW
    guide.standardise(normalise(images[start : start + 8, None].float(), spec) for start in range(0, len(images), 8))
    return guide


def compare_teacher(
    teacher: AdaptedTeacher,
    data: Path,
    config: AdaptConfig,
    labels: tuple[str, ...],
    *,
    model: nn.Module,
    start: Mapping[str, object] | None,
    against: Path | None,
) -> dict[str, object]:
    """Scores of a teacher and of the student it must be better than.

    For the run's settings.

    Args:
        teacher: trained.
        data: folder with ``split.csv``.
        config: settings.
        labels: names of the outputs.
        model: the student as it starts.
        start: what is recorded of its start.
        against: a student file to compare with, or None.

    Returns:
        ``rank`` and ``compared``: validation scores; ``compared`` is None where there is no student to compare with.

    Raises:
        InputError: the teacher is not better by the config's margin.
        CheckpointError: the student file is unusable.
    """
    segment, spec = config.student.task == "segment", preprocess_spec(config)
    pool = load_split(data, "val", spec, config, labels)
    rank = teacher.rank if teacher.rank is not None else score(teacher.net, pool, spec, segment=segment)["rank"]
    if against is not None:
        other = load_student_file(against)
        theirs = load_split(data, "val", other.spec.preprocess, config, labels)
        compared = score(other.module, theirs, other.spec.preprocess, segment=segment)["rank"]
        what = f"the student {against.name}"
    elif start is not None and not start["missing"]:
        compared, what = score(model, pool, spec, segment=segment)["rank"], "the student as it starts"
    else:
        return {"rank": round(rank, 4), "compared": None}
    check_margin(rank, compared, config.teacher_margin, what)
    return {"rank": round(rank, 4), "compared": round(compared, 4)}


def start_student(
    config: AdaptConfig,
    init: Path | None,
    *,
    container: str | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> tuple[Student, dict[str, object] | None]:
    """A student as a run starts with it, and what is recorded about its start.

    Args:
        config: settings.
        init: weights to start from, or None for random ones.
        container: which model of a checkpoint that holds several, such as ``model_ema``.
        say: called with what was done beyond plain copying, and that a head stays random.

    Raises:
        InputError: a container without a start.
        CheckpointError: unusable start weights.
    """
    if container is not None and init is None:
        raise InputError("a container is one of the models of a start: name the start (--init), or leave it out")
    torch.manual_seed(config.seed)
    model = build_student(config.student)
    if isinstance(model, SegmentationStudent):
        # the published mask head never uses the final norm: processes would wait for its gradient
        model.backbone.norm.requires_grad_(False)
    if init is None:
        return model, None
    found = load_start(model, init, container=container, say=say)
    about: dict[str, object] = {"sha256": found.sha256, "missing": len(found.missing_heads)}
    about |= {"stages": dict(found.stages)} if found.stages else {}
    return model, about | ({"origin": found.origin} if found.origin else {})


def is_first_process() -> bool:
    """Whether this process writes results.

    It is the only one, or the first of those that torchrun started.
    """
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0


def best_student(run_folder: Path, config: AdaptConfig) -> Student:
    """The student with the best weights of a finished run, in evaluation mode.

    Raises:
        InputError: the folder holds none, or those of another model.
    """
    path = run_folder / BEST
    if not path.is_file():
        raise InputError(f"{run_folder} holds no {BEST}: the run has not been evaluated yet")
    tensors = load_file(path)
    state = {name.removeprefix("model."): value for name, value in tensors.items() if name.startswith("model.")}
    model = build_student(config.student)
    wrong = set(model.state_dict()) ^ set(state)
    if isinstance(model, SegmentationStudent):
        wrong -= {"backbone.norm.weight", "backbone.norm.bias"}
    if wrong:
        raise InputError(f"{path} is of another model: {len(wrong)} names differ, first {sorted(wrong)[0]}")
    model.load_state_dict(state, strict=False)
    return model.eval()


def write_student(
    run_folder: Path,
    out: Path,
    config: AdaptConfig,
    spec: ModelSpec,
    *,
    data: Path,
    negatives: Sequence[Path] = (),
    unlabelled: Sequence[Path] = (),
) -> tuple[str, ExitReport | None]:
    """Writes the best weights of a run as a student file (float32).

    Early exits are calibrated on the validation split, and the file carries the policy.

    Args:
        run_folder: of a finished run.
        out: file to write.
        config: of the run.
        spec: what goes in and out.
        data: folder with ``split.csv``.
        negatives: folders of images that hold nothing to segment.
        unlabelled: folders of images of the transfer set.

    Returns:
        sha256 of the file, hex, and what the exits do on validation.

    Raises:
        InputError: the folder holds no weights of that network.
        OutputError: it cannot be written.
    """
    model, report = best_student(run_folder, config), None
    if isinstance(model, ClassificationStudent) and config.student.exits:
        policy, report = choose_exits(
            model, spec, read_table(data, "val", need="label", reading=make_reading(**config.reading))
        )
        spec = replace(spec, exits=policy)
    stages = _made_of(run_folder, config, {"images": [data], "negatives": negatives, "unlabelled": unlabelled})
    return save_student(out, model, spec, torch.float32, stages), report


def _made_of(run_folder: Path, config: AdaptConfig, folders: Mapping[str, Sequence[Path]]) -> dict[str, str]:
    """Stages of a run, as hashes; images are those of the training splits."""
    settings, reading = _settings(run_folder), make_reading(**config.reading)
    own = {stage: images_sha256(places, ("train",), reading) for stage, places in folders.items() if places}
    if digest := (settings.get("teacher") or {}).get("sha256"):
        own["teacher"] = str(digest)
    start = settings.get("init") or {}
    return joined(own, start.get("stages", {}), start.get("sha256", ""))


def origin_of(run_folder: Path, init: str) -> str:
    """One line of where a run's weights come from.

    Its start, and what that says of itself.

    Args:
        run_folder: of the run.
        init: the start as it was named.

    Raises:
        InputError: the folder holds no run.
    """
    stated_origin = (_settings(run_folder).get("init") or {}).get("origin", "")
    return f"tinyusfm-edge adapt from {Path(init).name}" + (f" ({stated_origin})" if stated_origin else "")


def _settings(run_folder: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads((run_folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{run_folder} holds no run: {error}") from error
    return found


def student_spec(
    config: AdaptConfig, labels: tuple[str, ...], *, name: str, postprocess: str | None = None, origin: str = "unknown"
) -> ModelSpec:
    """The spec of an adapted student.

    Args:
        config: of the run.
        labels: names of the outputs.
        name: short name.
        postprocess: what is made of the logits; a mask or nothing by default.
        origin: where its weights come from.

    Raises:
        InputError: an unknown post-processing.
    """
    task = Task(config.student.task)
    default = PostProcess.MASK if task is Task.SEGMENT else PostProcess.NONE
    known = [p.value for p in PostProcess]
    if postprocess is not None and postprocess not in known:
        raise InputError(f"post-processing {postprocess!r} is unknown: use {', '.join(known)}")
    chosen = default if postprocess is None else PostProcess(postprocess)
    return ModelSpec(
        name=name, task=task, labels=labels, preprocess=preprocess_spec(config), postprocess=chosen, origin=origin
    )


__all__ = [
    "STANDARD_IMAGES",
    "adapt",
    "best_student",
    "compare_teacher",
    "is_first_process",
    "make_guide",
    "origin_of",
    "start_student",
    "student_spec",
    "write_student",
]
