"""How much junk a coreset takes out of a bad pool, by method and budget.

Nothing is trained but the scoring model.

``python benchmarks/bad_pool.py --data DATA --teacher-weights FILE`` puts junk beside good frames (HC18, breast, lung
and muscle training frames): blank, inverted, overlaid and JPEG-ruined ones, and cine neighbours, three for each good
one. It prints the share of junk among what each method chooses at 2, 5 and 10 %. A neighbour is junk only where its
original, or an earlier neighbour of it, is chosen too. Embeddings are the teacher's, or the scoring model's without it.
``--chosen FOLDER`` writes what each method chooses at 10 %, one folder of images a method: the arms ``bad-METHOD`` of
experiments_mended.toml learn from them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F

from tinyusfm_calibration.clusters import cluster
from tinyusfm_calibration.select import SELECTION_METHODS, SelectConfig, select
from tinyusfm_edge.data.images import ImagePool, list_rows, read_pool
from tinyusfm_edge.models.teachers import load_teacher
from tinyusfm_edge.training.coreset.proxy import Proxy, ProxyConfig, embed_pool
from tinyusfm_edge.training.pretrain.views import as_input
from tinyusfm_runtime.atomic import write_file
from tinyusfm_runtime.errors import EdgeError
from tinyusfm_runtime.overlay import encode_png

FOLDERS = ("hc18", "busi", "pocus_lung", "timtrack_muscle")
"""Data sets of the good frames, below ``--data``."""
KINDS = ("neighbour", "blank", "inverted", "overlay", "jpeg")
"""Of what stands beside them."""
BUDGETS = (0.02, 0.05, 0.10)
WRITTEN = 0.10
"""The budget of the images that are written."""


def neighbour(image_SS: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The next frame of a cine: moved by less than a pixel or two, other noise."""
    shift = np.array([[1, 0, rng.uniform(-1.5, 1.5)], [0, 1, rng.uniform(-1.5, 1.5)]], np.float32)
    moved = cv2.warpAffine(image_SS, shift, image_SS.shape[::-1], borderMode=cv2.BORDER_REPLICATE)
    noisy = moved.astype(np.float32) * (1 + 0.03 * rng.standard_normal(image_SS.shape))
    return np.clip(noisy, 0, 255).astype(np.uint8)


