"""Pictures to learn from without labels: folders, tables, DICOM and video -> one array of square grey pictures.

Everything is decoded once, through the runtime's sources and its preprocessing, to uint8 squares that stay in memory or
in one memory-mapped file; training then never decodes. A folder without a table is searched for every file that a
source reads. Flagged rows are left out and counted. A file that cannot be decoded is named by a hash, counted, and
stops the reading unless so many failures were allowed: nothing is skipped silently.

It does not know crops, masks or models.

Shapes: N pictures, SS rows and columns.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tinyusfm_calibration.tables import TABLE, Row, clean, read_table_rows
from tinyusfm_runtime.errors import EdgeError, InputError, MissingExtra, OutputError, SourceError
from tinyusfm_runtime.frame import Frame
from tinyusfm_runtime.preprocess import preprocess
from tinyusfm_runtime.sources import open_source
from tinyusfm_runtime.spec import PreprocessSpec

STORE_VERSION = 1
"""Version of a stored pool's ``pool.json``."""
CINE_SUFFIXES = frozenset({".dcm", ".dicom", ".mp4", ".mov", ".avi", ".mkv", ".webm"})
"""Files that may hold many frames."""
PICTURE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff"})


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """A file that could not be decoded.

    Attributes:
        name: first 12 hex digits of the sha256 of its id, as ``Row.name``.
        reason: one line, without file names.
    """

    name: str
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Pool:
    """Decoded pictures.

    Attributes:
        ids: one a picture, unique; frames of a cine carry ``#INDEX``.
        groups: patient or file of each.
        sources: folder of each.
        pixels_NSS: uint8, in memory or memory-mapped.
        failures: what could not be decoded.
        left_out: rows left out, by flag.
        fingerprint: sha256 over ids and pixels, hex.
    """

    ids: tuple[str, ...]
    groups: tuple[str, ...]
    sources: tuple[str, ...]
    pixels_NSS: np.ndarray
    failures: tuple[Failure, ...]
    left_out: dict[str, int]
    fingerprint: str

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, kw_only=True, slots=True)
class Listing:
    """What there is to read.

    Attributes:
        rows: files in order.
        left_out: flagged rows left out, by flag.
        only: ids to keep of what the files hold (frames of cines), or None for all.
        frame_stride: the stride a coreset was made with, or None.
    """

    rows: list[Row]
    left_out: dict[str, int]
    only: frozenset[str] | None = None
    frame_stride: int | None = None


def list_rows(places: Sequence[Path], splits: Sequence[str] = ("train",)) -> Listing:
    """Rows of folders with or without tables, flagged ones left out.

    Args:
        places: folders with ``split.csv`` (of which ``splits`` are taken), folders of pictures, cines and videos, which
            are searched through, or ``coreset.json`` files.
        splits: splits taken from tables.

    Returns:
        Rows in order, and what was left out.

    Raises:
        InputError: nothing usable there, or two places share ids.
    """
    found: list[Row] = []
    left_out: Counter[str] = Counter()
    if any(place.suffix == ".json" for place in places):
        if len(places) > 1:
            raise InputError("a coreset stands alone: it names its folders itself")
        return _coreset_listing(places[0])
    for place in places:
        if (place / TABLE).is_file():
            rows = [row for row in read_table_rows(place) if row.split in splits]
        elif place.is_dir():
            rows = list(_search(place))
        else:
            raise InputError(f"no data at {place}: give a folder or a coreset.json")
        if not rows:
            raise InputError(f"{place} has no picture in split {' or '.join(splits)}")
        kept, counts = clean(rows)
        found += kept
        left_out.update(counts)
    if len({row.id for row in found}) != len(found):
        raise InputError("two data folders of one name hold files of one name: rename a folder")
    return Listing(rows=found, left_out=dict(left_out))


