"""Makes a transfer set: reads, trains, samples, judges, writes.

What it writes is a folder that ``adapt --unlabelled`` takes.

Only the training split is learnt from; the validation split judges; the test split is not read. What takes long is kept
in a folder of work, from which the same call goes on. A set that is refused leaves its judgement and no table.

Shapes: N samples, SS rows and columns.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tinyusfm_calibration.tables import TABLE
from tinyusfm_edge.data.reading import AS_IT_IS, Reading
from tinyusfm_edge.data.table import frames_sha256, read_table, resize_mask, stack_frames
from tinyusfm_edge.models.teachers import Teacher
from tinyusfm_edge.settings import to_json
from tinyusfm_edge.training.trainer.loop import stable_seed
from tinyusfm_edge.training.transfer.config import LEAST_SAMPLES, TransferConfig
from tinyusfm_edge.training.transfer.features import FeatureScale, Track, pooled_features, untracked
from tinyusfm_edge.training.transfer.judge import Judgement, judge_set
from tinyusfm_edge.training.transfer.warped import warped_pairs
from tinyusfm_runtime.atomic import write_file
from tinyusfm_runtime.errors import InputError, OutputError
from tinyusfm_runtime.overlay import encode_png
from tinyusfm_runtime.spec import PreprocessSpec

TRANSFER_VERSION = 1
"""Version of ``transfer.json``."""
SIDECAR, REPORT = "transfer.json", "report.html"
"""What lies beside the table of a set."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pairs:
    """Images with masks.

    Attributes:
        images_NSS: uint8.
        masks_NSS: uint8 0/1.
        groups: patient of each, or empty for made ones.
        sha256: of the frames, hex, or empty.
    """

    images_NSS: np.ndarray
    masks_NSS: np.ndarray
    groups: tuple[str, ...] = ()
    sha256: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class TransferSet:
    """What was made.

    Attributes:
        pairs: those that are kept.
        judgement: of the set.
        written: whether its table was written.
        about: content of ``transfer.json``.
    """

    pairs: Pairs
    judgement: Judgement
    written: bool
    about: dict[str, Any]


def read_pairs(folder: Path, split: str, size: int, reading: Reading = AS_IT_IS) -> Pairs:
    """Frames of a split and their masks, as squares.

    Args:
        folder: holds ``split.csv``.
        split: ``train`` or ``val``.
        size: rows and columns.
        reading: how files are read.

    Raises:
        InputError: unusable data, or too few frames for a judgement.
    """
    spec = PreprocessSpec(height=size, width=size)
    samples = read_table(folder, split, need="mask", reading=reading)
    if len(samples) < LEAST_SAMPLES:
        raise InputError(f"split {split} has {len(samples)} frames with a mask, {LEAST_SAMPLES} are needed")
    return Pairs(
        images_NSS=stack_frames([sample.frame for sample in samples], spec),
        masks_NSS=np.stack([resize_mask(sample.mask_HW, sample.frame, spec) for sample in samples]),
        groups=tuple(sample.group for sample in samples),
        sha256=frames_sha256(samples),
    )


def make_pairs(
    training: Pairs,
    work: Path,
    config: TransferConfig,
    *,
    quiet: bool = False,
    stop_after_s: float = 0.0,
    track: Track = untracked,
    say: Callable[[str], None] = lambda text: None,
) -> Pairs | None:
    """Pairs by the method of the settings.

    Some more than are wanted, for those that will be refused.

        Args:
            training: frames of the training split.
            work: folder of the run; the same call goes on from what is there.
            config: settings.
            quiet: no progress of the training.
            stop_after_s: seconds after which what is done is kept and the work stops; 0 never.
            track: wraps slow iterations for a progress bar.
            say: called with what is worth a line.

        Returns:
            The pairs, or None where time ran out.

        Raises:
            InputError: a run with other settings in the folder.
            MissingExtra: diffusers is not installed.
            OutputError: the folder cannot be written.
    """
    drawn = math.ceil(config.count / (1 - config.judge.most_near))
    if config.method == "warp":
        images, masks = warped_pairs(training.images_NSS, training.masks_NSS, drawn, config.seed)
        return Pairs(images_NSS=images, masks_NSS=masks)
    from tinyusfm_edge.training.transfer.diffusion import load_diffusion, sample_pairs, train_diffusion

    end = time.monotonic() + stop_after_s if stop_after_s else math.inf
    # the loop's own settings are kept by the loop, and may be lengthened; the sampler does not shape the training
    shape = {name: getattr(config.diffusion, name) for name in ("fold", "width", "depth", "levels", "noise_levels")}
    run = work / "diffusion"
    found = train_diffusion(
        training.images_NSS,
        training.masks_NSS,
        run,
        config.diffusion,
        seed=config.seed,
        settings={"network": shape, "image_size": config.image_size, "frames": training.sha256},
        quiet=quiet,
        stop_after_s=stop_after_s,
    )
    if found.steps < config.diffusion.steps:
        say(f"stopped at step {found.steps} of {config.diffusion.steps}: the same command goes on")
        return None
    model, place = load_diffusion(run, config.image_size, config.diffusion), work / _sampling_key(training, config)
    pieces, starts = [], range(0, drawn, config.piece)
    for start in track(starts, "samples", len(starts)):
        path = place / f"{start:06d}.npz"
        piece = _read_piece(path)
        if piece is None:
            if time.monotonic() > end:
                say(f"stopped at sample {start} of {drawn}: the same command goes on")
                return None
            seed = stable_seed("piece", config.seed, start)
            piece = sample_pairs(model, min(config.piece, drawn - start), seed)
            _write_piece(path, piece)
        pieces.append(piece)
    images, masks = (np.concatenate(parts) for parts in zip(*pieces, strict=True))
    return Pairs(images_NSS=images, masks_NSS=masks)


