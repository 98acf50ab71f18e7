"""A coreset: the part of a pool that is worth training on.

By clusters, distances and the gradient's course.

Puts together what others define: images.py reads, an embedder gives one vector per image, proxy.py records gradients,
``tinyusfm_calibration.select`` ranks and chooses (methods.md 1.10; re-implementation, choices ours). Beside the vectors
and gradients, which are memory-mapped, only names are held, so a pool of millions is a matter of time.

It does not know the command line or the report.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tinyusfm_calibration.clusters import Clusters, cluster
from tinyusfm_calibration.select import SelectConfig, Selection, parse_budget, select
from tinyusfm_edge.data.images import ImagePool, Listing, read_pool
from tinyusfm_edge.models.checkpoint import load_student_file
from tinyusfm_edge.models.teachers import load_teacher
from tinyusfm_edge.training.coreset.proxy import Proxy, ProxyConfig, Track, embed_pool
from tinyusfm_edge.training.pretrain.views import as_input
from tinyusfm_runtime.errors import InputError

CORESET_VERSION = 1
"""Version of ``coreset.json``."""
NEEDS_GRADIENTS = ("dual", "gradient")


@dataclass(frozen=True, kw_only=True, slots=True)
class Embedder:
    """What turns an image into a vector.

    Attributes:
        kind: ``proxy`` (the trained masked autoencoder, where there are no other weights), ``student`` or ``teacher``.
        weights: file of a student or teacher.
        teacher: the teacher's name.
    """

    kind: str = "proxy"
    weights: Path | None = None
    teacher: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Coreset:
    """What was chosen, and everything a report shows.

    Attributes:
        selection: ids and ranks.
        pool: all images.
        clusters: of the pool, or None for methods without.
        gradients_NE: trajectories, or None.
        seconds: time of each stage.
        settings: plain data that defines the choice.
        reading: how files were read, as it is typed; empty where nothing was asked for.
    """

    selection: Selection
    pool: ImagePool
    clusters: Clusters | None
    gradients_NE: np.ndarray | None
    seconds: dict[str, float] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    reading: dict[str, Any] = field(default_factory=dict)

    def to_json(self, out: Path, places: Sequence[Path], splits: Sequence[str], frame_stride: int) -> dict[str, Any]:
        """The content of ``coreset.json``; folders are written relative to it."""
        root = out.resolve().parent
        settings_hash = hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()
        return {
            **self.selection.to_json(),
            "version": CORESET_VERSION,
            "places": [os.path.relpath(place.resolve(), root) for place in places],
            "splits": list(splits),
            "frame_stride": frame_stride,
            "reading": self.reading,
            "pool": {"images": len(self.pool), "fingerprint": self.pool.fingerprint, "left_out": self.pool.left_out},
            "settings": self.settings,
            "settings_sha256": settings_hash,
            "seconds": {name: round(value, 2) for name, value in self.seconds.items()},
        }


def choose(
    found: Listing,
    budget: str,
    work: Path,
    *,
    method: str = "distance",
    embedder: Embedder | None = None,
    proxy: ProxyConfig | None = None,
    config: SelectConfig | None = None,
    stratify: bool = True,
    frame_stride: int = 8,
    allowed_failures: int = 0,
    device: str = "auto",
    track: Track = lambda items, _label, _total: items,
    say: Callable[[str], None] = lambda text: None,
) -> Coreset:
    """Chooses a coreset.

    Args:
        found: images to choose from.
        budget: a count, or a share such as ``10%``.
        work: folder for decoded images, vectors and gradients; a second call goes on from what is there.
        method: ``dual``, ``distance``, ``gradient``, ``kcentre`` or ``random``.
        embedder: what gives vectors; the proxy by default.
        proxy: how gradients are recorded.
        config: how is chosen.
        stratify: cluster each folder by itself, which stands for the organ where tables name none.
        frame_stride: every Nth frame of a cine is taken.
        allowed_failures: files that may fail to decode.
        device: ``auto``, ``cpu`` or ``cuda``.
        track: wraps slow iterations for a progress bar.
        say: called with what was read.

    Returns:
        The coreset.

    Raises:
        InputError: an unusable budget, method, pool or embedder.
        CheckpointError: unusable weights.
        CalibrationError: vectors or gradients that cannot be ranked.
        MissingExtra: a library is missing.
    """
    embedder, proxy, config = embedder or Embedder(), proxy or ProxyConfig(), config or SelectConfig()
    clock = _Clock()
    pool = _read(found, proxy.image_size, work, frame_stride, allowed_failures, track)
    clock.stop("reading")
    say(f"{len(pool)} images of {len(set(pool.groups))} groups")
    count = parse_budget(budget, len(pool))
    trained = None
    if method in NEEDS_GRADIENTS or (method != "random" and embedder.kind == "proxy"):
        trained = Proxy(pool, proxy, work / "proxy", device)
        trained.run(track)
        clock.stop("gradients")
    vectors: np.ndarray = np.zeros((len(pool), 1), np.float32)
    if method != "random":
        tokens, width, where = _tokens(embedder, trained, proxy.image_size, device)
        vectors = embed_pool(pool, tokens, width, work / "embeddings.f32", device=where, track=track)
        clock.stop("embeddings")
    clusters = None
    if method not in ("random", "kcentre"):
        kinds = pool.sources if stratify and len(set(pool.sources)) > 1 else None
        clusters = cluster(
            vectors, count=config.clusters, strata=kinds, seed=config.seed, algorithm=config.algorithm, dim=config.dim
        )
        clock.stop("clusters")
    used = trained.gradients_NE if trained is not None and method in NEEDS_GRADIENTS else None
    selection = select(vectors, pool.ids, count, method=method, gradients_NE=used, config=config, clusters=clusters)
    clock.stop("selection")
    settings = {
        "method": method,
        "budget": budget,
        "embedder": {"kind": embedder.kind, "teacher": embedder.teacher, "sha256": _sha256(embedder.weights)},
        "proxy": asdict(proxy) if trained is not None else None,
        "select": asdict(config),
        "stratify": stratify,
    }
    return Coreset(
        selection=selection,
        pool=pool,
        clusters=clusters,
        gradients_NE=used,
        seconds=clock.seconds,
        settings=settings,
        reading=found.reading.to_json(),
    )


def _read(found: Listing, size: int, work: Path, frame_stride: int, allowed_failures: int, track: Track) -> ImagePool:
    name = hashlib.sha256("\n".join([str(size), str(frame_stride), *(r.id for r in found.rows)]).encode()).hexdigest()
    return read_pool(
        found.rows,
        size,
        left_out=found.left_out,
        store=work / f"images-{name[:12]}",
        frame_stride=frame_stride,
        allowed_failures=allowed_failures,
        reading=found.reading,
        track=lambda items: iter(track(items, "images", len(found.rows))),
    )


class _Clock:
    def __init__(self) -> None:
        self.last = time.monotonic()
        self.seconds: dict[str, float] = {}

    def stop(self, stage: str) -> None:
        now = time.monotonic()
        self.seconds[stage] = now - self.last
        self.last = now


def _sha256(path: Path | None) -> str:
    return "" if path is None else hashlib.sha256(path.read_bytes()).hexdigest()


def _tokens(
    embedder: Embedder, trained: Proxy | None, size: int, device: str
) -> tuple[Callable[[Tensor], Tensor], int, torch.device]:
    """Images to patch tokens, their width, and where the network is."""
    where = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    if embedder.kind == "proxy":
        if trained is None:
            raise InputError("the proxy gives vectors once it is trained")
        backbone = trained.objective.student.backbone.eval()
        return lambda image: backbone(as_input(image))[:, 1:], trained.config.width, trained.device
    if embedder.weights is None:
        raise InputError(f"embeddings by a {embedder.kind} need its weights file")
    if embedder.kind == "student":
        student: Any = load_student_file(embedder.weights).module.to(where)
        wanted, width = student.config.image_size, student.config.width
        return lambda image: student.backbone(as_input(_resized(image, wanted)))[:, 1:], width, where
    if embedder.kind != "teacher":
        raise InputError(f"embeddings come from proxy, student or teacher, not {embedder.kind!r}")
    teacher = load_teacher(embedder.teacher, embedder.weights)
    if isinstance(teacher, torch.nn.Module):
        teacher.to(where)
    side = max(1, round(size / teacher.patch)) * teacher.patch
    return lambda image: teacher.tokens(as_input(_resized(image, side)), (teacher.depth,))[0], teacher.width, where


def _resized(image_B1HW: Tensor, size: int) -> Tensor:
    if image_B1HW.shape[-1] == size:
        return image_B1HW
    found = F.interpolate(image_B1HW, size=(size, size), mode="bilinear", align_corners=False, antialias=True)
    return found.clamp(0, 1)


__all__ = ["CORESET_VERSION", "NEEDS_GRADIENTS", "Coreset", "Embedder", "choose"]
