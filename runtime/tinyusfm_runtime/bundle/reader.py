"""Bundle: a read-only folder that is trusted only byte by byte.

``Bundle.open`` verifies: the folder holds exactly the files its manifest lists, all of them plain
files with one name on the disk, no links, and every byte hashes to what the manifest says. A file
is read once, through a descriptor that follows no link; the bytes that were hashed are the bytes
that are handed out, so nobody can exchange them in between. The folder itself may be named by a
link, as in ``current -> v2.bundle``: the link is resolved first, and what it means is trusted byte by byte.
A bundle that ships with this package is opened by its name (shipped.py).

It does not know engines, and it never writes: what a device adds later lives in a cache elsewhere.
Layout::

    manifest.json                            see manifest.py
    model.sig                                signature over all of it, see ../trust; when there is one
    artefacts/<target>-<precision>/...       model.onnx, or model.xml and model.bin; of a chain stage1.model.onnx, ...
    golden/frames.safetensors                phantom frames
    golden/reference.safetensors             the PyTorch float32 reference's answers to them
    golden/<target>-<precision>.safetensors  that artefact's own answers (logits)
    drift/statistic.safetensors              what the calibration frames look like, see drift.py; when there is one
    quant.json, reports/...                  when there are any

Shapes: SHW = frames, rows, columns; SKHW = frames, classes, rows, columns; SK = frames, classes.
"""

from __future__ import annotations

