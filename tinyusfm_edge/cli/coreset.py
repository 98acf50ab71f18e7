"""``tinyusfm-edge coreset``: chooses the part of a pool that is worth training on; writes it down and shows it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tinyusfm_edge.cli import console
from tinyusfm_edge.cli.data_folder import split_names
from tinyusfm_edge.cli.student import require


def coreset(
    images: Annotated[str, typer.Argument(help="Folders with or without split.csv, with commas between them.")],
    budget: Annotated[str, typer.Option(help="How many: a count, or a share such as 10%.")] = "10%",
    out: Annotated[Path, typer.Option(help="File to write; distill --data takes it. A page lies beside it.")] = Path(
        "coreset.json"
    ),
    method: Annotated[str, typer.Option(help="dual, distance, gradient, kcentre or random.")] = "dual",
    student: Annotated[
        Path | None, typer.Option(help="Student whose features embed; else a teacher's, or none.")
    ] = None,
    teacher: Annotated[str | None, typer.Option(help="Teacher whose features embed, such as dinov2_vits14.")] = None,
    teacher_weights: Annotated[Path | None, typer.Option(help="Its weights file.")] = None,
    epochs: Annotated[int, typer.Option(help="Epochs of the proxy whose gradients are recorded.")] = 10,
    proxy_share: Annotated[float, typer.Option(help="Share of the pool that trains the proxy; all is scored.")] = 1.0,
    image_size: Annotated[int, typer.Option(help="Rows and columns of the proxy's pictures.")] = 112,
    alpha: Annotated[float, typer.Option(help="Share of the distance in the dual rank.")] = 0.5,
    gamma: Annotated[float, typer.Option(help="1 keeps the pool's proportions, 0.5 favours small clusters.")] = 1.0,
    oscillation: Annotated[float, typer.Option(help="Lambda: how much an oscillating gradient costs.")] = 1.0,
    clusters: Annotated[int | None, typer.Option(help="Clusters. Default: the root of the pool, 8 to 1500.")] = None,
    algorithm: Annotated[str, typer.Option(help="sklearn or faiss.")] = "sklearn",
    splits: Annotated[str, typer.Option(help="Splits taken from tables.")] = "train",
    work: Annotated[Path | None, typer.Option(help="Folder for what is computed; default beside the file.")] = None,
    frame_stride: Annotated[int, typer.Option(help="Every how manieth frame of cines and videos is taken.")] = 8,
    allow_decode_errors: Annotated[int, typer.Option(help="Files that may fail to decode; they are named.")] = 0,
    seed: Annotated[int, typer.Option(help="Of clusters, ties and the proxy.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Choose a coreset."""
    require("a coreset", ("torch", "safetensors", "cv2", "sklearn"), "train")
    from tinyusfm_calibration.select import METHODS, SelectConfig
    from tinyusfm_edge.report.coreset import coreset_page
    from tinyusfm_edge.report.page import render
    from tinyusfm_edge.training.coreset import Embedder, choose
    from tinyusfm_edge.training.pictures import list_rows
    from tinyusfm_edge.training.proxy import ProxyConfig
    from tinyusfm_runtime.errors import InputError

    if method not in METHODS:
        raise InputError(f"--method {method}: choose one of {', '.join(METHODS)}")
    if (teacher is None) != (teacher_weights is None) or (teacher and student):
        raise InputError("embeddings come from --student, or from --teacher with --teacher-weights, or from the proxy")
    page = out.with_suffix(".html")
    console.check_writable(out, "the coreset")
    console.check_writable(page, "the coreset's page")
    embedder = Embedder(
        kind="student" if student else "teacher" if teacher else "proxy",
        weights=student or teacher_weights,
        teacher=teacher or "",
    )
    places, wanted = [Path(place) for place in split_names(images)], split_names(splits)
    found = choose(
        list_rows(places, tuple(wanted)),
        budget,
        work or out.with_suffix(".work"),
        method=method,
        embedder=embedder,
        proxy=ProxyConfig(image_size=image_size, epochs=epochs, share=proxy_share, seed=seed),
        config=SelectConfig(
            alpha=alpha,
            gamma=gamma,
            oscillation_weight=oscillation,
            clusters=clusters,
            algorithm=algorithm,
            seed=seed,
        ),
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
        f"{out}: {len(chosen.ids)} of {chosen.num_pool} pictures by {chosen.method} from {chosen.num_clusters} "
        f"clusters, {chosen.num_duplicates} near-duplicates skipped, {chosen.num_missing} short of the budget"
    )
    console.say("seconds: " + ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in found.seconds.items()))
    console.say(f"report: {page}")