def _sampling_key(training: Pairs, config: TransferConfig) -> str:
    """A folder's name that changes with whatever changes a sample."""
    settings = {
        "diffusion": to_json(config.diffusion),
        "size": config.image_size,
        "seed": config.seed,
        "piece": config.piece,
        "drawn": math.ceil(config.count / (1 - config.judge.most_near)),
        "frames": training.sha256,
    }
    return "samples-" + hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


def _read_piece(path: Path) -> tuple[np.ndarray, np.ndarray] | None:
    try:
        with np.load(path, allow_pickle=False) as data:
            return data["images"], data["masks"]
    except (OSError, ValueError, KeyError, EOFError):
        return None


def _write_piece(path: Path, piece: tuple[np.ndarray, np.ndarray]) -> None:
    held = io.BytesIO()
    np.savez_compressed(held, images=piece[0], masks=piece[1])
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{path.parent} cannot be made: {error.strerror}") from error
    write_file(path, held.getvalue(), "samples")


def judge_pairs(
    made: Pairs, training: Pairs, validation: Pairs, teacher: Teacher, config: TransferConfig, track: Track = untracked
) -> tuple[Judgement, Pairs]:
    """Judges pairs by a teacher's features.

    Leaves out what is too close to a training frame.

        Args:
            made: as they came.
            training: what they were made from.
            validation: frames of other patients.
            teacher: frozen.
            config: settings.
            track: wraps slow iterations for a progress bar.

        Returns:
            The judgement and the kept pairs, ``config.count`` at most.

        Raises:
            InputError: a patient in both splits, or too few frames.
    """
    shared = set(training.groups) & set(validation.groups)
    if shared:
        raise InputError(f"{len(shared)} patients stand in the training and the validation split: deal them out whole")
    warped = warped_pairs(training.images_NSS, training.masks_NSS, config.count, config.seed)[0]
    if config.method == "warp":
        warped = made.images_NSS
    size = config.judge.teacher_size
    raw = [
        pooled_features(teacher, images, size, track)
        for images in (training.images_NSS, validation.images_NSS, made.images_NSS, warped)
    ]
    standard = FeatureScale.of(raw[0])
    seen, held, own, bent = (standard(part) for part in raw)
    judgement, keep = judge_set(config.method, own, bent, seen, held, config.judge, wanted=config.count)
    rows = np.flatnonzero(keep)[: config.count]
    return judgement, Pairs(images_NSS=made.images_NSS[rows], masks_NSS=made.masks_NSS[rows])


def write_set(
    out: Path,
    pairs: Pairs,
    judgement: Judgement,
    config: TransferConfig,
    *,
    training: Pairs,
    teacher: dict[str, str],
    anyway: bool = False,
) -> TransferSet:
    """Writes a set, or its judgement alone where it is refused.

    Args:
        out: folder; one that holds another table is refused.
        pairs: those that are kept.
        judgement: of the set.
        config: settings.
        training: what they were made from.
        teacher: name and hash of what judged.
        anyway: write a refused set too; its sidecar says that it was refused.

    Returns:
        What was written.

    Raises:
        InputError: the folder holds a table that is no transfer set.
        OutputError: the folder cannot be written.
    """
    check_free(out)
    written = judgement.accepted or (anyway and len(pairs.images_NSS) > 0)
    about = {
        "version": TRANSFER_VERSION,
        "written": written,
        "anyway": written and not judgement.accepted,
        **judgement.to_json(),
        "settings": to_json(config),
        "training": {
            "frames": len(training.images_NSS),
            "groups": len(set(training.groups)),
            "sha256": training.sha256,
        },
        "teacher": teacher,
    }
    try:
        (out / TABLE).unlink(missing_ok=True)
        for part in ("images", "masks"):
            shutil.rmtree(out / part, ignore_errors=True)
            if written:
                (out / part).mkdir(parents=True)
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{out} cannot be made: {error.strerror}") from error
    write_file(out / SIDECAR, (json.dumps(about, indent=1, sort_keys=True) + "\n").encode(), "the judgement")
    if written:
        _write_table(out, pairs, judgement)
    return TransferSet(pairs=pairs, judgement=judgement, written=written, about=about)


def check_free(out: Path) -> None:
    """Refuses a folder whose table is no transfer set.

    Raises:
        InputError: it holds one.
    """
    if (out / TABLE).exists() and not (out / SIDECAR).exists():
        raise InputError(f"{out} holds a {TABLE} that is no transfer set: choose another folder")


def _write_table(out: Path, pairs: Pairs, judgement: Judgement) -> None:
    """Images, masks, and last of all the table."""
    held = io.StringIO()
    writer = csv.writer(held, lineterminator="\n")
    writer.writerow(("file", "mask", "split", "group", "made_by", "accepted"))
    for number, (image, mask) in enumerate(zip(pairs.images_NSS, pairs.masks_NSS, strict=True)):
        name = f"{number:06d}.png"
        write_file(out / "images" / name, encode_png(np.ascontiguousarray(image)), "an image")
        write_file(out / "masks" / name, encode_png(mask * np.uint8(255)), "a mask")
        accepted = "yes" if judgement.accepted else "no"
        made = f"made-{number:06d}"
        writer.writerow((f"images/{name}", f"masks/{name}", "train", made, judgement.method, accepted))
    write_file(out / TABLE, held.getvalue().encode(), "the table")


__all__ = [
    "REPORT",
    "SIDECAR",
    "TRANSFER_VERSION",
    "Pairs",
    "TransferSet",
    "check_free",
    "judge_pairs",
    "make_pairs",
    "read_pairs",
    "write_set",
]
