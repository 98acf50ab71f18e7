"""``tinyusfm-edge bank``: writes the fixed views of a pool for a foreign teacher, or fills them with one of ours."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tinyusfm_edge.cli import console
from tinyusfm_edge.cli.data_folder import split_names
from tinyusfm_edge.cli.student import require


def bank(
    data: Annotated[str, typer.Option(help="coreset.json, or folders, with commas between them; as for distill.")],
    out: Annotated[Path, typer.Option(help="Folder of the bank.")],
    teacher: Annotated[
        str | None, typer.Option(help="One of our teachers, to fill the bank; else pictures only.")
    ] = None,
    teacher_weights: Annotated[Path | None, typer.Option(help="Its weights file.")] = None,
    ablation: Annotated[str, typer.Option(help="As for distill: says which views are needed.")] = "ours",
    config: Annotated[Path | None, typer.Option(help="JSON of settings, as for distill.")] = None,
    change: Annotated[list[str] | None, typer.Option("--set", help="key=value, as for distill; repeat.")] = None,
    splits: Annotated[str, typer.Option(help="Splits taken from tables.")] = "train",
    frame_stride: Annotated[int, typer.Option(help="Every how manieth frame of cines and videos is taken.")] = 8,
    allow_decode_errors: Annotated[int, typer.Option(help="Files that may fail to decode; they are named.")] = 0,
) -> None:
    """Write a feature bank: the way to learn from a teacher that cannot be imported here."""
    require("a feature bank", ("torch", "safetensors", "cv2"), "train")
    from tinyusfm_edge.training.distill_config import read_config
    from tinyusfm_edge.training.foreign_bank import write_features, write_pictures
    from tinyusfm_edge.training.pictures import list_rows
    from tinyusfm_edge.training.pretrain import TeacherChoice, describe_pool, open_pool, open_teacher
    from tinyusfm_runtime.errors import InputError

    settings, _ = read_config(ablation, config, change or [])
    if (teacher is None) != (teacher_weights is None):
        raise InputError("--teacher and --teacher-weights belong together")
    found = list_rows([Path(place) for place in split_names(data)], tuple(split_names(splits)))
    pool = open_pool(
        found,
        settings,
        out / "cache",
        frame_stride=frame_stride,
        allowed_failures=allow_decode_errors,
        track=console.track,
    )
    console.note(describe_pool(pool))
    write_pictures(
        out,
        pool,
        settings.view,
        views=settings.views,
        variants=settings.variants,
        seed=settings.view_seed,
        track=console.track,
    )
    if teacher and teacher_weights:
        features, _identity = open_teacher(TeacherChoice(name=teacher, weights=teacher_weights), settings)
        write_features(out, features, track=console.track)
        console.say(f"{out}: {len(pool) * settings.variants} views with features of {teacher}")
    else:
        first = settings.views[0]
        console.say(
            f"{out}: {len(pool) * settings.variants} views; add features-{first}-1.npy and so on, "
            "entries x h x w x width, float16, one file a view and stage"
        )
