"""``tinyusfm-edge distill``: pre-trains a student on pictures without labels, with a teacher or as a plain baseline.

The same command under ``torchrun -m tinyusfm_edge distill ...`` uses many GPUs or nodes. A run that was stopped is
resumed by the same command.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from tinyusfm_edge.cli import console
from tinyusfm_edge.cli.data_folder import split_names
from tinyusfm_edge.cli.student import require


def distill(
    data: Annotated[
        str, typer.Option(help="coreset.json, or folders with or without split.csv, with commas between them.")
    ],
    out: Annotated[Path, typer.Option(help="Folder of the run; a run in it is resumed.")],
    teacher: Annotated[str | None, typer.Option(help="Teacher, such as dinov2_vits14.")] = None,
    teacher_weights: Annotated[Path | None, typer.Option(help="Its weights file, or a feature bank's folder.")] = None,
    ablation: Annotated[
        str,
        typer.Option(
            help="ours, uniform, spatial, frequency, no-reconstruction, last-layer, mae, feature-kd, dynamic-scale."
        ),
    ] = "ours",
    config: Annotated[Path | None, typer.Option(help="JSON of settings, laid over the ablation's.")] = None,
    change: Annotated[
        list[str] | None, typer.Option("--set", help="key=value laid over both, such as view.image_size=112; repeat.")
    ] = None,
    splits: Annotated[str, typer.Option(help="Splits taken from tables.")] = "train",
    cache: Annotated[Path | None, typer.Option(help="Folder for decoded pictures and teacher features.")] = None,
    frame_stride: Annotated[int, typer.Option(help="Every how manieth frame of cines and videos is taken.")] = 8,
    allow_decode_errors: Annotated[int, typer.Option(help="Files that may fail to decode; they are named.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    show_config: Annotated[bool, typer.Option("--show-config", help="Print the settings as JSON and stop.")] = False,
) -> None:
    """Pre-train a student on unlabelled pictures; leaves student.safetensors in the run's folder."""
    require("distillation", ("torch", "safetensors", "cv2", "lightning_fabric"), "train")
    from tinyusfm_edge.training.distill_config import read_config, to_json
    from tinyusfm_edge.training.pictures import list_rows
    from tinyusfm_edge.training.pretrain import STUDENT_FILE, TeacherChoice, pretrain
    from tinyusfm_runtime.errors import InputError

    settings, _ = read_config(ablation, config, change or [])
    if show_config:
        console.say(json.dumps(to_json(settings), indent=1))
        return
    if (teacher is None) != (teacher_weights is None):
        raise InputError("--teacher and --teacher-weights belong together")
    choice = TeacherChoice(name=teacher, weights=teacher_weights) if teacher and teacher_weights else None
    found = list_rows([Path(place) for place in split_names(data)], tuple(split_names(splits)))
    outcome = pretrain(
        found,
        settings,
        out,
        teacher=choice,
        cache=cache,
        frame_stride=frame_stride,
        allowed_failures=allow_decode_errors,
        device=device,
        say=console.note,
        track=console.track,
    )
    shown = ", ".join(f"{name} {value:.4f}" for name, value in outcome.scalars.items() if "rate" not in name)
    console.say(f"{out / STUDENT_FILE}: {outcome.steps} steps, {outcome.images_per_s:.1f} images/s; {shown}")
