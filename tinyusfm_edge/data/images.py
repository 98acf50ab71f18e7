"""Images to learn from without labels, as one array of square grey images.

They come from folders, tables, DICOM and video.

Everything is decoded once, through the runtime's sources and its preprocessing, to uint8 squares that stay in memory or
in one memory-mapped file; training then never decodes. A folder without a table is searched for every file that a
source reads. Flagged rows are left out and counted. A file that cannot be decoded is named by a hash, counted, and
stops the reading unless so many failures were allowed: nothing is skipped silently.

It does not know crops, masks or models.

Shapes: N images, SS rows and columns.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from tinyusfm_calibration.tables import (
    SPLITS,
    TABLE,
    Row,
    canonical_split,
    clean,
    find_table,
    folder_name,
    read_table_rows,
    unused,
)
from tinyusfm_edge.data.doubts import hold, kept
from tinyusfm_edge.data.frames import open_file, read_row
from tinyusfm_edge.data.reading import AS_IT_IS, Reading, make_reading
from tinyusfm_runtime.errors import EdgeError, InputError, MissingExtra, OutputError, SourceError
from tinyusfm_runtime.frame import Frame
from tinyusfm_runtime.images.kinds import READABLE, known_kind
from tinyusfm_runtime.images.order import in_order
from tinyusfm_runtime.numerics.preprocess import preprocess
from tinyusfm_runtime.spec import PreprocessSpec
from tinyusfm_runtime.strict_json import parse_json

STORE_VERSION = 2
"""Version of a stored pool's ``pool.json``."""
CINE_KINDS = frozenset({"DICOM", "MetaImage", "motion JPEG", "video"})
"""Kinds of files that may hold many frames."""


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
class ImagePool:
    """Decoded images.

    Attributes:
        ids: one per image, unique; frames of a cine carry ``#INDEX``.
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
        reading: how files are read.
        coreset_sha256: hash of the coreset's file, hex; empty where there is none.
    """

    rows: list[Row]
    left_out: dict[str, int]
    only: frozenset[str] | None = None
    frame_stride: int | None = None
    reading: Reading = AS_IT_IS
    coreset_sha256: str = ""


