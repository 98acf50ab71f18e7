"""Source for a folder of images, or one image file, in the order of the names.

Read is what images/decode.py reads (PNG, JPEG, TIFF, GIF, WebP, BMP, JPEG 2000, PNM), recognised by content and not by
name; pages of TIFF and frames of animations are frames. A folder that holds DICOM files and no such image gives the
frames of its DICOM files. Image files of other kinds, and those in folders inside, are counted and named as a doubt:
nothing is left out without a word. A file that cannot be read whole ends the source with its index.

It does not know spacing: images carry none that can be trusted, so the caller gives it.
"""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from tinyusfm_runtime.errors import FrameError, IncompleteError, MissingExtra, SourceError
from tinyusfm_runtime.frame import Frame, VideoRange
from tinyusfm_runtime.images.decode import MAX_FILE_BYTES, DecodedImage, read_pages
from tinyusfm_runtime.images.kinds import READABLE, SUFFIXES, known_kind
from tinyusfm_runtime.images.order import in_order
from tinyusfm_runtime.images.window import Window, check_window
from tinyusfm_runtime.plugins import Availability
from tinyusfm_runtime.sources._source import ReportingSource
from tinyusfm_runtime.sources._spacing import SpacingRule

NO_SPACING = "images carry no spacing: measurements are in pixels; --spacing MM gives millimetres"
MAX_LISTED = 1_000_000
"""Entries of a folder, above which it is refused."""


def available() -> Availability:
    """Works where Pillow is installed."""
    try:
        import PIL
    except ImportError:
        return Availability(usable=False, reason="Pillow is not installed", extra="images")
    except Exception as error:  # a broken installation may raise anything
        return Availability(usable=False, reason=f"Pillow is broken: {type(error).__name__}", extra="images")
    return Availability(usable=True, reason=f"Pillow {PIL.__version__}", extra="images")


def accepts(location: str) -> bool:
    """True for a folder, an image's suffix, or a file that begins as an image."""
    if location.startswith("folder:"):
        return True
    path = Path(location)
    try:
        return path.is_dir() or path.suffix.lower() in SUFFIXES or (path.is_file() and known_kind(path) in READABLE)
    except (OSError, ValueError):  # no path at all
        return False


def open_source(
    location: str,
    *,
    spacing_mm: tuple[float, float] | None = None,
    video_range: str = "full",
    window: Window | None = None,
    names: bool = False,
) -> FolderSource:
    """Lists the files; none is decoded yet.

    Args:
        location: folder or one image, with or without ``folder:`` in front.
        spacing_mm: (row, column) spacing of every upright image, mm, or None.
        video_range: what the codes mean, ``full`` or ``limited``.
        window: (code that becomes 0, code that becomes 255) for images of more than 8 bits, or None to refuse them.
        names: frames carry the name of their file, with ``#N`` (from 0) where it holds several; sinks then tell it.

    Returns:
        The source.

    Raises:
        SourceError: nothing there, no image inside, or not readable.
        MissingExtra: Pillow is not installed.
    """
    path = Path(location.removeprefix("folder:"))
    if window is not None:
        check_window(window)
    try:
        if path.is_dir():
            listing = FolderListing.of(path)
        elif path.is_file():
            listing = FolderListing(read=[path])
        else:
            raise SourceError("the folder or image does not exist")
    except OSError as error:
        raise SourceError(f"the folder cannot be read: {error.strerror}") from error
    if not listing.read:
        raise SourceError(listing.why_empty())
    if not listing.dicom:
        try:
            import PIL  # noqa: F401
        except ImportError as error:
            raise MissingExtra("reading images", "pillow", "images") from error
    return FolderSource(listing, spacing_mm, VideoRange(video_range), window, names=names)


class FolderListing:
    """The files of a folder, sorted into what is read and what is left out.

    Attributes:
        read: files to read, not in order yet.
        dicom: True if these are DICOM files.
        left: kind -> how many files of it are not read.
        inside: image files in folders inside.
    """

    def __init__(self, read: list[Path], *, left: Counter[str] | None = None, inside: int = 0) -> None:
        self.read, self.dicom, self.left, self.inside = read, False, left or Counter(), inside

    @classmethod
    def of(cls, folder: Path) -> FolderListing:
        """Looks through a folder, and one floor down for images that would be missed.

        Raises:
            OSError: it cannot be read.
        """
        by_kind: dict[str, list[Path]] = {}
        inside = 0
        for number, path in enumerate(folder.iterdir()):
            if number > MAX_LISTED:
                raise SourceError(f"the folder holds more than {MAX_LISTED} entries")
            if path.is_dir():
                inside += _images_in(path)
            elif path.is_file() and (kind := known_kind(path)) is not None:
                by_kind.setdefault(f"hidden {kind}" if path.name.startswith(".") else kind, []).append(path)
        read = [path for kind in READABLE for path in by_kind.pop(kind, [])]
        listing = cls(read, inside=inside)
        if not read and "DICOM" in by_kind:
            listing.read, listing.dicom = by_kind.pop("DICOM"), True
        listing.left = Counter({kind: len(paths) for kind, paths in by_kind.items()})
        return listing

    def doubts(self) -> list[str]:
        """What is left out, for people."""
        found = []
        if self.left:
            named = ", ".join(f"{count} {kind}" for kind, count in sorted(self.left.items()))
            also = f" beside the {len(self.read)} that are read"
            found.append(f"files of the folder that are not read: {named}{also}; give each kind a folder of its own")
        if self.inside:
            found.append(f"{self.inside} image files in folders inside are not read: give those folders themselves")
        return found

    def why_empty(self) -> str:
        """The refusal of a folder without a file to read."""
        looked = f"the folder holds no image (looked for {', '.join(READABLE)} and DICOM)"
        if self.left:
            named = ", ".join(f"{count} {kind}" for kind, count in sorted(self.left.items()))
            return f"{looked}; it holds {named}: give a file itself, or convert them to PNG"
        return f"{looked}; folders inside hold {self.inside}: give one of those" if self.inside else looked


