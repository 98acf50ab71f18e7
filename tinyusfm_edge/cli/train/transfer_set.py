"""``tinyusfm-edge transfer-set``: pairs of image and mask that no patient gave.

They are for ``adapt --unlabelled``.

Made by a diffusion model or by warping, judged, and refused where they are no better than warped frames or copies.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tinyusfm_edge.cli import console
from tinyusfm_edge.cli.data_options import print_table_notes, reads_data
from tinyusfm_edge.cli.output import SILENT, ReportOutput, reports
from tinyusfm_edge.cli.train.settings import Changes, Config, ShowConfig, check_choice, check_settings, show
from tinyusfm_edge.data.reading import AS_IT_IS, Reading
from tinyusfm_edge.extras import require
from tinyusfm_edge.settings import build, laid_over, to_json
from tinyusfm_runtime.errors import GateError, InputError

if TYPE_CHECKING:
    from tinyusfm_edge.training.transfer.make import TransferSet

METHOD_NAMES = ("diffusion", "warp")


@reports("transfer-set")
@reads_data
def transfer_set(
    data: Annotated[Path, typer.Option(help="Folder with split.csv and masks; training learns, validation judges.")],
    out: Annotated[Path, typer.Option(help="Folder of the set; FOLDER.work beside it holds the run, and resumes.")],
    teacher: Annotated[str | None, typer.Option(help="Teacher whose features judge, such as dinov2_vits14.")] = None,
    teacher_weights: Annotated[Path | None, typer.Option(help="Weights of the teacher.")] = None,
    method: Annotated[
        str | None,
        typer.Option(
            rich_help_panel="Options", help="diffusion, or warp: training frames bent and speckled. Default: diffusion."
        ),
    ] = None,
    count: Annotated[int | None, typer.Option(rich_help_panel="Options", help="Pairs to make. Default: 500.")] = None,
    image_size: Annotated[
        int | None, typer.Option(metavar="SIDE", help="Rows and columns of a pair, 64 to 96 is meant. Default: 64.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, max=console.MOST, help="Steps of the diffusion model. Default: 20000.")
    ] = None,
    batch: Annotated[int | None, typer.Option(min=1, max=console.MOST, help="Pairs per step. Default: 32.")] = None,
    seed: Annotated[int | None, typer.Option(help="Random seed. Default: 0.")] = None,
    minutes: Annotated[
        float, typer.Option(min=0, help="Stop at a checkpoint after so long; the same command goes on. 0: never.")
    ] = 0,
    anyway: Annotated[
        bool, typer.Option("--anyway", help="Write a set that is refused; its table and report say so.")
    ] = False,
    config: Config = None,
    change: Changes = None,
    show_config: ShowConfig = False,
    reading: Reading = AS_IT_IS,
    output: ReportOutput = SILENT,
) -> None:
    """Make pairs of image and mask to distil on.

    They must be nearer to the validation frames than warped ones are, and no copies of training frames.
    """
    check_settings(config, change)
    check_choice("--method", method or METHOD_NAMES[0], METHOD_NAMES)
    require("a transfer set", ("torch", "safetensors", "cv2", "lightning_fabric"), "train")
    from tinyusfm_edge.training.transfer.config import TransferConfig

    settings = laid_over(to_json(TransferConfig()), config, change)
    given = {"method": method, "count": count, "image_size": image_size, "seed": seed}
    settings.update({name: value for name, value in given.items() if value is not None})
    inner = {"steps": steps, "batch": batch}
    settings["diffusion"].update({name: value for name, value in inner.items() if value is not None})
    plan = build(TransferConfig, settings)
    if show_config:
        show(to_json(plan))
        return
    if teacher is None or teacher_weights is None:
        raise InputError("a set is judged by a teacher: give --teacher dinov2_vits14 --teacher-weights FILE")
    if plan.method == "diffusion":
        require("a diffusion transfer set", ("diffusers",), "diffusion")
    print_table_notes(data, "mask", reading)
    from tinyusfm_edge.models.teachers import load_teacher
    from tinyusfm_edge.training.trainer.lock import one_run
    from tinyusfm_edge.training.transfer import make

    make.check_free(out)
    judge = load_teacher(teacher, teacher_weights)
    training, validation = (make.read_pairs(data, split, plan.image_size, reading) for split in ("train", "val"))
    work = out.with_name(f"{out.name}.work")
    with one_run(work):
        pairs = make.make_pairs(
            training,
            work,
            plan,
            quiet=console.voice.quiet,
            stop_after_s=60 * minutes,
            track=console.track,
            say=console.note,
        )
        if pairs is None:
            return
        judgement, kept = make.judge_pairs(pairs, training, validation, judge, plan, console.track)
        about = {"name": teacher, "sha256": hashlib.sha256(teacher_weights.read_bytes()).hexdigest()}
        found = make.write_set(out, kept, judgement, plan, training=training, teacher=about, anyway=anyway)
    _tell(found, out, output)
    output.end("adapt", "--task", "segment", "--data", data, "--unlabelled", out, "--transfer-share", "0.3")


def _tell(found: TransferSet, out: Path, output: ReportOutput) -> None:
    """Writes the page and says what was found.

    Raises:
        GateError: the set is refused and was not written.
        OutputError: the page cannot be written.
    """
    from tinyusfm_edge.report.page import render
    from tinyusfm_edge.report.transfer import transfer_page
    from tinyusfm_edge.training.transfer.judge import JUDGEMENT_HEADER
    from tinyusfm_edge.training.transfer.make import REPORT

    judgement = found.judgement
    console.write_file(out / REPORT, render(transfer_page(found)).encode(), "the set's page")
    console.say(console.table(JUDGEMENT_HEADER, judgement.table()))
    console.say(
        f"{judgement.drawn} pairs made, {judgement.refused} too close to a training frame, {judgement.kept} kept"
    )
    output.result(found.about)
    refused = f"the set is refused: {'; '.join(judgement.reasons)}"
    if not found.written:
        raise GateError(f"{refused}. No table was written; --anyway writes one that says so", judgement)
    if not judgement.accepted:
        console.note(f"warning: {refused}. It was written all the same")


__all__ = ["METHOD_NAMES", "transfer_set"]
