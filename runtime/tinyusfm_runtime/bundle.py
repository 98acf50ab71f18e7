"""Bundle: a read-only folder that is trusted only byte by byte.

``Bundle.open`` verifies: the folder holds exactly the files its manifest lists, all of them plain
files with one name on the disk, no links, and every byte hashes to what the manifest says. A file
is read once, through a descriptor that follows no link; the bytes that were hashed are the bytes
that are handed out, so nobody can exchange them in between.

It does not know engines, and it never writes: what a device adds later lives in a cache elsewhere.
Layout::

    manifest.json                            see manifest.py
    artefacts/<target>-<precision>/...       model.onnx, or model.xml and model.bin; of a chain stage1.model.onnx, ...
    golden/frames.npz, reference.npz         phantom frames and the PyTorch float32 reference's answers
    golden/<target>-<precision>.npz          that artefact's own answers (logits)
    drift/statistic.npz                      what the calibration frames look like, see drift.py; when there is one
    quant.json, reports/...                  when there are any

Shapes: SHW = frames, rows, columns; SKHW = frames, classes, rows, columns; SK = frames, classes.
"""

from __future__ import annotations

import hashlib
import io
import os
import stat
from pathlib import Path

import numpy as np

from tinyusfm_runtime.arrays import unpack_arrays
from tinyusfm_runtime.errors import BundleError, FrameError, InputError, TamperedError
from tinyusfm_runtime.frame import Frame
from tinyusfm_runtime.manifest import (
    GOLDEN_FRAMES,
    GOLDEN_REFERENCE,
    MANIFEST_NAME,
    MAX_FILES,
    SCHEMA_VERSION,
    Artefact,
    ArtefactState,
    FileEntry,
    Manifest,
    file_entry,
    read_manifest,
)

MAX_MANIFEST_BYTES = 16 << 20
"""The manifest is parsed before anything vouches for it, so it is kept small."""
MAX_DEPTH = 8
"""Folders inside folders."""
_ATTEMPTS = 10  # a bundle that is replaced while it is read is read anew


class Bundle:
    """A verified bundle, its bytes in memory. Open one with ``Bundle.open``."""

    __slots__ = ("_content", "manifest", "path")

    def __init__(self, path: Path, manifest: Manifest, content: dict[str, bytes]) -> None:
        self.path = path
        self.manifest = manifest
        self._content = content

    @classmethod
    def open(cls, path: str | Path) -> Bundle:
        """Reads and verifies a bundle.

        Args:
            path: the bundle's folder.

        Returns:
            The bundle; all its bytes were read and hashed.

        Raises:
            InputError: there is no such folder.
            TamperedError: a file was changed, added, removed, or is a link.
            BundleError: not a bundle, or of another schema version, or unreadable.
        """
        folder, left = Path(path), _ATTEMPTS
        while True:
            root, left = _open_root(folder), left - 1
            try:
                return cls(folder, *_read_all(root))
            except BundleError:
                if not left or not _was_replaced(folder, root):
                    raise
            finally:
                os.close(root)

    def read(self, relpath: str) -> bytes:
        """The verified bytes of one file.

        Raises:
            InputError: the bundle has no such file.
        """
        try:
            return self._content[relpath]
        except KeyError:
            raise InputError(f"{self.path} has no file {relpath!r}") from None

    def artefact_files(self, artefact: Artefact) -> dict[str, bytes]:
        """An artefact's files as its engine wants them: file name -> verified bytes."""
        return {path.rsplit("/", 1)[-1]: self.read(path) for path in artefact.files}

    def golden_frames(self) -> list[Frame]:
        """The phantom frames of the self-test; ``seq`` is the phantom's seed.

        Raises:
            BundleError: the arrays are not what the layout says.
        """
        return frames_from_arrays(unpack_arrays(self.read(GOLDEN_FRAMES), GOLDEN_FRAMES))

    def golden_reference(self) -> dict[str, np.ndarray]:
        """The PyTorch float32 reference's answers to the golden frames; ``logits`` is float32 SKHW or SK.

        Raises:
            BundleError: the arrays are not what the layout says.
        """
        return _with_logits(unpack_arrays(self.read(GOLDEN_REFERENCE), GOLDEN_REFERENCE), GOLDEN_REFERENCE)

    def golden_outputs(self, artefact: Artefact) -> dict[str, np.ndarray]:
        """One artefact's own answers to the golden frames; ``logits`` is float16 or float32, SKHW or SK.

        Raises:
            BundleError: the arrays are not what the layout says.
        """
        return _with_logits(unpack_arrays(self.read(artefact.golden), artefact.golden), artefact.golden)