def _images_in(folder: Path) -> int:
    try:
        return sum(
            path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()
            for path in folder.iterdir()
        )
    except OSError:
        return 0


class FolderSource(ReportingSource):
    """Decodes one image at a time; ``seq`` counts frames, pages included."""

    def __init__(
        self,
        listing: FolderListing,
        spacing_mm: tuple[float, float] | None,
        video_range: VideoRange,
        window: Window | None = None,
        *,
        names: bool = False,
    ) -> None:
        self._names = names
        ordered = in_order(listing.read)
        self.paths = list(ordered.paths)
        self.spacing_mm, self.video_range, self.window, self._dicom = spacing_mm, video_range, window, listing.dicom
        super().__init__(ordered.notes, listing.doubts())
        self._rule = SpacingRule(spacing_mm, self.findings)
        if spacing_mm is None and not listing.dicom:
            self.findings.note(NO_SPACING)
        if ordered.ties:
            self.findings.doubt("the order of the files is not certain: some names come to the same place")

    def __iter__(self) -> Iterator[Frame]:
        for seq, frame in enumerate(self._frames()):
            yield replace(frame, seq=seq)

    def _frames(self) -> Iterator[Frame]:
        good = 0
        for index, path in enumerate(self.paths):
            where = f"file {index} of {len(self.paths)} (in order, from 0)"
            try:
                frames = self._of_dicom(path) if self._dicom else self._of_image(path)
                for frame in self._named(frames, path.name) if self._names else frames:
                    good += 1
                    yield frame
            except IncompleteError as error:
                raise IncompleteError(f"{where}: {error}") from error
            except (FrameError, SourceError) as error:
                raise (IncompleteError if good else SourceError)(f"{where}: {error}") from error

    def _named(self, frames: Iterator[Frame], name: str) -> Iterator[Frame]:
        """The frames of one file with its name.

        One frame is held back until it is known whether it is the only one.
        """
        first = next(frames, None)
        if first is None:
            return
        second = next(frames, None)
        if second is None:
            yield replace(first, name=name)
            return
        for number, frame in enumerate(itertools.chain((first, second), frames)):
            yield replace(frame, name=f"{name}#{number}")

    def _of_dicom(self, path: Path) -> Iterator[Frame]:
        from tinyusfm_runtime.sources import dicom

        with dicom.open_source(str(path), spacing_mm=self.spacing_mm, window=self.window) as source:
            for frame in source:
                # the rule of the folder: a given spacing holds for one size in all its files
                if self.spacing_mm is None or self._rule.of(frame.pixels.shape) is not None:
                    yield frame
                else:
                    yield replace(frame, spacing_mm=None)
            self._take_over(source.notes, source.doubts)

    def _take_over(self, notes: Iterable[str], doubts: Iterable[str]) -> None:
        for text in notes:
            self.findings.note(text)
        for text in doubts:
            self.findings.doubt(text)

    def _of_image(self, path: Path) -> Iterator[Frame]:
        for image in read_pages(_bytes_of(path), window=self.window):
            self._take_over(image.notes, ())
            yield self._frame(image)

    def _frame(self, image: DecodedImage) -> Frame:
        return Frame(
            pixels=image.pixels,
            pixel_format=image.pixel_format,
            video_range=self.video_range,
            spacing_mm=self._rule.of(image.pixels.shape, aspect=image.aspect),
            t_source_ns=None if image.start_ms is None else round(image.start_ms * 1e6),
            t_recv_ns=time.monotonic_ns(),
        )


def _bytes_of(path: Path) -> bytes:
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise FrameError(f"the file is larger than {MAX_FILE_BYTES >> 20} MiB")
        return path.read_bytes()
    except OSError as error:
        raise FrameError(f"cannot be read: {error.strerror}") from error


__all__ = [
    "MAX_LISTED",
    "NO_SPACING",
    "FolderListing",
    "FolderSource",
    "accepts",
    "available",
    "open_source",
]
