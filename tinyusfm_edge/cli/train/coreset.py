"""``tinyusfm-edge coreset``: chooses the part of a pool that is worth training on.

Writes it down and shows it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tinyusfm_edge.cli import console
from tinyusfm_edge.cli.data_options import check_places, reads_data
from tinyusfm_edge.cli.output import SILENT, ReportOutput, reports
from tinyusfm_edge.cli.train.settings import Changes, Config, ShowConfig, check_choice, check_settings, show
from tinyusfm_edge.data.folder import split_names
from tinyusfm_edge.data.reading import AS_IT_IS, Reading
from tinyusfm_edge.extras import require
from tinyusfm_edge.settings import build, laid_over, to_json
from tinyusfm_edge.training.trainer.lock import one_run
from tinyusfm_runtime.errors import InputError


@reports("coreset")
@reads_data
def coreset(
    images: Annotated[str, typer.Argument(help="Folders with or without split.csv, with commas between them.")],
    budget: Annotated[str, typer.Option(help="How many: a count, or a share such as 10%.")] = "10%",
    out: Annotated[Path, typer.Option(help="File to write; distill --data takes it. A page lies beside it.")] = Path(
        "coreset.json"
    ),
    method: Annotated[
        str, typer.Option(help="distance; dual adds the gradient's course; gradient, kcentre or random.")
    ] = "distance",
    student: Annotated[
        Path | None, typer.Option(help="Student whose features embed; else a teacher's, or none.")
    ] = None,
    teacher: Annotated[str | None, typer.Option(help="Teacher whose features embed, such as dinov2_vits14.")] = None,
    teacher_weights: Annotated[Path | None, typer.Option(help="Weights of the teacher.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Epochs of the scoring model. Default: 10.")] = None,
    proxy_share: Annotated[
        float | None, typer.Option(help="Fraction of images that trains the scoring model; all are scored. Default: 1.")
    ] = None,
    image_size: Annotated[int | None, typer.Option(help="Side of the scoring model's input. Default: 112.")] = None,
    alpha: Annotated[float | None, typer.Option(help="Share of the distance in the dual rank. Default: 0.5.")] = None,
    gamma: Annotated[
        float | None, typer.Option(help="1 keeps proportions between clusters, 0.5 favours small ones. Default: 1.")
    ] = None,
    oscillation: Annotated[float | None, typer.Option(help="Weight of oscillating gradients. Default: 1.")] = None,
    clusters: Annotated[int | None, typer.Option(help="Clusters. Default: the root of the pool, 8 to 1500.")] = None,
    algorithm: Annotated[str | None, typer.Option(help="sklearn (default) or faiss.")] = None,
    splits: Annotated[str, typer.Option(help="Splits taken from tables.")] = "train",
    work: Annotated[Path | None, typer.Option(help="Folder for what is computed; default beside the file.")] = None,
    frame_stride: Annotated[int, typer.Option(help="Use every Nth frame of cines and videos.")] = 8,
    allow_decode_errors: Annotated[int, typer.Option(help="Files that may fail to decode; they are named.")] = 0,
    seed: Annotated[int | None, typer.Option(help="Random seed. Default: 0.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    config: Config = None,
    change: Changes = None,
    show_config: ShowConfig = False,
    reading: Reading = AS_IT_IS,
    output: ReportOutput = SILENT,
) -> None:
    """Choose a coreset."""
    from tinyusfm_calibration.select import SELECTION_METHODS

    check_places(images)
    check_settings(config, change)
    check_choice("--method", method, SELECTION_METHODS)
    if (teacher is None) != (teacher_weights is None) or (teacher and student):
        raise InputError("embeddings come from --student, or from --teacher with --teacher-weights, or from the proxy")
    require("a coreset", ("torch", "safetensors", "cv2", "sklearn"), "train")
    from tinyusfm_calibration.select import SelectConfig
    from tinyusfm_edge.data.images import list_rows
    from tinyusfm_edge.report.coreset import coreset_page
    from tinyusfm_edge.report.page import render
    from tinyusfm_edge.training.coreset.choose import Embedder, choose
    from tinyusfm_edge.training.coreset.proxy import ProxyConfig

    data = laid_over({"select": to_json(SelectConfig()), "proxy": to_json(ProxyConfig())}, config, change)
    given: dict[str, dict[str, object]] = {
        "select": {
            "alpha": alpha, "gamma": gamma, "oscillation_weight": oscillation, "clusters": clusters,
            "algorithm": algorithm, "seed": seed,
        },
        "proxy": {"image_size": image_size, "epochs": epochs, "share": proxy_share, "seed": seed},
    }  # fmt: skip
    for part, values in given.items():
        data[part].update({name: value for name, value in values.items() if value is not None})
    if show_config:
        show(data)
        return
    page = out.with_suffix(".html")
    console.check_writable(out, "the coreset")
    console.check_writable(page, "the coreset's page")
    embedder = Embedder(
        kind="student" if student else "teacher" if teacher else "proxy",
        weights=student or teacher_weights,
        teacher=teacher or "",
    )
    places, wanted = [Path(place) for place in split_names(images)], split_names(splits)
    place = work or out.with_suffix(".work")
    with one_run(place):
        found = choose(
            list_rows(places, tuple(wanted), reading),
            budget,
            place,
            method=method,
            embedder=embedder,
            proxy=build(ProxyConfig, data["proxy"]),
            config=build(SelectConfig, data["select"]),
            frame_stride=frame_stride,
            allowed_failures=allow_decode_errors,
            device=device,
            track=console.track,
            say=console.note,
        )
    console.write_json(str(out), found.to_json(out, places, wanted, frame_stride), "the coreset")
    console.write_file(page, render(coreset_page(found)).encode(), "the coreset's page")
    chosen = found.selection
    for failure in found.pool.failures:
        console.note(f"not decoded: {failure.name} (hash of its id): {failure.reason}")
    console.say(
        f"{out}: {len(chosen.ids)} of {chosen.num_pool} images by {chosen.method} from {chosen.num_clusters} "
        f"clusters, {chosen.num_duplicates} near-duplicates skipped, {chosen.num_missing} fewer than asked for"
    )
    console.say("seconds: " + ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in found.seconds.items()))
    console.say(f"report: {page}")
    output.result(found.to_json(out, places, wanted, frame_stride))
    output.end("distill", "--data", out, "--teacher", "NAME", "--teacher-weights", "FILE", "--out", "runs/a")