def blank(image_SS: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A probe in the air: reverberation near the top at best, noise, and nothing."""
    depth = np.linspace(0, 1, image_SS.shape[0])[:, None]
    level = rng.uniform(0, 40) + rng.uniform(0, 120) * np.exp(-depth / rng.uniform(0.02, 0.08))
    return np.clip(level + rng.uniform(0, 4) * rng.standard_normal(image_SS.shape), 0, 255).astype(np.uint8)


def inverted(image_SS: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """White for black, as of a wrong photometric interpretation."""
    return 255 - image_SS


def overlay(image_SS: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A screen full of writing, lines and a menu over the image."""
    canvas = np.ascontiguousarray(image_SS // 2)
    side = len(canvas)
    menu = int(rng.uniform(0.2, 0.45) * side)
    canvas[:, :menu] = rng.integers(20, 90)
    for _ in range(int(rng.integers(8, 16))):
        text = "".join(rng.choice(list("ABCDEFGHKLMNPRST0123456789 .:/"), int(rng.integers(4, 14))))
        place = (int(rng.uniform(0, 0.7) * side), int(rng.uniform(0.05, 1) * side))
        cv2.putText(canvas, text, place, cv2.FONT_HERSHEY_SIMPLEX, side / 320, int(rng.integers(180, 256)), 1)
    for _ in range(int(rng.integers(2, 6))):
        ends = (rng.uniform(0, side, (2, 2))).astype(int).tolist()
        cv2.line(canvas, tuple(ends[0]), tuple(ends[1]), int(rng.integers(180, 256)), 1)
    return canvas


def jpeg(image_SS: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Written as JPEG of the lowest qualities, at half the size."""
    small = cv2.resize(image_SS, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
    coded = cv2.imencode(".jpg", small, [cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(1, 6))])[1]
    decoded = cv2.imdecode(coded, cv2.IMREAD_GRAYSCALE)
    assert decoded is not None, "what was just encoded"
    found: np.ndarray = cv2.resize(decoded, image_SS.shape[::-1], interpolation=cv2.INTER_NEAREST)
    return found


@dataclass(frozen=True, kw_only=True, slots=True)
class BadPool:
    """A pool and the truth about it.

    Attributes:
        pool: good frames first.
        kinds: ``good`` or one of ``KINDS``.
        origin_N: row of the good frame that each was made of.
    """

    pool: ImagePool
    kinds: tuple[str, ...]
    origin_N: np.ndarray


def make_bad_pool(good_NSS: np.ndarray, per_good: float, seed: int) -> BadPool:
    """Puts junk beside good frames, its kinds in equal parts.

    Args:
        good_NSS: uint8.
        per_good: frames of junk for each good one.
        seed: of everything.
    """
    rng = np.random.default_rng([seed, 5])
    makers = {"neighbour": neighbour, "blank": blank, "inverted": inverted, "overlay": overlay, "jpeg": jpeg}
    images, kinds, origins = list(good_NSS), ["good"] * len(good_NSS), list(range(len(good_NSS)))
    for kind in KINDS:
        for _ in range(round(per_good * len(good_NSS) / len(KINDS))):
            origin = int(rng.integers(len(good_NSS)))
            images.append(makers[kind](good_NSS[origin], rng))
            kinds.append(kind)
            origins.append(origin)
    pixels = np.stack(images)
    # names tell nothing: ties are broken by their hash
    ids = tuple(hashlib.sha256(f"{seed}:{number}".encode()).hexdigest()[:16] for number in range(len(pixels)))
    pool = ImagePool(
        ids=ids,
        groups=ids,
        sources=("pool",) * len(ids),
        pixels_NSS=pixels,
        failures=(),
        left_out={},
        fingerprint=hashlib.sha256(pixels.tobytes()).hexdigest(),
    )
    return BadPool(pool=pool, kinds=tuple(kinds), origin_N=np.array(origins))


def junk_rows(bad: BadPool, rows_M: np.ndarray) -> dict[str, int]:
    """Junk among chosen rows, by kind.

    A neighbour counts only where another frame of its cine is chosen before it, or its original is.
    """
    counts = dict.fromkeys(KINDS, 0)
    chosen = [int(row) for row in rows_M]
    seen = {int(bad.origin_N[row]) for row in chosen if bad.kinds[row] == "good"}
    for row in chosen:
        kind, origin = bad.kinds[row], int(bad.origin_N[row])
        if kind == "neighbour":
            counts[kind] += origin in seen
            seen.add(origin)
        elif kind != "good":
            counts[kind] += 1
    return counts


def write_chosen(bad: BadPool, rows_M: np.ndarray, folder: Path) -> None:
    """Writes chosen frames as PNG; their names tell nothing.

    Raises:
        OutputError: a file cannot be written.
        OSError: the folder cannot be made.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for row in rows_M:
        write_file(folder / f"{bad.pool.ids[int(row)]}.png", encode_png(bad.pool.pixels_NSS[int(row)]))


def measure(
    bad: BadPool, vectors_ND: np.ndarray, gradients_NE: np.ndarray, seed: int, chosen_in: Path | None = None
) -> list[dict[str, Any]]:
    """Share of junk for every method and budget.

    Args:
        bad: the pool.
        vectors_ND: embeddings.
        gradients_NE: of the scoring model, by epoch.
        seed: of clusters and choices.
        chosen_in: folder for the frames that each method chooses at ``WRITTEN``, or None.
    """
    config = SelectConfig(seed=seed)
    clusters = cluster(vectors_ND, seed=seed, algorithm=config.algorithm, dim=config.dim)
    found = []
    for method in SELECTION_METHODS:
        for budget in BUDGETS:
            wanted = max(1, round(budget * len(bad.pool)))
            chosen = select(
                vectors_ND, bad.pool.ids, wanted, method=method, gradients_NE=gradients_NE, config=config,
                clusters=clusters,
            ).rows_M  # fmt: skip
            if chosen_in is not None and budget == WRITTEN:
                write_chosen(bad, chosen, chosen_in / method)
            kinds = junk_rows(bad, chosen)
            found.append(
                {"method": method, "budget": budget, "chosen": len(chosen), "share": sum(kinds.values()) / len(chosen)}
                | {kind: count / len(chosen) for kind, count in kinds.items()}
            )
    return found


def good_frames(data: Path, count: int, size: int, seed: int) -> np.ndarray:
    """Training frames of all data sets, a seeded choice."""
    rows = list_rows([data / name for name in FOLDERS], ("train",)).rows
    picked = np.random.default_rng([seed, 3]).permutation(len(rows))[:count]
    return read_pool([rows[index] for index in sorted(picked)], size).pixels_NSS


def teacher_vectors(bad: BadPool, weights: Path, folder: Path) -> np.ndarray:
    """Mean patch tokens of DINOv2 ViT-S/14."""
    teacher = load_teacher("dinov2_vits14", weights)
    side = max(1, round(bad.pool.pixels_NSS.shape[1] / teacher.patch)) * teacher.patch

    def tokens(image_B1HW: torch.Tensor) -> torch.Tensor:
        shown = F.interpolate(image_B1HW, size=(side, side), mode="bilinear", align_corners=False, antialias=True)
        return teacher.tokens(as_input(shown.clamp(0, 1)), (teacher.depth,))[0]

    return embed_pool(bad.pool, tokens, teacher.width, folder / "teacher.f32", device=torch.device("cpu"))


def proxy_vectors(bad: BadPool, proxy: Proxy, folder: Path) -> np.ndarray:
    """Mean patch tokens of the scoring model."""
    backbone = proxy.objective.student.backbone.eval()
    width = proxy.config.width
    return embed_pool(bad.pool, lambda image: backbone(as_input(image))[:, 1:], width, folder / "proxy.f32")


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--teacher-weights", type=Path, default=None, help="DINOv2 ViT-S/14")
    parser.add_argument("--good", type=int, default=1508, help="good frames")
    parser.add_argument("--per-good", type=float, default=3.0, help="frames of junk for a good one")
    parser.add_argument("--image-size", type=int, default=112)
    parser.add_argument("--epochs", type=int, default=10, help="of the scoring model")
    parser.add_argument("--depth", type=int, default=12, help="blocks of the scoring model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--chosen", type=Path, default=None, metavar="FOLDER", help="folder for the chosen frames")
    options = parser.parse_args(arguments)
    try:
        good = good_frames(options.data, options.good, options.image_size, options.seed)
        bad = make_bad_pool(good, options.per_good, options.seed)
        share = sum(kind != "good" for kind in bad.kinds) / len(bad.pool)
        print(f"{len(bad.pool)} frames, {share:.1%} of them junk or neighbours", flush=True)
        settings = ProxyConfig(
            image_size=options.image_size, epochs=options.epochs, depth=options.depth, seed=options.seed
        )
        with tempfile.TemporaryDirectory() as name:
            proxy = Proxy(bad.pool, settings, Path(name) / "proxy", "cpu")
            gradients = proxy.run(lambda items, _label, _total: items)
            vectors = (
                proxy_vectors(bad, proxy, Path(name))
                if options.teacher_weights is None
                else teacher_vectors(bad, options.teacher_weights, Path(name))
            )
            found = measure(bad, vectors, np.array(gradients), options.seed, options.chosen)
    except EdgeError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(f"{'method':10s}{'budget':>8s}{'chosen':>8s}{'junk':>8s}" + "".join(f"{kind:>11s}" for kind in KINDS))
    for row in found:
        parts = "".join(f"{row[kind]:11.1%}" for kind in KINDS)
        print(f"{row['method']:10s}{row['budget']:8.0%}{row['chosen']:8d}{row['share']:8.1%}{parts}")
    if options.json is not None:
        options.json.write_text(json.dumps({"pool": len(bad.pool), "rows": found}, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