import hashlib
import io
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tinyusfm_runtime.bundle.arrays import unpack_arrays, unpack_metadata
from tinyusfm_runtime.bundle.manifest import (
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
from tinyusfm_runtime.bundle.shipped import find_bundle, names_allowed
from tinyusfm_runtime.errors import BundleError, FrameError, InputError, TamperedError
from tinyusfm_runtime.frame import Frame
from tinyusfm_runtime.trust.policy import SignedFacts, permanent_policy
from tinyusfm_runtime.trust.statement import SIGNATURE_NAME

if TYPE_CHECKING:
    from tinyusfm_runtime.trust.policy import Trust
    from tinyusfm_runtime.trust.statement import Binding

MAX_MANIFEST_BYTES = 16 << 20
"""The manifest is parsed before anything vouches for it, so it is kept small."""
MAX_DEPTH = 8
"""Folders inside folders."""
LITTER = (".DS_Store", "Thumbs.db", "desktop.ini")
"""What file browsers leave in folders that they show, beside ``._NAME``; refused as any other file is."""
_ATTEMPTS = 10  # a bundle that is replaced while it is read is read again


class Bundle:
    """A verified bundle, its bytes in memory. Open one with ``Bundle.open``."""

    __slots__ = ("_content", "binding", "manifest", "path", "trust")

    def __init__(
        self, path: Path, manifest: Manifest, content: dict[str, bytes], binding: Binding | None = None
    ) -> None:
        self.path = path
        self.manifest = manifest
        self._content = content
        self.binding = binding
        """What a trusted signature says of it, or None where none was demanded."""
        self.trust: Trust | None = None
        """What was demanded of it when it was opened; a bundle that takes its place must satisfy the same."""

    def __repr__(self) -> str:
        """Folder, model and artefacts, one line."""
        there = ", ".join(artefact.name for artefact in self.manifest.artefacts)
        return f"Bundle({self.path.name}: {self.manifest.spec.name}; {there})"

    @classmethod
    def open(cls, path: str | Path, *, trust: Trust | None = None, on_device: bool = True) -> Bundle:
        """Reads and verifies a bundle.

        Args:
            path: the bundle's folder, a link to it, or the name of a shipped bundle; an existing path wins.
            trust: demands a signature; the machine's policy file (trust/policy.py) holds beside it.
            on_device: False where bundles are made or signed, and the policy file does not count.

        Returns:
            The bundle; all its bytes were read and hashed.

        Raises:
            InputError: there is no such folder.
            TamperedError: a file was changed, added, removed, or is a link.
            UntrustedError: a signature is demanded and is missing, wrong, or not for this device.
            BundleError: not a bundle, or of another schema version, or unreadable.
        """
        folder, left = find_bundle(path), _ATTEMPTS
        demands = [demand for demand in (trust, permanent_policy() if on_device else None) if demand is not None]
        while True:
            real = _resolved(folder)
            root, left = _open_root(real), left - 1
            try:
                opened = cls(real, *_read_all(root, demands, names=names_allowed(real)))
                break
            except BundleError:
                if not left or not _was_replaced(folder, root):
                    raise
            finally:
                os.close(root)
        for demand in demands:
            if opened.binding is not None:
                demand.accept(signed_facts(opened.manifest, b""), opened.binding)
        opened.trust = demands[0] if demands else None
        return opened

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

    def golden_reference(self, path: str = GOLDEN_REFERENCE) -> dict[str, np.ndarray]:
        """The PyTorch float32 reference's answers to the golden frames.

        ``logits`` is float32 SKHW or SK.

        Args:
            path: ``Artefact.reference`` of the artefact that is held against it.

        Raises:
            BundleError: the arrays are not what the layout says.
        """
        return _with_logits(unpack_arrays(self.read(path), path), path)

    def golden_outputs(self, artefact: Artefact) -> dict[str, np.ndarray]:
        """One artefact's own answers to the golden frames.

        ``logits`` is float16 or float32, SKHW or SK.

        Raises:
            BundleError: the arrays are not what the layout says.
        """
        return self.golden_artefact(artefact.golden)

    def golden_artefact(self, relpath: str) -> dict[str, np.ndarray]:
        """The same, by the path of the file.

        Raises:
            BundleError: the arrays are not what the layout says.
        """
        return _with_logits(unpack_arrays(self.read(relpath), relpath), relpath)

    def golden_digest(self, relpath: str) -> str | None:
        """Digest of the spec by which the answers of a golden file were read.

        None where the file holds none.

        Raises:
            BundleError: not such a file.
        """
        return unpack_metadata(self.read(relpath), relpath).get("spec_sha256")


def frames_from_arrays(arrays: dict[str, np.ndarray]) -> list[Frame]:
    """Frames from the arrays of ``golden/frames.safetensors``.

    Raises:
        BundleError: an array is missing or does not fit the others.
    """
    try:
        pixels, spacing, seeds = arrays["pixels"], arrays["spacing_mm"], arrays["seeds"]
        if pixels.ndim != 3 or spacing.shape != (len(pixels), 2) or seeds.shape != (len(pixels),) or not len(pixels):
            raise ValueError(f"shapes {pixels.shape}, {spacing.shape}, {seeds.shape} do not fit together")
        return [
            Frame(pixels=image, spacing_mm=(float(mm[0]), float(mm[1])), seq=int(seed), phantom=True)
            for image, mm, seed in zip(pixels, spacing, seeds, strict=True)
        ]
    except (KeyError, ValueError, FrameError) as error:
        raise BundleError(f"{GOLDEN_FRAMES} does not hold golden frames: {error}") from error


def _with_logits(arrays: dict[str, np.ndarray], what: str) -> dict[str, np.ndarray]:
    if "logits" not in arrays or arrays["logits"].dtype.kind != "f" or arrays["logits"].ndim < 2:
        raise BundleError(f"{what} holds no logits")
    return arrays


def _resolved(folder: Path) -> Path:
    """What a link to a bundle means; any other path as it is."""
    if not folder.is_symlink():
        return folder
    try:
        return folder.resolve(strict=True)
    except (OSError, RuntimeError) as error:  # a circle is a RuntimeError up to Python 3.12
        raise InputError(f"{folder} is a link that leads nowhere: point it to a bundle's folder") from error


def _open_root(folder: Path) -> int:
    if not hasattr(os, "O_NOFOLLOW"):  # pragma: no cover
        raise BundleError("this operating system cannot open files without following links; use Linux or macOS")
    try:
        return os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        raise InputError(f"there is no bundle at {folder}") from None
    except (OSError, ValueError) as error:
        if folder.is_symlink():  # made after it was resolved
            raise TamperedError(f"{folder} was exchanged for a link while it was opened") from error
        if folder.exists() and not folder.is_dir():
            raise BundleError(f"{folder} is not a folder, so it is no bundle") from error
        raise BundleError(f"{folder} cannot be opened: {error}") from error


def _was_replaced(folder: Path, root: int) -> bool:
    try:
        return folder.stat().st_ino != os.fstat(root).st_ino
    except OSError:
        return False


def _read_all(
    root: int, demands: Sequence[Trust], *, names: int | None = 1
) -> tuple[Manifest, dict[str, bytes], Binding | None]:
    """``names`` is how many names a file may have on the disk, None for any number."""
    try:
        return _verified(root, demands, names)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise TamperedError(f"{error.filename!r} vanished while the bundle was read") from error
    except OSError as error:
        raise BundleError(f"{error.filename!r} in the bundle cannot be read: {error.strerror or error}") from error


def _verified(
    root: int, demands: Sequence[Trust], names: int | None
) -> tuple[Manifest, dict[str, bytes], Binding | None]:
    _refuse_no_manifest(root)
    files, folders = _walk(root, "", 0, names)
    raw_manifest = _read_file(root, MANIFEST_NAME, None, names)
    manifest = read_manifest(raw_manifest)
    signature = _read_file(root, SIGNATURE_NAME, None, names) if SIGNATURE_NAME in files else None
    _compare_lists(manifest, files - {SIGNATURE_NAME}, folders)
    bindings = [demand.check(signed_facts(manifest, raw_manifest), signature) for demand in demands]
    content = {}
    for path, entry in manifest.files.items():
        raw = _read_file(root, path, entry, names)
        _check_content(path, raw, entry)
        content[path] = raw
    return manifest, content, bindings[0] if bindings else None


def open_trusted(bundle: str | Path | Bundle, trust: Trust | None) -> Bundle:
    """Opens a bundle, or takes an open one that satisfies what is demanded.

    Args:
        bundle: a folder, or an open bundle.
        trust: demands a signature, or None.

    Raises:
        InputError: there is no such folder, or the open bundle was opened without this demand.
        BundleError: as ``Bundle.open``.
    """
    if not isinstance(bundle, Bundle):
        return Bundle.open(bundle, trust=trust)
    if trust is not None and bundle.trust is not trust:
        raise InputError("the bundle was opened without this trust: give its folder, or open it with trust=")
    return bundle


def signed_facts(manifest: Manifest, manifest_bytes: bytes) -> SignedFacts:
    """What a signature of a bundle is about.

    Args:
        manifest: of the bundle.
        manifest_bytes: the very bytes that it was read from.
    """
    return SignedFacts(
        name=manifest.spec.name,
        bundle_id=manifest.bundle_id,
        spec=manifest.spec.to_json(),
        digests={path: entry.sha256 for path, entry in manifest.files.items()},
        manifest_bytes=manifest_bytes,
    )


def _check_content(path: str, raw: bytes, entry: FileEntry) -> None:
    if hashlib.sha256(raw).hexdigest() != entry.sha256:
        raise TamperedError(f"{path} is not the file that was published: its sha256 does not match the manifest")


def _refuse_no_manifest(root: int) -> None:
    """Before a whole tree is walked that is no bundle at all."""
    try:
        os.stat(MANIFEST_NAME, dir_fd=root, follow_symlinks=False)
    except FileNotFoundError:
        raise BundleError(f"the folder holds no {MANIFEST_NAME}, so it is no bundle") from None


def _walk(folder: int, prefix: str, depth: int, names: int | None) -> tuple[set[str], set[str]]:
    """Lists files and folders below an open folder.

    Everything that is neither is refused.
    """
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
                    more = _walk(inner, path + "/", depth + 1, names)
                finally:
                    os.close(inner)
                folders.add(path)
                files |= more[0]
                folders |= more[1]
            else:
                _refuse_special(path, found, names)
                files.add(path)
            if len(files) + len(folders) > 2 * MAX_FILES:
                raise TamperedError(f"the folder holds more than {MAX_FILES} files")
    return files, folders


def _refuse_special(path: str, found: os.stat_result, names: int | None) -> None:
    if stat.S_ISLNK(found.st_mode):
        raise TamperedError(f"{path} is a link; a bundle holds none")
    if not stat.S_ISREG(found.st_mode):
        raise TamperedError(f"{path} is a special file; a bundle holds none")
    if names is not None and found.st_nlink != names:
        raise TamperedError(f"{path} is a hard link ({found.st_nlink} names): copy the bundle without links")


def _compare_lists(manifest: Manifest, files: set[str], folders: set[str]) -> None:
    listed = {*manifest.files, MANIFEST_NAME}
    if extra := sorted(files - listed):
        if litter := [path for path in extra if _is_litter(path)]:
            raise TamperedError(f"unexpected file in the bundle: {litter[0]}, left by a file browser: delete it")
        raise TamperedError(f"the bundle holds {extra[0]!r}, which the manifest does not list ({len(extra)} such)")
    if missing := sorted(listed - files):
        raise TamperedError(f"the bundle lacks {missing[0]!r}, which the manifest lists ({len(missing)} such)")
    parents = {path[:i] for path in listed for i, letter in enumerate(path) if letter == "/"}
    if extra := sorted(folders - parents):
        raise TamperedError(f"the bundle holds the folder {extra[0]!r}, in which the manifest lists nothing")


def _is_litter(path: str) -> bool:
    name = path.rpartition("/")[2]
    return name in LITTER or name.startswith("._")


def _read_file(root: int, path: str, entry: FileEntry | None, names: int | None) -> bytes:
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
        _refuse_special(path, found, names)
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
    "LITTER",
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
    "open_trusted",
    "signed_facts",
]
