"""How settings are given: ``--config``, ``--set`` and ``--show-config``.

They are the same in every training command.

Options on the line win over ``--set``, which wins over ``--config``. What can be refused without torch is refused here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from tinyusfm_edge.cli import console
from tinyusfm_edge.settings import parse_change, read_settings
from tinyusfm_runtime.errors import InputError

Config = Annotated[Path | None, typer.Option(help="JSON of settings; --set and options on the line win.")]
Changes = Annotated[
    list[str] | None,
    typer.Option("--set", help="One setting over --config; repeat. --show-config lists all of them."),
]
ShowConfig = Annotated[bool, typer.Option("--show-config", help="Print the settings as JSON and stop.")]


def check_settings(config: Path | None, changes: Sequence[str] | None) -> None:
    """Refuses a file that cannot be read, and what is no ``key=value``.

    Raises:
        InputError: one of them.
    """
    read_settings(config)
    for change in changes or ():
        parse_change(change)


def check_choice(option: str, value: str, choices: Sequence[str]) -> None:
    """Refuses what is none of the choices.

    Args:
        option: as it is typed.
        value: what was given.
        choices: what may be.

    Raises:
        InputError: none of them.
    """
    if value not in choices:
        raise InputError(f"{option} {value}: use {', '.join(choices)}")


def show(settings: Mapping[str, Any]) -> None:
    """Prints settings as JSON that ``--config`` takes."""
    console.say(json.dumps(settings, indent=1))


__all__ = ["Changes", "Config", "ShowConfig", "check_choice", "check_settings", "show"]