def list_rows(places: Sequence[Path], splits: Sequence[str] = ("train",), reading: Reading = AS_IT_IS) -> Listing:
    """Rows of folders with or without tables, flagged ones left out.

    Args:
        places: folders with ``split.csv`` (of which ``splits`` are taken), folders of images, cines and videos, which
            are searched through, or ``coreset.json`` files.
        splits: splits taken from tables, as they are called there or here.
        reading: how files are read.

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
        return _coreset_listing(places[0], reading)
    wanted = {canonical_split(split) for split in splits}
    for place in places:
        if not place.exists():
            raise InputError(f"{place} does not exist: give a folder or a coreset.json")
        if not place.is_dir():
            raise InputError(f"{place} is a file: give the folder it lies in, or a coreset.json")
        if find_table(place) is None:
            rows = search(place)
        else:
            every = read_table_rows(place, options=reading.table)
            rows = [row for row in every if row.split in wanted]
            others = ", ".join(sorted({row.split or "none" for row in every}))
            if not rows:
                raise InputError(f"{place} has no image in split {' or '.join(splits)}; its splits: {others}")
            left_out.update(unused([row for row in every if row.split not in {*wanted, *SPLITS}]))
        kept, counts = clean(rows)
        found += kept
        left_out.update(counts)
    if len({row.id for row in found}) != len(found):
        raise InputError("two data folders of one name hold files of one name: rename a folder")
    return Listing(rows=found, left_out={why: count for why, count in left_out.items() if count}, reading=reading)


def search(folder: Path) -> list[Row]:
    """Every file of a folder that holds frames, in natural order.

    Folders inside it are searched as well; hidden ones are left out.

    Raises:
        InputError: there is none; says what the folder holds.
    """
    inside = [path.relative_to(folder) for path in folder.rglob("*")]
    inside = [path for path in inside if not any(part.startswith(".") for part in path.parts)]
    kinds = {path: known_kind(folder / path) for path in inside if (folder / path).is_file()}
    files = [path for path, kind in kinds.items() if kind in READABLE or kind in CINE_KINDS]
    if not files:
        raise InputError(f"{folder} has no {TABLE} and no image, DICOM file or video{_clue(list(kinds))}")
    by_folder: dict[Path, list[Path]] = {}
    for path in files:
        by_folder.setdefault(path.parent, []).append(path)
    files = [path for parent in sorted(by_folder) for path in in_order(by_folder[parent]).paths]
    name = folder_name(folder)
    return [
        Row(
            id=f"{name}/{path.as_posix()}",
            path=folder / path,
            group=f"{name}/{path.as_posix()}",
            source=name,
            place=f"{name}: file {number} of {len(files)} (natural order, from 1)",
        )
        for number, path in enumerate(files, 1)
    ]


def _clue(inside: Sequence[Path]) -> str:
    """What a folder without images holds instead."""
    kinds = Counter(path.suffix.lower() or "no suffix" for path in inside)
    if not kinds:
        return ": it is empty"
    shown = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(4))
    return f"; it holds {shown}: convert them to PNG or DICOM"


def _coreset_listing(path: Path, reading: Reading) -> Listing:
    try:
        raw = path.read_bytes()
        data = parse_json(raw)
        if data["version"] != 1:
            raise InputError(f"{path} is a coreset of version {data['version']!r}; this release reads 1")
        places = [path.parent / place for place in data["places"]]
        chosen = frozenset(item["id"] for item in data["chosen"])
        stride = int(data["frame_stride"])
        # what was asked for when the coreset was made holds, unless something is asked for now
        if reading == AS_IT_IS:
            reading = replace(make_reading(**data.get("reading", {})), doubts=reading.doubts)
        splits = tuple(map(str, data["splits"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise InputError(f"{path} is no coreset: {error}") from error
    rows = {row.id: row for row in list_rows(places, splits, reading).rows}
    # frame 8 of a cine is FILE#8, which may be a row of its own
    files = {identity if identity in rows else identity.rpartition("#")[0] for identity in chosen}
    kept = [row for row in rows.values() if row.id in files]
    if len(kept) != len(files):
        raise InputError(f"{path} names {len(files) - len(kept)} images that its folders no longer hold")
    digest = hashlib.sha256(raw).hexdigest()
    return Listing(rows=kept, left_out={}, only=chosen, frame_stride=stride, reading=reading, coreset_sha256=digest)


def read_pool(
    rows: Sequence[Row],
    size: int,
    *,
    left_out: dict[str, int] | None = None,
    store: Path | None = None,
    frame_stride: int = 8,
    allowed_failures: int = 0,
    only: frozenset[str] | None = None,
    reading: Reading = AS_IT_IS,
    track: Callable[[Iterator[Row]], Iterator[Row]] = lambda rows: rows,
) -> ImagePool:
    """Decodes images to squares.

    Args:
        rows: what to read.
        size: rows and columns of the squares.
        left_out: counts to carry along.
        store: a folder to write the squares to and map them from, or None for memory; one with the same rows is reused.
        frame_stride: every Nth frame of a cine or video is taken.
        allowed_failures: files that may fail before the reading stops.
        only: ids to keep (frames of cines), or None for all.
        reading: how files are read.
        track: wraps the rows, for a progress bar.

    Returns:
        The pool.

    Raises:
        InputError: more failures than allowed, named by hash; or nothing left.
        MissingExtra: a library for a format is missing.
        OutputError: the store cannot be written.
    """
    key = _key(rows, size, frame_stride, only, reading)
    if store is not None and (found := _stored(store, key)) is not None:
        return found
    writer = _Writer(size, store)
    ids, groups, sources, failures = [], [], [], []
    for row in track(iter(rows)):
        try:
            for suffix, frame in _frames(row, frame_stride, reading):
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
        raise InputError("no image could be read")
    pixels, digest = writer.close(len(ids))
    pool = ImagePool(
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


def _frames(row: Row, stride: int, reading: Reading) -> Iterator[tuple[str, Frame]]:
    """A row's frames.

    The one that it names, the only one of an image, every Nth of a cine.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if row.frame is not None or known_kind(row.path) not in CINE_KINDS:
            yield "", read_row(row, reading).frame
            return
        with open_file(row.path, reading) as source:
            count = 0
            for index, frame in enumerate(kept(source, reading.doubts, row.where)):
                if index % stride == 0:
                    count += 1
                    yield f"#{index}", frame
            hold(reading.doubts, row.where, getattr(source, "doubts", ()))
            if not count:
                raise SourceError("it holds no frame")


def _key(rows: Sequence[Row], size: int, stride: int, only: frozenset[str] | None, reading: Reading) -> str:
    """Identity of a reading; a file's size and time stand for its content."""
    digest = hashlib.sha256(f"{STORE_VERSION}:{size}:{stride}:{reading.window}".encode())
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
                raise OutputError(f"cannot write images to {store}: {error.strerror}") from error

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
            raise OutputError(f"cannot write images to {self.store}: {error.strerror}") from error

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


def _describe(store: Path, key: str, pool: ImagePool) -> None:
    from tinyusfm_runtime.atomic import write_file

    data = {
        "version": STORE_VERSION,
        "key": key,
        "size": pool.pixels_NSS.shape[1],
        "fingerprint": pool.fingerprint,
        "left_out": pool.left_out,
        "failures": [[f.name, f.reason] for f in pool.failures],
        "images": [list(item) for item in zip(pool.ids, pool.groups, pool.sources, strict=True)],
    }
    write_file(store / "pool.json", json.dumps(data).encode())


def _stored(store: Path, key: str) -> ImagePool | None:
    try:
        data = parse_json((store / "pool.json").read_bytes())
    except (OSError, ValueError):
        return None
    if data.get("version") != STORE_VERSION or data.get("key") != key:
        return None
    images, size = data["images"], data["size"]
    if (store / "pixels.u8").stat().st_size != len(images) * size * size:
        return None
    return ImagePool(
        ids=tuple(p[0] for p in images),
        groups=tuple(p[1] for p in images),
        sources=tuple(p[2] for p in images),
        pixels_NSS=_map(store, len(images), size),
        failures=tuple(Failure(name=n, reason=r) for n, r in data["failures"]),
        left_out=data["left_out"],
        fingerprint=data["fingerprint"],
    )


__all__ = [
    "CINE_KINDS",
    "STORE_VERSION",
    "Failure",
    "ImagePool",
    "Listing",
    "list_rows",
    "read_pool",
    "search",
]
