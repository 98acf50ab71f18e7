"""Embeddings: one vector per image, gathered from a stream.

Checked, normalised and projected, chunk by chunk.

A pool of millions is a matrix on disk (``numpy.memmap``) that no function here copies: what passes over it holds one
chunk of rows. It does not know what a vector shows or how it was computed.

Shapes: N images, D numbers of a vector, P numbers after the projection, B rows of a chunk.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Final, TypeVar

import numpy as np

from tinyusfm_runtime.errors import CalibrationError

PCA_DIM: Final = 128
"""Directions kept (our choice; US-Metrics, arXiv:2604.19512, keeps as many of concatenated tokens)."""

CHUNK_ROWS: Final = 8192
"""Rows handled at once: 13 MB of float64 at 192 numbers a row."""

Item = TypeVar("Item")


@dataclass(frozen=True, kw_only=True, slots=True)
class Projection:
    """Principal directions of unit vectors.

    Attributes:
        mean_D: float32 mean of the normalised rows.
        basis_DP: float32 orthonormal directions, strongest first.
        kept: share of the variance that they hold, 0..1.
    """

    mean_D: np.ndarray
    basis_DP: np.ndarray
    kept: float

    def apply(self, rows_BD: np.ndarray) -> np.ndarray:
        """Projects rows.

        Args:
            rows_BD: raw embeddings.

        Returns:
            float32 (B, P).

        Raises:
            CalibrationError: NaN, infinity or a row without direction.
        """
        projected: np.ndarray = (unit_rows(rows_BD) - self.mean_D) @ self.basis_DP
        return projected


def gather(
    items: Iterable[Item], embed: Callable[[list[Item]], np.ndarray], name: Callable[[Item], str], *, batch: int = 32
) -> tuple[list[str], np.ndarray]:
    """Runs an embedder over a stream and keeps names and vectors alone.

    An image is dropped with its batch.

    Args:
        items: the stream.
        embed: a batch of items -> their vectors, one row each.
        name: an item's identity.
        batch: items embedded together.

    Returns:
        Identities and float32 (N, D).

    Raises:
        CalibrationError: an empty stream, an identity that comes twice, or another number of rows than items.
    """
    stream, names, blocks = iter(items), list[str](), list[np.ndarray]()
    while taken := list(islice(stream, batch)):
        rows_BD = np.asarray(embed(taken), np.float32)
        if rows_BD.ndim != 2 or len(rows_BD) != len(taken):
            raise CalibrationError(f"the embedder gave an array of shape {rows_BD.shape} for {len(taken)} images")
        names += [name(item) for item in taken]
        blocks.append(rows_BD)
    check_ids(names)
    return names, np.concatenate(blocks)


def check_ids(ids: Sequence[str]) -> None:
    """Checks that every image has a name of its own.

    Raises:
        CalibrationError: none at all, or a name that comes twice.
    """
    if not len(ids):
        raise CalibrationError("no images: nothing can be clustered or chosen")
    if len(set(ids)) != len(ids):
        raise CalibrationError(f"{len(ids) - len(set(ids))} images share their name with another one: name each once")


def unit_rows(rows_BD: np.ndarray) -> np.ndarray:
    """Rows of length one.

    Args:
        rows_BD: embeddings.

    Returns:
        float32 (B, D).

    Raises:
        CalibrationError: NaN, infinity or a row without direction.
    """
    rows = np.asarray(rows_BD, np.float32)
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    bad = ~np.isfinite(lengths[:, 0]) | (lengths[:, 0] == 0.0)
    if bad.any():
        raise CalibrationError(
            f"{int(bad.sum())} embeddings hold NaN, infinity or only zeros (first in row {int(np.argmax(bad))} of its "
            "chunk): leave those images out"
        )
    unit: np.ndarray = rows / lengths
    return unit


def chunks(count: int, rows: int = CHUNK_ROWS) -> Iterator[slice]:
    """Consecutive slices that cover ``count`` rows."""
    return (slice(start, min(start + rows, count)) for start in range(0, count, rows))


def fit_projection(embeddings_ND: np.ndarray, *, dim: int = PCA_DIM, chunk: int = CHUNK_ROWS) -> Projection:
    """Finds the principal directions in one pass.

    Exact, from the covariance, so no order or seed matters.

    Args:
        embeddings_ND: raw embeddings, in memory or mapped.
        dim: directions wanted; fewer where there are fewer rows or numbers.
        chunk: rows handled at once.

    Returns:
        The projection; each direction's largest number is positive.

    Raises:
        CalibrationError: fewer than two rows, or a row that is no vector.
    """
    count, width = embeddings_ND.shape
    if count < 2:
        raise CalibrationError("one embedding has no principal directions: give at least two images")
    total_D, products_DD = np.zeros(width), np.zeros((width, width))
    for part in chunks(count, chunk):
        rows_BD = unit_rows(embeddings_ND[part]).astype(np.float64)
        total_D += rows_BD.sum(0)
        products_DD += rows_BD.T @ rows_BD
    mean_D = total_D / count
    values_D, vectors_DD = np.linalg.eigh(products_DD / count - np.outer(mean_D, mean_D))
    values_D = np.clip(values_D[::-1], 0.0, None)
    basis_DP = vectors_DD[:, ::-1][:, : min(dim, width, count)]
    largest_P = basis_DP[np.abs(basis_DP).argmax(0), np.arange(basis_DP.shape[1])]
    kept = float(values_D[: basis_DP.shape[1]].sum() / values_D.sum()) if values_D.sum() > 0 else 1.0
    return Projection(
        mean_D=mean_D.astype(np.float32), basis_DP=(basis_DP * np.sign(largest_P)).astype(np.float32), kept=kept
    )


def id_keys(ids: Sequence[str], seed: int = 0) -> np.ndarray:
    """A number for each name, the same on every machine and in every order.

    It is what breaks ties.

    Args:
        ids: names.
        seed: another seed gives another order.

    Returns:
        uint64 (N,), the first 8 bytes of sha256 of seed and name.
    """
    keys = (hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8] for name in ids)
    return np.fromiter((int.from_bytes(key, "big") for key in keys), np.uint64, len(ids))


__all__ = [
    "CHUNK_ROWS",
    "PCA_DIM",
    "Item",
    "Projection",
    "check_ids",
    "chunks",
    "fit_projection",
    "gather",
    "id_keys",
    "unit_rows",
]
