"""Options that ``run`` and ``live`` share.

Which artefact answers, which fallback stands behind it, what is made over time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tinyusfm_edge.cli import console
from tinyusfm_edge.data.reading import numbers
from tinyusfm_runtime.errors import InputError

if TYPE_CHECKING:
    from tinyusfm_runtime.frame import FrameSource
    from tinyusfm_runtime.trust.policy import Trust

Bundles = Annotated[
    list[str],
    typer.Argument(
        metavar="BUNDLE...", help="The bundle's folder. Several answer every frame; NAME=BUNDLE names one of them."
    ),
]
Rules = Annotated[
    Path | None,
    typer.Option(help="Several bundles: a TOML file of after, needs_label and min_confidence (docs/guides/models.md)."),
]
Target = Annotated[str | None, typer.Option(help="Artefact to run, such as openvino or onnx.")]
Precision = Annotated[str | None, typer.Option(help="Artefact to run, such as int8.")]
Threads = Annotated[int | None, typer.Option(min=1, max=1024, help="Threads inside the engine.")]
AllowUnverified = Annotated[bool, typer.Option("--allow-unverified", help="Also run an artefact that passed no gate.")]
Recipe = Annotated[
    str | None,
    typer.Option(help="Artefact, threads and CPUs of a recipe, such as tune writes; options on the line win."),
]
Fallback = Annotated[
    bool, typer.Option("--fallback", help="Live: when the artefact fails, the bundle's next one answers.")
]
Isolate = Annotated[
    bool, typer.Option("--isolate", help="Live: run the engine in a process that is killed when it hangs.")
]
Smooth = Annotated[bool, typer.Option("--smooth", help="Live: smooth masks and readings over time.")]
Sinks = Annotated[list[str] | None, typer.Option(help="Live: where results go, such as jsonl:out.jsonl.")]
Crop = Annotated[
    str | None, typer.Option(help="ROW,COL,HEIGHT,WIDTH in pixels, or region (the one a DICOM file marks).")
]
Spacing = Annotated[str | None, typer.Option(help="ROW,COL distance of pixels in mm, over the file's own.")]
Window = Annotated[
    str | None, typer.Option(help="LO,HI: codes that become black and white, for input of more than 8 bits.")
]
Names = Annotated[
    bool, typer.Option("--names", help="Tell each image's file name in results (folders of your own images only).")
]
AllowNoCrc = Annotated[
    bool, typer.Option("--allow-no-crc", help="Live: take OpenIGTLink images of a sender that writes no CRC.")
]
ConnectTimeout = Annotated[
    float | None, typer.Option(min=0.1, help="Live: give up (exit code 6) after so many seconds without a frame.")
]
CONNECT_TIMEOUT_S = 30.0
"""Of ``run`` on a live source, where none is given; ``live`` waits, since its page tells what it waits for."""
Drift = Annotated[
    bool | None, typer.Option(help="Compare frames with the calibration frames. Default: where the bundle can.")
]
NoSecondPass = Annotated[
    bool, typer.Option("--no-second-pass", help="Never look twice at a frame; every result says so.")
]
RequireSigned = Annotated[
    Path | None,
    typer.Option(help="Trust store: refuse a bundle that none of its keys signed (see docs/trust/signing.md)."),
]
DeviceClass = Annotated[str | None, typer.Option(help="Class of this device, for bundles signed for one class.")]
FullDepth = Annotated[bool, typer.Option("--full-depth", help="Never stop at an early exit.")]


def read_bundles(typed: Sequence[str]) -> tuple[tuple[str, Path], ...]:
    """Names and folders of bundles as typed.

    Args:
        typed: ``FOLDER`` or ``NAME=FOLDER`` each.

    Returns:
        Name and folder of each; the name is empty where none was typed.
    """
    from tinyusfm_runtime.live.models import is_model_name

    found = []
    for text in typed:
        name, sign, folder = text.partition("=")
        named = bool(sign) and is_model_name(name) and not Path(text).exists()
        found.append((name, Path(folder)) if named else ("", Path(text)))
    return tuple(found)


def trust_of(folder: Path | None, device_class: str | None) -> Trust | None:
    """What ``--require-signed`` and ``--device-class`` demand of a bundle, or None.

    Raises:
        InputError: the trust store cannot be read, or a class is given without one.
    """
    from tinyusfm_runtime.trust.policy import Trust

    if folder is None and device_class is not None:
        raise InputError("--device-class goes with --require-signed")
    return None if folder is None else Trust.open(folder, device_class=device_class)


@dataclass(frozen=True, kw_only=True, slots=True)
class ChosenArtefact:
    """Which artefact answers and how its engine runs.

    Attributes:
        target: of the artefact, or None for the first that fits.
        precision: of the artefact, or None for the first that fits.
        threads: inside the engine, or None for the runtime's default.
        cpus: CPUs that the engine is pinned to, or None.
    """

    target: str | None = None
    precision: str | None = None
    threads: int | None = None
    cpus: tuple[int, ...] | None = None


def chosen_artefact(
    recipe: str | None, bundle: Path, target: str | None, precision: str | None, threads: int | None
) -> ChosenArtefact:
    """The options as typed, and where they are silent those of a recipe.

    Args:
        recipe: name or file, or None.
        bundle: the bundle's folder, or the name of a shipped one.
        target: as typed.
        precision: as typed.
        threads: as typed.

    Raises:
        InputError: no such recipe, or the bundle holds no artefact that it asks for.
        BundleError: the bundle cannot be used.
    """
    if recipe is None:
        return ChosenArtefact(target=target, precision=precision, threads=threads)
    from tinyusfm_export.recipe import load_recipe
    from tinyusfm_runtime.bundle.reader import open_trusted

    found = load_recipe(recipe)
    if target is None and precision is None:
        artefact = found.artefact_of(open_trusted(bundle, None).manifest.artefacts)
        target, precision = artefact.target, artefact.variant
    return ChosenArtefact(target=target, precision=precision, threads=threads or found.threads, cpus=found.cpus or None)


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceOptions:
    """How a source is opened.

    Attributes:
        crop: part of every frame, ``region``, or None for all of it.
        spacing_mm: (row, column) spacing, or None for the source's own.
        window: codes that become black and white, or None for the file's own.
        allow_no_crc: also take OpenIGTLink messages without a checksum.
        names: frames carry the name of their file.
    """

    crop: tuple[int, int, int, int] | str | None = None
    spacing_mm: tuple[float, ...] | None = None
    window: tuple[float, ...] | None = None
    allow_no_crc: bool = False
    names: bool = False

    def open(self, location: str) -> FrameSource:
        """Opens a source.

        An option that was not given is not handed over, since not every source has it.

        Raises:
            InputError: no such source, or an option that it does not have.
        """
        from tinyusfm_runtime.sources import open_source

        given = {
            "spacing_mm": self.spacing_mm,
            "window": self.window,
            "allow_no_crc": self.allow_no_crc or None,
            "names": self.names or None,
        }
        return open_source(location, crop=self.crop, **{k: v for k, v in given.items() if v is not None})


def source_options(
    crop: str | None,
    spacing: str | None,
    window: str | None = None,
    allow_no_crc: bool = False,
    names: bool = False,
) -> SourceOptions:
    """What a source is opened with, as typed.

    Raises:
        InputError: no such crop, spacing or window.
    """
    return SourceOptions(
        crop=console.crop(crop),
        spacing_mm=numbers(spacing, 2, "--spacing ROW,COL in mm") if spacing else None,
        window=numbers(window, 2, "--window LO,HI in codes") if window else None,
        allow_no_crc=allow_no_crc,
        names=names,
    )


def open_stream(location: str, options: SourceOptions) -> FrameSource:
    """Opens a source that a command can read by itself.

    Args:
        location: as typed.
        options: see ``source_options``.

    Raises:
        InputError: a source that only a program can feed, or one that does not exist.
    """
    from tinyusfm_runtime.sources.push import PushSource

    if ":" not in location and not Path(location).exists():
        raise InputError(
            f"{location} does not exist: give a folder of images, a DICOM, MetaImage or video file, or a probe"
        )
    source = options.open(location)
    inner = getattr(source, "source", source)
    if isinstance(inner, PushSource):
        raise InputError(
            f"{location.partition(':')[0]}: is fed by a program that calls it, which a command cannot be: "
            "give igtl://HOST:PORT, shm:NAME, camera:N or a file, or use the source from Python"
        )
    return source


__all__ = [
    "CONNECT_TIMEOUT_S",
    "AllowNoCrc",
    "AllowUnverified",
    "Bundles",
    "ChosenArtefact",
    "ConnectTimeout",
    "Crop",
    "DeviceClass",
    "Drift",
    "Fallback",
    "FullDepth",
    "Isolate",
    "Names",
    "NoSecondPass",
    "Precision",
    "Recipe",
    "RequireSigned",
    "Rules",
    "Sinks",
    "Smooth",
    "SourceOptions",
    "Spacing",
    "Target",
    "Threads",
    "Window",
    "chosen_artefact",
    "open_stream",
    "read_bundles",
    "source_options",
    "trust_of",
]
