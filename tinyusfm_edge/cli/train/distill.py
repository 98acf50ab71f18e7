"""``tinyusfm-edge distill``: pre-trains a student on unlabelled images.

With a teacher, or as a plain baseline.

The same command under ``torchrun -m tinyusfm_edge distill ...`` uses many GPUs or nodes. A run that was stopped is
resumed by the same command.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tinyusfm_edge.cli import console
from tinyusfm_edge.cli.data_options import reads_data
from tinyusfm_edge.cli.output import SILENT, ReportOutput, reports
from tinyusfm_edge.cli.train.adapt import RANDOM, find_start
from tinyusfm_edge.cli.train.keys import DISTILL_KEYS, check_keys
from tinyusfm_edge.cli.train.settings import Changes, Config, ShowConfig, check_choice, show
from tinyusfm_edge.data.folder import split_names
from tinyusfm_edge.data.reading import AS_IT_IS, Reading
from tinyusfm_edge.extras import require
from tinyusfm_edge.models.upstream import SHORT_RUN
from tinyusfm_edge.settings import to_json
from tinyusfm_runtime.errors import InputError

ABLATION_NAMES = (
    "ours", "uniform", "spatial", "frequency", "no-reconstruction", "last-layer", "mae", "dino", "feature-kd",
    "dynamic-scale", "unmasked", "masked-views", "masked-targets", "raw-targets", "weights-everywhere",
    "adaptive-masks",
)  # fmt: skip
"""Named ablations, known before torch is imported; a test holds them against training/pretrain/config.py."""


@reports("distill")
@reads_data
def distill(
    data: Annotated[
        str, typer.Option(help="coreset.json, or folders with or without split.csv, with commas between them.")
    ],
    out: Annotated[Path, typer.Option(help="Folder of the run; a run in it is resumed.")],
    teacher: Annotated[str | None, typer.Option(help="Teacher, such as dinov2_vits14.")] = None,
    teacher_weights: Annotated[
        Path | None, typer.Option(help="Weights of the teacher, or a feature bank's folder.")
    ] = None,
    init: Annotated[
        str, typer.Option(help="Start: a weights file (select makes one), a run folder, a shipped student, or random.")
    ] = RANDOM,
    container: Annotated[
        str | None, typer.Option(help="Which model of a start that holds several, such as model_ema.")
    ] = None,
    ablation: Annotated[
        str,
        typer.Option(
            help="ours, uniform, spatial, frequency, no-reconstruction, last-layer, mae, dino, feature-kd, "
            "dynamic-scale, unmasked, masked-views, masked-targets, raw-targets, weights-everywhere, adaptive-masks."
        ),
    ] = "ours",
    config: Config = None,
    change: Changes = None,
    splits: Annotated[str, typer.Option(help="Splits taken from tables.")] = "train",
    cache: Annotated[Path | None, typer.Option(help="Folder for decoded images and teacher features.")] = None,
    frame_stride: Annotated[int, typer.Option(help="Use every Nth frame of cines and videos.")] = 8,
    allow_decode_errors: Annotated[int, typer.Option(help="Files that may fail to decode; they are named.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    short: Annotated[
        bool, typer.Option("--short", help="Fewer than 500 steps are meant; run and student will say so.")
    ] = False,
    minutes: Annotated[
        float, typer.Option(min=0, help="Stop at a checkpoint after so long; the same command goes on. 0: never.")
    ] = 0,
    show_config: ShowConfig = False,
    reading: Reading = AS_IT_IS,
    output: ReportOutput = SILENT,
) -> None:
    """Pre-train a student on unlabelled images.

    Leaves student.safetensors in the run's folder.
    """
    check_keys(DISTILL_KEYS, config, change)
    check_choice("--ablation", ablation, ABLATION_NAMES)
    if (teacher is None) != (teacher_weights is None):
        raise InputError("--teacher and --teacher-weights belong together")
    start = find_start(init)
    require("distillation", ("torch", "safetensors", "cv2", "lightning_fabric"), "train")
    from tinyusfm_edge.data.images import list_rows
    from tinyusfm_edge.training.pretrain.config import LEAST_STEPS, read_config
    from tinyusfm_edge.training.pretrain.run import STUDENT_FILE, DistillTeacher, pretrain

    settings, _ = read_config(ablation, config, change or [])
    if show_config:
        show(to_json(settings))
        return
    choice = DistillTeacher(name=teacher, weights=teacher_weights) if teacher and teacher_weights else None
    found = list_rows([Path(place) for place in split_names(data)], tuple(split_names(splits)), reading)
    outcome = pretrain(
        found,
        settings,
        out,
        teacher=choice,
        init=start,
        container=container,
        short=short,
        cache=cache,
        frame_stride=frame_stride,
        allowed_failures=allow_decode_errors,
        device=device,
        say=console.note,
        track=console.track,
        stop_after_s=60 * minutes,
    )
    if not (out / STUDENT_FILE).is_file():
        console.note(f"stopped at step {outcome.steps}: the same command goes on")
        return
    shown = ", ".join(f"{name} {value:.4f}" for name, value in outcome.scalars.items() if "rate" not in name)
    mark = f"{SHORT_RUN} of " if outcome.steps < LEAST_STEPS else ""
    console.say(f"{out / STUDENT_FILE}: {mark}{outcome.steps} steps, {outcome.images_per_s:.1f} images/s; {shown}")
    made = {"student": str(out / STUDENT_FILE), "steps": outcome.steps, "short": bool(mark)}
    output.result({**made, "scalars": dict(outcome.scalars)})
    output.end("adapt", "--task", "segment", "--data", "DIR", "--init", out, "--out", "mine.safetensors")


@reports("select")
def select(
    teacher_weights: Annotated[Path, typer.Option(help="safetensors of a DINOv2 ViT-S/14 (timm's names).")],
    out: Annotated[Path, typer.Option(help="Student file to write; a start for distill and adapt.")],
    heads: Annotated[int, typer.Option(help="Attention heads of the student: 12 of 16, or 3 of 64.")] = 12,
    image_size: Annotated[int, typer.Option(help="Side of its square input.")] = 224,
    output: ReportOutput = SILENT,
) -> None:
    """Select start weights for a student out of a larger ViT.

    No training takes place (weight selection).
    """
    if not teacher_weights.is_file():
        raise InputError(f"{teacher_weights} does not exist: give the teacher's safetensors file")
    require("weight selection", ("torch", "safetensors"), "torch")
    from tinyusfm_edge.models.student import StudentConfig
    from tinyusfm_edge.models.weight_selection import write_selected

    console.check_writable(out, "the student file")
    config = StudentConfig(task="features", heads=heads, image_size=image_size, drop_path=0.0)
    sha256 = write_selected(teacher_weights, out, config)
    console.say(f"{out}  {sha256[:12]}  selected out of {teacher_weights.name}")
    output.result({"student": str(out), "sha256": sha256, "teacher": teacher_weights.name})
    output.end("distill", "--init", out, "--teacher-weights", teacher_weights, "--data", "DIR", "--out", "runs/a")
