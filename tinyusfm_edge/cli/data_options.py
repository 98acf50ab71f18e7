"""How a data folder is read, as options.

The same ones stand behind every command that takes a folder.

A command declares ``reading: Reading`` and is wrapped by ``reads_data``; typer then shows the options below in its
place. It does not read anything.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from tinyusfm_edge.cli import console
from tinyusfm_edge.data.doubts import Doubts
from tinyusfm_edge.data.folder import split_names
from tinyusfm_edge.data.reading import Reading, make_reading
from tinyusfm_runtime.errors import InputError

PANEL = "How the data is read"
_OPTIONS: dict[str, Any] = {
    "columns": Annotated[
        str | None,
        typer.Option(
            rich_help_panel=PANEL,
            metavar="OURS=THEIRS,...",
            help="Other names of the table's columns, such as file=image,split=fold.",
        ),
    ],
    "follow_links": Annotated[
        bool,
        typer.Option("--follow-links", rich_help_panel=PANEL, help="Links in the folder may lead out of it."),
    ],
    "mask_value": Annotated[
        str | None,
        typer.Option(
            rich_help_panel=PANEL,
            metavar="VALUE,...",
            help="Foreground of masks: 1, 1-3, 255 or '#ff0000'. Default: the larger of two values.",
        ),
    ],
    "classes": Annotated[
        str | None,
        typer.Option(
            rich_help_panel=PANEL,
            metavar="NAME=VALUE,...",
            help="Classes of masks, such as head=1,abdomen=2: all of them are foreground, other values an error.",
        ),
    ],
    "fill_outline": Annotated[
        bool | None,
        typer.Option(
            "--fill-outline/--no-fill-outline",
            rich_help_panel=PANEL,
            help="Fill masks that are outlines, or take them as they are. Default: refuse them.",
        ),
    ],
    "window": Annotated[
        str | None,
        typer.Option(
            rich_help_panel=PANEL,
            metavar="LO,HI",
            help="Codes that become black and white, for images of more than 8 bits. Default: refuse them.",
        ),
    ],
}


def reads_data(command: Callable[..., Any]) -> Callable[..., Any]:
    """Puts the options in the place of a command's parameter ``reading``.

    Args:
        command: has a parameter ``reading``; every other one has a default or is given by name.
    """
    signature = inspect.signature(command, eval_str=True)
    kept = [parameter for name, parameter in signature.parameters.items() if name != "reading"]
    added = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=False if name == "follow_links" else None,
            annotation=annotation,
        )
        for name, annotation in _OPTIONS.items()
    ]

    @functools.wraps(command)
    def wrapped(**given: Any) -> Any:
        check_places(given.get("data"))
        asked = {name: given.pop(name, False if name == "follow_links" else None) for name in _OPTIONS}
        doubts = Doubts(lambda line: console.note(f"note: doubtful input: {line}"))
        done = command(**given, reading=replace(make_reading(**asked), doubts=doubts))
        if doubts:
            console.end_with_doubts()
        return done

    plain = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in kept]
    wrapped.__signature__ = inspect.Signature([*plain, *added])  # type: ignore[attr-defined]
    wrapped.__annotations__ = {**{p.name: p.annotation for p in plain}, **_OPTIONS, "return": Any}
    return wrapped


def check_places(places: object) -> None:
    """Refuses folders and files that are not there, in the same words everywhere.

    Args:
        places: what was given as ``--data``: a path, or several with commas between; None is nothing.

    Raises:
        InputError: one does not exist.
    """
    if places is not None:
        names = [str(places)] if isinstance(places, Path) else split_names(str(places))
        for name in names:
            if not Path(name).exists():
                raise InputError(f"{name} does not exist: give a folder with images, with or without a split.csv")


def print_table_notes(folder: Path, need: Literal["mask", "label"] | None, reading: Reading) -> None:
    """Notes what was guessed about a table, and which of its rows are not used.

    Args:
        folder: holds the table.
        need: what a row must have to be used, or None.
        reading: how it is read.

    Raises:
        InputError: no table that can be used.
    """
    from tinyusfm_edge.data.table import table_notes

    for line in table_notes(folder, need, reading):
        console.note(f"note: {line}")


__all__ = ["PANEL", "check_places", "print_table_notes", "reads_data"]