def frames_from_arrays(arrays: dict[str, np.ndarray]) -> list[Frame]:
    """Frames from the arrays of ``golden/frames.npz``.

    Raises:
        BundleError: an array is missing or does not fit the others.
    """
    try:
        pixels, spacing, seeds = arrays["pixels"], arrays["spacing_mm"], arrays["seeds"]
        if pixels.ndim != 3 or spacing.shape != (len(pixels), 2) or seeds.shape != (len(pixels),) or not len(pixels):
            raise ValueError(f"shapes {pixels.shape}, {spacing.shape}, {seeds.shape} do not fit together")
        return [
            Frame(pixels=picture, spacing_mm=(float(mm[0]), float(mm[1])), seq=int(seed))
            for picture, mm, seed in zip(pixels, spacing, seeds, strict=True)
        ]
    except (KeyError, ValueError, FrameError) as error:
        raise BundleError(f"{GOLDEN_FRAMES} does not hold golden frames: {error}") from error


def _with_logits(arrays: dict[str, np.ndarray], what: str) -> dict[str, np.ndarray]:
    if "logits" not in arrays or arrays["logits"].dtype.kind != "f":
        raise BundleError(f"{what} holds no logits")
    return arrays


def _open_root(folder: Path) -> int:
    if not hasattr(os, "O_NOFOLLOW"):  # pragma: no cover
        raise BundleError("this operating system cannot open files without following links; use Linux or macOS")
    try:
        return os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        raise InputError(f"there is no bundle at {folder}") from None
    except (OSError, ValueError) as error:
        if folder.is_symlink():
            raise TamperedError(f"{folder} is a link: name the bundle's own folder") from error
        if folder.exists() and not folder.is_dir():
            raise BundleError(f"{folder} is not a folder, so it is no bundle") from error
        raise BundleError(f"{folder} cannot be opened: {error}") from error


def _was_replaced(folder: Path, root: int) -> bool:
    try:
        return folder.stat().st_ino != os.fstat(root).st_ino
    except OSError:
        return False


def _read_all(root: int) -> tuple[Manifest, dict[str, bytes]]:
    try:
        return _verified(root)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise TamperedError(f"{error.filename!r} vanished while the bundle was read") from error
    except OSError as error:
        raise BundleError(f"{error.filename!r} in the bundle cannot be read: {error.strerror or error}") from error


def _verified(root: int) -> tuple[Manifest, dict[str, bytes]]:
    files, folders = _walk(root, "", 0)
    if MANIFEST_NAME not in files:
        raise BundleError(f"the folder holds no {MANIFEST_NAME}, so it is no bundle")
    manifest = read_manifest(_read_file(root, MANIFEST_NAME, None))
    _compare_lists(manifest, files, folders)
    content = {}
    for path, entry in manifest.files.items():
        raw = _read_file(root, path, entry)
        _check_content(path, raw, entry)
        content[path] = raw
    return manifest, content


def _check_content(path: str, raw: bytes, entry: FileEntry) -> None:
    if hashlib.sha256(raw).hexdigest() != entry.sha256:
        raise TamperedError(f"{path} is not the file that was published: its sha256 does not match the manifest")


