"""``tinyusfm-edge gate show``: every threshold of the gate, as a file to edit.

Each says what it means and for which task.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tinyusfm_edge.cli import console
from tinyusfm_edge.cli.output import SILENT, ReportOutput, reports
from tinyusfm_edge.cli.panels import show_help_alone

gate = typer.Typer(help="Thresholds that an artefact must hold.")


@gate.callback(invoke_without_command=True)
def _gate(context: typer.Context) -> None:
    """Thresholds that an artefact must hold."""
    show_help_alone(context)


@gate.command(epilog="Example: tinyusfm-edge gate show > gate.toml")
@reports("gate show")
def show(
    file: Annotated[Path | None, typer.Argument(help="Gate file (.toml or .json). Default: the default gate.")] = None,
    output: ReportOutput = SILENT,
) -> None:
    """Print the gate as TOML with every key explained."""
    from tinyusfm_export.verify.gate import GATE_KEYS, Gate, gate_toml

    chosen, plain = Gate.from_file(file) if file is not None else Gate(), Gate()
    keys = {
        key: {"value": getattr(chosen, key), "default": getattr(plain, key), "judged_for": task, "meaning": meaning}
        for key, (task, meaning) in GATE_KEYS.items()
    }
    output.result({"kind": "tinyusfm-edge gate", "keys": keys})
    console.say(gate_toml(chosen).rstrip())
    # what is printed is a file: the next command goes where it does not end up in it
    console.note("next: tinyusfm-edge export my_student.safetensors --gate gate.toml")
