"""``tinyusfm-edge bank``: the fixed views of a pool, and their features.

Writes the views for a foreign teacher, or fills them with one of ours.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tinyusfm_edge.cli import console
from tinyusfm_edge.cli.data_options import reads_data
from tinyusfm_edge.cli.output import SILENT, ReportOutput, reports
from tinyusfm_edge.cli.train.distill import ABLATION_NAMES
from tinyusfm_edge.cli.train.keys import DISTILL_KEYS, check_keys
from tinyusfm_edge.cli.train.settings import Changes, Config, ShowConfig, check_choice, show
from tinyusfm_edge.data.folder import split_names
from tinyusfm_edge.data.reading import AS_IT_IS, Reading
from tinyusfm_edge.extras import require
from tinyusfm_edge.settings import to_json
from tinyusfm_edge.training.trainer.lock import one_run
from tinyusfm_runtime.errors import InputError


@reports("bank")
@reads_data
def bank(
    data: Annotated[str, typer.Option(help="coreset.json, or folders, with commas between them; as for distill.")],
    out: Annotated[Path, typer.Option(help="Folder of the bank.")],
    teacher: Annotated[
        str | None, typer.Option(help="One of our teachers, to fill the bank; else images only.")
    ] = None,
    teacher_weights: Annotated[Path | None, typer.Option(help="Weights of the teacher.")] = None,
    ablation: Annotated[str, typer.Option(help="As for distill: says which views are needed.")] = "ours",
    config: Config = None,
    change: Changes = None,
    show_config: ShowConfig = False,
    splits: Annotated[str, typer.Option(help="Splits taken from tables.")] = "train",
    frame_stride: Annotated[int, typer.Option(help="Use every Nth frame of cines and videos.")] = 8,
    allow_decode_errors: Annotated[int, typer.Option(help="Files that may fail to decode; they are named.")] = 0,
    reading: Reading = AS_IT_IS,
    output: ReportOutput = SILENT,
) -> None:
    """Write a feature bank for a teacher that cannot be imported here.

    It is the way to learn from such a teacher.
    """
    check_keys(DISTILL_KEYS, config, change)
    check_choice("--ablation", ablation, ABLATION_NAMES)
    if (teacher is None) != (teacher_weights is None):
        raise InputError("--teacher and --teacher-weights belong together")
    require("a feature bank", ("torch", "safetensors", "cv2"), "train")
    from tinyusfm_edge.data.images import list_rows
    from tinyusfm_edge.training.pretrain.config import read_config
    from tinyusfm_edge.training.pretrain.foreign_bank import write_features, write_images
    from tinyusfm_edge.training.pretrain.run import DistillTeacher, describe_pool, open_pool, open_teacher

    settings, _ = read_config(ablation, config, change or [])
    if show_config:
        show(to_json(settings))
        return
    with one_run(out):
        found = list_rows([Path(place) for place in split_names(data)], tuple(split_names(splits)), reading)
        pool = open_pool(
            found,
            settings,
            out / "cache",
            frame_stride=frame_stride,
            allowed_failures=allow_decode_errors,
            track=console.track,
        )
        console.note(describe_pool(pool))
        write_images(
            out,
            pool,
            settings.view,
            views=settings.teacher_views,
            variants=settings.variants,
            seed=settings.view_seed,
            track=console.track,
        )
        if teacher and teacher_weights:
            features, _identity = open_teacher(DistillTeacher(name=teacher, weights=teacher_weights), settings)
            write_features(out, features, track=console.track)
            console.say(f"{out}: {len(pool) * settings.variants} views with features of {teacher}")
        else:
            first = settings.teacher_views[0]
            console.say(
                f"{out}: {len(pool) * settings.variants} views; add features-{first}-1.npy and so on, "
                "entries x h x w x width, float16, one file per view and stage"
            )
    output.result({"bank": str(out), "images": len(pool), "variants": settings.variants, "teacher": teacher})
    output.end("distill", "--teacher", "feature_bank", "--teacher-weights", out, "--data", data, "--out", "runs/a")