def _search(folder: Path) -> Iterator[Row]:
    from tinyusfm_runtime.sources.folder import natural_key

    paths = [p for p in folder.rglob("*") if p.suffix.lower() in PICTURE_SUFFIXES | CINE_SUFFIXES and p.is_file()]
    for path in sorted(paths, key=lambda p: (str(p.parent), natural_key(p))):
        inside = path.relative_to(folder).as_posix()
        if not any(part.startswith(".") for part in path.relative_to(folder).parts):
            yield Row(id=f"{folder.name}/{inside}", path=path, group=f"{folder.name}/{inside}", source=folder.name)


def _coreset_listing(path: Path) -> Listing:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["version"] != 1:
            raise InputError(f"{path} is a coreset of version {data['version']!r}; this release reads 1")
        places = [path.parent / place for place in data["places"]]
        chosen = frozenset(item["id"] for item in data["chosen"])
        stride = int(data["frame_stride"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is no coreset: {error}") from error
    rows = list_rows(places, tuple(data["splits"])).rows
    files = {identity.partition("#")[0] for identity in chosen}
    kept = [row for row in rows if row.id in files]
    if len(kept) != len(files):
        raise InputError(f"{path} names {len(files) - len(kept)} pictures that its folders no longer hold")
    return Listing(rows=kept, left_out={}, only=chosen, frame_stride=stride)


def read_pool(
    rows: Sequence[Row],
    size: int,
    *,
    left_out: dict[str, int] | None = None,
    store: Path | None = None,
    frame_stride: int = 8,
    allowed_failures: int = 0,
    only: frozenset[str] | None = None,
    track: Callable[[Iterator[Row]], Iterator[Row]] = lambda rows: rows,
) -> Pool:
    """Decodes pictures to squares.

    Args:
        rows: what to read.
        size: rows and columns of the squares.
        left_out: counts to carry along.
        store: a folder to write the squares to and map them from, or None for memory; one with the same rows is reused.
        frame_stride: every how manieth frame of a cine or video is taken.
        allowed_failures: files that may fail before the reading stops.
        only: ids to keep (frames of cines), or None for all.
        track: wraps the rows, for a progress bar.

    Returns:
        The pool.

    Raises:
        InputError: more failures than allowed, named by hash; or nothing left.
        MissingExtra: a library for a format is missing.
        OutputError: the store cannot be written.
    """
    key = _key(rows, size, frame_stride, only)
    if store is not None and (found := _stored(store, key)) is not None:
        return found
    writer = _Writer(size, store)
    ids, groups, sources, failures = [], [], [], []
    for row in track(iter(rows)):
        try:
            for suffix, frame in _frames(row, frame_stride):
                identity = row.id + suffix
                if only is None or identity in only:
                    writer.put(preprocess(frame, PreprocessSpec(height=size, width=size))[0][0, 0], identity)
                    ids.append(identity)
                    groups.append(row.group)
                    sources.append(row.source)
        except MissingExtra:
            raise
        except EdgeError as error:
            failures.append(Failure(name=row.name, reason=str(error)))
            if len(failures) > allowed_failures:
                writer.drop()
                raise InputError(
                    f"{len(failures)} of {len(rows)} files cannot be decoded, {allowed_failures} allowed; the last is "
                    f"{row.source}/{row.name} (hash of its id): {error}"
                ) from error
    if not ids:
        writer.drop()
        raise InputError("no picture could be read")
    pixels, digest = writer.close(len(ids))
    pool = Pool(
        ids=tuple(ids),
        groups=tuple(groups),
        sources=tuple(sources),
        pixels_NSS=pixels,
        failures=tuple(failures),
        left_out=dict(left_out or {}),
        fingerprint=digest,
    )
    if store is not None:
        _describe(store, key, pool)
    return pool


def _frames(row: Row, stride: int) -> Iterator[tuple[str, Frame]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if row.path.suffix.lower() in PICTURE_SUFFIXES:
            with open_source(f"folder:{row.path}") as source:
                yield "", next(iter(source))
            return
        with open_source(str(row.path)) as source:
            count = 0
            for index, frame in enumerate(source):
                if index % stride == 0:
                    count += 1
                    yield f"#{index}", frame
            if not count:
                raise SourceError("it holds no frame")


def _key(rows: Sequence[Row], size: int, stride: int, only: frozenset[str] | None) -> str:
    """Identity of a reading; a file's size and time stand for its content."""
    digest = hashlib.sha256(f"{STORE_VERSION}:{size}:{stride}".encode())
    for row in rows:
        try:
            info = row.path.stat()
            digest.update(f"{row.id}:{info.st_size}:{info.st_mtime_ns}".encode())
        except OSError:
            digest.update(f"{row.id}:missing".encode())
    digest.update("\n".join(sorted(only or ())).encode())
    return digest.hexdigest()


class _Writer:
    """Takes squares one by one, into memory or a file."""

    def __init__(self, size: int, store: Path | None) -> None:
        self.size, self.store = size, store
        self.digest = hashlib.sha256()
        self.held: list[np.ndarray] = []
        self.stream = None
        if store is not None:
            try:
                store.mkdir(parents=True, exist_ok=True)
                (store / "pool.json").unlink(missing_ok=True)
                self.stream = (store / "pixels.u8").open("wb")
            except OSError as error:
                raise OutputError(f"cannot write pictures to {store}: {error.strerror}") from error

    def put(self, square_SS: np.ndarray, identity: str) -> None:
        data = np.ascontiguousarray(square_SS)
        self.digest.update(identity.encode())
        self.digest.update(data.data)
        if self.stream is None:
            self.held.append(data)
            return
        try:
            self.stream.write(data.data)
        except OSError as error:
            raise OutputError(f"cannot write pictures to {self.store}: {error.strerror}") from error

    def close(self, count: int) -> tuple[np.ndarray, str]:
        if self.stream is None or self.store is None:
            return np.stack(self.held), self.digest.hexdigest()
        self.stream.close()
        return _map(self.store, count, self.size), self.digest.hexdigest()

    def drop(self) -> None:
        if self.stream is not None and self.store is not None:
            self.stream.close()
            shutil.rmtree(self.store, ignore_errors=True)


def _map(store: Path, count: int, size: int) -> np.ndarray:
    return np.memmap(store / "pixels.u8", np.uint8, "r", shape=(count, size, size))


def _describe(store: Path, key: str, pool: Pool) -> None:
    from tinyusfm_edge.models.checkpoint import write_atomically

    data = {
        "version": STORE_VERSION,
        "key": key,
        "size": pool.pixels_NSS.shape[1],
        "fingerprint": pool.fingerprint,
        "left_out": pool.left_out,
        "failures": [[f.name, f.reason] for f in pool.failures],
        "pictures": [list(item) for item in zip(pool.ids, pool.groups, pool.sources, strict=True)],
    }
    write_atomically(store / "pool.json", json.dumps(data).encode())


def _stored(store: Path, key: str) -> Pool | None:
    try:
        data = json.loads((store / "pool.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if data.get("version") != STORE_VERSION or data.get("key") != key:
        return None
    pictures, size = data["pictures"], data["size"]
    if (store / "pixels.u8").stat().st_size != len(pictures) * size * size:
        return None
    return Pool(
        ids=tuple(p[0] for p in pictures),
        groups=tuple(p[1] for p in pictures),
        sources=tuple(p[2] for p in pictures),
        pixels_NSS=_map(store, len(pictures), size),
        failures=tuple(Failure(name=n, reason=r) for n, r in data["failures"]),
        left_out=data["left_out"],
        fingerprint=data["fingerprint"],
    )


__all__ = [
    "CINE_SUFFIXES",
    "PICTURE_SUFFIXES",
    "STORE_VERSION",
    "Failure",
    "Listing",
    "Pool",
    "list_rows",
    "read_pool",
]