def _walk(folder: int, prefix: str, depth: int) -> tuple[set[str], set[str]]:
    """Lists files and folders below an open folder, refusing everything that is neither."""
    if depth > MAX_DEPTH:
        raise TamperedError(f"{prefix} lies deeper than any bundle's folder")
    files: set[str] = set()
    folders: set[str] = set()
    with os.scandir(folder) as entries:
        for entry in entries:
            path = prefix + os.fsencode(entry.name).decode("ascii", "backslashreplace")
            found = entry.stat(follow_symlinks=False)
            if stat.S_ISDIR(found.st_mode):
                inner = os.open(entry.name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
                try:
                    more = _walk(inner, path + "/", depth + 1)
                finally:
                    os.close(inner)
                folders.add(path)
                files |= more[0]
                folders |= more[1]
            else:
                _refuse_special(path, found)
                files.add(path)
            if len(files) + len(folders) > 2 * MAX_FILES:
                raise TamperedError(f"the folder holds more than {MAX_FILES} files")
    return files, folders


def _refuse_special(path: str, found: os.stat_result) -> None:
    if stat.S_ISLNK(found.st_mode):
        raise TamperedError(f"{path} is a link; a bundle holds none")
    if not stat.S_ISREG(found.st_mode):
        raise TamperedError(f"{path} is a special file; a bundle holds none")
    if found.st_nlink != 1:
        raise TamperedError(f"{path} is a hard link ({found.st_nlink} names): copy the bundle without links")


def _compare_lists(manifest: Manifest, files: set[str], folders: set[str]) -> None:
    listed = {*manifest.files, MANIFEST_NAME}
    if extra := sorted(files - listed):
        raise TamperedError(f"the bundle holds {extra[0]!r}, which the manifest does not list ({len(extra)} such)")
    if missing := sorted(listed - files):
        raise TamperedError(f"the bundle lacks {missing[0]!r}, which the manifest lists ({len(missing)} such)")
    parents = {path[:i] for path in listed for i, letter in enumerate(path) if letter == "/"}
    if extra := sorted(folders - parents):
        raise TamperedError(f"the bundle holds the folder {extra[0]!r}, in which the manifest lists nothing")


def _read_file(root: int, path: str, entry: FileEntry | None) -> bytes:
    """Reads a file once, through descriptors only; ``entry`` is None for the manifest."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK  # a pipe put in its place cannot hang us
    *parents, name = path.split("/")
    folder = root
    try:
        for part in parents:
            inner = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
            if folder != root:
                os.close(folder)
            folder = inner
        handle = os.open(name, flags, dir_fd=folder)
    finally:
        if folder != root:
            os.close(folder)
    with os.fdopen(handle, "rb", buffering=0) as file:
        found = os.fstat(handle)
        _refuse_special(path, found)
        limit = MAX_MANIFEST_BYTES if entry is None else entry.size_bytes
        if found.st_size > limit if entry is None else found.st_size != limit:
            raise TamperedError(f"{path} has {found.st_size} bytes; {limit} were expected")
        raw = _read_up_to(file, found.st_size + 1)
    if len(raw) != found.st_size:
        raise TamperedError(f"{path} changed its size while it was read")
    return raw


def _read_up_to(file: io.FileIO, limit: int) -> bytes:
    parts, left = [], limit
    while left > 0:
        part = file.read(left)
        if not part:
            break
        parts.append(part)
        left -= len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


__all__ = [
    "GOLDEN_FRAMES",
    "GOLDEN_REFERENCE",
    "MANIFEST_NAME",
    "MAX_DEPTH",
    "MAX_MANIFEST_BYTES",
    "SCHEMA_VERSION",
    "Artefact",
    "ArtefactState",
    "Bundle",
    "FileEntry",
    "Manifest",
    "file_entry",
    "frames_from_arrays",
]
